"""A run that was interrupted ends as if nothing had been: in bits, in logs, in what it is told."""

import argparse
import json
import logging
import os
import shutil
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkout import ROOT
from etils import epath

from lfm_jax import checkpoints, mmd, sharding
from lfm_jax.errors import Failed, Preempted, UserError
from lfm_jax.evaluate import collect, collect_features
from lfm_jax.experiments import neighbour
from lfm_jax.features import Classifier, Extractor
from lfm_jax.jobs.fit import fit
from lfm_jax.jobs.mmd_monitor import Monitor
from lfm_jax.state import TrainState, create_state, make_step
from lfm_jax.workdir import Workdir
from lfm_jax.writers import ScalarWriter

BATCH, BAD = 4, 17  # the example that is not a number


def batches(start):
    rng = np.random.default_rng(0)
    data = rng.normal(size=(24, 3)).astype(np.float32)
    while True:
        position = np.arange(start, start + BATCH)
        index = (7 * position % 24).astype(np.int32)
        yield {"x": data[index], "index": index, "position": position.astype(np.uint32)}
        start += BATCH


def poisoned(start):
    for batch in batches(start):
        rows = batch["x"].copy()
        rows[batch["index"] == BAD] = np.nan
        yield {**batch, "x": rows}


def loss(params, batch, key):
    return jnp.mean((batch["x"] @ params["w"] - 1.0) ** 2), {"first": batch["x"][0, 0]}


def train(folder, *, steps, stream=batches, skip=False, **options):
    mesh, tx = sharding.make_mesh(), optax.adam(0.05)
    state = create_state(lambda: {"w": jnp.ones((3, 2))}, tx, mesh, ema=True)
    return fit(
        "train",
        state,
        make_step(loss, tx, jax.random.key(0), ema_decay=0.9, skip_nonfinite=skip),
        stream,
        folder=epath.Path(folder) / "checkpoints",
        logs=epath.Path(folder) / "logs",
        mesh=mesh,
        steps=steps,
        batch_size=BATCH,
        record={"seed": 0},
        config={},
        log_every=4,
        save_every=3,
        skip_nonfinite=skip,
        **options,
    )


def curve(folder):
    lines = (folder / "logs/train.jsonl").read_text().splitlines()
    timed = ("images_per_second", "steps_per_second", "data_wait")
    read = [json.loads(line).items() for line in lines]
    return [{k: v for k, v in row if k not in timed and "_ms_" not in k} for row in read]


def test_stopped_between_two_logs_the_curve_is_the_same(tmp_path):
    """SIGTERM a few steps into a log window, twice; the logged means are of whole windows."""
    wanted, figures = train(tmp_path / "a", steps=40)

    def terminated(start):
        for step, batch in enumerate(batches(start)):
            if step == 9:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    stopped_at = []
    for _ in range(2):
        with pytest.raises(Preempted, match="saved step") as caught:
            train(tmp_path / "b", steps=40, stream=terminated)
        stopped_at.append(checkpoints.latest_step(tmp_path / "b/checkpoints"))
        assert f"saved step {stopped_at[-1]};" in str(caught.value)
    assert 5 < stopped_at[0] < stopped_at[1] < 40
    state, resumed = train(tmp_path / "b", steps=40)
    chex.assert_trees_all_equal(state, wanted)
    assert resumed["loss"] == figures["loss"]
    assert curve(tmp_path / "b") == curve(tmp_path / "a")


def test_a_finished_run_knows_its_loss_again(tmp_path):
    _, figures = train(tmp_path, steps=10)
    _, again = train(tmp_path, steps=10)
    assert again["loss"] == figures["loss"] and again["steps"] == 10


def test_a_step_that_is_not_finite_names_its_examples(tmp_path):
    with pytest.raises(FloatingPointError) as caught:
        train(tmp_path, steps=10, stream=poisoned)
    line = str(caught.value)
    bad = next(s for s, b in enumerate(batches(0), start=1) if BAD in b["index"])
    assert f"step {bad} on examples" in line and "nonfinite=skip" in line
    last_good = (bad - 1) // 3 * 3
    assert (f"checkpoint is step {last_good}" if last_good else "no checkpoint before it") in line
    told = json.loads((tmp_path / f"logs/nonfinite_train_{bad}.json").read_text())
    assert BAD in told["index"] and told["step"] == bad and told["loss"] == "nan"


def test_steps_that_are_not_finite_are_left_out_and_counted(tmp_path):
    state, figures = train(tmp_path, steps=12, stream=poisoned, skip=True)
    skipped = sum(BAD in b["index"] for b, _ in zip(batches(0), range(12), strict=False))
    assert figures["skipped"] == skipped > 0 and np.isfinite(figures["loss"])
    chex.assert_tree_all_finite(state.params)
    assert int(state.step) == 12
    again, figures = train(tmp_path, steps=18, stream=poisoned, skip=True)
    assert figures["skipped"] > skipped, "the count must survive a restart"
    chex.assert_tree_all_finite(again.ema)


def test_nothing_but_bad_steps_stops_in_the_end(tmp_path):
    def all_bad(start):
        for batch in batches(start):
            yield {**batch, "x": batch["x"] * np.nan}

    with pytest.raises(FloatingPointError, match="step 101 "):
        train(tmp_path, steps=200, stream=all_bad, skip=True)


