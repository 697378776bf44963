"""Saved on {1, 4, 8} devices x {1, 2} processes, read on {1, 2, 4, 8}, by us and by plain orbax.

    python -m benchmarks.reliability_restore save FOLDER DATA FSDP     (in every process)
    python -m benchmarks.reliability_restore load FOLDER               (once a number of devices)
    python -m benchmarks.reliability_restore plain FOLDER              (without this package)

Devices are XLA's virtual CPU devices, processes are real and meet over gloo. The state's values are
a function of their place, so that a reader needs nothing but the checkpoint to check them.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"blocks": {"kernel": (2, 64, 256), "bias": (2, 64)}, "out": {"w": (256, 3)}}
STEP = 7


def values(part: str) -> Any:
    import numpy as np

    def fill(shapes: Any, path: str) -> Any:
        if isinstance(shapes, dict):
            return {key: fill(value, f"{path}/{key}") for key, value in shapes.items()}
        seed = sum(map(ord, path))
        return np.random.default_rng(seed).normal(size=shapes).astype(np.float32)

    return fill(SHAPES, part)


def _state(data: int, fsdp: int) -> Any:
    import jax
    import optax

    from lfm_jax import sharding
    from lfm_jax.state import create_state

    devices = jax.devices()[: data * fsdp]
    mesh = sharding.make_mesh(data, fsdp, devices=devices)
    params = values("params")

    def init() -> Any:
        return jax.tree.map(jax.numpy.asarray, params)

    state = create_state(init, optax.adam(1e-3), mesh, ema=True)
    averaged = values("ema")
    ema = jax.tree.map(lambda old, new: jax.device_put(new, old.sharding), state.ema, averaged)
    return state.replace(ema=ema)


def save(folder: Path, data: int, fsdp: int) -> None:
    from lfm_jax import checkpoints, distributed

    distributed.initialize()
    with checkpoints.open_manager(folder) as manager:
        state = _state(data, fsdp)
        checkpoints.save(manager, STEP, state, data={"examples_drawn": 5}, config={"a": 1})


def load(folder: Path) -> list[str]:
    """Restore every checkpoint under `folder` on this process's devices; problems."""
    import jax
    import numpy as np

    from lfm_jax import checkpoints

    def same(found: Any, part: str) -> bool:
        equal = jax.tree.map(np.array_equal, jax.device_get(found), values(part))
        return all(jax.tree.leaves(equal))

    problems, count = [], jax.device_count()
    for place in sorted(folder.iterdir()):
        for fsdp in {1, 2, count} if count > 1 else {1}:
            with checkpoints.open_manager(place) as manager:
                step, state, _ = checkpoints.newest_whole(manager, _state(count // fsdp, fsdp))
            kernel = state.params["blocks"]["kernel"]
            parts = kernel.size // kernel.addressable_shards[0].data.size
            if not (same(state.params, "params") and same(state.ema, "ema") and step == STEP):
                problems.append(f"{place.name} on {count} devices, fsdp {fsdp}: other values")
            if parts != fsdp:
                problems.append(f"{place.name}: kernel in {parts} parts, expected {fsdp}")
        for ema in (True, False):
            params = checkpoints.load_params(place, ema=ema)
            if not same(params, "ema" if ema else "params"):
                problems.append(f"{place.name} on {count} devices, ema={ema}: other values")
    return problems


def release(folder: Path) -> None:
    """Write a release as the export job does."""
    from safetensors.numpy import save_file

    from lfm_jax import checkpoints

    checkpoints.save_release(folder, values("ema"), {"a": 1})
    flat = {"blocks/kernel": values("ema")["blocks"]["kernel"]}
    save_file(flat, folder / "params.safetensors")


_PLAIN = """
import sys, json
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import v1
from safetensors.numpy import load_file
folder = sys.argv[1]
readers = {
    "Standard": lambda: ocp.StandardCheckpointer().restore(folder + "/0/params"),
    "PyTree": lambda: ocp.PyTreeCheckpointer().restore(folder + "/0/params"),
    "CheckpointManager": lambda: ocp.CheckpointManager(folder).restore(
        0, args=ocp.args.Composite(params=ocp.args.StandardRestore()))["params"],
    "v1": lambda: v1.load(folder + "/0", checkpointable_name="params"),
    "safetensors": lambda: {"blocks": {"kernel": load_file(folder + "/params.safetensors")["blocks/kernel"]}},
}
found = {}
for name, read in readers.items():
    try:
        kernel = np.asarray(read()["blocks"]["kernel"])
        found[name] = float(kernel.astype(np.float64).sum())
    except Exception as error:
        found[name] = repr(error)[:300]
assert "lfm_jax" not in sys.modules
print(json.dumps(found))
"""  # noqa: E501


def plain(folder: Path, devices: int) -> list[str]:
    """The release by every plain reader, in a process that has never heard of this package."""
    import numpy as np

    done = _run([sys.executable, "-c", _PLAIN, str(folder)], devices, path="")
    if done.returncode:
        return [done.stderr[-500:]]
    wanted = float(values("ema")["blocks"]["kernel"].astype(np.float64).sum())
    found = json.loads(done.stdout.splitlines()[-1])
    return [f"{name} on {devices} devices: {v}" for name, v in found.items() if v != wanted]


def _run(
    command: list[str], devices: int, *, path: str = str(ROOT), **more: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, env=_environment(devices, path, more), capture_output=True, text=True, check=False
    )


def _environment(devices: int, path: str, more: dict[str, str]) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": path, **more}


def _save_on(folder: Path, devices: int, processes: int, fsdp: int, port: int) -> str:
    """Save with `devices` a process; the problem."""
    place = folder / "saved" / f"{processes}x{devices}-fsdp{fsdp}"
    data = devices * processes // fsdp
    command = [sys.executable, "-m", "benchmarks.reliability_restore", "save"]
    command += [str(place), str(data), str(fsdp)]
    if processes == 1:
        done = _run(command, devices)
        return done.stderr[-800:] if done.returncode else ""
    running = []
    for index in range(processes):
        meet = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(index),
        }
        environment = _environment(devices, str(ROOT), meet)
        running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE))
    texts = [process.communicate(timeout=900)[1] for process in running]
    bad = [text[-800:].decode() for p, text in zip(running, texts, strict=True) if p.returncode]
    return bad[0] if bad else ""


