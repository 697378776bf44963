"""What all backbones share: their common fields, and the way from `x`, `t` to a velocity.

    inner x, t  ->  (condition's map joined)  ->  the network  ->  velocity

The outer two arrows translate the `convention` that the parameters were trained with; in the middle
stands the network's own method `_network`, and the hidden states that it names are captured and
injected through `Taps`.
"""

from collections.abc import Collection, Mapping

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lfm_jax.errors import UserError
from lfm_jax.models import conventions
from lfm_jax.models.conditioning import Cond
from lfm_jax.models.taps import Injection, Taps


class Backbone(nn.Module):
    """A velocity network; call it as ``model.apply({"params": p}, x, t, cond)``.

    Attributes:
        out_channels: channels of the velocity; 0 means those of `x`.
        num_classes: 0 for no labels; the null label is `num_classes`.
        time_scale: `t` in [0, 1] is multiplied by it before the sinusoids, whose frequencies run
            from 1 down to 1e-4. 1000 spreads [0, 1] over the range those frequencies were made for;
            with 1 (what LFM and SiT trained with, hence parity with their weights) most of the
            embedding is constant over [0, 1] and neighbouring times are hard to tell apart.
        convention: time and target that the parameters were trained with; see `conventions`.
        attention: ``auto``, ``xla`` or ``cudnn``; see `layers.attention`.
        remat: what is kept of a block for the backward pass; a name of `layers.REMAT_POLICIES`.
        dtype: of activations; parameters are float32.
    """

    out_channels: int = 0
    num_classes: int = 0
    time_scale: float = 1000.0
    convention: str = "flow"
    attention: str = "auto"
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the hidden states, in order."""
        raise NotImplementedError

    @property
    def t_max(self) -> float:
        """The largest time at which the velocity is defined (below 1 for imported VP networks)."""
        return conventions.t_max(self.convention)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        cond: Cond | None = None,
        train: bool = False,
        capture: Collection[str] = (),
        inject: Mapping[str, Injection] | None = None,
    ) -> Float[Array, "b h w o"] | tuple[Float[Array, "b h w o"], dict[str, Array]]:
        """Velocity at `x`, `t`, in float32; with `capture` also the named hidden states.

        Raises:
            UserError: fields that do not fit the latent or each other, missing context tokens, an
                unknown tap, backend or policy.
        """
        cond = cond or Cond()
        taps = Taps(self.taps, capture, inject)
        inner, time = conventions.enter(self.convention, x, t)
        if cond.spatial is not None:
            inner = jnp.concatenate([inner, cond.spatial.astype(inner.dtype)], axis=-1)
        out_channels = self.out_channels or x.shape[-1]
        output = self._network(inner, time, cond, train, taps, out_channels)
        output = output.astype(jnp.float32)
        return taps.output(conventions.leave(self.convention, output, x, t))

    def _network(
        self,
        x: Float[Array, "b h w k"],
        t: Float[Array, " b"],
        cond: Cond,
        train: bool,
        taps: Taps,
        out_channels: int,
    ) -> Float[Array, "b h w o"]:
        """The network itself: a compact method, in the convention of its parameters."""
        raise NotImplementedError


class UNetBackbone(Backbone):
    """A backbone of levels: maps halve on the way down and double on the way up.

    Attributes:
        channels: width of the first level; level i has ``channels * mult[i]``.
        mult: width factors of the levels.
        blocks: residual blocks a level (one more going up).
        attention_resolutions: sides of the maps that are attended (and always the bottleneck).
        dropout: inside residual blocks while training; needs ``rngs={"dropout": key}``.
    """

    channels: int = 256
    mult: tuple[int | float, ...] = (1, 2, 3, 4)
    blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16, 8, 4)
    dropout: float = 0.0

    @property
    def taps(self) -> tuple[str, ...]:
        """``down_i`` and ``up_i`` end level i on the way down and up, ``mid`` is the bottleneck."""
        levels = range(len(self.mult))
        return (*(f"down_{i}" for i in levels), "mid", *(f"up_{i}" for i in reversed(levels)))

    def width(self, level: int) -> int:
        """Channels of a level."""
        return int(self.channels * self.mult[level])

    def check_sides(self, x: Float[Array, "b h w c"]) -> None:
        """Refuse a map that cannot be halved once between every two levels."""
        factor = 2 ** (len(self.mult) - 1)
        if x.shape[1] % factor or x.shape[2] % factor:
            raise UserError(
                f"mult: {len(self.mult)} levels need sides divisible by {factor}, the latent has "
                f"{x.shape[1]}x{x.shape[2]}"
            )
