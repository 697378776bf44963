"""Named hidden states of a network: read them out, add to them, or put others in their place.

Every network of this package names the points of its trunk (``block_07`` of a DiT, ``mid`` of a
U-Net). A call may *capture* some of them and *inject* into some of them: editing moves the hidden
state along a direction, MMD reads it as a feature. With both off nothing is traced, so that the
compiled program is the one of a network without taps.

The captured state is the one that the network goes on with, i.e. the state *after* an injection
at the same point, so that what was read can be put back and gives the same output.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import flax.struct
import jax
from jaxtyping import Array

from lfm_jax.errors import UserError


@flax.struct.dataclass
class Replace:
    """An injection that takes the place of the hidden state (a bare array is added to it)."""

    value: Array


Injection = Array | Replace | Callable[[Array], Array]


class Taps:
    """The taps of one call; made anew inside each call, holds what was captured.

    Args:
        names: the points of this network, in order.
        capture: names to read out.
        inject: name -> array to add (anything that broadcasts), `Replace`, or a function of the
            hidden state.

    Raises:
        UserError: a name that this network does not have.
    """

    def __init__(
        self,
        names: Sequence[str],
        capture: Collection[str] = (),
        inject: Mapping[str, Injection] | None = None,
    ):
        self.capture = tuple(capture)
        self.inject = dict(inject or {})
        self.captured: dict[str, Array] = {}
        for kind, wanted in (("capture", self.capture), ("inject", self.inject)):
            for name in wanted:
                if name not in names:
                    raise UserError(
                        f"{kind}: this network has no hidden state {name!r}; it has "
                        f"{', '.join(names)}"
                    )

    def active(self, name: str) -> bool:
        return name in self.capture or name in self.inject

    def __call__(self, name: str, hidden: Array) -> Array:
        if name in self.inject:
            what = self.inject[name]
            if isinstance(what, Replace):
                value = jax.numpy.asarray(what.value, hidden.dtype)
                hidden = jax.numpy.broadcast_to(value, hidden.shape)
            elif callable(what):
                hidden = what(hidden).astype(hidden.dtype)
            else:
                hidden = hidden + jax.numpy.asarray(what).astype(hidden.dtype)
        if name in self.capture:
            self.captured[name] = hidden
        return hidden

    def output(self, velocity: Array) -> Array | tuple[Array, dict[str, Array]]:
        """The velocity alone, or with the captured states when some were asked for."""
        return (velocity, self.captured) if self.capture else velocity
