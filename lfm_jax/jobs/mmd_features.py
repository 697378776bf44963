"""From config to feature maps: the networks that the loss looks through, and the snapshots' judge.

Networks that are trained here (``pixels``, ``latents``) and the feature bank lie in one folder,
the workdir's ``features/`` or ``config.mmd.networks``: several finetunings share it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lfm_jax import mmd, sharding
from lfm_jax.data import LatentCache
from lfm_jax.errors import UserError
from lfm_jax.evaluate import FeatureStatistics
from lfm_jax.features import PUBLISHED, Extractor, open_extractor
from lfm_jax.jobs import build
from lfm_jax.jobs.mmd_bank import BATCH, feature_rows, networks_folder, shuffled
from lfm_jax.vae import Codec
from lfm_jax.workdir import Workdir

FEATURES = ("pixels", "latents", "tokens", "raw", "random", *PUBLISHED)
_VALIDATION_SEED = 97  # of the network that chooses the snapshot: none of those trained on
# The seeds take turns at these: what one shape is blind to (a stem of stride 2 is, to grain), the
# other sees.
SHAPES = {
    "pixels": (
        {"width": 16, "levels": 3, "stem": 1, "hidden": 128},
        {"width": 24, "levels": 3, "stem": 2, "hidden": 128},
        {"width": 12, "levels": 3, "stem": 1, "hidden": 128, "plain": True},
    ),
    "latents": ({"width": 64, "levels": 2, "stem": 1, "hidden": 128},),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge:
    """What scores snapshots: a feature map, labels to generate, and the real rows' statistics."""

    map: Any
    labels: np.ndarray
    statistics: FeatureStatistics
    spread: float


# ---- the networks


def check_names(features: Sequence[str]) -> None:
    """Raises a `UserError` unless `features` are some of `FEATURES`."""
    for name in features:
        if name not in FEATURES:
            raise UserError(f"--config.mmd.features={name}: expected some of {', '.join(FEATURES)}")
    if not features:
        raise UserError(f"--config.mmd.features is empty: expected some of {', '.join(FEATURES)}")


def feature_maps(
    config: ConfigDict,
    workdir: Workdir,
    codec: Codec,
    cache: LatentCache,
    model: Any,
    params: Any,
) -> tuple[list, Judge, dict[str, Any]]:
    """The maps that the loss sees, the judge of snapshots, and how the trained networks did.

    Raises:
        UserError: a network that does not take these images.
    """
    options, data = config.mmd, config.data
    # The judge sees what sampling will show: whole decodings, whatever the loss looks through.
    decoder = build.preview_codec(config, codec) if options.decoder == "preview" else codec
    maps, notes = [], {}
    train = functools.partial(_network, config, workdir, codec, cache)
    for name in options.features:
        if name in ("pixels", "latents"):
            shapes = SHAPES[name]
            for i, seed in enumerate(options.network_seeds):
                sizes = shapes[i % len(shapes)]
                network, weights, notes[f"{name}-{seed}"] = train(name, seed, sizes)
                maps.append(_trained_map(config, decoder, name, seed, network, weights))
        elif name == "tokens":
            maps.append(
                mmd.BackboneTokens(
                    params=params,
                    model=model,
                    times=tuple(options.token_times),
                    taps=(mmd.middle_tap(model),),
                )
            )
        elif name == "raw":
            maps.append(mmd.RawLatents())
        elif name == "random":
            maps.append(mmd.random_maps(jax.random.key(config.seed), codec.latent_channels))
        else:
            extractor = to_differentiate(open_extractor(name, weights=options.weights_file or ""))
            maps.append(mmd.Decoded(codec=decoder, extractor=extractor, name=name))
    for feature_map in maps:
        if isinstance(feature_map, mmd.Decoded):
            feature_map.check(data.image_size, data.channels)
    return maps, _judge(config, codec, cache, train, notes), notes


def to_differentiate(extractor: Extractor) -> Extractor:
    """A published extractor behind a resize rule that is antialiased and not clipped.

    The rules that they are judged by are not made for gradients: two taps (``tf1``, ``torch``) pass
    by every pixel between them when an image shrinks, and what ``clean`` clips has no slope.
    """
    if extractor.resize == "none":
        return extractor
    return dataclasses.replace(extractor, resize="bicubic")


