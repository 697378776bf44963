"""The ADM U-Net as EDM re-built it (Karras et al., 2206.00364, appendix F), LFM's "adm".

Against `unet` (the original): resampling by a box filter inside residual blocks, 64 channels a head
at every attention, attention at true resolutions inside the residual blocks of both halves and in
the first bottleneck block, labels by a bias-free linear layer on the one-hot vector, so that the
null label is the zero vector and needs no row of its own.

`EdmBlock` is also what `songunet` is made of. With `context` its attention becomes a small
transformer (self-attention, cross-attention to tokens, SiLU MLP): the "adm_context" network, whose
context is ``cond.tokens``, or a learned vector of the label when there are none.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lfm_jax.errors import UserError
from lfm_jax.models import layers, maps
from lfm_jax.models.backbone import UNetBackbone
from lfm_jax.models.conditioning import Cond
from lfm_jax.models.maps import FAN_IN, ZERO, Init, conv, dense
from lfm_jax.models.taps import Taps


def norm(x: Array, name: str, epsilon: float) -> Array:
    """Group norm of at most 32 groups of at least 4 channels."""
    groups = max(1, min(32, x.shape[-1] // 4))
    return maps.group_norm(x, name, groups=groups, epsilon=epsilon)


class EdmBlock(nn.Module):
    """Residual block with optional resampling and attention; see figure and table of appendix F.

    Attributes:
        direction, filter_taps: resample inside; the separable filter.
        heads: 0 for no attention.
        film: steer by scale and shift (ADM) or by a sum before the norm (DDPM++).
        skip_project: a 1x1 convolution on the skip of a resampling block (DDPM++).
        skip_scale: multiplies each residual sum.
        context: attention becomes a transformer with cross-attention to tokens.
    """

    features: int
    direction: str = ""
    filter_taps: tuple[int, ...] = (1, 1)
    heads: int = 0
    film: bool = True
    skip_project: bool = False
    skip_scale: float = 1.0
    epsilon: float = 1e-5
    dropout: float = 0.0
    context: bool = False
    init: Init = FAN_IN
    init_zero: Init = ZERO
    init_attention: Init = FAN_IN
    attention: str = "auto"
    train: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        emb: Float[Array, "b e"],
        tokens: Float[Array, "b n k"] | None = None,
    ) -> Array:
        c, d = self.features, self.dtype
        y = nn.silu(norm(x, "norm0", self.epsilon))
        if self.direction:
            x, y = (maps.resample(z, self.direction, self.filter_taps) for z in (x, y))
        y = conv(y, c, "conv0", init=self.init, dtype=d)
        steer = dense(emb, c * (2 if self.film else 1), "affine", init=self.init, dtype=d)
        steer = steer[:, None, None]
        if self.film:
            scale, shift = jnp.split(steer, 2, axis=-1)
            y = nn.silu(norm(y, "norm1", self.epsilon) * (1 + scale) + shift)
        else:
            y = nn.silu(norm(y + steer, "norm1", self.epsilon))
        y = nn.Dropout(self.dropout, deterministic=not self.train)(y)
        y = conv(y, c, "conv1", init=self.init_zero, dtype=d)
        if x.shape[-1] != c or (self.skip_project and self.direction):
            x = conv(x, c, "skip", kernel=1, init=self.init, dtype=d)
        x = (x + y) * self.skip_scale
        if not self.heads:
            return x
        if self.context:
            assert tokens is not None  # the network has looked
            return self._transformer(x, tokens)
        qkv = dense(norm(x, "norm2", self.epsilon), 3 * c, "qkv", init=self.init_attention, dtype=d)
        y = maps.attend(qkv, self.heads, self.attention)
        return (x + dense(y, c, "proj", init=self.init_zero, dtype=d)) * self.skip_scale

    def _transformer(self, x: Array, tokens: Array) -> Array:
        c = self.features

        def linear(y: Array, features: int, name: str, init: Init = self.init_attention) -> Array:
            return dense(y, features, name, init=init, dtype=self.dtype)

        y = maps.attend(
            linear(norm(x, "norm2", self.epsilon), 3 * c, "qkv"), self.heads, self.attention
        )
        x = x + linear(y, c, "proj", self.init_zero)
        q = linear(norm(x, "norm3", self.epsilon), c, "cross_q")
        k, v = jnp.split(linear(tokens, 2 * c, "cross_kv"), 2, axis=-1)
        y = maps.cross_attend(q, k, v, self.heads, self.attention)
        x = x + linear(y, c, "cross_proj", self.init_zero)
        y = nn.silu(linear(norm(x, "norm4", self.epsilon), 4 * c, "mlp_in"))
        return x + linear(y, c, "mlp_out", self.init_zero)


class ADM(UNetBackbone):
    """The network; its common fields are `Backbone`'s and `UNetBackbone`'s.

    Attributes:
        head_channels: channels a head.
        context_dim: width of ``cond.tokens``; > 0 makes each attention a transformer over them.
            Without tokens in the condition the label is the context: one token of this width.
    """

    head_channels: int = 64
    context_dim: int = 0

    @nn.compact
    def _network(
        self, x: Array, t: Array, cond: Cond, train: bool, taps: Taps, out_channels: int
    ) -> Array:
        self.check_sides(x)
        emb, tokens = self._embed(t, cond)
        emb = emb.astype(self.dtype)
        module, side = maps.remat_module(EdmBlock, self.remat), x.shape[1]

        def block(y: Array, level: int, name: str, attend: bool = False, direction="") -> Array:
            keep = direction or name.startswith("mid")
            width = y.shape[-1] if keep else self.width(level)
            if attend and (self.head_channels < 1 or width % self.head_channels):
                raise UserError(f"head_channels: {self.head_channels} does not divide {width}")
            return module(
                width,
                direction=direction,
                heads=width // self.head_channels if attend else 0,
                dropout=self.dropout,
                context=self.context_dim > 0,
                attention=self.attention,
                train=train,
                dtype=self.dtype,
                name=name,
            )(y, emb, tokens)

        y = conv(x.astype(self.dtype), self.width(0), "conv_in", dtype=self.dtype)
        skips, levels = [y], range(len(self.mult))
        for level in levels:
            attend = side >> level in self.attention_resolutions
            if level:
                y = block(y, level, f"down_{level}_halve", direction="down")
                skips.append(y)
            for i in range(self.blocks):
                y = block(y, level, f"down_{level}_block{i}", attend)
                skips.append(y)
            y = skips[-1] = taps(f"down_{level}", y)

        y = block(y, levels[-1], "mid_block0", attend=True)
        y = taps("mid", block(y, levels[-1], "mid_block1"))

        for level in reversed(levels):
            attend = side >> level in self.attention_resolutions
            if level != levels[-1]:
                y = block(y, level, f"up_{level}_double", direction="up")
            for i in range(self.blocks + 1):
                y = jnp.concatenate([y, skips.pop()], axis=-1)
                y = block(y, level, f"up_{level}_block{i}", attend)
            y = taps(f"up_{level}", y)

        y = nn.silu(norm(y, "norm_out", 1e-5))
        return conv(y, out_channels, "conv_out", init=ZERO, dtype=self.dtype)

    def _embed(self, t: Array, cond: Cond) -> tuple[Float[Array, "b e"], Array | None]:
        width = 4 * self.channels
        emb = layers.sinusoid(t * self.time_scale, self.channels)
        emb = dense(nn.silu(dense(emb, width, "time_in")), width, "time_out")
        tokens = cond.tokens if self.context_dim else None
        if self.num_classes and tokens is not None:
            raise UserError(
                f"num_classes: {self.num_classes} with cond.tokens; this network takes classes or "
                "tokens, not both"
            )
        if self.num_classes:
            # A label out of range, the null label above all, has the zero vector as its one-hot.
            label = jnp.full(t.shape, self.num_classes) if cond.label is None else cond.label
            if self.context_dim:
                table = nn.Embed(
                    self.num_classes + 1,
                    self.context_dim,
                    embedding_init=nn.initializers.normal(0.02),
                    name="context_labels",
                )
                tokens = table(label)[:, None]
            else:
                one_hot = jax.nn.one_hot(label, self.num_classes)
                init = Init(weight=math.sqrt(3 * self.num_classes))
                emb = emb + dense(one_hot, width, "labels", bias=False, init=init)
        if self.context_dim and tokens is None:
            raise UserError("cond.tokens: this network (context_dim > 0) needs tokens or classes")
        return nn.silu(emb), tokens
