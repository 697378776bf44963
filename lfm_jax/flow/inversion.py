"""From data to the noise that generates it, and what one can do between.

A flow is invertible: the same ODE integrated upwards takes a latent to its noise (or to any time on
the way), and downwards back. Differences of the round trip are the solver's alone.

A time can be reached in three ways, and a linear boundary need not be the same for all: data taken
up by the ODE (`invert`, `invert_through`), data with fresh noise (`noised`), noise taken down
(`sample_through`).
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from lfm_jax import rng
from lfm_jax.errors import UserError
from lfm_jax.flow.grids import make_grid
from lfm_jax.flow.ode import solve_adaptive, solve_fixed, solve_through
from lfm_jax.flow.path import interpolate
from lfm_jax.flow.sampler import (
    ERROR_NORMS,
    check_interval,
    check_tolerances,
    counts,
    sample,
)
from lfm_jax.flow.solvers import get_solver
from lfm_jax.flow.velocity import with_label


def invert(
    velocity: Any,
    x0: Float[Array, "b ..."],
    *,
    t: float | None = None,
    solver: str = "midpoint",
    num_steps: int = 50,
    grid: str | Sequence[float] = "uniform",
    rtol: float | None = None,
    atol: float | None = None,
    error_norm: str = "sample",
) -> tuple[Float[Array, "b ..."], dict[str, Array]]:
    """The state at time `t` (default ``velocity.t_max``: noise) whose flow ends in `x0`.

    Options and counts are those of `lfm_jax.flow.sample`; a named grid is walked upwards, and a
    list of times still falls.

    Raises:
        UserError: as `sample`; a solver for falling times only; `t` outside (0, velocity.t_max];
            times that do not begin at `t`.
    """
    top = velocity.t_max if t is None else t
    check_interval(0.0, top, velocity.t_max)
    adaptive = check_tolerances(rtol, atol)
    chosen = get_solver(solver, adaptive=adaptive, upward=True)
    if error_norm not in ERROR_NORMS:
        raise UserError(f"error_norm: {error_norm!r} is none of {', '.join(ERROR_NORMS)}")
    if adaptive:
        rtol, atol = rtol or atol, atol or rtol
        x, stats = _adaptive(
            velocity, x0, stop=top, solver=chosen, rtol=rtol, atol=atol, error_norm=error_norm
        )
    else:
        times = make_grid(grid, num_steps, t_max=top)[::-1]
        if not isinstance(grid, str) and not np.isclose(times[-1], top):
            raise UserError(f"grid: the times begin at {times[-1]:g}; expected t={top:g}")
        x, stats = _fixed(velocity, x0, times=tuple(times.tolist()), solver=chosen)
    return x, counts(stats, chosen, velocity, adaptive=adaptive)


@partial(jax.jit, static_argnames=("times", "solver"))
def _fixed(velocity, x0, *, times, solver):
    return solve_fixed(velocity, x0, np.asarray(times), solver)


@partial(jax.jit, static_argnames=("stop", "solver", "rtol", "atol", "error_norm"))
def _adaptive(velocity, x0, *, stop, solver, **settings):
    return solve_adaptive(velocity, x0, 0.0, stop, solver, **settings)


def invert_through(
    velocity: Any,
    x0: Float[Array, "b ..."],
    times: Sequence[float],
    *,
    solver: str = "midpoint",
    num_steps: int = 50,
) -> Float[Array, "k b ..."]:
    """The states at each of the rising `times` whose flow ends in `x0`, in one solve.

    `num_steps` is spread over the way up to the last time, at least one step between two times.

    Raises:
        UserError: times that do not rise within (0, velocity.t_max], and what `invert` raises.
    """
    _check_rising(times, velocity.t_max)
    chosen = get_solver(solver, upward=True)
    grid, stops = _grid_through((0.0, *times), num_steps)
    return _through(velocity, x0, grid, stops, chosen)


def sample_through(
    velocity: Any,
    noise: Float[Array, "b ..."],
    times: Sequence[float],
    *,
    solver: str = "midpoint",
    num_steps: int = 50,
) -> Float[Array, "k b ..."]:
    """The states at each of the rising `times` on the way from `noise` to data, in one solve.

    Raises:
        UserError: as `invert_through`.
    """
    _check_rising(times, velocity.t_max)
    chosen = get_solver(solver)
    top = velocity.t_max
    falling = tuple(t for t in times[::-1] if t < top)
    states = noise[None]
    if falling:
        grid, stops = _grid_through((top, *falling), num_steps)
        states = jnp.concatenate([states, _through(velocity, noise, grid, stops, chosen)])
    return states[::-1][: len(times)]


def noised(x0: Float[Array, "b ..."], keys: Key[Array, " b"], *, t: float) -> Float[Array, "b ..."]:
    """`x0` at time `t` by fresh noise, row i from ``keys[i]``: a draw from the flow's marginal."""
    noise = rng.normal(keys, x0.shape[1:])
    return interpolate(x0, noise, jnp.full(x0.shape[:1], t, x0.dtype))


