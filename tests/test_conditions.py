"""Conditions: their input to the network, their training, guidance, the baseline without."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkout import ROOT

from lfm_jax import rng
from lfm_jax.conditions import (
    ENCODER,
    Inpainting,
    Layout,
    MapEncoder,
    Semantic,
    composite,
    corner_tokens,
    encoded,
    figures,
    guided,
    init_conditioned,
    inpaint_by_replacement,
    input_sizes,
    latent_hole,
    training_condition,
    widen,
)
from lfm_jax.conditions.encoders import VOCABULARY
from lfm_jax.config import default_config, overrides
from lfm_jax.config_check import check_config
from lfm_jax.errors import UserError
from lfm_jax.flow import NetworkVelocity, flow_matching_loss, sample
from lfm_jax.jobs import build, train
from lfm_jax.models import Cond, count_params, create_model, forward_macs, init_params
from lfm_jax.sharding import make_mesh
from lfm_jax.state import create_state, make_step
from lfm_jax.vae import from_uint8, identity_codec

KEY = jax.random.key(0)
DIT = {"hidden": 32, "depth": 2, "heads": 2, "patch": 2}


def _batch(n=8, seed=0, **more):
    random = np.random.default_rng(seed)
    moments = random.normal(size=(n, 4, 4, 4)).astype(np.float16)
    label = random.integers(0, 3, n).astype(np.int32)
    return {"moments": moments, "label": label, "position": np.arange(n, dtype=np.uint32), **more}


def _inpainting(**more):
    fields = {"masks": "lama", "image_size": 8, "latent_shape": (8, 8, 1), "scale": 2.0}
    return Inpainting(**{**fields, "shift": 0.5, "variants": 3, **more})


def _semantic(**more):
    return Semantic(**{"num_classes": 3, "image_size": 16, "factor": 4, "channels": 5, **more})


def _layout(**more):
    return Layout(**{"num_classes": 10, "max_objects": 4, "width": 16, "heads": 2, **more})


def _digits(n=6):
    from lfm_jax.data import open_images

    source = open_images("digits", channels=1)
    return source.batch(range(n))["image"]


# ---- inpainting


def test_what_is_stored_is_the_latent_of_the_masked_image():
    condition, images = _inpainting(), _digits()
    arrays = condition.prepare(images, np.arange(6))
    arrays |= condition.encode(identity_codec(1), from_uint8(images), arrays)
    for name, (shape, _) in condition.stored().items():
        assert arrays[name].shape == (6, *shape)
    holes = np.asarray(condition.unpacked(arrays["mask"]))
    wanted = np.where(holes[..., None], -1.0, np.asarray(from_uint8(images))[:, None])
    np.testing.assert_allclose(arrays["masked"], wanted, atol=1e-6)


@pytest.mark.parametrize("kind, channels", [("nearest", 1), ("pixels", 4)])
def test_the_networks_input_holds_masked_latent_and_mask(kind, channels):
    condition = _inpainting(latent_shape=(4, 4, 2), mask_channels=kind, variants=1)
    hole = np.random.default_rng(0).random((2, 1, 8, 8)) < 0.5
    masked = np.random.default_rng(1).normal(size=(2, 1, 4, 4, 2))
    packed = np.packbits(hole.reshape(2, 1, -1), axis=-1)
    picked = condition.first({"mask": packed, "masked": masked})
    cond = condition.apply(None, picked, jnp.array([True, False]))
    assert cond.spatial.shape == (2, 4, 4, 2 + channels)
    np.testing.assert_allclose(cond.spatial[0, ..., :2], (masked[0, 0] - 0.5) * 2.0, rtol=1e-6)
    signs = np.where(hole[0, 0], 1.0, -1.0)
    if kind == "nearest":
        np.testing.assert_array_equal(cond.spatial[0, ..., 2], signs[::2, ::2])
    else:  # the four pixels of a latent position, row by row
        np.testing.assert_array_equal(cond.spatial[0, 1, 2, 2:], signs[2:4, 4:6].ravel())
    # Nothing known: no latent, and a hole everywhere.
    assert not cond.spatial[1, ..., :2].any() and (cond.spatial[1, ..., 2:] == 1).all()


def test_a_visit_picks_one_mask_and_its_own_latent():
    condition = _inpainting()
    number = np.arange(3, dtype=np.uint8)
    batch = {
        "mask": np.broadcast_to(number[None, :, None], (64, 3, 8)),
        "masked": np.broadcast_to(number[None, :, None, None, None], (64, 3, 8, 8, 1)),
    }
    keys = rng.stream_keys(KEY, rng.Stream.CONDITION, jnp.arange(64))
    picked = condition.pick(batch, keys)
    np.testing.assert_array_equal(picked["mask"][:, 0], picked["masked"][:, 0, 0, 0])
    assert set(np.unique(picked["mask"])) == {0, 1, 2}
    half = condition.pick(jax.tree.map(lambda a: a[32:], batch), keys[32:])
    np.testing.assert_array_equal(half["mask"], picked["mask"][32:])


def test_known_pixels_are_kept_bit_for_bit():
    truth, made = _digits(4), 255 - _digits(4)
    hole = np.zeros((4, 8, 8), bool)
    hole[:, 2:5] = True
    whole = composite(made, truth, hole)
    np.testing.assert_array_equal(whole[~hole], truth[~hole])
    np.testing.assert_array_equal(whole[hole], made[hole])


# ---- maps and layouts


def test_the_papers_rescaler_is_bilinear_halving_and_one_product():
    torch = pytest.importorskip("torch")
    maps = np.random.default_rng(0).integers(0, 3, (2, 16, 16)).astype(np.uint8)
    encoder = MapEncoder(num_classes=3, factor=4, channels=5, kind="average")
    keep = jnp.ones(2, bool)
    params = encoder.init(KEY, {"map": maps}, keep)["params"]
    found = encoder.apply({"params": params}, {"map": maps}, keep)
    x = torch.nn.functional.one_hot(torch.tensor(maps).long(), 3).permute(0, 3, 1, 2).float()
    for _ in range(2):
        x = torch.nn.functional.interpolate(x, scale_factor=0.5, mode="bilinear")
    kernel = torch.tensor(np.asarray(params["out"]["kernel"]).T.copy())[:, :, None, None]
    wanted = torch.nn.functional.conv2d(x, kernel).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_words_of_the_corner_scheme():
    boxes = jnp.array([[[0.0, 0.0, 1.0, 1.0], [0.5, 0.25, 0.75, 0.5]] + [[0.0] * 4] * 28])
    classes = jnp.array([[7, 3] + [-1] * 28])
    words = corner_tokens(boxes, classes)
    assert words.shape == (1, 92)
    assert words[0, :6].tolist() == [7, 0, 8099, 3, 22 * 90 + 45, 45 * 90 + 67]
    assert (words[0, 6:90] == VOCABULARY - 1).all() and words[0, 90:].tolist() == [0, 8099]


def test_the_order_of_objects_means_nothing():
    condition = _layout()
    random = np.random.default_rng(0)
    picked = {
        "boxes": random.random((2, 4, 4)).astype(np.float32),
        "classes": np.array([[1, 2, 3, -1], [4, -1, -1, -1]], np.int32),
    }
    model = create_model("DiT", context_dim=16, **DIT)
    params = _random_params(condition, model, (4, 4, 2))
    order = [2, 0, 3, 1]
    other = {"boxes": picked["boxes"][:, order], "classes": picked["classes"][:, order]}
    x, t, keep = jax.random.normal(KEY, (2, 4, 4, 2)), jnp.array([0.3, 0.7]), jnp.ones(2, bool)
    first, second = (
        model.apply({"params": params}, x, t, encoded(condition, params, p, keep))
        for p in (picked, other)
    )
    np.testing.assert_allclose(first, second, atol=1e-5)
    changed = picked | {"classes": np.array([[1, 2, 4, -1], [4, -1, -1, -1]], np.int32)}
    third = model.apply({"params": params}, x, t, encoded(condition, params, changed, keep))
    assert np.abs(third - first)[0].max() > 1e-4
    np.testing.assert_allclose(third[1], first[1], atol=1e-6)


def test_a_shuffle_keeps_boxes_with_their_classes():
    condition = _layout()
    batch = {
        "boxes": np.broadcast_to(np.arange(4.0)[None, :, None], (32, 4, 4)),
        "classes": np.broadcast_to(np.arange(4), (32, 4)),
    }
    keys = rng.stream_keys(KEY, rng.Stream.CONDITION, jnp.arange(32))
    picked = condition.pick(batch, keys)
    np.testing.assert_array_equal(picked["boxes"][..., 0], picked["classes"])
    assert len({tuple(row) for row in np.asarray(picked["classes"]).tolist()}) > 8


# ---- training


def _random_params(condition, model, latent_shape):
    """Parameters without zeros, so that every path through the network counts."""
    params = init_conditioned(condition, model, KEY, latent_shape)
    leaves, structure = jax.tree.flatten(params)
    random = np.random.default_rng(0)
    return jax.tree.unflatten(
        structure, [leaf + 0.1 * random.normal(size=leaf.shape).astype("f") for leaf in leaves]
    )


def test_conditions_and_labels_are_dropped_in_all_combinations():
    condition = _semantic(drop=0.3)
    model = create_model("DiT", num_classes=3, **DIT)
    params = init_conditioned(condition, model, KEY, (4, 4, 2))
    maps = np.ones((4000, 16, 16), np.uint8)
    cond = jax.jit(training_condition(condition, num_classes=3, label_drop=0.2))
    result = cond(params, _batch(4000, map=maps), KEY)
    null = condition.apply(params[ENCODER], {"map": maps[:1]}, jnp.zeros(1, bool)).spatial
    kept = np.abs(np.asarray(result.spatial - null)).max((1, 2, 3)) > 1e-6
    without = np.asarray(result.label) == 3
    assert abs(kept.mean() - 0.7) < 0.03
    assert abs(without[kept].mean() - 0.2) < 0.03
    assert abs(without[~kept].mean() - 0.6) < 0.05  # 1/2 with the condition, 0.2 of the others
    # The same by position, whatever the batch.
    part = jax.tree.map(lambda a: a[100:200], _batch(4000, map=maps))
    again = cond(params, part, KEY)
    np.testing.assert_array_equal(again.label, result.label[100:200])
    np.testing.assert_allclose(again.spatial, result.spatial[100:200], atol=1e-6)


@pytest.mark.parametrize("kind", ["semantic", "layout"])
def test_the_encoder_moves_in_training(kind):
    if kind == "semantic":
        condition, model = _semantic(drop=0.1), create_model("DiT", **DIT)
        arrays = {"map": np.random.default_rng(0).integers(0, 3, (8, 16, 16)).astype(np.uint8)}
    else:
        condition, model = _layout(drop=0.1), create_model("DiT", context_dim=16, **DIT)
        boxes = np.random.default_rng(0).random((8, 4, 4)).astype(np.float32)
        classes = np.random.default_rng(1).integers(-1, 10, (8, 4)).astype(np.int32)
        arrays = {"boxes": boxes, "classes": classes}
    loss = flow_matching_loss(model, scale=1.0, condition=training_condition(condition))
    tx, mesh = optax.adam(1e-2), make_mesh()
    state = create_state(
        lambda: init_conditioned(condition, model, KEY, (4, 4, 2)), tx, mesh, ema=True
    )
    before = jax.device_get(state.params[ENCODER])
    step = make_step(loss, tx, KEY, ema_decay=0.9)
    for _ in range(5):  # output layers start at zero: the encoder is reached after a few
        state, metrics = step(state, _batch() | arrays)
    assert metrics["finite"] == 1
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, state.params[ENCODER])
    kernels = [v for k, v in jax.tree.leaves_with_path(moved) if "kernel" in str(k)]
    assert kernels and min(kernels) > 1e-3, moved
    assert jax.tree.structure(state.ema) == jax.tree.structure(state.params)


@pytest.mark.parametrize("name", ["DiT", "unet"])
def test_a_widened_network_starts_as_the_old_one(name):
    fields = DIT if name == "DiT" else {"channels": 32, "mult": (1, 2), "blocks": 1}
    model = create_model(name, **fields)
    condition = _inpainting(latent_shape=(4, 4, 2), mask_channels="pixels", variants=1)
    old = init_params(model, KEY, (4, 4, 2))
    random = np.random.default_rng(0)
    old = jax.tree.map(lambda a: np.asarray(a) + 0.1 * random.normal(size=a.shape).astype("f"), old)
    fresh = init_conditioned(condition, model, jax.random.key(1), (4, 4, 2))
    wide = widen(old, fresh, patch=2)
    assert jax.tree.map(np.shape, wide) == jax.tree.map(np.shape, fresh)
    x, t = jax.random.normal(KEY, (2, 4, 4, 2)), jnp.array([0.2, 0.8])
    cond = Cond(spatial=jax.random.normal(jax.random.key(2), (2, 4, 4, 6)))
    wanted = model.apply({"params": old}, x, t)
    np.testing.assert_allclose(model.apply({"params": wide}, x, t, cond), wanted, atol=2e-5)


def test_a_run_from_an_unconditional_one_starts_as_it(monkeypatch):
    """A named size's patch stands in no field of the config."""
    config = default_config()
    config.model.name, config.model.depth, config.data.num_classes = "DiT-S/2", 1, 0
    config.condition.kind, config.init = "inpainting", "somewhere"
    model = build.network(config)
    old = jax.tree.map(
        lambda a: np.random.default_rng(0).normal(size=a.shape).astype("f") * 0.1,
        init_params(model, KEY, (4, 4, 2)),
    )
    condition = _inpainting(latent_shape=(4, 4, 2), mask_channels="pixels", variants=1)
    fresh = partial(init_conditioned, condition, model, KEY, (4, 4, 2))
    state = create_state(fresh, optax.sgd(0.1), make_mesh(devices=jax.devices()[:1]), ema=False)
    monkeypatch.setattr(train.origin, "initial_params", lambda init: old)
    state, _ = train._start_from(config, state)
    x, t = jax.random.normal(KEY, (2, 4, 4, 2)), jnp.array([0.2, 0.8])
    cond = Cond(spatial=jax.random.normal(jax.random.key(2), (2, 4, 4, 6)))
    wanted = model.apply({"params": old}, x, t)
    np.testing.assert_allclose(model.apply({"params": state.params}, x, t, cond), wanted, atol=2e-4)


