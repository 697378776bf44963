"""The figures, the plot and the pictures of the finetunings; see `benchmarks.mmd`."""

import json
from typing import Any

import numpy as np

from benchmarks.figures import RESULTS, record
from benchmarks.mmd_study import BOUNDS, CURVE, HELD_OUT, JUDGES, STEPS, Study, seconds_of, sweep
from lfm_jax import checkpoints
from lfm_jax.jobs import origin
from lfm_jax.writers import image_grid, save_image, write_json


def report(study: Study, seeds: list[int]) -> None:
    """Figures from the units that exist; what is missing is left out."""
    floors = study.floors()
    chosen = sweep(study)["best"]

    def of(name: str, judge: str, key: str = "fd") -> float | None:
        path = study.out / "judged" / judge / f"{name}.json"
        return json.loads(path.read_text())[key] if path.exists() else None

    params = origin.initial_params(str(study.base))
    digest = checkpoints.fingerprint(params)[:16]
    many_name = {j: f"many-{n}-w{w:g}-0" for j, (n, w) in chosen.items()}
    rows: list[dict[str, Any]] = []
    for judge_name in HELD_OUT:
        many = of(many_name[judge_name], judge_name)
        if many is None:
            continue
        floor = floors[judge_name]
        for steps in STEPS:
            tuned = [of(f"mmd-{steps}-{seed}", judge_name) for seed in seeds]
            tuned = [value for value in tuned if value is not None]
            untuned = of(f"base-{steps}-0", judge_name)
            if not tuned:
                continue
            beside = {
                kind: of(f"{kind}-{steps}-0", judge_name) for kind in ("flow", "grid", "base")
            }
            note = (
                f"base {digest}, {chosen[judge_name][0]} guidance {chosen[judge_name][1]:g}: "
                f"{many:.3f}; finetuned {np.mean(tuned):.3f} +- {np.std(tuned):.3f} over "
                f"{len(tuned)} seeds; un-tuned {untuned:.3f}; plain training of the same seconds "
                f"{_show(beside['flow'])}; trained grid {_show(beside['grid'])}; floor "
                f"{floor['floor']:.3f}, reconstructions {floor['reconstruction']:.3f}; "
                f"{study.count} samples"
            )
            record(
                "mmd", f"FD at N={steps} over the 50-step figure, {judge_name}",
                float(np.mean(tuned)) / many, "<=", BOUNDS[steps], study.command, note,
            )  # fmt: skip
            if steps == 1:
                record(
                    "mmd", f"FD at N=1 over the un-tuned N=1, {judge_name}",
                    float(np.mean(tuned)) / untuned, "<=", 0.2, study.command, note,
                )  # fmt: skip
            rows.append(
                {"judge": judge_name, "N": steps, "finetuned": tuned, "50 steps": many, **beside}
            )
    accuracy = of(many_name["classifier"], "classifier", "accuracy")
    for steps in STEPS:
        found = [of(f"mmd-{steps}-{seed}", "classifier", "accuracy") for seed in seeds]
        found = [value for value in found if value is not None]
        if found and accuracy is not None:
            record(
                "mmd", f"conditional accuracy at N={steps} less that of the un-tuned 50 steps",
                float(np.mean(found)) - accuracy, ">=", 0.0, study.command,
                f"{np.mean(found):.4f} +- {np.std(found):.4f} against {accuracy:.4f}",
            )  # fmt: skip
    for steps in STEPS:
        path = study.out / "runs" / f"mmd-{steps}-0" / "results" / "train.json"
        if path.exists():
            result = json.loads(path.read_text())
            seconds = seconds_of(study, steps, 0)
            record(
                "mmd", f"finetuning at N={steps}, minutes", seconds / 60, "<=", 5.0, study.command,
                f"{result['steps']} updates; networks and bank, which all N share, are not in",
            )  # fmt: skip
            record(
                "mmd", f"finetuning at N={steps}, FLOPs over the base training's",
                result["share_of_base_flops"], "<=", 0.1, study.command,
                "closed form: 4 forward passes a differentiated step, 2 of decoder and features",
            )  # fmt: skip
    table = ablation_table(study, of)
    write_json(RESULTS / "mmd" / "study.json", {"rows": rows, "floors": floors, "ablation": table})
    plot(study, of, floors, seeds)
    grids(study)


def _show(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"


def ablation_table(study: Study, of: Any) -> list[dict[str, Any]]:
    """Rows of the ablation, with the distance on features that were trained on beside."""
    rows = []
    for path in sorted((study.out / "judged" / "classifier").glob("ablation-*.json")):
        row = {"name": path.stem, **{name: of(path.stem, name) for name in JUDGES}}
        row["accuracy"] = of(path.stem, "classifier", "accuracy")
        rows.append(row)
    return rows


def plot(study: Study, of: Any, floors: dict, seeds: list[int]) -> None:
    """FD against network calls, base and finetuned, one panel a judge."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for axis, name in zip(axes, HELD_OUT, strict=True):
        curve = [(n, of(f"base-{n}-0", name)) for n in CURVE]
        curve = [pair for pair in curve if pair[1] is not None]
        if curve:
            axis.loglog(*zip(*curve, strict=True), "o-", label="base, Euler, no guidance")
        for kind, style in (("mmd", "s-"), ("flow", "^:"), ("grid", "v:")):
            points = []
            for n in STEPS:
                values = [of(f"{kind}-{n}-{seed}", name) for seed in seeds]
                values = [v for v in values if v is not None]
                if values:
                    points.append((n, np.mean(values)))
            label = {"mmd": "MMD-finetuned", "flow": "plain training", "grid": "trained grid"}
            if points:
                axis.loglog(*zip(*points, strict=True), style, label=label[kind])
        for path in (study.out / "judged" / name).glob("many-*-0.json"):
            at = study.calls(path.stem)
            axis.loglog([at], [json.loads(path.read_text())["fd"]], "*", ms=12,
                        label=path.stem[5:-2])  # fmt: skip
        axis.axhline(floors[name]["reconstruction"], color="gray", ls="--", label="reconstructions")
        axis.axhline(floors[name]["floor"], color="gray", ls=":", label="real train images")
        axis.set(xlabel="network calls a sample", ylabel=f"FD, {study.count} samples", title=name)
        axis.legend(fontsize=7)
    path = RESULTS / "mmd" / "fd_nfe.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def grids(study: Study) -> None:
    """The same noises before and after, a row a sampler."""
    cells, labels = [], []
    many = sorted((study.out / "samples").glob("many-*-0.npz"))
    for name in [f"{kind}-{n}-0" for n in STEPS for kind in ("base", "mmd")]:
        path = study.out / "samples" / f"{name}.npz"
        if path.exists():
            cells.append(np.load(path)["images"][:20])
            labels.append(name[:-2])
    if many:
        cells.append(np.load(many[0])["images"][:20])
        labels.append("50 steps")
    if cells:
        picture = image_grid(np.concatenate(cells), columns=20, row_labels=labels)
        save_image(RESULTS / "mmd" / "samples.png", picture)
