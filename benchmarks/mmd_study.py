"""The units of the study of finetunings: runs, samples and judgements, each made once and kept."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from lfm_jax import checkpoints, mmd
from lfm_jax.evaluate import FeatureStatistics, collect_features, frechet_of
from lfm_jax.experiments import neighbour
from lfm_jax.features import load_extractor, open_extractor
from lfm_jax.jobs import build, run_job
from lfm_jax.jobs.generate import Generator
from lfm_jax.jobs.judge import of_source, reconstructed, spread
from lfm_jax.workdir import Workdir
from lfm_jax.writers import write_json

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
# One change at a time of what the configs say, with a quarter of their updates.
_MEDIAN = {"mmd.joint": 4.0}  # a bounded kernel tells classes apart from a few bandwidths on
ABLATION = {
    "as configured": {},
    "cubic": {"mmd.kernel": "cubic"},
    "linear": {"mmd.kernel": "linear"},
    "gaussian": {"mmd.kernel": "gaussian", **_MEDIAN},
    "laplace": {"mmd.kernel": "laplace", **_MEDIAN},
    "imq": {"mmd.kernel": "imq", **_MEDIAN},
    "one network": {"mmd.network_seeds": (11,)},
    "hidden layers alone": {"mmd.entries": ("features",)},
    "latent encoders": {"mmd.features": ("latents",)},
    "backbone tokens": {"mmd.features": ("tokens",)},
    "random features": {"mmd.features": ("random",)},
    "raw latents": {"mmd.features": ("raw",)},
    "batch 128": {"train.batch_size": 128},
    "batch 512": {"train.batch_size": 512},
    "classes 4 medians apart": {**_MEDIAN},
    "classes not told apart": {"mmd.joint": 0.0, "mmd.baked": ()},
    "labels as they come": {"mmd.groups": 0},
    "adaLN alone": {"mmd.trainable": "adaln"},
    "LoRA": {"mmd.trainable": "lora"},
}
ABLATED = {  # the changes tried at a number of steps
    1: tuple(ABLATION),
    4: (
        "as configured",
        "cubic",
        "gaussian",
        "latent encoders",
        "backbone tokens",
        "raw latents",
        "batch 128",
    ),
}
SHORTER = 4


class Study:
    """The base run, the folder of the units, and what both judges need."""

    def __init__(self, base: str, out: str, count: int):
        self.base, self.out, self.count = Path(base), Path(out), count
        self.command = "python -m benchmarks.mmd runs/fashion_mnist runs/mmd_study"

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
        usual = config.train.batch_size
        for key, value in (changes or {}).items():
            section, field = key.split(".")
            config[section][field] = value
        if changes and "train.batch_size" in changes:
            factor = usual / changes["train.batch_size"]
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
            return np.concatenate(list(images(0, len(test))))

        def real():
            return train.batch(spread(len(train), self.count))["image"]

        return {
            judge: {
                "floor": self.judged("floor", judge, real)["fd"],
                "reconstruction": self.judged("reconstruction", judge, rebuilt)["fd"],
            }
            for judge in HELD_OUT
        }


def sweep(study: Study) -> dict[str, Any]:
    """Many-step settings of the base by `SWEPT` samples a cell, all from the same noises.

    Of each held-out judge's two best scales the best solver goes on to be measured with all
    samples: so few tell solvers apart well, and neighbouring scales less well.
    """
    cells = {}
    for scale in SCALES:
        for name, solver in MANY.items():
            cell = f"sweep-{name}-w{scale:g}"
            images = lambda c=cell, s=solver, w=scale: base_samples(study, c, s, w, 0, SWEPT)  # noqa: E731
            for judge in HELD_OUT:
                found = study.judged(cell, judge, images)
                cells[f"{judge} {name} {scale:g}"] = found["fd"]
    finalists = []
    for judge in HELD_OUT:
        mine = {key: value for key, value in cells.items() if key.startswith(judge)}
        scales = []
        for cell in sorted(mine, key=mine.__getitem__):
            _, name, scale = cell.split()
            if scale not in scales and len(scales) < 2:
                scales.append(scale)
                finalists.append((name, float(scale)))
    return {"cells": cells, "finalists": sorted(set(finalists))}


def best_of_many(study: Study, judge: str) -> str:
    """The unit of the finalist that this judge puts first, of those that it has seen."""
    fd = {}
    for name, scale in sweep(study)["finalists"]:
        unit = f"many-{name}-w{scale:g}-0"
        path = study.out / "judged" / judge / f"{unit}.json"
        if path.exists():
            fd[unit] = json.loads(path.read_text())["fd"]
    return min(fd, key=fd.__getitem__)


def base_samples(study, name, solver, scale, seed, count):
    config = study.base_config()
    section = config.sample
    section.rtol = section.atol = None
    for key, value in solver.items():
        section[key] = value
    section.guidance = scale
    return study.samples(name, study.base, config, seed, count)


def ablation_name(steps: int, label: str) -> str:
    """The unit that a change of `ABLATION` is kept under."""
    return f"ablation-{steps}-{label.replace(' ', '-')}"


def seconds_of(study: Study, steps: int, seed: int) -> float:
    """Seconds of a finetuning, compilation and validation included."""
    path = study.out / "runs" / f"mmd-{steps}-{seed}" / "results" / "train.json"
    return json.loads(path.read_text())["seconds_of_updates"]
