"""Fill the config's network with another project's weights: the workdir is then like any other.

What the file does not tell is taken from the config, what the config leaves open from the file
(`lfm_jax.jobs.origin`), and both must agree tensor by tensor. What comes out can be sampled,
evaluated, trained on, finetuned and exported with the same config.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from tqdm import tqdm

from lfm_jax import checkpoints, sharding
from lfm_jax.config import to_json
from lfm_jax.errors import UserError
from lfm_jax.jobs import build, origin
from lfm_jax.models import count_params
from lfm_jax.state import create_state
from lfm_jax.weights import Imported, import_torch
from lfm_jax.workdir import Workdir


def inputs(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    return build.section(config, "convert", "model")


def run(config: ConfigDict, workdir: Workdir) -> dict[str, Any]:
    section = config.convert
    if section.file is None:
        raise UserError("--config.convert.file is unset: expected a path or URL of weights")
    if checkpoints.latest_step(workdir.checkpoints) is not None:
        raise UserError(
            f"{workdir.checkpoints} holds checkpoints already; expected an empty --workdir"
        )
    imported = import_torch(
        section.family,
        section.file,
        weights=section.weights,
        sha256=section.sha256 or "",
        name=config.model.name,
        **origin.network_fields(config),
    )
    if sharding.is_main_process():
        tqdm.write(f"{section.file}: sha256 {imported.sha256}", file=sys.stderr)
    fields = dict(imported.overrides)
    _check(config, imported, classes := fields.pop("num_classes", 0))
    told = {"family": section.family, "sha256": imported.sha256, "weights": imported.weights}
    origin.keep(workdir, imported.name, fields, classes, told, null_label=imported.null_label)

    mesh = build.mesh(config)
    shapes = jax.tree.map(lambda p: p.shape, imported.params)
    # Placed afterwards: as constants of a program gigabytes would be compiled.
    state = create_state(
        lambda: jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple)),
        build.optimizer(config.train),
        mesh,
        ema=config.train.ema_decay > 0,
    )
    state = origin.started_from(state, imported.params)
    with checkpoints.open_manager(workdir.checkpoints) as manager:
        data = {"record": {"converted": told}, "examples_drawn": 0}
        checkpoints.save(manager, 0, state, data=data, config=to_json(config), force=True)
    origin.adopt(config, workdir)
    return {
        **told,
        "network": {"name": imported.name, **fields, "num_classes": classes},
        "t_max": imported.t_max,
        "parameters": count_params(imported.params),
        "checkpoint": checkpoints.fingerprint(imported.params),
    }


def _check(config: ConfigDict, imported: Imported, classes: int) -> None:
    """What the parameters' shapes do not settle."""
    where, data = config.convert.file, config.data
    if classes != data.num_classes:
        raise UserError(
            f"--config.data.num_classes={data.num_classes}: the network in {where} has {classes}"
        )
    channels = imported.latent_shape[2]
    wanted = {"identity": data.channels, "train": config.autoencoder.latent_channels}
    if wanted.get(config.autoencoder.kind, channels) != channels:
        raise UserError(
            f"{where}: a network for {channels} channels; with --config.autoencoder.kind="
            f"{config.autoencoder.kind} it would see {wanted[config.autoencoder.kind]}"
        )
