"""Maps, layouts and masks from files and rules, and every mistake in them named."""

import json

import numpy as np
import pytest
from PIL import Image

from lfm_jax.conditions import figures
from lfm_jax.data import open_images, open_layouts, open_maps, read_layouts
from lfm_jax.data.celebamask import MASKS, PARTS
from lfm_jax.data.id_files import fit_hole
from lfm_jax.data.layouts import _digits
from lfm_jax.data.maps import BACKGROUND_BELOW, EDGE_ABOVE, garment_parts
from lfm_jax.data.mask_files import open_masked
from lfm_jax.data.pixels import Preprocess
from lfm_jax.errors import UserError


def _save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


def _folder_of_images(root, names, size=16):
    for i, name in enumerate(names):
        _save(root / f"{name}.png", np.full((size, size), 10 * i))
    return open_images("folder", path=str(root), image_size=size, channels=1)


# ---- maps


def test_the_rule_for_garments_is_scipys_sobel(fashion_mnist):
    from scipy import ndimage

    source = open_images("idx", split="test", path=str(fashion_mnist), image_size=32, channels=1)
    images = source.batch(range(40))["image"]
    found = garment_parts(images)
    kernel = np.array([1, 2, 1]) / 4
    for image, ids in zip(images[..., 0].astype(float), found, strict=True):
        smooth = ndimage.correlate1d(image, kernel, 0, mode="nearest")
        smooth = ndimage.correlate1d(smooth, kernel, 1, mode="nearest")
        gradient = np.hypot(ndimage.sobel(smooth, 0), ndimage.sobel(smooth, 1)) / 4
        wanted = np.where(smooth < BACKGROUND_BELOW, 0, 1 + (gradient > EDGE_ABOVE))
        # The border row differs: there SciPy repeats the smoothed image and not the image.
        np.testing.assert_array_equal(ids[1:-1, 1:-1], wanted[1:-1, 1:-1])
    assert [round(float((found == k).mean()), 2) for k in range(3)] == [0.62, 0.21, 0.18]
    maps = open_maps("garment_parts", source, image_size=32)
    np.testing.assert_array_equal(maps.batch([3, 5]), found[[3, 5]])
    assert maps.num_classes == 3 and len(maps) == len(source)


def test_maps_pair_with_images_by_name(tmp_path):
    images = _folder_of_images(tmp_path / "images", ["a", "b", "c"])
    for i, name in enumerate("cab"):
        _save(tmp_path / "maps" / f"{name}.png", np.full((16, 16), i))
    options = {"path": str(tmp_path / "maps"), "image_size": 16, "num_classes": 3}
    maps = open_maps("folder", images, **options)
    assert maps.batch(range(3))[:, 0, 0].tolist() == [1, 2, 0]
    (tmp_path / "maps/b.png").rename(tmp_path / "maps/d.png")
    with pytest.raises(UserError, match=r"no file for image b\.png; no image for file d\.png"):
        open_maps("folder", images, **options)


def test_names_that_repeat_pair_by_their_folders(tmp_path):
    """Classes that count their images from 0 each must not get one another's maps."""
    for i, part in enumerate("xy"):
        _save(tmp_path / f"images/{part}/0.png", np.full((16, 16), i))
        _save(tmp_path / f"maps/{part}/0.PNG", np.full((16, 16), 2 - i))
    images = open_images("folder", path=str(tmp_path / "images"), image_size=16, channels=1)
    options = {"path": str(tmp_path / "maps"), "image_size": 16, "num_classes": 3}
    assert open_maps("folder", images, **options).batch([0, 1])[:, 0, 0].tolist() == [2, 1]
    _save(tmp_path / "images/x/0.jpg", np.zeros((16, 16)))
    images = open_images("folder", path=str(tmp_path / "images"), image_size=16, channels=1)
    with pytest.raises(UserError, match=r"x/0\.jpg, x/0\.png have one name"):
        open_maps("folder", images, **options)
    with pytest.raises(UserError, match=r"image x/a\.png: expected a number as CelebAMask-HQ"):
        (tmp_path / "images/x/0.jpg").rename(tmp_path / "images/x/a.png")
        images = open_images("folder", path=str(tmp_path / "images"), image_size=16, channels=1)
        open_maps("celebamask", images, **options)


