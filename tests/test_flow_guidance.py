"""Guidance: its formulas, its costs, its composition, and its absence bit for bit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_cases import Calls, Counting, Gaussian

from lfm_jax.conditions import guided
from lfm_jax.errors import UserError
from lfm_jax.flow import (
    LogProbability,
    NetworkVelocity,
    autoguidance,
    classifier_free,
    classifier_guidance,
    sample,
    with_label,
)
from lfm_jax.flow.path import expand
from lfm_jax.models import NAMES, create_model
from lfm_jax.models.conditioning import Cond

CLASSES = 3
X = jax.random.normal(jax.random.key(0), (4, 2, 2, 4))
T = jnp.asarray([0.1, 0.4, 0.6, 0.95])


class Table(nn.Module):
    """A velocity that depends on the label, as a network's does."""

    num_classes: int = CLASSES

    @nn.compact
    def __call__(self, x, t, cond, train=False):
        row = nn.Embed(self.num_classes + 1, 4)(cond.label)
        return jnp.sin(x + row[:, None, None, :]) * (1 + expand(t, x))


MODEL = Table()
LABEL = jnp.asarray([0, 1, 2, 1])
PARAMS = MODEL.init(jax.random.key(1), X, T, Cond(label=LABEL))["params"]
VELOCITY = NetworkVelocity(params=PARAMS, model=MODEL, cond=Cond(label=LABEL))
NULL = with_label(VELOCITY, CLASSES)


def test_scale_one_is_the_conditional_velocity_bit_for_bit():
    guided = classifier_free(VELOCITY, num_classes=CLASSES, scale=1.0)
    assert guided is VELOCITY and guided.network_calls == 1
    np.testing.assert_array_equal(
        sample(guided, X, num_steps=3)[0], sample(VELOCITY, X, num_steps=3)[0]
    )


def test_classifier_free_extrapolates_from_the_null_class():
    expected = NULL(X, T) + 2.5 * (VELOCITY(X, T) - NULL(X, T))
    joint = classifier_free(VELOCITY, num_classes=CLASSES, scale=2.5)
    apart = classifier_free(VELOCITY, NULL, scale=2.5)
    np.testing.assert_allclose(joint(X, T), expected, atol=1e-5)
    np.testing.assert_allclose(apart(X, T), expected, atol=1e-5)
    assert joint.network_calls == apart.network_calls == 2
    _, stats = sample(joint, X, solver="heun", num_steps=3)
    assert int(stats["nfe"][0]) == 6 and int(stats["network_calls"]) == 12


def test_per_sample_error_control_sees_the_right_labels():
    guided = classifier_free(VELOCITY, num_classes=CLASSES, scale=2.0)
    options = {"solver": "bosh3", "rtol": 1e-4, "atol": 1e-4}
    together, _ = sample(guided, X, **options)
    row = VELOCITY.replace(cond=Cond(label=LABEL[2:3]))
    alone, _ = sample(classifier_free(row, num_classes=CLASSES, scale=2.0), X[2:3], **options)
    np.testing.assert_allclose(together[2:3], alone, atol=1e-5)


def test_channels_interval_and_rescale():
    plain = classifier_free(VELOCITY, num_classes=CLASSES, scale=2.0)(X, T)
    v = VELOCITY(X, T)
    some = classifier_free(VELOCITY, num_classes=CLASSES, scale=2.0, channels=3)(X, T)
    np.testing.assert_allclose(some[..., :3], plain[..., :3], atol=1e-6)
    np.testing.assert_allclose(some[..., 3], v[..., 3], atol=1e-6)
    inside = classifier_free(VELOCITY, num_classes=CLASSES, scale=2.0, interval=(0.3, 0.7))
    assert inside.network_calls == 2  # both are executed at every time
    np.testing.assert_allclose(inside(X, T)[1:3], plain[1:3], atol=1e-6)
    np.testing.assert_allclose(inside(X, T)[::3], v[::3], atol=1e-6)
    scaled = classifier_free(VELOCITY, num_classes=CLASSES, scale=2.0, rescale=1.0)(X, T)
    np.testing.assert_allclose(jnp.std(scaled, (1, 2, 3)), jnp.std(v, (1, 2, 3)), rtol=1e-5)


def test_another_scale_does_not_compile_again():
    traces = []

    @jax.jit
    def program(velocity, x):
        traces.append(1)
        return velocity(x, T)

    program(classifier_free(VELOCITY, num_classes=CLASSES, scale=2.0), X)
    program(classifier_free(VELOCITY, num_classes=CLASSES, scale=3.0), X)
    assert len(traces) == 1


def test_autoguidance_extrapolates_from_another_checkpoint():
    worse = jax.tree.map(lambda p: 0.5 * p, PARAMS)
    weak = VELOCITY.replace(params=worse)
    guided = autoguidance(VELOCITY, weak, scale=3.0)
    expected = weak(X, T) + 3.0 * (VELOCITY(X, T) - weak(X, T))
    np.testing.assert_allclose(guided(X, T), expected, atol=1e-5)
    assert guided.network_calls == 2


