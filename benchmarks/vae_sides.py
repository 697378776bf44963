"""The autoencoder on both sides, diffusers' and ours, with the same weights; figures kept."""

import tempfile

import jax
import numpy as np

from benchmarks.figures import keep
from lfm_jax import vae

STABLE_DIFFUSION = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
}
TINY = STABLE_DIFFUSION | {"block_out_channels": [32, 32, 64, 64], "layers_per_block": 1}


def figure(part, name, value, op, bound, note=""):
    keep("vae", name, value, op, bound, f"python -m benchmarks.vae {part}", note)


def shared_weights(config, seed=0):
    """diffusers' module and ours with its weights; norms and biases moved off ones and zeros."""
    import diffusers
    import torch

    torch.manual_seed(seed)
    oracle = diffusers.AutoencoderKL(**config).eval()
    with torch.no_grad():
        for value in oracle.parameters():
            if value.ndim == 1:
                value += 0.2 * torch.randn(value.shape)
    with tempfile.TemporaryDirectory() as folder:
        oracle.save_pretrained(folder)
        model, params = vae.load_vae(folder)
    return oracle, model, jax.device_put(params)


def coders(model):
    """Jitted moments and decode as functions of parameters and arrays, as jobs run them."""
    codec = vae.make_codec(model, {}, scale=1.0, shift=0.0)

    def encode(params, x):
        return codec.replace(params=params).encode_moments(x)

    def decode(params, z):
        return codec.replace(params=params).decode(z)

    return jax.jit(encode), jax.jit(decode)


def channels_first(x):
    import torch

    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).contiguous()


def inputs(batch, height, width, factor=8, channels=4):
    rng = np.random.default_rng(0)
    x = rng.normal(0, 0.5, (batch, height, width, 3)).astype(np.float32)
    z = rng.normal(size=(batch, height // factor, width // factor, channels)).astype(np.float32)
    return x, z
