"""The optional terms of the autoencoder's loss: LPIPS against PyTorch, and the PatchGAN recipe."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

from lfm_jax import vae
from lfm_jax.errors import UserError
from lfm_jax.vae import discriminator, perceptual
from lfm_jax.vae.weights import parameter_shapes


def fresh(model, seed=0):
    """Random parameters without compiling an initializer; no bias is zero and no scale is one."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            return (rng.normal(size=leaf.shape) / np.sqrt(leaf.size / leaf.shape[-1])).astype("f4")
        return (0.1 * rng.normal(size=leaf.shape) + (path[-1].key == "scale")).astype("f4")

    return jax.tree_util.tree_map_with_path(draw, parameter_shapes(model))


@pytest.fixture(scope="module")
def vgg():
    """Random VGG16 and LPIPS weights under their published names."""
    rng = np.random.default_rng(0)
    tensors, linear, channels = {}, {}, 3
    for i, (stage, width) in enumerate(zip(perceptual.STAGES, perceptual.WIDTHS, strict=True)):
        for index in stage:
            scale = np.sqrt(2 / (9 * channels))
            shape = (width, channels, 3, 3)
            tensors[f"features.{index}.weight"] = (scale * rng.normal(size=shape)).astype("f4")
            tensors[f"features.{index}.bias"] = (0.1 * rng.normal(size=width)).astype("f4")
            channels = width
        linear[f"lin{i}.model.1.weight"] = rng.uniform(size=(1, width, 1, 1)).astype("f4")
    return tensors, linear


def test_lpips_is_its_definition_in_torch(vgg, tmp_path):
    torch = pytest.importorskip("torch")
    tensors, linear = vgg
    save_file(tensors | {"classifier.0.bias": np.zeros(3, "f4")}, tmp_path / "vgg16.safetensors")
    save_file(linear, tmp_path / "lin.safetensors")
    params = vae.load_lpips(tmp_path / "vgg16.safetensors", tmp_path / "lin.safetensors")
    x, y = np.random.default_rng(1).uniform(-1, 1, (2, 2, 32, 48, 3)).astype("f4")

    def features(image):
        image = torch.tensor(image).permute(0, 3, 1, 2)
        constants = (perceptual.SHIFT, perceptual.SCALE)
        shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in constants)
        h, out = (image - shift) / scale, []
        for i, stage in enumerate(perceptual.STAGES):
            h = torch.nn.functional.max_pool2d(h, 2) if i else h
            for index in stage:
                names = (f"features.{index}.{n}" for n in ("weight", "bias"))
                weight, bias = (torch.tensor(tensors[name]) for name in names)
                h = torch.relu(torch.nn.functional.conv2d(h, weight, bias, padding=1))
            out.append(torch.nn.functional.normalize(h, dim=1))
        return out

    expected = 0
    for i, (a, b) in enumerate(zip(features(x), features(y), strict=True)):
        weight = torch.tensor(linear[f"lin{i}.model.1.weight"])
        expected = expected + ((a - b) ** 2 * weight).sum(1).mean((1, 2))
    np.testing.assert_allclose(jax.jit(vae.lpips(params))(x, y), expected.numpy(), rtol=1e-4)
    # Two fused evaluations of the same image may round differently.
    assert float(jnp.abs(jax.jit(vae.lpips(params))(x, x)).max()) < 1e-12


def test_lpips_names_what_is_wrong(vgg, tmp_path):
    tensors, _ = vgg
    name = "features.5.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=rf"tensor {name} is missing"):
        vae.load_lpips(tmp_path / "a.safetensors")
    save_file(tensors | {name: tensors[name].swapaxes(0, 1).copy()}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=rf"tensor {name} has shape \(64, 128, 3, 3\), expected"):
        vae.load_lpips(tmp_path / "b.safetensors")


def test_discriminator_has_the_published_size():
    critic = vae.PatchDiscriminator()
    x = jnp.zeros((1, 256, 256, 3))
    shapes = jax.eval_shape(critic.init, jax.random.key(0), x)["params"]
    # PatchGAN of 64 features and 3 layers, with bias-free convolutions before the norms.
    assert sum(v.size for v in jax.tree.leaves(shapes)) == 2_765_633
    out = jax.eval_shape(lambda p, x: critic.apply({"params": p}, x), shapes, x)
    assert out.shape == (1, 30, 30, 1)


