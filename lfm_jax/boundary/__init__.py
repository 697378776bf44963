"""Semantic boundaries: learning-free control of a frozen flow."""

from lfm_jax.boundary.files import check_provenance, load_boundary, save_boundary
from lfm_jax.boundary.hyperplane import METHODS, Boundary, cross_validated, fit
from lfm_jax.boundary.steer import MODES, UNITS, orthogonal_normals, steer

__all__ = [
    "METHODS",
    "MODES",
    "UNITS",
    "Boundary",
    "check_provenance",
    "cross_validated",
    "fit",
    "load_boundary",
    "orthogonal_normals",
    "save_boundary",
    "steer",
]
