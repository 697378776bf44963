"""Do hostile files ever raise anything but the errors that name them? Fuzzing at larger counts.

    python -m benchmarks.fuzz_readers --examples 2000

Each reader gets damaged copies of valid files: bytes replaced, inserted, removed, cut, plain noise;
inside archives the damage lies behind checksums that fit, inside JSON any value becomes any other.
Nothing may come out but the documented errors, no signal (a fork reads), and no memory beyond
`MEMORY`: a header's claim is not a reason to allocate. For the two parsers of this package that
decide byte by byte the damage is guided by coverage: what reaches new lines is damaged again.
Prints a count a reader; exits with 1 on a surprise.
"""

import argparse
import copy
import dataclasses
import gzip
import io
import json
import os
import pickle
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

MEMORY = 4 << 30  # bytes over what the process had
_KEPT = 3  # surprises a reader that are reported


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


# ---- damage


def damaged(valid: bytes, dice: random.Random) -> bytes:
    """A copy with a few edits; one in eight is plain noise."""
    if dice.random() < 0.125:
        return dice.randbytes(dice.randrange(200))
    data = bytearray(valid)
    for _ in range(dice.randint(1, 6)):
        # Headers matter most, so half of the edits are near the front.
        place = dice.randrange((min(len(data), 64) if dice.random() < 0.5 else len(data)) or 1)
        edit = dice.randrange(5)
        if edit == 0 and data:
            data[place] = dice.choice([0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)])
        elif edit == 1:
            data[place:place] = dice.randbytes(dice.randint(1, 9))
        elif edit == 2:
            del data[place : place + dice.randint(1, 9)]
        elif edit == 3:  # numbers in text headers: sizes, offsets, shapes
            data[place : place + 1] = dice.choice([b"9" * 12, b"-1", b"0", b"e9", b"nan", b"'"])
        elif len(data) > 1:
            del data[place + 1 :]
        if not data:
            return b""
    return bytes(data)


def of(*valid: bytes) -> Callable[[random.Random], bytes]:
    return lambda dice: damaged(dice.choice(valid), dice)


