"""One ODE solve of ``dx/dt = v(x, t)`` through diffrax, along given times or by error control.

Built so that a fixed-step solve costs what a hand-written loop costs: the times are compiled in
(`StepTo`), nothing is thrown inside the program, and for inference the loop is a plain while loop.
The velocity goes in as `args`: a leaf of it changes, the program does not.

A solve never raises on numbers: `Stats` says from which time on a sample was not finite.
"""

from collections.abc import Sequence
from typing import Any

import diffrax
import equinox as eqx
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lfm_jax.flow.solvers import Solver

MAX_STEPS = 4096  # of an adaptive solve; far above what a finite velocity needs
MIN_STEP = 1e-6  # an adaptive solve that asks for less has met a velocity that is not finite


@flax.struct.dataclass
class Stats:
    """What a solve did, sample by sample.

    Attributes:
        steps: attempted steps (rejected ones count).
        finite: whether the sample's state is finite throughout and the solve reached its end.
        failed_t: the time at which the first non-finite state appeared, or at which an adaptive
            solve gave up; NaN where `finite`.
    """

    steps: Int[Array, " b"]
    finite: Bool[Array, " b"]
    failed_t: Float[Array, " b"]


def _field(t, x, velocity):
    return velocity(x, jnp.broadcast_to(t, x.shape[:1]))


def _rows_finite(t, x, args):
    del t, args
    return jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)))


def solve_fixed(
    velocity: Any,
    x: Float[Array, "b ..."],
    times: np.ndarray | Float[Array, " n"],
    solver: Solver,
    *,
    terms: diffrax.AbstractTerm | None = None,
    args: Any = None,
    differentiable: bool = False,
) -> tuple[Float[Array, "b ..."], Stats]:
    """The state at the last of `times`, stepping exactly through all of them.

    Args:
        velocity: a velocity pytree.
        x: the state at ``times[0]``.
        times: strictly monotone, concrete or traced (trainable).
        solver: see `lfm_jax.flow.solvers`.
        terms, args: diffrax's, in place of the velocity's ODE term.
        differentiable: allow reverse-mode derivatives: the state is kept at each step and a step is
            recomputed on the way back.
    """
    steps = len(times) - 1
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(_field) if terms is None else terms,
        solver.make(),
        times[0],
        times[-1],
        None,
        x,
        velocity if args is None else args,
        stepsize_controller=diffrax.StepTo(ts=times),
        saveat=diffrax.SaveAt(
            subs=[diffrax.SubSaveAt(t1=True), diffrax.SubSaveAt(steps=1, fn=_rows_finite)]
        ),
        adjoint=_adjoint(steps if differentiable else None),
        max_steps=steps,
        throw=False,
    )
    (x1,), finite = sol.ys[0], sol.ys[1]
    reached = jnp.asarray(times)[1:]
    failed_t = jnp.where(finite.all(0), jnp.nan, reached[jnp.argmin(finite, axis=0)])
    return x1, Stats(
        steps=jnp.full(x.shape[:1], steps, jnp.int32), finite=finite.all(0), failed_t=failed_t
    )


def solve_through(
    velocity: Any,
    x: Float[Array, "b ..."],
    times: np.ndarray,
    stops: Sequence[int],
    solver: Solver,
) -> Float[Array, "k b ..."]:
    """As `solve_fixed`, but the states at ``times[stops]``, the first and last among them if asked."""
    times = np.asarray(times, np.float32)
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(_field),
        solver.make(),
        times[0],
        times[-1],
        None,
        x,
        velocity,
        stepsize_controller=diffrax.StepTo(ts=times),
        saveat=diffrax.SaveAt(ts=times[np.asarray(stops)]),
        adjoint=_adjoint(None),
        max_steps=len(times) - 1,
        throw=False,
    )
    return sol.ys


def solve_adaptive(
    velocity: Any,
    x: Float[Array, "b ..."],
    start: float,
    stop: float,
    solver: Solver,
    *,
    rtol: float,
    atol: float,
    error_norm: str = "sample",
    max_steps: int = MAX_STEPS,
    differentiable: bool = False,
) -> tuple[Float[Array, "b ..."], Stats]:
    """The state at `stop` with the local error held within ``atol + rtol |x|``.

    Args:
        error_norm: ``sample``: each sample has its own steps (RMS over the sample), the network
            still sees whole batches. ``batch``: one RMS over everything, one step size for all (as
            torchdiffeq, hence LFM): a sample then depends on its batch.
    """

    def solve(y, field):
        sol = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver.make(),
            np.float32(start),
            np.float32(stop),
            None,
            y,
            velocity,
            stepsize_controller=diffrax.PIDController(
                rtol=rtol, atol=atol, dtmin=MIN_STEP, force_dtmin=False
            ),
            adjoint=_adjoint(max_steps if differentiable else None),
            max_steps=max_steps,
            throw=False,
        )
        return (
            sol.ys[0],
            sol.stats["num_steps"],
            sol.ts[0],
            sol.result == diffrax.RESULTS.successful,
        )

    if error_norm == "batch":
        y, steps, stopped, done = solve(x, _field)
        steps, stopped, done = (jnp.broadcast_to(a, x.shape[:1]) for a in (steps, stopped, done))
    else:
        y, steps, stopped, done = jax.vmap(lambda row: solve(row, _row_field))(x)
    finite = done & _rows_finite(None, y, None)
    return y, Stats(
        steps=steps.astype(jnp.int32),
        finite=finite,
        failed_t=jnp.where(finite, jnp.nan, stopped.astype(jnp.float32)),
    )


def _adjoint(checkpoints: int | None) -> diffrax.AbstractAdjoint:
    # ForwardMode runs a plain loop, like a hand-written one, and still honours max_steps.
    if checkpoints is None:
        return diffrax.ForwardMode()
    return diffrax.RecursiveCheckpointAdjoint(checkpoints=checkpoints)


def _row_field(t, row, velocity):
    """The velocity of one sample, which `jax.vmap` turns into one call for the whole batch.

    The condition of a velocity has rows of its own, one a sample, so the velocity itself must not
    be mapped over: the rule hands it all rows at once.
    """
    leaves, rebuild = eqx.partition(velocity, eqx.is_array)

    @jax.custom_batching.custom_vmap
    def field(t, row, leaves):
        del t, leaves  # the shape is all that is asked for outside of vmap
        return jnp.zeros_like(row)

    @field.def_vmap
    def _(size, mapped, t, rows, leaves):
        t_mapped, rows_mapped, _ = mapped
        rows = rows if rows_mapped else jnp.broadcast_to(rows, (size, *rows.shape))
        t = t if t_mapped else jnp.broadcast_to(t, (size,))
        return eqx.combine(leaves, rebuild)(rows, t), True

    return field(t, row, leaves)
