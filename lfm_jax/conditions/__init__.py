"""Conditions of a latent flow beside the class: inpainting, semantic maps, layouts."""

from lfm_jax.conditions.condition import (
    ENCODER,
    Condition,
    encoded,
    init_conditioned,
    input_sizes,
    training_condition,
)
from lfm_jax.conditions.encoders import LayoutEncoder, MapEncoder, corner_tokens
from lfm_jax.conditions.guidance import Weighted, guided
from lfm_jax.conditions.inpainting import Inpainting, composite
from lfm_jax.conditions.layout import Layout
from lfm_jax.conditions.masks import MASKS, draw_mask, draw_masks
from lfm_jax.conditions.replacement import inpaint_by_replacement, latent_hole
from lfm_jax.conditions.semantic import Semantic
from lfm_jax.conditions.widen import widen

__all__ = [
    "ENCODER",
    "MASKS",
    "Condition",
    "Inpainting",
    "Layout",
    "LayoutEncoder",
    "MapEncoder",
    "Semantic",
    "Weighted",
    "composite",
    "corner_tokens",
    "draw_mask",
    "draw_masks",
    "encoded",
    "guided",
    "init_conditioned",
    "inpaint_by_replacement",
    "input_sizes",
    "latent_hole",
    "training_condition",
    "widen",
]
