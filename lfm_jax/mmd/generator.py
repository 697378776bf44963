"""The few-step generator: the sampler of `lfm_jax.flow`, differentiable, with what may be trained.

    G(z, c) = x_N,    x_{i+1} = one solver step of dx/dt = v(x, t, c) from tau_i to tau_{i+1}

on a grid ``1 >= tau_0 > ... > tau_N = 0``. A flow that is asked at t = 1 knows nothing but the mean
of the data. Told that it is at ``tau_0 < 1`` it takes the noise for a rough picture and completes
it: one step from 0.8 is closer to the data than one from 1 before anything is trained (as few-step
diffusion distillation found, too: Yin et al. 2024, DMD2).

diffrax keeps the N latents of the solve and recomputes a step on the way back, so the activations
in memory are those of one step whatever N is: four forward passes' worth of work a step, three for
the last one of Euler's, and for as many before it as there is memory for (`kept`).
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from lfm_jax.errors import UserError
from lfm_jax.flow import make_grid, sample, sample_sde
from lfm_jax.flow.ode import Stats, solve_fixed
from lfm_jax.flow.sampler import counts
from lfm_jax.flow.solvers import get_solver
from lfm_jax.mmd.trained import solver_times


@flax.struct.dataclass
class Scaled:
    """A velocity times one factor a step: ``scales[i]`` for times in ``(tau_{i+1}, tau_i]``."""

    inner: Any
    times: Float[Array, " k"]
    scales: Float[Array, " n"]

    @property
    def t_max(self) -> float:
        """That of the velocity."""
        return self.inner.t_max

    @property
    def network_calls(self) -> int:
        """That of the velocity."""
        return self.inner.network_calls

    def __call__(self, x: Float[Array, "b ..."], t: Float[Array, " b"]) -> Float[Array, "b ..."]:
        """The scaled velocity."""
        step = (self.times[1:][None] >= t[:, None]).sum(1)
        factor = self.scales[jnp.minimum(step, len(self.scales) - 1)]
        return factor.reshape(-1, *(1,) * (x.ndim - 1)) * self.inner(x, t)


def generate(
    velocity: Any,
    noise: Float[Array, "b ..."],
    *,
    solver: str = "euler",
    num_steps: int,
    grid: str | Sequence[float] = "uniform",
    eta: float = 0.0,
    keys: Key[Array, " b"] | None = None,
    trained_solver: dict[str, Array] | None = None,
    backprop: int = 0,
    kept: int = 1,
    differentiable: bool = True,
) -> tuple[Float[Array, "b ..."], dict[str, Array]]:
    """Samples of `num_steps` solver steps and the counts of `lfm_jax.flow.sample`.

    Args:
        velocity: see `lfm_jax.flow.velocity`.
        noise: the state at the grid's first time.
        solver: a fixed-step name of `lfm_jax.flow.SOLVERS`, or ``ddim``.
        num_steps: N.
        grid: a name of `lfm_jax.flow.GRIDS` or the falling times.
        eta: noise of ``ddim``; 0 is the Euler step.
        keys: of that noise, one a sample.
        trained_solver: see the module; its grid is taken in place of `grid`.
        backprop: gradients flow through the last so many steps only; 0: through all.
        kept: the last so many Euler steps (at least 1) keep their activations for the way back and
            are not run again.
        differentiable: False for sampling: no state is kept.

    Raises:
        UserError: N below 1, an unknown solver or grid, a `trained_solver` of another N, `backprop`
            where steps are stochastic.
    """
    if num_steps < 1:
        raise UserError(f"num_steps: {num_steps} is below 1: a generator takes at least one step")
    if solver == "ddim":
        if backprop or trained_solver:
            raise UserError("solver: ddim takes neither truncated gradients nor a trained grid")
        keys = jax.vmap(jax.random.key)(jnp.arange(len(noise))) if keys is None else keys
        return sample_sde(
            velocity,
            noise,
            keys,
            method="ddim",
            eta=eta,
            num_steps=num_steps,
            grid=grid,
            differentiable=differentiable,
        )
    if trained_solver is None and not differentiable:
        return sample(velocity, noise, solver=solver, num_steps=num_steps, grid=grid)
    chosen = get_solver(solver)
    if trained_solver is None:
        times = make_grid(grid, num_steps, t_max=velocity.t_max)
    else:
        times = solver_times(trained_solver, num_steps, t_max=velocity.t_max)
        velocity = Scaled(inner=velocity, times=times, scales=trained_solver["scales"])
    steps = len(times) - 1
    x, first = noise, steps - backprop if 0 < backprop < steps else 0
    if first:
        x, _ = solve_fixed(velocity, x, times[: first + 1], chosen)
        x = jax.lax.stop_gradient(x)
    # The last Euler step's activations are wanted at once on the way back: kept, not recomputed.
    last = max(steps - max(kept, 1), first) if differentiable and solver == "euler" else steps
    if first < last:
        x, _ = solve_fixed(
            velocity, x, times[first : last + 1], chosen, differentiable=differentiable
        )
    for i in range(last, steps):
        t = jnp.broadcast_to(jnp.asarray(times[i], x.dtype), x.shape[:1])
        x = x + (times[i + 1] - times[i]) * velocity(x, t)
    finite = jnp.isfinite(x).all(tuple(range(1, x.ndim)))
    stats = Stats(
        steps=jnp.full(finite.shape, steps, jnp.int32),
        finite=finite,
        failed_t=jnp.where(finite, jnp.nan, 0.0),
    )
    return x, counts(stats, chosen, velocity, adaptive=False)
