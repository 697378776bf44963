"""Sides from words: which of two texts an image is closer to, by CLIP.

The zero-shot classifier of Radford et al. 2021: cosine of image and text embedding, times 100. No
labelled image is needed; what CLIP sees in an image is taken for what is in it.
"""

import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from lfm_jax.features.clip import clip
from lfm_jax.features.clip_text import open_text

LOGIT_SCALE = 100.0  # what CLIP's learned temperature was clipped to
_BATCH = 32


def text_similarity(
    folder: str | os.PathLike, texts: Sequence[str]
) -> Callable[[UInt8[np.ndarray, "n h w c"]], Float[np.ndarray, "n k"]]:
    """A function from images to their similarity with each of `texts`, in logits.

    Args:
        folder: CLIP's published files; see `lfm_jax.features.clip_text`.

    Raises:
        UserError: files are missing or are not CLIP's.
    """
    words, file = open_text(folder, texts)
    words = words / jnp.linalg.norm(words, axis=1, keepdims=True)
    extractor = clip(file)

    @jax.jit
    def similarity(extractor, images):
        features = extractor(images)["features"]
        features = features / jnp.linalg.norm(features, axis=1, keepdims=True)
        return LOGIT_SCALE * features @ words.T

    def of_images(images: UInt8[np.ndarray, "n h w c"]) -> Float[np.ndarray, "n k"]:
        rows = []
        for start in range(0, len(images), _BATCH):
            part = images[start : start + _BATCH]
            filled = np.concatenate([part, np.repeat(part[-1:], _BATCH - len(part), axis=0)])
            rows.append(np.asarray(similarity(extractor, filled))[: len(part)])
        return np.concatenate(rows)

    return of_images
