"""Velocity networks. All are called alike: ``model.apply({"params": p}, x, t, cond, train=False,
capture=(), inject=None, rngs=None)`` with latents ``x [b, h, w, c]`` and times ``t [b]`` in [0, 1]
gives the velocity ``[b, h, w, out_channels]`` in float32 (and the captured hidden states).
"""

from lfm_jax.models.adm import ADM
from lfm_jax.models.conditioning import Cond
from lfm_jax.models.create import (
    NAMES,
    count_params,
    create_model,
    forward_macs,
    init_params,
)
from lfm_jax.models.ddpm import DDPM
from lfm_jax.models.dit import DiT
from lfm_jax.models.songunet import SongUNet
from lfm_jax.models.taps import Replace
from lfm_jax.models.unet import UNet

__all__ = [
    "ADM",
    "DDPM",
    "NAMES",
    "Cond",
    "DiT",
    "Replace",
    "SongUNet",
    "UNet",
    "count_params",
    "create_model",
    "forward_macs",
    "init_params",
]
