"""Published autoencoders: which scale and shift belong to which, and config.json both ways.

A ``config.json`` (diffusers) says everything. A bare checkpoint says its sizes by its shapes; its
latent scale is then that of a family, which is named or, where only one fits, taken for granted:

| family | latents | scale | shift |
|---|---|---|---|
| sd | 4, 1/8 | 0.18215 | 0 |
| sdxl | 4, 1/8 | 0.13025 | 0 |
| sd3 | 16, 1/8 | 1.5305 | 0.0609 |
| flux | 16, 1/8 | 0.3611 | 0.1159 |
| ldm-kl-16 | 16, 1/16 | 0.2325 | 0 |
| taesd | 4, 1/8 | 1 | 0 |
"""

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from absl import logging

from lfm_jax.errors import UserError
from lfm_jax.vae.autoencoder import AutoencoderKL
from lfm_jax.vae.tiny import AutoencoderTiny

SCALES = {
    "sd": (0.18215, 0.0),
    "sdxl": (0.13025, 0.0),
    "sd3": (1.5305, 0.0609),
    "flux": (0.3611, 0.1159),
    "ldm-kl-16": (0.2325, 0.0),
    "taesd": (1.0, 0.0),
}
CLASSES = ("AutoencoderKL", "FlaxAutoencoderKL", "AutoencoderTiny")
# What a config may ask for that this architecture does not have.
_ONLY = {"act_fn": ("silu", "swish"), "norm_type": ("group",)}
_DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
_UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}


def family_scale(family: str) -> tuple[float, float]:
    """Latent scale and shift of a family.

    Raises:
        UserError: the family is unknown.
    """
    if family not in SCALES:
        raise UserError(f"family: {family!r} is unknown; choose one of {', '.join(SCALES)}")
    return SCALES[family]


def model_from_config(config: Mapping[str, Any], *, source: str) -> nn.Module:
    """The module that a diffusers ``config.json`` describes.

    Raises:
        UserError: another class, or an option that this architecture does not have.
    """
    name = config.get("_class_name", "AutoencoderKL")
    if name not in CLASSES:
        raise UserError(
            f"{source}: _class_name {name!r} is unknown; accepted: {', '.join(CLASSES)}"
        )
    if name == "AutoencoderTiny":
        return _tiny_from_config(config, source)
    for key, accepted in _ONLY.items():
        if config.get(key, accepted[0]) not in accepted:
            raise UserError(f"{source}: {key} {config[key]!r}; accepted: {', '.join(accepted)}")
    if config.get("latents_mean") is not None:
        logging.warning("%s: latents_mean and latents_std are not applied", source)
    widths = tuple(config.get("block_out_channels", (64,)))
    scale, shift = _scale_from_config(config, 0.18215, source)
    return AutoencoderKL(
        in_channels=config.get("in_channels", 3),
        out_channels=config.get("out_channels", 3),
        block_out_channels=widths,
        layers_per_block=config.get("layers_per_block", 1),
        latent_channels=config.get("latent_channels", 4),
        norm_groups=config.get("norm_num_groups", 32),
        mid_attention=config.get("mid_block_add_attention", True),
        attention_levels=_attention_levels(config, len(widths), source),
        use_quant_conv=config.get("use_quant_conv", True),
        use_post_quant_conv=config.get("use_post_quant_conv", True),
        scaling_factor=scale,
        shift_factor=shift,
    )


def _scale_from_config(
    config: Mapping[str, Any], default: float, source: str
) -> tuple[float, float]:
    """Scale and shift. Decoding divides by the scale in float32: 0 is as useless there as NaN."""
    scale = float(config.get("scaling_factor", default))
    shift = float(config.get("shift_factor") or 0.0)
    with np.errstate(over="ignore"):
        usable = np.float32(scale)
    if not usable or not np.isfinite(usable):
        raise UserError(
            f"{source}: scaling_factor {scale:g}; expected a finite number other than 0"
        )
    if not np.isfinite(shift):
        raise UserError(f"{source}: shift_factor {shift:g}; expected a finite number")
    return scale, shift


def _attention_levels(config: Mapping[str, Any], levels: int, source: str) -> tuple[int, ...]:
    found = []
    for key, kinds in (("down_block_types", _DOWN), ("up_block_types", _UP)):
        types = config.get(key) or [next(iter(kinds))] * levels
        for kind in types:
            if kind not in kinds:
                raise UserError(f"{source}: {key} {kind!r}; accepted: {', '.join(kinds)}")
        if len(types) != levels:
            raise UserError(f"{source}: {key} has {len(types)} entries, expected {levels}")
        found.append([kinds[kind] for kind in types])
    down, up = found[0], found[1][::-1]
    if down != up:
        raise UserError(
            f"{source}: down_block_types and up_block_types put attention at other levels"
        )
    return tuple(i for i, attention in enumerate(down) if attention)


