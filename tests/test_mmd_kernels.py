"""Kernels and estimators against plain sums, closed forms and torch-fidelity's kernel distance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import torch_fidelity

from lfm_jax.errors import UserError
from lfm_jax.mmd import (
    ESTIMATORS,
    KERNELS,
    Gaussian,
    Polynomial,
    make_kernel,
    median_bandwidth,
    mixture,
    mmd2,
)

CLOSED = {
    "linear": lambda x, y: x @ y / len(x) + 1,
    "cubic": lambda x, y: (x @ y / len(x) + 1) ** 3,
    "gaussian": lambda x, y: np.exp(-np.sum((x - y) ** 2) / (2 * 1.7**2)),
    "laplace": lambda x, y: np.exp(-np.linalg.norm(x - y) / 1.7),
    "energy": lambda x, y: -np.linalg.norm(x - y),
    "imq": lambda x, y: (1 + np.sum((x - y) ** 2) / 1.7**2) ** -0.5,
}


def rows(count, dim=5, seed=0, shift=0.0):
    return jnp.asarray(np.random.default_rng(seed).normal(shift, 1, (count, dim)), jnp.float32)


def brute_force(x, y, kernel, estimator):
    def mean(a, b, *, same):
        pairs = [
            kernel(u, v)
            for i, u in enumerate(a)
            for j, v in enumerate(b)
            if not (same and i == j and estimator == "unbiased")
        ]
        return np.mean(pairs)

    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if estimator == "linear":
        terms = [
            kernel(x[i], x[i + 1])
            + kernel(y[i], y[i + 1])
            - kernel(x[i], y[i + 1])
            - kernel(x[i + 1], y[i])
            for i in range(0, len(x) - 1, 2)
        ]
        return np.mean(terms)
    return mean(x, x, same=True) + mean(y, y, same=True) - 2 * mean(x, y, same=False)


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_and_estimator_is_the_plain_sum(name):
    kernel = make_kernel(name, bandwidth=1.7)
    for estimator in ESTIMATORS:
        y = rows(9 if estimator == "linear" else 6, seed=1, shift=0.4)
        value = mmd2(rows(9), y, kernel, estimator=estimator)
        wanted = brute_force(rows(9), y, CLOSED[name], estimator)
        np.testing.assert_allclose(value, wanted, atol=2e-6, err_msg=estimator)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("block", [1, 4, 9])
def test_blocks_change_neither_value_nor_gradient(estimator, block):
    kernel = make_kernel("laplace", bandwidth=2.0, factors=(0.5, 1, 2))
    x, y = rows(9), rows(7, seed=1)

    def value(x, block):
        return mmd2(x, y, kernel, estimator=estimator, block=block)

    whole, parts = (jax.value_and_grad(value)(x, b) for b in (0, block))
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-5)
    np.testing.assert_allclose(parts[1], whole[1], atol=1e-7)


def test_blocks_hold_no_whole_pair_matrix():
    x = jax.ShapeDtypeStruct((4096, 8), jnp.float32)
    kernel = Gaussian(bandwidth=1.0)

    def memory(block):
        gradient = jax.jit(jax.grad(lambda x, y: mmd2(x, y, kernel, block=block)))
        return gradient.lower(x, x).compile().memory_analysis().temp_size_in_bytes

    assert memory(128) < memory(0) / 8


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_cubic_and_gaussian_are_the_kernel_distances_of_torch_fidelity(estimator):
    x, y = rows(40, 16), rows(40, 16, seed=1, shift=0.5)
    theirs = torch_fidelity("metric_kid")
    options = {
        "kid_kernel_poly_degree": 3,
        "kid_kernel_poly_gamma": None,
        "kid_kernel_poly_coef0": 1,
        "kid_kernel_rbf_sigma": 4.0,
    }
    ours = {
        theirs.kernel_poly: make_kernel("cubic"),
        theirs.kernel_rbf: Gaussian(bandwidth=4.0),
    }
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    for function, kernel in ours.items():
        pairs = (function(u, v, **options) for u, v in ((a, a), (a, b), (b, b)))
        wanted = theirs.mmd2(*pairs, mmd_est=estimator)
        found = mmd2(x, y, kernel, estimator=estimator)
        np.testing.assert_allclose(found, wanted, rtol=5e-5)


def test_gaussian_mmd_of_two_normals_has_its_closed_form():
    """Between N(0, I) and N(a, I) in d dimensions with bandwidth s, ``q = s^2 + 2``:
    ``2 (s^2 / q)^(d/2) (1 - exp(-|a|^2 / (2 q)))``."""
    d, s, a, n = 3, 1.5, 0.8, 1500
    q = s**2 + 2
    wanted = 2 * (s**2 / q) ** (d / 2) * (1 - np.exp(-d * a**2 / (2 * q)))
    x, y = rows(n, d), rows(n, d, seed=1, shift=a)
    np.testing.assert_allclose(mmd2(x, y, Gaussian(bandwidth=s)), wanted, rtol=0.1)


def test_unbiased_is_zero_on_average_for_one_distribution_and_biased_is_not():
    kernel = make_kernel("cubic")
    draws = [(rows(8, 4, seed=2 * i), rows(8, 4, seed=2 * i + 1)) for i in range(300)]
    x, y = (jnp.stack(part) for part in zip(*draws, strict=True))
    values = {e: jax.vmap(lambda a, b, e=e: mmd2(a, b, kernel, estimator=e))(x, y)
              for e in ("unbiased", "biased")}  # fmt: skip
    error = values["unbiased"].std() / np.sqrt(300)
    assert abs(values["unbiased"].mean()) < 3 * error
    assert values["biased"].mean() > 10 * error
    assert values["biased"].min() > 0 > values["unbiased"].min()


def test_far_from_the_origin_nothing_cancels():
    x, y = rows(20), rows(20, seed=1, shift=0.5)
    kernel = Gaussian(bandwidth=1.0)
    np.testing.assert_allclose(mmd2(x + 1e3, y + 1e3, kernel), mmd2(x, y, kernel), atol=1e-4)


def test_coinciding_rows_have_a_finite_gradient():
    x = jnp.zeros((4, 3))
    for name in KERNELS:
        gradient = jax.grad(lambda x, n=name: mmd2(x, x, make_kernel(n, bandwidth=1.0)))(x)
        assert np.isfinite(gradient).all(), name


def test_median_bandwidth_and_mixture():
    x = rows(50)
    pairs = [np.linalg.norm(x[i] - x[j]) for i in range(50) for j in range(i)]
    np.testing.assert_allclose(median_bandwidth(x), np.median(pairs), rtol=1e-5)
    both = mixture([Gaussian(bandwidth=1.0), Polynomial()], [0.5, 2.0])
    y = rows(4, seed=1)
    np.testing.assert_allclose(
        both(x, y), 0.5 * Gaussian(bandwidth=1.0)(x, y) + 2 * Polynomial()(x, y), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mmd2(rows(1), rows(5), Polynomial()), "unbiased of 1 generated and 5 real"),
        (lambda: mmd2(rows(4), rows(5), Polynomial(), estimator="linear"), "as many of each"),
        (lambda: mmd2(rows(4), rows(5), Polynomial(), estimator="best"), "none of unbiased"),
        (lambda: make_kernel("rbf"), "none of linear, cubic"),
        (lambda: make_kernel("gaussian"), "bandwidth: None"),
        (lambda: make_kernel("imq", bandwidth=1.0, factors=(0,)), "factors"),
        (lambda: make_kernel("cubic", degree=0), "below 1"),
        (lambda: mixture([]), "0 kernels"),
        (lambda: median_bandwidth(rows(1)), "1 rows"),
    ],
)
def test_mistakes_are_told_in_one_line(call, words):
    with pytest.raises(UserError, match=words):
        call()
