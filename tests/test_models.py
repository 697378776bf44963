"""The U-Nets: published sizes, forward parity, taps, dtypes, conditions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_dit import noisy, run, shapes_of

from lfm_jax.errors import UserError
from lfm_jax.models import Cond, Replace, count_params, create_model, forward_macs, init_params

LATENT = (32, 32, 4)
FACTOR = {"attention_reading": "factor"}
SMALL = {
    "adm": {"channels": 32, "mult": (1, 2), "blocks": 1, "attention_resolutions": (4,)},
    "adm_context": {"channels": 32, "mult": (1, 2), "blocks": 1, "attention_resolutions": (4,)},
    "unet": {"channels": 32, "mult": (1, 2), "blocks": 1, "attention_resolutions": (4,)},
    "unet_context": {"channels": 32, "mult": (1, 2), "blocks": 1, "transformer_depth": 1},
    "ddpm++": {"channels": 32, "mult": (1, 2), "blocks": 1, "attention_resolutions": (4,)},
    "ncsn++": {"channels": 32, "mult": (1, 2), "blocks": 1, "attention_resolutions": (4,)},
    "ddpm": {"channels": 32, "mult": (1, 2), "blocks": 1, "attention_resolutions": (4,)},
}
SMALL["adm"]["head_channels"] = SMALL["adm_context"]["head_channels"] = 32
CONTEXT = {"adm_context": 1024, "unet_context": 512}


def small(name, **overrides):
    return create_model(name, **{**SMALL[name], **overrides})


def example(name, batch=2):
    x = jax.random.normal(jax.random.key(1), (batch, 8, 8, 4))
    tokens = jax.random.normal(jax.random.key(2), (batch, 5, CONTEXT.get(name, 1)))
    return x, jnp.linspace(0.2, 0.8, batch), Cond(tokens=tokens if name in CONTEXT else None)


@pytest.fixture(scope="module")
def params_of():
    kept = {}

    def make(name):
        if name not in kept:
            kept[name] = noisy(shapes_of(small(name), (8, 8, 4), example(name)[2]))
        return kept[name]

    return make


# name, latent, input channels, millions, giga MACs, fields
ADM1024 = {"mult": (1, 1, 2, 2, 4, 4), "attention_resolutions": (16, 8)}
GUIDED = {
    "attention_resolutions": (32, 16, 8),
    "head_channels": 64,
    "resblock_updown": True,
    "num_classes": 1000,
}
COUNTS = [
    ("adm", LATENT, 0, "406.4", "36.5", {}),
    ("adm", LATENT, 0, "407.4", None, {"num_classes": 1000}),
    ("adm", (128, 128, 4), 0, "531.8", "278", ADM1024),
    ("unet", LATENT, 0, "153.1", "23.0", {**FACTOR, "mult": (1, 2, 2, 2)}),
    ("unet", (64, 64, 4), 0, "352.2", "94.9", {**FACTOR, "mult": (1, 2, 2, 2, 4)}),
    ("unet", LATENT, 0, "356.1", "29.3", FACTOR),
    ("unet", LATENT, 9, "356.08", None, FACTOR),
    ("unet", LATENT, 8, "356.07", None, FACTOR),
    ("unet_context", LATENT, 0, "879.6", None, FACTOR),
    # ADM's own table, classes included: ImageNet 64, 128, 256 and 512.
    ("unet", (64, 64, 3), 0, "296", None, {**GUIDED, "channels": 192, "blocks": 3}),
    (
        "unet",
        (128, 128, 3),
        0,
        "422",
        None,
        {**GUIDED, "mult": (1, 1, 2, 3, 4), "head_channels": 0},
    ),
    ("unet", (256, 256, 3), 0, "554", None, {**GUIDED, "mult": (1, 1, 2, 2, 4, 4)}),
    ("unet", (512, 512, 3), 0, "559", None, {**GUIDED, "mult": (0.5, 1, 1, 2, 2, 4, 4)}),
    # DDPM's own table: CIFAR-10 35.7 M, LSUN and CelebA-HQ 256 114 M; CelebA 64 of DDIM 78.7 M.
    ("ddpm", (32, 32, 3), 0, "35.7", None, {"mult": (1, 2, 2, 2)}),
    ("ddpm", (64, 64, 3), 0, "78.7", None, {"mult": (1, 2, 2, 2, 4)}),
    ("ddpm", (256, 256, 3), 0, "114", None, {}),
]


def digits_of(value, published):
    return f"{value:.{len(published.partition('.')[2])}f}"


def count_of(name, shape, in_channels, published, _, options):
    """(name, millions found, millions published), both to the digits that are published."""
    model = create_model(name, **options)
    spatial = jnp.zeros((1, *shape[:2], in_channels - shape[2])) if in_channels else None
    tokens = jnp.zeros((1, 92, 512)) if "context" in name else None
    shapes = jax.eval_shape(
        lambda key: init_params(model, key, shape, Cond(spatial=spatial, tokens=tokens)),
        jax.random.key(0),
    )
    return f"{name} {shape}", digits_of(count_params(shapes) / 1e6, published), published


@pytest.mark.parametrize(
    "row",
    [
        # 33 transformer blocks take a while to trace.
        pytest.param(row, marks=pytest.mark.slow if row[0] == "unet_context" else ())
        for row in COUNTS
    ],
)
def test_sizes_of_the_published_networks(row):
    _, found, published = count_of(*row)
    assert found == published
    name, shape, in_channels, _, giga, options = row
    if giga:
        macs = forward_macs(create_model(name, **options), shape, in_channels)
        assert digits_of(macs / 1e9, giga) == giga


@pytest.mark.parametrize("name", SMALL)
def test_taps_read_and_write_the_mid_block(name, params_of):
    model, params = small(name), params_of(name)
    x, t, cond = example(name)
    plain, hidden = run(model, params, x, t, cond, capture=("mid", "down_0", "up_1"))
    assert plain.shape == x.shape and plain.dtype == jnp.float32
    assert hidden["mid"].shape == (2, 4, 4, 64) and hidden["down_0"].shape == (2, 8, 8, 32)

    @jax.jit
    def with_mid(params, value):
        return model.apply({"params": params}, x, t, cond, inject={"mid": Replace(value)})

    np.testing.assert_allclose(with_mid(params, hidden["mid"]), plain, atol=1e-5)
    assert np.abs(with_mid(params, hidden["mid"] + 1) - plain).max() > 1e-3


@pytest.mark.parametrize("name", ["unet"])
def test_remat_and_bf16_change_no_parameter_and_little_else(name, params_of):
    params = params_of(name)
    x, t, cond = example(name)

    def gradient(model):
        loss = lambda p: jnp.mean(jnp.sin(model.apply({"params": p}, x, t, cond)))  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    plain, remat = gradient(small(name)), gradient(small(name, remat="full"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), plain, remat)
    full = run(small(name), params, x, t, cond)
    half = run(small(name, dtype="bfloat16"), params, x, t, cond)
    assert half.dtype == jnp.float32
    assert np.abs(half - full).max() < 0.1 * np.abs(full).max()


def test_taps_switched_off_leave_the_program_alone(params_of):
    model, params = small("unet"), params_of("unet")
    x, t, _ = example("unet")

    def text(**options):
        call = jax.jit(lambda p, x, t: model.apply({"params": p}, x, t, **options))
        return call.lower(params, x, t).as_text()

    assert text() == text(capture=(), inject={}) != text(capture=("mid",))


def test_the_two_readings_of_attention_resolutions():
    """ "16 8" on 32x32: maps of those sides, or factors 8 (and 16, which is not there)."""
    key, options = jax.random.key(0), {"channels": 32, "mult": (1, 1, 1, 1), "blocks": 1}

    def attended(**reading):
        model = create_model("unet", **options, **reading)
        shapes = jax.eval_shape(lambda k: init_params(model, k, LATENT), key)
        return {name for name in shapes if "attention" in name and name.startswith("down")}

    assert attended() == {"down_1_attention0", "down_2_attention0"}
    assert attended(**FACTOR) == {"down_3_attention0"}
    with pytest.raises(UserError, match="factor"):
        attended(attention_reading="ds")


@pytest.mark.parametrize("name", CONTEXT)
def test_context_tokens_steer(name, params_of):
    model, params = small(name), params_of(name)
    x, t, cond = example(name)
    full = run(model, params, x, t, cond)
    other = run(model, params, x, t, cond.replace(tokens=2 * cond.tokens))
    assert np.abs(full - other).max() > 1e-4
    with pytest.raises(UserError, match="tokens"):
        model.apply({"params": params}, x, t)


@pytest.mark.parametrize("name", ["adm", "adm_context", "unet", "ddpm++"])
def test_labels_and_their_null(name):
    model = small(name, num_classes=10)
    x, t, _ = example(name)
    params = noisy(shapes_of(model, (8, 8, 4)))
    one, two, null = (run(model, params, x, t, Cond(label=jnp.full(2, i))) for i in (1, 2, 10))
    assert np.abs(one - two).max() > 1e-4 and np.abs(one - null).max() > 1e-4
    np.testing.assert_array_equal(null, run(model, params, x, t))


def test_classes_and_tokens_at_once_are_refused_where_one_would_go_unseen():
    model = small("adm_context", num_classes=10)
    x, t, cond = example("adm_context")
    with pytest.raises(UserError, match="takes classes or tokens, not both"):
        jax.eval_shape(model.init, jax.random.key(0), x, t, cond.replace(label=jnp.zeros(2, int)))


def test_dropout_acts_only_in_training(params_of):
    model, params = small("ddpm", dropout=0.5), params_of("ddpm")
    x, t, _ = example("ddpm")
    still = run(model, params, x, t)
    np.testing.assert_array_equal(still, run(small("ddpm"), params, x, t))
    first, second = (
        run(model, params, x, t, train=True, rngs={"dropout": jax.random.key(i)}) for i in (0, 1)
    )
    assert np.abs(first - still).max() > 1e-3 and np.abs(first - second).max() > 1e-3


def test_spatial_condition_and_any_sides(params_of):
    cond = Cond(spatial=jax.random.normal(jax.random.key(3), (2, 8, 16, 5)))
    x, t = jax.random.normal(jax.random.key(1), (2, 8, 16, 4)), jnp.array([0.3, 0.6])
    for name in ("adm", "unet", "ncsn++", "ddpm"):
        model = small(name)
        params = noisy(shapes_of(model, (8, 16, 4), cond))
        assert params["conv_in"]["kernel"].shape[2] == 9
        assert run(model, params, x, t, cond).shape == x.shape
        with pytest.raises(UserError, match="7x8"):
            model.apply({"params": params}, x[:, :7, :8], t, Cond(spatial=cond.spatial[:, :7, :8]))


@pytest.mark.parametrize("name", ["ddpm++", "ncsn++"])
def test_song_networks_against_pytorch(name):
    torch = pytest.importorskip("torch")
    import torch_networks as theirs

    from lfm_jax.weights import adm, bindings, files

    song = {
        "ddpm++": {"taps": (1, 1), "fourier": False, "residual": False, "noise_mult": 1},
        "ncsn++": {"taps": (1, 3, 3, 1), "fourier": True, "residual": True, "noise_mult": 2},
    }[name]
    network = theirs.EdmUNet(8, 32, (1, 2), 1, (4,), 4, 4, classes=5, song=song)
    theirs.randomise(network, scale=0.1)
    model = small(name, num_classes=5, time_scale=1.0)
    shapes = jax.eval_shape(lambda k: init_params(model, k, (8, 8, 4)), jax.random.key(0))
    found = [
        *bindings.layer("time_in", "map_layer0", bindings.LINEAR),
        *bindings.layer("time_out", "map_layer1", bindings.LINEAR),
        *bindings.layer("labels", "map_label", bindings.LINEAR),
        *bindings.layer("conv_in", "enc.8x8_conv", bindings.CONV),
        *bindings.norm("norm_out", "out_norm"),
        *bindings.layer("conv_out", "out_conv", bindings.CONV),
    ]
    if song["fourier"]:
        found.append(bindings.Binding(("frequencies",), ("freqs",)))
        found += bindings.layer("down_1_aux", "enc.4x4_aux", bindings.CONV)
    places = {
        "down_0_block0": "enc.8x8_block0",
        "down_1_halve": "enc.4x4_down",
        "down_1_block0": "enc.4x4_block0",
        "mid_block0": "dec.4x4_in0",
        "mid_block1": "dec.4x4_in1",
        "up_1_block0": "dec.4x4_block0",
        "up_1_block1": "dec.4x4_block1",
        "up_0_double": "dec.8x8_up",
        "up_0_block0": "dec.8x8_block0",
        "up_0_block1": "dec.8x8_block1",
    }
    for path, theirs_name in places.items():
        found += adm._block(path, theirs_name, shapes[path], 64)
    state = {k: v.numpy() for k, v in network.state_dict().items() if "resample" not in k}
    file = files.TensorFile(path="", tensors=state, sha256="", weights="raw")
    params = bindings.to_params(file, found, shapes)

    x, t, _ = example(name, batch=3)
    label = jnp.array([0, 4, 2])
    with torch.no_grad():
        expected = network(
            torch.from_numpy(np.asarray(x).transpose(0, 3, 1, 2).copy()),
            torch.tensor(np.asarray(t)),
            torch.tensor(np.asarray(label)).long(),
        )
    expected = expected.numpy().transpose(0, 2, 3, 1)
    ours = run(model, params, x, t, Cond(label=label))
    assert math.isfinite(expected.sum())
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())
