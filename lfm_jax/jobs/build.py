"""From config to objects: the images, the codec, the network and its optimizer.

Every job that needs one of them gets it here, so that two jobs cannot build different ones.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lfm_jax import checkpoints, sharding
from lfm_jax.config import overrides, to_json
from lfm_jax.data import ImageSource, LatentCache, latent_batches, open_images
from lfm_jax.data.images import PADDED
from lfm_jax.errors import UserError
from lfm_jax.flow import GRIDS
from lfm_jax.models import create_model
from lfm_jax.optim import adamw, learning_rate
from lfm_jax.vae import AutoencoderKL, Codec, identity_codec, load_vae, make_codec
from lfm_jax.workdir import Workdir


def image_options(config: ConfigDict, split: str) -> dict[str, Any]:
    """What `open_images` is called with for a split."""
    data = config.data
    return {
        "source": data.source,
        "split": split,
        "path": data.path or "",
        "image_size": data.image_size,
        "channels": data.channels,
        "num_classes": data.num_classes,
        "fit": data.fit or "",
        "labels": data.labels or "",
        "limit": data.limit,
    }


def images(config: ConfigDict, split: str) -> ImageSource:
    """The images of a split, checked against the config's class count."""
    data = config.data
    source = open_images(**image_options(config, split))
    if not data.class_names:
        return source
    if len(data.class_names) != source.num_classes:
        raise UserError(
            f"--config.data.class_names={tuple(data.class_names)}: {len(data.class_names)} names; "
            f"expected one for each of the {source.num_classes} classes of {source.name}"
        )
    return dataclasses.replace(source, class_names=tuple(data.class_names))


def crop(config: ConfigDict) -> str:
    """In words, how the images came to their size: for the metadata of what is made of them."""
    data, kind = config.data, config.data.source.partition(":")[0]
    if not data.image_size or kind == "synthetic":
        return "none"
    fit = data.fit or ("pad" if kind in PADDED else "crop")
    how = {"crop": "ADM's centre crop", "pad": "zeros around"}[fit]
    return f"{how} to {data.image_size}"


def autoencoder(config: ConfigDict) -> AutoencoderKL:
    """The untrained autoencoder that `config.autoencoder` describes."""
    section = config.autoencoder
    model = AutoencoderKL(
        in_channels=config.data.channels,
        out_channels=config.data.channels,
        block_out_channels=tuple(section.block_out_channels),
        layers_per_block=section.layers_per_block,
        latent_channels=section.latent_channels,
        norm_groups=section.norm_groups,
        mid_attention=section.mid_attention,
    )
    if config.data.image_size % model.factor:
        raise UserError(
            f"--config.data.image_size={config.data.image_size}: expected a multiple of the "
            f"autoencoder's factor {model.factor}"
        )
    return model


def codec(config: ConfigDict, workdir: Workdir) -> Codec:
    """The codec between images and scaled latents: trained here, loaded, or the identity."""
    section = config.autoencoder
    if section.kind == "identity":
        return identity_codec(config.data.channels)
    decoding = {
        "decode_dtype": section.decode_dtype,
        "slice_size": section.decode_slice * jax.device_count(),
    }
    if section.kind == "pretrained":
        model, params = load_vae(
            section.weights,
            family=section.family or "",
            revision=section.revision or "",
            sha256=section.sha256 or "",
        )
        return make_codec(model, params, **decoding)
    result = workdir.require_result("autoencode")
    params = checkpoints.load_params(workdir.autoencoder / "checkpoints")
    # Beside a discriminator that it was trained against, it is one of two.
    params = params.get("autoencoder", params)
    scale, shift = result["latent_scale"], result["latent_shift"]
    return make_codec(autoencoder(config), params, scale=scale, shift=shift, **decoding)


def preview_codec(config: ConfigDict, codec: Codec) -> Codec:
    """What decodes pictures on the way: the tiny autoencoder of `autoencoder.preview`, if told.

    Raises:
        UserError: one for other latents.
    """
    name = config.autoencoder.preview
    if name is None:
        return codec
    tiny = make_codec(*load_vae(name))
    if (tiny.factor, tiny.latent_channels) != (codec.factor, codec.latent_channels):
        raise UserError(
            f"--config.autoencoder.preview={name}: for latents of {tiny.latent_channels} channels "
            f"at 1/{tiny.factor}; expected {codec.latent_channels} at 1/{codec.factor}"
        )
    return tiny


def latent_shape(config: ConfigDict, codec: Codec) -> tuple[int, int, int]:
    """(h, w, c) of the latents of this config's images.

    Raises:
        UserError: images that the autoencoder cannot halve often enough.
    """
    if config.data.image_size % codec.factor:
        raise UserError(
            f"--config.data.image_size={config.data.image_size}: expected a multiple of the "
            f"autoencoder's factor {codec.factor}"
        )
    side = config.data.image_size // codec.factor
    return side, side, codec.latent_channels


def mesh(config: ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that `config.mesh` describes, over all devices unless told which."""
    section = config.mesh
    return sharding.make_mesh(section.data, section.fsdp, section.tensor, devices=devices)


def network(config: ConfigDict) -> nn.Module:
    """The velocity network."""
    fields = overrides(config.model)
    return create_model(fields.pop("name"), num_classes=config.data.num_classes, **fields)


def grid(text: str, *, key: str) -> str | tuple[float, ...]:
    """A grid's name, or its times out of a list such as "1,0.6,0".

    Raises:
        UserError: neither; it names `key`, the field that holds the text.
    """
    if text in GRIDS:
        return text
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(
            f"--config.{key}={text}: expected one of {', '.join(GRIDS)}, or falling times "
            "such as 1,0.6,0.3,0"
        ) from error


def latents(
    cache: LatentCache, config: ConfigDict, *, batch_size: int
) -> Callable[[int], Iterator[dict[str, Any]]]:
    """What `fit` draws from: this process's share of the training stream from a step on."""
    return lambda start: latent_batches(
        cache,
        global_batch=batch_size,
        seed=config.seed,
        start=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        in_memory=config.train.in_memory,
    )


def optimizer(section: ConfigDict) -> optax.GradientTransformation:
    """AdamW as `config.train` says."""
    rate = learning_rate(
        section.learning_rate,
        steps=section.steps,
        warmup_steps=section.warmup_steps,
        schedule=section.schedule,
        final=section.learning_rate_final,
    )
    return adamw(
        rate,
        b1=section.b1,
        b2=section.b2,
        weight_decay=section.weight_decay,
        grad_clip=section.grad_clip,
    )


def loop(config: ConfigDict) -> dict[str, Any]:
    """Length, logs and saves of the training loop as `config.train` says; arguments of `fit`."""
    section = config.train
    return {
        "steps": section.steps,
        "batch_size": section.batch_size,
        "config": to_json(config),
        "log_every": section.log_every,
        "save_every": section.save_every,
        "keep": section.keep,
        "keep_every": section.keep_every,
        "keep_best": section.keep_best,
        "skip_nonfinite": section.nonfinite == "skip",
        "profile_steps": tuple(section.profile_steps),
    }


def section(config: ConfigDict, *names: str) -> dict[str, Any]:
    """Sections of the config as JSON, for a job's `inputs`.

    Unset fields are left out, so that a new optional field does not make finished jobs look undone.
    """
    full = to_json(config)
    return {name: _without_unset(full[name]) for name in names}


def _without_unset(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_unset(item) for key, item in value.items() if item is not None}
