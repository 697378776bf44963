"""MMD finetuning on Fashion-MNIST: few steps against many, with the controls that make it honest.

    python -m benchmarks.mmd runs/fashion_mnist runs/mmd_study [--parts=...] [--seeds=0,1,2]

Every unit of work (a finetuning, a set of samples, a distance) is a file under the second folder
and is made once: an interrupted run goes on. Parts: ``sweep`` (of the base's many-step settings),
``base`` (its samples), ``mmd`` (finetunings), ``flow`` and ``grid`` (the controls: the same seconds
of plain training; a trained time grid alone), ``ablation``, ``judge``, ``report`` (figures, tables,
plot). Two judges that no feature was trained on: the pipeline's classifier (another architecture
and seed) and EfficientNet-Lite0 of ImageNet; a third, trained on, stands beside to show the bias.
"""

import argparse
import json
from typing import Any

import numpy as np

from benchmarks.mmd_report import report
from benchmarks.mmd_study import (
    ABLATED,
    ABLATION,
    CURVE,
    JUDGES,
    MANY,
    SHORTER,
    STEPS,
    Study,
    ablation_name,
    base_samples,
    seconds_of,
    sweep,
)

PARTS = ("sweep", "base", "mmd", "flow", "grid", "ablation", "judge", "report")


def base(study: Study) -> None:
    """10,000 samples of the base: the best many-step settings, and few steps at their scales."""
    for name, scale in sweep(study)["finalists"]:
        base_samples(study, f"many-{name}-w{scale:g}-0", MANY[name], scale, 0, study.count)
    for steps in CURVE:
        solver = {"solver": "euler", "num_steps": steps}
        base_samples(study, f"base-{steps}-0", solver, 1.0, 0, study.count)
    for steps in STEPS:  # where finetuning starts: what its grid alone is worth
        grid = study.mmd_config(steps, 0).mmd.grid
        solver = {"solver": "euler", "num_steps": steps, "grid": grid}
        base_samples(study, f"start-{steps}-0", solver, 1.0, 0, study.count)


def finetuned(study: Study, name: str, config: Any, seed: int, count: int) -> None:
    """Finetune, then sample."""
    study.finetune(name, config)
    study.samples(name, study.out / "runs" / name, config, seed, count)


def controls(study: Study, kind: str, seeds: list[int]) -> None:
    """What MMD has to beat at the same price."""
    for steps in STEPS:
        for seed in seeds:
            name = f"{kind}-{steps}-{seed}"
            if kind == "grid":
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


def ablation(study: Study, steps: list[int], count: int = 2000) -> None:
    """One change at a time, at N = 1 and 4; the number of examples is the same for all."""
    for number in steps:
        for label in ABLATED.get(number, ()):
            config = study.mmd_config(number, 0, ABLATION[label])
            config.train.steps = max(config.train.steps // SHORTER, 1)
            config.train.warmup_steps //= SHORTER
            config.mmd.validate_every = 0
            finetuned(study, ablation_name(number, label), config, 0, count)


def judge(study: Study) -> None:
    """All samples by all judges; EfficientNet sees the ablation's, too."""
    study.floors()
    for path in sorted((study.out / "samples").glob("*.npz")):
        if path.stem.startswith("sweep"):
            continue
        for name in JUDGES:
            study.judged(path.stem, name, lambda p=path: np.load(p)["images"])


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
            base(study)
        elif part == "mmd":
            for seed in seeds:
                for steps in map(int, given.steps.split(",")):
                    config = study.mmd_config(steps, seed)
                    finetuned(study, f"mmd-{steps}-{seed}", config, seed, study.count)
        elif part in ("flow", "grid"):
            controls(study, part, seeds)
        elif part == "ablation":
            ablation(study, list(map(int, given.steps.split(","))))
        elif part == "judge":
            judge(study)
        elif part == "report":
            report(study, seeds)
        else:
            parser.error(f"--parts: {part!r} is none of {', '.join(PARTS)}")


if __name__ == "__main__":
    main()
