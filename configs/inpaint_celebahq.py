r"""Inpainting on CelebA-HQ 256x256 with the numbers of latent flow matching.

    python -m lfm_jax.main --config=configs/inpaint_celebahq.py --workdir=runs/inpaint_celebahq \
        --config.data.path=FOLDER
    ... --config=configs/inpaint_celebahq.py:large     larger holes, all pixels of the mask

Hardware: the paper trained on two A100, batch 64 each, 500 epochs of 27,000 images.
Expected time, from the FLOPs of a step at 40 % MFU on one H200: about 1.7 h. The latents with four
masks an image take 1.9 GB.
Expected figure: the paper reports FID, P-IDS and U-IDS with MAT's evaluation masks, which are not
published with it; not reproduced here. The masks are those of LaMa's library, some of them empty.
"""

from ml_collections import ConfigDict

from lfm_jax.config import default_config
from lfm_jax.experiments import lfm_network, sd_latents_256, variants


def get_config(variant: str = "") -> ConfigDict:
    config = sd_latents_256(default_config())
    config.data.source = "lmdb"
    config.data.num_classes = 0
    config.encode.mirror = False  # a mirrored image would need masks of its own
    config.train.mirror = False

    config.condition.kind = "inpainting"
    config.condition.masks = "paper"
    config.condition.variants = 4
    config.condition.drop = 0.0  # the paper uses no guidance here

    lfm_network(config, "unet", (1, 2, 3, 4), (16, 8))
    config.train.steps = 105_000  # 500 epochs
    config.train.batch_size = 128
    config.train.learning_rate = 5e-5
    config.train.schedule = "cosine"
    config.train.learning_rate_final = 1e-5
    config.sample.num_samples = 3000  # the held-out faces
    return variants(config, variant, large=_large)


def _large(config: ConfigDict) -> ConfigDict:
    config.condition.masks = "lama+freeform+half"
    config.condition.mask_channels = "pixels"
    config.condition.drop = 0.1
    return config
