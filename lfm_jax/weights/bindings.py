"""Which tensor of a file is which parameter here, and how its axes are laid out on either side.

A family lists `Binding`s; `to_params` and `to_tensors` are the two directions. Layouts only
permute, split and join axes, so that a round trip is exact to the bit.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from lfm_jax.errors import UserError
from lfm_jax.weights.files import TensorFile

Paths = dict[tuple[str, ...], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A pair of inverse rearrangements of one tensor."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


PLAIN = Layout(lambda w: w, lambda w: w)
LINEAR = Layout(lambda w: w.T, lambda w: w.T)
CONV = Layout(lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1))
# 1x1 convolutions are matrices here.
CONV1X1 = Layout(lambda w: w[:, :, 0, 0].T, lambda w: w.T[:, :, None, None])
CONV1D = Layout(lambda w: w[:, :, 0].T, lambda w: w.T[:, :, None])
# A label table without a null row gets one of zeros, and loses it again.
NULL_ROW = Layout(lambda w: np.concatenate([w, np.zeros_like(w[:1])]), lambda w: w[:-1])


def patches(size: int) -> Layout:
    """A convolution of stride `size` as a matrix on patches in (row, column, channel) order."""

    def to_ours(w: np.ndarray) -> np.ndarray:
        return w.transpose(2, 3, 1, 0).reshape(-1, w.shape[0])

    def to_theirs(w: np.ndarray) -> np.ndarray:
        return w.reshape(size, size, -1, w.shape[-1]).transpose(3, 2, 0, 1)

    return Layout(to_ours, to_theirs)


def fused_heads(base: Layout, heads: int, order: str) -> Layout:
    """A fused q, k, v whose output channels come as ``h3d`` or ``hd3``; ours are ``3hd``."""
    sizes = {"h": heads, "3": 3, "d": -1}
    there = [order.index(axis) for axis in "3hd"]
    back = ["3hd".index(axis) for axis in order]

    def to_ours(w: np.ndarray) -> np.ndarray:
        w = base.to_ours(w)
        split = w.reshape(*w.shape[:-1], *(sizes[axis] for axis in order))
        lead = w.ndim - 1
        return split.transpose(*range(lead), *(lead + i for i in there)).reshape(w.shape)

    def to_theirs(w: np.ndarray) -> np.ndarray:
        split = w.reshape(*w.shape[:-1], *(sizes[axis] for axis in "3hd"))
        lead = w.ndim - 1
        w = split.transpose(*range(lead), *(lead + i for i in back)).reshape(w.shape)
        return base.to_theirs(w)

    return Layout(to_ours, to_theirs)


@dataclasses.dataclass(frozen=True)
class Binding:
    """One parameter and its tensor.

    Attributes:
        path: of the parameter.
        names: of its tensor; several are joined along our last axis (separate q, k, v).
        layout: of each tensor.
        index: place along the stacked first axis of the parameter, or -1.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    layout: Layout = PLAIN
    index: int = -1


def layer(path: str, name: str | tuple[str, ...], layout: Layout, index: int = -1) -> list[Binding]:
    """A layer with ``kernel`` and ``bias`` (``weight`` and ``bias`` in the file).

    The bias takes the layout's reordering of output channels along, so `layout` may be a fused one.
    """
    names = (name,) if isinstance(name, str) else name
    parts = tuple(path.split("/"))
    return [
        Binding((*parts, "kernel"), tuple(f"{n}.weight" for n in names), layout, index),
        Binding((*parts, "bias"), tuple(f"{n}.bias" for n in names), PLAIN, index),
    ]


def fused_layer(path: str, name: str, base: Layout, heads: int, order: str) -> list[Binding]:
    """A fused q, k, v layer with another order of its output channels."""
    parts = tuple(path.split("/"))
    return [
        Binding((*parts, "kernel"), (f"{name}.weight",), fused_heads(base, heads, order)),
        Binding((*parts, "bias"), (f"{name}.bias",), fused_heads(PLAIN, heads, order)),
    ]


