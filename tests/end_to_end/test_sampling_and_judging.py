"""Sampling, guiding, diagnosing and judging one small run through its jobs."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest
from checkout import ROOT
from etils import epath
from PIL import Image

from lfm_jax import checkpoints, jobs, sharding
from lfm_jax.config_check import check_config
from lfm_jax.errors import UserError
from lfm_jax.jobs.cost_curve import setting_of
from lfm_jax.jobs.generate import Generator
from lfm_jax.jobs.judge import share
from lfm_jax.workdir import Workdir


def config(**changes):
    """The digits' smoke run; ``sample__num_steps=3`` sets ``config.sample.num_steps``."""
    spec = importlib.util.spec_from_file_location("digits", ROOT / "configs" / "digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.get_config("smoke")
    for name, value in changes.items():
        section, _, field = name.partition("__")
        made[section][field] = value
    check_config(made)
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory, command_line):
    """A workdir trained for a few steps and watched meanwhile."""
    folder = tmp_path_factory.mktemp("run")
    done = command_line(
        f"--config={ROOT}/configs/digits.py:smoke",
        f"--workdir={folder}",
        "--config.train.evaluate_every=10",
        "--config.train.evaluate_samples=50",
        "--config.train.preview_every=0",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads((folder / "results/train.json").read_text())


def go(folder, job, **changes):
    return jobs.run_job(job, config(**changes), str(folder))


def test_the_best_step_is_kept_and_sampled(run):
    folder, trained = run
    lines = [json.loads(line) for line in (folder / "logs/evaluate.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20]
    values = {line["step"]: line["FD-digits-cnn"] for line in lines}
    best = min(values, key=values.get)
    assert trained["best_step"] == best == checkpoints.latest_step(folder / "best")
    assert trained["best FD-digits-cnn"] == pytest.approx(values[best])
    curves = json.loads((folder / "results/curves.json").read_text())
    assert curves["FD-digits-cnn over step"] == [[10, values[10]], [20, values[20]]]
    sampled = go(folder, "sample", sample__checkpoint="best", sample__num_samples=20)
    assert sampled["checkpoint_step"] == best


def test_parts_of_another_batch_size_are_not_taken_for_these(run):
    folder, _ = run
    options = {"sample__num_samples": 25, "sample__latents": True, "sample__jpeg": 90}
    files = {}
    for size in (10, 25):
        go(folder, "sample", sample__batch_size=size, **options)
        with np.load(folder / "samples/samples.npz") as arrays:
            files[size] = arrays["arr_0"]
            assert arrays["arr_0"].shape == (25, 8, 8, 1) and len(arrays["arr_1"]) == 25
    difference = np.abs(files[10].astype(int) - files[25])
    assert difference.max() <= 1
    assert len(list((folder / "samples/jpeg").glob("*.jpg"))) == 25
    with np.load(folder / "samples/latents.npz") as arrays:
        assert arrays["arr_0"].shape == (25, 4, 4, 4) and arrays["arr_0"].dtype == np.float32
    assert not list((folder / "samples").glob("parts-*"))


def test_nothing_of_another_sampling_stays_beside_the_samples(run):
    folder, _ = run
    for count, latents in ((12, True), (10, False)):
        go(
            folder,
            "sample",
            sample__num_samples=count,
            sample__png=True,
            sample__latents=latents,
            sample__trajectory=3 if latents else 0,
        )
        assert len(list((folder / "samples/png").glob("*.png"))) == count
        for name in ("latents.npz", "trajectory.png"):
            assert (folder / "samples" / name).exists() == latents


def test_pictures_of_the_way_between_and_in_other_classes(run):
    folder, _ = run
    asked = {"sample__trajectory": 3, "sample__interpolation": 5, "sample__class_switch": 2}
    told = go(folder, "sample", sample__num_samples=20, sample__grid="1,0.6,0.3,0", **asked)
    assert told["num_steps"] == told["nfe"] == 3  # of the times, not of config.sample.num_steps
    sizes = {
        name: Image.open(folder / f"samples/{name}.png").size
        for name in ("grid", "trajectory", "interpolation", "class_switch")
    }
    assert sizes["class_switch"][0] > 10 * 48 and sizes["interpolation"][0] > 5 * 48


def test_interpolation_ends_at_the_two_samples(run):
    folder, _ = run
    workdir = Workdir(epath.Path(folder))
    generator = Generator.from_config(config(), workdir)
    params = checkpoints.load_params(workdir.checkpoints)
    labels = np.zeros(3, np.int32)
    images = generator.between(params, ([4, 4, 4], [9, 9, 9]), [0.0, 0.5, 1.0], labels)
    ends, _, _ = generator(params, [4, 9], labels[:2])
    assert np.abs(images[[0, 2]].astype(int) - ends).max() <= 1
    assert np.abs(images[1].astype(int) - images[0]).max() > 1


def test_a_file_of_images_is_a_reference_and_gives_recall(run):
    folder, _ = run
    go(folder, "sample", sample__num_samples=60)
    made = go(folder, "reference", reference__split="test", reference__images=30)
    told = go(
        folder,
        "evaluate",
        evaluate__reference=str(folder / made["file"]),
        evaluate__metrics=("fd", "pr", "kid"),
        evaluate__singular=True,
    )
    assert told["num_real_for_recall"] == 30 and told["num_reference"] == made["count"]
    # Beside somebody's statistics too: real images, and what the autoencoder loses.
    # Of a few images and a flow of a few steps the order is chance; the scale is not.
    assert 0 < told["fd_floor"] < 2 * told["FD-digits-cnn"]
    assert 0 < told["fd_reconstruction"] < 2 * told["FD-digits-cnn"]
    rows = folder / "images.npz"
    with np.load(folder / made["file"]) as arrays:
        np.savez(rows, arr_0=arrays["arr_0"])
    told = go(
        folder,
        "evaluate",
        evaluate__reference=str(rows),
        evaluate__metrics=("fd", "pr"),
        evaluate__singular=True,
        evaluate__floors=False,
    )
    assert told["num_reference"] == 30 and np.isfinite(told["FD-digits-cnn"])
    assert "fd_floor" not in told


def test_jpeg_is_applied_to_both_sides_and_copies_are_looked_for(run):
    folder, _ = run
    go(folder, "sample", sample__num_samples=60)
    told = go(folder, "evaluate", evaluate__jpeg=50, evaluate__memorisation=200)
    assert told["jpeg_quality"] == told["reference"]["jpeg_quality"] == 50
    assert 0 <= told["memorised_share"] <= 1 and told["num_train"] == 200
    assert Image.open(folder / "samples/nearest.png").size[0] > 400


def test_a_solve_that_fails_is_named_and_finished_parts_are_kept(run, monkeypatch):
    folder, _ = run
    made, whole = [], Generator.__call__

    def broken(self, params, indices, labels, **options):
        made.append(int(indices[0]))
        if indices[0] == 10:
            params = jax.tree.map(lambda p: p * np.nan, params)
        return whole(self, params, indices, labels, **options)

    asked = {"sample__num_samples": 20, "sample__batch_size": 10, "sample__seed": 7}
    monkeypatch.setattr(Generator, "__call__", broken)
    with pytest.raises(FloatingPointError, match=r"10 of 10 .* first sample 10 at t = 0\.75"):
        go(folder, "sample", sample__solver="euler", sample__num_steps=4, **asked)
    (parts,) = (folder / "samples").glob("parts-*")
    assert [path.name for path in parts.iterdir()] == ["00000000.npz"]
    monkeypatch.undo()
    made.clear()
    monkeypatch.setattr(
        Generator,
        "__call__",
        lambda self, p, i, c, **o: made.append(int(i[0])) or whole(self, p, i, c, **o),
    )
    go(folder, "sample", sample__solver="euler", sample__num_steps=4, **asked)
    assert made == [10]


@pytest.mark.slow
def test_every_kind_of_guidance_and_noise_on_the_way(run):
    folder, _ = run
    small = {"classifier__width": 8, "classifier__steps": 6, "classifier__batch_size": 32}
    trained = go(folder, "classifier", classifier__log_every=3, **small)
    assert set(trained["accuracy_over_t"]) == {"0.1", "0.3", "0.5", "0.7", "0.9"}
    guided = go(
        folder,
        "sample",
        sample__num_samples=20,
        sample__classifier_guidance=1.0,
        sample__autoguidance=1.5,
        sample__weak=str(folder),
        sample__guidance_rescale=0.5,
        **small,
    )
    # The pair of classifier-free guidance, the weak network, the classifier: four a velocity.
    assert guided["network_calls"] == 4 * guided["nfe"]
    assert guided["autoguidance"] == 1.5 and guided["classifier_guidance"] == 1.0
    noisy = go(folder, "sample", sample__num_samples=20, sample__sde="heun", sample__eta=1.0)
    assert noisy["nfe"] == 2 * (config().sample.num_steps - 1) + 1


@pytest.mark.slow
def test_the_flow_is_diagnosed(run):
    folder, _ = run
    found = go(
        folder,
        "diagnose",
        diagnose__num_images=12,
        diagnose__points=3,
        diagnose__times=3,
        diagnose__iterations=4,
        diagnose__likelihood_steps=4,
        diagnose__inversion_steps=(2, 8),
        diagnose__switched=2,
        diagnose__curve=("euler:2", "bosh3:1e-2"),
        diagnose__curve_samples=40,
    )
    bound = found["bound"]
    assert bound["int_one_sided"]["log_bound"] <= bound["sup_lipschitz"]["log_bound"]
    assert bound["sup_lipschitz"]["dominating"] and bound["profile"]["t"] == [0.0, 0.5, 1.0]
    assert np.isfinite(found["likelihood"]["bits_per_dim"])
    coarse, fine = found["inversion"]["rows"]
    assert fine["rmse"] < coarse["rmse"] and fine["nfe"] == 32
    assert [row["setting"] for row in found["curve"]] == ["euler, 2 steps", "bosh3, rtol 0.01"]
    assert Image.open(folder / "samples/switched.png").size[0] > 10 * 48
    curves = json.loads((folder / "results/curves.json").read_text())
    assert {"FD-digits-cnn (euler) over NFE", "inversion error over NFE"} <= set(curves)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sample__solver": "rk5"}, "sample.solver=rk5.*euler"),
        ({"sample__grid": "log"}, "sample.grid=log.*uniform.*1,0.6"),
        ({"sample__solver": "rk4", "sample__rtol": 1e-3, "sample__atol": 1e-3}, "rk4.*heun"),
        (
            {"sample__sde": "heun", "sample__eta": 1.0, "sample__rtol": 1.0, "sample__atol": 1.0}
            | {"sample__solver": "dopri5"},
            "sde=heun: it takes fixed steps; expected sample.rtol=0",
        ),
        ({"sample__eta": 0.5}, "eta=0.5: expected sample.sde or sample.solver=ddim"),
        ({"sample__autoguidance": 2.0, "sample__weak": "/nowhere"}, "weak=/nowhere"),
        ({"sample__classifier_guidance": 1.0, "classifier__width": 16}, "classifier"),
        ({"sample__labels": "3,11"}, "class 11"),
        ({"sample__guidance_channels": 99}, "guidance_channels=99: expected at most 4"),
    ],
)
def test_what_cannot_be_sampled_is_named_before_anything_is_written(run, changes, named, tmp_path):
    folder, _ = run
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("autoencoder", "checkpoints", "results"):
        (copy / name).symlink_to(folder / name)
    with pytest.raises(UserError, match=named):
        go(copy, "sample", **changes)
    assert not (copy / "samples").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sample__sde": "heun"}, "eta > 0"),
        ({"sample__autoguidance": 2.0}, "sample.weak"),
        ({"sample__guidance_interval": (0.9, 0.1)}, "guidance_interval"),
        ({"sample__rtol": -1.0, "sample__atol": 1.0}, "rtol"),
        ({"sample__rtol": 1e-3, "sample__atol": 0.0}, "set both, or neither"),
        (
            {"model__name": "adm_context", "condition__kind": "layout", "data__num_classes": 4},
            "adm_context takes classes or boxes, not both",
        ),
        ({"sample__num_steps": 0}, "num_steps"),
        ({"sample__masks": "half"}, "masks=half: condition.kind=none"),
        (
            {"condition__kind": "inpainting", "sample__repeats": 9, "sample__num_samples": 8},
            "repeats=9: expected at most sample.num_samples=8",
        ),
        ({"sample__guidance": 2.0, "train__label_drop": 0.0}, "null label"),
    ],
)
def test_what_a_config_contradicts_is_named(changes, named):
    with pytest.raises(UserError, match=named):
        config(**changes)


