"""`sample`: from noise to data, with whatever solver, grid and guidance; and what it cost.

    x0, stats = sample(velocity, noise, solver="dopri5", rtol=1e-5, atol=1e-5)

Call it inside `jax.jit` with the velocity as an argument, or as it is: it compiles once per shape
and setting, not per set of parameters.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lfm_jax.errors import UserError
from lfm_jax.flow.grids import make_grid
from lfm_jax.flow.ode import Stats, solve_adaptive, solve_fixed, solve_through
from lfm_jax.flow.path import data_estimate
from lfm_jax.flow.solvers import Solver, get_solver

ERROR_NORMS = ("sample", "batch")


def sample(
    velocity: Any,
    noise: Float[Array, "b ..."],
    *,
    solver: str = "euler",
    num_steps: int = 50,
    grid: str | Sequence[float] = "uniform",
    rtol: float | None = None,
    atol: float | None = None,
    error_norm: str = "sample",
    t_start: float | None = None,
    t_min: float = 0.0,
    differentiable: bool = False,
) -> tuple[Float[Array, "b ..."], dict[str, Array]]:
    """Integrates ``dx/dt = v(x, t)`` from `t_start` (noise) down to `t_min` (0: data).

    Fixed steps along `grid` unless tolerances are given.

    Args:
        velocity: see `lfm_jax.flow.velocity`.
        noise: the state at `t_start`.
        solver: a name of `lfm_jax.flow.SOLVERS`.
        num_steps: intervals of a named `grid`.
        grid: a name of `lfm_jax.flow.GRIDS` or the falling times themselves.
        rtol, atol: tolerances of an adaptive solve (one alone stands for both).
        error_norm: of an adaptive solve: per ``sample``, or over the whole ``batch`` (LFM).
        t_start: where to start; default ``velocity.t_max``.
        t_min: where to stop.
        differentiable: allow reverse-mode derivatives; an adaptive solve needs the ``batch`` norm.

    Returns:
        The samples, and the counts: ``nfe`` ``[b]`` velocity evaluations that a sample needed,
        ``network_calls`` network evaluations that were executed for each row of the batch (guided
        pairs count as two; with an adaptive ``sample`` norm the batch runs until its slowest sample
        is done), ``steps`` ``[b]`` attempted steps, ``finite`` ``[b]`` and ``failed_t`` ``[b]``:
        the time at which the sample was first seen not to be finite, NaN for the others.

    Raises:
        UserError: an unknown solver, grid or norm, ``num_steps < 1``, a tolerance <= 0.
    """
    adaptive = check_tolerances(rtol, atol)
    chosen = get_solver(solver, adaptive=adaptive)
    if error_norm not in ERROR_NORMS:
        raise UserError(f"error_norm: {error_norm!r} is none of {', '.join(ERROR_NORMS)}")
    start = velocity.t_max if t_start is None else t_start
    check_interval(t_min, start, velocity.t_max)
    if adaptive and differentiable and error_norm == "sample":
        # Rows with steps of their own meet in one network call, whose derivative JAX cannot take.
        raise UserError(
            "error_norm: sample has no derivatives; expected batch, or fixed steps (no rtol, atol)"
        )
    if adaptive:
        rtol, atol = rtol or atol, atol or rtol
        x, stats = _adaptive(
            velocity,
            noise,
            start=start,
            stop=t_min,
            solver=chosen,
            rtol=rtol,
            atol=atol,
            error_norm=error_norm,
            differentiable=differentiable,
        )
    else:
        times = make_grid(grid, num_steps, t_max=start, t_min=t_min)
        x, stats = _fixed(
            velocity,
            noise,
            times=tuple(times.tolist()),
            solver=chosen,
            differentiable=differentiable,
        )
    return x, counts(stats, chosen, velocity, adaptive=adaptive)


def counts(stats: Stats, solver: Solver, velocity: Any, *, adaptive: bool) -> dict[str, Array]:
    """The public figures of a solve, as `sample` returns them."""
    nfe = solver.nfe(stats.steps, adaptive=adaptive)
    return {
        "nfe": nfe,
        "network_calls": velocity.network_calls * jnp.max(nfe),
        "steps": stats.steps,
        "finite": stats.finite,
        "failed_t": stats.failed_t,
    }


def check_tolerances(rtol: float | None, atol: float | None) -> bool:
    """Whether a solve is adaptive.

    Raises:
        UserError: a tolerance that is not above 0.
    """
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None and not value > 0:
            raise UserError(f"{name}: {value:g} is not above 0")
    return rtol is not None or atol is not None


def check_interval(low: float, high: float, t_max: float) -> None:
    """Raises a `UserError` unless ``0 <= low < high <= t_max``."""
    if not 0 <= low < high <= t_max:
        raise UserError(
            f"times: from {high:g} to {low:g}: expected an interval within [0, {t_max:g}], where "
            "the velocity is defined"
        )


def describe_failure(
    stats: dict[str, Any], indices: Sequence[int] | np.ndarray | None = None
) -> str | None:
    """One line on the samples that are not finite, or None when all are.

    Args:
        stats: of `sample`, on the host.
        indices: the samples' global numbers; default: their rows.
    """
    finite = np.asarray(stats["finite"])
    if finite.all():
        return None
    rows = np.flatnonzero(~finite)
    times = np.asarray(stats["failed_t"])[rows]
    names = rows if indices is None else np.asarray(indices)[rows]
    first = int(np.argmax(times))
    return (
        f"{len(rows)} of {len(finite)} samples are not finite: first sample {names[first]} "
        f"at t = {times[first]:.6g} (1 is noise, 0 is data)"
    )


@partial(jax.jit, static_argnames=("times", "solver", "differentiable"))
def _fixed(velocity, noise, *, times, solver, differentiable):
    return solve_fixed(velocity, noise, np.asarray(times), solver, differentiable=differentiable)


@partial(
    jax.jit,
    static_argnames=("start", "stop", "solver", "rtol", "atol", "error_norm", "differentiable"),
)
def _adaptive(velocity, noise, *, start, stop, solver, **settings):
    return solve_adaptive(velocity, noise, start, stop, solver, **settings)


def trajectory(
    velocity: Any,
    noise: Float[Array, "b ..."],
    *,
    count: int,
    solver: str = "euler",
    num_steps: int = 50,
    grid: str | Sequence[float] = "uniform",
) -> dict[str, Array]:
    """`count` snapshots of a fixed-step solve from noise to data.

    Returns:
        ``t`` ``[count]`` falling grid times, first and last included; ``x`` and ``data``
        ``[count, b, ...]``: the state and the running estimate of where it will land
        (``x - t v``, one more evaluation a snapshot); ``nfe``, those included.

    Raises:
        UserError: a count outside 2..num_steps + 1, and what `sample` raises.
    """
    chosen = get_solver(solver)
    times = make_grid(grid, num_steps, t_max=velocity.t_max)
    if not 2 <= count <= len(times):
        raise UserError(f"trajectory count: {count} is not in 2..{len(times)}")
    stops = np.round(np.linspace(0, len(times) - 1, count)).astype(int)
    return _trajectory(velocity, noise, tuple(times.tolist()), tuple(stops.tolist()), chosen)


@partial(jax.jit, static_argnames=("times", "stops", "solver"))
def _trajectory(velocity, noise, times, stops, solver):
    times = np.asarray(times)
    states = solve_through(velocity, noise, times, stops, solver)
    t = times[np.asarray(stops)]

    def land(pair):
        x, t = pair
        t = jnp.broadcast_to(t, x.shape[:1])
        return data_estimate(x, t, velocity(x, t))

    data = jax.lax.map(land, (states, t))
    nfe = solver.nfe(len(times) - 1) + len(stops)
    return {"t": jnp.asarray(t), "x": states, "data": data, "nfe": jnp.asarray(nfe)}
