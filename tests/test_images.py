"""Sources: real digits and Fashion-MNIST, every layout written by other tools, every bad input."""

import csv
import gzip
import hashlib
import io
import json
import os
import struct
import urllib.error
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lfm_jax.data import download_fashion_mnist, open_images
from lfm_jax.data.idx import read_idx
from lfm_jax.data.pixels import Preprocess, center_crop
from lfm_jax.data.source import hashed
from lfm_jax.errors import UserError

FASHION = "/usr/share/datasets/fashion-mnist"
needs_fashion = pytest.mark.skipif(
    not os.path.isdir(FASHION), reason=f"{FASHION} is missing (Debian: dataset-fashion-mnist)"
)


def picture(seed: int, height: int = 20, width: int = 30, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array.squeeze()).save(buffer, "PNG")
    return buffer.getvalue()


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    """A folder of MNIST-format files, one of them compressed."""
    random = np.random.default_rng(0)
    folder = tmp_path / "mnist"
    folder.mkdir()
    for prefix, count in (("train", 30), ("t10k", 10)):
        images = random.integers(0, 256, (count, 28, 28), np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return folder


# ---- digits


def test_digits_are_those_of_scikit_learn_split_by_class():
    from sklearn.datasets import load_digits

    train = open_images("digits", split="train", channels=1)
    test = open_images("digits", split="test", channels=1)
    assert (len(train), len(test), train.num_classes) == (1442, 355, 10)
    share = np.bincount(test.labels) / np.bincount(load_digits().target)
    assert np.all(np.abs(share - 0.2) < 0.005)
    ours = np.concatenate([s.batch(range(len(s)))["image"] for s in (train, test)])
    theirs = load_digits().images[..., None]
    assert sorted(x.tobytes() for x in ours) == sorted(
        np.round(x * 255 / 16).astype(np.uint8).tobytes() for x in theirs
    )
    assert train[0]["image"].shape == (8, 8, 1) and train[0]["label"] == train.labels[0]
    assert train.fingerprint != test.fingerprint
    assert train.fingerprint == open_images("digits", channels=1).fingerprint


def test_gray_becomes_three_equal_channels_and_small_images_are_padded():
    gray = open_images("digits", channels=1)[5]["image"]
    colour = open_images("digits", channels=3, image_size=12)[5]["image"]
    np.testing.assert_array_equal(colour[2:10, 2:10], np.repeat(gray, 3, axis=-1))
    assert colour.sum() == 3 * gray.astype(int).sum()


# ---- IDX


@needs_fashion
def test_fashion_mnist_padded_to_32():
    source = open_images(
        "idx", path=FASHION, split="test", image_size=32, channels=1, num_classes=10
    )
    with gzip.open(f"{FASHION}/t10k-images-idx3-ubyte.gz") as file:
        raw = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    images = source.batch(np.arange(len(source)))["image"]
    np.testing.assert_array_equal(images[:, 2:30, 2:30, 0], raw)
    assert images.shape == (10000, 32, 32, 1)
    assert np.bincount(source.labels).tolist() == [1000] * 10


def test_idx_folder(mnist):
    train = open_images("idx", path=str(mnist), channels=1)
    test = open_images("idx", path=str(mnist), split="test", channels=1)
    assert (len(train), len(test)) == (30, 10)
    assert train[13]["label"] == 3
    limited = open_images("idx", path=str(mnist), channels=1, limit=7)
    assert len(limited) == 7 and limited.fingerprint != train.fingerprint
    np.testing.assert_array_equal(limited[6]["image"], train[6]["image"])
    with pytest.raises(IndexError):
        limited.batch([7])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:-1], "truncated or damaged"),
        (lambda b: b + b"\0", "truncated or damaged"),
        (lambda b: b[:10], "truncated inside the header"),
        (lambda b: b[:3], "truncated: 3 bytes"),
        (lambda b: b[:2] + b"\x0d" + b[3:], "magic number 0x00000d03; expected 0x00000803"),
        (lambda b: b[:3] + b"\x01" + b[4:], "magic number 0x00000801; expected 0x00000803"),
        (lambda b: b[:4] + b"\xff" * 12 + b[16:], "the header claims"),
    ],
)
def test_damaged_idx_names_the_file(mnist, damage, message, packed):
    name = "train-images-idx3-ubyte.gz"
    data = damage(gzip.decompress((mnist / name).read_bytes()))
    (mnist / name).write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(UserError, match=f"{name}: {message}"):
        open_images("idx", path=str(mnist))


