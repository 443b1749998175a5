"""Kernel distance against torchmetrics and a literal double sum; the seam on known outlines."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.metrics import roc_auc_score
from torchmetrics.image.kid import poly_mmd

from helpers import quality


@pytest.fixture
def features():
    rng = np.random.default_rng(0)
    return rng.normal(size=(24, 7)), rng.normal(0.4, 1.2, size=(31, 7))


def _literal_mmd2(x, y):
    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    xy = sum(kernel(a, b) for a in x for b in y) / (n * m)
    return xx + yy - 2 * xy


def test_mmd_equals_the_double_sum(features):
    assert quality.mmd2(*features) == pytest.approx(_literal_mmd2(*features), rel=1e-10)
    two = features[0][:2], features[1][:2]
    assert quality.mmd2(*two) == pytest.approx(_literal_mmd2(*two), rel=1e-10)


def test_mmd_equals_torchmetrics(features):
    x, y = features[0], features[1][:24]  # torchmetrics wants equal sizes
    expected = poly_mmd(torch.from_numpy(x), torch.from_numpy(y))
    assert quality.mmd2(x, y) == pytest.approx(float(expected), rel=1e-6)


def test_mmd_is_unbiased_and_symmetric(features):
    x, y = features
    assert quality.mmd2(x, y) == pytest.approx(quality.mmd2(y, x))
    rng = np.random.default_rng(1)
    same = [quality.mmd2(rng.normal(size=(8, 5)), rng.normal(size=(8, 5))) for _ in range(800)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(len(same))
    assert min(same) < 0


def test_pairs_that_share_an_image_do_not_count(features):
    """Literally, pair by pair; a sample without any origin is related to itself alone."""
    x, y = features
    rng = np.random.default_rng(1)
    of_x = [set(rng.choice(list("abcdefgh"), rng.integers(0, 3))) for _ in x]
    of_y = [set(rng.choice(list("abcdefgh"), rng.integers(1, 4))) for _ in y]

    def mean(u, v, of_u, of_v):
        pairs = [
            (u[i] @ v[j] / u.shape[1] + 1) ** 3
            for i in range(len(u)) for j in range(len(v))
            if not of_u[i] & of_v[j] and not (u is v and i == j)
        ]  # fmt: skip
        return np.mean(pairs)

    expected = mean(x, x, of_x, of_x) + mean(y, y, of_y, of_y) - 2 * mean(x, y, of_x, of_y)
    assert quality.mmd2(x, y, origins=(of_x, of_y)) == pytest.approx(expected)
    own = [[f"x{i}"] for i in range(len(x))], [[f"y{i}"] for i in range(len(y))]
    assert quality.mmd2(x, y, origins=own) == pytest.approx(quality.mmd2(x, y))
    with pytest.raises(ValueError, match="every pair of samples shares an image"):
        quality.mmd2(x, y, origins=([["a"]] * len(x), [["a"]] * len(y)))
    with pytest.raises(ValueError, match="origins of"):
        quality.mmd2(x, y, origins=(of_x[:-1], of_y))


def test_samples_of_the_same_images_are_no_better_than_samples_of_others():
    """Copies of real samples, and several samples an image, bias the distance unless left out."""
    rng = np.random.default_rng(2)
    plain, aware, floors = [], [], []
    for _ in range(150):
        image = rng.normal(size=(12, 6)).repeat(4, axis=0)
        x = image + 0.3 * rng.normal(size=image.shape)
        of = [[str(i // 4)] for i in range(48)]
        chosen = np.arange(16)
        plain.append(quality.mmd2(x, x[chosen]))
        aware.append(quality.mmd2(x, x[chosen], origins=(of, of[:16])))
        floors.append(quality.kid_floor(x, n_subsets=2, origins=of, rng=rng).mean)
    error = [3 * np.std(v) / np.sqrt(len(v)) for v in (plain, aware, floors)]
    assert np.mean(plain) > error[0]  # crops of one image count as many
    assert abs(np.mean(aware)) < error[1]
    assert abs(np.mean(floors)) < error[2]


def test_classes_weigh_the_pairs_of_each_two_by_their_shares(features):
    """Literally, pair by pair; samples of x of a class that y has not are left out."""
    x, y = features
    rng = np.random.default_rng(3)
    in_x = np.array(["a", "b", "c"])[np.arange(len(x)) % 3]
    in_y = np.array(["a", "a", "b"])[np.arange(len(y)) % 3]
    of_x, of_y = ([{str(o)} for o in rng.integers(0, 9, len(z))] for z in (x, y))

    def mean(u, v, of_u, of_v, in_u, in_v):
        total = 0.0
        for one, other in itertools.product("ab", "ab"):
            pairs = [
                (u[i] @ v[j] / u.shape[1] + 1) ** 3
                for i in np.flatnonzero(in_u == one) for j in np.flatnonzero(in_v == other)
                if not of_u[i] & of_v[j] and not (u is v and i == j)
            ]  # fmt: skip
            total += (in_y == one).mean() * (in_y == other).mean() * np.mean(pairs)
        return total

    expected = (
        mean(x, x, of_x, of_x, in_x, in_x)
        + mean(y, y, of_y, of_y, in_y, in_y)
        - 2 * mean(x, y, of_x, of_y, in_x, in_y)
    )
    found = quality.mmd2(x, y, origins=(of_x, of_y), classes=(in_x, in_y))
    assert found == pytest.approx(expected)
    one = ["a"] * len(x), ["a"] * len(y)
    assert quality.mmd2(x, y, classes=one) == pytest.approx(quality.mmd2(x, y))
    with pytest.raises(ValueError, match="x has fewer than two samples of class 'd'"):
        quality.mmd2(x, y, classes=(in_x, ["d"] * len(y)))
    with pytest.raises(ValueError, match="x has fewer than two samples of class 'e'"):
        quality.mmd2(x, y, classes=(["e", *in_x[1:]], ["e"] * 9 + ["a"] * (len(y) - 9)))
    with pytest.raises(ValueError, match="classes of"):
        quality.mmd2(x, y, classes=(in_x[1:], in_y))


def test_pairs_left_out_within_classes_do_not_change_the_mixture():
    """Samples of one distribution, of two classes, half of whose images are shared in y."""
    rng = np.random.default_rng(4)
    plain, weighted, subsets, floors = [], [], [], []
    for _ in range(120):
        label = np.arange(48) // 24
        x, y = (3.0 * label[:, None] + rng.normal(size=(48, 4)) for _ in range(2))
        of_x = [{f"x{i}"} for i in range(48)]
        of_y = [{f"y{c} {o}" for o in rng.choice(6, 2, replace=False)} for c in label]
        given = {"origins": (of_x, of_y), "classes": (label, label)}
        plain.append(quality.mmd2(x, y, origins=(of_x, of_y)))
        weighted.append(quality.mmd2(x, y, **given))
        subsets.append(quality.kid(x, y, n_subsets=2, rng=rng, **given).mean)
        floors.append(quality.kid_floor(x, n_subsets=2, classes=label, rng=rng).mean)
    assert np.mean(plain) < -5 * np.std(weighted)  # as if closer than real to real
    for found in (weighted, subsets, floors):
        assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found))


def test_subsets_without_unrelated_samples_do_not_count(features):
    x = features[0][:12]
    label = ["a"] * 6 + ["b"] * 6
    # Of class a, three samples of either of two images: some subsets hold one of them alone.
    of = [{f"a{i % 2}"} for i in range(6)] + [{f"b{i}"} for i in range(6)]
    given = {"origins": (of, of), "classes": (label, label)}
    found = quality.kid(x, x, subset_size=4, rng=np.random.default_rng(0), **given)
    assert 1 < found.n_subsets < 50 and np.isfinite(found.mean)
    alone = [{"a"}] * 6 + of[6:]
    with pytest.raises(ValueError, match="of all or of two classes"):
        quality.kid(x, x, origins=(alone, of), classes=(label, label), rng=np.random.default_rng(0))


def test_size_of_a_subset_is_what_it_held(features):
    x, y = features
    rng = np.random.default_rng(0)
    assert quality.kid(x, y, subset_size=6, rng=rng).subset_size == 6
    # At least two of each class, and of those of x no more than there are.
    in_x = ["a"] * 3 + ["b"] * (len(x) - 3)
    in_y = ["a"] * (len(y) // 2) + ["b"] * (len(y) - len(y) // 2)
    found = quality.kid(x, y, subset_size=10, classes=(in_x, in_y), rng=rng)
    assert found.subset_size == 3 + round(10 * in_y.count("b") / len(y))
    in_x = ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    assert quality.kid_floor(x[:12], subset_size=3, classes=in_x, rng=rng).subset_size == 6


def test_real_samples_are_drawn_in_the_mixture_of_the_others():
    labels, like = ["a"] * 40 + ["b"] * 90 + ["c"] * 7, ["b"] * 3 + ["a"] * 6
    rows = quality.stratified(labels, like, most=1000, rng=np.random.default_rng(0))
    found = np.array(labels)[rows]
    assert [(found == name).sum() for name in "abc"] == [40, 20, 0]  # all of a, half as many of b
    assert len(set(rows.tolist())) == 60
    few = quality.stratified(labels, like, most=9, rng=np.random.default_rng(0))
    assert sorted(np.array(labels)[few].tolist()) == ["a"] * 6 + ["b"] * 3
    rare = quality.stratified(labels, ["b"] * 90 + ["c"], most=20, rng=np.random.default_rng(0))
    assert sorted(np.array(labels)[rare].tolist()) == ["b"] * 19 + ["c"]  # at least one of each
    with pytest.raises(ValueError, match="no sample of class 'd'"):
        quality.stratified(labels, ["d"], most=9, rng=np.random.default_rng(0))


def test_kid_sees_a_shift_that_the_floor_does_not(features):
    x, y = features
    kid = quality.kid(x, y, rng=np.random.default_rng(0))
    floor = quality.kid_floor(x, rng=np.random.default_rng(0))
    assert kid.mean > 3 * abs(floor.mean)
    assert (kid.subset_size, floor.subset_size) == (12, 12)
    assert kid == quality.kid(x, y, rng=np.random.default_rng(0))


def test_a_subset_is_half_of_the_smaller_side_but_two_at_least_and_a_hundred_at_most():
    rng, many = np.random.default_rng(0), np.random.default_rng(1).normal(size=(210, 3))
    for n, size in ((3, 2), (9, 4), (210, 100)):
        found = quality.kid(many[:n], many, n_subsets=2, rng=rng)
        assert (found.subset_size, found.n_subsets) == (size, 2)
        if n > 3:
            assert quality.kid_floor(many[:n], n_subsets=2, rng=rng).subset_size == size


def test_samples_of_a_class_that_is_not_in_y_do_not_count():
    """Neither in the value nor in the size of a subset."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 5)), rng.normal(size=(30, 5))
    classes = [["a"] * 10 + ["b"] * 30, ["a"] * 30]
    x[10:] += 9
    found = quality.kid(x, y, classes=classes, n_subsets=20, rng=np.random.default_rng(1))
    alone = quality.kid(x[:10], y, n_subsets=20, subset_size=5, rng=np.random.default_rng(1))
    assert found.subset_size <= 10 and found.n_subsets == 20
    assert abs(found.mean - alone.mean) < 3 * (found.std + alone.std) / np.sqrt(20)


