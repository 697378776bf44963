"""Is the evaluator exact, and is it fast enough to be used?

Speed is a ratio measured in one run, alternating, median of repeats; networks carry shared random
weights, since speed does not depend on them. Run it on an otherwise idle machine::

    python -m benchmarks.evaluate            # all questions
    python -m benchmarks.evaluate frechet    # one: parity inception frechet recall devices
"""

import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.figures import RESULTS, record
from benchmarks.turns import take_turns
from lfm_jax import evaluate
from lfm_jax.features import resize
from lfm_jax.features.inception import make_inception, params_from_torch

COMMAND = "python -m benchmarks.evaluate"
# Other people's networks with random weights are made where the tests make theirs.
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
oracles = importlib.import_module("oracles")


def relative(ours, theirs) -> float:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def parity() -> None:
    """Networks and resize rules against the libraries that define them."""
    import torch
    from PIL import Image

    tf1 = oracles.torch_fidelity(
        "interpolate_compat_tensorflow"
    ).interpolate_bilinear_2d_like_tensorflow1x

    network, tensors = oracles.torch_inception()
    extractor = make_inception(params_from_torch(tensors))
    images = np.concatenate(oracles.photographs(*[(256, 256)] * 3))
    ours = jax.jit(lambda e, x: e(x))(extractor, images)
    with torch.no_grad():
        features, logits = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    worst = max(relative(ours["features"], features), relative(ours["logits"], logits))
    record(
        "evaluation",
        "Inception features, random weights, max relative error to torch-fidelity",
        worst,
        "<=",
        1e-4,
        f"{COMMAND} parity",
        "2048 features and 1008 unbiased logits of three photographs; error over the largest value",
    )

    errors = {"tf1": 0.0, "torch": 0.0, "clean": 0.0}
    for side in (32, 64, 256, 400):
        pixels = oracles.photographs((min(side, 300), side))[0].astype(np.float32)
        tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        half = torch.nn.functional.interpolate(
            tensor, size=(299, 299), mode="bilinear", align_corners=False
        )
        pillow = [
            np.asarray(Image.fromarray(pixels[0, :, :, c]).resize((299, 299), Image.BICUBIC))
            for c in range(3)
        ]
        expected = {
            "tf1": tf1(tensor, size=(299, 299), align_corners=False).permute(0, 2, 3, 1).numpy(),
            "torch": half.permute(0, 2, 3, 1).numpy(),
            "clean": np.stack(pillow, -1)[None].clip(0, 255),
        }
        for rule, value in expected.items():
            found = np.asarray(resize(pixels, (299, 299), rule=rule))
            errors[rule] = max(errors[rule], float(np.abs(found - value).max()))
    for rule, library in (("tf1", "torch-fidelity"), ("torch", "torch"), ("clean", "Pillow F")):
        record(
            "evaluation",
            f"resize {rule}, max error in levels of 255 to {library}",
            errors[rule],
            "<=",
            1e-4,
            f"{COMMAND} parity",
            "photographs of 32, 64, 256 and 300x400 pixels to 299",
        )

    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(256, 256)) / 16
    real, fake = (rng.normal(size=(3000, 256)) @ mixing + shift for shift in (0.0, 0.1))
    metric_fid, metric_isc, metric_kid, metric_prc = (
        oracles.torch_fidelity(f"metric_{name}") for name in ("fid", "isc", "kid", "prc")
    )

    moments = [(x.mean(0), np.cov(x.T)) for x in (real, fake)]
    ours = evaluate.frechet_distance(*moments[0], *moments[1])
    theirs = metric_fid.fid_statistics_to_metric(
        *({"mu": m, "sigma": s} for m, s in moments), verbose=False
    )["frechet_inception_distance"]
    kid = metric_kid.kid_features_to_metric(
        torch.from_numpy(real), torch.from_numpy(fake), kid_subsets=10, verbose=False
    )
    score = metric_isc.isc_features_to_metric(torch.from_numpy(real))
    precision, recall = metric_prc.calculate_precision_recall_part(
        torch.from_numpy(fake), torch.from_numpy(real), 3, 1000
    )
    manifold = evaluate.precision_recall(real, fake)
    found = {
        "FID": (ours, theirs, 1e-6),
        "KID": (
            evaluate.kid(real, fake, subsets=10)[0],
            kid["kernel_inception_distance_mean"],
            1e-6,
        ),
        "IS": (evaluate.inception_score(real)[0], score["inception_score_mean"], 5e-3),
        "precision": (manifold.precision, precision, 1e-3),
        "recall": (manifold.recall, recall, 1e-3),
    }
    for name, (value, reference, bound) in found.items():
        record(
            "evaluation",
            f"{name} from fixed features, relative error to torch-fidelity",
            abs(value - reference) / abs(reference),
            "<=",
            bound,
            f"{COMMAND} parity",
            f"3,000 x 256 correlated normals; {value:.8g} and {reference:.8g}",
        )
    record(
        "evaluation",
        "FID(ref, ref)",
        abs(evaluate.frechet_distance(*moments[0], *moments[0])),
        "<=",
        1e-6,
        f"{COMMAND} parity",
    )


