"""What a network may be conditioned on: one small frozen pytree for every backbone."""

from typing import Any

import flax.struct


@flax.struct.dataclass
class Cond:
    """The condition of a batch; absent parts are None, and a network ignores what it cannot use.

    Attributes:
        label: class ids ``[b]``; ``num_classes`` is the null label (labels are dropped by the
            loss).
        spatial: a map ``[b, h, w, k]`` at the latent's resolution, concatenated to the network's
            input channels.
        tokens: context tokens ``[b, n, d]`` for cross-attention.

    The fields are not annotated as arrays: transformations put shapes and shardings in their place.
    """

    label: Any = None
    spatial: Any = None
    tokens: Any = None
