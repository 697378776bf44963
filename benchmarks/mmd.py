"""MMD finetuning on Fashion-MNIST: few steps against many, with the controls that make it honest.

    python -m benchmarks.mmd runs/fashion_mnist runs/mmd [--parts=...] [--seeds=0,1,2]

Every unit of work (a finetuning, a set of samples, a distance) is a file under the second folder
and is made once: an interrupted run goes on. Parts: ``sweep`` (the base's best many-step setting),
``base`` (its samples), ``mmd`` (finetunings), ``flow`` and ``grid`` (the controls: the same seconds
of plain training; a trained time grid alone), ``ablation``, ``judge``, ``report`` (figures, tables,
plot). Two judges that no feature was trained on: the pipeline's classifier (another architecture
and seed) and EfficientNet-Lite0 of ImageNet; a third, trained on, stands beside to show the bias.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from benchmarks.figures import RESULTS, record
from lfm_jax import checkpoints, mmd
from lfm_jax.evaluate import FeatureStatistics, collect_features, frechet_of
from lfm_jax.experiments import neighbour
from lfm_jax.features import load_extractor, open_extractor
from lfm_jax.jobs import build, origin, run_job
from lfm_jax.jobs.generate import Generator
from lfm_jax.jobs.judge import of_source, reconstructed, spread
from lfm_jax.workdir import Workdir
from lfm_jax.writers import image_grid, save_image, write_json

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "base.py"
SCALES = (1.0, 1.25, 1.5, 2.0, 3.0)
MANY = {  # fifty evaluations, and an adaptive solve
    "euler": {"solver": "euler", "num_steps": 50},
    "heun": {"solver": "heun", "num_steps": 25},
    "dopri5": {"solver": "dopri5", "num_steps": 1, "rtol": 1e-3, "atol": 1e-3},
}
STEPS = (1, 2, 4)
CURVE = (1, 2, 4, 8, 16)
JUDGES = ("classifier", "effnet", "trained")
HELD_OUT = ("classifier", "effnet")
SWEPT = 500
BOUNDS = {1: 1.25, 2: 1.0, 4: 0.8}
# kernel x features x batch at N = 1 and 4; the number of examples is the same for all
ABLATION = {
    "gaussian, pixels": {},
    "cubic, pixels": {"mmd.kernel": "cubic"},
    "linear, pixels": {"mmd.kernel": "linear"},
    "laplace, pixels": {"mmd.kernel": "laplace"},
    "energy, pixels": {"mmd.kernel": "energy"},
    "imq, pixels": {"mmd.kernel": "imq"},
    "gaussian, one network": {"mmd.network_seeds": (11,)},
    "gaussian, hidden layer alone": {"mmd.entries": ("features",)},
    "gaussian, latent encoder": {"mmd.features": ("latents",)},
    "gaussian, backbone tokens": {"mmd.features": ("tokens",)},
    "gaussian, random": {"mmd.features": ("random",)},
    "gaussian, raw latents": {"mmd.features": ("raw",)},
    "gaussian, pixels, marginals": {"mmd.joint": 0.0},
    "gaussian, pixels, batch 64": {"train.batch_size": 64},
    "gaussian, pixels, batch 1024": {"train.batch_size": 1024},
    "gaussian, pixels, adaLN alone": {"mmd.trainable": "adaln"},
    "gaussian, pixels, LoRA": {"mmd.trainable": "lora"},
}


class Study:
    """The base run, the folder of the units, and what both judges need."""

    def __init__(self, base: str, out: str, count: int):
        self.base, self.out, self.count = Path(base), Path(out), count
        self.command = f"python -m benchmarks.mmd {base} {out}"

    # ---- configs

    def base_config(self) -> Any:
        """The base's experiment with the autoencoder and network that it was run with."""
        config = neighbour(str(CONFIGS), "fashion_mnist.py")
        saved = json.loads((self.base / "config.json").read_text())["config"]
        for section in ("autoencoder", "model", "train"):
            for key, value in saved[section].items():
                if value is not None and key in config[section]:
                    config[section][key] = tuple(value) if isinstance(value, list) else value
        return config

    def mmd_config(self, steps: int, seed: int, changes: dict[str, Any] | None = None) -> Any:
        """The finetuning's experiment with the base's architecture."""
        config = neighbour(str(CONFIGS), "mmd_fashion_mnist.py", "" if steps == 1 else str(steps))
        base = self.base_config()
        for key, value in base.autoencoder.items():
            config.autoencoder[key] = value
        for key, value in base.model.items():
            config.model[key] = value
        config.init, config.seed = str(self.base), seed
        config.mmd.networks = str(self.out / "networks")
        for key, value in (changes or {}).items():
            section, field = key.split(".")
            config[section][field] = value
        if changes and "train.batch_size" in changes:
            factor = 256 / changes["train.batch_size"]
            config.train.steps = round(config.train.steps * factor)
            config.train.warmup_steps = round(config.train.warmup_steps * factor)
            config.mmd.validate_every = max(round(config.mmd.validate_every * factor), 1)
        return config

    # ---- units

    def finetune(self, name: str, config: Any) -> dict[str, Any]:
        """Train once; the result with its seconds."""
        folder = self.out / "runs" / name
        path = folder / "results" / "train.json"
        if not path.exists():
            run_job("train", config, str(folder))
        return json.loads(path.read_text())

    def samples(self, name: str, folder: Path, config: Any, seed: int, count: int) -> np.ndarray:
        """Images of a run, drawn once; balanced labels."""
        path = self.out / "samples" / f"{name}.npz"
        if path.exists():
            return np.load(path)["images"]
        config.sample.seed = seed
        generator = Generator.from_config(config, Workdir(epath.Path(folder)))
        params = checkpoints.load_params(folder / "checkpoints")
        labels = (np.arange(count) % config.data.num_classes).astype(np.int32)
        images, calls, begin = [], [], time.perf_counter()
        for start in tqdm(range(0, count, 250), desc=name, unit="batch"):
            made, _, stats = generator(
                params, range(start, start + 250), labels[start : start + 250]
            )
            images.append(made)
            calls.append(np.mean(stats["network_calls"]))
        images = np.concatenate(images)[:count]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, images=images)
        seconds = time.perf_counter() - begin
        write_json(path.with_suffix(".json"), {"calls": float(np.mean(calls)), "seconds": seconds})
        return images

    def calls(self, name: str) -> float:
        """Network calls a sample of `samples`."""
        return json.loads((self.out / "samples" / f"{name}.json").read_text())["calls"]

    # ---- judging

    def extractor(self, judge: str) -> Any:
        """One of `JUDGES`."""
        if judge == "effnet":
            return open_extractor("efficientnet-lite0")
        if judge == "classifier":
            return load_extractor(next((self.base / "extractors").rglob("*.safetensors")))
        network, params, _ = mmd.load_encoder(self.out / "networks" / "pixels-11.safetensors")
        return mmd.pixel_extractor(network, params, size=32, channels=1, name="trained on")

    def judged(self, name: str, judge: str, images: Any) -> dict[str, float]:
        """Frechet distance to the held-out images, and class accuracy, computed once."""
        path = self.out / "judged" / judge / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text())
        images = images() if callable(images) else images
        extractor = self.extractor(judge)
        found = collect_features(extractor, images, batch_size=250, description=f"{judge} {name}")
        figures = {"fd": frechet_of(found.statistics, self.real(judge)), "count": len(images)}
        if judge == "classifier":
            labels = np.arange(len(images)) % 10
            figures["accuracy"] = float((found.logits.argmax(-1) == labels).mean())
        write_json(path, figures)
        return figures

    def real(self, judge: str) -> FeatureStatistics:
        """Statistics of the held-out images."""
        path = self.out / "judged" / judge / "real.npz"
        if not path.exists():
            test = build.images(self.base_config(), "test")
            images = test.batch(np.arange(len(test)))["image"]
            found = collect_features(self.extractor(judge), images, batch_size=250).statistics
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, mean=found.mean, covariance=found.covariance, count=found.count)
        with np.load(path) as file:
            return FeatureStatistics.from_moments(
                file["mean"], file["covariance"], int(file["count"])
            )

    def floors(self) -> dict[str, dict[str, float]]:
        """Train images, and the held-out ones through the autoencoder, as if they were samples."""
        config = self.base_config()
        train, test = build.images(config, "train"), build.images(config, "test")

        def rebuilt():
            codec = build.codec(config, Workdir(epath.Path(self.base)))
            images = reconstructed(codec, of_source(test, np.arange(len(test))))
            return np.concatenate(list(images))

        def real():
            return train.batch(spread(len(train), self.count))["image"]

        return {
            judge: {
                "floor": self.judged("floor", judge, real)["fd"],
                "reconstruction": self.judged("reconstruction", judge, rebuilt)["fd"],
            }
            for judge in HELD_OUT
        }


