"""Workdirs at gs:// addresses, with a backend that has what object stores have and no more."""

import io
import json
import time

import numpy as np
import pytest
from etils import epath
from etils.epath import backend, gpath

from lfm_jax import lease
from lfm_jax.config import default_config
from lfm_jax.data.latents import local_folder
from lfm_jax.errors import UserError
from lfm_jax.lock import held
from lfm_jax.workdir import Workdir, claim, write_result
from lfm_jax.writers import ScalarWriter, write_bytes, write_json


class Bucket(backend.Backend):
    """Objects by name: written whole on close; no folders, no renaming, no locks."""

    def __init__(self):
        self.objects, self.listener = {}, lambda name: None

    def open(self, path, mode):
        name, store = str(path), self
        if "r" in mode:
            if name not in self.objects:
                raise FileNotFoundError(name)
            raw = io.BytesIO(self.objects[name])
        else:

            class Upload(io.BytesIO):
                def close(self):
                    if not self.closed:
                        store.objects[name] = self.getvalue()
                        store.listener(name)
                    super().close()

            raw = Upload()
        return raw if "b" in mode else io.TextIOWrapper(raw, encoding="utf-8")

    def exists(self, path):
        return str(path) in self.objects or self.isdir(path)

    def isdir(self, path):
        return any(name.startswith(f"{path}/") for name in self.objects)

    def listdir(self, path):
        inside = [n.removeprefix(f"{path}/") for n in self.objects if n.startswith(f"{path}/")]
        return sorted({name.partition("/")[0] for name in inside})

    def makedirs(self, path, *, exist_ok=False, mode=None):
        pass

    mkdir = makedirs

    def remove(self, path):
        if str(path) not in self.objects:
            raise FileNotFoundError(path)
        del self.objects[str(path)]

    def rmtree(self, path):
        self.objects = {n: v for n, v in self.objects.items() if not n.startswith(f"{path}/")}

    def rename(self, path, dst):
        raise AssertionError("an object store renames by copying")

    replace = rename
    glob = walk = copy = stat = None


@pytest.fixture
def bucket(monkeypatch):
    store = Bucket()
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", store)
    return store


def test_small_files_are_written_as_whole_objects(bucket):
    path = epath.Path("gs://bucket/run/results/train.json")
    write_json(path, {"a": 1})
    write_bytes(path.parent / "picture.png", b"png")
    assert sorted(bucket.objects) == [
        "gs://bucket/run/results/picture.png",
        "gs://bucket/run/results/train.json",
    ]
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_workdir_in_a_bucket_is_claimed_and_keeps_results(bucket):
    workdir = Workdir(epath.Path("gs://bucket/run"))
    config = default_config()
    with held(workdir, "train"):
        assert workdir.lock.exists()
        claim(workdir, config)
        write_result(workdir, "train", config, {"x": 1}, {"loss": 0.5})
    assert not workdir.lock.exists()
    assert workdir.result("train")["loss"] == 0.5
    config.seed = 5
    with pytest.raises(UserError, match="seed"):
        claim(workdir, config)


def test_a_second_run_is_kept_out_until_the_first_is_gone(bucket):
    path = epath.Path("gs://bucket/run/lock")
    with lease.held(path, "train", settle=0.0):
        with pytest.raises(UserError, match="in use by process"):
            with lease.held(path, "sample", settle=0.0):
                pass
        assert path.exists()
    with lease.held(path, "sample", settle=0.0):
        pass


def test_a_lease_is_renewed_and_one_that_is_not_runs_out(bucket):
    path = epath.Path("gs://bucket/run/lock")
    with lease.held(path, "train", holds=0.3, settle=0.0):
        time.sleep(0.8)
        with pytest.raises(UserError, match="in use"):
            with lease.held(path, "sample", settle=0.0):
                pass
    dead = {"holder": "process 1 on gone", "token": "x", "until": time.time() - 1}
    path.write_text(json.dumps(dead))
    with lease.held(path, "train", settle=0.0):
        pass


def test_of_two_that_write_at_once_one_has_it(bucket):
    path = epath.Path("gs://bucket/run/lock")
    other = {"holder": "process 2 on host", "token": "y", "until": time.time() + 60}

    def another_writes_too(name):
        bucket.listener = lambda name: None
        bucket.objects[name] = json.dumps(other).encode()

    bucket.listener = another_writes_too
    with pytest.raises(UserError, match="process 2 on host"):
        with lease.held(path, "train", settle=0.0):
            pass


def test_scalars_of_a_resumed_run(bucket):
    folder = epath.Path("gs://bucket/run/logs")
    writer = ScalarWriter(folder, "train")
    for step in (1, 2, 3):
        writer.write(step, {"loss": float(np.float32(step))})
    writer.close()
    ScalarWriter(folder, "train", start=2).write(3, {"loss": 9.0})
    lines = (folder / "train.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [1.0, 2.0, 9.0]


def test_caches_are_read_where_the_bucket_is_mounted(monkeypatch):
    monkeypatch.setenv("LFM_MOUNTS", "gs://other=/no gs://bucket/runs=/mnt/runs")
    assert str(local_folder("gs://bucket/runs/a/latents")) == "/mnt/runs/a/latents"
    assert str(local_folder("gs://bucket/runs")) == "/mnt/runs"
    with pytest.raises(UserError, match="LFM_MOUNTS"):
        local_folder("gs://bucket/runs2/a")
