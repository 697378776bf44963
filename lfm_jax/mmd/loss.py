"""The objective: MMD^2 between generated and real rows in every feature space, through all steps.

    L = sum_s w_s MMD^2_s(phi_s(G(z, c)), phi_s(data))

Guidance can be baked in (Deng et al. 2026, eq. 15): with the share ``g`` of unconditional data
among the generated rows the optimum is ``q = a p(x|c) - (a - 1) p(x)``, ``a = 1 / (1 - g)``: the
data, away from the mean of all classes, at one network call an evaluation.

Every random number is keyed by the example's position in the data stream.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from lfm_jax import rng
from lfm_jax.errors import UserError
from lfm_jax.mmd.bank import Bank
from lfm_jax.mmd.features import Rows
from lfm_jax.mmd.gradcache import Metrics, gradcache, in_chunks
from lfm_jax.mmd.spaces import Space, discrepancy

_UPDATE = 8  # folded into an example's key; its samples fold in less


def mmd_loss(
    generator: Callable[[Any, dict[str, Array], Key[Array, ""]], tuple[Rows, Array | None]],
    spaces: dict[str, Space],
    *,
    bank: Bank | None = None,
    bank_rows: int = 4096,
    real: Callable[[dict[str, Array], Key[Array, ""]], tuple[Rows, Array | None]] | None = None,
    estimator: str = "unbiased",
    block: int = 0,
    chunks: int = 1,
    backward_chunks: int = 0,
    guidance: Sequence[float | int] = (1.0,),
    anchor: Callable[[Any, dict[str, Array], Key[Array, ""]], tuple[Array, dict]] | None = None,
    anchor_weight: float = 0.0,
    groups: int = 0,
) -> Callable[[Any, dict[str, Array], Key[Array, ""]], tuple[Array, Metrics]]:
    """The loss ``(params, batch, key) -> (loss, metrics)`` for `lfm_jax.state.make_step`.

    Args:
        generator: ``(params, batch, key) -> (rows, labels)``: generated rows of a batch (or of a
            part of it: it draws by ``batch["position"]``); see `lfm_jax.mmd.row_generator`.
        spaces: name -> `Space`.
        bank: real rows, `bank_rows` of them drawn anew for each update.
        real: ``(batch, key) -> (rows, labels)``, the batch's own examples, where there is no bank.
            Without either the spaces' attractions are used.
        chunks: the batch in so many parts, one in memory at a time (`gradcache`); the gradient is
            the whole batch's.
        backward_chunks: gradients through so many of the chunks only, scaled up; 0: all.
        guidance: scales ``a >= 1`` to bake in, one drawn for each update; see the module.
        anchor: another loss, added with `anchor_weight` (flow matching keeps the many-step model).
        groups: labels are of so many classes drawn for each update; needs a bank.

    Raises:
        UserError: options that contradict each other.
    """
    if not guidance or min(guidance) < 1:
        raise UserError(f"guidance: {tuple(guidance)} to bake in; expected scales of at least 1")
    if groups and bank is None:
        raise UserError("groups: classes are drawn from a feature bank; there is none")
    if groups and bank is not None and groups > bank.num_classes:
        raise UserError(f"groups: {groups} classes of a bank of {bank.num_classes}")
    shares = 1 - 1 / jnp.asarray(guidance, jnp.float32)

    def prepare(batch, key):
        """What all parts of a batch must agree on: the update's own draws, and its classes."""
        # The update's own key: that of its first example, past those that a sample folds in.
        first = rng.stream_keys(key, rng.Stream.MMD, batch["position"][:1])[0]
        first = jax.random.fold_in(first, _UPDATE)
        draws = jax.random.uniform(jax.random.fold_in(first, 0), (2,))
        count = len(batch["position"])
        batch = {**batch, "draws": jnp.broadcast_to(draws, (count, 2))}
        if groups:
            assert bank is not None  # checked above
            if count < 2 * groups:
                raise UserError(
                    f"groups: {groups} classes in a batch of {count}; expected at most "
                    f"{count // 2}, so that two samples of a class can be compared"
                )
            classes = _classes(first, bank, groups)
            batch["label"] = classes[jnp.arange(count) * groups // count]
        return batch, first

    def compare(rows: Rows, labels, batch, key) -> tuple[Array, Metrics]:
        _, first = prepare(batch, key)
        real_rows = real_labels = None
        if bank is not None:
            classes = _classes(first, bank, groups) if groups else None
            real_rows, real_labels = bank.draw(jax.random.fold_in(first, 2), bank_rows, classes)
        elif real is not None:
            found = in_chunks(lambda part, real=real: real(part, key), batch, chunks)
            real_rows, real_labels = jax.lax.stop_gradient(found)
        return discrepancy(
            spaces,
            rows,
            labels,
            real_rows,
            real_labels,
            estimator=estimator,
            block=block,
            negatives=0.0 if tuple(guidance) == (1.0,) else choose(shares, batch["draws"][0, 1]),
            dealt=groups,
        )

    def loss(params, batch, key):
        told, _ = prepare(batch, key)
        if chunks == 1:
            rows, labels = generator(params, told, key)
            value, metrics = compare(rows, labels, told, key)
        else:
            value, metrics = gradcache(
                generator, compare, params, told, key, chunks=chunks, backward=backward_chunks
            )
        if anchor is not None:
            # On the examples with their own labels, not with those dealt out. A mean over
            # examples, so over equal chunks the mean of theirs.
            of_chunk = lambda part, anchor=anchor: anchor(params, part, key)[0]  # noqa: E731
            beside = in_chunks(of_chunk, batch, chunks, join=False).mean()
            value = value + anchor_weight * beside
            metrics = {**metrics, "anchor": beside}
        return value, metrics

    return loss


def choose(values: Float[Array, " k"], draw: Float[Array, ""]) -> Float[Array, ""]:
    """One of `values` by a uniform draw."""
    return values[jnp.minimum((draw * len(values)).astype(int), len(values) - 1)]


def _classes(key: Array, bank: Bank, groups: int) -> Array:
    """The classes of an update, ``[groups]``, different ones."""
    return jax.random.permutation(jax.random.fold_in(key, 1), bank.num_classes)[:groups]
