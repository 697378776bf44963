"""One ODE solve of ``dx/dt = v(x, t)`` through diffrax, along given times or by error control.

Built so that a fixed-step solve costs what a hand-written loop costs: the times are compiled in
(`_Times`), nothing is thrown inside the program, and for inference the loop is a plain while loop.
The velocity goes in as `args`: a leaf of it changes, the program does not.

A solve never raises on numbers: `Stats` says from which time on a sample was not finite.

A *field* here is ``field(t [b], x, args) -> dx/dt`` on a whole batch, where ``x`` is an array with
a leading batch axis or a pytree of such.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import diffrax
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lfm_jax.flow.solvers import Solver

MAX_STEPS = 4096  # of an adaptive solve; far above what a finite velocity needs
MIN_STEP = 1e-6  # an adaptive solve that asks for less has met a velocity that is not finite

Field = Callable[[Array, Any, Any], Any]


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


class _Times(diffrax.StepTo):
    """`diffrax.StepTo` without its checks of the times, which their makers have made.

    They are calls back into Python, and a program with one of those is kept in no compilation cache
    and compiles for no machine that is not there.
    """

    def wrap(self, direction):
        return type(self)(ts=self.ts * direction)

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        return self.ts[1], 2


def velocity_field(t, x, velocity):
    """The field whose `args` is the velocity."""
    return velocity(x, t)


def solve_fixed(
    args: Any,
    x: Any,
    times: np.ndarray | Float[Array, " n"],
    solver: Solver,
    *,
    field: Field = velocity_field,
    differentiable: bool = False,
) -> tuple[Any, Stats]:
    """The state at the last of `times`, stepping exactly through all of them.

    Args:
        args: what the field is given: the velocity, for the default field.
        x: the state at ``times[0]``.
        times: strictly monotone, concrete or traced (trainable).
        solver: see `lfm_jax.flow.solvers`.
        field: the field to follow.
        differentiable: allow reverse-mode derivatives: the state is kept at each step and a step is
            recomputed on the way back.
    """
    leaves, unpack = pack(args)
    terms = _whole_batch(field, unpack)
    return solve_terms(terms, solver.make(), leaves, x, times, differentiable=differentiable)


def solve_terms(
    terms: diffrax.AbstractTerm,
    solver: diffrax.AbstractSolver,
    args: Any,
    x: Any,
    times: np.ndarray | Float[Array, " n"],
    *,
    differentiable: bool = False,
) -> tuple[Any, Stats]:
    """`solve_fixed` for diffrax's own terms and solver (SDEs, stochastic steps)."""
    steps = len(times) - 1
    sol = diffrax.diffeqsolve(
        terms,
        solver,
        times[0],
        times[-1],
        None,
        x,
        args,
        stepsize_controller=_Times(ts=times),
        saveat=diffrax.SaveAt(
            subs=[diffrax.SubSaveAt(t1=True), diffrax.SubSaveAt(steps=1, fn=_rows_finite)]
        ),
        adjoint=_adjoint(steps if differentiable else None),
        max_steps=steps,
        throw=False,
    )
    last, finite = cast(tuple[Any, Array], sol.ys)  # one of each `SubSaveAt`
    reached = jnp.asarray(times)[1:]
    failed_t = jnp.where(finite.all(0), jnp.nan, reached[jnp.argmin(finite, axis=0)])
    return jax.tree.map(lambda y: y[0], last), Stats(
        steps=jnp.full(finite.shape[1:], steps, jnp.int32),
        finite=finite.all(0),
        failed_t=failed_t,
    )


def solve_through(
    velocity: Any,
    x: Float[Array, "b ..."],
    times: np.ndarray,
    stops: Sequence[int],
    solver: Solver,
) -> Float[Array, "k b ..."]:
    """As `solve_fixed`, but the states at ``times[stops]``; `stops` rise."""
    times = np.asarray(times)
    leaves, unpack = pack(velocity)
    sol = diffrax.diffeqsolve(
        _whole_batch(velocity_field, unpack),
        solver.make(),
        times[0],
        times[-1],
        None,
        x,
        leaves,
        stepsize_controller=_Times(ts=times),
        saveat=diffrax.SaveAt(ts=jnp.asarray(times[np.asarray(stops)])),
        adjoint=_adjoint(None),
        max_steps=len(times) - 1,
        throw=False,
    )
    return cast(Array, sol.ys)