def test_input_sizes_tell_the_cost():
    model = create_model("DiT", **DIT)
    sizes = input_sizes(_semantic(), (4, 4, 2))
    assert sizes == {"in_channels": 7}
    assert forward_macs(model, (4, 4, 2), **sizes) - forward_macs(model, (4, 4, 2)) == 4 * 20 * 32
    assert input_sizes(_layout(), (4, 4, 2)) == {"tokens": (4, 16)}


# ---- guidance


def test_guidance_by_condition_and_class_is_the_sum_of_its_terms():
    condition, model = _semantic(), create_model("DiT", num_classes=3, **DIT)
    params = _random_params(condition, model, (4, 4, 2))
    picked = {"map": np.random.default_rng(0).integers(0, 3, (2, 16, 16)).astype(np.uint8)}
    full = encoded(condition, params, picked, jnp.ones(2, bool)).replace(label=jnp.array([0, 2]))
    null = encoded(condition, params, picked, jnp.zeros(2, bool))
    velocity = NetworkVelocity(params=params, cond=full, model=model)
    x, t = jax.random.normal(KEY, (2, 4, 4, 2)), jnp.array([0.3, 0.6])

    def at(cond, label):
        return velocity.replace(cond=cond.replace(label=jnp.asarray(label)))(x, t)

    none, kept, both = at(null, [3, 3]), at(full, [3, 3]), at(full, [0, 2])

    def made(**scales):
        return guided(velocity, null, num_classes=3, **scales)

    same = made(condition_scale=1, label_scale=1)
    assert same.network_calls == 1
    np.testing.assert_allclose(same(x, t), both, atol=1e-6)
    for wc, wy, calls in [(2.0, 3.0, 3), (1, 3.0, 2), (2.0, 2.0, 2), (2.0, 1, 3)]:
        found = made(condition_scale=wc, label_scale=wy)
        assert found.network_calls == calls
        wanted = none + wc * (kept - none) + wy * (both - kept)
        np.testing.assert_allclose(found(x, t), wanted, atol=1e-4)
    inside = made(condition_scale=2.0, label_scale=3.0, interval=(0.5, 1.0))(x, t)
    np.testing.assert_allclose(inside[0], both[0], atol=1e-5)
    wanted = none + 2.0 * (kept - none) + 3.0 * (both - kept)
    np.testing.assert_allclose(inside[1], wanted[1], atol=1e-4)
    first = made(condition_scale=2.0, label_scale=3.0, channels=1)(x, t)
    np.testing.assert_allclose(first[..., 1], both[..., 1], atol=1e-5)
    pulled = made(condition_scale=2.0, label_scale=3.0, rescale=0.4)(x, t)
    axes = (1, 2, 3)
    ratio = both.std(axes, keepdims=True) / wanted.std(axes, keepdims=True)
    np.testing.assert_allclose(pulled, (0.4 * ratio + 0.6) * wanted, atol=1e-4)
    with pytest.raises(UserError, match="condition_guidance"):
        made(condition_scale=-1.0)


