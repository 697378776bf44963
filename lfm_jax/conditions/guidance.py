"""Classifier-free guidance by a condition and a class at once, each with a scale of its own.

    v = v(0, 0) + w_c (v(c, 0) - v(0, 0)) + w_y (v(c, y) - v(c, 0))

with condition c, class y and 0 for a dropped one (Brooks et al. 2023, "InstructPix2Pix", section
3.2.1). Terms whose weight is nothing are not evaluated: equal scales leave two network calls, a
scale of 1 for either leaves two, both 1 leave the conditional velocity itself.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lfm_jax.errors import UserError
from lfm_jax.flow import NetworkVelocity, with_label
from lfm_jax.flow.guidance import rescaled
from lfm_jax.flow.path import expand
from lfm_jax.models.conditioning import Cond


@flax.struct.dataclass
class Weighted:
    """``sum_k weights[k] v(x, t, conds[k])``; made by `guided`.

    Attributes:
        velocity: the network; its own condition is the last of `conds`.
        conds: conditions of the terms, each for all rows.
        weights: their weights, a leaf: other scales of the same terms do not compile again.
        channels: how many leading channels are guided; None: all.
        interval: outside of these times the last term stands alone.
        rescale: how far the result's per-sample deviation is pulled to the last term's.
    """

    velocity: NetworkVelocity
    conds: tuple[Cond, ...]
    weights: Any
    channels: int | None = flax.struct.field(pytree_node=False, default=None)
    interval: tuple[float, float] = flax.struct.field(pytree_node=False, default=(0.0, 1.0))
    rescale: float = flax.struct.field(pytree_node=False, default=0.0)

    @property
    def t_max(self) -> float:
        """That of the network."""
        return self.velocity.t_max

    @property
    def network_calls(self) -> int:
        """One a term."""
        return len(self.conds)

    def __call__(self, x: Float[Array, "b ..."], t: Float[Array, " b"]) -> Float[Array, "b ..."]:
        """The guided velocity; all terms in one call of a larger batch."""
        count = len(self.conds)

        # The terms of a sample lie side by side, so that a batch sharded over devices stays put.
        def join(*parts):
            return jnp.stack(parts, axis=1).reshape(count * parts[0].shape[0], *parts[0].shape[1:])

        cond = jax.tree.map(join, *self.conds)
        many = dataclasses.replace(self.velocity, cond=cond)
        v = many(join(*[x] * count), join(*[t] * count))
        v = v.reshape(x.shape[0], count, *v.shape[1:])
        full = v[:, -1]
        result = rescaled(jnp.einsum("bk...,k->b...", v, self.weights), full, self.rescale)
        if self.channels is not None:
            result = jnp.concatenate(
                [result[..., : self.channels], full[..., self.channels :]], axis=-1
            )
        if self.interval == (0.0, 1.0):
            return result
        low, high = self.interval
        return jnp.where(expand((low <= t) & (t <= high), x), result, full)


def guided(
    velocity: NetworkVelocity,
    null: Cond,
    *,
    condition_scale: float | int = 1.0,
    label_scale: float | int = 1.0,
    num_classes: int = 0,
    channels: int | None = None,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
) -> Any:
    """`velocity` guided by its condition and its label; 1 to 3 network calls an evaluation.

    Args:
        velocity: the network with condition and label.
        null: the dropped condition of each row (its label is not read).
        condition_scale: w_c, of the spatial map or the tokens.
        label_scale: w_y; without classes 1.
        num_classes: the null label's number; 0 for a network without classes.
        channels, interval, rescale: as in `lfm_jax.flow.classifier_free`.

    Raises:
        UserError: a scale below 0, or of a label that the network has not.
    """
    for name, scale in (("condition_guidance", condition_scale), ("guidance", label_scale)):
        if not scale >= 0:
            raise UserError(f"{name}: {scale:g} is not a number of at least 0")
    if label_scale != 1 and not num_classes:
        raise UserError(
            f"guidance: {label_scale:g} needs a network with a null label; this one has no classes "
            "(scale 1 needs none)"
        )
    full = velocity.cond
    if num_classes:
        kept = with_label(velocity, num_classes).cond
        none = dataclasses.replace(null, label=kept.label)
        terms = [(1 - condition_scale, none), (condition_scale - label_scale, kept)]
        terms.append((label_scale, full))
    else:
        assert full is not None  # `null` would have nothing to stand against
        none = dataclasses.replace(null, label=full.label)
        terms = [(1 - condition_scale, none), (condition_scale, full)]
    # The last term is also what stands outside of the interval.
    keeps_last = interval != (0.0, 1.0) or channels is not None or rescale > 0
    used = [term for term in terms[:-1] if term[0]]
    used += terms[-1:] if terms[-1][0] or keeps_last else []
    if len(used) == 1 and used[0][0] == 1:
        return dataclasses.replace(velocity, cond=used[0][1])
    low, high = interval
    return Weighted(
        velocity=velocity,
        conds=tuple(cond for _, cond in used),
        weights=jnp.asarray([weight for weight, _ in used], jnp.float32),
        channels=channels,
        interval=(float(low), float(high)),
        rescale=float(rescale),
    )
