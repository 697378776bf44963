"""Likelihood of a Gaussian flow, where it is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_cases import Gaussian

from lfm_jax.errors import UserError
from lfm_jax.flow import bits_per_dim, log_likelihood

MEAN, STD = 0.3, 0.5
VELOCITY = Gaussian(mean=jnp.asarray(MEAN), std=jnp.asarray(STD))
X = MEAN + STD * jax.random.normal(jax.random.key(0), (4, 2, 2, 3))
DIMS = 12


def exact():
    z = (X - MEAN) / STD
    return -0.5 * jnp.sum(z**2, (1, 2, 3)) - DIMS * (np.log(STD) + 0.5 * np.log(2 * np.pi))


def test_exact_trace_gives_the_gaussian_s_log_density():
    fixed, stats = log_likelihood(VELOCITY, X, num_steps=30)
    np.testing.assert_allclose(fixed, exact(), atol=2e-3)
    assert int(stats["nfe"][0]) == 120
    adaptive, stats = log_likelihood(VELOCITY, X, solver="dopri5", rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(adaptive, exact(), atol=2e-3)
    assert bool(stats["finite"].all())
    np.testing.assert_allclose(stats["noise"], (X - MEAN) / STD, atol=1e-3)


def test_hutchinson_is_exact_for_an_isotropic_jacobian_and_unbiased_otherwise():
    keys = jax.random.split(jax.random.key(1), 4)
    estimate, _ = log_likelihood(VELOCITY, X, keys, num_steps=30)
    np.testing.assert_allclose(estimate, exact(), atol=2e-3)

    import flax.struct

    @flax.struct.dataclass
    class Mixing:
        matrix: jax.Array
        t_max: float = flax.struct.field(pytree_node=False, default=1.0)

        def __call__(self, x, t):
            return x @ self.matrix

    matrix = jax.random.normal(jax.random.key(2), (3, 3)) / 3
    flow, x = Mixing(matrix=matrix), jnp.broadcast_to(X[:1], (64, 2, 2, 3))
    true, _ = log_likelihood(flow, X[:1], num_steps=10)
    # A linear flow's log-determinant is known: 4 pixels, each with the matrix's trace.
    x1 = (X[:1].reshape(4, 3) @ jax.scipy.linalg.expm(matrix)).ravel()
    known = -0.5 * (jnp.sum(x1**2) + DIMS * np.log(2 * np.pi)) + 4 * jnp.trace(matrix)
    assert float(true[0]) == pytest.approx(float(known), abs=1e-3)
    many = jax.random.split(jax.random.key(3), 64)
    estimates, _ = log_likelihood(flow, x, many, num_probes=8, num_steps=10)
    error = float(estimates.std()) / 8
    assert float(estimates.std()) > 0
    assert float(estimates.mean()) == pytest.approx(float(true[0]), abs=4 * error)


def test_bits_per_dim_of_unscaled_latents():
    bits = bits_per_dim(exact(), DIMS)
    assert float(bits.mean()) == pytest.approx(np.log2(STD * np.sqrt(2 * np.pi * np.e)), abs=0.3)
    # Latents before scaling by 1/2 are twice as wide: one bit more.
    np.testing.assert_allclose(bits_per_dim(exact(), DIMS, scale=0.5), bits + 1, rtol=1e-6)


@pytest.mark.parametrize(
    "velocity, options, named",
    [
        (VELOCITY.replace(t_max=0.99), {}, "t = 0.99"),
        (VELOCITY, {"num_probes": 0}, "num_probes"),
        (VELOCITY, {"solver": "exp2"}, "noise to data only"),
    ],
)
def test_bad_options_are_named(velocity, options, named):
    with pytest.raises(UserError, match=named):
        log_likelihood(velocity, X, **options)
