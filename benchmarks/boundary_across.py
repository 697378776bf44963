"""Semantic boundaries over times, across attributes and in pictures; see `benchmarks.boundary`."""

from typing import Any

import numpy as np

from benchmarks.boundary_bench import AUC_TIMES, MATRIX, OUT, STRENGTHS, Bench, sets
from lfm_jax.boundary import cross_validated, fit
from lfm_jax.boundary.crossing import Crossing
from lfm_jax.boundary.measure import flip_rate, leakage, pixel_distance
from lfm_jax.boundary.search import away, edit_curve, smallest_strength
from lfm_jax.jobs import edit
from lfm_jax.writers import image_grid, save_image


def auc_curves(bench: Bench) -> dict[str, Any]:
    """Cross-validated AUC against t: z and every layer (token mean), inverted and noised."""
    editor, (fitted, _, _) = bench.editor, sets(bench, MATRIX[0], 0)
    layers = editor.model.taps
    up = editor.invert_through(fitted.latents, AUC_TIMES)
    found: dict[str, Any] = {"times": list(AUC_TIMES)}
    for source in ("inverted", "noised"):
        rows: dict[str, list[float]] = {name: [] for name in ("z", *layers)}
        for i, t in enumerate(AUC_TIMES):
            states = up[i]
            if source == "noised":
                states = editor.noised(fitted.latents, t, positions=fitted.positions)
            spaces = {"z": states, **editor.hidden(states, t, layers)}
            for name, values in spaces.items():
                rows[name].append(cross_validated(values, fitted.sides, cost=0.3)["auc"])
        found[source] = rows
    return found


def leak(bench: Bench, name: str, t: float) -> dict[str, Any]:
    """Mean change of every attribute's score by the edit of one."""
    reference = bench.test.batch(np.linspace(0, len(bench.test) - 1, 500).astype(int))["image"]
    deviations = {n: float(np.std(j.score(reference))) for n, j in bench.judges.items()}
    judge = bench.judges[name]
    fitted, validation, test = sets(bench, name, 0, tests=64)
    boundary = {"z": fit(bench.editor.invert(fitted.latents, t), fitted.sides)}
    there = bench.editor.invert(validation.latents, t)
    curve = edit_curve(
        bench.editor, Crossing(), [boundary], judge, validation, there, t, STRENGTHS[1::2]
    )
    strength = smallest_strength(curve, edit.FLIP_LEVEL)
    states = bench.editor.invert(test.latents, t)
    moved = Crossing().apply(
        bench.editor, [boundary], states, t, away(test.sides, strength, "project")
    )
    images = bench.editor.decode(moved)
    before = {n: j.score(test.images) for n, j in bench.judges.items()}
    after = {n: j.score(images) for n, j in bench.judges.items()}
    return {
        "t": t,
        "strength": strength,
        "flip_rate": flip_rate(test.sides, after[name]),
        "distance": pixel_distance(images, test.images),
        "auc": boundary["z"].measure(states, test.sides)["auc"],
        "change": leakage(before, after, deviations),
    }


def strips(bench: Bench, name: str, t: float) -> None:
    """Test images, originals first, then strength from left to right."""
    strengths = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
    judge = bench.judges[name]
    fitted, _, test = sets(bench, name, 0, tests=12)
    boundary = fit(bench.editor.invert(fitted.latents, t), fitted.sides)
    states = bench.editor.invert(test.latents, t)
    columns = [test.images]
    for s in strengths:
        moved = Crossing().apply(bench.editor, [{"z": boundary}], states, t, s)
        columns.append(bench.editor.decode(moved))
    strip = np.stack(columns).swapaxes(0, 1)
    words = {-1: judge.attribute.negative, 1: judge.attribute.positive}
    picture = image_grid(
        strip.reshape(-1, *strip.shape[2:]),
        columns=len(columns),
        row_labels=[words[int(side)] for side in test.sides],
    )
    save_image(OUT / f"strips_{plain(name)}.png", picture)


def plain(name: str) -> str:
    return name.partition(":")[2].replace(" ", "_").replace("/", "_")
