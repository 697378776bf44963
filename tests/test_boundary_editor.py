"""Images to states and back through a network, hidden states, and edits in z, h or both."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfm_jax.boundary import fit
from lfm_jax.boundary.crossing import Crossing, Space, fit_space
from lfm_jax.boundary.editor import Editor
from lfm_jax.boundary.hidden import Shifted, hidden_delta, hidden_states
from lfm_jax.errors import UserError
from lfm_jax.flow import NetworkVelocity
from lfm_jax.models import Cond, create_model, init_params
from lfm_jax.vae import identity_codec

SHAPE = (8, 8, 1)


def random_params(model, seed=0):
    """No zero initial layers, which would hide the blocks."""
    params = init_params(model, jax.random.key(seed), SHAPE)
    leaves, treedef = jax.tree.flatten(params)
    random = np.random.default_rng(seed)
    noisy = [np.asarray(x) + 0.05 * random.normal(size=x.shape).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(treedef, noisy)


@pytest.fixture(scope="module")
def editor():
    model = create_model("DiT", hidden=32, depth=2, heads=2, patch=4, num_classes=3)
    return Editor(
        model=model,
        params=random_params(model),
        codec=identity_codec(1),
        latent_shape=SHAPE,
        image_size=8,
        num_steps=6,
        batch_size=8,
        progress=False,
    )


@pytest.fixture(scope="module")
def images():
    """Half dark, half bright, with noise."""
    random = np.random.default_rng(0)
    levels = np.where(np.arange(24) % 2 == 0, 80, 170)[:, None, None, None]
    return np.clip(levels + 30 * random.normal(size=(24, *SHAPE)), 0, 255).astype(np.uint8)


SIDES = np.where(np.arange(24) % 2 == 0, -1, 1)


def test_up_and_down_again_is_the_image(editor, images):
    latents = editor.encode(images)
    states = editor.invert(latents, 0.6)
    back = editor.decode(editor.generate(states, 0.6))
    assert np.abs(back.astype(int) - images).max() <= 3
    through = editor.invert_through(latents, (0.3, 0.6))
    assert through.shape == (2, 24, *SHAPE)
    np.testing.assert_allclose(through[1], states, atol=5e-3)


def test_neither_batch_size_nor_order_changes_an_image(editor, images):
    latents = editor.encode(images)
    for t, eta in ((0.5, 1.0), (0.5, 0.0)):
        states = editor.noised(latents, t, positions=np.arange(24))
        whole = editor.generate(states, t, eta=eta, positions=np.arange(24))
        one = editor.generate(states[17:18], t, eta=eta, positions=np.array([17]))
        np.testing.assert_allclose(one[0], whole[17], atol=1e-4)
    again = editor.generate(states, t, eta=1.0, positions=np.arange(24), draw=1)
    assert np.abs(again - whole).mean() > 1e-2


def test_sampled_states_end_in_their_samples(editor):
    states, ends = editor.sampled(np.arange(3), (0.5, 1.0))
    assert states.shape == (2, 3, *SHAPE)
    np.testing.assert_allclose(editor.generate(states[0], 0.5), ends, atol=1e-4)
    assert abs(states[1].std() - 1) < 0.2


def test_the_null_label_is_used_unless_a_class_is_named(editor, images):
    latents = editor.encode(images)[:4]
    null = editor.invert(latents, 0.5)
    np.testing.assert_array_equal(null, editor.invert(latents, 0.5, labels=3))
    assert np.abs(null - editor.invert(latents, 0.5, labels=1)).max() > 1e-4


@pytest.mark.parametrize("name", ["DiT", "unet"])
def test_a_delta_moves_the_hidden_state_by_itself_inside_its_window(name):
    if name == "DiT":
        model = create_model("DiT", hidden=32, depth=2, heads=2, patch=4)
        layer = "block_00"
    else:
        model = create_model("unet", channels=32, mult=(1, 2), blocks=1, attention_resolutions=())
        layer = "mid"
    velocity = NetworkVelocity(params=random_params(model), model=model, cond=Cond())
    x = jax.random.normal(jax.random.key(1), (2, *SHAPE))
    t = jnp.full(2, 0.5)
    hidden = hidden_states(velocity, x, t, (layer,))[layer]
    flat = hidden_states(velocity, x, t, (layer,), how="flat")[layer]
    axes = tuple(range(1, flat.ndim - 1))
    np.testing.assert_allclose(flat.mean(axes), hidden, atol=1e-5)
    # Not a constant over channels, which the layer norms of a DiT take away.
    delta = jax.random.normal(jax.random.key(2), hidden.shape)
    moved = Shifted(velocity, {layer: delta}, (0.4, 0.6))
    assert np.abs(moved(x, t) - velocity(x, t)).max() > 1e-3
    for outside in (0.3, 0.7):
        t = jnp.full(2, outside)
        np.testing.assert_allclose(moved(x, t), velocity(x, t), atol=1e-6)
    # What the network computes with the delta is what it computes with that state put in.
    t = jnp.full(2, 0.5)
    middle = (1,) * (flat.ndim - 2)
    wide = jnp.broadcast_to(delta.reshape(2, *middle, -1), flat.shape)
    whole = Shifted(velocity, {layer: wide}, (0.0, 1.0))
    np.testing.assert_allclose(whole(x, t), moved(x, t), atol=1e-5)
    assert moved.t_max == 1.0 and moved.network_calls == 1


@pytest.mark.parametrize("space", ["z", "h", "both"])
@pytest.mark.parametrize("mode", ["shift", "rotate"])
def test_strength_0_edits_nothing_and_others_do(editor, images, space, mode):
    states = editor.invert(editor.encode(images), 0.5)
    way = Crossing(space=Space(name=space), mode=mode)
    boundaries = fit_space(way.space, editor, states, SIDES, 0.5, provenance={"model": "m"})
    assert {"z": {"z"}, "h": {"block_01"}, "both": {"z", "block_01"}}[space] == set(boundaries)
    for part, one in boundaries.items():
        assert one.provenance["space"] == part and one.provenance["t"] == 0.5
    plain = editor.generate(states, 0.5)
    still = way.apply(editor, [boundaries], states, 0.5, 0.0)
    np.testing.assert_allclose(still, plain, atol=1e-4)
    moved = way.apply(editor, [boundaries], states, 0.5, -3.0 * SIDES)
    assert np.abs(moved - plain).mean() > 1e-3


def test_crossing_in_z_turns_dark_images_bright(editor, images):
    """At a low time the untrained flow is close to the identity: the edit itself is seen."""
    t = 0.1
    states = editor.invert(editor.encode(images), t)
    boundaries = [{"z": fit(states, SIDES, method="mean")}]
    moved = Crossing().apply(editor, boundaries, states, t, -SIDES)
    means = editor.decode(moved).mean(axis=(1, 2, 3))
    assert means[SIDES < 0].min() > means[SIDES > 0].max()


def test_a_kept_attribute_keeps_its_distance_in_every_mode(editor, images):
    states = editor.invert(editor.encode(images), 0.5)
    other = np.random.default_rng(2).permutation(SIDES)
    first, second = fit(states, SIDES), fit(states, other)
    seen = []

    class Spy(Editor):
        def generate(self, states, t, **options):
            seen.append(states)
            return states

    fields = dataclasses.fields(Editor)
    spy = Spy(**{field.name: getattr(editor, field.name) for field in fields})
    for mode in ("shift", "project", "rotate"):
        way = Crossing(mode=mode, weights=(1.0, 0.0))
        # Towards the boundary: further away, a rotation may not reach what is asked for.
        way.apply(spy, [{"z": first}, {"z": second}], states, 0.5, -0.2 * SIDES)
        before, after = second.signed_distance(states), second.signed_distance(seen[-1])
        np.testing.assert_allclose(after, before, atol=1e-3, err_msg=mode)
        assert np.abs(first.signed_distance(seen[-1]) - first.signed_distance(states)).max() > 0.05


def test_mistakes_are_named(editor, images):
    with pytest.raises(UserError, match=r"\(16, 16, 1\); this network edits \(8, 8, 1\)"):
        editor.encode(np.zeros((2, 16, 16, 1), np.uint8))
    with pytest.raises(UserError, match=r"eta: 1\.5"):
        editor.generate(np.zeros((1, *SHAPE), np.float32), 0.5, eta=1.5)
    with pytest.raises(UserError, match="'block_09' is none of this network's block_00, block_01"):
        Space(name="h", layer="block_09").parts(editor)
    with pytest.raises(UserError, match="'w' is none of z, h, both"):
        Space(name="w").parts(editor)
    states = np.zeros((2, 32), np.float32)
    with pytest.raises(UserError, match="fitted on"):
        hidden_delta(states, fit(np.random.default_rng(0).normal(size=(24, 4)), SIDES), 1.0)
