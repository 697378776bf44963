"""Conditions through the jobs: cached, trained, sampled under, measured; mistakes in a line."""

import importlib.util
import json

import jax.numpy as jnp
import numpy as np
import pytest
from checkout import ROOT
from etils import epath
from PIL import Image

from lfm_jax import checkpoints
from lfm_jax.conditions import ENCODER, masks
from lfm_jax.config_check import check_config
from lfm_jax.data import open_cache, open_images
from lfm_jax.errors import UserError
from lfm_jax.jobs import run_job, watch
from lfm_jax.jobs.generate import Generator
from lfm_jax.state import TrainState
from lfm_jax.workdir import Workdir


def _config(name, **condition):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("smoke")
    config.condition.update(condition)
    check_config(config)
    return config


@pytest.fixture(scope="module")
def inpainted(tmp_path_factory):
    """A finished smoke run of inpainting on digits, with two samples a condition."""
    config = _config("digits", kind="inpainting", masks="half+boxes", mask_channels="pixels")
    config.sample.repeats = 2
    config.sample.condition_guidance, config.sample.guidance = 1.5, 1.2
    folder = tmp_path_factory.mktemp("inpaint")
    run_job("pipeline", config, str(folder))
    return config, folder


def test_training_touches_no_image(inpainted):
    _, folder = inpainted
    cache = open_cache(folder / "latents/train")
    record = cache.read(range(3))
    assert record["mask"].shape == (3, 2, 8) and record["masked"].shape == (3, 2, 4, 4, 4)
    assert masks.unpack(record["mask"], 8).any((2, 3)).all()
    params = checkpoints.load_params(folder / "checkpoints")
    # 4 latent channels, 4 of the masked image, 4 pixels a latent position, in patches of 2x2.
    assert params["patch"]["kernel"].shape == (4 * (4 + 4 + 4), 32) and ENCODER not in params


def test_samples_keep_known_pixels_and_are_measured(inpainted):
    _, folder = inpainted
    figures = json.loads((folder / "results/evaluate.json").read_text())
    assert figures["known_pixels_exact"] is True and figures["psnr_known"] is None
    for key in ("psnr_hole", "psnr_hole_class_mean", "fd_completed", "fd_class_mean",
                "p_ids_completed", "u_ids_completed", "diversity_rms"):  # fmt: skip
        assert np.isfinite(figures[key])
    assert figures["diversity_rms"] > 0
    with np.load(folder / "samples/samples.npz") as samples:
        images, labels = samples["arr_0"], samples["arr_1"]
    held_out = open_images("digits", split="test", channels=1)
    places = np.linspace(0, len(held_out) - 1, 30).round().astype(int)
    truth = held_out.batch(places)
    np.testing.assert_array_equal(labels, np.repeat(truth["label"], 2))
    same = images == np.repeat(truth["image"], 2, axis=0)
    assert 0.4 < same.mean() < 1
    sampled = json.loads((folder / "results/sample.json").read_text())
    assert sampled["condition"] == "inpainting" and sampled["network_calls"] == 3 * sampled["nfe"]
    assert Image.open(folder / "samples/grid.png").size[0] > 150


def test_what_is_measured_while_training_has_the_class_of_its_condition(inpainted, monkeypatch):
    config, folder = inpainted
    config = config.copy_and_resolve_references()
    config.train.evaluate_samples = 12

    class Asked(Exception):
        pass

    def first(self, params, count, *, labels, **options):
        raise Asked(self.given.numbers(np.arange(count)), labels)

    monkeypatch.setattr(Generator, "first", first)
    watch_step = watch.watcher(config, Workdir(epath.Path(folder)))
    with pytest.raises(Asked) as asked:
        watch_step(TrainState(step=jnp.int32(1), params={}, opt_state=(), ema=None), 1)
    numbers, labels = asked.value.args
    held_out = open_images("digits", split="test", channels=1)
    places = np.linspace(0, len(held_out) - 1, 30).round().astype(int)
    np.testing.assert_array_equal(labels, held_out.batch(places[numbers])["label"])
    assert len(set(labels[::2])) > 1


