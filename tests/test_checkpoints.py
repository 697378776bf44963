"""Checkpoints come back as they were, whole or in parts, and refuse another network."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from lfm_jax import checkpoints, sharding
from lfm_jax.errors import UserError
from lfm_jax.state import create_state


def _state(width=3):
    def init():
        return {"layer": {"w": jax.random.normal(jax.random.key(0), (4, width))}}

    return create_state(init, optax.adam(1e-3), sharding.make_mesh(), ema=True)


def _saved(folder, steps=(1, 2, 3), keep=2):
    state = _state()
    with checkpoints.open_manager(folder, keep=keep) as manager:
        for step in steps:
            state = state.replace(step=jnp.int32(step))
            checkpoints.save(manager, step, state, data={"examples_drawn": step}, config={"a": 1})
    return state


def test_state_and_json_items_round_trip(tmp_path):
    state = _saved(tmp_path)
    with checkpoints.open_manager(tmp_path) as manager:
        chex.assert_trees_all_equal(checkpoints.restore(manager, _state()), state)
        assert checkpoints.read_data(manager, 3)["examples_drawn"] == 3
        assert checkpoints.read_json(manager, checkpoints.CONFIG) == {"a": 1}


def test_only_the_newest_are_kept(tmp_path):
    _saved(tmp_path, keep=2)
    assert checkpoints.latest_step(tmp_path) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]


@pytest.mark.parametrize("ema", [True, False])
def test_parameters_alone_load_without_a_target(tmp_path, ema):
    state = _saved(tmp_path)
    chex.assert_trees_all_equal(
        checkpoints.load_params(tmp_path, ema=ema), state.ema if ema else state.params
    )


def test_an_empty_folder_has_no_parameters(tmp_path):
    with pytest.raises(UserError, match="found none"):
        checkpoints.load_params(tmp_path)


def test_another_network_is_refused_in_one_line(tmp_path):
    _saved(tmp_path)
    with checkpoints.open_manager(tmp_path) as manager:
        with pytest.raises(UserError, match="does not fit") as caught:
            checkpoints.restore(manager, _state(width=5))
    assert "\n" not in str(caught.value)


def test_the_fingerprint_sees_values_names_and_shapes():
    a = {"x": jnp.arange(4.0)}
    assert checkpoints.fingerprint(a) == checkpoints.fingerprint({"x": jnp.arange(4.0)})
    others = ({"x": jnp.arange(4.0) + 1}, {"y": jnp.arange(4.0)}, {"x": jnp.arange(4.0)[None]})
    assert len({checkpoints.fingerprint(o) for o in (a, *others)}) == 4
