"""The PatchGAN term of latent diffusion's autoencoder, off unless asked for.

A small convolutional discriminator judges overlapping 70x70 patches (Isola et al. 2017); the hinge
loss trains it, and the autoencoder is rewarded for patches that it takes for real:

    L_D = [mean relu(1 - D(x)) + mean relu(1 + D(y))] / 2,    L_G = -mean D(y)

``L_G`` is weighted by the ratio of the gradient norms of the reconstruction and of ``L_G`` at the
decoder's last layer (Esser et al. 2021, eq. 7), and starts late, when reconstructions are good.

Both players live in one parameter tree, ``{"autoencoder": ..., "discriminator": ...}``, and one
optimizer moves both at once: a stopped gradient keeps each from helping the other, so the usual
``loss(params, batch, key)`` is enough. Clipping by the global norm would couple them: clip per
element or not at all.
"""

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from lfm_jax.errors import UserError
from lfm_jax.vae.codec import from_uint8
from lfm_jax.vae.loss import RECONSTRUCTIONS, mirrored, psnr, reconstruct


class PatchDiscriminator(nn.Module):
    """Images in [-1, 1] to one logit a patch; batch norms use the batch at hand.

    Attributes:
        features: width of the first layer; it doubles up to eight times.
        layers: strided layers; 3 see 70x70 pixels.
    """

    features: int = 64
    layers: int = 3

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j 1"]:
        init = nn.initializers.normal(0.02)

        def conv(features, stride, use_bias):
            return nn.Conv(features, (4, 4), stride, padding=1, use_bias=use_bias, kernel_init=init)

        x = nn.leaky_relu(conv(self.features, 2, True)(x), 0.2)
        for i in range(1, self.layers + 1):
            stride = 2 if i < self.layers else 1
            x = conv(self.features * min(2**i, 8), stride, False)(x)
            x = nn.leaky_relu(self._batch_norm(x, f"norm_{i}"), 0.2)
        return conv(1, 1, True)(x)

    def _batch_norm(self, x: Array, name: str) -> Array:
        def scale_init(key, shape):
            return 1.0 + 0.02 * jax.random.normal(key, shape)

        scale = self.param(f"{name}_scale", scale_init, x.shape[-1:])
        bias = self.param(f"{name}_bias", nn.initializers.zeros, x.shape[-1:])
        mean = jnp.mean(x, axis=(0, 1, 2))
        variance = jnp.mean(jnp.square(x - mean), axis=(0, 1, 2))
        return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias


def hinge(real: Float[Array, "b i j 1"], fake: Float[Array, "b i j 1"]) -> Float[Array, ""]:
    """The discriminator's loss on its logits."""
    return 0.5 * (jnp.mean(nn.relu(1.0 - real)) + jnp.mean(nn.relu(1.0 + fake)))


def adversarial_loss(
    model: nn.Module,
    discriminator: nn.Module,
    *,
    start_step: int = 50_000,
    weight: float = 0.5,
    adaptive: bool = True,
    kl_weight: float = 1e-6,
    reconstruction: str = "l1",
    mirror: bool = False,
    perceptual: Callable[[Array, Array], Float[Array, " b"]] | None = None,
    perceptual_weight: float = 1.0,
) -> Callable[[Any, dict[str, Array], Key[Array, ""]], tuple[Float[Array, ""], dict]]:
    """Latent diffusion's recipe as one loss over ``{"autoencoder", "discriminator"}`` parameters.

    Args:
        model: the autoencoder.
        discriminator: a module from images to logits, e.g. `PatchDiscriminator`.
        start_step: the step (positions divided by the batch) at which the adversarial terms begin.
        weight: of the generator's term, on top of the adaptive weight.
        adaptive: balance the two gradients at the decoder's last layer.
        kl_weight: see `autoencoder_loss`.
        reconstruction: "l1" or "l2".
        mirror: mirror half of the images.
        perceptual: see `autoencoder_loss`.
        perceptual_weight: its weight.

    Raises:
        UserError: an unknown reconstruction.
    """
    if reconstruction not in RECONSTRUCTIONS:
        raise UserError(f"reconstruction: {reconstruction!r}; choose one of l1, l2")
    pixelwise = RECONSTRUCTIONS[reconstruction]

    def judge(params, images):
        return cast(Array, discriminator.apply({"params": params}, images))

    def loss(params, batch, key):
        coder, critic = params["autoencoder"], params["discriminator"]
        x = from_uint8(batch["image"])
        if mirror:
            x = mirrored(x, key, batch["position"])
        y, posterior, z = reconstruct(model, coder, x, key, batch["position"])

        def likeness(y):
            error = jnp.mean(pixelwise(x - y))
            if perceptual is not None:
                error = error + perceptual_weight * jnp.mean(perceptual(x, y))
            return error

        def fooled(y):
            return -jnp.mean(judge(jax.lax.stop_gradient(critic), y))

        step = batch["position"][0] // len(batch["position"])
        active = jnp.where(step >= start_step, 1.0, 0.0)
        balance = weight
        if adaptive:
            balance = weight * _gradient_ratio(model, coder, z, likeness, fooled)
        error, kl, generator = likeness(y), jnp.mean(posterior.kl()), fooled(y)
        critic_loss = hinge(judge(critic, x), judge(critic, jax.lax.stop_gradient(y)))
        total = error + kl_weight * kl + active * (balance * generator + critic_loss)
        return total, {
            "loss": total,
            "reconstruction": error,
            "kl": kl,
            "psnr": psnr(x, y),
            "generator": generator,
            "discriminator": critic_loss,
            "adversarial_weight": active * balance,
        }

    return loss


def _gradient_ratio(
    model: nn.Module,
    params: Any,
    z: Float[Array, "b h w c"],
    numerator: Callable[[Array], Array],
    denominator: Callable[[Array], Array],
) -> Float[Array, ""]:
    """Ratio of two losses' gradient norms at the kernel of the decoder's last convolution."""
    params, z = jax.lax.stop_gradient((params, z))

    def decode(kernel):
        last = params["decoder"]["conv_out"] | {"kernel": kernel}
        changed = params | {"decoder": params["decoder"] | {"conv_out": last}}
        return model.apply({"params": changed}, z, method="decode")

    y, pull = jax.vjp(decode, params["decoder"]["conv_out"]["kernel"])

    def norm(function):
        return jnp.sqrt(jnp.sum(jnp.square(pull(jax.grad(function)(y))[0])))

    return jax.lax.stop_gradient(jnp.clip(norm(numerator) / (norm(denominator) + 1e-4), 0.0, 1e4))
