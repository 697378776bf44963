"""The pre-norm vision transformer that CLIP's image tower and DINOv2 share.

Patches to tokens, a class token, learned positions, ``depth`` blocks of attention and MLP, a last
norm; the two families differ in the activation, a norm before the blocks, layer scale and the bias
of the patch embedding, and are given by those four (Dosovitskiy et al., 2021; Touvron et al.,
2021).
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


def quick_gelu(x: Array) -> Array:
    """``x sigmoid(1.702 x)``, CLIP's."""
    return x * nn.sigmoid(1.702 * x)


class VisionTransformer(nn.Module):
    """``x [b, s, s, 3]`` -> normalised tokens ``[b, 1 + (s/p)^2, width]``, the class token first.

    Attributes:
        patch, width, depth, heads, mlp: patch side, token width, blocks, heads, hidden width.
        quick: `quick_gelu` in the MLP instead of the exact GELU.
        pre_norm: a layer norm between positions and blocks.
        layer_scale: a learned factor per channel at the end of every residual branch.
        patch_bias: a bias in the patch embedding.
        epsilon: of every layer norm.
    """

    patch: int
    width: int
    depth: int
    heads: int
    mlp: int
    quick: bool = False
    pre_norm: bool = False
    layer_scale: bool = False
    patch_bias: bool = True
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "b s s 3"]) -> Float[Array, "b n d"]:
        b, p = x.shape[0], self.patch
        x = nn.Conv(
            self.width, (p, p), (p, p), "VALID", use_bias=self.patch_bias, name="patch_embed"
        )(x).reshape(b, -1, self.width)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(token, (b, 1, self.width)), x], 1)
        position = nn.initializers.normal(0.02)
        x = x + self.param("position", position, (1, x.shape[1], self.width))
        if self.pre_norm:
            x = self._norm("pre_norm")(x)
        for i in range(self.depth):
            x = x + self._scaled(f"scale{i}_attention", self._attention(f"block{i}", x))
            x = x + self._scaled(f"scale{i}_mlp", self._mlp(f"block{i}", x))
        return self._norm("norm")(x)

    def _norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(epsilon=self.epsilon, use_fast_variance=False, name=name)

    def _scaled(self, name: str, x: Array) -> Array:
        if not self.layer_scale:
            return x
        return x * self.param(name, nn.initializers.ones, (self.width,))

    def _attention(self, name: str, x: Array) -> Array:
        x = self._norm(f"{name}_norm1")(x)
        qkv = nn.Dense(3 * self.width, name=f"{name}_qkv")(x)
        qkv = qkv.reshape(*x.shape[:2], 3, self.heads, -1)
        q, k, v = (qkv[:, :, i] for i in range(3))
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        x = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(logits), v).reshape(x.shape)
        return nn.Dense(self.width, name=f"{name}_out")(x)

    def _mlp(self, name: str, x: Array) -> Array:
        x = nn.Dense(self.mlp, name=f"{name}_up")(self._norm(f"{name}_norm2")(x))
        x = quick_gelu(x) if self.quick else nn.gelu(x, approximate=False)
        return nn.Dense(self.width, name=f"{name}_down")(x)
