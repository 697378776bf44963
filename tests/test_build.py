"""The images that a config describes, as every job gets them."""

import pytest

from lfm_jax.config import default_config
from lfm_jax.errors import UserError
from lfm_jax.jobs import build


def test_class_names_of_the_config_stand_in_for_the_source_s():
    config = default_config()
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    own = build.images(config, "train")
    config.data.class_names = names
    named = build.images(config, "train")
    assert own.class_names == tuple("0123456789") and named.class_names == names
    assert named.fingerprint == own.fingerprint  # a caption changes no cache and no checkpoint


def test_class_names_must_be_one_a_class():
    config = default_config()
    config.data.class_names = ("zero", "one")
    with pytest.raises(UserError, match=r"data.class_names=.*2 names; expected one .* 10 classes"):
        build.images(config, "train")


def test_fit_and_label_table_reach_the_source(tmp_path):
    from PIL import Image

    for name in ("a.png", "b.png"):
        Image.new("L", (6, 4), 255).save(tmp_path / name)
    (tmp_path / "mine.csv").write_text("a.png,bag\nb.png,shoe\n")
    config = default_config()
    config.data.source, config.data.path = "folder", str(tmp_path)
    config.data.num_classes, config.data.labels = 2, str(tmp_path / "mine.csv")
    cropped = build.images(config, "train")
    assert cropped.class_names == ("bag", "shoe") and cropped[0]["image"].min() == 255
    config.data.fit = "pad"
    assert build.images(config, "train")[0]["image"].min() == 0