# ---- the baseline without training


@jax.tree_util.register_static
class _Gaussian:
    """The exact velocity of pairs (a, b) of unit variance and correlation 0.8."""

    t_max, network_calls = 1.0, 1
    covariance = np.array([[1.0, 0.8], [0.8, 1.0]])

    def __call__(self, x, t):
        eye, t = np.eye(2), t[:, None, None]
        top = t * eye - (1 - t) * self.covariance
        bottom = (1 - t) ** 2 * self.covariance + t**2 * eye
        matrix = top @ jnp.linalg.inv(bottom)
        return jnp.einsum("bij,bj->bi", matrix, x.reshape(-1, 2)).reshape(x.shape)


@pytest.mark.parametrize("resample, low, high", [(1, 0.2, 0.62), (8, 0.68, 0.9)])
def test_replacement_approaches_the_conditional_law_by_resampling(resample, low, high):
    n = 4000
    noise = jax.random.normal(KEY, (n, 1, 2, 1))
    known = jnp.zeros((n, 1, 2, 1)).at[:, 0, 0, 0].set(1.5)
    hole = jnp.zeros((n, 1, 2), bool).at[:, 0, 1].set(True)
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(n))
    x, counts = inpaint_by_replacement(
        _Gaussian(), noise, known, hole, keys, num_steps=25, resample=resample
    )
    np.testing.assert_array_equal(x[:, 0, 0, 0], known[:, 0, 0, 0])
    assert counts["nfe"][0] == counts["network_calls"] == 25 * resample
    slope = float(x[:, 0, 1, 0].mean()) / 1.5  # the law says 0.8
    assert low < slope < high
    free, _ = sample(_Gaussian(), noise, num_steps=25)
    assert abs(float(free.mean())) < 0.1