# ---- parts


def sweep(study: Study) -> dict[str, Any]:
    """The base's best many-step setting for each held-out judge, by `SWEPT` samples a cell."""
    cells = {}
    for scale in SCALES:
        for name, solver in MANY.items():
            cell = f"sweep-{name}-w{scale:g}"
            images = lambda c=cell, s=solver, w=scale: base_samples(study, c, s, w, 0, SWEPT)  # noqa: E731
            for judge in HELD_OUT:
                found = study.judged(cell, judge, images)
                cells[f"{judge} {name} {scale:g}"] = found["fd"]
    best = {}
    for judge in HELD_OUT:
        mine = {key: value for key, value in cells.items() if key.startswith(judge)}
        _, name, scale = min(mine, key=mine.get).split()
        best[judge] = (name, float(scale))
    return {"cells": cells, "best": best}


def base_samples(study, name, solver, scale, seed, count):
    config = study.base_config()
    section = config.sample
    section.rtol = section.atol = None
    for key, value in solver.items():
        section[key] = value
    section.guidance = scale
    return study.samples(name, study.base, config, seed, count)


def base(study: Study, seeds: list[int]) -> None:
    """10,000 samples of the base: the best many-step settings, and few steps at their scales."""
    for name, scale in set(sweep(study)["best"].values()):
        base_samples(study, f"many-{name}-w{scale:g}-0", MANY[name], scale, 0, study.count)
    for steps in CURVE:
        few_base(study, steps, 0)
    for steps in STEPS:
        for seed in seeds:
            few_base(study, steps, seed)


