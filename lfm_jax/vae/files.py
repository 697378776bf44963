"""Files of weights: where they come from and what is in them.

Tensors are read as numpy. safetensors and Flax msgpack need no PyTorch; ``.bin``, ``.pt``, ``.pth``
and ``.ckpt`` are pickles and are read by PyTorch with ``weights_only=True``, which runs no code.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from absl import logging

from lfm_jax.checksums import file_sha256
from lfm_jax.errors import UserError

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
SUFFIXES = (".safetensors", ".msgpack", *PICKLES)
# In the order of preference; a folder may hold several.
FILE_NAMES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_flax_model.msgpack",
    "diffusion_pytorch_model.bin",
)
# Hub repositories whose content is known, so that a later upload cannot change a result.
REVISIONS = {
    "stabilityai/sd-vae-ft-mse": "31f26fdeee1355a5c34592e401dd41e45d25a493",
    "stabilityai/sd-vae-ft-ema": "f04b2c4b98319346dad8c65879f680b1997b204a",
}
HALF = r"(.+)_(encoder|decoder)(\.\w+)"  # TAESD's own files come in twos
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
}


def locate(
    source: str | Path, *, revision: str = "", subfolder: str = "", cache_dir: str | Path = ""
) -> tuple[Path, Path | None]:
    """The file of weights and, if there is one, its ``config.json``.

    Args:
        source: a file, a folder, or a hub repository ``owner/name``.
        revision: of the hub repository; the default is the pinned one, else its main branch.
        subfolder: inside the folder or repository; "vae" is found without being told.
        cache_dir: of the hub's files; the hub's own default if empty.

    Raises:
        UserError: nothing there.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"{path}: unknown suffix; accepted: {', '.join(SUFFIXES)}")
        config = path.with_name("config.json")
        return path, config if config.is_file() else None
    if path.is_dir():
        return _in_folder(path / subfolder)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not str(source).startswith("."):
        return _from_hub(str(source), revision, subfolder, cache_dir)
    raise UserError(f"{source}: no such file or folder, and no hub repository owner/name")


def _in_folder(folder: Path) -> tuple[Path, Path | None]:
    for inside in (folder, folder / "vae"):
        config = inside / "config.json"
        for name in FILE_NAMES:
            if (inside / name).is_file():
                return inside / name, config if config.is_file() else None
        others = [p for s in SUFFIXES for p in sorted(inside.glob(f"*{s}"))]
        kinds = {re.sub(HALF, r"\1\3", p.name) for p in others}
        if len(others) == 1 or (len(others) == 2 and len(kinds) == 1):
            return others[0], config if config.is_file() else None
        if others:
            names = ", ".join(p.name for p in others)
            raise UserError(f"{inside}: several files of weights ({names}); name one of them")
    raise UserError(f"{folder}: no file of weights; expected one of {', '.join(FILE_NAMES)}")


def halves(path: Path) -> tuple[Path, Path]:
    """The encoder's and the decoder's file of an autoencoder in two files, from either.

    Raises:
        UserError: the other one is not beside it.
    """
    found = re.fullmatch(HALF, path.name)
    if not found:
        raise UserError(
            f"{path}: half an autoencoder; expected NAME_encoder and NAME_decoder files"
        )
    pair = [path.with_name(f"{found[1]}_{part}{found[3]}") for part in ("encoder", "decoder")]
    for half in pair:
        if not half.is_file():
            raise UserError(f"{path}: half an autoencoder; expected {half.name} beside it")
    return pair[0], pair[1]


