"""Semantic boundaries on digits: turn a 3 into an 8 with a trained flow, without training.

    python -m lfm_jax.main --config=configs/digits.py --workdir=runs/digits
    python -m lfm_jax.main --config=configs/boundary_digits.py --workdir=runs/boundary_digits

Two CPU cores: about a minute. Expected figure: no bound is set; Fashion-MNIST's stand in
docs/results/boundary.json. `--config.init=DIR` edits with another run's network. `:slant` moves
a property measured on the pixels instead of a class, and keeps the strokes' thickness.
"""

from functools import partial

from ml_collections import ConfigDict

from lfm_jax.experiments import neighbour, smoke, variants


def get_config(variant: str = "") -> ConfigDict:
    config = neighbour(__file__, "digits.py")
    config.job = "edit"
    config.init = "runs/digits"
    config.edit.attribute = "pair:3/8"
    config.edit.leakage = ("pixels:thickness", "pixels:slant")
    config.edit.num_fit = 200
    config.edit.num_validation = 40
    config.edit.count = 60
    return variants(config, variant, slant=_slant, smoke=partial(smoke, synthetic=False))


def _slant(config: ConfigDict) -> ConfigDict:
    config.edit.attribute = "pixels:slant"
    config.edit.also = ("pixels:thickness",)
    config.edit.also_weights = (0.0,)
    config.edit.leakage = ("pixels:brightness",)
    config.edit.num_fit = 800
    return config