def test_maps_that_would_fill_the_memory_are_refused(tmp_path):
    _folder_of_images(tmp_path / "images", ["a"])
    _save(tmp_path / "maps/a.png", np.zeros((1, 60_000)))
    images = open_images("folder", path=str(tmp_path / "images"), image_size=256, channels=1)
    options = {"path": str(tmp_path / "maps"), "image_size": 256, "num_classes": 3}
    with pytest.raises(UserError, match=r"a\.png: 60000x1 pixels grow beyond"):
        open_maps("folder", images, **options)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "maps/a.png")
    with pytest.raises(UserError, match=r"a\.png: .*(20000x20000|400000000) pixels"):
        open_maps("folder", images, **options)


def test_an_unknown_id_is_named_with_its_file(tmp_path):
    images = _folder_of_images(tmp_path / "images", ["a"])
    _save(tmp_path / "maps/a.png", np.full((16, 16), 7))
    with pytest.raises(UserError, match=r"a\.png: unknown class id 7; expected 0 to 2"):
        open_maps(
            "folder", images, path=str(tmp_path / "maps"), image_size=16, num_classes=3
        ).batch([0])


def test_ids_are_resized_without_mixing_and_cropped_as_images(tmp_path):
    ids = np.zeros((40, 64), np.uint8)
    ids[:, 32:] = 2
    _save(tmp_path / "images/a.png", np.where(ids, 255, 0))
    _save(tmp_path / "maps/a.png", ids)
    images = open_images("folder", path=str(tmp_path / "images"), image_size=20, channels=1)
    maps = open_maps("folder", images, path=str(tmp_path / "maps"), image_size=20, num_classes=3)
    found = maps.batch([0])[0]
    assert set(np.unique(found)) == {0, 2}
    np.testing.assert_array_equal(found > 0, images.batch([0])["image"][0, ..., 0] > 127)


def test_coco_stuff_counts_unlabelled_as_the_first_class(tmp_path):
    images = _folder_of_images(tmp_path / "images", ["a"])
    ids = np.full((16, 16), 255)
    ids[:8] = 181
    _save(tmp_path / "maps/a.png", ids)
    maps = open_maps("coco_stuff", images, path=str(tmp_path / "maps"), image_size=16)
    assert maps.num_classes == 183
    assert np.unique(maps.batch([0])).tolist() == [0, 182]
    ids[9] = 182
    _save(tmp_path / "maps/a.png", ids)
    with pytest.raises(UserError, match=r"a\.png: unknown class id 182; expected 0 to 181"):
        maps.batch([0])


def test_the_parts_of_a_face_cover_one_another_in_order(tmp_path):
    face = np.zeros((512, 512, 3), np.uint8)
    (tmp_path / "CelebA-HQ-img").mkdir()
    for number in (5, 27_000):
        Image.fromarray(face).save(tmp_path / f"CelebA-HQ-img/{number}.jpg")
    folder = tmp_path / MASKS / "0"
    for part, rows in (("hair", 300), ("skin", 400), ("hat", 100)):
        mask = np.zeros((512, 512))
        mask[:rows] = 225
        _save(folder / f"00005_{part}.png", mask)
    images = open_images("celebamask", path=str(tmp_path), image_size=64)
    assert len(images) == 1
    assert len(open_images("celebamask", split="test", path=str(tmp_path), image_size=64)) == 1
    found = open_maps("celebamask", images, path=str(tmp_path), image_size=64).batch([0])[0, :, 0]
    place = {part: i + 1 for i, part in enumerate(PARTS)}
    wanted = [place["hat"]] * 12 + [place["hair"]] * 25 + [place["skin"]] * 13 + [0] * 14
    assert (found != wanted).sum() <= 2 and len(PARTS) == 18
    (folder / "00005_nose.png").write_bytes((folder / "00005_hat.png").read_bytes())
    _save(folder / "00005_nose.png", np.zeros((8, 8)))
    with pytest.raises(UserError, match=r"00005_nose\.png: 8x8 pixels; expected 512x512"):
        open_maps("celebamask", images, path=str(tmp_path), image_size=64).batch([0])


