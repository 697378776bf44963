"""Semantic boundaries on Fashion-MNIST: the edit beside every control, on images not fitted on.

    python -m benchmarks.boundary runs/fashion_mnist runs/boundary_bench

Three seeds choose images, folds and directions anew. Per seed: the mixing time by the default rule
and the strength on 64 validation images (both from the train split), then flip rate against pixel
distance on test images for the boundary and its controls: a random direction and a label-shuffled
SVM of equal step, a mean difference, the class switch and SDEdit, the last two over their time.
Every part is kept in the second folder as it ends; the same command goes on. Curves, matrix and
pictures go to docs/results/boundary/.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from benchmarks.figures import RESULTS, record
from lfm_jax.boundary import cross_validated, fit, load_boundary, save_boundary
from lfm_jax.boundary.crossing import Crossing, Space, fit_space
from lfm_jax.boundary.editor import Editor
from lfm_jax.boundary.judges import Judge, class_judge, pixel_judge, split_sides, take_sides
from lfm_jax.boundary.measure import (
    distance_at,
    flip_rate,
    leakage,
    monotonicity,
    pixel_distance,
    psnr,
)
from lfm_jax.boundary.pictures import mixing_picture, pareto_picture
from lfm_jax.boundary.search import (
    Examples,
    away,
    edit_curve,
    examples,
    opposite_distance,
    search_time,
    smallest_strength,
)
from lfm_jax.data import ImageSource
from lfm_jax.data.attributes import parse_attribute
from lfm_jax.experiments import neighbour
from lfm_jax.jobs import build, edit, editing
from lfm_jax.jobs.judge import judge as open_judge
from lfm_jax.workdir import Workdir
from lfm_jax.writers import image_grid, save_image, write_json

COMMAND = "python -m benchmarks.boundary runs/fashion_mnist runs/boundary_bench"
CONFIG = Path(__file__).resolve().parent.parent / "configs" / "boundary_fashion_mnist.py"
OUT = RESULTS / "boundary"
SEEDS = (0, 1, 2)
TEST = 96  # test images a seed, half of each side
STRENGTHS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0)
SWITCH_TIMES = (0.7, 0.85, 0.93, 1.0)
AUC_TIMES = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
MATRIX = (
    "pair:sneaker/ankle boot",
    "pair:shirt/coat",
    "pair:pullover/dress",
    "pixels:brightness",
    "pixels:thickness",
)
STEPS = 12  # of the midpoint rule over [0, 1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """What every part needs."""

    config: ConfigDict
    workdir: Workdir
    editor: Editor
    judges: dict[str, Judge]
    train: ImageSource
    test: ImageSource

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """The result of a part, made once."""
        path = self.workdir.root / "parts" / f"{name}.json"
        if not path.exists():
            begin = time.perf_counter()
            write_json(path, make())
            print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
        return json.loads(path.read_text())


def open_bench(init: str, folder: str) -> Bench:
    config = neighbour(str(CONFIG), CONFIG.name)
    config.init = init
    config.edit.num_steps = STEPS
    config.model.scan_blocks = False  # the same network, faster on a CPU
    workdir = Workdir(epath.Path(folder))
    editor = editing.make_editor(config, workdir)
    train, test = (build.images(config, split) for split in ("train", "test"))
    editing.borrow_extractors(Workdir(epath.Path(init)), workdir)
    extractor, _ = open_judge(config, workdir)
    judges = {}
    for name in MATRIX:
        attribute = parse_attribute(name)
        if attribute.kind == "pixels":
            judges[name] = pixel_judge(attribute, train)
        else:
            judges[name] = class_judge(attribute, train.class_names, extractor)
    return Bench(
        config=config, workdir=workdir, editor=editor, judges=judges, train=train, test=test
    )


# ---- one seed


def sets(bench: Bench, name: str, seed: int, tests: int = TEST) -> tuple[Examples, ...]:
    """Images to fit with, to choose with (both of the train split), and to report on."""
    judge, section = bench.judges[name], bench.config.edit
    halves = split_sides(
        judge, bench.train, count=section.num_fit, held_out=section.num_validation, seed=seed
    )
    chosen = [(bench.train, *half) for half in halves]
    chosen.append((bench.test, *take_sides(judge, bench.test, count=tests, seed=seed)))
    return tuple(
        examples(bench.editor, source.batch(indices)["image"], sides, indices)
        for source, indices, sides in chosen
    )


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


# ---- over times, and across attributes


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
    strengths = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
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
    save_image(OUT / f"strips_{_plain(name)}.png", picture)


def _plain(name: str) -> str:
    return name.partition(":")[2].replace(" ", "_").replace("/", "_")


# ---- the figures


def main(init: str, folder: str, *only: str) -> None:
    """Every part that is missing, then the figures; or only the parts that are named."""
    bench = open_bench(init, folder)
    OUT.mkdir(parents=True, exist_ok=True)

    def part(name: str, make: Callable[[], Any]) -> Any:
        done = (bench.workdir.root / "parts" / f"{name}.json").exists()
        return bench.part(name, make) if done or not only or name in only else None

    searches, runs = [], []
    for seed in SEEDS:
        found = part(f"search_{seed}", lambda s=seed: search(bench, s))
        if found is None:
            return
        searches.append(found)
        t = found["t"]
        run = part(f"cross_{seed}", lambda s=seed, t=t: cross(bench, s, t)) or {"methods": {}}
        more = [
            part(f"directions_{seed}", lambda s=seed, t=t: directions(bench, s, t)),
            part(f"turns_{seed}", lambda s=seed: turns(bench, s)),
        ]
        for methods in more:
            run["methods"] |= methods or {}
        runs.append(run)
    t = searches[0]["t"]
    runs[0]["methods"] |= part("spaces", lambda: spaces(bench, t)) or {}
    searches[0] |= part("more_curves", lambda: more_curves(bench)) or {}
    auc = part("auc", lambda: auc_curves(bench))
    matrix = {
        name: part(f"leak_{_plain(name)}", lambda n=name: leak(bench, n, t)) for name in MATRIX
    }
    for name in MATRIX[:3]:
        part(f"strips_{_plain(name)}", lambda n=name: strips(bench, n, t))
    if only:
        return
    write_json(OUT / "mixing.json", searches[0])
    write_json(OUT / "pareto.json", runs)
    write_json(OUT / "auc.json", auc)
    write_json(OUT / "leakage.json", matrix)
    drawn = dict(searches[0])
    drawn["curves"] = {**drawn["more"]["curves"], **drawn["curves"]}
    mixing_picture(OUT / "mixing.png", drawn)
    for source in ("inverted", "noised"):
        shown = {"times": auc["times"], "t": t, "curves": {"separability": auc[source]["z"]}}
        shown["layers"] = {k: v for k, v in auc[source].items() if k != "z"}
        mixing_picture(OUT / f"auc_{source}.png", shown)
    pareto_picture(OUT / "pareto.png", runs[0]["methods"], title=f"seed 0, t = {t:g}")
    figures(searches, runs, matrix)


def figures(searches: list[dict], runs: list[dict], matrix: dict) -> None:
    """Record what was asked for, and print it."""

    def add(name: str, value: float | bool, op: str, bound: Any, note: str = "") -> None:
        kept = record("boundary", name, value, op, bound, COMMAND, note)
        print(f"{'ok ' if kept else 'MISS'} {name}: {value} {op} {bound}  {note}")

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
        "Spearman correlation of strength and mean logit, lowest of 3 seeds",
        min(spearman),
        ">",
        0.9,
        "up to where edits of the validation images move as far as the classes are apart (strength "
        f"{_list([run['useful'][-1] for run in runs])}); within single images, mean: "
        f"{_list(images)}; of the mean up to strength {STRENGTHS[-1]:g}: "
        f"{_list([run['spearman_of_all']['of_the_mean'] for run in runs])}",
    )
    lost = [run["psnr_autoencoder"] - run["psnr_round_trip"] for run in runs]
    add(
        "PSNR lost by a round trip without edit, dB, worst of 3 seeds",
        max(lost),
        "<=",
        0.5,
        f"autoencoder alone {_list([run['psnr_autoencoder'] for run in runs])} dB",
    )
    worst = max(
        (value, row, column)
        for row, made in matrix.items()
        for column, value in made["change"].items()
        if row != column
    )
    add(
        "leakage: largest change of another attribute, standard deviations",
        worst[0],
        "report",
        None,
        f"of {worst[2]} by the edit of {worst[1]}; matrix: docs/results/boundary/leakage.json",
    )
    add(
        "seconds to edit an image (CPU)",
        mean([run["edit_seconds"] for run in runs]),
        "report",
        None,
        f"{STEPS} midpoint steps over [0, 1], batches of 128, without the way up; machine shared",
    )
    add(
        "seconds to fit a boundary (500 images, C chosen by 5 folds)",
        mean([run["fit_seconds"] for run in runs]),
        "report",
        None,
        "machine shared",
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


if __name__ == "__main__":
    main(*sys.argv[1:])
