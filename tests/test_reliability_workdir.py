"""One run a workdir, one line for a workdir that cannot be used, damaged small files included."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import time

import pytest
from checkout import ROOT
from etils import epath

from lfm_jax import errors, preemption
from lfm_jax.config import default_config
from lfm_jax.errors import Preempted, UserError
from lfm_jax.lock import held
from lfm_jax.workdir import Workdir, claim, is_done, write_result

DIGITS = f"--config={ROOT}/configs/digits.py:smoke"


@pytest.fixture
def workdir(tmp_path):
    return Workdir(epath.Path(tmp_path / "run"))


def _hold(folder, ready):
    with held(Workdir(epath.Path(folder)), "train"):
        ready.set()
        time.sleep(600)


def test_a_second_run_is_refused_until_the_first_is_dead(workdir):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    first = context.Process(target=_hold, args=(workdir.root, ready), daemon=True)
    first.start()
    assert ready.wait(60)
    with pytest.raises(UserError, match=rf"in use by process {first.pid} on .*, train since"):
        with held(workdir, "sample"):
            pass
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    assert workdir.lock.exists(), "a killed run cannot clean up"
    with held(workdir, "sample"):
        assert f"process {os.getpid()}" in workdir.lock.read_text()
    assert not workdir.lock.exists()


def test_the_lock_goes_with_an_error_too(workdir):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), held(workdir, "train"):
            raise ZeroDivisionError


def test_a_read_only_workdir_is_one_line(command_line, tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", place], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting a tmpfs needs CAP_SYS_ADMIN")
    try:
        done = command_line(DIGITS, f"--workdir={place}/run", "--job=encode")
    finally:
        subprocess.run(["umount", "-l", place], check=True)
    assert done.returncode == errors.USER_MISTAKE
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and "Read-only file system" in lines[0] and str(place) in lines[0]


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"provenance": 3}', "\x00\xff"])
def test_a_damaged_result_is_named(workdir, content):
    write_result(workdir, "encode", default_config(), {"a": 1}, {})
    workdir.result_path("encode").write_text(content)
    for read in (lambda: workdir.result("encode"), lambda: is_done(workdir, "encode", {"a": 1})):
        with pytest.raises(UserError, match=r"encode\.json: damaged.*--job=encode"):
            read()


@pytest.mark.parametrize("content", ["", "[]", "null", '{"identity": 3}', '{"identity": null}'])
def test_a_damaged_config_is_named(workdir, content):
    claim(workdir, default_config())
    workdir.config.write_text(content)
    with pytest.raises(UserError, match=r"config\.json: expected"):
        claim(workdir, default_config())
    assert workdir.config.read_text() == content


def test_every_differing_key_is_named(workdir):
    config = default_config()
    claim(workdir, config)
    (workdir.checkpoints / "20").mkdir(parents=True)
    config.model.depth, config.train.b2, config.data.source = 3, 0.9, "idx"
    with pytest.raises(UserError, match=r"data\.source .*model\.depth .*train\.b2") as caught:
        claim(workdir, config)
    assert "there 'digits', here 'idx'" in str(caught.value)


def test_sigterm_ends_a_job_of_work_items_at_once():
    with pytest.raises(Preempted, match="encode: stopped"):
        with preemption.stops_at_once("encode"):
            with preemption.asks_first() as asked:  # the training loop inside decides for itself
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
                assert asked()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    assert not issubclass(Preempted, Exception)  # or a reader would take it for a damaged file


def test_storage_failures_are_told_from_mistakes():
    full = OSError(errno.ENOSPC, "No space left on device", "/runs/a")
    assert errors.storage_failure(full) == "/runs/a: No space left on device"
    assert errors.storage_failure(OSError(errno.ECONNRESET, "reset")) is None


def test_config_json_is_whole_json(workdir):
    claim(workdir, default_config())
    assert json.loads(workdir.config.read_text())["identity"]["seed"] == 0
