"""Estimators of the squared maximum mean discrepancy between two sets of feature rows.

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)

unbiased   pairs i != j within a set, all across: may fall below 0 (Gretton et al. 2012, eq. 3)
biased     all pairs: the squared norm of the difference of the two mean embeddings, never below 0
linear     disjoint pairs, O(n): needs equal counts (Gretton et al. 2012, section 6)

Polynomial kernels want the unbiased one: their diagonal ``k(x, x)`` depends on ``|x|`` and would
pull every row towards zero; for kernels of a distance the diagonal is a constant.

Under `jax.jit` the sets are global arrays, however they are sharded: pairs are excluded by global
index and counts are global, so value and gradient do not depend on the number of devices. With
`block` the pair matrix is made a few rows at a time, and again on the way back.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from lfm_jax.errors import UserError
from lfm_jax.mmd.kernels import Kernel

ESTIMATORS = ("unbiased", "biased", "linear")


def mmd2(
    x: Float[Array, "m d"],
    y: Float[Array, "n d"],
    kernel: Kernel,
    *,
    estimator: str = "unbiased",
    block: int = 0,
    real_term: float | int | Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """MMD^2 between the rows of `x` (generated) and of `y` (real); differentiable in both.

    Args:
        x, y: feature rows; the counts may differ except for ``linear``.
        kernel: see `lfm_jax.mmd.kernels`.
        estimator: of `ESTIMATORS`.
        block: rows of the pair matrix held at a time; 0: all. Memory is O(block n), not O(m n).
        real_term: ``E k(y, y')`` where it is known, or any constant where only gradients with
            respect to `x` are wanted; None computes it.

    Raises:
        UserError: an unknown estimator, too few rows, or unequal counts for ``linear``.
    """
    check_counts(estimator, len(x), len(y))
    if estimator == "linear":
        return _linear(x, y, kernel)
    if real_term is None:
        real_term = within(y, kernel, estimator=estimator, block=block)
    return (
        within(x, kernel, estimator=estimator, block=block)
        + real_term
        - 2 * mean_pairs(x, y, kernel, block=block)
    )


def check_counts(estimator: str, generated: int, real: int) -> None:
    """Raises a `UserError` unless `estimator` exists and is defined for these row counts."""
    if estimator not in ESTIMATORS:
        raise UserError(f"estimator: {estimator!r} is none of {', '.join(ESTIMATORS)}")
    least = 1 if estimator == "biased" else 2
    if min(generated, real) < least:
        raise UserError(
            f"estimator: {estimator} of {generated} generated and {real} real rows; expected at "
            f"least {least} of each"
        )
    if estimator == "linear" and generated != real:
        raise UserError(
            f"estimator: linear of {generated} generated and {real} real rows; expected as many of "
            "each (unbiased and biased take any counts)"
        )


def within(
    x: Float[Array, "m d"],
    kernel: Kernel,
    *,
    estimator: str = "unbiased",
    block: int = 0,
    strata: Integer[Array, " m"] | None = None,
    num_strata: int = 0,
) -> Float[Array, ""]:
    """``E k(x, x')`` over the pairs of one set; without its diagonal where unbiased.

    Args:
        x, kernel, estimator, block: as for `mmd2`.
        strata: the rows' classes, where these were dealt out in equal numbers and not drawn. Of
            `num_strata` classes two rows drawn freely share one with probability ``1/num_strata``,
            two of m rows dealt out only with ``(m/num_strata - 1)/(m - 1)``. Unbiased, pairs of one
            class and of two are then averaged apart and weighted as in free draws; with the
            diagonal, as in the biased estimator, the shares are right already.
        num_strata: classes that were dealt out.
    """
    count = len(x)
    if estimator == "biased":
        return mean_pairs(x, x, kernel, block=block)
    pairs = count * (count - 1)
    alike = unlike = 1.0
    if strata is not None:
        sizes = jnp.unique(strata, return_counts=True, size=num_strata)[1]
        same = jnp.square(sizes).sum() - count
        alike = pairs / num_strata / same
        unlike = pairs * (1 - 1 / num_strata) / jnp.maximum(pairs - same, 1)

    def off_diagonal(rows: Array, index: Array) -> Array:
        # By global index: right wherever the rows lie.
        itself = index[:, None] == jnp.arange(count)[None]
        values = jnp.where(itself, 0.0, kernel(rows, x))
        if strata is not None:
            values *= jnp.where(strata[index][:, None] == strata[None], alike, unlike)
        return values.sum(1)

    return _sum_over_rows(off_diagonal, x, block) / pairs


def mean_pairs(
    x: Float[Array, "m d"], y: Float[Array, "n d"], kernel: Kernel, *, block: int = 0
) -> Float[Array, ""]:
    """``E k(x, y)`` over all pairs."""
    total = _sum_over_rows(lambda rows, index: kernel(rows, y).sum(1), x, block)
    return total / (len(x) * len(y))


def _sum_over_rows(part: Callable[[Array, Array], Array], x: Array, block: int) -> Array:
    """The sum of ``part(rows, their indices) -> [rows]`` over `x`, `block` rows at a time."""
    index = jnp.arange(len(x))
    if not 0 < block < len(x):
        return part(x, index).sum()
    padding = -len(x) % block
    x = jnp.pad(x, ((0, padding), (0, 0)))
    index = jnp.pad(index, (0, padding), constant_values=-1)

    def step(total, piece):
        rows, at = piece
        return total + jnp.where(at >= 0, part(rows, at), 0.0).sum(), None

    blocks = (x.reshape(-1, block, x.shape[-1]), index.reshape(-1, block))
    return jax.lax.scan(jax.checkpoint(step), jnp.zeros(()), blocks)[0]


def _linear(x: Array, y: Array, kernel: Kernel) -> Array:
    pairs = len(x) // 2 * 2
    (x1, x2), (y1, y2) = ((a[0:pairs:2], a[1:pairs:2]) for a in (x, y))
    one = jax.vmap(lambda a, b: kernel(a[None], b[None])[0, 0])
    return (one(x1, x2) + one(y1, y2) - one(x1, y2) - one(x2, y1)).mean()
