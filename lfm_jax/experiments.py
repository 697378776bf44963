"""What the files of `configs/` are written with: neighbours, variants, what several share."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from lfm_jax.errors import UserError


def neighbour(file: str, name: str, variant: str = "") -> ConfigDict:
    """The config of `name`, an experiment in the same folder as `file`."""
    path = Path(file).resolve().parent / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)


def few_step(config: ConfigDict, *, init: str, num_steps: int) -> ConfigDict:
    """The finetuning of an experiment's flow to `num_steps` steps; sampling follows its solve.

    Args:
        config: of the experiment, changed in place and returned.
        init: where its run lies.
    """
    config.loss = "mmd"
    config.init = init
    config.mmd.num_steps = num_steps
    # One way: an override of config.mmd reaches the sampler, one of the sampler changes it alone.
    for field in ("num_steps", "solver", "grid", "eta", "guidance"):
        config.sample[field] = config.mmd.get_oneway_ref(field)
    config.sample.rtol = config.sample.atol = None
    config.train.label_drop = max(config.train.label_drop, 0.1) if config.data.num_classes else 0.0
    config.train.weight_decay = 0.0
    config.train.grad_clip = 1.0
    config.train.schedule = "constant"
    config.train.preview_every = 0
    return config


def sd_latents_256(config: ConfigDict) -> ConfigDict:
    """What LFM's experiments at 256x256 share: SD VAE latents with mirrors, dopri5, 50k samples."""
    config.data.image_size = 256
    config.data.channels = 3
    config.autoencoder.kind = "pretrained"
    config.autoencoder.weights = "stabilityai/sd-vae-ft-mse"
    config.encode.mirror = True
    config.model.dtype = "bfloat16"
    config.train.mirror = True
    config.train.log_every = 100
    config.train.save_every = 10_000
    config.evaluate.extractor = "inception"
    config.evaluate.metrics = ("fd", "sfd", "is", "kid", "pr")
    config.sample.num_samples = 50_000
    config.sample.solver = "dopri5"
    config.sample.rtol = 1e-5
    config.sample.atol = 1e-5
    return config


def lfm_network(
    config: ConfigDict, name: str, mult: tuple[int, ...], attention: tuple[int, ...]
) -> ConfigDict:
    """One of LFM's U-Nets: ``adm`` (EDM's form) or ``unet`` (guided-diffusion's).

    `attention` is read as the published code reads it: map sides by ``adm``, downsampling factors
    by ``unet``.
    """
    config.model.name = name
    config.model.mult = mult
    config.model.attention_resolutions = attention
    if name == "unet":
        config.model.attention_reading = "factor"
    return config


def variants(
    config: ConfigDict, name: str, **choices: Callable[[ConfigDict], ConfigDict]
) -> ConfigDict:
    """The config as its file's variant changes it; `smoke` is there for every file.

    Args:
        config: changed in place and returned.
        name: what stands behind the colon in ``--config=FILE:NAME``; empty for none.
        **choices: variant name (with "_" for "/") -> what it changes.

    Raises:
        UserError: an unknown variant.
    """
    choices = {"smoke": smoke, **choices}
    if not name:
        return config
    key = name.replace("/", "_")
    if key not in choices:
        known = ", ".join(choice.replace("_", "/") for choice in choices)
        raise UserError(f"--config=...:{name}: expected no variant or one of {known}")
    return choices[key](config)


def smoke(config: ConfigDict, *, synthetic: bool = True, limit: int = 0) -> ConfigDict:
    """Shrink an experiment until every stage of it runs in seconds on a CPU; it learns nothing.

    Args:
        config: changed in place and returned.
        synthetic: replace the images by small synthetic ones, so that no data set is needed.
        limit: how many of its own images it keeps otherwise, 0: all.
    """
    if limit:
        config.data.limit = limit
    if synthetic:
        config.data.source = "synthetic"
        config.data.path = ""
        config.data.image_size = 16
        config.data.limit = 256
        config.autoencoder.kind = "train"
    config.autoencoder.block_out_channels = (8,) * len(config.autoencoder.block_out_channels)
    config.autoencoder.norm_groups = 4
    config.autoencoder.layers_per_block = 1
    config.autoencoder.steps = 10
    config.autoencoder.batch_size = 32
    config.model.name = "DiT"
    for key in ("mult", "attention_resolutions", "attention_reading"):
        config.model[key] = None
    config.model.hidden = 32
    config.model.depth = 2
    config.model.heads = 2
    config.model.patch = 2
    config.model.dtype = "float32"
    config.train.steps = 20
    config.train.batch_size = 32
    config.train.log_every = 5
    config.train.save_every = 10
    config.train.preview_every = 10
    config.train.warmup_steps = 5
    config.sample.num_samples = 60
    config.sample.batch_size = 30
    if config.loss != "mmd":  # there the number of steps is that of the finetuning
        config.sample.num_steps = 4
    config.sample.rtol = None
    config.sample.atol = None
    config.mmd.groups = 0
    if synthetic:  # published networks need their weights
        config.mmd.features = ("latents",)
        config.mmd.target = "latents"
    config.mmd.network_steps = 5
    config.mmd.bank_size = 128
    config.mmd.bank_rows = 64
    config.mmd.validate_every = 10
    config.mmd.validate_samples = 50
    config.evaluate.num_real = 50
    # Without labels there is nothing to train a judge on.
    config.evaluate.extractor = "classifier" if config.data.num_classes else "random"
    config.evaluate.metrics = ("kid",)
    config.evaluate.classifier_epochs = 1
    config.evaluate.classifier_width = 4
    config.edit.num_fit = 40
    config.edit.num_validation = 16
    config.edit.count = 8
    config.edit.times = (0.5, 0.8)
    config.edit.strengths = (-1.0, 1.0)
    config.edit.num_steps = 4
    config.edit.strips = 4
    return config
