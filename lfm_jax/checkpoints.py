"""Checkpoints: the only importer of orbax.

A step folder holds three items: ``state`` (arrays, sharded as they were), ``data`` (JSON: where the
data stream stands) and ``config`` (JSON). Saves are asynchronous and become visible when whole.

The ``data`` item carries a sum of every array (`lfm_jax.checksums`), taken on the devices before a
save and compared after a restore, on whatever devices that is. The newest checkpoint that passes is
used; newer ones are set aside, never deleted.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from lfm_jax import sharding
from lfm_jax.checksums import host_sums, is_sealed, named, seal, sums
from lfm_jax.errors import Failed, UserError

STATE, DATA, CONFIG = "state", "data", "config"
_SUMS, _SEAL = "sums", "sha256"


class Damaged(UserError):
    """A checkpoint that is not what was saved."""


@contextmanager
def open_manager(
    folder: epath.PathLike,
    *,
    save_every: int = 1,
    keep: int = 2,
    keep_every: int = 0,
    keep_best: int = 0,
    metric: str = "loss",
) -> Iterator[ocp.CheckpointManager]:
    """A manager of the step folders under `folder`; pending saves are finished on leaving.

    Args:
        folder: created on the first save.
        save_every: `save` keeps every such step; forced saves always.
        keep: newest steps kept.
        keep_every: steps that it divides are kept for ever; 0: none.
        keep_best: steps of smallest `metric` kept; 0: none.

    Raises:
        Failed: a save that was still under way did not succeed.
    """
    policy = ocp.checkpoint_managers
    kept: list[Any] = [policy.LatestN(keep)]
    if keep_every:
        kept.append(policy.EveryNSteps(keep_every))
    if keep_best:
        by_metric = {"get_metric_fn": lambda metrics: metrics[metric], "reverse": True}
        # A step without the metric is none of the best; by age it may still stay.
        kept.append(policy.BestN(n=keep_best, keep_checkpoints_without_metrics=False, **by_metric))
    options = ocp.CheckpointManagerOptions(
        save_decision_policy=policy.AnySavePolicy(
            [
                policy.FixedIntervalPolicy(save_every),
                policy.PreemptionCheckpointingPolicy(),
            ]
        ),
        preservation_policy=policy.AnyPreservationPolicy(kept),
        # orbax writes a step's metrics only for this older option; the policy above decides.
        best_fn=(lambda metrics: metrics[metric]) if keep_best else None,
        cleanup_tmp_directories=True,
    )
    handlers = _handlers(ocp.StandardCheckpointHandler())
    manager = ocp.CheckpointManager(
        epath.Path(folder).absolute(), options=options, item_handlers=handlers
    )
    try:
        yield manager
        with _saving(manager):
            manager.wait_until_finished()
            manager.check_for_errors()
    except BaseException:
        try:
            manager.close()
        except Exception as error:  # what ended the run is the news, not what followed from it
            logging.warning("%s: %s", manager.directory, _reason(error))
        raise
    manager.close()


def _handlers(state: ocp.CheckpointHandler) -> dict[str, ocp.CheckpointHandler]:
    return {STATE: state, DATA: ocp.JsonCheckpointHandler(), CONFIG: ocp.JsonCheckpointHandler()}


# ---- saving


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: Any,
    *,
    data: dict,
    config: dict,
    force: bool = False,
    metrics: dict[str, float] | None = None,
) -> bool:
    """Start an asynchronous save if the policy (or `force`) wants this step.

    Raises:
        Failed: this save cannot begin, or an earlier one did not succeed (a full disk).
    """
    check(manager)
    if step in manager.all_steps() or not (force or manager.should_save(step)):
        return False
    items = ocp.args.Composite(
        **{
            STATE: ocp.args.StandardSave(state),
            DATA: ocp.args.JsonSave(seal({**data, _SUMS: sums(state)}, _SEAL)),
            CONFIG: ocp.args.JsonSave(config),
        }
    )
    with _saving(manager):
        return manager.save(step, args=items, force=True, metrics=metrics)


def check(manager: ocp.CheckpointManager) -> None:
    """Raise `Failed` if an asynchronous save has failed; costs nothing."""
    with _saving(manager):
        manager.check_for_errors()


@contextmanager
def _saving(manager: ocp.CheckpointManager) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # orbax passes on whatever the storage below it raised
        whole = latest_step(manager.directory)
        newest = "there is none" if whole is None else f"the newest whole one is step {whole}"
        raise Failed(
            f"checkpoints {manager.directory}: a save failed ({_reason(error)}); {newest}"
        ) from error


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays, which is about what a checkpoint of them takes on disk."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# ---- restoring


def newest_whole(manager: ocp.CheckpointManager, target: Any) -> tuple[int, Any, dict] | None:
    """Step, state and data of the newest checkpoint that is as it was saved; None without any.

    Newer ones that are damaged are named in a warning and renamed to ``damaged-<step>``.

    Raises:
        UserError: checkpoints, but none whole; a checkpoint of another network.
    """
    damaged: list[tuple[int, str]] = []
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            data = read_data(manager, step)
            state = restore(manager, target, step, data=data)
        except Damaged as error:
            logging.warning("%s", error)
            damaged.append((step, str(error)))
            continue
        _set_aside(manager, [step for step, _ in damaged])
        return step, state, data
    if damaged:
        raise UserError(
            f"{manager.directory}: none of {len(damaged)} checkpoints is whole; the newest: "
            f"{damaged[0][1]}; expected one: put a copy back, or remove the folder to start anew"
        )
    return None


def _set_aside(manager: ocp.CheckpointManager, steps: list[int]) -> None:
    if not steps:
        return
    if jax.process_index() == 0:
        for step in steps:
            place = manager.directory / f"damaged-{step}"
            if place.exists():
                place.rmtree()
            (manager.directory / str(step)).rename(place)
            logging.warning("%s: kept as %s", manager.directory / str(step), place.name)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("damaged checkpoints")
    manager.reload()


def restore(
    manager: ocp.CheckpointManager,
    target: Any,
    step: int | None = None,
    *,
    data: dict | None = None,
) -> Any:
    """The state of a step (default: the newest) in the shardings and dtypes of `target`.

    Args:
        data: the step's ``data`` item if it has been read.

    Raises:
        UserError: no checkpoint, or one of another network.
        Damaged: it cannot be read, or its arrays are not those that were saved.
    """
    step = manager.latest_step() if step is None else step
    if step is None:
        raise UserError(f"{manager.directory}: expected a checkpoint, there is none")
    where = manager.directory / str(step)
    wanted = (read_data(manager, step) if data is None else data).get(_SUMS)
    if wanted is not None:
        _check_fits(where, wanted, target)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target
    )
    try:
        items = manager.restore(
            step, args=ocp.args.Composite(**{STATE: ocp.args.StandardRestore(abstract)})
        )
    # orbax and the storage under it raise nearly anything on what they cannot read.
    except Exception as error:
        if wanted is None and isinstance(error, ValueError | KeyError):
            raise UserError(
                f"checkpoint {where} does not fit this config's network: {_reason(error)}"
            ) from error
        raise Damaged(f"checkpoint {where} is damaged: {_reason(error)}") from error
    if wanted is not None:
        _compare(where, wanted, sums(items[STATE]))
    return items[STATE]


def read_data(manager: ocp.CheckpointManager, step: int) -> dict:
    """The ``data`` item of a step.

    Raises:
        Damaged: it cannot be read or is not what was saved.
    """
    where = manager.directory / str(step)
    try:
        data = read_json(manager, DATA, step)
        whole = is_sealed(data, _SEAL)
    except Exception as error:
        raise Damaged(f"checkpoint {where} is damaged: {DATA}: {_reason(error)}") from error
    if not whole:
        raise Damaged(f"checkpoint {where} is damaged: {DATA}: checksum differs")
    return data


def read_json(manager: ocp.CheckpointManager, item: str, step: int | None = None) -> dict:
    """The ``data`` or ``config`` item of a step (default: the newest)."""
    step = manager.latest_step() if step is None else step
    return manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()}))[item]


def load_params(folder: epath.PathLike, *, ema: bool = True, step: int | None = None) -> Any:
    """Parameters of a checkpoint as host numpy, for any number of devices and without a target.

    Args:
        folder: a ``checkpoints`` folder.
        ema: the averaged parameters (the raw ones where no average was kept).
        step: default the newest. An older one is never taken in its place: what is made of them
            would bear the wrong name.

    Raises:
        UserError: the folder holds no checkpoint, not this one, or it is damaged.
    """
    known = steps(folder)
    if not known:
        raise UserError(f"{folder}: expected a folder with a saved checkpoint, found none")
    step = known[-1] if step is None else step
    if step not in known:
        raise UserError(f"{folder}: no step {step}; expected one of {', '.join(map(str, known))}")
    path = epath.Path(folder).absolute()
    try:
        return _read_params(path, step, ema)
    except Damaged as error:
        raise Damaged(
            f"{error}; run the job that wrote it again: it goes on from the newest whole one"
        ) from error


def _read_params(folder: epath.Path, step: int, ema: bool) -> Any:
    handlers = _handlers(ocp.PyTreeCheckpointHandler())
    options = ocp.CheckpointManagerOptions(create=False)
    with ocp.CheckpointManager(folder, options=options, item_handlers=handlers) as manager:
        wanted = read_data(manager, step).get(_SUMS, {})
        where = folder / str(step)
        try:
            tree = manager.item_metadata(step)[STATE].tree
            name = "ema" if ema and tree.get("ema") is not None else "params"
            # Only the wanted part is read: the optimizer's state is twice as large.
            item = {name: jax.tree.map(lambda leaf: 0, tree[name])}
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            args = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
            part = manager.restore(step, args=ocp.args.Composite(**{STATE: args}))[STATE]
        except Exception as error:
            raise Damaged(
                f"checkpoint {folder / str(step)} is damaged: {_reason(error)}"
            ) from error
    wanted = {leaf: value for leaf, value in wanted.items() if leaf.split("/")[0] == name}
    if wanted:
        _compare(where, wanted, host_sums(part))
    return part[name]


def steps(folder: epath.PathLike) -> list[int]:
    """The finished steps under `folder`, rising."""
    path = epath.Path(folder).absolute()
    return sorted(ocp.utils.checkpoint_steps(path)) if path.exists() else []


def latest_step(folder: epath.PathLike) -> int | None:
    """The newest finished step under `folder`, or None."""
    return max(steps(folder), default=None)


# ---- releases


def save_release(folder: epath.PathLike, params: Any, config: dict) -> None:
    """Write host arrays as step 0 with items ``params`` and ``config``, replacing an older one.

    Host arrays carry no sharding, so that every orbax reader restores them without a target on any
    number of devices. The older release goes only when the new one is whole.
    """
    handlers = {"params": ocp.StandardCheckpointHandler(), "config": ocp.JsonCheckpointHandler()}
    path = epath.Path(folder).absolute()
    fresh, old = path / ".fresh", path / ".old"
    if old.exists() and not (path / "0").exists():  # killed between the two renames below
        old.rename(path / "0")
    for leftover in (fresh, old):
        if leftover.exists():
            leftover.rmtree()
    with ocp.CheckpointManager(fresh, item_handlers=handlers) as manager, _saving(manager):
        items = {"params": ocp.args.StandardSave(params), "config": ocp.args.JsonSave(config)}
        manager.save(0, args=ocp.args.Composite(**items))
        manager.wait_until_finished()
        manager.check_for_errors()
    if (path / "0").exists():
        (path / "0").rename(old)
    (fresh / "0").rename(path / "0")
    for leftover in (fresh, old):
        if leftover.exists():
            leftover.rmtree()


def load_release(folder: epath.PathLike) -> Any:
    """Parameters of a release as host numpy."""
    path = epath.Path(folder).absolute() / "0" / "params"
    with ocp.StandardCheckpointer() as checkpointer:
        return jax.tree.map(np.asarray, checkpointer.restore(path))


def fingerprint(tree: Any) -> str:
    """sha256 over the names, shapes, dtypes and bytes of a tree of arrays, on host or devices.

    Those on devices, gathered over processes, come to the host one at a time.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(sharding.fetch(leaf) if isinstance(leaf, jax.Array) else leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


# ---- comparing


def _check_fits(where: epath.Path, saved: dict[str, list], target: Any) -> None:
    wanted = {k: [list(x.shape), str(x.dtype)] for k, x in named(target).items()}
    for name in (*wanted, *saved):
        found = saved[name][:2] if name in saved else "nothing"
        expected = wanted.get(name, "nothing")
        if found != expected:
            raise UserError(
                f"checkpoint {where} does not fit this config's network: {name} is {found}, "
                f"expected {expected}"
            )


def _compare(where: epath.Path, saved: dict[str, list], found: dict[str, list]) -> None:
    for name, value in saved.items():
        if found.get(name) != value:
            raise Damaged(f"checkpoint {where} is damaged: array {name} is not what was saved")


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
