"""Published weights in and out of PyTorch and safetensors files."""

from lfm_jax.weights.convert import FAMILIES, Imported, import_torch, load_torch, save_torch
from lfm_jax.weights.files import read_tensors, write_tensors

__all__ = [
    "FAMILIES",
    "Imported",
    "import_torch",
    "load_torch",
    "read_tensors",
    "save_torch",
    "write_tensors",
]
