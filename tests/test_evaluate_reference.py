"""References in every format, the refusal to mix pipelines, and sample files of other people."""

import dataclasses
import os
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from lfm_jax import evaluate
from lfm_jax.errors import UserError
from lfm_jax.evaluate import FeatureSet, FeatureStatistics, Reference
from lfm_jax.features.dino import dino_pipeline
from lfm_jax.features.inception import inception_pipeline


def feature_set(seed=0, count=400, dim=6, shift=0.0, pipeline="tf1") -> FeatureSet:
    rows = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32) + shift
    return FeatureSet(
        extractor="Inception",
        pipeline=inception_pipeline(pipeline),
        fingerprint="abc",
        count=count,
        statistics=FeatureStatistics.of(rows),
        spatial=FeatureStatistics.of(rows[:, :3]),
        features=rows,
        logits=rows[:, :4],
    )


def reference(**kwargs) -> Reference:
    return evaluate.make_reference(feature_set(**kwargs), source="digits", source_fingerprint="f")


def test_own_format_keeps_everything(tmp_path):
    images = np.zeros((3, 4, 4, 3), np.uint8)
    made = dataclasses.replace(reference(), images=images)
    evaluate.write_reference(tmp_path / "r.npz", made)
    read = evaluate.read_reference(tmp_path / "r.npz")
    for name in ("mu", "sigma", "mu_s", "sigma_s", "features", "images"):
        np.testing.assert_array_equal(getattr(read, name), getattr(made, name))
    assert (read.pipeline, read.count) == (made.pipeline, 400)
    assert read.provenance.items() >= made.provenance.items()
    assert len(read.provenance["file_sha256"]) == 64
    assert [f.name for f in tmp_path.iterdir()] == ["r.npz"]


@pytest.mark.parametrize(
    ("format", "pipeline"),
    [
        ("adm", inception_pipeline("tf1")),
        ("meanflow", inception_pipeline("tf1")),
        ("edm2", inception_pipeline("tf1")),
        ("moments", ""),
        ("features", ""),
    ],
)
def test_foreign_formats_round_trip(tmp_path, format, pipeline):
    made = reference()
    evaluate.write_reference(tmp_path / "r", made, format=format)
    read = evaluate.read_reference(tmp_path / "r")
    assert (read.format, read.pipeline) == (format, pipeline)
    np.testing.assert_allclose(read.mu, made.mu, rtol=1e-6)
    np.testing.assert_allclose(read.sigma, made.sigma, rtol=1e-5, atol=1e-7)
    named = evaluate.read_reference(tmp_path / "r", pipeline="torch")
    assert named.pipeline == (pipeline or inception_pipeline("torch"))


def test_files_as_their_own_projects_write_them(tmp_path):
    mu, sigma = np.arange(4.0), np.eye(4)
    np.savez(tmp_path / "fid.npz", mu=mu, sigma=sigma)
    np.savez(tmp_path / "meanflow.npz", ref_mu=mu, ref_sigma=sigma)
    np.savez(tmp_path / "adm.npz", mu=mu, sigma=sigma, mu_s=mu[:2], sigma_s=np.eye(2))
    np.savez(tmp_path / "batch.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    np.save(tmp_path / "lfm.npy", {"mu": mu, "sigma": sigma})
    table = {"fid": {"mu": mu, "sigma": sigma}, "fd_dinov2": {"mu": mu[:2], "sigma": np.eye(2)}}
    (tmp_path / "edm2.pkl").write_bytes(pickle.dumps(table))
    (tmp_path / "dino.pkl").write_bytes(pickle.dumps({"fd_dinov2": table["fd_dinov2"]}, protocol=2))
    found = {f.stem: evaluate.read_reference(f) for f in tmp_path.iterdir()}
    formats = {name: r.format for name, r in found.items()}
    assert formats == {
        "fid": "moments", "meanflow": "meanflow", "adm": "adm", "batch": "adm", "lfm": "lfm",
        "edm2": "edm2", "dino": "edm2",
    }  # fmt: skip
    assert found["lfm"].pipeline == inception_pipeline("torch")
    assert found["dino"].pipeline == dino_pipeline() and len(found["dino"].mu) == 2
    assert found["batch"].mu is None and found["batch"].images.shape == (2, 8, 8, 3)


def test_a_pickle_that_would_call_something_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/ran",))

    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"fid": Payload()}))
    with pytest.raises(UserError, match=r"asks for .*system"):
        evaluate.read_reference(tmp_path / "bad.pkl")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu \[3\], sigma \[4, 4\]; accepted"),
        ({"mean": np.zeros(3)}, "holds mean; accepted: npz of ADM"),
        ({"mu": np.zeros(3)}, "holds mu; accepted"),
        ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, "channels first"),
    ],
)
def test_bad_references_are_named(tmp_path, arrays, message):
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(UserError, match=message):
        evaluate.read_reference(tmp_path / "r.npz")


