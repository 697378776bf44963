"""The training loop that every objective shares, from restore to the last save.

Nothing in the loop waits for the device between two logs: metrics stay there as arrays and are
fetched together every `log_every` steps (and before a save, so that no NaN is ever saved).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from lfm_jax import checkpoints, preemption, sharding
from lfm_jax.data import prefetch
from lfm_jax.errors import Preempted, UserError
from lfm_jax.profiling import peak_flops
from lfm_jax.state import Batch, Metrics, TrainState
from lfm_jax.writers import ScalarWriter


def fit(
    name: str,
    state: TrainState,
    step_fn: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]],
    *,
    folder: epath.Path,
    logs: epath.Path,
    mesh: Mesh,
    steps: int,
    batch_size: int,
    record: dict[str, Any],
    config: dict[str, Any],
    log_every: int,
    save_every: int,
    keep: int = 2,
    train_flops: float = 0.0,
    preview: Callable[[TrainState, int], None] | None = None,
    preview_every: int = 0,
) -> tuple[TrainState, dict[str, float]]:
    """Train to `steps`, going on from the newest checkpoint under `folder`.

    Args:
        name: of the log files and the progress bar.
        state: a fresh state; replaced by the newest checkpoint's where there is one.
        step_fn: one update, see `lfm_jax.state.make_step`.
        batches: ``batches(start)`` yields this process's host batches from example `start` on.
        folder: of the checkpoints.
        logs: of the scalar logs.
        mesh: batches are split over all its devices.
        steps: updates in all.
        batch_size: examples an update over all devices.
        record: what the data stream depends on (seed, cache fingerprint); saved as the ``data``
            item and compared on resume.
        config: saved as the ``config`` item.
        train_flops: FLOPs of one example's forward and backward pass, for MFU; 0: unknown.
        preview: called with the state every `preview_every` steps.

    Returns:
        The final state and its figures: "loss" (mean of the last log window), "steps",
        "images_per_second" (median over windows, the first, which compiles, left out), "mfu",
        "data_wait" (share of the time spent waiting for batches).

    Raises:
        UserError: the checkpoint belongs to another data stream.
        FloatingPointError: loss or gradient is not finite; nothing after the last save is kept.
        Preempted: the process was asked to end and the state is saved.
    """
    main = sharding.is_main_process()
    with (
        checkpoints.open_manager(folder, save_every=save_every, keep=keep) as manager,
        preemption.asks_first() as terminated,
    ):
        start = manager.latest_step() or 0
        if manager.latest_step() is not None:
            saved = checkpoints.read_json(manager, checkpoints.DATA)
            # Step 0 is a network of another project's: it has drawn nothing from any stream.
            if start and saved["record"] != record:
                raise UserError(
                    f"checkpoint {manager.directory / str(start)} was trained on another data "
                    f"stream: {saved['record']}, expected {record}"
                )
            state = checkpoints.restore(manager, state)
            logging.info("%s: going on from step %d", name, start)

        def save(step: int, *, force: bool = False) -> None:
            data = {"record": record, "examples_drawn": step * batch_size}
            checkpoints.save(manager, step, state, data=data, config=config, force=force)

        writer = ScalarWriter(logs, name, start=start) if main else None
        host_batches = batches(start * batch_size)
        device_batches = prefetch(host_batches, sharding.batch_sharding(mesh))
        pending: list[tuple[int, Metrics]] = []
        history: list[dict[str, float]] = []
        waited, since = 0.0, time.perf_counter()

        with (
            closing(device_batches),
            tqdm(total=steps, initial=start, desc=name, unit="step", disable=not main) as bar,
        ):
            for step in range(start + 1, steps + 1):
                before = time.perf_counter()
                batch = next(device_batches)
                waited += time.perf_counter() - before
                state, metrics = step_fn(state, batch)
                pending.append((step, metrics))

                logs_now = step % log_every == 0 or step == steps
                stops = terminated() or manager.reached_preemption(step)
                saves = step % save_every == 0 or step == steps or stops
                if logs_now or saves:
                    values = _fetch(pending, name)
                if logs_now:
                    elapsed = time.perf_counter() - since
                    rate = len(pending) * batch_size / elapsed
                    values |= {
                        "images_per_second": rate,
                        "steps_per_second": len(pending) / elapsed,
                        "data_wait": waited / elapsed,
                    }
                    if train_flops:
                        values["mfu"] = rate * train_flops / peak_flops()
                    history.append(values)
                    if writer:
                        writer.write(step, values)
                        bar.set_postfix(loss=f"{values['loss']:.4f}", img_s=f"{rate:.0f}")
                        bar.update(step - bar.n)
                if saves:
                    save(step, force=step == steps or stops)
                if stops:
                    manager.wait_until_finished()
                    raise Preempted(f"{name}: saved step {step}; run the same command to go on")
                if preview and preview_every and step % preview_every == 0:
                    preview(state, step)
                if logs_now:
                    pending, waited, since = [], 0.0, time.perf_counter()
        if writer:
            writer.close()
    return state, _summary(history, steps)


def _fetch(pending: list[tuple[int, Metrics]], name: str) -> dict[str, float]:
    """Means over the steps since the last log; raises on the first step that is not finite."""
    values = jax.device_get([metrics for _, metrics in pending])
    for (step, _), metrics in zip(pending, values, strict=True):
        if not metrics["finite"]:
            raise FloatingPointError(
                f"{name}: loss {metrics['loss']:g}, gradient norm {metrics['grad_norm']:g} "
                f"at step {step}; the newest checkpoint before it is untouched"
            )
    return {k: float(np.mean([m[k] for m in values])) for k in values[0] if k != "finite"}


def _summary(history: list[dict[str, float]], steps: int) -> dict[str, float]:
    if not history:
        return {"steps": steps}
    summary = {"steps": steps, "loss": history[-1]["loss"]}
    timed = history[1:] or history
    for key in ("images_per_second", "steps_per_second", "mfu", "data_wait"):
        if key in history[-1]:
            summary[key] = float(np.median([h[key] for h in timed]))
    return summary
