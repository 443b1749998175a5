"""Crops: boxes, who asks which superpixel, and masks back on the raster of the image."""

import itertools

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from torch.nn import functional as F

from helpers import phantom
from helpers.anchors import (
    anchors,
    best_iou,
    choose_anchors,
    identity_vectors,
    iou_matrix,
    prompt,
    segment,
)
from helpers.crops import (
    centred,
    crop_boxes,
    explained,
    inner_edges,
    nearest,
    reaches,
    resample,
    share_out,
    without,
)
from helpers.sam import embed, load_sam, propose
from helpers.superpixels import draw_points, superpixels
from tests.literal_phase1 import literal_anchor

SIZE = (150, 210)


@pytest.fixture(scope="module")
def small():
    return load_sam("small")


@pytest.fixture(scope="module")
def image():
    return phantom.render(1, seed=8, size=SIZE).image


@pytest.mark.parametrize("size", [(64, 64), SIZE, (300, 101)])
def test_crops_of_a_layer_cover_the_image_and_get_smaller(size):
    layers = crop_boxes(size, 2)
    assert [len(boxes) for boxes in layers] == [1, 4, 16]
    assert layers[0] == [(0, 0, size[1], size[0])]
    largest = []
    for boxes in layers:
        covered = np.zeros(size, bool)
        for x0, y0, x1, y1 in boxes:
            assert 0 <= x0 < x1 <= size[1] and 0 <= y0 < y1 <= size[0]
            covered[y0:y1, x0:x1] = True
        assert covered.all()
        largest.append(max((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes))
    assert largest[0] > 1.8 * largest[1] > 1.8 * 1.8 * largest[2]
    (_, _, _, end), (_, start, _, _) = layers[1][:2]
    assert end - start == pytest.approx(512 / 1500 * min(size), abs=1.5)
    with pytest.raises(ValueError, match="n_layers = -1"):
        crop_boxes(size, -1)


def test_masks_reach_the_edges_that_are_marked():
    """One mask a pixel: corners lie on two edges; left, top, right, bottom."""
    masks = np.eye(12, dtype=bool).reshape(12, 3, 4)
    for edges in itertools.product([False, True], repeat=4):
        left, top, right, bottom = edges
        expected = np.zeros((3, 4), bool)
        expected[:, 0] |= left
        expected[0] |= top
        expected[:, -1] |= right
        expected[-1] |= bottom
        for given in (masks, torch.from_numpy(masks)):
            found = np.asarray(reaches(given, edges))
            np.testing.assert_array_equal(found.reshape(3, 4), expected)


def test_inner_edges_are_those_inside_the_image():
    assert inner_edges((0, 0, 210, 150), SIZE) == (False, False, False, False)
    assert inner_edges((0, 40, 100, 150), SIZE) == (False, True, True, False)
    assert inner_edges((60, 0, 210, 90), SIZE) == (True, False, False, True)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_every_superpixel_is_shared_out_once_to_the_crop_of_most_of_its_pixels(image, layer):
    labels = superpixels(image, 40)
    boxes = crop_boxes(SIZE, layer)[layer]
    parts = share_out(labels, boxes)
    owners = np.full(labels.max() + 1, -1)
    for i, ((x0, y0, x1, y1), part) in enumerate(zip(boxes, parts, strict=True)):
        window = labels[y0:y1, x0:x1]
        assert part.shape == window.shape
        former = -1
        for new in range(part.max() + 1):  # numbered from 0 without gaps, in order
            (old,) = np.unique(window[part == new])
            assert owners[old] == -1 and old > former
            assert ((window == old) == (part == new)).all()
            owners[old], former = i, old
    middles = np.array([((x0 + x1 - 1) / 2, (y0 + y1 - 1) / 2) for x0, y0, x1, y1 in boxes])
    for old, owner in enumerate(owners):  # pixel by pixel
        votes = np.zeros(len(boxes))
        for y, x in np.argwhere(labels == old):
            votes[np.argmin(((middles - (x, y)) ** 2).sum(1))] += 1
        assert votes[owner] == votes.max() > 0


def test_points_are_drawn_where_labels_are_not_negative():
    labels = np.full((20, 30), -1)
    labels[3:9, 4:8], labels[12:14, 20:29] = 1, 0
    points = draw_points(labels, 5, rng=np.random.default_rng(0))
    assert points.shape == (2, 5, 2)
    assert (labels[points[..., 1], points[..., 0]] == np.arange(2)[:, None]).all()
    assert draw_points(labels * 0 - 1, 5, rng=np.random.default_rng(0)).shape == (0, 5, 2)
    with pytest.raises(ValueError, match=r"-1 \.\. n-1"):
        draw_points(labels - 1, 5, rng=np.random.default_rng(0))


def test_resampled_masks_lie_where_the_crop_lies():
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    disc = np.hypot(x - 120, y - 80) < 25
    box = (70, 40, 190, 130)
    logits = torch.from_numpy(np.where(disc, 1.0, -1.0)[40:130, 70:190]).float()[None]
    same = resample(logits, box, SIZE, SIZE)[0].numpy()
    np.testing.assert_array_equal(same, disc)
    half = resample(logits, box, SIZE, (75, 105))[0].numpy()
    area = disc.reshape(75, 2, 105, 2).mean((1, 3))
    assert half[area > 0.8].all() and not half[area < 0.2].any()
    full = resample(torch.ones(2, 9, 12), box, SIZE, SIZE).numpy()
    assert full[:, 40:130, 70:190].all() and full.sum() == 2 * 90 * 120


def test_resampling_the_whole_image_changes_nothing():
    logits = torch.randn(3, 15, 21, generator=torch.Generator().manual_seed(0))
    found = resample(logits, (0, 0, 210, 150), SIZE, (15, 21))
    assert torch.equal(found, logits > 0)


def test_a_crop_is_embedded_as_an_image_of_its_own(small, image):
    box = (50, 0, 150, 80)
    there, here = embed(small, image, box=box), embed(small, image[:80, 50:150])
    assert torch.equal(there.features, here.features)
    assert there.original_size == (80, 100) and there.input_size == here.input_size
    assert there.cut == (True, False, True, True) and here.cut == (False,) * 4
    with pytest.raises(ValueError, match="too small"):
        embed(small, image, box=(0, 0, 6, 60))


def test_masks_that_a_crop_cuts_come_back_empty(small, image):
    box = (40, 20, 140, 100)
    points = np.stack(np.meshgrid(np.arange(5, 100, 10), np.arange(5, 80, 10)), -1).reshape(-1, 2)
    cut = propose(small, embed(small, image, box=box), points)
    free = propose(small, embed(small, image[20:100, 40:140]), points)
    masks = free.masks()
    reaches = masks[:, [0, -1]].any((1, 2)) | masks[:, :, [0, -1]].any((1, 2))
    assert 0 < reaches.sum() < len(points)
    np.testing.assert_array_equal(cut.masks(), masks & ~reaches[:, None, None])
    np.testing.assert_array_equal(cut.iou, free.iou)


def test_the_whole_image_is_asked_as_without_crops(small, image):
    settings = {"n_segments": 8, "n_points": 3}
    alone = prompt(small, image, rng=np.random.default_rng(0), crop_n_layers=0, **settings)
    both = prompt(
        small, image, rng=np.random.default_rng(0), crop_n_layers=1, explained_iou=1, **settings
    )
    assert len(alone) == 1 and [c.layer for c in both] == [0, 1, 1, 1, 1]
    np.testing.assert_array_equal(alone[0].points, both[0].points)
    assert torch.equal(alone[0].proposals.padded, both[0].proposals.padded)
    n = [sum(len(c.points) for c in both if c.layer == layer) for layer in (0, 1)]
    assert n[1] == superpixels(image, 16).max() + 1 and n[0] == superpixels(image, 8).max() + 1
    for crop in both:
        x, y = crop.points[..., 0], crop.points[..., 1]
        assert (crop.labels[y, x] == np.arange(len(crop.points))[:, None]).all()


def test_anchors_of_crops_are_those_of_the_literal_form(small, image):
    """One ``SamPredictor`` a crop, one ``predict`` a point, clusters of full masks, loops."""
    crops = prompt(
        small, image, rng=np.random.default_rng(0), n_segments=5, n_points=3, mask_choice="best",
        explained_iou=1,
    )  # fmt: skip
    found = anchors(crops, pred_iou_thresh=0, min_area=0.0, iou_merge=1.0, iou_vote=1.0)
    literal, predictor = [], SamPredictor(small)
    for crop in crops:
        x0, y0, x1, y1 = crop.box
        predictor.set_image(np.ascontiguousarray(image[y0:y1, x0:x1]))
        threshold = 0.1 * np.sqrt((x1 - x0) * (y1 - y0))
        for points in crop.points:
            masks, scores = [], []
            for point in points:
                three, quality, low = predictor.predict(point[None], np.array([1]))
                mask, low = three[np.argmax(quality)], low[np.argmax(quality)] > 0
                h, w = (round(len(low) * side / 256) for side in predictor.input_size)
                low = low[:h, :w]
                edges = (low[:, 0], low[0], low[:, -1], low[-1])
                inside = (x0 > 0, y0 > 0, x1 < SIZE[1], y1 < SIZE[0])
                if any(cut and edge.any() for cut, edge in zip(inside, edges, strict=True)):
                    mask = np.zeros_like(mask)
                masks.append(mask)
                scores.append(float(np.clip(quality.max(), 0, 1)))
            best = literal_anchor(masks, scores, threshold)
            placed = np.zeros(SIZE, bool)
            if best is not None:
                placed[y0:y1, x0:x1] = masks[best]
            literal.append(placed)
    literal = np.array(literal)
    assert found.n_superpixels == len(literal)
    assert len(np.unique(found.layer)) == 3
    same = [
        iou_matrix(mask[None], literal[i][None])[0, 0] >= 0.95
        for mask, i in zip(found.masks, found.superpixel, strict=True)
    ]
    assert len(same) > 15 and sum(same) >= 0.95 * len(same)
    vectors = identity_vectors(found.masks, SIZE)
    assert np.isfinite(vectors).all()


def test_outlines_voted_for_across_crops_are_those_of_the_literal_form(small, image):
    """Probabilities of whole images pixel by pixel, the vote of each segment in loops."""
    crops = prompt(
        small, image, rng=np.random.default_rng(0), n_segments=5, n_points=3, mask_choice="middle"
    )
    settings = {"pred_iou_thresh": 0.2, "min_area": 0.0}
    own, voted = (anchors(crops, iou_vote=iou, **settings) for iou in (1.0, 0.6))
    np.testing.assert_array_equal(own.superpixel, voted.superpixel)
    where = [(crop, i) for crop in crops for i in choose_anchors(crop.proposals, len(crop.points))]
    raster, low, sure = crops[0].proposals.logits.shape[-2:], {}, {}
    for row, (crop, i) in enumerate(where):
        (x0, y0, x1, y1), logits = crop.box, crop.proposals.logits[[i]]
        share = (logits > 0).float().mean() * (x1 - x0) * (y1 - y0) / (SIZE[0] * SIZE[1])
        if i < 0 or crop.proposals.iou[i] < 0.2 or not 0 <= share <= 0.9:
            continue
        low[row] = resample(logits, crop.box, SIZE, raster)[0].numpy()
        scaled = F.interpolate(
            crop.proposals.padded[[i]][None], (256, 256), mode="bilinear", align_corners=False
        )
        h, w = crop.proposals.input_size
        scaled = F.interpolate(
            scaled[..., :h, :w], (y1 - y0, x1 - x0), mode="bilinear", align_corners=False
        )
        sure[row] = np.zeros(SIZE)
        sure[row][y0:y1, x0:x1] = 1 / (1 + np.exp(-scaled[0, 0].double().numpy()))
    changed = 0
    for row, mask, before in zip(voted.superpixel, voted.masks, own.masks, strict=True):
        say = [r for r in low if (low[r] & low[row]).sum() >= 0.6 * (low[r] | low[row]).sum()]
        mean = sum(sure[r] for r in say) / len(say)
        clear = np.abs(mean - 0.5) > 1e-6
        np.testing.assert_array_equal(mask[clear], (mean > 0.5)[clear])
        changed += len(say) > 1 and (mask != before).any()
    assert changed > 3


def test_crops_find_small_glands_that_the_whole_image_misses(small):
    scores = []
    for seed in (0, 1):
        scene = phantom.render(seed, seed=21, grade="poor", size=(192, 192))
        truth = scene.glands
        found = [
            segment(
                small,
                scene.image,
                rng=np.random.default_rng(seed),
                n_segments=n,
                crop_n_layers=layers,
            ).masks
            for layers, n in ((0, 7 * 16), (2, 16))
        ]
        for i in np.unique(truth[truth > 0]):
            gland = truth == i
            if gland.mean() >= 0.002:
                scores.append(
                    [iou_matrix(m, gland[None]).max(initial=0) if len(m) else 0 for m in found]
                )
    alone, with_crops = np.mean(scores, axis=0)
    assert with_crops > alone + 0.05


@pytest.mark.parametrize("early_stop", [False, True])
def test_segments_of_crops_are_complete_and_repeatable(small, image, early_stop):
    one, two = (
        segment(
            small, image, rng=np.random.default_rng(3), n_segments=5, n_points=3,
            early_stop=early_stop,
        )
        for _ in range(2)
    )  # fmt: skip
    np.testing.assert_array_equal(one.masks, two.masks)
    choices = len(prompt.__kwdefaults__["mask_choice"])
    assert len(one) + sum(one.n_dropped.values()) == choices * one.n_superpixels
    least = anchors.__kwdefaults__["pred_iou_thresh"]
    assert one.masks.any((1, 2)).all() and (one.scores >= least).all()
    assert (one.superpixel < one.n_superpixels).all() and one.n_dropped["unsure"] > 0
    overlap = iou_matrix(one.masks) - np.eye(len(one))
    assert overlap.max() < 0.6  # 0.5 on the raster of low resolution


def test_superpixels_in_a_segment_that_the_crop_cuts_are_explained():
    """Pixel by pixel: on a raster of a pixel a cell, and on one of half as many."""
    rng = np.random.default_rng(5)
    size, box = (40, 60), (12, 0, 44, 28)
    whole = np.kron(np.arange(60).reshape(6, 10), np.ones((7, 6), int))[:40, :60]
    labels = share_out(whole, [box])[0]
    masks = np.zeros((6, *size), bool)
    masks[0, 4:25, 20:40] = True  # inside the crop: not cut by it
    masks[1, 0:25, 20:40] = True  # reaches an edge, but that of the image
    masks[2, 4:25, 20:50] = True  # cut at the right
    masks[3, 10:36, 12:20] = True  # cut at the left and at the bottom
    masks[4] = rng.random(size) < 0.5  # cut, but covers half of everything
    expected = np.zeros(labels.max() + 1, bool)
    for mask in masks[2:]:
        for i in range(len(expected)):
            at = np.zeros(size, bool)
            at[:28, 12:44] = labels == i
            expected[i] |= at.any() and mask[at].mean() >= 0.95
    found = explained(labels, box, size, masks)
    assert 0 < expected.sum() < len(expected) - 4
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(explained(labels, box, size, masks[:2]), False)
    np.testing.assert_array_equal(explained(labels, box, size, masks[:0]), False)
    upside_down = explained(labels[::-1], (12, 12, 44, 40), size, masks[:, ::-1])
    np.testing.assert_array_equal(upside_down, expected)
    coarse = explained(labels, box, size, masks[:, ::2, ::2])
    assert (coarse == expected).mean() > 0.9
    left = without(labels, expected)
    for new, old in enumerate(np.flatnonzero(~expected)):
        np.testing.assert_array_equal(left == new, labels == old)
    assert left.max() == (~expected).sum() - 1
    np.testing.assert_array_equal(
        left < 0, (labels < 0) | np.isin(labels, np.flatnonzero(expected))
    )


def test_a_strip_too_thin_for_the_raster_is_asked_all_the_same():
    labels = np.zeros((9, 503), int)
    labels[:, 250:] = 1
    masks = np.ones((2, 1, 64), bool)
    assert explained(labels, (0, 0, 503, 9), (24, 2000), masks).tolist() == [False, False]


def test_what_is_explained_is_not_asked_again(small):
    """A large gland is not asked for in crops that cut it; what is asked is asked as before."""
    scene = phantom.render(3, seed=5, grade="benign", size=(160, 160), microns_per_pixel=0.5)
    settings = {"n_segments": 16, "n_points": 3}
    every, some = (
        prompt(small, scene.image, rng=np.random.default_rng(0), explained_iou=iou, **settings)
        for iou in (1, 0.7)
    )
    asked = [{tuple(map(tuple, p)) for p in crop.points + crop.box[:2]} for crop in every]
    of_box = dict(zip((crop.box for crop in every), zip(every, asked, strict=True), strict=True))
    n = [sum(len(crop.points) for crop in crops) for crops in (every, some)]
    assert n[1] < 0.8 * n[0] and len(some[0].points) == len(every[0].points)
    for crop in some:
        before, points = of_box[crop.box]
        assert {tuple(map(tuple, p)) for p in crop.points + crop.box[:2]} <= points
        rows = [np.flatnonzero((before.points == p).all((1, 2)))[0] for p in crop.points]
        new, old = (
            c.proposals.padded.unflatten(0, (-1, *c.points.shape[:2])) for c in (crop, before)
        )
        torch.testing.assert_close(new, old[:, rows], rtol=1e-3, atol=1e-3)
        x, y = crop.points[..., 0], crop.points[..., 1]
        assert (crop.labels[y, x] == np.arange(len(crop.points))[:, None]).all()


def test_what_is_explained_costs_no_glands(small):
    scores = []
    for index in (3, 4, 5, 7, 8):
        scene = phantom.render(
            index, seed=5, grade="benign", size=(160, 160), microns_per_pixel=0.5
        )
        found = [
            segment(
                small,
                scene.image,
                rng=np.random.default_rng(0),
                n_segments=16,
                crop_n_layers=1,
                explained_iou=iou,
            ).masks
            for iou in (1, 0.7)
        ]
        scores.append([best_iou(masks, scene.glands, min_area=0.01) for masks in found])
    every, some = np.concatenate(scores, axis=1)
    assert len(every) > 15 and some.mean() > every.mean() - 0.02


def test_bad_settings_are_named(small, image):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"asks for 3200 superpixels.*150 x 210; lower either"):
        segment(small, image, rng=rng, n_segments=800, crop_n_layers=2)
    with pytest.raises(ValueError, match=r"32 x 40 into crops of \d pixels, too small"):
        segment(small, image[:32, :40], rng=rng, n_segments=2, crop_n_layers=3)
    with pytest.raises(ValueError, match=r"explained_iou = 2; it must lie in \[0, 1\]"):
        segment(small, image, rng=rng, explained_iou=2)
    with pytest.raises(ValueError, match="n_layers = -2"):
        segment(small, image, rng=rng, crop_n_layers=-2)
    with pytest.raises(ValueError, match=r"pred_iou_thresh = 1.5; it must lie in \[0, 1\]"):
        segment(small, image, rng=rng, n_segments=2, crop_n_layers=0, pred_iou_thresh=1.5)


