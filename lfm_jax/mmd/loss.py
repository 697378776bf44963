"""The objective: MMD^2 between generated and real rows in every feature space, through all steps.

    L = sum_s w_s MMD^2_s(phi_s(G(z, c)), phi_s(data))

A space is standardised by the real rows' mean and deviation and has a kernel of its own; with
classes its rows carry the label, scaled to ``joint`` bandwidths: a product kernel in which two
classes are that far apart, so that p(x, c) is matched and not p(x) alone. `joint` 0 matches the
marginals; large values compare within classes only.

Guidance can be baked in (Deng et al. 2026, eq. 15): with the share ``g`` of unconditional data
among the generated rows the optimum is ``q = a p(x|c) - (a - 1) p(x)``, ``a = 1 / (1 - g)``: the
data, away from the mean of all classes, at one network call an evaluation.

Every random number is keyed by the example's position in the data stream.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Key

from lfm_jax import rng
from lfm_jax.errors import UserError
from lfm_jax.mmd.bank import Bank, Weighted
from lfm_jax.mmd.estimators import check_counts, mean_pairs, within
from lfm_jax.mmd.features import Rows
from lfm_jax.mmd.gradcache import Metrics, gradcache
from lfm_jax.mmd.kernels import Kernel, distances, has_bandwidth, make_kernel, median_bandwidth


@flax.struct.dataclass
class Space:
    """How the rows of one feature space are compared.

    Attributes:
        kernel: on the standardised rows, label columns included.
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
    self_normalise: bool = False,
    dealt: int = 0,
) -> tuple[Float[Array, ""], Metrics]:
    """The weighted sum over spaces, up to the real side's own constant, and its parts.

    Args:
        generated, real: rows by space; `real` None: each space's `attraction` stands for them.
        labels, real_labels: of the rows.
        negatives: g, see the module.
        self_normalise: divide every term by its own size, so that all pull alike.
        dealt: so many classes were dealt out to the generated rows in equal numbers (`within`'s
            strata); 0: their labels were drawn.

    Returns:
        The loss; ``mmd2/<space>`` with the real side's term where it is cheap (not more than twice
        as many rows as generated), and ``spread/<space>``: the mean distance of two generated rows
        over that of two real ones, which falls towards 0 in a collapse.
    """
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
            metrics[f"spread/{name}"] = _spread(x) / _spread(y)
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
        if self_normalise:
            value = value / (jnp.abs(jax.lax.stop_gradient(value)) + 1e-7)
        total = total + space.weight * value
    return total, metrics


def _scattered(count: int) -> np.ndarray:
    """A fixed order that takes neighbours far apart: real rows come sorted by class."""
    stride = max(int(0.618 * count), 1)
    while math.gcd(stride, count) > 1:
        stride += 1
    return np.arange(count, dtype=np.int64) * stride % count


def _spread(rows: Array, most: int = 256) -> Array:
    # Evenly over the rows: real ones come sorted by class.
    rows = jax.lax.stop_gradient(rows[:: max(len(rows) // most, 1)][:most])
    count = len(rows)
    return distances(rows, rows).sum() / (count * (count - 1))


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
    self_normalise: bool = False,
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
        self_normalise: see `discrepancy`.
        anchor: another loss, added with `anchor_weight` (flow matching keeps the many-step model).
        groups: labels are of so many classes drawn for each update; needs a bank.

    Raises:
        UserError: options that contradict each other.
    """
    if not guidance or min(guidance) < 1:
        raise UserError(f"guidance: {tuple(guidance)} to bake in; expected scales of at least 1")
    if groups and bank is None:
        raise UserError("groups: classes are drawn from a feature bank; there is none")
    shares = 1 - 1 / jnp.asarray(guidance, jnp.float32)

    def prepare(batch, key):
        """What all parts of a batch must agree on: the update's own draws, and its classes."""
        first = rng.stream_keys(key, rng.Stream.MMD, batch["position"][:1])[0]
        draws = jax.random.uniform(jax.random.fold_in(first, 1), (2,))
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
            real_rows, real_labels = bank.draw(first, bank_rows, classes)
        elif real is not None:
            real_rows, real_labels = jax.lax.stop_gradient(real(batch, key))
        return discrepancy(
            spaces,
            rows,
            labels,
            real_rows,
            real_labels,
            estimator=estimator,
            block=block,
            negatives=0.0 if tuple(guidance) == (1.0,) else choose(shares, batch["draws"][0, 1]),
            self_normalise=self_normalise,
            dealt=groups,
        )

    def loss(params, batch, key):
        batch, _ = prepare(batch, key)
        if chunks == 1:
            rows, labels = generator(params, batch, key)
            value, metrics = compare(rows, labels, batch, key)
        else:
            value, metrics = gradcache(
                generator, compare, params, batch, key, chunks=chunks, backward=backward_chunks
            )
        if anchor is not None:
            beside, _ = anchor(params, batch, key)
            value = value + anchor_weight * beside
            metrics = {**metrics, "anchor": beside}
        return value, metrics

    return loss


def choose(values: Float[Array, " k"], draw: Float[Array, ""]) -> Float[Array, ""]:
    """One of `values` by a uniform draw."""
    return values[jnp.minimum((draw * len(values)).astype(int), len(values) - 1)]


def _classes(key: Array, bank: Bank, groups: int) -> Array:
    """The classes of an update, ``[groups]``, different ones."""
    return jax.random.permutation(jax.random.fold_in(key, 2), len(bank.starts) - 1)[:groups]