def _tiny_from_config(config: Mapping[str, Any], source: str) -> AutoencoderTiny:
    for key, accepted in {
        "act_fn": "relu",
        "upsample_fn": "nearest",
        "upsampling_scaling_factor": 2,
    }.items():
        if config.get(key, accepted) != accepted:
            raise UserError(f"{source}: {key} {config[key]!r}; accepted: {accepted}")
    scale, shift = _scale_from_config(config, 1.0, source)
    return AutoencoderTiny(
        in_channels=config.get("in_channels", 3),
        out_channels=config.get("out_channels", 3),
        latent_channels=config.get("latent_channels", 4),
        encoder_widths=tuple(config.get("encoder_block_out_channels", (64,) * 4)),
        decoder_widths=tuple(config.get("decoder_block_out_channels", (64,) * 4)),
        encoder_blocks=tuple(config.get("num_encoder_blocks", (1, 3, 3, 3))),
        decoder_blocks=tuple(config.get("num_decoder_blocks", (3, 3, 3, 1))),
        scaling_factor=scale,
        shift_factor=shift,
    )


def model_to_config(model: nn.Module) -> dict[str, Any]:
    """What diffusers reads back: the inverse of `model_from_config`."""
    if isinstance(model, AutoencoderTiny):
        return {
            "_class_name": "AutoencoderTiny",
            "in_channels": model.in_channels,
            "out_channels": model.out_channels,
            "latent_channels": model.latent_channels,
            "encoder_block_out_channels": list(model.encoder_widths),
            "decoder_block_out_channels": list(model.decoder_widths),
            "num_encoder_blocks": list(model.encoder_blocks),
            "num_decoder_blocks": list(model.decoder_blocks),
            "scaling_factor": model.scaling_factor,
            "shift_factor": model.shift_factor,
        }
    if model.norm_eps != 1e-6:
        raise UserError(f"norm_eps: {model.norm_eps}, but diffusers' format knows 1e-6 only")
    levels = range(len(model.block_out_channels))
    attention = [i in model.attention_levels for i in levels]
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": model.in_channels,
        "out_channels": model.out_channels,
        "down_block_types": ["Attn" * a + "DownEncoderBlock2D" for a in attention],
        "up_block_types": ["Attn" * a + "UpDecoderBlock2D" for a in attention[::-1]],
        "block_out_channels": list(model.block_out_channels),
        "layers_per_block": model.layers_per_block,
        "act_fn": "silu",
        "latent_channels": model.latent_channels,
        "norm_num_groups": model.norm_groups,
        "scaling_factor": model.scaling_factor,
        "shift_factor": model.shift_factor or None,
        "use_quant_conv": model.use_quant_conv,
        "use_post_quant_conv": model.use_post_quant_conv,
        "mid_block_add_attention": model.mid_attention,
    }


def model_from_tensors(
    tensors: Mapping[str, np.ndarray], *, family: str = "", norm_groups: int = 32, source: str
) -> nn.Module:
    """The module that fits tensors under diffusers' names, read off their shapes.

    The number of norm groups leaves no trace in the shapes; every published one has 32.

    Raises:
        UserError: no autoencoder in there, or its family is not told and not plain.
    """
    if "encoder.conv_in.weight" not in tensors or "decoder.conv_in.weight" not in tensors:
        if any(re.match(r"(en|de)coder\.layers\.\d", name) for name in tensors):
            first = tensors.get("decoder.layers.0.weight")
            channels = 4 if first is None or first.ndim != 4 else first.shape[1]
            return _tiny_from_config({"latent_channels": channels}, source)
        some = next(iter(tensors), "nothing")
        raise UserError(
            f"{source}: no autoencoder found (first tensor: {some}); "
            "expected encoder.conv_in.weight and decoder.conv_in.weight"
        )

    def indices(pattern: str) -> list[int]:
        return sorted({int(m[1]) for name in tensors if (m := re.match(pattern, name))})

    down = r"encoder\.down_blocks\."
    deepest = max(indices(down + r"(\d+)\."), default=0)
    # Sizes from biases where one has them: they lie but one way, so that of weights that do not
    # fit the culprit is named.
    widths = [
        _first_axis(tensors, f"encoder.down_blocks.{level}.resnets.0.conv1.bias", source)
        for level in range(deepest + 1)
    ]
    post = "post_quant_conv.weight" in tensors
    model = AutoencoderKL(
        in_channels=tensors["encoder.conv_in.weight"].shape[1],
        out_channels=_first_axis(tensors, "decoder.conv_out.bias", source),
        block_out_channels=tuple(widths),
        layers_per_block=len(indices(down + r"0\.resnets\.(\d+)\.")),
        latent_channels=_first_axis(tensors, "encoder.conv_out.bias", source) // 2,
        norm_groups=norm_groups,
        mid_attention=any(name.startswith("encoder.mid_block.attentions.") for name in tensors),
        attention_levels=tuple(indices(down + r"(\d+)\.attentions\.")),
        use_quant_conv="quant_conv.weight" in tensors,
        use_post_quant_conv=post,
    )
    scale, shift = family_scale(family or _plain_family(model, source))
    return model.clone(scaling_factor=scale, shift_factor=shift)


def _first_axis(tensors: Mapping[str, np.ndarray], name: str, source: str) -> int:
    if name not in tensors:
        raise UserError(f"{source}: tensor {name} is missing")
    return tensors[name].shape[0]


def _plain_family(model: AutoencoderKL, source: str) -> str:
    if model.latent_channels == 4 and model.factor == 8:
        logging.info("%s: taken for the family sd, scale 0.18215 (SDXL's: family='sdxl')", source)
        return "sd"
    if model.latent_channels == 16 and model.factor == 16:
        return "ldm-kl-16"
    raise UserError(
        f"{source}: there is no config.json and the latent scale is not plain from the shapes; "
        f"name the family, one of {', '.join(SCALES)}"
    )
