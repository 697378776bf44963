"""Sample files of anyone's making: ``arr_0`` uint8 NHWC and optionally ``arr_1`` labels.

The format that ADM's sampler writes and its evaluator reads. What is not exactly that is refused
with the reason: a figure over floats that were cast, or over channels taken for rows, looks like
any other.
"""

import dataclasses
import hashlib
import os
import zipfile

import numpy as np
from etils import epath
from jaxtyping import Integer, UInt8

from lfm_jax.errors import UserError

ACCEPTED = "accepted: an npz with arr_0 uint8 [n, height, width, 1 or 3] and optional arr_1 int [n]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
    """Images to judge, their labels (None: unconditional) and the file's sha256."""

    images: UInt8[np.ndarray, "n h w c"]
    labels: Integer[np.ndarray, " n"] | None
    sha256: str


def read_samples(path: str | os.PathLike) -> Samples:
    """Read and check a sample file.

    Raises:
        UserError: missing, not an npz, floats, channels first, ranks or counts that do not fit.
    """
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"samples {path}: no such file; {ACCEPTED}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        try:
            archive = np.load(file, allow_pickle=False)
            names = getattr(archive, "files", ["a bare array"])
            if "arr_0" not in names:
                raise UserError(f"samples {path}: holds {', '.join(names)}; {ACCEPTED}")
            images = archive["arr_0"]
            labels = archive["arr_1"] if "arr_1" in names else None
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"samples {path}: not readable ({error}); {ACCEPTED}") from error
    check_images(images, f"samples {path}: arr_0")
    if labels is not None:
        if labels.ndim != 1 or len(labels) != len(images) or labels.dtype.kind not in "iu":
            raise UserError(
                f"samples {path}: arr_1 is {labels.dtype} {list(labels.shape)} "
                f"for {len(images)} images; {ACCEPTED}"
            )
        labels = labels.astype(np.int64)
    return Samples(images=images, labels=labels, sha256=digest)


def check_images(images: np.ndarray, what: str) -> None:
    """`UserError`, beginning with `what`, unless `images` are uint8 NHWC with 1 or 3 channels."""
    shape = list(images.shape)
    if images.dtype != np.uint8:
        hint = ""
        if images.dtype.kind == "f" and images.size:
            hint = f" in [{images.min():.3g}, {images.max():.3g}]"
        raise UserError(f"{what} is {images.dtype}{hint}; {ACCEPTED}")
    if images.ndim != 4:
        raise UserError(f"{what} has shape {shape}; {ACCEPTED}")
    if images.shape[-1] not in (1, 3):
        first = " (channels first)" if images.shape[1] in (1, 3) else ""
        raise UserError(f"{what} has shape {shape}{first}; {ACCEPTED}")
    if not len(images):
        raise UserError(f"{what} is empty; {ACCEPTED}")
