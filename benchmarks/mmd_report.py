"""The figures, the plot and the pictures of the finetunings; see `benchmarks.mmd`."""

import json
from typing import Any

import numpy as np

from benchmarks.figures import RESULTS, record
from benchmarks.mmd_study import (
    ABLATED,
    BOUNDS,
    CURVE,
    HELD_OUT,
    JUDGES,
    STEPS,
    Study,
    ablation_name,
    best_of_many,
    seconds_of,
)
from lfm_jax import checkpoints
from lfm_jax.jobs import origin
from lfm_jax.writers import image_grid, save_image, write_json

CONTROLS = {
    "start": "the un-tuned sampler on the same times",
    "grid": "a trained time grid alone",
    "flow": "plain training of the same seconds",
}
_LABELS = {
    "mmd": "MMD-finetuned",
    "flow": "plain training",
    "start": "un-tuned, its times",
    "grid": "trained times",
}


def report(study: Study, seeds: list[int]) -> None:
    """Figures from the units that exist; what is missing is left out."""
    floors = study.floors()
    best = {judge: best_of_many(study, judge) for judge in HELD_OUT}
    digest = checkpoints.fingerprint(origin.initial_params(str(study.base)))[:16]
    rows = [
        row
        for judge in HELD_OUT
        for row in distances(study, judge, digest, best[judge], floors[judge], seeds)
    ]
    accuracies(study, best["classifier"], seeds)
    for steps in STEPS:
        costs(study, steps)
    table = ablation_table(study)
    bias(study, seeds)
    found = {"rows": rows, "floors": floors, "ablation": table}
    write_json(RESULTS / "mmd" / "study.json", found)
    plot(study, floors, seeds)
    grids(study, best["classifier"])


def read(study: Study, name: str, judge: str, key: str = "fd") -> float | None:
    """What a judge said of a set of samples, if it has seen it."""
    path = study.out / "judged" / judge / f"{name}.json"
    return json.loads(path.read_text())[key] if path.exists() else None


def over_seeds(
    study: Study, kind: str, steps: int, judge: str, seeds: list[int], key: str = "fd"
) -> list[float]:
    """The same of the sets of all seeds that there are."""
    found = [read(study, f"{kind}-{steps}-{seed}", judge, key) for seed in seeds]
    return [value for value in found if value is not None]


def distances(
    study: Study, judge: str, digest: str, best: str, floor: dict[str, float], seeds: list[int]
) -> list[dict[str, Any]]:
    """Figures of one judge: against 50 steps, against the un-tuned sampler and the controls."""
    many, rows = read(study, best, judge), []
    if many is None:
        return rows
    for steps in STEPS:
        tuned = over_seeds(study, "mmd", steps, judge, seeds)
        if not tuned:
            continue
        mean = float(np.mean(tuned))
        beside = {k: read(study, f"{k}-{steps}-0", judge) for k in ("base", *CONTROLS)}
        note = (
            f"base {digest}, 50 steps as {best[5:-2]}: {many:.3f}; finetuned "
            f"{', '.join(f'{value:.3f}' for value in tuned)} ({mean:.3f} +- {np.std(tuned):.3f} "
            f"over {len(tuned)} seeds); un-tuned {_show(beside['base'])}; "
            + "".join(f"{words} {_show(beside[kind])}; " for kind, words in CONTROLS.items())
            + f"floor {floor['floor']:.3f}, reconstructions {floor['reconstruction']:.3f}, "
            f"{floor['reconstruction'] / many:.3f} of the 50 steps; {study.count} samples"
        )
        name = f"FD at N={steps} over the 50-step figure, {judge}"
        record("mmd", name, mean / many, "<=", BOUNDS[steps], study.command, note)
        if beside["base"] is not None:
            name = f"FD at N={steps} over the un-tuned N={steps}, {judge}"
            op, bound = ("<=", 0.2) if steps == 1 else ("<", 1.0)
            record("mmd", name, mean / beside["base"], op, bound, study.command, note)
        for kind, words in CONTROLS.items():
            if beside[kind] is not None:
                name = f"FD at N={steps} over that of {words}, {judge}"
                record("mmd", name, mean / beside[kind], "<", 1.0, study.command, note)
        rows.append({"judge": judge, "N": steps, "finetuned": tuned, "50 steps": many, **beside})
    return rows


