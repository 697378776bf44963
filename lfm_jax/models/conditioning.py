"""What a network may be conditioned on: one small frozen pytree for every backbone."""

import flax.struct
from jaxtyping import Array, Float, Integer


@flax.struct.dataclass
class Cond:
    """The condition of a batch; absent parts are None, and a network ignores what it cannot use.

    Attributes:
        label: class ids; ``num_classes`` is the null label (labels are dropped by the loss).
        spatial: a map at the latent's resolution, concatenated to the network's input channels.
        tokens: context tokens for cross-attention.
    """

    label: Integer[Array, " b"] | None = None
    spatial: Float[Array, "b h w k"] | None = None
    tokens: Float[Array, "b n d"] | None = None
