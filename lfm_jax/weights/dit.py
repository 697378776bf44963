"""DiT files: LFM's, facebook's, SiT's (timm names) and diffusers' ``DiTTransformer2DModel``.

What differs between them: LFM is our convention with raw t in [0, 1] (`time_scale` 1);
facebook's and diffusers' predict noise on 1000 steps (``vp``); SiT's time runs the other way
(``reversed``). A learned variance, the second half of the output channels, is dropped. The
position table in the files is checked against the computed one and dropped.
"""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import numpy as np

from lfm_jax.errors import UserError
from lfm_jax.models import dit as model_dit
from lfm_jax.models import layers
from lfm_jax.weights.bindings import LINEAR, PLAIN, Binding, layer, patches
from lfm_jax.weights.family import Family, Network, replaced, without
from lfm_jax.weights.files import TensorFile

TIMM = {
    "patch": "x_embedder.proj",
    "time_in": "t_embedder.mlp.0",
    "time_out": "t_embedder.mlp.2",
    "labels": "y_embedder.embedding_table",
    "final_modulation": "final_layer.adaLN_modulation.1",
    "final_out": "final_layer.linear",
    "block": "blocks.{}.",
    "modulation": "adaLN_modulation.1",
    "qkv": ("attn.qkv",),
    "attention_out": "attn.proj",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
}
EMBEDDER = "transformer_blocks.{}.norm1.emb."
DIFFUSERS = {
    "patch": "pos_embed.proj",
    "time_in": EMBEDDER.format(0) + "timestep_embedder.linear_1",
    "time_out": EMBEDDER.format(0) + "timestep_embedder.linear_2",
    "labels": EMBEDDER.format(0) + "class_embedder.embedding_table",
    "final_modulation": "proj_out_1",
    "final_out": "proj_out_2",
    "block": "transformer_blocks.{}.",
    "modulation": "norm1.linear",
    "qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attention_out": "attn1.to_out.0",
    "mlp_in": "ff.net.0.proj",
    "mlp_out": "ff.net.2",
}


def _bindings(names: dict, model: model_dit.DiT, shapes: dict, side: int) -> list[Binding]:
    found = [
        *layer("patch", names["patch"], patches(model.patch)),
        *(b for part in ("time_in", "time_out") for b in layer(part, names[part], LINEAR)),
        *(
            b
            for part in ("final_modulation", "final_out")
            for b in layer(part, names[part], LINEAR)
        ),
    ]
    if "labels" in shapes:
        found.append(Binding(("labels", "embedding"), (f"{names['labels']}.weight",), PLAIN))
    for i in range(model.depth):
        prefix = names["block"].format(i)
        for part in ("modulation", "attention_out", "mlp_in", "mlp_out"):
            found += layer(f"blocks/{part}", prefix + names[part], LINEAR, i)
        found += layer("blocks/qkv", tuple(prefix + name for name in names["qkv"]), LINEAR, i)
    return found


def _clean(names: dict, file: TensorFile) -> TensorFile:
    """Drop the position table (checked) and the learned variance."""
    kernel = file.need(f"{names['patch']}.weight")
    for name in ("pos_embed", "pos_embed.pos_embed"):
        table = file.tensors.get(name)
        if table is None:
            continue
        side = math.isqrt(table.shape[1])
        fixed = layers.position_table(side, side, table.shape[2])
        if side * side != table.shape[1] or not np.allclose(table[0], fixed, atol=1e-4):
            raise UserError(
                f"{file.path}: {name!r} {list(table.shape)} is not the fixed sine-cosine table of "
                "this family"
            )
        file = without(file, lambda n, name=name: n == name)
    channels, patch = kernel.shape[1], kernel.shape[2]
    weight, bias = (file.need(f"{names['final_out']}.{part}") for part in ("weight", "bias"))
    if weight.shape[0] == 2 * channels * patch**2:
        half = [
            value.reshape(patch, patch, 2 * channels, *value.shape[1:])[:, :, :channels].reshape(
                -1, *value.shape[1:]
            )
            for value in (weight, bias)
        ]
        pairs = zip(("weight", "bias"), half, strict=True)
        file = replaced(file, {f"{names['final_out']}.{part}": value for part, value in pairs})
    return file


def _clean_diffusers(file: TensorFile) -> TensorFile:
    """One embedder for all blocks: theirs are copies, which is checked."""
    for name, value in file.tensors.items():
        if ".norm1.emb." in name and not name.startswith(EMBEDDER.format(0)):
            first = EMBEDDER.format(0) + name.split(".norm1.emb.")[1]
            if not np.array_equal(value, file.need(first)):
                raise UserError(
                    f"{file.path}: {name!r} differs from {first!r}: blocks with time embeddings of "
                    "their own are not a DiT"
                )
    first = EMBEDDER.format(0)
    file = without(file, lambda n: ".norm1.emb." in n and not n.startswith(first))
    return _clean(DIFFUSERS, file)


