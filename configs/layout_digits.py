"""Layout-to-image: canvases of real digits at known boxes, 24x24.

    python -m lfm_jax.main --config=configs/layout_digits.py --workdir=runs/layout

One to four of scikit-learn's digits a canvas, without overlap (lfm_jax/data/layouts.py); held-out
canvases hold held-out digits. The flow works on pixels. Two CPU cores: about 20 minutes for all
stages. Figures: docs/results/conditions.json, measured by benchmarks/conditions.py.
"""

from ml_collections import ConfigDict

from lfm_jax.config import default_config
from lfm_jax.experiments import smoke, variants


def get_config(variant: str = "") -> ConfigDict:
    config = default_config()
    config.data.source = "digit_canvases"
    config.data.image_size = 24
    config.data.channels = 1
    config.data.num_classes = 0  # the classes are those of the boxes
    config.condition.kind = "layout"
    config.condition.source = "digit_canvases"
    config.condition.depth = 2
    config.condition.heads = 4

    config.autoencoder.kind = "identity"  # so few pixels need no autoencoder

    config.model.hidden = 96
    config.model.depth = 6
    config.model.heads = 3
    config.model.patch = 4  # 36 tokens
    config.model.context_dim = 96

    config.train.steps = 9000
    config.train.batch_size = 64
    config.train.learning_rate = 1e-3
    config.train.schedule = "cosine"
    config.train.warmup_steps = 200
    config.train.grad_clip = 1.0
    config.train.ema_decay = 0.999
    config.train.in_memory = True
    config.train.preview_every = 1000

    config.sample.num_samples = 500
    config.sample.solver = "heun"
    config.sample.num_steps = 16
    config.sample.condition_guidance = 1.5

    config.evaluate.extractor = "random"  # canvases have no class of their own
    config.evaluate.metrics = ("fd", "kid")
    return variants(config, variant, smoke=_smoke)


def _smoke(config: ConfigDict) -> ConfigDict:
    config.model.context_dim = 32
    return smoke(config, synthetic=False, limit=256)
