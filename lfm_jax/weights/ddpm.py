"""DDPM U-Net files: DDIM's ``.ckpt`` names, and diffusers' ``UNet2DModel``.

Both predict noise on 1000 steps (``vp``). q, k and v are separate there and one matrix here.
A file does not say how large its images are: levels are attended at 16x16 in every published one,
which tells the side.
"""

import re
from functools import partial

import flax.linen as nn

from lfm_jax.errors import UserError
from lfm_jax.models.ddpm import DDPM
from lfm_jax.weights.bindings import CONV, CONV1X1, LINEAR, Binding, Layout, layer, norm
from lfm_jax.weights.family import Family, Network, renamed
from lfm_jax.weights.files import TensorFile

ATTENDED = 16

DDIM = {
    "time": ("temb.dense.0", "temb.dense.1"),
    "down": "down.{}.block.{}",
    "down_attention": "down.{}.attn.{}",
    "halve": "down.{}.downsample.conv",
    "mid": ("mid.block_1", "mid.attn_1", "mid.block_2"),
    "up": "up.{}.block.{}",
    "up_attention": "up.{}.attn.{}",
    "double": "up.{}.upsample.conv",
    "norm_out": "norm_out",
    "emb": "temb_proj",
    "skip": "nin_shortcut",
    "attention": ("norm", "q", "k", "v", "proj_out"),
    "upside": False,
}
DIFFUSERS = {
    "time": ("time_embedding.linear_1", "time_embedding.linear_2"),
    "down": "down_blocks.{}.resnets.{}",
    "down_attention": "down_blocks.{}.attentions.{}",
    "halve": "down_blocks.{}.downsamplers.0.conv",
    "mid": ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    "up": "up_blocks.{}.resnets.{}",
    "up_attention": "up_blocks.{}.attentions.{}",
    "double": "up_blocks.{}.upsamplers.0.conv",
    "norm_out": "conv_norm_out",
    "emb": "time_emb_proj",
    "skip": "conv_shortcut",
    "attention": ("group_norm", "to_q", "to_k", "to_v", "to_out.0"),
    "upside": True,  # counts the levels of the way up from the bottom
}


OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _new_names(file: TensorFile) -> TensorFile:
    """diffusers' files before 2023, such as google/ddpm-*, call attention's layers otherwise."""
    old = re.compile(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.")
    return renamed(file, lambda n: old.sub(lambda m: f"{m[1]}.{OLD_ATTENTION[m[2]]}.", n))


def _recognise(names: dict, file: TensorFile) -> Network:
    first = file.need("conv_in.weight")
    file.need(f"{names['time'][0]}.weight")
    channels = first.shape[0]
    mult: list[int] = []
    while (name := names["down"].format(len(mult), 0) + ".conv1.weight") in file.tensors:
        mult.append(file.tensors[name].shape[0] // channels)
    if not mult:
        file.need(name)
    blocks = 0
    while names["down"].format(0, blocks) + ".conv1.weight" in file.tensors:
        blocks += 1
    norm_name = names["attention"][0]
    attended = [
        level
        for level in range(len(mult))
        if f"{names['down_attention'].format(level, 0)}.{norm_name}.weight" in file.tensors
    ]
    side = ATTENDED << attended[0] if attended else 2 ** (len(mult) - 1)
    out = file.need("conv_out.weight").shape[0]
    overrides = {
        "channels": channels,
        "mult": tuple(mult),
        "blocks": blocks,
        "attention_resolutions": tuple(side >> level for level in attended),
        "time_scale": 1000.0,
        "convention": "vp",
    }
    return Network(
        name="ddpm",
        overrides=overrides,
        latent_shape=(side, side, out),
        spatial_channels=first.shape[1] - out,
    )


def _bindings(names: dict, product: Layout, model: DDPM, shapes: dict, side: int) -> list[Binding]:
    def res(path: str, name: str) -> list[Binding]:
        parts = [
            *norm(f"{path}/norm1", f"{name}.norm1"),
            *layer(f"{path}/conv1", f"{name}.conv1", CONV),
            *layer(f"{path}/emb", f"{name}.{names['emb']}", LINEAR),
            *norm(f"{path}/norm2", f"{name}.norm2"),
            *layer(f"{path}/conv2", f"{name}.conv2", CONV),
        ]
        if "skip" in shapes[path]:
            parts += layer(f"{path}/skip", f"{name}.{names['skip']}", CONV1X1)
        return parts

    def attention(path: str, name: str) -> list[Binding]:
        if path not in shapes:
            return []
        theirs, q, k, v, out = (f"{name}.{part}" for part in names["attention"])
        return [
            *norm(f"{path}/norm", theirs),
            *layer(f"{path}/qkv", (q, k, v), product),
            *layer(f"{path}/proj", out, product),
        ]

    levels = len(model.mult)
    found = [
        *layer("time_in", names["time"][0], LINEAR),
        *layer("time_out", names["time"][1], LINEAR),
        *layer("conv_in", "conv_in", CONV),
        *norm("norm_out", names["norm_out"]),
        *layer("conv_out", "conv_out", CONV),
        *res("mid_block0", names["mid"][0]),
        *attention("mid_attention", names["mid"][1]),
        *res("mid_block1", names["mid"][2]),
    ]
    for level in range(levels):
        up = levels - 1 - level if names["upside"] else level
        for i in range(model.blocks):
            found += res(f"down_{level}_block{i}", names["down"].format(level, i))
            found += attention(
                f"down_{level}_attention{i}", names["down_attention"].format(level, i)
            )
        for i in range(model.blocks + 1):
            found += res(f"up_{level}_block{i}", names["up"].format(up, i))
            found += attention(f"up_{level}_attention{i}", names["up_attention"].format(up, i))
        if level < levels - 1:
            found += layer(f"down_{level}_halve", names["halve"].format(level), CONV)
        if level:
            found += layer(f"up_{level}_double", names["double"].format(up), CONV)
    return found


def _export(model: nn.Module, params: dict) -> dict:
    if model.time_scale != 1000.0:
        raise UserError(
            f"model.time_scale: {model.time_scale} cannot be told in a ddpm file (1000)"
        )
    return params


FAMILIES = {
    "ddpm": Family(
        clean=lambda file: file,
        recognise=partial(_recognise, DDIM),
        module=DDPM,
        bindings=partial(_bindings, DDIM, CONV1X1),
        export=_export,
    ),
    "diffusers-ddpm": Family(
        clean=_new_names,
        recognise=partial(_recognise, DIFFUSERS),
        module=DDPM,
        bindings=partial(_bindings, DIFFUSERS, LINEAR),
        export=_export,
    ),
}
