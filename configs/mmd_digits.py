"""Digits in two steps: the flow of digits.py, finetuned.

    python -m lfm_jax.main --config=configs/digits.py --workdir=runs/digits
    python -m lfm_jax.main --config=configs/mmd_digits.py --workdir=runs/mmd_digits

Two CPU cores: about a minute. `--config.mmd.num_steps=1` and so on for another N; sampling follows.
Fashion-MNIST's figures stand in docs/results/mmd.json.
"""

from functools import partial

from ml_collections import ConfigDict

from lfm_jax.experiments import few_step, neighbour, smoke, variants


def get_config(variant: str = "") -> ConfigDict:
    config = neighbour(__file__, "digits.py")
    few_step(config, init="runs/digits", num_steps=2)
    config.train.steps = 120
    config.train.batch_size = 256
    config.train.learning_rate = 1e-4
    config.train.warmup_steps = 10
    config.train.ema_decay = 0.95
    config.train.log_every = 10
    config.train.save_every = 60
    config.mmd.network_steps = 600
    config.mmd.bank_size = 1000
    config.mmd.bank_rows = 1000
    return variants(config, variant, smoke=partial(smoke, synthetic=False))
