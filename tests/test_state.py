"""The train step: accumulation, averaging, donation, and the same values on any mesh."""

import subprocess
import sys

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


_MESHES = """
import jax, jax.numpy as jnp, numpy as np
from lfm_jax import flow, models, optim, sharding
from lfm_jax.state import create_state, make_step

model = models.create_model("DiT", hidden=64, depth=2, heads=2, patch=2, num_classes=10)
rng = np.random.default_rng(0)
def batch(step):
    return {
        "moments": rng.standard_normal((16, 4, 4, 8)).astype(np.float16),
        "label": rng.integers(0, 10, 16).astype(np.int32),
        "position": np.arange(step * 16, step * 16 + 16, dtype=np.uint32),
    }
batches = [batch(i) for i in range(20)]
curves, finals = [], []
for data, fsdp in ((8, 1), (2, 4), (1, 8)):
    mesh = sharding.make_mesh(data, fsdp)
    tx = optim.adamw(optim.learning_rate(1e-3, steps=100), grad_clip=1.0)
    loss = flow.flow_matching_loss(model, scale=1.0, num_classes=10)
    init = lambda: models.init_params(model, jax.random.key(0), (4, 4, 4))
    state = create_state(init, tx, mesh, ema=True)
    if fsdp > 1:
        leaf = state.params["blocks"]["qkv"]["kernel"]
        assert leaf.addressable_shards[0].data.size == leaf.size // fsdp, leaf.sharding
    step = make_step(loss, tx, jax.random.key(0), ema_decay=0.9)
    curve = []
    for b in batches:
        placed = jax.device_put(b, sharding.batch_sharding(mesh))
        state, metrics = step(state, placed)
        curve.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    curves.append(np.array(curve))
    finals.append(jax.device_get(state.ema))
np.savez("OUT", curves=np.stack(curves), *jax.tree.leaves(finals[0]))
for curve, final in zip(curves[1:], finals[1:]):
    np.testing.assert_allclose(curve[0], curves[0][0], rtol=1e-6)
    np.testing.assert_allclose(curve[:, 0], curves[0][:, 0], rtol=1e-5)
    norm = lambda t: np.sqrt(sum((x ** 2).sum() for x in jax.tree.leaves(t)))
    difference = norm(jax.tree.map(lambda a, b: a - b, final, finals[0])) / norm(finals[0])
    assert difference < 1e-3, difference
"""


def test_data_parallel_equals_fsdp_equals_one_device(tmp_path):
    """First gradient within 1e-6, the loss of 20 steps within 1e-5, parameters within 1e-3."""
    curves = {}
    for devices in (8, 1):
        out = tmp_path / f"{devices}.npz"
        code = _MESHES.replace("OUT", str(out))
        if devices == 1:
            code = code.replace("((8, 1), (2, 4), (1, 8))", "((1, 1),)")
        environment = {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
            "PATH": "/usr/bin:/bin",
        }
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        curves[devices] = np.load(out)["curves"][0]
    np.testing.assert_allclose(curves[8][0], curves[1][0], rtol=1e-6)
    np.testing.assert_allclose(curves[8][:, 0], curves[1][:, 0], rtol=1e-5)
