"""Programs for machines that are not there: what is read from them, and what is said about them."""

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from jax.sharding import AbstractMesh

from configs import digits, imagenet
from lfm_jax import aot, sharding
from lfm_jax.collectives import Collectives, collectives
from lfm_jax.errors import UserError
from lfm_jax.jobs import build, compile, programs
from lfm_jax.workdir import Workdir

libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is missing: pip install 'jax[tpu]'"
)
NOWHERE = Workdir(epath.Path("/nowhere"))

HLO = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (p: f32[64]) -> f32[16] {
  %p = f32[64]{0} parameter(0)
  %all-reduce.9 = f32[64]{0:T(128)} all-reduce(%p), to_apply=%add
  ROOT %slice = f32[16]{0} dynamic-slice(%all-reduce.9, %c)
}

%body (s: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %s = (s32[], bf16[8,4]) parameter(0)
  %g = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%s), index=1
  %all-gather-start.1 = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) all-gather-start(%g), dimensions={0}
  %all-gather-done.1 = bf16[32,4]{1,0} all-gather-done(%all-gather-start.1)
  ROOT %t = (s32[], bf16[8,4]) tuple(%i, %g)
}

%condition (s: (s32[], bf16[8,4])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(28)
  ROOT %lt = pred[] compare(%i, %constant.1), direction=LT
}