def solve_adaptive(
    args: Any,
    x: Any,
    start: float,
    stop: float,
    solver: Solver,
    *,
    rtol: float,
    atol: float,
    error_norm: str = "sample",
    field: Field = velocity_field,
    max_steps: int = MAX_STEPS,
    differentiable: bool = False,
) -> tuple[Any, Stats]:
    """The state at `stop` with the local error held within ``atol + rtol |x|``.

    Args:
        error_norm: ``sample``: each sample has its own steps (RMS over the sample), the network
            still sees whole batches. ``batch``: one RMS over everything, one step size for all (as
            torchdiffeq, hence LFM): a sample then depends on its batch.

    Returns:
        The state, and what the solve did; `Solver.nfe` counts its evaluations.
    """

    leaves, unpack = pack(args)
    whole = error_norm == "batch"
    first, slope = first_step(
        args, x, start, stop, solver, rtol=rtol, atol=atol, field=field, whole=whole
    )

    def solve(y, first, slope, terms):
        sol = diffrax.diffeqsolve(
            terms,
            solver.make(),
            float(start),
            float(stop),
            None,
            y,
            leaves,
            stepsize_controller=_Controller(
                rtol=rtol, atol=atol, dtmin=MIN_STEP, force_dtmin=False, first=first
            ),
            # The slope at the start is known: a solver that reuses slopes need not ask for it.
            solver_state=(jnp.asarray(False), slope) if solver.first else None,
            adjoint=_adjoint(max_steps if differentiable else None),
            max_steps=max_steps,
            throw=False,
        )
        assert sol.ts is not None  # the default `SaveAt` keeps the end
        done = sol.result == diffrax.RESULTS.successful
        return jax.tree.map(lambda a: a[0], sol.ys), sol.stats["num_steps"], sol.ts[0], done

    if whole:
        y, *told = solve(x, first[0], slope, _whole_batch(field, unpack))
        rows = jax.tree.leaves(x)[0].shape[:1]
        steps, stopped, done = (jnp.broadcast_to(a, rows) for a in told)
    else:
        y, steps, stopped, done = jax.vmap(partial(solve, terms=_row_by_row(field, unpack)))(
            x, first, slope
        )
    finite = done & _rows_finite(None, y, None)
    return y, Stats(
        steps=steps.astype(jnp.int32),
        finite=finite,
        failed_t=jnp.where(finite, jnp.nan, stopped),
    )


class _Controller(diffrax.PIDController):
    """Error control that starts with a given step.

    diffrax would choose one itself, but on falling times it takes 0.01 whatever the velocity.
    """

    first: Float[Array, ""] | None = None

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        """The end of the first step."""
        del dt0
        return super().init(terms, t0, t1, y0, self.first, args, func, error_order)


