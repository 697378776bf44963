"""The train step: accumulation, averaging, donation, and losses that are not finite."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lfm_jax import sharding
from lfm_jax.state import create_state, make_step


def _init():
    return {"w": jnp.arange(12.0).reshape(4, 3) / 10, "b": jnp.zeros(3)}


def _loss(params, batch, key):
    del key
    error = batch["x"] @ params["w"] + params["b"] - 1.0
    return jnp.mean(error**2), {"mean_error": jnp.mean(error)}


def _batch(n=8):
    return {"x": jax.random.normal(jax.random.key(1), (n, 4))}


def test_a_step_is_gradient_descent_by_hand():
    mesh = sharding.make_mesh()
    state = create_state(_init, optax.sgd(0.1), mesh, ema=False)
    gradient = jax.grad(lambda p: _loss(p, _batch(), None)[0])(_init())
    wanted = jax.tree.map(lambda p, g: p - 0.1 * g, _init(), gradient)
    state, metrics = make_step(_loss, optax.sgd(0.1), jax.random.key(0))(state, _batch())
    chex.assert_trees_all_close(state.params, wanted, rtol=1e-6)
    assert int(state.step) == 1 and state.ema is None
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-6)


def test_accumulated_micro_batches_make_the_same_update():
    states = []
    for parts in (1, 4):
        state = create_state(_init, optax.adam(0.1), sharding.make_mesh(), ema=False)
        step = make_step(_loss, optax.adam(0.1), jax.random.key(0), accumulate=parts)
        states.append(step(state, _batch())[0])
    chex.assert_trees_all_close(states[0].params, states[1].params, rtol=1e-5)


def test_the_average_follows_its_ramp():
    state = create_state(_init, optax.sgd(0.1), sharding.make_mesh(), ema=True)
    step = make_step(_loss, optax.sgd(0.1), jax.random.key(0), ema_decay=0.5)
    average = _init()
    for i in range(12):
        state, _ = step(state, _batch())
        decay = min(0.5, (1 + i) / (10 + i))
        average = jax.tree.map(
            lambda old, new, d=decay: d * old + (1 - d) * new, average, state.params
        )
    chex.assert_trees_all_close(state.ema, average, rtol=1e-5)
    chex.assert_trees_all_equal(state.best_params, state.ema)


def test_the_old_state_is_donated():
    state = create_state(_init, optax.sgd(0.1), sharding.make_mesh(), ema=True)
    old = state.params["w"]
    make_step(_loss, optax.sgd(0.1), jax.random.key(0), ema_decay=0.9)(state, _batch())
    assert old.is_deleted()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_is_flagged(bad):
    state = create_state(_init, optax.sgd(0.1), sharding.make_mesh(), ema=False)
    step = make_step(_loss, optax.sgd(0.1), jax.random.key(0))
    _, metrics = step(state, {"x": jnp.full((8, 4), bad)})
    assert float(metrics["finite"]) == 0.0
