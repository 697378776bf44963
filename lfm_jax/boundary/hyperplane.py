"""Linear boundaries between two attributes in the states of a flow.

States (latents ``x_t``, or hidden states of the network there) with an attribute and states without
it are told apart by a hyperplane ``n . x + b = 0`` with unit normal n; the *signed distance* of a
state is ``n . x + b``, positive where the attribute is present. Zhu et al. 2023 ("Boundary Guided
Learning-Free Semantic Control with Diffusion Models") fit it with a linear SVM at the mixing time.

There are few images and many dimensions, so every solver works on the Gram matrix of the centred
states (its factor ``Z``, ``Z Z^T = K``, has at most n columns) and the normal is mapped back as
``X^T U S^{-1/2} beta``: penalties on the norm of the normal are the same in both. States are
divided by their root mean square distance from the mean, so that one grid of costs fits all spaces.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from lfm_jax.errors import UserError

METHODS = ("svm", "logistic", "lda", "mean")
COSTS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_EQUAL, _AS_RIGHT = 2e-3, 1e-2  # differences of AUC and of accuracy that say nothing
States = Shaped[Array | np.ndarray, "n ..."]

MIN_SIDE = 10  # images of each side below which a boundary says nothing


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Boundary:
    """A hyperplane with a unit normal.

    Attributes:
        normal: n, of the flattened state.
        offset: b, scaled with the normal: ``b / ||w||`` of the classifier's own.
        spread: standard deviation of ``n . x`` over the states it was fitted on: the unit "margin"
            in which strengths are given.
        shape: of one state.
        method: one of `METHODS`.
        cost: C that was used; larger fits closer.
        score: mean AUC over the folds that chose `cost` (NaN where nothing was left to choose).
        provenance: where it may be used: model, time, space, attribute ...; see `save_boundary`.
    """

    normal: Float[np.ndarray, " d"]
    offset: float
    spread: float
    shape: tuple[int, ...]
    method: str
    cost: float
    score: float
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

    def signed_distance(self, states: States) -> Float[np.ndarray, " n"]:
        """``n . x + b`` of every state.

        Raises:
            UserError: states of another shape.
        """
        if tuple(states.shape[1:]) != self.shape:
            raise UserError(
                f"boundary: states of shape {tuple(states.shape[1:])}; "
                f"it was fitted on {self.shape}"
            )
        flat = np.asarray(states, np.float64).reshape(len(states), -1)
        return flat @ self.normal + self.offset

    def measure(self, states: States, labels: Shaped[np.ndarray, " n"]) -> dict[str, float]:
        """``accuracy`` (mean of both sides') and ``auc`` on labelled states, held out ones."""
        from sklearn.metrics import roc_auc_score

        positive = check_sides(labels, least=1)
        distance = self.signed_distance(states)
        right = (distance > 0) == positive
        return {
            "accuracy": float((right[positive].mean() + right[~positive].mean()) / 2),
            "auc": float(roc_auc_score(positive, distance)),
        }


def fit(
    states: States,
    labels: Shaped[np.ndarray, " n"],
    *,
    method: str = "svm",
    cost: float | None = None,
    folds: int = 5,
    seed: int = 0,
    attribute: str = "attribute",
    provenance: dict[str, Any] | None = None,
) -> Boundary:
    """Fit a hyperplane between labelled states; both sides weigh the same, however many they are.

    Args:
        states: one a row, of any shape.
        labels: positive where the attribute is present: booleans, 0/1 or -1/+1.
        method: ``svm`` (hinge loss), ``logistic``, ``lda`` (ridge on the scatter within sides) or
            ``mean`` (difference of the sides' means, which has no cost).
        cost: C; None takes the smallest of `COSTS` whose mean AUC over `folds` stratified folds is
            within 0.002 of the best, and accuracy within 0.01 of the best of those.
        seed: of the folds.
        attribute: named in errors and in the provenance.
        provenance: what the boundary belongs to.

    Raises:
        UserError: one side only or fewer than 10 states of it, states that are not finite, an
            unknown method, a cost that is not positive.
    """
    if method not in METHODS:
        raise UserError(f"boundary method: {method!r} is none of {', '.join(METHODS)}")
    if cost is not None and not 0 < cost < np.inf:
        raise UserError(f"boundary cost: {cost} is not a positive number")
    positive = check_sides(labels, attribute=attribute)
    if len(states) != len(positive):
        raise UserError(f"boundary of {attribute}: {len(states)} states, {len(positive)} labels")
    flat = np.asarray(states, np.float64).reshape(len(states), -1)
    if not np.isfinite(flat).all():
        raise UserError(f"boundary of {attribute}: the states are not finite")

    center = flat.mean(0)
    flat = flat - center
    scale = float(np.sqrt(np.mean(np.sum(flat**2, axis=1)))) or 1.0
    factor, back = _gram_factor(flat / scale)
    score = float("nan")
    if method == "mean":
        cost = 1.0
    elif cost is None:
        cost, score = _choose_cost(factor, positive, method, folds, seed)
    beta, intercept = _solve(factor, positive, method, cost)
    weights = back(beta) / scale
    norm = float(np.linalg.norm(weights))
    if not norm > 0:
        raise UserError(f"boundary of {attribute}: both sides have the same states")
    normal = weights / norm
    return Boundary(
        normal=normal,
        offset=intercept / norm - float(normal @ center),
        spread=float(np.std(flat @ normal)),
        shape=tuple(states.shape[1:]),
        method=method,
        cost=float(cost),
        score=score,
        provenance={"attribute": attribute, **(provenance or {})},
    )


def check_sides(
    labels: Shaped[np.ndarray, " n"], *, attribute: str = "attribute", least: int = MIN_SIDE
) -> Bool[np.ndarray, " n"]:
    """The labels as booleans.

    Raises:
        UserError: fewer than `least` on a side.
    """
    positive = np.asarray(labels) > 0
    sides = {"with": int(positive.sum()), "without": int((~positive).sum())}
    for side, count in sides.items():
        if count < least:
            raise UserError(
                f"attribute {attribute}: {count} of {len(positive)} images {side} it; "
                f"expected at least {least} on each side"
            )
    return positive


def cross_validated(
    states: States,
    labels: Shaped[np.ndarray, " n"],
    *,
    method: str = "svm",
    cost: float | None = None,
    folds: int = 5,
    seed: int = 0,
) -> dict[str, float]:
    """Mean ``auc`` and ``accuracy`` over stratified folds at `cost` (None: the best one)."""
    from sklearn.model_selection import StratifiedKFold

    if cost is None and method != "mean":
        cost = fit(states, labels, method=method, folds=folds, seed=seed).cost
    positive = check_sides(labels)
    splits = StratifiedKFold(folds, shuffle=True, random_state=seed)
    states = np.asarray(states).reshape(len(states), -1)
    rows = []
    for train, held_out in splits.split(states, positive):
        boundary = fit(states[train], positive[train], method=method, cost=cost)
        rows.append(boundary.measure(states[held_out], positive[held_out]))
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _gram_factor(flat: np.ndarray):
    """``Z [n, r]`` with ``Z Z^T`` the Gram matrix, and the map of a normal from Z to the states."""
    n, d = flat.shape
    if d <= n:
        return flat, lambda beta: beta
    values, vectors = np.linalg.eigh(flat @ flat.T)
    kept = values > 1e-10 * values[-1]
    roots = np.sqrt(values[kept])
    vectors = vectors[:, kept]
    return vectors * roots, lambda beta: flat.T @ (vectors @ (beta / roots))


def _choose_cost(
    factor: np.ndarray, positive: np.ndarray, method: str, folds: int, seed: int
) -> tuple[float, float]:
    """The smallest cost among near equals in held-out AUC and accuracy, and its AUC.

    A closer fit that separates no better leans on detail: its edits leave shreds in the image. But
    a very small cost has, with all states inside the margin, any intercept: hence the accuracy.
    """
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold

    splits = StratifiedKFold(folds, shuffle=True, random_state=seed)
    auc, accuracy = np.zeros(len(COSTS)), np.zeros(len(COSTS))
    for train, held_out in splits.split(factor, positive):
        side = positive[held_out]
        for i, cost in enumerate(COSTS):
            beta, intercept = _solve(factor[train], positive[train], method, cost)
            score = factor[held_out] @ beta + intercept
            auc[i] += roc_auc_score(side, score) / folds
            right = (score > 0) == side
            accuracy[i] += (right[side].mean() + right[~side].mean()) / (2 * folds)
    near = auc >= auc.max() - _EQUAL
    best = int(np.argmax(near & (accuracy >= accuracy[near].max() - _AS_RIGHT)))
    return COSTS[best], float(auc[best])


def _solve(
    factor: np.ndarray, positive: np.ndarray, method: str, cost: float
) -> tuple[np.ndarray, float]:
    """Normal (of any length) and intercept in the coordinates of `factor`."""
    if method == "svm":
        from sklearn.svm import SVC

        found = SVC(kernel="linear", C=cost, class_weight="balanced").fit(factor, positive)
        return found.coef_[0], float(found.intercept_[0])
    if method == "logistic":
        from sklearn.linear_model import LogisticRegression

        found = LogisticRegression(C=cost, class_weight="balanced", max_iter=5000)
        found.fit(factor, positive)
        return found.coef_[0], float(np.ravel(found.intercept_)[0])
    means = [factor[side].mean(0) for side in (positive, ~positive)]
    beta = means[0] - means[1]
    if method == "lda":
        scatter = np.eye(factor.shape[1]) / (cost * len(factor))
        for side, mean in zip((positive, ~positive), means, strict=True):
            rest = factor[side] - mean
            scatter += rest.T @ rest / (2 * len(rest))
        beta = np.linalg.solve(scatter, beta)
    return beta, float(-beta @ (means[0] + means[1]) / 2)
