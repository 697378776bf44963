"""Solvers and guidance on a trained run: FD, class accuracy and cost, as a table and two pictures.

    python -m benchmarks.solver_sweep configs/fashion_mnist.py runs/fashion_mnist [samples]

Samples of one row start from the same noises. FD is biased upwards at few samples, so the floor and
the reconstruction are computed at the same count; accuracy never stands without it. Rows are kept
in ``<run>/results/solver_sweep.json`` as they come, so that a stopped sweep goes on.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from benchmarks.figures import RESULTS, record
from benchmarks.settings import judged
from lfm_jax import checkpoints
from lfm_jax.evaluate import frechet_of
from lfm_jax.jobs import build
from lfm_jax.jobs.judge import Look, judge, of_source, reconstructed, spread
from lfm_jax.jobs.sample_options import class_names
from lfm_jax.workdir import Workdir
from lfm_jax.writers import image_grid, save_image

# guidance -> solver -> steps (or, below 1, tolerances)
LINES: dict[float, dict[str, tuple[float, ...]]] = {
    1.0: {"euler": (1, 2, 4, 8, 16, 50)},
    1.5: {
        "euler": (1, 2, 4, 8, 16, 50),
        "heun": (2, 4, 8, 16),
        "ab2": (4, 8, 16),
        "bosh3": (3e-2, 1e-2),
        "dopri5": (3e-2, 3e-3),
    },
    2.5: {"euler": (1, 2, 4, 8, 16, 50)},
}


def measure(config: Any, workdir: Workdir, count: int) -> tuple[list[dict], dict, np.ndarray]:
    """Rows of figures, the common floors, and the first sample of each class for every row."""
    extractor, accuracy = judge(config, workdir)
    look = Look(extractor=extractor)
    train, test = build.images(config, "train"), build.images(config, "test")
    real = look(of_source(test, spread(len(test), len(test))), len(test), "held-out real")
    some = of_source(test, spread(len(test), count))
    rebuilt = look(reconstructed(build.codec(config, workdir), some), count, "reconstructions")
    floor = look(of_source(train, spread(len(train), count)), count, "train real")
    floors = {
        "classifier_accuracy": accuracy,
        "fd_floor": _fd(floor, real),
        "fd_reconstruction": _fd(rebuilt, real),
        "count": count,
        "num_real": len(test),
    }
    kept = workdir.root / "results" / "solver_sweep.json"
    key = f"{workdir.checkpoint()} {count}"
    found = json.loads(kept.read_text()) if kept.exists() else {}
    rows = found["rows"] if found.get("key") == key else []
    shown = {name: np.asarray(x, np.uint8) for name, x in found.get("shown", {}).items()}
    params = jax.tree.map(jax.numpy.asarray, checkpoints.load_params(workdir.checkpoints))
    settings = [(w, s, n) for w, line in LINES.items() for s, many in line.items() for n in many]
    for scale, solver, number in tqdm(settings, unit="row"):
        name = _named(scale, solver, number)
        if any(row["name"] == name for row in rows):
            continue
        config.sample.guidance = scale
        row, images = judged(
            config, workdir, params, look, real, count, solver=solver, number=number, name=name
        )
        rows.append({"name": name, "guidance": scale, "solver": solver, "number": number} | row)
        shown[name] = images[: config.data.num_classes]
        kept.write_text(
            json.dumps(
                {"key": key, "rows": rows, "shown": {k: v.tolist() for k, v in shown.items()}}
            )
        )
    return rows, floors, np.concatenate([shown[row["name"]] for row in rows])


def _named(scale: float, solver: str, number: float) -> str:
    return f"{solver} {number:g}, w {scale:g}"


def _fd(features: Any, real: Any) -> float:
    return frechet_of(features.statistics, real.statistics)


def plot(rows: list[dict], floors: dict, path: Path) -> None:
    """FD against velocity evaluations (left, one guidance) and executed network calls (right)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10.5, 4.2), constrained_layout=True, sharey=True
    )
    for solver in LINES[1.5]:
        line = [row for row in rows if row["guidance"] == 1.5 and row["solver"] == solver]
        style = "*--" if line[0]["number"] < 1 else "o-"
        left.loglog([r["nfe"] for r in line], [r["fd"] for r in line], style, label=solver)
    for scale in LINES:
        line = [row for row in rows if row["guidance"] == scale and row["solver"] == "euler"]
        calls = [r["network_calls"] for r in line]
        right.loglog(calls, [r["fd"] for r in line], "o-", label=f"euler, guidance {scale:g}")
    for axes, title in (
        (left, "velocity evaluations (NFE), guidance 1.5"),
        (right, "network calls a sample"),
    ):
        axes.axhline(floors["fd_reconstruction"], color="gray", ls="--", label="reconstructions")
        axes.axhline(floors["fd_floor"], color="gray", ls=":", label="real train images")
        axes.set_xlabel(title)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    left.set_ylabel(f"FD, {floors['count']} samples against {floors['num_real']} held-out")
    figure.savefig(path, dpi=120)


def main(config_file: str, folder: str, count: str = "1000") -> None:
    """Measures, draws, and records the cost of the best row."""
    spec = importlib.util.spec_from_file_location("experiment", config_file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config, workdir = module.get_config(), Workdir(epath.Path(folder))
    rows, floors, images = measure(config, workdir, int(count))
    out = RESULTS / Path(config_file).stem
    out.mkdir(parents=True, exist_ok=True)
    (out / "solvers.json").write_text(json.dumps({"floors": floors, "rows": rows}, indent=1) + "\n")
    plot(rows, floors, out / "solvers.png")
    columns = len(class_names(config))
    names = [row["name"] for row in rows]
    save_image(out / "solver_samples.png", image_grid(images, columns=columns, row_labels=names))
    print(f"{'row':<22}{'NFE':>7}{'calls':>7}{'FD':>9}{'accuracy':>10}")
    for row in rows:
        print(
            f"{row['name']:<22}{row['nfe']:>7.1f}{row['network_calls']:>7.1f}"
            f"{row['fd']:>9.3f}{row['accuracy']:>10.3f}"
        )
    best = min((row for row in rows if row["guidance"] == 1.5), key=lambda row: row["fd"])
    near = min(
        (r for r in rows if r["guidance"] == 1.5 and r["fd"] <= 1.1 * best["fd"]),
        key=lambda row: row["nfe"],
    )
    record(
        "sampling",
        "NFE that come within 10 % of the best FD on Fashion-MNIST, guidance 1.5",
        near["nfe"],
        "report",
        None,
        f"python -m benchmarks.solver_sweep {config_file} runs/{Path(config_file).stem} {count}",
        f"{near['name']}: FD {near['fd']:.3f}; best {best['name']}: {best['fd']:.3f} at "
        f"{best['nfe']:.0f} NFE; reconstructions {floors['fd_reconstruction']:.3f}, real train "
        f"{floors['fd_floor']:.3f}; {count} samples; all rows in fashion_mnist/solvers.json",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
