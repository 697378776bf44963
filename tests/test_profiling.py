"""Step times without waiting for a step, and a profile that the usual tools open."""

import gzip
import json
import time

import jax
import jax.numpy as jnp
import pytest

from lfm_jax import profiling


class Takes:
    """Something that is done on the device after a while."""

    def __init__(self, seconds):
        self.seconds = seconds

    def block_until_ready(self):
        time.sleep(self.seconds)
        return self


def test_step_times_are_those_of_the_device_not_of_the_loop():
    times = profiling.StepTimes()
    times.pause()
    begin = time.perf_counter()
    for seconds in (0.03,) * 9 + (0.15,):
        times.add(Takes(seconds))
    assert time.perf_counter() - begin < 0.1  # nothing was waited for
    found = times.window()
    assert found["step_ms_p50"] == pytest.approx(30, rel=0.6)
    assert found["step_ms_p95"] > 60
    time.sleep(0.2)  # a save
    times.pause()
    times.add(Takes(0.01))
    assert times.window()["step_ms_p50"] < 100
    assert times.window() == {}
    times.close()


@pytest.mark.slow
def test_a_profile_of_some_steps_is_written(tmp_path):
    trace = profiling.Trace(tmp_path / "profile", (2, 3))
    step = jax.jit(lambda x: x @ x)
    x = jnp.ones((64, 64))
    for i in range(1, 6):
        trace.before(i)
        x = step(x)
        trace.after(i, x)
    trace.close()
    assert list(tmp_path.rglob("*.xplane.pb"))
    (perfetto,) = tmp_path.rglob("perfetto_trace.json.gz")
    with gzip.open(perfetto) as file:
        assert json.load(file)["traceEvents"]


def test_no_window_no_profile(tmp_path):
    trace = profiling.Trace(tmp_path / "profile", ())
    trace.before(1)
    trace.after(1, jnp.ones(()))
    trace.close()
    assert not (tmp_path / "profile").exists()
