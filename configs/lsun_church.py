r"""LSUN Church 256x256, unconditional: LFM's DiT-L/2 (FID 5.54).

    python -m lfm_jax.main --config=configs/lsun_church.py --workdir=runs/lsun_church \
        --config.data.path=FOLDER
    ... --config=configs/lsun_church.py:adm    LFM's U-Net (FID 7.70; its training is unpublished)

Hardware: the paper trained on two A100, batch 48 each.
Expected time, from the closed FLOP form at 40 % MFU on one H200: about 24 h.
The latents take 3.9 GB with mirrors.
Expected figure: FID-50K 5.54 (README of VinAIResearch/LFM, DiT-L/2, dopri5 at 1e-5,
pytorch-fid on JPEG files). Not reproduced here.
"""

from ml_collections import ConfigDict

from lfm_jax.config import default_config
from lfm_jax.experiments import lfm_network, sd_latents_256, variants


def get_config(variant: str = "") -> ConfigDict:
    config = sd_latents_256(default_config())
    config.data.source = "lmdb"  # torchvision's layout: church_outdoor_train_lmdb
    config.data.num_classes = 0  # unconditional
    config.data.limit = 120_000  # the paper trained on the first 120,000 images

    config.model.name = "DiT-L/2"

    config.train.steps = 718_750  # epoch 575 of 120,000 images
    config.train.batch_size = 96
    config.train.learning_rate = 1e-4
    return variants(config, variant, adm=_adm)


def _adm(config: ConfigDict) -> ConfigDict:
    # The training command was not released: the batch and rate are those of CelebA-HQ's U-Net.
    lfm_network(config, "unet", (1, 2, 3, 4), (16, 8))
    config.train.steps = 455_000  # epoch 425
    config.train.batch_size = 112
    config.train.learning_rate = 2e-5
    return config
