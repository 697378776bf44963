"""Hyperplanes against closed forms and scikit-learn, steps across them, and files of them."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfm_jax.boundary import (
    METHODS,
    MODES,
    cross_validated,
    fit,
    load_boundary,
    orthogonal_normals,
    save_boundary,
    steer,
)
from lfm_jax.errors import UserError
from lfm_jax.flow import invert, sample
from lfm_jax.flow.path import expand

SHAPE = (2, 2, 2)


@flax.struct.dataclass
class Mixture:
    """The exact velocity of half N(c + m, s^2 I) and half N(c - m, s^2 I)."""

    center: jax.Array
    half: jax.Array
    std: float
    t_max: float = flax.struct.field(pytree_node=False, default=1.0)

    @property
    def network_calls(self):
        return 1

    def __call__(self, x, t):
        t = expand(t, x)
        variance = (1 - t) ** 2 * self.std**2 + t**2
        rest = x - (1 - t) * self.center
        along = jnp.sum(rest * (1 - t) * self.half, axis=(1, 2, 3), keepdims=True)
        mean = self.center + jnp.tanh(along / variance) * self.half  # of the side, given x
        return -mean + (t - (1 - t) * self.std**2) / variance * (x - (1 - t) * mean)


def angle(a, b) -> float:
    """Degrees between two lines."""
    cosine = abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b)
    return float(np.degrees(np.arccos(min(cosine, 1.0))))


@pytest.fixture(scope="module")
def mixture():
    """The velocity, 2,000 data and their sides; the true normal is the direction of `half`."""
    random = np.random.default_rng(0)
    half = random.normal(size=SHAPE)
    half *= 2.4 / np.linalg.norm(half)
    center = random.normal(size=SHAPE)
    sides = random.integers(0, 2, 2000) == 1
    data = center + np.where(sides, 1, -1)[:, None, None, None] * half
    data = data + 0.6 * random.normal(size=data.shape)
    velocity = Mixture(center=jnp.asarray(center), half=jnp.asarray(half), std=0.6)
    return velocity, jnp.asarray(data, jnp.float32), sides


@pytest.mark.parametrize("method", METHODS)
def test_the_boundary_of_two_gaussians_is_found_at_the_mixing_time(mixture, method):
    velocity, data, sides = mixture
    t = 0.6
    states, _ = invert(velocity, data, t=t, num_steps=10)
    boundary = fit(states, sides, method=method)
    assert angle(boundary.normal, np.asarray(velocity.half).ravel()) < 3
    # By symmetry the true hyperplane goes through (1 - t) c.
    middle = (1 - t) * velocity.center[None]
    assert abs(boundary.signed_distance(middle)[0]) < 0.1 * boundary.spread
    assert boundary.measure(states, sides)["auc"] > 0.95


def test_crossing_it_makes_data_of_the_other_side(mixture):
    velocity, data, sides = mixture
    states, _ = invert(velocity, data[:200], t=0.6, num_steps=10)
    boundary = fit(states, sides[:200], method="mean")
    mirrored = steer(states, boundary, 1.0, mode="reflect")
    back, _ = sample(velocity, mirrored, t_start=0.6, num_steps=20, solver="midpoint")
    half = np.asarray(velocity.half).ravel()
    flat = np.asarray(back - velocity.center).reshape(200, -1)
    now = flat @ half > 0
    assert np.mean(now != sides[:200]) > 0.95


@pytest.mark.parametrize("method", ["svm", "logistic"])
def test_few_images_of_many_dimensions_give_the_solution_of_the_full_problem(method):
    """The Gram factor against scikit-learn on the states themselves."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

    random = np.random.default_rng(1)
    states = random.normal(size=(40, 300)) + 3.0
    sides = np.arange(40) % 4 == 0
    states[sides, :5] += 1.5
    boundary = fit(states, sides, method=method, cost=0.1)
    centred = states - states.mean(0)
    centred /= np.sqrt(np.mean(np.sum(centred**2, axis=1)))
    if method == "svm":
        oracle = SVC(kernel="linear", C=0.1, class_weight="balanced").fit(centred, sides)
    else:
        oracle = LogisticRegression(C=0.1, class_weight="balanced", tol=1e-8, max_iter=5000)
        oracle.fit(centred, sides)
    # libsvm stops at a tolerance of 1e-3 in the dual, lbfgs at 1e-4 in the gradient.
    wanted = oracle.coef_[0] / np.linalg.norm(oracle.coef_[0])
    np.testing.assert_allclose(boundary.normal, wanted, atol=5e-3)
    scores = oracle.decision_function(centred)
    ours = boundary.signed_distance(states)
    assert np.corrcoef(scores, ours)[0, 1] > 0.9999
    np.testing.assert_array_equal(
        np.sign(scores)[abs(scores) > 0.02], np.sign(ours)[abs(scores) > 0.02]
    )