def _from_hub(
    repo: str, revision: str, subfolder: str, cache_dir: str | Path
) -> tuple[Path, Path | None]:
    import huggingface_hub
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    revision = revision or REVISIONS.get(repo, "main")

    def fetch(name: str, folder: str) -> Path | None:
        try:
            return Path(
                huggingface_hub.hf_hub_download(
                    repo,
                    name,
                    revision=revision,
                    subfolder=folder or None,
                    cache_dir=cache_dir or None,
                )
            )
        except LocalEntryNotFoundError as error:
            # Offline, a file that the repository does not have looks like one not yet fetched.
            offline.append(error)
        except RepositoryNotFoundError:
            raise UserError(f"{repo}: no such repository on the hub, or it needs a login") from None
        except EntryNotFoundError:
            pass
        except (HfHubHTTPError, OSError) as error:
            raise UserError(f"{repo}: {str(error).splitlines()[0]}") from error
        return None

    offline: list[Exception] = []
    for folder in dict.fromkeys((subfolder, subfolder or "vae")):
        config = fetch("config.json", folder)
        if config is None:
            continue
        for name in FILE_NAMES:
            weights = fetch(name, folder)
            if weights is not None:
                _verify_blob(weights)
                logging.info("%s: %s at revision %s", repo, name, revision)
                return weights, config
    if offline:
        raise UserError(
            f"{repo}: revision {revision} is not in the hub's cache and the hub cannot be reached"
        )
    raise UserError(f"{repo}: no config.json with one of {', '.join(FILE_NAMES)} at {revision}")


def _verify_blob(path: Path) -> None:
    """The hub names the blob of a large file by its sha256; check that the cache still holds it."""
    name = path.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", name):
        check_sha256(path, name)


def check_sha256(path: str | Path, expected: str) -> None:
    """Raise `UserError` unless the file has this sha256 (hex)."""
    found = file_sha256(path)
    if found != expected.lower():
        raise UserError(f"{path}: sha256 is {found}, expected {expected}")


def read_tensors(path: Path) -> tuple[Mapping[str, Any], bool]:
    """What a file of weights holds, and whether it is a Flax tree (else flat PyTorch names).

    Raises:
        UserError: truncated, not of its suffix's format, or a pickle of more than tensors.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path), False
    if path.suffix == ".msgpack":
        return _read_msgpack(path), True
    return _read_pickle(path), False


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file, bfloat16 included."""
    from safetensors import SafetensorError, deserialize

    try:
        records = deserialize(path.read_bytes())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None
    tensors = {}
    for name, record in records:
        if record["dtype"] not in _DTYPES:
            raise UserError(f"{path}: tensor {name} is {record['dtype']}; accepted: {_accepted()}")
        value = np.frombuffer(record["data"], dtype=_DTYPES[record["dtype"]])
        tensors[name] = value.reshape(record["shape"])
    return tensors


def _accepted() -> str:
    return ", ".join(_DTYPES)


def _read_msgpack(path: Path) -> Mapping[str, Any]:
    import flax.serialization

    try:
        tree = flax.serialization.msgpack_restore(path.read_bytes())
    # The decoder has no common base class for what a damaged file makes it raise.
    except Exception as error:
        raise UserError(f"{path}: not a whole msgpack file ({error})") from None
    if not isinstance(tree, Mapping):
        raise UserError(f"{path}: expected a nested dict of arrays, found {type(tree).__name__}")
    return tree


def _read_pickle(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path}: reading {path.suffix} needs PyTorch (pip install 'lfm_jax[torch]'); "
            "safetensors and msgpack do not"
        ) from None
    import pickle

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL |global )(\S+)", str(error))
        what = f", e.g. {found[1]}" if found else ""
        raise UserError(
            f"{path}: holds more than tensors{what}, and code from a file is not run; "
            "save its state_dict alone, or as safetensors"
        ) from None
    except Exception as error:  # PyTorch raises nearly anything on damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a whole PyTorch file ({reason})") from None
    for container in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(container), Mapping):
            content = content[container]
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: expected a dict of tensors, found {type(content).__name__}")
    try:
        return {
            name: value.detach().to(torch.float32).numpy()
            for name, value in content.items()
            if isinstance(value, torch.Tensor)
        }
    except Exception as error:  # sparse, quantized, complex, without storage
        raise UserError(f"{path}: tensors that are no plain numbers ({error})") from None
