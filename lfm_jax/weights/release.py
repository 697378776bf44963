"""A release (``--job=export``) back in: the network, its parameters, and what they stand for."""

import dataclasses
import json
import os
from typing import Any

import flax.linen as nn
from etils import epath

from lfm_jax import checkpoints
from lfm_jax.errors import UserError
from lfm_jax.models import create_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Release:
    """What a release holds.

    Attributes:
        model: the velocity network.
        params: its parameters, host numpy; those of a few-step sampler may hold more than the
            network's (`lfm_jax.mmd.deploy`).
        latent_shape: (h, w, c) of its latents.
        scale, shift: of the latents, ``z = (sample - shift) * scale``.
        num_classes: 0 without labels.
        described: all of ``config.json``: the experiment, the step, checksums, the licence.
    """

    model: nn.Module
    params: dict[str, Any]
    latent_shape: tuple[int, int, int]
    scale: float
    shift: float
    num_classes: int
    described: dict[str, Any]


def load_release(folder: str | os.PathLike) -> Release:
    """The release in `folder`. Its autoencoder, if it has one, is `vae.load_vae(folder / "vae")`.

    Raises:
        UserError: no release there.
    """
    path = epath.Path(folder)
    if not (path / "0" / "params").exists() or not (path / "config.json").exists():
        raise UserError(
            f"release {path}: expected a folder that --job=export wrote, with config.json and "
            "0/params"
        )
    described = json.loads((path / "config.json").read_text())
    config, latents = described["config"], described["latents"]
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in config["model"].items()
        if value is not None
    }
    num_classes = config["data"]["num_classes"]
    h, w, c = latents["shape"]
    return Release(
        model=create_model(fields.pop("name"), num_classes=num_classes, **fields),
        params=checkpoints.load_release(path),
        latent_shape=(h, w, c),
        scale=latents["scale"],
        shift=latents["shift"],
        num_classes=num_classes,
        described=described,
    )
