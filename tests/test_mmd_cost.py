"""Multiply-adds of a finetuning: what each option adds to the closed form."""

import jax
import pytest
from etils import epath

from lfm_jax import mmd
from lfm_jax.config import default_config
from lfm_jax.jobs.mmd_cost import share_of_base, update_macs
from lfm_jax.models import create_model, forward_macs
from lfm_jax.workdir import Workdir

SHAPE = (4, 4, 2)
MODEL = create_model("DiT", hidden=16, depth=2, heads=2, patch=2)
MAPS = [mmd.random_maps(jax.random.key(0), 2, width=8)]
# Two convolutions: 4x4 places of 9 x 2 -> 8, then 2x2 of 9 x 8 -> 16.
FEATURES = 16 * 9 * 2 * 8 + 4 * 9 * 8 * 16


def config_of(**changes):
    config = default_config()
    config.data.num_classes = 0
    config.train.batch_size = 6
    config.mmd.num_steps = 2
    for key, value in changes.items():
        config.mmd[key] = value
    return config


@pytest.mark.parametrize(
    "changes, calls, features",
    [
        ({}, 4 + 3, 2),
        ({"chunks": 2}, 4 + 3 + 2, 3),
        ({"real": "batch"}, 4 + 3, 3),
        ({"real": "batch", "chunks": 2}, 4 + 3 + 2, 4),
        ({"solver": "heun"}, 2 * (4 + 4), 2),
        ({"guidance": 1.5}, 2 * (4 + 3), 2),
    ],
)
def test_an_update_costs_its_calls_and_its_features(changes, calls, features):
    found = update_macs(config_of(**changes), MODEL, MAPS, SHAPE)
    assert found == 6 * (calls * forward_macs(MODEL, SHAPE) + features * FEATURES)


@pytest.mark.parametrize(
    "changes, calls",
    [({}, 2), ({"solver": "heun"}, 4), ({"guidance": 1.5}, 4), ({"solver": "ddim"}, 2)],
)
def test_validation_pays_for_every_call_of_the_sampler(changes, calls):
    class Base(Workdir):
        def result(self, job):
            return {"examples_drawn": 1000}

    config = config_of(validate_every=5, validate_samples=100, **changes)
    config.train.steps = 10
    network = forward_macs(MODEL, SHAPE)
    updates = 10 * update_macs(config, MODEL, MAPS, SHAPE)
    validation = 3 * 100 * (calls * network + FEATURES)
    share = share_of_base(config, Base(epath.Path()), MODEL, MAPS, SHAPE)
    assert share == pytest.approx((updates + validation) / (3000 * network))
