"""One seed of semantic boundaries: mixing time, boundary, controls; see `benchmarks.boundary`."""

import time
from typing import Any

import numpy as np
from etils import epath

from benchmarks.boundary_bench import MATRIX, STRENGTHS, SWITCH_TIMES, Bench, sets
from lfm_jax.boundary import fit, load_boundary, save_boundary
from lfm_jax.boundary.crossing import Crossing, Space, fit_space
from lfm_jax.boundary.judges import Judge
from lfm_jax.boundary.measure import flip_rate, monotonicity, pixel_distance, psnr
from lfm_jax.boundary.search import (
    Examples,
    away,
    edit_curve,
    opposite_distance,
    search_time,
    smallest_strength,
)
from lfm_jax.jobs import edit


def search(bench: Bench, seed: int) -> dict[str, Any]:
    """The mixing time by the default rule."""
    section, (fitted, validation, _) = bench.config.edit, sets(bench, MATRIX[0], seed)
    return search_time(
        bench.editor,
        Crossing(),
        bench.judges[MATRIX[0]],
        fitted,
        validation,
        times=section.times,
        strengths=STRENGTHS[1::2],
        curves=("separability", "utility"),
        rule=section.rule,
        seed=seed,
    )


def more_curves(bench: Bench) -> dict[str, Any]:
    """The curves that the default rule does not need, with the times that they would take."""
    section, (fitted, validation, _) = bench.config.edit, sets(bench, MATRIX[0], 0)
    found = search_time(
        bench.editor,
        Crossing(),
        bench.judges[MATRIX[0]],
        fitted,
        validation,
        times=section.times,
        strengths=(),
        curves=("radius", "separability", "commitment"),
        rule="separability",
        completions=4,
    )
    return {"more": found}


def cross(bench: Bench, seed: int, t: float) -> dict[str, Any]:
    """The strength chosen on validation images, and the boundary's curve on the test images."""
    editor, judge = bench.editor, bench.judges[MATRIX[0]]
    fitted, validation, test = sets(bench, MATRIX[0], seed)
    up = editor.invert(fitted.latents, t)
    begin = time.perf_counter()
    boundary = fit(up, fitted.sides, seed=seed)
    fit_seconds = time.perf_counter() - begin
    way = Crossing()
    there = editor.invert(validation.latents, t)
    chosen = edit_curve(editor, way, [{"z": boundary}], judge, validation, there, t, STRENGTHS)
    # A margin is worth more with one C than with another: beyond the distance of the two classes
    # there is no image left to edit.
    limit = opposite_distance(validation)
    useful = [row["strength"] for row in chosen if row["distance"] <= limit]

    # ---- test images from here on
    states = editor.invert(test.latents, t)
    wider = sets(bench, MATRIX[0], seed, tests=300)[2]
    scores, rows = [judge.score(test.images) * -test.sides], []
    begin = time.perf_counter()
    for strength in STRENGTHS:
        images = editor.decode(
            way.apply(editor, [{"z": boundary}], states, t, away(test.sides, strength, way.mode))
        )
        scores.append(judge.score(images) * -test.sides)
        rows.append(_row(judge, test, images, strength))
    edit_seconds = (time.perf_counter() - begin) / (len(STRENGTHS) * len(test))
    save_boundary(_boundary_file(bench, seed), boundary)
    plain = editor.decode(test.latents)
    unedited = editor.decode(editor.generate(states, t))
    return {
        "t": t,
        "cost": boundary.cost,
        "cross_validated_auc": boundary.score,
        "auc_300": boundary.measure(editor.invert(wider.latents, t), wider.sides)["auc"],
        "strength": smallest_strength(chosen, edit.FLIP_LEVEL),
        "validation": chosen,
        "methods": {"boundary (SVM)": rows},
        "useful": useful,
        "spearman": monotonicity((0.0, *useful), np.stack(scores[: 1 + len(useful)])),
        "spearman_of_all": monotonicity((0.0, *STRENGTHS), np.stack(scores)),
        "psnr_autoencoder": psnr(plain, test.images),
        "psnr_round_trip": psnr(unedited, test.images),
        "fit_seconds": fit_seconds,
        "edit_seconds": edit_seconds,
    }


