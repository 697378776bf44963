"""The programs of the train and sample jobs with shapes for arrays: what `--job=compile` compiles.

Nothing is read: of a published autoencoder the name alone, of data sets nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lfm_jax import aot, mmd, sharding
from lfm_jax.errors import UserError
from lfm_jax.flow.solvers import get_solver
from lfm_jax.jobs import build
from lfm_jax.jobs.generate import Generator
from lfm_jax.jobs.mmd_cost import update_macs
from lfm_jax.jobs.sample_options import fixed_steps
from lfm_jax.jobs.train import objective
from lfm_jax.models import forward_macs
from lfm_jax.models.macs import traced_macs
from lfm_jax.state import Loss, abstract_state, make_step
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


def train_step(config: ConfigDict, workdir: Workdir, mesh: Mesh) -> Step:
    """The update of the train job, by flow matching or by MMD."""
    section = config.train
    sharding.check_batch(mesh, "train.batch_size", section.batch_size // section.accumulate)
    codec = abstract_codec(config)
    shape = build.latent_shape(config, codec)
    init, loss, flops = objective(config, codec, shape)
    if config.loss == "mmd":
        loss = _mmd_loss(config, shape)
        macs = update_macs(config, build.network(config), [mmd.RawLatents()], shape)
        flops = 2.0 * macs / section.batch_size
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


def _mmd_loss(config: ConfigDict, shape: tuple[int, int, int]) -> Loss:
    """Finetuning on raw latents: what the differentiated sampler takes.

    Networks that make features are trained or read when the job runs; they come on top.
    """
    options, size = config.mmd, int(np.prod(shape))
    rows = mmd.row_generator(
        build.network(config),
        [mmd.RawLatents()],
        shape,
        num_classes=config.data.num_classes,
        steps=(options.num_steps, *options.more_steps),
        solver=options.solver,
        grid=build.grid(options.grid, key="mmd.grid"),
        eta=options.eta,
        loop_guidance=options.guidance,
        backprop=options.backprop_steps,
        kept=options.kept_steps,
    )
    space = mmd.Space(
        kernel=mmd.Gaussian(bandwidth=float(size) ** 0.5),
        mean=jnp.zeros(size),
        scale=jnp.ones(size),
        attraction=mmd.mean_row(jnp.ones((1, size))),
    )
    return mmd.mmd_loss(rows, {"raw": space}, chunks=options.chunks, block=options.block)


def check_network(config: ConfigDict) -> None:
    """Refuse a network that could not be initialised, before anything that it needs is made.

    Raises:
        UserError: fields of `config.model` that contradict each other or the latents.
    """
    codec = abstract_codec(config)
    init, _, _ = objective(config, codec, build.latent_shape(config, codec))
    try:
        jax.eval_shape(init)
    except UserError as error:
        field = str(error).partition(":")[0]
        flag = "--config.model." if field in config.model else ""
        raise UserError(f"{flag}{error}") from None


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


def _network_macs(config: ConfigDict, generator: Generator) -> int:
    """Multiply-adds of one sample's solve; of an adaptive one, those of `num_steps` steps."""
    section = config.sample
    solver = "euler" if section.solver == "ddim" or section.sde else section.solver
    calls = fixed_steps(config) * get_solver(solver).evaluations
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