def first_step(
    args: Any,
    x: Any,
    start: float,
    stop: float,
    solver: Solver,
    *,
    rtol: float,
    atol: float,
    field: Field = velocity_field,
    whole: bool = False,
) -> tuple[Float[Array, " b"], Any]:
    """A length for the first step of each row (of all rows together where `whole`).

    Two evaluations tell the size of the slope and of its change, hence a step whose error is about
    a hundredth of the tolerance (Hairer, Norsett and Wanner, "Solving Ordinary Differential
    Equations I", section II.4).

    Returns:
        The lengths, positive, and the slope ``field(start, x)``, which is the first of the two.
    """
    direction = 1.0 if stop > start else -1.0
    rows = jax.tree.leaves(x)[0].shape[:1]
    scale = jax.tree.map(lambda a: atol + rtol * jnp.abs(a), x)

    def size(tree):
        parts = jax.tree.leaves(jax.tree.map(lambda a, s: jnp.square(a / s), tree, scale))
        sums = sum(jnp.sum(a, axis=tuple(range(1, a.ndim))) for a in parts)
        mean = sums / sum(a[0].size for a in parts)
        return jnp.sqrt(jnp.broadcast_to(jnp.mean(mean), rows) if whole else mean)

    def step(tree, slope, h):
        def move(a, f):
            return a + direction * h.reshape(rows + (1,) * (a.ndim - 1)) * f

        return jax.tree.map(move, tree, slope)

    slope = field(jnp.full(rows, float(start)), x, args)
    state, change = size(x), size(slope)
    tiny = (state < 1e-5) | (change < 1e-5)
    trial = jnp.where(tiny, 1e-6, 0.01 * state / jnp.where(tiny, 1.0, change))
    after = field(float(start) + direction * trial, step(x, slope, trial), args)
    bend = size(jax.tree.map(jnp.subtract, after, slope)) / trial
    largest = jnp.maximum(change, bend)
    guess = jnp.where(
        largest <= 1e-15,
        jnp.maximum(1e-6, 1e-3 * trial),
        (0.01 / jnp.maximum(largest, 1e-15)) ** (1 / solver.order),
    )
    h = jnp.minimum(100 * trial, guess)
    # A velocity that is not finite is met by the solve itself, which then says so.
    h = jnp.where(jnp.isfinite(h), h, 0.01)
    return jax.lax.stop_gradient(jnp.clip(h, MIN_STEP, abs(stop - start))), slope


def _adjoint(checkpoints: int | None) -> diffrax.AbstractAdjoint:
    # ForwardMode runs a plain loop, like a hand-written one, and still honours max_steps.
    if checkpoints is None:
        return diffrax.ForwardMode()
    return diffrax.RecursiveCheckpointAdjoint(checkpoints=checkpoints)


def _rows_finite(t, x, args):
    del t, args
    rows = [jnp.all(jnp.isfinite(y), axis=tuple(range(1, y.ndim))) for y in jax.tree.leaves(x)]
    return jnp.all(jnp.stack(rows), axis=0)


def pack(args: Any) -> tuple[list[Array], Callable[[list[Array]], Any]]:
    """The leaves of `args` for diffrax, and how to build `args` from them again.

    diffrax takes pytrees apart and fills them with placeholders; a velocity stays out of that.
    """
    leaves, structure = jax.tree.flatten(args)
    return leaves, partial(jax.tree.unflatten, structure)


def _whole_batch(field: Field, unpack: Callable) -> diffrax.ODETerm:
    def all_rows(t, x, leaves):
        return field(jnp.broadcast_to(t, jax.tree.leaves(x)[0].shape[:1]), x, unpack(leaves))

    return diffrax.ODETerm(all_rows)


def _row_by_row(field: Field, unpack: Callable) -> diffrax.ODETerm:
    """The field of one sample, which `jax.vmap` turns into one call for the whole batch.

    `args` hold rows of their own (the condition of a velocity), one a sample, so they must not be
    mapped over: the rule hands the field all rows at once.
    """

    def one_row(t, row, leaves):
        @jax.custom_batching.custom_vmap
        def call(t, row, leaves):
            del t, leaves  # outside of vmap nothing but the shape is asked for
            return jax.tree.map(jnp.zeros_like, row)

        @call.def_vmap
        def _(size, mapped, t, rows, leaves):
            t_mapped, rows_mapped, _ = mapped
            rows = jax.tree.map(
                lambda a, m: a if m else jnp.broadcast_to(a, (size, *a.shape)), rows, rows_mapped
            )
            t = t if t_mapped else jnp.broadcast_to(t, (size,))
            out = field(t, rows, unpack(leaves))
            return out, jax.tree.map(lambda _: True, out)

        return call(t, row, leaves)

    return diffrax.ODETerm(one_row)
