"""At which time to cross: four curves over t, and a rule for each.

Below the mixing time a state has decided what it is and an edit only paints over it; far above,
what is decided on the way down washes the edit out, and the image with it. The paper says that the
time is searched, the released code has t = 500 of 1000; the curves here say how it can be found.

    radius       |R_inverted - R_sampled| / R_sampled: real images taken up by the ODE lie in the
                 shell of the sampled states (Zhu et al. 2023, "distance effect")
    separability cross-validated AUC of the linear boundary (z, and every hidden layer asked for)
    commitment   I(attribute; x_t) / H(attribute): how far the state decides the attribute when it
                 is completed stochastically, from K completions a state
    utility      flip rate of validation images at equal pixel distance

Default rule, ``utility``, in words: of the times that are at least `floor` and whose AUC is within
`slack` of the best, the one whose edits of the validation images flip most at equal pixel distance
(the area under flip rate against distance). It sees images of the fit and the validation set only.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped

from lfm_jax.boundary.hyperplane import cross_validated, fit
from lfm_jax.errors import UserError

RULES = ("utility", "separability", "commitment", "radius")


def radius_gap(
    inverted: Float[np.ndarray, "k n ..."], sampled: Float[np.ndarray, "k m ..."]
) -> dict[str, list[float]]:
    """Mean norms of both and their relative gap ``rho``, a value a time."""
    means = [
        np.linalg.norm(states.reshape(*states.shape[:2], -1).astype(np.float64), axis=-1).mean(1)
        for states in (inverted, sampled)
    ]
    gap = np.abs(means[0] - means[1]) / means[1]
    return {"inverted": means[0].tolist(), "sampled": means[1].tolist(), "rho": gap.tolist()}


def separability(
    states: Float[np.ndarray, "k n ..."],
    labels: Shaped[np.ndarray, " n"],
    *,
    method: str = "svm",
    cost: float | None = None,
    seed: int = 0,
) -> list[float]:
    """Cross-validated AUC of a boundary at each time."""
    if cost is None and method != "mean":
        return [fit(at, labels, method=method, seed=seed).score for at in states]
    return [
        cross_validated(at, labels, method=method, cost=cost, seed=seed)["auc"] for at in states
    ]


def commitment(decided: Bool[np.ndarray, "n k"]) -> float:
    """``I(attribute; x_t) / H(attribute)`` from k stochastic completions of each of n states.

    The information is ``H(mean p) - mean H(p)`` with p the share of a state's completions that have
    the attribute, less the Miller-Madow bias of k draws; 0 where the attribute never varies.
    """
    shares = decided.mean(axis=1)
    whole = _entropy(shares.mean())
    if not whole > 0:
        return 0.0
    split = (shares > 0) & (shares < 1)
    within = np.mean([_entropy(p) for p in shares]) + split.mean() / (2 * decided.shape[1])
    return float(np.clip((whole - within) / whole, 0.0, 1.0))


def _entropy(p: float) -> float:
    """Of a coin, in nats."""
    terms = [q * np.log(q) for q in (p, 1 - p) if q > 0]
    return float(-np.sum(terms))


def edit_utility(distances: Sequence[float], flips: Sequence[float], *, limit: float) -> float:
    """Mean flip rate over pixel distances from 0 to `limit`: the area under one time's curve.

    Args:
        distances, flips: of rising strengths; the curve starts at no flip and no distance, is
            linear between points and flat behind the last.
        limit: the largest distance, the same for all times that are compared.
    """
    order = np.argsort(distances)
    # A stronger edit that flips less does not take back what a weaker one reached.
    reached = np.maximum.accumulate(np.asarray(flips, np.float64)[order])
    x = np.concatenate([[0.0], np.asarray(distances, np.float64)[order]])
    y = np.concatenate([[0.0], reached])
    grid = np.linspace(0.0, limit, 201)
    return float(np.mean(np.interp(grid, x, y)))


def choose_time(
    times: Sequence[float],
    curves: dict[str, Any],
    *,
    rule: str = "utility",
    floor: float = 0.5,
    slack: float = 0.02,
    tolerance: float = 0.01,
    share: float = 0.9,
) -> float:
    """The mixing time by a rule; only times of at least `floor` are considered.

    Args:
        times: rising.
        curves: by rule name, a value a time: ``radius`` (the gap rho), ``separability`` (AUC),
            ``commitment`` (I / H), ``utility`` (NaN where it was not measured).
        rule: ``utility`` as the module says; ``separability``: the largest time whose AUC is
            within `slack` of the best; ``commitment``: the largest with ``I > share * H``;
            ``radius``: the largest up to which rho stays below `tolerance`. Where no time
            qualifies, the smallest is taken.

    Raises:
        UserError: an unknown rule, no time from `floor` on, a curve that is missing.
    """
    if rule not in RULES:
        raise UserError(f"mixing rule: {rule!r} is none of {', '.join(RULES)}")
    allowed = [i for i, t in enumerate(times) if t >= floor - 1e-9]
    if not allowed:
        raise UserError(f"mixing times: none of {tuple(times)} is at least {floor:g}")
    if rule not in curves:
        raise UserError(f"mixing rule: no curve for {rule}; there are {', '.join(curves)}")
    if rule == "utility":
        good = candidates(times, curves["separability"], floor=floor, slack=slack)
        measured = [i for i in good if np.isfinite(curves["utility"][i])]
        if not measured:
            raise UserError("mixing rule: no edit was measured at a separable time")
        return float(times[max(measured, key=lambda i: curves["utility"][i])])
    curve = np.asarray(curves[rule], np.float64)
    if rule == "separability":
        good = candidates(times, curve.tolist(), floor=floor, slack=slack)
    elif rule == "commitment":
        good = [i for i in allowed if curve[i] > share]
    else:
        good = list(itertools.takewhile(lambda i: curve[i] < tolerance, allowed))
    return float(times[good[-1] if good else allowed[0]])


def candidates(
    times: Sequence[float], auc: Sequence[float], *, floor: float = 0.5, slack: float = 0.02
) -> list[int]:
    """Places of the times of at least `floor` whose AUC is within `slack` of the best of them."""
    allowed = [i for i, t in enumerate(times) if t >= floor - 1e-9]
    best = max((auc[i] for i in allowed), default=0.0)
    return [i for i in allowed if auc[i] >= best - slack]
