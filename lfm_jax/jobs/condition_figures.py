"""Whether samples obey the conditions that they were made under, beside what can be expected.

    inpainting   known pixels, PSNR in and out of the hole, FD of completed images, P-IDS and U-IDS,
                 all beside filling the hole with the class mean
    semantic     overlap of the map that was given with the one read from the sample, beside that of
                 reconstructions
    layout       what a classifier reads in the boxes, light outside of them, and where the objects
                 lie, all beside held-out canvases

A map is read by the rule that made it, or by a segmenter that is trained on the train split.
"""

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from lfm_jax import sharding
from lfm_jax.conditions import Inpainting, Semantic, figures, segmenter
from lfm_jax.conditions.inpainting import composite
from lfm_jax.data import ImageSource, open_maps
from lfm_jax.data.maps import garment_parts
from lfm_jax.data.source import array_source
from lfm_jax.evaluate import SampleFile, frechet_of, inpainting_discrimination
from lfm_jax.features import predict, train_classifier
from lfm_jax.jobs import build
from lfm_jax.jobs import condition as conditions
from lfm_jax.jobs.judge import BATCH, Look, of_array, reconstructed, spread
from lfm_jax.vae import from_uint8
from lfm_jax.vae.perceptual import load_lpips, lpips
from lfm_jax.workdir import Workdir

_LIT = 48  # of 255: brighter pixels are drawn
_CROP = 8  # side that crops are read at: that of scikit-learn's digits
_SEGMENTED = 8000  # images that a segmenter is trained on, at most
_CROPPED = 4000  # canvases whose crops the classifier is trained on


def measure(
    config: ConfigDict, workdir: Workdir, samples: SampleFile, look: Look
) -> dict[str, Any]:
    """Figures of this workdir's own samples under held-out conditions."""
    codec = build.codec(config, workdir)
    given = conditions.given(config, codec)
    assert given is not None  # `config.condition.kind` is not none here
    images = samples.read()
    told = given.plain(given.numbers(np.arange(len(images))))
    if isinstance(given.condition, Inpainting):
        found = _inpainting(config, look, images, told, samples.labels)
    elif isinstance(given.condition, Semantic):
        found = _semantic(config, codec, images, told, given.condition.num_classes)
    else:
        found = _layout(config, codec, images, told)
    if given.repeats > 1:
        whole = len(images) // given.repeats * given.repeats
        groups = images[:whole].reshape(-1, given.repeats, *images.shape[1:])
        found["diversity_rms"] = figures.pairwise_distance(groups)
    return found


# ---- inpainting


def _inpainting(
    config: ConfigDict,
    look: Look,
    images: np.ndarray,
    told: dict[str, np.ndarray],
    labels: np.ndarray | None,
) -> dict[str, Any]:
    truth, hole = told["image"], told["mask"]
    means = figures.class_means(build.images(config, "train"), config.data.num_classes)
    classes = labels if config.data.num_classes else np.zeros(len(images), np.int32)
    filled = composite(means[classes], truth, hole)
    known = figures.psnr(images, truth, ~hole)
    result: dict[str, Any] = {
        "hole_share": float(hole.mean()),
        "known_pixels_exact": bool((images == truth)[~hole].all()),
        "psnr_known": None if np.isinf(known) else known,
        "psnr_hole": figures.psnr(images, truth, hole),
        "psnr_hole_class_mean": figures.psnr(filled, truth, hole),
    }
    real = look(of_array(truth), len(truth), "truth")
    for name, completed in (("completed", images), ("class_mean", filled)):
        features = look(of_array(completed), len(completed), name)
        pids, uids = inpainting_discrimination(real.features, features.features)
        result |= {
            f"fd_{name}": frechet_of(features.statistics, real.statistics),
            f"p_ids_{name}": pids,
            f"u_ids_{name}": uids,
        }
        if config.evaluate.lpips is not None:
            result[f"lpips_{name}"] = _lpips(config.evaluate.lpips, completed, truth)
    return result


def _lpips(weights: str, a: np.ndarray, b: np.ndarray) -> float:
    """Mean LPIPS of pairs; the weights are "VGG.pth" or "VGG.pth,LPIPS.pth"."""
    distance = jax.jit(lpips(load_lpips(*weights.split(","))))
    parts = [
        np.asarray(distance(from_uint8(a[i : i + BATCH]), from_uint8(b[i : i + BATCH])))
        for i in range(0, len(a), BATCH)
    ]
    return float(np.concatenate(parts).mean())


