"""InceptionV3 as in TensorFlow's graph of 2015-12-05: the network that FID is defined by.

What differs from the InceptionV3 of model zoos: 1008 outputs; average pools inside the blocks
divide by the pixels in the image and not by nine; the pool branch of the last block is a max pool;
convolutions are valid in the stem and in the strided blocks. Batch norms (epsilon 1e-3) are
constants at inference and are folded into the convolutions when the weights are read.

Outputs: ``features [b, 2048]`` (mean over the last 8x8 map, the graph's ``pool_3``); ``logits [b,
1008]`` without the bias, as the inception score of the reference implementation takes them; and
``spatial [b, 2023]``, the first 7 channels of ``mixed_6/conv`` in row-major NHWC order, for sFID
(Nash et al., 2021). That node of the graph is the rectified output: its convolution is called
``mixed_6/conv/Conv2D``.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from lfm_jax.errors import UserError
from lfm_jax.features import weights
from lfm_jax.features.extractor import Extractor

PUBLISHED = weights.Published(
    url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
    sha256_prefix="6726825d",
)
NAME = "Inception"  # of the published weights, checked by hash: these alone make a FID
UNCHECKED = "Inception-unchecked"
# Name of the pipeline: (resize rule, mean, std) in bytes.
PIPELINES = {
    "tf1": ("tf1", 128.0, 128.0),
    "torch": ("torch", 127.5, 127.5),
    "clean": ("clean", 128.0, 128.0),
}


class Conv(nn.Module):
    """Convolution with bias and ReLU; `pad` zeros on each side.

    `averaged`: of the 3x3 mean of its input. A pointwise convolution and a mean commute, and there
    are fewer outputs to average than inputs.
    """

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    pad: tuple[int, int] = (0, 0)
    averaged: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 k"]:
        shape = (*self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        if self.kernel == (1, 1) and self.stride == 1:
            x = x @ kernel[0, 0]  # XLA has faster products than convolutions on a CPU
        else:
            x = jax.lax.conv_general_dilated(
                x,
                kernel,
                (self.stride, self.stride),
                [(p, p) for p in self.pad],
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        return nn.relu((_average_pool(x) if self.averaged else x) + bias)


# 3x3 pools as three shifts along each axis: XLA's windows are slow on a CPU.


def _shifted(x: Array, axis: int, stride: int) -> list[Array]:
    stops = [x.shape[axis] - 2 + i for i in range(3)]
    return [jax.lax.slice_in_dim(x, i, stops[i], stride, axis) for i in range(3)]


def _max_pool(x: Float[Array, "b h w c"], stride: int, *, pad: int = 0) -> Array:
    if pad:
        x = jnp.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)], constant_values=-jnp.inf)
    for axis in (1, 2):
        x = functools.reduce(jnp.maximum, _shifted(x, axis, stride))
    return x


def _average_pool(x: Float[Array, "b h w c"]) -> Array:
    """The mean over those of nine positions that lie in the image."""
    _, height, width, _ = x.shape
    rows, columns = (np.convolve(np.ones(n), np.ones(3), "same") for n in (height, width))
    x = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    for axis in (1, 2):
        x = functools.reduce(jnp.add, _shifted(x, axis, 1))
    return x * jnp.asarray(1 / np.outer(rows, columns), x.dtype)[..., None]


# Chains of (name, features, kernel, stride); padding keeps the size unless the stride is 2.
_7x7 = lambda c, n: [  # noqa: E731
    [("branch1x1", 192, (1, 1), 1)],
    [
        ("branch7x7_1", c, (1, 1), 1),
        ("branch7x7_2", c, (1, 7), 1),
        ("branch7x7_3", n, (7, 1), 1),
    ],
    [
        ("branch7x7dbl_1", c, (1, 1), 1),
        ("branch7x7dbl_2", c, (7, 1), 1),
        ("branch7x7dbl_3", c, (1, 7), 1),
        ("branch7x7dbl_4", c, (7, 1), 1),
        ("branch7x7dbl_5", n, (1, 7), 1),
    ],
]
_5x5 = [
    [("branch1x1", 64, (1, 1), 1)],
    [("branch5x5_1", 48, (1, 1), 1), ("branch5x5_2", 64, (5, 5), 1)],
    [
        ("branch3x3dbl_1", 64, (1, 1), 1),
        ("branch3x3dbl_2", 96, (3, 3), 1),
        ("branch3x3dbl_3", 96, (3, 3), 1),
    ],
]


class Block(nn.Module):
    """Parallel chains of convolutions beside a pool, concatenated; `pool` features 0: pool alone.

    A chain's last entry may be a pair of convolutions of the same input.
    """

    chains: tuple
    pool: int
    max_pool: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 k"]:
        outputs = []
        for chain in self.chains:
            y = x
            for link in chain:
                pair = link if isinstance(link[0], tuple) else (link,)
                y = [_conv(self, one)(y) for one in pair]
                y = jnp.concatenate(y, -1) if len(y) > 1 else y[0]
            outputs.append(y)
        if not self.pool:
            outputs.append(_max_pool(x, 2))
        elif self.max_pool:
            outputs.append(Conv(self.pool, name="branch_pool")(_max_pool(x, 1, pad=1)))
        else:
            outputs.append(Conv(self.pool, averaged=True, name="branch_pool")(x))
        return jnp.concatenate(outputs, -1)


def _conv(parent: nn.Module, link: tuple) -> Conv:
    name, features, kernel, stride = link
    pad = tuple(k // 2 for k in kernel) if stride == 1 else (0, 0)
    return Conv(features, kernel, stride, pad, name=name, parent=parent)


def _freeze(chains: list) -> tuple:
    return tuple(tuple(chain) for chain in chains)


def _last_block(max_pool: bool) -> dict:
    chains = [
        [("branch1x1", 320, (1, 1), 1)],
        [
            ("branch3x3_1", 384, (1, 1), 1),
            (("branch3x3_2a", 384, (1, 3), 1), ("branch3x3_2b", 384, (3, 1), 1)),
        ],
        [
            ("branch3x3dbl_1", 448, (1, 1), 1),
            ("branch3x3dbl_2", 384, (3, 3), 1),
            (("branch3x3dbl_3a", 384, (1, 3), 1), ("branch3x3dbl_3b", 384, (3, 1), 1)),
        ],
    ]
    return {"chains": _freeze(chains), "pool": 192, "max_pool": max_pool}


BLOCKS = {
    "Mixed_5b": {"chains": _freeze(_5x5), "pool": 32},
    "Mixed_5c": {"chains": _freeze(_5x5), "pool": 64},
    "Mixed_5d": {"chains": _freeze(_5x5), "pool": 64},
    "Mixed_6a": {
        "chains": _freeze(
            [
                [("branch3x3", 384, (3, 3), 2)],
                [
                    ("branch3x3dbl_1", 64, (1, 1), 1),
                    ("branch3x3dbl_2", 96, (3, 3), 1),
                    ("branch3x3dbl_3", 96, (3, 3), 2),
                ],
            ]
        ),
        "pool": 0,
    },
    "Mixed_6b": {"chains": _freeze(_7x7(128, 192)), "pool": 192},
    "Mixed_6c": {"chains": _freeze(_7x7(160, 192)), "pool": 192},
    "Mixed_6d": {"chains": _freeze(_7x7(160, 192)), "pool": 192},
    "Mixed_6e": {"chains": _freeze(_7x7(192, 192)), "pool": 192},
    "Mixed_7a": {
        "chains": _freeze(
            [
                [("branch3x3_1", 192, (1, 1), 1), ("branch3x3_2", 320, (3, 3), 2)],
                [
                    ("branch7x7x3_1", 192, (1, 1), 1),
                    ("branch7x7x3_2", 192, (1, 7), 1),
                    ("branch7x7x3_3", 192, (7, 1), 1),
                    ("branch7x7x3_4", 192, (3, 3), 2),
                ],
            ]
        ),
        "pool": 0,
    },
    "Mixed_7b": _last_block(max_pool=False),
    "Mixed_7c": _last_block(max_pool=True),
}


class InceptionV3(nn.Module):
    """``x [b, 299, 299, 3]`` on [-1, 1] -> features 2048, logits 1008, spatial 2023."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> dict[str, Array]:
        x = Conv(32, (3, 3), 2, name="Conv2d_1a_3x3")(x)
        x = Conv(32, (3, 3), name="Conv2d_2a_3x3")(x)
        x = Conv(64, (3, 3), pad=(1, 1), name="Conv2d_2b_3x3")(x)
        x = _max_pool(x, 2)
        x = Conv(80, name="Conv2d_3b_1x1")(x)
        x = Conv(192, (3, 3), name="Conv2d_4a_3x3")(x)
        x = _max_pool(x, 2)
        for name, block in BLOCKS.items():
            x = Block(**block, name=name)(x)
            if name == "Mixed_6d":  # `mixed_6` in the graph, which counts from the first block
                spatial = x[..., :7].reshape(x.shape[0], -1)
        features = x.mean((1, 2))
        kernel = self.param("fc", nn.initializers.lecun_normal(), (2048, 1008))
        return {"features": features, "logits": features @ kernel, "spatial": spatial}