def test_conditions_from_files(inpainted, tmp_path):
    config, folder = inpainted
    config = config.copy_and_resolve_references()
    for name in "ab":
        for part, values in (("images", 90), ("masks", 0)):
            picture = np.full((8, 8), values, np.uint8)
            if part == "masks":
                picture[:, 4:] = 255
            (tmp_path / part).mkdir(exist_ok=True)
            Image.fromarray(picture).save(tmp_path / part / f"{name}.png")
    config.sample.given = str(tmp_path)
    config.sample.num_samples = config.sample.batch_size = 4
    run_job("sample", config, str(folder))
    with np.load(folder / "samples/samples.npz") as samples:
        assert (samples["arr_0"][:, :, :4] == 90).all() and samples["arr_0"].shape[0] == 4
    before = (folder / "samples/samples.npz").read_bytes()
    Image.fromarray(np.zeros((8, 4), np.uint8)).save(tmp_path / "masks/a.png")
    with pytest.raises(UserError, match=r"a\.png has 4x8 pixels, its image 8x8"):
        run_job("sample", config, str(folder))
    assert (folder / "samples/samples.npz").read_bytes() == before
    assert [p.name for p in (folder / "samples").iterdir() if "parts" in p.name] == []


def test_a_run_takes_over_autoencoder_and_weights(inpainted, tmp_path):
    config, folder = inpainted
    config = config.copy_and_resolve_references()
    config.init = str(folder)
    config.train.steps = 1
    for job in ("autoencode", "encode", "train"):
        result = run_job(job, config, str(tmp_path))
    theirs = Workdir(epath.Path(folder)).result("autoencode")
    ours = Workdir(epath.Path(tmp_path)).result("autoencode")
    assert ours["latent_scale"] == theirs["latent_scale"] and ours["taken_over"] is True
    ends = [checkpoints.load_params(f / "autoencoder/checkpoints") for f in (folder, tmp_path)]
    assert checkpoints.fingerprint(ends[0]) == checkpoints.fingerprint(ends[1])
    assert result["steps"] == 1
    config.autoencoder.latent_channels = 2
    with pytest.raises(UserError, match=r"its autoencoder\.latent_channels is 4, here 2"):
        run_job("autoencode", config, str(tmp_path / "other"))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"condition.kind": "depth"}, "none, inpainting, semantic, layout"),
        ({"condition.kind": "inpainting", "condition.masks": "circle"}, "none of strokes"),
        ({"condition.kind": "layout"}, "model.context_dim=None"),
        ({"condition.kind": "semantic", "train.mirror": True}, "left and right"),
        ({"condition.kind": "semantic", "condition.drop": 0.0, "sample.condition_guidance": 2.0},
         "condition.drop > 0"),
        ({"sample.repeats": 3}, "condition.kind=none"),
    ],
)  # fmt: skip
def test_fields_that_contradict_are_named(changes, words):
    config = _config("digits")
    for key, value in changes.items():
        section, field = key.split(".")
        config[section][field] = value
    with pytest.raises(UserError, match=words):
        check_config(config)


@pytest.mark.slow
def test_layouts_through_the_pipeline(tmp_path):
    config = _config("layout_digits")
    run_job("pipeline", config, str(tmp_path))
    figures = json.loads((tmp_path / "results/evaluate.json").read_text())
    assert figures["crop_accuracy_real"] > figures["crop_accuracy_samples"]
    assert figures["empty_lit_real"] == 0
    assert ENCODER in checkpoints.load_params(tmp_path / "checkpoints")
    layouts = tmp_path / "layouts.json"
    layouts.write_text(json.dumps([[[3, 0.1, 0.1, 0.5, 0.5]], [[3, 0.1, 0.1, 1.5, 0.5]]]))
    config.sample.given = str(layouts)
    with pytest.raises(UserError, match=r"image 1: box 0 .* lies out of the canvas"):
        run_job("sample", config, str(tmp_path))


@pytest.mark.slow
def test_maps_through_the_pipeline(fashion_mnist, tmp_path):
    config = _config("semantic_fashion_mnist", source="garment_parts")
    run_job("pipeline", config, str(tmp_path))
    figures = json.loads((tmp_path / "results/evaluate.json").read_text())
    assert figures["miou_real"] == 1 and 0 < figures["miou_samples"] < 1
    maps = tmp_path / "maps"
    maps.mkdir()
    Image.fromarray(np.full((32, 32), 5, np.uint8)).save(maps / "a.png")
    config.sample.given = str(maps)
    with pytest.raises(UserError, match=r"a\.png: unknown class id 5; expected 0 to 2"):
        run_job("sample", config, str(tmp_path))


@pytest.mark.slow
def test_a_segmenter_reads_the_rule(fashion_mnist):
    from lfm_jax.conditions.segmenter import segment, train_segmenter
    from lfm_jax.data.maps import garment_parts

    source = open_images("idx", path=str(fashion_mnist), image_size=32, channels=1)
    images = source.batch(range(2400))["image"]
    maps = garment_parts(images)
    trained = train_segmenter(images[:2000], maps[:2000], num_classes=3, progress=False)
    assert (segment(trained, images[2000:]) == maps[2000:]).mean() > 0.93
