"""Readers of weights: the files themselves, and what turns their tensors into a network."""

import functools
import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fuzz_damage import damaged, inside_zip, mutated, of, tensors_like
from benchmarks.fuzz_readers import Reader, through


def readers(folder: Path) -> Iterator[Reader]:
    # First: what comes after it starts a backend here, and these compute in their forks.
    yield from _converters(folder)
    yield from _judges(folder)
    yield from _files(folder)


def _files(folder: Path) -> Iterator[Reader]:
    import flax.serialization
    import torch
    from safetensors.numpy import save

    from lfm_jax.errors import UserError
    from lfm_jax.features.extractor import read_params, write_params
    from lfm_jax.features.weights import read_tensors as read_features
    from lfm_jax.vae.files import read_tensors as read_vae
    from lfm_jax.weights.files import read_tensors

    user = (UserError,)
    tensors = {"a.weight": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float16)}
    path = folder / "weights.safetensors"
    header = json.loads(save(tensors)[8 : 8 + int.from_bytes(save(tensors)[:8], "little")])
    body = save(tensors)[8 + int.from_bytes(save(tensors)[:8], "little") :]

    def safetensors(dice: random.Random) -> bytes:
        if dice.random() < 0.4:
            return damaged(save(tensors), dice)
        text = json.dumps(mutated(header, dice)).encode()
        return len(text).to_bytes(8, "little") + text + body

    def everyone(path: Path) -> object:
        for number, read in enumerate((read_tensors, read_features, read_vae)):
            try:
                read(path)
            except UserError:
                if number == 2:
                    raise
        return None

    read = through(path, everyone)
    yield Reader(name="safetensors", make=safetensors, read=read, allowed=user, share=1)
    write_params(folder / "extractor.safetensors", {"a": np.ones(3, np.float32)}, {"name": "x"})
    valid = (folder / "extractor.safetensors").read_bytes()
    read = through(folder / "extractor.safetensors", read_params)
    yield Reader(name="extractor", make=of(valid), read=read, allowed=user, share=1)
    state = {"model": {k: torch.from_numpy(v) for k, v in tensors.items()}, "step": 3}
    buffer, old = io.BytesIO(), io.BytesIO()
    torch.save(state, buffer)
    torch.save(state, old, _use_new_zipfile_serialization=False)
    read = through(folder / "weights.pt", everyone)
    make = inside_zip(buffer.getvalue())
    yield Reader(name="torch file", make=make, read=read, allowed=user, share=0.5)
    make = of(old.getvalue())
    yield Reader(name="torch file, old", make=make, read=read, allowed=user, share=0.5)
    packed = flax.serialization.msgpack_serialize({"a": {"kernel": np.ones((2, 3))}})
    read = through(folder / "weights.msgpack", read_vae)
    yield Reader(name="msgpack", make=of(packed), read=read, allowed=user, share=1)


# ---- tensors into networks

_UNET = {"channels": 32, "mult": (1, 2), "blocks": 1, "attention_resolutions": (4,)}
_DIT = {"hidden": 32, "depth": 1, "heads": 2, "patch": 2, "num_classes": 3}
# Family -> (network, its fields): the smallest that has every kind of layer.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm-dit": ("DiT", _DIT | {"time_scale": 1.0}),
    "dit": ("DiT", _DIT | {"convention": "vp"}),
    "sit": ("DiT", _DIT | {"time_scale": 1.0, "convention": "reversed"}),
    "diffusers-dit": ("DiT", _DIT | {"convention": "vp", "time_endpoint": True}),
    "lfm-adm": ("adm", _UNET | {"num_classes": 3, "time_scale": 1.0}),
    "lfm-unet": ("unet", _UNET | {"heads": 4, "time_scale": 1.0}),
    "guided-diffusion": ("unet", _UNET | {"head_channels": 64, "convention": "vp"}),
    "guided-diffusion-64": ("unet", _UNET | {"head_channels": 64, "convention": "vp_cosine"}),
    "ddpm": ("ddpm", _UNET | {"convention": "vp"}),
    "diffusers-ddpm": ("ddpm", _UNET | {"convention": "vp"}),
}


def _saved(tensors: dict[str, np.ndarray]) -> bytes:
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(value) for name, value in tensors.items()})


def _prepared(build: Callable[[], tuple[Callable, Callable]]) -> dict[str, Callable]:
    """`make` and `read` of a reader whose valid files take a backend: built in the fork that reads.

    A process that forks must not have its threads.
    """
    built = functools.cache(build)
    return {"make": lambda dice: built()[0](dice), "read": lambda data: built()[1](data)}


def _converters(folder: Path) -> Iterator[Reader]:
    from lfm_jax.errors import UserError

    for family in FAMILIES:
        yield Reader(
            name=f"converter {family}",
            **_prepared(functools.partial(_converter, folder, family)),
            allowed=(UserError,),
            share=0.015,
        )
    for name in ("autoencoder", "tiny autoencoder"):
        yield Reader(
            name=f"converter {name}",
            **_prepared(functools.partial(_autoencoder, folder, name)),
            allowed=(UserError,),
            share=0.02,
        )


