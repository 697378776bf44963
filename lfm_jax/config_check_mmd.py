"""What `config.mmd` may not say together: options that contradict each other, or do nothing."""

from ml_collections import ConfigDict

from lfm_jax.errors import UserError


def check_mmd(config: ConfigDict) -> None:
    """Raise `UserError` for the first contradiction in a finetuning's config."""
    if config.train.evaluate_every:
        raise UserError(
            f"--config.train.evaluate_every={config.train.evaluate_every}: finetuning scores its "
            "snapshots every mmd.validate_every steps; expected 0"
        )
    _check_features(config)
    _check_update(config)
    _check_solver(config)
    _check_target(config)


def _check_update(config: ConfigDict) -> None:
    """The samples of an update, their classes and their chunks."""
    options, batch = config.mmd, config.train.batch_size
    # The loss is over the pairs of one accumulation step: it sees no other samples.
    seen = batch // config.train.accumulate
    step = f"the {seen} samples of an update"
    if config.train.accumulate > 1:
        step = f"the {seen} samples of one of train.accumulate={config.train.accumulate} steps"
    if options.estimator != "biased" and seen < 2:
        raise UserError(
            f"--config.train.batch_size={batch}: the {options.estimator} estimator needs pairs; "
            "expected at least 2 samples an accumulation step"
        )
    if options.groups > seen // 2:
        raise UserError(
            f"--config.mmd.groups={options.groups}: expected at most {seen // 2}, as many as find "
            "two samples each in an accumulation step"
        )
    if seen % options.chunks or options.backward_chunks > options.chunks:
        raise UserError(
            f"--config.mmd.chunks={options.chunks}: expected a divisor of {step}, and at least "
            f"mmd.backward_chunks={options.backward_chunks}"
        )
    if options.bank_rows < options.groups:
        raise UserError(
            f"--config.mmd.bank_rows={options.bank_rows}: expected at least "
            f"mmd.groups={options.groups}"
        )
    if options.groups and seen % options.groups:
        raise UserError(f"--config.mmd.groups={options.groups}: expected a divisor of {step}")


def _check_solver(config: ConfigDict) -> None:
    """The steps that are differentiated, and what of them trains."""
    options = config.mmd
    if options.backprop_steps > options.num_steps:
        raise UserError(
            f"--config.mmd.backprop_steps={options.backprop_steps}: expected at most "
            f"mmd.num_steps={options.num_steps}"
        )
    if options.backprop_steps and options.solver == "ddim":
        raise UserError(
            f"--config.mmd.backprop_steps={options.backprop_steps}: ddim's steps are not cut; "
            "expected 0 (all), or another mmd.solver"
        )
    if options.eta and options.solver != "ddim":
        raise UserError(
            f"--config.mmd.eta={options.eta:g}: expected mmd.solver=ddim as well, whose noise it "
            f"scales, or 0 (off); {options.solver} adds none"
        )
    if options.trainable == "solver" and (options.more_steps or options.solver == "ddim"):
        raise UserError(
            "--config.mmd.trainable=solver: a grid has one number of steps; expected no "
            "mmd.more_steps, and another solver than ddim"
        )
    if options.more_steps and "," in options.grid:
        raise UserError(
            f"--config.mmd.grid={options.grid}: times are of one N; mmd.more_steps="
            f"{tuple(options.more_steps)} wants a grid's name"
        )


def _check_target(config: ConfigDict) -> None:
    """What samples are compared with, and guidance in it."""
    options = config.mmd
    if options.baked and (options.guidance != 1 or not config.data.num_classes):
        raise UserError(
            f"--config.mmd.baked={tuple(options.baked)}: guidance in the target needs classes; "
            "expected data.num_classes > 0 and mmd.guidance=1"
        )
    if options.baked and options.real != "bank":
        raise UserError(f"--config.mmd.real={options.real}: mmd.baked needs bank")
    if any(scale != 1 for scale in options.baked) and not options.joint:
        raise UserError(
            f"--config.mmd.baked={tuple(options.baked)}: guidance in the target is away from other "
            "classes, which mmd.joint=0 does not tell apart; expected mmd.joint > 0, or no scale "
            "but 1"
        )
    if options.real == "batch" and options.target != "latents":
        raise UserError(
            f"--config.mmd.target={options.target}: mmd.real=batch compares with the latents of "
            "the batch; expected latents, or another mmd.real"
        )
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


def _check_features(config: ConfigDict) -> None:
    """Spaces that the options would leave empty, or that these data do not have."""
    options = config.mmd
    trained = ("pixels", "latents")
    needs = {"entries": trained, "network_seeds": trained, "token_times": ("tokens",)}
    for key, features in needs.items():
        asking = [name for name in options.features if name in features]
        if asking and not options[key]:
            raise UserError(
                f"--config.mmd.{key}=(): mmd.features={asking[0]} has no space without; expected "
                "at least one"
            )
    trains = set(trained) & set(options.features)
    if trains and "logits" in options.entries and not config.data.num_classes:
        raise UserError(
            f"--config.mmd.entries={tuple(options.entries)}: networks trained without classes "
            "(data.num_classes=0) have no logits; expected features, maps or both"
        )
    if options.decoder == "preview" and config.autoencoder.preview is None:
        raise UserError(
            "--config.mmd.decoder=preview: expected autoencoder.preview, the tiny autoencoder to "
            "decode with, as well"
        )
