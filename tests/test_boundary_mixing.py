"""Rules for the mixing time on curves whose answer is known, and the figures of an edit."""

import numpy as np
import pytest

from lfm_jax.boundary.measure import (
    distance_at,
    flip_rate,
    leakage,
    monotonicity,
    pixel_distance,
    psnr,
)
from lfm_jax.boundary.mixing import (
    choose_time,
    commitment,
    edit_utility,
    radius_gap,
    separability,
)
from lfm_jax.boundary.search import followed, smallest_strength
from lfm_jax.errors import UserError

TIMES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
CURVES = {
    "separability": [1.0, 0.99, 0.985, 0.98, 0.9, 0.8],
    "commitment": [1.0, 0.99, 0.97, 0.92, 0.8, 0.2],
    "radius": [0.0, 0.001, 0.004, 0.02, 0.005, 0.001],
    "utility": [0.9, 0.5, 0.7, 0.6, 0.95, float("nan")],
}


@pytest.mark.parametrize(
    "rule, wanted",
    [("separability", 0.7), ("commitment", 0.7), ("radius", 0.6), ("utility", 0.6)],
)
def test_each_rule_takes_the_time_it_says(rule, wanted):
    """Not 0.8 by utility, where the states are less separable, and nothing below the floor."""
    assert choose_time(TIMES, CURVES, rule=rule) == wanted


def test_a_rule_without_a_time_takes_the_first_and_mistakes_are_named():
    assert choose_time(TIMES, {"commitment": [0.0] * 6}, rule="commitment") == 0.5
    with pytest.raises(UserError, match="'luck' is none of utility"):
        choose_time(TIMES, CURVES, rule="luck")
    with pytest.raises(UserError, match="no curve for radius"):
        choose_time(TIMES, {"commitment": [0.0] * 6}, rule="radius")
    with pytest.raises(UserError, match="none of"):
        choose_time((0.1, 0.2), {"radius": [0.0, 0.0]}, rule="radius")


def test_commitment_is_information_over_entropy():
    half = np.repeat([[True], [False]], 50, axis=0).repeat(8, axis=1)
    assert commitment(half) == pytest.approx(1.0)
    coins = np.random.default_rng(0).random((400, 8)) < 0.5
    assert commitment(coins) < 0.05
    assert commitment(np.ones((10, 8), bool)) == 0.0


def test_radii_and_separability_over_time():
    random = np.random.default_rng(0)
    states = random.normal(size=(2, 200, 16))
    sides = np.arange(200) % 2 == 0
    states[0, sides, 0] += 5
    gap = radius_gap(states[:, :100], states[:, 100:] * 1.1)
    np.testing.assert_allclose(gap["rho"], 1 - 1 / 1.1, atol=0.03)
    near, far = separability(states, sides, method="mean")
    assert near > 0.99 and far < 0.7


def test_utility_is_the_area_below_the_curve():
    assert edit_utility([0.1], [1.0], limit=0.1) == pytest.approx(0.5, abs=0.01)
    early = edit_utility([0.05, 0.2], [0.8, 1.0], limit=0.2)
    late = edit_utility([0.15, 0.2], [0.8, 1.0], limit=0.2)
    assert early > late
    # Going on too far does not take back what was reached.
    assert edit_utility([0.05, 0.2], [0.8, 0.3], limit=0.2) > late


def test_flips_distances_and_what_else_changed():
    sides = np.array([-1, -1, 1, 1])
    assert flip_rate(sides, np.array([2.0, -1.0, -3.0, 0.0])) == 0.5
    black, white = (np.full((2, 4, 4, 1), value, np.uint8) for value in (0, 255))
    assert pixel_distance(black, white) == 1.0 and pixel_distance(black, black) == 0.0
    gray = np.full((2, 4, 4, 1), 51, np.uint8)
    assert psnr(black, gray) == pytest.approx(-20 * np.log10(0.2))
    before = {"a": np.array([0.0, 2.0]), "b": np.array([1.0, 1.0])}
    after = {"a": np.array([1.0, 3.0]), "b": np.array([1.0, 1.0])}
    assert leakage(before, after) == {"a": 1.0, "b": 0.0}
    assert leakage(before, after, {"a": 4.0}) == {"a": 0.25, "b": 0.0}


def test_strength_and_score_rise_together():
    strengths = np.arange(5)
    scores = strengths[:, None] * np.array([1.0, 2.0]) + np.array([5.0, -5.0])
    assert monotonicity(strengths, scores) == pytest.approx(
        {"of_the_mean": 1.0, "mean_of_images": 1.0}
    )
    assert monotonicity(strengths, -scores)["of_the_mean"] == pytest.approx(-1.0)


def test_distance_at_a_flip_rate_and_the_strength_that_gets_there():
    assert distance_at([0.2, 0.6, 1.0], [0.1, 0.2, 0.3], 0.8) == pytest.approx(0.25)
    assert distance_at([0.2], [0.1], 0.1) == pytest.approx(0.05)
    assert distance_at([0.2, 0.6], [0.1, 0.2], 0.8) == float("inf")
    rows = [{"strength": s, "flip_rate": f} for s, f in ((1.0, 0.3), (2.0, 0.9), (3.0, 0.8))]
    assert smallest_strength(rows, 0.85) == 2.0 and smallest_strength(rows, 0.95) == 2.0


@pytest.mark.parametrize(("slope", "limit"), [(0.05, 10.0), (0.5, 0.9), (0.001, 10.0)])
def test_a_curve_is_followed_until_it_flips_all_or_leaves_the_image(slope, limit):
    def curve(strengths):
        return [
            {"strength": s, "flip_rate": min(1.0, slope * s), "distance": 0.2 * s}
            for s in strengths
        ]

    rows = followed(curve, (1.0, 3.0), limit=limit)
    last, before = rows[-1], rows[-2]
    assert [row["strength"] for row in rows[:2]] == [1.0, 3.0]
    assert last["strength"] == pytest.approx(3.0 * 1.4 ** (len(rows) - 2))
    assert (before["distance"] < limit and before["flip_rate"] < 0.98) or len(rows) == 2
    assert last["distance"] >= limit or last["flip_rate"] >= 0.98 or len(rows) == 8
