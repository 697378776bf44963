"""Runs of several processes on this host, joined by gloo: the code of a pod, for real."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from checkout import ROOT

from lfm_jax import checkpoints

CONFIG = f"--config={ROOT}/configs/digits.py:smoke"
# Large enough for fsdp to split something; a constant rate, so that fewer steps are a prefix.
FLAGS = (
    CONFIG,
    "--config.model.hidden=64",
    "--config.train.schedule=constant",
    "--config.train.preview_every=0",
    "--config.train.log_every=1",
    "--config.train.save_every=5",
)
STEPS = 20


class Processes:
    """`count` processes of one run, each with `devices` devices and files for what it says."""

    def __init__(self, folder, count, *flags, devices=1, lost_after=15, own=None, **environment):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.running = []
        for index in range(count):
            env = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
            env.pop("XLA_FLAGS", None)
            env |= {
                "JAX_NUM_CPU_DEVICES": str(devices),
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
                "LFM_LOST_AFTER": str(lost_after),
                **environment,
            }
            command = [sys.executable, "-m", "lfm_jax.main", *flags, *(own or {}).get(index, ())]
            with open(folder / f"out{index}", "w") as out, open(folder / f"err{index}", "w") as err:
                process = subprocess.Popen(command, env=env, cwd="/tmp", stdout=out, stderr=err)
            self.running.append(process)

    def wait(self, seconds=400):
        """Exit statuses of all; none may be left after `seconds`."""
        deadline = time.time() + seconds
        try:
            return [p.wait(max(1, deadline - time.time())) for p in self.running]
        finally:
            for process in self.running:
                process.kill()

    def lines(self, index):
        """What lfm_jax itself said on a process's stderr."""
        text = (self.folder / f"err{index}").read_text().replace("\r", "\n")
        return [line for line in text.splitlines() if line.startswith("lfm_jax:")]

    def errors(self):
        return "\n".join(
            (self.folder / f"err{i}").read_text()[-1500:] for i in range(len(self.running))
        )


@pytest.fixture(scope="module")
def prepared(command_line, tmp_path_factory):
    """A workdir with an autoencoder and latents, not trained."""
    workdir = tmp_path_factory.mktemp("prepared")
    for job in ("autoencode", "encode"):
        done = command_line(*FLAGS, f"--workdir={workdir}", f"--job={job}")
        assert done.returncode == 0, done.stderr[-2000:]
    return workdir


