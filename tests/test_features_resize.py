"""Each resize rule against the library that defines it, on photographs."""

import jax
import numpy as np
import pytest
from oracles import photographs, torch_fidelity
from PIL import Image

from lfm_jax.errors import UserError
from lfm_jax.features import center_crop, resize, resize_matrix

torch = pytest.importorskip("torch")
SIZES = [(32, 32), (64, 64), (256, 256), (300, 400), (299, 299)]


def ours(pixels, size, rule):
    return np.asarray(jax.jit(lambda x: resize(x, size, rule=rule))(pixels.astype(np.float32)))


def as_torch(pixels):
    return torch.from_numpy(pixels.astype(np.float32)).permute(0, 3, 1, 2)


def as_numpy(tensor):
    return tensor.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("size", SIZES)
def test_tf1_is_torch_fidelity(size):
    tf1 = torch_fidelity("interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x

    pixels = photographs(size)[0]
    expected = as_numpy(tf1(as_torch(pixels), size=(299, 299), align_corners=False))
    # 1e-4 of a level in 255: both sides round in float32.
    assert np.abs(ours(pixels, (299, 299), "tf1") - expected).max() <= 1e-4


@pytest.mark.parametrize("size", SIZES)
def test_torch_is_torch_interpolate(size):
    pixels = photographs(size)[0]
    expected = torch.nn.functional.interpolate(
        as_torch(pixels), size=(299, 299), mode="bilinear", align_corners=False
    )
    assert np.abs(ours(pixels, (299, 299), "torch") - as_numpy(expected)).max() <= 1e-4


@pytest.mark.parametrize("rule", ["clean", "bilinear", "lanczos"])
@pytest.mark.parametrize("size", SIZES)
def test_antialiased_rules_are_pillow_in_float(size, rule):
    pixels = photographs(size)[0]
    filters = {"clean": Image.BICUBIC, "bilinear": Image.BILINEAR, "lanczos": Image.LANCZOS}
    channels = [
        np.asarray(
            Image.fromarray(pixels[0, :, :, c].astype(np.float32), mode="F").resize(
                (299, 299), filters[rule]
            )
        )
        for c in range(3)
    ]
    expected = np.stack(channels, -1).clip(0, 255)
    assert np.abs(ours(pixels, (299, 299), rule)[0] - expected).max() <= 1e-4


def test_bicubic_is_torch_antialiased():
    pixels = photographs((300, 400))[0]
    expected = torch.nn.functional.interpolate(
        as_torch(pixels), size=(224, 224), mode="bicubic", antialias=True
    )
    # Torch sums its float32 weights in another order: 7e-6 of the range.
    assert np.abs(ours(pixels, (224, 224), "bicubic") - as_numpy(expected)).max() <= 2.5e-3


def test_the_three_camps_are_not_interchangeable():
    """Mean difference in levels between TF1's rule and the half-pixel one, as it is seen in use."""
    for side, low, high in ((32, 5, 20), (64, 3, 12), (256, 0.3, 1.5)):
        whole = photographs((512, 512))[0]
        pixels = ours(whole, (side, side), "clean").round()
        camps = [ours(pixels, (299, 299), rule) for rule in ("tf1", "torch")]
        assert low < np.abs(camps[0] - camps[1]).mean() < high


def test_center_crop_keeps_the_middle():
    pixels = photographs((300, 400))[0].astype(np.float32)
    crop = np.asarray(center_crop(pixels, 300, rule="clean"))
    np.testing.assert_array_equal(crop, pixels[:, :, 50:350])


def test_rows_sum_to_one_and_unknown_rules_are_named():
    for rule in ("tf1", "torch", "clean", "bicubic", "lanczos"):
        np.testing.assert_allclose(resize_matrix(48, 299, rule).sum(1), 1, atol=1e-6)
    with pytest.raises(UserError, match="accepted: tf1, torch, clean"):
        resize_matrix(8, 8, "nearest")
