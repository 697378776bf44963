"""LFM's "adm" files: the EDM re-implementation, tensors named by the side of the map they act on.

The resampling filters that the files carry as buffers are the box [1, 1]: checked and dropped. The
fused q, k, v comes in (head, channel, qkv) order.
"""

import re

import flax.linen as nn
import numpy as np

from lfm_jax.errors import UserError
from lfm_jax.models.adm import ADM
from lfm_jax.weights.bindings import (
    CONV,
    CONV1X1,
    LINEAR,
    Binding,
    fused_layer,
    layer,
    norm,
)
from lfm_jax.weights.family import Family, Network, without
from lfm_jax.weights.files import TensorFile

BUFFER = ".resample_filter"


def _clean(file: TensorFile) -> TensorFile:
    for name, value in file.tensors.items():
        if name.endswith(BUFFER) and not np.array_equal(value.ravel(), np.full(4, 0.25)):
            raise UserError(f"{file.path}: {name!r} {list(value.shape)} is not the box filter")
    return without(file, lambda name: name.endswith(BUFFER))


def _recognise(file: TensorFile) -> Network:
    file.need("map_layer0.weight")
    sides = sorted(
        {int(m[1]) for name in file.tensors if (m := re.match(r"enc\.(\d+)x\1_", name))},
        reverse=True,
    )
    if not sides:
        file.need("enc.32x32_conv.weight")
    channels = file.need("map_layer0.weight").shape[1]
    blocks = 0
    while f"enc.{sides[0]}x{sides[0]}_block{blocks}.conv0.weight" in file.tensors:
        blocks += 1
    mult, attended = [], []
    for side in sides:
        width = file.need(f"enc.{side}x{side}_block0.conv0.weight").shape[0]
        mult.append(width // channels)
        if f"enc.{side}x{side}_block0.qkv.weight" in file.tensors:
            attended.append(side)
    out = file.need("out_conv.weight").shape[0]
    labels = file.tensors.get("map_label.weight")
    overrides = {
        "channels": channels,
        "mult": tuple(mult),
        "blocks": blocks,
        "attention_resolutions": tuple(attended),
        "num_classes": 0 if labels is None else labels.shape[1],
        "time_scale": 1.0,
    }
    into = file.need(f"enc.{sides[0]}x{sides[0]}_conv.weight").shape[1]
    return Network(
        name="adm",
        overrides=overrides,
        latent_shape=(sides[0], sides[0], out),
        spatial_channels=into - out,
    )


def _bindings(model: ADM, shapes: dict, side: int) -> list[Binding]:
    def names(level: int, kind: str) -> str:
        return f"{side >> level}x{side >> level}_{kind}"

    last = len(model.mult) - 1
    found = [
        *layer("time_in", "map_layer0", LINEAR),
        *layer("time_out", "map_layer1", LINEAR),
        *layer("conv_in", f"enc.{names(0, 'conv')}", CONV),
        *norm("norm_out", "out_norm"),
        *layer("conv_out", "out_conv", CONV),
    ]
    if "labels" in shapes:
        found.append(Binding(("labels", "kernel"), ("map_label.weight",), LINEAR))
    for path, parts in shapes.items():
        place = re.match(r"(down|up|mid)_(?:(\d+)_)?(halve|double|block)(\d*)", path)
        if not place:
            continue
        way, level, kind, i = place[1], int(place[2] or 0), place[3], place[4]
        if way == "mid":
            name = f"dec.{names(last, f'in{i}')}"
        else:
            theirs = {"halve": "down", "double": "up", "block": f"block{i}"}[kind]
            name = f"{'enc' if way == 'down' else 'dec'}.{names(level, theirs)}"
        found += _block(path, name, parts, model.head_channels)
    return found


def _block(path: str, name: str, parts: dict, head_channels: int) -> list[Binding]:
    found = [
        *norm(f"{path}/norm0", f"{name}.norm0"),
        *layer(f"{path}/conv0", f"{name}.conv0", CONV),
        *layer(f"{path}/affine", f"{name}.affine", LINEAR),
        *norm(f"{path}/norm1", f"{name}.norm1"),
        *layer(f"{path}/conv1", f"{name}.conv1", CONV),
    ]
    if "skip" in parts:
        found += layer(f"{path}/skip", f"{name}.skip", CONV1X1)
    if "qkv" in parts:
        heads = parts["qkv"]["kernel"].shape[0] // head_channels
        found += norm(f"{path}/norm2", f"{name}.norm2")
        found += fused_layer(f"{path}/qkv", f"{name}.qkv", CONV1X1, heads, "hd3")
        found += layer(f"{path}/proj", f"{name}.proj", CONV1X1)
    return found


def _extra(model: ADM, tensors: dict, side: int) -> dict[str, np.ndarray]:
    """The filter buffers of resampling blocks, which the other side's loader asks for."""
    box = np.full((1, 1, 2, 2), 0.25, np.float32)
    blocks = {name.split(".conv0")[0] for name in tensors if re.search(r"_(down|up)\.conv0", name)}
    return {f"{name}.{part}{BUFFER}": box for name in sorted(blocks) for part in ("conv0", "skip")}


def _export(model: nn.Module, params: dict) -> dict:
    for field, want in (("time_scale", 1.0), ("convention", "flow"), ("context_dim", 0)):
        if getattr(model, field) != want:
            raise UserError(
                f"model.{field}: {getattr(model, field)} cannot be told in an lfm-adm file, whose "
                f"code has {want}"
            )
    return params


FAMILIES = {
    "lfm-adm": Family(
        clean=_clean,
        recognise=_recognise,
        module=ADM,
        bindings=_bindings,
        extra=_extra,
        export=_export,
        prefix="module.",
    )
}
