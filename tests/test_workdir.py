"""A workdir belongs to one config, and a stage is done only for the inputs that it had."""

import json

import pytest
from etils import epath

from lfm_jax.config import default_config
from lfm_jax.errors import UserError
from lfm_jax.workdir import Workdir, claim, is_done, write_result


@pytest.fixture
def workdir(tmp_path):
    return Workdir(epath.Path(tmp_path / "run"))


def test_the_same_config_may_come_back_with_other_sampling(workdir):
    config = default_config()
    claim(workdir, config)
    config.sample.num_steps = 7
    config.train.steps = 77
    claim(workdir, config)
    assert json.loads(workdir.config.read_text())["config"]["sample"]["num_steps"] == 7


@pytest.mark.parametrize(
    "section, field, value",
    [("model", "depth", 3), ("train", "learning_rate", 9.0), ("autoencoder", "latent_channels", 8)],
)
def test_another_config_is_refused_with_the_differing_key(workdir, section, field, value):
    config = default_config()
    claim(workdir, config)
    before = workdir.config.read_text()
    (workdir.checkpoints / "20").mkdir(parents=True)
    config[section][field] = value
    with pytest.raises(UserError, match=rf"{section}\.{field}"):
        claim(workdir, config)
    assert workdir.config.read_text() == before


def test_a_field_added_since_has_its_default(workdir):
    config = default_config()
    claim(workdir, config)
    (workdir.checkpoints / "20").mkdir(parents=True)
    stored = json.loads(workdir.config.read_text())
    del stored["identity"]["model"]["mult"], stored["identity"]["train"]["b2"]
    workdir.config.write_text(json.dumps(stored))
    claim(workdir, config)
    config.train.b2 = 0.95
    workdir.config.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"train\.b2"):
        claim(workdir, config)


def test_a_field_that_became_free_binds_no_more(workdir):
    config = default_config()
    claim(workdir, config)
    (workdir.checkpoints / "20").mkdir(parents=True)
    stored = json.loads(workdir.config.read_text())
    stored["identity"]["autoencoder"]["decode_dtype"] = "bfloat16"
    stored["identity"]["encode"]["workers"] = 3
    workdir.config.write_text(json.dumps(stored))
    claim(workdir, config)


def test_a_finetuning_begun_before_a_field_of_its_was_there_goes_on(workdir):
    config = default_config()
    config.loss = "mmd"
    claim(workdir, config)
    (workdir.checkpoints / "20").mkdir(parents=True)
    stored = json.loads(workdir.config.read_text())
    del stored["identity"]["mmd"]["joint"]
    stored["identity"]["mmd"]["networks"] = "/elsewhere"
    workdir.config.write_text(json.dumps(stored))
    claim(workdir, config)
    config.mmd.joint = 1.0
    with pytest.raises(UserError, match=r"mmd\.joint"):
        claim(workdir, config)


def test_a_run_that_made_nothing_has_no_claim(workdir):
    config = default_config()
    claim(workdir, config)
    config.model.depth = 3
    claim(workdir, config)
    assert json.loads(workdir.config.read_text())["config"]["model"]["depth"] == 3


def test_what_stands_before_a_network_is_not_bound_to_one(workdir):
    """A size that does not add up is mended in the workdir that holds hours of latents."""
    config = default_config()
    claim(workdir, config)
    workdir.latents("train").mkdir(parents=True)
    config.model.heads, config.train.batch_size = 5, 7
    claim(workdir, config)
    config.autoencoder.latent_channels = 9
    with pytest.raises(UserError, match=r"autoencoder\.latent_channels"):
        claim(workdir, config)


def test_weights_that_no_ended_training_left_bear_no_name(workdir):
    told = {"checkpoint": "abc", "steps": 20}
    write_result(workdir, "train", default_config(), {}, told)
    (workdir.checkpoints / "20").mkdir(parents=True)
    assert workdir.checkpoint() == "abc"
    (workdir.checkpoints / "50").mkdir()
    with pytest.raises(UserError, match=r"step 50, .* ended was at step 20.*train\.steps=50"):
        workdir.checkpoint()


def test_a_foreign_file_in_the_place_of_ours_is_refused(workdir):
    workdir.root.mkdir(parents=True)
    workdir.config.write_text("not json")
    with pytest.raises(UserError, match=r"config\.json"):
        claim(workdir, default_config())


def test_done_means_done_with_these_inputs(workdir):
    assert not is_done(workdir, "encode", {"a": 1})
    result = write_result(workdir, "encode", default_config(), {"a": 1}, {"examples": 5})
    assert is_done(workdir, "encode", {"a": 1}) and not is_done(workdir, "encode", {"a": 2})
    assert result["examples"] == 5 and result["provenance"]["versions"]["jax"]
    assert workdir.require_result("encode") == result


def test_a_missing_stage_is_named(workdir):
    with pytest.raises(UserError, match="--job=encode"):
        workdir.require_result("encode")
