"""Feature spaces: how rows are made comparable, and the discrepancy over several of them.

A space is standardised by the real rows' mean and deviation and has a kernel of its own; with
classes its rows carry the label, ``joint`` median distances from any other one (`Joint`), so that
p(x, c) is matched and not p(x) alone. `joint` 0 matches the marginals; large values compare within
classes only.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from lfm_jax.errors import UserError
from lfm_jax.mmd.bank import Weighted
from lfm_jax.mmd.estimators import check_counts, mean_pairs, within
from lfm_jax.mmd.features import Rows
from lfm_jax.mmd.gradcache import Metrics
from lfm_jax.mmd.kernels import (
    Joint,
    Kernel,
    distances,
    evenly,
    has_bandwidth,
    make_kernel,
    median_bandwidth,
)


@flax.struct.dataclass
class Space:
    """How the rows of one feature space are compared.

    Attributes:
        kernel: on the standardised rows, label columns included (`Joint`).
        mean, scale: of the standardisation, ``[d]`` each.
        label_scale: distance of two labels over root two, in units of the standardised rows.
        weight: of the term.
        attraction: stands for the real rows where they are not given (`Weighted`).
    """

    kernel: Kernel
    mean: Float[Array, " d"]
    scale: Float[Array, " d"]
    label_scale: Any = 0.0
    weight: Any = 1.0
    attraction: Weighted | None = None
    num_classes: int = flax.struct.field(pytree_node=False, default=0)

    def rows(
        self, features: Float[Array, "n d"], labels: Integer[Array, " n"] | None
    ) -> Float[Array, "n k"]:
        """Standardised rows, the label's columns beside them."""
        rows = (features - self.mean) / self.scale
        if not self.num_classes or labels is None:
            return rows
        columns = jax.nn.one_hot(labels, self.num_classes) * self.label_scale
        return jnp.concatenate([rows, columns], axis=-1)


def make_space(
    features: Float[Array, "n d"],
    *,
    kernel: str = "gaussian",
    bandwidth: float | int = 0.0,
    factors: Sequence[float | int] = (1.0,),
    joint: float | int = 0.0,
    num_classes: int = 0,
    weight: float | int = 1.0,
) -> Space:
    """A space from its real rows.

    Args:
        features: real rows.
        kernel: a name of `lfm_jax.mmd.KERNELS`.
        bandwidth: in median distances of the standardised rows; 0 means 1.
        factors: see `lfm_jax.mmd.make_kernel`.
        joint: distance between two classes in bandwidths; 0: marginals are matched.
        num_classes: classes of the labels.
        weight: of the term.
    """
    mean = features.mean(0)
    deviation = features.std(0)
    # A feature that hardly moves on real data would otherwise be all that is seen.
    scale = jnp.maximum(deviation, 0.05 * jnp.sqrt(jnp.mean(jnp.square(deviation))) + 1e-6)
    length = median_bandwidth((features - mean) / scale) * (bandwidth or 1.0)
    chosen = make_kernel(
        kernel, bandwidth=length if has_bandwidth(kernel) else None, factors=factors
    )
    if joint and num_classes:
        chosen = Joint(kernel=chosen, length=length, columns=num_classes)
    return Space(
        kernel=chosen,
        mean=mean,
        scale=scale,
        label_scale=joint * length / jnp.sqrt(2.0),
        weight=jnp.float32(weight),
        num_classes=num_classes if joint else 0,
    )


def discrepancy(
    spaces: dict[str, Space],
    generated: Rows,
    labels: Integer[Array, " m"] | None,
    real: Rows | None,
    real_labels: Integer[Array, " n"] | None,
    *,
    estimator: str = "unbiased",
    block: int = 0,
    negatives: float | int | Float[Array, ""] = 0.0,
    dealt: int = 0,
) -> tuple[Float[Array, ""], Metrics]:
    """The weighted sum over spaces, up to the real side's own constant, and its parts.

    Args:
        generated, real: rows by space; `real` None: each space's `attraction` stands for them.
        labels, real_labels: of the rows.
        negatives: the share g of unconditional data, see `mmd_loss`.
        dealt: so many classes were dealt out to the generated rows in equal numbers (`within`'s
            strata); 0: their labels were drawn.

    Raises:
        UserError: the linear-time estimator, whose pairs cannot be told apart here, or neither
            real rows nor an attraction.

    Returns:
        The loss; ``mmd2/<space>`` with the real side's term where it is cheap (not more than twice
        as many rows as generated), and ``spread/<space>``: the mean distance of two generated rows
        over that of two real ones, which falls towards 0 in a collapse.
    """
    if estimator == "linear":
        raise UserError("estimator: linear is one of mmd2's; expected unbiased or biased")
    total, metrics = jnp.zeros(()), {}
    for name, space in spaces.items():
        x = space.rows(generated[name], labels)
        if real is None:
            if space.attraction is None:
                raise UserError(f"features {name}: neither real rows nor an attraction to use")
            pull = space.attraction.mean_pairs(x, space.kernel)
            constant = None
        else:
            y = space.rows(real[name], real_labels)
            check_counts(estimator, len(x), len(y))
            pull = mean_pairs(x, y, space.kernel, block=block)
            constant = None
            if len(y) <= 2 * len(x):
                constant = within(y, space.kernel, estimator=estimator, block=block)
            # Of the features alone: beside far labels nothing else would be seen.
            seen = generated[name] / space.scale, real[name] / space.scale
            metrics[f"spread/{name}"] = _spread(seen[0]) / _spread(seen[1])
            if not (isinstance(negatives, float | int) and negatives == 0):
                anyone = y
                if space.num_classes:
                    assert real_labels is not None  # rows of classes come with them
                    # The same rows under any label: p(x) p(c) and not p(x, c).
                    anyone = space.rows(real[name], real_labels[_scattered(len(y))])
                away = mean_pairs(x, anyone, space.kernel, block=block)
                pull = (pull - negatives * away) / (1 - negatives)
        own = within(
            x,
            space.kernel,
            estimator=estimator,
            block=block,
            strata=labels if dealt else None,
            num_strata=dealt,
        )
        value = own - 2 * pull
        if constant is not None:
            metrics[f"mmd2/{name}"] = value + constant
        total = total + space.weight * value
    return total, metrics


def _scattered(count: int) -> np.ndarray:
    """A fixed order that takes neighbours far apart: real rows come sorted by class."""
    stride = max(int(0.618 * count), 1)
    while math.gcd(stride, count) > 1:
        stride += 1
    return np.arange(count, dtype=np.int64) * stride % count


def _spread(rows: Array, most: int = 256) -> Array:
    rows = jax.lax.stop_gradient(evenly(rows, most))
    count = len(rows)
    return distances(rows, rows).sum() / (count * (count - 1))
