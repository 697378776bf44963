"""The guided-diffusion U-Net (Dhariwal & Nichol, 2105.05233), LFM's "origin ADM".

Residual blocks steered by the time embedding (scale and shift after the second norm, or a plain
sum), learned strided convolutions down and nearest neighbour + convolution up (or resampling inside
residual blocks, `resblock_updown`), self-attention on chosen levels. With `context_dim` the
attention becomes a transformer over the map with cross-attention to ``cond.tokens`` (Rombach et
al., 2112.10752): LFM's layout network.

`attention_resolutions` has two readings. ``resolution`` (default) compares with the side of the
map, as the name says. ``factor`` compares with the downsampling factor 1, 2, 4, ..., which is what
the published code does: "16 8" on a 32x32 latent then means attention at 4x4 (factor 8) alone.
Weights published with LFM need ``factor``.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lfm_jax.errors import UserError
from lfm_jax.models import layers, maps
from lfm_jax.models.backbone import UNetBackbone
from lfm_jax.models.conditioning import Cond
from lfm_jax.models.maps import ZERO, conv, dense, group_norm
from lfm_jax.models.taps import Taps

READINGS = ("resolution", "factor")


class ResBlock(nn.Module):
    """``skip(x) + conv(silu(film(norm(conv(silu(norm x))))))``, resampled inside when told."""

    features: int
    scale_shift: bool
    dropout: float
    train: bool
    dtype: DTypeLike
    direction: str = ""  # "down", "up" or neither

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], emb: Float[Array, "b e"]) -> Array:
        y = nn.silu(group_norm(x, "norm1"))
        if self.direction:
            x, y = (maps.resample(z, self.direction) for z in (x, y))
        y = conv(y, self.features, "conv1", dtype=self.dtype)
        width = self.features * (2 if self.scale_shift else 1)
        steer = dense(nn.silu(emb), width, "emb", dtype=self.dtype)[:, None, None]
        if self.scale_shift:
            scale, shift = jnp.split(steer, 2, axis=-1)
            y = group_norm(y, "norm2") * (1 + scale) + shift
        else:
            y = group_norm(y + steer, "norm2")
        y = nn.Dropout(self.dropout, deterministic=not self.train)(nn.silu(y))
        y = conv(y, self.features, "conv2", init=ZERO, dtype=self.dtype)
        if x.shape[-1] != self.features:
            x = conv(x, self.features, "skip", kernel=1, dtype=self.dtype)
        return x + y


class AttentionBlock(nn.Module):
    """``x + W attention(norm x)`` over the positions of a map; W starts at zero."""

    heads: int
    attention: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], tokens: None = None) -> Array:
        c = x.shape[-1]
        qkv = dense(group_norm(x, "norm"), 3 * c, "qkv", dtype=self.dtype)
        y = maps.attend(qkv, self.heads, self.attention)
        return x + dense(y, c, "proj", init=ZERO, dtype=self.dtype)


class SpatialTransformer(nn.Module):
    """`depth` times self-attention, cross-attention to tokens and a gated MLP, on a map."""

    heads: int
    depth: int
    attention: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], tokens: Float[Array, "b n k"]) -> Array:
        c = x.shape[-1]

        def linear(y: Array, features: int, name: str, bias: bool = True) -> Array:
            return dense(y, features, name, bias=bias, dtype=self.dtype)

        def norm(y: Array, name: str) -> Array:
            return nn.LayerNorm(1e-5, dtype=self.dtype, use_fast_variance=False, name=name)(y)

        y = linear(group_norm(x, "norm", epsilon=1e-6), c, "proj_in")
        for i in range(self.depth):
            z = norm(y, f"norm1_{i}")
            for j, source in ((1, z), (2, tokens)):
                if j == 2:
                    z = norm(y, f"norm2_{i}")
                q = linear(z, c, f"q{j}_{i}", bias=False)
                k = linear(source, c, f"k{j}_{i}", bias=False)
                v = linear(source, c, f"v{j}_{i}", bias=False)
                k, v = (part.reshape(part.shape[0], -1, c) for part in (k, v))
                z = maps.cross_attend(q, k, v, self.heads, self.attention)
                y = y + linear(z, c, f"out{j}_{i}")
            value, gate = jnp.split(linear(norm(y, f"norm3_{i}"), 8 * c, f"mlp_in_{i}"), 2, -1)
            y = y + linear(value * nn.gelu(gate, approximate=False), c, f"mlp_out_{i}")
        return x + dense(y, c, "proj_out", init=ZERO, dtype=self.dtype)


class UNet(UNetBackbone):
    """The network; its common fields are `Backbone`'s and `UNetBackbone`'s.

    The label table has ``num_classes + 1`` rows, the last for the null label.

    Attributes:
        attention_reading: of `attention_resolutions`; see the module's docstring.
        heads, head_channels: heads of an attention; `head_channels` > 0 gives ``width /
            head_channels`` of them instead.
        scale_shift, resblock_updown: of the residual blocks.
        context_dim, transformer_depth: with a context width > 0, attention is a transformer with
            cross-attention to ``cond.tokens``.
    """

    attention_resolutions: tuple[int, ...] = (16, 8)
    attention_reading: str = "resolution"
    heads: int = 4
    head_channels: int = 0
    scale_shift: bool = True
    resblock_updown: bool = False
    context_dim: int = 0
    transformer_depth: int = 3

    @nn.compact
    def _network(
        self, x: Array, t: Array, cond: Cond, train: bool, taps: Taps, out_channels: int
    ) -> Array:
        self.check_sides(x)
        if self.attention_reading not in READINGS:
            raise UserError(
                f"attention_reading: {self.attention_reading!r} is none of {', '.join(READINGS)}"
            )
        if self.context_dim and cond.tokens is None:
            raise UserError("cond.tokens: this network (context_dim > 0) needs context tokens")
        emb = self._embed(t, cond).astype(self.dtype)
        res_block = maps.remat_module(ResBlock, self.remat)
        common = {
            "scale_shift": self.scale_shift,
            "dropout": self.dropout,
            "train": train,
            "dtype": self.dtype,
        }

        def block(
            y: Array, level: int, name: str, direction: str = "", keep: bool = False
        ) -> Array:
            width = y.shape[-1] if keep else self.width(level)
            return res_block(width, direction=direction, name=name, **common)(y, emb)

        y = conv(x.astype(self.dtype), self.width(0), "conv_in", dtype=self.dtype)
        skips, levels = [y], range(len(self.mult))
        for level in levels:
            for i in range(self.blocks):
                y = block(y, level, f"down_{level}_block{i}")
                y = self._attend(y, cond, x.shape[1], level, f"down_{level}_attention{i}")
                skips.append(y)
            y = skips[-1] = taps(f"down_{level}", y)
            if level != levels[-1]:
                name = f"down_{level}_halve"
                if self.resblock_updown:
                    y = block(y, level, name, "down", keep=True)
                else:
                    y = conv(y, y.shape[-1], name, stride=2, dtype=self.dtype)
                skips.append(y)

        y = block(y, levels[-1], "mid_block0", keep=True)
        y = self._attend(y, cond, x.shape[1], -1, "mid_attention")
        y = taps("mid", block(y, levels[-1], "mid_block1", keep=True))

        for level in reversed(levels):
            for i in range(self.blocks + 1):
                y = jnp.concatenate([y, skips.pop()], axis=-1)
                y = block(y, level, f"up_{level}_block{i}")
                y = self._attend(y, cond, x.shape[1], level, f"up_{level}_attention{i}")
            y = taps(f"up_{level}", y)
            if level:
                name = f"up_{level}_double"
                if self.resblock_updown:
                    y = block(y, level, name, "up", keep=True)
                else:
                    y = conv(maps.double(y), y.shape[-1], name, dtype=self.dtype)

        y = nn.silu(group_norm(y, "norm_out"))
        return conv(y, out_channels, "conv_out", init=ZERO, dtype=self.dtype)

    def _embed(self, t: Array, cond: Cond) -> Float[Array, "b e"]:
        width = 4 * self.channels
        emb = layers.sinusoid(t * self.time_scale, self.channels)
        emb = dense(nn.silu(dense(emb, width, "time_in")), width, "time_out")
        if self.num_classes:
            table = nn.Embed(
                self.num_classes + 1,
                width,
                embedding_init=nn.initializers.normal(1.0),
                name="labels",
            )
            null = jnp.full(t.shape, self.num_classes)
            emb = emb + table(null if cond.label is None else cond.label)
        return emb

    def _attend(self, y: Array, cond: Cond, side: int, level: int, name: str) -> Array:
        """Attention where this level has it; level -1 is the bottleneck, which always has."""
        place = 2**level if self.attention_reading == "factor" else side // 2 ** max(level, 0)
        if level >= 0 and place not in self.attention_resolutions:
            return y
        width = y.shape[-1]
        heads = width // self.head_channels if self.head_channels else self.heads
        if width % heads:
            raise UserError(f"heads: {heads} does not divide the width {width} of {name}")
        common = {"heads": heads, "attention": self.attention, "dtype": self.dtype, "name": name}
        if self.context_dim:
            module = maps.remat_module(SpatialTransformer, self.remat)
            return module(depth=self.transformer_depth, **common)(y, cond.tokens)
        return maps.remat_module(AttentionBlock, self.remat)(**common)(y)