def test_damaged_gzip_missing_files_and_counts_that_differ(mnist):
    name = "train-images-idx3-ubyte.gz"
    whole = (mnist / name).read_bytes()
    damaged = bytearray(whole)
    damaged[-6] ^= 1  # the checksum
    for data in (whole[:-9], whole[: len(whole) // 2], bytes(damaged)):
        (mnist / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name}: truncated or damaged"):
            open_images("idx", path=str(mnist))
    (mnist / name).write_bytes(whole)
    (mnist / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(29, np.uint8)))
    with pytest.raises(UserError, match="29 labels for 30 images"):
        open_images("idx", path=str(mnist))
    (mnist / name).unlink()
    with pytest.raises(UserError, match="train-images-idx3-ubyte: no such file; expected"):
        open_images("idx", path=str(mnist))
    with pytest.raises(UserError, match="no such folder"):
        open_images("idx", path=str(mnist / "nowhere"))


def test_label_out_of_range_names_the_image(mnist):
    with pytest.raises(UserError, match="label 9 of image 9 is out of range; expected 0 to 8"):
        open_images("idx", path=str(mnist), num_classes=9)
    assert open_images("idx", path=str(mnist), num_classes=12).num_classes == 12


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=80), st.booleans(), st.sampled_from([1, 3]))
def test_any_bytes_are_an_array_or_a_user_error(tmp_path_factory, data, packed, rank):
    path = tmp_path_factory.getbasetemp() / "fuzz"
    head = struct.pack(">I", 0x800 + rank)
    path.write_bytes(gzip.compress(head + data) if packed else head + data)
    try:
        assert read_idx(path, dimensions=rank).ndim == rank
    except UserError as error:
        assert str(path) in str(error)


# ---- files


def write_tree(folder, paths):
    for seed, name in enumerate(paths):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(picture(seed, height=20 + seed)))


def zipped(folder, file):
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder))
    return str(file)


TREE = ["train/cat/a.png", "train/cat/b.png", "train/dog/c.png", "val/cat/d.png", "val/dog/e.png"]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_class_subfolders_and_splits(tmp_path, kind):
    write_tree(tmp_path / "set", TREE)
    (tmp_path / "set/train/cat/notes.txt").write_text("no image")
    path = str(tmp_path / "set")
    if kind == "zip":
        path = zipped(tmp_path / "set", tmp_path / "set.zip")
    train = open_images(kind, path=path, image_size=16)
    test = open_images(kind, path=path, split="test", image_size=16)
    assert train.class_names == ("cat", "dog")
    assert train.labels.tolist() == [0, 0, 1] and test.labels.tolist() == [0, 1]
    np.testing.assert_array_equal(train[2]["image"], center_crop(picture(2, height=22), 16))
    assert train.batch([0, 2])["image"].shape == (2, 16, 16, 3)
    assert train.fingerprint != open_images(kind, path=path, image_size=8).fingerprint
    with pytest.raises(UserError, match="different sizes"):
        open_images(kind, path=path).batch([0, 1])


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_flat_folder_and_tables(tmp_path, kind):
    folder = tmp_path / "set"
    write_tree(folder, ["b.png", "a.png", "c.png"])

    def opened(**options):
        path = zipped(folder, tmp_path / "set.zip") if kind == "zip" else str(folder)
        return open_images(kind, path=path, image_size=16, **options)

    flat = opened()
    assert flat.labels.tolist() == [-1, -1, -1] and flat.num_classes == 0
    assert flat[0]["label"] == -1
    with pytest.raises(UserError, match="has no labels; expected 0"):
        opened(num_classes=2)

    (folder / "dataset.json").write_text(
        json.dumps({"labels": [["a.png", 2], ["b.png", 0], ["c.png", 1]]})
    )
    assert opened().labels.tolist() == [2, 0, 1]
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file", "label"), ("a.png", 1), ("b.png", 1), ("c.png", 0)])
    assert opened().labels.tolist() == [1, 1, 0]
    table = tmp_path / "table.csv"
    table.write_text("a.png,shoe\nb.png,bag\nc.png,shoe\n")
    named = opened(labels=str(table))
    assert named.class_names == ("bag", "shoe") and named.labels.tolist() == [1, 0, 1]

    for text, message in (
        ("a.png,0\nb.png,0\n", r"no label for c\.png"),
        ("a.png,0\nb.png,-2\nc.png,1\n", r"label -2 of b\.png is out of range"),
        ("a.png,0,3\n", "line 1 has 3 fields; expected file,label"),
    ):
        table.write_text(text)
        with pytest.raises(UserError, match=message):
            opened(labels=str(table))
    with pytest.raises(UserError, match="expected a CSV file"):
        opened(labels=str(tmp_path / "none.csv"))


