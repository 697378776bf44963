"""Do latent flows need fewer evaluations than pixel flows of equal compute? On Fashion-MNIST.

    python -m benchmarks.pixel_or_latent runs/fashion_mnist runs/pixels [--flows=...]

Three flows are trained from scratch for the same number of examples. Their networks are the same
transformer up to what a token is, so that a forward pass costs the same by the closed form:

    latent   8x8x4 latents, 2x2 a token: 16 tokens, width 192 (the autoencoder of the first folder)
    pixel    32x32 pixels, 8x8 a token: 16 tokens, width 192
    fine     32x32 pixels, 4x4 a token: 64 tokens, width 96

Samples of all start from noises of the same seed, without guidance, and are judged by the
classifier of the first folder. Everything made is kept under the second one, and made once: a
stopped run goes on. Figures go to docs/results/quickstart.json, curves to
docs/results/fashion_mnist/pixel_or_latent.json.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from benchmarks.figures import RESULTS, record
from benchmarks.settings import judged
from lfm_jax import checkpoints
from lfm_jax.evaluate import frechet_of
from lfm_jax.experiments import neighbour
from lfm_jax.jobs import build, run_job
from lfm_jax.jobs.judge import Look, judge, of_source, reconstructed, spread
from lfm_jax.models import forward_macs
from lfm_jax.workdir import Workdir
from lfm_jax.writers import image_grid, save_image, write_json

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "base.py"
FLOWS = {
    "latent": {"hidden": 192, "heads": 3, "patch": 2},
    "pixel": {"hidden": 192, "heads": 3, "patch": 8},
    "fine": {"hidden": 96, "heads": 3, "patch": 4},
}
EULER = (1, 2, 4, 8, 16, 32, 64)
TOLERANCES = (1e-3, 1e-5)


def experiment(flow: str, steps: int) -> ConfigDict:
    """configs/fashion_mnist.py with this flow's network and training."""
    config = neighbour(str(CONFIGS), "fashion_mnist.py")
    for key, value in FLOWS[flow].items():
        config.model[key] = value
    if flow != "latent":
        config.autoencoder.kind = "identity"
    config.train.steps = steps
    config.train.warmup_steps = min(100, steps // 10)
    config.train.save_every = max(steps // 4, 1)
    config.train.preview_every = 0
    config.sample.guidance = 1.0
    return config


def trained(flow: str, config: ConfigDict, base: Path, folder: Path) -> Workdir:
    """The flow's workdir, encoded and trained; the latent one takes over the base's cache."""
    if flow == "latent":
        for part in ("autoencoder", "latents"):
            if not (folder / part).exists():
                shutil.copytree(base / part, folder / part)
        for job in ("autoencode", "encode"):
            (folder / "results").mkdir(exist_ok=True)
            shutil.copy(base / "results" / f"{job}.json", folder / "results")
    workdir = Workdir(epath.Path(folder))
    for job in ("encode", "train"):
        if workdir.result(job) is None:
            run_job(job, config, str(folder))
    return workdir


def curve(config: ConfigDict, workdir: Workdir, look: Look, real: Any, count: int) -> list[dict]:
    """A row a solver setting; rows stay in the workdir as they come."""
    kept = workdir.root / "results" / f"curve_{count}.json"
    found = json.loads(kept.read_text()) if kept.exists() else {}
    rows = found["rows"] if found.get("checkpoint") == workdir.checkpoint() else []
    params = jax.tree.map(jax.numpy.asarray, checkpoints.load_params(workdir.checkpoints))
    settings = [("euler", n) for n in EULER] + [("dopri5", t) for t in TOLERANCES]
    for solver, number in tqdm(settings[len(rows) :], unit="row"):
        name = f"{solver} {number:g}"
        row, images = judged(
            config, workdir, params, look, real, count, solver=solver, number=number, name=name
        )
        shown = images[: config.data.num_classes].tolist()
        rows.append({"solver": solver, "number": number, **row, "shown": shown})
        write_json(kept, {"checkpoint": workdir.checkpoint(), "rows": rows})
    return rows


def near_best(rows: list[dict]) -> dict:
    """The cheapest Euler row whose FD is within 10 % of the best of the Euler rows."""
    euler = [row for row in rows if row["solver"] == "euler"]
    best = min(row["fd"] for row in euler)
    return min((row for row in euler if row["fd"] <= 1.1 * best), key=lambda row: row["nfe"])


def _of(rows: list[dict], number: float, key: str) -> float:
    return next(row[key] for row in rows if row["number"] == number)


def report(found: dict[str, dict], floors: dict[str, float], command: str) -> None:
    """Figures, curves and pictures of what is there; ratios need both sides."""
    out = RESULTS / "fashion_mnist"
    out.mkdir(parents=True, exist_ok=True)
    shown = {
        f"{flow}, euler {row['number']}": row["shown"]
        for flow, one in found.items()
        for row in one["rows"]
        if row["solver"] == "euler" and row["number"] in (2, 8, 64)
    }
    images = np.concatenate([np.asarray(x, np.uint8) for x in shown.values()])
    grid = image_grid(images, columns=10, row_labels=list(shown))
    save_image(epath.Path(out) / "pixel_or_latent_samples.png", grid)
    for one in found.values():
        for row in one["rows"]:
            row.pop("shown")
    write_json(epath.Path(out) / "pixel_or_latent.json", {"floors": floors, "flows": found})
    _plot(found, floors, out / "pixel_or_latent.png")
    for flow, one in found.items():
        best = near_best(one["rows"])
        note = (
            f"FD {best['fd']:.3f} there; by NFE: "
            + ", ".join(f"{r['nfe']:.0f}: {r['fd']:.2f}" for r in one["rows"])
            + f"; {one['examples']:,} examples at {one['macs'] / 1e6:.1f} M MACs forward"
        )
        name = f"claim (a): Euler steps that come within 10 % of its own best FD, {flow} flow"
        record("quickstart", name, best["nfe"], "report", None, command, note)
    if not {"latent", "pixel", "fine"} <= set(found):
        return
    latent, pixels = found["latent"]["rows"], [found["pixel"]["rows"], found["fine"]["rows"]]
    ratio = near_best(latent)["nfe"] / min(near_best(rows)["nfe"] for rows in pixels)
    record(
        "quickstart", "claim (a): Euler steps to within 10 % of its own best, latent over pixel",
        ratio, "<", 1.0, command, "the better of the two pixel flows",
    )  # fmt: skip
    target = min((near_best(rows) for rows in pixels), key=lambda row: row["fd"])
    needed = next(row["nfe"] for row in latent if row["fd"] <= target["fd"])
    record(
        "quickstart", "claim (a): Euler steps to the better pixel flow's FD, latent over pixel",
        needed / target["nfe"], "<", 1.0, command,
        f"FD {target['fd']:.3f}: {needed:.0f} steps in latents, {target['nfe']:.0f} in pixels",
    )  # fmt: skip
    name = "claim (a): evaluations of dopri5 at 1e-5, latent over pixel"
    nfe = [_of(rows, 1e-5, "nfe") for rows in (latent, *pixels)]
    record(
        "quickstart", name, nfe[0] / min(nfe[1:]), "<", 1.0, command,
        f"latent {nfe[0]:.0f}, pixel {nfe[1]:.0f}, fine {nfe[2]:.0f}",
    )  # fmt: skip
    for steps in (2, 8, 64):
        fd = [_of(rows, steps, "fd") for rows in (latent, *pixels)]
        name = f"claim (a): FD at {steps} Euler steps, latent over pixel, equal training FLOPs"
        note = f"latent {fd[0]:.3f}, pixel {fd[1]:.3f}, fine {fd[2]:.3f}; autoencoder alone "
        note += f"{floors['fd_reconstruction']:.3f}, real train images {floors['fd_floor']:.3f}"
        record("quickstart", name, fd[0] / min(fd[1:]), "<", 1.0, command, note)


def _plot(found: dict[str, dict], floors: dict[str, float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), constrained_layout=True)
    for (flow, one), colour in zip(found.items(), ("C0", "C1", "C2"), strict=False):
        for solver, style in (("euler", "o-"), ("dopri5", "*")):
            line = [row for row in one["rows"] if row["solver"] == solver]
            label = f"{flow}, {solver}"
            nfe, fd = [row["nfe"] for row in line], [row["fd"] for row in line]
            axis.loglog(nfe, fd, style, color=colour, label=label)
    axis.axhline(floors["fd_reconstruction"], color="gray", ls="--", label="reconstructions")
    axis.axhline(floors["fd_floor"], color="gray", ls=":", label="real train images")
    axis.set_xlabel("velocity evaluations a sample")
    axis.set_ylabel(f"FD, {floors['count']:.0f} samples")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base", help="a finished workdir of configs/fashion_mnist.py")
    parser.add_argument("out", help="where the flows are trained and kept")
    parser.add_argument("--flows", default=",".join(FLOWS), help="to train now; all are reported")
    parser.add_argument("--steps", type=int, default=1500, help="updates of 128 examples")
    parser.add_argument("--count", type=int, default=1000, help="samples a row")
    flags = parser.parse_args()
    base, out = Path(flags.base), Path(flags.out)
    if unknown := sorted(set(flags.flows.split(",")) - set(FLOWS)):
        parser.error(f"--flows: {unknown[0]!r} is none of {', '.join(FLOWS)}")
    config = experiment("latent", flags.steps)
    extractor, _ = judge(config, Workdir(epath.Path(base)))
    look = Look(extractor=extractor)
    train, test = build.images(config, "train"), build.images(config, "test")
    real = look(of_source(test, spread(len(test), len(test))), len(test), "held-out real")
    some = of_source(test, spread(len(test), flags.count))
    codec = build.codec(config, Workdir(epath.Path(base)))
    rebuilt = look(reconstructed(codec, some), flags.count, "reconstructions")
    seen = look(of_source(train, spread(len(train), flags.count)), flags.count, "train real")
    floors = {
        "fd_reconstruction": frechet_of(rebuilt.statistics, real.statistics),
        "fd_floor": frechet_of(seen.statistics, real.statistics),
        "count": flags.count,
    }
    found = {}
    for flow in FLOWS:
        folder = out / f"{flow}_{flags.steps}"
        if flow not in flags.flows.split(",") and not (folder / "results" / "train.json").exists():
            continue
        config = experiment(flow, flags.steps)
        workdir = trained(flow, config, base, folder)
        rows = curve(config, workdir, look, real, flags.count)
        shape = build.latent_shape(config, build.codec(config, workdir))
        found[flow] = {
            "macs": forward_macs(build.network(config), shape),
            "examples": flags.steps * config.train.batch_size,
            "rows": rows,
        }
        for row in rows:
            print(
                f"{flow:<8}{row['solver']:<8}{row['number']:<8g}NFE {row['nfe']:<8.1f}"
                f"FD {row['fd']:<8.3f}accuracy {row['accuracy']:.3f}",
                flush=True,
            )
    report(found, floors, "python -m benchmarks.pixel_or_latent runs/fashion_mnist runs/pixels")


if __name__ == "__main__":
    main()
