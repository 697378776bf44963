"""Pieces that several backbones share: embeddings, attention, norms, patches, rematerialisation.

Statistics of norms, softmax and time embeddings are computed in float32 whatever the activations'
dtype; matrix products run in the activations' dtype with float32 parameters cast on the way.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lfm_jax.errors import UserError

ATTENTION_BACKENDS = ("auto", "xla", "cudnn")

# Name -> what `jax.checkpoint` keeps of a block's forward pass; "none" keeps everything.
REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def remat(function: Callable, policy: str, *, prevent_cse: bool = True) -> Callable:
    """`function` under the named rematerialisation policy; ``"none"`` returns it untouched.

    Raises:
        UserError: an unknown policy.
    """
    check_remat(policy)
    if policy == "none":
        return function
    return jax.checkpoint(function, policy=REMAT_POLICIES[policy], prevent_cse=prevent_cse)


def check_remat(policy: str) -> None:
    """Raise `UserError` unless it is a name of `REMAT_POLICIES`."""
    if policy not in REMAT_POLICIES:
        raise UserError(f"remat: {policy!r} is none of {', '.join(REMAT_POLICIES)}")


def sinusoid(
    t: Float[Array, " b"],
    dim: int,
    *,
    max_period: float = 1e4,
    endpoint: bool = False,
    sin_first: bool = False,
) -> Float[Array, "b dim"]:
    """Sinusoidal embedding ``[cos(t w_k), sin(t w_k)]`` in float32.

    ``w_k = max_period^(-k / n)`` for ``k < n = dim / 2``; with `endpoint` the division is by
    ``n - 1``, so that the slowest frequency is ``1 / max_period`` exactly. Vaswani et al. 2017,
    section 3.5, with the cosine first as in the diffusion literature.
    """
    half = dim // 2
    exponent = np.arange(half) / (half - 1 if endpoint else half)
    angles = t.astype(jnp.float32)[:, None] * (max_period**-exponent).astype(np.float32)[None]
    parts = (jnp.sin(angles), jnp.cos(angles)) if sin_first else (jnp.cos(angles), jnp.sin(angles))
    return jnp.concatenate(parts, axis=-1)


def position_table(height: int, width: int, dim: int) -> np.ndarray:
    """Fixed 2-D sine-cosine table ``[height * width, dim]``: float32, row-major tokens.

    The first half of the channels codes the column, the second the row, each as ``[sin, cos]`` of
    ``position * 10000^(-k / (dim / 4))``: the order that published DiT weights were trained with.
    It is computed for the grid at hand and is no parameter: one network runs on any resolution.
    """
    if dim % 4:
        raise UserError(f"hidden: {dim} must be divisible by 4 for the 2-D position table")
    frequencies = 1e4 ** -(np.arange(dim // 4) / (dim // 4))
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    table = [
        wave(np.outer(positions.ravel(), frequencies))
        for positions in (columns, rows)
        for wave in (np.sin, np.cos)
    ]
    return np.concatenate(table, axis=1).astype(np.float32)


def patchify(x: Float[Array, "b h w c"], patch: int) -> Float[Array, "b t k"]:
    """Tokens in row-major order, each its patch's values in (row, column, channel) order."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, patch * patch * c)


def unpatchify(
    tokens: Float[Array, "b t k"], patch: int, grid: tuple[int, int]
) -> Float[Array, "b h w c"]:
    """The inverse of `patchify` on a `grid` of (rows, columns) of tokens."""
    b = tokens.shape[0]
    x = tokens.reshape(b, *grid, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, grid[0] * patch, grid[1] * patch, -1)


