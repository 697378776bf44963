"""Where pixels come from: `open_images` opens every kind of source under one interface.

| source | path | splits |
|---|---|---|
| ``digits`` | unused (in scikit-learn, 8x8 gray) | train, test: every fifth of a class |
| ``idx`` | folder of MNIST-format files, gzip or not | train, test (t10k) |
| ``folder`` | class-per-subfolder or flat; labels also by CSV, dataset.json | subfolders |
| ``zip`` | the same inside a zip file | subfolders |
| ``lmdb`` | NVAE's raw bytes, or torchvision's LSUN | train, validation |
| ``tfds:<name>`` | TFDS data folder, prepared as ArrayRecord | as prepared |
| ``celebamask`` | CelebAMask-HQ's root | train, test |
| ``digit_canvases`` | unused: scikit-learn's digits, several a canvas | train, test |
| ``synthetic`` | unused: coloured gratings, for smoke runs | train, test |
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from lfm_jax.data.celebamask import open_celebamask
from lfm_jax.data.download import FASHION_MNIST_FOLDER, download_fashion_mnist
from lfm_jax.data.folder import open_folder, open_zip
from lfm_jax.data.idx import open_idx
from lfm_jax.data.layouts import open_digit_canvases
from lfm_jax.data.lmdb_images import open_lmdb
from lfm_jax.data.pixels import MAX_PIXELS, Preprocess
from lfm_jax.data.source import ImageSource, array_source, check_count, check_labels, hashed
from lfm_jax.data.tfds_images import open_tfds
from lfm_jax.errors import UserError

SOURCES = (
    "digits",
    "idx",
    "folder",
    "zip",
    "lmdb",
    "tfds:<name>",
    "celebamask",
    "digit_canvases",
    "synthetic",
)
PADDED = ("digits", "idx")  # MNIST-like: brought to size by zeros around, where `fit` is not told
_SYNTHETIC = 1024  # images when no limit is given


def open_images(
    source: str,
    *,
    split: str = "train",
    path: str = "",
    image_size: int = 0,
    channels: int = 3,
    num_classes: int = 0,
    limit: int = 0,
    fit: str = "",
    labels: str = "",
    max_pixels: int = MAX_PIXELS,
) -> ImageSource:
    """Open a set of images.

    Args:
        source: one of `SOURCES`.
        split: the part of it; which ones there are depends on the source.
        path: folder or file of the source. The ``idx`` folder `FASHION_MNIST_FOLDER` is filled by
            a download when files are missing there.
        image_size: side in pixels that every image is brought to; 0 keeps the stored size.
        channels: 1 or 3.
        num_classes: labels must lie in ``[0, num_classes)``, and classes that have names must be
            as many or more; 0 accepts what is there.
        limit: the first `limit` images only, in the source's own order; 0 takes all. LFM trained
            LSUN on the first 120,000.
        fit: "crop" or "pad" (see `Preprocess`); by default MNIST-like sources pad, others crop.
        labels: CSV file of ``file,label`` rows, for ``folder`` and ``zip``.
        max_pixels: larger stored images are refused.

    Raises:
        UserError: naming the source, path, file or index that is wrong and what is accepted.
    """
    kind, _, dataset = source.partition(":")
    kinds = {name.partition(":")[0] for name in SOURCES}
    if kind not in kinds or (kind == "tfds") != bool(dataset):
        raise UserError(f"data.source={source!r}: expected one of {', '.join(SOURCES)}")
    if limit < 0:
        raise UserError(f"data.limit={limit}: expected a number of images, or 0 for all")
    if kind in ("idx", "folder", "zip", "lmdb", "celebamask") and not path:
        raise UserError(f"data.path is unset: source {source!r} needs a folder or file")
    preprocess = Preprocess(
        image_size=image_size,
        channels=channels,
        fit=fit or ("pad" if kind in PADDED else "crop"),
        max_pixels=max_pixels,
    )
    options = {"split": split, "preprocess": preprocess}
    if kind == "digits":
        opened = _open_digits(**options)
    elif kind == "idx":
        if Path(path).expanduser() == FASHION_MNIST_FOLDER:
            download_fashion_mnist(path)
        opened = open_idx(path, **options)
    elif kind == "folder":
        opened = open_folder(path, labels=labels, num_classes=num_classes, **options)
    elif kind == "zip":
        opened = open_zip(path, labels=labels, num_classes=num_classes, **options)
    elif kind == "lmdb":
        opened = open_lmdb(path, limit=limit, **options)
    elif kind == "tfds":
        opened = open_tfds(dataset, path=path, **options)
    elif kind == "celebamask":
        opened = open_celebamask(path, **options)
    elif kind == "digit_canvases":
        opened = open_digit_canvases(
            split=split, image_size=image_size, channels=channels, limit=limit
        )
    else:
        opened = _open_synthetic(num_classes, limit or _SYNTHETIC, **options)
    if limit and limit < len(opened):
        opened = _first(opened, limit)
    if num_classes:
        if not opened.num_classes:
            raise UserError(
                f"data.num_classes={num_classes}: {opened.name} has no labels; expected 0"
            )
        if opened.labels is not None:
            check_labels(opened.labels, num_classes, opened.name)
        names = opened.class_names[:num_classes]
        # Classes that are numbers are counted by the largest label that occurs, in a split or
        # under a limit, and larger ones may be elsewhere.
        numbers = tuple(str(i) for i in range(num_classes))
        if names != numbers[: len(names)]:
            check_count(names, num_classes, opened.name)
        opened = dataclasses.replace(opened, class_names=names + numbers[len(names) :])
    return opened


def _first(source: ImageSource, limit: int) -> ImageSource:
    return dataclasses.replace(
        source,
        size=limit,
        labels=None if source.labels is None else source.labels[:limit],
        files=source.files[:limit],
        fingerprint=hashed(source.fingerprint, f"first {limit}"),
    )


def _open_digits(*, split: str, preprocess: Preprocess) -> ImageSource:
    """The 1,797 8x8 digits of scikit-learn (values 0..16), every fifth of a class held out."""
    from sklearn.datasets import load_digits

    if split not in ("train", "test"):
        raise UserError(f"digits split {split!r}: expected one of train, test")
    bunch: Any = load_digits()
    labels = bunch.target.astype(np.int32)
    place_in_class = np.zeros_like(labels)
    for digit in range(10):
        members = labels == digit
        place_in_class[members] = np.arange(members.sum())
    chosen = (place_in_class % 5 == 4) == (split == "test")
    images = np.round(bunch.images[chosen] * (255 / 16)).astype(np.uint8)
    names = tuple(str(digit) for digit in range(10))
    return array_source("digits", preprocess.arrays(images, "digits"), labels[chosen], names)


def _open_synthetic(
    num_classes: int, count: int, *, split: str, preprocess: Preprocess
) -> ImageSource:
    """Gratings whose direction tells the class and whose phase and colour vary."""
    if split not in ("train", "test"):
        raise UserError(f"synthetic split {split!r}: expected one of train, test")
    size, classes = preprocess.image_size or 16, max(num_classes, 1)
    random = np.random.default_rng(split == "test")
    labels = (np.arange(count) % classes).astype(np.int32)
    angle = (np.pi * labels / classes)[:, None, None]
    phase = random.uniform(0, 2 * np.pi, (count, 1, 1))
    y, x = np.mgrid[:size, :size] * (4 * np.pi / size)
    wave = 0.5 + 0.5 * np.sin(np.cos(angle) * x + np.sin(angle) * y + phase)
    colour = random.uniform(0.3, 1.0, (count, 1, 1, preprocess.channels))
    images = np.round(255 * wave[..., None] * colour).astype(np.uint8)
    if not num_classes:
        return array_source("synthetic", images, np.full(count, -1), ())
    return array_source("synthetic", images, labels, tuple(str(i) for i in range(classes)))
