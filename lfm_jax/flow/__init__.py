"""Latent flow matching: the path, the loss, velocities, guidance, and their solution by diffrax.

``t = 0`` is data, ``t = 1`` is noise; a velocity is a pytree callable ``(x [b, ...], t [b]) -> v``.
"""

from lfm_jax.flow.bound import (
    WassersteinBound,
    lipschitz_estimates,
    velocity_constants,
    velocity_profile,
    wasserstein_bound,
)
from lfm_jax.flow.classifier import LogProbability, classifier_guidance, noisy_classifier_loss
from lfm_jax.flow.grids import GRIDS, make_grid
from lfm_jax.flow.guidance import autoguidance, classifier_free
from lfm_jax.flow.inversion import (
    interpolate_samples,
    invert,
    invert_through,
    noised,
    reconstruction_errors,
    sample_through,
    slerp,
    switch_class,
)
from lfm_jax.flow.likelihood import bits_per_dim, log_likelihood
from lfm_jax.flow.loss import (
    TIME_SAMPLING,
    draw_latents,
    draw_times,
    drop_labels,
    flow_matching_loss,
)
from lfm_jax.flow.path import data_estimate, interpolate, noise_estimate, score, target
from lfm_jax.flow.sampler import ERROR_NORMS, describe_failure, sample, trajectory
from lfm_jax.flow.sde import METHODS as SDE_METHODS
from lfm_jax.flow.sde import sample_sde
from lfm_jax.flow.solvers import SOLVERS
from lfm_jax.flow.velocity import NetworkVelocity, Velocity, with_label

__all__ = [
    "ERROR_NORMS",
    "GRIDS",
    "SDE_METHODS",
    "SOLVERS",
    "TIME_SAMPLING",
    "LogProbability",
    "NetworkVelocity",
    "Velocity",
    "WassersteinBound",
    "autoguidance",
    "bits_per_dim",
    "classifier_free",
    "classifier_guidance",
    "data_estimate",
    "describe_failure",
    "draw_latents",
    "draw_times",
    "drop_labels",
    "flow_matching_loss",
    "interpolate",
    "interpolate_samples",
    "invert",
    "invert_through",
    "lipschitz_estimates",
    "log_likelihood",
    "make_grid",
    "noise_estimate",
    "noised",
    "noisy_classifier_loss",
    "reconstruction_errors",
    "sample",
    "sample_sde",
    "sample_through",
    "score",
    "slerp",
    "switch_class",
    "target",
    "trajectory",
    "velocity_constants",
    "velocity_profile",
    "wasserstein_bound",
    "with_label",
]
