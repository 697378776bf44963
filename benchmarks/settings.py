"""One solver setting of a trained run, sampled and judged: what the sweeps make their rows of."""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from lfm_jax.evaluate import FeatureSet, frechet_of
from lfm_jax.jobs.generate import Generator
from lfm_jax.jobs.judge import Look, of_array
from lfm_jax.workdir import Workdir

_BATCH = 250


def judged(
    config: ConfigDict,
    workdir: Workdir,
    params: Any,
    look: Look,
    real: FeatureSet,
    count: int,
    *,
    solver: str,
    number: float,
    name: str,
) -> tuple[dict[str, float], np.ndarray]:
    """Cost, FD and class accuracy of `count` samples, all classes in turn; and the samples.

    Every setting starts from the same noises.

    Args:
        config: its `sample` section is changed.
        number: steps or, below 1, the tolerance.
        name: what the progress bar says.
    """
    config.sample.solver = solver
    config.sample.num_steps = int(max(number, 1))
    config.sample.rtol = config.sample.atol = number if number < 1 else None
    labels = (np.arange(count) % config.data.num_classes).astype(np.int32)
    generator = Generator.from_config(config, workdir)
    images, counts = generator.first(params, count, batch_size=_BATCH, labels=labels)
    features = look(of_array(images), count, name)
    fd = frechet_of(features.statistics, real.statistics)
    accuracy = float((features.logits.argmax(-1) == labels).mean())
    return {**counts, "fd": fd, "accuracy": accuracy}, images
