"""A run's folder: where everything lies, whose it is, and which of its stages are done.

No absolute path is stored, so that a copied folder goes on working. Whether a stage is done is
decided by content: its result file holds a hash of everything that it depended on.
"""

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from lfm_jax import checkpoints
from lfm_jax import config as config_lib
from lfm_jax.errors import UserError
from lfm_jax.writers import write_json

# Fields of a config that may change between two runs in one workdir (how long, how often, how to
# sample, how to measure, where things lie): its arrays are not bound to them.
FREE_TRAIN = (
    *("log_every", "save_every", "keep", "keep_every", "keep_best", "nonfinite"),
    *("in_memory", "preview_every", "evaluate_every", "evaluate_samples", "profile_steps"),
)
_FREE = {
    "data": ("path", "class_names"),
    "autoencoder": ("steps", "decode_dtype", "decode_slice", "preview"),
    "encode": ("batch_size", "workers"),
    "condition": ("path",),
    "train": ("steps", *FREE_TRAIN),
    "mmd": ("networks",),
}
_BOUND = ("seed", "loss", "data", "autoencoder", "encode", "condition", "model", "train")


@dataclasses.dataclass(frozen=True)
class Workdir:
    """Paths of a run's folder; `root` may be a ``gs://`` address."""

    root: epath.Path

    @property
    def config(self) -> epath.Path:
        return self.root / "config.json"

    @property
    def lock(self) -> epath.Path:
        return self.root / "lock"

    @property
    def autoencoder(self) -> epath.Path:
        return self.root / "autoencoder"

    @property
    def checkpoints(self) -> epath.Path:
        return self.root / "checkpoints"

    @property
    def extractors(self) -> epath.Path:
        return self.root / "extractors"

    @property
    def samples(self) -> epath.Path:
        return self.root / "samples"

    @property
    def previews(self) -> epath.Path:
        return self.root / "previews"

    @property
    def logs(self) -> epath.Path:
        return self.root / "logs"

    def latents(self, split: str) -> epath.Path:
        """The latent cache of a split."""
        return self.root / "latents" / split

    def result_path(self, job: str) -> epath.Path:
        return self.root / "results" / f"{job}.json"

    def result(self, job: str) -> dict[str, Any] | None:
        """The result file of a job, or None where it has not ended."""
        path = self.result_path(job)
        if not path.exists():
            return None
        try:
            result = json.loads(path.read_text())
            result["provenance"]["inputs"]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}: damaged, expected the JSON that a job writes; remove it and run "
                f"--job={job} again"
            ) from None
        return result

    def require_result(self, job: str) -> dict[str, Any]:
        """The result file of a job that must have run before.

        Raises:
            UserError: it has not.
        """
        result = self.result(job)
        if result is None:
            raise UserError(
                f"{self.result_path(job)} is missing: run --job={job} (or --job=pipeline) first"
            )
        return result

    def holds_work(self) -> bool:
        """Whether a job has left arrays or results here."""
        parts = ("autoencoder", "latents", "checkpoints", "results")
        return any((self.root / part).exists() for part in parts)

    def holds_weights(self) -> bool:
        """Whether a velocity network has been trained, finetuned or converted here."""
        places = (self.checkpoints, self.root / "finetune")
        return any(checkpoints.latest_step(place) is not None for place in places)

    def checkpoint(self) -> str:
        """Fingerprint of the newest weights, trained here or converted.

        Raises:
            UserError: there are none, or the newest are not those that the last job ended with:
                what is made of them would bear another's name.
        """
        made = self.result("train") or self.result("convert") or self.require_result("train")
        ended = made.get("snapshot_step", made.get("steps", 0))
        newest = checkpoints.latest_step(self.checkpoints)
        if newest not in (None, ended):
            raise UserError(
                f"{self.checkpoints}: the newest checkpoint is of step {newest}, the last training "
                f"that ended was at step {ended}; expected --job=train to end first (with "
                f"--config.train.steps={newest} it ends there)"
            )
        return made["checkpoint"]


