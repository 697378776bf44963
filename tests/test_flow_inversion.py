"""The way up and back, and what is done at the top."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_cases import Gaussian

from lfm_jax.errors import UserError
from lfm_jax.flow import (
    interpolate_samples,
    invert,
    invert_through,
    noised,
    reconstruction_errors,
    sample,
    sample_through,
    slerp,
    switch_class,
)

VELOCITY = Gaussian(mean=jnp.asarray(0.3), std=jnp.asarray(0.5))
NOISE = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
DATA = VELOCITY.solution(NOISE)


def test_inversion_finds_the_noise_and_any_time_between():
    noise, stats = invert(VELOCITY, DATA, solver="rk4", num_steps=20)
    np.testing.assert_allclose(noise, NOISE, atol=1e-3)
    assert int(stats["nfe"][0]) == 80
    half, _ = invert(VELOCITY, DATA, t=0.4, rtol=1e-5, solver="dopri5")
    np.testing.assert_allclose(half, VELOCITY.solution(NOISE, 0.4), atol=1e-4)
    back, _ = sample(VELOCITY, half, t_start=0.4, rtol=1e-5, solver="dopri5")
    np.testing.assert_allclose(back, DATA, atol=2e-4)


def test_reconstruction_error_falls_at_second_order():
    rows = reconstruction_errors(VELOCITY, DATA, num_steps=(8, 16))
    assert [row["nfe"] for row in rows] == [32, 64]
    assert rows[0]["relative"] > rows[0]["rmse"] * 0  # both are reported
    # The midpoint rule up and down: the leading errors cancel, so at least order two remains.
    assert np.log2(rows[0]["rmse"] / rows[1]["rmse"]) > 1.7


def test_slerp_keeps_the_norm_and_the_ends():
    a, b = NOISE, jax.random.normal(jax.random.key(1), NOISE.shape)
    np.testing.assert_allclose(slerp(a, b, 0.0), a, atol=1e-6)
    np.testing.assert_allclose(slerp(a, b, 1.0), b, atol=1e-6)
    middle = slerp(a, b, 0.5)

    def norm(x):
        return jnp.sqrt(jnp.sum(x**2, (1, 2, 3)))

    np.testing.assert_allclose(norm(middle), (norm(a) + norm(b)) / 2, rtol=1e-5)
    np.testing.assert_allclose(slerp(a, a, 0.3), a, atol=1e-5)
    gradient = jax.grad(lambda y: slerp(a, y, 0.5).sum())(a)
    assert bool(jnp.isfinite(gradient).all())


def test_interpolation_goes_from_one_sample_to_the_other():
    other = jax.random.normal(jax.random.key(1), NOISE.shape)
    strip = interpolate_samples(VELOCITY, NOISE, other, count=3, num_steps=4)
    assert strip.shape == (3, *NOISE.shape)
    np.testing.assert_allclose(strip[0], sample(VELOCITY, NOISE, num_steps=4)[0], atol=1e-5)
    np.testing.assert_allclose(strip[-1], sample(VELOCITY, other, num_steps=4)[0], atol=1e-5)


def test_class_switch_moves_every_sample_to_the_other_class():
    """A network whose class c is N(m_c, s^2): the switch is the exact map between two Gaussians."""
    import flax.linen as nn

    from lfm_jax.flow import NetworkVelocity
    from lfm_jax.models.conditioning import Cond

    class Two(nn.Module):
        num_classes: int = 2

        @nn.compact
        def __call__(self, x, t, cond, train=False):
            mean = jnp.asarray([-1.0, 1.0, 0.0])[cond.label][:, None, None, None]
            return Gaussian(mean=mean, std=jnp.asarray(0.5))(x, t)

    velocity = NetworkVelocity(params={}, model=Two(), cond=Cond(label=jnp.zeros(3, jnp.int32)))
    data = -1.0 + 0.5 * NOISE
    x, stats = switch_class(velocity, data, 1, num_steps=40)
    np.testing.assert_allclose(x, data + 2.0, atol=1e-2)
    assert int(stats["nfe"][0]) == 160
    with pytest.raises(UserError, match="5 is not in"):
        switch_class(velocity, data, 5)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"solver": "exp2"}, "noise to data only"),
        ({"t": 1.2}, "within"),
        ({"t": 0.0}, "within"),
        ({"rtol": -1.0}, "rtol"),
        ({"t": 0.8, "grid": (0.5, 0.25, 0.0)}, "begin at 0.5; expected t=0.8"),
    ],
)
def test_bad_options_are_named(options, named):
    with pytest.raises(UserError, match=named):
        invert(VELOCITY, DATA, **options)


def test_all_times_on_the_way_in_one_solve():
    times = (0.3, 0.6, 1.0)
    up = invert_through(VELOCITY, DATA, times, solver="rk4", num_steps=20)
    down = sample_through(VELOCITY, NOISE, times, solver="rk4", num_steps=20)
    for i, t in enumerate(times):
        np.testing.assert_allclose(up[i], VELOCITY.solution(NOISE, t), atol=1e-3)
        np.testing.assert_allclose(down[i], VELOCITY.solution(NOISE, t), atol=1e-3)
    assert sample_through(VELOCITY, NOISE, (0.5,), num_steps=4).shape == (1, *NOISE.shape)
    for wrong in ((0.6, 0.3), (), (0.5, 1.5), (0.0, 0.5)):
        with pytest.raises(UserError, match="must rise"):
            invert_through(VELOCITY, DATA, wrong)


def test_noised_states_have_the_marginal_of_the_path():
    data = jnp.full((2000, 4), 2.0)
    keys = jax.random.split(jax.random.key(3), 2000)
    states = noised(data, keys, t=0.25)
    assert abs(float(states.mean()) - 1.5) < 0.02 and abs(float(states.std()) - 0.25) < 0.01
    np.testing.assert_array_equal(noised(data[7:9], keys[7:9], t=0.25), states[7:9])
