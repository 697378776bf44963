"""Second-order solvers at one velocity evaluation a step, as diffrax solver classes.

Both remember the previous step's evaluation and start with an Euler step, whose local error is of
second order, so the whole solve is of second order. ``h`` is a step, ``r`` its ratio to the one
before.

`AdamsBashforth2` extrapolates the velocity linearly in time,

    x' = x + h [(1 + r/2) v_n - (r/2) v_{n-1}].

`Exponential2` extrapolates the estimate of the data instead, ``D_n = x_n - t_n v_n``, and solves
the linear rest exactly. From ``dx/dt = (x - D)/t``: with ``D(t) = D_n + (t - t_n) k``,
``k = (D_n - D_{n-1}) / (t_n - t_{n-1})``, a step from t to s is

    x' = (s/t) x + (1 - s/t) D_n - k [s ln(s/t) + t - s],

which is finite at t = 1 and at s = 0; its error falls like ``h^2 log(1/h)``. It is the flow's
DPM-Solver++(2M) (Lu et al. 2022, eq. 17) with time in place of the log-SNR, which is infinite at
both ends, as the variable of extrapolation. It pays on grids that are fine near the data
(``quadratic``) with few steps; on the uniform grid `AdamsBashforth2` is ahead.
"""

from collections.abc import Callable
from typing import ClassVar

import diffrax
import jax.numpy as jnp


class _Multistep(diffrax.AbstractSolver):
    """The bookkeeping of a solver that remembers one quantity of the previous step."""

    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar[Callable] = diffrax.LocalLinearInterpolation

    def order(self, terms):
        """Two."""
        return 2

    def init(self, terms, t0, t1, y0, args):
        """No previous step: an infinite one turns the first step into Euler's."""
        return jnp.zeros_like(y0), jnp.asarray(jnp.inf, jnp.result_type(t0))

    def func(self, terms, t0, y0, args):
        """The velocity."""
        return terms.vf(t0, y0, args)


class AdamsBashforth2(_Multistep):
    """The variable-step two-step Adams-Bashforth method."""

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step, one evaluation."""
        previous, length = solver_state
        control = terms.contr(t0, t1)
        v = terms.vf(t0, y0, args)
        r = (t1 - t0) / length
        y1 = y0 + control * ((1 + r / 2) * v - (r / 2) * previous)
        state = (v, t1 - t0)
        return y1, None, {"y0": y0, "y1": y1}, state, diffrax.RESULTS.successful


class Exponential2(_Multistep):
    """The two-step exponential method in the estimate of the data."""

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step, one evaluation; for falling times above zero."""
        previous, length = solver_state
        # diffrax counts falling times upwards from -t; flow times are never negative.
        t, s = jnp.abs(t0), jnp.abs(t1)
        data = y0 - t * terms.vf(t0, y0, args)
        slope = (previous - data) / length
        log_term = jnp.where(s > 0, s * jnp.log(jnp.where(s > 0, s, 1) / t), 0)
        y1 = (s / t) * y0 + (1 - s / t) * data - slope * (log_term + t - s)
        state = (data, t1 - t0)
        return y1, None, {"y0": y0, "y1": y1}, state, diffrax.RESULTS.successful
