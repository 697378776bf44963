"""Manifold metrics: precision, recall, density and coverage from k-nearest-neighbour balls.

Around every real feature lies the ball that reaches its k-th real neighbour; likewise for generated
ones.

    precision  share of generated features inside any real ball       (Kynkaanniemi et al., 2019)
    recall     share of real features inside any generated ball
    density    mean number of real balls around a generated one / k   (Naeem et al., 2020)
    coverage   share of real balls that hold a generated feature

Distances come in blocks of rows, so memory is ``chunk x n`` and never ``n x n``.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm import tqdm

from lfm_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManifoldFigures:
    """Each in [0, 1] except density, which may exceed 1; `k` is the neighbour behind the radii."""

    precision: float
    recall: float
    density: float
    coverage: float
    k: int


@jax.jit
def _squared(x: Array, y: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        distance = (x * x).sum(1)[:, None] + (y * y).sum(1)[None] - 2 * x @ y.T
    return jnp.maximum(distance, 0)


def squared_distances(
    rows: Float[np.ndarray, "n d"], columns: Float[np.ndarray, "m d"], *, chunk: int = 2048
) -> Iterator[tuple[slice, Float[np.ndarray, "c m"]]]:
    """Blocks ``(slice of rows, squared Euclidean distances float32)``, `chunk` rows at a time.

    Both sets are centred first: ``|x|^2 + |y|^2 - 2 x y`` cancels less near the origin.
    """
    centre = columns.mean(0, dtype=np.float64).astype(np.float32)
    others = jnp.asarray(columns - centre)
    for start in range(0, len(rows), chunk):
        part = slice(start, min(start + chunk, len(rows)))
        yield part, np.asarray(_squared(jnp.asarray(rows[part] - centre), others))


def ball_radii(
    features: Float[np.ndarray, "n d"], k: int, *, chunk: int = 2048
) -> Float[np.ndarray, " n"]:
    """Squared distance of every feature to its k-th nearest other one."""
    radii = np.empty(len(features), np.float32)
    for part, distance in squared_distances(features, features, chunk=chunk):
        # Rounding may leave a point at 1e-4 from itself; it is still its own nearest.
        distance = distance.copy()
        distance[np.arange(len(distance)), np.arange(part.start, part.stop)] = 0
        distance.partition(k, axis=1)
        radii[part] = distance[:, k]
    return radii


def precision_recall(
    real: Float[np.ndarray, "n d"],
    fake: Float[np.ndarray, "m d"],
    *,
    k: int = 3,
    chunk: int = 2048,
    progress: bool = False,
) -> ManifoldFigures:
    """All four figures of generated features `fake` against `real` ones, roles as named above.

    Args:
        k: neighbour that sets the radii: 3 in precision and recall of ADM; 5 is usual for density
            and coverage.
        chunk: rows of the distance matrix in memory at once.

    Raises:
        UserError: fewer than k + 1 features in a set.
    """
    smaller = min(len(real), len(fake))
    if smaller <= k:
        raise UserError(f"precision_recall: {smaller} images; accepted: more than k = {k}")
    real, fake = np.asarray(real, np.float32), np.asarray(fake, np.float32)
    real_radii = ball_radii(real, k, chunk=chunk)
    fake_radii = ball_radii(fake, k, chunk=chunk)
    inside_real = np.zeros(len(fake), np.int64)
    inside_fake = np.zeros(len(real), bool)
    covered = np.zeros(len(real), bool)
    blocks = squared_distances(fake, real, chunk=chunk)
    steps = -(-len(fake) // chunk)
    for part, distance in tqdm(blocks, total=steps, desc="precision", disable=not progress):
        in_ball = distance <= real_radii
        inside_real[part] = in_ball.sum(1)
        covered |= in_ball.any(0)
        inside_fake |= (distance <= fake_radii[part, None]).any(0)
    return ManifoldFigures(
        precision=float((inside_real > 0).mean()),
        recall=float(inside_fake.mean()),
        density=float(inside_real.mean() / k),
        coverage=float(covered.mean()),
        k=k,
    )
