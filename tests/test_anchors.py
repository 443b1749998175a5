"""Identity vectors, clusters, anchors, segments, and the comparison with annotation."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.cluster import AgglomerativeClustering

from helpers import phantom
from helpers.anchors import (
    Prompted,
    anchor_index,
    anchors,
    ask_in_rounds,
    best_iou,
    choose_anchors,
    cluster,
    deduplicate,
    identity_vectors,
    iou_matrix,
    match_glands,
    mean_match,
    n_asked,
    prompt,
    repeated,
    segment,
    segment_all,
    settled,
    take,
)
from helpers.sam import SMALL_WEIGHTS, Proposals, build_small_sam, embed, load_sam, propose
from helpers.segment_table import collect, cut_by_border
from helpers.superpixels import draw_points, superpixels
from tests.literal_phase1 import literal_anchor, literal_anchors, literal_identity

#: Choices of mask, each with an anchor in every superpixel.
CHOICES = len(prompt.__kwdefaults__["mask_choice"])


@pytest.fixture(scope="module")
def small():
    if not SMALL_WEIGHTS.exists():
        pytest.skip("data/weights/sam_small.safetensors is not there")
    return load_sam("small")


@pytest.fixture(scope="module")
def random_sam():
    torch.manual_seed(0)
    return build_small_sam(64, dim=32).requires_grad_(False)


def _disc(shape, centre, radius):
    y, x = np.mgrid[: shape[0], : shape[1]]
    return (x - centre[0]) ** 2 + (y - centre[1]) ** 2 <= radius**2


# ---------------------------------------------------------------- identity vectors


def test_identity_vector_by_hand():
    mask = np.zeros((1, 6, 8), bool)
    mask[0, 1:3, 4:8] = True
    np.testing.assert_allclose(identity_vectors(mask, (6, 8)), [[5.5, 1.5, np.sqrt(8)]])


def test_identity_vectors_are_in_pixels_of_the_image():
    """One cell of 4 x 6 over 40 x 90 pixels: rows 10 .. 19, columns 30 .. 44."""
    masks = np.zeros((2, 4, 6), bool)
    masks[0, 1, 2] = masks[1].flat[:] = True
    np.testing.assert_allclose(
        identity_vectors(masks, (40, 90)), [[37, 14.5, np.sqrt(150)], [44.5, 19.5, 60]]
    )


@pytest.mark.parametrize("size", [(120, 180), (64, 64), (200, 90)])
def test_low_resolution_vectors_are_those_of_the_image(size):
    full = np.stack([_disc(size, (40, 30), 20), _disc(size, (60, 50), 11)])
    low = full[:, ::2, ::2] & full[:, 1::2, ::2] & full[:, ::2, 1::2]
    exact = np.array([literal_identity(mask) for mask in full])
    np.testing.assert_allclose(identity_vectors(full, size), exact)
    np.testing.assert_allclose(identity_vectors(low, size), exact, atol=1.5)


def test_identity_vectors_move_and_grow_with_the_mask():
    a, b = identity_vectors(
        np.stack([_disc((90, 90), (30, 30), 10), _disc((90, 90), (50, 35), 20)]), (90, 90)
    )
    np.testing.assert_allclose(b[:2] - a[:2], [20, 5], atol=1e-9)
    assert b[2] / a[2] == pytest.approx(2, rel=0.03)


def test_empty_masks_have_no_identity():
    assert np.isnan(identity_vectors(np.zeros((2, 5, 5), bool), (10, 10))).all()
    assert identity_vectors(np.zeros((0, 5, 5), bool), (10, 10)).shape == (0, 3)


# ---------------------------------------------------------------- clusters


@pytest.mark.parametrize("linkage", ["average", "complete", "single"])
@pytest.mark.parametrize("spread", [100, 20, 12])  # the last: all within the threshold
def test_clusters_are_those_of_scikit_learn(linkage, spread):
    vectors = np.random.default_rng(0).uniform(0, spread, (40, 3))
    ours = cluster(vectors, distance_threshold=25.0, linkage=linkage)
    theirs = AgglomerativeClustering(
        n_clusters=None, distance_threshold=25.0, linkage=linkage
    ).fit_predict(vectors)
    same = (ours[:, None] == ours) == (theirs[:, None] == theirs)
    assert same.all() and ours[0] == 0


def test_clusters_at_the_extremes():
    vectors = np.random.default_rng(1).normal(size=(7, 3))
    assert set(cluster(vectors, distance_threshold=1e-9)) == set(range(7))
    assert not cluster(vectors, distance_threshold=1e9).any()
    assert cluster(vectors[:1], distance_threshold=1.0).tolist() == [0]


def test_clusters_are_relative_to_the_side():
    """64 x 256 pixels have a side of 128; the two groups lie 20 pixels apart.

    As two clusters, the three that differ win, and their medoid; as one, the two that are equal.
    """
    logits = torch.full((6, 64, 64), -1.0)  # the last mask is empty
    for i, (row, column) in enumerate([(3, 10), (4, 10), (5, 10), (4, 15), (4, 15)]):
        logits[i, row : row + 6, column : column + 6] = 1
    proposals = Proposals(logits, np.full(6, 0.5, np.float32), (64, 256), (64, 256), 256)
    assert choose_anchors(proposals, 1, distance_threshold=0.1).tolist() == [1]
    assert choose_anchors(proposals, 1, distance_threshold=0.2).tolist() == [3]


def test_clusters_do_not_depend_on_the_order():
    rng = np.random.default_rng(2)
    vectors, order = rng.uniform(0, 50, (20, 3)), rng.permutation(20)
    a = cluster(vectors, distance_threshold=15.0)[order]
    b = cluster(vectors[order], distance_threshold=15.0)
    assert ((a[:, None] == a) == (b[:, None] == b)).all()


def test_bad_clusters():
    with pytest.raises(ValueError, match="linkage"):
        cluster(np.zeros((2, 3)), distance_threshold=1, linkage="ward")
    with pytest.raises(ValueError, match="positive"):
        cluster(np.zeros((2, 3)), distance_threshold=0)
    with pytest.raises(ValueError, match="finite"):
        cluster(np.full((2, 3), np.nan), distance_threshold=1)


# ---------------------------------------------------------------- anchors


def test_anchor_is_the_most_frequent_mask_of_the_largest_cluster():
    shape = (60, 60)
    wrong = [_disc(shape, (45, 45), 8)] * 2
    right = [_disc(shape, (20, 20), r) for r in (7, 12, 12, 12, 9)]
    masks = np.stack(wrong + right)
    labels = np.array([0, 0, 1, 1, 1, 1, 1])
    assert anchor_index(iou_matrix(masks), np.ones(7), labels) == 3


def test_ties_between_clusters_go_to_the_predicted_iou():
    masks = np.stack([_disc((40, 40), (10, 10), 5)] * 2 + [_disc((40, 40), (30, 30), 5)] * 2)
    labels, overlap = np.array([0, 0, 1, 1]), iou_matrix(masks)
    assert anchor_index(overlap, np.array([0.5, 0.5, 0.9, 0.9]), labels) == 2
    assert anchor_index(overlap, np.array([0.9, 0.9, 0.5, 0.5]), labels) == 0


def test_ties_within_a_cluster_go_to_the_medoid():
    masks = np.stack([_disc((40, 40), (20, 20), r) for r in (4, 8, 12)])
    assert anchor_index(iou_matrix(masks), np.ones(3), np.zeros(3, int)) == 1


def test_near_duplicates_count_from_the_very_overlap_and_before_the_medoid():
    overlap = np.full((5, 5), 0.3)
    overlap[2], overlap[:, 2] = 0.85, 0.85  # the medoid is no near-duplicate of any
    overlap[0, 1] = overlap[1, 0] = 0.9
    np.fill_diagonal(overlap, 1.0)
    given = overlap, np.full(5, 0.8), np.zeros(5, int)
    assert anchor_index(*given, iou_duplicate=0.9) == 0
    assert anchor_index(*given, iou_duplicate=0.91) == 2


def test_bad_anchor():
    with pytest.raises(ValueError, match="no proposals"):
        anchor_index(np.zeros((0, 0)), np.zeros(0), np.zeros(0, int))
    with pytest.raises(ValueError, match="iou_duplicate"):
        anchor_index(np.ones((1, 1)), np.ones(1), np.zeros(1, int), iou_duplicate=0)


@pytest.mark.parametrize("seed", range(6))
def test_choice_is_that_of_the_literal_form_on_the_same_masks(seed):
    """Low resolution and full resolution coincide here, so that nothing but the choice differs."""
    rng = np.random.default_rng(seed)
    n, k, side = 3, 8, 48
    logits = np.full((n * k, side, side), -1.0, np.float32)
    for i in range(n * k):  # a few structures a superpixel, each seen several times, some empty
        centre, radius = rng.integers(14, 34, 2) // 10 * 10, rng.integers(2, 5) * 3
        if rng.random() > 0.1:
            jitter = rng.uniform(-0.6, 0.6, 2)
            logits[i][_disc((side, side), centre + jitter, radius + rng.uniform(0, 0.5))] = 1
    iou = rng.random(n * k).astype(np.float32)
    proposals = Proposals(torch.from_numpy(logits), iou, (side, side), (side, side), side)
    fast = choose_anchors(proposals, n, distance_threshold=0.1)
    literal = [
        literal_anchor(logits[i * k : (i + 1) * k] > 0, iou[i * k : (i + 1) * k], 0.1 * side)
        for i in range(n)
    ]
    assert fast.tolist() == [i * k + best for i, best in enumerate(literal)]


@pytest.mark.parametrize(("seed", "size"), [(1, (192, 192)), (2, (150, 210)), (3, (256, 180))])
def test_fast_path_gives_the_anchors_of_the_literal_form(small, seed, size):
    """Full resolution decides a tie now and then otherwise, between masks that are near-duplicates.

    So the anchors are compared, not their indices.
    """
    image = phantom.render(seed, seed=8, size=size).image
    points = draw_points(superpixels(image, 6), 6, rng=np.random.default_rng(seed))
    literal, masks = literal_anchors(small, image, points, distance_threshold=0.1)
    proposals = propose(small, embed(small, image), points.reshape(-1, 2))
    fast = choose_anchors(proposals, len(points), distance_threshold=0.1)
    assert len(literal) == len(fast) >= 4
    for i, j in zip(literal, fast, strict=True):
        assert iou_matrix(np.stack([masks[i], proposals.full(j)]))[0, 1] >= 0.95


def test_each_choice_of_mask_has_anchors_of_its_own(small):
    image = phantom.render(2, seed=8, size=(96, 130)).image
    settings = {"n_segments": 6, "n_points": 3, "crop_n_layers": 1, "explained_iou": 1}
    both, *alone = (
        prompt(small, image, rng=np.random.default_rng(0), mask_choice=choice, **settings)
        for choice in (["largest", "best"], "largest", "best")
    )
    assert len(both) == len(alone[0]) == 5
    n = sum(len(crop.points) for crop in both)
    for crop, *parts in zip(both, *alone, strict=True):
        padded = torch.cat([part.proposals.padded for part in parts])
        torch.testing.assert_close(crop.proposals.padded, padded, rtol=1e-4, atol=1e-4)
    every = {"pred_iou_thresh": 0, "min_area": 0, "max_area": 1, "iou_merge": 1, "iou_vote": 1}
    found, *each = (anchors(crops, **every) for crops in (both, *alone))
    known = {
        (i, m.tobytes()) for one in each for i, m in zip(one.superpixel, one.masks, strict=True)
    }
    assert {m.tobytes() for m in found.masks} == {mask for _, mask in known}
    assert {(i, m.tobytes()) for i, m in zip(found.superpixel, found.masks, strict=True)} <= known
    assert found.n_superpixels == each[0].n_superpixels == n
    assert len(found) + sum(found.n_dropped.values()) == 2 * n
    assert len(found) > max(map(len, each))


def test_part_of_the_prompts(random_sam):
    image = phantom.render(0, seed=3, size=(64, 64)).image
    settings = {"n_segments": 4, "n_points": 6, "crop_n_layers": 1, "explained_iou": 1}
    settings["mask_choice"] = ("largest", "smallest")
    all_six = prompt(random_sam, image, rng=np.random.default_rng(0), **settings)
    all_two = take(all_six, slice(2, 4))
    assert len(all_two) == len(all_six) == 5
    six, two = all_six[3], all_two[3]
    n = len(six.points)
    assert (two.box, two.size, two.layer) == (six.box, six.size, six.layer) and six.layer == 1
    assert two.points.shape == (n, 2, 2) and two.asked.shape == (n, 2)
    np.testing.assert_array_equal(two.points, six.points[:, 2:4])
    expected = six.proposals.masks().reshape(2, n, 6, 32, 32)[:, :, 2:4].reshape(-1, 32, 32)
    np.testing.assert_array_equal(two.proposals.masks(), expected)
    np.testing.assert_array_equal(
        two.proposals.iou, six.proposals.iou.reshape(2, n, 6)[:, :, 2:4].ravel()
    )

    smallest = take(all_six, choices=slice(1, 2))[3].proposals
    alone = prompt(
        random_sam, image, rng=np.random.default_rng(0),
        **settings | {"mask_choice": "smallest"},
    )[3].proposals  # fmt: skip
    np.testing.assert_array_equal(smallest.masks(), alone.masks())
    np.testing.assert_array_equal(smallest.iou, alone.iou)


def _crop_of(masks, k):
    """Prompted superpixels whose K masks each are given."""
    n, size = len(masks) // k, masks.shape[1:]
    logits = torch.from_numpy(np.where(masks, 1.0, -1.0).astype(np.float32))
    iou = np.linspace(0.2, 0.9, n * k, dtype=np.float32)
    labels, points = np.zeros(size, np.int32), np.zeros((n, k, 2), int)
    box = (0, 0, size[1], size[0])
    asked = np.ones((n, k), bool)
    return Prompted(labels, points, Proposals(logits, iou, size, size, max(size)), asked, box, size)


def test_two_runs_are_the_halves_of_the_prompts_of_each_superpixel():
    rng, k = np.random.default_rng(3), 3
    crops = []
    for n in (4, 2):
        masks = np.stack([
            _disc((24, 40), rng.choice([10, 14, 30], 2), rng.choice([4, 5, 9]))
            for _ in range(n * 2 * k)
        ])  # fmt: skip
        masks[rng.random(len(masks)) < 0.3] = False
        masks[: 2 * k] &= n == 4  # a superpixel without any answer
        crops.append(_crop_of(masks, 2 * k))
    answered, iou = repeated(crops, distance_threshold=0.2)
    assert answered.shape == (6, 2, 2) and iou.shape == (6, 2)
    row = 0
    for crop in crops:
        masks, predicted = crop.proposals.masks(), crop.proposals.iou
        for i in range(len(crop.points)):
            both = []
            for at in (i * 2 * k, i * 2 * k + k):
                filled = [j for j in range(at, at + k) if masks[j].any()]
                anchor = np.zeros((24, 40), bool)
                if filled:
                    threshold = 0.2 * np.sqrt(24 * 40)
                    best = literal_anchor(masks[filled], predicted[filled], threshold)
                    anchor = masks[filled[best]]
                both.append((masks[at], anchor))
            for way in range(2):
                one, two = both[0][way], both[1][way]
                assert answered[row, way].tolist() == [one.any(), two.any()]
                assert iou[row, way] == pytest.approx((one & two).sum() / max(1, (one | two).sum()))
            row += 1
    assert answered.any() and not answered.all() and not answered[4].any()


# ---------------------------------------------------------------- early stopping


def _first_settled(masks, iou, threshold, linkage="average"):
    """Number of proposals after which a superpixel is settled, and the anchor by then."""
    vectors, overlap = identity_vectors(masks, masks.shape[1:]), iou_matrix(masks)
    for n in range(1, len(masks) + 1):
        labels = cluster(vectors[:n], distance_threshold=threshold, linkage=linkage)
        if settled(overlap[:n, :n], iou[:n], labels, len(masks) - n):
            return n, anchor_index(overlap[:n, :n], iou[:n], labels)
    raise AssertionError("nothing remains, so it is settled")


def _anchor(masks, iou, threshold, linkage="average"):
    vectors = identity_vectors(masks, masks.shape[1:])
    labels = cluster(vectors, distance_threshold=threshold, linkage=linkage)
    return anchor_index(iou_matrix(masks), iou, labels)


def test_a_majority_of_equal_masks_settles_and_no_fewer_do():
    overlap, ones, labels = np.ones((15, 15)), np.ones(15), np.zeros(15, int)
    assert settled(overlap[:8, :8], ones[:8], labels[:8], 7)
    assert not settled(overlap[:7, :7], ones[:7], labels[:7], 8)
    assert settled(overlap[:1, :1], ones[:1], labels[:1], 0)
    assert not settled(overlap[:0, :0], ones[:0], labels[:0], 3)


def test_a_large_cluster_without_frequent_mask_does_not_settle():
    masks = np.stack([_disc((60, 60), (30, 30), r) for r in (5, 7, 9, 11, 13, 15, 17, 20)])
    overlap, labels, ones = iou_matrix(masks), np.zeros(8, int), np.ones(8)
    assert not settled(overlap, ones, labels, 7)
    assert not settled(overlap, ones, labels, 1)


def test_masks_half_alike_may_gather_around_one_to_come():
    """IoU of 0.85 with each other is no near-duplicate, but one mask may be that of all three."""
    overlap = np.full((7, 7), 0.7)
    overlap[:4, :4] = 1.0
    overlap[4:, 4:] = 0.85
    np.fill_diagonal(overlap, 1.0)
    given = overlap, np.full(7, 0.9), np.zeros(7, int)
    assert not settled(*given, remaining=1)
    overlap[4:, 4:] = np.where(np.eye(3), 1.0, 0.75)
    assert settled(*given, remaining=1)
    assert settled(*given, remaining=2) and not settled(*given, remaining=3)


@pytest.mark.parametrize("seed", range(20))
def test_stopping_early_gives_the_same_anchor_where_masks_are_equal_or_far_apart(seed):
    rng = np.random.default_rng(seed)
    forms = np.stack([_disc((64, 64), c, r) for c, r in
                      (((14, 14), 8), ((48, 14), 12), ((20, 48), 10), ((48, 48), 5))])  # fmt: skip
    share = rng.dirichlet([1, 1, 1, 0.3])
    masks = forms[rng.choice(4, 15, p=share)]
    iou = np.full(15, 0.5)
    n, early = _first_settled(masks, iou, threshold=8.0)
    assert n >= 8
    np.testing.assert_array_equal(masks[early], masks[_anchor(masks, iou, 8.0)])


@pytest.mark.parametrize("linkage", ["average", "complete", "single"])
def test_an_anchor_settled_early_is_a_near_duplicate_of_the_final_one(linkage):
    """IoU at least 1 - 2 (1 - 0.9), on jittered masks with outliers; and it does stop early."""
    rng, stopped, same = np.random.default_rng(7), 0, 0
    for _ in range(60):
        centre, radius = rng.uniform(22, 42, 2), rng.uniform(8, 16)
        jitter = rng.choice([0.2, 0.6, 1.5])
        masks = []
        for _ in range(15):
            if rng.random() < 0.25:
                masks.append(_disc((64, 64), rng.uniform(10, 54, 2), rng.uniform(3, 20)))
            else:
                step = rng.normal(0, jitter, 3)
                masks.append(_disc((64, 64), centre + step[:2], radius + step[2]))
        masks, iou = np.stack(masks), rng.random(15)
        n, early = _first_settled(masks, iou, 6.4, linkage)
        final = _anchor(masks, iou, 6.4, linkage)
        overlap = iou_matrix(masks[[early, final]])[0, 1]
        assert overlap >= 0.8
        stopped += n < 15
        same += early == final
    assert stopped > 20 and same > 30


@pytest.mark.parametrize(("seed", "choices"), [(1, ["middle"]), (2, ["largest", "best"])])
def test_rounds_ask_fewer_prompts_and_give_nearly_the_same_anchors(small, seed, choices):
    image = phantom.render(seed, seed=8, size=(128, 150)).image
    full, early = (
        prompt(
            small,
            image,
            rng=np.random.default_rng(seed),
            n_segments=6,
            n_points=15,
            crop_n_layers=0,
            mask_choice=choices,
            early_stop=stop,
        )[0]
        for stop in (False, True)
    )
    np.testing.assert_array_equal(full.points, early.points)
    assert full.asked.all() and (early.asked[:, :8]).all()
    assert early.asked.sum() < full.asked.sum()
    assert n_asked([full, early, full]) == early.asked.sum() + 2 * full.asked.size
    n, k = full.asked.shape
    asked = np.tile(early.asked.ravel(), len(choices))
    torch.testing.assert_close(
        early.proposals.padded[asked], full.proposals.padded[asked], rtol=1e-3, atol=1e-3
    )
    assert not early.proposals.masks()[~asked].any()
    a = choose_anchors(full.proposals, len(choices) * n)
    b = choose_anchors(early.proposals, len(choices) * n)
    masks = full.proposals.masks()
    for i, j in zip(a, b, strict=True):
        assert i // k == j // k and iou_matrix(masks[[i, j]])[0, 1] >= 0.9


def test_rounds_end_at_once_where_every_prompt_gives_the_same_mask(monkeypatch, random_sam):
    asked_for = []

    def constant(sam, embedding, points, **_):
        asked_for.append(len(points))
        logits = torch.full((len(points), 16, 16), -1.0)
        logits[:, 4:9, 4:9] = 1
        return Proposals(logits, np.ones(len(points), np.float32), (64, 64), (64, 64), 64)

    monkeypatch.setattr("helpers.anchors.propose", constant)
    embedding = embed(random_sam, np.zeros((64, 64, 3), np.uint8))
    proposals, asked = ask_in_rounds(random_sam, embedding, np.zeros((3, 15, 2), int))
    assert asked_for == [24] and asked.sum() == 24 and len(proposals) == 45


def test_segment_takes_early_stopping_and_refuses_unknown_settings(random_sam):
    image = phantom.render(0, seed=3, size=(64, 64)).image
    settings = {"n_segments": 4, "n_points": 3, "early_stop": True, "distance_threshold": 0.2}
    found = segment(random_sam, image, rng=np.random.default_rng(0), **settings)
    assert len(found) + sum(found.n_dropped.values()) == CHOICES * found.n_superpixels
    with pytest.raises(TypeError, match="no setting"):
        segment(random_sam, image, rng=np.random.default_rng(0), stop_early=True)


# ---------------------------------------------------------------- segments


def test_duplicates_keep_the_best_score():
    a, b = _disc((50, 50), (20, 20), 10), _disc((50, 50), (21, 20), 10)
    masks = np.stack([a, b, _disc((50, 50), (40, 40), 5)])
    assert deduplicate(masks, np.array([0.5, 0.9, 0.1]), 0.7).tolist() == [1, 2]
    assert deduplicate(masks, np.array([0.5, 0.9, 0.1]), 0.99).tolist() == [0, 1, 2]
    assert deduplicate(masks[:0], np.zeros(0), 0.7).tolist() == []


def test_iou_matrix_by_hand():
    masks = np.zeros((3, 2, 4), bool)
    masks[0, 0], masks[1, 0, :2] = True, True
    np.testing.assert_allclose(iou_matrix(masks), [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 0]])


@pytest.mark.parametrize(("seed", "size"), [(1, (192, 192)), (2, (150, 210))])
def test_sizes_and_duplicates_judged_at_low_resolution_are_those_of_the_image(small, seed, size):
    image = phantom.render(seed, seed=8, size=size).image
    rng = np.random.default_rng(seed)
    settings = {"n_segments": 20, "n_points": 3, "mask_choice": "middle"}
    (prompted,) = prompt(small, image, rng=rng, crop_n_layers=0, **settings)
    index = choose_anchors(prompted.proposals, len(prompted.points))
    masks = np.stack([prompted.proposals.full(i) for i in index])
    sized = np.flatnonzero((masks.mean((1, 2)) >= 0.02) & (masks.mean((1, 2)) <= 0.5))
    kept = sized[deduplicate(masks[sized], prompted.proposals.iou[index[sized]], 0.5)]
    found = anchors([prompted], min_area=0.02, max_area=0.5, pred_iou_thresh=0, iou_vote=1)
    assert found.superpixel.tolist() == kept.tolist() and len(kept) > 3
    np.testing.assert_array_equal(found.masks, masks[kept])


def test_measures_of_masks_take_tensors_and_leading_axes():
    rng = np.random.default_rng(0)
    masks = rng.random((2, 3, 6, 7)) < 0.4
    others = rng.random((2, 4, 6, 7)) < 0.4
    found = iou_matrix(torch.from_numpy(masks), torch.from_numpy(others))
    expected = [
        [[(a & b).sum() / (a | b).sum() for b in right] for a in left]
        for left, right in zip(masks, others, strict=True)
    ]
    np.testing.assert_allclose(found, expected)
    np.testing.assert_array_equal(iou_matrix(masks)[1], iou_matrix(masks[1]))
    np.testing.assert_array_equal(iou_matrix(masks[1, :, ::-1, ::-1]), iou_matrix(masks[1]))
    np.testing.assert_array_equal(
        identity_vectors(torch.from_numpy(masks[0]), (12, 14)), identity_vectors(masks[0], (12, 14))
    )
    with pytest.raises(ValueError, match=r"shape \(2, 3, 6, 7\).*expected \(n, h, w\) bool"):
        identity_vectors(masks, (12, 14))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("early_stop", [False, True])
def test_a_gpu_gives_the_anchors_of_the_cpu(early_stop):
    image = phantom.render(0, seed=8, size=(150, 210)).image
    there, here = (
        segment(
            load_sam("small", device=device), image, rng=np.random.default_rng(0),
            n_segments=12, n_points=6, early_stop=early_stop,
        )
        for device in ("cuda", "cpu")
    )  # fmt: skip
    assert len(there) == len(here)
    assert np.diag(iou_matrix(there.masks, here.masks)).min() > 0.95


def test_segment_is_complete_and_repeatable(random_sam):
    image = phantom.render(0, seed=3, size=(96, 130)).image
    one, two = (
        segment(random_sam, image, rng=np.random.default_rng(5), n_segments=6, n_points=4)
        for _ in range(2)
    )
    np.testing.assert_array_equal(one.masks, two.masks)
    assert one.masks.shape[1:] == (96, 130) and one.masks.dtype == bool
    assert len(one) + sum(one.n_dropped.values()) == CHOICES * one.n_superpixels
    assert len(one.scores) == len(one.superpixel) == len(one.border) == len(one.layer) == len(one)
    np.testing.assert_array_equal(one.border, cut_by_border(one.masks))
    counts = one.counts
    assert counts.pop("cut by border") == one.border.sum()
    assert CHOICES * counts.pop("superpixels") == counts.pop("anchors") == sum(counts.values())
    assert counts.pop("segments") == len(one) and counts == one.n_dropped


def test_only_sure_anchors_explain_what_a_crop_would_ask(random_sam, monkeypatch):
    """By those of both choices of mask, the first of each crop by one and the first two by two."""
    seen, shapes = [], np.arange(7 * 16 * 16).reshape(7, 16, 16) % 11 == 0
    iou, index = np.array([0.9, 0.9, 0.7, 0.8, 0.1, 0.9, 0.2]), np.array([0, -1, 2, 3, 4, 5, 6])
    found = {"masks": shapes, "index": index, "iou": iou, "choice": np.array([0] * 5 + [1] * 2)}

    def note(labels, box, size, masks):
        seen.append(masks)
        return np.arange(labels.max() + 1) < 1 + len(seen) % 2

    monkeypatch.setattr("helpers.anchors._candidates", lambda *_, **__: found)
    monkeypatch.setattr("helpers.anchors.explained", note)
    given = {"n_segments": 4, "n_points": 1, "crop_n_layers": 1, "explained_iou": 0.7}
    given["mask_choice"] = ["middle", "largest"]
    image = phantom.render(0, seed=3, size=(64, 70)).image
    crops = prompt(random_sam, image, rng=np.random.default_rng(0), **given)
    assert len(seen) == 8 and all((masks == shapes[[0, 3]]).all() for masks in seen[::2])
    assert all((masks == shapes[[5]]).all() for masks in seen[1::2])
    whole = superpixels(image, 8).max() + 1
    assert sum(len(crop.points) for crop in crops[1:]) == whole - 4
    iou[5] = 0.6  # no anchor of the second choice is sure
    crops = prompt(random_sam, image, rng=np.random.default_rng(0), **given)
    assert len(seen) == 8 and sum(len(crop.points) for crop in crops[1:]) == whole


def _seen_whole(masks, iou):
    """Prompted superpixels of an image of 32 x 64, with one mask each, as large as the image."""
    padded = torch.full((len(masks), 64, 64), -1.0)  # as the network sees them
    padded[:, :32][torch.from_numpy(masks)] = 1
    proposals = Proposals(padded, np.array(iou, np.float32), (32, 64), (32, 64), 64)
    return replace(_crop_of(masks, 1), proposals=proposals)


def test_what_is_dropped_is_counted_once_by_its_first_reason():
    """Seven superpixels of one prompt each; what lies on a limit stays."""
    masks = np.zeros((7, 32, 64), bool)
    masks[0, 2:12, 2:22] = masks[1, 2:12, 2:23] = True  # two of a kind
    masks[3, 4:8] = True  # unsure
    masks[4, 20:24, 1:32] = True  # small, 124 pixels
    masks[5, :, :33] = True  # large
    masks[6, 16:, 20:] = masks[6, 15, 24:] = True
    iou = np.array([0.5, 0.75, 0.9, 0.125, 0.9, 0.9, 0.25], np.float32)

    settings = {"pred_iou_thresh": 0.25, "min_area": 1 / 16, "max_area": 1 / 2, "iou_vote": 1.0}
    found = anchors([_seen_whole(masks, iou)], **settings)
    assert found.superpixel.tolist() == [1, 6] and found.scores.tolist() == [0.75, 0.25]
    np.testing.assert_array_equal(found.masks, masks[[1, 6]])
    dropped = {"empty": 1, "unsure": 1, "small": 1, "large": 1, "duplicate": 1}
    assert found.n_dropped == dropped and found.n_superpixels == 7
    ends = masks[[4, 5]]
    ends[0, 20, 32:36] = True  # a sixteenth of the image, and half of it
    ends[1, :, 32] = False
    assert len(anchors([_seen_whole(ends, iou[:2])], **settings)) == 2


def test_the_outline_of_a_segment_is_that_of_most_anchors_that_overlap_it():
    """Discs of one prompt each, by hand: which of them have a say, and what they say."""
    radii = np.array([10, 11, 12, 6, 10])
    masks = np.stack([_disc((32, 64), (16 + 32 * (i == 4), 16), r) for i, r in enumerate(radii)])
    crop = _seen_whole(masks, [0.6, 0.9, 0.7, 0.5, 0.4])
    overlap = iou_matrix(masks)[1]
    assert overlap[0] > 0.7 and overlap[2] > 0.7 and 0.25 < overlap[3] < 0.5
    settings = {"iou_merge": 0.25, "min_area": 0.0}
    for iou, outline in ((1.0, 1), (0.7, 1), (0.25, 0)):  # with the smallest disc there is a tie
        found = anchors([crop], iou_vote=iou, **settings)
        assert found.superpixel.tolist() == [1, 4] and found.scores.tolist() == [
            pytest.approx(0.9),
            pytest.approx(0.4),
        ]
        np.testing.assert_array_equal(found.masks, masks[[outline, 4]])
    crop.proposals.padded[2, :32][masks[2]] = 9.0  # one that is sure outvotes two that are not
    found = anchors([crop], iou_vote=0.7, **settings)
    np.testing.assert_array_equal(found.masks, masks[[2, 4]])
    with pytest.raises(ValueError, match=r"iou_vote = 0; it must lie in \(0, 1\]"):
        anchors([crop], iou_vote=0)


def test_a_speck_that_a_small_image_cannot_show_is_small():
    logits = torch.full((2, 64, 64), -1.0)
    logits[0, 0, 0] = 1
    logits[1, 8:40, 8:40] = 1
    proposals = Proposals(logits, np.full(2, 0.5, np.float32), (64, 64), (16, 16), 64)
    crop = replace(_crop_of(np.zeros((2, 16, 16), bool), 1), proposals=proposals)
    found = anchors([crop], min_area=0.0)
    assert found.superpixel.tolist() == [1] and found.masks.sum() == 64
    assert found.n_dropped["small"] == 1


def test_segment_counts_what_it_drops(random_sam):
    image = phantom.render(0, seed=3, size=(96, 96)).image
    found = segment(
        random_sam,
        image,
        rng=np.random.default_rng(5),
        n_segments=6,
        n_points=3,
        pred_iou_thresh=0,
        min_area=0.98,
        max_area=0.99,
    )
    assert len(found) + sum(found.n_dropped.values()) == CHOICES * found.n_superpixels
    assert found.n_dropped["small"] + found.n_dropped["large"] > 0


def test_segmenting_goes_on_where_it_was_stopped(tmp_path):
    """The same table as in one go, from files of which those that are complete are kept."""
    names = ["a", "b", "c", "a.rows"]
    images = pd.DataFrame(
        {"image_id": names, "label": "x", "split": "train", "height": 30, "width": 50}
    )
    rng = np.random.default_rng(0)
    masks = {i: np.stack([_disc((30, 50), rng.integers(8, 22, 2), 5)] * m)
             for i, m in zip(names, (2, 1, 1, 3), strict=True)}  # fmt: skip
    masks["b"] = masks["b"][:0]  # an image without segments
    done = []

    def work(record, broken=()):
        if record.image_id in broken:
            raise KeyboardInterrupt
        done.append(record.image_id)
        found = SimpleNamespace(masks=masks[record.image_id])
        return found, {"id": record.image_id, "share": 1 / 3}

    with pytest.raises(KeyboardInterrupt):
        segment_all(lambda record: work(record, "c"), images, tmp_path)
    before = set(done)
    for name in before:  # the rows are written last, so an image with segments alone is not done
        assert (tmp_path / "rows" / f"{name}.json").exists()
    (tmp_path / "rows" / "a.json").unlink()
    done.clear()
    segments, kept = segment_all(work, images, tmp_path)
    assert set(done) == set(names) - (before - {"a"})
    assert kept == [{"id": name, "share": 1 / 3} for name in names]
    expected = collect(images, masks)
    pd.testing.assert_frame_equal(segments.table, expected.table, check_dtype=False)
    assert segments.rles == expected.rles
    done.clear()
    assert segment_all(work, images, tmp_path)[1] == kept and done == []


@pytest.mark.parametrize("level", [0, 128, 255])
def test_constant_image(random_sam, level):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = segment(
            random_sam,
            np.full((64, 64, 3), level, np.uint8),
            rng=np.random.default_rng(0),
            n_segments=4,
            n_points=3,
        )
    assert found.masks.shape[1:] == (64, 64)


def test_bad_areas(random_sam):
    with pytest.raises(ValueError, match="min_area"):
        segment(
            random_sam,
            np.zeros((64, 64, 3), np.uint8),
            rng=np.random.default_rng(0),
            min_area=0.5,
            max_area=0.4,
        )


# ---------------------------------------------------------------- comparison


def test_perfect_segments_match_perfectly():
    glands = phantom.render(1, seed=2, size=(128, 128)).glands
    masks = np.stack([glands == i for i in np.unique(glands[glands > 0])])
    score = match_glands(masks, glands)
    assert score["mean_best_iou"] == 1 and score["recall_50"] == 1
    assert score["n"] == len(masks) and score["coverage"] == pytest.approx((glands > 0).mean())


def test_match_by_hand():
    glands = np.zeros((4, 8), int)
    glands[:, :4], glands[:, 6:] = 3, 7
    mask = np.zeros((1, 4, 8), bool)
    mask[0, :, :2] = True
    assert best_iou(mask, glands).tolist() == [0.5, 0.0]
    assert match_glands(mask, glands)["recall_50"] == 0.5
    assert best_iou(mask, glands, min_area=0.4).tolist() == [0.5]
    assert best_iou(mask, glands, min_area=0.25).tolist() == [0.5, 0.0]  # a quarter of the image
    glands[0, 5] = 9  # a single pixel is a gland, too
    assert best_iou(mask, glands).tolist() == [0.5, 0.0, 0.0]


def test_matches_weigh_every_gland_the_same():
    rows = [
        {"mean_best_iou": 0.9, "recall_50": 1.0, "coverage": 0.5, "n": 1, "n_segments": 4},
        {"mean_best_iou": 0.3, "recall_50": 0.0, "coverage": 0.7, "n": 3, "n_segments": 8},
        {"mean_best_iou": np.nan, "recall_50": np.nan, "coverage": 0.0, "n": 0, "n_segments": 0},
    ]
    mean = mean_match(rows)
    assert mean["mean_best_iou"] == pytest.approx((0.9 + 3 * 0.3) / 4)
    assert mean["recall_50"] == 0.25 and mean["n"] == 4
    assert mean["coverage"] == pytest.approx(0.4) and mean["n_segments"] == 4
    assert np.isnan(mean_match(rows[2:])["mean_best_iou"])


def test_match_without_glands_or_segments():
    none = match_glands(np.zeros((0, 4, 4), bool), np.zeros((4, 4), int))
    assert none["n"] == 0 and np.isnan(none["mean_best_iou"]) and none["coverage"] == 0
    with pytest.raises(ValueError, match="agree"):
        match_glands(np.zeros((1, 4, 4), bool), np.zeros((5, 4), int))
