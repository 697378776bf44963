"""Slices and tiles decode what the whole decodes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfm_jax import vae
from lfm_jax.errors import UserError
from lfm_jax.vae import layers, tiling
from lfm_jax.vae.weights import parameter_shapes


def fresh(model, seed=0):
    """Random parameters without compiling an initializer; no bias is zero and no scale is one."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            return (rng.normal(size=leaf.shape) / np.sqrt(leaf.size / leaf.shape[-1])).astype("f4")
        return (0.1 * rng.normal(size=leaf.shape) + (path[-1].key == "scale")).astype("f4")

    return jax.tree_util.tree_map_with_path(draw, parameter_shapes(model))


def make(**options):
    sizes = {"block_out_channels": (8, 16, 16), "layers_per_block": 1, "norm_groups": 4}
    model = vae.AutoencoderKL(**sizes | options)
    return model, fresh(model)


@pytest.fixture(scope="module")
def plain():
    model, params = make()
    # A gradient over the image makes the statistics of tiles differ from those of the whole.
    z = np.random.default_rng(1).normal(size=(2, 13, 18, 4)).astype("f4")
    z = z + np.linspace(-2, 2, 18, dtype="f4")[:, None]
    return model, params, z, decode(model, params, z)


def decode(model, params, z):
    decoder = jax.jit(lambda p, z: model.apply({"params": p}, z, method="decode"))
    return np.asarray(decoder(params, z))


def worst(x, y):
    return np.abs(x - y).max() / y.std()


def test_upsampling_convolution_is_nearest_then_3x3():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 5, 7, 6))
    kernel, bias = jax.random.normal(keys[1], (3, 3, 6, 4)), jax.random.normal(keys[2], (4,))
    expected = layers.convolve(layers.upsample_nearest(x), kernel, bias)
    np.testing.assert_allclose(layers.upsample_conv(x, kernel, bias), expected, atol=2e-5)


def test_attention_in_chunks_is_attention(monkeypatch):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 37, 8))
    whole = layers.attend(q, k, v)
    expected = jax.nn.dot_product_attention(*(x[:, :, None] for x in (q, k, v)))[:, :, 0]
    np.testing.assert_allclose(whole, expected, atol=1e-5)
    monkeypatch.setattr(layers, "ATTENTION_CHUNK", 10)
    np.testing.assert_allclose(layers.attend(q, k, v), whole, atol=1e-6)


@pytest.mark.parametrize("tile", [9, 16, 1000])
def test_exact_tiles_equal_the_whole(plain, tile):
    model, params, z, whole = plain
    assert worst(vae.decode_tiled(model, params, z, tile=tile), whole) < 1e-4  # asked for: 1e-3


def test_exact_tiles_with_attention_in_the_up_path():
    model, params = make(attention_levels=(2,), use_post_quant_conv=False)
    z = np.random.default_rng(2).normal(size=(1, 6, 11, 4)).astype("f4")
    assert worst(vae.decode_tiled(model, params, z, tile=8), decode(model, params, z)) < 1e-4


@pytest.mark.parametrize(
    ("tile", "options"), [(16, {}), (23, {"attention_levels": (2,)}), (999, {})]
)
def test_tiled_encoding_equals_the_whole(tile, options):
    model, params = make(**options)
    images = np.random.default_rng(3).uniform(-1, 1, (2, 44, 60, 3)).astype("f4")
    images = images * 0.3 + np.linspace(-0.7, 0.7, 60, dtype="f4")[:, None]
    encoder = jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode"))
    whole = encoder(params, images)
    tiled = vae.encode_tiled(model, params, images, tile=tile)
    assert worst(tiled.mean, np.asarray(whole.mean)) < 1e-4
    assert worst(tiled.moments, np.asarray(whole.moments)) < 1e-4
    # Tiles on their own are another matter: their norms see other statistics.
    alone = encoder(params, images[:, :, :16]).mean
    assert worst(np.asarray(alone)[:, :, :2], np.asarray(whole.mean)[:, :, :2]) > 1e-2


def test_the_halo_is_as_wide_as_the_receptive_field(plain):
    """With the whole image's statistics, windows with that halo are exact; smaller ones are not."""
    model, params, z, whole = plain
    z, whole = z[:1], whole[:1]
    x = np.asarray(tiling._bottom(model, params, z))
    decoder, halo = params["decoder"], tiling.receptive_field(model)
    statistics = tiling.thumbnail_statistics(model, decoder, x, side=1000)

    def windows(halo):
        return tiling._decode_windows(model, decoder, x, 2, halo, statistics)

    assert halo == 8
    assert worst(windows(halo), whole) < 1e-4
    assert worst(windows(halo - 4), whole) > 1e-4


def test_approximate_tiles_are_close_and_their_own_statistics_would_not_be(plain):
    model, params, z, whole = plain
    rough = vae.decode_tiled(model, params, z, tile=4, exact=False, halo=2)
    assert rough.shape == whole.shape
    alone = decode(model, params, z[:, :, :6])[:, :, :16]
    assert worst(rough[:, :, :16], whole[:, :, :16]) < worst(alone, whole[:, :, :16])
    assert worst(vae.decode_tiled(model, params, z, tile=64, exact=False), whole) < 1e-4


def test_receptive_field_of_stable_diffusion():
    assert tiling.receptive_field(vae.AutoencoderKL()) == 13


def test_slices_equal_the_whole(plain):
    model, params, z, _ = plain
    z = jnp.concatenate([z, z + 1, z - 1])[:5]
    whole = decode(model, params, z)
    sliced = jax.jit(lambda p, z: vae.decode_sliced(model, p, z, slice_size=2))(params, z)
    np.testing.assert_allclose(sliced, whole, atol=1e-4)
    codec = vae.make_codec(model, params, slice_size=2)
    decoded = jax.jit(lambda codec, z: codec.decode(z))(codec, z * codec.scale)
    np.testing.assert_allclose(decoded, whole, atol=1e-4)
    half = codec.replace(decode_dtype="bfloat16")
    rough = jax.jit(lambda codec, z: codec.decode(z))(half, z * codec.scale)
    assert rough.dtype == jnp.float32 and 1e-4 < worst(rough, np.asarray(whole)) < 0.2
    images = jnp.clip(whole, -1, 1)
    encode = jax.jit(lambda p, x: vae.encode_sliced(model, p, x, slice_size=3))
    posterior = encode(params, images)
    expected = jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode"))(params, images)
    np.testing.assert_allclose(posterior.moments, expected.moments, atol=1e-4)


def test_mistakes_are_named(plain):
    model, params, z, _ = plain
    with pytest.raises(UserError, match="AutoencoderTiny cannot be tiled"):
        vae.decode_tiled(vae.AutoencoderTiny(), {}, z)
    with pytest.raises(UserError, match="latents: 3 channels"):
        vae.decode_tiled(model, params, z[..., :3])
    with pytest.raises(UserError, match="tile: -1"):
        vae.decode_tiled(model, params, z, tile=-1)
    with pytest.raises(UserError, match="images: 43x60 pixels"):
        vae.encode_tiled(model, params, np.zeros((1, 43, 60, 3), "f4"))
    with pytest.raises(UserError, match="slice_size: 0"):
        vae.decode_sliced(model, params, jnp.asarray(z), slice_size=0)