def inception() -> None:
    """Inception features beside torch-fidelity's, images of 256 pixels in batches of 16."""
    import torch

    network, tensors = oracles.torch_inception()
    extractor = make_inception(params_from_torch(tensors))
    images = np.concatenate(oracles.photographs(*[(256, 256)] * 16))
    apply = jax.jit(lambda e, x: e(x))
    tensor = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        sides = {
            "ours": lambda: jax.block_until_ready(apply(extractor, images)),
            "theirs": lambda: network(tensor),
        }
        ours, theirs = (float(np.median(t)) for t in take_turns(sides, 5).values())
    record(
        "evaluation",
        "Inception features, time over torch-fidelity's",
        ours / theirs,
        "<=",
        1.0,
        f"{COMMAND} inception",
        f"{len(images) / ours:.1f} and {len(images) / theirs:.1f} images/s at 256 px, "
        f"torch threads {torch.get_num_threads()}, resize included on both sides",
    )
    if jax.default_backend() != "cpu":
        record(
            "evaluation",
            "Inception images/s at 256x256 on one H200-class card",
            len(images) / ours,
            ">=",
            3000,
            f"{COMMAND} inception",
        )


def frechet() -> None:
    """One Frechet distance of 2048 dimensions from 10,000 features with a decaying spectrum."""
    rng = np.random.default_rng(0)
    spectrum = np.arange(1, 2049) ** -0.75
    rotation = np.linalg.qr(rng.normal(size=(2048, 2048)))[0]
    stats = []
    for shift in (0.0, 0.01):
        rows = (rng.normal(size=(10_000, 2048)) * spectrum) @ rotation + shift
        stats.append((rows.mean(0), np.cov(rows.T)))
    times, value = [], 0.0
    for _ in range(3):
        start = time.perf_counter()
        value = evaluate.frechet_distance(*stats[0], *stats[1])
        times.append(time.perf_counter() - start)
    record(
        "evaluation",
        "Frechet distance of 2048 dimensions, seconds",
        float(np.median(times)),
        "<=",
        3.0,
        f"{COMMAND} frechet",
        f"eigenvalues k^-1.5, full rank; value {value:.5g}",
    )


def recall() -> None:
    """Precision and recall of 10,000 x 10,000 Inception-sized features: added memory and time."""
    rng = np.random.default_rng(0)
    real, fake = (rng.normal(size=(10_000, 2048)).astype(np.float32) for _ in range(2))
    evaluate.precision_recall(real[:64], fake[:64])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    evaluate.precision_recall(real, fake, chunk=1024, progress=True)
    seconds = time.perf_counter() - start
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    record(
        "evaluation",
        "Precision and recall of 10k x 10k, peak memory added in GiB",
        added,
        "<=",
        1.0,
        f"{COMMAND} recall",
        f"{seconds:.0f} s at 2048 dimensions; three whole float32 distance matrices "
        "would take 1.1 GiB",
    )


_WORKER = """
import sys
import jax, numpy as np
rank, processes, port, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
if processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", processes, rank)
from flax import linen as nn
from sklearn.datasets import load_digits
from lfm_jax.features import Extractor
from lfm_jax.jobs.judge import Look, of_array

class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return {"features": nn.gelu(nn.Conv(16, (3, 3))(x)).reshape(x.shape[0], -1)[:, ::8]}

params = Net().init(jax.random.key(0), np.zeros((1, 8, 8, 1), np.float32))["params"]
extractor = Extractor(params=params, model=Net(), name="n", dim=128, input_size=8, channels=1)
images = load_digits().data.astype(np.uint8).reshape(-1, 8, 8, 1)
found = Look(extractor=extractor)(of_array(images), len(images), "digits")
np.savez(f"{out}.{rank}.npz", rows=found.features, covariance=found.statistics.covariance)
"""


def devices() -> None:
    """One device, eight devices and two processes see the same images."""
    import socket
    import subprocess
    import tempfile

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name, processes, count in (("one", 1, 1), ("eight devices", 1, 8), ("two", 2, 1)):
            environment = dict(os.environ, JAX_PLATFORMS="cpu")
            environment["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
            environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"
            out = f"{folder}/{name}"
            workers = [
                subprocess.Popen(
                    [sys.executable, "-c", _WORKER, str(rank), str(processes), port, out],
                    env=environment,
                )
                for rank in range(processes)
            ]
            assert [worker.wait() for worker in workers] == [0] * processes
            found[name] = [dict(np.load(f"{out}.{rank}.npz")) for rank in range(processes)]
    one = found["one"][0]
    for name, label in (("eight devices", "eight devices"), ("two", "two processes")):
        worst = max(relative(f[key], one[key]) for f in found[name] for key in one)
        record(
            "evaluation",
            f"features and covariance of {label}, relative difference to one device",
            worst,
            "<=",
            1e-5,
            f"{COMMAND} devices",
            "1,797 digits through a small network; error over the largest value",
        )


QUESTIONS = {
    "parity": parity,
    "inception": inception,
    "frechet": frechet,
    "recall": recall,
    "devices": devices,
}


def main() -> None:
    for name in sys.argv[1:] or list(QUESTIONS):
        print(f"---- {name}: {QUESTIONS[name].__doc__}")
        QUESTIONS[name]()
    for figure in json.loads((RESULTS / "evaluation.json").read_text())["figures"]:
        sign = "ok " if figure["holds"] else "NOT"
        print(f"{sign} {figure['name']}: {figure['value']:.4g} {figure['op']} {figure['bound']}")


if __name__ == "__main__":
    main()
