"""The reconstruction report, against scikit-image and closed forms."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from lfm_jax import vae
from lfm_jax.vae import report

metrics = pytest.importorskip("skimage.metrics")


@pytest.fixture(scope="module")
def photographs():
    china = load_sample_image("china.jpg")[:160, :192]
    noise = np.random.default_rng(0).normal(0, 12, china.shape)
    return china, np.clip(china + noise, 0, 255).astype(np.uint8)


def test_psnr_and_ssim_are_those_of_scikit_image(photographs):
    x, y = photographs
    expected = metrics.peak_signal_noise_ratio(x, y)
    np.testing.assert_allclose(report.image_psnr(x, y), expected, rtol=1e-9)
    expected = metrics.structural_similarity(
        x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1
    )
    np.testing.assert_allclose(report.image_ssim(x, y), expected, rtol=1e-6)
    assert report.image_psnr(x, x) == 100.0
    assert report.image_ssim(x, x) == 1.0


def test_the_identity_reconstructs_and_shows_the_pixel_statistics(photographs, tmp_path):
    x = np.stack([photographs[0][:32, :32], photographs[0][32:64, :32], photographs[0][64:96, :32]])
    out = vae.reconstruction_report(vae.identity_codec(3), x, batch_size=2, folder=tmp_path)
    assert (out["num_images"], out["psnr"], out["ssim"]) == (3, 100.0, 1.0)
    pixels = x / 127.5 - 1
    np.testing.assert_allclose(out["latent_mean"], pixels.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(out["latent_std"], pixels.std((0, 1, 2)), atol=1e-5)
    assert json.loads((tmp_path / "reconstruction.json").read_text()) == out
    picture = np.asarray(Image.open(tmp_path / "reconstruction.png"))
    assert picture.shape == (3 * 64, 3 * 64, 3)
    np.testing.assert_array_equal(picture[:64:2, :64:2], x[0])
    np.testing.assert_array_equal(picture[64:128], picture[:64])
    assert not picture[128:].any()
    assert {p.name for p in tmp_path.iterdir()} == {"reconstruction.json", "reconstruction.png"}


def test_a_source_is_read_in_batches_and_judged_as_a_whole():
    from lfm_jax.data import open_images

    source = open_images("digits", image_size=8, channels=1)
    indices = np.arange(0, 100, 7)

    def extractor(x):
        return {"features": x.reshape(len(x), -1)[:, 20:25].astype("f4")}

    def distance(*moments):
        seen.append(moments)
        return 0.0

    seen = []
    codec, options = vae.identity_codec(1), {"extractor": extractor, "distance": distance}
    out = vae.reconstruction_report(codec, source, indices=indices, batch_size=4, **options)
    assert out["num_images"] == 15 and out["psnr"] == 100.0
    rows = extractor(source.batch(indices)["image"])["features"]
    np.testing.assert_allclose(seen[0][0], rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(seen[0][3], np.cov(rows.T), rtol=1e-6, atol=1e-9)


def test_latent_statistics_and_feature_distance_of_an_autoencoder():
    images = np.round(load_digits().images[:20, :, :, None] * (255 / 16)).astype(np.uint8)
    model = vae.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_groups=4,
        mid_attention=False,
    )
    codec = vae.make_codec(model, vae.init_vae(model, jax.random.key(0)), scale=0.7, shift=0.3)

    def extractor(x):
        assert x.dtype == np.uint8
        return {"features": x.reshape(len(x), -1)[:, :5] / 255}

    def distance(mean1, covariance1, mean2, covariance2):
        return np.sum((mean1 - mean2) ** 2) + np.trace(covariance1 + covariance2)

    out = vae.reconstruction_report(
        codec, images, batch_size=8, extractor=extractor, distance=distance
    )
    moments = np.asarray(jax.jit(codec.encode_moments)(vae.from_uint8(images)), np.float64)
    mean, logvar = np.split(moments, 2, -1)
    np.testing.assert_allclose(out["latent_mean"], ((mean - 0.3) * 0.7).mean((0, 1, 2)), atol=1e-5)
    variance = mean.var((0, 1, 2)) + np.exp(logvar).mean((0, 1, 2))
    np.testing.assert_allclose(out["latent_std"], 0.7 * np.sqrt(variance), rtol=1e-4)
    decode = jax.jit(lambda z: vae.to_uint8(codec.decode(z)))
    y = np.asarray(decode((mean.astype("f4") - 0.3) * 0.7))
    psnrs = [report.image_psnr(a, b) for a, b in zip(images, y, strict=True)]
    np.testing.assert_allclose(out["psnr"], np.mean(psnrs), rtol=1e-3)
    a, b = (v.reshape(20, -1)[:, :5] / 255 for v in (images, y))
    expected = distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
    np.testing.assert_allclose(out["rfd"], expected, rtol=0.02, atol=1e-3)
