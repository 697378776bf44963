"""Where arrays lie, and that it changes nothing about what is computed."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkout import ROOT
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

from lfm_jax import sharding
from lfm_jax.errors import UserError


def _mesh(data, fsdp, tensor=1):
    return AbstractMesh((data, fsdp, tensor), sharding.AXES)


def _spec(shape, *axes):
    return sharding._by_size(shape, _mesh(*axes))


def test_large_arrays_are_split_along_their_largest_divisible_dimension():
    assert _spec((28, 1152, 4608), 2, 4) == P(None, None, "fsdp")
    assert _spec((28, 4608, 1152), 2, 4) == P(None, "fsdp")
    assert _spec((1001, 1152), 2, 4) == P(None, "fsdp")
    assert _spec((1001, 1153), 2, 4) == P()
    assert _spec((1152,), 2, 4) == P()
    assert _spec((28, 1152, 4608), 8, 1) == P()


def test_tensor_parallel_products_go_by_column_then_by_row():
    assert _spec((28, 1152, 4608), 2, 2, 4) == P(None, "fsdp", "tensor")
    assert _spec((28, 4608, 1152), 2, 2, 4) == P(None, "tensor", "fsdp")
    assert _spec((28, 1152, 4608), 2, 1, 4) == P(None, None, "tensor")


def _real_mesh():
    return sharding.make_mesh()


def test_rules_come_first_and_cover_moments_and_averages():
    shapes = {
        "params": {"mlp": {"kernel": jax.ShapeDtypeStruct((64, 512), jnp.float32)}},
        "mu": {"mlp": {"kernel": jax.ShapeDtypeStruct((64, 512), jnp.float32)}},
        "other": jax.ShapeDtypeStruct((4, 4), jnp.float32),
    }
    placed = sharding.state_sharding(shapes, _real_mesh(), [("mlp/kernel$", ("fsdp", None))])
    assert placed["params"]["mlp"]["kernel"].spec == P("fsdp", None)
    assert placed["mu"]["mlp"]["kernel"].spec == P("fsdp", None)
    assert placed["other"].spec == P()


@pytest.mark.parametrize(
    "rules, words",
    [
        ([("nowhere", (None,))], ("nowhere", "no parameter")),
        ([("w", ("fsdq",))], ("data, fsdp, tensor",)),
        ([("w", ("fsdp", "fsdp"))], ("at most once",)),
        ([("w", (None, None, "fsdp"))], ("(3, 5)",)),
    ],
)
def test_a_wrong_rule_is_named(rules, words):
    shapes = {"w": jax.ShapeDtypeStruct((3, 5), jnp.float32)}
    with pytest.raises(UserError) as caught:
        sharding.state_sharding(shapes, _real_mesh(), rules)
    for word in words:
        assert word in str(caught.value)


def test_rules_that_are_no_rules_are_named():
    assert sharding.rules((("a/b", (None, "fsdp")),)) == (("a/b", (None, "fsdp")),)
    for wrong in (("a/b", "fsdp"), 3, (("(", ("fsdp",)),)):
        with pytest.raises(UserError, match=r"mesh\.rules"):
            sharding.rules(wrong)


# ---- slices


class Device(SimpleNamespace):
    """As much of a device as the construction of a mesh looks at."""

    platform, device_kind = "cpu", "cpu"

    def __hash__(self):
        return self.id


def _slices(sizes):
    devices = []
    for index, size in enumerate(sizes):
        for _ in range(size):
            devices.append(Device(id=len(devices), slice_index=index, process_index=index))
    return devices


def _arranged(shape, sizes):
    grid = sharding._arranged(shape, _slices(sizes), "flags")
    return np.vectorize(lambda device: device.slice_index)(grid)


def test_only_data_crosses_slices_where_it_can():
    slices = _arranged((4, 2, 1), [4, 4])
    for row in slices:  # everything along fsdp lies in one slice
        assert len(np.unique(row)) == 1
    assert np.unique(slices[:2]).tolist() == [0] and np.unique(slices[2:]).tolist() == [1]


def test_fsdp_crosses_slices_only_when_data_is_used_up():
    slices = _arranged((2, 4, 1), [2, 2, 2, 2])
    assert slices.shape == (2, 4, 1)
    for row in slices:
        assert len(np.unique(row)) == 2


@pytest.mark.parametrize("shape, sizes", [((1, 1, 8), [4, 4]), ((8, 1, 1), [5, 3])])
def test_an_axis_that_slices_would_cut_is_refused(shape, sizes):
    with pytest.raises(UserError, match="slices"):
        _arranged(shape, sizes)


def test_a_batch_is_shared_over_data_and_fsdp_only():
    devices = np.array(jax.devices()[:1]).reshape(1, 1, 1)
    mesh = Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    assert sharding.batch_parts(mesh) == 1
    assert sharding.batch_parts(_mesh(2, 3, 4)) == 6
    with pytest.raises(UserError, match="12 or 18"):
        sharding.check_batch(_mesh(2, 3, 4), "train.batch_size", 16)
    with pytest.raises(UserError, match=r"mesh\.fsdp=3"):
        sharding.make_mesh(-1, 3)


# ---- values

ONE = "1,1,1"
FLOW = ("flow:8,1,1", "flow:2,4,1")
MORE = ("flow:2,2,2", "autoencoder:2,4,1", "mmd:2,4,1")


def _run(out, cases):
    """Twenty steps of each case, and of its objective on one device, in one process."""
    alone = sorted({f"{case.partition(':')[0]}:{ONE}" for case in cases})
    env = dict(os.environ, JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="8", PYTHONPATH=str(ROOT))
    env.pop("XLA_FLAGS", None)
    # XLA's threads: with one a device, devices that meet in different collectives wait for ever.
    env["NPROC"] = "32"
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/mesh_program.py"), str(out), *alone, *cases],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(out / "arrays.npz")), json.loads((out / "facts.json").read_text())


@pytest.fixture(scope="module")
def flow_runs(tmp_path_factory):
    return _run(tmp_path_factory.mktemp("flow"), FLOW)


@pytest.fixture(scope="module")
def more_runs(tmp_path_factory):
    return _run(tmp_path_factory.mktemp("more"), MORE)


@pytest.mark.parametrize("case", FLOW)
def test_a_mesh_changes_no_values(flow_runs, case):
    _check_values(flow_runs[0], case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_a_mesh_changes_no_values_of_other_objectives_and_axes(more_runs, case):
    _check_values(more_runs[0], case)


def _check_values(arrays, case):
    """First gradient within 1e-6, loss curve within 1e-5, parameters within 1e-3, relative."""
    alone = f"{case.partition(':')[0]}:{ONE}"

    def both(name):
        return [arrays[f"{which} {name}"].astype(np.float64) for which in (alone, case)]

    one, many = both("gradient")
    assert np.linalg.norm(one - many) <= 1e-6 * np.linalg.norm(one)
    one, many = both("losses")
    assert len(one) == 20 and np.ptp(one) > 0
    np.testing.assert_allclose(many, one, rtol=1e-5)
    one, many = both("params")
    assert np.linalg.norm(one - many) <= 1e-3 * np.linalg.norm(one)


def test_state_is_split_and_stays_split(flow_runs):
    """After twenty updates every array still lies as it was placed, and a device holds its part."""
    _, facts = flow_runs
    for name, fact in facts.items():
        assert fact["kept"], name
    whole = facts[f"flow:{ONE}"]["bytes"]
    assert facts["flow:8,1,1"]["bytes"] == whole
    assert facts["flow:2,4,1"]["bytes"] < whole / 2


@pytest.mark.slow
def test_state_is_split_over_two_axes(more_runs):
    _, facts = more_runs
    assert all(fact["kept"] for fact in facts.values())
    assert facts["flow:2,2,2"]["bytes"] < facts[f"flow:{ONE}"]["bytes"] / 2
