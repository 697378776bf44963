"""The whole path on real digits through the command line, and what a killed run leaves behind."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from checkout import ROOT
from PIL import Image

from lfm_jax import checkpoints

FLAGS = (f"--config={ROOT}/configs/digits.py:smoke",)


@pytest.fixture(scope="module")
def run(command_line, tmp_path_factory):
    """A finished smoke run of the pipeline."""
    workdir = tmp_path_factory.mktemp("digits")
    done = command_line(*FLAGS, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir, done


def test_the_last_line_is_the_result_file(run):
    workdir, done = run
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed == json.loads((workdir / "results/pipeline.json").read_text())
    for job in ("autoencode", "encode", "train", "sample", "evaluate"):
        result = json.loads((workdir / f"results/{job}.json").read_text())
        assert result["provenance"]["config"] and result["provenance"]["versions"]["jax"]


def test_samples_have_the_adm_layout_and_a_picture(run):
    workdir, _ = run
    with np.load(workdir / "samples/samples.npz", allow_pickle=False) as samples:
        assert samples["arr_0"].shape == (60, 8, 8, 1) and samples["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(np.bincount(samples["arr_1"]), np.full(10, 6))
    assert Image.open(workdir / "samples/grid.png").size[1] > 400
    assert list((workdir / "previews").glob("step_*.png"))


def test_figures_stand_beside_their_floors(run):
    workdir, _ = run
    figures = json.loads((workdir / "results/evaluate.json").read_text())
    for key in ("fd_samples", "fd_reconstruction", "fd_floor", "kid_floor"):
        assert np.isfinite(figures[key])
    assert figures["sampler"]["nfe"] == 4 and figures["sampler"]["network_calls"] == 8


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--config.model.heads=5", "--config.model.heads: 5 does not divide"),
        ("--config.sample.labels=12", "class 12 is not in"),
        ("--config.evaluate.metrics=('fdd',)", "'fdd' (did you mean fd?)"),
        ("--config.evaluate.reference=nowhere.npz", "reference=nowhere.npz: no such file"),
    ],
)
def test_what_a_late_stage_would_refuse_is_refused_first(command_line, tmp_path, flag, words):
    done = command_line(
        f"--config={ROOT}/configs/digits.py:smoke", f"--workdir={tmp_path}/run", flag
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert words in done.stderr
    assert not (tmp_path / "run/autoencoder").exists()


def test_a_second_call_does_nothing_again(run, command_line):
    workdir, _ = run
    before = {p: p.stat().st_mtime_ns for p in (workdir / "checkpoints").rglob("*")}
    done = command_line(*FLAGS, f"--workdir={workdir}")
    assert done.returncode == 0
    assert json.loads(done.stdout.splitlines()[-1])["seconds"] == {}
    assert before == {p: p.stat().st_mtime_ns for p in (workdir / "checkpoints").rglob("*")}


def test_a_copied_workdir_goes_on_and_redoes_only_what_changed(run, command_line, tmp_path):
    workdir, _ = run
    copy = tmp_path / "elsewhere"
    shutil.copytree(workdir, copy)
    done = command_line(*FLAGS, f"--workdir={copy}", "--config.sample.num_steps=2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(json.loads(done.stdout.splitlines()[-1])["seconds"]) == {"sample", "evaluate"}


def test_training_killed_at_a_random_moment_ends_bit_identical(run, tmp_path):
    workdir, _ = run
    wanted = checkpoints.load_params(workdir / "checkpoints", ema=False)
    again = tmp_path / "killed"
    shutil.copytree(workdir, again)
    shutil.rmtree(again / "checkpoints")
    (again / "results/train.json").unlink()
    command = [sys.executable, "-m", "lfm_jax.main", *FLAGS, f"--workdir={again}", "--job=train"]
    command += ["--config.train.save_every=3", "--config.train.log_every=1"]
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    log = again / "logs/train.jsonl"
    log.unlink()
    target = random.randint(1, 15)
    deadline = time.time() + 300
    while time.time() < deadline and process.poll() is None:
        if log.exists() and len(log.read_text().splitlines()) >= target:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.01)
    assert process.wait() == -signal.SIGKILL
    assert (checkpoints.latest_step(again / "checkpoints") or 0) < 20
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = checkpoints.load_params(again / "checkpoints", ema=False)
    assert checkpoints.fingerprint(found) == checkpoints.fingerprint(wanted)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, 21))


def test_sigterm_saves_and_exits_with_75(run, tmp_path):
    workdir, _ = run
    again = tmp_path / "preempted"
    shutil.copytree(workdir, again)
    command = [sys.executable, "-m", "lfm_jax.main", *FLAGS, f"--workdir={again}", "--job=train"]
    command += ["--config.train.steps=100000", "--config.train.log_every=5"]
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    log = again / "logs/train.jsonl"
    while json.loads(log.read_text().splitlines()[-1])["step"] < 25 and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors[-2000:]
    saved = checkpoints.latest_step(again / "checkpoints")
    assert saved >= 25 and f"saved step {saved}" in errors


_PLAIN_RESTORE = """
import sys
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import load_file
params = ocp.StandardCheckpointer().restore(sys.argv[1] + "/0/params")
assert isinstance(params["patch"]["kernel"], np.ndarray) or params["patch"]["kernel"].shape
tensors = load_file(sys.argv[1] + "/params.safetensors")
np.testing.assert_array_equal(tensors["patch/kernel"], params["patch"]["kernel"])
assert "lfm_jax" not in sys.modules
"""


def test_a_release_opens_with_plain_orbax_and_safetensors(run, command_line):
    workdir, _ = run
    done = command_line(*FLAGS, f"--workdir={workdir}", "--job=export")
    assert done.returncode == 0, done.stderr[-2000:]
    release = workdir / "release"
    described = json.loads((release / "config.json").read_text())
    assert described["latents"]["shape"] == [4, 4, 4] and described["checkpoint_step"] == 20
    assert "StandardCheckpointer" in (release / "README.md").read_text()
    command = [sys.executable, "-c", _PLAIN_RESTORE, str(release)]
    environment = dict(os.environ, JAX_PLATFORMS="cpu")
    restored = subprocess.run(
        command, env=environment, cwd="/tmp", capture_output=True, text=True, check=False
    )
    assert restored.returncode == 0, restored.stderr[-2000:]


def test_samples_of_others_are_judged_and_runs_compared(run, command_line):
    workdir, _ = run
    flags = (*FLAGS, f"--workdir={workdir}")
    done = command_line(
        *flags, "--job=evaluate", f"--config.evaluate.samples={workdir}/samples/samples.npz"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "sampler" not in json.loads(done.stdout.splitlines()[-1])
    done = command_line(*flags, "--job=compare", f"--config.compare.runs=('{workdir}',)")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "<table" in (workdir / "compare.html").read_text()


def test_a_broken_sample_file_is_one_line(run, command_line, tmp_path):
    workdir, _ = run
    bad = tmp_path / "bad.npz"
    np.savez(bad, arr_0=np.zeros((4, 8, 8, 1), np.float32))
    done = command_line(
        *FLAGS, f"--workdir={workdir}", "--job=evaluate", f"--config.evaluate.samples={bad}"
    )
    assert done.returncode == 2
    assert "bad.npz" in done.stderr and "uint8" in done.stderr
