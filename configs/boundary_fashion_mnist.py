r"""Semantic boundaries on Fashion-MNIST: sneakers into ankle boots and back, without training.

    python -m lfm_jax.main --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist
    python -m lfm_jax.main --config=configs/boundary_fashion_mnist.py \
        --workdir=runs/boundary_fashion_mnist

Two CPU cores: about 4 minutes. `--config.init=DIR` edits with another run's network. Other pairs:
`:shirt` (shirt/coat), `:pullover` (pullover/dress); `:brightness` moves a property measured on the
pixels. What it reaches, beside controls, stands in docs/results/boundary.json.
"""

from functools import partial

from ml_collections import ConfigDict

from lfm_jax.experiments import neighbour, smoke, variants


def get_config(variant: str = "") -> ConfigDict:
    config = neighbour(__file__, "fashion_mnist.py")
    config.job = "edit"
    config.init = "runs/fashion_mnist"
    config.edit.attribute = "pair:sneaker/ankle boot"
    config.edit.leakage = ("class:sandal", "pixels:brightness", "pixels:thickness")
    return variants(
        config,
        variant,
        shirt=_pair("shirt/coat"),
        pullover=_pair("pullover/dress"),
        brightness=_brightness,
        smoke=partial(smoke, synthetic=False, limit=512),
    )


def _pair(sides: str):
    def change(config: ConfigDict) -> ConfigDict:
        config.edit.attribute = f"pair:{sides}"
        config.edit.leakage = ("pixels:brightness", "pixels:thickness")
        return config

    return change


def _brightness(config: ConfigDict) -> ConfigDict:
    config.edit.attribute = "pixels:brightness"
    config.edit.leakage = ("class:sneaker", "class:bag", "pixels:thickness")
    return config
