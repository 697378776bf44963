"""Encode the images once into the latent cache, shard by shard; or import another project's.

A shard is a work item: processes take every P-th missing one and encode it on their own devices, so
that a killed job goes on with the shards that are missing, with any number of processes. Images are
read and cropped ahead, by worker processes where they are files.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from tqdm import tqdm

from lfm_jax import sharding
from lfm_jax.conditions import Condition
from lfm_jax.data import CacheWriter, LatentCache
from lfm_jax.data.cache_writer import begun_with, remove_cache
from lfm_jax.data.importers import open_store
from lfm_jax.data.workers import batches_ahead, choose_workers
from lfm_jax.errors import UserError
from lfm_jax.jobs import build
from lfm_jax.jobs import condition as conditions
from lfm_jax.vae import Codec, from_uint8
from lfm_jax.workdir import Workdir

Examples = Iterator[dict[str, Any]]


def inputs(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    section = config.encode
    if section.import_kind is None:
        images = {name: build.images(config, name).fingerprint for name in section.splits}
    else:
        images = {"train": open_store(section.import_kind, section.import_path).fingerprint}
    return {
        "images": images,
        "codec": build.codec(config, workdir).fingerprint,
        "mirror": section.mirror,
        "splits": list(section.splits),
        **conditions.cached_inputs(config),
    }


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    codec = build.codec(config, workdir)
    if config.encode.import_kind is not None and tuple(config.encode.splits) != ("train",):
        raise UserError(
            f"--config.encode.splits={tuple(config.encode.splits)}: a store of latents is one "
            "split; expected ('train',)"
        )
    if config.encode.import_kind is not None and config.condition.kind != "none":
        raise UserError(
            f"--config.encode.import_kind={config.encode.import_kind}: a store of latents holds no "
            f"conditions; expected images with condition.kind={config.condition.kind}"
        )
    return {split: _encode_split(config, workdir, split, codec) for split in config.encode.splits}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Work:
    """Where a split's latents come from: `examples` of ranges of them, one range a shard.

    What a condition stores beside the moments is `extra`.
    """

    count: int
    latent_shape: tuple[int, int, int]
    mirror: bool
    metadata: dict[str, Any]
    examples: Callable[[list[range]], Iterator[Examples]]
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


def _encode_split(config: ConfigDict, workdir: Workdir, split: str, codec: Codec) -> dict[str, Any]:
    work = _images(config, split, codec)
    folder = workdir.latents(split)
    _remove_stale(config, workdir, split, codec)
    writer = CacheWriter(
        folder,
        num_examples=work.count,
        shard_size=config.encode.shard_size,
        latent_shape=work.latent_shape,
        mirror=work.mirror,
        extra=work.extra,
        metadata={
            "encoder": codec.fingerprint,
            "scale": codec.scale,
            "shift": codec.shift,
            "image_size": config.data.image_size,
            "num_classes": config.data.num_classes,
            **work.metadata,
            **conditions.cached_inputs(config),
        },
    )
    if sharding.is_main_process():
        writer.remove_leftovers()
    # What has been damaged since is made again.
    missing = writer.missing_shards(verify=sharding.is_main_process())
    missing = _agreed(missing, writer.num_shards)
    mine = missing[jax.process_index() :: jax.process_count()]
    ranges = [writer.shard_range(shard) for shard in mine]
    total = sum(len(indices) for indices in ranges)
    with tqdm(total=total, desc=f"encode {split}", unit="img", disable=not mine) as bar:
        for shard, examples in zip(mine, work.examples(ranges), strict=True):
            writer.write_shard(shard, _counted(examples, bar))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"encode {split}")
    cache = writer.finish()
    _verify(cache)
    return {"examples": len(cache), "cache": cache.fingerprint, "shards_written": len(missing)}


def _agreed(missing: list[int], num_shards: int) -> list[int]:
    """What the main process found missing, in every process: they share it out among them."""
    if jax.process_count() == 1:
        return missing
    mask = np.isin(np.arange(num_shards), missing)
    return np.flatnonzero(multihost_utils.broadcast_one_to_all(mask)).tolist()


def _remove_stale(config: ConfigDict, workdir: Workdir, split: str, codec: Codec) -> None:
    """Latents of an encoder that this workdir has trained on since: nothing can decode them."""
    folder = workdir.latents(split)
    begun = begun_with(folder)
    if config.autoencoder.kind != "train" or not begun or begun["encoder"] == codec.fingerprint:
        begun = None
    elif sharding.is_main_process():
        logging.warning("%s: the encoder has changed since; encoding again", folder)
        remove_cache(folder)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"latents of {split} removed")


def _verify(cache: LatentCache) -> None:
    """The checksums of what is on disk, each process those of its share."""
    shards = cache.metadata["shards"]
    mine = range(jax.process_index(), len(shards), jax.process_count())
    large = sum(shard["bytes"] for shard in shards) > 2**31
    for shard in tqdm(mine, desc="verify", unit="shard", disable=not large):
        cache.verify(shard, len(shards))


def _counted(examples: Examples, bar: tqdm) -> Examples:
    for example in examples:
        yield example
        bar.update(1)


# ---- from a store


def _stored(config: ConfigDict, codec: Codec) -> _Work:
    section, data = config.encode, config.data
    store = open_store(section.import_kind, section.import_path)
    wanted = build.latent_shape(config, codec)
    if store.latent_shape != wanted:
        raise UserError(
            f"--config.encode.import_path={section.import_path}: latents of shape "
            f"{store.latent_shape}; expected {wanted}, of images of {data.image_size} pixels in "
            "this autoencoder"
        )
    if section.mirror and "moments_flip" not in store.shapes:
        raise UserError(
            f"--config.encode.mirror=True: {section.import_path} holds no mirror images"
        )
    return _Work(
        count=len(store),
        latent_shape=store.latent_shape,
        mirror="moments_flip" in store.shapes,
        metadata={
            "source": store.fingerprint,
            "class_names": list(store.class_names),
            "origin": store.origin,
        },
        examples=lambda ranges: (store.examples(indices) for indices in ranges),
    )


# ---- from images


def _images(config: ConfigDict, split: str, codec: Codec) -> _Work:
    if config.encode.import_kind is not None:
        return _stored(config, codec)
    section, data = config.encode, config.data
    source = build.images(config, split)
    options = build.image_options(config, split)
    size = min(section.batch_size, section.shard_size, len(source))
    condition = conditions.make(config, codec, split)
    encode = _encoder(codec, condition, mirror=section.mirror, batch_size=size)

    def examples(ranges: list[range]) -> Iterator[Examples]:
        batches = [_cut(indices, size) for indices in ranges]
        flat = [batch for of_shard in batches for batch in of_shard]
        kind = data.source.partition(":")[0]
        workers = choose_workers(section.workers, kind, sum(map(len, flat)))
        images = batches_ahead(source, flat, workers=workers, options=options)
        encoded = _ahead(itertools.starmap(encode, zip(images, flat, strict=True)))
        for of_shard in batches:
            yield _examples(of_shard, itertools.islice(encoded, len(of_shard)))

    return _Work(
        count=len(source),
        latent_shape=build.latent_shape(config, codec),
        mirror=section.mirror,
        metadata={
            "source": source.fingerprint,
            "class_names": list(source.class_names),
            "crop": build.crop(config),
        },
        examples=examples,
        extra=condition.stored() if condition else {},
    )


def _cut(indices: range, size: int) -> list[np.ndarray]:
    return [np.asarray(indices[start : start + size]) for start in range(0, len(indices), size)]


def _ahead(results: Iterator[Any], depth: int = 2) -> Iterator[Any]:
    """Dispatch ahead of what is fetched, so that the device does not wait for the writer."""
    waiting: collections.deque[Any] = collections.deque()
    for result in results:
        waiting.append(result)
        if len(waiting) == depth:
            yield waiting.popleft()
    yield from waiting


def _encoder(codec: Codec, condition: Condition | None, *, mirror: bool, batch_size: int):
    """Batches of uint8 images -> their moments (and those of the mirror images), on devices.

    With them goes what the condition stores. One program over all devices of this process serves
    all batches: smaller ones are filled up.
    """
    devices = jax.local_devices()
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    size = -(-batch_size // len(devices)) * len(devices)

    @jax.jit
    def encode(codec: Codec, images, arrays):
        x = from_uint8(images)
        moments = {"moments": codec.encode_moments(x)}
        if mirror:
            moments["moments_flip"] = codec.encode_moments(x[:, :, ::-1])
        return moments | (condition.encode(codec, x, arrays) if condition else {})

    def run(batch: dict[str, np.ndarray], indices: np.ndarray) -> dict[str, Any]:
        images = batch["image"]
        arrays = condition.prepare(images, indices) if condition else {}

        def place(rows: np.ndarray) -> jax.Array:
            rows = np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])
            return jax.device_put(rows, NamedSharding(mesh, P("data")))

        made = encode(codec, *jax.tree.map(place, (images, arrays)))
        return {**arrays, **made, "label": batch["label"]}

    return run


def _examples(batches: list[np.ndarray], encoded: Iterator[dict[str, Any]]) -> Examples:
    for indices, arrays in zip(batches, encoded, strict=True):
        arrays = {name: np.asarray(array) for name, array in arrays.items()}
        for i, index in enumerate(indices):
            yield {**{name: array[i] for name, array in arrays.items()}, "index": index}