class Dense(nn.Module):
    """``x W + b`` with the rows of `x` flattened to one axis for the product.

    The gradient of W then contracts one axis. With ``[b, t, d]`` it contracts two, which XLA makes
    one by transposing an operand in memory: three times the cost of that product on a CPU.

    Attributes:
        features: output width.  init: of the kernel.  dtype: of the product.
    """

    features: int
    init: Callable = nn.initializers.xavier_uniform()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
        kernel = self.param("kernel", self.init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        y = rows @ kernel.astype(self.dtype) + bias.astype(self.dtype)
        return y.reshape(*x.shape[:-1], self.features)


# The next three have hand-written derivatives for one reason: what is kept for the backward pass.
# Differentiated by rule, a GELU keeps five arrays of its size, a softmax and a norm two each; here
# it is one. They are JVP rules, so that forward mode and higher derivatives work too.


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def layer_norm(x: Float[Array, "*b d"], epsilon: float = 1e-6) -> Float[Array, "*b d"]:
    """Layer norm without affine parameters, statistics in float32, result in the dtype of `x`."""
    return _normalise(x, epsilon)[0]


def _normalise(x: Array, epsilon: float) -> tuple[Array, Array]:
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon)
    return (y * inverse).astype(x.dtype), inverse


@layer_norm.defjvp
def _layer_norm_jvp(epsilon: float, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    y, inverse = _normalise(primals[0], epsilon)
    unit, dx = y.astype(jnp.float32), tangents[0].astype(jnp.float32)
    along = unit * (unit * dx).mean(-1, keepdims=True)
    return y, (inverse * (dx - dx.mean(-1, keepdims=True) - along)).astype(y.dtype)


@jax.custom_jvp
def gelu(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """``x Phi(x)`` by the tanh formula (Hendrycks & Gimpel 2016)."""
    return _gelu_parts(x)[0]


def _gelu_parts(x: Array) -> tuple[Array, Array]:
    """The value and the derivative, which share their tanh."""
    a, b = math.sqrt(2 / math.pi), 0.044715
    tanh = jnp.tanh(a * (x + b * x * x * x))
    half = 0.5 * (1 + tanh)
    slope = half + 0.5 * x * (1 - tanh * tanh) * a * (1 + 3 * b * x * x)
    return x * half, slope


@gelu.defjvp
def _gelu_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    y, slope = _gelu_parts(primals[0])
    return y, slope * tangents[0]


@jax.custom_jvp
def softmax(logits: Float[Array, "*b s"]) -> Float[Array, "*b s"]:
    """Over the last axis, in the dtype given."""
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    return weights / weights.sum(-1, keepdims=True)


@softmax.defjvp
def _softmax_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    weights, change = softmax(primals[0]), tangents[0]
    return weights, weights * (change - (weights * change).sum(-1, keepdims=True))


def modulate(
    x: Float[Array, "b t d"], shift: Float[Array, "b d"], scale: Float[Array, "b d"]
) -> Float[Array, "b t d"]:
    """``x (1 + scale) + shift``, one shift and scale per image."""
    return x * (1 + scale[:, None]) + shift[:, None]


def check_attention(backend: str) -> None:
    """Raise `UserError` unless it is one of `ATTENTION_BACKENDS`."""
    if backend not in ATTENTION_BACKENDS:
        raise UserError(f"attention: {backend!r} is none of {', '.join(ATTENTION_BACKENDS)}")


def attention(
    q: Float[Array, "b t n d"],
    k: Float[Array, "b s n d"],
    v: Float[Array, "b s n d"],
    *,
    backend: str = "auto",
) -> Float[Array, "b t n d"]:
    """Softmax attention over `s`, heads `n`, logits scaled by ``1/sqrt(d)``, softmax in float32.

    Backends: ``xla`` runs everywhere and has a forward-mode derivative; ``cudnn`` is the fused
    kernel (GPU, 16-bit activations, head size a multiple of 8 and at most 128, on Hopper 256;
    reverse mode only); ``auto`` takes cudnn where it runs on any GPU that has it, else xla.
    """
    check_attention(backend)
    if backend == "auto":
        size = q.shape[-1]
        fits = q.dtype in (jnp.bfloat16, jnp.float16) and size % 8 == 0 and size <= 128
        backend = "cudnn" if fits and jax.default_backend() == "gpu" else "xla"
    if backend == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    # Scaling q touches t d numbers a head where scaling the logits touches t s.
    q = q * (1 / math.sqrt(q.shape[-1]))
    logits = jnp.einsum("btnd,bsnd->bnts", q, k, preferred_element_type=jnp.float32)
    return jnp.einsum("bnts,bsnd->btnd", softmax(logits).astype(q.dtype), v)
