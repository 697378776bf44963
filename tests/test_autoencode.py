"""The autoencode and reconstruct jobs: plain, with LPIPS and with a discriminator."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from lfm_jax import checkpoints, jobs, vae
from lfm_jax.config import default_config
from lfm_jax.config_check import check_config
from lfm_jax.errors import UserError
from lfm_jax.vae import perceptual


def photographs():
    config = default_config()
    config.data.source, config.data.limit, config.data.num_classes = "synthetic", 16, 0
    config.data.image_size, config.data.channels = 32, 3
    config.autoencoder.block_out_channels, config.autoencoder.norm_groups = (8, 8), 4
    config.autoencoder.steps, config.autoencoder.batch_size = 2, 4
    config.evaluate.extractor = "random"
    config.reconstruct.num_images, config.reconstruct.pictures = 10, 3
    config.encode.batch_size = 4
    return config


def test_reconstructions_are_judged_and_shown(tmp_path):
    config = photographs()
    jobs.run_job("autoencode", config, str(tmp_path))
    result = jobs.run_job("reconstruct", config, str(tmp_path))
    assert result["num_images"] == 10 and np.isfinite(result["rfd"]) and result["rfd"] > 0
    assert 0 < result["psnr"] < 60 and len(result["latent_std"]) == 4
    assert Image.open(tmp_path / "reconstruction/reconstruction.png").size == (3 * 64, 3 * 64)
    config.reconstruct.rfd = False
    assert "rfd" not in jobs.run_job("reconstruct", config, str(tmp_path))


@pytest.mark.slow
def test_latent_diffusions_recipe(tmp_path):
    random = np.random.default_rng(0)
    tensors, channels = {}, 3
    for stage, width in zip(perceptual.STAGES, perceptual.WIDTHS, strict=True):
        for index in stage:
            shape = (width, channels, 3, 3)
            kernel = random.standard_normal(shape, np.float32) * np.sqrt(2 / (9 * channels))
            tensors[f"features.{index}.weight"] = kernel.astype("f4")
            tensors[f"features.{index}.bias"] = np.zeros(width, "f4")
            channels = width
    save_file(tensors, tmp_path / "vgg16.safetensors")
    config = photographs()
    config.autoencoder.perceptual_weight = 1.0
    with pytest.raises(UserError, match=r"expected autoencoder\.vgg"):
        check_config(config)
    config.autoencoder.vgg = str(tmp_path / "vgg16.safetensors")
    config.autoencoder.adversarial_weight, config.autoencoder.adversarial_start = 0.5, 1
    jobs.run_job("autoencode", config, str(tmp_path / "run"))
    params = checkpoints.load_params(tmp_path / "run/autoencoder/checkpoints")
    assert set(params) == {"autoencoder", "discriminator"}
    lines = (tmp_path / "run/logs/autoencode.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["adversarial_weight"] > 0
    # The codec is the autoencoder alone.
    encoded = jobs.run_job("encode", config, str(tmp_path / "run"))["train"]
    assert encoded["examples"] == 16
    metadata = json.loads((tmp_path / "run/latents/train/metadata.json").read_text())
    assert metadata["encoder"] == vae.encoder_fingerprint(params["autoencoder"])


def test_a_discriminator_needs_room(tmp_path):
    config = photographs()
    config.data.image_size = 8
    config.autoencoder.adversarial_weight = 0.5
    with pytest.raises(UserError, match=r"adversarial_weight=0\.5: .*image_size=8"):
        jobs.run_job("autoencode", config, str(tmp_path))


def test_convolutions_are_not_shared_out_over_tensor(tmp_path):
    config = photographs()
    config.mesh.tensor = 2
    with pytest.raises(UserError, match=r"mesh\.tensor=2 with --job=autoencode: expected 1"):
        jobs.run_job("autoencode", config, str(tmp_path))