def inside_zip(*valid: bytes) -> Callable[[random.Random], bytes]:
    """The same, and archives whose members are damaged under checksums that fit."""

    def make(dice: random.Random) -> bytes:
        chosen = dice.choice(valid)
        if dice.random() < 0.3:
            return damaged(chosen, dice)
        with zipfile.ZipFile(io.BytesIO(chosen)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        victim = dice.choice(list(members))
        members[victim] = damaged(members[victim], dice)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return buffer.getvalue()

    return make


_VALUES = [None, True, -1, 0, 1.5, 2**70, float("nan"), "", "x", "../../x", [], {}, [[]], {"a": 1}]


def mutated(valid: Any, dice: random.Random) -> Any:
    """A JSON value of which some parts are others."""
    value = copy.deepcopy(valid)
    for _ in range(dice.randint(1, 3)):
        node, key, at = None, None, value
        while isinstance(at, dict | list) and at and (node is None or dice.random() < 0.8):
            keys = list(at) if isinstance(at, dict) else range(len(at))
            node, key = at, dice.choice(list(keys))
            at = at[key]
        if node is None:
            return dice.choice(_VALUES)
        if dice.random() < 0.3:
            del node[key]
        else:
            node[key] = copy.deepcopy(dice.choice(_VALUES))
    return value


def of_json(valid: Any) -> Callable[[random.Random], bytes]:
    text = json.dumps(valid).encode()

    def make(dice: random.Random) -> bytes:
        if dice.random() < 0.3:
            return damaged(text, dice)
        return json.dumps(mutated(valid, dice)).encode()

    return make


# ---- the readers


def readers(folder: Path) -> Iterator[Reader]:
    """Every reader of files that others may have written or damaged."""
    yield from _images(folder)
    yield from _caches(folder)
    yield from _statistics(folder)
    yield from _weights(folder)
    yield from _stores(folder)
    yield from _runs(folder)


def _through(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    path.parent.mkdir(parents=True, exist_ok=True)

    def reader(data: bytes) -> object:
        path.write_bytes(data)
        return read(path)

    return reader


def _images(folder: Path) -> Iterator[Reader]:
    from PIL import Image

    from lfm_jax.data import idx
    from lfm_jax.data.folder import _csv_rows, _json_rows, open_zip
    from lfm_jax.data.pixels import Preprocess
    from lfm_jax.errors import UserError

    noise = np.random.default_rng(0)
    images = noise.integers(0, 256, (3, 5, 7), np.uint8)
    valid = struct.pack(">I3I", 0x803, *images.shape) + images.tobytes()
    user = (UserError,)
    read = _through(folder / "fuzz-idx3-ubyte", lambda path: idx.read_idx(path, dimensions=3))
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

    read = _through(folder / "images.zip", read_zip)
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
    read = _through(shard, read_all)
    yield Reader(name="shard", make=same_length, read=read, allowed=user, share=0.5)
    make = of_json(json.loads(whole[description]))
    read = _through(description, read_all)
    yield Reader(name="cache description", make=make, read=read, allowed=user, share=0.5)


def _npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _npy(array: np.ndarray) -> bytes:
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
        _npz(mu=mu, sigma=sigma),
        _npz(mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma, arr_0=np.zeros((2, 4, 4, 3), np.uint8)),
        _npz(ref_mu=mu, ref_sigma=sigma),
        _npz(mu=mu, sigma=sigma, feats=np.zeros((5, 3), np.float32), lfm_jax=np.array(told)),
        _npz(feats=np.random.default_rng(0).normal(size=(5, 3))),
    ]
    read = _through(folder / "reference.npz", read_reference)
    yield Reader(name="npz reference", make=inside_zip(*files), read=read, allowed=user, share=2)
    statistics = {"mu": mu, "sigma": sigma}
    pickles = [
        *(pickle.dumps({"fid": statistics}, protocol=p) for p in (2, 3, 4, 5)),
        _npy(np.array(statistics, dtype=object)),
    ]
    read = _through(folder / "reference.pkl", read_reference)
    yield Reader(name="pickled reference", make=of(*pickles), read=read, allowed=user, share=2)
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
    samples = [_npz(arr_0=images), _npz(arr_0=images, arr_1=np.arange(3))]
    read = _through(folder / "samples.npz", read_samples)
    yield Reader(name="samples", make=inside_zip(*samples), read=read, allowed=user, share=2)


def _weights(folder: Path) -> Iterator[Reader]:
    import flax.serialization
    import torch
    from safetensors.numpy import save

    from lfm_jax.errors import UserError
    from lfm_jax.features.extractor import read_params, write_params
    from lfm_jax.features.weights import read_tensors as read_features
    from lfm_jax.vae.files import read_tensors as read_vae
    from lfm_jax.weights.files import read_tensors

    user = (UserError,)
    tensors = {"a.weight": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float16)}
    path = folder / "weights.safetensors"
    header = json.loads(save(tensors)[8 : 8 + int.from_bytes(save(tensors)[:8], "little")])
    body = save(tensors)[8 + int.from_bytes(save(tensors)[:8], "little") :]

    def safetensors(dice: random.Random) -> bytes:
        if dice.random() < 0.4:
            return damaged(save(tensors), dice)
        text = json.dumps(mutated(header, dice)).encode()
        return len(text).to_bytes(8, "little") + text + body

    def everyone(path: Path) -> object:
        for number, read in enumerate((read_tensors, read_features, read_vae)):
            try:
                read(path)
            except UserError:
                if number == 2:
                    raise
        return None

    read = _through(path, everyone)
    yield Reader(name="safetensors", make=safetensors, read=read, allowed=user, share=1)
    write_params(folder / "extractor.safetensors", {"a": np.ones(3, np.float32)}, {"name": "x"})
    valid = (folder / "extractor.safetensors").read_bytes()
    read = _through(folder / "extractor.safetensors", read_params)
    yield Reader(name="extractor", make=of(valid), read=read, allowed=user, share=1)
    state = {"model": {k: torch.from_numpy(v) for k, v in tensors.items()}, "step": 3}
    buffer, old = io.BytesIO(), io.BytesIO()
    torch.save(state, buffer)
    torch.save(state, old, _use_new_zipfile_serialization=False)
    read = _through(folder / "weights.pt", everyone)
    make = inside_zip(buffer.getvalue())
    yield Reader(name="torch file", make=make, read=read, allowed=user, share=0.5)
    make = of(old.getvalue())
    yield Reader(name="torch file, old", make=make, read=read, allowed=user, share=0.5)
    packed = flax.serialization.msgpack_serialize({"a": {"kernel": np.ones((2, 3))}})
    read = _through(folder / "weights.msgpack", read_vae)
    yield Reader(name="msgpack", make=of(packed), read=read, allowed=user, share=1)


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
        archive.writestr("0/a.npy", _npy(latent))
        archive.writestr("dataset.json", json.dumps({"labels": [["0/a.npy", 1]]}))
    make, read = inside_zip(buffer.getvalue()), _through(root, first("edm2", root))
    yield Reader(name="EDM2 latents", make=make, read=read, allowed=user, share=0.5)
    root = folder / "mar"
    make = inside_zip(_npz(moments=latent, moments_flip=latent))
    read = _through(root / "0/a.npz", first("mar", root))
    yield Reader(name="MAR latents", make=make, read=read, allowed=user, share=0.5)
    root, buffer = folder / "meanflow", io.BytesIO()
    torch.save({"image": torch.from_numpy(latent), "label": 3}, buffer)
    read = _through(root / "00000000.pt", first("meanflow", root))
    make = inside_zip(buffer.getvalue())
    yield Reader(name="MeanFlow latents", make=make, read=read, allowed=user, share=0.3)
    root = folder / "fast"
    (root / "x_labels").mkdir(parents=True)
    np.save(root / "x_labels/0.npy", np.array([3]))
    read = _through(root / "x_features/0.npy", first("fast_dit", root))
    make = of(_npy(latent[None, :4]))
    yield Reader(name="fast-DiT latents", make=make, read=read, allowed=user, share=0.5)