# ---- layouts


def test_canvases_hold_real_digits_in_their_boxes():
    images = open_images("digit_canvases", split="test", image_size=24, channels=1)
    layouts = open_layouts("digit_canvases", images, split="test")
    told = layouts.batch(range(60))
    canvases = images.batch(range(60))["image"]
    boxes, classes = told["boxes"], told["classes"]
    assert boxes.shape == (60, 4, 4) and set(np.unique(classes)) == {*range(-1, 10)}
    empty = figures.outside_boxes(boxes, classes, 24)
    assert not canvases[empty].any()
    digits = _digits("test")
    for i, j in np.argwhere(classes >= 0)[:40]:
        x0, y0, x1, y1 = np.round(boxes[i, j] * 24).astype(int)
        crop, size = canvases[i, y0:y1, x0:x1, 0], (x1 - x0, y1 - y0)
        group = [np.asarray(Image.fromarray(d).resize(size, 2)) for d in digits[classes[i, j]]]
        assert any((crop == digit).all() for digit in group)
    # As many lit pixels outside of a box as there are neighbours in it: none.
    areas = [(b[:, 2] - b[:, 0]) @ (b[:, 3] - b[:, 1]) * 576 for b in boxes]
    np.testing.assert_allclose((~empty).sum((1, 2)), areas, rtol=1e-4)


def test_held_out_canvases_hold_held_out_digits():
    train, test = (np.concatenate(_digits(split)).reshape(-1, 64) for split in ("train", "test"))
    assert len(train) + len(test) == 1797
    both = {row.tobytes() for row in train} & {row.tobytes() for row in test}
    assert len(both) < 5  # scikit-learn's own doubles
    sources = [open_images("digit_canvases", split=s, image_size=24, channels=1)
               for s in ("train", "test")]  # fmt: skip
    assert sources[0].fingerprint != sources[1].fingerprint and len(sources[0]) == 20_000


def test_what_a_real_canvas_scores_by_construction():
    images = open_images("digit_canvases", split="test", image_size=24, channels=1)
    told = open_layouts("digit_canvases", images, split="test").batch(range(40))
    canvases = images.batch(range(40))["image"]
    score = figures.box_iou(canvases, told["boxes"], told["classes"], threshold=48)
    assert 0.6 < score < 1
    moved = np.roll(canvases, 4, axis=2)
    assert figures.box_iou(moved, told["boxes"], told["classes"], threshold=48) < score - 0.2
    cut = figures.crops(canvases, told["boxes"], told["classes"], size=8)
    assert len(cut["image"]) == (told["classes"] >= 0).sum() and cut["image"].shape[1:] == (8, 8, 1)


@pytest.mark.parametrize(
    "boxes, words",
    [
        ([[3, 0.1, 0.1, 0.4, 0.4], [4, 0.3, 0.3, 0.6, 0.6]], "image 0: boxes 0 and 1 overlap"),
        ([[3, 0.7, 0.1, 1.2, 0.4]], "box 0 (0.7, 0.1, 1.2, 0.4) lies out of the canvas"),
        ([[3, 0.5, 0.1, 0.4, 0.4]], "box 0 (0.5, 0.1, 0.4, 0.4) is empty"),
        ([[12, 0.1, 0.1, 0.4, 0.4]], "box 0: class 12 is not in 0..9"),
        ([[1, 0, 0, 0.1, 0.1]] * 5, "5 boxes, at most 4 accepted"),
    ],
)
def test_impossible_layouts_are_named(tmp_path, boxes, words):
    path = tmp_path / "layouts.json"
    path.write_text(json.dumps([boxes]))
    options = {"num_classes": 10, "max_objects": 4}
    with pytest.raises(UserError) as caught:
        read_layouts(str(path), overlap=False, **options)
    assert words in str(caught.value) and "layouts.json" in str(caught.value)
    if "overlap" in words:
        found, classes = read_layouts(str(path), overlap=True, **options)
        assert found.shape == (1, 4, 4) and classes.tolist() == [[3, 4, -1, -1]]


