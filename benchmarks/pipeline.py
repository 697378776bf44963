"""The pipeline's figures, read from the results of finished runs and recorded with their bounds.

bash launch/local.sh
python -m benchmarks.pipeline digits runs/digits
bash launch/local.sh --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist
python -m benchmarks.pipeline fashion_mnist runs/fashion_mnist
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.figures import record


def digits(results: dict[str, Any], command: str) -> None:
    """Digits: time, recognition by an independent SVC, variety."""
    seconds = sum(result["seconds"] for result in results.values())
    figures = results["evaluate"]
    distances = (
        f"{figures['metric']} of {figures['num_samples']} samples against "
        f"{figures['num_real']} held-out images: {figures['fd_samples']:.3f}, floor (train images) "
        f"{figures['fd_floor']:.3f}, reconstructions {figures['fd_reconstruction']:.3f}"
    )

    def add(name: str, value: float, op: str, bound: Any, note: str = "") -> None:
        record("pipeline", f"digits: {name}", value, op, bound, command, note)

    add("whole run, minutes", seconds / 60, "<=", 6.0, _seconds(results))
    add("SVC accuracy on held-out real digits", figures["svc_accuracy_real"], ">=", 0.98)
    add(
        "SVC accuracy on class-conditional samples",
        figures["svc_accuracy_samples"],
        ">=",
        0.95,
        distances,
    )
    ratio = figures["pixel_std_ratio"]
    add("lowest per-class pixel std over the real one's", ratio["min"], "between", [0.7, 1.2])
    add("highest per-class pixel std over the real one's", ratio["max"], "between", [0.7, 1.2])
    for key in ("fd_samples", "fd_floor", "fd_reconstruction"):
        add(f"{key} ({figures['metric']})", figures[key], "report", None, distances)


def fashion_mnist(results: dict[str, Any], command: str) -> None:
    """Fashion-MNIST: time, the autoencoder's cost in accuracy, class accuracy beside FD."""
    seconds = sum(result["seconds"] for result in results.values())
    figures, sampler = results["evaluate"], results["sample"]
    setting = (
        f"{sampler['num_samples']} samples, {sampler['solver']}, NFE {sampler['nfe']:g}, guidance "
        f"{sampler['guidance']:g}; {figures['metric']} {figures['fd_samples']:.3f}, reconstruction "
        f"{figures['fd_reconstruction']:.3f}, floor {figures['fd_floor']:.3f}, "
        f"N = {figures['num_real']} held-out images"
    )

    def add(name: str, value: float, op: str, bound: Any, note: str = "") -> None:
        record("pipeline", f"Fashion-MNIST: {name}", value, op, bound, command, note)

    add("whole run with 10,000 samples, minutes", seconds / 60, "<=", 60.0, _seconds(results))
    add("classifier accuracy on real test images", figures["accuracy_real"], ">=", 0.91)
    lost = 100 * (figures["accuracy_real"] - figures["accuracy_reconstruction"])
    add("accuracy points lost on reconstructions", lost, "<=", 1.0)
    add("conditional accuracy of samples", figures["accuracy_samples"], ">=", 0.88, setting)
    add(
        "held-out FD of samples over the autoencoder's reconstruction FD",
        figures["fd_over_reconstruction"],
        "<=",
        6.0,
        setting,
    )
    for key in ("fd_samples", "fd_floor", "fd_reconstruction"):
        add(f"{key} ({figures['metric']})", figures[key], "report", None, setting)


def _seconds(results: dict[str, Any]) -> str:
    return ", ".join(f"{name} {result['seconds']:.0f} s" for name, result in results.items())


def main(name: str, workdir: str) -> None:
    stages = ("autoencode", "encode", "train", "sample", "evaluate")
    folder = Path(workdir) / "results"
    results = {stage: json.loads((folder / f"{stage}.json").read_text()) for stage in stages}
    config = f"--config=configs/{name}.py --workdir=runs/{name}"
    command = f"bash launch/local.sh {config} && python -m benchmarks.pipeline {name} runs/{name}"
    {"digits": digits, "fashion_mnist": fashion_mnist}[name](results, command)


if __name__ == "__main__":
    main(*sys.argv[1:])
