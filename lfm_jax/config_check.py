"""What a config may hold: ranges and choices, checked before any job starts.

Types are ml_collections' own business (a field keeps the type of its default); this page holds the
values. A rule is a key, a predicate and the words that tell a person what is accepted.
"""

import math
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
    "loss": _one_of("flow", "mmd"),
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
    "autoencoder.decode_dtype": _one_of("float32", "bfloat16"),
    "autoencoder.decode_slice": _at_least(0),
    "autoencoder.perceptual_weight": _at_least(0),
    "autoencoder.adversarial_weight": _at_least(0),
    "autoencoder.adversarial_start": _at_least(0),
    "encode.batch_size": _at_least(1),
    "encode.shard_size": _at_least(1),
    "encode.workers": _at_least(-1),
    "encode.import_kind": _one_of("edm2", "mar", "meanflow", "fast_dit"),
    "reconstruct.num_images": _at_least(2),
    "reconstruct.pictures": _at_least(1),
    "condition.kind": _one_of("none", "inpainting", "semantic", "layout"),
    "condition.drop": (lambda v: 0 <= v < 1, "a probability in [0, 1)"),
    "condition.num_classes": _between(0, 256),
    "condition.variants": _at_least(1),
    "condition.fill": _between(-1, 1),
    "condition.mask_channels": _one_of("nearest", "pixels"),
    "condition.rescaler": _one_of("patches", "average"),
    "condition.channels": _at_least(1),
    "condition.hidden": _at_least(1),
    "condition.scheme": _one_of("boxes", "corners"),
    "condition.max_objects": _at_least(0),
    "condition.depth": _at_least(0),
    "condition.heads": _at_least(1),
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
    "train.keep_every": _at_least(0),
    "train.keep_best": _at_least(0),
    "train.nonfinite": _one_of("stop", "skip"),
    "train.preview_every": _at_least(0),
    "train.profile_steps": (
        lambda v: not v or (len(v) == 2 and 1 <= v[0] <= v[1]),
        "nothing, or a first and a last step such as (10,15)",
    ),
    "train.evaluate_every": _at_least(0),
    "train.evaluate_samples": _at_least(2),
    "mmd.num_steps": _at_least(1),
    "mmd.more_steps": (lambda v: all(n >= 1 for n in v), "numbers >= 1"),
    "mmd.eta": _between(0, 1),
    "mmd.backprop_steps": _at_least(0),
    "mmd.guidance": _at_least(0),
    "mmd.baked": (lambda v: all(w >= 1 for w in v), "numbers >= 1"),
    "mmd.trainable": _one_of("all", "adaln", "lora", "solver"),
    "mmd.lora_rank": _at_least(1),
    "mmd.network_steps": _at_least(1),
    "mmd.network_objective": _one_of("classify", "mask", "both"),
    "mmd.kernel": _one_of("linear", "cubic", "gaussian", "laplace", "energy", "imq"),
    "mmd.bandwidth": _more_than(0),
    "mmd.factors": (lambda v: v and min(v) > 0, "numbers > 0"),
    "mmd.estimator": _one_of("unbiased", "biased", "linear"),
    "mmd.joint": _at_least(0),
    "mmd.groups": _at_least(0),
    "mmd.real": _one_of("bank", "batch", "mean", "nystrom"),
    "mmd.target": _one_of("images", "latents", "teacher"),
    "mmd.bank_size": _at_least(2),
    "mmd.bank_rows": _at_least(2),
    "mmd.landmarks": _at_least(1),
    "mmd.teacher_steps": _at_least(1),
    "mmd.teacher_guidance": _at_least(0),
    "mmd.block": _at_least(0),
    "mmd.chunks": _at_least(1),
    "mmd.backward_chunks": _at_least(0),
    "mmd.anchor": _at_least(0),
    "mmd.validate_every": _at_least(0),
    "mmd.validate_samples": _at_least(2),
    "mmd.collapse": _between(0, 1),
    "sample.num_samples": _at_least(1),
    "sample.batch_size": _at_least(1),
    "sample.num_steps": _at_least(1),
    "sample.rtol": _more_than(0),
    "sample.atol": _more_than(0),
    "sample.error_norm": _one_of("sample", "batch"),
    "sample.guidance": _at_least(0),
    "sample.condition_guidance": _at_least(0),
    "sample.repeats": _at_least(1),
    "sample.guidance_channels": _at_least(0),
    "sample.guidance_interval": (
        lambda v: len(v) == 2 and 0 <= v[0] <= v[1] <= 1,
        "two times lo <= hi in [0, 1]",
    ),
    "sample.guidance_rescale": _between(0, 1),
    "sample.autoguidance": _at_least(0),
    "sample.weak_step": _at_least(0),
    "sample.classifier_guidance": _at_least(0),
    "sample.classifier_max_weight": _more_than(0),
    "sample.eta": _at_least(0),
    "sample.checkpoint": _one_of("newest", "best"),
    "sample.jpeg": _between(0, 100),
    "sample.interpolation": (lambda v: v == 0 or v >= 2, "0 (off) or a number >= 2"),
    "sample.class_switch": _at_least(0),
    "classifier.steps": _at_least(1),
    "classifier.batch_size": _at_least(1),
    "classifier.learning_rate": _more_than(0),
    "classifier.warmup_steps": _at_least(0),
    "classifier.weight_decay": _at_least(0),
    "classifier.width": (lambda v: v >= 8 and v % 8 == 0, "a multiple of 8"),
    "classifier.blocks": _at_least(1),
    "classifier.log_every": _at_least(1),
    "classifier.save_every": _at_least(1),
    "sample.trajectory": (lambda v: v == 0 or v >= 2, "0 (off) or a number >= 2"),
    "sample.latency": _at_least(0),
    "sample.seed": _between(0, 2**31 - 1),
    "evaluate.num_real": _at_least(2),
    "evaluate.memorisation": _at_least(0),
    "reference.of": _one_of("images", "latents"),
    "reference.images": _at_least(0),
    "diagnose.num_images": _at_least(2),
    "diagnose.points": _at_least(1),
    "diagnose.times": _at_least(2),
    "diagnose.iterations": _at_least(1),
    "diagnose.probes": _at_least(0),
    "diagnose.likelihood_steps": _at_least(1),
    "diagnose.switched": _at_least(0),
    "diagnose.switch_t": (lambda v: 0 < v <= 1, "a number in (0, 1]"),
    "diagnose.curve_samples": _at_least(2),
    "evaluate.pipeline": _one_of("", "tf1", "torch", "clean"),
    "evaluate.jpeg": _between(0, 100),
    "evaluate.bootstrap": _at_least(0),
    "convert.weights": _one_of("auto", "ema", "raw"),
    "evaluate.classifier_epochs": _at_least(1),
    "evaluate.classifier_width": _at_least(1),
    "edit.count": _at_least(1),
    "edit.space": _one_of("z", "h", "both"),
    "edit.pool": _one_of("mean", "flat"),
    "edit.method": _one_of("svm", "logistic", "lda", "mean"),
    "edit.cost": _more_than(0),
    "edit.source": _one_of("inverted", "noised", "sampled"),
    "edit.num_fit": _at_least(20),
    "edit.num_validation": _at_least(8),
    "edit.time": (lambda v: 0 < v <= 1, "a time in (0, 1]"),
    "edit.rule": _one_of("utility", "separability", "commitment", "radius"),
    "edit.completions": _at_least(2),
    "edit.mode": _one_of("shift", "project", "reflect", "rotate"),
    "edit.unit": _one_of("margin", "absolute"),
    "edit.strengths": (lambda v: len(v) > 0 and all(map(math.isfinite, v)), "finite numbers"),
    "edit.hidden_weight": (math.isfinite, "a finite number"),
    "edit.eta": _between(0, 1),
    "edit.num_steps": _at_least(2),
    "edit.batch_size": _at_least(1),
    "edit.strips": _at_least(1),
    "edit.seed": _between(0, 2**31 - 1),
    "mesh.data": (lambda v: v == -1 or v >= 1, "-1 (all remaining devices) or a number >= 1"),
    "mesh.fsdp": _at_least(1),
    "mesh.tensor": _at_least(1),
    "compile.slices": _at_least(1),
    "compile.step": _one_of("train", "sample"),
}