def norm(path: str, name: str) -> list[Binding]:
    """An affine norm."""
    parts = tuple(path.split("/"))
    return [
        Binding((*parts, "scale"), (f"{name}.weight",)),
        Binding((*parts, "bias"), (f"{name}.bias",)),
    ]


def check(file: TensorFile, bindings: Iterable[Binding], shapes: Any) -> None:
    """Refuse a file whose tensors are not, one by one, those of the parameters of `shapes`.

    Raises:
        UserError: the first tensor that is missing, has another shape, or is left over.
    """
    expected = paths(shapes)
    used, filled = set(), set()
    for binding in bindings:
        if binding.path not in expected:
            raise UserError(
                f"{file.path}: tensor {binding.names[0]!r} has no counterpart in this network "
                f"({'/'.join(binding.path)})"
            )
        shape = expected[binding.path]
        wanted = _their_shapes(binding, shape[1:] if binding.index >= 0 else shape)
        for name, want in zip(binding.names, wanted, strict=True):
            found = file.need(name).shape
            if found != want:
                raise UserError(
                    f"{file.path}: tensor {name!r} has shape {list(found)}, this network takes "
                    f"{list(want)}: another size?"
                )
        used.update(binding.names)
        filled.add(binding.path)
    for name, value in file.tensors.items():
        if name not in used:
            raise UserError(
                f"{file.path}: tensor {name!r} {list(value.shape)} is more than this network has: "
                "another size or family?"
            )
    for path in expected:
        if path not in filled:
            raise UserError(f"{file.path}: nothing in this family fills {'/'.join(path)}")


def to_params(file: TensorFile, bindings: list[Binding], shapes: Any) -> dict:
    """The parameter tree of `shapes` (of arrays or `jax.ShapeDtypeStruct`) from the file's tensors.

    Raises:
        UserError: see `check`.
    """
    check(file, bindings, shapes)
    expected = paths(shapes)
    flat: dict[tuple[str, ...], Any] = {}
    for binding in bindings:
        parts = [binding.layout.to_ours(file.tensors[name]) for name in binding.names]
        value = np.concatenate(parts, axis=-1)
        if binding.index < 0:
            flat[binding.path] = np.ascontiguousarray(value)
            continue
        if binding.path not in flat:
            flat[binding.path] = np.empty(expected[binding.path], np.float32)
        flat[binding.path][binding.index] = value
    return _nest(flat)


def to_tensors(params: Mapping, bindings: Iterable[Binding]) -> dict[str, np.ndarray]:
    """The file's tensors from a parameter tree; the inverse of `to_params`."""
    flat = {path: np.asarray(value, np.float32) for path, value in _flatten(params).items()}
    tensors = {}
    left = set(flat)
    for binding in bindings:
        if binding.path not in flat:
            raise UserError(f"params: {'/'.join(binding.path)} is missing for this family")
        left.discard(binding.path)
        value = flat[binding.path]
        if binding.index >= 0:
            value = value[binding.index]
        for name, part in zip(
            binding.names, np.split(value, len(binding.names), axis=-1), strict=True
        ):
            tensors[name] = np.ascontiguousarray(binding.layout.to_theirs(part))
    if left:
        raise UserError(f"params: {'/'.join(min(left))} has no place in this family's files")
    return tensors


def paths(shapes: Any) -> Paths:
    """Path -> shape of every leaf."""
    return {path: tuple(leaf.shape) for path, leaf in _flatten(shapes).items()}


def _their_shapes(binding: Binding, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    # Zeros with no memory behind them: layouts then only move strides about.
    empty = np.broadcast_to(np.float32(0), shape)
    parts = np.split(empty, len(binding.names), axis=-1) if shape else [empty]
    return [binding.layout.to_theirs(part).shape for part in parts]


def _flatten(tree: Any) -> dict[tuple[str, ...], Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {tuple(key.key for key in path): leaf for path, leaf in leaves}


def _nest(flat: Mapping[tuple[str, ...], Any]) -> dict:
    tree: dict = {}
    for path, value in sorted(flat.items()):
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree
