"""The published judges by name, as a config or a flag asks for them."""

import os

import jax
import jax.numpy as jnp

from lfm_jax.errors import UserError, blaming
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
    others = {"clip": clip, "dinov2": dino, "vgg16": vgg, "efficientnet-lite0": efficientnet}
    if name not in PUBLISHED:
        raise UserError(f"evaluate.extractor: {name!r}; accepted: {', '.join(PUBLISHED)}")
    with blaming(f"weights {weights}" if weights else "published weights", f"those of {name}"):
        if name == "inception":
            return inception(weights, pipeline=pipeline or "tf1", check=check)
        make = others[name]
        extractor = make(weights, resize=pipeline) if pipeline else make(weights)
        if name in ("clip", "dinov2"):  # of any size, known by no hash: do the tensors fit?
            side = extractor.input_size
            pixels = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
            jax.eval_shape(extractor, pixels)
    return extractor
