"""MMD finetuning: a trained flow becomes a few-step sampler.

The N-step sampler is differentiated through, and the discrepancy between its samples and the data
in one or more feature spaces is its loss (Aiello et al. 2023; here for latent flows).
"""

from lfm_jax.mmd.bank import Bank, Weighted, load_bank, make_bank, mean_row, nystrom, save_bank
from lfm_jax.mmd.encoder import (
    OBJECTIVES,
    FeatureEncoder,
    load_encoder,
    pixel_extractor,
    save_encoder,
    train_encoder,
)
from lfm_jax.mmd.estimators import ESTIMATORS, check_counts, mean_pairs, mmd2, within
from lfm_jax.mmd.features import (
    BackboneTokens,
    Decoded,
    LatentMaps,
    RandomMaps,
    RawLatents,
    all_features,
    middle_tap,
    random_maps,
    soft_clamp,
)
from lfm_jax.mmd.generator import generate
from lfm_jax.mmd.gradcache import gradcache
from lfm_jax.mmd.kernels import (
    KERNELS,
    Energy,
    Gaussian,
    InverseMultiquadric,
    Joint,
    Laplace,
    Mixture,
    Polynomial,
    has_bandwidth,
    make_kernel,
    median_bandwidth,
    mixture,
)
from lfm_jax.mmd.loss import mmd_loss
from lfm_jax.mmd.rows import row_generator
from lfm_jax.mmd.spaces import Space, discrepancy, make_space
from lfm_jax.mmd.trained import (
    FEW_STEP,
    TRAINABLE,
    deploy,
    deploy_sampler,
    freeze,
    is_few_step,
    new_solver,
    solver_times,
    trainable,
    trained_mask,
)

__all__ = [
    "ESTIMATORS",
    "FEW_STEP",
    "KERNELS",
    "OBJECTIVES",
    "TRAINABLE",
    "BackboneTokens",
    "Bank",
    "Decoded",
    "Energy",
    "FeatureEncoder",
    "Gaussian",
    "InverseMultiquadric",
    "Joint",
    "Laplace",
    "LatentMaps",
    "Mixture",
    "Polynomial",
    "RandomMaps",
    "RawLatents",
    "Space",
    "Weighted",
    "all_features",
    "check_counts",
    "deploy",
    "deploy_sampler",
    "discrepancy",
    "freeze",
    "generate",
    "gradcache",
    "has_bandwidth",
    "is_few_step",
    "load_bank",
    "load_encoder",
    "make_bank",
    "make_kernel",
    "make_space",
    "mean_pairs",
    "mean_row",
    "median_bandwidth",
    "middle_tap",
    "mixture",
    "mmd2",
    "mmd_loss",
    "new_solver",
    "nystrom",
    "pixel_extractor",
    "random_maps",
    "row_generator",
    "save_bank",
    "save_encoder",
    "soft_clamp",
    "solver_times",
    "train_encoder",
    "trainable",
    "trained_mask",
    "within",
]
