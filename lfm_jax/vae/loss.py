"""Training loss of a small autoencoder: reconstruction plus a weighted KL to a standard normal.

    loss = mean |x - decode(m + exp(l / 2) e)|^p + kl_weight * mean KL(N(m, exp(l)) || N(0, 1))

with p = 1 or 2, both means over all elements (Kingma & Welling 2014, eq. 10; Rombach et al. 2022,
section 3.1: the KL is only a light regulariser). ``e`` and the mirror choice are keyed by the
example's position in the data stream.
"""

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Key

from lfm_jax.errors import UserError
from lfm_jax.rng import Stream, normal, stream_keys, uniform
from lfm_jax.vae.autoencoder import AnyArray, DiagonalGaussian
from lfm_jax.vae.codec import from_uint8

RECONSTRUCTIONS = {"l1": jnp.abs, "l2": jnp.square}


def mirrored(
    images: Float[AnyArray, "b h w c"], key: Key[Array, ""], position: Integer[AnyArray, " b"]
) -> Float[Array, "b h w c"]:
    """Mirror each image left to right with probability one half."""
    flip = uniform(stream_keys(key, Stream.MIRROR, jnp.asarray(position))) < 0.5
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def reconstruct(
    model: nn.Module,
    params: Any,
    images: Float[AnyArray, "b h w c"],
    key: Key[Array, ""],
    position: Integer[AnyArray, " b"],
) -> tuple[Float[Array, "b h w c"], DiagonalGaussian, Float[Array, "b i j d"]]:
    """Decode a posterior sample whose noise is keyed by position; also the posterior and sample."""
    posterior = cast(DiagonalGaussian, model.apply({"params": params}, images, method="encode"))
    noise = normal(
        stream_keys(key, Stream.POSTERIOR, jnp.asarray(position)), posterior.mean.shape[1:]
    )
    z = posterior.mean + posterior.std * noise
    return cast(Array, model.apply({"params": params}, z, method="decode")), posterior, z


def psnr(x: Float[Array, "b h w c"], y: Float[Array, "b h w c"]) -> Float[Array, ""]:
    """Peak signal-to-noise ratio in dB of images in [-1, 1] (peak 2), over the whole batch."""
    return 10.0 * jnp.log10(4.0 / jnp.maximum(jnp.mean(jnp.square(x - y)), 1e-10))


def autoencoder_loss(
    model: nn.Module,
    *,
    kl_weight: float = 1e-4,
    reconstruction: str = "l2",
    mirror: bool = False,
    perceptual: Callable[[Array, Array], Float[Array, " b"]] | None = None,
    perceptual_weight: float = 1.0,
) -> Callable[[Any, dict[str, Array], Key[Array, ""]], tuple[Float[Array, ""], dict]]:
    """The loss ``(params, batch, key) -> (loss, metrics)`` of an autoencoder.

    Args:
        model: a module with ``encode`` and ``decode``.
        kl_weight: weight of the KL averaged over latent elements.
        reconstruction: "l1" or "l2", averaged over pixels in [-1, 1].
        mirror: mirror half of the images.
        perceptual: distance per image of two batches in [-1, 1], e.g. `lpips`; off by default.
        perceptual_weight: its weight.

    Returns:
        The loss; it reads ``batch["image"]`` uint8 ``[B, H, W, C]`` and ``batch["position"]``.

    Raises:
        UserError: an unknown reconstruction.
    """
    if reconstruction not in RECONSTRUCTIONS:
        raise UserError(f"reconstruction: {reconstruction!r}; choose one of l1, l2")
    distance = RECONSTRUCTIONS[reconstruction]

    def loss(params, batch, key):
        x = from_uint8(batch["image"])
        if mirror:
            x = mirrored(x, key, batch["position"])
        y, posterior, _ = reconstruct(model, params, x, key, batch["position"])
        error = jnp.mean(distance(x - y))
        kl = jnp.mean(posterior.kl())
        total = error + kl_weight * kl
        metrics = {"reconstruction": error, "kl": kl, "psnr": psnr(x, y)}
        if perceptual is not None:
            metrics["perceptual"] = jnp.mean(perceptual(x, y))
            total = total + perceptual_weight * metrics["perceptual"]
        return total, {"loss": total, **metrics}

    return loss
