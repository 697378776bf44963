"""The mixing time of one attribute, searched on training images alone.

`search_time` takes the images of the fit and of the validation set up through all candidate times
once, measures the curves of `lfm_jax.boundary.mixing` there and applies the rule.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Num, UInt8

from lfm_jax.boundary.crossing import Crossing, fit_space
from lfm_jax.boundary.editor import Editor, Latents
from lfm_jax.boundary.hyperplane import Boundary
from lfm_jax.boundary.judges import Judge
from lfm_jax.boundary.measure import flip_rate, pixel_distance
from lfm_jax.boundary.mixing import (
    RULES,
    candidates,
    choose_time,
    commitment,
    edit_utility,
    radius_gap,
    separability,
)
from lfm_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """Images with their latents and sides (-1 or +1)."""

    images: UInt8[np.ndarray, "n H W C"]
    latents: Latents
    sides: Num[np.ndarray, " n"]
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


_GROWTH, _FURTHER, _ALL = 1.4, 6, 0.98  # of strengths beyond those given, until so many flip
_NORMS = 128  # samples whose mean norm is compared: one norm varies by about 1 %


def examples(editor: Editor, images: np.ndarray, sides: np.ndarray, positions: np.ndarray):
    """`Examples` of images; `positions` key their noise."""
    return Examples(
        images=images, latents=editor.encode(images), sides=sides, positions=np.asarray(positions)
    )


def away(sides: np.ndarray, strength: float | int, mode: str) -> np.ndarray:
    """Signed strengths that take each image to the other side (``reflect`` has no sign)."""
    if mode == "reflect":
        return np.full(len(sides), float(strength))
    return -np.asarray(sides, np.float64) * strength


def edit_curve(
    editor: Editor,
    crossing: Crossing,
    boundaries: Sequence[dict[str, Boundary]],
    judge: Judge,
    chosen: Examples,
    states: Latents,
    t: float,
    strengths: Sequence[float],
) -> list[dict[str, float]]:
    """Flip rate and pixel distance of edits towards the other side, a row a strength."""
    rows = []
    for strength in strengths:
        latents = crossing.apply(
            editor,
            boundaries,
            states,
            t,
            away(chosen.sides, strength, crossing.mode),
            positions=chosen.positions,
        )
        images = editor.decode(latents)
        rows.append(
            {
                "strength": float(strength),
                "flip_rate": flip_rate(chosen.sides, judge.score(images)),
                "distance": pixel_distance(images, chosen.images),
            }
        )
    return rows


def search_time(
    editor: Editor,
    crossing: Crossing,
    judge: Judge,
    fitted: Examples,
    validation: Examples,
    *,
    times: Sequence[float],
    strengths: Sequence[float],
    curves: Sequence[str] = ("radius", "separability", "utility"),
    rule: str = "utility",
    layers: Sequence[str] = (),
    completions: int = 8,
    floor: float = 0.5,
    method: str = "svm",
    cost: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The curves over `times` and the time that `rule` takes from them.

    Args:
        strengths: rising magnitudes of the edits whose utility is measured; see `followed`.
        curves: which to measure; what the rule needs is measured anyway.
        layers: hidden layers whose separability is measured beside z.
        completions: stochastic completions of each validation state, for ``commitment``.

    Returns:
        ``t``, ``rule``, ``times``, ``curves`` (a list a curve), and where measured ``radii``,
        ``layers`` (AUC by layer), ``edits`` (rows of `edit_curve` by time) and ``chosen_by`` (the
        time that each measured rule alone would take).

    Raises:
        UserError: an unknown curve or rule, times that do not rise.
    """
    times = tuple(float(t) for t in times)
    for name in (*curves, rule):
        if name not in RULES:
            raise UserError(f"mixing curve: {name!r} is none of {', '.join(RULES)}")
    wanted = {*curves, rule} | ({"separability"} if "utility" in (*curves, rule) else set())
    up = editor.invert_through(fitted.latents, times)
    found: dict[str, Any] = {"times": list(times), "rule": rule}
    measured: dict[str, list[float]] = {}
    options = {"method": method, "cost": cost, "seed": seed}

    if "separability" in wanted:
        measured["separability"] = separability(up, fitted.sides, **options)
    if layers:
        pool = crossing.space.pool
        hidden = [editor.hidden(x, t, layers, pool=pool) for x, t in zip(up, times, strict=True)]
        found["layers"] = {
            layer: separability(np.stack([h[layer] for h in hidden]), fitted.sides, **options)
            for layer in layers
        }
    if "radius" in wanted:
        sampled, _ = editor.sampled(np.arange(min(len(fitted), _NORMS)), times)
        found["radii"] = radius_gap(up, sampled)
        measured["radius"] = found["radii"]["rho"]
    if "commitment" in wanted:
        measured["commitment"] = [
            _commitment(editor, judge, validation, t, completions) for t in times
        ]
    if "utility" in wanted:
        there = editor.invert_through(validation.latents, times)
        good = candidates(times, measured["separability"], floor=floor)
        limit = opposite_distance(validation)
        found["edits"], measured["utility"] = {}, [float("nan")] * len(times)
        for i in good:
            boundary = fit_space(
                crossing.space, editor, up[i], fitted.sides, times[i], provenance={}, **options
            )
            single = dataclasses.replace(crossing, weights=(1.0,))
            rows = followed(
                functools.partial(
                    edit_curve, editor, single, [boundary], judge, validation, there[i], times[i]
                ),
                strengths,
                limit=limit,
            )
            found["edits"][f"{times[i]:g}"] = rows
            measured["utility"][i] = edit_utility(
                [row["distance"] for row in rows],
                [row["flip_rate"] for row in rows],
                limit=limit,
            )
        found["distance_limit"] = limit
    # JSON has no NaN.
    found["curves"] = {
        name: [value if np.isfinite(value) else None for value in curve]
        for name, curve in measured.items()
    }
    found["chosen_by"] = {
        name: choose_time(times, measured, rule=name, floor=floor) for name in measured
    }
    found["t"] = found["chosen_by"][rule]
    logging.info("mixing time %g by %s of %s", found["t"], rule, times)
    return found


