"""The autoencoder: sizes, conventions, randomness by position, and that it learns real digits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from lfm_jax import vae
from lfm_jax.errors import UserError

SMALL = {
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_groups": 8,
}


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def coder():
    model = vae.AutoencoderKL(**SMALL)
    return model, vae.init_vae(model, jax.random.key(0))


@pytest.fixture(scope="module")
def digits():
    images = load_digits().images[..., None]
    return np.round(images * (255 / 16)).astype(np.uint8)


def test_parameter_count_of_stable_diffusion():
    model = vae.AutoencoderKL()
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    assert count(params) == 83_653_863
    assert count(params["encoder"]) == 34_163_592
    assert count(params["decoder"]) == 49_490_179


@pytest.mark.parametrize(
    ("channels", "size", "widths"), [(1, 8, (16, 32)), (1, 32, (16, 16, 32)), (3, 16, (16,))]
)
def test_shapes_of_small_models(channels, size, widths):
    options = SMALL | {"in_channels": channels, "out_channels": channels}
    model = vae.AutoencoderKL(**options | {"block_out_channels": widths})
    x = jnp.zeros((2, size, size, channels))

    def all_of_it(key, x):
        params = model.init(key, x)
        posterior = model.apply(params, x, method="encode")
        return posterior, posterior.moments, model.apply(params, posterior.mean, method="decode")

    posterior, moments, image = jax.eval_shape(all_of_it, jax.random.key(0), x)
    side = size // model.factor
    assert posterior.mean.shape == posterior.logvar.shape == (2, side, side, 4)
    assert moments.shape == (2, side, side, 8)
    assert image.shape == x.shape


def test_activations_in_bfloat16_keep_float32_parameters_and_results(coder):
    model, params = coder
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    rough = jax.jit(model.clone(dtype=jnp.bfloat16).apply)({"params": params}, x)
    exact = jax.jit(model.apply)({"params": params}, x)
    assert rough.dtype == jnp.float32
    assert 1e-5 < jnp.max(jnp.abs(rough - exact)) < 0.1 * jnp.std(exact)


def test_mistakes_are_named(coder):
    with pytest.raises(UserError, match="norm_groups: 7 does not divide 16"):
        vae.init_vae(vae.AutoencoderKL(**SMALL | {"norm_groups": 7}), jax.random.key(0))
    model, params = coder
    with pytest.raises(UserError, match="9x8 pixels, but each side must be a multiple of 2"):
        model.apply({"params": params}, jnp.zeros((1, 9, 8, 1)), method="encode")
    with pytest.raises(UserError, match="images: 3 channels"):
        model.apply({"params": params}, jnp.zeros((1, 8, 8, 3)), method="encode")
    with pytest.raises(UserError, match="latents: 5 channels"):
        model.apply({"params": params}, jnp.zeros((1, 4, 4, 5)), method="decode")
    with pytest.raises(UserError, match="choose one of l1, l2"):
        vae.autoencoder_loss(model, reconstruction="l3")


def test_posterior_clamps_logvar_and_its_kl_is_the_closed_form():
    posterior = vae.from_moments(jnp.array([0.0, 3.0, -99.0, 99.0]).reshape(1, 1, 1, 4))
    np.testing.assert_allclose(posterior.logvar.ravel(), [-30.0, 20.0])
    mean, logvar = 0.7, -1.3
    posterior = vae.from_moments(jnp.array([mean, logvar]).reshape(1, 1, 1, 2))
    grid = np.linspace(-12, 12, 200_001)
    variance = np.exp(logvar)
    p = np.exp(-0.5 * (grid - mean) ** 2 / variance) / np.sqrt(2 * np.pi * variance)
    ratio = -0.5 * (grid - mean) ** 2 / variance - 0.5 * logvar + 0.5 * grid**2
    expected = np.trapezoid(p * ratio, grid)
    np.testing.assert_allclose(posterior.kl().item(), expected, rtol=1e-5)


def test_a_codec_scales_back_and_is_a_jit_argument_that_does_not_compile_again(coder):
    model, params = coder
    codec = vae.make_codec(model, params, scale=0.5, shift=0.25)
    assert (codec.factor, codec.latent_channels, codec.image_channels) == (2, 4, 1)
    traces = []

    @jax.jit
    def reconstruct(codec, x):
        traces.append(1)
        mean = jnp.split(codec.encode_moments(x), 2, axis=-1)[0]
        return codec.decode((mean - codec.shift) * codec.scale)

    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    expected = jax.jit(model.apply)({"params": params}, x)
    np.testing.assert_allclose(reconstruct(codec, x), expected, atol=2e-5)
    reconstruct(codec.replace(params=jax.tree.map(lambda p: 2 * p, params)), x)
    assert len(traces) == 1


def test_fingerprint_follows_the_encoder_only(coder):
    codec = vae.make_codec(*coder)
    zeros = jax.tree.map(jnp.zeros_like, codec.params)
    other_decoder = codec.params | {"decoder": zeros["decoder"]}
    other_encoder = codec.params | {"encoder": zeros["encoder"]}
    assert codec.replace(params=other_decoder).fingerprint == codec.fingerprint
    assert codec.replace(params=other_encoder).fingerprint != codec.fingerprint
    assert len(codec.fingerprint) == 64


def test_identity_codec_is_pixel_space(digits):
    codec = vae.identity_codec(1)
    x = vae.from_uint8(digits[:5])
    mean, logvar = jnp.split(codec.encode_moments(x), 2, axis=-1)
    np.testing.assert_array_equal(mean, x)
    np.testing.assert_array_equal(logvar, -30.0)
    np.testing.assert_array_equal(vae.to_uint8(codec.decode(mean)), digits[:5])
    assert (codec.factor, codec.latent_channels) == (1, 1)
    assert codec.fingerprint != vae.identity_codec(3).fingerprint


def test_measured_scale_gives_unit_variance():
    rng = np.random.default_rng(0)
    logvar = np.log(0.3)
    mean = rng.normal(1.5, 2.0, (4000, 4, 4, 2))
    moments = np.concatenate([mean, np.full_like(mean, logvar)], -1)
    scale, shift = vae.measure_scale(moments)
    draw = (mean + np.sqrt(0.3) * rng.normal(size=mean.shape) - shift) * scale
    np.testing.assert_allclose([draw.mean(), draw.std()], [0.0, 1.0], atol=0.01)


def test_loss_randomness_follows_position_not_order(digits, coder):
    model, params = coder
    loss = jax.jit(vae.autoencoder_loss(model, kl_weight=1e-3, mirror=True))
    batch = {"image": digits[:16], "position": np.arange(100, 116, dtype=np.uint32)}
    order = np.random.default_rng(0).permutation(16)
    shuffled = {k: v[order] for k, v in batch.items()}
    key = jax.random.key(5)
    total, metrics = loss(params, batch, key)
    np.testing.assert_allclose(loss(params, shuffled, key)[0], total, rtol=1e-5)
    moved = batch | {"position": batch["position"] + 1}
    assert abs(loss(params, moved, key)[0] - total) > 1e-6
    expected = metrics["reconstruction"] + 1e-3 * metrics["kl"]
    np.testing.assert_allclose(total, expected, rtol=1e-6)


def test_a_small_autoencoder_learns_digits(digits, coder):
    model, params = coder
    loss = vae.autoencoder_loss(model, kl_weight=1e-4)
    tx = optax.adam(2e-3)

    @jax.jit
    def step(params, state, batch):
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(
            params, batch, jax.random.key(0)
        )
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, metrics

    state = tx.init(params)
    rng = np.random.default_rng(0)
    for i in range(150):
        index = rng.integers(0, 1500, 64)
        position = np.arange(64 * i, 64 * (i + 1), dtype=np.uint32)
        params, state, _ = step(params, state, {"image": digits[index], "position": position})
    held_out = vae.from_uint8(digits[1500:])
    error = jnp.mean(jnp.square(jax.jit(model.apply)({"params": params}, held_out) - held_out))
    assert error < 0.1 * jnp.var(held_out)
