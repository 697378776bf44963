r"""Inpainting on Fashion-MNIST at 32x32, starting from the class-conditional flow.

    python -m lfm_jax.main --config=configs/inpaint_fashion_mnist.py --workdir=runs/inpaint \
        --config.init=runs/fashion_mnist

Two CPU cores: about 10 minutes with `init`, the finished workdir of configs/fashion_mnist.py, whose
autoencoder and velocity it takes over. Without it everything is trained from scratch: raise
train.steps. Figures: docs/results/conditions.json, measured by benchmarks/conditions.py.
"""

from ml_collections import ConfigDict

from lfm_jax.experiments import neighbour, smoke, variants


def get_config(variant: str = "") -> ConfigDict:
    config = neighbour(__file__, "fashion_mnist.py")
    config.condition.kind = "inpainting"
    config.condition.masks = "lama+freeform+half"
    config.condition.variants = 1  # an image is seen about twice
    config.condition.mask_channels = "pixels"

    config.train.steps = 1200
    config.train.learning_rate = 5e-4
    config.train.warmup_steps = 100
    config.train.preview_every = 600

    config.sample.num_samples = 2000
    config.sample.batch_size = 500
    config.sample.guidance = 1.0
    # What is around a stroke all but decides it: few steps stay nearer to the mean, which is closer
    # to the image and costs no quality there. Large holes want more: --config.sample.num_steps=8.
    config.sample.solver = "euler"
    config.sample.num_steps = 4

    return variants(config, variant, smoke=_smoke)


def _smoke(config: ConfigDict) -> ConfigDict:
    config.sample.repeats = 2
    return smoke(config, synthetic=False, limit=512)