def test_a_latent_position_is_a_hole_with_its_first_pixel():
    hole = np.zeros((1, 8, 8), bool)
    hole[0, 3, 4] = True
    wanted = np.zeros((1, 2, 2), bool)
    wanted[0, 0, 1] = True
    np.testing.assert_array_equal(latent_hole(jnp.asarray(hole), 4), wanted)


# ---- figures


def test_psnr_is_that_of_the_chosen_pixels():
    a = np.full((2, 4, 4, 1), 100, np.uint8)
    b, where = a.copy(), np.zeros((2, 4, 4), bool)
    b[0, 0, 0], where[0, 0, :2] = 110, True
    assert figures.psnr(a, b, where) == pytest.approx(10 * np.log10(255**2 / 50))
    assert figures.psnr(a, b, ~where) == np.inf


def test_class_means_are_read_in_parts_and_never_empty():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (23, 4, 4, 1)).astype(np.uint8)
    labels = random.integers(0, 2, 23)  # of three classes the last has no image

    class Source:
        def __len__(self):
            return len(images)

        def batch(self, indices):
            return {"image": images[indices], "label": labels[indices]}

    means = figures.class_means(Source(), 3, batch_size=5)
    wanted = [images[labels == 0].mean(0), images[labels == 1].mean(0), images.mean(0)]
    np.testing.assert_array_equal(means, np.round(wanted).astype(np.uint8))
    alone = figures.class_means(Source(), 0, batch_size=7)
    np.testing.assert_array_equal(alone[0], np.round(images.mean(0)).astype(np.uint8))


