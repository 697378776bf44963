"""Train a KL autoencoder on the images, then measure what scales its latents to unit size.

Pixels and a light KL are enough for small images. For photographs latent diffusion adds LPIPS
(`perceptual_weight`, with VGG's weights from a file) and a patch discriminator
(`adversarial_weight`), which is trained in the same state and left out of the codec.

The scale is ``1 / std`` and the shift the mean of posterior samples over the train split, so that
``(z - shift) * scale`` meets the flow's standard normal at the same size.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from lfm_jax import sharding
from lfm_jax.config import to_json
from lfm_jax.data import image_batches
from lfm_jax.errors import UserError
from lfm_jax.jobs import build, takeover
from lfm_jax.jobs.fit import fit
from lfm_jax.models import count_params
from lfm_jax.optim import adamw, learning_rate
from lfm_jax.state import create_state, make_step
from lfm_jax.vae import (
    AutoencoderKL,
    PatchDiscriminator,
    adversarial_loss,
    autoencoder_loss,
    from_uint8,
    load_lpips,
    lpips,
    make_codec,
    measure_scale,
)
from lfm_jax.workdir import Workdir

_SMALLEST_JUDGED = 32  # pixels a side; patches are 70x70 where they fit
_SCALE_IMAGES = 4096  # enough for the standard deviation to 1 %


def inputs(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    source = build.images(config, "train")
    sections = build.section(config, "seed", "autoencoder")
    return {"images": source.fingerprint, **sections, **takeover.told(config)}


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    section = config.autoencoder
    if section.kind != "train":
        raise UserError(
            f"--job=autoencode with --config.autoencoder.kind={section.kind}: expected kind=train"
        )
    if (other := takeover.origin(config)) is not None:
        return takeover.take_autoencoder(config, workdir, other)
    if (folder := takeover.release(config)) is not None:
        return takeover.take_released(config, workdir, folder)
    if config.mesh.tensor > 1:
        raise UserError(
            f"--config.mesh.tensor={config.mesh.tensor} with --job=autoencode: expected 1; "
            "convolutions are not shared out (mesh.fsdp shards them)"
        )
    mesh = build.mesh(config)
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
    # Clipping by a norm over both would let the discriminator's gradients shorten the other's.
    tx = adamw(rate, grad_clip=0.0 if section.adversarial_weight else 1.0)
    loss, init = _objective(section, model, jnp.zeros((1, side, side, channels)))
    state = create_state(lambda: init(key), tx, mesh, ema=section.ema_decay > 0)
    skips = config.train.nonfinite == "skip"
    step = make_step(loss, tx, key, ema_decay=section.ema_decay, skip_nonfinite=skips, like=state)

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
        skip_nonfinite=skips,
    )
    params = sharding.fetch(state.best_params)
    params = params.get("autoencoder", params)
    scale, shift = _measure_scale(model, params, source)
    return {
        **figures,
        "parameters": count_params(params),
        "latent_shift": shift,
        "latent_scale": scale,
    }


def _objective(
    section: ConfigDict, model: AutoencoderKL, example: Float[Array, "1 h w c"]
) -> tuple[Callable[..., Any], Callable[[Array], Any]]:
    """The loss, and the initial parameters as a function of a key."""
    options = {
        "kl_weight": section.kl_weight,
        "reconstruction": section.reconstruction,
        "mirror": section.mirror,
    }
    if section.perceptual_weight:
        params = load_lpips(section.vgg, section.lpips or "")
        options |= {"perceptual": lpips(params), "perceptual_weight": section.perceptual_weight}
    if not section.adversarial_weight:
        return autoencoder_loss(model, **options), lambda key: model.init(key, example)["params"]
    judge = PatchDiscriminator()
    if min(example.shape[1:3]) < _SMALLEST_JUDGED:
        raise UserError(
            f"--config.autoencoder.adversarial_weight={section.adversarial_weight:g}: the "
            f"discriminator's patches do not fit into data.image_size={example.shape[1]}; "
            f"expected at least {_SMALLEST_JUDGED} pixels"
        )

    def init(key: Array) -> dict[str, Any]:
        first, second = jax.random.split(key)
        coder, critic = model.init(first, example), judge.init(second, example)
        return {"autoencoder": coder["params"], "discriminator": critic["params"]}

    loss = adversarial_loss(
        model,
        judge,
        start_step=section.adversarial_start,
        weight=section.adversarial_weight,
        **options,
    )
    return loss, init


def _measure_scale(model: Any, params: Any, source: Any) -> tuple[float, float]:
    """Scale and shift over evenly spaced images."""
    count = min(_SCALE_IMAGES, len(source))
    indices = np.linspace(0, len(source) - 1, count).astype(int)
    encode = jax.jit(lambda codec, images: codec.encode_moments(images))
    codec = make_codec(model, params)
    moments = [
        np.asarray(encode(codec, from_uint8(source.batch(chunk)["image"])))
        for chunk in np.array_split(indices, max(1, count // 256))
    ]
    return measure_scale(np.concatenate(moments))
