r"""CelebA-HQ 256x256, unconditional: LFM's DiT-L/2 (FID 5.26).

    python -m lfm_jax.main --config=configs/celebahq.py --workdir=runs/celebahq \
        --config.data.path=FOLDER
    ... --config=configs/celebahq.py:adm       LFM's U-Net (FID 5.67)
    ... --config=configs/celebahq.py:512       512x512 (FID 6.35)
    ... --config=configs/celebahq.py:1024      1024x1024 (no figure in LFM's README)

Hardware: the paper trained on one A100, batch 32.
Expected time, from the closed FLOP form at 40 % MFU on one H200: about 4.4 h.
The latents take 0.9 GB with mirrors.
Expected figure: FID-50K 5.26 (README of VinAIResearch/LFM, DiT-L/2, dopri5 at 1e-5,
pytorch-fid on JPEG files). Not reproduced here.
"""

from ml_collections import ConfigDict

from lfm_jax.config import default_config
from lfm_jax.experiments import lfm_network, sd_latents_256, variants


def get_config(variant: str = "") -> ConfigDict:
    config = sd_latents_256(default_config())
    config.data.source = "lmdb"  # NVAE's layout: train.lmdb, validation.lmdb
    config.data.num_classes = 0  # unconditional

    config.model.name = "DiT-L/2"

    config.train.steps = 400_000  # epoch 475 of 27,000 images
    config.train.batch_size = 32
    config.train.learning_rate = 2e-4
    return variants(config, variant, **{"adm": _adm, "512": _512, "1024": _1024})


def _adm(config: ConfigDict) -> ConfigDict:
    lfm_network(config, "unet", (1, 2, 2, 2), (16, 8))
    config.train.steps = 116_000  # epoch 480
    config.train.batch_size = 112
    config.train.learning_rate = 2e-5
    config.train.schedule = "cosine"
    config.train.learning_rate_final = 1e-5
    return config


def _512(config: ConfigDict) -> ConfigDict:
    config.data.image_size = 512
    lfm_network(config, "unet", (1, 2, 2, 2, 4), (16, 8))
    config.train.steps = 240_000  # epoch 425
    config.train.batch_size = 48
    config.train.learning_rate = 2e-5
    return config


def _1024(config: ConfigDict) -> ConfigDict:
    config.data.image_size = 1024
    lfm_network(config, "adm", (1, 1, 2, 2, 4, 4), (16, 8))
    config.train.steps = 562_000  # epoch 1000
    config.train.batch_size = 48
    config.train.learning_rate = 2e-5
    return config
