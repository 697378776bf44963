"""The learning rate follows its formula; the clip acts before AdamW."""

import jax.numpy as jnp
import numpy as np
import pytest

from lfm_jax.optim import adamw, learning_rate


def test_warm_up_then_cosine_to_an_absolute_floor():
    rate = learning_rate(1e-3, steps=110, warmup_steps=10, schedule="cosine", final=1e-5)
    assert float(rate(0)) == 0.0
    np.testing.assert_allclose(rate(5), 5e-4, rtol=1e-5)
    np.testing.assert_allclose(rate(10), 1e-3, rtol=1e-5)
    np.testing.assert_allclose(rate(60), 1e-5 + (1e-3 - 1e-5) / 2, rtol=1e-4)
    np.testing.assert_allclose(rate(110), 1e-5, rtol=1e-4)


def test_constant_stays():
    rate = learning_rate(2e-4, steps=100)
    assert float(rate(0)) == float(rate(1000)) == pytest.approx(2e-4)


def test_a_clipped_gradient_has_the_clip_as_norm():
    tx = adamw(learning_rate(1.0, steps=10), b1=0.0, b2=0.0, grad_clip=0.5)
    params = {"w": jnp.array([3.0, 4.0])}
    _, state = tx.update({"w": jnp.array([30.0, 40.0])}, tx.init(params), params)
    moments = next(s for s in state[1] if hasattr(s, "mu"))
    np.testing.assert_allclose(jnp.linalg.norm(moments.mu["w"]), 0.5, rtol=1e-5)
