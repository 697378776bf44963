"""Random streams keyed by position, never by device or by order of execution.

Every random number of a run is a pure function of (seed, stream, position): the position is the
example's place in the data stream while training, and the global sample index while sampling. So a
resumed run draws what the interrupted one would have drawn, and sample ``i`` starts from the same
noise whatever the batch size and the topology.
"""

import enum

import jax
from jaxtyping import Array, Integer, Key


class Stream(enum.IntEnum):
    """Names of the independent streams; the numbers are part of the checkpoint contract."""

    POSTERIOR = 0  # sample of the autoencoder's posterior
    NOISE = 1  # the flow's noise endpoint
    TIME = 2
    MIRROR = 3
    LABEL_DROP = 4
    SAMPLE = 5  # initial noise of generated samples
    SAMPLE_LABEL = 6
    SDE = 7  # Brownian increments
    DROPOUT = 8
    CONDITION = 9  # masks, condition drop
    MMD = 10


def stream_keys(
    key: Key[Array, ""], stream: Stream, positions: Integer[Array, " b"]
) -> Key[Array, " b"]:
    """One key per position: ``fold_in(fold_in(key, stream), position)``."""
    base = jax.random.fold_in(key, int(stream))
    return jax.vmap(lambda position: jax.random.fold_in(base, position))(positions)


def normal(keys: Key[Array, " b"], shape: tuple[int, ...], dtype=None) -> Array:
    """Standard normals ``[b, *shape]`` (float32 unless told), row ``i`` from ``keys[i]`` alone."""
    dtype = dtype or jax.numpy.float32
    return jax.vmap(lambda k: jax.random.normal(k, shape, dtype))(keys)


def uniform(keys: Key[Array, " b"], shape: tuple[int, ...] = ()) -> Array:
    """Uniforms on [0, 1) ``[b, *shape]`` in float32, row ``i`` drawn from ``keys[i]`` alone."""
    return jax.vmap(lambda k: jax.random.uniform(k, shape))(keys)
