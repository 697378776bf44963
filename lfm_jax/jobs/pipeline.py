"""Run what is missing of autoencode, encode, train, sample, evaluate, in order."""

import importlib
import sys
import time
from typing import Any

from absl import logging
from ml_collections import ConfigDict
from tqdm import tqdm

from lfm_jax import sharding
from lfm_jax.jobs import build, finish, judge, programs, sample_options
from lfm_jax.workdir import Workdir, is_done

_STAGES = ("autoencode", "encode", "train", "sample", "evaluate")


def stages(config: ConfigDict) -> tuple[str, ...]:
    """The stages that this config has: only a codec of one's own has to be trained, and finetuning
    reads what its base has encoded."""
    if config.loss == "mmd":
        return _STAGES[2:]
    return _STAGES if config.autoencoder.kind == "train" else _STAGES[1:]


def inputs(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    told = {}
    for name in stages(config):
        result = workdir.result(name)
        assert result is not None  # `run` has run what had not ended
        told[name] = result["provenance"]["inputs"]
    return told


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    """Run each stage unless its result stands and its inputs are the same."""
    # A name that a later stage would refuse is refused before an earlier one has run for an hour.
    programs.check_network(config)
    sample_options.check_solver(config)
    sample_options.sample_labels(config)
    judge.check_names(config)
    if config.evaluate.reference is None:
        build.images(config, "test")  # what is judged against is there
    seconds, results = {}, {}
    for name in stages(config):
        job = importlib.import_module(f"lfm_jax.jobs.{name}")
        wanted = job.inputs(config, workdir)
        if is_done(workdir, name, wanted):
            logging.info("%s: done already", name)
            if sharding.is_main_process():
                tqdm.write(f"{name}: done already, its inputs have not changed", file=sys.stderr)
            results[name] = workdir.result(name)
            continue
        start = time.perf_counter()
        figures = job.run(config, workdir)
        seconds[name] = round(time.perf_counter() - start, 1)
        figures["seconds"] = seconds[name]
        results[name] = finish(job, name, config, workdir, figures)
    return {"seconds": seconds, "evaluate": _figures(results["evaluate"])}


def _figures(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key not in ("job", "provenance")}