def test_every_bad_layout_is_named(tmp_path):
    path = tmp_path / "layouts.json"
    good, out = [3, 0.1, 0.1, 0.4, 0.4], [4, 0.7, 0.1, 1.2, 0.4]
    path.write_text(json.dumps([[out, good, good], [good], [[float("nan"), *good[1:]]]]))
    with pytest.raises(UserError) as caught:
        read_layouts(str(path), num_classes=10, max_objects=4, overlap=False)
    for words in ("image 0: box 0 (0.7", "boxes 1 and 2 overlap", "image 2: box 0: class nan",
                  "2 images in all"):  # fmt: skip
        assert words in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["[[1, 2, 3]]", "[[1, 0, 0, 1, 1]]", '[[["1", "0", "0", "1", "1"]]]', "[[[null, 0, 0, 1, 1]]]",
     "[[[true, 0, 0, 1, 1]]]", f"[[[1{'0' * 400}, 0, 0, 1, 1]]]", "[" * 100_000],
    ids=["numbers", "flat", "strings", "null", "truth", "huge", "deep"],
)  # fmt: skip
def test_a_file_that_is_no_layout_is_one_line(tmp_path, text):
    path = tmp_path / "layouts.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"layouts\.json: .*expected a JSON list"):
        read_layouts(str(path), num_classes=10, max_objects=4, overlap=False)


def test_coco_boxes_lie_in_the_cropped_square(tmp_path):
    for name in ("000000000001", "000000000002"):
        _save(tmp_path / f"images/{name}.png", np.zeros((40, 80)))
    things = {
        "images": [
            {"id": i, "file_name": f"00000000000{i}.png", "width": 80, "height": 40} for i in (1, 2)
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}],
        "annotations": [
            {"image_id": 1, "category_id": 3, "bbox": [20, 0, 20, 20]},
            {"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 40]},  # cropped away
        ],
    }
    stuff = {
        "images": things["images"],
        "categories": [{"id": 92, "name": "banner"}, {"id": 183, "name": "other"}],
        "annotations": [
            {"image_id": 1, "category_id": 92, "bbox": [50, 0, 30, 40]},
            {"image_id": 2, "category_id": 183, "bbox": [20, 0, 40, 40]},
        ],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_train2017.json").write_text(json.dumps(things))
    (tmp_path / "annotations/stuff_train2017.json").write_text(json.dumps(stuff))
    images = open_images("folder", path=str(tmp_path / "images"), image_size=16, channels=1)
    layouts = open_layouts("coco", images, path=str(tmp_path), max_objects=3)
    assert layouts.class_names == ("person", "car", "banner")
    told = layouts.batch([0, 1])
    assert told["classes"].tolist() == [[1, 2, -1], [-1, -1, -1]]
    np.testing.assert_allclose(told["boxes"][0, 0], [0, 0, 0.5, 0.5])
    np.testing.assert_allclose(told["boxes"][0, 1], [0.75, 0, 1, 1])


@pytest.mark.parametrize(
    "part, change",
    [
        ("annotations", {"image_id": 1, "category_id": 1}),
        ("annotations", {"image_id": 1, "bbox": [0, 0, 9, 9]}),
        ("annotations", {"image_id": 1, "category_id": 1, "bbox": [0, 9]}),
        ("annotations", {"image_id": 1, "category_id": 1, "bbox": ["a"] * 4}),
        ("categories", None),
        ("images", {"id": 1, "file_name": "a.png", "width": 0, "height": 9}),
    ],
)
def test_damaged_annotations_are_one_line(tmp_path, part, change):
    images = _folder_of_images(tmp_path / "images", ["a"])
    things = {
        "images": [{"id": 1, "file_name": "a.png", "width": 16, "height": 16}],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9]}],
    }
    things[part] = [change]
    (tmp_path / "instances_train2017.json").write_text(json.dumps(things))
    with pytest.raises(UserError, match=str(tmp_path)):
        open_layouts("coco", images, path=str(tmp_path), max_objects=3).batch([0])


