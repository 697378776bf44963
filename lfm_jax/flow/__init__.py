"""Latent flow matching: the path, the loss, velocities, guidance, and their solution by diffrax.

``t = 0`` is data, ``t = 1`` is noise; a velocity is a pytree callable ``(x [b, ...], t [b]) -> v``.
"""

from lfm_jax.flow.grids import GRIDS, make_grid
from lfm_jax.flow.guidance import autoguidance, classifier_free
from lfm_jax.flow.loss import (
    TIME_SAMPLING,
    draw_latents,
    draw_times,
    drop_labels,
    flow_matching_loss,
)
from lfm_jax.flow.path import data_estimate, interpolate, noise_estimate, score, target
from lfm_jax.flow.sampler import ERROR_NORMS, describe_failure, sample, trajectory
from lfm_jax.flow.solvers import SOLVERS
from lfm_jax.flow.velocity import NetworkVelocity, Velocity, with_label

__all__ = [
    "ERROR_NORMS",
    "GRIDS",
    "SOLVERS",
    "TIME_SAMPLING",
    "NetworkVelocity",
    "Velocity",
    "autoguidance",
    "classifier_free",
    "data_estimate",
    "describe_failure",
    "draw_latents",
    "draw_times",
    "drop_labels",
    "flow_matching_loss",
    "interpolate",
    "make_grid",
    "noise_estimate",
    "sample",
    "score",
    "target",
    "trajectory",
    "with_label",
]
