"""Stochastic sampling: marginals on a Gaussian, the noiseless limit, per-sample noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_cases import Calls, Counting, Gaussian

from lfm_jax import rng
from lfm_jax.errors import UserError
from lfm_jax.flow import SDE_METHODS, sample, sample_sde
from lfm_jax.flow.sde import AdditiveNoise, Brownian, _drift

MEAN = jnp.asarray([1.0, -0.5])
STD = jnp.asarray([0.6, 1.3])
VELOCITY = Gaussian(mean=MEAN, std=STD)
COUNT = 4096


def draws(count, seed=0):
    positions = jnp.arange(count, dtype=jnp.uint32)
    key = jax.random.key(seed)
    noise = rng.normal(rng.stream_keys(key, rng.Stream.SAMPLE, positions), (2,))
    return noise, rng.stream_keys(key, rng.Stream.SDE, positions)


@pytest.mark.parametrize("method", SDE_METHODS)
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_mean_and_covariance_are_the_flow_s(method, eta):
    noise, keys = draws(COUNT)
    x, stats = sample_sde(VELOCITY, noise, keys, method=method, eta=eta, num_steps=48)
    x = np.asarray(x)
    assert bool(stats["finite"].all())
    # Standard errors are 0.02; the step's bias is of order 1/48.
    np.testing.assert_allclose(x.mean(0), MEAN, atol=0.07)
    # An ancestral step draws the posterior of a single datum: too little variance by O(step).
    tolerance = 0.2 if method == "ddim" else 0.1
    np.testing.assert_allclose(np.cov(x.T), np.diag(STD**2), atol=tolerance)


def test_noise_on_the_way_is_really_added():
    noise, keys = draws(512)
    for method in SDE_METHODS:
        x, _ = sample_sde(VELOCITY, noise, keys, method=method, eta=1.0, num_steps=32)
        correlation = np.corrcoef(np.asarray(x)[:, 0], np.asarray(noise)[:, 0])[0, 1]
        assert correlation < 0.6, method  # the ODE's is 1


def test_ddim_without_noise_is_euler():
    noise, keys = draws(8)
    x, stats = sample_sde(VELOCITY, noise, keys, method="ddim", eta=0.0, num_steps=10)
    euler, _ = sample(VELOCITY, noise, num_steps=10)
    np.testing.assert_allclose(x, euler, atol=1e-5)
    assert int(stats["nfe"][0]) == 10


@pytest.mark.parametrize("method", SDE_METHODS)
def test_counts_and_noise_of_a_sample_in_any_batch(method):
    calls = Calls()
    noise, keys = draws(6)
    velocity = Counting(inner=VELOCITY, calls=calls)
    x, stats = sample_sde(velocity, noise, keys, method=method, num_steps=5)
    expected = 9 if method == "heun" else 5
    assert calls.take() == int(stats["nfe"][0]) == int(stats["network_calls"]) == expected
    part, _ = sample_sde(VELOCITY, noise[4:], keys[4:], method=method, num_steps=5)
    np.testing.assert_allclose(x[4:], part, atol=1e-6)


def test_drift_is_finite_at_zero_and_the_noise_vanishes_there():
    x = jnp.ones((3, 2))
    drift = _drift(lambda args: args, 1.0, jnp.asarray(0.0), x, (VELOCITY, None))
    v = VELOCITY(x, jnp.zeros(3))
    np.testing.assert_allclose(drift, v + (x + v), atol=1e-6)
    noise = AdditiveNoise(eta=1.0, path=Brownian(keys=draws(3)[1], shape=(2,)))
    assert float(noise.vf(0.0, x, None)) == 0.0
    assert float(noise.vf(0.5, x, None)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"method": "milstein"}, "milstein.*euler_maruyama, heun, ddim"),
        ({"eta": -1.0}, "eta: -1"),
        ({"method": "ddim", "eta": 2.0}, "eta: 2"),
        ({"num_steps": 0}, "num_steps: 0"),
    ],
)
def test_bad_options_are_named(options, named):
    noise, keys = draws(2)
    with pytest.raises(UserError, match=named):
        sample_sde(VELOCITY, noise, keys, **options)