# ---- semantic maps


def _semantic(
    config: ConfigDict, codec: Any, images: np.ndarray, told: dict[str, np.ndarray], classes: int
) -> dict[str, Any]:
    read, accuracy = map_reader(config, classes)
    restored = rebuilt(codec, told["image"])
    result: dict[str, Any] = {"map_reader_accuracy": accuracy}
    for name, pictures in (
        ("samples", images),
        ("reconstruction", restored),
        ("real", told["image"]),
    ):
        mean, each = figures.mean_iou(told["map"], read(pictures), classes)
        result[f"miou_{name}"] = mean
        result[f"iou_{name}"] = [None if np.isnan(value) else float(value) for value in each]
    result["miou_over_reconstruction"] = result["miou_samples"] / result["miou_reconstruction"]
    return result


def rebuilt(codec: Any, images: np.ndarray) -> np.ndarray:
    """Through the autoencoder: what sampling in its latent space cannot mend."""

    def pieces(start: int, stop: int) -> Any:
        for first in range(start, stop, BATCH):
            yield images[first : min(first + BATCH, stop)]

    return np.concatenate(list(reconstructed(codec, pieces)(0, len(images))))


def map_reader(config: ConfigDict, classes: int) -> tuple[Any, float | None]:
    """``images -> maps``, and its accuracy by pixel on held-out images where it was trained."""
    if config.condition.source == "garment_parts":
        return garment_parts, None
    splits = {}
    for split in ("train", "test"):
        source = build.images(config, split)
        maps = open_maps(
            config.condition.source,
            source,
            split=split,
            path=config.condition.path or "",
            image_size=config.data.image_size,
            num_classes=config.condition.num_classes,
        )
        places = spread(len(source), min(len(source), _SEGMENTED))
        splits[split] = source.batch(places)["image"], maps.batch(places)
    trained = segmenter.train_segmenter(
        *splits["train"], num_classes=classes, seed=config.evaluate.classifier_seed
    )

    def read(images: np.ndarray) -> np.ndarray:
        return segmenter.segment(trained, images)

    images, maps = splits["test"]
    return read, float((read(images) == maps).mean())


# ---- layouts


def _layout(
    config: ConfigDict, codec: Any, images: np.ndarray, told: dict[str, np.ndarray]
) -> dict[str, Any]:
    boxes, classes, truth = told["boxes"], told["classes"], told["image"]
    reader, accuracy = crop_reader(config)
    restored = rebuilt(codec, truth)
    empty = figures.outside_boxes(boxes, classes, images.shape[1])
    result: dict[str, Any] = {
        "crop_accuracy_held_out": accuracy,
        "boxes": int((classes >= 0).sum()),
    }
    for name, pictures in (("samples", images), ("reconstruction", restored), ("real", truth)):
        cut = figures.crops(pictures, boxes, classes, size=_CROP)
        result |= {
            f"crop_accuracy_{name}": float((predict(reader, cut["image"]) == cut["label"]).mean()),
            f"empty_lit_{name}": float((pictures.max(-1)[empty] > _LIT).mean()),
            f"empty_level_{name}": float(pictures[empty].mean()),
            f"box_iou_{name}": figures.box_iou(pictures, boxes, classes, threshold=_LIT),
        }
    return result


def crop_reader(config: ConfigDict) -> tuple[Any, float]:
    """A classifier of crops, trained on real ones, and its accuracy on held-out real ones."""
    sources = [_crops_of(config, split) for split in ("train", "test")]
    return train_classifier(
        *sources,
        seed=config.evaluate.classifier_seed,
        epochs=config.evaluate.classifier_epochs,
        width=config.evaluate.classifier_width,
        name="crops-cnn",
        progress=sharding.is_main_process(),
    )


def _crops_of(config: ConfigDict, split: str) -> ImageSource:
    source = build.images(config, split)
    layouts = conditions.annotations(config, split)
    cut = []
    places = spread(len(source), min(len(source), _CROPPED))
    for chunk in tqdm(np.array_split(places, max(len(places) // 500, 1)), desc=f"crops {split}"):
        told = layouts.batch(chunk)
        images = source.batch(chunk)["image"]
        cut.append(figures.crops(images, told["boxes"], told["classes"], size=_CROP))
    return array_source(
        f"crops of {source.name}",
        np.concatenate([part["image"] for part in cut]),
        np.concatenate([part["label"] for part in cut]),
        layouts.class_names,
    )
