"""The straight path between data and noise, and what a velocity says about its two ends.

    x_t = (1 - t) x0 + (s + (1 - s) t) e,        u = dx_t/dt = (1 - s) e - x0,

with data ``x0`` at ``t = 0``, noise ``e ~ N(0, I)`` at ``t = 1`` and ``s = 1e-5`` (Lipman et al.
2023, "Flow Matching for Generative Modeling"; the direction of time is that of Dao et al. 2023,
"Flow Matching in Latent Space"). The estimates below are written for ``s = 0``: the difference is
far below the error of any network.
"""

from jaxtyping import Array, Float, Shaped

SIGMA_MIN = 1e-5


def expand(t: Shaped[Array, " b"], like: Shaped[Array, "b ..."]) -> Shaped[Array, "b ..."]:
    """``t`` with as many trailing axes as `like` has."""
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim))


def interpolate(
    x0: Float[Array, "b ..."],
    noise: Float[Array, "b ..."],
    t: Float[Array, " b"],
    *,
    sigma_min: float = SIGMA_MIN,
) -> Float[Array, "b ..."]:
    """``x_t`` between data `x0` (t = 0) and `noise` (t = 1)."""
    t = expand(t, x0)
    return (1 - t) * x0 + (sigma_min + (1 - sigma_min) * t) * noise


def target(
    x0: Float[Array, "b ..."], noise: Float[Array, "b ..."], *, sigma_min: float = SIGMA_MIN
) -> Float[Array, "b ..."]:
    """The conditional velocity ``u`` that the network regresses on."""
    return (1 - sigma_min) * noise - x0


def data_estimate(
    x: Float[Array, "b ..."], t: Float[Array, " b"], v: Float[Array, "b ..."]
) -> Float[Array, "b ..."]:
    """``E[x0 | x_t] = x - t v``: where the flow would land if it went straight on."""
    return x - expand(t, x) * v


def noise_estimate(
    x: Float[Array, "b ..."], t: Float[Array, " b"], v: Float[Array, "b ..."]
) -> Float[Array, "b ..."]:
    """``E[e | x_t] = x + (1 - t) v``."""
    return x + (1 - expand(t, x)) * v


def score(
    x: Float[Array, "b ..."], t: Float[Array, " b"], v: Float[Array, "b ..."]
) -> Float[Array, "b ..."]:
    """``grad log p_t(x) = -E[e | x_t] / t``; infinite at ``t = 0``, where no noise is left."""
    return -noise_estimate(x, t, v) / expand(t, x)
