"""Baselines of the anchors."""

import numpy as np
import pytest
import torch
from scipy.ndimage import label

from helpers import phantom
from helpers.anchors import Prompted
from helpers.baselines import (
    CLASSICAL,
    automatic,
    grid_side,
    single_prompts,
    slic_merged,
)
from helpers.sam import Proposals, build_small_sam


@pytest.fixture(scope="module")
def image():
    return phantom.render(1, seed=2, size=(110, 128)).image


@pytest.mark.parametrize("baseline", CLASSICAL.values(), ids=CLASSICAL)
def test_baselines_have_about_the_number_asked_and_tile_the_image(baseline, image):
    masks = baseline(image, 20)
    assert 13 <= len(masks) <= 28
    assert masks.shape[1:] == image.shape[:2] and masks.dtype == bool
    assert (masks.sum(0) == 1).all()


@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_merging_gives_exactly_the_number_asked_in_connected_pieces(image, n):
    masks = slic_merged(image, n)
    assert len(masks) == n
    assert all(label(mask, np.ones((3, 3)))[1] == 1 for mask in masks)


def test_merging_finds_a_bright_square():
    image = np.full((80, 100, 3), 90, np.uint8)
    image[24:56, 30:62] = 220
    inside = np.zeros((80, 100), bool)
    inside[24:56, 30:62] = True
    masks = slic_merged(image, 2, finer=60)
    iou = (masks & inside).sum((1, 2)) / (masks | inside).sum((1, 2))
    assert iou.max() > 0.8


def test_automatic_masks_are_as_many_as_asked_at_most_and_within_the_sizes(image):
    torch.manual_seed(0)
    sam = build_small_sam(64, dim=32).requires_grad_(False)
    masks = automatic(sam, image, 3, n_prompts=16)
    assert len(masks) <= 3 and masks.shape[1:] == image.shape[:2] and masks.dtype == bool
    none = automatic(sam, image, 3, n_prompts=4, min_area=0.5, max_area=0.500001)
    assert none.shape == (0, *image.shape[:2])


def test_single_prompts_are_the_best_of_the_first_of_each_superpixel():
    logits = torch.full((6, 32, 32), -1.0)  # three superpixels with two prompts
    for i, left in enumerate((2, 12, 22)):
        logits[2 * i, 4:10, left : left + 6] = 1
        logits[2 * i + 1, 20:30] = 1
    iou = np.array([0.1, 0.9, 0.6, 0.9, 0.8, 0.9], np.float32)
    prompted = Prompted(
        labels=np.zeros((32, 32), np.int32),
        points=np.zeros((3, 2, 2), np.int64),
        proposals=Proposals(logits, iou, (32, 32), (32, 32), 32),
        asked=np.ones((3, 2), bool),
        box=(0, 0, 32, 32),
        size=(32, 32),
    )
    firsts = logits[::2].numpy() > 0
    np.testing.assert_array_equal(single_prompts([prompted], 2), firsts[[2, 1]])
    assert len(single_prompts([prompted], 9)) == 3
    assert single_prompts([prompted], 9, min_area=0.5).shape == (0, 32, 32)
    with pytest.raises(ValueError, match="at least one"):
        single_prompts([prompted], 0)


def test_the_grid_has_about_as_many_points_as_prompts():
    assert [grid_side(n) for n in (1, 4, 6, 7, 450, 32)] == [1, 2, 2, 3, 21, 6]


@pytest.mark.parametrize("baseline", CLASSICAL.values(), ids=CLASSICAL)
def test_no_segments_are_refused(baseline, image):
    with pytest.raises(ValueError, match="at least one"):
        baseline(image, 0)
