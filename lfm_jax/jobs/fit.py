"""The training loop that every objective shares, from restore to the last save.

Nothing in the loop waits for the device between two logs: metrics stay there as arrays and are
fetched together every `log_every` steps (and before a save, so that no NaN is ever saved). What the
log still owes of the steps before a save is saved too, so that a resumed run logs the same curve.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from lfm_jax import checkpoints, preemption, sharding
from lfm_jax.data import prefetch
from lfm_jax.errors import Failed, Preempted, UserError
from lfm_jax.jobs.loss_curve import Curve
from lfm_jax.profiling import StepTimes, Trace, peak_flops
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
    keep_every: int = 0,
    keep_best: int = 0,
    skip_nonfinite: bool = False,
    train_flops: float = 0.0,
    preview: Callable[[TrainState, int], None] | None = None,
    preview_every: int = 0,
    watch: Callable[[TrainState, int], None] | None = None,
    watch_every: int = 0,
    profile_steps: Sequence[int] = (),
) -> tuple[TrainState, dict[str, Any]]:
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
        keep, keep_every, keep_best: which checkpoints stay, see `checkpoints.open_manager`; the
            best are those of smallest logged "loss".
        skip_nonfinite: count the updates that `make_step` left out instead of stopping there.
        train_flops: FLOPs of one example's forward and backward pass, for MFU; 0: unknown.
        preview: called with the state every `preview_every` steps.
        watch: the same every `watch_every` steps and at the last one.
        profile_steps: first and last step of a profile, written to ``<logs>/profile``; empty: none.

    Returns:
        The final state and its figures: "loss" (mean of the last log window), "steps",
        "images_per_second" (median over windows, the first, which compiles, left out), "mfu",
        "data_wait" (share of the time spent waiting for batches), "step_ms_p50" and "step_ms_p95"
        (time between the ends of two steps on the device), "skipped" (updates left out),
        "checkpoint_bytes" and "checkpoints_bytes_at_most" (all that are kept, and one being
        written).

    Raises:
        UserError: the checkpoint belongs to another data stream, or is beyond `steps`.
        FloatingPointError: loss or gradient is not finite; nothing after the last save is kept.
        Failed: a checkpoint could not be written, or there is no room for one.
        Preempted: the process was asked to end and the state is saved.
    """
    main = sharding.is_main_process()
    retention: dict[str, Any] = {"keep": keep, "keep_every": keep_every, "keep_best": keep_best}
    disk = _disk_use(folder, checkpoints.tree_bytes(state), steps, **retention)
    with (
        checkpoints.open_manager(folder, save_every=save_every, **retention) as manager,
        preemption.asks_first() as terminated,
    ):
        start, saved = 0, {}
        found = checkpoints.newest_whole(manager, state)
        if found is not None:
            start, state, saved = found
            # Step 0 is a network of another project's: it has drawn nothing from any stream.
            if start and saved["record"] != record:
                raise UserError(
                    f"checkpoint {manager.directory / str(start)} was trained on another data "
                    f"stream: {saved['record']}, expected {record}"
                )
            if start > steps:
                raise UserError(
                    f"{name}: {manager.directory} holds step {start}, beyond the {steps} steps "
                    f"asked for; expected at least {start}, or another --workdir"
                )
            logging.info("%s: going on from step %d", name, start)
        curve = Curve(name, logs, manager, saved, skips=skip_nonfinite)

        def save(step: int, *, force: bool = False) -> None:
            data = {"record": record, "examples_drawn": step * batch_size, **curve.to_json()}
            metrics = {"loss": curve.loss} if curve.loss is not None else None
            checkpoints.save(
                manager, step, state, data=data, config=config, force=force, metrics=metrics
            )

        writer = ScalarWriter(logs, name, start=start) if main else None
        host_batches = batches(start * batch_size)
        device_batches = prefetch(host_batches, sharding.batch_sharding(mesh))
        history: list[dict[str, float]] = []
        timed, waited, since = 0, 0.0, time.perf_counter()
        trace, times = Trace(logs / "profile", profile_steps), StepTimes()

        with (
            closing(device_batches),
            closing(trace),
            closing(times),
            tqdm(total=steps, initial=start, desc=name, unit="step", disable=not main) as bar,
        ):
            for step in range(start + 1, steps + 1):
                trace.before(step)
                before = time.perf_counter()
                batch = next(device_batches)
                waited += time.perf_counter() - before
                state, metrics = step_fn(state, batch)
                curve.add(step, metrics, batch)
                times.add(metrics["loss"])
                trace.after(step, metrics)
                timed += 1

                checkpoints.check(manager)
                logs_now = step % log_every == 0 or step == steps
                stops = terminated() or manager.reached_preemption(step)
                saves = step % save_every == 0 or step == steps or stops
                if logs_now or saves:
                    curve.fetch()
                if logs_now:
                    values = curve.close_window()
                    elapsed = time.perf_counter() - since
                    rate = timed * batch_size / elapsed
                    values |= {
                        "images_per_second": rate,
                        "steps_per_second": timed / elapsed,
                        "data_wait": waited / elapsed,
                        **times.window(),
                    }
                    if train_flops:
                        values["mfu"] = rate * train_flops / peak_flops()
                    history.append(values)
                    if writer:
                        writer.write(step, values)
                        bar.set_postfix(loss=f"{values['loss']:.4f}", img_s=f"{rate:.0f}")
                        bar.update(step - bar.n)
                # Before the save: a run that is killed between the two watches again, not never.
                if watch and watch_every and (step % watch_every == 0 or step == steps):
                    watch(state, step)
                if saves:
                    save(step, force=step == steps or stops)
                if stops:
                    manager.wait_until_finished()
                    checkpoints.check(manager)
                    raise Preempted(f"{name}: saved step {step}; run the same command to go on")
                if preview and preview_every and step % preview_every == 0:
                    preview(state, step)
                if logs_now:
                    timed, waited, since = 0, 0.0, time.perf_counter()
                    times.pause()
        if writer:
            writer.close()
    return state, {"steps": steps, "loss": curve.loss, **_speed(history), **curve.counts(), **disk}


def _disk_use(
    folder: epath.Path, size: int, steps: int, *, keep: int, keep_every: int, keep_best: int
) -> dict[str, int]:
    """What checkpoints take and will take at most; raises `Failed` where not one has room."""
    count = keep + keep_best + (steps // keep_every if keep_every else 0) + 1
    use = {"checkpoint_bytes": size, "checkpoints_bytes_at_most": size * count}
    if "://" in os.fspath(folder):
        return use
    there = next(place for place in (Path(folder), *Path(folder).parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        raise Failed(
            f"{folder}: {free:,} bytes are free, a checkpoint takes {size:,}; expected room for it"
        )
    if free < size * count:
        logging.warning(
            "%s: %s bytes are free; %d checkpoints of %s bytes may come to be there",
            *(folder, f"{free:,}", count, f"{size:,}"),
        )
    return use


def _speed(history: list[dict[str, float]]) -> dict[str, float]:
    """Medians over the windows; the first one compiles and is left out where there are more."""
    timed = history[1:] or history
    keys = ("images_per_second", "steps_per_second", "mfu", "data_wait")
    keys = (*keys, "step_ms_p50", "step_ms_p95")
    return {
        key: float(np.median([h[key] for h in timed if key in h]))
        for key in keys
        if any(key in h for h in timed)
    }
