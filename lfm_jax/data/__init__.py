"""Images in, latents cached, both streamed by position: the project's only readers of data."""

from lfm_jax.data.images import SOURCES, open_images
from lfm_jax.data.source import ImageSource

__all__ = ["SOURCES", "ImageSource", "open_images"]
