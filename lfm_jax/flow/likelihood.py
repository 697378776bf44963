"""The log-likelihood of latents under a flow, by the instantaneous change of variables.

Along ``dx/dt = v`` the density changes by ``d log p / dt = -div v`` (Chen et al. 2018, "Neural
Ordinary Differential Equations", eq. 8), so

    log p_0(x_0) = log N(x_1; 0, I) + int_0^1 div v(x_t, t) dt.

The divergence is the exact trace (one Jacobian-vector product a dimension) or Hutchinson's estimate
``e^T J e`` with random signs e, which is unbiased (Grathwohl et al. 2019, "FFJORD").
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from lfm_jax.errors import UserError
from lfm_jax.flow.grids import make_grid
from lfm_jax.flow.ode import solve_adaptive, solve_fixed
from lfm_jax.flow.sampler import check_tolerances
from lfm_jax.flow.solvers import get_solver


def log_likelihood(
    velocity: Any,
    x0: Float[Array, "b ..."],
    keys: Key[Array, " b"] | None = None,
    *,
    num_probes: int = 1,
    solver: str = "rk4",
    num_steps: int = 50,
    rtol: float | None = None,
    atol: float | None = None,
) -> tuple[Float[Array, " b"], dict[str, Array]]:
    """``log p_0(x0)`` in nats, sample by sample.

    Args:
        velocity: a velocity with ``t_max = 1``.
        x0: latents at the scale on which the flow was trained.
        keys: one a sample for Hutchinson's estimate; None: the exact trace.
        num_probes: random vectors a sample, the same along the whole path.
        solver, num_steps, rtol, atol: as in `lfm_jax.flow.sample`; error control is per sample and
            covers the log-density too.

    Returns:
        The log-likelihoods, and ``nfe`` (evaluations of velocity and divergence together),
        ``noise`` (the latents' noise), ``finite``, ``failed_t``.

    Raises:
        UserError: as `sample`; ``num_probes < 1``; a velocity that does not reach t = 1.
    """
    if velocity.t_max != 1:
        raise UserError(
            f"likelihood: the velocity is defined up to t = {velocity.t_max:g}; only at 1 is the "
            "density known"
        )
    if num_probes < 1:
        raise UserError(f"num_probes: {num_probes} is below 1")
    adaptive = check_tolerances(rtol, atol)
    chosen = get_solver(solver, adaptive=adaptive, upward=True)
    if adaptive:
        how = ("rtol", rtol or atol), ("atol", atol or rtol)
    else:
        how = (("times", tuple(make_grid("uniform", num_steps)[::-1].tolist())),)
    x1, change, stats = _integrate(velocity, x0, keys, num_probes, chosen, how)
    dims = int(np.prod(x0.shape[1:]))
    squared = jnp.sum(jnp.square(x1), axis=tuple(range(1, x1.ndim)))
    log_p = -0.5 * (squared + dims * np.log(2 * np.pi)) + change
    return log_p, {
        "nfe": chosen.nfe(stats.steps, adaptive=adaptive),
        "noise": x1,
        "finite": stats.finite,
        "failed_t": stats.failed_t,
    }


def bits_per_dim(log_p: Float[Array, " b"], dims: int, *, scale: float = 1.0) -> Float[Array, " b"]:
    """Bits per latent dimension, ``-log2 p / dims``; a density's, hence possibly negative.

    Args:
        log_p: nats, of scaled latents.
        dims: elements of one latent.
        scale: of the latents; the result then is that of the unscaled ones.
    """
    return -log_p / (dims * np.log(2)) - np.log2(scale)


@partial(jax.jit, static_argnums=(3, 4, 5))
def _integrate(velocity, x0, keys, num_probes, solver, how):
    probes = None
    if keys is not None:
        probes = jax.vmap(
            lambda k: jax.random.rademacher(k, (num_probes, *x0.shape[1:]), x0.dtype)
        )(keys)
    start = (x0, jnp.zeros(x0.shape[:1], x0.dtype))
    args = (velocity, probes)
    options = dict(how)
    if "times" in options:
        times = np.asarray(options["times"])
        (x1, change), stats = solve_fixed(args, start, times, solver, field=_with_divergence)
    else:
        (x1, change), stats = solve_adaptive(
            args, start, 0.0, 1.0, solver, field=_with_divergence, **options
        )
    return x1, change, stats


def _with_divergence(t, y, args):
    velocity, probes = args
    x, _ = y

    def along(direction):
        v, change = jax.jvp(lambda z: velocity(z, t), (x,), (direction,))
        return v, jnp.sum(direction * change, axis=tuple(range(1, x.ndim)))

    if probes is not None:
        v, quadratic = jax.vmap(along, in_axes=1, out_axes=(None, 0))(probes)
        return v, jnp.mean(quadratic, axis=0)
    basis = jnp.eye(int(np.prod(x.shape[1:])), dtype=x.dtype).reshape(-1, *x.shape[1:])
    # One dimension at a time: the batch is what keeps the machine busy, and memory stays flat.
    diagonal = jax.lax.map(lambda e: along(jnp.broadcast_to(e, x.shape))[1], basis)
    return velocity(x, t), jnp.sum(diagonal, axis=0)
