"""Solvers and guidance on a trained run: FD, class accuracy and NFE, as a table and two pictures.

    python benchmarks/solver_sweep.py configs/fashion_mnist.py runs/fashion_mnist [samples]

Samples of one row start from the same noise. FD is biased upwards at few samples, so the floor and
the reconstruction are computed at the same count; accuracy never stands without it.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from benchmarks.figures import RESULTS
from lfm_jax import checkpoints
from lfm_jax.evaluate import collect_features, frechet_of
from lfm_jax.jobs import build
from lfm_jax.jobs.evaluate import judge, reconstruct, spread
from lfm_jax.jobs.generate import Generator, class_names
from lfm_jax.workdir import Workdir
from lfm_jax.writers import image_grid, save_image

GUIDANCE = (1.0, 1.5, 2.5)
SOLVERS = (*(("euler", n, None) for n in (1, 2, 4, 8, 16, 50)), ("dopri5", 0, 1e-3))
_BATCH = 250


def measure(config: Any, workdir: Workdir, count: int) -> tuple[list[dict], dict, np.ndarray]:
    """Rows of figures, the common floors, and the first sample of each class for every row."""
    extractor, accuracy = judge(config, workdir)
    train, test = build.images(config, "train"), build.images(config, "test")
    collect = lambda images: collect_features(extractor, images, batch_size=_BATCH, progress=False)  # noqa: E731
    held_out = spread(len(test), len(test))
    real = collect(test.batch(held_out)["image"])
    some = spread(len(test), count)
    rebuilt = collect(np.concatenate(list(reconstruct(build.codec(config, workdir), test, some))))
    floors = {
        "classifier_accuracy": accuracy,
        "fd_floor": _fd(collect(train.batch(spread(len(train), count))["image"]), real),
        "fd_reconstruction": _fd(rebuilt, real),
        "count": count,
        "num_real": len(test),
    }
    params = checkpoints.load_params(workdir.checkpoints)
    labels = (np.arange(count) % config.data.num_classes).astype(np.int32)
    rows, shown = [], []
    for scale in GUIDANCE:
        for solver, steps, tolerance in tqdm(SOLVERS, desc=f"guidance {scale:g}", unit="row"):
            section = config.sample
            section.guidance, section.solver = scale, solver
            section.num_steps = steps or 1
            section.rtol = section.atol = tolerance
            generator = Generator.from_config(config, workdir)
            parts = [
                generator(params, range(i, i + _BATCH), labels[i : i + _BATCH])
                for i in range(0, count, _BATCH)
            ]
            images = np.concatenate([images for images, _, _ in parts])
            features = collect(images)
            rows.append(
                {
                    "guidance": scale,
                    "solver": f"{solver} {steps}" if steps else f"{solver} rtol {tolerance:g}",
                    "nfe": float(np.mean([np.mean(stats["nfe"]) for _, _, stats in parts])),
                    "network_calls": float(
                        np.mean([np.mean(stats["network_calls"]) for _, _, stats in parts])
                    ),
                    "fd": _fd(features, real),
                    "accuracy": float((features.logits.argmax(-1) == labels).mean()),
                }
            )
            shown.append(images[: config.data.num_classes])
    return rows, floors, np.concatenate(shown)


def _fd(features: Any, real: Any) -> float:
    return frechet_of(features.statistics, real.statistics)


def plot(rows: list[dict], floors: dict, path: Path) -> None:
    """FD against executed network calls, a line a guidance scale, with both floors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), constrained_layout=True)
    for scale in GUIDANCE:
        chosen = [r for r in rows if r["guidance"] == scale and r["solver"].startswith("euler")]
        (line,) = axes.loglog(
            [r["network_calls"] for r in chosen],
            [r["fd"] for r in chosen],
            "o-",
            label=f"Euler, guidance {scale:g}",
        )
        adaptive = [r for r in rows if r["guidance"] == scale and r["solver"].startswith("dopri5")]
        for row in adaptive:
            axes.loglog(row["network_calls"], row["fd"], "*", ms=12, color=line.get_color())
    axes.axhline(floors["fd_reconstruction"], color="gray", ls="--", label="reconstructions")
    axes.axhline(floors["fd_floor"], color="gray", ls=":", label="real train images")
    axes.set_xlabel("network calls a sample (stars: Dopri5)")
    axes.set_ylabel(f"FD, {floors['count']} samples")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(config_file: str, folder: str, count: str = "2000") -> None:
    spec = importlib.util.spec_from_file_location("experiment", config_file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config, workdir = module.get_config(), Workdir(epath.Path(folder))
    rows, floors, images = measure(config, workdir, int(count))
    out = RESULTS / Path(config_file).stem
    out.mkdir(parents=True, exist_ok=True)
    (out / "solvers.json").write_text(json.dumps({"floors": floors, "rows": rows}, indent=1) + "\n")
    plot(rows, floors, out / "solvers.png")
    names = [f"{row['solver']}, w {row['guidance']:g}" for row in rows]
    columns = len(class_names(config))
    save_image(out / "solver_samples.png", image_grid(images, columns=columns, row_labels=names))
    print(f"{'solver':<16}{'guidance':>9}{'NFE':>7}{'calls':>7}{'FD':>9}{'accuracy':>10}")
    for row in rows:
        print(
            f"{row['solver']:<16}{row['guidance']:>9g}{row['nfe']:>7.1f}"
            f"{row['network_calls']:>7.1f}{row['fd']:>9.3f}{row['accuracy']:>10.3f}"
        )
    print(json.dumps(floors))


if __name__ == "__main__":
    main(*sys.argv[1:])