def test_kid_over_all_samples_is_mmd(features):
    x, y = features[0], features[1][:24]
    kid = quality.kid(x, y, subset_size=24, n_subsets=3, rng=np.random.default_rng(0))
    assert kid.mean == pytest.approx(quality.mmd2(x, y))
    assert kid.std == pytest.approx(0, abs=1e-9)


def test_spread_of_an_estimate_is_that_of_its_subsets():
    """The standard deviation over the subsets, no error of their mean."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 4)), rng.normal(size=(14, 4))
    found = quality.kid(x, y, subset_size=5, n_subsets=40, rng=np.random.default_rng(1))
    again, each = np.random.default_rng(1), []
    for _ in range(40):
        i, j = again.permutation(12)[:5], again.permutation(14)[:5]
        each.append(quality.mmd2(x[i], y[j]))
    assert found.mean == pytest.approx(np.mean(each)) and found.std == pytest.approx(np.std(each))


def _disc(shape=(48, 64), centre=(24, 30), radius=12):
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return np.hypot(rows - centre[0], columns - centre[1]) < radius


def _painted(mask, inside=200, outside=80, blur=0.0):
    grey = ndimage.gaussian_filter(np.where(mask, float(inside), float(outside)), blur)
    return np.repeat(np.rint(grey)[..., None], 3, 2).astype(np.uint8)


def test_gradient_of_a_straight_edge_in_closed_form():
    """A step of height h under a Gaussian derivative of width s has slope h / (s sqrt(2 pi))."""
    mask = np.zeros((40, 60), bool)
    mask[:, 30:] = True
    found = quality.normal_gradient(_painted(mask), mask, sigma=2.0)
    step = 120 / 255
    # outline pixels lie half a pixel from the edge
    expected = step / (2.0 * np.sqrt(2 * np.pi)) * np.exp(-(0.5**2) / (2 * 2.0**2))
    np.testing.assert_allclose(found, expected, rtol=0.01)


def test_gradient_along_the_outline_does_not_count():
    mask = np.zeros((40, 60), bool)
    mask[:, 30:] = True
    stripes = np.repeat((np.arange(40) % 8 * 30).astype(np.uint8)[:, None], 60, 1)
    image = np.repeat(stripes[..., None], 3, 2)
    np.testing.assert_allclose(quality.normal_gradient(image, mask), 0, atol=1e-6)


def test_gradient_moves_and_turns_with_the_image():
    mask = _disc()
    rng = np.random.default_rng(0)
    image = _painted(mask, blur=1)
    image = (image + rng.integers(0, 20, image.shape)).astype(np.uint8)
    here = quality.normal_gradient(image, mask).mean()
    moved = quality.normal_gradient(np.roll(image, (3, 5), (0, 1)), np.roll(mask, (3, 5), (0, 1)))
    turned = quality.normal_gradient(np.rot90(image).copy(), np.rot90(mask).copy())
    assert moved.mean() == pytest.approx(here, rel=1e-6)
    assert turned.mean() == pytest.approx(here, rel=1e-6)


def test_luminance_weighs_the_channels_by_rec_601():
    mask = np.zeros((40, 60), bool)
    mask[:, 30:] = True
    slopes = []
    for channel in range(3):
        image = np.zeros((40, 60, 3), np.uint8)
        image[..., channel] = 255 * mask
        slopes.append(quality.normal_gradient(image, mask).mean())
    np.testing.assert_allclose(np.array(slopes) / sum(slopes), [0.299, 0.587, 0.114], rtol=1e-3)


def test_seam_score_of_hard_equal_and_blurred_outlines():
    mask, other = _disc(), _disc(centre=(22, 36), radius=14)
    real = [_painted(other, blur=1.5)], [other]
    same = quality.seam_score([_painted(mask, blur=1.5)], [mask], *real)
    hard = quality.seam_score([_painted(mask)], [mask], *real)
    soft = quality.seam_score([_painted(mask, blur=5)], [mask], *real)
    assert abs(same.score) < 0.05 < 0.3 < hard.score
    assert soft.score < -0.3
    assert (same.n, same.n_reference) == (1, 1)


def test_outline_on_the_image_border_is_no_seam():
    mask = np.zeros((40, 60), bool)
    mask[:, :20] = True
    image = _painted(np.zeros_like(mask))
    assert quality.normal_gradient(image, mask).max() < 1e-9  # rounding depends on the machine
    assert quality.normal_gradient(image, np.ones_like(mask)).size == 0


def test_pixels_near_the_image_border_are_no_part_of_an_outline():
    mask = np.zeros((40, 60), bool)
    mask[:, 30:] = True
    image = np.full((40, 60, 3), 90, np.uint8)
    image[:2, 30:] = image[-2:, 30:] = 255  # only there is an edge
    found = quality.normal_gradient(image, mask, sigma=0.5)
    assert len(found) == 2 * (40 - 2)  # both sides of the outline, a pixel left out at each end
    for sigma, margin in ((0.6, 2), (2.0, 4)):
        rest = quality.normal_gradient(image, mask, sigma=sigma)
        assert len(rest) == 2 * (40 - 2 * margin)


def test_bad_input(features):
    rng = np.random.default_rng(0)
    x, y = features
    with pytest.raises(ValueError, match="one extractor"):
        quality.kid(x, y[:, :3], rng=rng)
    for size in (1, 25, 99):
        with pytest.raises(ValueError, match=rf"subset_size is {size}, .* in 2 \.\. 24"):
            quality.kid(x, y, subset_size=size, rng=rng)
    with pytest.raises(ValueError, match="n >= 2"):
        quality.kid(x[:1], y, rng=rng)
    with pytest.raises(ValueError, match="at least 4"):
        quality.kid_floor(x[:3], rng=rng)
    assert quality.kid_floor(x[:4], rng=rng).subset_size == 2
    for few in (1, 2, 3):
        label = ["a"] * few + ["b"] * (len(x) - few)
        with pytest.raises(ValueError, match=f"x has {few} samples of class 'a', .* at least 4 of"):
            quality.kid_floor(x, classes=label, rng=rng)
    of_x, of_y = [{"a"}] * len(x), [{"b"}] * len(y)
    with pytest.raises(ValueError, match="origins of"):
        quality.kid(x, y, origins=(of_x, of_y[1:]), rng=rng)
    with pytest.raises(ValueError, match="classes of"):
        quality.kid_floor(x, classes=["a"] * (len(x) + 1), rng=rng)
    with pytest.raises(ValueError, match="not finite"):
        quality.kid(np.where(x == x.max(), np.nan, x), y, rng=rng)
    mask = _disc()
    with pytest.raises(ValueError, match="uint8 in RGB"):
        quality.normal_gradient(mask.astype(float), mask)
    for wrong in (mask[:-1], mask.astype(int)):
        with pytest.raises(ValueError, match="as the image"):
            quality.normal_gradient(_painted(mask), wrong)
    with pytest.raises(ValueError, match="one mask an image"):
        quality.seam_score([_painted(mask)], [], [_painted(mask)], [mask])
    with pytest.raises(ValueError, match="nothing to compare"):
        quality.seam_score([_painted(mask)], [np.zeros_like(mask)], [_painted(mask)], [mask])


# --- detection of seams ---


def test_strips_follow_the_outline_from_outside_to_inside():
    """A disc of another grey: dark outside, bright inside, the step between pixels 8 and 9."""
    y, x = np.mgrid[:90, :110]
    mask = np.hypot(x - 50, y - 44) < 25
    image = np.where(mask[..., None], 200, 50).astype(np.uint8).repeat(3, 2)
    strips = quality.outline_strips(image, mask)
    assert strips.shape[1:] == (32, 17, 3) and len(strips) == 4
    assert (strips[:, :, :6] == 50).all() and (strips[:, :, 10:] == 200).all()
    cut = np.roll(mask, -40, axis=1)
    assert len(quality.outline_strips(image, cut)) < 4
    assert quality.outline_strips(image, np.zeros_like(mask)).shape == (0, 32, 17, 3)


def test_an_outline_shorter_than_a_strip_has_none():
    image = np.zeros((60, 70, 3), np.uint8)
    for side, n in ((8, 0), (9, 1), (16, 1), (17, 2)):  # outlines of 28, 32, 60 and 64 pixels
        mask = np.zeros((60, 70), bool)
        mask[20 : 20 + side, 25 : 25 + side] = True
        assert len(quality.outline_strips(image, mask)) == n


def test_numbers_of_a_strip_are_those_of_loops():
    """At each distance from the outline; the correlation is that with the line next to it."""
    rng = np.random.default_rng(1)
    strips = (rng.normal(size=(2, 9, 5, 3)) * 30 + rng.uniform(40, 200, (2, 1, 5, 1))).astype("f4")
    for strip, found in zip(strips, quality._numbers(strips), strict=True):
        lines = strip.mean(-1).T  # one a distance, along the outline
        across = [np.abs(strip[:, k + 1] - strip[:, k]).mean() for k in range(4)]
        along = [np.abs(strip[1:, k] - strip[:-1, k]).mean() for k in range(5)]
        alike = [np.corrcoef(lines[k], lines[k + 1])[0, 1] for k in range(4)]
        spread = [line.std() for line in lines]
        expected = np.concatenate([np.log1p(across), np.log1p(along), np.log1p(spread), alike])
        np.testing.assert_allclose(found, expected, atol=1e-3)


def pasted_noise(contrast, n=16):
    """Noise images, and the same with a disc of other noise, brighter by `contrast`."""
    rng = np.random.default_rng(6)
    y, x = np.mgrid[:80, :100]
    originals, images, masks = [], [], []
    for _ in range(n):
        one, other = (
            128 + 90 * ndimage.gaussian_filter(rng.normal(size=(80, 100, 3)), (2, 2, 0))
            for _ in range(2)
        )
        mask = np.hypot(x - rng.uniform(42, 58), y - rng.uniform(36, 44)) < 22
        mixed = np.where(mask[..., None], other + contrast, one)
        originals.append(one.clip(0, 255).astype(np.uint8))
        images.append(mixed.clip(0, 255).astype(np.uint8))
        masks.append(mask)
    return images, originals, masks


def test_a_hard_paste_is_detected_and_an_unchanged_image_is_not():
    images, originals, masks = pasted_noise(10)
    names = [str(k) for k in range(len(images))]
    assert quality.detect_seams(images, originals, masks, groups=names).auc() > 0.95
    # Other images of the same kind, nothing pasted: chance.
    other = [image[::-1].copy() for image in originals]
    assert abs(quality.detect_seams(other, originals, masks, groups=names).auc() - 0.5) < 0.15
    soft = []
    for image, original, mask in zip(images, originals, masks, strict=True):
        share = ndimage.gaussian_filter(mask.astype(float), 5)[..., None]
        soft.append((share * image + (1 - share) * original).astype(np.uint8))
    hard = quality.detect_seams(images, originals, masks, groups=names).auc()
    assert quality.detect_seams(soft, originals, masks, groups=names).auc() < hard


def test_images_of_one_original_are_never_in_two_folds():
    """Each original has a look of its own: a detector that saw it knows the answer."""
    rng = np.random.default_rng(2)
    y, x = np.mgrid[:80, :100]
    mask = np.hypot(x - 50, y - 40) < 22
    images, originals, groups = [], [], []
    for k in range(6):
        looks = rng.permutation([0.6 + 0.1 * k, 2.6 - 0.1 * k])
        for _ in range(3):
            pair = [
                (128 + 90 * ndimage.gaussian_filter(rng.normal(size=(80, 100, 3)), (s, s, 0)))
                .clip(0, 255).astype(np.uint8)
                for s in looks
            ]  # fmt: skip
            images.append(pair[0])
            originals.append(pair[1])
            groups.append(f"original {k}")
    masks = [mask] * len(images)
    apart = quality.detect_seams(images, originals, masks, groups=groups).auc()
    each = [str(k) for k in range(len(images))]
    mixed = quality.detect_seams(images, originals, masks, groups=each).auc()
    assert mixed > apart + 0.1


def test_detection_needs_two_originals_and_one_of_each():
    images, originals, masks = pasted_noise(10, n=2)
    with pytest.raises(ValueError, match="1 originals with a strip of outline"):
        quality.detect_seams(images, originals, masks, groups=["a", "a"])
    found = quality.detect_seams(images, originals, masks, groups=["a", "b"])
    assert 0.5 < found.auc() <= 1
    with pytest.raises(ValueError, match="1 groups: give one of each"):
        quality.detect_seams(images, originals, masks, groups=["a"])


def test_the_area_under_the_curve_counts_pairs_and_weights_repeat_strips():
    """Share of pairs of a strip with and one without a seam that are in the right order."""
    rng = np.random.default_rng(3)
    pasted, evidence = rng.random(30) < 0.4, rng.normal(size=30).round(1)
    found = quality.Detection(evidence, pasted, np.arange(30).astype(str))

    def share(e, p):
        pairs = [(a > b) + 0.5 * (a == b) for a in e[p] for b in e[~p]]
        return np.mean(pairs)

    assert found.auc() == pytest.approx(share(evidence, pasted))
    assert found.auc() == pytest.approx(roc_auc_score(pasted, evidence))
    times = rng.integers(0, 4, 30)
    assert found.auc(times) == pytest.approx(
        share(np.repeat(evidence, times), np.repeat(pasted, times))
    )
    assert found.auc(times) == pytest.approx(roc_auc_score(pasted, evidence, sample_weight=times))
    assert np.isnan(found.auc(pasted))  # no strip without a seam has a weight


def test_outline_gradients_are_one_number_an_image(features):
    """Mean along each outline; a mask without one has none."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (3, 40, 52, 3)).astype(np.uint8)
    masks = np.zeros((3, 40, 52), bool)
    masks[0, 10:20, 15:30], masks[1, 12:30, 9:22] = True, True
    found = quality.outline_gradients(images, masks)
    assert np.isnan(found[2])
    for k in (0, 1):
        assert found[k] == pytest.approx(quality.normal_gradient(images[k], masks[k]).mean())
    with pytest.raises(ValueError, match="3 pictures but 2 masks"):
        quality.outline_gradients(images, masks[:2], name="pictures")


