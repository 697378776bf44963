"""Compile a step for machines that are not there, and say what it takes and whether it fits.

    python -m lfm_jax.main --config=configs/imagenet.py:XL/2 --workdir=runs/plan --job=compile
        --config.compile.topology=v5e:4x4 --config.mesh.fsdp=16

Nothing is trained, read or downloaded: parameters, batch and autoencoder are shapes alone. The
program is the very one that the train or sample job runs, compiled by libtpu (`lfm_jax.aot`) for
the named topology, or for the local devices where none is named.
"""

import dataclasses
import sys
import time
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from lfm_jax import aot, profiling, sharding
from lfm_jax.collectives import collectives
from lfm_jax.jobs import build
from lfm_jax.jobs.programs import Step, sample_step, train_step
from lfm_jax.models import count_params
from lfm_jax.workdir import Workdir


def inputs(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    return build.section(
        config, "data", "autoencoder", "model", "train", "sample", "mesh", "compile"
    )


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    section = config.compile
    aot.hush_libtpu()
    if section.topology is None:
        devices, where = jax.devices(), "the local devices"
    else:
        devices = aot.topology_devices(section.topology, section.slices)
        where = section.topology + (f" x {section.slices}" if section.slices > 1 else "")
    mesh = build.mesh(config, devices)
    step = {"train": train_step, "sample": sample_step}[section.step](config, workdir, mesh)
    figures = measure(step, devices)
    figures = {"step": section.step, "topology": where, "mesh": dict(mesh.shape), **figures}
    if not figures["fits"]:
        figures["first_knob"] = first_knob(config, mesh, figures)
    print(_words(figures), file=sys.stderr)
    return figures


def measure(step: Step, devices: list[Any]) -> dict[str, Any]:
    """Compile a step and read off what it takes; bytes are those of one device."""
    hbm = aot.device_memory(devices[0])
    peak = profiling.stated_peak(devices[0].device_kind)
    figures: dict[str, Any] = {
        "device": devices[0].device_kind,
        "devices": len(devices),
        "hbm": hbm,
        "state": aot.argument_bytes(step.state),
        "parameters": count_params(getattr(step.state, "params", step.state)),
        "flops": step.flops,
        "examples": step.examples,
    }
    if peak:
        # What the step would take at 40 % of the stated peak: a plan, not a measurement.
        figures["seconds_at_40_mfu"] = step.flops / (0.4 * peak * len(devices))
    begin = time.perf_counter()
    lowered = step.lower()
    try:
        compiled = aot.compile_lowered(lowered)
    except aot.OutOfMemory as error:
        over = error.needed - (error.available or hbm or 0)
        return {**figures, "fits": False, "needed": error.needed, "over": over}
    figures["compile_seconds"] = time.perf_counter() - begin
    memory = aot.memory(compiled)
    moved = collectives(compiled.as_text())
    over = 0 if hbm is None else max(0, memory["peak"] - hbm)
    return {
        **figures,
        "fits": not over,
        "needed": memory["peak"],
        "over": over,
        "memory": memory,
        "donated": memory["aliased"] / step.donated if step.donated else None,
        "collectives": {kind: dataclasses.asdict(c) for kind, c in moved.items()},
        "collective_bytes": sum(c.bytes for c in moved.values()),
    }


# ---- the verdict


def first_knob(config: ConfigDict, mesh: Mesh | AbstractMesh, figures: dict[str, Any]) -> str:
    """The setting to turn first where a program does not fit, as a flag.

    State that fills more than a third of the memory is sharded first; else activations are
    recomputed; else the batch is cut into more parts.
    """
    if config.compile.step == "sample":
        return f"--config.sample.batch_size={max(1, config.sample.batch_size // 2)}"
    hbm, data = figures["hbm"] or figures["needed"], mesh.shape["data"]
    if 3 * figures["state"] > hbm and data > 1:
        factors = [f for f in range(2, data + 1) if data % f == 0]
        enough = (f for f in factors if 8 * figures["state"] <= hbm * f)
        return f"--config.mesh.fsdp={mesh.shape['fsdp'] * next(enough, data)}"
    if (config.model.remat or "none") == "none":
        return "--config.model.remat=full"
    parts = config.train.accumulate * 2
    if config.train.batch_size % (parts * sharding.batch_parts(mesh)) == 0:
        return f"--config.train.accumulate={parts}"
    return "a larger --config.compile.topology"


def _words(figures: dict[str, Any]) -> str:
    gib = lambda n: f"{n / aot.GIB:.2f} GiB"  # noqa: E731
    lines = [
        f"{figures['step']} step on {figures['topology']}: {figures['devices']} x "
        f"{figures['device']}, mesh {figures['mesh']}",
        f"  {figures['parameters'] / 1e6:.1f} M parameters, {figures['examples']} images, "
        f"{figures['flops'] / 1e12:.1f} TFLOP a step (closed form)",
    ]
    if "seconds_at_40_mfu" in figures:
        seconds = figures["seconds_at_40_mfu"]
        rate = figures["examples"] / seconds
        lines.append(f"  at 40 % MFU: {seconds:.3f} s a step, {rate:,.0f} images/s")
    lines.append(f"  a device: state {gib(figures['state'])}")
    if "memory" in figures:
        memory = figures["memory"]
        lines[-1] += (
            f", arguments {gib(memory['arguments'])}, temporaries {gib(memory['temporaries'])}, "
            f"peak {gib(memory['peak'])}"
        )
        for kind, moved in figures["collectives"].items():
            lines.append(f"  {kind}: {moved['count']} a step, {gib(moved['bytes'])}")
        lines.append(f"  compiled in {figures['compile_seconds']:.1f} s")
    limit = f" of {gib(figures['hbm'])}" if figures["hbm"] else ", no limit known"
    if figures["fits"]:
        lines.append(f"fits: {gib(figures['needed'])}{limit}")
    else:
        lines.append(
            f"does not fit: {gib(figures['needed'])}{limit}, {gib(figures['over'])} too much; "
            f"first try {figures['first_knob']}"
        )
    return "\n".join(lines)
