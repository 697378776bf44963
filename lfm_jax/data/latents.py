"""The latent cache, read: a TFDS-readable folder of ArrayRecord shards plus ``metadata.json``.

A record holds ``moments`` ``[h, w, 2c]`` float16 (mean and log-variance of the encoder's posterior,
unscaled), optionally ``moments_flip`` (of the mirror image: a latent cannot simply be mirrored),
``label``, ``index`` (place in the image source) and any further arrays. ``CacheWriter`` writes it,
``tfds.builder_from_directory(folder).as_data_source(split)`` opens it too, both without TensorFlow.

    metadata.json   what `CacheWriter` was told (encoder, scale, shift, image_size, ...), count,
                    features, channel_mean and channel_std of the unscaled latents, one entry a
                    shard (file, count, bytes, sha256); written last: a folder with it is whole

Damage is found at three depths: the size of every shard on opening; a checksum of the
whole file on demand, and on opening where that takes under a second; ArrayRecord's own checksum of
each record when it is read.
"""

import dataclasses
import functools
import hashlib
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from lfm_jax.checksums import file_sha256, is_sealed
from lfm_jax.data.records import RecordError, encode_example, parse_example
from lfm_jax.errors import UserError

METADATA = "metadata.json"
PLAN = "plan.json"
_VERIFY_BELOW = 1 << 28  # bytes; a sha256 of that takes about 0.2 s


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feature:
    """Shape and type of one array of a record; `label` and `index` are scalars."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


class LatentCache:
    """Random access to a finished cache. Made by `open_cache`; safe to use from several threads."""

    def __init__(self, folder: Path, metadata: dict[str, Any]):
        self.folder = folder
        self.metadata = metadata
        self.features = features_from_json(metadata["features"])
        self._shards = metadata["shards"]
        self._starts = np.cumsum([0] + [shard["count"] for shard in self._shards])
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of a latent, half the channels of the moments."""
        height, width, channels = self.features["moments"].shape
        return height, width, channels // 2

    @property
    def num_classes_seen(self) -> int:
        """Largest label plus one; 0 where nothing is labelled."""
        return self.metadata["num_classes_seen"]

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 hex of the shards' checksums and of the features: the content, not the place."""
        content = [[shard["count"], shard["sha256"]] for shard in self._shards]
        text = json.dumps([self.metadata["features"], content], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def read(
        self, indices: Integer[np.ndarray, " n"] | Sequence[int] | range
    ) -> dict[str, np.ndarray]:
        """The records at the given places, stacked: every feature with a leading axis ``n``.

        Returns:
            "moments" f16 ``[n, h, w, 2c]``, "moments_flip" where stored, "label" int32 ``[n]``,
            "index" int32 ``[n]``, and what else was stored.

        Raises:
            UserError: a shard is damaged, naming it.
        """
        places = np.asarray(indices, np.int64)
        if len(places) and (places.min() < 0 or places.max() >= len(self)):
            raise IndexError(f"cache {self.folder}: {len(self)} latents; asked for {places.max()}")
        batch = {
            name: np.empty((len(places), *feature.shape), feature.dtype)
            for name, feature in self.features.items()
        }
        shards = np.searchsorted(self._starts, places, side="right") - 1
        for shard in np.unique(shards):
            rows = np.flatnonzero(shards == shard)
            self._read_shard(int(shard), places[rows] - self._starts[shard], rows, batch)
        batch["index"] = batch["index"].astype(np.int32)
        return batch

    def _read_shard(
        self, shard: int, places: np.ndarray, rows: np.ndarray, batch: dict[str, np.ndarray]
    ) -> None:
        path = self.folder / self._shards[shard]["file"]
        try:
            records = self._reader(shard).read(places.tolist())
            for row, record in zip(rows.tolist(), records, strict=True):
                decode_record(record, self.features, batch, row)
        except (RecordError, RuntimeError, ValueError, IndexError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path}: damaged shard ({reason}); encode it again") from None

    def _reader(self, shard: int) -> Any:
        with self._lock:
            if shard not in self._readers:
                self._readers[shard] = open_reader(self.folder / self._shards[shard]["file"])
            return self._readers[shard]

    def verify(self, part: int = 0, of: int = 1) -> None:
        """Recompute the checksum of every shard, or of every `of`-th from `part` on.

        Raises:
            UserError: one differs, naming the file.
        """
        for shard in self._shards[part::of]:
            path = self.folder / shard["file"]
            if file_sha256(path) != shard["sha256"]:
                raise UserError(f"{path}: checksum differs: damaged shard; encode it again")


def open_cache(
    folder: str | os.PathLike[str], *, encoder: str | None = None, verify: bool | None = None
) -> LatentCache:
    """Open a finished latent cache.

    Args:
        folder: a local folder, ``DIR/latents/<split>``.
        encoder: fingerprint of the encoder that is about to be used; the cache must be of it.
        verify: recompute the shards' checksums; None does so for caches under 256 MiB.

    Raises:
        UserError: no cache there or not finished, a missing, resized or damaged shard, another
            encoder's cache, a folder that is not local.
    """
    folder = local_folder(folder)
    try:
        metadata = json.loads((folder / METADATA).read_text())
        _check_description(metadata)
    except FileNotFoundError:
        state = "not finished" if (folder / PLAN).exists() else "none there"
        raise UserError(f"latent cache {folder}: {state}; run --job=encode first") from None
    # A file that is no such description raises nearly anything, recursion errors included.
    except Exception as error:
        reason = " ".join(repr(error).split())[:200]
        raise UserError(f"{folder / METADATA}: damaged ({reason}); encode again") from None
    shards = metadata["shards"]
    if encoder is not None and metadata["encoder"] != encoder:
        raise UserError(
            f"latent cache {folder}: made by encoder {metadata['encoder']}; expected {encoder}, "
            "the one in use: encode into another --workdir, or use the encoder of the cache"
        )
    if sum(shard["count"] for shard in shards) != metadata["count"]:
        raise UserError(f"{folder / METADATA}: shards do not add up to count {metadata['count']}")
    for shard in shards:
        _check_shard(folder / shard["file"], shard)
    cache = LatentCache(folder, metadata)
    small = sum(shard["bytes"] for shard in shards) <= _VERIFY_BELOW
    if verify or (verify is None and small):
        cache.verify()
    return cache


def _check_description(metadata: dict[str, Any]) -> None:
    """Raise whatever for one that `CacheWriter` cannot have written."""
    if not is_sealed(metadata):
        raise ValueError("its checksum differs")
    features = features_from_json(metadata["features"])
    wanted = {"moments": "f", "label": "i", "index": "i"}
    for name, feature in features.items():
        kind = np.dtype(feature.dtype).kind
        sizes = (*feature.shape, 1)
        if kind not in wanted.get(name, "biuf") or not all(type(n) is int and n > 0 for n in sizes):
            raise ValueError(f"feature {name} is {feature}")
    if not wanted.keys() <= features.keys() or len(features["moments"].shape) != 3:
        raise ValueError(f"features {', '.join(features)}")
    bytes_each = sum(feature.bytes for feature in features.values())
    for shard in metadata["shards"]:
        name, count, size = shard["file"], shard["count"], shard["bytes"]
        # A name alone: a description from elsewhere must not point outside its folder.
        if Path(name).name != name or type(count) is not int or type(size) is not int:
            raise ValueError(f"shard {shard}")
        if count < 0 or count * bytes_each > size or len(shard["sha256"]) != 64:
            raise ValueError(f"shard {shard}")
    if not isinstance(metadata["encoder"], str) or type(metadata["num_classes_seen"]) is not int:
        raise ValueError("encoder or num_classes_seen")
    if type(metadata["count"]) is not int or metadata["count"] < 1:
        raise ValueError("count")


def _check_shard(path: Path, shard: dict[str, Any]) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path}: missing shard; encode again") from None
    except (OSError, ValueError) as error:  # a name that is none
        raise UserError(f"{path}: not readable ({error}); encode again") from None
    if size != shard["bytes"]:
        raise UserError(f"{path}: {size} bytes; expected {shard['bytes']}: encode again")


