"""LPIPS, the perceptual distance of latent diffusion's autoencoder (Zhang et al. 2018, eq. 1).

    d(x, y) = sum_l mean_hw sum_c w_lc (x_l / |x_l| - y_l / |y_l|)^2

over five layers of VGG16, each position's features normalised over channels. The weights are not
ours to ship: the user gives torchvision's VGG16 and, for the learned ``w``, LPIPS' ``vgg.pth``;
without it all ``w`` are one.
"""

import functools
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lfm_jax.errors import UserError
from lfm_jax.vae import files, keys, layers
from lfm_jax.vae.autoencoder import AnyArray

# torchvision's numbering of VGG16's convolutions, stage by stage; pooling lies between stages.
STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
WIDTHS = (64, 128, 256, 512, 512)
# LPIPS standardizes images in [-1, 1] by ImageNet's mean and deviation in that range.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


def load_lpips(vgg_file: str | Path, linear_file: str | Path = "") -> dict[str, Any]:
    """Parameters of `lpips` from the user's files (safetensors, or PyTorch's).

    Args:
        vgg_file: torchvision's VGG16, names ``features.0.weight`` and so on; the rest is ignored.
        linear_file: LPIPS' linear layers, names ``lin0.model.1.weight``; if empty, all are one.

    Raises:
        UserError: a tensor is missing or has another shape.
    """
    vgg, _ = files.read_tensors(Path(vgg_file))
    params: dict[str, Any] = {"convolutions": [], "linear": []}
    channels = 3
    for stage, width in zip(STAGES, WIDTHS, strict=True):
        convolutions = []
        for index in stage:
            name = f"features.{index}"
            kernel = _tensor(vgg, f"{name}.weight", (width, channels, 3, 3), vgg_file)
            bias = _tensor(vgg, f"{name}.bias", (width,), vgg_file)
            convolutions.append({"kernel": keys.to_our_layout(kernel), "bias": bias})
            channels = width
        params["convolutions"].append(convolutions)
    linear = files.read_tensors(Path(linear_file))[0] if str(linear_file) else None
    for i, width in enumerate(WIDTHS):
        if linear is None:
            params["linear"].append(np.ones(width, np.float32))
        else:
            shape = (1, width, 1, 1)
            weight = _tensor(linear, f"lin{i}.model.1.weight", shape, linear_file)
            params["linear"].append(weight[0, :, 0, 0])
    return params


def _tensor(tensors, name: str, shape: tuple[int, ...], source: str | Path) -> np.ndarray:
    if name not in tensors:
        raise UserError(f"{source}: tensor {name} is missing")
    if tensors[name].shape != shape:
        raise UserError(
            f"{source}: tensor {name} has shape {tensors[name].shape}, expected {shape}"
        )
    return np.asarray(tensors[name], np.float32)


def vgg_features(params: Any, images: Float[Array, "b h w 3"]) -> list[Float[Array, "b i j c"]]:
    """Activations after the last ReLU of each of VGG16's five stages; images in [-1, 1]."""
    x = (images - jnp.array(SHIFT)) / jnp.array(SCALE)
    features = []
    for i, stage in enumerate(params["convolutions"]):
        if i:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        for convolution in stage:
            kernel, bias = (jnp.asarray(convolution[k]) for k in ("kernel", "bias"))
            x = jax.nn.relu(layers.convolve(x, kernel, bias))
        features.append(x)
    return features


def lpips(params: Any) -> Callable[[Array, Array], Float[Array, " b"]]:
    """The distance ``(x, y) -> [B]`` of images in [-1, 1], for `autoencoder_loss`'s ``perceptual``.

    Grey images are repeated to three channels. The parameters get no gradient.
    """

    def unit(x):
        norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
        return x / (norm + 1e-10)

    def distance(
        x: Float[AnyArray, "b h w c"], y: Float[AnyArray, "b h w c"]
    ) -> Float[Array, " b"]:
        x, y = (jnp.broadcast_to(v, (*v.shape[:3], 3)) for v in (x, y))
        stages = zip(
            vgg_features(params, x), vgg_features(params, y), params["linear"], strict=True
        )
        distances = [
            jnp.mean(jnp.square(unit(of_x) - unit(of_y)) @ weight, axis=(1, 2))
            for of_x, of_y, weight in stages
        ]
        return functools.reduce(operator.add, distances)

    return distance
