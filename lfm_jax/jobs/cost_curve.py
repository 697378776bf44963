"""Quality over cost: the Frechet distance of samples from the same noises, by solver setting."""

import dataclasses
from typing import Any

import jax
from ml_collections import ConfigDict

from lfm_jax import sharding
from lfm_jax.errors import UserError
from lfm_jax.evaluate import frechet_of, metric_name
from lfm_jax.flow import SOLVERS
from lfm_jax.jobs import build
from lfm_jax.jobs.generate import Generator
from lfm_jax.jobs.judge import Look, judge, of_array, of_source, spread
from lfm_jax.jobs.sample_options import sample_labels
from lfm_jax.jobs.watch import write_curve
from lfm_jax.workdir import Workdir


def curve(
    config: ConfigDict, workdir: Workdir, params: Any, settings: list[dict[str, Any]]
) -> dict[str, Any]:
    """The Frechet distance of samples from the same noises, a row a solver's setting."""
    section = config.diagnose
    extractor, _ = judge(config, workdir)
    look = Look(extractor=extractor)
    test = build.images(config, "test")
    held_out = spread(len(test), min(config.evaluate.num_real, len(test)))
    real = look(of_source(test, held_out), len(held_out), "held-out real")
    generator = Generator.from_config(config, workdir)
    params = jax.device_put(params, sharding.state_sharding(params, generator.mesh))
    labels = sample_labels(config)
    name, rows, points = metric_name(real), [], {}
    # Times are of one number of steps; settings of others take a grid that any number has.
    grid = generator.solver["grid"] if isinstance(generator.solver["grid"], str) else "uniform"
    for setting in settings:
        one = dataclasses.replace(generator, solver=generator.solver | {"grid": grid} | setting)
        images, stats = one.first(
            params, section.curve_samples, batch_size=config.sample.batch_size, labels=labels
        )
        fake = look(of_array(images), len(images), _told(setting))
        value = frechet_of(fake.statistics, real.statistics)
        rows.append({"setting": _told(setting), **stats, name: value})
        points.setdefault(setting["solver"], []).append([stats["nfe"], value])
    if sharding.is_main_process():
        for solver, line in points.items():
            write_curve(workdir, f"{name} ({solver}) over NFE", sorted(line))
    return {
        "curve": rows,
        "metric": name,
        "curve_samples": section.curve_samples,
        "num_real": len(held_out),
        "guidance": config.sample.guidance,
    }


def setting_of(text: str) -> dict[str, Any]:
    """``solver:steps`` or, with a number below 1, ``solver:tolerance``."""
    name, _, number = text.partition(":")
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    adaptive = 0 < value < 1
    if name not in SOLVERS or not (adaptive or (value >= 1 and value == int(value))):
        raise UserError(
            f"--config.diagnose.curve={text}: expected a solver and its steps or tolerance, like "
            f"heun:8 or dopri5:1e-3; solvers are {', '.join(SOLVERS)}"
        )
    if adaptive and not SOLVERS[name].adaptive:
        raise UserError(
            f"--config.diagnose.curve={text}: {name} has no error estimate; expected its steps"
        )
    tolerance = value if adaptive else None
    steps = 1 if adaptive else int(value)
    return {"solver": name, "num_steps": steps, "rtol": tolerance, "atol": tolerance}


def _told(setting: dict[str, Any]) -> str:
    how = f"rtol {setting['rtol']:g}" if setting["rtol"] else f"{setting['num_steps']} steps"
    return f"{setting['solver']}, {how}"
