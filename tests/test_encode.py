"""The encode job: files in workers, imported latents, a changed encoder, several processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from checkout import ROOT
from oracles import photographs
from PIL import Image

from lfm_jax import jobs
from lfm_jax.config import default_config
from lfm_jax.data import open_cache, open_images
from lfm_jax.data.workers import batches_ahead, choose_workers
from lfm_jax.errors import UserError


def pixels(folder=None, side=16):
    """A config whose latents are the pixels themselves."""
    config = default_config()
    config.data.source = "synthetic" if folder is None else "folder"
    config.data.path = None if folder is None else str(folder)
    config.data.image_size, config.data.channels = side, 3
    config.data.num_classes, config.data.limit = 0 if folder is None else 2, 20
    config.autoencoder.kind = "identity"
    config.encode.batch_size, config.encode.shard_size = 4, 8
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten photographs of three sizes in two classes."""
    root = tmp_path_factory.mktemp("photographs")
    cuts = photographs((200, 300), (220, 180), (170, 170))
    for i in range(10):
        path = root / ("cat" if i % 2 else "coffee") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.roll(cuts[i % 3][0], 7 * i, axis=1)).save(path)
    return root


def test_metadata_tells_crop_and_classes(folder, tmp_path):
    config = pixels(folder)
    result = jobs.run_job("encode", config, str(tmp_path))
    assert result["train"]["examples"] == 10 and result["train"]["shards_written"] == 2
    metadata = open_cache(tmp_path / "latents/train").metadata
    assert metadata["crop"] == "ADM's centre crop to 16"
    assert metadata["class_names"] == ["cat", "coffee"] and metadata["image_size"] == 16
    again = jobs.run_job("encode", config, str(tmp_path))
    assert again["train"] == {**result["train"], "shards_written": 0}


def test_worker_processes_read_the_same_in_the_same_order(folder, tmp_path):
    options = {"source": "folder", "path": str(folder), "image_size": 32}
    source = open_images(**options)
    batches = [np.arange(i, min(i + 3, 10)) for i in range(0, 10, 3)]
    one = list(batches_ahead(source, batches))
    two = list(batches_ahead(source, batches, workers=2, options=options))
    for a, b, indices in zip(one, two, batches, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], source.batch(indices)["label"])
        np.testing.assert_array_equal(a["label"], b["label"])


def test_a_damaged_photograph_is_named_whoever_reads_it(folder, tmp_path):
    broken = tmp_path / "set/cat"
    broken.mkdir(parents=True)
    for i in range(3):
        Image.fromarray(photographs((64, 64))[0][0]).save(broken / f"{i}.png")
    (broken / "1.png").write_bytes((broken / "1.png").read_bytes()[:900])
    for workers in (0, 1):
        config = pixels(tmp_path / "set")
        config.data.num_classes = 0
        config.encode.workers = workers
        with pytest.raises(UserError, match=r"cat/1\.png: not a readable image"):
            jobs.run_job("encode", config, str(tmp_path / f"run{workers}"))
        assert not (tmp_path / f"run{workers}/latents/train/metadata.json").exists()


def test_workers_are_for_many_files():
    assert choose_workers(-1, "digits", 10**6) == 0
    assert choose_workers(-1, "folder", 100) == 0
    assert choose_workers(3, "folder", 100) == 3
    cores = len(os.sched_getaffinity(0))
    assert choose_workers(-1, "folder", 10**6) == (min(cores, 16) if cores > 1 else 0)


def write_edm2(folder, channels, side):
    random = np.random.default_rng(0)
    folder.mkdir()
    rows = []
    for i in range(12):
        mean = random.normal(0, 1, (channels, side, side)).astype(np.float32)
        np.save(folder / f"{i:02d}.npy", np.concatenate([mean, np.full_like(mean, 0.1)]))
        rows.append([f"{i:02d}.npy", i % 2])
    (folder / "dataset.json").write_text(json.dumps({"labels": rows}))


