"""The edit job on real digits with an untrained network: what it writes, chooses and refuses."""

import json

import jax
import numpy as np
import pytest
from checkout import ROOT
from etils import epath
from PIL import Image

from lfm_jax import checkpoints, jobs
from lfm_jax.boundary import load_boundary
from lfm_jax.config import to_json
from lfm_jax.config_check import check_config
from lfm_jax.errors import UserError
from lfm_jax.experiments import neighbour
from lfm_jax.jobs import build, edit, editing
from lfm_jax.models import init_params
from lfm_jax.workdir import Workdir


def small_config(init, **fields):
    """The smoke variant of the digits' edit, in pixel space, of a pixel attribute."""
    config = neighbour(str(ROOT / "configs" / "x"), "boundary_digits.py", "smoke")
    config.init = str(init)
    config.autoencoder.kind = "identity"
    config.edit.attribute = "pixels:brightness"
    config.edit.leakage = ("pixels:slant",)
    config.edit.count = 6
    config.edit.strips = 2
    with config.unlocked():
        for key, value in fields.items():
            config.edit[key] = value
    check_config(config)
    return config


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """Random weights as a release, with the config that describes them."""
    folder = tmp_path_factory.mktemp("release")
    config = small_config(folder)
    params = jax.device_get(init_params(build.network(config), jax.random.key(0), (8, 8, 1)))
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x + 0.05 * random.normal(size=x.shape).astype(np.float32), params
    )
    described = {"config": to_json(config)}
    checkpoints.save_release(folder, params, described)
    (folder / "config.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="module")
def run(release, tmp_path_factory):
    """A finished edit in z and h with every curve."""
    workdir = tmp_path_factory.mktemp("edit")
    config = small_config(
        release,
        space="both",
        curves=("radius", "separability", "commitment", "utility"),
        completions=2,
        also=("pixels:thickness",),
        also_weights=(0.0,),
        eta=0.5,
    )
    return workdir, jobs.run_job("edit", config, str(workdir))


def test_what_it_writes(run):
    workdir, result = run
    assert result == json.loads((workdir / "results/edit.json").read_text())
    folder = workdir / "edit"
    for name in ("strips.png", "grid.png", "mixing.png"):
        assert Image.open(folder / name).size[0] > 100
    with np.load(folder / "edited.npz", allow_pickle=False) as made:
        assert made["arr_0"].shape == (6, 8, 8, 1) and made["arr_0"].dtype == np.uint8
        assert made["by_strength"].shape == (2, 6, 8, 8, 1)
        assert sorted(made["side"].tolist()) == [-1, -1, -1, 1, 1, 1]
    assert sorted(path.name for path in folder.glob("*.npz")) == [
        "boundary_0_block_01.npz",
        "boundary_0_z.npz",
        "boundary_1_block_01.npz",
        "boundary_1_z.npz",
        "edited.npz",
    ]


def test_what_it_chose_is_in_the_result(run):
    workdir, result = run
    mixing = json.loads((workdir / "edit/mixing.json").read_text())
    assert mixing["times"] == [0.5, 0.8] and result["t"] == mixing["t"] in (0.5, 0.8)
    assert set(mixing["curves"]) == {"radius", "separability", "commitment", "utility"}
    assert set(mixing["layers"]) == {"block_01"}
    assert result["chosen_by"].keys() == mixing["curves"].keys()
    assert result["strength"] in (1.0,)
    quality = result["boundary"]["z"]
    assert 0 <= quality["held_out"]["auc"] <= 1 and quality["cost"] > 0
    assert set(result["boundary"]["cross"]) == {"inverted", "noised", "sampled"}
    assert set(result["leakage"]) == {"pixels:brightness", "pixels:thickness", "pixels:slant"}
    assert [row["strength"] for row in result["strengths"]] == [-1.0, 1.0]
    assert result["seconds"]["fit"] > 0


def test_a_saved_boundary_edits_again_and_elsewhere_is_refused(run, release, tmp_path):
    workdir, result = run
    file = workdir / "edit/boundary_0_z.npz"
    assert load_boundary(file).provenance["attribute"] == "pixels:brightness"
    again = jobs.run_job("edit", small_config(release, boundary=str(file)), str(tmp_path))
    assert again["t"] == result["t"] and again["rule"] == "given"
    other = 0.5 if result["t"] == 0.8 else 0.8
    with pytest.raises(UserError, match=f"fitted with t {result['t']}, here it is {other}"):
        jobs.run_job("edit", small_config(release, boundary=str(file), time=other), str(tmp_path))
    hidden = workdir / "edit/boundary_0_block_01.npz"
    with pytest.raises(UserError, match="fitted with space 'block_01', here it is 'z'"):
        jobs.run_job("edit", small_config(release, boundary=str(hidden)), str(tmp_path))


def test_images_come_from_files_indices_and_samples(release, tmp_path):
    image = tmp_path / "digit.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)).save(image)
    for images, count in ((str(image), 1), (str(tmp_path), 1), ("test:3,17", 2), ("sampled", 6)):
        config = small_config(release, images=images, time=0.5)
        judges = editing.make_judges(config, Workdir(epath.Path(tmp_path)))
        editor = editing.make_editor(config, Workdir(epath.Path(tmp_path)))
        target = editing.targets(config, editor, judges[0])
        assert len(target) == count and set(target.sides.tolist()) <= {-1, 1}


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"attribute": None}, "edit.attribute is unset"),
        ({"attribute": "pair:3/eleven"}, "no class 'eleven'"),
        ({"attribute": "table:Smiling"}, "edit.table is unset"),
        ({"attribute": "text:a cat/a dog"}, "edit.clip is unset"),
        ({"images": "test:3,x"}, "expected indices such as"),
        ({"images": "test:99999"}, "99999 is not in 0..354"),
        ({"images": "/no/such/image.png"}, "expected test, train"),
        ({"strengths": (1.0, float("nan"))}, "edit.strengths=.*nan.*finite numbers"),
        ({"strengths": (0.0,)}, r"edit.strengths=\(0.0,\): .*at least one of them not 0"),
        ({"times": (), "time": None}, r"edit.times=\(\): expected one or more rising times"),
        ({"also": ("pixels:slant",)}, "one weight for each"),
        ({"time": 1.5}, r"a time in \(0, 1\]"),
        ({"space": "h", "layer": "mid"}, "'mid' is none of this network's block_00"),
    ],
)
def test_mistakes_are_one_line(release, tmp_path, fields, named):
    with pytest.raises(UserError, match=named):
        jobs.run_job("edit", small_config(release, **{"time": 0.5, **fields}), str(tmp_path))


def test_an_image_of_another_size_is_refused(release, tmp_path):
    image = tmp_path / "large.png"
    Image.new("L", (16, 8)).save(image)
    config = small_config(release, images=str(image), time=0.5)
    with pytest.raises(UserError, match="an image of 8x16 pixels; this network edits 8x8"):
        jobs.run_job("edit", config, str(tmp_path))


def test_an_attribute_with_one_side_is_refused(release, tmp_path):
    config = small_config(release, attribute="pair:3/8", time=0.5, num_fit=20)
    config.data.limit = 40
    config.data.num_classes = 10
    with pytest.raises(UserError, match="expected at least 10 on each side"):
        edit.run(config, Workdir(epath.Path(tmp_path)))


def test_exit_status_2_and_one_line(command_line, release, tmp_path):
    done = command_line(
        f"--config={ROOT}/configs/boundary_digits.py:smoke",
        f"--workdir={tmp_path}",
        f"--config.init={release}",
        "--config.autoencoder.kind=identity",
        "--config.edit.attribute=pixels:mood",
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and "pixels:mood" in done.stderr
