"""Fill the config's network with another project's weights: the workdir is then like any other.

The file is checked tensor by tensor against the network that the config describes, so what comes
out can be sampled, evaluated, trained on, finetuned and exported with the same config.
"""

from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from lfm_jax import checkpoints, sharding
from lfm_jax.config import to_json
from lfm_jax.errors import UserError
from lfm_jax.jobs import build
from lfm_jax.state import create_state
from lfm_jax.weights import import_torch
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
        section.family, section.file, weights=section.weights, model=build.network(config)
    )
    logging.info("%s: sha256 %s", section.file, imported.sha256)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    params = jax.tree.map(jax.numpy.asarray, imported.params)
    state = create_state(
        lambda: params, build.optimizer(config.train), mesh, ema=config.train.ema_decay > 0
    )
    origin = {"family": section.family, "sha256": imported.sha256, "weights": imported.weights}
    with checkpoints.open_manager(workdir.checkpoints) as manager:
        data = {"record": {"converted": origin}, "examples_drawn": 0}
        checkpoints.save(manager, 0, state, data=data, config=to_json(config), force=True)
    return {
        **origin,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(imported.params)),
        "checkpoint": checkpoints.fingerprint(imported.params),
    }