@pytest.mark.parametrize("zoom", [1, 1.5, 4])
def test_a_box_around_a_pixel_is_the_nearest_of_its_size(zoom):
    height, width = 45, 84
    h, w = round(height / zoom), round(width / zoom)
    for x, y in [(0, 0), (83, 44), (83, 0), (40, 20), (9, 30)]:
        x0, y0, x1, y1 = box = centred(x, y, (height, width), zoom)
        assert all(isinstance(edge, int) for edge in box)
        assert (x1 - x0, y1 - y0) == (w, h) and x0 <= x < x1 and y0 <= y < y1
        fitting = [
            (abs(i + w / 2 - x - 0.5) + abs(j + h / 2 - y - 0.5), i, j)
            for i in range(width - w + 1)
            for j in range(height - h + 1)
        ]
        away = abs(x0 + w / 2 - x - 0.5) + abs(y0 + h / 2 - y - 0.5)
        assert away == min(fitting)[0]


def test_zooms_that_show_nothing_are_named():
    with pytest.raises(ValueError, match=r"zoom = 0\.5; 1 is the whole image"):
        centred(3, 4, (45, 84), 0.5)
    with pytest.raises(ValueError, match="zoom = 9 leaves 5 x 9 pixels of an image of 45 x 84"):
        centred(3, 4, (45, 84), 9)


def test_the_nearest_box_is_that_of_a_literal_search():
    boxes = crop_boxes((61, 84), 2)[2]
    rng = np.random.default_rng(4)
    x, y = rng.integers(0, 84, 50), rng.integers(0, 61, 50)
    for i, column, row in zip(nearest(boxes, x, y), x, y, strict=True):
        away = [
            np.hypot(column + 0.5 - (x0 + x1) / 2, row + 0.5 - (y0 + y1) / 2)
            for x0, y0, x1, y1 in boxes
        ]
        assert away[i] == min(away)
    assert nearest(boxes, x[None], y[:, None]).shape == (50, 50)