def _recognise(names: dict, overrides: dict, file: TensorFile) -> Network:
    kernel = file.need(f"{names['patch']}.weight")
    hidden, channels, patch = kernel.shape[:3]
    depth = 0
    while f"{names['block'].format(depth)}{names['modulation']}.weight" in file.tensors:
        depth += 1
    heads = {(h, d): n for h, d, n in model_dit.SIZES.values()}.get((hidden, depth), hidden // 64)
    found = {"hidden": hidden, "depth": depth, "heads": heads, "patch": patch, **overrides}
    table = file.tensors.get(f"{names['labels']}.weight")
    if table is not None:
        # A table of one row is LFM's unconditional network: the row is always added.
        found["num_classes"] = len(table) - 1
        found["null_row"] = len(table) == 1
    out = file.need(f"{names['final_out']}.bias").shape[0] // patch**2
    side = patch * 2
    return Network(
        name="DiT",
        overrides=found,
        latent_shape=(side, side, out),
        spatial_channels=channels - out,
    )


def _extra(model: model_dit.DiT, tensors: dict, side: int) -> dict[str, np.ndarray]:
    grid = side // model.patch
    return {"pos_embed": layers.position_table(grid, grid, model.hidden)[None]}


def _export(
    family: str, convention: str, time_scale: float, endpoint: bool, model: nn.Module, params: dict
) -> dict:
    """Check what the other side's code takes for granted; turn time round where that is all."""
    for field, want in (("time_scale", time_scale), ("time_endpoint", endpoint)):
        if getattr(model, field) != want:
            raise UserError(
                f"model.{field}: {getattr(model, field)} cannot be told in a {family} file, whose "
                f"code has {want}; train with model.{field}={want}"
            )
    if model.context_dim:
        raise UserError(f"model.context_dim: a {family} file has no cross-attention")
    ours = {"flow", "reversed"}
    # A diffusers file says nothing of the target: its pipeline does.
    if model.convention == convention or (family, model.convention) == ("diffusers-dit", "flow"):
        return params
    if {model.convention, convention} <= ours:
        return _turned(params)
    raise UserError(
        f"model.convention: a {model.convention!r} network cannot be told in a {family} file "
        f"({convention!r})"
    )


def _turned(params: dict) -> dict:
    """The same velocity told in reversed time: ``-net(x, 1 - t)`` as a network of t.

    ``cos w(1-t) = cos w cos wt + sin w sin wt`` and ``sin w(1-t) = sin w cos wt - cos w sin wt``
    are linear in the embedding, so they go into the layer behind it; the sign goes into the last.
    """
    half = model_dit.TIME_DIM // 2
    w = 1e4 ** -(np.arange(half) / half)
    kernel = np.asarray(params["time_in"]["kernel"], np.float64)
    cosine, sine = kernel[:half], kernel[half:]
    c, s = np.cos(w)[:, None], np.sin(w)[:, None]
    turned = np.concatenate([c * cosine + s * sine, s * cosine - c * sine]).astype(np.float32)
    final = {name: -np.asarray(value) for name, value in params["final_out"].items()}
    return {**params, "time_in": {**params["time_in"], "kernel": turned}, "final_out": final}


def _copies(model: model_dit.DiT, tensors: dict, side: int) -> dict[str, np.ndarray]:
    """The embedder once more for every further block."""
    first = EMBEDDER.format(0)
    shared = {name: value for name, value in tensors.items() if name.startswith(first)}
    return {
        name.replace(first, EMBEDDER.format(i)): value
        for i in range(1, model.depth)
        for name, value in shared.items()
    }


def diffusers_config(model: model_dit.DiT, side: int, channels: int) -> dict[str, Any]:
    """The ``config.json`` with which ``DiTTransformer2DModel.from_pretrained`` opens a file."""
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": model.heads,
        "attention_head_dim": model.hidden // model.heads,
        "in_channels": channels,
        "out_channels": model.out_channels or channels,
        "num_layers": model.depth,
        "sample_size": side,
        "patch_size": model.patch,
        "num_embeds_ada_norm": model.num_classes,
        "norm_eps": 1e-6,
    }


def _family(name: str, convention: str, time_scale: float, prefix: str = "") -> Family:
    overrides = {"time_scale": time_scale, "convention": convention}
    return Family(
        clean=partial(_clean, TIMM),
        recognise=partial(_recognise, TIMM, overrides),
        module=model_dit.DiT,
        bindings=partial(_bindings, TIMM),
        extra=_extra,
        export=partial(_export, name, convention, time_scale, False),
        prefix=prefix,
    )


FAMILIES = {
    # LFM's own loader cuts the first seven characters off every name, prefix or not.
    "lfm-dit": _family("lfm-dit", "flow", 1.0, prefix="module."),
    "dit": _family("dit", "vp", 1000.0),
    "sit": _family("sit", "reversed", 1.0),
    "diffusers-dit": Family(
        clean=_clean_diffusers,
        recognise=partial(
            _recognise,
            DIFFUSERS,
            {"time_scale": 1000.0, "convention": "vp", "time_endpoint": True},
        ),
        module=model_dit.DiT,
        bindings=partial(_bindings, DIFFUSERS),
        extra=_copies,
        export=partial(_export, "diffusers-dit", "vp", 1000.0, True),
    ),
}
