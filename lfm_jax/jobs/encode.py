"""Encode the images once into the latent cache, shard by shard.

A shard is a work item: processes take every P-th missing one and encode it on their own devices, so
that a killed job goes on with the shards that are missing, with any number of processes.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from tqdm import tqdm

from lfm_jax.data import CacheWriter, ImageSource
from lfm_jax.jobs import build
from lfm_jax.vae import Codec, from_uint8
from lfm_jax.workdir import Workdir


def inputs(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    return {
        "images": {name: build.images(config, name).fingerprint for name in config.encode.splits},
        "codec": build.codec(config, workdir).fingerprint,
        "mirror": config.encode.mirror,
        "splits": list(config.encode.splits),
    }


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    codec = build.codec(config, workdir)
    return {split: _encode_split(config, workdir, split, codec) for split in config.encode.splits}


def _encode_split(config: ConfigDict, workdir: Workdir, split: str, codec: Codec) -> dict[str, Any]:
    source = build.images(config, split)
    side = config.data.image_size // codec.factor
    writer = CacheWriter(
        workdir.latents(split),
        num_examples=len(source),
        shard_size=config.encode.shard_size,
        latent_shape=(side, side, codec.latent_channels),
        mirror=config.encode.mirror,
        metadata={
            "encoder": codec.fingerprint,
            "scale": codec.scale,
            "shift": codec.shift,
            "image_size": config.data.image_size,
            "source": source.fingerprint,
            "num_classes": config.data.num_classes,
        },
    )
    missing = writer.missing_shards()
    mine = missing[jax.process_index() :: jax.process_count()]
    encode = _encoder(codec, mirror=config.encode.mirror)
    total = sum(len(writer.shard_range(shard)) for shard in mine)
    with tqdm(total=total, desc=f"encode {split}", unit="img", disable=not mine) as bar:
        for shard in mine:
            batches = _batches(source, writer.shard_range(shard), config.encode.batch_size)
            writer.write_shard(shard, _examples(encode, batches, bar))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"encode {split}")
    cache = writer.finish()
    return {"examples": len(cache), "cache": cache.fingerprint, "shards_written": len(missing)}


def _batches(
    source: ImageSource, indices: range, size: int
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    for start in range(0, len(indices), size):
        chunk = np.asarray(indices[start : start + size])
        yield chunk, source.batch(chunk)


def _encoder(codec: Codec, *, mirror: bool):
    """uint8 images -> moments (and those of the mirror image), over this process's devices."""
    devices = jax.local_devices()
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)

    @jax.jit
    def encode(codec: Codec, images):
        x = from_uint8(images)
        moments = {"moments": codec.encode_moments(x)}
        if mirror:
            moments["moments_flip"] = codec.encode_moments(x[:, :, ::-1])
        return moments

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        # The last batch of a shard is filled up, so that one program serves all.
        padding = -len(images) % len(devices)
        padded = np.concatenate([images, np.repeat(images[-1:], padding, axis=0)])
        placed = jax.device_put(padded, NamedSharding(mesh, P("data")))
        return {k: np.asarray(v)[: len(images)] for k, v in encode(codec, placed).items()}

    return run


def _examples(encode, batches, bar: tqdm) -> Iterator[dict[str, np.ndarray]]:
    for indices, batch in batches:
        arrays = encode(batch["image"])
        for i, index in enumerate(indices):
            example = {name: array[i] for name, array in arrays.items()}
            yield {**example, "label": batch["label"][i], "index": index}
        bar.update(len(indices))
