"""Pixels to latents and back: the SD VAE in Flax, its weights, and codecs for jobs."""

from lfm_jax.vae.autoencoder import AutoencoderKL, DiagonalGaussian, from_moments, init_vae
from lfm_jax.vae.codec import (
    Codec,
    encoder_fingerprint,
    from_uint8,
    identity_codec,
    make_codec,
    measure_scale,
    to_uint8,
)
from lfm_jax.vae.discriminator import PatchDiscriminator, adversarial_loss
from lfm_jax.vae.loss import autoencoder_loss
from lfm_jax.vae.perceptual import load_lpips, lpips
from lfm_jax.vae.report import reconstruction_report
from lfm_jax.vae.slicing import decode_sliced, encode_sliced
from lfm_jax.vae.tiling import decode_tiled, encode_tiled
from lfm_jax.vae.tiny import AutoencoderTiny
from lfm_jax.vae.weights import load_vae, save_vae

__all__ = [
    "AutoencoderKL",
    "AutoencoderTiny",
    "Codec",
    "DiagonalGaussian",
    "PatchDiscriminator",
    "adversarial_loss",
    "autoencoder_loss",
    "decode_sliced",
    "decode_tiled",
    "encode_sliced",
    "encode_tiled",
    "encoder_fingerprint",
    "from_moments",
    "from_uint8",
    "identity_codec",
    "init_vae",
    "load_lpips",
    "load_vae",
    "lpips",
    "make_codec",
    "measure_scale",
    "reconstruction_report",
    "save_vae",
    "to_uint8",
]