def test_a_spike_of_the_loss_is_logged(tmp_path, caplog):
    def spiking(start):
        for step, batch in enumerate(batches(start)):
            yield {**batch, "x": batch["x"] * (1e3 if step == 70 else 1)}

    with caplog.at_level(logging.WARNING):
        train(tmp_path, steps=80, stream=spiking)
    assert "at step 71, the median before is" in caplog.text
    values = {line["step"]: line["loss_max"] for line in curve(tmp_path)}
    assert values[72] > 100 * values[68]


def test_disk_use_is_stated_and_no_room_is_said_at_once(tmp_path, monkeypatch):
    _, figures = train(tmp_path / "a", steps=6, keep=2, keep_every=3)
    assert figures["checkpoints_bytes_at_most"] == 5 * figures["checkpoint_bytes"]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(Failed, match="10 bytes are free, a checkpoint takes"):
        train(tmp_path / "b", steps=6)


def test_another_stream_is_refused(tmp_path):
    train(tmp_path, steps=3)
    data = next((tmp_path / "checkpoints/3/data").iterdir())
    text = data.read_text()
    assert '"seed": 0' in text
    data.write_text(text.replace('"seed": 0', '"seed": 1'))  # damage, not another stream
    with pytest.raises(UserError, match="data: checksum differs"):
        train(tmp_path, steps=6)


def test_fewer_steps_than_there_are_make_no_result(tmp_path):
    train(tmp_path, steps=6)
    with pytest.raises(UserError, match="holds step 6, beyond the 3 steps asked for"):
        train(tmp_path, steps=3)


def test_a_damaged_log_does_not_stop_a_run(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe{"st\n{"step": "x"}\n[]\n{"step": 2}\n{"step": 9}\n')
    writer = ScalarWriter(tmp_path, "train", start=2)
    writer.write(3, {"loss": 0.5})
    writer.close()
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [1, 2, 3]


class Killed(BaseException):
    pass


def test_a_pass_of_features_goes_on_where_it_was(tmp_path, monkeypatch):
    """No image is looked at twice except those of the part that was not yet on disk."""
    monkeypatch.setattr(collect, "PART_SECONDS", -1.0)
    images = np.random.default_rng(0).integers(0, 256, (103, 8, 8, 1), np.uint8)
    model = Classifier(num_classes=3, width=4)
    params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    judge = Extractor(
        params=params, model=model, name="j", dim=model.hidden, input_size=8, channels=1
    )
    looked: list[int] = []

    def read(start, dies_at=None):
        for i in range(start, len(images), 7):
            if dies_at is not None and i >= dies_at:
                raise Killed
            looked.extend(range(i, min(i + 7, len(images))))
            yield images[i : i + 7]

    options = {"batch_size": 10, "progress": False}
    wanted = collect_features(judge, images, **options)
    for dies_at in (35, 80):
        with pytest.raises(Killed):
            collect_features(judge, lambda s, d=dies_at: read(s, d), parts=tmp_path, **options)
    (tmp_path / "000000070.npz").write_bytes(b"damaged")
    looked.clear()
    found = collect_features(judge, read, parts=tmp_path, **options)
    assert looked == list(range(70, 103))
    for name in ("features", "logits"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    np.testing.assert_array_equal(found.statistics.scatter, wanted.statistics.scatter)
    looked.clear()
    collect_features(judge, read, parts=tmp_path, **options)
    assert looked == []


# ---- finetuning


def test_a_bank_that_is_read_back_is_the_one_that_was_made(tmp_path):
    """Or a run that made its bank would train on other rows than the one that goes on from it."""
    rows = {"a": np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)}
    made = mmd.make_bank(rows, np.array([2, 0, 1, 0, 2, 1]), num_classes=3)
    mmd.save_bank(tmp_path / "bank.npz", made, {"seed": 0})
    chex.assert_trees_all_equal(mmd.load_bank(tmp_path / "bank.npz", {"seed": 0}), made)
    with pytest.raises(UserError, match="a: not finite"):
        mmd.make_bank({"a": np.full((2, 2), 1e6)}, np.zeros(2, int))


def test_every_validation_of_an_interrupted_finetuning_is_kept(tmp_path, monkeypatch):
    """That of a snapshot that was worse than the one before too."""
    config = neighbour(str(ROOT / "configs" / "base.py"), "mmd_digits.py", "smoke")
    workdir = Workdir(epath.Path(tmp_path))
    scores = {0: 9.0, 2: 3.0, 4: 5.0, 6: 4.0}

    def monitor():
        judge = argparse.Namespace(labels=np.zeros(250, np.int32), statistics=None, spread=1.0)
        rows = [lambda params, part, key: ({"a": params["w"]},)]
        return Monitor(config=config, workdir=workdir, rows=rows, judge=judge, record={"a": 1})

    def watch(found, step):
        score = lambda *_: scores[step]  # noqa: E731
        monkeypatch.setattr("lfm_jax.jobs.mmd_monitor.frechet_of", score)
        params = {"w": jnp.asarray(np.random.default_rng(step).normal(size=(250, 3)))}
        found(TrainState(step=jnp.int32(step), params=params, opt_state=(), ema=None), step)

    first = monitor()
    for step in (0, 2, 4):
        watch(first, step)
    again = monitor()
    assert [entry["step"] for entry in again.history] == [0, 2, 4]
    watch(again, 6)
    assert [entry["score"] for entry in again.history] == pytest.approx(list(scores.values()))
    assert checkpoints.latest_step(workdir.checkpoints) == 2
