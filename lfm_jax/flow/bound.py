"""The Wasserstein bound of latent flow matching, with every term measured.

For data x, encoder f, decoder g, true and learned velocities v and v^ (Dao et al. 2023, eq. 18,
here in the square-root form, which is rigorous: the printed square drops the cross term),

    W2(p, p^) <= (E|x - g(f(x))|^2)^(1/2)  +  L_g e^(1/2 + L) (int E|v - v^|^2 dt)^(1/2),

where the inner expectation is over the law of z_t and norms are sums over elements. L_g is the
decoder's Lipschitz constant, L the learned velocity's. What can be measured are estimates, and not
all from the same side:

- Lipschitz constants from samples are *lower* estimates of the true suprema;
- the error of the velocity is at most the whole validation loss, an *upper* estimate (the loss also
  holds the conditional variance, which no network removes).

Gronwall's lemma on the way down gives more than L: with the one-sided constant ``M(t)``, the
supremum of the largest eigenvalue of ``-(J + J^T)/2``, the exponent ``1/2 + L`` may be replaced by
``sup_t int_0^t (1/2 + M)``, which is often far smaller, and is never below 0: a contraction on one
part of the way does not excuse an error made after it. The exponential makes logarithms necessary.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from lfm_jax import rng
from lfm_jax.errors import UserError
from lfm_jax.flow import path


@dataclasses.dataclass(frozen=True, kw_only=True)
class WassersteinBound:
    """The bound in natural logarithms, and what it is made of.

    Attributes:
        log_autoencoder: log of the root mean squared reconstruction error (L2 norm of an image).
        log_flow: log of the second term.
        log_decoder, exponent, log_velocity: its factors: log L_g, the exponent (at least 0), log of
            the error's root.
        log_total: log of the bound.
        log_diameter: log of the data's diameter, NaN when not given.
    """

    log_autoencoder: float
    log_flow: float
    log_decoder: float
    exponent: float
    log_velocity: float
    log_total: float
    log_diameter: float

    @property
    def dominating(self) -> str:
        """The larger term; of the second, its largest factor."""
        if self.log_autoencoder >= self.log_flow:
            return "autoencoder error"
        factors = {
            "decoder Lipschitz constant": self.log_decoder,
            "velocity Lipschitz constant": self.exponent,
            "velocity error": self.log_velocity,
        }
        return max(factors, key=lambda name: factors[name])

    @property
    def vacuous(self) -> bool:
        """Whether the bound exceeds the data's diameter, which bounds W2 without any model."""
        return self.log_total >= self.log_diameter

    @property
    def verdict(self) -> str:
        """One line."""
        size = f"W2 <= exp({self.log_total:.2f}), dominated by the {self.dominating}"
        if np.isnan(self.log_diameter):
            return size
        word = "vacuous" if self.vacuous else "informative"
        return f"{size}; {word}: the data's diameter is exp({self.log_diameter:.2f})"


def wasserstein_bound(
    *,
    autoencoder_error: float,
    decoder_lipschitz: float,
    velocity_lipschitz: float,
    velocity_error: float,
    diameter: float | None = None,
) -> WassersteinBound:
    """Puts the terms together.

    Args:
        autoencoder_error: ``E|x - g(f(x))|^2``, a squared L2 norm (not a mean over pixels).
        decoder_lipschitz: L_g.
        velocity_lipschitz: L, or one of the smaller constants of `velocity_profile`.
        velocity_error: ``int E|v - v^|^2 dt``, a squared L2 norm.
        diameter: of the data, in the same L2 norm.

    Raises:
        UserError: a negative error or constant (the one-sided constant may be negative).
    """
    for name, value in (
        ("autoencoder_error", autoencoder_error),
        ("decoder_lipschitz", decoder_lipschitz),
        ("velocity_error", velocity_error),
    ):
        if not value >= 0:
            raise UserError(f"{name}: {value:g} is not at least 0")
    with np.errstate(divide="ignore"):
        log_autoencoder = 0.5 * float(np.log(autoencoder_error))
        log_decoder = float(np.log(decoder_lipschitz))
        log_velocity = 0.5 * float(np.log(velocity_error))
    exponent = max(0.5 + float(velocity_lipschitz), 0.0)
    log_flow = log_decoder + exponent + log_velocity
    return WassersteinBound(
        log_autoencoder=log_autoencoder,
        log_flow=log_flow,
        log_decoder=log_decoder,
        exponent=exponent,
        log_velocity=log_velocity,
        log_total=float(np.logaddexp(log_autoencoder, log_flow)),
        log_diameter=float("nan") if diameter is None else float(np.log(diameter)),
    )


