"""One pass over images: features out, statistics summed as they come.

Every batch is padded to one size so that the network compiles once, sharded over the given devices,
and reduced on the host in float64. Processes each pass their own share of the images and receive
the statistics of all of them. A pass may keep its features on disk as they come: killed, it goes on
behind them and ends with the same bits.
"""

import dataclasses
import io
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float
from tqdm import tqdm

from lfm_jax.errors import UserError
from lfm_jax.evaluate.statistics import FeatureStatistics, StreamingStatistics, gather_bits
from lfm_jax.features.extractor import Extractor
from lfm_jax.writers import write_bytes

# Seconds of work that a kill may cost; a part is a file of the features of so long.
PART_SECONDS = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """What one pass leaves behind; `spatial`, `logits` are None where the extractor has none.

    Attributes:
        extractor, pipeline, fingerprint: which network, which pixels rule, which weights.
        count: images seen by all processes.
        statistics: of ``"features"``, over all images.
        spatial: of ``"spatial"`` (sFID), over all images.
        features: float32 ``[kept, d]`` rows in order of the images, process after process.
        logits: float32 ``[kept, k]``, the same rows.
    """

    extractor: str
    pipeline: str
    fingerprint: str
    count: int
    statistics: FeatureStatistics
    spatial: FeatureStatistics | None = None
    features: Float[np.ndarray, "n d"]
    logits: Float[np.ndarray, "n k"] | None = None


@jax.jit
def _apply(extractor: Extractor, images):
    return extractor(images)


def collect_features(
    extractor: Extractor,
    images: Iterable[np.ndarray] | np.ndarray | Callable[[int], Iterable[np.ndarray]],
    *,
    batch_size: int = 100,
    total: int | None = None,
    keep: int | None = None,
    sharding: jax.sharding.Sharding | None = None,
    description: str = "features",
    progress: bool = True,
    parts: epath.PathLike | None = None,
) -> FeatureSet:
    """Run `extractor` over `images` once.

    Args:
        images: this process's share: an array uint8 ``[n, h, w, c]`` or an iterable of such batches
            of any sizes (they are cut and joined to `batch_size`); or a function that gives the
            iterable from an image on, which `parts` needs.
        batch_size: images per forward pass and process; divisible by the devices of `sharding`.
        total: number of images to expect, for the progress bar only.
        keep: rows of features and logits to keep in memory per process; None keeps all.
        sharding: of the batch over local devices; None computes on the default device.
        parts: a folder of this pass alone, where its features are kept; it is the caller's to name
            it by everything they depend on, and to remove it.

    Raises:
        UserError: no images, or not uint8.
    """
    if isinstance(images, np.ndarray):
        whole = images
        total, images = len(whole), lambda start: [whole[start:]]
    streams, kept = {}, {"features": [], "logits": []}
    room = keep
    if sharding is not None:
        extractor = jax.device_put(extractor, _replicated(sharding))
    with tqdm(total=total, desc=description, unit="img", disable=not progress) as bar:
        for out in _outputs(extractor, images, batch_size, sharding, parts):
            size = len(out["features"])
            for name in ("features", "spatial"):
                if name in out:
                    streams.setdefault(name, StreamingStatistics()).add(out[name])
            for name, rows in kept.items():
                if name in out:
                    rows.append(out[name] if room is None else out[name][: max(room, 0)])
            room = None if room is None else room - size
            bar.update(size)
    if not streams:
        raise UserError(f"evaluate: no images for {description}; accepted: at least 2")
    statistics = {k: v.result().merge_processes() for k, v in streams.items()}
    rows = {k: _gather_rows(np.concatenate(v)) for k, v in kept.items() if v}
    return FeatureSet(
        extractor=extractor.name,
        pipeline=extractor.pipeline,
        fingerprint=extractor.fingerprint,
        count=statistics["features"].count,
        statistics=statistics["features"],
        spatial=statistics.get("spatial"),
        features=rows["features"],
        logits=rows.get("logits"),
    )


def _outputs(
    extractor: Extractor,
    images: Iterable[np.ndarray] | Callable[[int], Iterable[np.ndarray]],
    batch_size: int,
    sharding: jax.sharding.Sharding | None,
    parts: epath.PathLike | None,
) -> Iterator[dict[str, np.ndarray]]:
    """What the network makes of each batch, from disk as far as it is there."""
    done = 0
    if parts is not None:
        for out in _kept(epath.Path(parts), batch_size):
            done += len(out["features"])
            yield out
    held: list[dict[str, np.ndarray]] = []
    since = time.monotonic()
    for batch in _rebatch(images(done) if callable(images) else images, batch_size):
        size = len(batch)
        padded = np.pad(batch, [(0, batch_size - size), (0, 0), (0, 0), (0, 0)], mode="edge")
        if sharding is not None:
            padded = jax.device_put(padded, sharding)
        out = {k: np.asarray(v)[:size] for k, v in _apply(extractor, padded).items()}
        yield out
        if parts is not None:
            held.append(out)
            if time.monotonic() - since > PART_SECONDS:
                done += _keep(epath.Path(parts), done, held)
                held, since = [], time.monotonic()
    if parts is not None and held:
        _keep(epath.Path(parts), done, held)


def _keep(folder: epath.Path, start: int, held: list[dict[str, np.ndarray]]) -> int:
    """Write features of images from `start` on; how many."""
    arrays: dict[str, Any] = {k: np.concatenate([out[k] for out in held]) for k in held[0]}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes(folder / f"{start:09d}.npz", buffer.getvalue())
    return sum(len(out["features"]) for out in held)


def _kept(folder: epath.Path, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """The features in a folder from image 0 on without a gap, batch by batch as they were made."""
    done = 0
    for path in sorted(folder.glob("*.npz")) if folder.exists() else []:
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                arrays = dict(file)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile):
            return  # made again from here on
        if int(path.stem) != done:
            return
        count = len(arrays["features"])
        for start in range(0, count, batch_size):
            yield {k: v[start : start + batch_size] for k, v in arrays.items()}
        done += count
        if count % batch_size:  # the end of the images
            return


def _rebatch(batches: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same images in batches of `size`, the last one shorter."""
    held: list[np.ndarray] = []
    for batch in batches:
        batch = np.asarray(batch)
        if batch.ndim != 4 or batch.dtype != np.uint8:
            raise UserError(
                f"evaluate: images of dtype {batch.dtype} and shape {batch.shape}; "
                "accepted: uint8 [n, height, width, channels]"
            )
        for start in range(0, len(batch), size):
            held.append(batch[start : start + size])
            if sum(map(len, held)) >= size:
                joined = np.concatenate(held)
                yield joined[:size]
                held = [joined[size:]]
    if sum(map(len, held)):
        yield np.concatenate(held)


def _replicated(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return sharding


def _gather_rows(rows: np.ndarray) -> np.ndarray:
    """Rows of all processes, one after the other; processes may hold different numbers of them."""
    if jax.process_count() == 1:
        return rows
    counts = gather_bits(np.array([len(rows)], np.int64))[:, 0]
    padded = np.zeros((counts.max(), rows.shape[1]), rows.dtype)
    padded[: len(rows)] = rows
    return np.concatenate([r[:n] for r, n in zip(gather_bits(padded), counts, strict=True)])
