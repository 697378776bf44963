"""Finetuning as a job: from a base's workdir to a checkpoint that every other job takes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkout import ROOT

from lfm_jax import checkpoints, mmd
from lfm_jax.config_check import check_config
from lfm_jax.errors import UserError
from lfm_jax.experiments import neighbour
from lfm_jax.features import Classifier, Extractor
from lfm_jax.jobs import run_job
from lfm_jax.vae import identity_codec

# Several finetunings each: a minute and more on two cores.
pytestmark = pytest.mark.slow


def config_of(name, variant="smoke"):
    return neighbour(str(ROOT / "configs" / "base.py"), name, variant)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base that has learned nothing, with all that a finetuning reads."""
    folder = tmp_path_factory.mktemp("base")
    config = config_of("digits.py")
    config.autoencoder.steps = 5
    config.train.steps = 5
    config.train.preview_every = 0
    for job in ("autoencode", "encode", "train"):
        run_job(job, config, str(folder))
    return folder


@pytest.fixture
def config(base, tmp_path_factory):
    config = config_of("mmd_digits.py")
    config.init = str(base)
    config.mmd.networks = str(base / "networks")  # trained by the first test that needs them
    config.train.steps = 4
    config.train.save_every = 2
    config.train.log_every = 2
    config.mmd.validate_every = 2
    config.sample.num_samples = 20
    config.sample.batch_size = 20
    return config


def test_a_finetuned_checkpoint_is_sampled_by_its_own_steps_and_exported(config, tmp_path):
    found = run_job("train", config, str(tmp_path))
    assert found["num_steps"] == 2 and found["snapshot_step"] in (2, 4)
    assert [entry["step"] for entry in found["validation"]] == [0, 2, 4]
    scores = {entry["step"]: entry["score"] for entry in found["validation"][1:]}
    alike = [step for step, score in scores.items() if score <= 1.1 * min(scores.values())]
    assert found["snapshot_step"] == max(alike)
    assert found["share_of_base_flops"] > 0
    sampled = run_job("sample", config, str(tmp_path))
    assert sampled["nfe"] == 2 and sampled["guidance"] == 1
    config.sample.num_steps = 5  # an override of the sampler alone
    assert run_job("sample", config, str(tmp_path))["nfe"] == 5
    exported = run_job("export", config, str(tmp_path))
    assert exported["params_sha256"] == found["checkpoint"]
    with pytest.raises(UserError, match=r"differing.*mmd\.num_steps"):
        config.mmd.num_steps = 3
        run_job("train", config, str(tmp_path))


