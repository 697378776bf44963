"""Distances and statistics against scipy, scikit-learn, torch-fidelity and closed forms."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import scipy.linalg
import sklearn.datasets
import sklearn.metrics.pairwise
import sklearn.neighbors
from oracles import torch_fidelity

from lfm_jax import evaluate
from lfm_jax.errors import UserError
from lfm_jax.evaluate import FeatureStatistics, StreamingStatistics
from lfm_jax.evaluate.variety import pixel_std_ratio
from lfm_jax.features import Extractor


@pytest.fixture(scope="module")
def digits():
    """Two halves of real digits as 64-dimensional features."""
    data = sklearn.datasets.load_digits().data.astype(np.float32)
    data = data[np.random.RandomState(0).permutation(len(data))]
    return data[:900], data[900:1797]


def moments(features):
    return features.mean(0, dtype=np.float64), np.cov(features.astype(np.float64).T)


def test_frechet_distance_of_gaussians_is_the_closed_form():
    # Commuting covariances: |dm|^2 + sum (sqrt(a) - sqrt(b))^2.
    a, b = np.array([4.0, 1.0, 0.0]), np.array([1.0, 9.0, 4.0])
    rotation = scipy.linalg.qr(np.random.RandomState(0).normal(size=(3, 3)))[0]
    mean = np.array([1.0, -2.0, 0.5])
    value = evaluate.frechet_distance(
        mean, rotation * a @ rotation.T, np.zeros(3), rotation * b @ rotation.T
    )
    expected = mean @ mean + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert value == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_equals_scipy_and_torch_fidelity(digits):
    metric_fid = torch_fidelity("metric_fid")

    # Constant pixels make both covariances singular, where scipy's root of the product may fail.
    varying = [i for i in range(64) if min(d[:, i].std() for d in digits) > 0.5]
    first, second = (moments(d[:, varying]) for d in digits)
    ours = evaluate.frechet_distance(*first, *second)
    root = scipy.linalg.sqrtm(first[1] @ second[1]).real
    mean = first[0] - second[0]
    expected = mean @ mean + np.trace(first[1] + second[1] - 2 * root)
    theirs = metric_fid.fid_statistics_to_metric(
        *({"mu": m, "sigma": s} for m, s in (first, second)), verbose=False
    )
    assert ours == pytest.approx(expected, rel=1e-9)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)


def test_frechet_distance_is_zero_on_itself_and_takes_singular_covariances(digits):
    mu, sigma = moments(digits[0])
    assert np.linalg.matrix_rank(sigma) < 64
    assert abs(evaluate.frechet_distance(mu, sigma, mu, sigma)) < 1e-6
    few = moments(digits[1][:20])
    there = evaluate.frechet_distance(mu, sigma, *few)
    assert there == pytest.approx(evaluate.frechet_distance(*few, mu, sigma), rel=1e-9)
    # Rank-deficient closed form: a covariance of zero leaves |dm|^2 + tr(sigma).
    zero = evaluate.frechet_distance(mu, sigma, mu, np.zeros_like(sigma))
    assert zero == pytest.approx(np.trace(sigma), rel=1e-12)
    with pytest.raises(UserError, match="not finite"):
        evaluate.frechet_distance(mu * np.nan, sigma, mu, sigma)
    with pytest.raises(UserError, match=r"mu2 has shape \(3,\); accepted: \(64,\)"):
        evaluate.frechet_distance(mu, sigma, mu[:3], sigma)


def test_statistics_merge_to_those_of_the_whole(digits):
    rows = digits[0].astype(np.float64) + 1e4  # far from the origin: naive sums of squares fail
    parts = StreamingStatistics()
    for start in range(0, 900, 7):
        parts.add(rows[start : start + 7])
    merged = FeatureStatistics.of(rows[:100]).merge(FeatureStatistics.of(rows[100:101]))
    merged = merged.update(rows[101:]).update(rows[:0])
    for statistics in (parts.result(), merged):
        assert statistics.count == 900
        np.testing.assert_allclose(statistics.mean, rows.mean(0), rtol=1e-14)
        np.testing.assert_allclose(statistics.covariance, np.cov(rows.T), atol=1e-9)
    with pytest.raises(UserError, match="accepted: at least 2"):
        _ = FeatureStatistics.of(rows[:1]).covariance


def test_kid_equals_torch_fidelity_and_scikit_learn(digits):
    torch = pytest.importorskip("torch")
    metric_kid = torch_fidelity("metric_kid")

    real, fake = digits
    mean, deviation = evaluate.kid(real, fake, subsets=8, subset_size=300)
    theirs = metric_kid.kid_features_to_metric(
        torch.from_numpy(real).double(),
        torch.from_numpy(fake).double(),
        kid_subsets=8,
        kid_subset_size=300,
        rng_seed=2020,
        verbose=False,
    )
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    assert deviation == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-6)
    kernel = sklearn.metrics.pairwise.polynomial_kernel
    x, y = real[:200].astype(np.float64), fake[:150].astype(np.float64)
    kxx, kyy = (kernel(a, degree=3, gamma=1 / 64, coef0=1) for a in (x, y))
    kxy = kernel(x, y, degree=3, gamma=1 / 64, coef0=1)
    expected = (
        (kxx.sum() - np.trace(kxx)) / (200 * 199)
        + (kyy.sum() - np.trace(kyy)) / (150 * 149)
        - 2 * kxy.mean()
    )
    assert evaluate.polynomial_mmd2(x, y) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(UserError, match="accepted: up to 897"):
        evaluate.kid(real, fake)


def test_inception_score_equals_torch_fidelity_and_its_bounds():
    torch = pytest.importorskip("torch")
    metric_isc = torch_fidelity("metric_isc")

    logits = np.random.default_rng(0).normal(size=(1003, 20)).astype(np.float32) * 3
    theirs = metric_isc.isc_features_to_metric(torch.from_numpy(logits))
    ours = evaluate.inception_score(logits)
    assert ours[0] == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert ours[1] == pytest.approx(theirs["inception_score_std"], rel=1e-9)
    # Certain and balanced predictions of k classes score k; equal ones score 1.
    certain = 50 * np.eye(20, dtype=np.float32)[np.arange(1000) % 20]
    chunks = evaluate.inception_score(certain, split_size=500, shuffle=False)
    assert chunks[0] == pytest.approx(20, rel=1e-6)
    assert evaluate.inception_score(certain * 0)[0] == pytest.approx(1)


def test_precision_and_recall_equal_torch_fidelity_with_the_roles_right(digits):
    torch = pytest.importorskip("torch")
    metric_prc = torch_fidelity("metric_prc")

    real = digits[0]
    fake = np.concatenate([digits[1][:300], digits[1][:200] * 1.7 + 3])
    ours = evaluate.precision_recall(real, fake, k=3, chunk=128)
    precision, recall = metric_prc.calculate_precision_recall_part(
        torch.from_numpy(fake).double(), torch.from_numpy(real).double(), 3, 256
    )
    assert ours.precision == pytest.approx(precision, abs=2e-3)
    assert ours.recall == pytest.approx(recall, abs=2e-3)
    swapped = evaluate.precision_recall(fake, real, k=3)
    # Integer pixels tie on the spheres: one image may fall on either side.
    assert swapped.precision == pytest.approx(ours.recall, abs=2e-3)
    assert swapped.recall == pytest.approx(ours.precision, abs=2e-3)
    assert ours.recall < ours.precision - 0.1 or ours.precision < ours.recall - 0.1


def test_collapse_keeps_precision_and_loses_recall_and_coverage(digits):
    real = digits[0]
    one = real[:1] + np.random.default_rng(0).normal(size=(300, 64)).astype(np.float32) * 1e-2
    figures = evaluate.precision_recall(real, one)
    assert figures.precision == 1 and figures.recall < 0.01 and figures.coverage < 0.02


def test_density_and_coverage_equal_a_brute_force(digits):
    real, fake = digits[0][:200], digits[1][:150]
    neighbours = sklearn.neighbors.NearestNeighbors(n_neighbors=6).fit(real)
    radii = neighbours.kneighbors(real)[0][:, 5]
    inside = sklearn.metrics.pairwise.euclidean_distances(real, fake) <= radii[:, None]
    figures = evaluate.precision_recall(real, fake, k=5, chunk=64)
    assert figures.density == pytest.approx(inside.sum() / (5 * 150), abs=1e-9)
    assert figures.coverage == pytest.approx(inside.any(1).mean(), abs=1e-9)


def test_cmmd_equals_a_brute_force_and_vanishes_on_itself(digits):
    x, y = (d[:300].astype(np.float64) for d in digits)
    x, y = (d / np.linalg.norm(d, axis=1, keepdims=True) for d in (x, y))
    rbf = sklearn.metrics.pairwise.rbf_kernel
    gamma = 1 / 200
    expected = 1000 * (
        rbf(x, x, gamma).mean() + rbf(y, y, gamma).mean() - 2 * rbf(x, y, gamma).mean()
    )
    assert evaluate.cmmd(digits[0][:300], digits[1][:300], chunk=70) == pytest.approx(
        expected, rel=1e-3
    )
    assert abs(evaluate.cmmd(x, x)) < 1e-6


def test_inpainting_scores_half_for_the_real_thing_and_zero_for_a_giveaway(digits):
    real, other = digits[0][:800], digits[1][:800]
    paired, unpaired = evaluate.inpainting_discrimination(real, other)
    assert 0.3 < unpaired <= 0.55 and 0.3 < paired < 0.6
    shifted = other + 8 * np.eye(64, dtype=np.float32)[0]  # a pixel that is always dark, lit
    assert max(evaluate.inpainting_discrimination(real, shifted)) < 0.01
    with pytest.raises(UserError, match="pairs in one order"):
        evaluate.inpainting_discrimination(real, other[:5])


def test_memorisation_tells_copies_from_new_images(digits):
    train, rest = digits
    held_out, fresh = rest[:400], rest[400:]
    honest = evaluate.memorisation(fresh, train, held_out, chunk=100)
    assert abs(honest.z_score) < 3 and honest.share < 0.04
    copies = np.concatenate([fresh[:200], train[17:117] + np.float32(0.1)])
    caught = evaluate.memorisation(copies, train, held_out)
    assert caught.z_score < -3 and caught.share > 0.3
    assert set(caught.suspects[:50]) <= set(range(200, 300))
    np.testing.assert_array_equal(caught.nearest[200:], np.arange(17, 117))


def test_bootstrap_covers_the_standard_error_of_a_mean():
    rows = np.random.default_rng(0).normal(size=(400, 1))
    interval = evaluate.bootstrap(lambda r: float(r.mean()), rows, resamples=300)
    assert interval.error == pytest.approx(rows.std() / 20, rel=0.15)
    assert interval.low < interval.value < interval.high
    assert interval.high - interval.value == pytest.approx(1.96 * interval.error, rel=1e-3)


class _Flat:
    """Pixels themselves as features, as a Linen module."""

    @staticmethod
    def make() -> Extractor:
        from flax import linen as nn

        class Flat(nn.Module):
            def __call__(self, x):
                flat = x.reshape(x.shape[0], -1)
                return {"features": flat, "spatial": flat[:, :5], "logits": flat[:, :3]}

        return Extractor(params={}, model=Flat(), name="pixels", dim=64, input_size=8, channels=1)


def test_collect_is_one_pass_whatever_the_batches(digits):
    images = digits[0].astype(np.uint8).reshape(-1, 8, 8, 1)
    whole = evaluate.collect_features(_Flat.make(), images, batch_size=100, progress=False)
    pieces = evaluate.collect_features(
        _Flat.make(), (images[i : i + 37] for i in range(0, 900, 37)), batch_size=64, keep=150,
        progress=False,
    )  # fmt: skip
    assert whole.count == pieces.count == 900 and len(pieces.features) == 150
    np.testing.assert_array_equal(whole.features[:150], pieces.features)
    np.testing.assert_allclose(
        whole.statistics.covariance, pieces.statistics.covariance, rtol=1e-9, atol=1e-12
    )
    expected = images.reshape(900, 64) / 127.5 - 1
    np.testing.assert_allclose(whole.features, expected, atol=1e-6)
    np.testing.assert_allclose(whole.spatial.mean, expected[:, :5].mean(0), atol=1e-6)
    with pytest.raises(UserError, match=r"dtype float32 .* accepted: uint8"):
        evaluate.collect_features(_Flat.make(), images.astype(np.float32))


def test_eight_devices_equal_one(digits, tmp_path):
    """In a process of its own, since the number of devices is fixed when JAX starts."""
    script = tmp_path / "eight.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            import jax, numpy as np
            from flax import linen as nn
            from lfm_jax.evaluate import collect_features
            from lfm_jax.features import Extractor

            class Net(nn.Module):
                @nn.compact
                def __call__(self, x):
                    return {"features": nn.gelu(nn.Conv(16, (3, 3))(x)).mean((1, 2))}

            params = Net().init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))["params"]
            extractor = Extractor(
                params=params, model=Net(), name="n", dim=16, input_size=8, channels=1
            )
            images = np.load(sys.argv[1]).astype(np.uint8).reshape(-1, 8, 8, 1)
            mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
            sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
            one, eight = (
                collect_features(extractor, images, batch_size=80, sharding=s, progress=False)
                for s in (None, sharding)
            )
            np.testing.assert_allclose(one.features, eight.features, rtol=1e-5, atol=1e-6)
            a, b = one.statistics, eight.statistics
            np.testing.assert_allclose(a.covariance, b.covariance, rtol=1e-5, atol=1e-8)
            assert a.count == b.count == 900
            """
        )
    )
    np.save(tmp_path / "digits.npy", digits[0])
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [sys.executable, script, tmp_path / "digits.npy"], env=environment, check=True, timeout=180
    )


def test_variety_within_classes_leaves_out_what_has_no_spread():
    images = np.random.default_rng(0).integers(0, 256, (60, 4, 4, 1)).astype(np.uint8)
    labels = np.repeat([0, 1, 2], 20)
    real = {"image": images, "label": labels}
    dull = (images // 2 + 64).astype(np.uint8)
    found = pixel_std_ratio(dull, labels, real, num_classes=4)
    assert found["min"] == pytest.approx(0.5, abs=0.01) == found["max"]
    one = [0, 20, 40]
    assert pixel_std_ratio(images[one], labels[one], real, num_classes=4) == {}
    few = {"image": images[:21], "label": labels[:21]}
    assert pixel_std_ratio(images, labels, few, num_classes=4)["max"] == pytest.approx(1.0)
