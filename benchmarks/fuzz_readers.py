"""Do damaged files ever raise anything but the errors that name them? Fuzzing at larger counts.

    python -m benchmarks.fuzz_readers --examples 20000

Each reader gets arbitrary bytes and damaged copies (bytes replaced, inserted, removed, cut) of
valid files: the IDX reader, the record parser, the image decoder, the file tables. Prints a count a
reader; exits with 1 on the first surprise.
"""

import argparse
import gzip
import io
import random
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from lfm_jax.data.folder import _csv_rows, _json_rows
from lfm_jax.data.idx import read_idx
from lfm_jax.data.latents import Feature, decode_record
from lfm_jax.data.pixels import Preprocess
from lfm_jax.data.records import RecordError, encode_example
from lfm_jax.errors import UserError


def damaged(valid: bytes, source: random.Random) -> bytes:
    """A copy with a few edits; one in eight is plain noise."""
    if source.random() < 0.125:
        return source.randbytes(source.randrange(200))
    data = bytearray(valid)
    for _ in range(source.randint(1, 6)):
        # Headers matter most, so half of the edits are near the front.
        place = source.randrange(min(len(data), 64) if source.random() < 0.5 else len(data) or 1)
        edit = source.randrange(4)
        if edit == 0 and data:
            data[place] = source.choice([0, 1, 0x7F, 0x80, 0xFF, source.randrange(256)])
        elif edit == 1:
            data[place:place] = source.randbytes(source.randint(1, 9))
        elif edit == 2:
            del data[place : place + source.randint(1, 9)]
        elif len(data) > 1:
            del data[place + 1 :]
        if not data:
            return b""
    return bytes(data)


def readers(folder: Path) -> Iterator[tuple[str, list[bytes], Callable[[bytes], object]]]:
    """(name, valid inputs, reader that may only raise UserError or RecordError)."""
    noise = np.random.default_rng(0)
    images = noise.integers(0, 256, (3, 5, 7), np.uint8)
    idx = struct.pack(">I3I", 0x803, *images.shape) + images.tobytes()
    path = folder / "fuzz-idx3-ubyte"

    def idx_reader(data: bytes) -> object:
        path.write_bytes(data)
        return read_idx(path, dimensions=3)

    yield "idx", [idx, gzip.compress(idx)], idx_reader

    features = {
        "moments": Feature(shape=(4, 4, 2), dtype="float16"),
        "label": Feature(shape=(), dtype="int32"),
        "index": Feature(shape=(), dtype="int64"),
    }
    batch = {name: np.empty((1, *f.shape), f.dtype) for name, f in features.items()}
    record = encode_example({"moments": noise.bytes(64), "label": -1, "index": 2**40})

    def record_reader(data: bytes) -> object:
        return decode_record(data, features, batch, 0)

    yield "record", [record], record_reader

    encoded = []
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        buffer = io.BytesIO()
        picture = noise.integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(picture).save(buffer, kind)
        encoded.append(buffer.getvalue())
    preprocess = Preprocess(image_size=16, max_pixels=1_000_000)
    yield "image", encoded, lambda data: preprocess.encoded(data, "fuzz")
    yield "csv", [b"file,label\na.png,1\nb.png,0\n"], lambda data: _csv_rows(data, "fuzz")
    yield "json", [b'{"labels": [["a.png", 1], ["b", 0]]}'], lambda data: _json_rows(data, "fuzz")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=20000, help="damaged inputs a reader")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    warnings.simplefilter("ignore")  # Pillow comments on damaged TIFF tags
    with tempfile.TemporaryDirectory() as folder:
        for name, valid, read in readers(Path(folder)):
            source = random.Random(flags.seed)
            accepted, begin = 0, time.perf_counter()
            for number in range(flags.examples):
                data = damaged(source.choice(valid), source)
                try:
                    read(data)
                    accepted += 1
                except (UserError, RecordError):
                    pass
                except Exception as error:
                    print(f"{name}: input {number} raised {error!r}: {data[:80]!r}")
                    sys.exit(1)
            seconds = time.perf_counter() - begin
            print(
                f"{name:8} {flags.examples:,} damaged inputs: {flags.examples - accepted:,} "
                f"refused by name, {accepted:,} still readable, {seconds:.0f} s"
            )


if __name__ == "__main__":
    main()
