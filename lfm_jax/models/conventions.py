"""Which time and target a network was trained with, translated to this package's at its border.

Inside the package a network is a velocity: ``x_t = (1 - t) x0 + t e``, ``v = e - x0``, t = 0 data.
A network imported from elsewhere keeps its parameters bit for bit and names its `convention`:

- ``flow``: ours (LFM's); nothing to do.
- ``reversed``: t = 1 is data and the velocity points to the data (SiT, flow_matching):
  ``v(x, t) = -net(x, 1 - t)``.
- ``vp``: predicts the noise of a variance-preserving diffusion ``x_vp = a x0 + s e`` with
  ``a^2 + s^2 = 1``, on 1000 steps of linear beta 1e-4..0.02 (DDPM, DDIM, ADM, DiT). With
  ``t = s / (a + s)`` the two paths meet up to scale, ``x_vp = (a + s) x``, and

      v(x, t) = (eps(x_vp, index) - x) / (1 - t),   a + s = 1 / sqrt((1 - t)^2 + t^2);

  the index is interpolated in log-SNR ``2 log((1 - t) / t)``. The last index has not lost the data
  quite: velocities are defined up to ``t_max = 0.9937``, where sampling starts.
- ``vp_cosine``: the same on the cosine schedule (Nichol & Dhariwal, 2102.09672, eq. 17; ADM's
  64x64 network), with ``t_max = 0.99995``.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lfm_jax.errors import UserError

CONVENTIONS = ("flow", "reversed", "vp", "vp_cosine")
VP_STEPS = 1000


def _vp_log_snr(convention: str) -> np.ndarray:
    """``log(a^2 / s^2)`` of every index, decreasing (linear beta: Ho et al. 2020)."""
    beta = np.linspace(1e-4, 0.02, VP_STEPS)
    if convention == "vp_cosine":
        signal = np.cos((np.arange(VP_STEPS + 1) / VP_STEPS + 0.008) / 1.008 * np.pi / 2) ** 2
        beta = np.minimum(1 - signal[1:] / signal[:-1], 0.999)
    kept = np.cumprod(1 - beta)
    return np.log(kept) - np.log1p(-kept)


def t_max(convention: str) -> float:
    """The largest time at which the velocity is defined: sampling starts there."""
    check(convention)
    if not convention.startswith("vp"):
        return 1.0
    return float(1 / (1 + np.exp(_vp_log_snr(convention)[-1] / 2)))


def check(convention: str) -> None:
    """Raise `UserError` unless it is one of `CONVENTIONS`."""
    if convention not in CONVENTIONS:
        raise UserError(f"convention: {convention!r} is none of {', '.join(CONVENTIONS)}")


def enter(
    convention: str, x: Float[Array, "b h w c"], t: Float[Array, " b"]
) -> tuple[Float[Array, "b h w c"], Float[Array, " b"]]:
    """The input and the time that the network itself expects (a VP index comes divided by 1000)."""
    check(convention)
    if convention == "flow":
        return x, t
    if convention == "reversed":
        return x, 1 - t
    t = jnp.clip(t.astype(jnp.float32), 1e-6, t_max(convention))
    log_snr = 2 * (jnp.log1p(-t) - jnp.log(t))
    grid = _vp_log_snr(convention)[::-1].astype(np.float32)
    index = jnp.interp(log_snr, grid, np.arange(VP_STEPS, dtype=np.float32)[::-1])
    scale = (1 / jnp.sqrt((1 - t) ** 2 + t**2))[:, None, None, None]
    return (x * scale).astype(x.dtype), index / VP_STEPS


def leave(
    convention: str,
    output: Float[Array, "b h w c"],
    x: Float[Array, "b h w c"],
    t: Float[Array, " b"],
) -> Float[Array, "b h w c"]:
    """The velocity from the network's output and the outer `x` and `t`."""
    if convention == "flow":
        return output
    if convention == "reversed":
        return -output
    t = jnp.clip(t.astype(jnp.float32), 0.0, t_max(convention))[:, None, None, None]
    return (output - x[..., : output.shape[-1]]) / (1 - t)
