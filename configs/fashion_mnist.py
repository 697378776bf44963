"""Fashion-MNIST at 32x32: a latent flow that two CPU cores train within the hour.

    apt-get install dataset-fashion-mnist      # or let the run download the four files
    python -m lfm_jax.main --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist

Two CPU cores: under 60 minutes for autoencode, encode, train, 10,000 samples and evaluate. What it
reaches stands in docs/results/pipeline.json. The 28x28 images are padded to 32x32 and encoded to
8x8x4 latents; the DiT sees 16 tokens.
"""

from functools import partial
from pathlib import Path

from ml_collections import ConfigDict

from lfm_jax.config import default_config
from lfm_jax.data import FASHION_MNIST_FOLDER
from lfm_jax.experiments import smoke, variants

_DEBIAN = "/usr/share/datasets/fashion-mnist"  # where Debian's dataset-fashion-mnist puts the files


def get_config(variant: str = "") -> ConfigDict:
    config = default_config()
    config.data.source = "idx"
    # Without Debian's package the four files are downloaded here, checked by sha256.
    config.data.path = _DEBIAN if Path(_DEBIAN).is_dir() else str(FASHION_MNIST_FOLDER)
    config.data.image_size = 32
    config.data.channels = 1
    config.data.num_classes = 10
    config.data.class_names = (
        "T-shirt", "trouser", "pullover", "dress", "coat",
        "sandal", "shirt", "sneaker", "bag", "ankle boot",
    )  # fmt: skip

    config.autoencoder.block_out_channels = (16, 32, 64)  # 32x32x1 -> 8x8x4
    config.autoencoder.latent_channels = 4
    config.autoencoder.norm_groups = 8
    config.autoencoder.steps = 2500
    config.autoencoder.batch_size = 64
    config.autoencoder.learning_rate = 2e-3
    config.autoencoder.kl_weight = 2e-4

    config.model.hidden = 192
    config.model.depth = 8
    config.model.heads = 3
    config.model.patch = 2

    config.train.steps = 5400
    config.train.batch_size = 128
    config.train.learning_rate = 1e-3
    config.train.schedule = "cosine"
    config.train.warmup_steps = 300
    config.train.grad_clip = 1.0
    config.train.ema_decay = 0.999
    config.train.in_memory = True
    config.train.preview_every = 2000

    config.sample.num_samples = 10000
    config.sample.batch_size = 500
    config.sample.solver = "heun"
    config.sample.num_steps = 16
    config.sample.guidance = 1.5

    return variants(config, variant, smoke=partial(smoke, synthetic=False, limit=512))
