r"""Semantic-to-image on CelebAMask-HQ 256x256 with the numbers of latent flow matching.

    python -m lfm_jax.main --config=configs/semantic_celebahq.py --workdir=runs/semantic_celebahq \
        --config.data.path=CelebAMask-HQ --config.condition.path=CelebAMask-HQ

The 18 parts are merged in the order of lfm_jax/data/celebamask.py; faces below 27,000 train.
Hardware: the paper trained on two A100, batch 64 each, 175 epochs.
Expected time, from the FLOPs of a step at 40 % MFU on one H200: about 0.6 h.
Expected figure: the paper reports FID on the 3,000 held-out faces (pytorch-fid), with an encoder
that its code leaves untrained; here it is trained. Not reproduced here.
"""

from ml_collections import ConfigDict

from lfm_jax.config import default_config
from lfm_jax.experiments import lfm_network, sd_latents_256, smoke, variants


def get_config(variant: str = "") -> ConfigDict:
    config = sd_latents_256(default_config())
    config.data.source = "celebamask"
    config.data.num_classes = 0
    config.encode.mirror = False  # left and right parts would trade places
    config.train.mirror = False

    config.condition.kind = "semantic"
    config.condition.source = "celebamask"
    config.condition.rescaler = "average"
    config.condition.channels = 4
    config.condition.drop = 0.0  # the paper uses no guidance here

    lfm_network(config, "unet", (1, 2, 3, 4), (16, 8))
    config.train.steps = 37_000  # 175 epochs of 27,000
    config.train.batch_size = 128
    config.train.learning_rate = 5e-5
    config.train.schedule = "cosine"
    config.train.learning_rate_final = 1e-5
    config.sample.num_samples = 3000
    return variants(config, variant, guided=_guided, smoke=_smoke)


def _guided(config: ConfigDict) -> ConfigDict:
    config.condition.rescaler = "patches"
    config.condition.channels = 16
    config.condition.drop = 0.1
    config.sample.condition_guidance = 1.5
    return config


def _smoke(config: ConfigDict) -> ConfigDict:
    config.condition.source = "garment_parts"  # a rule that reads any image
    return smoke(config)