def test_change_across_outlines_is_the_log_ratio_of_the_means():
    """Weights repeat images, and one without an outline does not count."""
    after, before = np.array([2.0, np.nan, 6.0, 1.0]), np.array([1.0, np.nan, 2.0, 5.0])
    change = quality.outline_change(after, before)
    assert change(np.ones(4)) == pytest.approx(np.log(9 / 8))
    assert change(np.array([2, 7, 1, 0])) == pytest.approx(np.log((2 + 2 + 6) / (1 + 1 + 2)))
    assert np.isnan(change(np.array([0, 3, 0, 0])))


@pytest.mark.parametrize("with_origins", [False, True])
def test_the_difference_of_two_distances(features, with_origins):
    """By itself, and for weights of 0 and more, whose copies are no pairs."""
    x, a = features
    b = a + np.random.default_rng(4).normal(0, 0.3, a.shape)
    given = {}
    if with_origins:
        given["origins"] = (
            [{f"x{i % 9}"} for i in range(len(x))],
            [{f"x{i % 5}", f"a{i % 11}"} for i in range(len(a))],
        )
        given["classes"] = (
            ["pq"[i % 2] for i in range(len(x))],
            ["pq"[i % 3 == 0] for i in range(len(a))],
        )
    difference = quality.kid_difference(x, a, b, **given)
    expected = quality.mmd2(x, a, **given) - quality.mmd2(x, b, **given)
    whole = np.ones(len(x))
    assert difference(whole, np.ones(len(a))) == pytest.approx(expected, rel=1e-9)
    if with_origins:
        return
    keep, kept = np.arange(len(x)) % 3 > 0, np.arange(len(a)) % 4 > 0
    expected = quality.mmd2(x[keep], a[kept]) - quality.mmd2(x[keep], b[kept])
    assert difference(keep, kept) == pytest.approx(expected, rel=1e-9)
    times = np.random.default_rng(5).integers(0, 3, len(a))
    own = np.repeat(np.arange(len(a)), times)

    def distance(y):
        kernel = quality.polynomial_kernel
        within = kernel(y, y)[own[:, None] != own].mean()
        return within - 2 * kernel(x, y).mean()

    expected = distance(a[own]) - distance(b[own])
    assert difference(whole, times) == pytest.approx(expected, rel=1e-9)
    assert np.isnan(difference(whole, np.eye(len(a))[0]))  # one image, and no pair of two


