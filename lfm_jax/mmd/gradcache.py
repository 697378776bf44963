"""GradCache: a loss over the pairs of a large batch at the memory of a small one."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from lfm_jax import rng
from lfm_jax.errors import UserError

Metrics = dict[str, Float[Array, ""]]


def gradcache(
    generator: Callable,
    compare: Callable,
    params: Any,
    batch: dict[str, Array],
    key: Key[Array, ""],
    *,
    chunks: int,
    backward: int = 0,
) -> tuple[Float[Array, ""], Metrics]:
    """``compare(generator(params, batch))`` with one chunk's activations in memory at a time.

    First all rows are generated without gradients; then the loss is differentiated with respect to
    the rows, which are small; then every chunk runs again from the same keys and carries its rows'
    gradients on (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size"). Exact, at the
    price of one more forward pass.

    Args:
        backward: carry on the gradients of so many random chunks only, scaled up: unbiased.

    Raises:
        UserError: chunks that do not divide the batch.
    """
    count = len(batch["position"])
    if chunks < 1 or count % chunks:
        raise UserError(f"chunks: {chunks} is no divisor of the batch of {count}")
    if not 0 <= backward <= chunks:
        raise UserError(f"backward_chunks: {backward} is not in 0..{chunks}")

    split = functools.partial(_split, chunks=chunks)

    def all_rows(params, batch, key):
        return in_chunks(lambda part: generator(params, part, key), batch, chunks)

    @jax.custom_vjp
    def value(params, batch, key):
        rows, labels = all_rows(params, batch, key)
        return compare(rows, labels, batch, key)

    def forward(params, batch, key):
        rows, labels = all_rows(params, batch, key)
        found, pull = jax.value_and_grad(compare, has_aux=True)(rows, labels, batch, key)
        return found, (params, batch, key, pull)

    def back(saved, cotangents):
        params, batch, key, pull = saved
        pull = jax.tree.map(lambda g: split(g) * cotangents[0], pull)
        parts = jax.tree.map(split, batch)
        if backward:
            fold = rng.stream_keys(key, rng.Stream.MMD, batch["position"][-1:])[0]
            chosen = jax.random.permutation(fold, chunks)[:backward]
            parts, pull = jax.tree.map(lambda x: x[chosen], (parts, pull))
            pull = jax.tree.map(lambda g: g * (chunks / backward), pull)

        def add(total, piece):
            part, rows_pull = piece
            _, through = jax.vjp(lambda p: generator(p, part, key)[0], params)
            return jax.tree.map(jnp.add, total, through(rows_pull)[0]), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        gradient, _ = jax.lax.scan(add, zeros, (parts, pull))
        return gradient, None, None

    value.defvjp(forward, back)
    return value(params, batch, key)


def in_chunks(part: Callable[[Any], Any], batch: Any, chunks: int, *, join: bool = True) -> Any:
    """``part(batch)`` one chunk at a time, on the way back too.

    Args:
        part: from a chunk of `batch` (a pytree of ``[count, ...]``) to a pytree of ``[k, ...]``.
        join: put the chunks' rows back into the batch's order; else they are stacked.
    """
    if chunks == 1:
        return part(batch) if join else jax.tree.map(lambda x: x[None], part(batch))
    parts = jax.tree.map(functools.partial(_split, chunks=chunks), batch)
    found = jax.lax.map(jax.checkpoint(part), parts)
    return jax.tree.map(_join, found) if join else found


# Strided, not blocked: a chunk then keeps an equal part of every device's examples.
def _split(x: Array, chunks: int) -> Array:
    return jnp.swapaxes(x.reshape(len(x) // chunks, chunks, *x.shape[1:]), 0, 1)


def _join(x: Array) -> Array:
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])
