"""The real side, computed once: feature rows with their labels, and two ways to shrink them.

A bank is a file of float16 rows, one array a feature space, with a checksum and with what it was
made of: networks, data, crop, seed. `Bank.draw` takes a fresh subset at every update. Where only
the mean embedding is needed it can be replaced by fewer rows:

    linear kernel   one row, the mean
    any other       Nystrom: landmarks Z, weights ``a = (K_ZZ + r I)^-1 m`` with
                    ``m_i = E k(z_i, y)``, so that ``E k(x, y) ~ k(x, Z) a``
"""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Integer, Key

from lfm_jax.errors import UserError
from lfm_jax.mmd.kernels import Kernel
from lfm_jax.writers import write_bytes

_META = "__meta__"


@flax.struct.dataclass
class Bank:
    """Feature rows of real examples, sorted by class.

    Attributes:
        rows: name -> ``[n, d]``.
        labels: ``[n]``, rising; -1 where there are none.
        starts: ``[classes + 1]`` first row of each class (static, for drawing by class).
    """

    rows: dict[str, Any]
    labels: Any
    starts: tuple[int, ...] = flax.struct.field(pytree_node=False)

    @property
    def count(self) -> int:
        """Rows."""
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Classes, 0 where there are none."""
        return len(self.starts) - 1

    def draw(
        self, key: Key[Array, ""], count: int, classes: Integer[Array, " g"] | None = None
    ) -> tuple[dict[str, Float[Array, "k _"]], Integer[Array, " k"]]:
        """`count` random rows of each space and their labels; of `classes` alone if given.

        One of each of `count` equal stretches of the sorted rows, so that every class keeps its
        share; of given classes equally many each, with replacement.
        """
        if classes is None:
            if count >= self.count:
                return self.rows, self.labels
            offset = jax.random.uniform(key, (count,)) + jnp.arange(count)
            index = jnp.minimum((offset * (self.count / count)).astype(int), self.count - 1)
        else:
            starts = jnp.asarray(self.starts)
            each = count // len(classes)
            low, high = starts[classes], starts[classes + 1]
            place = jax.random.uniform(key, (len(classes), each))
            # Rounded before it is added: a sum in float32 may round up into the next class.
            within = (place * (high - low)[:, None]).astype(int)
            index = (low[:, None] + jnp.minimum(within, (high - low)[:, None] - 1)).reshape(-1)
        return {name: rows[index] for name, rows in self.rows.items()}, self.labels[index]


def make_bank(
    rows: Mapping[str, np.ndarray | Array],
    labels: Integer[np.ndarray, " n"],
    *,
    num_classes: int = 0,
) -> Bank:
    """A bank of `rows`, sorted by class and rounded to float16.

    Rounded here and not in the file alone, so that a run that reads its bank back goes on as the
    one that made it.

    Raises:
        UserError: a feature that is not finite in float16, or a class of `num_classes` without a
            row.
    """
    with np.errstate(over="ignore"):
        rows = {name: np.asarray(values).astype(np.float16) for name, values in rows.items()}
    for name, values in rows.items():
        if not np.isfinite(values).all():
            raise UserError(
                f"features {name}: not finite on real data; expected a network that takes these "
                "images (size, channels, weights)"
            )
    order = np.argsort(labels, kind="stable")
    labels = np.asarray(labels, np.int32)[order]
    starts = np.searchsorted(labels, np.arange(num_classes + 1)) if num_classes else [0]
    if num_classes and (np.diff(starts) == 0).any():
        missing = int(np.flatnonzero(np.diff(starts) == 0)[0])
        raise UserError(f"feature bank: no example of class {missing}; draw more rows")
    return Bank(
        rows={name: jnp.asarray(values[order], jnp.float32) for name, values in rows.items()},
        labels=jnp.asarray(labels),
        starts=tuple(int(i) for i in starts),
    )


def save_bank(path: str | os.PathLike, bank: Bank, made_of: dict[str, Any]) -> None:
    """Write `bank` whole, with `made_of` (JSON) and a checksum."""
    arrays: dict[str, Any] = {
        name: np.asarray(rows, np.float16) for name, rows in bank.rows.items()
    }
    arrays["__labels__"] = np.asarray(bank.labels)
    meta = {"made_of": made_of, "starts": bank.starts, "sha256": _digest(arrays)}
    arrays[_META] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def load_bank(path: str | os.PathLike, made_of: dict[str, Any]) -> Bank | None:
    """The bank at `path`, or None where there is none or it was made of something else.

    Raises:
        UserError: a file that is not a bank, or one that was altered.
    """
    path = epath.Path(path)
    if not path.exists():
        return None
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = dict(file)
        meta = json.loads(arrays.pop(_META).tobytes())
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"feature bank {path}: not readable; remove it and run again") from error
    if meta["sha256"] != _digest(arrays):
        raise UserError(f"feature bank {path}: checksum differs; remove it and run again")
    if meta["made_of"] != json.loads(json.dumps(made_of)):
        return None
    labels = arrays.pop("__labels__")
    return Bank(
        rows={name: jnp.asarray(rows, jnp.float32) for name, rows in arrays.items()},
        labels=jnp.asarray(labels),
        starts=tuple(meta["starts"]),
    )


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].shape} {arrays[name].dtype}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


@flax.struct.dataclass
class Weighted:
    """Rows with weights that stand for many: ``E k(x, y) = mean_i k(x_i, rows) weights``."""

    rows: Float[Array, "k d"]
    weights: Float[Array, " k"]

    def mean_pairs(self, x: Float[Array, "m d"], kernel: Kernel) -> Float[Array, ""]:
        """``E k(x, y)`` over the rows of `x` and the whole real side."""
        return (kernel(x, self.rows) @ self.weights).mean()


def mean_row(y: Float[Array, "n d"], labels: Integer[Array, " n"] | None = None) -> Weighted:
    """All that a linear kernel needs of `y`: its mean, or that of each class with its share."""
    if labels is None:
        return Weighted(rows=y.mean(0, keepdims=True), weights=jnp.ones(1))
    present, counts = np.unique(np.asarray(labels), return_counts=True)
    means = jnp.stack([y[np.asarray(labels) == label].mean(0) for label in present])
    return Weighted(rows=means, weights=jnp.asarray(counts / len(y), jnp.float32))


def nystrom(
    y: Float[Array, "n d"],
    kernel: Kernel,
    landmarks: int,
    key: Key[Array, ""],
    *,
    rounds: int = 5,
    ridge: float = 1e-4,
    block: int = 2048,
) -> Weighted:
    """`landmarks` k-means centres of `y` with Nystrom weights for its mean embedding.

    The weights are solved for on the host in float64: K_ZZ of near landmarks is close to singular.

    Raises:
        UserError: more landmarks than rows.
    """
    if not 0 < landmarks <= len(y):
        raise UserError(f"nystrom: {landmarks} landmarks of {len(y)} rows; expected 1..{len(y)}")
    centres = y[jax.random.permutation(key, len(y))[:landmarks]]

    @jax.jit
    def refine(centres):
        nearest = jnp.argmin(
            (centres**2).sum(1)[None] - 2 * jnp.matmul(y, centres.T, precision="highest"), axis=1
        )
        totals = jax.ops.segment_sum(y, nearest, landmarks)
        sizes = jax.ops.segment_sum(jnp.ones(len(y)), nearest, landmarks)
        return jnp.where(sizes[:, None] > 0, totals / jnp.maximum(sizes, 1)[:, None], centres)

    for _ in range(rounds):
        centres = refine(centres)
    blocks = [y[i : i + block] for i in range(0, len(y), block)]
    mean = sum(np.asarray(kernel(centres, part).sum(1), np.float64) for part in blocks) / len(y)
    gram = np.asarray(kernel(centres, centres), np.float64)
    # By the entries' size and not by the trace, which the energy kernel does not have.
    weights = np.linalg.solve(gram + ridge * np.abs(gram).mean() * np.eye(landmarks), mean)
    return Weighted(rows=centres, weights=jnp.asarray(weights, jnp.float32))
