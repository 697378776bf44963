"""Batches as a pure function of seed and position (grain).

The stream is endless: epoch after epoch, each in another seeded permutation of all examples, with
no gap or repeat at the border. After the global shuffle process ``p`` of ``P`` takes every ``P``-th
example, so that any number of processes continues the same stream from its position:

    position of row j of step s, process p  =  start + s * global_batch + j * P + p

Everything random about an example (noise, time, mirror, label drop) is keyed by that position.
"""

from collections.abc import Callable, Iterator

import grain
import numpy as np

from lfm_jax.data.latents import LatentCache
from lfm_jax.data.source import ImageSource
from lfm_jax.errors import UserError

Batch = dict[str, np.ndarray]


def latent_batches(
    cache: LatentCache,
    *,
    global_batch: int,
    seed: int,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    in_memory: bool = False,
    threads: int = 2,
    read_ahead: int = 4,
) -> Iterator[Batch]:
    """This process's share of an endless stream of latent batches.

    Args:
        cache: an open cache.
        global_batch: examples a step over all processes; a multiple of `process_count`.
        seed: of the shuffle, >= 0.
        start: examples that the whole run has drawn before.
        process_index, process_count: which share.
        in_memory: read the whole cache into memory first.
        threads: of grain's reader; `read_ahead`: batches it keeps ready.

    Returns:
        An iterator of ``{"moments" f16 [b, h, w, 2c], "moments_flip" where stored, "label" int32,
        "index" int32, "position" uint32}`` and any further features, ``b = global_batch / P``.

    Raises:
        UserError: a batch that the processes cannot share; a damaged shard when it is read.
    """
    read = _held(cache) if in_memory else cache.read
    return stream(
        read,
        len(cache),
        global_batch=global_batch,
        seed=seed,
        start=start,
        process_index=process_index,
        process_count=process_count,
        threads=threads,
        read_ahead=read_ahead,
    )


def image_batches(
    source: ImageSource,
    *,
    global_batch: int,
    seed: int,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 2,
    read_ahead: int = 4,
) -> Iterator[Batch]:
    """The same stream over an image source.

    Returns:
        An iterator of ``{"image" uint8 [b, H, W, C], "label" int32, "index" int32, "position"
        uint32}``; arguments and errors as in `latent_batches`.
    """

    def read(indices: np.ndarray) -> Batch:
        return {**source.batch(indices), "index": indices.astype(np.int32)}

    return stream(
        read,
        len(source),
        global_batch=global_batch,
        seed=seed,
        start=start,
        process_index=process_index,
        process_count=process_count,
        threads=threads,
        read_ahead=read_ahead,
    )


def stream(
    read: Callable[[np.ndarray], Batch],
    size: int,
    *,
    global_batch: int,
    seed: int,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 2,
    read_ahead: int = 4,
) -> Iterator[Batch]:
    """The stream over anything that reads `size` examples by index; see the module."""
    if size < 1:
        raise UserError("the data source is empty; expected at least one example")
    if global_batch < 1 or global_batch % process_count:
        raise UserError(
            f"batch_size={global_batch}: expected a multiple of the {process_count} processes"
        )
    local = global_batch // process_count
    # Grain shuffles epoch e by seed + e; spread seeds, or neighbouring ones would share epochs.
    spread = int(np.random.SeedSequence(seed).generate_state(1)[0])
    order = grain.MapDataset.range(size).shuffle(spread).repeat()
    mine = order[start + process_index :: process_count]

    def load(step: int, indices: np.ndarray) -> Batch:
        rows = step * local + np.arange(local)
        positions = start + process_index + process_count * rows
        return {**read(np.asarray(indices)), "position": positions.astype(np.uint32)}

    batches = mine.batch(local, batch_fn=np.asarray).map_with_index(load)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=read_ahead)
    return iter(batches.to_iter_dataset(options))


def _held(cache: LatentCache) -> Callable[[np.ndarray], Batch]:
    """The whole cache in memory, read in order once; a batch is then one gather."""
    chunks = [
        cache.read(range(begin, min(begin + 4096, len(cache))))
        for begin in range(0, len(cache), 4096)
    ]
    arrays = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    return lambda indices: {name: array[indices] for name, array in arrays.items()}