def test_unreadable_references_are_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        evaluate.read_reference(tmp_path / "none.npz")
    (tmp_path / "text").write_text("not a reference")
    with pytest.raises(UserError, match="accepted: npz of ADM"):
        evaluate.read_reference(tmp_path / "text")
    with pytest.raises(UserError, match="needs mu_s, sigma_s"):
        evaluate.write_reference(
            tmp_path / "w", Reference(mu=np.zeros(2), sigma=np.eye(2)), format="adm"
        )
    assert not (tmp_path / "w").exists()


def test_pipelines_are_not_compared_unless_forced():
    fake = feature_set(seed=1, pipeline="tf1")
    other = reference(pipeline="torch")
    with pytest.raises(UserError, match=r"made by 'Inception: torch .* evaluate.force"):
        evaluate.measure(fake, other, metrics=("fd",))
    marked = evaluate.measure(fake, other, metrics=("fd",), force=True)
    assert marked["warning"].startswith("NOT COMPARABLE") and marked["FID"] > 0
    unknown = Reference(mu=other.mu, sigma=other.sigma, format="moments")
    with pytest.raises(UserError, match=r"does not say .* one of tf1, torch, clean"):
        evaluate.measure(fake, unknown, metrics=("fd",))
    weights = reference()
    weights.provenance["extractor_fingerprint"] = "def"
    with pytest.raises(UserError, match="weights def"):
        evaluate.measure(fake, weights, metrics=("fd",))
    with pytest.raises(UserError, match="5 dimensions; accepted: 6"):
        evaluate.measure(fake, reference(dim=5), metrics=("fd",), force=True)


def test_measure_reports_everything_it_depends_on():
    fake = feature_set(seed=1, shift=0.5)
    figures = evaluate.measure(
        fake, reference(), metrics=evaluate.METRICS, kid_subsets=5, resamples=20, progress=False
    )
    assert figures["FID"] == pytest.approx(6 * 0.25, rel=0.3)
    assert figures["sFID"] == pytest.approx(3 * 0.25, rel=0.4)
    interval = figures["FID interval"]
    assert interval["low"] < figures["FID"] < interval["high"]
    assert figures["KID"] > 0 and 0 < figures["precision"] < 1 and figures["IS"] >= 1
    assert figures["num_samples"] == figures["num_reference"] == 400
    assert "below" not in figures and "biased upwards" in figures["note"]
    assert figures["reference"]["source"] == "digits" and figures["pipeline"] == fake.pipeline
    same = evaluate.measure(feature_set(), reference(), metrics=("fd",))
    assert abs(same["FID"]) < 1e-6
    renamed = dataclasses.replace(fake, extractor="EffNetLite0")
    assert evaluate.metric_name(renamed) == "FD-EffNetLite0"


def test_measure_refuses_what_it_cannot_say():
    with pytest.raises(UserError, match=r"6 images for 6 dimensions .* full rank"):
        evaluate.measure(feature_set(count=6), reference(), metrics=("fd",))
    allowed = evaluate.measure(
        feature_set(count=6), reference(), metrics=("fd",), allow_singular=True
    )
    assert allowed["FID"] > 0
    with pytest.raises(UserError, match="accepted: fd, sfd, kid"):
        evaluate.measure(feature_set(), reference(), metrics=("lpips",))
    bare = Reference(mu=reference().mu, sigma=reference().sigma, pipeline=feature_set().pipeline)
    with pytest.raises(UserError, match="needs features of real images"):
        evaluate.measure(feature_set(), bare, metrics=("fd", "pr"))
    with pytest.raises(UserError, match="sfd needs spatial"):
        evaluate.measure(feature_set(), bare, metrics=("sfd",))