def _check_rising(times: Sequence[float], t_max: float) -> None:
    rising = [0.0, *times]
    if len(rising) < 2 or not np.all(np.diff(rising) > 0) or times[-1] > t_max:
        raise UserError(f"times: {tuple(times)} must rise within (0, {t_max:g}]")


def _grid_through(ends: Sequence[float], num_steps: int) -> tuple[tuple, tuple]:
    """Times from the first of `ends` through all others, and where the others lie in it."""
    if num_steps < 1:
        raise UserError(f"num_steps: {num_steps} is below 1")
    whole = abs(ends[-1] - ends[0])
    grid, stops = [ends[0]], []
    for start, stop in itertools.pairwise(ends):
        count = max(1, round(num_steps * abs(stop - start) / whole))
        grid.extend(np.linspace(start, stop, count + 1)[1:].tolist())
        stops.append(len(grid) - 1)
    return tuple(grid), tuple(stops)


@partial(jax.jit, static_argnames=("times", "stops", "solver"))
def _through(velocity, x, times, stops, solver):
    times = np.asarray(times, jnp.result_type(float))
    return solve_through(velocity, x, times, stops, solver)


def reconstruction_errors(
    velocity: Any,
    x0: Float[Array, "b ..."],
    *,
    num_steps: Sequence[int] = (5, 10, 20, 50),
    solver: str = "midpoint",
    grid: str | Sequence[float] = "uniform",
    t: float | None = None,
) -> list[dict[str, float | int]]:
    """Round-trip error (up to `t` and back) for each number of steps.

    Returns:
        One row a setting: ``num_steps``, ``nfe`` of both ways together, ``rmse`` over all elements
        and ``relative`` to the data's own root mean square.
    """
    rows = []
    for steps in num_steps:
        up, there = invert(velocity, x0, t=t, solver=solver, num_steps=steps, grid=grid)
        down, back = sample(velocity, up, t_start=t, solver=solver, num_steps=steps, grid=grid)
        rmse = float(jnp.sqrt(jnp.mean(jnp.square(down - x0))))
        rows.append(
            {
                "num_steps": int(steps),
                "nfe": int(there["nfe"][0] + back["nfe"][0]),
                "rmse": rmse,
                "relative": rmse / float(jnp.sqrt(jnp.mean(jnp.square(x0)))),
            }
        )
    return rows


def slerp(
    a: Float[Array, "b ..."], b: Float[Array, "b ..."], weight: float | Float[Array, " b"]
) -> Float[Array, "b ..."]:
    """Spherical interpolation from `a` (weight 0) to `b` (weight 1), sample by sample.

    Straight interpolation of Gaussian noise shrinks its norm; along the great circle, with the norm
    interpolated on its own, the flow sees states of the size it was trained on.
    """
    axes = tuple(range(1, a.ndim))
    shape = (-1,) + (1,) * (a.ndim - 1)
    weight = jnp.broadcast_to(jnp.asarray(weight, a.dtype), a.shape[:1]).reshape(shape)
    norm_a = jnp.sqrt(jnp.sum(a * a, axes, keepdims=True))
    norm_b = jnp.sqrt(jnp.sum(b * b, axes, keepdims=True))
    cosine = jnp.sum(a * b, axes, keepdims=True) / (norm_a * norm_b)
    # Short of 1, so that equal ends divide nothing by zero, nor do their derivatives.
    angle = jnp.arccos(jnp.clip(cosine, -1 + 1e-6, 1 - 1e-6))
    along = jnp.sin((1 - weight) * angle) * (a / norm_a) + jnp.sin(weight * angle) * (b / norm_b)
    along = along / jnp.sin(angle)
    return ((1 - weight) * norm_a + weight * norm_b) * along


def interpolate_samples(
    velocity: Any,
    first: Float[Array, "b ..."],
    second: Float[Array, "b ..."],
    *,
    count: int,
    **options: Any,
) -> Float[Array, "k b ..."]:
    """`count` samples on the way from noise `first` to noise `second`, ends included.

    `options` are those of `lfm_jax.flow.sample`.
    """
    if count < 2:
        raise UserError(f"interpolation count: {count} is below 2")
    weights = np.linspace(0.0, 1.0, count)
    return jnp.stack(
        [sample(velocity, slerp(first, second, float(w)), **options)[0] for w in weights]
    )


def switch_class(
    velocity: Any,
    x0: Float[Array, "b ..."],
    label: Any,
    *,
    t: float | None = None,
    **options: Any,
) -> tuple[Float[Array, "b ..."], dict[str, Array]]:
    """`x0` inverted under its own class up to `t`, and regenerated as class `label`.

    `options` are those of `invert`. The counts are the sum of both ways.

    Raises:
        UserError: a network without classes, a class out of range, and what `invert` raises.
    """
    other = with_label(velocity, label)
    state, up = invert(velocity, x0, t=t, **options)
    x, down = sample(other, state, t_start=t, **{"solver": "midpoint", **options})
    both = {name: up[name] + down[name] for name in ("nfe", "network_calls", "steps")}
    failed_t = jnp.where(up["finite"], down["failed_t"], up["failed_t"])
    return x, {**both, "finite": up["finite"] & down["finite"], "failed_t": failed_t}
