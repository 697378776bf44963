"""``tfds:<name>``: data sets that TFDS has prepared as ArrayRecord, opened without TensorFlow."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from lfm_jax.data.pixels import Preprocess
from lfm_jax.data.source import ImageSource, hashed, stack
from lfm_jax.errors import UserError

_DEFAULT_FOLDER = "~/tensorflow_datasets"
_PREPARE = "prepare it with tfds.builder(NAME, file_format='array_record').download_and_prepare()"


def open_tfds(name: str, *, path: str, split: str, preprocess: Preprocess) -> ImageSource:
    """Open what is already prepared; nothing is downloaded and no builder code is run.

    Args:
        name: data set, optionally ``name/config`` or ``name/config:version``.
        path: TFDS data folder (default ~/tensorflow_datasets), or a prepared version's own folder.
        split: "test" also stands for "validation" where only that exists.
        preprocess: size, channels and crop.

    Raises:
        UserError: not prepared there, not as ArrayRecord, no such split, no feature "image".
    """
    import tensorflow_datasets as tfds

    folder = _find(name, Path(path or _DEFAULT_FOLDER).expanduser())
    builder: Any  # decorators hide what its methods take
    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # whatever protobuf and JSON readers say of a damaged folder
        raise UserError(f"tfds {folder}: not a readable TFDS folder ({error})") from None
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(
            f"tfds {folder}: prepared as {builder.info.file_format.value}; "
            f"expected array_record: {_PREPARE.replace('NAME', repr(name))}"
        )
    features: Any = builder.info.features
    splits = builder.info.splits
    if split == "test" and "test" not in splits and "validation" in splits:
        split = "validation"
    if split not in splits:
        raise UserError(f"tfds {name}: split {split!r}: expected one of {', '.join(splits)}")
    if "image" not in features:
        raise UserError(f"tfds {name}: features {', '.join(features)}; expected one named image")
    # Encoded bytes, so that our own size limit is applied before anything is decoded.
    decoders = {"image": tfds.decode.SkipDecoding()}
    data = builder.as_data_source(split=split, decoders=decoders)
    labelled = "label" in features and isinstance(features["label"], tfds.features.ClassLabel)
    classes = tuple(features["label"].names) if labelled else ()

    def read(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images, labels = [], []
        for index in indices:
            where = f"tfds:{name} {split} image {index}"
            example = _example(data, int(index), where)
            images.append(preprocess.encoded(example["image"], where))
            labels.append(example["label"] if labelled else -1)
        return stack(images, f"tfds:{name}"), np.array(labels, np.int32)

    return ImageSource(
        name=f"tfds:{name}",
        size=len(data),
        labels=None if labelled else np.full(len(data), -1, np.int32),
        class_names=classes,
        fingerprint=hashed(_description(folder), split, preprocess.spec()),
        read=read,
    )


def _example(data: Any, index: int, where: str) -> dict[str, Any]:
    try:
        return data[index]
    except Exception as error:  # ArrayRecord and protobuf raise their own kinds
        raise UserError(f"{where}: damaged record ({error})") from None


def _find(name: str, root: Path) -> Path:
    name, _, version = name.partition(":")
    if (root / "dataset_info.json").exists():
        return root
    candidates = sorted((root / name).glob("**/dataset_info.json"), key=_version)
    if version:
        candidates = [c for c in candidates if c.parent.name == version]
    if not candidates:
        raise UserError(
            f"tfds {name!r}: nothing prepared in {root / name}; "
            f"{_PREPARE.replace('NAME', repr(name))}, or set data.path to its folder"
        )
    return candidates[-1].parent


def _version(path: Path) -> tuple:
    numbers = path.parent.name.split(".")
    return tuple(int(n) if n.isdecimal() else 0 for n in numbers), str(path)


def _description(folder: Path) -> dict[str, Any]:
    """Counts, sizes and features: what TFDS itself knows of the content."""
    return {
        name: json.loads((folder / name).read_text())
        for name in ("dataset_info.json", "features.json")
    }
