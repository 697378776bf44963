"""The DiT: sizes, one parameter layout, taps, conditions, gradients against PyTorch."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfm_jax.errors import UserError
from lfm_jax.models import (
    Cond,
    Replace,
    count_params,
    create_model,
    forward_macs,
    init_params,
    layers,
    macs,
)

SMALL = {"hidden": 64, "depth": 3, "heads": 4, "patch": 2}


def small(**overrides):
    return create_model("DiT", **{**SMALL, **overrides})


def noisy(params):
    """Random values of a sensible scale for every leaf (arrays or shapes), zero-initialised or not.

    NumPy draws them: a network's worth of small JAX draws takes longer to compile than the network.
    """
    rng = np.random.default_rng(7)

    def draw(path, leaf):
        value = rng.standard_normal(leaf.shape)
        if leaf.ndim < 2 or "labels" in path[0].key:
            return jnp.asarray(0.05 * value + (path[-1].key == "scale"), jnp.float32)
        stacked = path[0].key == "blocks" and leaf.ndim == 2  # biases, one row a block
        fan_in = (
            400
            if stacked
            else np.prod(leaf.shape[:-1]) / (len(leaf) if path[0].key == "blocks" else 1)
        )
        return jnp.asarray(value / np.sqrt(fan_in), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, params)


def shapes_of(model, latent, cond=None):
    return jax.eval_shape(lambda k: init_params(model, k, latent, cond), jax.random.key(0))


def example():
    x = jax.random.normal(jax.random.key(1), (3, 8, 8, 4))
    return x, jnp.array([0.1, 0.5, 0.9]), Cond(label=jnp.array([0, 9, 10]))


@pytest.fixture(scope="module")
def case():
    return noisy(shapes_of(small(num_classes=10), (8, 8, 4))), *example()


def run(model, params, x, t, cond=None, **options):
    return jax.jit(lambda p, x, t: model.apply({"params": p}, x, t, cond, **options))(params, x, t)


# Published sizes count the frozen position table in, which is computed here: T d more.
COUNTS = [
    ("DiT-S/2", {"null_row": True}, "32.6"),
    ("DiT-B/2", {"null_row": True}, "129.7"),
    ("DiT-B/2", {"num_classes": 1000}, "130.5"),
    ("DiT-L/2", {"null_row": True}, "457.06"),
    ("DiT-L/4", {"null_row": True}, "456.96"),
    ("DiT-XL/2", {"null_row": True}, "673.96"),
    ("DiT-XL/2", {"num_classes": 1000}, "675.1"),
]


def count_of(name, options, published):
    """(name, millions found, millions published), both to the digits that are published."""
    model = create_model(name, **options)
    shapes = jax.eval_shape(lambda key: init_params(model, key, (32, 32, 4)), jax.random.key(0))
    found = count_params(shapes) + (32 // model.patch) ** 2 * model.hidden
    return name, f"{found / 1e6:.{len(published.partition('.')[2])}f}", published


@pytest.mark.parametrize("row", COUNTS)
def test_parameter_counts_of_the_published_sizes(row):
    _, found, published = count_of(*row)
    assert found == published


@pytest.mark.parametrize(
    ("name", "giga"),
    [("S/2", 6.06), ("B/2", 23.01), ("L/2", 80.71), ("L/4", 19.7), ("XL/2", 118.64)],
)
def test_macs_are_the_published_ones(name, giga):
    assert forward_macs(create_model(f"DiT-{name}"), (32, 32, 4)) / 1e9 == pytest.approx(
        giga, rel=2e-3
    )


def test_closed_form_macs_equal_the_traced_program(case):
    params, _, _, _ = case
    model = small(num_classes=10)
    x, t = jnp.zeros((1, 8, 8, 4)), jnp.zeros(1)
    traced = macs.traced_macs(lambda p: model.apply({"params": p}, x, t), params)
    outside = 256 * 64 + 64 * 64 + 2 * 64 * 64  # the time MLP and the final modulation
    assert forward_macs(model, (8, 8, 4)) == traced - outside


def test_starts_as_the_zero_velocity_with_the_papers_scales():
    model = small(num_classes=10)
    params = init_params(model, jax.random.key(0), (8, 8, 4))
    velocity = run(model, params, jnp.ones((2, 8, 8, 4)), jnp.ones(2))
    assert velocity.shape == (2, 8, 8, 4) and not np.any(velocity)
    blocks = params["blocks"]
    assert not np.any(blocks["modulation"]["kernel"])
    bound = np.sqrt(6 / (64 + 192))
    assert 0.95 * bound < np.abs(blocks["qkv"]["kernel"]).max() <= bound
    assert np.std(params["labels"]["embedding"]) == pytest.approx(0.02, rel=0.1)
    assert np.std(params["time_in"]["kernel"]) == pytest.approx(0.02, rel=0.05)
    # Blocks are drawn one by one: stacking is a layout.
    assert not np.allclose(blocks["qkv"]["kernel"][0], blocks["qkv"]["kernel"][1])


@pytest.mark.parametrize("options", [{"scan_blocks": False}, {"remat": "full"}, {"remat": "dots"}])
def test_scan_loop_and_remat_are_one_function_of_one_tree(case, options):
    params, x, t, cond = case

    def loss(params, model):
        return jnp.sum(jnp.sin(model.apply({"params": params}, x, t, cond)))

    value, gradient = jax.jit(jax.value_and_grad(lambda p: loss(p, small(num_classes=10))))(params)
    other = small(num_classes=10, **options)
    value2, gradient2 = jax.jit(jax.value_and_grad(lambda p: loss(p, other)))(params)
    np.testing.assert_allclose(value, value2, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), gradient, gradient2)
    shapes = jax.eval_shape(lambda k: init_params(other, k, (8, 8, 4)), jax.random.key(0))
    assert jax.tree.structure(shapes) == jax.tree.structure(params)


def test_bf16_activations_keep_float32_parameters_and_output(case):
    params, x, t, cond = case
    full = run(small(num_classes=10), params, x, t, cond)
    half = run(small(num_classes=10, dtype="bfloat16"), params, x, t, cond)
    assert half.dtype == jnp.float32
    assert np.abs(half - full).max() < 0.05 * np.abs(full).max()


def gradient_error():
    """Largest error of any gradient against PyTorch, relative to the tensor's largest entry."""
    import torch
    import torch_networks as theirs

    from lfm_jax.weights import convert, files

    network = theirs.randomise(theirs.DiT(64, 2, 4, 2, 4, 4, 8, 11))
    state = {k: v.numpy() for k, v in network.state_dict().items()}
    chosen = convert.FAMILIES["lfm-dit"]
    content = chosen.clean(files.TensorFile(path="", tensors=state, sha256="", weights="raw"))
    model = create_model("DiT", **{**chosen.recognise(content).overrides, "heads": 4})
    shapes = jax.eval_shape(lambda k: init_params(model, k, (8, 8, 4)), jax.random.key(0))
    bindings = chosen.bindings(model, shapes, 8)
    params = convert.to_params(content, bindings, shapes)

    x, t, cond = example()
    target = np.random.default_rng(0).standard_normal(x.shape).astype(np.float32)

    def loss(params):
        return jnp.mean((model.apply({"params": params}, x, t, cond) - target) ** 2)

    ours = convert.to_tensors(jax.jit(jax.grad(loss))(params), bindings)
    nchw = [torch.from_numpy(np.asarray(z).transpose(0, 3, 1, 2).copy()) for z in (x, target)]
    out = network(nchw[0], torch.tensor(np.asarray(t)), torch.tensor(np.asarray(cond.label)).long())
    ((out - nchw[1]) ** 2).mean().backward()
    errors = []
    for name, parameter in network.named_parameters():
        if name != "pos_embed":
            expected = parameter.grad.numpy()
            errors.append(np.abs(ours[name] - expected).max() / np.abs(expected).max())
    return float(max(errors))


