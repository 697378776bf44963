"""The four files of Fashion-MNIST from its publishers, checked by sha256.

Xiao, Rasul & Vollgraf 2017, MIT licence. The first address is the one that the project's README
names, the second the project's repository at a fixed commit.
"""

import hashlib
import os
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import logging
from tqdm import tqdm

from lfm_jax.errors import UserError

# What configs/fashion_mnist.py names where Debian's package is not installed; filled on first use.
FASHION_MNIST_FOLDER = Path.home() / ".cache/lfm_jax/fashion-mnist"
_ADDRESSES = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/"
    "b2617bb6d3ffa2e429640350f613e3291e10b141/data/fashion/",
)
# Debian ships the same deflate streams under another gzip header (no name, another time). With the
# publisher's header put back they have the published MD5 sums, which is where these come from.
_FILES = {
    "train-images-idx3-ubyte.gz": (
        26421880,
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    ),
    "train-labels-idx1-ubyte.gz": (
        29515,
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    ),
    "t10k-images-idx3-ubyte.gz": (
        4422102,
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    ),
    "t10k-labels-idx1-ubyte.gz": (
        5148,
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
}


def download_fashion_mnist(
    folder: str | os.PathLike[str],
    *,
    opener: Callable[..., Any] = urllib.request.urlopen,
) -> Path:
    """Put the four files of Fashion-MNIST into a folder; those that are there stay.

    Args:
        folder: made if it is missing.
        opener: ``(address, timeout=seconds) -> context manager with read(n)``.

    Returns:
        The folder, ready for ``open_images("idx", path=folder)``.

    Raises:
        UserError: no address gave a file with the right checksum; nothing half is left.
    """
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    for name, (size, digest) in _FILES.items():
        if not (folder / name).exists():
            _download(folder / name, size, digest, opener)
    return folder


def _download(path: Path, size: int, digest: str, opener: Callable[..., Any]) -> None:
    failures = []
    for address in _ADDRESSES:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file, opener(address + path.name, timeout=60) as reply:
                found = _copy(reply, file, size, path.name)
            if found == digest:
                # mkstemp makes it private; data is for everybody who may see the folder.
                os.chmod(temporary, 0o644)
                os.replace(temporary, path)
                return
            failures.append(f"{address}: sha256 {found[:12]}... instead of {digest[:12]}...")
        except OSError as error:  # urllib's errors are OSErrors
            failures.append(f"{address}: {error}")
        finally:
            Path(temporary).unlink(missing_ok=True)
        logging.warning("%s from %s", path.name, failures[-1])
    raise UserError(
        f"{path}: download failed ({'; '.join(failures)}); "
        "put the file there by hand, or install Debian's dataset-fashion-mnist"
    )


def _copy(reply: Any, file: Any, size: int, name: str) -> str:
    """Copy at most one byte more than announced, so that no server can fill the disk."""
    digest = hashlib.sha256()
    left = size + 1
    with tqdm(total=size, desc=name, unit="B", unit_scale=True) as bar:
        while left and (chunk := reply.read(min(left, 1 << 20))):
            digest.update(chunk)
            file.write(chunk)
            left -= len(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()
