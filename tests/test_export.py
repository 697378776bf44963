"""Releases: the model card, files for other projects' code, and what an upload would send."""

import json

import jax
import numpy as np
import pytest
from etils import epath

from lfm_jax import checkpoints, jobs, vae, weights
from lfm_jax.config import default_config
from lfm_jax.errors import UserError
from lfm_jax.jobs import build
from lfm_jax.workdir import Workdir


def digits():
    config = default_config()
    config.data.limit = 40
    config.autoencoder.block_out_channels, config.autoencoder.norm_groups = (8, 8), 4
    config.autoencoder.steps, config.autoencoder.batch_size = 1, 8
    config.model.hidden, config.model.depth, config.model.heads = 64, 1, 1
    config.model.patch, config.model.time_scale = 2, 1.0
    config.train.steps, config.train.batch_size = 1, 8
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for job in ("autoencode", "encode", "train"):
        jobs.run_job(job, digits(), str(folder))
    return folder


def test_a_release_is_whole(workdir):
    config = digits()
    config.export.families = ("sit", "lfm-dit", "diffusers-dit")
    with pytest.raises(UserError, match="time_scale"):  # diffusers' code has other frequencies
        jobs.run_job("export", config, str(workdir))
    assert not (workdir / "release").exists()
    config.export.families = ("sit", "lfm-dit")
    result = jobs.run_job("export", config, str(workdir))
    release = workdir / "release"
    assert {"params.safetensors", "vae/config.json", "sit.safetensors"} <= set(result["files"])
    assert all((release / name).is_file() for name in result["files"])

    params = checkpoints.load_params(workdir / "checkpoints")
    theirs = weights.load_torch("lfm-dit", release / "lfm-dit.safetensors")
    jax.tree.map(np.testing.assert_array_equal, params, theirs)
    model, loaded = vae.load_vae(release / "vae")
    trained = json.loads((workdir / "results/autoencode.json").read_text())
    assert model.scaling_factor == trained["latent_scale"]
    assert model.shift_factor == trained["latent_shift"]
    from etils import epath

    from lfm_jax.workdir import Workdir

    codec = build.codec(config, Workdir(epath.Path(workdir)))
    assert vae.encoder_fingerprint(loaded) == codec.fingerprint

    found = weights.load_release(release)
    assert found.model == build.network(config) and found.latent_shape == (4, 4, 4)
    assert (found.scale, found.shift) == (trained["latent_scale"], trained["latent_shift"])
    jax.tree.map(np.testing.assert_array_equal, params, found.params)

    card = (release / "README.md").read_text()
    for words in ("license: apache-2.0", "not evaluated", '"hidden": 64', "10 classes", "restore("):
        assert words in card


def test_a_release_holds_what_this_export_asked_for(workdir):
    config = digits()
    config.export.families = ("lfm-dit",)
    assert "lfm-dit.safetensors" in jobs.run_job("export", config, str(workdir))["files"]
    files = jobs.run_job("export", digits(), str(workdir))["files"]
    assert "lfm-dit.safetensors" not in files and "vae/config.json" in files


def test_a_run_from_a_release_sees_the_latents_of_its_weights(workdir, tmp_path):
    jobs.run_job("export", digits(), str(workdir))
    config = digits()
    config.init, config.seed = str(workdir / "release"), 5
    made = jobs.run_job("autoencode", config, str(tmp_path / "next"))
    there = jobs.run_job("autoencode", digits(), str(workdir))
    assert made["taken_over"] and made["latent_scale"] == there["latent_scale"]
    one, two = (
        build.codec(c, Workdir(epath.Path(folder)))
        for c, folder in ((digits(), workdir), (config, tmp_path / "next"))
    )
    assert one.fingerprint == two.fingerprint and one.scale == two.scale
    z = np.random.default_rng(0).normal(size=(2, 4, 4, one.latent_channels)).astype("f")
    decode = jax.jit(lambda codec, z: codec.decode(z))
    np.testing.assert_allclose(decode(two, z), decode(one, z), atol=1e-6)
    jobs.run_job("encode", config, str(tmp_path / "next"))
    jobs.run_job("train", config, str(tmp_path / "next"))
    config.init = None
    with pytest.raises(UserError, match="trained on another data stream"):
        config.train.steps = 2
        jobs.run_job("train", config, str(tmp_path / "next"))


def test_a_dry_run_lists_what_a_push_sends(workdir, monkeypatch, capfd):
    import huggingface_hub

    sent = []

    class Hub:
        def create_repo(self, *arguments, **options):
            sent.append(("create", *arguments))

        def upload_folder(self, **options):
            sent.append(("upload", options))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    config = digits()
    config.export.push, config.export.dry_run = "someone/digits", True
    config.export.licence = "cc-by-4.0"
    dry = jobs.run_job("export", config, str(workdir))
    assert not sent and dry["pushed"] is None
    assert dry["would_push"]["repository"] == "someone/digits"
    shown = capfd.readouterr().err
    assert "would upload README.md" in shown and "0/params" in shown
    assert "license: cc-by-4.0" in (workdir / "release/README.md").read_text()

    config.export.dry_run = False
    wet = jobs.run_job("export", config, str(workdir))
    assert wet["pushed"] == "someone/digits"
    assert sent[0] == ("create", "someone/digits")
    assert sent[1][1]["allow_patterns"] == wet["files"]
    assert dry["files"] == sorted(dry["would_push"]["files"])


def test_bad_requests_are_refused(workdir):
    config = digits()
    config.export.push = "digits"
    with pytest.raises(UserError, match="push=digits: expected owner/name"):
        jobs.run_job("export", config, str(workdir))
    config.export.push = None
    config.export.families = ("lfm",)
    with pytest.raises(UserError, match="'lfm' is none of lfm-dit"):
        jobs.run_job("export", config, str(workdir))


def test_what_is_no_release_is_said_to_be_none(tmp_path):
    with pytest.raises(UserError, match="expected a folder that --job=export wrote"):
        weights.load_release(tmp_path)
