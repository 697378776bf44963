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
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from lfm_jax import aot, profiling, sharding
from lfm_jax.errors import UserError
from lfm_jax.jobs import build
from lfm_jax.jobs.generate import Generator
from lfm_jax.jobs.train import objective
from lfm_jax.models import count_params, forward_macs
from lfm_jax.models.macs import traced_macs
from lfm_jax.state import abstract_state, make_step
from lfm_jax.vae import AutoencoderKL, AutoencoderTiny, Codec, identity_codec, make_codec
from lfm_jax.workdir import Workdir

# What a published autoencoder's name says of its sizes, first match first.
_PUBLISHED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("taesd", {}),
    ("kl-16", {"block_out_channels": (128, 128, 256, 256, 512), "latent_channels": 16}),
    ("flux", {"latent_channels": 16}),
    ("sd3", {"latent_channels": 16}),
    ("stable-diffusion-3", {"latent_channels": 16}),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A program to compile.

    Attributes:
        lower: traces and lowers it.
        arguments: its arguments as shapes with shardings; `state`, the part that every device
            keeps (parameters, optimizer, average).
        flops: of one run over all devices, closed form.
        examples: images of one run.
        donated: bytes a device that should be written in place.
    """

    lower: Callable[[], Any]
    arguments: Any
    state: Any
    flops: float
    examples: int
    donated: int


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
    moved = aot.collectives(compiled.as_text())
    fits = hbm is None or memory["peak"] <= hbm
    return {
        **figures,
        "fits": fits,
        "needed": memory["peak"],
        "over": 0 if fits else memory["peak"] - hbm,
        "memory": memory,
        "donated": memory["aliased"] / step.donated if step.donated else None,
        "collectives": {kind: dataclasses.asdict(c) for kind, c in moved.items()},
        "collective_bytes": sum(c.bytes for c in moved.values()),
    }


# ---- the programs


def train_step(config: ConfigDict, workdir: Workdir, mesh: Mesh) -> Step:
    """The update of the train job under flow matching."""
    section = config.train
    if config.loss != "flow":
        raise UserError(
            f"--config.loss={config.loss}: its step depends on trained feature networks; expected "
            "flow for --job=compile"
        )
    sharding.check_batch(mesh, "train.batch_size", section.batch_size // section.accumulate)
    codec = abstract_codec(config)
    shape = build.latent_shape(config, codec)
    init, loss, flops = objective(config, codec, shape)
    tx = build.optimizer(section)
    state = abstract_state(
        init, tx, mesh, ema=section.ema_decay > 0, rules=sharding.rules(config.mesh.rules)
    )
    step = make_step(
        loss,
        tx,
        jax.random.key(config.seed),
        ema_decay=section.ema_decay,
        accumulate=section.accumulate,
        skip_nonfinite=section.nonfinite == "skip",
        like=state,
    )
    placement = sharding.batch_sharding(mesh)

    def rows(dtype: Any, *sides: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((section.batch_size, *sides), dtype, sharding=placement)

    h, w, c = shape
    batch = {name: rows(jnp.int32) for name in ("label", "index")}
    batch |= {"position": rows(jnp.uint32), "moments": rows(jnp.float16, h, w, 2 * c)}
    if config.encode.mirror:
        batch["moments_flip"] = batch["moments"]
    return Step(
        lower=lambda: step.lower(state, batch),
        arguments=(state, batch),
        state=state,
        flops=flops * section.batch_size,
        examples=section.batch_size,
        donated=aot.argument_bytes(state),
    )


def sample_step(config: ConfigDict, workdir: Workdir, mesh: Mesh) -> Step:
    """One batch of the sample job: noise, solve, decode."""
    codec = abstract_codec(config)
    codec = jax.tree.map(lambda x: _placed(x, sharding.replicated(mesh)), codec)
    generator = Generator.from_config(config, workdir, codec=codec, mesh=mesh)
    shape = generator.latent_shape
    init, _, _ = objective(config, codec, shape)
    params = jax.eval_shape(init)
    placements = sharding.state_sharding(params, mesh)
    params = jax.tree.map(_placed, params, placements)
    count = config.sample.batch_size
    return Step(
        lower=lambda: generator.lower(params, count),
        arguments=(codec, params),
        state=params,
        flops=count * 2.0 * (_network_macs(config, generator) + _decoder_macs(codec, shape)),
        examples=count,
        donated=0,
    )


def _network_macs(config: ConfigDict, generator: Generator) -> float:
    """Multiply-adds of one sample's solve; of an adaptive one, those of `num_steps` steps."""
    from lfm_jax.flow.solvers import get_solver

    section = config.sample
    solver = "euler" if section.solver == "ddim" or section.sde else section.solver
    calls = section.num_steps * get_solver(solver).evaluations
    guided = config.data.num_classes and section.guidance != 1
    return calls * (2 if guided else 1) * forward_macs(generator.model, generator.latent_shape)


def _decoder_macs(codec: Codec, shape: tuple[int, int, int]) -> int:
    z = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    return traced_macs(lambda c, z: c.decode(z), codec, z)


def _placed(x: Any, placement: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement)


def abstract_codec(config: ConfigDict) -> Codec:
    """The config's codec with shapes for parameters; of published weights only the name is read."""
    section = config.autoencoder
    if section.kind == "identity":
        return identity_codec(config.data.channels)
    if section.kind == "train":
        model = build.autoencoder(config)
    else:
        name = f"{section.family or ''} {section.weights}".lower()
        sizes = next((fields for word, fields in _PUBLISHED if word in name), {})
        model = AutoencoderTiny() if "taesd" in name else AutoencoderKL(**sizes)
    side = config.data.image_size // model.factor * model.factor
    image = jnp.zeros((1, side, side, config.data.channels))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), image)["params"])
    return make_codec(
        model,
        params,
        decode_dtype=section.decode_dtype,
        slice_size=section.decode_slice,
    )


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
