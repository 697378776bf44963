"""How far would the figure move with other images? Bootstrap over the rows of features.

The interval is the figure itself plus and minus z standard deviations of its bootstrap replicates,
and not their percentiles: drawing with replacement repeats rows, which biases a Frechet distance
upwards, so that its percentiles often do not even hold the figure.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import scipy.stats
from jaxtyping import Float
from tqdm import tqdm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure with the standard error and the interval of `level` that the bootstrap gives it."""

    value: float
    error: float
    low: float
    high: float
    level: float
    resamples: int


def bootstrap(
    statistic: Callable[..., float],
    *features: Float[np.ndarray, "_ d"],
    resamples: int = 50,
    level: float = 0.95,
    seed: int = 0,
    progress: bool = False,
) -> Interval:
    """Interval of ``statistic(*features)``, every set of rows redrawn independently each time.

    Args:
        statistic: of as many arrays as `features`; bind a fixed reference by a closure.
        resamples: replicates; the standard error is known to about ``1 / sqrt(2 resamples)``.
    """
    draw = np.random.default_rng(seed)
    value = statistic(*features)
    replicates = []
    for _ in tqdm(range(resamples), desc="bootstrap", disable=not progress):
        rows = [f[draw.integers(len(f), size=len(f))] for f in features]
        replicates.append(statistic(*rows))
    error = float(np.std(replicates, ddof=1))
    reach = float(scipy.stats.norm.ppf(0.5 + level / 2)) * error
    return Interval(
        value=float(value),
        error=error,
        low=float(value - reach),
        high=float(value + reach),
        level=level,
        resamples=resamples,
    )
