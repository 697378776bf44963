"""What `config.sample` asks of a `Generator`: its steps, its solver, its labels and their names."""

import jax
import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from lfm_jax import rng
from lfm_jax.errors import UserError, near
from lfm_jax.flow import GRIDS, SDE_METHODS, SOLVERS
from lfm_jax.jobs import build
from lfm_jax.jobs import condition as conditions


def fixed_steps(config: ConfigDict) -> int:
    """The steps that a fixed-step solve of `config.sample` takes: of times in the grid, theirs.

    A plain flow's `sample.num_steps` may be no more than a default, so times win over it. That of a
    few-step sampler follows `mmd.num_steps`: where it is neither that nor theirs, it was asked for.

    Raises:
        UserError: an unknown grid, or a few-step sampler's N that its times contradict.
    """
    section = config.sample
    grid = build.grid(section.grid, key="sample.grid")
    if isinstance(grid, str):
        return section.num_steps
    count = len(grid) - 1
    if config.loss == "mmd" and section.num_steps not in (count, config.mmd.num_steps):
        raise UserError(
            f"--config.sample.num_steps={section.num_steps}: the times of sample.grid="
            f"{section.grid} make {count}; expected {count}, or a grid of {', '.join(GRIDS)}"
        )
    return count


def check_solver(config: ConfigDict) -> None:
    """Refuse what the compiled program would refuse or ignore, before anything is read or trained.

    Raises:
        UserError: an unknown solver, grid or method, or an N that the grid's times contradict.
    """
    section = config.sample
    methods = ("", *(name for name in SDE_METHODS if name != "ddim"))
    fixed_steps(config)
    names = {"solver": (*SOLVERS, "ddim"), "sde": methods}
    for key, known in names.items():
        if section[key] not in known:
            raise UserError(
                f"--config.sample.{key}={section[key]}{near(section[key], known)}: expected one of "
                + ", ".join(name or '""' for name in known)
            )
    adaptive = [name for name, solver in SOLVERS.items() if solver.adaptive]
    if section.rtol and section.solver not in adaptive:
        raise UserError(
            f"--config.sample.solver={section.solver}: it has no error estimate for rtol and atol; "
            f"expected one of {', '.join(adaptive)}, or sample.rtol=0 and sample.atol=0"
        )
    if section.rtol and section.sde:
        raise UserError(
            f"--config.sample.sde={section.sde}: it takes fixed steps; expected sample.rtol=0 and "
            f"sample.atol=0, not {section.rtol:g} and {section.atol:g}"
        )
    if section.eta and not section.sde and section.solver != "ddim":
        raise UserError(
            f"--config.sample.eta={section.eta:g}: expected sample.sde or sample.solver=ddim as "
            f"well, whose noise it scales, or 0 (off); {section.solver} adds none"
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
        if config.sample.labels != "balanced":
            raise UserError(
                f"--config.sample.labels={config.sample.labels}: the network has no classes "
                "(data.num_classes=0); expected balanced"
            )
        return None
    indices = np.arange(count)
    wanted = config.sample.labels
    if wanted == "balanced" and given is not None and given.labels is not None:
        return given.classes(indices)
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