def test_mean_iou_is_scikit_learns():
    from sklearn.metrics import jaccard_score

    random = np.random.default_rng(0)
    a, b = random.integers(0, 4, (2, 3, 8, 8))
    b[a == 2] = 2
    mean, each = figures.mean_iou(a, b, 5)
    wanted = jaccard_score(a.ravel(), b.ravel(), average=None)
    np.testing.assert_allclose(each[:4], wanted)
    assert np.isnan(each[4]) and mean == pytest.approx(wanted.mean())


def test_diversity_is_the_mean_distance_between_samples():
    samples = np.zeros((2, 3, 2, 2, 1), np.uint8)
    samples[:, 1], samples[:, 2] = 10, 30
    assert figures.pairwise_distance(samples) == pytest.approx((10 + 30 + 20) / 3)


# ---- the published sizes


@pytest.mark.parametrize(
    "name, millions, encoder",
    [("inpaint_celebahq", 356.08, 0.0), ("semantic_celebahq", 356.07, 19 * 4 / 1e6)],
)
def test_configs_are_the_published_networks(name, millions, encoder):
    config = _load(name)
    check_config(config)
    fields = overrides(config.model) | {"dtype": "float32"}
    model = create_model(fields.pop("name"), **fields)
    if name == "inpaint_celebahq":
        condition = _inpainting(image_size=256, latent_shape=(32, 32, 4))
    else:
        section = config.condition
        condition = _semantic(
            num_classes=19, image_size=256, factor=8, channels=section.channels,
            kind=section.rescaler,
        )  # fmt: skip
    shapes = jax.eval_shape(lambda: init_conditioned(condition, model, KEY, (32, 32, 4)))
    trained = count_params(shapes.pop(ENCODER, {}))
    assert trained / 1e6 == pytest.approx(encoder, abs=1e-6)
    assert count_params(shapes) / 1e6 == pytest.approx(millions, abs=0.02)


def test_the_coco_config_has_the_original_transformer():
    config = _load("layout_coco")
    check_config(config)
    section = config.condition
    condition = _layout(
        num_classes=171, max_objects=section.max_objects, scheme=section.scheme,
        width=config.model.context_dim, depth=section.depth, heads=section.heads,
    )  # fmt: skip
    fields = overrides(config.model) | {"dtype": "float32"}
    model = create_model(fields.pop("name"), **fields)
    shapes = jax.eval_shape(lambda: init_conditioned(condition, model, KEY, (32, 32, 4)))
    # 8192 words and 92 places of width 512, sixteen blocks of 12 * 512^2, and norms and biases.
    trained = count_params(shapes.pop(ENCODER)) / 1e6
    assert trained == pytest.approx(54.7, abs=0.2)
    assert count_params(shapes) / 1e6 == pytest.approx(879.6, abs=0.2)


def _load(name):
    file = ROOT / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()
