"""From config to feature spaces: the networks, the rows of real examples, the kernels.

Networks that are trained here (``pixels``, ``latents``) and the feature bank lie in one folder,
the workdir's ``features/`` or ``config.mmd.networks``: several finetunings share it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from lfm_jax import checkpoints, mmd, rng, sharding
from lfm_jax.config import content_hash
from lfm_jax.data import ImageSource, LatentCache
from lfm_jax.errors import UserError
from lfm_jax.evaluate import FeatureStatistics
from lfm_jax.features import PUBLISHED, open_extractor
from lfm_jax.flow import NetworkVelocity, classifier_free, draw_latents, make_grid, sample
from lfm_jax.jobs import build
from lfm_jax.models import Cond
from lfm_jax.models.macs import traced_macs
from lfm_jax.vae import Codec
from lfm_jax.workdir import Workdir

FEATURES = ("pixels", "latents", "tokens", "raw", "random", *PUBLISHED)
REAL = ("bank", "batch", "mean", "nystrom")
TARGETS = ("images", "latents", "teacher")
_BATCH = 250
_VALIDATION_SEED = 97  # of the network that chooses the snapshot: none of those trained on
_PIXELS = {"width": 24, "levels": 3, "stem": 2, "hidden": 128}
_LATENTS = {"width": 64, "levels": 2, "stem": 1, "hidden": 128}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge:
    """What scores snapshots: a feature map, labels to generate, and the real rows' statistics."""

    map: Any
    labels: np.ndarray
    statistics: FeatureStatistics
    spread: float


# ---- the networks


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
        UserError: an unknown feature, or a network that does not take these images.
    """
    options, data = config.mmd, config.data
    maps, notes = [], {}
    train = functools.partial(_network, config, workdir, codec, cache)
    for name in options.features:
        if name in ("pixels", "latents"):
            for seed in options.network_seeds:
                network, weights, notes[f"{name}-{seed}"] = train(name, seed)
                maps.append(_trained_map(config, codec, name, seed, network, weights))
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
        elif name in PUBLISHED:
            extractor = open_extractor(name, weights=options.weights_file or "")
            maps.append(mmd.Decoded(codec=codec, extractor=extractor, name=name))
        else:
            raise UserError(f"--config.mmd.features={name}: expected some of {', '.join(FEATURES)}")
    for feature_map in maps:
        if isinstance(feature_map, mmd.Decoded):
            feature_map.check(data.image_size, data.channels)
    if not maps:
        raise UserError(f"--config.mmd.features is empty: expected some of {', '.join(FEATURES)}")
    return maps, _judge(config, codec, cache, train, notes), notes


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


def _network(config, workdir, codec, cache, name, seed, sizes=None):
    """A trained `MapEncoder`, from its file where that is of the same making."""
    options = config.mmd
    classes = config.data.num_classes
    sizes = sizes or (_PIXELS if name == "pixels" else _LATENTS)
    made_of = {
        "cache": cache.fingerprint,
        "seed": seed,
        "steps": options.network_steps,
        "objective": options.network_objective if classes else "mask",
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
        seed=seed,
        steps=options.network_steps,
        progress=sharding.is_main_process(),
        **sizes,
    )
    if sharding.is_main_process():
        mmd.save_encoder(path, network, weights, **made_of, loss=loss)
    return network, weights, loss


def networks_folder(config: ConfigDict, workdir: Workdir) -> epath.Path:
    """Where trained feature networks and the bank lie."""
    return epath.Path(config.mmd.networks) if config.mmd.networks else workdir.root / "features"


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
    base = _PIXELS if name == "pixels" else _LATENTS
    sizes = {**base, "width": base["width"] - 8, "hidden": 96}
    network, weights, notes[f"validation {name}"] = train(name, _VALIDATION_SEED, sizes)
    feature_map = _trained_map(config, codec, name, _VALIDATION_SEED, network, weights)
    feature_map = feature_map.replace(entries=("features",))
    count = min(4 * config.mmd.validate_samples, max(len(cache) // 4, 2))
    # The last rows of a fixed shuffle; `real_bank` takes the first.
    chosen = _order(cache)[-count:]
    rows, labels = _rows(config, codec, cache, [feature_map], chosen, None)
    values = next(iter(rows.values()))
    statistics = FeatureStatistics.of(values)
    spread = float(np.sqrt(np.square(values - values.mean(0)).sum(1).mean()))
    wanted = -(-config.mmd.validate_samples // _BATCH) * _BATCH
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


# ---- real rows


def real_bank(
    config: ConfigDict,
    workdir: Workdir,
    codec: Codec,
    cache: LatentCache,
    maps: Sequence[Any],
    model: Any,
    params: Any,
) -> mmd.Bank:
    """Feature rows of ``bank_size`` real (or teacher) examples, from their file where it fits."""
    options = config.mmd
    made_of = {
        "cache": cache.fingerprint,
        "size": options.bank_size,
        "target": options.target,
        "maps": [_identity(feature_map) for feature_map in maps],
        "image_size": config.data.image_size,
        "by_class": bool(options.groups),
        "seed": config.seed,
    }
    teacher = None
    if options.target == "teacher":
        made_of["teacher"] = [
            checkpoints.fingerprint(jax.tree.map(np.asarray, params)),
            options.teacher_steps,
            options.teacher_guidance,
        ]
        teacher = _teacher(config, model, params, cache.latent_shape)
    name = f"bank-{content_hash(made_of)[:12]}.npz"
    path = networks_folder(config, workdir) / name
    bank = mmd.load_bank(path, made_of)
    if bank is not None:
        return bank
    chosen = _order(cache)[: min(options.bank_size, max(len(cache) * 3 // 4, 2))]
    rows, labels = _rows(config, codec, cache, maps, chosen, teacher)
    bank = mmd.make_bank(rows, labels, num_classes=config.data.num_classes if options.groups else 0)
    if sharding.is_main_process():
        mmd.save_bank(path, bank, made_of)
    return bank


def _order(cache: LatentCache) -> np.ndarray:
    return np.random.default_rng(12345).permutation(len(cache))


def _identity(feature_map: Any) -> str:
    """What a map's rows depend on."""
    leaves = jax.tree.map(np.asarray, feature_map)
    static = [feature_map.name, str(getattr(feature_map, "entries", ""))]
    return f"{static} {checkpoints.fingerprint(jax.tree.leaves(leaves))}"


