"""The published judges by name, as a config or a flag asks for them."""

import os

from lfm_jax.errors import UserError
from lfm_jax.features.clip import clip
from lfm_jax.features.dino import dino
from lfm_jax.features.efficientnet import efficientnet
from lfm_jax.features.extractor import Extractor
from lfm_jax.features.inception import check_pipeline, inception
from lfm_jax.features.vgg import vgg

PUBLISHED = ("inception", "clip", "dinov2", "vgg16", "efficientnet-lite0")


def open_extractor(
    name: str, *, weights: str | os.PathLike = "", pipeline: str = "", check: bool = True
) -> Extractor:
    """The extractor `name` of `PUBLISHED`.

    Args:
        weights: the file; empty finds or fetches the published one.
        pipeline: ``tf1``, ``torch`` or ``clean``; empty takes what the network is usually judged by
            (``tf1`` for Inception and VGG16, antialiased bicubic for the rest).
        check: refuse Inception weights whose sha256 is not the published one.

    Raises:
        UserError: unknown name or pipeline, or weights that are missing, altered or another's.
    """
    if pipeline:
        check_pipeline(pipeline)
    if name == "inception":
        return inception(weights, pipeline=pipeline or "tf1", check=check)
    others = {"clip": clip, "dinov2": dino, "vgg16": vgg, "efficientnet-lite0": efficientnet}
    if name not in others:
        raise UserError(f"evaluate.extractor: {name!r}; accepted: {', '.join(PUBLISHED)}")
    return others[name](weights, resize=pipeline) if pipeline else others[name](weights)
