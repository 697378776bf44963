"""Tensors in and out of files: safetensors, and PyTorch's pickles read with code execution off.

A checkpoint nests its tensors in many ways: a bare state dict, ``{"model": ..., "ema": ...}``,
DDIM's list ``[model, optimizer, epoch, step, ema]``, names with or without ``module.``.
`read_tensors` finds the state dict in all of them.
"""

import dataclasses
import hashlib
import http.client
import os
import tempfile
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from lfm_jax.checksums import file_sha256
from lfm_jax.errors import UserError

EMA_KEYS = ("ema", "ema_state_dict", "model_ema", "ema_model", "state_dict_ema")
RAW_KEYS = ("model", "state_dict", "model_state_dict", "model_dict", "net")
CHOICES = ("auto", "ema", "raw")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorFile:
    """The tensors of a file in float32, its content hash, and which set of weights was taken."""

    path: str
    tensors: dict[str, np.ndarray]
    sha256: str
    weights: str

    def need(self, name: str) -> np.ndarray:
        """A tensor; `UserError` where there is none of that name."""
        if name not in self.tensors:
            first = next(iter(self.tensors), "nothing")
            shape = list(self.tensors[first].shape) if self.tensors else []
            raise UserError(
                f"{self.path}: tensor {name!r} is missing (the file starts with {first!r} "
                f"{shape}): another family's file?"
            )
        return self.tensors[name]


def read_tensors(file: str | os.PathLike, *, weights: str = "auto", sha256: str = "") -> TensorFile:
    """Read a local file or a URL (kept in the user's cache) into named float32 arrays.

    Args:
        weights: ``ema``, ``raw`` or ``auto`` (EMA where the file has it).
        sha256: checksum (hex) that the file must have; empty: not checked.

    Raises:
        UserError: no such file or set of weights, another checksum, not a weights file, a pickle
            that holds code.
    """
    if weights not in CHOICES:
        raise UserError(f"weights: {weights!r} is none of {', '.join(CHOICES)}")
    path = _local(str(file))
    if not path.is_file():
        raise UserError(f"{file}: no such file")
    found = file_sha256(path)
    logging.info("%s: sha256 %s", file, found)
    if sha256 and found != sha256.lower():
        raise UserError(f"{file}: sha256 is {found}, expected {sha256}")
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        try:
            content = load_file(path)
        except Exception as error:
            raise UserError(f"{file}: not a safetensors file ({error})") from error
    else:
        content = _load_pickle(path)
    state, taken = _state_dict(content, weights, str(file))
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    try:
        tensors = {name: _array(value) for name, value in state.items()}
    except Exception as error:  # sparse, quantized, complex, without storage
        raise UserError(f"{file}: tensors that are no plain numbers ({error})") from error
    return TensorFile(path=str(file), tensors=tensors, sha256=found, weights=taken)


def write_tensors(tensors: Mapping[str, np.ndarray], file: str | os.PathLike) -> None:
    """Write a bare state dict: safetensors by suffix, else PyTorch's format. All or nothing."""
    path = Path(file)
    if not path.parent.is_dir():
        raise UserError(f"{file}: no such folder {path.parent}")
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        if path.suffix == ".safetensors":
            from safetensors.numpy import save_file

            save_file(contiguous, name, metadata={"format": "pt"})
        else:
            torch = _torch(path)
            state = {key: torch.from_numpy(value.copy()) for key, value in contiguous.items()}
            torch.save(state, name)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _torch(path: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: {path.suffix} files need PyTorch: pip install 'lfm_jax[torch]', or convert "
            "the file to .safetensors"
        ) from error
    return torch


def _load_pickle(path: Path) -> Any:
    import argparse
    import pickle

    torch = _torch(path)
    try:
        # Training scripts of this field keep their arguments beside the weights; a Namespace is
        # a plain record and runs nothing when read.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")
        culprit = next((line for line in reason if "GLOBAL" in line or "nsupported" in line), "")
        raise UserError(
            f"{path}: refused, this pickle holds more than tensors ({culprit.strip()[:120]}); "
            "accepted are PyTorch files that load with weights_only=True, and .safetensors"
        ) from error
    except Exception as error:
        raise UserError(f"{path}: not a PyTorch weights file ({str(error)[:120]})") from error


def _state_dict(content: Any, weights: str, file: str) -> tuple[dict[str, Any], str]:
    """The state dict inside whatever the file held, and whether it is ``ema`` or ``raw``."""
    if isinstance(content, list | tuple):
        dicts = [part for part in content if _is_state(part)]
        if not dicts:
            raise UserError(f"{file}: a list without a dict of tensors")
        # DDIM's order: model first, exponential moving average last.
        found = {"raw": dicts[0]} | ({"ema": dicts[-1]} if len(dicts) > 1 else {})
    elif _is_state(content):
        found = {"raw": content}
    elif isinstance(content, Mapping):
        found = {}
        for kind, keys in (("raw", RAW_KEYS), ("ema", EMA_KEYS)):
            part = next((content[key] for key in keys if _is_state(content.get(key))), None)
            if part is not None:
                found[kind] = part
        if not found:
            keys = ", ".join(map(str, list(content)[:8]))
            raise UserError(f"{file}: no dict of tensors under any known key; it has {keys}")
    else:
        raise UserError(f"{file}: holds a {type(content).__name__}, not a dict of tensors")
    kind = weights if weights != "auto" else ("ema" if "ema" in found else "raw")
    if kind not in found:
        raise UserError(f"weights: {kind!r} is not in {file}; it has {', '.join(found)}")
    return dict(found[kind]), kind


def _is_state(part: Any) -> bool:
    return (
        isinstance(part, Mapping)
        and len(part) > 0
        and all(isinstance(key, str) and hasattr(value, "shape") for key, value in part.items())
    )


def _array(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # a torch tensor; bfloat16 has no numpy counterpart
        value = value.detach().float().numpy()
    return np.asarray(value, np.float32)


def _local(file: str) -> Path:
    """The file itself, or where its download is kept (fetched once, whole or not at all)."""
    if not file.startswith(("http://", "https://")):
        return Path(file).expanduser()
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lfm_jax" / "weights"
    # Different addresses may end in the same name.
    folder = root / hashlib.sha256(file.encode()).hexdigest()[:16]
    path = folder / file.split("?")[0].rsplit("/", 1)[-1]
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            _download(file, part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    return path


def _download(url: str, path: Path) -> None:
    try:
        with (
            urllib.request.urlopen(url, timeout=60) as answer,
            open(path, "wb") as stream,
            tqdm(desc=path.name[1:], unit="B", unit_scale=True, total=answer.length) as bar,
        ):
            while block := answer.read(1 << 20):
                stream.write(block)
                bar.update(len(block))
            page = answer.headers.get_content_type() == "text/html"
            left = answer.length
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"{url}: download failed ({error})") from error
    if left:
        raise UserError(f"{url}: download failed ({left} bytes are missing)")
    if page:
        # What a site answers that wants a click or a login first.
        raise UserError(
            f"{url}: the answer is a web page, not a file of weights; download it by hand and "
            "give its path"
        )
