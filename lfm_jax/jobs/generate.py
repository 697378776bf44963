"""From sample indices to images: one compiled program of noise, solve and decode.

The noise of sample ``i`` is a function of the seed and of ``i`` alone; the solve and the decoder
are row-wise. So neither the batch size nor the topology changes a sample.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int
from ml_collections import ConfigDict

from lfm_jax import sharding
from lfm_jax.errors import UserError
from lfm_jax.jobs import build, guide, solve
from lfm_jax.jobs import condition as conditions
from lfm_jax.jobs.sample_options import check_solver, fixed_steps
from lfm_jax.vae import Codec
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
    beyond: dict[str, Any] = dataclasses.field(default_factory=dict)
    beside: guide.OtherNetworks = dataclasses.field(default_factory=guide.OtherNetworks)
    given: conditions.Given | None = None
    condition_guidance: float = 1.0

    @classmethod
    def from_config(
        cls,
        config: ConfigDict,
        workdir: Workdir,
        *,
        codec: Codec | None = None,
        mesh: Mesh | None = None,
    ) -> "Generator":
        """The sampler that `config.sample` describes; it needs the codec but no cache.

        `codec` and `mesh` are the config's own unless given.
        """
        section = config.sample
        check_solver(config)
        codec = codec or build.codec(config, workdir)
        if section.guidance_channels > codec.latent_channels:
            raise UserError(
                f"--config.sample.guidance_channels={section.guidance_channels}: expected at most "
                f"{codec.latent_channels}, the channels of the latents, or 0 (all)"
            )
        return cls(
            model=build.network(config),
            codec=codec,
            mesh=mesh or build.mesh(config),
            latent_shape=build.latent_shape(config, codec),
            num_classes=config.data.num_classes,
            seed=section.seed,
            guidance={
                "scale": section.guidance,
                "interval": tuple(section.guidance_interval),
                "channels": section.guidance_channels or None,
                "rescale": section.guidance_rescale,
            },
            beyond=guide.options(config),
            beside=guide.other_networks(config, workdir),
            given=conditions.given(config, codec),
            condition_guidance=section.condition_guidance,
            solver={
                "solver": section.solver,
                "num_steps": fixed_steps(config),
                "grid": build.grid(section.grid, key="sample.grid"),
                "rtol": section.rtol or None,  # 0: fixed steps
                "atol": section.atol or None,
                "error_norm": section.error_norm,
                "sde": section.sde,
                "eta": section.eta,
            },
        )

    def __call__(
        self,
        params: Any,
        indices: Sequence[int] | np.ndarray,
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
        inputs = self._inputs(indices)
        made = solve.generate(self._plan(), codec, params, places, classes, inputs, self.beside)
        images, latents, stats = sharding.fetch(made)
        # Per-sample counts lose the filling-up too; totals have no axis.
        stats = {k: v[:n] if v.ndim else v for k, v in stats.items()}
        return images[:n], latents[:n], stats

    def first(
        self,
        params: Any,
        count: int,
        *,
        batch_size: int,
        labels: Int[np.ndarray, " m"] | None,
    ) -> tuple[np.ndarray, dict[str, float]]:
        """The first `count` samples, and the mean counts of their solves.

        Always by whole batches, so that one program serves all; what is over is cut off. Labels are
        repeated as often as needed.
        """
        size = min(batch_size, count)
        images, counts = [], {"nfe": [], "network_calls": []}
        for start in range(0, count, size):
            indices = np.arange(start, start + size)
            chosen = None if labels is None else labels[indices % len(labels)]
            made, _, stats = self(params, indices, chosen)
            images.append(made)
            for key, values in counts.items():
                values.append(np.mean(stats[key]))
        means = {key: float(np.mean(values)) for key, values in counts.items()}
        return np.concatenate(images)[:count], means

    def strip(
        self,
        params: Any,
        indices: Sequence[int] | np.ndarray,
        labels: Int[np.ndarray, " n"] | None,
        *,
        count: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Decoded states and running estimates of the data, ``[n, count, H, W, C]`` uint8 each.

        Along the fixed steps of the samples, a trained grid's included; where samples are made by
        error control or with noise on the way, along the grid without either (`solve.snapshots`).
        """
        places = self._place(indices, np.uint32)
        classes = self._place(labels, np.int32) if self.num_classes else None
        inputs = self._inputs(indices)
        states = solve.snapshots(
            self._plan(), count, self.codec, params, places, classes, inputs, self.beside
        )
        return tuple(x[:, : len(indices)].swapaxes(0, 1) for x in sharding.fetch(states))

    def between(
        self,
        params: Any,
        ends: tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray],
        weights: Sequence[float] | np.ndarray,
        labels: Int[np.ndarray, " n"] | None,
    ) -> np.ndarray:
        """Images ``[n, H, W, C]`` uint8 from noises on the great circle between those of two ends.

        Row i starts from the noise of sample ``ends[0][i]`` (weight 0) to ``ends[1][i]`` (1).
        """
        first, second = (self._place(indices, np.uint32) for indices in ends)
        classes = self._place(labels, np.int32) if self.num_classes else None
        images = solve.between(
            self._plan(),
            self.codec,
            params,
            (first, second, self._place(weights, np.float32)),
            classes,
            self._inputs(ends[0]),
            self.beside,
        )
        return sharding.fetch(images)[: len(weights)]

    def lower(self, params: Any, count: int) -> jax.stages.Lowered:
        """The program of `count` samples, lowered; `params` and the codec's may be shapes."""
        placement = sharding.batch_sharding(self.mesh)
        count += -count % sharding.batch_parts(self.mesh)

        def rows(x: np.ndarray) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype, sharding=placement)

        places = rows(np.zeros(1, np.uint32))
        classes = rows(np.zeros(1, np.int32)) if self.num_classes else None
        inputs = {} if self.given is None else jax.tree.map(rows, self.given.inputs([0]))
        return solve.generate.lower(
            self._plan(), self.codec, params, places, classes, inputs, self.beside
        )

    def _inputs(self, indices: Sequence[int] | np.ndarray) -> dict[str, jax.Array]:
        """What the condition's input is made of, a row a sample; empty without a condition."""
        if self.given is None:
            return {}
        arrays = self.given.inputs(indices)
        return {name: self._place(array, array.dtype) for name, array in arrays.items()}

    def _place(self, values: Any, dtype: Any) -> jax.Array:
        """One row a sample over all devices, filled up by repeating the last."""
        values = np.asarray(values, dtype)
        parts = sharding.batch_parts(self.mesh)
        values = np.concatenate([values, np.repeat(values[-1:], -len(values) % parts, axis=0)])
        placement = sharding.batch_sharding(self.mesh)
        return jax.make_array_from_callback(values.shape, placement, lambda i: values[i])

    def _plan(self) -> solve.Plan:
        condition = None
        if self.given is not None:
            condition = (self.given.condition, self.condition_guidance)
        return solve.Plan(
            model=self.model,
            latent_shape=self.latent_shape,
            num_classes=self.num_classes,
            seed=self.seed,
            guidance=tuple(self.guidance.items()),
            solver=tuple(self.solver.items()),
            beyond=tuple(self.beyond.items()),
            condition=condition,
        )
