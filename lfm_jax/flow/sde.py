"""Stochastic sampling with the marginals of the flow.

The SDE (integrated from t = 1 down to 0; see Ma et al. 2024, "SiT", section 2.3)

    dx = [v - (g^2 / 2) score] dt + g dW,     score = -(x + (1 - t) v) / t,

has the flow's marginals for every g. With the default ``g^2 = 2 eta^2 t`` its drift is
``v + eta^2 (x + (1 - t) v)``: finite at t = 0. `ddim` is no SDE solve but the discrete step of Song
et al. 2021 ("Denoising Diffusion Implicit Models", eq. 12 and 16) for ``x_t = (1 - t) x0 + t e``:

    x_s = (1 - s) x0^ + sqrt(s^2 - c^2) e^ + c xi,
    c^2 = eta^2 (s/t)^2 (t^2 - ((1 - t) s / (1 - s))^2).

``eta = 0`` is the ODE (for `ddim` exactly its Euler step), ``eta = 1`` for `ddim` ancestral
sampling. The noise of a sample is a function of its own key: no batch, no topology changes it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from lfm_jax import rng
from lfm_jax.errors import UserError
from lfm_jax.flow.grids import make_grid
from lfm_jax.flow.ode import Stats, pack, solve_terms
from lfm_jax.flow.path import data_estimate, noise_estimate

# Velocity evaluations a step; the last step is the denoising one and costs one.
METHODS = {"euler_maruyama": 1, "heun": 2, "ddim": 1}
TREE_TOLERANCE = 2.0**-14  # below it the Brownian path is interpolated; finer than any grid here


def sample_sde(
    velocity: Any,
    noise: Float[Array, "b ..."],
    keys: Key[Array, " b"],
    *,
    method: str = "euler_maruyama",
    eta: float = 1.0,
    num_steps: int = 250,
    grid: str | Sequence[float] = "uniform",
    t_start: float | None = None,
    differentiable: bool = False,
) -> tuple[Float[Array, "b ..."], dict[str, Array]]:
    """Samples with fresh noise on the way; the last step only denoises, ``x0 = x - t v``.

    Args:
        velocity: see `lfm_jax.flow.velocity`.
        noise: the state at `t_start` (default ``velocity.t_max``).
        keys: one a sample: ``stream_keys(key, Stream.SDE, sample indices)``. The Brownian path is a
            function of the key, not of the grid, so finer grids converge to one image.
        method: ``euler_maruyama`` (1 evaluation a step), ``heun`` (2; second order in the drift) or
            ``ddim``.
        eta: strength of the noise.
        num_steps: intervals of the grid, the denoising one included.
        differentiable: allow reverse-mode derivatives.

    Returns:
        Samples and counts as `lfm_jax.flow.sample` does.

    Raises:
        UserError: an unknown method or grid, ``num_steps < 1``, an ``eta`` below 0 (or, for
            ``ddim``, above 1).
    """
    if method not in METHODS:
        raise UserError(f"sde method: {method!r} is none of {', '.join(METHODS)}")
    if eta < 0 or (method == "ddim" and eta > 1):
        raise UserError(f"eta: {eta:g} is not {'in [0, 1]' if method == 'ddim' else 'at least 0'}")
    start = velocity.t_max if t_start is None else t_start
    times = make_grid(grid, num_steps, t_max=start)
    settings = (tuple(times.tolist()), method, float(eta), differentiable)
    x, stats = _solve(velocity, noise, keys, *settings)
    nfe = METHODS[method] * (stats.steps - 1) + 1
    return x, {
        "nfe": nfe,
        "network_calls": velocity.network_calls * jnp.max(nfe),
        "steps": stats.steps,
        "finite": stats.finite,
        "failed_t": stats.failed_t,
    }


@partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _solve(velocity, noise, keys, times, method, eta, differentiable):
    times = np.asarray(times)
    x, steps = noise, len(times) - 1
    finite = jnp.ones(noise.shape[:1], bool)
    stats = Stats(steps=jnp.zeros_like(finite, jnp.int32), finite=finite, failed_t=finite * jnp.nan)
    if steps > 1:
        leaves, unpack = pack(velocity)
        if method == "ddim":
            terms, solver = diffrax.ODETerm(partial(_velocity, unpack)), DDIM(eta=eta)
        else:
            drift = diffrax.ODETerm(partial(_drift, unpack, eta))
            path = Brownian(keys=keys, shape=noise.shape[1:])
            terms = diffrax.MultiTerm(drift, AdditiveNoise(eta=eta, path=path))
            solver = diffrax.Euler() if method == "euler_maruyama" else diffrax.Heun()
        x, stats = solve_terms(
            terms, solver, (leaves, keys), noise, times[:-1], differentiable=differentiable
        )
    t = jnp.full(x.shape[:1], times[-2])
    x = data_estimate(x, t, velocity(x, t))
    landed = jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)))
    failed_t = jnp.where(stats.finite & ~landed, 0.0, stats.failed_t)
    return x, Stats(steps=stats.steps + 1, finite=stats.finite & landed, failed_t=failed_t)


def _velocity(unpack, t, x, args):
    return unpack(args[0])(x, jnp.broadcast_to(t, x.shape[:1]))


def _drift(unpack, eta, t, x, args):
    v = _velocity(unpack, t, x, args)
    return v + eta**2 * noise_estimate(x, jnp.broadcast_to(t, x.shape[:1]), v)


class Brownian(eqx.Module):
    """Independent Brownian motions on [0, 1], one a sample, each from its own key."""

    keys: Key[Array, " b"]
    shape: tuple[int, ...] = eqx.field(static=True)

    def increment(self, t0, t1) -> Float[Array, "b ..."]:
        """``W(t1) - W(t0)`` of every sample."""

        def one(key):
            tree = diffrax.VirtualBrownianTree(
                0.0, 1.0, tol=TREE_TOLERANCE, shape=self.shape, key=key
            )
            return cast(Array, tree.evaluate(t0, t1))

        return jax.vmap(one)(self.keys)


class AdditiveNoise(diffrax.AbstractTerm):
    """``g(t) dW`` with ``g = eta sqrt(2 t)``: a number times an array, hence no linear operator."""

    eta: float = eqx.field(static=True)
    path: Brownian

    def vf(self, t, y, args):
        """g(t)."""
        return self.eta * jnp.sqrt(2 * jnp.maximum(t, 0.0))

    def contr(self, t0, t1, **kwargs):
        """The Brownian increment."""
        return self.path.increment(t0, t1)

    def prod(self, vf, control):
        """``g dW``."""
        return vf * control


class DDIM(diffrax.AbstractSolver):
    """The stochastic DDIM step on the straight path; `args` are ``(velocity's leaves, keys)``."""

    eta: float = eqx.field(static=True)
    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar[Callable] = diffrax.LocalLinearInterpolation

    def order(self, terms):
        """One."""
        return 1

    def init(self, terms, t0, t1, y0, args):
        """Counts the steps: a step's noise is keyed by its number."""
        return jnp.zeros((), jnp.uint32)

    def func(self, terms, t0, y0, args):
        """The velocity."""
        return terms.vf(t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        """One step, one evaluation."""
        # diffrax counts falling times upwards from -t; flow times are never negative.
        t, s = jnp.abs(t0), jnp.abs(t1)
        v = terms.vf(t0, y0, args)
        rows = y0.shape[:1]
        data = data_estimate(y0, jnp.broadcast_to(t, rows), v)
        old = noise_estimate(y0, jnp.broadcast_to(t, rows), v)
        variance = (self.eta * s / t) ** 2 * (t**2 - ((1 - t) * s / (1 - s)) ** 2)
        keys = jax.vmap(lambda key: jax.random.fold_in(key, solver_state))(args[1])
        fresh = rng.normal(keys, y0.shape[1:])
        kept = jnp.sqrt(jnp.maximum(s**2 - variance, 0.0))
        y1 = (1 - s) * data + kept * old + jnp.sqrt(jnp.maximum(variance, 0.0)) * fresh
        return y1, None, {"y0": y0, "y1": y1}, solver_state + 1, diffrax.RESULTS.successful
