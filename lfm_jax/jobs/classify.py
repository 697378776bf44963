"""Train the classifier of noisy latents whose gradient guides sampling."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lfm_jax import checkpoints, rng, sharding
from lfm_jax.config import to_json
from lfm_jax.data import open_cache
from lfm_jax.errors import UserError
from lfm_jax.features.noisy import NoisyClassifier
from lfm_jax.flow import draw_latents, interpolate, noisy_classifier_loss
from lfm_jax.jobs import build
from lfm_jax.jobs.fit import fit
from lfm_jax.jobs.judge import spread
from lfm_jax.models import count_params
from lfm_jax.optim import adamw, learning_rate
from lfm_jax.state import create_state, make_step
from lfm_jax.vae import from_uint8
from lfm_jax.workdir import Workdir

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # at which its accuracy is told
_HELD_OUT = 1000


def inputs(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    cache = open_cache(workdir.latents("train"))
    section = build.section(config, "classifier")
    for key in ("log_every", "save_every"):
        del section["classifier"][key]
    return {"cache": cache.fingerprint, "seed": config.seed, **section}


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    section = config.classifier
    model = network(config)
    mesh = build.mesh(config)
    sharding.check_batch(mesh, "classifier.batch_size", section.batch_size)
    codec = build.codec(config, workdir)
    cache = open_cache(workdir.latents("train"), encoder=codec.fingerprint)
    if not cache.num_classes_seen:
        raise UserError(f"{workdir.latents('train')}: its latents have no labels to learn from")
    key = jax.random.key(config.seed)
    shape = (1, *cache.latent_shape)
    rate = learning_rate(
        section.learning_rate,
        steps=section.steps,
        warmup_steps=section.warmup_steps,
        schedule="cosine",
    )
    tx = adamw(rate, weight_decay=section.weight_decay, grad_clip=1.0)
    state = create_state(
        lambda: model.init(key, jnp.zeros(shape), jnp.zeros(1))["params"], tx, mesh, ema=True
    )
    loss = noisy_classifier_loss(
        model, scale=codec.scale, shift=codec.shift, mirror=config.train.mirror
    )
    state, figures = fit(
        "classifier",
        state,
        make_step(loss, tx, key, ema_decay=0.999, like=state),
        build.latents(cache, config, batch_size=section.batch_size),
        folder=folder(workdir),
        logs=workdir.logs,
        mesh=mesh,
        steps=section.steps,
        batch_size=section.batch_size,
        record={
            "cache": cache.fingerprint,
            "seed": config.seed,
            "global_batch": section.batch_size,
        },
        config=to_json(config),
        log_every=section.log_every,
        save_every=section.save_every,
    )
    params = sharding.fetch(state.best_params)
    return {
        **figures,
        "parameters": count_params(params),
        "accuracy_over_t": _accuracies(config, codec, model, params, key),
        "checkpoint": checkpoints.fingerprint(params),
    }


def network(config: ConfigDict) -> NoisyClassifier:
    """The untrained classifier.

    Raises:
        UserError: a config without classes.
    """
    if not config.data.num_classes:
        raise UserError("--config.data.num_classes=0: a classifier needs classes; expected > 0")
    section = config.classifier
    return NoisyClassifier(
        num_classes=config.data.num_classes, width=section.width, blocks=section.blocks
    )


def folder(workdir: Workdir) -> Any:
    """Where its checkpoints lie."""
    return workdir.root / "classifier" / "checkpoints"


def _accuracies(
    config: ConfigDict, codec: Any, model: NoisyClassifier, params: Any, key: Any
) -> dict[str, float]:
    """Share of held-out images whose noisy latent it recognises, by time."""
    test = build.images(config, "test")
    found = test.batch(spread(len(test), min(_HELD_OUT, len(test))))
    rows = jnp.arange(len(found["image"]), dtype=jnp.uint32)

    @jax.jit
    def predict(codec, params, pixels, t):
        batch = {"moments": codec.encode_moments(from_uint8(pixels)), "position": rows}
        x0 = draw_latents(batch, key, scale=codec.scale, shift=codec.shift)
        noise = rng.normal(rng.stream_keys(key, rng.Stream.NOISE, rows), x0.shape[1:])
        times = jnp.full(rows.shape, t)
        logits = model.apply({"params": params}, interpolate(x0, noise, times), times)
        return cast(jax.Array, logits).argmax(-1)

    return {
        f"{t:g}": float(
            np.mean(np.asarray(predict(codec, params, found["image"], t)) == found["label"])
        )
        for t in TIMES
    }