def test_samples_of_other_people(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "s.npz", images, np.arange(5))
    samples = evaluate.read_samples(tmp_path / "s.npz")
    np.testing.assert_array_equal(samples.images, images)
    np.testing.assert_array_equal(samples.labels, np.arange(5))
    np.savez(tmp_path / "u.npz", arr_0=images)
    assert evaluate.read_samples(tmp_path / "u.npz").labels is None
    np.savez_compressed(tmp_path / "c.npz", arr_0=images)
    batches = list(evaluate.SampleFile(tmp_path / "c.npz").batches(2))
    assert [len(b) for b in batches] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(batches), images)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.full((2, 8, 8, 3), -0.5)}, r"float64 in \[-0.5, -0.5\]; accepted: an npz"),
        ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, r"\[2, 3, 8, 8\] \(channels first\)"),
        ({"arr_0": np.zeros((8, 8, 3), np.uint8)}, r"shape \[8, 8, 3\]"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, "is empty"),
        ({"images": np.zeros((2, 8, 8, 3), np.uint8)}, "holds images"),
        (
            {"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "arr_1": np.zeros(3, int)},
            r"arr_1 is int64 \[3\] for 2 images",
        ),
    ],
)
def test_bad_samples_are_named(tmp_path, arrays, message):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(UserError, match=message):
        evaluate.read_samples(tmp_path / "s.npz")


def test_unreadable_samples_are_named(tmp_path):
    (tmp_path / "s.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(UserError, match="not readable"):
        evaluate.read_samples(tmp_path / "s.npz")
    np.save(tmp_path / "a.npy", np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="not readable"):
        evaluate.read_samples(tmp_path / "a.npy")


def test_byte_rules_and_jpeg():
    x = np.linspace(-1.1, 1.1, 23, dtype=np.float32)
    levels = {rule: evaluate.to_bytes(x, rule=rule) for rule in evaluate.UINT8_RULES}
    np.testing.assert_array_equal(levels["round"], np.round(np.clip((x + 1) * 127.5, 0, 255)))
    assert evaluate.to_bytes(np.float32([0.0]), rule="truncate")[0] == 128
    assert evaluate.to_bytes(np.float32([0.0]), rule="floor")[0] == 127
    back = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(evaluate.to_bytes(back / np.float32(127.5) - 1), back)
    with pytest.raises(UserError, match="accepted: round, truncate, floor"):
        evaluate.to_bytes(x, rule="ceil")
    from oracles import photographs

    photo = photographs((64, 64))[0]
    again = evaluate.jpeg_round_trip(photo)
    error = np.abs(again.astype(int) - photo)
    assert again.shape == photo.shape and 0 < error.mean() < 10
    assert evaluate.jpeg_round_trip(photo[..., :1]).shape == (1, 64, 64, 1)


def test_two_processes_sum_to_one(tmp_path):
    """Each of two real processes sees half of the digits; both end with the statistics of all."""
    script = tmp_path / "worker.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            import jax, numpy as np
            rank, port, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            jax.distributed.initialize(f"localhost:{port}", 2, rank)
            from flax import linen as nn
            from sklearn.datasets import load_digits
            from lfm_jax.evaluate import collect_features
            from lfm_jax.features import Extractor

            class Flat(nn.Module):
                def __call__(self, x):
                    return {"features": x.reshape(x.shape[0], -1)}

            images = load_digits().data.astype(np.uint8).reshape(-1, 8, 8, 1)
            half = images[:1000] if rank == 0 else images[1000:]
            extractor = Extractor(
                params={}, model=Flat(), name="p", dim=64, input_size=8, channels=1)
            found = collect_features(extractor, half, batch_size=128, progress=False)
            np.savez(f"{out}/{rank}.npz", mean=found.statistics.mean,
                     cov=found.statistics.covariance, features=found.features)
            """
        )
    )
    import socket

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    workers = [
        subprocess.Popen([sys.executable, script, str(rank), port, tmp_path]) for rank in (0, 1)
    ]
    assert [w.wait(timeout=180) for w in workers] == [0, 0]
    from sklearn.datasets import load_digits

    rows = load_digits().data / 127.5 - 1
    results = [np.load(tmp_path / f"{rank}.npz") for rank in (0, 1)]
    for name in ("mean", "cov", "features"):
        np.testing.assert_array_equal(results[0][name], results[1][name])
    np.testing.assert_allclose(results[0]["features"], rows, atol=1e-6)
    np.testing.assert_allclose(results[0]["cov"], np.cov(rows.T), rtol=1e-5, atol=1e-7)