def decode_record(
    record: bytes, features: dict[str, Feature], batch: dict[str, np.ndarray], row: int
) -> None:
    """Write one record's features into row `row` of the arrays of `batch`.

    Raises:
        RecordError: not a record, a feature that is missing, of another type or length.
    """
    parsed = parse_example(record)
    for name, feature in features.items():
        value = parsed.get(name)
        if not feature.shape:
            if not isinstance(value, int):
                raise RecordError(f"feature {name!r} is no integer")
            if not np.iinfo(feature.dtype).min <= value <= np.iinfo(feature.dtype).max:
                raise RecordError(f"feature {name!r} = {value} does not fit {feature.dtype}")
            batch[name][row] = value
        else:
            if not isinstance(value, memoryview) or len(value) != feature.bytes:
                raise RecordError(f"feature {name!r} is not {feature.bytes} bytes")
            batch[name][row] = np.frombuffer(value, feature.dtype).reshape(feature.shape)


def encode_record(arrays: dict[str, Any], features: dict[str, Feature]) -> bytes:
    """One record; arrays must already have their features' shape and type."""
    return encode_example(
        {
            name: arrays[name].tobytes() if feature.shape else int(arrays[name])
            for name, feature in features.items()
        }
    )


def features_to_json(features: dict[str, Feature]) -> dict[str, Any]:
    """A record's arrays, as ``metadata.json`` tells them."""
    return {name: {"shape": list(f.shape), "dtype": f.dtype} for name, f in features.items()}


def features_from_json(value: dict[str, Any]) -> dict[str, Feature]:
    """The inverse of `features_to_json`."""
    return {name: Feature(shape=tuple(f["shape"]), dtype=f["dtype"]) for name, f in value.items()}


def open_reader(path: Path) -> Any:
    """An ArrayRecord reader set for random access (no read-ahead)."""
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")


def local_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder as a local path.

    ArrayRecord opens local files only. Where buckets are mounted (gcsfuse) or copied to, the
    environment says: ``LFM_MOUNTS="gs://bucket=/mnt/bucket gs://other/runs=/data/runs"``.

    Raises:
        UserError: an address such as gs:// that LFM_MOUNTS does not cover.
    """
    name = os.fspath(folder)
    if "://" not in name:
        return Path(name).expanduser()
    for mount in os.environ.get("LFM_MOUNTS", "").split():
        address, _, place = mount.partition("=")
        rest = name.removeprefix(address.rstrip("/"))
        if place and rest != name and rest[:1] in ("", "/"):
            return Path(place) / rest.lstrip("/")
    raise UserError(
        f"latent cache {name}: ArrayRecord opens local paths only; mount the bucket or copy the "
        "folder to this host, and say where by LFM_MOUNTS=gs://bucket=/mnt/bucket"
    )
