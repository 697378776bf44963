"""The objective against its closed-form minimum; its randomness against the stream's contract."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfm_jax.errors import UserError
from lfm_jax.flow import draw_latents, draw_times, flow_matching_loss, interpolate, target
from lfm_jax.flow.path import data_estimate, noise_estimate, score

SIGMA = 0.7


class Optimal(nn.Module):
    """The minimiser for data N(0, s^2 I): v*(x, t) = (t - (1-t) s^2) / ((1-t)^2 s^2 + t^2) x."""

    factor: float = 1.0

    @nn.compact
    def __call__(self, x, t, cond, train=False):
        t = t[:, None, None, None]
        v = (t - (1 - t) * SIGMA**2) / ((1 - t) ** 2 * SIGMA**2 + t**2) * x
        return self.factor * v


def gaussian_batch(count, start=0):
    """Moments of N(0, sigma^2): mean 0, log-variance 2 log sigma."""
    moments = np.zeros((count, 4, 4, 4), np.float16)
    moments[..., 2:] = 2 * np.log(SIGMA)
    return {
        "moments": jnp.asarray(moments),
        "label": jnp.arange(count) % 10,
        "position": jnp.arange(start, start + count, dtype=jnp.uint32),
    }


def test_minimum_for_gaussian_data_is_sigma_pi_over_two():
    batch, key = gaussian_batch(8192), jax.random.key(0)

    def value(factor):
        loss = flow_matching_loss(Optimal(factor), scale=1.0)
        return float(jax.jit(loss)({}, batch, key)[0])

    best = value(1.0)
    assert best == pytest.approx(SIGMA * np.pi / 2, rel=0.01)
    assert value(0.0) == pytest.approx(1 + SIGMA**2, rel=0.01)  # no output: the target's power
    assert best < value(0.95) and best < value(1.05)


def test_scale_and_shift_act_on_the_posterior_sample():
    batch, key = gaussian_batch(4), jax.random.key(1)
    plain = draw_latents(batch, key, scale=1.0)
    np.testing.assert_allclose(
        draw_latents(batch, key, scale=0.5, shift=2.0), (plain - 2.0) * 0.5, atol=1e-6
    )


def test_an_example_draws_by_its_position_alone():
    key = jax.random.key(2)
    loss = jax.jit(flow_matching_loss(Optimal(), scale=1.0))
    whole = draw_latents(gaussian_batch(6), key, scale=1.0)
    part = draw_latents(gaussian_batch(2, start=4), key, scale=1.0)
    np.testing.assert_array_equal(whole[4:], part)
    losses = [loss({}, gaussian_batch(2, start), key)[0] for start in (0, 2, 4)]
    assert np.mean(losses) == pytest.approx(float(loss({}, gaussian_batch(6), key)[0]), rel=1e-5)
    assert len({float(value) for value in losses}) == 3


def test_mirror_takes_half_of_the_encoded_mirror_images():
    batch = gaussian_batch(2000)
    mean = jnp.zeros((2000, 4, 4, 2))
    low = jnp.full((2000, 4, 4, 2), -30.0)
    batch["moments"] = jnp.concatenate([mean, low], -1)
    batch["moments_flip"] = jnp.concatenate([mean + 1, low], -1)
    z = draw_latents(batch, jax.random.key(0), scale=1.0, mirror=True)
    assert float(z.mean()) == pytest.approx(0.5, abs=0.04)
    del batch["moments_flip"]
    with pytest.raises(UserError, match="mirror"):
        draw_latents(batch, jax.random.key(0), scale=1.0, mirror=True)


def test_labels_are_dropped_to_the_null_class_at_the_stated_rate():
    count, classes, drop = 4000, 10, 0.25
    batch = gaussian_batch(count)
    batch["label"] = jnp.where(jnp.arange(count) < 4, -1, 3)
    seen = {}

    class Spy(nn.Module):
        @nn.compact
        def __call__(self, x, t, cond, train=False):
            seen["label"] = cond.label
            return jnp.zeros_like(x)

    loss = flow_matching_loss(Spy(), scale=1.0, num_classes=classes, label_drop=drop)
    loss({}, batch, jax.random.key(0))
    label = np.asarray(seen["label"])
    assert set(label) == {3, classes}
    assert (label[:4] == classes).all()  # unlabelled examples are the null class
    assert (label == classes).mean() == pytest.approx(drop, abs=0.025)


def test_times_have_the_named_distribution():
    keys = jax.random.split(jax.random.key(0), 20000)
    uniform = np.asarray(draw_times(keys))
    assert uniform.min() >= 0 and uniform.max() < 1
    assert uniform.mean() == pytest.approx(0.5, abs=0.01)
    assert uniform.var() == pytest.approx(1 / 12, abs=0.002)
    normal = np.asarray(draw_times(keys, time_sampling="logit_normal", logit_mean=1.0))
    logit = np.log(normal / (1 - normal))
    assert logit.mean() == pytest.approx(1.0, abs=0.03)
    assert logit.std() == pytest.approx(1.0, abs=0.03)


def test_path_and_its_estimates_agree():
    key0, key1 = jax.random.split(jax.random.key(0))
    x0, e = jax.random.normal(key0, (5, 3)), jax.random.normal(key1, (5, 3))
    t = jnp.linspace(0, 1, 5)
    x, u = interpolate(x0, e, t, sigma_min=0.0), target(x0, e, sigma_min=0.0)
    np.testing.assert_allclose(data_estimate(x, t, u), x0, atol=1e-6)
    np.testing.assert_allclose(noise_estimate(x, t, u), e, atol=1e-6)
    np.testing.assert_allclose(score(x, t, u)[1:], -(e / t[:, None])[1:], atol=1e-5)
    # With s > 0 the ends are x0 + s e and exactly e.
    np.testing.assert_allclose(interpolate(x0, e, t)[-1], e[-1], atol=1e-6)
    np.testing.assert_allclose(interpolate(x0, e, t)[0], x0[0] + 1e-5 * e[0], atol=1e-7)
    speed = jax.jvp(lambda s: interpolate(x0, e, s), (t,), (jnp.ones_like(t),))[1]
    np.testing.assert_allclose(speed, target(x0, e), atol=1e-5)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"time_sampling": "sobol"}, "uniform, logit_normal"),
        ({"label_drop": 1.0}, "label_drop"),
        ({"logit_std": 0.0}, "logit_std"),
    ],
)
def test_bad_options_are_named(options, named):
    with pytest.raises(UserError, match=named):
        flow_matching_loss(Optimal(), scale=1.0, **options)
