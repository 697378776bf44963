"""What is said and kept of a finetuning's snapshots, and how its seconds add up."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from lfm_jax import checkpoints, mmd
from lfm_jax.config import default_config
from lfm_jax.evaluate import FeatureStatistics
from lfm_jax.jobs import mmd_clock, mmd_features
from lfm_jax.jobs.mmd_monitor import Monitor
from lfm_jax.state import TrainState
from lfm_jax.workdir import Workdir


def state(width):
    return TrainState(step=jnp.int32(0), params={"w": jnp.float32(width)}, opt_state=(), ema=None)


@pytest.fixture
def workdir(tmp_path):
    return Workdir(epath.Path(tmp_path))


@pytest.fixture
def monitor(workdir):
    """Of Gaussians that should have width 1; `state` says which they have."""
    config = default_config()
    config.mmd.validate_samples = 250
    judge = mmd_features.Judge(
        map=mmd.RawLatents(),
        labels=np.zeros(250, np.int32),
        statistics=FeatureStatistics.of(np.random.default_rng(0).normal(size=(99, 2))),
        spread=1.0,
    )

    def rows(params, batch, key):
        keys = jax.vmap(lambda p: jax.random.fold_in(key, p))(batch["position"])
        return {"raw": params["w"] * jax.vmap(lambda k: jax.random.normal(k, (2,)))(keys)}, None

    return Monitor(config=config, workdir=workdir, rows=[rows], judge=judge, record={})


def test_collapse_ends_the_run_and_keeps_the_last_good_snapshot(monitor, workdir):
    for step, width in ((0, 2.0), (10, 1.5), (20, 1.2)):
        monitor(state(width), step)
    with pytest.raises(FloatingPointError, match=r"collapse at step 30.*snapshot of step 20"):
        monitor(state(0.05), 30)
    kept = checkpoints.load_params(workdir.checkpoints)
    np.testing.assert_allclose(kept["w"], 1.2)


def test_of_equal_snapshots_the_latest_is_kept(monitor, workdir):
    for step, width, newest in ((0, 2.0, None), (10, 1.5, 10), (20, 1.503, 20), (30, 1.6, 20)):
        monitor(state(width), step)
        assert checkpoints.latest_step(workdir.checkpoints) == newest
    scores = [entry["score"] for entry in monitor.history]
    assert scores[1] < scores[2] < 1.1 * scores[1] < scores[3]


@pytest.mark.parametrize("width, worse", [(1.5, False), (2.5, True)])
def test_a_snapshot_that_is_worse_than_the_base_is_kept_with_a_warning(
    monitor, workdir, caplog, width, worse
):
    monitor(state(2.0), 0)
    monitor(state(width), 10)
    assert checkpoints.latest_step(workdir.checkpoints) == 10
    with caplog.at_level(logging.WARNING):
        monitor.compare_with_base()
    assert ("snapshot of step 10 scores" in caplog.text) == worse
    assert len(caplog.records) == worse


def test_a_collapse_before_any_snapshot_says_that_there_is_none(monitor):
    monitor(state(2.0), 0)
    with pytest.raises(FloatingPointError, match=r"collapse at step 10.*no snapshot was kept$"):
        monitor(state(0.05), 10)


def test_a_collapse_found_at_the_end_alone_leaves_the_finetuned_state(monitor, workdir):
    with checkpoints.open_manager(workdir.root / "finetune") as manager:
        checkpoints.save(manager, 40, state(0.05), data={}, config={}, force=True)
    words = r"no snapshot was kept, finetune/ holds the state of step 40$"
    with pytest.raises(FloatingPointError, match=words):
        monitor(state(0.05), 40, keep=True)


def test_seconds_add_up_over_the_processes_of_one_run(workdir, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def process(seconds, record):
        clock = mmd_clock.start(workdir, record)
        now[0] += seconds
        clock.keep()
        return clock.seconds()

    assert process(5, {"seed": 0}) == pytest.approx(5)
    # It left no state: the next one begins anew.
    assert process(7, {"seed": 0}) == pytest.approx(7)
    with checkpoints.open_manager(workdir.root / "finetune") as manager:
        checkpoints.save(manager, 2, state(1.0), data={}, config={}, force=True)
    assert process(4, {"seed": 0}) == pytest.approx(11)
    assert process(1, {"seed": 1}) == pytest.approx(1)
    (workdir.logs / "seconds.json").write_text("{")
    assert process(3, {"seed": 1}) == pytest.approx(3)
