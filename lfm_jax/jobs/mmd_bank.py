"""Feature rows of real examples (or a teacher's), and the standardised spaces that they make."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
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
from lfm_jax.flow import NetworkVelocity, classifier_free, draw_latents, sample
from lfm_jax.jobs import build
from lfm_jax.mmd.features import shared_leaves
from lfm_jax.models import Cond
from lfm_jax.vae import Codec
from lfm_jax.workdir import Workdir

_PLAIN = (bool, int, float, str, tuple, np.dtype, type(None))
BATCH = 250  # rows a program, of real examples as of validation


def networks_folder(config: ConfigDict, workdir: Workdir) -> epath.Path:
    """Where trained feature networks and the bank lie."""
    return epath.Path(config.mmd.networks) if config.mmd.networks else workdir.root / "features"


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
        "crop": build.crop(config),
        "mirror": config.train.mirror,
        "size": options.bank_size,
        "target": options.target,
        "maps": [identity(feature_map) for feature_map in maps],
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
    chosen = shuffled(cache)[: min(options.bank_size, max(len(cache) * 3 // 4, 2))]
    rows, labels = feature_rows(config, codec, cache, maps, chosen, teacher)
    bank = mmd.make_bank(rows, labels, num_classes=config.data.num_classes if options.groups else 0)
    if sharding.is_main_process():
        mmd.save_bank(path, bank, made_of)
    return bank


def shuffled(cache: LatentCache) -> np.ndarray:
    """The examples in a fixed order: the bank takes the first, the judge of snapshots the last."""
    return np.random.default_rng(12345).permutation(len(cache))


def identity(feature_map: Any) -> str:
    """What a map's rows depend on: its arrays, and all that is said beside them."""
    leaves = jax.tree.map(np.asarray, feature_map)
    said = json.dumps(_said(feature_map), sort_keys=True)
    return f"{said} {checkpoints.fingerprint(jax.tree.leaves(leaves))}"


def _said(part: Any) -> Any:
    """The fields of a map, its codec, extractor and network that are no arrays, as JSON.

    Of those a network has only plain values: the text of a function is another in each process.
    """
    if isinstance(part, nn.Module):
        fields = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
        plain = {k: str(v) for k, v in fields.items() if isinstance(v, _PLAIN)}
        return {"network": type(part).__name__, **plain}
    if not dataclasses.is_dataclass(part):
        return str(part)
    found = {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        # How many images are decoded at a time changes none of them.
        static = not field.metadata.get("pytree_node", True) and field.name != "slice_size"
        if static or dataclasses.is_dataclass(value):
            found[field.name] = _said(value)
    return found


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


def feature_rows(
    config: ConfigDict,
    codec: Codec,
    cache: LatentCache,
    maps: Sequence[Any],
    chosen: np.ndarray,
    teacher: Callable | None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Rows ``[n, d]`` of all `maps` on the examples `chosen`, and their labels.

    `n` is filled up to whole batches. With a `teacher` the rows are of its latents in their place.
    Where training mirrors, half of the examples are mirrored here as well, by their number, images
    and latents alike.
    """
    classes, mirror = config.data.num_classes, config.train.mirror
    use_images = config.mmd.target == "images" and any(isinstance(m, mmd.Decoded) for m in maps)
    source: ImageSource | None = build.images(config, "train") if use_images else None
    arrays, maps_of = shared_leaves(maps)

    @jax.jit
    def latents_of(moments, index):
        return draw_latents(
            {**moments, "position": index},
            jax.random.key(config.seed + 3),
            scale=codec.scale,
            shift=codec.shift,
            mirror=mirror,
        )

    @jax.jit
    def mirrored(images, index):
        # The coins of `draw_latents`: an image and its latent are of one side.
        keys = rng.stream_keys(jax.random.key(config.seed + 3), rng.Stream.MIRROR, index)
        coin = rng.uniform(keys) < 0.5
        return jnp.where(coin[:, None, None, None], images[:, :, ::-1], images)

    @jax.jit
    def embed(arrays, latents, labels, index, images):
        keys = rng.stream_keys(jax.random.key(config.seed + 4), rng.Stream.MMD, index)
        found = labels if classes else None
        return mmd.all_features(maps_of(arrays), latents, found, keys, images)

    kinds = ("moments", "moments_flip") if mirror else ("moments",)
    parts, labels = [], []
    chosen = np.resize(chosen, -(-len(chosen) // BATCH) * BATCH)
    for start in tqdm(
        range(0, len(chosen), BATCH),
        desc="real features",
        unit="batch",
        disable=not sharding.is_main_process(),
    ):
        at = np.sort(chosen[start : start + BATCH])
        batch = cache.read(at)
        label = batch["label"].astype(np.int32)
        shown = np.where(label < 0, classes, label)
        index = jnp.asarray(at, jnp.uint32)
        if teacher is None:
            moments = {k: jnp.asarray(v) for k, v in batch.items() if k in kinds}
            drawn = latents_of(moments, index)
        else:
            drawn = teacher(index, jnp.asarray(shown))
        images = None
        if source is not None:
            images = jnp.asarray(source.batch(batch["index"])["image"])
            images = mirrored(images, index) if mirror else images
        found = embed(arrays, drawn, jnp.asarray(shown), index, images)
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
            space = dataclasses.replace(space, attraction=mmd.mean_row(rows, bank.labels))
        elif options.real == "nystrom":
            key = jax.random.key(config.seed + 5)
            landmarks = min(options.landmarks, len(rows))
            space = dataclasses.replace(
                space, attraction=mmd.nystrom(rows, space.kernel, landmarks, key)
            )
        spaces[name] = space
    return spaces
