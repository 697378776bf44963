r"""LSUN Bedroom 256x256, unconditional: LFM's DiT-L/2 (FID 4.92).

    python -m lfm_jax.main --config=configs/lsun_bedroom.py --workdir=runs/lsun_bedroom \
        --config.data.path=FOLDER
    ... --config=configs/lsun_bedroom.py:adm   LFM's ADM (FID 7.05)

Hardware: the paper trained on one A100, batch 32.
Expected time, from the closed FLOP form at 40 % MFU on one H200: about 22 h.
The latents take 3.9 GB with mirrors.
Expected figure: FID-50K 4.92 (README of VinAIResearch/LFM, DiT-L/2, dopri5 at 1e-5,
pytorch-fid on JPEG files). Not reproduced here.
"""

from ml_collections import ConfigDict

from lfm_jax.config import default_config
from lfm_jax.experiments import lfm_network, sd_latents_256, variants


def get_config(variant: str = "") -> ConfigDict:
    config = sd_latents_256(default_config())
    config.data.source = "lmdb"  # torchvision's layout: bedroom_train_lmdb
    config.data.num_classes = 0  # unconditional
    config.data.limit = 120_000  # the paper trained on the first 120,000 images

    config.model.name = "DiT-L/2"

    config.train.steps = 2_062_500  # epoch 550 of 120,000 images
    config.train.batch_size = 32
    config.train.learning_rate = 1e-4
    return variants(config, variant, adm=_adm)


def _adm(config: ConfigDict) -> ConfigDict:
    lfm_network(config, "adm", (1, 2, 3, 4), (16, 8, 4))
    config.train.steps = 398_000  # epoch 425
    config.train.batch_size = 128
    config.train.learning_rate = 1e-5
    return config
