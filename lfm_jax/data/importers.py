"""Other projects' latent stores (`lfm_jax.data.latent_stores`), rewritten once as our cache."""

import os
from pathlib import Path

from tqdm import tqdm

from lfm_jax.data.cache_writer import CacheWriter
from lfm_jax.data.latent_stores import KINDS, LatentStore
from lfm_jax.data.latents import LatentCache
from lfm_jax.errors import UserError


def open_store(kind: str, path: str | os.PathLike[str]) -> LatentStore:
    """Open another project's latent store.

    Args:
        kind: one of `KINDS`.
        path: a folder, for ``edm2`` also a zip file.

    Raises:
        UserError: another layout, a damaged file, naming it.
    """
    if kind not in KINDS:
        raise UserError(f"import kind {kind!r}: expected one of {', '.join(KINDS)}")
    root = Path(path).expanduser()
    if not root.exists():
        raise UserError(f"import {kind}: {root}: no such file or folder")
    return KINDS[kind](root)


def import_latents(
    kind: str,
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    encoder: str,
    scale: float,
    image_size: int,
    shift: float = 0.0,
    shard_size: int = 16384,
) -> LatentCache:
    """Write another project's latent store as a cache; a killed import goes on where it stopped.

    ``--job=encode --config.encode.import_kind=...`` does the same in a workdir.

    Args:
        kind, path: of the store; see `open_store`.
        folder: where the cache goes; its name is the split's.
        encoder: fingerprint of the encoder that made the store. Nothing in the stores tells; it is
            what `open_cache` compares with the encoder in use.
        scale, shift: of the latents that a network is to see, ``(z - shift) * scale``; 0.18215 and
            0 for the SD VAE, whatever the store itself was multiplied with.
        image_size: side in pixels of the images behind the latents.
        shard_size: examples a shard.

    Raises:
        UserError: another layout, a damaged file or one of another shape, naming it.
    """
    store = open_store(kind, path)
    writer = CacheWriter(
        folder,
        num_examples=len(store),
        shard_size=shard_size,
        latent_shape=store.latent_shape,
        mirror="moments_flip" in store.shapes,
        metadata={
            "encoder": encoder,
            "scale": scale,
            "shift": shift,
            "image_size": image_size,
            "source": store.fingerprint,
            "class_names": list(store.class_names),
            "origin": store.origin,
        },
    )
    writer.remove_leftovers()
    missing = writer.missing_shards(verify=True)
    total = sum(len(writer.shard_range(shard)) for shard in missing)
    with tqdm(total=total, desc=f"import {kind}", unit="latent") as bar:
        for shard in missing:
            writer.write_shard(shard, store.examples(writer.shard_range(shard)))
            bar.update(len(writer.shard_range(shard)))
    return writer.finish()