def at(folder, kind):
    """The path of a folder, or of a zip of what it holds now."""
    return str(folder) if kind == "folder" else zipped(folder, folder.with_suffix(".zip"))


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("held_out", ["test", "val", "validation", "valid"])
def test_a_class_has_one_number_in_every_split(tmp_path, kind, held_out):
    """Whichever split lacks a class, and however deep the others' images lie."""
    train = ["train/a/1.png", "train/b/deep/2.png", "train/c/3.png"]
    test = [f"{held_out}/a/4.png", f"{held_out}/c/deep/5.png", f"{held_out}/d/6.png"]
    write_tree(tmp_path / "set", [*train, *test])
    (tmp_path / "set" / held_out / "notes").mkdir()
    (tmp_path / "set" / held_out / "notes/readme.txt").write_text("no class")
    path = at(tmp_path / "set", kind)
    for split, numbers in (("train", [0, 1, 2]), ("test", [0, 2, 3])):
        source = open_images(kind, path=path, split=split, image_size=16, num_classes=4)
        assert source.class_names == ("a", "b", "c", "d") and source.labels.tolist() == numbers


def test_links_make_no_classes_that_their_own_split_does_not_see(tmp_path):
    write_tree(tmp_path, ["train/b/1.png", "test/b/2.png"])
    (tmp_path / "test/a").mkdir()
    (tmp_path / "test/a/up").symlink_to(tmp_path / "test")
    (tmp_path / "test/c").symlink_to(tmp_path / "test/b")
    for split in ("train", "test"):
        assert open_images("folder", path=str(tmp_path), split=split).class_names == ("b",)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_splits_without_class_names_do_not_number_those_of_others(tmp_path, kind):
    folder = tmp_path / "set"
    write_tree(folder, ["train/b/1.png", "train/c/2.png", "test/a/3.png", "val/4.png"])
    (folder / "test/labels.csv").write_text("a/3.png,7\n")
    assert open_images(kind, path=at(folder, kind)).labels.tolist() == [0, 1]
    (folder / "test/labels.csv").unlink()
    (folder / "test/dataset.json").write_text(json.dumps({"labels": [["a/3.png", 7]]}))
    assert open_images(kind, path=at(folder, kind)).labels.tolist() == [0, 1]
    (folder / "test/dataset.json").write_text(json.dumps({"labels": None}))
    assert open_images(kind, path=at(folder, kind)).labels.tolist() == [1, 2]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_names_in_tables_have_one_number_in_every_split(tmp_path, kind):
    folder, table = tmp_path / "set", tmp_path / "table.csv"
    write_tree(folder, ["train/1.png", "train/2.png", "test/3.png"])

    def numbered(**options):
        path = at(folder, kind)
        sources = [open_images(kind, path=path, split=s, **options) for s in ("train", "test")]
        assert sources[0].class_names == sources[1].class_names
        return [source.labels.tolist() for source in sources], sources[0].class_names

    # "breed" is a header that is not known: it is no class.
    table.write_text("image,breed\n1.png,cat\n2.png,dog\n3.png,dog\n")
    assert numbered(labels=str(table)) == ([[0, 1], [1]], ("cat", "dog"))
    (folder / "train/labels.csv").write_text("1.png,ape\n2.png,dog\n")
    (folder / "test/labels.csv").write_text("3.png,cat\n")
    assert numbered() == ([[0, 2], [1]], ("ape", "cat", "dog"))
    table.write_text("image,breed\n1.png,3\n2.png,10\n3.png,0\n")  # numbers stay what they are
    source = open_images(kind, path=at(folder, kind), labels=str(table), num_classes=12)
    assert source.labels.tolist() == [3, 10] and source.num_classes == 12


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_fingerprint_follows_from_files_and_labels_alone(tmp_path, kind):
    """Latent caches on disk know their images by it: written out here, so that it stays."""
    write_tree(tmp_path / "set", TREE)
    path = at(tmp_path / "set", kind)
    (tmp_path / "table.csv").write_text("cat/a.png,2\ncat/b.png,0\ndog/c.png,1\n")
    for split, folder, table, labels in (
        ("train", "train", "", [0, 0, 1]),
        ("test", "val", "", [0, 1]),
        ("train", "train", str(tmp_path / "table.csv"), [2, 0, 1]),
    ):
        names = [n.removeprefix(f"{folder}/") for n in TREE if n.startswith(folder)]
        data = [(tmp_path / "set" / folder / name).read_bytes() for name in names]
        sums = [zlib.crc32(d) if kind == "zip" else None for d in data]
        listing = [[n, len(d), crc] for n, d, crc in zip(names, data, sums, strict=True)]
        contents = [hashed(d) for d in data] if kind == "folder" else []
        spec = {"image_size": 16, "channels": 3, "fit": "crop"}
        source = open_images(kind, path=path, split=split, image_size=16, labels=table)
        assert source.labels.tolist() == labels
        assert source.fingerprint == hashed(listing, contents, np.array(labels), spec)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_what_other_programs_leave_is_no_class_and_no_image(tmp_path, kind):
    folder = tmp_path / "set"
    write_tree(folder, ["train/cat/a.png", "train/dog/b.png", "test/cat/c.png"])
    left = [
        "train/.ipynb_checkpoints/a-checkpoint.png",
        "train/cat/._a.png",
        "__MACOSX/train/x.png",
    ]
    left += ["train/dog/.thumbnails/b.png", "test/__MACOSX/c.png", "test/.trash/deep/d.png"]
    left += ["test/bird/._a.png", "test/bird/.thumbnails/a.png"]
    write_tree(folder, left)
    train = open_images(kind, path=at(folder, kind), image_size=16)
    assert train.class_names == ("cat", "dog") and train.files == ("cat/a.png", "dog/b.png")
    test = open_images(kind, path=at(folder, kind), split="test", image_size=16)
    assert test.files == ("cat/c.png",)


