"""What the measurements of semantic boundaries say, as figures with their bounds."""

from typing import Any

import numpy as np

from benchmarks.boundary_bench import COMMAND, STEPS, STRENGTHS, TEST
from benchmarks.figures import keep
from lfm_jax.boundary.measure import distance_at


def figures(searches: list[dict], runs: list[dict], matrix: dict) -> None:
    """Record the figures, and print them."""

    def add(name: str, value: float | bool, op: str, bound: Any, note: str = "") -> None:
        keep("boundary", name, value, op, bound, COMMAND, note)

    def mean(values: list[float]) -> float:
        return float(np.mean(values))

    times = [found["t"] for found in searches]
    others = {**searches[0]["more"]["chosen_by"], **searches[0]["chosen_by"]}
    rules = ", ".join(f"{k} {v:g}" for k, v in others.items())
    add(
        "mixing time by the default rule, lowest of 3 seeds",
        min(times),
        ">=",
        0.5,
        f"seeds: {times}; chosen on train images; candidates {searches[0]['times']}; other rules "
        f"on seed 0: {rules}",
    )
    aucs = [run["auc_300"] for run in runs]
    add(
        "boundary AUC at t_m, sneaker/ankle boot, 500 training images, lowest of 3 seeds",
        min(aucs),
        ">=",
        0.95,
        f"300 test images a seed: {_list(aucs)}",
    )
    chosen = [_at(run["methods"]["boundary (SVM)"], run["strength"]) for run in runs]
    flips = [row["flip_rate"] for row in chosen]
    strengths = [run["strength"] for run in runs]
    note = f"{TEST} test images a seed; strengths from 64 validation images: {strengths}"
    add(
        "flip rate at the strength chosen on validation, mean of 3 seeds",
        mean(flips),
        ">=",
        0.8,
        f"{note}; seeds: {_list(flips)}",
    )
    own = [row["distance"] for row in chosen]
    for name in ("SDEdit", "class switch"):
        there = [
            _reached(run["methods"][name], flip) for run, flip in zip(runs, flips, strict=True)
        ]
        ratio = [a / b for a, b in zip(own, there, strict=True)]
        add(
            f"pixel distance over {name}'s at equal flip rate, mean of 3 seeds",
            mean(ratio),
            "<=",
            1.0,
            f"own {_list(own)}, {name} {_list(there)} (its largest where it never flips as many); "
            f"most that {name} flips: "
            f"{_list([max(r['flip_rate'] for r in run['methods'][name]) for run in runs])}",
        )
    random = [_at(run["methods"]["random direction"], run["strength"])["flip_rate"] for run in runs]
    add(
        "flip rate of a random direction of equal step, mean of 3 seeds",
        mean(random),
        "<=",
        0.1,
        f"seeds: {_list(random)}",
    )
    spearman = [run["spearman"]["of_the_mean"] for run in runs]
    images = [run["spearman"]["mean_of_images"] for run in runs]
    add(
        "Spearman correlation of strength and mean logit, up to the distance between the classes, "
        "lowest of 3 seeds",
        min(spearman),
        ">",
        0.9,
        "up to where edits of the validation images move as far as the classes are apart (strength "
        f"{_list([run['useful'][-1] for run in runs])}); within single images, mean: "
        f"{_list(images)}",
    )
    beyond = [run["spearman_of_all"]["of_the_mean"] for run in runs]
    add(
        f"Spearman correlation of strength and mean logit, up to strength {STRENGTHS[-1]:g}, "
        "lowest of 3 seeds",
        min(beyond),
        "report",
        None,
        f"seeds: {_list(beyond)}; far beyond the other class the logit falls again",
    )
    lost = [run["psnr_autoencoder"] - run["psnr_round_trip"] for run in runs]
    add(
        "PSNR lost by a round trip without edit, dB, worst of 3 seeds",
        max(lost),
        "<=",
        0.5,
        f"autoencoder alone {_list([run['psnr_autoencoder'] for run in runs])} dB",
    )
    edit = "pair:sneaker/ankle boot"
    others = {k: value for k, value in matrix[edit]["change"].items() if k != edit}
    most, row, column = max(
        (value, row, column)
        for row, made in matrix.items()
        for column, value in made["change"].items()
        if row != column
    )
    add(
        "leakage of the sneaker/ankle boot edit: largest change of another attribute, standard "
        "deviations",
        max(others.values()),
        "report",
        None,
        f"of {max(others, key=others.__getitem__)}; the largest of all edits is {most:.3g}, of "
        f"{column} by the edit of {row}; matrix: docs/results/boundary/leakage.json",
    )
    add(
        "seconds to edit an image (CPU)",
        mean([run["edit_seconds"] for run in runs]),
        "report",
        None,
        f"{STEPS} midpoint steps over [0, 1], batches of 128, without the way up; timed "
        "beside other processes",
    )
    add(
        "seconds to fit a boundary (500 images, C chosen by 5 folds)",
        mean([run["fit_seconds"] for run in runs]),
        "report",
        None,
        "timed beside other processes",
    )
    for name in ("label-shuffled SVM",):
        rows = [_at(run["methods"][name], run["strength"]) for run in runs]
        add(
            f"flip rate of the {name} at equal step, mean of 3 seeds",
            mean([row["flip_rate"] for row in rows]),
            "report",
            None,
            f"pixel distance {_list([row['distance'] for row in rows])}",
        )


def _at(rows: list[dict], strength: float) -> dict:
    return next(row for row in rows if row["strength"] == strength)


def _reached(rows: list[dict], level: float) -> float:
    """The distance at which a curve reaches a flip rate; its largest where it does not."""
    found = distance_at(
        [row["flip_rate"] for row in rows], [row["distance"] for row in rows], level
    )
    return found if np.isfinite(found) else max(row["distance"] for row in rows)


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
