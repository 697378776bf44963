"""The latent cache, written: shard by shard, by any number of processes, killed at any time.

A shard is a contiguous range of examples and the unit of work. It is written under a temporary name
and renamed, beside a small JSON of what is in it; a shard whose JSON exists is done. `finish` adds
the parts up and writes the description last, so that a folder is either whole or going on.

Log-variances are stored, not standard deviations: exp(-15) is below the smallest float16, while
float16 log-variances in [-30, 20] err by at most 0.8 % of the standard deviation.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lfm_jax.checksums import file_sha256, is_sealed, seal
from lfm_jax.data.latent_totals import Totals
from lfm_jax.data.latents import (
    METADATA,
    PLAN,
    Feature,
    LatentCache,
    encode_record,
    features_to_json,
    local_folder,
    open_cache,
    open_reader,
)
from lfm_jax.data.tfds_info import NAME, write_tfds_info
from lfm_jax.errors import UserError

_PARTS = "parts"
_REQUIRED = ("encoder", "scale", "shift", "image_size")
_LOGVAR_RANGE = (-30.0, 20.0)
# One record a group, so that a random read touches no neighbour; not compressed, because moments
# are noise-like (zstd saves 7 %) and unpacking would halve the read rate.
_OPTIONS = "group_size:1,uncompressed"


class CacheWriter:
    """Writes a latent cache into a folder.

        writer = CacheWriter("latents/train", num_examples=n, shard_size=16384, ...)
        for shard in writer.missing_shards()[process_index::process_count]:
            writer.write_shard(shard, examples_of(writer.shard_range(shard)))
        cache = writer.finish()  # when all processes are through; any or all of them may call it

    Args:
        folder: local folder; made if it is missing. Its name is the split's.
        num_examples: how many in all.
        shard_size: examples a shard; the last one may be smaller.
        latent_shape: ``(h, w, c)`` of a latent; the moments have ``2c`` channels.
        mirror: whether examples also carry ``moments_flip``.
        metadata: JSON values; "encoder" (sha256 hex), "scale", "shift" and "image_size" are
            required; customary are "crop", "source" (its fingerprint), "num_classes" (labels are
            checked against it), "class_names" and "origin".
        extra: further arrays of an example, such as masks: name to ``(shape, dtype)``; a shape of
            ``()`` is an integer.

    Raises:
        UserError: the folder holds another cache (other encoder, images, sizes); nothing is
            overwritten.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        num_examples: int,
        shard_size: int,
        latent_shape: tuple[int, int, int],
        metadata: Mapping[str, Any],
        mirror: bool = False,
        extra: Mapping[str, tuple[tuple[int, ...], str]] | None = None,
    ):
        if num_examples < 1 or shard_size < 1:
            raise UserError(
                f"latent cache: num_examples={num_examples}, shard_size={shard_size}: expected >= 1"
            )
        absent = [key for key in _REQUIRED if key not in metadata]
        if absent:
            raise ValueError(f"metadata lacks {', '.join(absent)}")
        height, width, channels = latent_shape
        moments = Feature(shape=(height, width, 2 * channels), dtype="float16")
        self.features = {"moments": moments}
        if mirror:
            self.features["moments_flip"] = moments
        for name, (shape, dtype) in (extra or {}).items():
            if name in ("moments", "moments_flip", "label", "index"):
                raise ValueError(f"extra feature {name!r}: the name is taken")
            self.features[name] = Feature(shape=tuple(shape), dtype=np.dtype(dtype).name)
        self.features["label"] = Feature(shape=(), dtype="int32")
        self.features["index"] = Feature(shape=(), dtype="int64")

        self.folder = local_folder(folder)
        self.num_examples = num_examples
        self.shard_size = shard_size
        self.num_shards = -(-num_examples // shard_size)
        self._channels = channels
        self._metadata = dict(metadata)
        self._split = "".join(c if c.isalnum() else "_" for c in self.folder.name) or "train"
        self._plan = json.loads(
            json.dumps(
                {
                    **self._metadata,
                    "count": num_examples,
                    "shard_size": shard_size,
                    "features": features_to_json(self.features),
                }
            )
        )
        self._claim()

    def shard_range(self, shard: int) -> range:
        """The examples of a shard."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.num_examples))

    def missing_shards(self, *, verify: bool = False) -> list[int]:
        """Shards that are not (wholly) there yet, in order.

        Args:
            verify: count those whose checksum differs among them: writing them again mends them.
        """

        def whole(shard: int) -> bool:
            part = self._part(shard)
            if part is None or not verify:
                return part is not None
            return file_sha256(self.folder / part["file"]) == part["sha256"]

        return [shard for shard in range(self.num_shards) if not whole(shard)]

    def remove_leftovers(self) -> None:
        """Remove what killed writers have left half written; while nobody writes."""
        for path in (*self.folder.glob(".*.tmp"), *(self.folder / _PARTS).glob(".*.tmp")):
            path.unlink(missing_ok=True)
        for path in self.folder.glob(".info-*"):
            shutil.rmtree(path, ignore_errors=True)

    def write_shard(self, shard: int, examples: Iterable[Mapping[str, Any]]) -> None:
        """Write one shard; it appears only when all of it is on disk.

        Args:
            shard: its number.
            examples: those of `shard_range`, in order. Each is one example (``moments``
                ``[h, w, 2c]``, any float type, logvar still unclamped; ``label``, -1 without;
                the extras) or a batch of them with a leading axis. ``index`` may be left out.

        Raises:
            UserError: moments that are not finite in float16, a label out of range, naming the
                example.
        """
        from array_record.python.array_record_module import ArrayRecordWriter

        path = self.folder / self._file(shard)
        indices = iter(self.shard_range(shard))
        totals = Totals(self._channels)
        with _replacing(path) as temporary:
            writer = ArrayRecordWriter(str(temporary), _OPTIONS)
            try:
                for example in _singles(examples):
                    index = next(indices, None)
                    if index is None:
                        raise ValueError(f"shard {shard}: more than {self.shard_size} examples")
                    arrays = self._checked(example, index)
                    totals.add(arrays)
                    writer.write(encode_record(arrays, self.features))
            finally:
                writer.close()
            left = len(list(indices))
            if left:
                raise ValueError(f"shard {shard}: {left} examples are missing")
            part = {
                "file": path.name,
                "count": totals.count,
                "bytes": temporary.stat().st_size,
                "sha256": file_sha256(temporary),
                "totals": totals.to_json(),
            }
        _write_json(self._part_path(shard), seal({"plan": self._plan_hash(), **part}))

    def finish(self) -> LatentCache:
        """Add the shards up, write the description, open the cache.

        Raises:
            UserError: a shard is missing or not what was written.
        """
        parts, absent = [], []
        for shard in range(self.num_shards):
            part = self._part(shard)
            if part is None:
                absent.append(shard)
            else:
                parts.append(part)
        if absent:
            raise UserError(
                f"latent cache {self.folder}: {len(absent)} of {self.num_shards} shards are "
                f"missing, the first is {absent[0]}; run --job=encode again"
            )
        totals = Totals(self._channels)
        for part in parts:
            totals.merge(part["totals"])
        shards = [
            {key: part[key] for key in ("file", "count", "bytes", "sha256")} for part in parts
        ]
        description = {**self._plan, "split": self._split, **totals.summary(), "shards": shards}
        if not self._described_as(description):
            for part in parts:
                path = self.folder / part["file"]
                if open_reader(path).num_records() != part["count"]:
                    raise UserError(f"{path}: expected {part['count']} records; remove it")
            write_tfds_info(self.folder, self.features, self._split, parts)
            _write_json(self.folder / METADATA, seal(description))
        return open_cache(self.folder)

    def _described_as(self, description: dict[str, Any]) -> bool:
        """Whether the folder's description is this one, and whole."""
        try:
            found = json.loads((self.folder / METADATA).read_text())
            return seal(found) == seal(json.loads(json.dumps(description)))
        except (OSError, ValueError, AttributeError):
            return False

    # ---- what is on disk

    def _claim(self) -> None:
        path = self.folder / PLAN
        if path.exists():
            try:
                found = json.loads(path.read_text())
            except ValueError as error:
                raise UserError(f"{path}: damaged ({error}); remove {self.folder}") from None
            for key in (*self._plan, *found):
                if found.get(key) != self._plan.get(key):
                    raise UserError(
                        f"latent cache {self.folder}: was begun with {key} = {found.get(key)}; "
                        f"expected {self._plan.get(key)}: remove the folder or use another one"
                    )
            return
        if (self.folder / METADATA).exists():
            raise UserError(f"{self.folder}: holds another data set; use another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_json(path, self._plan)

    def _file(self, shard: int) -> str:
        return f"{NAME}-{self._split}.array_record-{shard:05d}-of-{self.num_shards:05d}"

    def _part_path(self, shard: int) -> Path:
        return self.folder / _PARTS / f"{shard:05d}.json"

    def _part(self, shard: int) -> dict[str, Any] | None:
        try:
            part = json.loads(self._part_path(shard).read_text())
            size = (self.folder / self._file(shard)).stat().st_size
            done = part["plan"] == self._plan_hash() and part["bytes"] == size
            done &= is_sealed(part)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return part if done else None

    def _plan_hash(self) -> str:
        return hashlib.sha256(json.dumps(self._plan, sort_keys=True).encode()).hexdigest()

    # ---- one example

    def _checked(self, example: Mapping[str, Any], index: int) -> dict[str, np.ndarray]:
        given = {"label": -1, **example}
        if int(given.setdefault("index", index)) != index:
            raise ValueError(f"example {given['index']} in the place of {index}")
        arrays = {}
        for name, feature in self.features.items():
            if name not in given:
                raise ValueError(f"example {index} lacks {name!r}")
            array = np.asarray(given[name])
            if array.shape != feature.shape:
                raise ValueError(
                    f"example {index}: {name} has shape {array.shape}; expected {feature.shape}"
                )
            arrays[name] = (
                self._moments(array, name, index)
                if name in ("moments", "moments_flip")
                else array.astype(feature.dtype)
            )
        label, classes = int(arrays["label"]), self._metadata.get("num_classes", 0)
        if classes and not 0 <= label < classes:
            raise UserError(
                f"example {index}: label {label} is out of range; expected 0 to {classes - 1}"
            )
        return arrays

    def _moments(self, moments: np.ndarray, name: str, index: int) -> np.ndarray:
        mean, logvar = np.split(np.asarray(moments, np.float32), 2, axis=-1)
        logvar = np.clip(logvar, *_LOGVAR_RANGE)
        stored = np.concatenate([mean, logvar], axis=-1)
        if not np.abs(stored).max() <= np.finfo(np.float16).max:
            raise UserError(
                f"example {index}: {name} is not finite in float16; expected |mean| <= 65504"
            )
        return stored.astype(np.float16)


def begun_with(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What the cache in a folder, finished or not, was begun with; None where there is none."""
    try:
        return json.loads((local_folder(folder) / PLAN).read_text())
    except (OSError, ValueError):
        return None


def remove_cache(folder: str | os.PathLike[str]) -> None:
    """Remove a cache and nothing else; killed halfway, it is removed the next time."""
    root = local_folder(folder)
    (root / METADATA).unlink(missing_ok=True)
    parts = [*root.glob(f"{NAME}-*.array_record-*"), *root.glob(f"{_PARTS}/*.json")]
    for path in [*parts, root / "dataset_info.json", root / "features.json", root / PLAN]:
        path.unlink(missing_ok=True)


def _singles(examples: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    for example in examples:
        if np.ndim(example["moments"]) == 3:
            yield example
        else:
            for row in range(len(example["moments"])):
                yield {name: array[row] for name, array in example.items()}


@contextlib.contextmanager
def _replacing(path: Path):
    """A temporary name in the same folder that becomes `path` if nothing fails."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")
