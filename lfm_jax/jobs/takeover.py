"""The autoencoder of another run, taken over instead of trained again.

A run that starts from another's weights (`config.init`) has to see the latents that they were
trained on. The checkpoint is copied, so that the workdir stays whole when it is copied or the other
one is gone.
"""

import json
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from lfm_jax import checkpoints, sharding
from lfm_jax.config import to_json
from lfm_jax.errors import UserError
from lfm_jax.workdir import Workdir
from lfm_jax.writers import copy_whole

_ARCHITECTURE = (
    "block_out_channels",
    "layers_per_block",
    "latent_channels",
    "norm_groups",
    "mid_attention",
)


def origin(config: ConfigDict) -> Workdir | None:
    """The workdir whose autoencoder is to be taken over, or None where one is to be trained."""
    if config.init is None:
        return None
    other = Workdir(epath.Path(config.init))
    return other if other.result("autoencode") is not None else None


def told(config: ConfigDict) -> dict[str, Any]:
    """What the job's result depends on for this: the other run's autoencoder, by content."""
    other = origin(config)
    if other is None:
        return {}
    return {"taken_over": other.require_result("autoencode")["provenance"]["inputs"]}


def take_autoencoder(config: ConfigDict, workdir: Workdir, other: Workdir) -> dict[str, Any]:
    """Copy the newest checkpoint of `other`'s autoencoder; the figures are those of its training.

    Raises:
        UserError: it is built otherwise than this config says, or has no checkpoint.
    """
    theirs, ours = json.loads(other.config.read_text())["config"], to_json(config)
    for section, keys in (("autoencoder", _ARCHITECTURE), ("data", ("channels", "image_size"))):
        for key in keys:
            if theirs[section][key] != ours[section][key]:
                raise UserError(
                    f"--config.init={config.init}: its {section}.{key} is {theirs[section][key]}, "
                    f"here {ours[section][key]}; expected the autoencoder of the weights"
                )
    folder = other.autoencoder / "checkpoints"
    step = checkpoints.latest_step(folder)
    if step is None:
        raise UserError(f"{folder}: expected a checkpoint of the autoencoder, found none")
    target = workdir.autoencoder / "checkpoints" / str(step)
    if sharding.is_main_process() and not target.exists():
        copy_whole(folder / str(step), target)
    result = other.require_result("autoencode")
    keys = ("steps", "loss", "parameters", "latent_shift", "latent_scale")
    return {**{key: result[key] for key in keys if key in result}, "taken_over": True}
