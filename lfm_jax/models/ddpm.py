"""The U-Net of DDPM (Ho et al., 2006.11239), as DDIM's PyTorch code and its checkpoints have it.

The linear-beta era: additive time embedding, one attention head, 1x1 q, k and v, strided
convolutions padded on the right and bottom only. These are the networks that MMD-DDM finetunes and
BoundaryDiffusion edits; imported, they predict noise (``convention="vp"``).
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lfm_jax.errors import UserError
from lfm_jax.models import layers, maps
from lfm_jax.models.backbone import UNetBackbone
from lfm_jax.models.conditioning import Cond
from lfm_jax.models.maps import conv, dense, group_norm
from lfm_jax.models.taps import Taps

EPSILON = 1e-6


class Residual(nn.Module):
    """``skip(x) + conv(silu(norm(conv(silu(norm x)) + W silu(emb))))``."""

    features: int
    dropout: float
    train: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], emb: Float[Array, "b e"]) -> Array:
        y = nn.silu(group_norm(x, "norm1", epsilon=EPSILON))
        y = conv(y, self.features, "conv1", dtype=self.dtype)
        y = y + dense(nn.silu(emb), self.features, "emb", dtype=self.dtype)[:, None, None]
        y = nn.silu(group_norm(y, "norm2", epsilon=EPSILON))
        y = nn.Dropout(self.dropout, deterministic=not self.train)(y)
        y = conv(y, self.features, "conv2", dtype=self.dtype)
        if x.shape[-1] != self.features:
            x = conv(x, self.features, "skip", kernel=1, dtype=self.dtype)
        return x + y


class Attend(nn.Module):
    """One head of attention over the map."""

    attention: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Array:
        c = x.shape[-1]
        y = group_norm(x, "norm", epsilon=EPSILON)
        y = maps.attend(dense(y, 3 * c, "qkv", dtype=self.dtype), 1, self.attention)
        return x + dense(y, c, "proj", dtype=self.dtype)


class DDPM(UNetBackbone):
    """The network; its fields are `Backbone`'s and `UNetBackbone`'s. It knows no labels."""

    channels: int = 128
    mult: tuple[int | float, ...] = (1, 1, 2, 2, 4, 4)
    attention_resolutions: tuple[int, ...] = (16,)

    @nn.compact
    def _network(
        self, x: Array, t: Array, cond: Cond, train: bool, taps: Taps, out_channels: int
    ) -> Array:
        self.check_sides(x)
        if self.num_classes:
            raise UserError(
                f"num_classes: {self.num_classes}, but ddpm knows no labels; expected 0"
            )
        emb = layers.sinusoid(t * self.time_scale, self.channels, endpoint=True, sin_first=True)
        emb = dense(
            nn.silu(dense(emb, 4 * self.channels, "time_in")), 4 * self.channels, "time_out"
        )
        emb = emb.astype(self.dtype)
        residual = maps.remat_module(Residual, self.remat)
        attend = maps.remat_module(Attend, self.remat)

        def block(y: Array, level: int, name: str) -> Array:
            layer = residual(self.width(level), self.dropout, train, self.dtype, name=name)
            return layer(y, emb)

        def attended(y: Array, name: str) -> Array:
            return attend(self.attention, self.dtype, name=name)(y)

        y = conv(x.astype(self.dtype), self.channels, "conv_in", dtype=self.dtype)
        skips, levels = [y], range(len(self.mult))
        here = [x.shape[1] >> level in self.attention_resolutions for level in levels]
        for level in levels:
            for i in range(self.blocks):
                y = block(y, level, f"down_{level}_block{i}")
                y = attended(y, f"down_{level}_attention{i}") if here[level] else y
                skips.append(y)
            y = skips[-1] = taps(f"down_{level}", y)
            if level != levels[-1]:
                name = f"down_{level}_halve"
                y = conv(y, y.shape[-1], name, stride=2, padding=(0, 1), dtype=self.dtype)
                skips.append(y)

        y = attended(block(y, levels[-1], "mid_block0"), "mid_attention")
        y = taps("mid", block(y, levels[-1], "mid_block1"))

        for level in reversed(levels):
            for i in range(self.blocks + 1):
                y = block(jnp.concatenate([y, skips.pop()], axis=-1), level, f"up_{level}_block{i}")
                y = attended(y, f"up_{level}_attention{i}") if here[level] else y
            y = taps(f"up_{level}", y)
            if level:
                y = conv(maps.double(y), y.shape[-1], f"up_{level}_double", dtype=self.dtype)

        y = nn.silu(group_norm(y, "norm_out", epsilon=EPSILON))
        return conv(y, out_channels, "conv_out", dtype=self.dtype)