def params_from_torch(tensors: dict) -> dict:
    """Flax parameters of a state dict under the names that pytorch-fid and torch-fidelity use.

    Raises `UserError` if a tensor is missing or of another shape (a model zoo's 1000 outputs).
    """
    weights.require(tensors, {"fc.weight": (1008, 2048)}, "Inception 2015-12-05")
    model = InceptionV3()
    image = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
    template = jax.eval_shape(model.init, jax.random.key(0), image)["params"]

    def read(tree, path):
        if "kernel" not in tree:
            return {k: read(v, [*path, k]) for k, v in tree.items()}
        name = ".".join(path)
        shape = tuple(tree["kernel"].shape[i] for i in (3, 2, 0, 1))
        norm = {f"{name}.bn.{k}": shape[:1] for k in ("weight", "bias")}
        norm |= {f"{name}.bn.running_{k}": shape[:1] for k in ("mean", "var")}
        weights.require(tensors, {f"{name}.conv.weight": shape, **norm}, "Inception 2015-12-05")
        return weights.fold_batch_norm(tensors, f"{name}.conv", f"{name}.bn")

    convolutions = {k: v for k, v in template.items() if k != "fc"}
    return {**read(convolutions, []), "fc": tensors["fc.weight"].T}


def inception(
    path: str | os.PathLike = "", *, pipeline: str = "tf1", check: bool = True
) -> Extractor:
    """The FID extractor from the published weights.

    Args:
        path: torch or safetensors file; empty fetches it once into the cache folder.
        pipeline: ``tf1`` (ADM, torch-fidelity, EDM), ``torch`` (pytorch-fid), ``clean``.
        check: refuse a file whose sha256 is not the published one (a conversion has another).

    Raises:
        UserError: no such file, another hash, another network, or an unknown pipeline.
    """
    check_pipeline(pipeline)
    file = weights.locate(path, PUBLISHED if check else weights.Published(url=PUBLISHED.url))
    params = params_from_torch(weights.read_tensors(file))
    return make_inception(params, pipeline=pipeline, name=NAME if check else UNCHECKED)


def make_inception(params: dict, *, pipeline: str = "tf1", name: str = UNCHECKED) -> Extractor:
    """An extractor of `params` of `InceptionV3`; reports write FID for the name `NAME` alone."""
    rule, mean, std = PIPELINES[check_pipeline(pipeline)]
    return Extractor(
        params=jax.tree.map(jnp.asarray, params),
        model=InceptionV3(),
        name=name,
        dim=2048,
        input_size=299,
        resize=rule,
        mean=(mean,),
        std=(std,),
    )


def inception_pipeline(pipeline: str) -> str:
    """`Extractor.pipeline` of the published weights behind ``tf1``, ``torch`` or ``clean``."""
    return make_inception({}, pipeline=pipeline, name=NAME).pipeline


def check_pipeline(pipeline: str) -> str:
    """`pipeline` if it is one, else `UserError` with the list."""
    if pipeline not in PIPELINES:
        raise UserError(f"evaluate.pipeline: {pipeline!r}; accepted: {', '.join(PIPELINES)}")
    return pipeline