def _converter(folder: Path, family: str) -> tuple[Callable, Callable]:
    import jax
    from safetensors.numpy import load_file

    from lfm_jax.models import create_model, init_params
    from lfm_jax.weights import import_torch, save_torch

    name, fields = FAMILIES[family]
    side, path = 8, folder / f"{family}.safetensors"
    model = create_model(name, **fields)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0), (side, side, 4)))
    params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, np.float32), shapes)
    save_torch(family, params, path, model=model, latent_size=side)
    valid = load_file(path)
    more = {"heads": fields["heads"]} if name == "DiT" else {}
    read = functools.partial(import_torch, family, **more)
    read(path)  # what is not damaged is taken
    return lambda dice: _saved(tensors_like(valid, dice)), through(path, read)


def _autoencoder(folder: Path, name: str) -> tuple[Callable, Callable]:
    import jax
    from safetensors.numpy import load_file

    from lfm_jax.vae import AutoencoderKL, load_vae, save_vae
    from lfm_jax.vae.tiny import AutoencoderTiny
    from lfm_jax.vae.weights import parameter_shapes

    model = AutoencoderKL(block_out_channels=(8, 8), norm_groups=4, latent_channels=2)
    if name.startswith("tiny"):
        widths = {"encoder_widths": (8, 8), "decoder_widths": (8, 8)}
        model = AutoencoderTiny(**widths, encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    place = folder / name
    params = jax.tree.map(
        lambda leaf: np.full(leaf.shape, 0.1, np.float32), parameter_shapes(model)
    )
    save_vae(place, model, params)
    files = (place / "diffusion_pytorch_model.safetensors", place / "config.json")
    valid, description = load_file(files[0]), json.loads(files[1].read_text())

    def make(dice: random.Random) -> tuple[bytes, bytes]:
        if dice.random() < 0.5:
            return _saved(tensors_like(valid, dice)), json.dumps(description).encode()
        return _saved(valid), json.dumps(mutated(description, dice)).encode()

    def read(data: tuple[bytes, bytes]) -> object:
        for path, content in zip(files, data, strict=True):
            path.write_bytes(content)
        return load_vae(place)

    load_vae(place)
    return make, read


def _judges(folder: Path) -> Iterator[Reader]:
    """Feature networks whose sizes are read off the file."""
    from lfm_jax.errors import UserError
    from lfm_jax.features import open_extractor

    width, patch = 64, 2
    vector, matrix = np.full(width, 0.1, np.float32), np.full((width, width), 0.1, np.float32)
    kernel = np.full((width, 3, patch, patch), 0.1, np.float32)

    def layer(name: str, weight: np.ndarray = matrix) -> dict[str, np.ndarray]:
        return {f"{name}.weight": weight, f"{name}.bias": weight[..., 0].copy()}

    def block(names: dict[str, np.ndarray], at: str) -> dict[str, np.ndarray]:
        parts = [layer(f"{at}.{name}", weight) for name, weight in names.items()]
        return {key: value for part in parts for key, value in part.items()}

    norm = np.full((width, 1), 0.1, np.float32)
    dinov2 = {
        "cls_token": vector[None, None],
        "pos_embed": np.full((1, 17, width), 0.1, np.float32),
        **layer("patch_embed.proj", kernel),
        "patch_embed.proj.bias": vector,
        **{f"blocks.0.ls{i}.gamma": vector for i in (1, 2)},
        **block(
            {"norm1": norm, "norm2": norm, "attn.qkv": np.tile(matrix, (3, 1)),
             "attn.proj": matrix, "mlp.fc1": matrix, "mlp.fc2": matrix}, "blocks.0",
        ),
        **layer("norm", norm),
    }  # fmt: skip
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
    vision = {
        "embeddings.patch_embedding.weight": kernel,
        "embeddings.class_embedding": vector,
        "embeddings.position_embedding.weight": np.full((17, width), 0.1, np.float32),
        "visual_projection.weight": matrix,
        **block({"pre_layrnorm": norm, "post_layernorm": norm}, "x"),
        **block(
            {"layer_norm1": norm, "layer_norm2": norm, "mlp.fc1": matrix, "mlp.fc2": matrix,
             **dict.fromkeys(names, matrix)}, "encoder.layers.0",
        ),
    }  # fmt: skip
    vision = {name.removeprefix("x."): value for name, value in vision.items()}
    for name, valid in {"dinov2": dinov2, "clip": vision}.items():
        yield Reader(
            name=f"converter {name}",
            make=lambda dice, valid=valid: _saved(tensors_like(valid, dice)),
            read=through(
                folder / f"{name}.safetensors",
                lambda path, name=name: open_extractor(name, weights=path),
            ),
            allowed=(UserError,),
            share=0.05,
        )
