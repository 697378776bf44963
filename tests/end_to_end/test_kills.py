"""Four kills and a termination notice a job, by the script that does hundreds."""

import json
import os
import signal
import subprocess
import sys

import pytest
from checkout import ROOT

JOBS = ("train", "mmd", "autoencode", "encode", "sample", "evaluate", "export")


def _run(part: str, kills: int, folder, jobs=JOBS) -> dict:
    command = [sys.executable, "-m", "benchmarks.reliability", part, "--folder", str(folder)]
    command += ["--kills", str(kills), "--jobs", ",".join(jobs)]
    done = subprocess.run(
        command, cwd=ROOT, env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True,
        text=True, check=False, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "state.json").read_text())


@pytest.mark.slow
def test_every_job_ends_equal_to_the_undisturbed_run(tmp_path):
    for part, kills in (("kills", 4), ("terms", 1)):
        counts = _run(part, kills, tmp_path)
        assert not counts.get("problems"), counts["problems"][0]
        for job in JOBS:
            assert counts[part][job]["signals"] >= kills
            assert counts[part][job]["lost"] == 0


def test_a_killed_work_item_is_the_only_one_that_is_made_again(tmp_path):
    """The same at the smallest scale: shards of a cache, one kill."""
    script = f"""
import os, signal, sys
import numpy as np
sys.path.insert(0, {str(ROOT)!r})
from lfm_jax.data import CacheWriter
made = []
writer = CacheWriter({str(tmp_path / "train")!r}, num_examples=9, shard_size=3,
    latent_shape=(2, 2, 1), metadata=dict(encoder="e", scale=1.0, shift=0.0, image_size=8))
for shard in writer.missing_shards():
    def rows():
        for i in writer.shard_range(shard):
            if i == int(sys.argv[1]):
                os.kill(os.getpid(), signal.SIGKILL)
            made.append(i)
            yield dict(moments=np.full((2, 2, 2), i))
    writer.write_shard(shard, rows())
writer.finish()
print(made)
"""
    run = [sys.executable, "-c", script]
    killed = subprocess.run([*run, "4"], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    done = subprocess.run([*run, "-1"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [3, 4, 5, 6, 7, 8]