def check_config(config: ConfigDict) -> None:
    """Raise `UserError` for the first field out of its range, and for fields that contradict."""
    for key, (accepts, words) in _RULES.items():
        value = _get(config, key)
        if value is not None and not accepts(value):
            raise UserError(f"--config.{key}={value}: expected {words}")
    _check_finite(config, "--config")
    if (config.sample.rtol is None) != (config.sample.atol is None):
        raise UserError("--config.sample.rtol and --config.sample.atol: set both or neither")
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
        _check_mmd(config)
    if config.autoencoder.kind == "pretrained" and config.autoencoder.weights is None:
        raise UserError(
            "--config.autoencoder.weights is unset: autoencoder.kind=pretrained needs "
            "a weights file, a folder or a hub repository"
        )


def _check_condition(config: ConfigDict) -> None:
    section, sample = config.condition, config.sample
    if section.kind == "none":
        for key, unused in (("condition_guidance", 1.0), ("given", None), ("repeats", 1)):
            if sample[key] != unused:
                raise UserError(
                    f"--config.sample.{key}={sample[key]}: condition.kind=none has no conditions "
                    f"to sample under; expected {unused}"
                )
        return
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


def _check_mmd(config: ConfigDict) -> None:
    options, batch = config.mmd, config.train.batch_size
    if options.estimator != "biased" and batch // config.train.accumulate < 2:
        raise UserError(
            f"--config.train.batch_size={batch}: the {options.estimator} estimator needs pairs; "
            "expected at least 2 samples an accumulation step"
        )
    if batch % options.chunks or options.backward_chunks > options.chunks:
        raise UserError(
            f"--config.mmd.chunks={options.chunks}: expected a divisor of train.batch_size={batch} "
            f"and at least mmd.backward_chunks={options.backward_chunks}"
        )
    if options.backprop_steps > options.num_steps:
        raise UserError(
            f"--config.mmd.backprop_steps={options.backprop_steps}: expected at most "
            f"mmd.num_steps={options.num_steps}"
        )
    if options.trainable == "solver" and (options.more_steps or options.solver == "ddim"):
        raise UserError(
            "--config.mmd.trainable=solver: a grid has one number of steps; expected no "
            "mmd.more_steps, and another solver than ddim"
        )
    if options.baked and (options.guidance != 1 or not config.data.num_classes):
        raise UserError(
            f"--config.mmd.baked={tuple(options.baked)}: guidance in the target needs classes; "
            "expected data.num_classes > 0 and mmd.guidance=1"
        )
    if options.baked and options.real != "bank":
        raise UserError(f"--config.mmd.real={options.real}: mmd.baked needs bank")
    for key in ("guidance", "teacher_guidance"):
        if options[key] != 1 and not config.data.num_classes:
            raise UserError(
                f"--config.mmd.{key}={options[key]:g}: guidance needs classes; expected 1"
            )
    if options.real == "mean" and options.kernel != "linear":
        raise UserError(
            f"--config.mmd.real=mean: one row stands for all only under mmd.kernel=linear, not "
            f"{options.kernel}; nystrom does for the others"
        )
    if options.groups > config.data.num_classes or (options.groups and options.real != "bank"):
        raise UserError(
            f"--config.mmd.groups={options.groups}: expected at most data.num_classes="
            f"{config.data.num_classes}, and mmd.real=bank"
        )
    if options.groups and batch % options.groups:
        raise UserError(
            f"--config.mmd.groups={options.groups}: expected a divisor of train.batch_size={batch}"
        )


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
