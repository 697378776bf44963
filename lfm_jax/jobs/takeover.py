"""The autoencoder of another run or release, taken over instead of trained again.

A run that starts from another's weights (`config.init`) has to see the latents that they were
trained on. The autoencoder is copied, so that the workdir stays whole when it is copied or the
other one is gone.
"""

import json
import os
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

from lfm_jax import checkpoints, sharding
from lfm_jax.config import to_json
from lfm_jax.errors import UserError
from lfm_jax.jobs import build
from lfm_jax.models import count_params
from lfm_jax.state import TrainState
from lfm_jax.vae import load_vae
from lfm_jax.vae.codec import encoder_fingerprint
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


def release(config: ConfigDict) -> epath.Path | None:
    """The release whose autoencoder is to be taken over, or None."""
    if config.init is None:
        return None
    folder = epath.Path(config.init)
    return folder if (folder / "vae" / "config.json").exists() else None


def told(config: ConfigDict) -> dict[str, Any]:
    """What the job's result depends on for this: the other autoencoder, by content."""
    if (other := origin(config)) is not None:
        return {"taken_over": other.require_result("autoencode")["provenance"]["inputs"]}
    if (folder := release(config)) is not None:
        described = json.loads((folder / "config.json").read_text())
        return {"taken_over": described["latents"]["encoder_sha256"]}
    return {}


def take_released(config: ConfigDict, workdir: Workdir, folder: epath.Path) -> dict[str, Any]:
    """Keep the autoencoder of a release as this workdir's own, with the scale of its latents.

    Raises:
        UserError: it is built otherwise than this config says, or its files are damaged.
    """
    described = json.loads((folder / "config.json").read_text())
    _check(config, described["config"])
    _, params = load_vae(os.fspath(folder / "vae"), norm_groups=config.autoencoder.norm_groups)
    if encoder_fingerprint(params) != described["latents"]["encoder_sha256"]:
        raise UserError(f"{folder / 'vae'}: not the encoder that {folder / 'config.json'} names")
    state = TrainState(step=jnp.int32(0), params=params, opt_state=(), ema=None)
    # Of all processes together: arrays of one alone cannot be saved where there are several.
    state = jax.device_put(state, sharding.replicated(build.mesh(config)))
    with checkpoints.open_manager(workdir.autoencoder / "checkpoints", keep=1) as manager:
        checkpoints.save(manager, 0, state, data={}, config=to_json(config), force=True)
    return {
        "steps": 0,
        "parameters": count_params(params),
        "latent_shift": described["latents"]["shift"],
        "latent_scale": described["latents"]["scale"],
        "taken_over": True,
    }


def take_autoencoder(config: ConfigDict, workdir: Workdir, other: Workdir) -> dict[str, Any]:
    """Copy the newest checkpoint of `other`'s autoencoder; the figures are those of its training.

    Raises:
        UserError: it is built otherwise than this config says, or has no checkpoint.
    """
    _check(config, json.loads(other.config.read_text())["config"])
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


def _check(config: ConfigDict, theirs: dict[str, Any]) -> None:
    ours = to_json(config)
    for section, keys in (("autoencoder", _ARCHITECTURE), ("data", ("channels", "image_size"))):
        for key in keys:
            if theirs[section][key] != ours[section][key]:
                raise UserError(
                    f"--config.init={config.init}: its {section}.{key} is {theirs[section][key]}, "
                    f"here {ours[section][key]}; expected the autoencoder of the weights"
                )