class ExactClassifier(nn.Module):
    """p(c | x_t) of two equal Gaussians N(+-m, s^2) on the straight path, in closed form."""

    mean: float
    std: float

    @nn.compact
    def __call__(self, x, t):
        variance = (1 - t) ** 2 * self.std**2 + t**2
        half = (1 - t) * self.mean * jnp.sum(x, axis=(1, 2, 3)) / variance
        return jnp.stack([half, -half], axis=-1)


def test_classifier_guidance_turns_the_mixture_into_its_class():
    """v of the mixture - t/(1-t) grad log p(c|x) is the velocity of the class alone."""
    mean, std = 0.8, 0.6
    log_p = LogProbability(
        params={}, label=jnp.zeros(4, jnp.int32), model=ExactClassifier(mean=mean, std=std)
    )
    kinds = [Gaussian(mean=jnp.asarray(m), std=jnp.asarray(std)) for m in (mean, -mean)]
    p = jax.nn.softmax(log_p.model.apply({}, X, T))
    mixture_v = sum(expand(p[:, i], X) * kinds[i](X, T) for i in range(2))

    import flax.struct

    @flax.struct.dataclass
    class Fixed:
        v: jax.Array
        t_max: float = 1.0
        network_calls: int = 1

        def __call__(self, x, t):
            return self.v

    guided = classifier_guidance(Fixed(v=mixture_v), log_p, scale=1.0, max_weight=100.0)
    np.testing.assert_allclose(guided(X, T), kinds[0](X, T), atol=1e-4)
    assert guided.network_calls == 2
    bounded = classifier_guidance(Fixed(v=mixture_v), log_p, scale=1.0, max_weight=2.0)
    np.testing.assert_allclose(bounded(X, T)[:3], guided(X, T)[:3], atol=1e-5)
    shrunk = (bounded(X, T) - mixture_v)[3] / (guided(X, T) - mixture_v)[3]
    np.testing.assert_allclose(shrunk, 2.0 / (0.95 / 0.05), rtol=1e-3)
    # At t = 1 the weight would be infinite.
    assert bool(jnp.isfinite(bounded(X, jnp.ones(4))).all())
    assert classifier_guidance(kinds[0], log_p, scale=0) is kinds[0]


def test_guidances_compose_and_count_what_they_execute():
    calls = Calls()
    strong = Counting(inner=Gaussian(mean=jnp.asarray(0.3), std=jnp.asarray(0.5)), calls=calls)
    weak = Counting(inner=Gaussian(mean=jnp.asarray(0.0), std=jnp.asarray(1.0)), calls=calls)
    log_p = LogProbability(
        params={}, label=jnp.zeros(4, jnp.int32), model=ExactClassifier(mean=0.8, std=0.6)
    )
    guided = classifier_guidance(
        autoguidance(
            classifier_free(strong, weak, scale=2.0), weak, scale=1.5, interval=(0.2, 0.8)
        ),
        log_p,
        scale=0.1,
    )
    assert guided.network_calls == 4
    _, stats = sample(guided, X, solver="heun", num_steps=2)
    assert int(stats["network_calls"]) == 16
    assert calls.take() == 12  # beside the classifier's 4


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda: classifier_free(NetworkVelocity(params={}, model=Table(0)), scale=2.0), "null"),
        (lambda: classifier_free(VELOCITY, num_classes=7, scale=2.0), "null label 7"),
        (lambda: classifier_free(VELOCITY, NULL, scale=-1.0), "-1"),
        (lambda: classifier_free(VELOCITY, NULL, scale=2.0, channels=0), "channels"),
        (lambda: classifier_free(VELOCITY, NULL, scale=2.0, interval=(0.7, 0.3)), "interval"),
        (lambda: classifier_free(VELOCITY, NULL, scale=2.0, rescale=1.5), "rescale"),
        (lambda: classifier_guidance(VELOCITY, None, scale=1.0, max_weight=0.0), "max_weight"),
        (lambda: with_label(VELOCITY, 9), "9 is not in 0..3"),
    ],
)
def test_bad_options_are_named(make, named):
    with pytest.raises(UserError, match=named):
        make()


@pytest.mark.parametrize("name", sorted({n.partition("-")[0] for n in NAMES}))
def test_every_network_without_classes_refuses_guidance_in_a_line(name):
    fields = {"null_row": True} if name == "DiT" else {}  # LFM's: a row, but no label to drop
    velocity = NetworkVelocity(params={}, model=create_model(name, **fields), cond=Cond())
    for options in ({}, {"num_classes": 0}, {"num_classes": 10}):
        with pytest.raises(UserError, match=r"guidance: 2 needs .*null label.*0 classes"):
            classifier_free(velocity, scale=2.0, **options)
    with pytest.raises(UserError, match=r"guidance: 2 needs .*null label.*no classes"):
        guided(velocity, Cond(), label_scale=2.0)
    assert classifier_free(velocity, scale=1.0) is velocity