def _runs(folder: Path) -> Iterator[Reader]:
    from etils import epath

    from lfm_jax.config import default_config
    from lfm_jax.config_check import check_config
    from lfm_jax.errors import UserError
    from lfm_jax.workdir import Workdir, claim, is_done, write_result
    from lfm_jax.writers import ScalarWriter

    user = (UserError,)
    config, workdir = default_config(), Workdir(epath.Path(folder / "run"))
    claim(workdir, config)
    workdir.checkpoints.mkdir()
    write_result(workdir, "train", config, {}, {"checkpoint": "0" * 64})
    valid = json.loads(workdir.config.read_text())
    read = _through(Path(workdir.config), lambda path: claim(workdir, config))
    yield Reader(name="config.json", make=of_json(valid), read=read, allowed=user, share=0.3)
    path = Path(workdir.result_path("train"))
    valid = json.loads(path.read_text())
    read = _through(path, lambda path: is_done(workdir, "train", {}))
    yield Reader(name="result file", make=of_json(valid), read=read, allowed=user, share=0.5)
    log = folder / "run/logs/a.jsonl"
    lines = b"".join(b'{"step": %d, "loss": 0.5}\n' % step for step in range(4))
    read = _through(log, lambda path: ScalarWriter(f"{log.parent}", "a", start=9))
    # Not even that one: a log is no reason to stop.
    yield Reader(name="log", make=of(lines), read=read, allowed=(), share=0.05)

    fields = []
    for name, section in config.items():
        keys = [f"{name}.{key}" for key in section] if hasattr(section, "items") else [name]
        fields += keys
    words = [*("", "nan", "inf", "-1", "0", "1e999", "()", "(1,'a')", "None", "True", "[[", "x y")]
    words += [*("9" * 40, "-0.0", "('',)", "(1,)", "(0.5,2)", "none", "\x00", "é" * 300, "0x10")]

    def overrides(dice: random.Random) -> list[str]:
        count = dice.randint(1, 4)
        keys = [dice.choice(fields) for _ in range(count)]
        keys = [damaged(k.encode(), dice).decode("latin1") if dice.random() < 0.1 else k
                for k in keys]  # fmt: skip
        return [f"--config.{key}={dice.choice(words)}" for key in keys]

    yield Reader(
        name="config overrides",
        make=overrides,
        read=lambda argv: check_config(_parsed(argv)),
        allowed=(UserError, _Refused),
        share=0.5,
    )


