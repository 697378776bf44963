"""Semantic boundaries on digits: turn a 3 into an 8 with a trained flow, without training.

    python -m lfm_jax.main --config=configs/digits.py --workdir=runs/digits
    python -m lfm_jax.main --config=configs/boundary_digits.py --workdir=runs/boundary_digits

Two CPU cores: about a minute. Expected figure: none was asked for; Fashion-MNIST's stand in
docs/results/boundary.json. `--config.init=DIR` edits with another run's network. `:slant` moves
a property measured on the pixels instead of a class, and keeps the strokes' thickness.
"""

from ml_collections import ConfigDict

from lfm_jax.config import neighbour, smoke, variants


def get_config(variant: str = "") -> ConfigDict:
    config = neighbour(__file__, "digits.py")
    config.job = "edit"
    config.init = "runs/digits"
    config.edit.attribute = "pair:3/8"
    config.edit.leakage = ("pixels:thickness", "pixels:slant")
    config.edit.num_fit = 200
    config.edit.num_validation = 40
    config.edit.count = 60
    return variants(config, variant, slant=_slant, smoke=_smoke)


def _slant(config: ConfigDict) -> ConfigDict:
    config.edit.attribute = "pixels:slant"
    config.edit.also = ("pixels:thickness",)
    config.edit.also_weights = (0.0,)
    config.edit.leakage = ("pixels:brightness",)
    config.edit.num_fit = 800
    return config


def _smoke(config: ConfigDict) -> ConfigDict:
    smoke(config, synthetic=False)
    config.edit.num_fit = 40
    config.edit.num_validation = 16
    config.edit.count = 8
    config.edit.times = (0.5, 0.8)
    config.edit.strengths = (-1.0, 1.0)
    config.edit.num_steps = 4
    config.edit.strips = 4
    return config
