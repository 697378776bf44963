"""Guided-diffusion U-Net files: OpenAI's (noise prediction, 1000 steps) and LFM's "origin ADM".

Blocks are numbered in the order they are built, down and up. The fused q, k, v comes in (head, qkv,
channel) order; in OpenAI's 64x64 network, which also has the cosine schedule, in ours. Attention is
where the file has it, told as downsampling factors. The label table has no null row: one of zeros
is added here, to be trained, and left out again in the file.
"""

import re
from functools import partial

import flax.linen as nn

from lfm_jax.errors import UserError
from lfm_jax.models.unet import UNet
from lfm_jax.weights.bindings import (
    CONV,
    CONV1D,
    CONV1X1,
    LINEAR,
    NULL_ROW,
    Binding,
    fused_layer,
    layer,
    norm,
)
from lfm_jax.weights.family import Family, Network, replaced
from lfm_jax.weights.files import TensorFile


def _clean(file: TensorFile) -> TensorFile:
    """Drop the learned variance of a noise predictor: the second half of its output channels."""
    weight = file.need("out.2.weight")
    if weight.shape[0] != 2 * file.need("input_blocks.0.0.weight").shape[1]:
        return file
    half = weight.shape[0] // 2
    bias = file.need("out.2.bias")
    return replaced(file, {"out.2.weight": weight[:half], "out.2.bias": bias[:half]})


def _recognise(name: str, overrides: dict, file: TensorFile) -> Network:
    channels = file.need("time_embed.0.weight").shape[1]
    first = file.need("input_blocks.0.0.weight")
    ups = [n for n in file.tensors if re.match(r"output_blocks\.\d+\.[12]\.conv\.weight", n)]
    inside = [
        n for n in file.tensors if re.match(r"output_blocks\.\d+\.[12]\.in_layers\.2\.weight", n)
    ]
    levels = max(len(ups), len(inside)) + 1
    entries = len({n.split(".")[1] for n in file.tensors if n.startswith("input_blocks.")})
    blocks = (entries - levels) // levels
    mult, factors = [], []
    for level in range(levels):
        start = 1 + level * (blocks + 1)
        width = file.need(f"input_blocks.{start}.0.in_layers.2.weight").shape[0]
        # OpenAI's 512x512 network begins with half of `channels`.
        mult.append(width // channels if width % channels == 0 else width / channels)
        if f"input_blocks.{start}.1.qkv.weight" in file.tensors:
            factors.append(2**level)
    out = file.need("out.2.weight").shape[0]
    steer = file.need("input_blocks.1.0.emb_layers.1.weight").shape[0]
    labels = file.tensors.get("label_emb.weight")
    found = {
        "channels": channels,
        "mult": tuple(mult),
        "blocks": blocks,
        "attention_resolutions": tuple(factors),
        "attention_reading": "factor",
        "scale_shift": steer == 2 * int(mult[0] * channels),
        "resblock_updown": bool(inside),
        "num_classes": 0 if labels is None else len(labels),
    }
    is_64 = (channels, tuple(mult), blocks) == (192, (1, 2, 3, 4), 3)
    if is_64 and name == "guided-diffusion":
        raise UserError(
            f"{file.path}: OpenAI's 64x64 network, which has another noise schedule and order of "
            "attention's channels; expected the family guided-diffusion-64"
        )
    side = 2 ** (levels - 1)
    return Network(
        name="unet",
        overrides={**found, **overrides},
        latent_shape=(side, side, out),
        spatial_channels=first.shape[1] - out,
    )


def _bindings(order: str, model: UNet, shapes: dict, side: int) -> list[Binding]:
    found = [
        *layer("time_in", "time_embed.0", LINEAR),
        *layer("time_out", "time_embed.2", LINEAR),
        *layer("conv_in", "input_blocks.0.0", CONV),
        *norm("norm_out", "out.0"),
        *layer("conv_out", "out.2", CONV),
    ]
    if "labels" in shapes:
        found.append(Binding(("labels", "embedding"), ("label_emb.weight",), NULL_ROW))

    def res(path: str, name: str) -> list[Binding]:
        parts = [
            *norm(f"{path}/norm1", f"{name}.in_layers.0"),
            *layer(f"{path}/conv1", f"{name}.in_layers.2", CONV),
            *layer(f"{path}/emb", f"{name}.emb_layers.1", LINEAR),
            *norm(f"{path}/norm2", f"{name}.out_layers.0"),
            *layer(f"{path}/conv2", f"{name}.out_layers.3", CONV),
        ]
        if "skip" in shapes[path]:
            parts += layer(f"{path}/skip", f"{name}.skip_connection", CONV1X1)
        return parts

    def attention(path: str, name: str) -> list[Binding]:
        if path not in shapes:
            return []
        if "qkv" not in shapes[path]:
            raise UserError("model.context_dim: no files of this family have cross-attention")
        width = shapes[path]["qkv"]["kernel"].shape[0]
        heads = width // model.head_channels if model.head_channels else model.heads
        return [
            *norm(f"{path}/norm", f"{name}.norm"),
            *fused_layer(f"{path}/qkv", f"{name}.qkv", CONV1D, heads, order),
            *layer(f"{path}/proj", f"{name}.proj_out", CONV1D),
        ]

    place, levels = 1, len(model.mult)
    for level in range(levels):
        for i in range(model.blocks):
            found += res(f"down_{level}_block{i}", f"input_blocks.{place}.0")
            found += attention(f"down_{level}_attention{i}", f"input_blocks.{place}.1")
            place += 1
        if level < levels - 1:
            path, name = f"down_{level}_halve", f"input_blocks.{place}.0"
            found += res(path, name) if model.resblock_updown else layer(path, f"{name}.op", CONV)
            place += 1
    found += res("mid_block0", "middle_block.0")
    found += attention("mid_attention", "middle_block.1")
    found += res("mid_block1", "middle_block.2")
    place = 0
    for level in reversed(range(levels)):
        for i in range(model.blocks + 1):
            found += res(f"up_{level}_block{i}", f"output_blocks.{place}.0")
            attended = attention(f"up_{level}_attention{i}", f"output_blocks.{place}.1")
            found += attended
            if level and i == model.blocks:
                path, name = f"up_{level}_double", f"output_blocks.{place}.{2 if attended else 1}"
                inside = model.resblock_updown
                found += res(path, name) if inside else layer(path, f"{name}.conv", CONV)
            place += 1
    return found


def _export(family: str, wants: dict, model: nn.Module, params: dict) -> dict:
    for field, want in wants.items():
        if getattr(model, field) != want:
            raise UserError(
                f"model.{field}: {getattr(model, field)} cannot be told in a {family} file, whose "
                f"code has {want}"
            )
    return params


def _family(
    name: str, time_scale: float, convention: str, heads: dict, prefix: str = "", order: str = "h3d"
) -> Family:
    wants = {"time_scale": time_scale, "convention": convention, "context_dim": 0}
    return Family(
        clean=_clean,
        recognise=partial(
            _recognise, name, {"time_scale": time_scale, "convention": convention, **heads}
        ),
        module=UNet,
        bindings=partial(_bindings, order),
        export=partial(_export, name, wants),
        prefix=prefix,
        null_label=False,
    )


FAMILIES = {
    "lfm-unet": _family("lfm-unet", 1.0, "flow", {"heads": 4}, "module."),
    "guided-diffusion": _family("guided-diffusion", 1000.0, "vp", {"head_channels": 64}),
    "guided-diffusion-64": _family(
        "guided-diffusion-64", 1000.0, "vp_cosine", {"head_channels": 64}, order="3hd"
    ),
}
