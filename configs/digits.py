"""Digits: the 1,797 handwritten 8x8 digits that scikit-learn carries; the embedded default.

    python -m lfm_jax.main --config=configs/digits.py --workdir=runs/digits

Two CPU cores: under 6 minutes for the whole pipeline. What it reaches stands in
docs/results/pipeline.json. `:smoke` runs every stage in seconds and reaches nothing.
"""

from functools import partial

from ml_collections import ConfigDict

from lfm_jax.config import default_config
from lfm_jax.experiments import smoke, variants


def get_config(variant: str = "") -> ConfigDict:
    config = default_config()
    config.data.source = "digits"
    config.data.image_size = 8
    config.data.channels = 1
    config.data.num_classes = 10

    config.autoencoder.block_out_channels = (16, 32)  # 8x8x1 -> 4x4x4
    config.autoencoder.latent_channels = 4
    config.autoencoder.norm_groups = 8
    config.autoencoder.steps = 2000
    config.autoencoder.batch_size = 64
    config.autoencoder.learning_rate = 2e-3
    config.autoencoder.kl_weight = 1e-3

    config.model.hidden = 96
    config.model.depth = 6
    config.model.heads = 3
    config.model.patch = 1  # 16 tokens

    config.train.steps = 3200
    config.train.batch_size = 64
    config.train.learning_rate = 1e-3
    config.train.schedule = "cosine"
    config.train.warmup_steps = 200
    config.train.grad_clip = 1.0
    config.train.ema_decay = 0.999
    config.train.in_memory = True
    config.train.preview_every = 1600

    config.sample.num_samples = 1000
    config.sample.num_steps = 16
    config.sample.guidance = 1.2  # 1.5 reads as well but loses variety

    config.evaluate.classifier_epochs = 30
    config.evaluate.svc = True
    return variants(config, variant, smoke=partial(smoke, synthetic=False))
