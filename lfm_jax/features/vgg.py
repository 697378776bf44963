"""VGG16 up to its second hidden layer: the features of improved precision and recall.

Kynkaanniemi et al. (2019) take the 4,096 rectified activations before the classifier; these are
torchvision's ImageNet weights with the resize rule that torch-fidelity gives them (``tf1``).
"""

import os

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from lfm_jax.features import weights
from lfm_jax.features.dino import MEAN, STD
from lfm_jax.features.extractor import Extractor

PUBLISHED = weights.Published(
    url="https://download.pytorch.org/models/vgg16-397923af.pth", sha256_prefix="397923af"
)
# Features of each 3x3 convolution; 0 is a 2x2 max pool. The position is the torch module's number
# once every convolution is followed by its ReLU.
LAYERS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


class Vgg16(nn.Module):
    """``x [b, 224, 224, 3]`` -> ``{"features": [b, 4096]}``, rectified."""

    @nn.compact
    def __call__(self, x: Float[Array, "b 224 224 3"]) -> dict[str, Array]:
        for i, features in enumerate(LAYERS):
            if features:
                x = nn.relu(nn.Conv(features, (3, 3), padding=1, name=f"conv{i}")(x))
            else:
                x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(4096, name="fc1")(x))
        return {"features": nn.relu(nn.Dense(4096, name="fc2")(x))}


def params_from_torch(tensors: dict) -> dict:
    """Flax parameters of torchvision's VGG16 (without batch norm); `UserError` if it is another."""
    shapes = {"classifier.0.weight": (4096, 25088), "classifier.3.weight": (4096, 4096)}
    weights.require(tensors, shapes, "VGG16")
    params, module = {}, 0
    for i, features in enumerate(LAYERS):
        if features:
            name = f"features.{module}"
            params[f"conv{i}"] = {
                "kernel": weights.conv_kernel(tensors[f"{name}.weight"]),
                "bias": tensors[f"{name}.bias"],
            }
        module += 2 if features else 1
    # Torch flattens channels first.
    kernel = tensors["classifier.0.weight"].reshape(4096, 512, 7, 7).transpose(2, 3, 1, 0)
    params["fc1"] = {
        "kernel": kernel.reshape(25088, 4096),
        "bias": tensors["classifier.0.bias"],
    }
    params["fc2"] = weights.dense(tensors, "classifier.3")
    return params


def vgg(path: str | os.PathLike = "", *, resize: str = "tf1") -> Extractor:
    """The VGG16 extractor of `path`, or of the published weights fetched once.

    Raises `UserError` if the file is missing, has another hash, or is another network.
    """
    params = params_from_torch(weights.read_tensors(weights.locate(path, PUBLISHED)))
    return Extractor(
        params=jax.tree.map(jnp.asarray, params),
        model=Vgg16(),
        name="VGG16",
        dim=4096,
        input_size=224,
        resize=resize,
        mean=MEAN,
        std=STD,
    )
