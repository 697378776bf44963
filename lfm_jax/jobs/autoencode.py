"""Train a small KL autoencoder on the images, then measure what scales its latents to unit size.

The scale is ``1 / std`` and the shift the mean of posterior samples over the train split, so that
``(z - shift) * scale`` meets the flow's standard normal at the same size.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lfm_jax import checkpoints, sharding
from lfm_jax.config import to_json
from lfm_jax.data import image_batches
from lfm_jax.errors import UserError
from lfm_jax.jobs import build
from lfm_jax.jobs.fit import fit
from lfm_jax.optim import adamw, learning_rate
from lfm_jax.state import create_state, make_step
from lfm_jax.vae import autoencoder_loss, from_uint8, make_codec, measure_scale
from lfm_jax.workdir import Workdir

_SCALE_IMAGES = 4096  # enough for the standard deviation to 1 %


def inputs(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    source = build.images(config, "train")
    return {"images": source.fingerprint, **build.section(config, "seed", "autoencoder")}


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    section = config.autoencoder
    if section.kind != "train":
        raise UserError(
            f"--job=autoencode with --config.autoencoder.kind={section.kind}: expected kind=train"
        )
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    sharding.check_batch(mesh, "autoencoder.batch_size", section.batch_size)
    source = build.images(config, "train")
    model = build.autoencoder(config)
    side, channels = config.data.image_size, config.data.channels

    key = jax.random.key(config.seed)
    rate = learning_rate(
        section.learning_rate,
        steps=section.steps,
        warmup_steps=section.warmup_steps,
        schedule="cosine",
    )
    tx = adamw(rate, grad_clip=1.0)
    loss = autoencoder_loss(
        model,
        kl_weight=section.kl_weight,
        reconstruction=section.reconstruction,
        mirror=section.mirror,
    )
    example = jnp.zeros((1, side, side, channels))
    state = create_state(
        lambda: model.init(key, example)["params"], tx, mesh, ema=section.ema_decay > 0
    )
    step = make_step(loss, tx, key, ema_decay=section.ema_decay)

    state, figures = fit(
        "autoencode",
        state,
        step,
        lambda start: image_batches(
            source,
            global_batch=section.batch_size,
            seed=config.seed,
            start=start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        ),
        folder=workdir.autoencoder / "checkpoints",
        logs=workdir.logs,
        mesh=mesh,
        steps=section.steps,
        batch_size=section.batch_size,
        record={
            "images": source.fingerprint,
            "seed": config.seed,
            "global_batch": section.batch_size,
        },
        config=to_json(config),
        log_every=config.train.log_every,
        save_every=config.train.save_every,
    )
    params = checkpoints.load_params(workdir.autoencoder / "checkpoints")
    scale, shift = _measure_scale(model, params, source)
    return {
        **figures,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "latent_shift": shift,
        "latent_scale": scale,
    }


def _measure_scale(model: Any, params: Any, source: Any) -> tuple[float, float]:
    """Scale and shift over evenly spaced images."""
    count = min(_SCALE_IMAGES, len(source))
    indices = np.linspace(0, len(source) - 1, count).astype(int)
    encode = jax.jit(make_codec(model, params).encode_moments)
    moments = [
        np.asarray(encode(from_uint8(source.batch(chunk)["image"])))
        for chunk in np.array_split(indices, max(1, count // 256))
    ]
    return measure_scale(np.concatenate(moments))