def test_going_on_ends_where_one_run_ends(config, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_job("train", config, str(whole))
    config.train.steps = 2
    run_job("train", config, str(parts))
    config.train.steps = 4
    run_job("train", config, str(parts))
    one, two = (
        json.loads((folder / "results" / "train.json").read_text()) for folder in (whole, parts)
    )
    assert one["checkpoint"] == two["checkpoint"]


@pytest.mark.parametrize(
    "changes",
    [
        {"trainable": "solver", "num_steps": 3},
        {"trainable": "lora", "lora_rank": 2, "features": ("latents", "tokens")},
        {"more_steps": (1, 4), "chunks": 4, "features": ("raw",), "target": "latents"},
        {"baked": (1.0, 2.0), "features": ("random",), "estimator": "biased"},
        {"real": "nystrom", "landmarks": 20, "features": ("latents",), "kernel": "imq"},
        {
            "real": "batch",
            "target": "latents",
            "features": ("tokens",),
            "anchor": 0.1,
            "guidance": 1.5,
            "joint": 0.0,
        },
        {"target": "teacher", "teacher_steps": 2, "groups": 2, "features": ("raw",)},
        {"solver": "ddim", "eta": 0.5, "features": ("raw",), "trainable": "adaln"},
        {"solver": "heun", "num_steps": 2, "backprop_steps": 1, "features": ("raw",)},
    ],
    ids=lambda changes: "-".join(map(str, list(changes.values())[:2])),
)
def test_every_option_ends_in_a_checkpoint_that_samples(config, changes, tmp_path):
    for key, value in changes.items():
        config.mmd[key] = value
    config.train.steps = config.train.preview_every = 2
    check_config(config)
    found = run_job("train", config, str(tmp_path))
    assert np.isfinite(found["loss"])
    assert (tmp_path / "previews" / "step_0000002.png").exists()
    config.sample.guidance = 1.5 if "baked" in changes or "guidance" in changes else 1.0
    sampled = run_job("sample", config, str(tmp_path))
    assert sampled["nfe"] == config.mmd.num_steps * (2 if changes.get("solver") == "heun" else 1)
    # A steered network is told its scale and pays for one call.
    assert sampled["network_calls"] == sampled["nfe"] * (2 if "guidance" in changes else 1)


def test_a_trained_grid_is_what_is_sampled(config, tmp_path):
    """The job's sampler takes the grid out of the checkpoint."""
    config.mmd.trainable = "solver"
    config.mmd.features, config.mmd.target = ("raw",), "latents"
    config.train.learning_rate = 0.1
    config.train.warmup_steps = 0
    run_job("train", config, str(tmp_path))
    params = checkpoints.load_params(tmp_path / "checkpoints")
    trained = params[mmd.FEW_STEP]["solver"]
    assert np.abs(trained["scales"] - 1).max() > 0.01
    config.sample.latents = True
    run_job("sample", config, str(tmp_path))
    with np.load(tmp_path / "samples" / "latents.npz") as file:
        moved = file["arr_0"]
    config.sample.num_steps = 3
    with pytest.raises(UserError, match="grid has 2 steps"):
        run_job("sample", config, str(tmp_path))
    assert np.isfinite(moved).all()


def test_bad_input_is_one_line(config, base, tmp_path):
    def fails(words, run=True, **changes):
        made = config.copy_and_resolve_references()
        for key, value in changes.items():
            section, _, field = key.partition("__")
            if field:
                made[section][field] = value
            else:
                made[key] = value
        with pytest.raises(UserError, match=words):
            check_config(made)
            if run:
                run_job("train", made, str(tmp_path / "run"))

    fails("config.init is unset", init=None)
    fails("config.init", init=str(tmp_path / "nowhere"))
    fails(r"hidden=64.*weights of", model__hidden=64)
    fails(r"num_steps=0: expected a number >= 1", run=False, mmd__num_steps=0)
    fails("the unbiased estimator needs pairs", run=False, train__batch_size=1)
    fails("groups=3: expected at most 2,", run=False, mmd__groups=3, train__batch_size=4)
    fails("expected some of pixels, latents", mmd__features=("best",))
    fails("backprop_steps=3: expected at most", run=False, mmd__backprop_steps=3)
    fails("chunks=5", run=False, mmd__chunks=5)
    fails("guidance in the target", run=False, mmd__baked=(2.0,), mmd__guidance=1.5)
    fails("one row stands for all", run=False, mmd__real="mean")
    fails("grid=1,0.5,0.2,0: 3 steps", mmd__grid="1,0.5,0.2,0", mmd__features=("raw",))
    fails("holds no mirror images", train__mirror=True, encode__mirror=True)
    fails("times are of one N", run=False, mmd__grid="1,0.5,0", mmd__more_steps=(1,))
    fails("mmd.eta=0.5: expected mmd.solver=ddim", run=False, mmd__eta=0.5)
    fails("evaluate_every=5: finetuning", run=False, train__evaluate_every=5)
    fails("no mmd.more_steps", run=False, mmd__trainable="solver", mmd__more_steps=(1,))
    fails("one for each of the", mmd__weights=(1.0, 2.0, 3.0), mmd__features=("raw",))


def test_an_extractor_that_does_not_fit_or_is_not_finite_is_refused():
    model = Classifier(2, width=4)
    params = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))["params"]
    extractor = Extractor(params=params, model=model, name="small", dim=128, input_size=16,
                          channels=1)  # fmt: skip
    fits = mmd.Decoded(codec=identity_codec(1), extractor=extractor)
    fits.check(16, 1)
    with pytest.raises(UserError, match="32x32 pixels; accepted: 16x16"):
        fits.check(32, 1)
    with pytest.raises(UserError, match="has no 'spatial'; it has"):
        fits.replace(entries=("spatial",)).check(16, 1)
    broken = fits.replace(
        extractor=extractor.replace(params=jax.tree.map(lambda p: p * jnp.nan, params))
    )
    rows = broken(jnp.zeros((4, 16, 16, 1)), None, None)
    with pytest.raises(UserError, match="not finite on real data"):
        mmd.make_bank({k: np.asarray(v) for k, v in rows.items()}, np.zeros(4, int))