def test_ridge_discriminant_is_its_closed_form():
    random = np.random.default_rng(2)
    states = random.normal(size=(60, 5)) @ random.normal(size=(5, 5))
    sides = np.arange(60) % 3 == 0
    boundary = fit(states, sides, method="lda", cost=1e9)
    within = (np.cov(states[sides].T, bias=True) + np.cov(states[~sides].T, bias=True)) / 2
    wanted = np.linalg.solve(within, states[sides].mean(0) - states[~sides].mean(0))
    assert angle(boundary.normal, wanted) < 1e-3
    middle = (states[sides].mean(0) + states[~sides].mean(0)) / 2
    assert abs(boundary.signed_distance(middle[None])[0]) < 1e-9


def test_sides_weigh_the_same_and_cost_is_chosen_by_held_out_auc():
    random = np.random.default_rng(3)
    sides = np.arange(400) % 20 == 0
    states = random.normal(size=(400, 30))
    states[sides, 0] += 4
    boundary = fit(states, sides)
    assert boundary.cost > 0 and 0.9 < boundary.score <= 1
    assert boundary.measure(states, sides)["accuracy"] > 0.95
    shuffled = random.permutation(sides)
    assert cross_validated(states, sides, method="mean")["auc"] > 0.9
    assert cross_validated(states, shuffled, method="mean")["auc"] < 0.75


@pytest.fixture
def pair():
    """Two boundaries that are neither parallel nor orthogonal, and states."""
    random = np.random.default_rng(4)
    states = random.normal(size=(200, *SHAPE)).astype(np.float32) + 1
    flat = states.reshape(200, -1)
    first = fit(states, flat[:, 0] > 1, attribute="first")
    second = fit(states, flat[:, 0] + flat[:, 1] > 2, attribute="second")
    return states, first, second


def test_every_mode_lands_where_it_says(pair):
    states, first, _ = pair
    before = first.signed_distance(states)
    after = {mode: steer(states, first, 1.5, mode=mode) for mode in MODES}
    sigma = first.spread
    distance = {mode: first.signed_distance(x) for mode, x in after.items()}
    np.testing.assert_allclose(distance["shift"], before + 1.5 * sigma, atol=1e-4)
    np.testing.assert_allclose(distance["project"], 1.5 * sigma, atol=1e-4)
    np.testing.assert_allclose(distance["reflect"], -2 * before, atol=1e-4)
    # Where the sphere reaches so far.
    reached = np.abs(distance["shift"] - first.offset) < np.linalg.norm(
        states.reshape(200, -1), axis=1
    )
    assert reached.sum() > 150
    np.testing.assert_allclose(distance["rotate"][reached], distance["shift"][reached], atol=1e-4)
    norms = [
        np.linalg.norm(np.asarray(x).reshape(200, -1), axis=1) for x in (states, after["rotate"])
    ]
    np.testing.assert_allclose(*norms, rtol=1e-5)
    # A step changes nothing across the normal.
    step = (np.asarray(after["shift"]) - states).reshape(200, -1)
    np.testing.assert_allclose(step, np.tile(1.5 * sigma * first.normal, (200, 1)), atol=1e-5)
    for mode in ("shift", "reflect", "rotate"):
        np.testing.assert_allclose(steer(states, first, 0, mode=mode), states, atol=1e-6)


def test_absolute_units_are_the_released_codes(pair):
    states, first, _ = pair
    set_to = steer(states, first, 7.0, mode="project", unit="absolute")
    flat = np.asarray(set_to, np.float64).reshape(200, -1)
    np.testing.assert_allclose(flat @ first.normal, 7.0, atol=1e-4)
    moved = steer(states, first, 2.0, unit="absolute")
    lengths = np.linalg.norm((np.asarray(moved) - states).reshape(200, -1), axis=1)
    np.testing.assert_allclose(lengths, 2.0, rtol=1e-5)