@partial(jax.jit, static_argnames=("function", "iterations"))
def lipschitz_estimates(
    function: Callable[[Any, Array], Array],
    args: Any,
    x: Float[Array, "b ..."],
    keys: Key[Array, " b"],
    *,
    iterations: int = 20,
) -> Float[Array, " b"]:
    """Spectral norms of the Jacobian of ``function(args, x)`` at each row, by power iteration.

    Rows of the function must not mix. Each value is a lower estimate of the norm at its point, and
    their maximum one of the Lipschitz constant. `function` is static: hand the same object again.
    """

    def squared(direction):
        forward, pull = jax.vjp(partial(function, args), x)
        del forward
        pushed = jax.jvp(partial(function, args), (x,), (direction,))[1]
        return pull(pushed)[0]

    return jnp.sqrt(_power_iteration(squared, x, keys, iterations))


@partial(jax.jit, static_argnames="iterations")
def velocity_constants(
    velocity: Any,
    x: Float[Array, "b ..."],
    t: Float[Array, " b"],
    keys: Key[Array, " b"],
    *,
    iterations: int = 20,
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Spectral norm and one-sided constant (of the way down) of a velocity's Jacobian at rows."""

    def field(y):
        return velocity(y, t)

    def squared(direction):
        pushed = jax.jvp(field, (x,), (direction,))[1]
        return jax.vjp(field, x)[1](pushed)[0]

    norm = jnp.sqrt(_power_iteration(squared, x, keys, iterations))
    # Shifted by the norm, the symmetric part has no negative eigenvalue left to converge to.
    shift = path.expand(norm, x)

    def shifted(direction):
        pushed = jax.jvp(field, (x,), (direction,))[1]
        pulled = jax.vjp(field, x)[1](direction)[0]
        return shift * direction - 0.5 * (pushed + pulled)

    return norm, _power_iteration(shifted, x, keys, 2 * iterations) - norm


def velocity_profile(
    velocity: Any,
    x0: Float[Array, "b ..."],
    key: Key[Array, ""],
    *,
    times: Sequence[float] | np.ndarray,
    iterations: int = 20,
) -> dict[str, Any]:
    """The learned velocity's constants over time, on noised data.

    Returns:
        ``t``, ``lipschitz`` and ``one_sided`` (maxima over rows, one a time), and what may stand
        for L in the bound: the suprema ``sup_lipschitz``, ``sup_one_sided`` and, by the trapezoid
        rule over `times`, ``int_lipschitz`` and ``int_one_sided``, which is
        ``sup_t int_0^t (1/2 + M) - 1/2``.

    Raises:
        UserError: `times` that do not rise from 0 to 1.
    """
    times = [float(value) for value in times]
    if len(times) < 2 or (times[0], times[-1]) != (0.0, 1.0) or np.any(np.diff(times) <= 0):
        raise UserError(f"times: {times} do not rise from 0 to 1")
    rows = jnp.arange(x0.shape[0], dtype=jnp.uint32)
    noise = rng.normal(rng.stream_keys(key, rng.Stream.NOISE, rows), x0.shape[1:])
    keys = rng.stream_keys(key, rng.Stream.SAMPLE, rows)
    norms, sides = [], []
    for value in times:
        t = jnp.full(x0.shape[:1], value, jnp.float32)
        x = path.interpolate(x0, noise, t)
        norm, side = velocity_constants(velocity, x, t, keys, iterations=iterations)
        norms.append(float(norm.max()))
        sides.append(float(side.max()))
    rates = 0.5 + np.asarray(sides)
    partial_sums = np.cumsum(0.5 * (rates[1:] + rates[:-1]) * np.diff(times))
    return {
        "t": times,
        "lipschitz": norms,
        "one_sided": sides,
        "sup_lipschitz": max(norms),
        "sup_one_sided": max(sides),
        "int_lipschitz": float(np.trapezoid(norms, times)),
        "int_one_sided": float(max(partial_sums.max(), 0.0) - 0.5),
    }


def _power_iteration(operator, x, keys, iterations):
    axes = tuple(range(1, x.ndim))

    def unit(y):
        return y / jnp.maximum(jnp.sqrt(jnp.sum(y * y, axes, keepdims=True)), 1e-30)

    def body(_, carry):
        direction, _ = carry
        image = operator(direction)
        return unit(image), jnp.sum(direction * image, axes)

    start = unit(rng.normal(keys, x.shape[1:]))
    zero = jnp.zeros(x.shape[:1], x.dtype)
    return jnp.maximum(jax.lax.fori_loop(0, iterations, body, (start, zero))[1], 0.0)
