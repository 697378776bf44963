"""Inpainting by an unconditional flow, without training: replace what is known, at every step.

After a step from t to s the known part of the state is what the path says it is,

    x_s <- hole * x_s + (1 - hole) * ((1 - s) z + s e),

with the known latent z and fresh noise e. The two parts know little of each other, so a step is
repeated: noise is added back to where the step began, which for the straight path is

    x_t = a x_s + sqrt(t^2 - a^2 s^2) e,        a = (1 - t) / (1 - s),

and the step is taken again (Lugmayr et al. 2022, "RePaint", algorithm 1, there for diffusion). It
is the baseline of the trained condition: a latent position next to the hole has seen the hole's
fill through the encoder, and counts as hole here.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from lfm_jax import rng
from lfm_jax.errors import UserError
from lfm_jax.flow.grids import make_grid
from lfm_jax.flow.ode import solve_fixed
from lfm_jax.flow.path import interpolate
from lfm_jax.flow.solvers import get_solver


def inpaint_by_replacement(
    velocity: Any,
    noise: Float[Array, "b h w c"],
    known: Float[Array, "b h w c"],
    hole: Bool[Array, "b h w"],
    keys: Key[Array, " b"],
    *,
    solver: str = "euler",
    num_steps: int = 50,
    grid: str = "uniform",
    resample: int = 5,
) -> tuple[Float[Array, "b h w c"], dict[str, Array]]:
    """Latents that agree with `known` outside of `hole`.

    Args:
        velocity: an unconditional (or class-conditional) velocity.
        noise: the state at ``t = 1``.
        known: scaled latents of the masked image.
        hole: latent positions to fill (`latent_hole`).
        keys: of the fresh noise, one a sample.
        solver, num_steps, grid: as `lfm_jax.flow.sample`; one step a solve, so that solvers with a
            memory gain nothing.
        resample: how often each step is taken; 1: no repetition.

    Returns:
        The latents, and counts as `lfm_jax.flow.sample` has them ("nfe", "network_calls").

    Raises:
        UserError: an unknown solver or grid, ``resample < 1``.
    """
    if resample < 1:
        raise UserError(f"resample: {resample} is below 1")
    chosen = get_solver(solver)
    times = make_grid(grid, num_steps, t_max=velocity.t_max)
    x = _fill(
        velocity, noise, known, hole, keys, jnp.asarray(times), solver=chosen, resample=resample
    )
    nfe = jnp.full(noise.shape[:1], resample * num_steps * chosen.nfe(1))
    return x, {"nfe": nfe, "network_calls": velocity.network_calls * jnp.max(nfe)}


@partial(jax.jit, static_argnames=("solver", "resample"))
def _fill(velocity, x, known, hole, keys, times, *, solver, resample):
    inside = hole[..., None]

    def fresh(which: Array) -> Array:
        return rng.normal(jax.vmap(lambda k: jax.random.fold_in(k, which))(keys), x.shape[1:])

    def once(x, index):
        i, repeat = index // resample, index % resample
        t, s = times[i], times[i + 1]
        x, _ = solve_fixed(velocity, x, jnp.stack([t, s]), solver)
        at = jnp.broadcast_to(s, x.shape[:1])
        x = jnp.where(inside, x, interpolate(known, fresh(2 * index), at))
        # Back to where the step began, unless it was taken for the last time.
        kept = (1 - t) / jnp.maximum(1 - s, 1e-12)
        spread = jnp.sqrt(jnp.maximum(t**2 - (kept * s) ** 2, 0.0))
        again = kept * x + spread * fresh(2 * index + 1)
        return jnp.where(repeat < resample - 1, again, x), None

    steps = jnp.arange(resample * (len(times) - 1))
    x, _ = jax.lax.scan(once, x, steps)
    return jnp.where(inside, x, known)


def latent_hole(hole: Bool[Array, "b h w"], factor: int) -> Bool[Array, "b i j"]:
    """Latent positions that hold at least one pixel of the hole."""
    b, h, w = hole.shape
    return hole.reshape(b, h // factor, factor, w // factor, factor).any((2, 4))
