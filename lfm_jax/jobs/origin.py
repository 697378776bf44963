"""The network behind weights that came from elsewhere: converted ones, and those of `config.init`.

A file of weights tells more than a config would: the size, the convention of time and target, how
attention is read. `convert` keeps it in ``DIR/network.json``, and `adopt`, called before every job,
puts it into the fields of `config.model` that are unset. So sampling, evaluating, training on,
finetuning and editing need no flag of their own, in the converted workdir or in a new one that
starts from it.
"""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

from lfm_jax import checkpoints, sharding
from lfm_jax.checksums import named
from lfm_jax.config import overrides
from lfm_jax.errors import UserError
from lfm_jax.models import NAMES
from lfm_jax.state import TrainState
from lfm_jax.workdir import Workdir
from lfm_jax.writers import write_json

# How a network is run, not what it is: free to differ from the weights' origin.
FREE = ("dtype", "remat", "scan_blocks", "attention", "dropout")


def network_fields(config: ConfigDict) -> dict[str, Any]:
    """What `config.model` says of the network: set fields, without name and `FREE` ones."""
    return {k: v for k, v in overrides(config.model).items() if k not in ("name", *FREE)}


def keep(
    workdir: Workdir,
    name: str,
    fields: dict[str, Any],
    num_classes: int,
    converted: dict[str, str],
    *,
    null_label: bool,
) -> None:
    """Write down the network of a workdir's weights, and what file they were."""
    told = {
        "name": name,
        "fields": fields,
        "num_classes": num_classes,
        "converted": converted,
        "null_label": null_label,
    }
    if sharding.is_main_process():
        write_json(_file(workdir.root), told)


def adopt(config: ConfigDict, workdir: Workdir) -> None:
    """Complete `config.model` by what is known of the weights that this workdir starts from.

    Raises:
        UserError: the config contradicts them, or `config.init` holds nothing to start from.
    """
    where, told = workdir.root, None
    if checkpoints.latest_step(workdir.checkpoints) is not None:
        told = _read(_file(workdir.root))
    if told is None and config.init is not None:
        where = epath.Path(config.init)
        told = _read(_file(where)) or _of_config(where)
        if sharding.is_main_process():
            write_json(_file(workdir.root), told)
    if told is None:
        return
    _check(config, told, where)
    for field, value in told["fields"].items():
        if config.model[field] is None and field not in NAMES[config.model.name][1]:
            config.model[field] = tuple(value) if isinstance(value, list) else value


def converted(workdir: Workdir) -> dict[str, str] | None:
    """Family and sha256 of the file that a workdir's weights began as, or None."""
    told = _read(_file(workdir.root))
    return told and told["converted"]


def require_null_label(root: epath.Path, needs: str, accepted: str) -> None:
    """Refuse what evaluates a network at a null label that it never met in training.

    Args:
        root: the workdir or release of the weights.
        needs: the flag and value that ask for it.
        accepted: what may stand there instead.

    Raises:
        UserError: neither the file that they began as nor a training here had one.
    """
    if not knows_null_label(root):
        raise UserError(
            f"{needs}: the weights of {root} know no null label; expected {accepted}, or training "
            "with train.label_drop > 0 first"
        )


def knows_null_label(root: epath.Path) -> bool:
    """Whether the weights of a workdir or release have met the null label, as far as it says."""
    path = root / "config.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    if "null_label" in content:  # a release
        return content["null_label"]
    config, told = content.get("config"), _read(_file(root))
    if told is not None and told.get("null_label", True):
        return True
    if config is None:
        return told is None
    converted_alone = checkpoints.latest_step(root / "checkpoints") == 0
    # Finetuning to a few steps draws no labels to drop.
    trains = config["loss"] == "flow" and config["train"]["label_drop"] > 0
    return trains and not converted_alone


def initial_params(init: str) -> Any:
    """The (averaged) parameters of a workdir or release, as host numpy.

    Raises:
        UserError: there are none.
    """
    folder = epath.Path(init)
    for release in (folder, folder / "release"):
        if (release / "0" / "params").exists():
            return checkpoints.load_release(release)
    if checkpoints.latest_step(folder / "checkpoints") is None:
        raise UserError(
            f"--config.init={init}: expected a workdir with checkpoints, or a release of one"
        )
    return checkpoints.load_params(folder / "checkpoints")


def started_from(state: TrainState, params: Any) -> TrainState:
    """A fresh state with these parameters, and their average, in its shardings."""
    placed = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), params, state.params)
    ema = None if state.ema is None else jax.tree.map(jnp.copy, placed)
    return dataclasses.replace(state, params=placed, ema=ema)


def check_fits(init: str, params: Any, wanted: Any) -> None:
    """Refuse parameters of another network than `wanted`, a tree of arrays or their shapes.

    Raises:
        UserError: naming the first parameter of `init` that is too many, missing or of another
            shape.
    """
    found, here = (
        {name: tuple(leaf.shape) for name, leaf in named(tree).items()} for tree in (params, wanted)
    )
    for name in sorted({*found, *here}):
        if found.get(name) != here.get(name):
            raise UserError(
                f"--config.init={init}: parameter {name} is {found.get(name, 'missing')} there, "
                f"this network's is {here.get(name, 'missing')}"
            )


def _check(config: ConfigDict, told: dict[str, Any], where: epath.Path) -> None:
    name, kind = config.model.name, NAMES[told["name"]][0]
    if name not in NAMES:
        return  # refused with the list of names when the network is made
    if NAMES[name][0] is not kind:
        raise UserError(
            f"--config.model.name={name}: the weights of {where} are of a {told['name']}"
        )
    explicit = {**NAMES[name][1], **network_fields(config)}
    for field, value in told["fields"].items():
        value = tuple(value) if isinstance(value, list) else value
        if field in explicit and explicit[field] != value:
            raise UserError(
                f"--config.model.{field}={explicit[field]}: the weights of {where} have {value}; "
                "leave the field unset"
            )
    if told["num_classes"] != config.data.num_classes:
        raise UserError(
            f"--config.data.num_classes={config.data.num_classes}: the weights of {where} have "
            f"{told['num_classes']}"
        )


def _file(folder: epath.Path) -> epath.Path:
    return folder / "network.json"


def _read(path: epath.Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path}: damaged, expected the JSON that a job writes; put a copy back, or remove it "
            "where the network was trained here"
        ) from error


def _of_config(folder: epath.Path) -> dict[str, Any]:
    """The network of a workdir or release that was trained here, by its config."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text())
        config = content["config"]
        model = {k: v for k, v in config["model"].items() if v is not None and k not in FREE}
        name = model.pop("name")
        fields = {**NAMES[name][1], **model}
        return {
            "name": name,
            "fields": fields,
            "num_classes": config["data"]["num_classes"],
            "converted": content.get("converted"),
            "null_label": knows_null_label(folder),
        }
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"--config.init={folder}: expected a workdir or release with a config.json"
        ) from error
