"""Readers of data that others may have written or damaged: images, caches, statistics, latents."""

import dataclasses
import gzip
import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fuzz_damage import inside_zip, of, of_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """Something that reads what others wrote.

    Attributes:
        name: in reports.
        make: a malformed input from dice; bytes or whatever `read` takes.
        read: reads it; may only raise `allowed`.
        share: inputs, as a multiple of those asked for.
        traced: files whose lines guide the damage; empty: none.
    """

    name: str
    make: Callable[[random.Random], Any]
    read: Callable[[Any], object]
    allowed: tuple[type[BaseException], ...]
    share: float = 1.0
    traced: tuple[str, ...] = ()


def readers(folder: Path) -> Iterator[Reader]:
    yield from _images(folder)
    yield from _caches(folder)
    yield from _statistics(folder)
    yield from _stores(folder)


def through(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    path.parent.mkdir(parents=True, exist_ok=True)

    def reader(data: bytes) -> object:
        path.write_bytes(data)
        return read(path)

    return reader


def _images(folder: Path) -> Iterator[Reader]:
    from PIL import Image

    from lfm_jax.data import idx
    from lfm_jax.data.folder import open_zip
    from lfm_jax.data.folder_labels import _csv_rows, _json_rows
    from lfm_jax.data.pixels import Preprocess
    from lfm_jax.errors import UserError

    noise = np.random.default_rng(0)
    images = noise.integers(0, 256, (3, 5, 7), np.uint8)
    valid = struct.pack(">I3I", 0x803, *images.shape) + images.tobytes()
    user = (UserError,)
    read = through(folder / "fuzz-idx3-ubyte", lambda path: idx.read_idx(path, dimensions=3))
    yield Reader(
        name="idx",
        make=of(valid, gzip.compress(valid)),
        read=read,
        allowed=user,
        share=2,
        traced=(idx.__file__,),
    )
    encoded, names = [], {}
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        buffer = io.BytesIO()
        picture = noise.integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(picture).save(buffer, kind)
        encoded.append(buffer.getvalue())
        names[f"{len(names) % 2}/{kind}.{kind.lower()}"] = buffer.getvalue()
    preprocess = Preprocess(image_size=16, max_pixels=1_000_000)
    yield Reader(
        name="image",
        make=of(*encoded),
        read=lambda data: preprocess.encoded(data, "fuzz"),
        allowed=user,
        share=2,
    )
    table = {"labels": [["a.png", 1], ["b", 0]]}
    yield Reader(
        name="label table (CSV)",
        make=of(b"file,label\na.png,1\nb.png,0\n"),
        read=lambda data: _csv_rows(data, "fuzz"),
        allowed=user,
    )
    yield Reader(
        name="label table (JSON)",
        make=of_json(table),
        read=lambda data: _json_rows(data, "fuzz"),
        allowed=user,
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in {**names, "../outside.png": encoded[0], "/root.png": encoded[0]}.items():
            archive.writestr(name, data)

    def read_zip(path: Path) -> object:
        source = open_zip(str(path), split="train", preprocess=preprocess)
        return source.batch(range(len(source)))

    read = through(folder / "images.zip", read_zip)
    yield Reader(name="zip of images", make=inside_zip(buffer.getvalue()), read=read, allowed=user)


def _caches(folder: Path) -> Iterator[Reader]:
    from lfm_jax.data import CacheWriter, open_cache, records
    from lfm_jax.data.latents import Feature, decode_record
    from lfm_jax.errors import UserError

    noise = np.random.default_rng(0)
    features = {
        "moments": Feature(shape=(4, 4, 2), dtype="float16"),
        "label": Feature(shape=(), dtype="int32"),
        "index": Feature(shape=(), dtype="int64"),
    }
    batch = {name: np.empty((1, *f.shape), f.dtype) for name, f in features.items()}
    record = {"moments": noise.bytes(64), "label": -1, "index": 2**40}
    yield Reader(
        name="record",
        make=of(records.encode_example(record)),
        read=lambda data: decode_record(data, features, batch, 0),
        allowed=(records.RecordError,),
        share=3,
        traced=(records.__file__,),
    )
    place = folder / "cache/train"
    writer = CacheWriter(
        place,
        num_examples=6,
        shard_size=3,
        latent_shape=(2, 2, 1),
        metadata={"encoder": "e" * 64, "scale": 1.0, "shift": 0.0, "image_size": 8},
    )
    for shard in writer.missing_shards():
        places = writer.shard_range(shard)
        rows = [{"moments": noise.normal(size=(2, 2, 2)), "label": i} for i in places]
        writer.write_shard(shard, rows)
    writer.finish()
    shard = sorted(place.glob("*array_record*"))[0]
    description = place / "metadata.json"
    whole = {path: path.read_bytes() for path in (shard, description)}

    def read_all(path: Path) -> object:
        try:
            cache = open_cache(place, encoder="e" * 64, verify=False)
            return cache.fingerprint, cache.latent_shape, cache.read(range(len(cache)))
        finally:
            path.write_bytes(whole[path])

    def same_length(dice: random.Random) -> bytes:
        # Another length is found on opening; this must be found on reading.
        data = bytearray(whole[shard])
        written = [i for i, byte in enumerate(data) if byte]  # the rest fills up blocks
        for _ in range(dice.randint(1, 4)):
            data[dice.choice(written)] = dice.randrange(256)
        return bytes(data)

    user = (UserError,)
    read = through(shard, read_all)
    yield Reader(name="shard", make=same_length, read=read, allowed=user, share=0.5)
    make = of_json(json.loads(whole[description]))
    read = through(description, read_all)
    yield Reader(name="cache description", make=make, read=read, allowed=user, share=0.5)


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def _statistics(folder: Path) -> Iterator[Reader]:
    from lfm_jax.errors import UserError
    from lfm_jax.evaluate import read_reference, read_samples

    user = (UserError,)
    mu, sigma = np.zeros(3), np.eye(3)
    told = json.dumps({"pipeline": "p", "count": 5, "provenance": {}})
    files = [
        npz(mu=mu, sigma=sigma),
        npz(mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma, arr_0=np.zeros((2, 4, 4, 3), np.uint8)),
        npz(ref_mu=mu, ref_sigma=sigma),
        npz(mu=mu, sigma=sigma, feats=np.zeros((5, 3), np.float32), lfm_jax=np.array(told)),
        npz(feats=np.random.default_rng(0).normal(size=(5, 3))),
    ]
    read = through(folder / "reference.npz", read_reference)
    yield Reader(name="npz reference", make=inside_zip(*files), read=read, allowed=user, share=2)
    statistics = {"mu": mu, "sigma": sigma}
    pickles = [
        *(pickle.dumps({"fid": statistics}, protocol=p) for p in (2, 3, 4, 5)),
        npy(np.array(statistics, dtype=object)),
    ]
    read = through(folder / "reference.pkl", read_reference)
    yield Reader(name="pickled reference", make=of(*pickles), read=read, allowed=user, share=2)
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
    samples = [npz(arr_0=images), npz(arr_0=images, arr_1=np.arange(3))]
    read = through(folder / "samples.npz", read_samples)
    yield Reader(name="samples", make=inside_zip(*samples), read=read, allowed=user, share=2)


def _stores(folder: Path) -> Iterator[Reader]:
    import torch

    from lfm_jax.data.importers import open_store
    from lfm_jax.errors import UserError

    user = (UserError,)
    latent = np.abs(np.random.default_rng(0).normal(size=(8, 4, 4))).astype(np.float32)

    def first(kind: str, place: Path) -> Callable[[Path], object]:
        return lambda path: open_store(kind, place).read(0)

    root = folder / "edm2.zip"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("0/a.npy", npy(latent))
        archive.writestr("dataset.json", json.dumps({"labels": [["0/a.npy", 1]]}))
    make, read = inside_zip(buffer.getvalue()), through(root, first("edm2", root))
    yield Reader(name="EDM2 latents", make=make, read=read, allowed=user, share=0.5)
    root = folder / "mar"
    make = inside_zip(npz(moments=latent, moments_flip=latent))
    read = through(root / "0/a.npz", first("mar", root))
    yield Reader(name="MAR latents", make=make, read=read, allowed=user, share=0.5)
    root, buffer = folder / "meanflow", io.BytesIO()
    torch.save({"image": torch.from_numpy(latent), "label": 3}, buffer)
    read = through(root / "00000000.pt", first("meanflow", root))
    make = inside_zip(buffer.getvalue())
    yield Reader(name="MeanFlow latents", make=make, read=read, allowed=user, share=0.3)
    root = folder / "fast"
    (root / "x_labels").mkdir(parents=True)
    np.save(root / "x_labels/0.npy", np.array([3]))
    read = through(root / "x_features/0.npy", first("fast_dit", root))
    make = of(npy(latent[None, :4]))
    yield Reader(name="fast-DiT latents", make=make, read=read, allowed=user, share=0.5)