def _teacher(config: ConfigDict, model: Any, params: Any, shape: tuple) -> Callable:
    """``(positions, labels) -> latents`` of the base network with many steps and guidance."""
    options, classes = config.mmd, config.data.num_classes

    @jax.jit
    def draw(params, positions, labels):
        keys = rng.stream_keys(jax.random.key(config.seed + 2), rng.Stream.SAMPLE, positions)
        cond = Cond(label=labels) if classes else None
        velocity = NetworkVelocity(params=params, model=model, cond=cond, t_max=model.t_max)
        if classes:
            velocity = classifier_free(
                velocity, num_classes=classes, scale=options.teacher_guidance
            )
        return sample(velocity, rng.normal(keys, shape), num_steps=options.teacher_steps)[0]

    return lambda positions, labels: draw(params, positions, labels)


def _rows(config, codec, cache, maps, chosen, teacher) -> tuple[dict, np.ndarray]:
    """Rows of all `maps` on the examples `chosen`, and their labels."""
    classes = config.data.num_classes
    use_images = config.mmd.target == "images" and any(isinstance(m, mmd.Decoded) for m in maps)
    source: ImageSource | None = build.images(config, "train") if use_images else None

    @jax.jit
    def latents_of(moments, index):
        return draw_latents(
            {"moments": moments, "position": index},
            jax.random.key(config.seed + 3),
            scale=codec.scale,
            shift=codec.shift,
        )

    @jax.jit
    def embed(maps, latents, labels, index, images):
        keys = rng.stream_keys(jax.random.key(config.seed + 4), rng.Stream.MMD, index)
        return mmd.all_features(maps, latents, labels if classes else None, keys, images)

    parts, labels = [], []
    chosen = np.resize(chosen, -(-len(chosen) // _BATCH) * _BATCH)
    for start in tqdm(
        range(0, len(chosen), _BATCH),
        desc="real features",
        unit="batch",
        disable=not sharding.is_main_process(),
    ):
        at = np.sort(chosen[start : start + _BATCH])
        batch = cache.read(at)
        label = batch["label"].astype(np.int32)
        shown = np.where(label < 0, classes, label)
        index = jnp.asarray(at, jnp.uint32)
        if teacher is None:
            drawn = latents_of(jnp.asarray(batch["moments"]), index)
        else:
            drawn = teacher(index, jnp.asarray(shown))
        images = None
        if source is not None:
            images = jnp.asarray(source.batch(batch["index"])["image"])
        found = embed(list(maps), drawn, jnp.asarray(shown), index, images)
        parts.append({name: np.asarray(rows) for name, rows in found.items()})
        labels.append(label)
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return rows, np.concatenate(labels)


def feature_spaces(config: ConfigDict, bank: mmd.Bank) -> dict[str, mmd.Space]:
    """A standardised space with its kernel for each of the bank's entries.

    Raises:
        UserError: weights that are not one a space.
    """
    options, names = config.mmd, list(bank.rows)
    if options.weights and len(options.weights) != len(names):
        raise UserError(
            f"--config.mmd.weights={tuple(options.weights)}: expected one for each of the "
            f"{len(names)} feature spaces {', '.join(names)}"
        )
    spaces = {}
    for name, weight in zip(names, options.weights or (1.0,) * len(names), strict=True):
        space = mmd.make_space(
            bank.rows[name],
            kernel=options.kernel,
            bandwidth=options.bandwidth,
            factors=tuple(options.factors),
            joint=options.joint if config.data.num_classes else 0.0,
            num_classes=config.data.num_classes,
            weight=weight,
        )
        rows = space.rows(bank.rows[name], bank.labels)
        if options.real == "mean":
            space = space.replace(attraction=mmd.mean_row(rows))
        elif options.real == "nystrom":
            key = jax.random.key(config.seed + 5)
            landmarks = min(options.landmarks, len(rows))
            space = space.replace(attraction=mmd.nystrom(rows, space.kernel, landmarks, key))
        spaces[name] = space
    return spaces


def grid_times(config: ConfigDict, model: Any) -> np.ndarray:
    """The falling times of the config's N steps."""
    options = config.mmd
    times = make_grid(
        build.grid(options.grid, key="mmd.grid"), options.num_steps, t_max=model.t_max
    )
    if len(times) != options.num_steps + 1:
        raise UserError(
            f"--config.mmd.grid={options.grid}: {len(times) - 1} steps; expected "
            f"mmd.num_steps={options.num_steps}"
        )
    return times


def feature_macs(maps: Sequence[Any], latent_shape: tuple[int, int, int], classes: int) -> int:
    """Multiply-adds of all maps for one sample, decoding included."""
    latents = jax.ShapeDtypeStruct((1, *latent_shape), jnp.float32)

    def features(latents):
        labels = jnp.zeros(1, jnp.int32) if classes else None
        keys = jax.vmap(jax.random.key)(jnp.zeros(1, jnp.uint32))
        return mmd.all_features(maps, latents, labels, keys)

    return traced_macs(features, latents)