def test_settings_of_a_curve_are_read_or_refused():
    assert setting_of("heun:8") == {"solver": "heun", "num_steps": 8, "rtol": None, "atol": None}
    assert setting_of("dopri5:1e-3")["rtol"] == 1e-3
    for text in ("foo:3", "heun", "heun:2.5", "euler:1e-3", "heun:-1"):
        with pytest.raises(UserError, match=text):
            setting_of(text)


def test_processes_share_images_without_gap_or_overlap(monkeypatch):
    for count, processes in ((10, 3), (7, 7), (1000, 8)):
        parts = []
        for index in range(processes):
            monkeypatch.setattr(jax, "process_count", lambda n=processes: n)
            monkeypatch.setattr(jax, "process_index", lambda i=index: i)
            parts += list(range(*share(count)))
        assert parts == list(range(count))
    with pytest.raises(UserError, match="2 images for 8 processes"):
        share(2)


def test_a_generator_on_a_part_of_the_devices_makes_the_same(run):
    folder, _ = run
    workdir = Workdir(epath.Path(folder))
    generator = Generator.from_config(config(), workdir)
    assert generator.mesh.size == jax.device_count()
    one = dataclasses.replace(generator, mesh=sharding.make_mesh(devices=jax.devices()[:1]))
    params = checkpoints.load_params(workdir.checkpoints)
    labels = np.arange(3, dtype=np.int32)
    a, b = (g(params, range(3), labels)[0] for g in (generator, one))
    assert np.abs(a.astype(int) - b).max() <= 1
