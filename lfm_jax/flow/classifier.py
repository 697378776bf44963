"""Classifier guidance of a flow, from a classifier of noisy latents.

From the Fokker-Planck equation of the straight path (Dao et al. 2023, section 3.3),

    v~ = v - gamma (t / (1 - t)) grad_x log p(c | x_t),

whose weight is infinite at t = 1, where the gradient vanishes for a perfect classifier but not for
a trained one: it is bounded, ``min(t / (1 - t), max_weight)``.
"""

from typing import Any, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from lfm_jax import rng
from lfm_jax.errors import UserError
from lfm_jax.flow import path
from lfm_jax.flow.loss import Loss, draw_latents, draw_times

MAX_WEIGHT = 10.0


@flax.struct.dataclass
class LogProbability:
    """``log p(label | x_t)`` by a network ``model.apply({"params": p}, x, t) -> logits``.

    `label` may be None until the rows are known.
    """

    params: Any
    label: Integer[Array, " b"] | None
    model: nn.Module = flax.struct.field(pytree_node=False)

    def __call__(self, x: Float[Array, "b ..."], t: Float[Array, " b"]) -> Float[Array, " b"]:
        """The log-probability of each row's label."""
        assert self.label is not None  # the rows are known by now
        logits = cast(Array, self.model.apply({"params": self.params}, x, t))
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
        return jnp.take_along_axis(log_p, self.label[:, None], axis=-1)[:, 0]


@flax.struct.dataclass
class ClassifierGuided:
    """A velocity steered by a classifier's gradient; made by `classifier_guidance`."""

    velocity: Any
    log_prob: Any
    scale: Any
    max_weight: float = flax.struct.field(pytree_node=False, default=MAX_WEIGHT)

    @property
    def t_max(self) -> float:
        """The velocity's."""
        return self.velocity.t_max

    @property
    def network_calls(self) -> int:
        """The velocity's, and one of the classifier (forward and backward)."""
        return self.velocity.network_calls + 1

    def __call__(self, x: Float[Array, "b ..."], t: Float[Array, " b"]) -> Float[Array, "b ..."]:
        """The guided velocity."""
        gradient = jax.grad(lambda y: jnp.sum(self.log_prob(y, t)))(x)
        # t / (1 - t) <= w for t <= w / (1 + w): the bound without a division by zero.
        bounded = jnp.minimum(t, self.max_weight / (1 + self.max_weight))
        weight = bounded / (1 - bounded)
        return self.velocity(x, t) - self.scale * path.expand(weight, x) * gradient


def classifier_guidance(
    velocity: Any,
    log_prob: Any,
    *,
    scale: float | int | Float[Array, ""],
    max_weight: float = MAX_WEIGHT,
) -> Any:
    """Steers `velocity` by ``grad log_prob``; scale 0 returns it unchanged.

    Args:
        velocity: any velocity, guided or not.
        log_prob: a pytree callable ``(x, t) -> log p(c | x_t) [b]``, e.g. `LogProbability`.
        scale: gamma.
        max_weight: the bound of ``t / (1 - t)``.

    Raises:
        UserError: ``max_weight`` not above 0.
    """
    if not max_weight > 0:
        raise UserError(f"max_weight: {max_weight:g} is not above 0")
    if isinstance(scale, int | float) and scale == 0:
        return velocity
    return ClassifierGuided(
        velocity=velocity,
        log_prob=log_prob,
        scale=jnp.asarray(scale, jnp.float32),
        max_weight=float(max_weight),
    )


def noisy_classifier_loss(
    model: nn.Module, *, scale: float, shift: float = 0.0, mirror: bool = False
) -> Loss:
    """Cross-entropy of ``model.apply({"params": p}, x_t, t)``, as the train step wants a loss.

    Latents without a label (-1) are left out.
    """

    def loss(params, batch, key):
        position = batch["position"]
        x0 = draw_latents(batch, key, scale=scale, shift=shift, mirror=mirror)
        noise = rng.normal(rng.stream_keys(key, rng.Stream.NOISE, position), x0.shape[1:])
        t = draw_times(rng.stream_keys(key, rng.Stream.TIME, position))
        x = path.interpolate(x0, noise, t)
        logits = cast(Array, model.apply({"params": params}, x, t))
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
        label = batch["label"]
        known = label >= 0
        count = jnp.maximum(jnp.sum(known), 1)
        picked = jnp.take_along_axis(log_p, jnp.maximum(label, 0)[:, None], axis=-1)[:, 0]
        right = known & (jnp.argmax(log_p, -1) == label)
        return -jnp.sum(jnp.where(known, picked, 0)) / count, {"accuracy": jnp.sum(right) / count}

    return loss