def test_gradients_equal_pytorchs():
    pytest.importorskip("torch")
    assert gradient_error() < 1e-4


def test_hand_written_derivatives_equal_those_by_rule():
    x = 3 * jax.random.normal(jax.random.key(0), (5, 16))
    direction = jax.random.normal(jax.random.key(1), (5, 16))

    def plain_norm(x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)

    pairs = [
        (layers.gelu, lambda x: nn.gelu(x, approximate=True)),
        (layers.softmax, jax.nn.softmax),
        (layers.layer_norm, plain_norm),
    ]
    for ours, rule in pairs:
        for a, b in zip(
            jax.jvp(ours, (x,), (direction,)), jax.jvp(rule, (x,), (direction,)), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=2e-5)
        back = [jax.vjp(f, x)[1](direction)[0] for f in (ours, rule)]
        np.testing.assert_allclose(*back, atol=2e-5)


def test_null_row_labels_and_absent_labels(case):
    params, x, t, _ = case
    model = small(num_classes=10)
    null = run(model, params, x, t, Cond(label=jnp.full(3, 10)))
    np.testing.assert_array_equal(null, run(model, params, x, t))
    assert np.abs(null - run(model, params, x, t, Cond(label=jnp.zeros(3, int)))).max() > 1e-3


def test_runs_on_any_grid_and_positions_matter(case):
    params, _, t, cond = case
    model = small(num_classes=10)
    wide = jax.random.normal(jax.random.key(3), (3, 4, 12, 4))
    assert run(model, params, wide, t, cond).shape == wide.shape
    swapped = run(model, params, wide[:, ::-1], t, cond)[:, ::-1]
    assert np.abs(swapped - run(model, params, wide, t, cond)).max() > 1e-3
    # Row-major tokens: first half of the table codes the column, second half the row.
    table = layers.position_table(2, 3, 8).reshape(2, 3, 8)
    np.testing.assert_array_equal(table[0, :, :4], table[1, :, :4])
    np.testing.assert_array_equal(table[:, 0, 4:], table[:, 2, 4:])
    patches = layers.patchify(wide, 2)
    np.testing.assert_array_equal(patches[:, 1], wide[:, :2, 2:4].reshape(3, -1))
    np.testing.assert_array_equal(layers.unpatchify(patches, 2, (2, 6)), wide)


