r"""Semantic-to-image on Fashion-MNIST at 32x32: from a map of three classes, and the class.

    python -m lfm_jax.main --config=configs/semantic_fashion_mnist.py --workdir=runs/semantic \
        --config.init=runs/fashion_mnist

The map says background, garment and edge of every pixel, by a documented rule on real images
(lfm_jax/data/maps.py), which also reads the map of a sample. Two CPU cores: about 15 minutes with
`init`, the finished workdir of configs/fashion_mnist.py; without it everything is trained from
scratch: raise train.steps. Figures: docs/results/conditions.json, measured by
benchmarks/conditions.py.
"""

from functools import partial

from ml_collections import ConfigDict

from lfm_jax.experiments import neighbour, smoke, variants


def get_config(variant: str = "") -> ConfigDict:
    config = neighbour(__file__, "fashion_mnist.py")
    config.condition.kind = "semantic"
    config.condition.source = "garment_parts"
    config.condition.channels = 16

    config.train.steps = 1200
    config.train.learning_rate = 5e-4
    config.train.warmup_steps = 100
    config.train.preview_every = 600

    config.sample.num_samples = 2000
    config.sample.batch_size = 500
    config.sample.guidance = 1.0

    return variants(config, variant, smoke=partial(smoke, synthetic=False, limit=512))
