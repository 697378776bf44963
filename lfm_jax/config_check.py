"""What a config may hold: ranges and choices, checked before any job starts.

Types are ml_collections' own business (a field keeps the type of its default); this page holds the
values. A rule is a key, a predicate and the words that tell a person what is accepted.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from lfm_jax.errors import UserError

Rule = tuple[Callable[[Any], bool], str]


def _at_least(low: float | int) -> Rule:
    return lambda v: v >= low, f"a number >= {low:g}"


def _more_than(low: float | int) -> Rule:
    return lambda v: v > low, f"a number > {low:g}"


def _between(low: float | int, high: float | int) -> Rule:
    return lambda v: low <= v <= high, f"a number in [{low:g}, {high:g}]"


def _one_of(*names: str) -> Rule:
    return lambda v: v in names, "one of " + ", ".join(names)


_RULES: dict[str, Rule] = {
    "seed": _between(0, 2**31 - 1),
    "loss": _one_of("flow"),
    "data.image_size": _at_least(1),
    "data.channels": (lambda v: v in (1, 3), "1 (gray) or 3 (RGB)"),
    "data.num_classes": _at_least(0),
    "data.limit": _at_least(0),
    "data.fit": _one_of("crop", "pad"),
    "autoencoder.kind": _one_of("train", "pretrained", "identity"),
    "autoencoder.layers_per_block": _at_least(1),
    "autoencoder.latent_channels": _at_least(1),
    "autoencoder.norm_groups": _at_least(1),
    "autoencoder.steps": _at_least(1),
    "autoencoder.batch_size": _at_least(1),
    "autoencoder.learning_rate": _more_than(0),
    "autoencoder.warmup_steps": _at_least(0),
    "autoencoder.ema_decay": (lambda v: 0 <= v < 1, "a number in [0, 1)"),
    "autoencoder.kl_weight": _at_least(0),
    "autoencoder.reconstruction": _one_of("l1", "l2"),
    "encode.batch_size": _at_least(1),
    "encode.shard_size": _at_least(1),
    "model.time_scale": _more_than(0),
    "model.dtype": _one_of("float32", "bfloat16"),
    "train.steps": _at_least(1),
    "train.batch_size": _at_least(1),
    "train.accumulate": _at_least(1),
    "train.learning_rate": _more_than(0),
    "train.schedule": _one_of("constant", "cosine"),
    "train.learning_rate_final": _at_least(0),
    "train.warmup_steps": _at_least(0),
    "train.weight_decay": _at_least(0),
    "train.b1": (lambda v: 0 <= v < 1, "a number in [0, 1)"),
    "train.b2": (lambda v: 0 <= v < 1, "a number in [0, 1)"),
    "train.grad_clip": _at_least(0),
    "train.ema_decay": (lambda v: 0 <= v < 1, "a number in [0, 1); 0 is off"),
    "train.label_drop": (lambda v: 0 <= v < 1, "a probability in [0, 1)"),
    "train.time_sampling": _one_of("uniform", "logit_normal"),
    "train.log_every": _at_least(1),
    "train.save_every": _at_least(1),
    "train.keep": _at_least(1),
    "train.preview_every": _at_least(0),
    "sample.num_samples": _at_least(1),
    "sample.batch_size": _at_least(1),
    "sample.num_steps": _at_least(1),
    "sample.rtol": _more_than(0),
    "sample.atol": _more_than(0),
    "sample.error_norm": _one_of("sample", "batch"),
    "sample.guidance": _at_least(0),
    "sample.guidance_channels": _at_least(0),
    "sample.trajectory": (lambda v: v == 0 or v >= 2, "0 (off) or a number >= 2"),
    "sample.latency": _at_least(0),
    "sample.seed": _between(0, 2**31 - 1),
    "evaluate.num_real": _at_least(2),
    "evaluate.pipeline": _one_of("", "tf1", "torch", "clean"),
    "evaluate.jpeg": _between(0, 100),
    "evaluate.bootstrap": _at_least(0),
    "convert.weights": _one_of("auto", "ema", "raw"),
    "evaluate.classifier_epochs": _at_least(1),
    "evaluate.classifier_width": _at_least(1),
    "mesh.data": (lambda v: v == -1 or v >= 1, "-1 (all remaining devices) or a number >= 1"),
    "mesh.fsdp": _at_least(1),
}


def check_config(config: ConfigDict) -> None:
    """Raise `UserError` for the first field out of its range, and for fields that contradict."""
    for key, (accepts, words) in _RULES.items():
        value = _get(config, key)
        if value is not None and not accepts(value):
            raise UserError(f"--config.{key}={value}: expected {words}")
    if (config.sample.rtol is None) != (config.sample.atol is None):
        raise UserError("--config.sample.rtol and --config.sample.atol: set both or neither")
    if config.train.batch_size % config.train.accumulate:
        raise UserError(
            f"--config.train.accumulate={config.train.accumulate}: expected a divisor of "
            f"train.batch_size={config.train.batch_size}"
        )
    if config.sample.guidance != 1 and not (config.data.num_classes and config.train.label_drop):
        raise UserError(
            f"--config.sample.guidance={config.sample.guidance:g}: guidance needs a null label "
            "that was trained; expected data.num_classes > 0 and train.label_drop > 0, or 1 (off)"
        )
    if config.train.mirror and not config.encode.mirror and config.autoencoder.kind != "identity":
        raise UserError(
            "--config.train.mirror=True: the cache has no mirror images; expected "
            "encode.mirror=True as well"
        )
    if config.autoencoder.kind == "pretrained" and config.autoencoder.weights is None:
        raise UserError(
            "--config.autoencoder.weights is unset: autoencoder.kind=pretrained needs "
            "a weights file, a folder or a hub repository"
        )


def _get(config: ConfigDict, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config
