"""Files are written whole; scalars of a resumed run appear once; grids have the size they say."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from lfm_jax.writers import (
    ScalarWriter,
    copy_whole,
    image_grid,
    save_image,
    write_bytes,
    write_json,
)


def test_a_failing_write_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    from etils import epath

    kind = type(epath.Path(path))

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(kind, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(path, b"half")
    assert json.loads(path.read_text()) == {"old": 1}


def test_a_copy_is_whole_or_not_there(tmp_path):
    source, target = tmp_path / "a", tmp_path / "there" / "b"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "file").write_text("one")
    left_over = tmp_path / "there" / ".b.partial"
    left_over.mkdir(parents=True)
    (left_over / "half").write_text("")
    copy_whole(source, target)
    assert [p.name for p in target.iterdir()] == ["deep"] and not left_over.exists()
    assert (target / "deep" / "file").read_text() == "one"
    copy_whole(source / "deep" / "file", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "one"


def test_a_resumed_log_holds_every_step_once(tmp_path):
    writer = ScalarWriter(tmp_path, "train")
    for step in (10, 20, 30):
        writer.write(step, {"loss": 1.0 / step})
    writer.close()
    writer = ScalarWriter(tmp_path, "train", start=20)
    writer.write(30, {"loss": 0.5})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30] and lines[-1]["loss"] == 0.5


def test_tensorboard_gets_the_scalars_without_torch(tmp_path):
    program = (
        "import sys; from lfm_jax.writers import ScalarWriter\n"
        f"writer = ScalarWriter({str(tmp_path)!r}, 'train')\n"
        "writer.write(10, {'loss': 0.5}); writer.close()\n"
        "assert 'torch' not in sys.modules, 'seconds of every start'\n"
        "import importlib.util as u; assert u.find_spec('torch')\n"  # for whoever needs it later
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    (events,) = (tmp_path / "train").iterdir()
    assert b"loss" in events.read_bytes()


def test_a_grid_places_images_row_by_row(tmp_path):
    images = np.zeros((6, 8, 8, 1), np.uint8)
    images[4] = 200
    picture = image_grid(images, columns=3, min_side=16)
    assert picture.size == (3 * 18 + 2, 2 * 18 + 2)
    pixels = np.asarray(picture)
    assert pixels[2 + 18 + 8, 2 + 18 + 8, 0] == 200  # second row, second column
    assert pixels[2 + 8, 2 + 18 + 8, 0] == 0
    save_image(tmp_path / "grid.png", picture)
    assert Image.open(tmp_path / "grid.png").size == picture.size


def test_row_labels_widen_the_grid():
    images = np.zeros((2, 50, 50, 3), np.uint8)
    plain, labelled = (image_grid(images, columns=1, row_labels=r) for r in ((), ("boot", "shoe")))
    assert labelled.size[0] > plain.size[0] and labelled.size[1] == plain.size[1]