def matrix(folder: Path, seed: int) -> dict[str, tuple[int, list[str]]]:
    """What was tried -> (how often, problems)."""
    place = folder / "saved"
    problems, saved, port = [], 0, 20_000 + seed % 20_000
    for devices, processes in itertools.product((1, 4, 8), (1, 2)):
        for fsdp in {1, devices * processes}:
            port += 1
            problem = _save_on(folder, devices, processes, fsdp, port)
            problems += [problem] if problem else []
            saved += 1
    found = {"saved on other devices and processes": (saved, problems)}
    problems, loads = [], 0
    for devices in (1, 2, 4, 8):
        command = [sys.executable, "-m", "benchmarks.reliability_restore", "load", str(place)]
        done = _run(command, devices)
        problems += (
            json.loads(done.stdout.splitlines()[-1]) if done.stdout else [done.stderr[-800:]]
        )
        loads += saved * (len({1, 2, devices} if devices > 1 else {1}) + 2)
    found["restored on other devices"] = (loads, problems)
    command = [sys.executable, "-m", "benchmarks.reliability_restore", "release"]
    done = _run([*command, str(folder / "release")], 1)
    problems = [done.stderr[-800:]] if done.returncode else []
    for devices in (1, 4):
        problems += plain(folder / "release", devices)
    return {**found, "release read by plain orbax and safetensors": (2 * 5, problems)}


def main() -> None:
    verb, place = sys.argv[1], Path(sys.argv[2]).absolute()
    if verb == "save":
        save(place, int(sys.argv[3]), int(sys.argv[4]))
    elif verb == "load":
        print(json.dumps(load(place)))
    else:
        release(place)


if __name__ == "__main__":
    main()
