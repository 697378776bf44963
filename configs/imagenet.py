"""ImageNet 256x256, class-conditional: LFM's DiT-B/2 (FID 4.46 with guidance 1.5).

    python -m lfm_jax.main --config=configs/imagenet.py --workdir=gs://bucket/imagenet
    ... --config=configs/imagenet.py:XL/2      SiT's recipe: DiT-XL/2, batch 256
    ... --config=configs/imagenet.py:L/2       the same, DiT-L/2
    ... --config=configs/imagenet.py:adm       LFM's ADM (FID 8.58 with guidance 1.25)

Hardware: the paper trained on 8 A100 GPUs, 160 images each.
Expected time, from the closed FLOP form at 40 % MFU on 8 H200: B/2 875k steps of 1280 about 14 h;
XL/2 7M steps of 256 about 112 h (its 400k-step mark 6.4 h). The latents take 42 GB with mirrors.
Expected figure: LFM reports FID-50K 4.46 (README of VinAIResearch/LFM, checkpoint at epoch 875,
guidance 1.5, dopri5); SiT-XL/2 reports 8.3 without guidance at 7M steps. Not reproduced here.
"""

from functools import partial

from ml_collections import ConfigDict

from lfm_jax.config import default_config
from lfm_jax.experiments import lfm_network, sd_latents_256, variants


def get_config(variant: str = "") -> ConfigDict:
    config = sd_latents_256(default_config())
    config.data.source = "folder"  # class-per-subfolder, as ILSVRC2012_img_train unpacks
    config.data.num_classes = 1000

    config.model.name = "DiT-B/2"

    config.train.steps = 875_000  # epoch 875 at 1,281,167 / 1280 steps an epoch
    config.train.batch_size = 1280
    config.train.learning_rate = 1e-4
    config.train.label_drop = 0.1

    config.sample.guidance = 1.5
    return variants(
        config, variant, XL_2=partial(_sit, size="XL/2"), L_2=partial(_sit, size="L/2"), adm=_adm
    )


def _sit(config: ConfigDict, *, size: str) -> ConfigDict:
    config.model.name = f"DiT-{size}"
    config.train.batch_size = 256
    config.train.steps = 7_000_000 if size == "XL/2" else 400_000
    return config


def _adm(config: ConfigDict) -> ConfigDict:
    lfm_network(config, "adm", (1, 2, 3, 4), (16, 8, 4))
    config.train.batch_size = 768
    config.train.steps = 1_880_000  # epoch 1125
    config.sample.guidance = 1.25
    return config