def test_spatial_and_token_conditions_are_used():
    x, t = jax.random.normal(jax.random.key(0), (2, 8, 8, 4)), jnp.array([0.2, 0.7])
    cond = Cond(
        spatial=jax.random.normal(jax.random.key(1), (2, 8, 8, 5)),
        tokens=jax.random.normal(jax.random.key(2), (2, 6, 24)),
    )
    model = small(context_dim=24)
    params = noisy(shapes_of(model, (8, 8, 4), cond))
    assert params["patch"]["kernel"].shape == (4 * 9, 64)
    full = run(model, params, x, t, cond)
    assert full.shape == x.shape
    # Tokens are a set, but not nothing.
    shuffled = run(model, params, x, t, cond.replace(tokens=cond.tokens[:, ::-1]))
    np.testing.assert_allclose(full, shuffled, atol=1e-5)
    assert (
        np.abs(full - run(model, params, x, t, cond.replace(tokens=0 * cond.tokens))).max() > 1e-4
    )
    with pytest.raises(UserError, match="tokens"):
        model.apply({"params": params}, x, t, Cond(spatial=cond.spatial))


@pytest.mark.parametrize("scan", [True, False])
def test_capture_and_inject(case, scan):
    params, x, t, cond = case
    model = small(num_classes=10, scan_blocks=scan)
    plain = run(model, params, x, t, cond)
    v, hidden = run(model, params, x, t, cond, capture=("block_00", "block_02"))
    np.testing.assert_allclose(v, plain, atol=1e-6)
    assert set(hidden) == {"block_00", "block_02"} and hidden["block_00"].shape == (3, 16, 64)
    again = run(model, params, x, t, cond, inject={"block_00": Replace(hidden["block_00"])})
    np.testing.assert_allclose(again, plain, atol=1e-6)
    shift = jnp.linspace(-1, 1, 64)  # a constant would vanish in the next norm
    # An edit of an earlier state moves later ones; by array or by function is the same.
    added = run(model, params, x, t, cond, inject={"block_01": shift}, capture=("block_01",))
    called = run(model, params, x, t, cond, inject={"block_01": lambda h: h + shift})
    np.testing.assert_allclose(added[0], called, atol=1e-6)
    assert np.abs(called - plain).max() > 1e-3
    before = run(model, params, x, t, cond, capture=("block_01",))[1]["block_01"]
    np.testing.assert_allclose(added[1]["block_01"], before + shift, atol=1e-5)
    with pytest.raises(UserError, match="block_02"):
        model.apply({"params": params}, x, t, cond, capture=("block_09",))


def test_taps_switched_off_leave_the_program_alone(case):
    params, x, t, cond = case

    def text(model, **options):
        lowered = jax.jit(lambda p, x, t: model.apply({"params": p}, x, t, cond, **options))
        return lowered.lower(params, x, t).as_text()

    model = small(num_classes=10)
    assert text(model) == text(model, capture=(), inject={})
    assert text(model) != text(model, capture=("block_01",))
    assert len(re.findall("stablehlo.while", text(model))) == 1


def test_auto_takes_the_fused_kernel_only_where_it_runs(monkeypatch):
    taken = []

    def fused(q, k, v, implementation):
        taken.append(implementation)
        return q

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    for size, dtype in [(64, jnp.bfloat16), (128, jnp.float16), (256, jnp.bfloat16)]:
        layers.attention(*[jnp.ones((1, 2, 1, size), dtype)] * 3)
    layers.attention(*[jnp.ones((1, 2, 1, 64))] * 3)
    assert taken == ["cudnn", "cudnn"]


def test_mistakes_are_named():

    def shapes(model):
        return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 4)), jnp.zeros(1))

    cases = [
        (lambda: create_model("DiT-M/2"), "DiT-S/2"),
        (lambda: create_model("DiT", width=3), "hidden"),
        (lambda: shapes(small(patch=3)), "patch: 3"),
        (lambda: shapes(small(heads=5)), "heads: 5"),
        (lambda: shapes(small(attention="flash")), "cudnn"),
        (lambda: shapes(small(remat="some")), "dots"),
        (lambda: shapes(small(convention="edm")), "reversed"),
    ]
    for mistake, word in cases:
        with pytest.raises(UserError, match=word):
            mistake()
