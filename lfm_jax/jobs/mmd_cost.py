"""What a finetuning computes, in multiply-adds by the closed form, beside its base's training."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lfm_jax import mmd
from lfm_jax.flow.solvers import get_solver
from lfm_jax.models import forward_macs
from lfm_jax.models.macs import traced_macs
from lfm_jax.workdir import Workdir


def update_macs(config: ConfigDict, model: Any, maps: list, latent_shape: tuple) -> int:
    """Multiply-adds of one update by the closed form.

    A differentiated step costs four forward passes (forward, again, and twice backward; the kept
    Euler steps three), a step before a truncation one, gradcache one more; a feature network two
    (forward, and backward to its input), one more of gradcache, and one of real examples that come
    with the batch. Validation: one of all of them a sample.
    """
    options = config.mmd
    evaluations, guided = _evaluations(options)
    steps = (options.num_steps, *options.more_steps)
    passes = []
    for count in steps:
        through = min(options.backprop_steps or count, count)
        # The last of Euler's steps are not run again.
        kept = min(options.kept_steps, through) if options.solver == "euler" else 0
        again = (options.chunks > 1) * count
        passes.append(evaluations * (count - through + 4 * through + again) - kept)
    network = guided * float(np.mean(passes)) * forward_macs(model, latent_shape)
    if options.anchor:
        network += 3 * forward_macs(model, latent_shape)
    features = _feature_macs(maps, latent_shape, config.data.num_classes)
    seen = 2 + (options.chunks > 1) + (options.real == "batch")
    return int(config.train.batch_size * (network + seen * features))


def share_of_base(
    config: ConfigDict, base: Workdir, model: Any, maps: list, latent_shape: tuple
) -> float | None:
    """Multiply-adds of updates and validation over the base training's, where that is known."""
    trained = base.result("train")
    if trained is None or "examples_drawn" not in trained:
        return None
    whole = 3 * forward_macs(model, latent_shape) * trained["examples_drawn"]
    updates = config.train.steps * update_macs(config, model, maps, latent_shape)
    options, validation = config.mmd, 0
    if options.validate_every:
        evaluations, guided = _evaluations(options)
        calls = guided * evaluations * sum((options.num_steps, *options.more_steps))
        features = _feature_macs(maps[:1], latent_shape, config.data.num_classes)
        rounds = config.train.steps // options.validate_every + 1
        network = calls * forward_macs(model, latent_shape)
        validation = rounds * options.validate_samples * (network + features)
    return (updates + validation) / whole


def _evaluations(options: ConfigDict) -> tuple[int, int]:
    """Velocities a solver step, and network calls a velocity."""
    solver = "euler" if options.solver == "ddim" else options.solver
    return get_solver(solver).evaluations, 2 if options.guidance != 1 else 1


def _feature_macs(maps: Sequence[Any], latent_shape: tuple[int, int, int], classes: int) -> int:
    """Multiply-adds of all maps for one sample, decoding included."""
    latents = jax.ShapeDtypeStruct((1, *latent_shape), jnp.float32)

    def features(latents):
        labels = jnp.zeros(1, jnp.int32) if classes else None
        keys = jax.vmap(jax.random.key)(jnp.zeros(1, jnp.uint32))
        return mmd.all_features(maps, latents, labels, keys)

    return traced_macs(features, latents)
