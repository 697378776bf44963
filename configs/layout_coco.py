r"""Layout-to-image on COCO 2017 at 256x256, with the numbers of LFM's removed code.

    python -m lfm_jax.main --config=configs/layout_coco.py --workdir=runs/layout_coco \
        --config.data.path=coco/images --config.condition.path=coco

Images in coco/images/{train,val}; things and stuff from coco/annotations. 92 tokens: three for each
of 30 objects, and two for the image.
Hardware: the original names none; batch 32.
Expected figure: none is published. Not reproduced here.
"""

from ml_collections import ConfigDict

from lfm_jax.config import default_config
from lfm_jax.experiments import sd_latents_256, smoke, variants


def get_config(variant: str = "") -> ConfigDict:
    config = sd_latents_256(default_config())
    config.data.source = "folder"
    config.data.num_classes = 0
    config.encode.mirror = False
    config.train.mirror = False

    config.condition.kind = "layout"
    config.condition.source = "coco"
    config.condition.scheme = "corners"
    config.condition.max_objects = 30
    config.condition.depth = 16
    config.condition.heads = 8
    config.condition.overlap = True  # objects of photographs do

    config.model.name = "unet_context"
    config.model.context_dim = 512
    config.model.mult = (1, 2, 3, 4)
    config.model.attention_reading = "factor"  # as the published code reads 16, 8, 4

    config.train.steps = 400_000
    config.train.batch_size = 32
    config.train.learning_rate = 5e-5
    config.train.schedule = "cosine"
    config.train.learning_rate_final = 1e-5
    config.sample.num_samples = 5000  # the validation split
    return variants(config, variant, boxes=_boxes, smoke=_smoke)


def _boxes(config: ConfigDict) -> ConfigDict:
    config.condition.scheme = "boxes"
    config.condition.depth = 4
    config.sample.condition_guidance = 2.0
    return config


def _smoke(config: ConfigDict) -> ConfigDict:
    """Canvases of digits in the place of COCO."""
    config = smoke(config)
    config.data.source = config.condition.source = "digit_canvases"
    config.data.image_size, config.data.channels = 24, 1
    config.autoencoder.block_out_channels = (8, 16)
    config.condition.depth, config.condition.heads = 1, 2
    config.model.context_dim = 32
    return config
