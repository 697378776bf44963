"""Sums by which damage is found: of files, of JSON values, of arrays wherever they lie.

Storage damages what it keeps, and compressed arrays with a flipped bit often still decode. An array
is summed over the bits b_i of its elements as integers,

    sum_i b_i w_i  mod 2^32,   w_i = i 2654435761 mod 2^32 with its lowest bit set

Integers add up to the same in any order and sharding, and odd weights let no single flipped bit
through.
"""

import hashlib
import io
import json
import os
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lfm_jax import sharding

_FACTOR = 2654435761
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def sums(tree: Any) -> dict[str, list]:
    """Name to [shape, dtype, sum] of every array of a tree on devices."""
    leaves = named(tree)
    values = sharding.fetch(_device_sums(list(leaves.values())))
    return {
        name: [list(leaf.shape), str(leaf.dtype), int(value)]
        for (name, leaf), value in zip(leaves.items(), values, strict=True)
    }


def host_sums(tree: Any) -> dict[str, list]:
    """The same of host arrays, without a device: they may be larger than one."""
    return {
        name: [list(leaf.shape), str(leaf.dtype), _host_sum(np.asarray(leaf))]
        for name, leaf in named(tree).items()
    }


def named(tree: Any) -> dict[str, Any]:
    """Path such as "params/time_in/kernel" to leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@jax.jit
def _device_sums(leaves: list[jax.Array]) -> list[jax.Array]:
    def one(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)
        index, stride = jnp.zeros(x.shape, jnp.uint32), 1
        for axis in reversed(range(x.ndim)):
            places = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
            index += places * np.uint32(stride % 2**32)
            stride *= x.shape[axis]
        return jnp.sum(bits * (index * np.uint32(_FACTOR) | 1), dtype=jnp.uint32)

    return [one(x) for x in leaves]


def _host_sum(array: np.ndarray) -> int:
    bits = np.ascontiguousarray(array).reshape(-1).view(_WORDS[array.dtype.itemsize])
    total, chunk = 0, 1 << 22
    for start in range(0, len(bits), chunk):
        part = bits[start : start + chunk].astype(np.uint32)
        index = np.arange(start, start + len(part), dtype=np.uint64).astype(np.uint32)
        weights = index * np.uint32(_FACTOR) | np.uint32(1)
        total += int((part * weights).sum(dtype=np.uint64))
    return total % 2**32


def file_sha256(path: str | os.PathLike) -> str:
    """sha256 hex of a file, local or in a bucket, read by pieces."""
    with epath.Path(path).open("rb") as file:
        # Binary files can be read into a buffer; the type of `open` does not say so.
        return hashlib.file_digest(cast(io.BufferedReader, file), "sha256").hexdigest()


def seal(values: dict[str, Any], key: str = "checksum") -> dict[str, Any]:
    """JSON values with a sha256 of the rest of them under `key`."""
    content = {name: value for name, value in values.items() if name != key}
    text = json.dumps(content, sort_keys=True)
    return {**content, key: hashlib.sha256(text.encode()).hexdigest()}


def is_sealed(values: dict[str, Any], key: str = "checksum") -> bool:
    """Whether the sum fits; values of before there were any pass."""
    return key not in values or seal(values, key) == values
