"""Baselines of the anchors."""

import numpy as np
import pytest
import torch
from scipy.ndimage import label
from segment_anything.utils.amg import build_all_layer_point_grids
from skimage.segmentation import slic

from helpers import phantom
from helpers.anchors import Prompted, match_glands, prompt
from helpers.baselines import (
    CLASSICAL,
    automatic,
    graph_based,
    grid_side,
    judged,
    rivals,
    single_prompts,
    slic_alone,
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


def test_slic_and_graphs_are_asked_until_their_number_is_near(image):
    plain = len(np.unique(slic(image, 37, compactness=10.0, sigma=2.0)))
    assert abs(plain - 37) > 5
    for baseline in (slic_alone, graph_based):
        assert abs(len(baseline(image, 37)) - 37) <= 3


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


@pytest.mark.parametrize(("n", "layers"), [(16, 0), (50, 1), (90, 2), (9, 2)])
def test_automatic_masks_are_asked_as_many_prompts_as_come_nearest(image, n, layers, monkeypatch):
    torch.manual_seed(0)
    sam = build_small_sam(64, dim=32).requires_grad_(False)
    asked = []
    monkeypatch.setattr(
        "helpers.baselines.SamAutomaticMaskGenerator",
        lambda *_, **options: Counting(asked, options),
    )
    automatic(sam, image, 3, n_prompts=n, crop_n_layers=layers)
    (found,) = asked
    near = []
    for side in range(1, 30):  # by the generator's own grids
        depth = min(layers, side.bit_length() - 1)
        grids = build_all_layer_point_grids(side, depth, 2)
        near.append(sum(4**k * len(grid) for k, grid in enumerate(grids)))
    assert abs(found - n) == min(abs(total - n) for total in near)


class Counting:
    """In the place of the mask generator: how many prompts it would ask."""

    def __init__(self, asked, options):
        grids = build_all_layer_point_grids(
            options["points_per_side"], options["crop_n_layers"],
            options["crop_n_points_downscale_factor"],
        )  # fmt: skip
        asked.append(sum(4**k * len(grid) for k, grid in enumerate(grids)))

    def generate(self, image):
        return []


def test_automatic_masks_are_the_best_of_what_the_generator_finds(image, monkeypatch):
    """Ranked by predicted IoU, within the sizes, whatever the order they are found in."""
    sam = build_small_sam(64, dim=32).requires_grad_(False)
    found = []
    for k, score in enumerate((0.3, 0.9, 0.5, 0.8)):
        mask = np.zeros(image.shape[:2], bool)
        mask[2 * k : 2 * k + 12, 5:25] = True
        found.append({"segmentation": mask, "area": int(mask.sum()), "predicted_iou": score})
    found[1]["area"] = image.size  # too large
    options = {}

    class Fixed:
        def __init__(self, _, **given):
            options.update(given)

        def generate(self, image):
            return list(found)

    monkeypatch.setattr("helpers.baselines.SamAutomaticMaskGenerator", Fixed)
    masks = automatic(sam, image, 2, n_prompts=9, iou_merge=0.4)
    np.testing.assert_array_equal(masks, [found[k]["segmentation"] for k in (3, 2)])
    assert options["box_nms_thresh"] == options["crop_nms_thresh"] == 0.4


def test_single_prompts_may_vote_on_their_outlines_as_anchors_do():
    """Three masks of one structure, each with another margin: the mean of their probabilities."""
    logits = torch.full((3, 32, 32), -1.0)
    logits[0, 8:20, 8:20] = 2
    logits[1, 8:20, 8:21] = 2
    logits[2, 8:21, 8:20] = 2
    prompted = Prompted(
        labels=np.zeros((32, 32), np.int32),
        points=np.zeros((3, 1, 2), np.int64),
        proposals=Proposals(logits, np.array([0.5, 0.9, 0.4], np.float32), (32, 32), (32, 32), 32),
        asked=np.ones((3, 1), bool),
        box=(0, 0, 32, 32),
        size=(32, 32),
    )
    alone, voted = (single_prompts([prompted], 9, voted=v) for v in (False, True))
    np.testing.assert_array_equal(alone, logits[1:2].numpy() > 0)
    np.testing.assert_array_equal(voted, torch.sigmoid(logits).mean(0, keepdim=True).numpy() > 0.5)
    assert (voted != alone).any()


@pytest.mark.parametrize("baseline", CLASSICAL.values(), ids=CLASSICAL)
def test_no_segments_are_refused(baseline, image):
    with pytest.raises(ValueError, match="at least one"):
        baseline(image, 0)


def test_rivals_are_the_methods_with_the_settings_of_the_anchors(image):
    torch.manual_seed(0)
    sam = build_small_sam(64, dim=32).requires_grad_(False)
    asked = prompt(sam, image, rng=np.random.default_rng(0), n_segments=4, crop_n_layers=1)
    settings = {"min_area": 0.01, "max_area": 0.5, "linkage": "single"}
    ways = rivals(sam, image, asked, 6, settings=settings, crop_n_layers=1)
    assert list(ways) == ["single prompts", "single prompts, voted", *CLASSICAL]
    np.testing.assert_array_equal(ways["single prompts"](), single_prompts(asked, 6, **settings))
    voted = single_prompts(asked, 6, voted=True, **settings)
    np.testing.assert_array_equal(ways["single prompts, voted"](), voted)
    np.testing.assert_array_equal(ways["SLIC, merged"](), slic_merged(image, 6))
    ways = rivals(sam, image, asked, 6, settings=settings, crop_n_layers=1, with_automatic=True)
    n_prompts = sum(crop.points.shape[0] * crop.points.shape[1] for crop in asked)
    sizes = {"min_area": 0.01, "max_area": 0.5}
    expected = automatic(sam, image, 6, n_prompts=n_prompts, crop_n_layers=1, **sizes)
    np.testing.assert_array_equal(ways["automatic masks"](), expected)
    ways = rivals(sam, image, asked, 6, settings={}, crop_n_layers=1, with_automatic=True)
    assert ways["automatic masks"]().shape[1:] == image.shape[:2]


def test_each_way_is_called_once_timed_and_compared_with_the_glands():
    glands = np.zeros((20, 30), int)
    glands[2:8, 3:9], glands[15:16, 20:22] = 1, 2
    hit = (glands == 1)[None]
    calls = []
    ways = {"hit": lambda: calls.append("hit") or hit, "none": lambda: hit[:0]}
    rows = judged(ways, glands, min_area=0.01, spent={"none": 100.0})
    assert calls == ["hit"] and [row.pop("method") for row in rows] == ["hit", "none"]
    quick, slow = (row.pop("seconds") for row in rows)
    assert 0 <= quick < 1 and 100 <= slow < 101
    assert rows == [match_glands(masks, glands, min_area=0.01) for masks in (hit, hit[:0])]
    assert rows[0]["mean_best_iou"] == 1 and rows[0]["n"] == 1  # the second gland is too small
