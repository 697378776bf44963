"""Checkpoints: the only importer of orbax.

A step folder holds three items: ``state`` (arrays, sharded as they were), ``data`` (JSON: where the
data stream stands) and ``config`` (JSON). Saves are asynchronous and become visible when whole.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from lfm_jax.errors import UserError

STATE, DATA, CONFIG = "state", "data", "config"


@contextmanager
def open_manager(
    folder: epath.PathLike, *, save_every: int = 1, keep: int = 2
) -> Iterator[ocp.CheckpointManager]:
    """A manager of the step folders under `folder`; pending saves are finished on leaving.

    Args:
        folder: created on the first save.
        save_every: `save` keeps every such step; forced saves always.
        keep: newest steps kept.
    """
    policy = ocp.checkpoint_managers
    options = ocp.CheckpointManagerOptions(
        save_decision_policy=policy.AnySavePolicy(
            [
                policy.FixedIntervalPolicy(save_every),
                policy.PreemptionCheckpointingPolicy(),
            ]
        ),
        preservation_policy=policy.LatestN(keep),
        cleanup_tmp_directories=True,
    )
    handlers = _handlers(ocp.StandardCheckpointHandler())
    manager = ocp.CheckpointManager(
        epath.Path(folder).absolute(), options=options, item_handlers=handlers
    )
    try:
        yield manager
        manager.wait_until_finished()
        manager.check_for_errors()
    finally:
        manager.close()


def _handlers(state: ocp.CheckpointHandler) -> dict[str, ocp.CheckpointHandler]:
    return {STATE: state, DATA: ocp.JsonCheckpointHandler(), CONFIG: ocp.JsonCheckpointHandler()}


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: Any,
    *,
    data: dict,
    config: dict,
    force: bool = False,
) -> bool:
    """Start an asynchronous save if the policy (or `force`) wants this step; errors of an earlier
    save surface here."""
    manager.check_for_errors()
    if step in manager.all_steps():
        return False
    items = ocp.args.Composite(
        **{
            STATE: ocp.args.StandardSave(state),
            DATA: ocp.args.JsonSave(data),
            CONFIG: ocp.args.JsonSave(config),
        }
    )
    return manager.save(step, args=items, force=force)


def restore(manager: ocp.CheckpointManager, target: Any, step: int | None = None) -> Any:
    """The state of a step (default: the newest) in the shardings and dtypes of `target`."""
    step = manager.latest_step() if step is None else step
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target
    )
    try:
        items = manager.restore(
            step, args=ocp.args.Composite(**{STATE: ocp.args.StandardRestore(abstract)})
        )
    except (ValueError, KeyError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"checkpoint {manager.directory / str(step)} does not fit this config's network: "
            f"{lines[0][:300]}"
        ) from error
    return items[STATE]


def read_json(manager: ocp.CheckpointManager, item: str, step: int | None = None) -> dict:
    """The ``data`` or ``config`` item of a step (default: the newest)."""
    step = manager.latest_step() if step is None else step
    return manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()}))[item]


def load_params(folder: epath.PathLike, *, ema: bool = True, step: int | None = None) -> Any:
    """Parameters of a checkpoint as host numpy, for any number of devices and without a target.

    Args:
        folder: a ``checkpoints`` folder.
        ema: the averaged parameters (the raw ones where no average was kept).
        step: default the newest.

    Raises:
        UserError: the folder holds no checkpoint.
    """
    step = latest_step(folder) if step is None else step
    if step is None:
        raise UserError(f"{folder}: expected a folder with a saved checkpoint, found none")
    handlers = _handlers(ocp.PyTreeCheckpointHandler())
    with ocp.CheckpointManager(
        epath.Path(folder).absolute(),
        options=ocp.CheckpointManagerOptions(create=False),
        item_handlers=handlers,
    ) as manager:
        tree = manager.item_metadata(step)[STATE].tree
        name = "ema" if ema and tree.get("ema") is not None else "params"
        # Only the wanted part is read: the optimizer's state is twice as large as the parameters.
        item = {name: jax.tree.map(lambda leaf: 0, tree[name])}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        args = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
        return manager.restore(step, args=ocp.args.Composite(**{STATE: args}))[STATE][name]


def latest_step(folder: epath.PathLike) -> int | None:
    """The newest whole step under `folder`, or None."""
    path = epath.Path(folder).absolute()
    if not path.exists():
        return None
    steps = [int(child.name) for child in path.iterdir() if child.name.isdigit()]
    return max(steps, default=None)


def save_release(folder: epath.PathLike, params: Any, config: dict) -> None:
    """Write host arrays as step 0 with items ``params`` and ``config``, replacing an older one.

    Host arrays carry no sharding, so that every orbax reader restores them without a target on any
    number of devices.
    """
    handlers = {"params": ocp.StandardCheckpointHandler(), "config": ocp.JsonCheckpointHandler()}
    path = epath.Path(folder).absolute()
    with ocp.CheckpointManager(path, item_handlers=handlers) as manager:
        if manager.latest_step() is not None:
            manager.delete(0)
        items = {"params": ocp.args.StandardSave(params), "config": ocp.args.JsonSave(config)}
        manager.save(0, args=ocp.args.Composite(**items))


def fingerprint(tree: Any) -> str:
    """sha256 over the names, shapes, dtypes and bytes of a tree of host arrays."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