def test_classes_whose_samples_all_share_an_image_are_not_compared():
    """Against loops over pairs; only within the classes, and on average over their samples."""
    origins = [{"a", "b"}, {"b", "c"}, {"c", "a"}, {"d"}, {"e"}, {"d", "a"}, {"f"}]
    classes = ["few", "few", "few", "some", "some", "some", "alone"]
    partners = {name: [] for name in classes}
    for i, (own, name) in enumerate(zip(origins, classes, strict=True)):
        others = [j for j, c in enumerate(classes) if c == name and j != i]
        partners[name].append(sum(not own & origins[j] for j in others))
    assert partners == {"few": [0, 0, 0], "some": [1, 2, 1], "alone": [0]}
    assert quality.with_unrelated(origins, classes) == ["some"]
    assert quality.with_unrelated(origins, classes, least=4 / 3) == ["some"]
    assert quality.with_unrelated(origins, classes, least=1.4) == []
    assert quality.with_unrelated(origins, classes, least=0) == ["few", "some", "alone"]
    x = np.random.default_rng(0).normal(size=(7, 3))
    with pytest.raises(ValueError, match="every pair of samples shares an image"):
        quality.mmd2(x, x[:6], origins=(origins, origins[:6]), classes=(classes, classes[:6]))
    with pytest.raises(ValueError, match="origins of 7 samples and classes of 6"):
        quality.with_unrelated(origins, classes[:6])


def test_a_name_in_the_place_of_names_is_refused(features):
    """A string is a collection of letters, which images have in common."""
    x, a = features
    names = ([f"im{i}" for i in range(len(x))], [{f"a{i}"} for i in range(len(a))])
    for measure in (quality.mmd2, partial(quality.kid_difference, b=a)):
        with pytest.raises(ValueError, match="origins hold 'im0', a single name"):
            measure(x, a, origins=names)
    with pytest.raises(ValueError, match="origins hold 'im0', a single name"):
        quality.with_unrelated(names[0], ["p"] * len(x))


def test_two_versions_have_to_be_of_the_same_images(features):
    x, a = features
    with pytest.raises(ValueError, match=r"a has shape \(31, 7\) but b \(30, 7\)"):
        quality.kid_difference(x, a, a[:-1])
    with pytest.raises(ValueError, match="every pair of samples shares an image"):
        quality.kid_difference(x, a, a, origins=([{"i"}] * len(x), [{"i"}] * len(a)))
