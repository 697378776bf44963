"""A velocity is what solvers, guidance and editing see: a pytree callable ``(x, t) -> v``.

Its leaves are parameters and conditions, so it enters `jax.jit` as an argument and other weights do
not compile again; its static fields (network, ``t_max``) say which program it is. Two attributes go
with the call: ``t_max``, where sampling starts (1 for flows; less for imported diffusion models),
and ``network_calls``, how many network evaluations one call executes.
"""

import dataclasses
from typing import Any, Protocol, cast, runtime_checkable

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float

from lfm_jax.errors import UserError
from lfm_jax.models.conditioning import Cond


@runtime_checkable
class Velocity(Protocol):
    """``velocity(x [b, ...], t [b]) -> v [b, ...]`` with its start time and cost."""

    t_max: float
    network_calls: int

    def __call__(self, x: Float[Array, "b ..."], t: Float[Array, " b"]) -> Float[Array, "b ..."]:
        """The velocity ``dx/dt`` at `x`, `t`."""
        ...


@flax.struct.dataclass
class NetworkVelocity:
    """A network with parameters and a condition.

    Attributes:
        params: the network's parameters.
        model: the Linen module.
        cond: the condition of each row, or None.
        t_max: the largest time at which the network is defined.
    """

    params: Any
    model: nn.Module = flax.struct.field(pytree_node=False)
    cond: Cond | None = None
    t_max: float = flax.struct.field(pytree_node=False, default=1.0)

    @property
    def network_calls(self) -> int:
        """One network evaluation a call."""
        return 1

    def __call__(self, x: Float[Array, "b ..."], t: Float[Array, " b"]) -> Float[Array, "b ..."]:
        """The network's velocity in float32, whatever its activations' type."""
        v = self.model.apply({"params": self.params}, x, t, self.cond)
        return cast(Array, v).astype(jnp.float32)


def with_label(velocity: Any, label: Any) -> Any:
    """`velocity` with every row's class replaced by `label` (an int or ``[b]``).

    Raises:
        UserError: the network has no label table, or a class outside it (null included).
    """
    model, cond = getattr(velocity, "model", None), getattr(velocity, "cond", None)
    classes = getattr(model, "num_classes", 0)
    if not classes or cond is None or cond.label is None:
        raise UserError("label: the network was built without classes (model.num_classes: 0)")
    if isinstance(label, int) and not 0 <= label <= classes:
        raise UserError(f"label: {label} is not in 0..{classes} ({classes} is the null class)")
    label = jnp.broadcast_to(jnp.asarray(label, cond.label.dtype), cond.label.shape)
    return dataclasses.replace(velocity, cond=dataclasses.replace(cond, label=label))