ENTRY %main (a: f32[10]) -> f32[10] {
  %a = f32[10]{0} parameter(0)
  %b = f32[64]{0} parameter(1)
  %all-reduce.1 = (f32[10]{0}, /*index=1*/f32[]{:T(128)}) all-reduce(%a, %n), to_apply=%add
  %fusion.1 = f32[16]{0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
  %while.1 = (s32[], bf16[8,4]) while(%init), condition=%condition, body=%body
  %while.2 = (s32[], bf16[8,4]) while(%init), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"2"}}
  ROOT %r = f32[10]{0} get-tuple-element(%all-reduce.1), index=0
}
"""


def test_collectives_are_counted_as_often_as_they_run():
    found = collectives(HLO)
    assert set(found) == {"all-reduce", "all-gather", "reduce-scatter"}
    assert found["all-reduce"] == Collectives(count=1, bytes=44, elements=11)
    assert found["reduce-scatter"] == Collectives(count=1, bytes=256, elements=64)
    assert found["all-gather"] == Collectives(count=30, bytes=30 * 256, elements=30 * 128)


def test_a_program_without_others_sends_nothing():
    compiled = jax.jit(lambda x: x @ x).lower(jnp.ones((8, 8))).compile()
    assert collectives(compiled.as_text()) == {}
    memory = aot.memory(compiled)
    assert memory["arguments"] == 256 and memory["peak"] >= 512


def test_both_forms_of_what_does_not_fit():
    first = "RESOURCE_EXHAUSTED: ... HLO temporaries (21.93G) exceeds available HBM (15.75G)."
    second = "Ran out of memory in memory space hbm. Used 512.5M of 15.75G hbm. Exceeded"
    gib = 2**30
    assert aot._sizes(first) == (int(21.93 * gib), int(15.75 * gib))
    assert aot._sizes(second) == (int(512.5 * 2**20), int(15.75 * gib))


def test_without_libtpu_the_wheel_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="libtpu"):
        aot.topology_devices("v5e:2x2")


@libtpu
@pytest.mark.parametrize("name", ["v9z:2x2", "v5e:3x3", "nonsense"])
def test_a_topology_that_does_not_exist_is_named(name):
    with pytest.raises(UserError, match="v5p:2x2x4") as caught:
        aot.topology_devices(name)
    assert f"topology={name}" in str(caught.value)


@libtpu
def test_what_only_another_machine_can_load_stays_out_of_the_cache(tmp_path):
    program = (
        "import jax, jax.numpy as jnp\n"
        "from lfm_jax import aot\n"
        "device = aot.topology_devices('v5e:2x2')[0]\n"
        "placed = jax.sharding.SingleDeviceSharding(device)\n"
        "x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=placed)\n"
        "for _ in range(2): aot.compile_lowered(jax.jit(lambda x: x @ x).lower(x))\n"
        "assert jax.config.jax_persistent_cache_min_compile_time_secs == 0\n"
    )
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, env=os.environ | cache, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert not list(tmp_path.iterdir())


@libtpu
def test_slices_are_laid_out_with_data_across_them():
    mesh = sharding.make_mesh(-1, 4, devices=aot.topology_devices("v5e:2x2", slices=2))
    for row in mesh.devices[:, :, 0]:
        assert len({device.slice_index for device in row}) == 1


def _plan(**changes):
    config = digits.get_config("smoke")
    config.compile.topology = "v5e:2x2"
    config.model.depth = 3
    for key, value in changes.items():
        section, _, field = key.partition("__")
        config[section][field] = value
    return config


@libtpu
def test_a_train_step_for_four_chips_reduces_its_gradients_once():
    figures = compile.run(_plan(), NOWHERE)
    assert figures["fits"] and figures["devices"] == 4 and figures["hbm"] == 16 * 2**30
    assert figures["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1}
    assert set(figures["collectives"]) == {"all-reduce"}
    moved = figures["collectives"]["all-reduce"]["elements"]
    assert figures["parameters"] <= moved <= figures["parameters"] + 8  # and some metrics
    assert figures["donated"] >= 0.99
    assert figures["memory"]["arguments"] >= figures["state"]


@libtpu
def test_a_batch_that_does_not_divide_the_slice_is_named():
    with pytest.raises(UserError, match=r"train\.batch_size=30"):
        compile.run(_plan(train__batch_size=30), NOWHERE)


@libtpu
@pytest.mark.slow
def test_an_mmd_step_differentiates_through_its_solve():
    plan = _plan(mmd__num_steps=2)
    plan.loss = "mmd"
    figures = compile.run(plan, NOWHERE)
    flow = compile.run(_plan(), NOWHERE)
    assert figures["fits"] and figures["parameters"] == flow["parameters"]
    assert 2 <= figures["flops"] / flow["flops"] <= 4  # 7 forward passes over 3


@libtpu
@pytest.mark.slow
def test_a_sample_step_for_four_chips_sends_nothing():
    figures = compile.run(_plan(compile__step="sample"), NOWHERE)
    assert figures["fits"] and figures["collectives"] == {}
    assert figures["examples"] == 30 and figures["flops"] > 0


@libtpu
@pytest.mark.slow
def test_what_does_not_fit_is_said_with_the_compiler_s_figures():
    (device, *_) = aot.topology_devices("v5e:2x2")
    placed = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((65536, 65536), jnp.float32, sharding=placed)
    with pytest.raises(aot.OutOfMemory) as caught:
        aot.compile_lowered(jax.jit(lambda x: x @ x).lower(x))
    assert caught.value.needed > caught.value.available > 15 * 2**30


def test_the_first_knob_is_the_one_that_helps():
    gib = 2**30
    config = imagenet.get_config("XL/2")
    mesh = AbstractMesh((16, 1, 1), sharding.AXES)
    told = {"hbm": 16 * gib, "needed": 22 * gib}
    full = {**told, "state": 10 * gib}
    assert compile.first_knob(config, mesh, full) == "--config.mesh.fsdp=8"
    shared = {**told, "state": gib}
    assert compile.first_knob(config, mesh, shared) == "--config.model.remat=full"
    config.model.remat = "full"
    assert compile.first_knob(config, mesh, shared) == "--config.train.accumulate=2"
    config.train.accumulate = 16
    assert "topology" in compile.first_knob(config, mesh, shared)
    config.compile.step = "sample"
    assert compile.first_knob(config, mesh, shared) == "--config.sample.batch_size=125"


def test_published_autoencoders_are_planned_by_name_alone():
    config = imagenet.get_config("XL/2")
    codec = programs.abstract_codec(config)
    assert build.latent_shape(config, codec) == (32, 32, 4)
    assert sum(leaf.size for leaf in jax.tree.leaves(codec.params)) == 83_653_863
    config.autoencoder.weights = "black-forest-labs/FLUX.1-schnell"
    assert programs.abstract_codec(config).latent_channels == 16
    assert programs.abstract_codec(digits.get_config()).latent_channels == 4
