r"""FFHQ 256x256, unconditional: LFM's DiT-L/2 (FID 4.55).

    python -m lfm_jax.main --config=configs/ffhq.py --workdir=runs/ffhq \
        --config.data.path=FOLDER
    ... --config=configs/ffhq.py:adm           LFM's ADM (FID 6.12)

Hardware: the paper trained on one A100, batch 32.
Expected time, from the closed FLOP form at 40 % MFU on one H200: about 10 h.
The latents take 2.1 GB with mirrors.
Expected figure: FID-50K 4.55 (README of VinAIResearch/LFM, DiT-L/2, dopri5 at 1e-5,
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

    config.train.steps = 935_000  # epoch 475 of 63,000 images
    config.train.batch_size = 32
    config.train.learning_rate = 2e-4
    config.train.schedule = "cosine"
    config.train.learning_rate_final = 1e-5
    return variants(config, variant, adm=_adm)


def _adm(config: ConfigDict) -> ConfigDict:
    lfm_network(config, "adm", (1, 2, 3, 4), (16, 8, 4))
    config.train.steps = 160_000  # epoch 325
    config.train.batch_size = 128
    config.train.learning_rate = 2e-5
    return config
