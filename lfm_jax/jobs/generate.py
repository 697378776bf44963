"""From sample indices to images: one compiled program of noise, solve and decode.

The noise of sample ``i`` is a function of the seed and of ``i`` alone; the solve and the decoder
are row-wise. So neither the batch size nor the topology changes a sample.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Int
from ml_collections import ConfigDict

from lfm_jax import rng, sharding
from lfm_jax.errors import UserError
from lfm_jax.flow import NetworkVelocity, classifier_free, sample, trajectory
from lfm_jax.jobs import build
from lfm_jax.models import Cond
from lfm_jax.vae import Codec, to_uint8
from lfm_jax.workdir import Workdir


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generator:
    """What turns (params, indices, labels) into uint8 images; build it with `from_config`."""

    model: nn.Module
    codec: Codec
    mesh: Mesh
    latent_shape: tuple[int, int, int]
    num_classes: int
    seed: int
    guidance: dict[str, Any]
    solver: dict[str, Any]

    @classmethod
    def from_config(cls, config: ConfigDict, workdir: Workdir) -> "Generator":
        """The sampler that `config.sample` describes; it needs the codec but no cache."""
        section = config.sample
        codec = build.codec(config, workdir)
        return cls(
            model=build.network(config),
            codec=codec,
            mesh=sharding.make_mesh(config.mesh.data, config.mesh.fsdp),
            latent_shape=build.latent_shape(config, codec),
            num_classes=config.data.num_classes,
            seed=section.seed,
            guidance={
                "scale": section.guidance,
                "interval": tuple(section.guidance_interval),
                "channels": section.guidance_channels or None,
            },
            solver={
                "solver": section.solver,
                "num_steps": section.num_steps,
                "grid": section.grid,
                "rtol": section.rtol,
                "atol": section.atol,
                "error_norm": section.error_norm,
            },
        )

    def __call__(
        self,
        params: Any,
        indices: Sequence[int],
        labels: Int[np.ndarray, " n"] | None,
        *,
        decode: bool = True,
    ) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Images ``[n, H, W, C]`` uint8, their scaled latents and the solver's counts, on the host.

        `n` may be anything; it is filled up to a multiple of the devices. Without `decode` the
        images are empty.
        """
        n = len(indices)
        places = self._place(indices, np.uint32)
        classes = self._place(labels, np.int32) if self.num_classes else None
        codec = self.codec if decode else None
        made = _generate(self._static(), codec, params, places, classes)
        images, latents, stats = sharding.fetch(made)
        # Per-sample counts lose the filling-up too; totals have no axis.
        stats = {k: v[:n] if v.ndim else v for k, v in stats.items()}
        return images[:n], latents[:n], stats

    def strip(
        self,
        params: Any,
        indices: Sequence[int],
        labels: Int[np.ndarray, " n"] | None,
        *,
        count: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Decoded states and running estimates of the data, ``[n, count, H, W, C]`` uint8 each."""
        places = self._place(indices, np.uint32)
        classes = self._place(labels, np.int32) if self.num_classes else None
        states = _snapshots(self._static(), count, self.codec, params, places, classes)
        return tuple(x[:, : len(indices)].swapaxes(0, 1) for x in sharding.fetch(states))

    def _place(self, values: Any, dtype: Any) -> jax.Array:
        """One row a sample over all devices, filled up by repeating the last."""
        values = np.asarray(values, dtype)
        values = np.concatenate([values, np.repeat(values[-1:], -len(values) % self.mesh.size)])
        placement = sharding.batch_sharding(self.mesh)
        return jax.make_array_from_callback(values.shape, placement, lambda i: values[i])

    def _static(self) -> tuple:
        """The hashable part, on which the program is compiled."""
        return (
            self.model,
            self.latent_shape,
            self.num_classes,
            self.seed,
            tuple(self.guidance.items()),
            tuple(self.solver.items()),
        )


def _start(static: tuple, params: Any, indices: Any, labels: Any) -> tuple[Any, Any, dict]:
    """The guided velocity, the noise of these samples, and the solver's options."""
    model, latent_shape, num_classes, seed, guidance, solver = static
    keys = rng.stream_keys(jax.random.key(seed), rng.Stream.SAMPLE, indices)
    noise = rng.normal(keys, latent_shape)
    velocity = NetworkVelocity(
        params=params, cond=Cond(label=labels), model=model, t_max=model.t_max
    )
    if num_classes:
        velocity = classifier_free(velocity, num_classes=num_classes, **dict(guidance))
    return velocity, noise, dict(solver)


@partial(jax.jit, static_argnums=0)
def _generate(static: tuple, codec: Codec | None, params: Any, indices, labels):
    velocity, noise, solver = _start(static, params, indices, labels)
    latents, stats = sample(velocity, noise, **solver)
    images = latents[..., :0] if codec is None else to_uint8(codec.decode(latents))
    return images, latents, stats


@partial(jax.jit, static_argnums=(0, 1))
def _snapshots(static: tuple, count: int, codec: Codec, params: Any, indices, labels):
    velocity, noise, solver = _start(static, params, indices, labels)
    fixed = {key: solver[key] for key in ("solver", "num_steps", "grid")}
    path = trajectory(velocity, noise, count=min(count, solver["num_steps"] + 1), **fixed)

    def pictures(latents):
        return jax.lax.map(lambda z: to_uint8(codec.decode(z)), latents)

    return pictures(path["x"]), pictures(path["data"])


def sample_labels(config: ConfigDict) -> Int[np.ndarray, " n"] | None:
    """The class of every sample index, or None for an unconditional model.

    Raises:
        UserError: a class out of range or a list that is not one.
    """
    classes, count = config.data.num_classes, config.sample.num_samples
    if not classes:
        return None
    indices = np.arange(count)
    wanted = config.sample.labels
    if wanted == "balanced":
        return (indices % classes).astype(np.int32)
    if wanted == "uniform":
        keys = rng.stream_keys(
            jax.random.key(config.sample.seed), rng.Stream.SAMPLE_LABEL, indices.astype(np.uint32)
        )
        return np.asarray(jax.vmap(lambda k: jax.random.randint(k, (), 0, classes))(keys))
    try:
        chosen = [int(part) for part in wanted.split(",")]
    except ValueError as error:
        raise UserError(
            f"--config.sample.labels={wanted}: expected balanced, uniform or classes like 3,7"
        ) from error
    for label in chosen:
        if not 0 <= label < classes:
            raise UserError(
                f"--config.sample.labels={wanted}: class {label} is not in 0..{classes - 1}"
            )
    return np.asarray(chosen, np.int32)[indices % len(chosen)]


def class_names(config: ConfigDict, *, most: int = 10) -> list[str]:
    """Names of the first classes, for the rows of a grid; empty for an unconditional model."""
    shown = min(config.data.num_classes, most)
    return list(build.images(config, "train").class_names[:shown]) if shown else []


def load_samples(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a samples file; no pickled object is ever loaded."""
    with epath.Path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)
