"""Measure a network while it trains, on samples from the same noises every time; keep the best.

What the loss does not show, the Frechet distance does: whether longer training still helps. The
best step's whole state lies in ``DIR/best`` (sampled by ``sample.checkpoint=best``), the curve in
``DIR/logs/evaluate.jsonl`` and, for the comparison page, in ``DIR/results/curves.json``.
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from lfm_jax import checkpoints, sharding
from lfm_jax.config import to_json
from lfm_jax.evaluate import frechet_of, metric_name
from lfm_jax.jobs import build
from lfm_jax.jobs.generate import Generator
from lfm_jax.jobs.judge import Look, judge, of_array, of_source, spread
from lfm_jax.state import TrainState
from lfm_jax.workdir import Workdir
from lfm_jax.writers import ScalarWriter, write_json

_LOG = "evaluate"


def folder(workdir: Workdir) -> epath.Path:
    """Where the best step's checkpoint lies."""
    return workdir.root / "best"


def watcher(config: ConfigDict, workdir: Workdir) -> Callable[[TrainState, int], None]:
    """What `fit` calls with the state every `config.train.evaluate_every` steps.

    The judge is trained or loaded, and the held-out images are looked at, before the first step.
    """
    extractor, _ = judge(config, workdir)
    look = Look(extractor=extractor)
    test = build.images(config, "test")
    held_out = spread(len(test), min(config.evaluate.num_real, len(test)))
    real = look(of_source(test, held_out), len(held_out), "held-out real")
    name = metric_name(real)
    generator = Generator.from_config(config, workdir)
    classes = np.arange(max(config.data.num_classes, 1), dtype=np.int32)
    if generator.given is not None and generator.given.labels is not None:
        # The class of the image that a condition was taken from: a shoe's map is no shirt's.
        classes = generator.given.classes(np.arange(config.train.evaluate_samples))
    start = checkpoints.latest_step(workdir.checkpoints) or 0
    writer = ScalarWriter(workdir.logs, _LOG, start=start) if sharding.is_main_process() else None

    def watch(state: TrainState, step: int) -> None:
        images, _ = generator.first(
            state.best_params,
            config.train.evaluate_samples,
            batch_size=config.sample.batch_size,
            labels=classes,
        )
        fake = look(of_array(images), len(images), f"step {step}")
        value = _agreed(frechet_of(fake.statistics, real.statistics))
        if writer:
            writer.write(step, {name: value})
            write_curve(workdir, f"{name} over step", _points(workdir, name))
        best = _best(workdir)
        # The same step again, after a restart, is what is there already.
        if best is None or value < best["value"] or step == best["step"]:
            with checkpoints.open_manager(folder(workdir), keep=1) as manager:
                told = {"metric": name, "value": value, "step": step}
                checkpoints.save(
                    manager, step, state, data=told, config=to_json(config), force=True
                )
            logging.info("step %d: %s %.4g, the best so far", step, name, value)

    return watch


def summary(workdir: Workdir) -> dict[str, Any]:
    """The best step and its figure; empty where nothing was measured."""
    best = _best(workdir)
    if best is None:
        return {}
    return {"best_step": best["step"], f"best {best['metric']}": best["value"]}


def write_curve(workdir: Workdir, title: str, points: list[list[float | int]]) -> None:
    """Put a curve into ``results/curves.json`` in place of the one of the same title."""
    path = workdir.root / "results" / "curves.json"
    curves = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, {**curves, title: points})


def _points(workdir: Workdir, name: str) -> list[list[float]]:
    lines = (workdir.logs / f"{_LOG}.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [[row["step"], row[name]] for row in rows if name in row]


def _best(workdir: Workdir) -> dict[str, Any] | None:
    where = folder(workdir)
    if checkpoints.latest_step(where) is None:
        return None
    with checkpoints.open_manager(where, keep=1) as manager:
        return checkpoints.read_json(manager, checkpoints.DATA)


def _agreed(value: float) -> float:
    """The main process's figure, in every process: all must save, or none."""
    if jax.process_count() == 1:
        return value
    return float(multihost_utils.broadcast_one_to_all(np.float32(value)))