def test_a_rotation_that_asks_too_much_ends_on_the_normal(pair):
    states, first, _ = pair
    flat = np.asarray(steer(states, first, 1000.0, mode="rotate")).reshape(200, -1)
    norms = np.linalg.norm(states.reshape(200, -1), axis=1)
    np.testing.assert_allclose(flat, norms[:, None] * first.normal, atol=1e-4)


@pytest.mark.parametrize("mode", ["shift", "rotate"])
def test_an_attribute_of_strength_0_keeps_its_distance(pair, mode):
    states, first, second = pair
    states = states + 3  # long enough for the rotation to reach
    alone = steer(states, first, 0.5, mode=mode)
    together = steer(states, [first, second], [0.5, 0.0], mode=mode)
    before = second.signed_distance(states)
    assert np.abs(second.signed_distance(alone) - before).mean() > 0.1
    np.testing.assert_allclose(second.signed_distance(together), before, atol=1e-4)
    wanted = first.signed_distance(states) + first.spread / 2
    np.testing.assert_allclose(first.signed_distance(together), wanted, atol=1e-4)
    if mode == "shift":
        step = (np.asarray(together) - states).reshape(200, -1)
        assert angle(step[0], orthogonal_normals([first, second])[0]) < 0.1


def test_strengths_by_state(pair):
    states, first, _ = pair
    strengths = np.linspace(-1, 1, 200)[:, None]
    moved = first.signed_distance(steer(states, first, strengths)) - first.signed_distance(states)
    np.testing.assert_allclose(moved, strengths[:, 0] * first.spread, atol=1e-4)


def test_files_keep_the_boundary_and_refuse_another_place(pair, tmp_path):
    states, first, _ = pair
    here = {"model": "a" * 64, "t": 0.6, "space": "z", "attribute": "first"}
    save_boundary(tmp_path / "b.npz", dataclasses.replace(first, provenance=here))
    loaded = load_boundary(tmp_path / "b.npz", expected=here)
    np.testing.assert_array_equal(loaded.signed_distance(states), first.signed_distance(states))
    assert loaded.shape == SHAPE and loaded.cost == first.cost
    for name, other in (("model", "b" * 64), ("t", 0.7), ("space", "block_03")):
        with pytest.raises(UserError, match=f"{name} .*{here[name]}.*{other}"):
            load_boundary(tmp_path / "b.npz", expected={**here, name: other})
    with pytest.raises(UserError, match=r"none\.npz"):
        load_boundary(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no arrays")
    with pytest.raises(UserError, match="not readable"):
        load_boundary(tmp_path / "text.npz")


@pytest.mark.parametrize(
    "change, named",
    [
        ({"labels": np.zeros(40)}, "smile: 0 of 40 images with it"),
        ({"labels": np.arange(40) < 31}, "9 of 40 images without it; expected at least 10"),
        ({"method": "forest"}, "'forest' is none of svm"),
        ({"cost": -1.0}, "-1.0 is not a positive"),
        ({"states": np.full((40, 3), np.nan)}, "not finite"),
    ],
)
def test_unusable_states_are_named(change, named):
    random = np.random.default_rng(0)
    given = {"states": random.normal(size=(40, 3)), "labels": np.arange(40) < 20}
    with pytest.raises(UserError, match=named):
        fit(**{**given, "attribute": "smile", **change})


@pytest.mark.parametrize(
    "change, named",
    [
        ({"strength": float("nan")}, "not finite"),
        ({"strength": [1.0, 2.0]}, "neither a number, nor 1"),
        ({"mode": "push"}, "'push' is none of shift"),
        ({"unit": "pixels"}, "'pixels' is none of margin"),
        ({"states": np.zeros((2, 3, 3, 1), np.float32)}, "fitted on"),
    ],
)
def test_unusable_steps_are_named(pair, change, named):
    states, first, _ = pair
    with pytest.raises(UserError, match=named):
        steer(**{"states": states, "boundary": first, "strength": 1.0, **change})


def test_two_names_of_one_attribute_are_refused(pair):
    states, first, _ = pair
    with pytest.raises(UserError, match="nearly parallel"):
        steer(states, [first, first], 1.0)
