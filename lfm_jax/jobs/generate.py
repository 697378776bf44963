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

from lfm_jax import rng, sharding
from lfm_jax.errors import UserError, near
from lfm_jax.flow import SDE_METHODS, SOLVERS
from lfm_jax.jobs import build, guide, solve
from lfm_jax.jobs import condition as conditions
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
    beside: guide.Helpers = dataclasses.field(default_factory=guide.Helpers)
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
        check_solver(section)
        codec = codec or build.codec(config, workdir)
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
            },
            beyond=guide.options(config),
            beside=guide.helpers(config, workdir),
            given=conditions.given(config, codec),
            condition_guidance=section.condition_guidance,
            solver={
                "solver": section.solver,
                "num_steps": section.num_steps,
                "grid": build.grid(section.grid, key="sample.grid"),
                "rtol": section.rtol,
                "atol": section.atol,
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
        """Decoded states and running estimates of the data, ``[n, count, H, W, C]`` uint8 each."""
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


def check_solver(section: ConfigDict) -> None:
    """Refuse names that the compiled program would refuse, before anything is read or trained.

    Raises:
        UserError: an unknown solver, grid or method.
    """
    methods = ("", *(name for name in SDE_METHODS if name != "ddim"))
    build.grid(section.grid, key="sample.grid")
    names = {"solver": (*SOLVERS, "ddim"), "sde": methods}
    for key, known in names.items():
        if section[key] not in known:
            raise UserError(
                f"--config.sample.{key}={section[key]}{near(section[key], known)}: expected one of "
                + ", ".join(name or '""' for name in known)
            )
    adaptive = [name for name, solver in SOLVERS.items() if solver.adaptive]
    if section.rtol is not None and section.solver not in adaptive:
        raise UserError(
            f"--config.sample.solver={section.solver}: it has no error estimate for rtol and atol; "
            f"expected one of {', '.join(adaptive)}"
        )


def sample_labels(
    config: ConfigDict, given: conditions.Given | None = None
) -> Int[np.ndarray, " n"] | None:
    """The class of every sample index, or None for an unconditional model.

    "balanced" means the classes of the conditions' images where there are conditions.

    Raises:
        UserError: a class out of range or a list that is not one.
    """
    classes, count = config.data.num_classes, config.sample.num_samples
    if not classes:
        return None
    indices = np.arange(count)
    wanted = config.sample.labels
    if wanted == "balanced" and given is not None and given.labels is not None:
        return given.labels[given.numbers(indices)].astype(np.int32)
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
    """Names of the first classes, for the rows of a grid; empty for an unconditional model.

    Where the images are not at hand, which no sampler and no training on a cache needs, their
    numbers stand for them.
    """
    shown = min(config.data.num_classes, most)
    if not shown:
        return []
    try:
        names = build.images(config, "train").class_names
    except UserError:
        given = tuple(config.data.class_names)
        names = (*given, *map(str, range(len(given), shown)))
    return list(names[:shown])
