"""Files that were made to do harm: no code of theirs runs, no memory goes by their claims."""

import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
from checkout import ROOT
from PIL import Image

from lfm_jax.checksums import seal
from lfm_jax.data import CacheWriter, open_cache, open_images
from lfm_jax.data.folder import open_zip
from lfm_jax.data.importers import open_store
from lfm_jax.data.pixels import Preprocess
from lfm_jax.errors import UserError
from lfm_jax.evaluate import read_reference, read_samples
from lfm_jax.features import open_extractor
from lfm_jax.features.weights import read_tensors as read_features
from lfm_jax.vae import AutoencoderKL, load_vae, save_vae
from lfm_jax.vae.files import read_tensors as read_vae
from lfm_jax.vae.weights import parameter_shapes
from lfm_jax.weights import import_torch, write_tensors
from lfm_jax.weights.files import read_tensors


def png(width, height, colour=7):
    buffer = io.BytesIO()
    Image.new("L", (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


# ---- code in files


class Touch:
    """What unpickling it by the book would do: leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


NUMPY_CALLS = [
    ("numpy", "load"),
    ("numpy.core.multiarray", "fromfile"),
    ("numpy._core.records", "ndarray"),  # a name that is allowed, in a module that is not
    ("numpy.testing", "dtype"),
    ("builtins", "eval"),
    ("os", "system"),
]


@pytest.mark.parametrize("protocol", range(6))
def test_no_pickle_runs_code(tmp_path, protocol):
    made = tmp_path / "made"
    payload = {"fid": {"mu": np.zeros(3), "sigma": Touch(made)}, "a": np.ones(2)}
    harmful = pickle.dumps(payload, protocol=protocol)
    array = np.empty((), object)
    array[()] = Touch(made)
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    npz = io.BytesIO()
    np.savez(npz, mu=array, arr_0=array, moments=array)
    for name, data in {
        "a.pkl": harmful,
        "a.npy": buffer.getvalue(),
        "a.npz": npz.getvalue(),
    }.items():
        path = tmp_path / name
        path.write_bytes(data)
        readers = [read_reference, read_samples]
        for reader in readers:
            with pytest.raises(UserError):
                reader(path)
    for suffix in (".pt", ".ckpt", ".bin"):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(harmful)
        for reader in (read_tensors, read_features, read_vae):
            with pytest.raises(UserError):
                reader(path)
    (tmp_path / "mar/0").mkdir(parents=True)
    (tmp_path / "mar/0/a.npz").write_bytes(npz.getvalue())
    with pytest.raises(UserError, match="not readable"):
        open_store("mar", tmp_path / "mar")
    assert not made.exists()
    if protocol == 2:  # and by the book it would have
        with pytest.raises(Exception):  # noqa: B017
            pickle.loads(pickle.dumps([Touch(made), 1 / 2, Touch(made)]))
        assert made.exists()


@pytest.mark.parametrize("module, name", NUMPY_CALLS)
def test_the_unpickler_knows_arrays_and_nothing_else(tmp_path, module, name):
    path = tmp_path / "a.pkl"
    path.write_bytes(f"c{module}\n{name}\n(S'x'\ntR.".encode())
    with pytest.raises(UserError, match=name):
        read_reference(path)


def test_no_config_value_reaches_a_shell():
    found = subprocess.run(
        ["grep", "-rnE", r"os\.system|os\.popen|shell=True|\beval\(|\bexec\(|extractall|yaml\.load",
         str(ROOT / "lfm_jax")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not [line for line in found.stdout.splitlines() if "\\b" not in line], found.stdout


# ---- claims


@pytest.mark.parametrize(
    "data, named",
    [
        (b"\x80\x05}r\x94\x93\x94\x28.", "memo"),  # a place in the memo: 5 GB of pointers
        (b"\x80\x05}p680825748\n.", "memo"),
        (
            b"\x80\x05\x96\x00\x00\x00\x00\x00\x00\x60\x00.",
            "bytearray8",
        ),  # a bytearray of petabytes
    ],
)
def test_a_pickle_gets_no_more_memory_than_it_has_bytes(tmp_path, data, named):
    path = tmp_path / "a.pkl"
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=named):
        read_reference(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


@pytest.mark.parametrize("width, height", [(30_000, 30_000), (9000, 9000)])
def test_an_image_of_too_many_pixels_is_not_decoded(width, height):
    # The header of a real PNG with another size: a few bytes that claim gigabytes.
    data = bytearray(png(4, 4))
    data[16:24] = struct.pack(">II", width, height)
    with pytest.raises(UserError, match=r"pixels|image"):
        Preprocess(image_size=8).encoded(bytes(data), "bomb.png")


def test_a_line_of_pixels_is_not_blown_up():
    """Its short side brought to 256 it would have 256 x 16 million pixels."""
    with pytest.raises(UserError, match=r"line\.png: 60000x1 pixels grow"):
        Preprocess(image_size=256).encoded(png(60_000, 1), "line.png")
    assert Preprocess(image_size=16, channels=1).encoded(png(60, 1), "x").shape == (16, 16, 1)


def npz_claiming(shape, dtype="|u1", name="arr_0"):
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    header = header.ljust(117).encode() + b"\n"
    npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(f"{name}.npy", npy + bytes(100))
    return buffer.getvalue()


@pytest.mark.parametrize("shape", ["(1000000000, 64, 64, 3)", "(-1, 8, 8, 3)", "(2, 8, 8, 3)"])
def test_samples_that_claim_more_than_they_hold(tmp_path, shape):
    (tmp_path / "a.npz").write_bytes(npz_claiming(shape))
    with pytest.raises(UserError, match=r"a\.npz: not readable .*claims"):
        read_samples(tmp_path / "a.npz")


def test_references_that_claim_too_much(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, feats=np.zeros((1, 20_000), np.float32))  # a covariance of 3 GB
    with pytest.raises(UserError, match="feats has shape"):
        read_reference(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mu.npy", bytes(1000))
    data = path.read_bytes()
    size = struct.pack("<I", 1000)
    path.write_bytes(data.replace(size, struct.pack("<I", 2**32 - 2)))
    with pytest.raises(UserError, match=r"evaluate\.reference"):
        read_reference(path)


def test_a_member_that_is_no_array(tmp_path):
    (tmp_path / "mar/0").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "mar/0/a.npz", "w") as archive:
        archive.writestr("moments.npy", b"no array")
    with pytest.raises(UserError, match="holds bytes"):
        open_store("mar", tmp_path / "mar")


# ---- names


def test_names_in_archives_are_never_paths(tmp_path):
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("../../up.png", "/top/root.png", "c:\\x/y.png", "a/../../b.png"):
            archive.writestr(name, png(4, 4))
    source = open_zip(str(path), split="train", preprocess=Preprocess(image_size=4))
    assert len(source) == 2  # what climbs out is not looked at
    source.batch(range(len(source)))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["images.zip"]
    assert not (tmp_path.parent / "up.png").exists()


@pytest.mark.parametrize("change", ["outside", "object", "huge", "negative"])
def test_a_cache_description_from_elsewhere(tmp_path, change):
    writer = CacheWriter(
        tmp_path / "train",
        num_examples=2,
        shard_size=2,
        latent_shape=(2, 2, 1),
        metadata={"encoder": "e", "scale": 1.0, "shift": 0.0, "image_size": 8},
    )
    writer.write_shard(0, [{"moments": np.zeros((2, 2, 2))} for _ in range(2)])
    writer.finish()
    path = tmp_path / "train/metadata.json"
    description = json.loads(path.read_text())
    shard, moments = description["shards"][0], description["features"]["moments"]
    if change == "outside":
        (tmp_path / "outside").write_bytes((tmp_path / "train" / shard["file"]).read_bytes())
        shard["file"] = "../outside"
    elif change == "object":
        moments["dtype"] = "object"
    elif change == "huge":
        moments["shape"] = [100_000, 100_000, 2]
    else:
        shard["count"], description["count"] = -2, -2
    path.write_text(json.dumps(seal(description)))  # whoever writes it can seal it too
    with pytest.raises(UserError, match=r"metadata\.json: damaged"):
        open_cache(tmp_path / "train")


def test_a_flipped_description_is_found_by_its_checksum(tmp_path):
    writer = CacheWriter(
        tmp_path / "train",
        num_examples=1,
        shard_size=1,
        latent_shape=(2, 2, 1),
        metadata={"encoder": "e", "scale": 1.25, "shift": 0.0, "image_size": 8},
    )
    writer.write_shard(0, [{"moments": np.zeros((2, 2, 2))}])
    writer.finish()
    path = tmp_path / "train/metadata.json"
    path.write_text(path.read_text().replace("1.25", "1.24"))
    with pytest.raises(UserError, match="checksum differs"):
        open_cache(tmp_path / "train")


def test_links_in_a_circle_are_walked_once(tmp_path):
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/b").mkdir()
    for name in ("a/1.png", "b/2.png"):
        (tmp_path / "images" / name).write_bytes(png(4, 4))
    (tmp_path / "images/a/again").symlink_to(tmp_path / "images")
    source = open_images("folder", path=str(tmp_path / "images"), image_size=4, channels=1)
    assert len(source) == 2 and source.class_names == ("a", "b")


@pytest.mark.parametrize("label", ["--5", "5-", "²", "9" * 5000])
def test_labels_that_only_look_like_numbers(tmp_path, label):
    (tmp_path / "1.png").write_bytes(png(4, 4))
    (tmp_path / "labels.csv").write_text(f"1.png,{label}\n")
    source = open_images("folder", path=str(tmp_path), image_size=4, channels=1)
    assert source.class_names == (label,)


# ---- weights


DIT = {"x_embedder.proj.weight": (32, 4, 2, 2), "final_layer.linear.bias": (16,),
       "final_layer.linear.weight": (16, 32)}  # fmt: skip


@pytest.mark.parametrize(
    "name, shape",
    [
        ("x_embedder.proj.weight", (512,)),
        ("x_embedder.proj.weight", (32, 4, 0, 0)),
        ("final_layer.linear.bias", ()),
        ("pos_embed", (16,)),
    ],
)
def test_tensors_of_shapes_that_no_network_has(tmp_path, name, shape):
    tensors = {key: np.ones(value, np.float32) for key, value in {**DIT, name: shape}.items()}
    write_tensors(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors: "):
        import_torch("dit", tmp_path / "a.safetensors")


def test_a_side_is_a_claim_that_takes_no_memory(tmp_path):
    names = ("map_layer0.weight", "enc.999999x999999_conv.weight", "out_conv.weight",
             "enc.999999x999999_block0.conv0.weight")  # fmt: skip
    write_tensors(
        {name: np.ones((8, 8, 3, 3), np.float32) for name in names}, tmp_path / "a.safetensors"
    )
    with pytest.raises(UserError, match=r"a\.safetensors: "):
        import_torch("lfm-adm", tmp_path / "a.safetensors")


@pytest.mark.parametrize("value", ["x", None, [], {"a": 1}, -1])
@pytest.mark.parametrize("key", ["block_out_channels", "layers_per_block", "scaling_factor"])
def test_an_autoencoder_of_an_impossible_config(tmp_path, key, value):
    model = AutoencoderKL(block_out_channels=(8, 8), norm_groups=4, latent_channels=2)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), parameter_shapes(model))
    save_vae(tmp_path, model, params)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    if (key, value) == ("scaling_factor", -1):
        return  # a number like any other
    with pytest.raises(UserError, match=str(tmp_path)):
        load_vae(tmp_path)


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_judges_of_a_few_tensors(tmp_path, name):
    kept = ("patch_embed.proj.weight", "pos_embed", "norm.weight", "blocks.0.ls1.gamma",
            "embeddings.patch_embedding.weight", "visual_projection.weight")  # fmt: skip
    write_tensors({key: np.ones((2, 2), np.float32) for key in kept}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors"):
        open_extractor(name, weights=tmp_path / "a.safetensors")


SLOW = pytest.param("^converter", marks=pytest.mark.slow)  # a network is traced for every input


@pytest.mark.parametrize("readers", ["^(?!converter)", SLOW])
def test_every_reader_on_a_few_malformed_files(readers):
    """The hours of fuzzing, briefly."""
    command = [sys.executable, "-m", "benchmarks.fuzz", "--examples", "12"]
    command += ["--only", readers]
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
