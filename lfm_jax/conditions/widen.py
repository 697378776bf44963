"""Parameters of a network without a condition as the start of one with it.

The new input channels get zero weights and new parts their fresh ones, which start at zero where
they enter the network (cross-attention): so the first velocity is the old network's.
"""

from typing import Any

import flax.traverse_util as traverse
import numpy as np

_INPUTS = ("patch/kernel", "conv_in/kernel")  # the first layers of a DiT and of the U-Nets


def widen(old: Any, fresh: Any, *, patch: int = 1) -> Any:
    """`old` with the shapes of `fresh`, where they differ by a condition.

    Args:
        old: parameters on the host.
        fresh: those of the network with the condition (any arrays).
        patch: of a DiT: its first product sees ``patch^2`` positions, channels last.

    Returns:
        Host arrays. What differs for another reason keeps its old shape, for the caller to find.
    """
    old = dict[str, Any](traverse.flatten_dict(old, sep="/"))
    new = dict[str, Any](traverse.flatten_dict(fresh, sep="/"))
    result = dict(old)
    for name, leaf in new.items():
        if name not in old:
            result[name] = np.asarray(leaf)
        elif name in _INPUTS and old[name].shape[-2] < leaf.shape[-2]:
            result[name] = _wider(old[name], leaf.shape, patch if name == _INPUTS[0] else 1)
    return traverse.unflatten_dict(result, sep="/")


def _wider(kernel: np.ndarray, shape: tuple[int, ...], patch: int) -> np.ndarray:
    positions = patch * patch
    *outer, rows, columns = kernel.shape
    parts = kernel.reshape(*outer, positions, rows // positions, columns)
    more = shape[-2] // positions - rows // positions
    padding = [(0, 0)] * (parts.ndim - 2) + [(0, more), (0, 0)]
    return np.pad(parts, padding).reshape(shape)
