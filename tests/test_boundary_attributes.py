"""Which side of an attribute an image is on: classes, tables, pixels."""

import numpy as np
import pytest
from PIL import Image

from lfm_jax.boundary.judges import pixel_judge, split_sides, take_sides
from lfm_jax.data import open_images
from lfm_jax.data.attributes import (
    Attribute,
    brightness,
    class_sides,
    parse_attribute,
    pixel_values,
    read_table,
    slant,
    table_sides,
    thickness,
)
from lfm_jax.errors import UserError

NAMES = ("cat", "dog", "wild")
CELEBA = "3\nSmiling Male\n0.jpg  1 -1\n1.jpg -1 -1\n2.jpg  1  1\n"


def test_classes_by_name_and_number():
    labels = np.array([0, 1, 2, 1])
    pair = parse_attribute("pair:Cat/dog")
    assert (pair.negative, pair.positive) == ("Cat", "dog")
    assert class_sides(pair, labels, NAMES).tolist() == [-1, 1, 0, 1]
    assert class_sides(parse_attribute("pair:2/0"), labels, NAMES).tolist() == [1, 0, -1, 0]
    assert class_sides(parse_attribute("class:wild"), labels, NAMES).tolist() == [-1, -1, 1, -1]


@pytest.mark.parametrize(
    "text, named",
    [
        ("smile", "expected pair:A/B"),
        ("pair:cat", "expected two sides"),
        ("pixels:mood", "pixels:brightness"),
        ("class:", "expected pair:A/B"),
    ],
)
def test_other_words_are_refused(text, named):
    with pytest.raises(UserError, match=named):
        parse_attribute(text)


def test_unknown_classes_are_named():
    for text, named in (("pair:cat/bird", "no class 'bird'"), ("pair:cat/0", "the same class")):
        with pytest.raises(UserError, match=named):
            class_sides(parse_attribute(text), np.zeros(3, int), NAMES)
    with pytest.raises(UserError, match="not labelled"):
        class_sides(parse_attribute("class:cat"), np.zeros(3, int), ())


def test_celebas_layout_and_csv_are_one_table(tmp_path):
    (tmp_path / "anno.txt").write_text(CELEBA)
    (tmp_path / "anno.csv").write_text("image_id,Smiling,Male\n0.jpg,1,0\n1.jpg,0,0\n2.jpg,1,1\n")
    for name in ("anno.txt", "anno.csv"):
        columns, table = read_table(str(tmp_path / name))
        assert columns == ("Smiling", "Male")
        assert {file: row.tolist() for file, row in table.items()} == {
            "0.jpg": [1, -1],
            "1.jpg": [-1, -1],
            "2.jpg": [1, 1],
        }
    smiling = parse_attribute("table:Smiling")
    files = ("a/2.jpg", "1.png", "0.jpg")
    assert table_sides(smiling, files, str(tmp_path / "anno.txt")).tolist() == [1, -1, 1]
    for change, named in (
        ({"files": ("7.jpg",)}, "no row for 7.jpg"),
        ({"files": ()}, "no file names"),
        ({"attribute": parse_attribute("table:Hat")}, "no such column; it has Smiling, Male"),
        ({"path": str(tmp_path / "none")}, "none"),
    ):
        given = {"attribute": smiling, "files": files, "path": str(tmp_path / "anno.txt")}
        with pytest.raises(UserError, match=named):
            table_sides(**{**given, **change})
    (tmp_path / "bad.csv").write_text("f,Smiling\n0.jpg,2\n")
    with pytest.raises(UserError, match="line 2"):
        read_table(str(tmp_path / "bad.csv"))


def test_a_folder_of_faces_meets_its_table(tmp_path):
    (tmp_path / "train").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (80 * i, 0, 0)).save(tmp_path / "train" / f"{i}.jpg")
    (tmp_path / "anno.txt").write_text(CELEBA)
    source = open_images("folder", path=str(tmp_path), image_size=8)
    sides = table_sides(parse_attribute("table:Male"), source.files, str(tmp_path / "anno.txt"))
    assert sides.tolist() == [-1, -1, 1]


def bars(width: int, lean: float = 0.0) -> np.ndarray:
    """An upright bar of a width that leans by `lean` pixels a row upwards."""
    rows = np.arange(40)[:, None]
    centre = 20 + lean * (20 - rows)
    return (np.abs(np.arange(40)[None] - centre) < width / 2).astype(float)


def test_thickness_and_slant_of_bars():
    wide = thickness(np.stack([bars(3), bars(7)]))
    np.testing.assert_allclose(wide, [3, 7], rtol=0.2)
    assert wide[1] / wide[0] > 2
    leaning = slant(np.stack([bars(5), bars(5, 0.3), bars(5, -0.3)]))
    np.testing.assert_allclose(leaning, [0, 0.3, -0.3], atol=0.02)
    assert brightness(np.full((1, 4, 4), 0.25))[0] == 0.25
    images = np.stack([bars(3), bars(7)])[..., None].repeat(3, -1) * 255
    attribute = Attribute(name="pixels:thickness", kind="pixels", negative="", positive="thickness")
    np.testing.assert_allclose(pixel_values(attribute, images.astype(np.uint8)), wide, rtol=1e-6)


def test_measured_sides_are_the_outer_thirds_of_real_digits():
    train = open_images("digits", image_size=8, channels=1)
    judge = pixel_judge(parse_attribute("pixels:slant"), train)
    sides = judge.sides(train, np.arange(len(train)))
    assert all(abs((sides == side).mean() - 1 / 3) < 0.03 for side in (-1, 0, 1))
    images = train.batch(np.flatnonzero(sides == 1)[:20])["image"]
    assert np.all(judge.score(images) > 0)


def test_images_to_fit_and_to_choose_with_are_disjoint_and_balanced():
    train = open_images("digits", image_size=8, channels=1)
    judge = pixel_judge(parse_attribute("pixels:brightness"), train)
    (first, sides), (second, later) = split_sides(judge, train, count=100, held_out=40, seed=1)
    assert len(first) == 100 and sides.sum() == 0 and len(second) == 40 and later.sum() == 0
    assert not set(first) & set(second) and np.all(np.diff(first) > 0)
    np.testing.assert_array_equal(judge.sides(train, first), sides)
    again, _ = take_sides(judge, train, count=100, seed=2)
    assert set(again) != set(first)