@pytest.fixture(scope="module")
def alone(prepared, command_line, tmp_path_factory):
    """The same run of one process with one device: what all others must agree with."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    shutil.copytree(prepared, workdir)
    done = command_line(*FLAGS, f"--workdir={workdir}", "--job=train")
    assert done.returncode == 0, done.stderr[-2000:]
    return workdir


def _start(prepared, folder, count, *flags, **options):
    workdir = folder / "run"
    if not workdir.exists():
        shutil.copytree(prepared, workdir)
    flags = (*FLAGS, f"--workdir={workdir}", "--job=train", *flags)
    return workdir, Processes(folder / f"logs{time.time():.0f}", count, *flags, **options)


def _curve(workdir):
    lines = (workdir / "logs/train.jsonl").read_text().splitlines()
    return {entry["step"]: entry["loss"] for entry in map(json.loads, lines)}


def _check_agrees(workdir, alone):
    found, wanted = _curve(workdir), _curve(alone)
    assert list(found) == list(range(1, STEPS + 1))
    for step in found:
        np.testing.assert_allclose(found[step], wanted[step], rtol=1e-5, err_msg=str(step))
    one, many = (checkpoints.load_params(w / "checkpoints", ema=False) for w in (alone, workdir))
    flat = [np.concatenate([x.ravel() for x in _leaves(tree)]) for tree in (one, many)]
    assert np.linalg.norm(flat[0] - flat[1]) <= 1e-3 * np.linalg.norm(flat[0])


def _leaves(tree):
    return [tree] if not isinstance(tree, dict) else [x for v in tree.values() for x in _leaves(v)]


@pytest.mark.slow
def test_a_killed_run_of_two_goes_on_with_four_and_agrees_with_one(prepared, alone, tmp_path):
    workdir, run = _start(prepared, tmp_path, 2, "--config.mesh.fsdp=2")
    log = workdir / "logs/train.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 8:
        assert all(p.poll() is None for p in run.running), run.errors()
        time.sleep(0.05)
    # The newest save may still be under way: what counts is that a whole one is there.
    run.running[1].send_signal(signal.SIGKILL)
    begin = time.time()
    statuses = run.wait()
    assert statuses == [1, -signal.SIGKILL], run.errors()
    assert time.time() - begin < 60
    assert len(run.lines(0)) == 1 and "process" in run.lines(0)[0], run.errors()
    assert (checkpoints.latest_step(workdir / "checkpoints") or 0) < STEPS

    # fsdp over processes: no process could have written the whole state.
    _, run = _start(prepared, tmp_path, 4, "--config.mesh.fsdp=4")
    assert run.wait() == [0] * 4, run.errors()
    _check_agrees(workdir, alone)
    state = workdir / f"checkpoints/{STEPS}/state"
    writers = {path.name for path in state.iterdir() if path.name.startswith("ocdbt.process_")}
    assert writers == {f"ocdbt.process_{i}" for i in range(4)}
    assert (run.folder / "out0").read_text().rstrip().endswith("}")
    for index in (1, 2, 3):
        assert "{" not in (run.folder / f"out{index}").read_text()


@pytest.mark.slow
def test_a_notice_to_one_process_ends_all_after_saving(prepared, tmp_path):
    workdir, run = _start(prepared, tmp_path, 2, "--config.train.steps=100000")
    log = workdir / "logs/train.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        assert all(p.poll() is None for p in run.running), run.errors()
        time.sleep(0.05)
    run.running[1].send_signal(signal.SIGTERM)
    assert run.wait() == [75, 75], run.errors()
    saved = checkpoints.latest_step(workdir / "checkpoints")
    assert saved >= 3 and f"saved step {saved}" in run.lines(0)[0]


def test_processes_that_were_told_different_things_all_end(tmp_path):
    own = {1: ("--config.train.learning_rate=0.5",)}
    flags = (*FLAGS, f"--workdir={tmp_path}/run", "--job=train")
    run = Processes(tmp_path / "logs", 2, *flags, own=own)
    assert run.wait() == [2, 2], run.errors()
    assert len(run.lines(0)) == 1
    assert "train.learning_rate" in run.lines(0)[0] and "process 1" in run.lines(0)[0]
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_divide_ends_all(tmp_path):
    flags = (*FLAGS, f"--workdir={tmp_path}/run", "--job=train", "--config.train.batch_size=33")
    run = Processes(tmp_path / "logs", 2, *flags)
    assert run.wait() == [2, 2], run.errors()
    assert len(run.lines(0)) == 1
    assert "train.batch_size=33" in run.lines(0)[0] and "32 or 34" in run.lines(0)[0]


def test_a_coordinator_that_does_not_answer_is_given_up(tmp_path):
    """Process 1 of 2 finds nobody; process 0 of 2 waits for nobody."""
    flags = (CONFIG, f"--workdir={tmp_path}/run", "--job=train")
    for index in ("1", "0"):
        folder = tmp_path / f"logs{index}"
        run = Processes(folder, 1, *flags, LFM_CONNECT_WITHIN="3", JAX_NUM_PROCESSES="2",
                        JAX_PROCESS_ID=index)  # fmt: skip
        begin = time.time()
        assert run.wait() == [1], run.errors()
        assert time.time() - begin < 60
        assert len(run.lines(0)) == 1 and "within 3 s" in run.lines(0)[0], run.errors()