class _Refused(Exception):
    """What `lfm_jax.main` turns into one line and exit status 2."""


def _parsed(argv: list[str]) -> Any:
    from absl import flags
    from ml_collections import config_flags

    from lfm_jax.config import default_config

    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", default_config(), flag_values=values)
    try:
        values(["fuzz", *argv])
    except Exception as error:  # the command line catches the same there
        raise _Refused(str(error)) from None
    return values.config


# ---- the loop


def fuzz(reader: Reader, examples: int, seed: int) -> dict[str, Any]:
    """Counts of inputs tried, refused by name and still readable, and surprises, in a fork.

    Returns:
        "tried", "refused", "accepted", "lines" (reached, where traced), "surprises" (texts).
    """
    answer, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(answer)
        try:
            found = _loop(reader, examples, seed, write)
        except BaseException as error:
            counts = {"tried": 0, "refused": 0, "accepted": 0}
            found = {**counts, "surprises": [f"the fuzzer itself: {error!r}"]}
        os.write(write, json.dumps(found).encode() + b"\n")
        os._exit(0)
    os.close(write)
    with open(answer, "rb") as stream:
        said = stream.read().splitlines()
    _, status = os.waitpid(pid, 0)
    if said and said[-1].startswith(b"{"):
        return json.loads(said[-1])
    reached = int(said[-1]) if said else 0
    text = f"input {reached} (seed {seed}) ended the process with status {status}"
    return {"tried": reached + 1, "refused": 0, "accepted": 0, "surprises": [text]}


def _loop(reader: Reader, examples: int, seed: int, progress: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")  # Pillow comments on damaged TIFF tags
    base = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (base + MEMORY, base + MEMORY))
    dice = random.Random(f"{seed} {reader.name}")
    corpus: list[bytes] = []
    lines: set[tuple[str, int]] = set()
    found = {"tried": 0, "refused": 0, "accepted": 0, "surprises": []}
    # A crash of the process leaves the number of its input; a pipe holds 64 KiB of them.
    every = max(1, examples // 4000)
    for number in range(examples):
        if number % every == 0:
            os.write(progress, b"%d\n" % number)
        data = damaged(dice.choice(corpus), dice) if corpus and dice.random() < 0.5 else None
        data = reader.make(dice) if data is None else data
        before = len(lines)
        if reader.traced:
            sys.settrace(_tracer(reader.traced, lines))
        try:
            reader.read(data)
            found["accepted"] += 1
        except reader.allowed:
            found["refused"] += 1
        except BaseException as error:
            found["surprises"].append(f"input {number}: {error!r}: {data[:80]!s}")
        finally:
            sys.settrace(None)
        found["tried"] += 1
        if len(lines) > before:
            corpus.append(data)
        if len(found["surprises"]) >= _KEPT:
            break
    return {**found, "lines": len(lines)}


def _tracer(files: tuple[str, ...], lines: set[tuple[str, int]]) -> Callable:
    def trace(frame: Any, event: str, argument: Any) -> Callable | None:
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            lines.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    return trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=2000, help="malformed inputs a reader")
    parser.add_argument("--only", default="", help="readers whose name contains this")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    surprised = False
    with tempfile.TemporaryDirectory() as folder:
        for reader in readers(Path(folder)):
            if flags.only not in reader.name:
                continue
            begin = time.perf_counter()
            found = fuzz(reader, max(1, int(flags.examples * reader.share)), flags.seed)
            seconds = time.perf_counter() - begin
            print(
                f"{reader.name:20} {found['tried']:,} inputs: {found['refused']:,} refused by "
                f"name, {found['accepted']:,} still readable, {seconds:.0f} s",
                *found["surprises"],
                sep="\n    ",
                flush=True,
            )
            surprised |= bool(found["surprises"])
    sys.exit(int(surprised))


if __name__ == "__main__":
    main()