def directions(bench: Bench, seed: int, t: float) -> dict[str, list[dict[str, float]]]:
    """Other normals: a random one and a label-shuffled SVM's, of equal step; the means'."""
    editor, judge = bench.editor, bench.judges[MATRIX[0]]
    fitted, _, test = sets(bench, MATRIX[0], seed)
    up, states = (editor.invert(x.latents, t) for x in (fitted, test))
    boundary = load_boundary(_boundary_file(bench, seed))
    random = np.random.default_rng(seed)
    shuffled = fit(up, random.permutation(fitted.sides), cost=boundary.cost)
    direction = random.normal(size=boundary.normal.shape)
    others = {
        "random direction": direction / np.linalg.norm(direction),
        "label-shuffled SVM": shuffled.normal,
    }
    found = {
        name: [
            _row(judge, test, _equal_step(editor, states, boundary, test, t, s, normal), s)
            for s in STRENGTHS[1:]
        ]
        for name, normal in others.items()
    }
    mean = fit(up, fitted.sides, method="mean")
    found["mean difference"] = edit_curve(
        editor, Crossing(), [{"z": mean}], judge, test, states, t, STRENGTHS[:4]
    )
    return found


def turns(bench: Bench, seed: int) -> dict[str, list[dict[str, float]]]:
    """What a network with classes can do without a boundary."""
    test = sets(bench, MATRIX[0], seed)[2]
    return {"class switch": class_switch(bench, test), "SDEdit": sdedit(bench, test)}


def _boundary_file(bench: Bench, seed: int) -> epath.Path:
    return bench.workdir.root / f"boundary_{seed}.npz"


def _row(judge: Judge, test: Examples, images: np.ndarray, strength: float) -> dict[str, float]:
    return {
        "strength": float(strength),
        "flip_rate": flip_rate(test.sides, judge.score(images)),
        "distance": pixel_distance(images, test.images),
    }


def _equal_step(editor, states, boundary, test, t, strength, normal) -> np.ndarray:
    """Images after the boundary edit's step in length and sign, along another direction."""
    wanted = away(test.sides, strength, "project") * boundary.spread
    steps = wanted - boundary.signed_distance(states)
    moved = states.reshape(len(states), -1) + steps[:, None] * normal
    return editor.decode(editor.generate(moved.reshape(states.shape), t))


def _other_class(bench: Bench, test: Examples) -> tuple[np.ndarray, np.ndarray]:
    names = [name.lower() for name in bench.train.class_names]
    attribute = bench.judges[MATRIX[0]].attribute
    negative, positive = (names.index(x) for x in (attribute.negative, attribute.positive))
    own = np.where(test.sides > 0, positive, negative)
    return own, np.where(test.sides > 0, negative, positive)


def class_switch(bench: Bench, test: Examples) -> list[dict[str, float]]:
    """Up under the image's own class, down as the other, over the time of the turn."""
    own, other = _other_class(bench, test)
    rows = []
    for t in SWITCH_TIMES:
        states = bench.editor.invert(test.latents, t, labels=own)
        images = bench.editor.decode(bench.editor.generate(states, t, labels=other))
        rows.append(_row(bench.judges[MATRIX[0]], test, images, t))
    return rows


def sdedit(bench: Bench, test: Examples) -> list[dict[str, float]]:
    """Fresh noise up to t, down as the other class (Meng et al. 2022), over t."""
    _, other = _other_class(bench, test)
    rows = []
    for t in SWITCH_TIMES:
        states = bench.editor.noised(test.latents, t, positions=test.positions)
        images = bench.editor.decode(bench.editor.generate(states, t, labels=other))
        rows.append(_row(bench.judges[MATRIX[0]], test, images, t))
    return rows


def spaces(bench: Bench, t: float) -> dict[str, list[dict[str, float]]]:
    """The hidden state of the middle block, both spaces, a rotation, and full noise on the way."""
    fitted, _, test = sets(bench, MATRIX[0], 0)
    up, states = (bench.editor.invert(x.latents, t) for x in (fitted, test))
    ways = {
        "h, middle block": Crossing(space=Space(name="h")),
        "z and h": Crossing(space=Space(name="both")),
        "SVM, rotate": Crossing(mode="rotate"),
        "SVM, eta 1": Crossing(eta=1.0),
    }
    curves = {}
    for name, way in ways.items():
        boundary = fit_space(way.space, bench.editor, up, fitted.sides, t, provenance={})
        scale = 2.0 if way.mode == "rotate" else 1.0  # relative to where the state is, not absolute
        curves[name] = edit_curve(
            bench.editor,
            way,
            [boundary],
            bench.judges[MATRIX[0]],
            test,
            states,
            t,
            [scale * s for s in STRENGTHS[1::2]],
        )
    return curves