def few_base(study: Study, steps: int, seed: int, scale: float = 1.0) -> np.ndarray:
    """Samples of the base in a few Euler steps, one network call each."""
    solver = {"solver": "euler", "num_steps": steps}
    return base_samples(study, f"base-{steps}-{seed}", solver, scale, seed, study.count)


def finetuned(study: Study, name: str, config: Any, seed: int, count: int) -> dict[str, Any]:
    """Finetune, then sample."""
    result = study.finetune(name, config)
    study.samples(name, study.out / "runs" / name, config, seed, count)
    return result


def controls(study: Study, kind: str, seeds: list[int]) -> None:
    """What MMD has to beat at the same price."""
    for steps in STEPS:
        for seed in seeds:
            name = f"{kind}-{steps}-{seed}"
            if kind == "grid":
                if steps == 1:
                    continue  # a grid of one step has nothing to train but one scale
                config = study.mmd_config(
                    steps, seed, {"mmd.trainable": "solver", "train.learning_rate": 2e-2}
                )
                finetuned(study, name, config, seed, study.count)
                continue
            # One plain training a seed serves all N: its seconds are those of the longest.
            shared = f"flow-{seed}"
            config = study.base_config()
            seconds = max(seconds_of(study, n, seed) for n in STEPS)
            trained = json.loads((study.base / "results" / "train.json").read_text())
            config.init = str(study.base)
            config.train.steps = max(round(seconds * trained["steps_per_second"]), 10)
            config.train.learning_rate = 1e-4
            config.train.warmup_steps = 10
            config.train.ema_decay = 0.99
            config.train.save_every = 1000
            config.train.preview_every = 0
            for part in ("latents", "autoencoder"):
                link = study.out / "runs" / shared / part
                if not link.exists():
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to((study.base / part).resolve())
            result = study.out / "runs" / shared / "results" / "autoencode.json"
            if not result.exists():
                result.parent.mkdir(parents=True, exist_ok=True)
                result.write_text((study.base / "results" / "autoencode.json").read_text())
            config.seed = seed
            study.finetune(shared, config)
            config.sample.solver, config.sample.num_steps = "euler", steps
            config.sample.guidance, config.sample.rtol, config.sample.atol = 1.0, None, None
            study.samples(name, study.out / "runs" / shared, config, seed, study.count)


def seconds_of(study: Study, steps: int, seed: int) -> float:
    """Seconds of a finetuning, compilation and validation included."""
    path = study.out / "runs" / f"mmd-{steps}-{seed}" / "results" / "train.json"
    return json.loads(path.read_text())["seconds_of_updates"]


def ablation(study: Study, steps: tuple[int, ...] = (1, 4), count: int = 2000) -> None:
    """One change at a time."""
    for number in steps:
        for label, changes in ABLATION.items():
            name = f"ablation-{number}-{label.replace(', ', '_').replace(' ', '-')}"
            finetuned(study, name, study.mmd_config(number, 0, changes), 0, count)


def judge(study: Study) -> None:
    """All samples by all judges; EfficientNet sees the ablation's, too."""
    study.floors()
    for path in sorted((study.out / "samples").glob("*.npz")):
        if path.stem.startswith("sweep"):
            continue
        for name in JUDGES:
            study.judged(path.stem, name, lambda p=path: np.load(p)["images"])


# ---- report


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


PARTS = ("sweep", "base", "mmd", "flow", "grid", "ablation", "judge", "report")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("out")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", default="1,2,4")
    parser.add_argument("--count", type=int, default=10000)
    given = parser.parse_args()
    study = Study(given.base, given.out, given.count)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    for part in given.parts.split(","):
        if part == "sweep":
            sweep(study)
        elif part == "base":
            base(study, seeds)
        elif part == "mmd":
            for seed in seeds:
                for steps in map(int, given.steps.split(",")):
                    config = study.mmd_config(steps, seed)
                    finetuned(study, f"mmd-{steps}-{seed}", config, seed, study.count)
        elif part in ("flow", "grid"):
            controls(study, part, seeds)
        elif part == "ablation":
            ablation(study)
        elif part == "judge":
            judge(study)
        elif part == "report":
            report(study, seeds)
        else:
            parser.error(f"--parts: {part!r} is none of {', '.join(PARTS)}")


if __name__ == "__main__":
    main()