# ---- masks from files


def test_images_and_masks_from_folders(tmp_path):
    _folder_of_images(tmp_path / "images", ["a", "b"])
    mask = np.zeros((16, 16))
    mask[4:8] = 255
    _save(tmp_path / "masks/a.png", mask)
    _save(tmp_path / "masks/b.png", mask.T // 255)
    source, holes = open_masked(str(tmp_path), image_size=16, channels=1)
    assert len(source) == 2 and holes[0, 4:8].all() and holes.mean() == 0.25
    np.testing.assert_array_equal(holes[1], holes[0].T)


def test_every_bad_mask_is_named(tmp_path):
    _folder_of_images(tmp_path / "images", ["a", "b", "c", "d"])
    mask = np.full((16, 16), 255)
    _save(tmp_path / "masks/a.png", mask[:8])
    gray = mask.copy()
    gray[3, 3] = 100
    _save(tmp_path / "masks/b.png", gray)
    _save(tmp_path / "masks/c.png", 0 * mask)
    _save(tmp_path / "masks/d.png", mask)
    with pytest.raises(UserError) as caught:
        open_masked(str(tmp_path), image_size=16, channels=1)
    for words in (
        "a.png has 16x8 pixels, its image 16x16",
        "b.png is not binary (it holds 100 beside 0 and 255)",
        "c.png has no hole",
        "3 in all",
    ):
        assert words in str(caught.value)
    Image.fromarray(mask.astype(np.uint8)).convert("RGB").save(tmp_path / "masks/a.png")
    (tmp_path / "masks/b.png").write_bytes(b"no image")
    with pytest.raises(
        UserError, match=r"a\.png: mode RGB; .*b\.png: not a readable image.*3 in all"
    ):
        open_masked(str(tmp_path), image_size=16, channels=1)
    (tmp_path / "masks/d.png").rename(tmp_path / "masks/e.png")
    with pytest.raises(UserError, match=r"no file for image d\.png; no image for file e\.png"):
        open_masked(str(tmp_path), image_size=16, channels=1)


def test_a_hole_that_is_lost_on_the_way_is_named(tmp_path):
    """One beside the square that is cut out; a stroke of one pixel in a large image stays."""
    mask = np.zeros((64, 128))
    mask[:, 63] = 255
    _save(tmp_path / "images/a.png", mask)
    _save(tmp_path / "images/b.png", mask)
    _save(tmp_path / "masks/a.png", mask)
    _save(tmp_path / "masks/b.png", np.roll(mask, -60, axis=1))
    with pytest.raises(UserError, match=r"masks: b\.png has no hole left at 8x8 .*1 in all"):
        open_masked(str(tmp_path), image_size=8, channels=1)


def test_a_pixel_that_touches_a_hole_is_not_known():
    """Nearest neighbours would keep pixels whose content is partly the hole's."""
    mask = np.zeros((32, 32), np.uint8)
    mask[7:17, 9:16] = 255  # no edge but the right one falls between two pixels of 4x4
    found = fit_hole(mask, Preprocess(image_size=8, channels=1, fit="crop"), "a")
    wanted = mask.reshape(8, 4, 8, 4).max((1, 3)) > 0
    np.testing.assert_array_equal(found, wanted)


def test_a_palettes_white_is_the_hole_whatever_its_number(tmp_path):
    _folder_of_images(tmp_path / "images/train", ["a"])
    picture = Image.new("P", (16, 16), 1)
    picture.putpalette([255, 255, 255, 0, 0, 0])
    picture.paste(0, (0, 0, 16, 4))
    (tmp_path / "masks").mkdir()
    picture.save(tmp_path / "masks/a.png")
    _, holes = open_masked(str(tmp_path), image_size=16, channels=1)
    assert holes[0, :4].all() and holes.mean() == 0.25


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    _save(tmp_path / "masks/a.png", np.full((16, 16), 255))
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"images/a\.png: not a readable image"):
        open_masked(str(tmp_path), image_size=16, channels=1)
