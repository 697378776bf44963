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

from lfm_jax import mmd, rng, sharding
from lfm_jax.conditions import Condition, encoded, guided
from lfm_jax.errors import UserError
from lfm_jax.flow import (
    SDE_METHODS,
    SOLVERS,
    NetworkVelocity,
    classifier_free,
    sample,
    sample_sde,
    slerp,
    trajectory,
)
from lfm_jax.jobs import build, guide
from lfm_jax.jobs import condition as conditions
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
        _check_solver(section)
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
        made = _generate(self._static(), codec, params, places, classes, inputs, self.beside)
        images, latents, stats = sharding.fetch(made)
        # Per-sample counts lose the filling-up too; totals have no axis.
        stats = {k: v[:n] if v.ndim else v for k, v in stats.items()}
        return images[:n], latents[:n], stats

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
        states = _snapshots(
            self._static(), count, self.codec, params, places, classes, inputs, self.beside
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
        images = _between(
            self._static(),
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
        return _generate.lower(
            self._static(), self.codec, params, places, classes, inputs, self.beside
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

    def _static(self) -> tuple:
        """The hashable part, on which the program is compiled."""
        return (
            self.model,
            self.latent_shape,
            self.num_classes,
            self.seed,
            tuple(self.guidance.items()),
            tuple(self.solver.items()),
            None if self.given is None else (self.given.condition, self.condition_guidance),
            tuple(self.beyond.items()),
        )


def _start(
    static: tuple, params: Any, indices: Any, labels: Any, inputs: dict, beside: guide.Helpers
) -> tuple[Any, Any, dict]:
    """The guided velocity, the noise of these samples, and the solver's options."""
    model, latent_shape, num_classes, seed, guidance, solver, condition, beyond = static
    solver, guidance = dict(solver), dict(guidance)
    if mmd.is_few_step(params):
        params, trained, guidance["scale"] = mmd.deploy_sampler(
            params, num_steps=solver["num_steps"], guidance=guidance["scale"]
        )
        solver["trained_solver"] = trained
    keys = rng.stream_keys(jax.random.key(seed), rng.Stream.SAMPLE, indices)
    noise = rng.normal(keys, latent_shape)
    cond = Cond(label=labels)
    if condition is not None:
        keep = jax.numpy.ones(indices.shape, bool)
        cond = encoded(condition[0], params, inputs, keep).replace(label=labels)
    velocity = network = NetworkVelocity(params=params, cond=cond, model=model, t_max=model.t_max)
    beyond, how = dict(beyond), {k: v for k, v in guidance.items() if k != "scale"}
    rescale = beyond.pop("rescale", 0.0)
    if condition is not None:
        velocity = _guide(velocity, *condition, inputs, num_classes, guidance)
    elif num_classes:
        velocity = classifier_free(velocity, num_classes=num_classes, rescale=rescale, **guidance)
    if beyond:
        velocity = guide.further(
            velocity, network, beside, labels, **how, rescale=rescale, **beyond
        )
    return velocity, noise, solver


def _guide(
    velocity: NetworkVelocity,
    condition: Condition,
    condition_scale: float,
    inputs: dict,
    num_classes: int,
    guidance: dict[str, Any],
) -> Any:
    """Guidance by the condition and by the class."""
    keep = jax.numpy.zeros(next(iter(inputs.values())).shape[0], bool)
    return guided(
        velocity,
        encoded(condition, velocity.params, inputs, keep),
        condition_scale=condition_scale,
        label_scale=guidance.pop("scale"),
        num_classes=num_classes,
        **guidance,
    )


@partial(jax.jit, static_argnums=0)
def _generate(static: tuple, codec: Codec | None, params: Any, indices, labels, inputs, beside):
    velocity, noise, solver = _start(static, params, indices, labels, inputs, beside)
    latents, stats = _solve(velocity, noise, indices, static, solver)
    images = latents[..., :0] if codec is None else to_uint8(codec.decode(latents))
    return images, latents, stats


@partial(jax.jit, static_argnums=0)
def _between(static: tuple, codec: Codec, params: Any, places, labels, inputs, beside):
    first, second, weights = places
    velocity, noise, solver = _start(static, params, first, labels, inputs, beside)
    other = rng.normal(
        rng.stream_keys(jax.random.key(static[3]), rng.Stream.SAMPLE, second), static[1]
    )
    latents, _ = _solve(velocity, slerp(noise, other, weights), first, static, solver)
    return to_uint8(codec.decode(latents))


def _solve(velocity, noise, indices, static: tuple, solver: dict) -> tuple[Any, dict]:
    """The sampler's own solve, or the stochastic or trained one of a few-step sampler."""
    eta, trained = solver.pop("eta"), solver.pop("trained_solver", None)
    if method := solver.pop("sde", ""):
        keys = rng.stream_keys(jax.random.key(static[3]), rng.Stream.SDE, indices)
        fixed = {key: solver[key] for key in ("num_steps", "grid")}
        return sample_sde(velocity, noise, keys, method=method, eta=eta, **fixed)
    if solver["solver"] != "ddim" and trained is None:
        return sample(velocity, noise, **solver)
    fixed = {key: solver[key] for key in ("solver", "num_steps", "grid")}
    keys = rng.stream_keys(jax.random.key(static[3]), rng.Stream.SDE, indices)
    return mmd.generate(
        velocity, noise, eta=eta, keys=keys, trained_solver=trained, differentiable=False, **fixed
    )


@partial(jax.jit, static_argnums=(0, 1))
def _snapshots(
    static: tuple, count: int, codec: Codec, params: Any, indices, labels, inputs, beside
):
    velocity, noise, solver = _start(static, params, indices, labels, inputs, beside)
    fixed = {key: solver[key] for key in ("solver", "num_steps", "grid")}
    grid = solver["grid"]
    stops = solver["num_steps"] + 1 if isinstance(grid, str) else len(grid)
    path = trajectory(velocity, noise, count=min(count, stops), **fixed)

    def pictures(latents):
        return jax.lax.map(lambda z: to_uint8(codec.decode(z)), latents)

    return pictures(path["x"]), pictures(path["data"])


def _check_solver(section: ConfigDict) -> None:
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
                f"--config.sample.{key}={section[key]}: expected one of "
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
    """Names of the first classes, for the rows of a grid; empty for an unconditional model."""
    shown = min(config.data.num_classes, most)
    return list(build.images(config, "train").class_names[:shown]) if shown else []


def load_samples(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a samples file; no pickled object is ever loaded."""
    with epath.Path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)
