"""Published weights: found by path or fetched once, checked by sha256, read without executing them.

Torch files are opened with ``weights_only=True``: tensors and plain containers, no code. What a
file is comes from its bytes, not from its name: a hash other than the published one is refused,
because a network that is nearly the right one gives numbers that nearly compare.
"""

import dataclasses
import os
import re
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from tqdm import tqdm

from lfm_jax.checksums import file_sha256
from lfm_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """Where a family's weights are published, and the first hex digits of their sha256 if stated.

    `file` is the name under which a download is kept; empty takes the address's.
    """

    url: str
    sha256_prefix: str = ""
    file: str = ""


def cache_folder() -> Path:
    """``$LFM_CACHE``, else ``$XDG_CACHE_HOME/lfm_jax``, else ``~/.cache/lfm_jax``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LFM_CACHE") or Path(base) / "lfm_jax")


def locate(path: str | os.PathLike, published: Published) -> Path:
    """The weights file: `path` if given, else the cached download of `published`.

    Raises `UserError` if it is missing, cannot be fetched, or has another hash.
    """
    if path:
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError(
                f"weights {file}: no such file; accepted: a download of {published.url}"
            )
    else:
        file = cache_folder() / (published.file or published.url.rsplit("/", 1)[1])
        if not file.is_file():
            download(published.url, file)
    check_sha256(file, published)
    return file


def check_sha256(file: Path, published: Published) -> None:
    """`UserError` unless the file's sha256 begins with the published digits."""
    found = file_sha256(file)
    if not found.startswith(published.sha256_prefix):
        raise UserError(
            f"weights {file}: sha256 {found[:16]}...; "
            f"accepted: {published.sha256_prefix}... as published at {published.url}"
        )


def download(url: str, file: Path) -> None:
    """Fetch `url` to `file`, all or nothing; `UserError` if it cannot be had."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, open(partial, "wb") as out:
            total = int(answer.headers.get("Content-Length") or 0) or None
            with tqdm(total=total, unit="B", unit_scale=True, desc=file.name) as bar:
                while block := answer.read(1 << 20):
                    bar.update(out.write(block))
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"weights: {url} could not be fetched ({error}); accepted: the file's path"
        ) from error


def read_tensors(file: str | os.PathLike) -> dict[str, np.ndarray]:
    """Tensors by name of a ``.safetensors`` or torch file, float32, nothing executed.

    Raises `UserError` if the file is neither, or needs code to open.
    """
    file = Path(file)
    if file.suffix == ".safetensors":
        try:
            return dict(safetensors.numpy.load_file(file))
        except Exception as error:  # of the format, and of what numpy has no dtype for
            raise UserError(f"weights {file}: not a safetensors file ({error})") from error
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"weights {file}: torch files need PyTorch; accepted: a .safetensors file, "
            "or pip install lfm_jax[torch]"
        ) from error
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"weights {file}: not a plain torch state dict ({type(error).__name__}); "
            "accepted: .safetensors, or .pt/.pth of tensors alone"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not any(torch.is_tensor(v) for v in state.values()):
        raise UserError(f"weights {file}: holds no tensors by name; accepted: a state dict")
    try:
        return {k: v.float().numpy() for k, v in state.items() if torch.is_tensor(v)}
    except Exception as error:
        raise UserError(
            f"weights {file}: tensors that are no plain numbers ({type(error).__name__})"
        ) from error


def require(
    tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple | None], family: str
) -> None:
    """`UserError` unless every name of `shapes` is there in that shape (None: in any)."""
    for name, shape in shapes.items():
        if name not in tensors:
            raise UserError(f"weights of {family}: no tensor {name!r}; found {_some(tensors)}")
        if shape is not None and tensors[name].shape != tuple(shape):
            raise UserError(
                f"weights of {family}: {name} has shape {tensors[name].shape}; "
                f"accepted: {tuple(shape)}"
            )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" ... ({len(names)} tensors)" if len(names) > 3 else "")


def conv_kernel(weight: np.ndarray) -> np.ndarray:
    """Torch's convolution ``[out, in/groups, h, w]`` as ``[h, w, in/groups, out]``."""
    return np.transpose(weight, (2, 3, 1, 0))


def fold_batch_norm(
    tensors: Mapping[str, np.ndarray], conv: str, norm: str, *, epsilon: float = 1e-3
) -> dict[str, np.ndarray]:
    """``{"kernel", "bias"}`` of a convolution without bias followed by an inference batch norm.

    Both are linear: ``g (Wx - m) / sqrt(v + eps) + b``; folded in float64, rounded once.
    """
    gamma, beta, mean, variance = (
        tensors[f"{norm}.{k}"].astype(np.float64)
        for k in ("weight", "bias", "running_mean", "running_var")
    )
    factor = gamma / np.sqrt(variance + epsilon)
    kernel = conv_kernel(tensors[f"{conv}.weight"].astype(np.float64)) * factor
    return {"kernel": kernel.astype(np.float32), "bias": (beta - mean * factor).astype(np.float32)}


def dense(tensors: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """``{"kernel", "bias"}`` of a torch linear layer."""
    return {"kernel": tensors[f"{name}.weight"].T, "bias": tensors[f"{name}.bias"]}


def layer_norm(tensors: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """``{"scale", "bias"}`` of a torch layer norm."""
    return {"scale": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}


def block_numbers(tensors: Iterable[str], pattern: str) -> range:
    """``range(depth)`` of the blocks whose number is the group of the regular expression."""
    numbers = {int(m[1]) for m in map(re.compile(pattern).match, tensors) if m}
    return range(len(numbers))
