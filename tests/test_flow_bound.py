"""The W2 bound where W2 is known: Gaussian data, a Gaussian model, a linear decoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_cases import Gaussian

from lfm_jax.errors import UserError
from lfm_jax.flow import (
    lipschitz_estimates,
    velocity_constants,
    velocity_profile,
    wasserstein_bound,
)

DIMS, DECODER = 16, 3.0


def linear(matrix, x):
    return x @ matrix


def velocity_error(true, learned, points=2001):
    """``int E|v - v^|^2 dt`` over the true marginals, in closed form but for the integral."""
    t = np.linspace(0, 1, points)
    factor = np.asarray(true.factor(t) - learned.factor(t))
    variance = (1 - t) ** 2 * float(true.std) ** 2 + t**2
    return DIMS * float(np.trapezoid(factor**2 * variance, t))


@pytest.mark.parametrize("learned_std", [0.4, 0.55, 0.69, 0.71, 1.2])
def test_the_bound_holds_and_is_of_the_right_size_for_gaussians(learned_std):
    true = Gaussian(mean=jnp.zeros(()), std=jnp.asarray(0.7))
    learned = Gaussian(mean=jnp.zeros(()), std=jnp.asarray(learned_std))
    reconstruction = 0.05  # an encoder that loses an independent part of this squared norm
    data_std = np.sqrt((DECODER * 0.7) ** 2 + reconstruction / DIMS)
    distance = np.sqrt(DIMS) * abs(data_std - DECODER * learned_std)

    x0 = 0.7 * jax.random.normal(jax.random.key(0), (4, 2, 2, 4))
    times = np.linspace(0, 1, 21)
    profile = velocity_profile(learned, x0, jax.random.key(1), times=times, iterations=3)
    known = np.asarray(learned.factor(times))
    np.testing.assert_allclose(profile["lipschitz"], np.abs(known), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(profile["one_sided"], -known, rtol=1e-3, atol=1e-3)

    totals = {}
    for name in ("sup_lipschitz", "sup_one_sided", "int_lipschitz", "int_one_sided"):
        bound = wasserstein_bound(
            autoencoder_error=reconstruction,
            decoder_lipschitz=DECODER,
            velocity_lipschitz=profile[name],
            velocity_error=velocity_error(true, learned),
        )
        assert bound.log_total >= np.log(distance), name
        totals[name] = bound.log_total
    assert bound.exponent >= 0
    assert totals["int_one_sided"] <= totals["int_lipschitz"] <= totals["sup_lipschitz"]
    # The sharpest form is within a factor of ten of the truth when the model is well off.
    if abs(learned_std - 0.7) > 0.1:
        assert totals["int_one_sided"] < np.log(10 * distance)


def test_power_iteration_finds_the_spectral_norm():
    matrix = jax.random.normal(jax.random.key(0), (6, 6))
    x = jax.random.normal(jax.random.key(1), (3, 6))
    keys = jax.random.split(jax.random.key(2), 3)
    norms = lipschitz_estimates(linear, matrix, x, keys, iterations=100)
    np.testing.assert_allclose(norms, jnp.linalg.norm(matrix, 2), rtol=1e-3)
    few = lipschitz_estimates(linear, matrix, x, keys, iterations=2)
    assert (few <= norms + 1e-4).all()  # from below


def test_one_sided_constant_of_a_rotation_is_zero():
    import flax.struct

    @flax.struct.dataclass
    class Rotation:
        matrix: jax.Array

        def __call__(self, x, t):
            return x @ self.matrix

    turn = jnp.asarray([[0.0, 5.0], [-5.0, 0.0]])
    x = jnp.ones((2, 2))
    norm, side = velocity_constants(
        Rotation(matrix=turn), x, jnp.zeros(2), jax.random.split(jax.random.key(0), 2)
    )
    np.testing.assert_allclose(norm, 5.0, rtol=1e-4)
    np.testing.assert_allclose(side, 0.0, atol=1e-3)


def test_verdicts_name_the_dominating_term_and_vacuity():
    terms = {"autoencoder_error": 1.0, "decoder_lipschitz": 50.0, "velocity_error": 0.1}
    bound = wasserstein_bound(velocity_lipschitz=400.0, diameter=100.0, **terms)
    assert bound.vacuous and np.isfinite(bound.log_total)
    assert "velocity Lipschitz" in bound.verdict and "vacuous" in bound.verdict
    small = {**terms, "velocity_error": 1e-6}
    bound = wasserstein_bound(velocity_lipschitz=-10.0, diameter=100.0, **small)
    assert not bound.vacuous and bound.dominating == "autoencoder error"
    assert "informative" in bound.verdict
    perfect = wasserstein_bound(
        autoencoder_error=4.0, decoder_lipschitz=1.0, velocity_lipschitz=1.0, velocity_error=0.0
    )
    assert perfect.log_total == pytest.approx(np.log(2.0))
    with pytest.raises(UserError, match="velocity_error: -1"):
        wasserstein_bound(**{**terms, "velocity_error": -1.0}, velocity_lipschitz=1.0)
