"""Images in, latents cached, both streamed by position: the project's only readers of data."""

from lfm_jax.data.cache_writer import CacheWriter
from lfm_jax.data.download import FASHION_MNIST_FOLDER, download_fashion_mnist
from lfm_jax.data.images import SOURCES, open_images
from lfm_jax.data.latents import LatentCache, open_cache
from lfm_jax.data.layouts import LAYOUT_SOURCES, LayoutSource, open_layouts, read_layouts
from lfm_jax.data.loader import image_batches, latent_batches
from lfm_jax.data.maps import MAP_SOURCES, MapSource, open_maps
from lfm_jax.data.prefetch import prefetch
from lfm_jax.data.source import ImageSource

__all__ = [
    "FASHION_MNIST_FOLDER",
    "LAYOUT_SOURCES",
    "MAP_SOURCES",
    "SOURCES",
    "CacheWriter",
    "ImageSource",
    "LatentCache",
    "LayoutSource",
    "MapSource",
    "download_fashion_mnist",
    "image_batches",
    "latent_batches",
    "open_cache",
    "open_images",
    "open_layouts",
    "open_maps",
    "prefetch",
    "read_layouts",
]
