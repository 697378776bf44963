"""Scores of a finetuning on validation features: the best snapshot is kept, collapse ends it."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from lfm_jax import checkpoints, mmd, sharding
from lfm_jax.config import to_json
from lfm_jax.evaluate import FeatureStatistics, frechet_of
from lfm_jax.jobs.mmd_bank import BATCH
from lfm_jax.state import Params, TrainState
from lfm_jax.workdir import Workdir
from lfm_jax.writers import write_json

# What one network makes of some hundred samples tells no more than this about another's view.
_NOISE = 0.1


class Monitor:
    """Scores the averaged weights on validation features and keeps the best snapshot.

    Of equals within the scores' noise the latest is kept: it has been trained longest.

    Called as ``monitor(state, step)``; the noises are the same every time. The score is the Frechet
    distance of the judge's features to real ones, averaged over the numbers of steps in the
    logarithm. A spread of the samples below ``config.mmd.collapse`` times the real one ends the
    run before that snapshot is kept, with ``keep`` too: the state is in ``finetune/`` all the same.
    """

    def __init__(
        self, *, config: ConfigDict, workdir: Workdir, rows: list, judge: Any, record: dict
    ):
        self.config, self.workdir, self.record = config, workdir, record
        self.judge = judge
        self._log = workdir.logs / "validation.json"
        self.history: list[dict[str, float | int]] = self._earlier()
        count = -(-config.mmd.validate_samples // BATCH) * BATCH
        self._parts = [
            {
                "position": jnp.arange(start, start + BATCH, dtype=jnp.uint32),
                "label": jnp.asarray(judge.labels[start : start + BATCH]),
                "draws": jnp.zeros((BATCH, 2)),
            }
            for start in range(0, count, BATCH)
        ]
        key = jax.random.key(config.seed + 1)
        self._rows = [
            jax.jit(lambda params, part, r=r: next(iter(r(params, part, key)[0].values())))
            for r in rows
        ]

    def __call__(self, state: TrainState, step: int, *, keep: bool = False) -> None:
        if any(entry["step"] == step for entry in self.history):
            return
        params = state.best_params
        scores, spreads = [], []
        for rows in self._rows:
            features = np.concatenate([np.asarray(rows(params, part)) for part in self._parts])
            if not np.isfinite(features).all():
                raise FloatingPointError(f"finetune: samples are not finite at step {step}")
            scores.append(frechet_of(FeatureStatistics.of(features), self.judge.statistics))
            centred = features - features.mean(0)
            spreads.append(np.sqrt(np.square(centred).sum(1).mean()) / self.judge.spread)
        entry = {
            "step": step,
            "score": float(np.exp(np.mean(np.log(np.maximum(scores, 1e-9))))),
            "spread": float(min(spreads)),
        }
        best = min((e["score"] for e in self.history if e["step"]), default=np.inf)
        self.history.append(entry)
        logging.info("finetune: step %d, validation %.4f", step, entry["score"])
        if entry["spread"] < self.config.mmd.collapse:
            raise FloatingPointError(
                f"finetune: collapse at step {step}: samples spread {entry['spread']:.2f} times "
                f"as far as real ones, below --config.mmd.collapse={self.config.mmd.collapse:g}; "
                f"{self._left()}"
            )
        # Step 0 is the base itself: no snapshot, and none has to beat it, so that there always is
        # one. `compare_with_base` says so where the one that was kept does not.
        if keep or (step and entry["score"] <= (1 + _NOISE) * best):
            self._save(params, step)
        # After the snapshot: a run that is killed between the two measures this step again.
        if sharding.is_main_process():
            write_json(self._log, {"record": self.record, "validation": self.history})

    def compare_with_base(self) -> None:
        """Warn where the snapshot that was kept scores worse than the base did."""
        scores = {entry["step"]: entry["score"] for entry in self.history}
        kept = checkpoints.latest_step(self.workdir.checkpoints)
        if kept in scores and scores[kept] > scores.get(0, np.inf) and sharding.is_main_process():
            logging.warning(
                "finetune: the snapshot of step %d scores %.4f on validation features, worse than "
                "the %.4f of the same few steps before finetuning",
                *(kept, scores[kept], scores[0]),
            )

    def _left(self) -> str:
        """What there is after a collapse."""
        kept = checkpoints.latest_step(self.workdir.checkpoints)
        state = checkpoints.latest_step(self.workdir.root / "finetune")
        words = "no snapshot was kept" if kept is None else f"the snapshot of step {kept} is kept"
        return words if state is None else f"{words}, finetune/ holds the state of step {state}"

    def _save(self, params: Params, step: int) -> None:
        state = TrainState(step=jnp.int32(step), params=snapshot(params), opt_state=(), ema=None)
        with checkpoints.open_manager(self.workdir.checkpoints, keep=1) as manager:
            data = {"record": self.record, "validation": self.history}
            checkpoints.save(
                manager, step, state, data=data, config=to_json(self.config), force=True
            )

    def _earlier(self) -> list[dict[str, float | int]]:
        """What an interrupted run had measured, of snapshots that were not kept too."""
        if checkpoints.latest_step(self.workdir.checkpoints) is None:
            return []
        try:
            logged = json.loads(self._log.read_text())
            if logged["record"] == self.record:
                return list(logged["validation"])
        except (OSError, ValueError, KeyError, TypeError):
            pass  # the snapshot knows all that came before it
        with checkpoints.open_manager(self.workdir.checkpoints, keep=1) as manager:
            saved = checkpoints.read_json(manager, checkpoints.DATA)
        return saved["validation"] if saved["record"] == self.record else []


def snapshot(params: Params) -> Params:
    """What is kept of the parameters: low-rank updates merged, a trained grid or offset beside."""
    extra = dict(params.get(mmd.FEW_STEP, {}))
    if "lora" not in extra:
        return params
    plain, _ = mmd.deploy({**params, mmd.FEW_STEP: {"lora": extra.pop("lora")}})
    return {**plain, mmd.FEW_STEP: extra} if extra else plain
