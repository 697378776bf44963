"""Feature maps: differentiable, the same for images and decoded latents, and what they see."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lfm_jax import mmd
from lfm_jax.data import open_images
from lfm_jax.errors import UserError
from lfm_jax.features import Classifier, Extractor
from lfm_jax.jobs.mmd_features import to_differentiate
from lfm_jax.mmd.features import shared_leaves
from lfm_jax.models import create_model, init_params
from lfm_jax.vae import AutoencoderKL, identity_codec, init_vae, make_codec, to_uint8


def extractor(size=16, channels=3, rule="none"):
    model = Classifier(3, width=4)
    params = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, channels)))["params"]
    return Extractor(params=params, model=model, name="random", dim=128, input_size=16,
                     channels=channels, resize=rule)  # fmt: skip


def keys(count):
    return jax.vmap(jax.random.key)(jnp.arange(count, dtype=jnp.uint32))


def test_images_and_latents_that_decode_to_them_have_the_same_features():
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    feature_map = mmd.Decoded(codec=identity_codec(3), extractor=extractor())
    latents = jnp.asarray(images, jnp.float32) / 127.5 - 1
    np.testing.assert_allclose(
        feature_map(latents, None, None)["decoded/features"],
        feature_map.of_images(jnp.asarray(images))["decoded/features"],
        atol=1e-4,
    )
    np.testing.assert_array_equal(to_uint8(latents), images)


def test_gradients_reach_the_latents_through_decoder_resize_and_network():
    vae = AutoencoderKL(in_channels=3, out_channels=3, block_out_channels=(8, 8), norm_groups=4,
                        layers_per_block=1, latent_channels=4)  # fmt: skip
    codec = make_codec(vae, init_vae(vae, jax.random.key(0), 32), scale=0.5, shift=0.1)
    feature_map = mmd.Decoded(codec=codec, extractor=extractor(rule="bilinear"))
    latents = jax.random.normal(jax.random.key(1), (2, 16, 16, 4))

    def value(z):
        return feature_map(z, None, None)["decoded/features"].sum()

    slope = jax.jit(jax.grad(value))(latents)
    assert np.isfinite(slope).all() and (np.abs(slope).max((1, 2, 3)) > 0).all()
    direction = jax.random.normal(jax.random.key(2), latents.shape)
    step = 1e-3
    difference = (value(latents + step * direction) - value(latents - step * direction)) / (
        2 * step
    )
    np.testing.assert_allclose((slope * direction).sum(), difference, rtol=0.05)


def test_tokens_are_means_of_the_backbones_states_at_noised_times():
    model = create_model("DiT", hidden=32, depth=3, heads=2, patch=2, num_classes=3)
    params = init_params(model, jax.random.key(0), (4, 4, 2))
    feature_map = mmd.BackboneTokens(
        params=params, model=model, times=(0.1, 0.4), taps=(mmd.middle_tap(model),)
    )
    latents = jax.random.normal(jax.random.key(1), (5, 4, 4, 2))
    rows = feature_map(latents, jnp.zeros(5, int), keys(5))
    assert set(rows) == {"tokens/block_01@0.1", "tokens/block_01@0.4"}
    assert all(r.shape == (5, 32) for r in rows.values())
    # Row by row, by its own key: another batch does not change it.
    part = feature_map(latents[2:4], jnp.zeros(2, int), keys(5)[2:4])
    for name, value in part.items():
        np.testing.assert_allclose(value, rows[name][2:4], atol=1e-5)


def test_maps_share_one_decoding_and_no_name():
    codec = identity_codec(3)
    calls = []

    class Counted(type(codec)):
        def decode(self, z):
            calls.append(1)
            return super().decode(z)

    counted = Counted(params={"p": jnp.ones(1)}, model=None, scale=1.0, shift=0.0, channels=3)
    maps = [mmd.Decoded(codec=counted, extractor=extractor(), name=n) for n in ("a", "b")]
    latents = jnp.zeros((2, 16, 16, 3))
    rows = mmd.all_features([*maps, mmd.RawLatents()], latents, None, keys(2))
    assert len(calls) == 1 and set(rows) == {"a/features", "b/features", "raw"}
    with pytest.raises(UserError, match="two maps"):
        mmd.all_features([mmd.RawLatents(), mmd.RawLatents()], latents, None, keys(2))


def test_maps_that_are_arguments_of_a_program_share_their_decoding_too():
    calls = []

    @flax.struct.dataclass
    class Counted(type(identity_codec(3))):
        def decode(self, z):
            calls.append(1)
            return super().decode(z)

    codec = Counted(params={"p": jnp.ones(1)}, model=None, scale=1.0, shift=0.0, channels=3)
    maps = [mmd.Decoded(codec=codec, extractor=extractor(), name=n) for n in ("a", "b")]
    arrays, maps_of = shared_leaves([*maps, mmd.RawLatents()])
    latents = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    found = jax.jit(lambda a: mmd.all_features(maps_of(a), latents, None, keys(2)))(arrays)
    assert len(calls) == 1
    expected = mmd.all_features([*maps, mmd.RawLatents()], latents, None, keys(2))
    for name, rows in expected.items():
        np.testing.assert_allclose(found[name], rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", ["tf1", "torch", "clean"])
def test_what_is_differentiated_sees_every_pixel_and_slopes_at_white(rule):
    judging = extractor(size=16, rule=rule)
    found = to_differentiate(judging)
    white = jnp.full((1, 48, 48, 3), 255.0)

    def slopes(network):
        weights = jax.random.normal(jax.random.key(1), (1, 16, 16, 3))
        return jax.grad(lambda x: (network.prepare(x) * weights).sum())(white)

    # Only a pixel at a zero of the bicubic kernel may go unseen.
    assert (np.abs(slopes(found)) > 0).all((0, 3)).mean() > 0.95
    assert (np.abs(slopes(judging)) > 0.8 * np.abs(slopes(found))).all((0, 3)).mean() < 0.6
    assert to_differentiate(extractor()).resize == "none"  # of networks that take no other size


def test_a_latent_encoder_learns_classes_and_to_fill_in():
    """On the digits themselves: better than chance in seconds, and masked cells below variance."""
    source = open_images("digits", split="train", image_size=8, channels=1)

    def read(indices):
        batch = source.batch(indices)
        return {"x": batch["image"].astype(np.float32) / 127.5 - 1,
                "label": batch["label"].astype(np.int32)}  # fmt: skip

    model, params, _ = mmd.train_encoder(
        read, len(source), num_classes=10, steps=60, width=16, levels=2, progress=False
    )
    batch = read(np.arange(400))
    logits = model.apply({"params": params}, jnp.asarray(batch["x"]))["logits"]
    assert (np.asarray(logits).argmax(-1) == batch["label"]).mean() > 0.8
    _, _, filled = mmd.train_encoder(
        read, len(source), objective="mask", steps=60, width=16, levels=2, progress=False
    )
    assert filled < 0.8 * batch["x"].var()
    model, robust, _ = mmd.train_encoder(
        read, len(source), num_classes=10, noise=1.0, steps=60, width=16, levels=2, progress=False
    )
    noised = batch["x"] + np.random.default_rng(0).normal(size=batch["x"].shape)

    def right(weights):
        logits = model.apply({"params": weights}, jnp.asarray(noised, jnp.float32))["logits"]
        return (np.asarray(logits).argmax(-1) == batch["label"]).mean()

    assert right(robust) > right(params) + 0.03
    for objective, words in (("classify", "needs classes"), ("best", "none of classify")):
        with pytest.raises(UserError, match=words):
            mmd.train_encoder(read, len(source), objective=objective)


@pytest.mark.parametrize("plain", [False, True])
def test_an_encoder_survives_its_file(tmp_path, plain):
    model = mmd.FeatureEncoder(num_classes=3, width=8, levels=2, plain=plain)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    params = model.init(jax.random.key(1), x)["params"]
    mmd.save_encoder(tmp_path / "e.safetensors", model, params, seed=4)
    found, loaded, made_of = mmd.load_encoder(tmp_path / "e.safetensors")
    assert found == model and made_of == {"seed": 4}
    for entry, value in model.apply({"params": params}, x).items():
        np.testing.assert_array_equal(found.apply({"params": loaded}, x)[entry], value)


@pytest.mark.parametrize("side", [8, 7, 28])
def test_a_plain_encoder_keeps_the_largest_of_each_square_and_of_an_odd_edge(side):
    model = mmd.FeatureEncoder(width=4, levels=1, hidden=8, plain=True)
    x = jax.random.normal(jax.random.key(0), (2, side, side, 3))
    params = model.init(jax.random.key(1), x)["params"]

    def convolved(x, name):
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        axes = ("NHWC", "HWIO", "NHWC")
        return (
            jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=axes) + bias
        )

    maps = nn.relu(convolved(nn.relu(convolved(x, "stem")), "conv0"))
    maps = nn.max_pool(convolved(maps, "mix0"), (2, 2), (2, 2), padding="SAME")
    found = model.apply({"params": params}, x)
    np.testing.assert_allclose(found["maps"][:, :4], maps.mean((1, 2)), atol=1e-5)
    np.testing.assert_allclose(found["maps"][:, 4:], maps.std((1, 2)), atol=1e-3)
    hidden = params["hidden"]
    flat = nn.relu(maps).reshape(2, -1) @ hidden["kernel"] + hidden["bias"]
    np.testing.assert_allclose(found["features"], nn.relu(flat), atol=1e-5)


def test_deviations_over_space_see_grain_that_the_mean_does_not():
    maps = mmd.random_maps(jax.random.key(0), 4)
    smooth = jnp.ones((6, 8, 8, 4)) * jax.random.normal(jax.random.key(1), (6, 1, 1, 4))
    grainy = smooth + 0.5 * jax.random.normal(jax.random.key(2), smooth.shape)
    a, b = (maps(z, None, None)["random"] for z in (smooth, grainy))
    assert (b - a)[:, 64:128].mean() > 0.1
