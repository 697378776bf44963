"""Small files of a run, written whole: JSON, scalar logs (JSON lines and TensorBoard), grids."""

import io
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont


def write_bytes(path: epath.PathLike, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if "://" in os.fspath(path):  # an object appears whole; renaming one would be copying it
        path.write_bytes(content)
        return
    temporary = path.parent / f".{path.name}.tmp"
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:  # a full disk: what there is of it must not take up room
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: epath.PathLike, value: Any) -> None:
    """Write a JSON file whole."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def copy_whole(source: epath.PathLike, target: epath.PathLike) -> None:
    """Copy a file or folder under another name first, so that what a kill leaves looks undone."""
    source, target = epath.Path(source), epath.Path(target)
    partial = target.parent / f".{target.name}.partial"
    if partial.exists():
        partial.rmtree() if partial.is_dir() else partial.unlink()
    partial.parent.mkdir(parents=True, exist_ok=True)
    _copy(source, partial)
    partial.rename(target)


def _copy(source: epath.Path, target: epath.Path) -> None:
    if not source.is_dir():
        source.copy(target)
        return
    target.mkdir()
    for child in source.iterdir():
        _copy(child, target / child.name)


class ScalarWriter:
    """Scalars of a run to ``<folder>/<name>.jsonl`` and to TensorBoard event files beside it.

    Lines of steps after `start` are dropped on opening: a resumed run logs every step once. So are
    lines that are damaged: a log is no reason for a run not to go on.
    """

    def __init__(self, folder: epath.PathLike, name: str, *, start: int = 0):
        self._path = epath.Path(folder) / f"{name}.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._path.read_bytes().splitlines() if self._path.exists() else []
        self._lines = [line.decode() for line in lines if _step_of(line) <= start]
        # tensorboardX writes local files only; a run in a bucket keeps the JSON lines.
        self._board = None
        if "://" not in str(folder):
            self._board = _summary_writer()(str(epath.Path(folder) / name), purge_step=start + 1)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Append one line; the file is rewritten whole, which object stores need too."""
        self._lines.append(json.dumps({"step": step, **scalars}))
        write_bytes(self._path, ("\n".join(self._lines) + "\n").encode())
        if self._board is not None:
            for key, value in scalars.items():
                self._board.add_scalar(key, value, step)
            self._board.flush()

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _summary_writer() -> type:
    """tensorboardX's writer, without the torch that it imports only to know its tensors by type.

    Where torch is installed that import is most of what a job's first line of log waits for.
    """
    hides = "torch" not in sys.modules
    if hides:
        sys.modules["torch"] = cast(
            Any, None
        )  # an import of it fails, as where it is not installed
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hides:
            del sys.modules["torch"]
    return SummaryWriter


def _step_of(line: bytes) -> float:
    """The step of a logged line, infinite where it cannot be read."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def image_grid(
    images: UInt8[np.ndarray, "n h w c"],
    *,
    columns: int,
    row_labels: Sequence[str] = (),
    min_side: int = 48,
) -> Image.Image:
    """Images row by row, small ones enlarged without smoothing, each row with its label.

    Args:
        images: uint8, 1 or 3 channels.
        columns: images a row.
        row_labels: one text a row, drawn at the left.
        min_side: images smaller than this are enlarged by a whole factor.
    """
    if images.shape[-1] == 1:
        images = np.repeat(images, 3, axis=-1)
    factor = max(1, math.ceil(min_side / images.shape[1]))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    n, height, width, _ = images.shape
    rows = math.ceil(n / columns)
    gap = 2
    font = ImageFont.load_default(size=14)
    margin = int(max((font.getlength(text) for text in row_labels), default=-12)) + 12
    canvas = Image.new(
        "RGB", (margin + columns * (width + gap) + gap, rows * (height + gap) + gap), "white"
    )
    draw = ImageDraw.Draw(canvas)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        x, y = margin + gap + column * (width + gap), gap + row * (height + gap)
        canvas.paste(Image.fromarray(image), (x, y))
    for row, text in enumerate(row_labels):
        middle = gap + row * (height + gap) + height // 2
        draw.text((margin - 6, middle), text, fill="black", font=font, anchor="rm")
    return canvas


def save_image(path: epath.PathLike, image: Image.Image) -> None:
    """Write a PNG whole."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_bytes(path, buffer.getvalue())