@pytest.fixture(scope="module")
def players():
    model = vae.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_groups=4,
        mid_attention=False,
    )
    critic = vae.PatchDiscriminator(features=8, layers=1)
    params = {
        "autoencoder": fresh(model),
        "discriminator": jax.jit(critic.init)(jax.random.key(1), jnp.zeros((1, 8, 8, 1)))["params"],
    }
    images = np.round(load_digits().images[:16, :, :, None] * (255 / 16)).astype(np.uint8)
    return model, critic, params, images


def gradients(loss, params, images, first):
    batch = {"image": images, "position": np.arange(first, first + 16, dtype=np.uint32)}
    (_, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        params, batch, jax.random.key(2)
    )
    return metrics, grads


def test_the_adversarial_terms_wait_for_their_step(players):
    model, critic, params, images = players
    options = {"kl_weight": 1e-3, "reconstruction": "l1"}
    loss = vae.adversarial_loss(model, critic, start_step=3, **options)
    metrics, grads = gradients(loss, params, images, first=32)  # step 2
    assert metrics["adversarial_weight"] == 0
    assert all(not jnp.any(g) for g in jax.tree.leaves(grads["discriminator"]))
    alone = vae.autoencoder_loss(model, **options)
    _, expected = gradients(alone, params["autoencoder"], images, first=32)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads["autoencoder"], expected
    )
    metrics, grads = gradients(loss, params, images, first=48)  # step 3
    assert metrics["adversarial_weight"] > 0
    assert any(jnp.any(g) for g in jax.tree.leaves(grads["discriminator"]))


def test_neither_player_helps_the_other(players):
    model, critic, params, images = players
    loss = vae.adversarial_loss(model, critic, start_step=0, weight=1.0, adaptive=False)
    _, grads = gradients(loss, params, images, first=0)
    x = vae.from_uint8(images)
    noise_key = jax.random.key(2)
    position = jnp.arange(16, dtype=jnp.uint32)
    draw = jax.jit(lambda p: vae.loss.reconstruct(model, p, x, noise_key, position))
    y, _, _ = draw(params["autoencoder"])

    def critic_loss(p):
        return discriminator.hinge(*(critic.apply({"params": p}, v) for v in (x, y)))

    expected = jax.jit(jax.grad(critic_loss))(params["discriminator"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads["discriminator"], expected
    )


def test_adaptive_weight_balances_the_last_layer(players):
    model, critic, params, images = players
    loss = vae.adversarial_loss(model, critic, start_step=0, weight=0.5, reconstruction="l2")
    metrics, _ = gradients(loss, params, images, first=0)
    x, coder = vae.from_uint8(images), params["autoencoder"]
    position = jnp.arange(16, dtype=jnp.uint32)
    draw = jax.jit(lambda p: vae.loss.reconstruct(model, p, x, jax.random.key(2), position))
    _, _, z = draw(coder)

    def norm(function):
        def of_all(p):
            return function(model.apply({"params": p}, z, method="decode"))

        return jnp.linalg.norm(jax.jit(jax.grad(of_all))(coder)["decoder"]["conv_out"]["kernel"])

    likeness = norm(lambda y: jnp.mean(jnp.square(x - y)))
    fooled = norm(lambda y: jnp.mean(critic.apply({"params": params["discriminator"]}, y)))
    expected = 0.5 * likeness / (fooled + 1e-4)
    np.testing.assert_allclose(metrics["adversarial_weight"], expected, rtol=1e-3)


def test_a_perceptual_term_is_added_and_off_by_default(players):
    model, _, params, images = players
    batch = {"image": images, "position": np.arange(16, dtype=np.uint32)}
    args = params["autoencoder"], batch, jax.random.key(0)
    plain, metrics = jax.jit(vae.autoencoder_loss(model))(*args)
    assert "perceptual" not in metrics
    term = vae.autoencoder_loss(
        model, perceptual=lambda x, y: jnp.full(len(x), 0.25), perceptual_weight=2.0
    )
    np.testing.assert_allclose(jax.jit(term)(*args)[0] - plain, 0.5, atol=1e-5)
