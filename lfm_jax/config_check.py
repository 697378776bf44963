"""What a config may hold, checked before any job starts: its fields, and what they say together."""

import math
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from lfm_jax.config_check_mmd import check_mmd
from lfm_jax.config_rules import RULES
from lfm_jax.errors import UserError


def _passes(accepts: Callable[[Any], bool], value: Any) -> bool:
    """Whether a rule accepts a value, which may be of a kind that it cannot compare."""
    try:
        return bool(accepts(value))
    except (TypeError, ValueError, OverflowError):  # a tuple's entries are of any kind
        return False


def check_config(config: ConfigDict) -> None:
    """Raise `UserError` for the first field out of its range, and for fields that contradict."""
    for key, (accepts, words) in RULES.items():
        value = _get(config, key)
        if value is not None and not _passes(accepts, value):
            raise UserError(f"--config.{key}={value}: expected {words}")
    _check_finite(config, "--config")
    if bool(config.sample.rtol) != bool(config.sample.atol):
        raise UserError(
            "--config.sample.rtol and --config.sample.atol: set both, or neither (0 is off)"
        )
    if config.train.batch_size % config.train.accumulate:
        raise UserError(
            f"--config.train.accumulate={config.train.accumulate}: expected a divisor of "
            f"train.batch_size={config.train.batch_size}"
        )
    if config.mesh.tensor > 1 and not config.model.name.startswith("DiT"):
        # Convolutions shared out over channels gave another gradient on eight devices.
        raise UserError(
            f"--config.mesh.tensor={config.mesh.tensor} with --config.model.name="
            f"{config.model.name}: expected 1; only a DiT's products are shared out (mesh.fsdp "
            "shards any network)"
        )
    if config.sample.guidance != 1 and not (config.data.num_classes and config.train.label_drop):
        raise UserError(
            f"--config.sample.guidance={config.sample.guidance:g}: guidance needs a null label "
            "that was trained; expected data.num_classes > 0 and train.label_drop > 0, or 1 (off)"
        )
    _check_condition(config)
    if len(config.edit.also) != len(config.edit.also_weights):
        raise UserError(
            f"--config.edit.also_weights={tuple(config.edit.also_weights)}: expected one weight "
            f"for each of edit.also={tuple(config.edit.also)}"
        )
    if config.sample.sde and not config.sample.eta:
        raise UserError(
            f"--config.sample.sde={config.sample.sde}: expected sample.eta > 0, the strength of "
            "its noise, as well (1 is the usual one)"
        )
    if config.sample.autoguidance != 1 and config.sample.weak is None:
        raise UserError(
            f"--config.sample.autoguidance={config.sample.autoguidance:g}: expected sample.weak, "
            "the workdir of the network to go away from, as well"
        )
    if config.sample.classifier_guidance and not config.data.num_classes:
        raise UserError(
            f"--config.sample.classifier_guidance={config.sample.classifier_guidance:g}: expected "
            "0 (off) without classes (data.num_classes=0)"
        )
    if config.train.mirror and not config.encode.mirror and config.autoencoder.kind != "identity":
        raise UserError(
            "--config.train.mirror=True: the cache has no mirror images; expected "
            "encode.mirror=True as well"
        )
    if config.autoencoder.perceptual_weight and config.autoencoder.vgg is None:
        raise UserError(
            f"--config.autoencoder.perceptual_weight={config.autoencoder.perceptual_weight:g}: "
            "expected autoencoder.vgg, a file of torchvision's VGG16, as well"
        )
    if (config.encode.import_kind is None) != (config.encode.import_path is None):
        raise UserError(
            "--config.encode.import_kind and --config.encode.import_path: set both or neither"
        )
    if config.loss == "mmd":
        check_mmd(config)
    if config.autoencoder.kind == "pretrained" and config.autoencoder.weights is None:
        raise UserError(
            "--config.autoencoder.weights is unset: autoencoder.kind=pretrained needs "
            "a weights file, a folder or a hub repository"
        )


def _check_condition(config: ConfigDict) -> None:
    section, sample = config.condition, config.sample
    if section.kind == "none":
        defaults = {"condition_guidance": 1.0, "given": None, "repeats": 1, "masks": ""}
        for key, unused in defaults.items():
            if sample[key] != unused:
                raise UserError(
                    f"--config.sample.{key}={sample[key]}: condition.kind=none has no conditions "
                    f"to sample under; expected {unused}"
                )
        return
    if sample.repeats > sample.num_samples:
        raise UserError(
            f"--config.sample.repeats={sample.repeats}: expected at most sample.num_samples="
            f"{sample.num_samples}, all samples of one condition"
        )
    if sample.condition_guidance != 1 and not section.drop:
        raise UserError(
            f"--config.sample.condition_guidance={sample.condition_guidance:g}: guidance needs a "
            "null condition that was trained; expected condition.drop > 0, or 1 (off)"
        )
    if config.train.mirror:
        raise UserError(
            "--config.train.mirror=True: a mirrored image has another condition (left and right "
            "parts trade places); expected False with condition.kind"
        )
    if section.kind == "layout":
        if config.model.name.startswith("adm") and config.data.num_classes:
            raise UserError(
                f"--config.data.num_classes={config.data.num_classes}: {config.model.name} takes "
                "classes or boxes, not both; expected 0, or model.name=unet_context"
            )
        width = config.model.context_dim
        if not width or width % section.heads:
            raise UserError(
                f"--config.model.context_dim={width}: layouts enter by cross-attention; expected "
                f"the width of their tokens, a multiple of condition.heads={section.heads}"
            )
    if section.kind == "inpainting":
        # Here, because the sampling job would find out only after the training.
        from lfm_jax.conditions.masks import check_masks

        check_masks(section.masks)
        check_masks(sample.masks or section.masks)


def _check_finite(value: Any, key: str) -> None:
    if isinstance(value, ConfigDict):
        for name, field in value.items():
            _check_finite(field, f"{key}.{name}")
    elif isinstance(value, tuple | list):
        for field in value:
            _check_finite(field, key)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={value}: expected a finite number")


def _get(config: ConfigDict, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config
