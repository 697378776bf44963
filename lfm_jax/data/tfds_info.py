"""What TFDS needs to open a latent cache as one of its data sets, without TensorFlow."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from lfm_jax.data.latents import Feature

NAME = "latents"  # of the data set; TFDS expects the shards' names to begin with it


def write_tfds_info(
    folder: Path, features: Mapping[str, Feature], split: str, parts: list[dict[str, Any]]
) -> None:
    """Write the description by which ``tfds.builder_from_directory(folder)`` opens a cache.

    Args:
        folder: of the shards.
        features: of a record.
        split: its name; the only one of the folder.
        parts: "count" and "bytes" of every shard.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity
    from tensorflow_datasets.core.splits import SplitDict

    tensors = {}
    for name, feature in features.items():
        dtype = np.dtype(feature.dtype).type
        tensors[name] = (
            tfds.features.Tensor(shape=feature.shape, dtype=dtype, encoding="bytes")
            if feature.shape
            else tfds.features.Scalar(dtype=dtype)
        )
    identity = DatasetIdentity(
        name=NAME,
        version=tfds.core.Version("1.0.0"),
        data_dir=str(folder),
        module_name="",
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=tfds.features.FeaturesDict(tensors),
        description="Latent moments: mean and log-variance of an image encoder's posterior.",
    )
    info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    template = tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(folder),
        dataset_name=NAME,
        split=split,
        filetype_suffix="array_record",
    )
    info_of_split = tfds.core.SplitInfo(
        name=split,
        shard_lengths=[part["count"] for part in parts],
        num_bytes=sum(part["bytes"] for part in parts),
        filename_template=template,
    )
    info.set_splits(SplitDict([info_of_split]))
    with tempfile.TemporaryDirectory(dir=folder, prefix=".info-") as temporary:
        info.write_to_directory(temporary)
        for file in Path(temporary).iterdir():
            os.replace(file, folder / file.name)
