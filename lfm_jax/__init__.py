"""Latent flow matching in JAX/Flax.

One convention holds everywhere: ``t = 0`` is data, ``t = 1`` is noise, images and latents are NHWC,
and latents are scaled: ``z = (moments sample - shift) * scale``.
"""

__version__ = "0.1.0"
