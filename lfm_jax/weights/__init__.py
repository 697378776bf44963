"""Published weights in and out of PyTorch and safetensors files, and releases of one's own in."""

from lfm_jax.weights.convert import FAMILIES, Imported, import_torch, load_torch, save_torch
from lfm_jax.weights.files import read_tensors, write_tensors
from lfm_jax.weights.release import Release, load_release

__all__ = [
    "FAMILIES",
    "Imported",
    "Release",
    "import_torch",
    "load_release",
    "load_torch",
    "read_tensors",
    "save_torch",
    "write_tensors",
]