def _trained_map(config, codec, name, seed, network, weights):
    entries = tuple(config.mmd.entries)
    if name == "latents":
        return mmd.LatentMaps(
            params=weights, model=network, entries=entries, name=f"latents-{seed}"
        )
    extractor = mmd.pixel_extractor(
        network,
        weights,
        size=config.data.image_size,
        channels=config.data.channels,
        name=f"pixels-{seed}",
    )
    return mmd.Decoded(codec=codec, extractor=extractor, entries=entries, name=f"pixels-{seed}")


def _network(config, workdir, codec, cache, name, seed, sizes):
    """A trained `FeatureEncoder`, from its file where that is of the same making."""
    options = config.mmd
    classes = config.data.num_classes
    made_of = {
        "cache": cache.fingerprint,
        "seed": seed,
        "steps": options.network_steps,
        "objective": options.network_objective if classes else "mask",
        "noise": options.network_noise,
        **sizes,
    }
    path = networks_folder(config, workdir) / f"{name}-{seed}.safetensors"
    if path.exists():
        network, weights, found = mmd.load_encoder(path)
        if {key: found.get(key) for key in made_of} == made_of:
            return network, weights, found["loss"]
    read = _read_pixels(config) if name == "pixels" else _read_latents(codec, cache)
    network, weights, loss = mmd.train_encoder(
        read,
        len(cache),
        num_classes=classes,
        objective=made_of["objective"],
        noise=options.network_noise,
        seed=seed,
        steps=options.network_steps,
        progress=sharding.is_main_process(),
        **sizes,
    )
    if sharding.is_main_process():
        mmd.save_encoder(path, network, weights, **made_of, loss=loss)
    return network, weights, loss


def _read_pixels(config: ConfigDict) -> Callable:
    source = build.images(config, "train")

    def read(indices):
        batch = source.batch(indices)
        return {
            "x": np.asarray(batch["image"], np.float32) / 127.5 - 1,
            "label": np.asarray(batch["label"], np.int32),
        }

    return read


def _read_latents(codec: Codec, cache: LatentCache) -> Callable:
    def read(indices):
        batch = cache.read(indices)
        mean, logvar = np.split(batch["moments"].astype(np.float32), 2, axis=-1)
        noise = np.random.default_rng(int(indices[0])).normal(size=mean.shape)
        drawn = mean + np.exp(0.5 * np.clip(logvar, -30, 20)) * noise
        return {
            "x": ((drawn - codec.shift) * codec.scale).astype(np.float32),
            "label": batch["label"].astype(np.int32),
        }

    return read


def _judge(config, codec, cache, train, notes) -> Judge:
    """A network of another seed and shape, on real rows that the bank leaves out."""
    name = "pixels" if {"pixels", *PUBLISHED} & set(config.mmd.features) else "latents"
    if name == "pixels" and not _has_images(config):
        name = "latents"
    base = SHAPES[name][0]
    sizes = {**base, "width": base["width"] - 4, "hidden": 96}
    network, weights, notes[f"validation {name}"] = train(name, _VALIDATION_SEED, sizes)
    feature_map = _trained_map(config, codec, name, _VALIDATION_SEED, network, weights)
    feature_map = dataclasses.replace(feature_map, entries=("features",))
    count = min(4 * config.mmd.validate_samples, max(len(cache) // 4, 2))
    chosen = shuffled(cache)[-count:]
    rows, labels = feature_rows(config, codec, cache, [feature_map], chosen, None)
    values = next(iter(rows.values()))
    statistics = FeatureStatistics.of(values)
    spread = float(np.sqrt(np.square(values - values.mean(0)).sum(1).mean()))
    wanted = -(-config.mmd.validate_samples // BATCH) * BATCH
    return Judge(
        map=feature_map,
        labels=np.resize(np.random.default_rng(0).permutation(labels), wanted),
        statistics=statistics,
        spread=spread,
    )


def _has_images(config: ConfigDict) -> bool:
    try:
        build.images(config, "train")
    except UserError:
        return False
    return True