def on_main_process(action: Callable[[], None]) -> None:
    """Do what only one process may do; a `UserError` there is raised in all of them."""
    problem = ""
    if jax.process_index() == 0:
        try:
            action()
        except UserError as error:
            problem = str(error)
    if jax.process_count() > 1:
        letters = np.zeros(2048, np.uint8)
        encoded = problem.encode()[: letters.size]
        letters[: len(encoded)] = np.frombuffer(encoded, np.uint8)
        letters = np.asarray(multihost_utils.broadcast_one_to_all(letters))
        problem = bytes(letters).rstrip(b"\0").decode(errors="ignore")
    if problem:
        raise UserError(problem)


def identity(config: ConfigDict) -> dict[str, Any]:
    """The part of a config that the checkpoints and caches of a workdir are bound to."""
    return _bound(config_lib.to_json(config))


def _bound(values: dict[str, Any]) -> dict[str, Any]:
    names = (*_BOUND, "mmd") if values["loss"] == "mmd" else _BOUND
    bound = {name: values[name] for name in names}
    for section, fields in _FREE.items():
        if section in bound:
            bound[section] = {k: v for k, v in bound[section].items() if k not in fields}
    return bound


def claim(workdir: Workdir, config: ConfigDict) -> None:
    """Take a workdir for this config: write its config.json, or refuse one that is another's.

    Raises:
        UserError: the workdir holds another config's checkpoints; the message names the keys.
    """
    on_main_process(lambda: _claim(workdir, config))


def _claim(workdir: Workdir, config: ConfigDict) -> None:
    wanted = identity(config)
    if workdir.config.exists():
        try:
            found = json.loads(workdir.config.read_text())["identity"]
            # A field that was not there yet had its default; one that became free binds no more.
            found = _bound(_merged(config_lib.to_json(config_lib.default_config()), found))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{workdir.config}: expected the JSON that a run of lfm_jax wrote; "
                "remove it or choose another --workdir"
            ) from error
        # A run that made nothing has no claim, and one without weights none to a network.
        free = () if workdir.holds_weights() else ("loss", "model", "train", "mmd")
        theirs, ours = ({k: v for k, v in x.items() if k not in free} for x in (found, wanted))
        differing = _differing(theirs, ours)
        if differing and workdir.holds_work():
            raise UserError(
                f"--workdir={workdir.root} holds another config's run; differing: {differing}; "
                "expected the same values, or another --workdir"
            )
    write_json(workdir.config, {"identity": wanted, "config": config_lib.to_json(config)})


def _merged(defaults: dict, values: dict) -> dict:
    merged = dict(defaults)
    for key, value in values.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if nested else value
    return merged


def _differing(found: dict, wanted: dict, prefix: str = "") -> str:
    parts = []
    for key in sorted({*found, *wanted}):
        old, new = found.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            parts.append(_differing(old, new, f"{prefix}{key}."))
        elif old != new:
            parts.append(f"{prefix}{key} (there {old!r}, here {new!r})")
    return ", ".join(part for part in parts if part)


def write_result(
    workdir: Workdir, job: str, config: ConfigDict, inputs: dict[str, Any], figures: dict[str, Any]
) -> dict[str, Any]:
    """Write ``results/<job>.json``: the figures and what they depend on."""
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "diffrax", "numpy")
    result = {
        "job": job,
        **figures,
        "provenance": {
            "inputs": config_lib.content_hash(inputs),
            "config": config_lib.content_hash(config_lib.to_json(config)),
            "seed": config.seed,
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "processes": jax.process_count(),
            "versions": {
                "lfm_jax": importlib.metadata.version("lfm_jax"),
                **{name: importlib.metadata.version(name) for name in packages},
            },
        },
    }
    if jax.process_index() == 0:
        write_json(workdir.result_path(job), result)
    if jax.process_count() > 1:  # the next stage reads it in every process
        multihost_utils.sync_global_devices(f"result of {job}")
    return result


def is_done(workdir: Workdir, job: str, inputs: dict[str, Any]) -> bool:
    """Whether a job ended with exactly these inputs."""
    result = workdir.result(job)
    return result is not None and result["provenance"]["inputs"] == config_lib.content_hash(inputs)