def imported(store, side=8):
    config = pixels(side=side)
    config.data.num_classes = 2
    config.encode.import_kind, config.encode.import_path = "edm2", str(store)
    config.model.hidden, config.model.depth, config.model.heads = 16, 1, 2
    config.train.batch_size, config.train.steps = 4, 1
    return config


def test_another_projects_latents_are_trained_on(tmp_path):
    write_edm2(tmp_path / "store", channels=3, side=8)
    config = imported(tmp_path / "store")
    result = jobs.run_job("encode", config, str(tmp_path / "run"))
    assert result["train"]["examples"] == 12
    metadata = open_cache(tmp_path / "run/latents/train").metadata
    assert metadata["origin"]["project"] == "EDM2, REPA" and metadata["num_classes"] == 2
    assert np.isfinite(jobs.run_job("train", config, str(tmp_path / "run"))["loss"])


def test_latents_that_do_not_fit_are_refused(tmp_path):
    write_edm2(tmp_path / "store", channels=3, side=8)

    def refused(match, **changes):
        config = imported(tmp_path / "store", changes.pop("side", 8))
        for key, value in changes.items():
            config.encode[key] = value
        with pytest.raises(UserError, match=match):
            jobs.run_job("encode", config, str(tmp_path / "run"))
        assert not (tmp_path / "run/latents").exists()

    refused(r"latents of shape \(8, 8, 3\); expected \(16, 16, 3\)", side=16)
    refused("holds no mirror images", mirror=True)
    refused("expected \\('train',\\)", splits=("train", "test"))
    refused("no such file or folder", import_path=str(tmp_path / "nowhere"))
    refused("no label|class/name", import_kind="mar")


@pytest.mark.slow
def test_a_trained_on_encoder_encodes_again(tmp_path):
    config = default_config()
    config.data.source, config.data.limit = "digits", 40
    config.autoencoder.block_out_channels, config.autoencoder.norm_groups = (8, 8), 4
    config.autoencoder.steps, config.autoencoder.batch_size = 1, 8
    config.encode.shard_size = 16
    jobs.run_job("autoencode", config, str(tmp_path))
    first = jobs.run_job("encode", config, str(tmp_path))["train"]
    config.autoencoder.steps = 3
    jobs.run_job("autoencode", config, str(tmp_path))
    second = jobs.run_job("encode", config, str(tmp_path))["train"]
    assert second["shards_written"] == 3 and second["cache"] != first["cache"]
    # Other images are another matter: they are not thrown away for a slip in a path.
    config.data.limit = 20
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="was begun with"):
        jobs.run_job("encode", config, str(tmp_path))


FLAGS = (
    f"--config={ROOT}/configs/digits.py",
    "--job=encode",
    "--config.autoencoder.kind=identity",
    "--config.encode.shard_size=32",
    "--config.encode.batch_size=8",
)


def start(workdir, processes):
    """The encode job in so many processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    running = []
    for i in range(processes):
        environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
        if processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(i),
            }
        command = [sys.executable, "-m", "lfm_jax.main", *FLAGS, f"--workdir={workdir}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(command, env=environment, **pipes))
    return running


@pytest.mark.slow
def test_begun_by_one_process_and_finished_by_four(tmp_path):
    (alone,) = start(tmp_path / "whole", 1)
    expected = json.loads(alone.communicate()[0].splitlines()[-1])["train"]
    shards = expected["shards_written"]
    assert shards == -(-expected["examples"] // 32)

    (first,) = start(tmp_path / "run", 1)
    parts = tmp_path / "run/latents/train/parts"
    while first.poll() is None and len(list(parts.glob("*.json"))) < 10:
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    done = len(list(parts.glob("*.json")))
    assert 10 <= done < shards
    four = start(tmp_path / "run", 4)
    results = [process.communicate() for process in four]
    assert [process.returncode for process in four] == [0] * 4, results
    found = json.loads(results[0][0].splitlines()[-1])["train"]
    assert found == {**expected, "shards_written": shards - done}
