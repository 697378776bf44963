"""Masks: what each kind hides, that they depend on their seed alone, how they are kept."""

import numpy as np
import pytest

from lfm_jax.conditions import MASKS, Inpainting, draw_mask, draw_masks, masks
from lfm_jax.errors import UserError


def _many(names, count=150, size=32, seed=0):
    return draw_masks(names, seed, np.arange(count), 1, size)[:, 0]


@pytest.mark.parametrize("name", [name for name in MASKS if name != "paper"])
def test_a_mask_is_never_empty(name):
    assert _many(name, 40 if name == "freeform" else 150).any((1, 2)).all()


def test_the_papers_masks_may_be_empty_and_others_where_it_is_asked():
    empty = ~_many("paper").any((1, 2))
    # A quarter of the draws of boxes asks for none, and a tenth of those of strokes.
    assert 0.05 < empty.mean() < 0.35
    random = np.random.default_rng(0)
    allowed = [draw_mask("boxes", random, 32, allow_empty=True).any() for _ in range(60)]
    assert not all(allowed)


@pytest.mark.parametrize("size", [32, 256])
def test_lengths_scale_with_the_image(size):
    boxes = _many("boxes", 60, size)
    # One box of 30..100 of 256 pixels a side is between 1.4 % and 15.3 % of the image.
    share = boxes.mean((1, 2))
    assert share.min() >= 0.9 * (30 / 256) ** 2 and share.max() <= 3.2 * (100 / 256) ** 2
    margin = round(10 * size / 256)
    assert not boxes[:, :margin].any() and not boxes[:, :, -margin:].any()


def test_known_shapes_hide_what_they_say():
    assert (_many("half").mean((1, 2)) == 0.5).all()
    corners = {tuple(m[[0, 0, -1], [0, -1, 0]]) for m in _many("half")}
    assert len(corners) == 4  # left, right, upper, lower
    center = _many("center", 1)[0]
    assert center[8:24, 8:24].all() and center.mean() == 0.25
    assert np.abs(1 - _many("outpaint").mean((1, 2)) - 0.25).max() < 0.03
    assert 0.4 < _many("freeform", 60).mean() < 0.9  # large holes
    assert 0.05 < _many("lama").mean() < 0.25  # small ones


def test_a_mask_depends_on_seed_number_and_place_alone():
    whole = draw_masks("lama+half", 3, np.arange(6), 2, 32)
    parts = [draw_masks("lama+half", 3, np.array([i]), 2, 32) for i in range(6)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert (whole[:, 0] != whole[:, 1]).any((1, 2)).all()
    assert (whole != draw_masks("lama+half", 4, np.arange(6), 2, 32)).any()


@pytest.mark.parametrize("size", [8, 9, 32])
def test_packing_keeps_every_pixel_on_host_and_device(size):
    drawn = np.random.default_rng(0).random((3, 2, size, size)) < 0.5
    packed = masks.pack(drawn)
    assert packed.shape == (3, 2, -(-(size**2) // 8))
    np.testing.assert_array_equal(masks.unpack(packed, size), drawn)
    condition = Inpainting(
        masks="lama", image_size=size, latent_shape=(size, size, 1), scale=1.0, shift=0.0
    )
    np.testing.assert_array_equal(condition.unpacked(packed), drawn)


def test_an_unknown_kind_is_answered_with_the_choices():
    with pytest.raises(UserError, match=r"'circle' is none of strokes, boxes, lama"):
        draw_mask("lama+circle", np.random.default_rng(0), 32)
