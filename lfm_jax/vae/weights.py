"""Published weights in, ours out: `load_vae` and `save_vae`.

    model, params = load_vae("stabilityai/sd-vae-ft-mse")
    posterior = model.apply({"params": params}, images, method="encode")

Accepted are diffusers folders and repositories (safetensors, Flax msgpack, ``.bin``) and bare files
in any dialect of `lfm_jax.vae.keys`. The latent scale and shift come with the model, from
``config.json`` or from the family (`lfm_jax.vae.families`).
"""

import json
import os
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lfm_jax.errors import UserError, blaming
from lfm_jax.vae import files, keys
from lfm_jax.vae.families import (
    family_scale,
    model_from_config,
    model_from_tensors,
    model_to_config,
)


def load_vae(
    source: str | Path,
    *,
    family: str = "",
    revision: str = "",
    subfolder: str = "",
    sha256: str = "",
    cache_dir: str | Path = "",
    norm_groups: int = 32,
    dtype: Any = jnp.float32,
    precision: str | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """An autoencoder with its weights, from a file, a folder or a hub repository.

    Args:
        source: path, or hub repository ``owner/name`` (fetched once, then read from the cache, with
            or without a network).
        family: one of `families.SCALES`; needed only for a bare file whose scale is not plain.
            Where a ``config.json`` is found, it must agree with it.
        revision: of the hub repository; well-known repositories are pinned.
        subfolder: inside the folder or repository; "vae" is found by itself.
        sha256: the file's expected checksum (hex); not checked if empty.
        cache_dir: of the hub's files.
        norm_groups: of a bare file; shapes do not show it.
        dtype: of the activations.
        precision: of matmuls and convolutions.

    Returns:
        The module and its parameters: float32 numpy arrays in the layout of `AutoencoderKL`.

    Raises:
        UserError: nothing found, another checksum, a damaged file, or tensors that do not fit; the
            file and the tensor are named.
    """
    if family:
        family_scale(family)
    path, config_path = files.locate(
        source, revision=revision, subfolder=subfolder, cache_dir=cache_dir
    )
    if sha256:
        files.check_sha256(path, sha256)
    tensors, is_flax = files.read_tensors(path)
    with blaming(str(path), "an autoencoder's weights and config"):
        if not is_flax and keys.is_half(tensors):
            both = files.halves(path)
            tensors, config_path = keys.from_halves(*(files.read_tensors(p)[0] for p in both)), None
        else:
            tensors = keys.from_flax(tensors) if is_flax else keys.canonical(tensors)
        if config_path is not None:
            model = model_from_config(read_config(config_path), source=str(config_path))
            if family and (model.scaling_factor, model.shift_factor) != family_scale(family):
                raise UserError(
                    f"family: {family!r} has scale and shift {family_scale(family)}, but "
                    f"{config_path} says {(model.scaling_factor, model.shift_factor)}; leave the "
                    "family out"
                )
        else:
            model = model_from_tensors(
                tensors, family=family, norm_groups=norm_groups, source=str(path)
            )
        model = model.clone(dtype=dtype, precision=precision)
        return model, keys.to_tree(tensors, parameter_shapes(model), source=str(path))


def read_config(path: Path) -> dict[str, Any]:
    """A ``config.json`` as a dict.

    Raises:
        UserError: it is not JSON, or not a dict.
    """
    try:
        config = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def parameter_shapes(model: nn.Module) -> dict[str, Any]:
    """The parameters' shapes and dtypes, without computing anything."""
    side = 2 * model.factor
    images = jax.ShapeDtypeStruct((1, side, side, model.in_channels), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def save_vae(folder: str | Path, model: nn.Module, params: Any, *, dtype: Any = np.float32) -> Path:
    """Write ``config.json`` and ``diffusion_pytorch_model.safetensors``, which diffusers opens.

    Args:
        folder: made if it is not there; files of these names are replaced, each at once.
        model: an `AutoencoderKL` or `AutoencoderTiny`; its scale and shift go into the config.
        params: its parameters.
        dtype: of the file, e.g. ``np.float16``.

    Returns:
        The folder.

    Raises:
        UserError: the parameters do not fit the model.
    """
    from safetensors.numpy import save

    folder = Path(folder)
    tensors = keys.from_tree(params)
    keys.to_tree(tensors, parameter_shapes(model), source="params")
    arrays = {k: np.ascontiguousarray(v, dtype) for k, v in tensors.items()}
    content = {
        "diffusion_pytorch_model.safetensors": save(arrays, metadata={"format": "pt"}),
        "config.json": (json.dumps(model_to_config(model), indent=2) + "\n").encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        temporary = folder / f".{name}.{os.getpid()}.tmp"
        temporary.write_bytes(data)
        temporary.replace(folder / name)
    return folder