def followed(
    curve: Callable[[Sequence[float]], list[dict[str, float]]],
    strengths: Sequence[float],
    *,
    limit: float,
) -> list[dict[str, float]]:
    """Rows of `curve` at `strengths`, and at growing ones until it flips all or reaches `limit`.

    A margin is worth more at one time than at another: curves that end at one strength would be
    compared over different distances.
    """
    rows = curve(strengths)
    for _ in range(_FURTHER):
        if not rows or rows[-1]["flip_rate"] >= _ALL or rows[-1]["distance"] >= limit:
            break
        rows += curve([rows[-1]["strength"] * _GROWTH])
    return rows


def opposite_distance(chosen: Examples) -> float:
    """Mean pixel distance between images of opposite sides: edits beyond it keep nothing."""
    negative, positive = (chosen.images[chosen.sides == side] for side in (-1, 1))
    count = min(len(negative), len(positive))
    return pixel_distance(negative[:count], positive[:count])


def _commitment(
    editor: Editor, judge: Judge, chosen: Examples, t: float, completions: int
) -> float:
    states = editor.noised(chosen.latents, t, positions=chosen.positions)
    decided = []
    for draw in range(completions):
        ends = editor.generate(states, t, eta=1.0, positions=chosen.positions, draw=draw)
        decided.append(judge.score(editor.decode(ends)) > 0)
    return commitment(np.stack(decided, axis=1))


def smallest_strength(rows: Sequence[dict[str, float]], level: float) -> float:
    """The smallest strength of `edit_curve` rows that flips at least `level`; else the strongest
    flipper's."""
    for row in rows:
        if row["flip_rate"] >= level:
            return row["strength"]
    return max(rows, key=lambda row: row["flip_rate"])["strength"]
