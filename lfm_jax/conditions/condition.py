"""What a condition is: a small module between stored arrays and the input of a velocity network.

    prepare, encode   images -> arrays, once, stored in the latent cache beside the moments
    pick              stored arrays -> the arrays of one visit (which of several masks, which order)
    apply             those arrays -> `Cond`, through the condition's encoder where it has one

Training calls `pick` and `apply` inside the loss, so that the encoder's parameters (the subtree
``"condition"`` of the parameters; a network does not look at it) get gradients with the network's.
Sampling calls `prepare`, `encode` and `apply` once, before the solve.

A dropped condition is the null of classifier-free guidance. Labels are dropped on their own, and
with half of the dropped conditions, so that all four combinations are trained.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Key, UInt8

from lfm_jax import rng
from lfm_jax.flow.loss import drop_labels
from lfm_jax.models import Cond, init_params
from lfm_jax.vae import Codec

ENCODER = "condition"  # the encoder's place in the parameters
Arrays = dict[str, Any]


@runtime_checkable
class Condition(Protocol):
    """A frozen, hashable description; see the module's docstring.

    Attributes:
        name: what configs call it.
    """

    name: ClassVar[str]

    @property
    def drop(self) -> float:
        """Probability of the null condition in training."""
        ...

    def stored(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of each array of an example in the cache."""
        ...

    def prepare(
        self, images: UInt8[np.ndarray, "n h w c"], indices: np.ndarray
    ) -> dict[str, np.ndarray]:
        """What of the stored arrays comes from the host: masks, maps, boxes."""
        ...

    def encode(self, codec: Codec, images: Array, arrays: Arrays) -> Arrays:
        """What of the stored arrays comes from the autoencoder; `images` are in [-1, 1]."""
        ...

    def pick(self, batch: Arrays, keys: Key[Array, " b"]) -> Arrays:
        """The arrays of one visit, chosen by one key an example."""
        ...

    def first(self, arrays: Arrays) -> Arrays:
        """The arrays that sampling uses: `pick` without chance."""
        ...

    def encoder(self) -> nn.Module | None:
        """The trained network between arrays and `Cond`, or None."""
        ...

    def apply(self, params: Any, picked: Arrays, keep: Bool[Array, " b"]) -> Cond:
        """The network's input; rows that are not kept get the null condition."""
        ...


def init_conditioned(
    condition: Condition, model: nn.Module, key: Key[Array, ""], latent_shape: tuple[int, int, int]
) -> dict:
    """Fresh parameters of a network and of its condition's encoder."""
    zeros = {
        name: jnp.zeros((1, *shape), dtype) for name, (shape, dtype) in condition.stored().items()
    }
    picked, keep = condition.first(zeros), jnp.ones(1, bool)
    module, params = condition.encoder(), {}
    if module is not None:
        params = {ENCODER: module.init(jax.random.fold_in(key, 1), picked, keep)["params"]}
    example = encoded(condition, params, picked, keep)
    return {**init_params(model, key, latent_shape, example), **params}


def input_sizes(condition: Condition, latent_shape: tuple[int, int, int]) -> dict[str, Any]:
    """What a condition adds to a network's input, as `lfm_jax.models.forward_macs` takes it."""

    def example():
        zeros = {
            k: jnp.zeros((1, *shape), dtype) for k, (shape, dtype) in condition.stored().items()
        }
        picked, keep, module = condition.first(zeros), jnp.ones(1, bool), condition.encoder()
        params = {} if module is None else module.init(jax.random.key(0), picked, keep)["params"]
        cond = condition.apply(params, picked, keep)
        return cond.spatial, cond.tokens

    spatial, tokens = jax.eval_shape(example)
    sizes: dict[str, Any] = {}
    if spatial is not None:
        sizes["in_channels"] = latent_shape[2] + spatial.shape[-1]
    if tokens is not None:
        sizes["tokens"] = tokens.shape[1:]
    return sizes


def encoded(condition: Condition, params: Any, picked: Arrays, keep: Bool[Array, " b"]) -> Cond:
    """`Condition.apply` with the encoder's part of all parameters."""
    return condition.apply(params.get(ENCODER), picked, keep)


def training_condition(
    condition: Condition, *, num_classes: int = 0, label_drop: float = 0.1
) -> Callable[[Any, Arrays, Key[Array, ""]], Cond]:
    """The ``condition`` argument of `lfm_jax.flow.flow_matching_loss`.

    Args:
        condition: applied to the stored arrays of each batch.
        num_classes: also condition on the label; 0: not.
        label_drop: probability of the null label where the condition is kept.
    """

    def cond(params: Any, batch: Arrays, key: Key[Array, ""]) -> Cond:
        position = batch["position"]
        keys = rng.stream_keys(key, rng.Stream.CONDITION, position)
        chance = rng.uniform(keys, (2,))
        keep = chance[:, 0] >= condition.drop
        result = encoded(condition, params, condition.pick(batch, keys), keep)
        if not num_classes:
            return result
        label_keys = rng.stream_keys(key, rng.Stream.LABEL_DROP, position)
        label = drop_labels(
            batch["label"], label_keys, num_classes=num_classes, label_drop=label_drop
        )
        label = jnp.where(~keep & (chance[:, 1] < 0.5), num_classes, label)
        return dataclasses.replace(result, label=label)

    return cond