def _show(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"


def accuracies(study: Study, best: str, seeds: list[int]) -> None:
    """Class accuracy against that of the un-tuned many steps."""
    many = read(study, best, "classifier", "accuracy")
    for steps in STEPS:
        found = over_seeds(study, "mmd", steps, "classifier", seeds, "accuracy")
        if found and many is not None:
            record(
                "mmd", f"conditional accuracy at N={steps} less that of the un-tuned 50 steps",
                float(np.mean(found)) - many, ">=", 0.0, study.command,
                f"{np.mean(found):.4f} +- {np.std(found):.4f} over {len(found)} seeds against "
                f"{many:.4f}",
            )  # fmt: skip


def costs(study: Study, steps: int) -> None:
    """Minutes and FLOPs of one finetuning."""
    path = study.out / "runs" / f"mmd-{steps}-0" / "results" / "train.json"
    if not path.exists():
        return
    result = json.loads(path.read_text())
    record(
        "mmd", f"finetuning at N={steps}, minutes", seconds_of(study, steps, 0) / 60, "<=", 5.0,
        study.command,
        f"{result['steps']} updates, seed 0, alone on both cores (the other seeds "
        "shared them); networks and bank, which all N share, are not in",
    )  # fmt: skip
    record(
        "mmd", f"finetuning at N={steps}, FLOPs over the base training's",
        result["share_of_base_flops"], "<=", 0.1, study.command,
        "closed form: 4 forward passes a differentiated step, 3 where its activations are kept; "
        "2 of decoder and features",
    )  # fmt: skip


def bias(study: Study, seeds: list[int]) -> None:
    """How much better finetuning looks to the features it was trained on."""
    for steps in STEPS:
        gain = {}
        for judge in JUDGES:
            tuned = over_seeds(study, "mmd", steps, judge, seeds)
            untuned = read(study, f"base-{steps}-0", judge)
            if tuned and untuned is not None:
                gain[judge] = untuned / float(np.mean(tuned))
        if {"trained", "classifier"} <= gain.keys():
            told = ", ".join(f"{judge} {value:.2f}" for judge, value in gain.items())
            record(
                "mmd", f"bias at N={steps}: gain on trained features over that on held-out ones",
                gain["trained"] / gain["classifier"], "report", None, study.command,
                f"un-tuned FD over finetuned FD: {told}",
            )  # fmt: skip


def ablation_table(study: Study) -> list[dict[str, Any]]:
    """Rows of the ablation, with the distance on features that were trained on beside."""
    rows = []
    for steps, labels in ABLATED.items():
        for label in labels:
            name = ablation_name(steps, label)
            row = {judge: read(study, name, judge) for judge in JUDGES}
            if row["classifier"] is not None:
                row["accuracy"] = read(study, name, "classifier", "accuracy")
                rows.append({"N": steps, "change": label, **row})
    return rows


def plot(study: Study, floors: dict, seeds: list[int]) -> None:
    """FD against network calls, base and finetuned, one panel a judge."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for axis, name in zip(axes, HELD_OUT, strict=True):
        curve = [(n, read(study, f"base-{n}-0", name)) for n in CURVE]
        curve = [pair for pair in curve if pair[1] is not None]
        if curve:
            axis.loglog(*zip(*curve, strict=True), "o-", label="base, Euler, no guidance")
        for kind, style in (("mmd", "s-"), ("flow", "^:"), ("start", "x:"), ("grid", "v:")):
            points = [(n, over_seeds(study, kind, n, name, seeds)) for n in STEPS]
            points = [(n, np.mean(values)) for n, values in points if values]
            if points:
                axis.loglog(*zip(*points, strict=True), style, label=_LABELS[kind])
        for path in (study.out / "judged" / name).glob("many-*-0.json"):
            at, fd = study.calls(path.stem), json.loads(path.read_text())["fd"]
            axis.loglog([at], [fd], "*", ms=12, label=path.stem[5:-2])
        axis.axhline(floors[name]["reconstruction"], color="gray", ls="--", label="reconstructions")
        axis.axhline(floors[name]["floor"], color="gray", ls=":", label="real train images")
        axis.set(xlabel="network calls a sample", ylabel=f"FD, {study.count} samples", title=name)
        axis.set_xticks([*CURVE, 32, 64], labels=[str(n) for n in (*CURVE, 32, 64)], minor=False)
        axis.set_xticks([], minor=True)
        axis.legend(fontsize=7)
    path = RESULTS / "mmd" / "fd_nfe.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def grids(study: Study, best: str) -> None:
    """The same noises before and after, a row a sampler."""
    rows = {f"{kind}-{n}-0": f"{kind}-{n}" for n in STEPS for kind in ("base", "mmd")}
    cells, labels = [], []
    for name, label in {**rows, best: "50 steps"}.items():
        path = study.out / "samples" / f"{name}.npz"
        if path.exists():
            cells.append(np.load(path)["images"][:20])
            labels.append(label)
    if cells:
        picture = image_grid(np.concatenate(cells), columns=20, row_labels=labels)
        save_image(RESULTS / "mmd" / "samples.png", picture)
