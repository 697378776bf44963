"""Guidance as functions that wrap a velocity; what they return is a velocity again.

Classifier-free guidance and autoguidance extrapolate from a weaker velocity to a stronger one,

    v = v_weak + w (v_strong - v_weak),

where the weak one is the null class of the same network (Ho and Salimans 2022; in velocities: Dao
et al. 2023, section 3.3) or a smaller or less trained network (Karras et al. 2024, "Guiding a
Diffusion Model with a Bad Version of Itself"). `lfm_jax.flow.classifier` holds classifier guidance.
A scale of exactly 1 is the strong velocity itself, at its own cost.

``network_calls`` counts what is executed: outside its interval a guided velocity still pays for
both networks, because one compiled program serves all times.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lfm_jax.errors import UserError
from lfm_jax.flow.path import expand
from lfm_jax.flow.velocity import with_label
from lfm_jax.models.conditioning import Cond


@flax.struct.dataclass
class Extrapolated:
    """``weak + scale (strong - weak)``; made by `classifier_free` and `autoguidance`.

    Attributes:
        strong: the velocity to go towards (and to return where guidance is off).
        weak: the velocity to go away from; None: `strong` itself under `null_cond`, evaluated in
            one call of twice the batch.
        null_cond: see `weak`.
        scale: the weight w, a leaf: another scale does not compile again.
        channels: how many leading channels are guided; None: all.
        interval: guidance acts at times ``lo <= t <= hi``.
        rescale: how far the guided velocity's per-sample deviation is pulled to the strong one's.
    """

    strong: Any
    weak: Any
    null_cond: Cond | None
    scale: Any
    channels: int | None = flax.struct.field(pytree_node=False, default=None)
    interval: tuple[float, float] = flax.struct.field(pytree_node=False, default=(0.0, 1.0))
    rescale: float = flax.struct.field(pytree_node=False, default=0.0)

    @property
    def t_max(self) -> float:
        """Where both velocities are defined."""
        return self.strong.t_max if self.weak is None else min(self.strong.t_max, self.weak.t_max)

    @property
    def network_calls(self) -> int:
        """Of both velocities."""
        weak = self.strong if self.weak is None else self.weak
        return self.strong.network_calls + weak.network_calls

    def __call__(self, x: Float[Array, "b ..."], t: Float[Array, " b"]) -> Float[Array, "b ..."]:
        """The guided velocity."""
        strong, weak = self._both(x, t)
        guided = rescaled(weak + self.scale * (strong - weak), strong, self.rescale)
        if self.channels is not None:
            guided = jnp.concatenate(
                [guided[..., : self.channels], strong[..., self.channels :]], axis=-1
            )
        if self.interval == (0.0, 1.0):
            return guided
        low, high = self.interval
        return jnp.where(expand((low <= t) & (t <= high), x), guided, strong)

    def _both(self, x, t):
        if self.weak is not None:
            return self.strong(x, t), self.weak(x, t)

        # The pair of a sample lies side by side, so that a batch sharded over devices stays put.
        def pair(a, b):
            return jnp.stack([a, b], axis=1).reshape(2 * a.shape[0], *a.shape[1:])

        cond = jax.tree.map(pair, self.strong.cond, self.null_cond)
        v = dataclasses.replace(self.strong, cond=cond)(pair(x, x), pair(t, t))
        v = v.reshape(x.shape[0], 2, *v.shape[1:])
        return v[:, 0], v[:, 1]


def classifier_free(
    velocity: Any,
    velocity_null: Any = None,
    *,
    num_classes: int | None = None,
    scale: float | int | Float[Array, ""],
    channels: int | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
) -> Any:
    """Classifier-free guidance of a conditional velocity; two network calls an evaluation.

    Args:
        velocity: the conditional velocity.
        velocity_null: the unconditional one; leave it out to use the null class of `velocity`.
        num_classes: the null class's number, where `velocity_null` is left out (default: what the
            network's table says).
        scale: w; the Python number 1 returns `velocity` itself.
        channels: guided channels from the first on; None: all (LFM), 3 for weights sampled that way
            (DiT, SiT).
        interval: times at which guidance acts (Kynkäänniemi et al. 2024).
        rescale: in [0, 1], pulls the deviation over a sample back to the conditional one (Lin et
            al. 2023, "Common Diffusion Noise Schedules ... are Flawed", section 3.4).

    Raises:
        UserError: a network without a null label, or an option out of range.
    """
    _check(scale=scale, channels=channels, interval=interval, rescale=rescale)
    if isinstance(scale, int | float) and scale == 1:
        return velocity
    null_cond = None
    if velocity_null is None:
        table = getattr(getattr(velocity, "model", None), "num_classes", 0)
        num_classes = table if num_classes is None else num_classes
        if not table or num_classes != table:
            raise UserError(
                f"guidance: {_show(scale)} needs a network with a null label; this one has a table "
                f"of {table} classes, asked for the null label {num_classes} (scale 1 needs none)"
            )
        null_cond = with_label(velocity, num_classes).cond
    low, high = interval
    return Extrapolated(
        strong=velocity,
        weak=velocity_null,
        null_cond=null_cond,
        scale=jnp.asarray(scale, jnp.float32),
        channels=channels,
        interval=(float(low), float(high)),
        rescale=float(rescale),
    )


def autoguidance(
    velocity: Any,
    weak: Any,
    *,
    scale: float | int | Float[Array, ""],
    channels: int | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
) -> Any:
    """Guidance of `velocity` away from a `weak` one of the same task: another checkpoint or size.

    Options and errors as in `classifier_free`.
    """
    return classifier_free(
        velocity, weak, scale=scale, channels=channels, interval=interval, rescale=rescale
    )


def rescaled(
    guided: Float[Array, "b ..."], plain: Float[Array, "b ..."], amount: float
) -> Float[Array, "b ..."]:
    """`guided` with its deviation over each sample pulled to that of `plain` by `amount` in [0, 1].

    Lin et al. 2023, "Common Diffusion Noise Schedules ... are Flawed", section 3.4.
    """
    if not amount:
        return guided
    axes = tuple(range(1, guided.ndim))
    ratio = jnp.std(plain, axes, keepdims=True) / jnp.std(guided, axes, keepdims=True)
    return amount * guided * ratio + (1 - amount) * guided


def _check(*, scale, channels, interval, rescale) -> None:
    if isinstance(scale, int | float) and not scale >= 0:
        raise UserError(f"guidance: {scale:g} is not a number of at least 0")
    if channels is not None and channels < 1:
        raise UserError(f"guidance channels: {channels} is below 1 (None guides all)")
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        raise UserError(f"guidance interval: {interval} is not lo <= hi within [0, 1]")
    if not 0 <= rescale <= 1:
        raise UserError(f"guidance rescale: {rescale:g} is not in [0, 1]")


def _show(scale) -> str:
    return f"{scale:g}" if isinstance(scale, int | float) else "a scale"
