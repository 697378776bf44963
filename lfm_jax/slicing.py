"""Large batches by slices: the memory of a few images instead of all of them.

`jax.lax.map` runs one slice after the other inside one program, so that slicing works under
`jax.jit`. For functions of single images alone: the result is then that of the whole batch.

Slice k of n takes images k, k + n, k + 2n, ...: of a batch that is sharded over devices every slice
then lies on all of them, and nothing is sent about.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Num

from lfm_jax.errors import UserError


def apply_sliced(
    function: Callable[[Any], Any], x: Num[Array | np.ndarray, "b ..."], *, slice_size: int
) -> Any:
    """``function(x)`` in slices of the batch; a last, smaller slice is filled up with zeros.

    Raises:
        UserError: the slice size is not positive.
    """
    if slice_size < 1:
        raise UserError(f"slice_size: {slice_size}, but it must be at least 1")
    batch = x.shape[0]
    if batch <= slice_size:
        return function(x)
    slices = -(-batch // slice_size)
    padding = ((0, slices * slice_size - batch), *(((0, 0),) * (x.ndim - 1)))
    x = jnp.pad(jnp.asarray(x), padding).reshape(slice_size, slices, *x.shape[1:])
    out = jax.lax.map(function, x.swapaxes(0, 1))
    return jax.tree.map(lambda y: y.swapaxes(0, 1).reshape(-1, *y.shape[2:])[:batch], out)
