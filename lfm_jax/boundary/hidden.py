"""Hidden states of the network as a space of their own: read at a state, shifted over a window.

The released code overwrote the hidden state, and from the second call on with the state of the call
before. Here a *delta* is added to what the network computes itself, the same one at every time
inside the window, so a single call, a stretch of the way or all of it are one mechanism. Pooled
``mean`` a space is the average over tokens or positions (a delta is then the same at each of them),
``flat`` is the whole state.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lfm_jax.boundary.hyperplane import Boundary
from lfm_jax.boundary.steer import steer
from lfm_jax.errors import UserError
from lfm_jax.flow.path import expand

POOLS = ("mean", "flat")


def pool(hidden: Float[Array, "b ... c"], how: str) -> Float[Array, "b ..."]:
    """``mean``: ``[b, c]`` over tokens or positions; ``flat``: as it is.

    Raises:
        UserError: another name.
    """
    if how not in POOLS:
        raise UserError(f"pool: {how!r} is none of {', '.join(POOLS)}")
    hidden = hidden.astype(jnp.float32)
    return hidden.mean(axis=tuple(range(1, hidden.ndim - 1))) if how == "mean" else hidden


@partial(jax.jit, static_argnames=("layers", "how"))
def hidden_states(
    velocity: Any,
    x: Float[Array, "b ..."],
    t: Float[Array, " b"],
    layers: tuple[str, ...],
    *,
    how: str = "mean",
) -> dict[str, Array]:
    """Pooled hidden states of a `NetworkVelocity` at `x`, `t`, by the names of its layers.

    Raises:
        UserError: a layer that the network does not have.
    """
    _, hidden = velocity.model.apply(
        {"params": velocity.params}, x, t, velocity.cond, capture=layers
    )
    return {name: pool(hidden[name], how) for name in layers}


def hidden_delta(
    hidden: Float[Array | np.ndarray, "b ..."],
    boundary: Boundary | Sequence[Boundary],
    strength: Any,
    *,
    mode: str = "shift",
    unit: str = "margin",
) -> Float[Array, "b ..."]:
    """What `steer` adds to pooled hidden states; arguments and errors as there."""
    return steer(hidden, boundary, strength, mode=mode, unit=unit) - hidden


@flax.struct.dataclass
class Shifted:
    """A `NetworkVelocity` with deltas added to hidden states inside a window of time.

    Attributes:
        velocity: the velocity.
        deltas: layer -> ``[b, c]`` (added at every token or position) or a whole hidden state.
        window: ``lo <= t <= hi`` is inside.
    """

    velocity: Any
    deltas: dict[str, Array]
    window: tuple[float, float] = flax.struct.field(pytree_node=False, default=(0.0, 1.0))

    @property
    def t_max(self) -> float:
        """Of the velocity."""
        return self.velocity.t_max

    @property
    def network_calls(self) -> int:
        """Of the velocity: one program serves all times."""
        return self.velocity.network_calls

    def __call__(self, x: Float[Array, "b ..."], t: Float[Array, " b"]) -> Float[Array, "b ..."]:
        """The velocity with the deltas where `t` is inside the window."""
        low, high = self.window
        inside = (low <= t) & (t <= high)

        def add(delta):
            def inject(hidden):
                wide = delta
                if delta.ndim < hidden.ndim:
                    middle = (1,) * (hidden.ndim - delta.ndim)
                    wide = delta.reshape(delta.shape[0], *middle, delta.shape[-1])
                return hidden + jnp.where(expand(inside, hidden), wide, 0.0).astype(hidden.dtype)

            return inject

        inject = {name: add(delta) for name, delta in self.deltas.items()}
        v = self.velocity.model.apply(
            {"params": self.velocity.params}, x, t, self.velocity.cond, inject=inject
        )
        return v.astype(jnp.float32)


def check_window(window: tuple[float, float]) -> tuple[float, float]:
    """The window as floats.

    Raises:
        UserError: not ``lo <= hi`` within [0, 1].
    """
    if len(window) != 2 or not 0 <= window[0] <= window[1] <= 1:
        raise UserError(f"window: {window} is not lo <= hi within [0, 1]")
    return float(window[0]), float(window[1])


def default_layer(taps: tuple[str, ...]) -> str:
    """The middle of the network: the bottleneck of a U-Net, the block at half depth of a DiT."""
    return "mid" if "mid" in taps else taps[len(taps) // 2]