def test_a_zip_of_names_that_begin_with_a_dot_and_a_slash(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in TREE:
            archive.writestr(f"./{name}", png(picture(0)))
    source = open_images("zip", path=str(tmp_path / "set.zip"), split="test")
    assert source.class_names == ("cat", "dog") and source.files == ("cat/d.png", "dog/e.png")
    assert source[1]["image"].shape == (20, 30, 3)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_classes_with_names_are_never_filled_up_with_numbers(tmp_path, kind):
    folder = tmp_path / "set"
    write_tree(folder, ["cat/a.png", "dog/b.png"])

    def opened(**options):
        return open_images(kind, path=at(folder, kind), image_size=16, **options)

    line = r"data\.num_classes=3: {}:.*set\S* has 2 classes \({}\); expected 2$"
    with pytest.raises(UserError, match=line.format(kind, "cat, dog")):
        opened(num_classes=3)
    table = tmp_path / "table.csv"
    table.write_text("cat/a.png,shoe\ndog/b.png,bag\n")
    with pytest.raises(UserError, match=line.format(kind, "bag, shoe")):
        opened(num_classes=3, labels=str(table))
    assert [opened(num_classes=n).num_classes for n in (0, 2)] == [2, 2]
    table.write_text("cat/a.png,0\ndog/b.png,1\n")  # numbers need not all occur
    assert opened(num_classes=3, labels=str(table)).class_names == ("0", "1", "2")


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_folder_around_the_classes_is_one_class_and_the_line_says_so(tmp_path, kind):
    write_tree(tmp_path / "set", ["pets/cat/a.png", "pets/dog/b.png"])
    path = at(tmp_path / "set", kind)
    with pytest.raises(
        UserError, match=r"has 1 class \(pets\); .*subfolders of pets/ \(cat, dog\)"
    ):
        open_images(kind, path=path, num_classes=2)
    assert open_images(kind, path=path).labels.tolist() == [0, 0]
    assert open_images(kind, path=path, num_classes=1).class_names == ("pets",)
    if kind == "folder":
        inside = open_images(kind, path=f"{path}/pets", num_classes=2)
        assert inside.class_names == ("cat", "dog")


def test_bad_folders_and_files_are_named(tmp_path):
    def opened(path, **options):
        return open_images("folder", path=str(path), image_size=16, **options)

    with pytest.raises(UserError, match=r"nowhere.*no such folder"):
        opened(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no images"):
        opened(tmp_path)
    write_tree(tmp_path / "mixed", ["a.png", "cat/b.png"])
    with pytest.raises(UserError, match=r"beside and inside class subfolders.*a\.png"):
        opened(tmp_path / "mixed")
    with pytest.raises(UserError, match="no 'test' split; expected a subfolder test or val"):
        opened(tmp_path / "mixed", split="test")
    folder = tmp_path / "bad"
    write_tree(folder, ["a.png", "b.png", "c.png"])
    (folder / "a.png").write_text("not an image")
    (folder / "b.png").write_bytes(png(picture(0))[:-300])
    source = opened(folder)
    for index, name in enumerate(["a.png", "b.png"]):
        with pytest.raises(UserError, match=f"{name}: not a readable image"):
            source.batch([index])
    assert source[2]["image"].shape == (16, 16, 3)
    (tmp_path / "bad.zip").write_bytes(b"PK\3\4 damaged")
    with pytest.raises(UserError, match=r"bad\.zip.*truncated or damaged"):
        open_images("zip", path=str(tmp_path / "bad.zip"))


def test_image_bombs_are_refused_before_they_unfold(tmp_path):
    bomb = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(bomb, "PNG")
    (tmp_path / "bomb.png").write_bytes(bomb.getvalue())
    assert len(bomb.getvalue()) < 200_000
    with pytest.raises(UserError, match=r"bomb\.png: .*at most 64000000"):
        open_images("folder", path=str(tmp_path), image_size=16)[0]
    (tmp_path / "bomb.png").write_bytes(png(picture(0, 20, 30)))
    with pytest.raises(UserError, match="30x20 pixels; at most 599"):
        open_images("folder", path=str(tmp_path), image_size=16, max_pixels=599)[0]


# ---- pixels


def test_crop_keeps_the_centre_and_the_mean():
    """A box halving of constant blocks is exact; the crop of a wide image is its middle."""
    blocks = picture(0, 16, 24)
    np.testing.assert_array_equal(
        center_crop(blocks.repeat(4, 0).repeat(4, 1), 16), blocks[:, 4:20]
    )
    np.testing.assert_array_equal(center_crop(blocks, 16), blocks[:, 4:20])
    fine = picture(1, 32, 32)
    averaged = fine.reshape(16, 2, 16, 2, 3).mean((1, 3))
    # Pillow rounds after each of the two axes.
    np.testing.assert_allclose(center_crop(fine, 16), averaged, atol=1)
    smooth = np.linspace(0, 255, 90).astype(np.uint8)[None, :, None].repeat(70, 0).repeat(3, 2)
    cropped = center_crop(smooth, 32)
    assert cropped.shape == (32, 32, 3)
    # 41 columns are left of 90; cutting 32 of them is half a column off the middle.
    assert abs(cropped.mean() - smooth[:, 10:80].mean()) < 0.5 * 255 / 41
    assert center_crop(blocks[:8, :8], 32).shape == (32, 32, 3)  # enlarged


def test_luma_of_arrays_is_that_of_files():
    colour = picture(3)
    preprocess = Preprocess(channels=1)
    np.testing.assert_array_equal(
        preprocess.array(colour, "array"), preprocess.encoded(png(colour), "file")
    )


def test_sixteen_bit_and_palette_and_alpha_files():
    deep = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    buffer = io.BytesIO()
    Image.fromarray(deep).save(buffer, "PNG")
    decoded = Preprocess(channels=1).encoded(buffer.getvalue(), "deep")
    np.testing.assert_array_equal(decoded[..., 0], deep >> 8)
    graymap = b"P5 16 16 65535\n" + deep.astype(">u2").tobytes()  # Pillow opens it as 32 bits
    decoded = Preprocess(channels=1).encoded(graymap, "deep")
    np.testing.assert_array_equal(decoded[..., 0], deep >> 8)
    colour = Image.fromarray(picture(1))
    for mode in ("P", "RGBA", "CMYK", "1"):
        buffer = io.BytesIO()
        colour.convert(mode).save(buffer, "TIFF")
        assert Preprocess().encoded(buffer.getvalue(), mode).shape == (20, 30, 3)


def tiff(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "TIFF")
    return buffer.getvalue()


def test_files_whose_black_and_white_are_not_known_are_refused(tmp_path):
    """Pillow would make a float image in [0, 1] black and clip large whole numbers."""
    deep = np.arange(0, 65536, 256, dtype=np.int32).reshape(16, 16)
    gray = Preprocess(channels=1)
    np.testing.assert_array_equal(gray.encoded(tiff(deep), "deep")[..., 0], deep >> 8)
    np.testing.assert_array_equal(gray.encoded(tiff(deep >> 8), "gray")[..., 0], deep >> 8)
    for array, words in (
        ((deep / 65535).astype(np.float32), r"mode F \(floats\)"),
        (2 * deep, r"mode I \(whole numbers\) with values from 0 to 130560"),
        (deep - 9, r"mode I \(whole numbers\) with values from -9 to 65271"),
    ):
        (tmp_path / "a.tif").write_bytes(tiff(array))
        with pytest.raises(UserError, match=rf"a\.tif: {words}.*expected .* 8 or 16 bits"):
            open_images("folder", path=str(tmp_path))[0]


def test_padding_too_small_and_unknown_choices():
    with pytest.raises(UserError, match="8x8 does not fit image_size=6"):
        open_images("digits", image_size=6)
    with pytest.raises(UserError, match="expected one of digits, idx, folder, zip, lmdb"):
        open_images("cifar")
    with pytest.raises(UserError, match=r"data\.path is unset"):
        open_images("folder")
    with pytest.raises(UserError, match="expected one of train, test"):
        open_images("digits", split="half")
    with pytest.raises(UserError, match="channels=2: expected 1 or 3"):
        open_images("digits", channels=2)
    with pytest.raises(UserError, match="expected one of crop, pad"):
        open_images("digits", fit="stretch")


def test_synthetic_images_show_their_class():
    source = open_images("synthetic", image_size=16, channels=3, num_classes=4, limit=64)
    assert (len(source), source.num_classes) == (64, 4)
    batch = source.batch(np.arange(64))
    power = np.abs(np.fft.fft2(batch["image"].mean(-1)))[:, :3, :3].reshape(64, -1)[:, 1:]
    peaks = [set(power[batch["label"] == k].argmax(1)) for k in range(3)]
    assert all(len(peak) == 1 for peak in peaks)
    again = open_images("synthetic", image_size=16, num_classes=4, limit=64)
    assert again.fingerprint == source.fingerprint


# ---- LMDB


def write_lmdb(folder, entries):
    lmdb = pytest.importorskip("lmdb")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(folder), map_size=1 << 24) as environment:
        with environment.begin(write=True) as transaction:
            for key, value in entries:
                transaction.put(key, value)


def test_lmdb_of_raw_square_bytes(tmp_path):
    images = [picture(i, 16, 16) for i in range(12)]
    entries = [(str(i).encode(), image.tobytes()) for i, image in enumerate(images)]
    write_lmdb(tmp_path / "train.lmdb", entries)
    write_lmdb(tmp_path / "validation.lmdb", entries[:3])
    source = open_images("lmdb", path=str(tmp_path), image_size=16)
    assert len(source) == 12 and len(open_images("lmdb", path=str(tmp_path), split="test")) == 3
    np.testing.assert_array_equal(source.batch([2, 10])["image"], np.stack([images[2], images[10]]))
    assert source.labels.tolist() == [-1] * 12
    assert len(open_images("lmdb", path=str(tmp_path), limit=5)) == 5
    half = open_images("lmdb", path=str(tmp_path / "train.lmdb"), image_size=8)
    np.testing.assert_array_equal(half[10]["image"], center_crop(images[10], 8))


def test_lmdb_of_encoded_files_never_opens_the_pickled_keys(tmp_path):
    entries = [(hashlib.md5(bytes([i])).hexdigest().encode(), png(picture(i))) for i in range(9)]
    folder = tmp_path / "church_outdoor_train_lmdb"
    write_lmdb(folder, entries)

    # torchvision's key cache lies beside the data; unpickling this one would leave a mark.
    mark = tmp_path / "mark"
    (folder / "_cache_church").write_bytes(
        b"cos\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR."
    )
    (tmp_path / "_cache_church").write_bytes((folder / "_cache_church").read_bytes())
    source = open_images("lmdb", path=str(tmp_path), image_size=16, limit=4)
    assert not mark.exists()
    by_key = sorted(entries)[:4]  # LMDB's order, which is torchvision's
    for i, (_, value) in enumerate(by_key):
        np.testing.assert_array_equal(
            source[i]["image"], Preprocess(image_size=16).encoded(value, "")
        )
    write_lmdb(tmp_path / "bedroom_train_lmdb", entries[:2])
    both = open_images("lmdb", path=str(tmp_path), image_size=16)
    assert both.class_names == ("bedroom", "church_outdoor")
    assert both.labels.tolist() == [0] * 2 + [1] * 9
    with pytest.raises(UserError, match=r"num_classes=3: lmdb:.* has 2 classes \(bedroom, church"):
        open_images("lmdb", path=str(tmp_path), image_size=16, num_classes=3)


def test_bad_lmdb_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no train\.lmdb \(NVAE\) and no <class>_train_lmdb"):
        open_images("lmdb", path=str(tmp_path))
    with pytest.raises(UserError, match="no such folder or file"):
        open_images("lmdb", path=str(tmp_path / "nowhere"))
    write_lmdb(tmp_path / "train.lmdb", [(b"0", b"neither")])
    with pytest.raises(UserError, match=r"train\.lmdb key b'0': not a readable image"):
        open_images("lmdb", path=str(tmp_path))[0]
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/data.mdb").write_bytes(b"\1" * 5000)
    with pytest.raises(UserError, match="broken: not a readable LMDB database"):
        open_images("lmdb", path=str(tmp_path / "broken"))


# ---- TFDS


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    tfds = pytest.importorskip("tensorflow_datasets")

    class TinyPets(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.2.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples(6), "validation": self._generate_examples(3)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"image": io.BytesIO(png(picture(i, 20 + i))), "label": i % 2}

    folder = tmp_path_factory.mktemp("tfds")
    TinyPets(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_prepared_tfds_opens_without_tensorflow(prepared):
    import sys

    source = open_images("tfds:tiny_pets", path=str(prepared), image_size=16, num_classes=2)
    assert len(source) == 6 and source.class_names == ("cat", "dog")
    batch = source.batch(range(6))
    # TFDS shuffles by key; every image is there with its own label.
    wanted = {center_crop(picture(i, 20 + i), 16).tobytes(): i % 2 for i in range(6)}
    found = {x.tobytes(): y for x, y in zip(batch["image"], batch["label"].tolist(), strict=True)}
    assert found == wanted
    assert len(open_images("tfds:tiny_pets", path=str(prepared), split="test")) == 3
    version = prepared / "tiny_pets/1.2.0"
    assert open_images("tfds:tiny_pets", path=str(version), image_size=16).fingerprint == (
        source.fingerprint
    )
    assert "tensorflow" not in sys.modules


def test_unprepared_tfds_says_how(prepared):
    with pytest.raises(UserError, match=r"nothing prepared in .*mnist.*download_and_prepare"):
        open_images("tfds:mnist", path=str(prepared))
    with pytest.raises(UserError, match="split 'half': expected one of train, validation"):
        open_images("tfds:tiny_pets", path=str(prepared), split="half")
    with pytest.raises(UserError, match="expected one of"):
        open_images("tfds:")


# ---- download


class FakeServer:
    """Answers with given bytes by file name and keeps the addresses it was asked for."""

    def __init__(self, files, failing=()):
        self.files, self.failing, self.asked = files, failing, []

    def __call__(self, address, timeout):
        self.asked.append(address)
        if any(part in address for part in self.failing):
            raise urllib.error.URLError("unreachable")
        return io.BytesIO(self.files[address.rsplit("/", 1)[1]])


@needs_fashion
def test_published_files_pass_the_checksum_and_open(tmp_path):
    """Debian's streams under the publisher's gzip headers are the published files."""
    files = {}
    for split, time in (("train", 1504176606), ("t10k", 1504176627)):
        for kind in ("images-idx3", "labels-idx1"):
            name = f"{split}-{kind}-ubyte"
            with open(f"{FASHION}/{name}.gz", "rb") as file:
                body = file.read()[10:]
            head = b"\x1f\x8b\x08\x08" + struct.pack("<I", time) + b"\0\3" + name.encode() + b"\0"
            files[f"{name}.gz"] = head + body
    assert hashlib.md5(files["t10k-labels-idx1-ubyte.gz"]).hexdigest() == (
        "bb300cfdad3c16e7a12a480ee83cd310"
    )
    server = FakeServer(files, failing=["amazonaws"])  # the second address then serves
    folder = download_fashion_mnist(tmp_path / "fashion", opener=server)
    assert len(server.asked) == 8
    assert sorted(path.name for path in folder.iterdir()) == sorted(files)
    ours = open_images("idx", path=str(folder), split="test", channels=1)
    debian = open_images("idx", path=FASHION, split="test", channels=1)
    assert ours.fingerprint == debian.fingerprint
    download_fashion_mnist(folder, opener=server)
    assert len(server.asked) == 8  # what is there stays


@pytest.mark.parametrize("reply", [b"<html>moved</html>", b"\0" * 30_000_000])
def test_another_file_is_refused_and_nothing_is_left(tmp_path, reply):
    server = FakeServer({"train-images-idx3-ubyte.gz": reply})
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz: download failed .*sha256"):
        download_fashion_mnist(tmp_path, opener=server)
    assert not list(tmp_path.iterdir())
