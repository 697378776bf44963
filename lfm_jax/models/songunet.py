"""DDPM++ and NCSN++ (Song et al., 2011.13456) in EDM's formulation (2206.00364, appendix F).

`ddpm++`: sinusoidal embedding, box resampling, plain encoder. `ncsn++`: random Fourier features of
t, filter [1, 3, 3, 1], and a residual encoder: the input, resampled by a convolution of its own, is
added to every level, ``x = aux = (x + conv(aux)) / sqrt 2``.
Both: one head, attention at true resolutions (going up in the last block of the level only), the
time embedding added before the second norm, residual sums scaled by ``sqrt 1/2``.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lfm_jax.models import layers, maps
from lfm_jax.models.adm import EdmBlock, norm
from lfm_jax.models.backbone import UNetBackbone
from lfm_jax.models.conditioning import Cond
from lfm_jax.models.maps import Init, conv, dense
from lfm_jax.models.taps import Taps

XAVIER = Init("xavier", bias=0.0)
NEARLY_ZERO = Init("xavier", weight=1e-5, bias=0.0)
FOURIER_SCALE = 16.0
EPSILON = 1e-6


class SongUNet(UNetBackbone):
    """The network; its common fields are `Backbone`'s and `UNetBackbone`'s.

    Attributes:
        embedding: ``positional`` or ``fourier``; the latter sees t in [0, 1] whatever `time_scale`,
            its frequencies are drawn once with standard deviation 16.
        encoder: ``standard`` or ``residual``.
        filter_taps: of the resampling filter.
        noise_mult: width of the embedding in units of `channels`.
    """

    channels: int = 128
    mult: tuple[int | float, ...] = (2, 2, 2)
    blocks: int = 4
    attention_resolutions: tuple[int, ...] = (16,)
    embedding: str = "positional"
    encoder: str = "standard"
    filter_taps: tuple[int, ...] = (1, 1)
    noise_mult: int = 1

    @nn.compact
    def _network(
        self, x: Array, t: Array, cond: Cond, train: bool, taps: Taps, out_channels: int
    ) -> Array:
        self.check_sides(x)
        emb = self._embed(t, cond).astype(self.dtype)
        module, side = maps.remat_module(EdmBlock, self.remat), x.shape[1]

        def block(y: Array, level: int, name: str, attend: bool = False, direction="") -> Array:
            keep = direction or name.startswith("mid")
            return module(
                y.shape[-1] if keep else self.width(level),
                direction=direction,
                filter_taps=tuple(self.filter_taps),
                heads=int(attend),
                film=False,
                skip_project=True,
                skip_scale=math.sqrt(0.5),
                epsilon=EPSILON,
                dropout=self.dropout,
                init=XAVIER,
                init_zero=NEARLY_ZERO,
                init_attention=Init("xavier", weight=math.sqrt(0.2), bias=0.0),
                attention=self.attention,
                train=train,
                dtype=self.dtype,
                name=name,
            )(y, emb)

        aux = x.astype(self.dtype)
        y = conv(aux, self.channels, "conv_in", init=XAVIER, dtype=self.dtype)
        skips, levels = [y], range(len(self.mult))
        for level in levels:
            attend = side >> level in self.attention_resolutions
            if level:
                y = block(y, level, f"down_{level}_halve", direction="down")
                if self.encoder == "residual":
                    y = aux = self._residual(y, aux, f"down_{level}_aux")
                skips.append(y)
            for i in range(self.blocks):
                y = block(y, level, f"down_{level}_block{i}", attend)
                skips.append(y)
            y = skips[-1] = taps(f"down_{level}", y)

        y = block(y, levels[-1], "mid_block0", attend=True)
        y = taps("mid", block(y, levels[-1], "mid_block1"))

        for level in reversed(levels):
            if level != levels[-1]:
                y = block(y, level, f"up_{level}_double", direction="up")
            for i in range(self.blocks + 1):
                attend = i == self.blocks and side >> level in self.attention_resolutions
                y = jnp.concatenate([y, skips.pop()], axis=-1)
                y = block(y, level, f"up_{level}_block{i}", attend)
            y = taps(f"up_{level}", y)

        y = nn.silu(norm(y, "norm_out", EPSILON))
        return conv(y, out_channels, "conv_out", init=NEARLY_ZERO, dtype=self.dtype)

    def _residual(self, y: Array, aux: Array, name: str) -> Array:
        """Convolve the running input and halve it; the filter's margin is convolved too."""
        size = len(self.filter_taps)
        margin = 1 + (size - 1) // 2
        aux = conv(aux, y.shape[-1], name, padding=(margin, margin), init=XAVIER, dtype=self.dtype)
        return (y + maps.resample(aux, "down", tuple(self.filter_taps), pad=0)) * math.sqrt(0.5)

    def _embed(self, t: Array, cond: Cond) -> Float[Array, "b e"]:
        width = self.channels * self.noise_mult
        if self.embedding == "fourier":
            draw = nn.initializers.normal(FOURIER_SCALE)
            frequencies = jax.lax.stop_gradient(self.param("frequencies", draw, (width // 2,)))
            angles = t.astype(jnp.float32)[:, None] * (2 * jnp.pi * frequencies)
            emb = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        else:
            emb = layers.sinusoid(t * self.time_scale, width, endpoint=True, sin_first=True)
        if self.num_classes:
            label = jnp.full(t.shape, self.num_classes) if cond.label is None else cond.label
            one_hot = jax.nn.one_hot(label, self.num_classes) * math.sqrt(self.num_classes)
            emb = emb + dense(one_hot, width, "labels", init=XAVIER)
        emb = nn.silu(dense(emb, 4 * self.channels, "time_in", init=XAVIER))
        return nn.silu(dense(emb, 4 * self.channels, "time_out", init=XAVIER))
