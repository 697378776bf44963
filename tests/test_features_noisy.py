"""The classifier of noisy latents: what it sees, and its loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfm_jax.features.noisy import NoisyClassifier
from lfm_jax.flow import noisy_classifier_loss

MODEL = NoisyClassifier(num_classes=3, width=8)
X = jax.random.normal(jax.random.key(0), (4, 8, 8, 2))


@pytest.fixture(scope="module")
def params():
    fresh = MODEL.init(jax.random.key(1), X, jnp.ones(4))["params"]
    # A fresh block is the identity: its last convolution is zero.
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda p: p + 0.1 * draw.normal(size=p.shape).astype(p.dtype), fresh)


def test_logits_depend_on_the_time_and_on_their_own_row_alone(params):
    t = jnp.asarray([0.1, 0.4, 0.7, 1.0])
    logits = MODEL.apply({"params": params}, X, t)
    assert logits.shape == (4, 3) and logits.dtype == jnp.float32
    other = MODEL.apply({"params": params}, X, t.at[0].set(0.9))
    np.testing.assert_allclose(other[1:], logits[1:], atol=1e-5)
    assert float(jnp.abs(other[0] - logits[0]).max()) > 1e-3


def test_any_latent_size_ends_at_four_positions_a_side():
    for side, levels in ((4, 1), (6, 1), (16, 3)):
        shapes = jax.eval_shape(
            MODEL.init, jax.random.key(0), jnp.ones((1, side, side, 2)), X[:1, 0, 0, 0]
        )
        convolutions = [name for name in shapes["params"] if name.startswith("Conv_")]
        assert len(convolutions) == 2 * levels


def test_latents_without_a_label_do_not_teach(params):
    loss = noisy_classifier_loss(MODEL, scale=0.5)
    moments = jnp.concatenate([X, jnp.full_like(X, -30.0)], axis=-1)
    position = jnp.arange(4, dtype=jnp.uint32)
    batch = {"moments": moments, "position": position, "label": jnp.asarray([0, 2, 1, -1])}
    key = jax.random.key(2)
    whole, metrics = loss(params, batch, key)
    rest = jax.tree.map(lambda a: a[:3], batch)
    alone, _ = loss(params, rest, key)
    assert float(whole) == pytest.approx(float(alone), rel=1e-5)
    assert 0 <= float(metrics["accuracy"]) <= 1
    none = {**batch, "label": jnp.full(4, -1)}
    assert float(loss(params, none, key)[0]) == 0
