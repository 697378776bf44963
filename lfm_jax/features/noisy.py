"""A classifier of noisy latents that knows how noisy they are: it guides, and judges nothing.

Residual blocks of two 3x3 convolutions at each scale, halved until four positions a side are left,
time entering every block as a scale and shift of its second norm (the block of Dhariwal and Nichol
2021, "Diffusion Models Beat GANs", without attention), then a mean over positions and a linear
head.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from lfm_jax.models.layers import sinusoid

TIME_SCALE = 1000.0  # sinusoids were made for times up to a thousand
_GROUPS = 8
_SMALLEST = 4  # positions a side of the last level
_WIDEST = 4  # times the first level's channels


class NoisyClassifier(nn.Module):
    """``x [b, h, w, c], t [b] -> logits [b, num_classes]``.

    Attributes:
        num_classes: of the latents, without a null class.
        width: channels of the first level, a multiple of 8; doubled at each next one, up to four
            times.
        blocks: residual blocks a level.
    """

    num_classes: int
    width: int = 64
    blocks: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], t: Float[Array, " b"]
    ) -> Float[Array, "b classes"]:
        """The logits of each row's classes, float32."""
        time = nn.silu(nn.Dense(4 * self.width, name="time")(sinusoid(TIME_SCALE * t, self.width)))
        x = nn.Conv(self.width, (3, 3), name="stem")(x)
        level = 0
        while True:
            channels = self.width * min(2**level, _WIDEST)
            for _ in range(self.blocks):
                x = self._block(x, time, channels)
            if min(x.shape[1:3]) < 2 * _SMALLEST:
                break
            x = nn.avg_pool(x, (2, 2), strides=(2, 2))
            level += 1
        x = nn.silu(nn.GroupNorm(_GROUPS, name="norm")(x))
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2))).astype(jnp.float32)

    def _block(self, x: Array, time: Array, channels: int) -> Array:
        h = nn.Conv(channels, (3, 3))(nn.silu(nn.GroupNorm(_GROUPS)(x)))
        scale, shift = jnp.split(nn.Dense(2 * channels)(time)[:, None, None, :], 2, axis=-1)
        h = nn.silu(nn.GroupNorm(_GROUPS)(h) * (1 + scale) + shift)
        # Zero at the start: a new block is the identity.
        h = nn.Conv(channels, (3, 3), kernel_init=nn.initializers.zeros)(h)
        return h + (x if x.shape[-1] == channels else nn.Dense(channels)(x))
