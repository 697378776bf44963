"""Pieces that the convolutional backbones share: initial scales, norms, resampling, attention.

The helpers are called inside a module's compact method and make the Flax layer called `name` there.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lfm_jax.models import layers


@dataclasses.dataclass(frozen=True)
class Init:
    """How a layer starts: ``fan_in`` draws U(-1, 1) / sqrt(fan_in), ``xavier`` the Glorot uniform.

    Both are multiplied by `weight`; biases are drawn like ``fan_in`` weights, times `bias`.
    """

    mode: str = "fan_in"
    weight: float = 1.0
    bias: float = 1.0

    def kernel(self, key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
        if not self.weight:
            return jnp.zeros(shape, dtype)
        window = math.prod(shape[:-2])
        fans = shape[-2] * window + (shape[-1] * window if self.mode == "xavier" else 0)
        bound = math.sqrt((6 if self.mode == "xavier" else 1) / fans) * self.weight
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    def offset(self, fan_in: int):
        bound = self.bias / math.sqrt(fan_in)

        def init(key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
            return (
                jax.random.uniform(key, shape, dtype, -bound, bound) if bound else jnp.zeros(shape)
            )

        return init


FAN_IN = Init()
ZERO = Init(weight=0.0, bias=0.0)


def conv(
    x: Float[Array, "b h w c"],
    features: int,
    name: str,
    *,
    kernel: int = 3,
    stride: int = 1,
    padding: tuple[int, int] | None = None,
    init: Init = FAN_IN,
    dtype=jnp.float32,
) -> Float[Array, "b i j d"]:
    """Square convolution, ``kernel // 2`` of zeros on every side unless `padding` is told."""
    if kernel == 1:
        return dense(x, features, name, init=init, dtype=dtype)
    pad = padding or (kernel // 2, kernel // 2)
    layer = nn.Conv(
        features,
        (kernel, kernel),
        strides=stride,
        padding=(pad, pad),
        kernel_init=init.kernel,
        bias_init=init.offset(kernel * kernel * x.shape[-1]),
        dtype=dtype,
        name=name,
    )
    return layer(x)


def dense(
    x: Float[Array, "*b c"],
    features: int,
    name: str,
    *,
    bias: bool = True,
    init: Init = FAN_IN,
    dtype=jnp.float32,
) -> Float[Array, "*b d"]:
    """A linear layer over the last axis; a 1x1 convolution is one, and is stored as a matrix."""
    layer = nn.Dense(
        features,
        use_bias=bias,
        kernel_init=init.kernel,
        bias_init=init.offset(x.shape[-1]),
        dtype=dtype,
        name=name,
    )
    return layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], features)


def group_norm(
    x: Float[Array, "*b c"], name: str, *, groups: int = 32, epsilon: float = 1e-5
) -> Float[Array, "*b c"]:
    """Group norm with affine parameters, statistics in float32, result in the dtype of `x`."""
    return nn.GroupNorm(
        num_groups=groups, epsilon=epsilon, use_fast_variance=False, dtype=x.dtype, name=name
    )(x)


def halve(x: Float[Array, "b h w c"]) -> Float[Array, "b i j c"]:
    """The mean of every 2x2 block: resampling with the box filter [1, 1]."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def double(x: Float[Array, "b h w c"]) -> Float[Array, "b i j c"]:
    """Every pixel repeated 2x2."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)


def resample(
    x: Float[Array, "b h w c"],
    direction: str,
    taps: tuple[int, ...] = (1, 1),
    pad: int | None = None,
) -> Float[Array, "b i j c"]:
    """Half (``down``) or double (``up``) the sides with a separable filter of even length.

    `pad` overrides the zeros on every side before a ``down`` (default: what halves exactly).
    """
    if tuple(taps) == (1, 1) and pad is None:
        return halve(x) if direction == "down" else double(x)
    c, size = x.shape[-1], len(taps)
    window = np.outer(taps, taps) / sum(taps) ** 2
    kernel = jnp.asarray(np.tile(window[:, :, None, None], (1, 1, 1, c)), x.dtype)
    options = {"feature_group_count": c, "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    side = size // 2 - 1
    if direction == "down":
        edge = side if pad is None else pad
        edges = ((edge, edge), (edge, edge))
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), edges, **options)
    edge = size - 1 - side
    edges = ((edge, edge), (edge, edge))
    return jax.lax.conv_general_dilated(
        x, kernel * 4, (1, 1), edges, lhs_dilation=(2, 2), **options
    )


def attend(qkv: Float[Array, "b h w k"], heads: int, backend: str) -> Float[Array, "b h w c"]:
    """Self-attention over all positions of a map; channels of `qkv` in (q|k|v, head, d) order."""
    b, h, w, c = qkv.shape
    q, k, v = (z.reshape(b, h * w, heads, -1) for z in jnp.split(qkv, 3, axis=-1))
    return layers.attention(q, k, v, backend=backend).reshape(b, h, w, c // 3)


def cross_attend(
    q: Float[Array, "b *t c"],
    k: Float[Array, "b n c"],
    v: Float[Array, "b n c"],
    heads: int,
    backend: str,
) -> Float[Array, "b *t c"]:
    """Attention of the positions of `q` over the tokens `k`, `v`."""
    b, c = q.shape[0], q.shape[-1]
    parts = (z.reshape(b, -1, heads, c // heads) for z in (q, k, v))
    return layers.attention(*parts, backend=backend).reshape(q.shape)


def remat_module(module: type[nn.Module], policy: str) -> type[nn.Module]:
    """The module class whose call is rematerialised by the named policy."""
    layers.check_remat(policy)
    if policy == "none":
        return module
    return nn.remat(module, policy=layers.REMAT_POLICIES[policy])
