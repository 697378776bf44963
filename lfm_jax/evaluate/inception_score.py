"""Inception score (Salimans et al., 2016): exp of the mean KL(p(y|x) || p(y)), per split.

Two protocols are in use, and the figure depends on which: torch-fidelity shuffles with seed 2020
and cuts 10 splits; ADM keeps the order and cuts chunks of 5,000. Both take logits without the last
layer's bias.
"""

import itertools

import numpy as np
import scipy.special
from jaxtyping import Float

from lfm_jax.errors import UserError


def inception_score(
    logits: Float[np.ndarray, "n k"],
    *,
    splits: int = 10,
    split_size: int = 0,
    shuffle: bool = True,
    seed: int = 2020,
) -> tuple[float, float]:
    """Mean and standard deviation over splits, in float64.

    Args:
        splits: number of equal splits (torch-fidelity: 10).
        split_size: images a split instead, if positive (ADM: 5,000 with ``shuffle=False``).

    Raises:
        UserError: fewer images than splits.
    """
    count = len(logits)
    if count < splits and not split_size:
        raise UserError(f"inception_score: {count} images; accepted: at least {splits}, the splits")
    if shuffle:
        logits = logits[np.random.RandomState(seed).permutation(count)]
    if split_size:
        edges = [*range(0, count, split_size), count]
    else:
        edges = [i * count // splits for i in range(splits + 1)]
    scores = []
    for start, stop in itertools.pairwise(edges):
        log_p = scipy.special.log_softmax(logits[start:stop].astype(np.float64), axis=1)
        p = np.exp(log_p)
        divergence = (p * (log_p - np.log(p.mean(0)))).sum(1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores)), float(np.std(scores))
