"""The jobs of the kill matrix: what each makes, what it is writing when, what must come out equal.

All of them run in copies of one finished run of a few dozen updates, or start from it. An outcome
is everything that a run leaves and that may not depend on how often it was killed: every array of
the last checkpoint by its sum, logged losses, bytes of shards, samples and releases, figures.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    f"--config={ROOT}/configs/digits.py:smoke",
    "--config.autoencoder.block_out_channels=(8, 8)",
    "--config.autoencoder.norm_groups=4",
    "--config.autoencoder.mid_attention=False",
    "--config.autoencoder.steps=12",
    "--config.encode.shard_size=200",
    "--config.model.hidden=16",
    "--config.model.depth=1",
    "--config.model.heads=1",
    "--config.train.steps=24",
    "--config.train.save_every=4",
    "--config.train.log_every=3",
    "--config.train.preview_every=0",
    "--config.sample.num_samples=24",
    "--config.sample.batch_size=4",
    "--config.sample.num_steps=2",
    "--config.evaluate.extractor=random",
    "--config.evaluate.metrics=('fd',)",
)
_FINETUNE = (
    f"--config={ROOT}/configs/mmd_digits.py:smoke",
    *TINY[1:9],
    "--config.train.steps=12",
    "--config.train.save_every=2",
    "--config.train.log_every=3",
    "--config.mmd.features=('latents',)",
    "--config.mmd.entries=('features',)",
    "--config.mmd.target=latents",
    "--config.mmd.network_seeds=(11,)",
    "--config.mmd.network_steps=3",
    "--config.mmd.validate_every=4",
)
_SAVE = "*.orbax-checkpoint-tmp*"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Killed:
    """A job of the matrix.

    Attributes:
        makes: what the job makes, removed from a copy of the finished run before a trial.
        writing: glob patterns of what is there only while the job writes, and its name in counts.
        outcome: of a finished workdir, what must be equal to the undisturbed run's.
        verb: what stands behind ``--job``.
        flags: of the command line.
        anew: begins in an empty workdir, with the finished run as ``config.init``.
    """

    makes: tuple[str, ...] = ()
    writing: dict[str, str]
    outcome: Callable[[Path], Any]
    verb: str
    flags: tuple[str, ...] = TINY
    anew: bool = False

    def command(self, base: Path, workdir: Path) -> list[str]:
        """Arguments of `lfm_jax.main`."""
        init = (f"--config.init={base}",) if self.anew else ()
        return [*self.flags, *init, f"--workdir={workdir}", f"--job={self.verb}"]

    def fresh(self, base: Path, workdir: Path) -> None:
        """Make `workdir` one in which everything but this job has run."""
        shutil.rmtree(workdir, ignore_errors=True)
        if self.anew:
            workdir.mkdir(parents=True)
            return
        shutil.copytree(base, workdir)
        for pattern in self.makes:
            for path in workdir.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


# ---- outcomes


def _trained(folder: str, job: str, log: str = "") -> Callable[[Path], Any]:
    def outcome(workdir: Path) -> Any:
        newest = max((p for p in (workdir / folder).iterdir() if p.name.isdigit()), key=_number)
        data = json.loads(next(p for p in (newest / "data").iterdir() if p.is_file()).read_text())
        lines = (workdir / f"logs/{log or job}.jsonl").read_text().splitlines()
        curve = [{k: json.loads(line)[k] for k in ("step", "loss", "grad_norm")} for line in lines]
        return {"step": newest.name, "data": data, "curve": curve, **_figures(workdir, job)}

    return outcome


def _number(path: Path) -> int:
    return int(path.name)


def _figures(workdir: Path, job: str) -> dict[str, Any]:
    result = json.loads((workdir / f"results/{job}.json").read_text())
    # orbax gives its data files random names.
    result["files"] = [f for f in result.get("files", []) if not f.startswith("0/")]
    timed = ("provenance", "mfu", "data_wait")
    kept = {k: v for k, v in result.items() if k not in timed and "second" not in k}
    for split in kept.values():  # encode says how many shards were left to write
        if isinstance(split, dict):
            split.pop("shards_written", None)
    return {k: v for k, v in kept.items() if "_ms_" not in k}


def _bytes_of(pattern: str, job: str) -> Callable[[Path], Any]:
    def outcome(workdir: Path) -> Any:
        files = sorted(p for p in workdir.glob(pattern) if p.is_file())
        sums = {str(p.relative_to(workdir)): _sha256(p) for p in files}
        return {"sums": sums, **_figures(workdir, job)}

    return outcome


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _finetuned(workdir: Path) -> Any:
    """The running state, and which snapshot was kept with what in it."""
    snapshots = sorted(p.name for p in (workdir / "checkpoints").iterdir())
    return {"snapshots": snapshots, **_trained("finetune", "train", "finetune")(workdir)}


def _exported(workdir: Path) -> Any:
    import numpy as np
    import orbax.checkpoint as ocp

    params = ocp.StandardCheckpointer().restore(workdir / "release/0/params")
    digest = hashlib.sha256()

    def add(tree: Any) -> None:
        for key in sorted(tree):
            if isinstance(tree[key], dict):
                add(tree[key])
            else:
                digest.update(key.encode() + np.ascontiguousarray(tree[key]).tobytes())

    add(params)
    left = sorted(p.name for p in (workdir / "release").iterdir())
    return {"orbax": digest.hexdigest(), "left": left, **_bytes_of("release/*", "export")(workdir)}


# ---- the matrix

JOBS: dict[str, Killed] = {
    "train": Killed(
        verb="train",
        makes=("checkpoints", "results/train.json", "logs/train*"),
        writing={f"checkpoints/{_SAVE}": "asynchronous save"},
        outcome=_trained("checkpoints", "train"),
    ),
    "mmd": Killed(
        verb="train",
        flags=_FINETUNE,
        anew=True,
        writing={
            f"finetune/{_SAVE}": "asynchronous save",
            f"checkpoints/{_SAVE}": "save of the best snapshot",
            "features/.*": "save of a feature network",
            ".*.partial": "copy of the base's autoencoder",
        },
        outcome=_finetuned,
    ),
    "autoencode": Killed(
        verb="autoencode",
        makes=("autoencoder", "results/autoencode.json", "logs/autoencode*"),
        writing={f"autoencoder/checkpoints/{_SAVE}": "asynchronous save"},
        outcome=_trained("autoencoder/checkpoints", "autoencode"),
    ),
    "encode": Killed(
        verb="encode",
        makes=("latents", "results/encode.json"),
        writing={"latents/train/.*.tmp": "shard write", "latents/train/.info-*": "description"},
        outcome=_bytes_of("latents/train/*", "encode"),
    ),
    "sample": Killed(
        verb="sample",
        makes=("samples", "results/sample.json"),
        writing={"samples/parts-*/*": "part of the samples", "samples/.*.tmp": "samples file"},
        outcome=_bytes_of("samples/samples.npz", "sample"),
    ),
    "evaluate": Killed(
        verb="evaluate",
        makes=("results/evaluate.json",),
        writing={"evaluation/*/*": "features on disk", "results/.*.tmp": "result file"},
        outcome=lambda workdir: _figures(workdir, "evaluate"),
    ),
    "export": Killed(
        verb="export",
        makes=("release", "results/export.json"),
        writing={
            f"release/.fresh/{_SAVE}": "export",
            "release/.fresh/0": "swap of releases",
            "release/.*.tmp": "release file",
            "release/vae*": "export of the autoencoder",
        },
        outcome=_exported,
    ),
}
