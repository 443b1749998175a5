import numpy as np
import pytest
from scipy import ndimage, special
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_flow

from helpers import seam
from tests.test_placement import ellipse


def pictures(seed, shape):
    """Two smooth random images."""
    rng = np.random.default_rng(seed)
    return [
        (128 + 300 * ndimage.gaussian_filter(rng.normal(size=(*shape, 3)), (2, 2, 0)))
        .clip(0, 255)
        .astype(np.uint8)
        for _ in range(2)
    ]


def least_cost(source, target, least, most):
    """Value of the minimum cut by scipy's maximum flow, whole-number costs."""
    h, w = least.shape
    difference = ((source.astype(int) - target) ** 2).sum(-1)
    index = np.arange(h * w).reshape(h, w)
    start, end, huge = h * w, h * w + 1, 10**9
    rows, columns, costs = [], [], []
    for a, b in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        cost = (difference[a] + difference[b] + 1).ravel()
        for p, q in ((a, b), (b, a)):
            rows.append(index[p].ravel())
            columns.append(index[q].ravel())
            costs.append(cost)
    for node, where in ((start, least), (end, ~most)):
        cells = index[where]
        ends = (np.full(len(cells), node), cells)
        rows.append(ends[0] if node == start else ends[1])
        columns.append(ends[1] if node == start else ends[0])
        costs.append(np.full(len(cells), huge))
    graph = csr_matrix(
        (np.concatenate(costs).astype(np.int32), (np.concatenate(rows), np.concatenate(columns))),
        shape=(h * w + 2,) * 2,
    )
    return maximum_flow(graph, start, end).flow_value


@pytest.mark.parametrize("seed", range(5))
def test_the_cut_is_the_minimum_cut(seed):
    """Its cost is that of another maximum flow, and it stays where it may."""
    shape = (44, 53)
    source, target = pictures(seed, shape)
    mask = ellipse(26, 21, 12, 9, 20 * seed, shape)
    found = seam.least_cut(source, target, mask, outwards=5, inwards=2)
    most = ndimage.binary_dilation(mask, seam.disc(5).astype(bool))
    least = ndimage.binary_erosion(mask, seam.disc(2).astype(bool))
    assert (least <= found).all() and (found <= most).all()
    optimum = least_cost(source, target, least, most)
    assert optimum <= seam.cut_cost(source, target, found) <= 1.001 * optimum
    assert optimum < 0.8 * seam.cut_cost(source, target, mask)
    np.testing.assert_array_equal(
        found, seam.least_cut(source, target, mask, outwards=5, inwards=2)
    )


def test_the_cut_avoids_what_differs():
    """A bright bar beside the segment is in the source only: the cut takes all of it or nothing."""
    shape = (60, 70)
    target = np.full((*shape, 3), 120, np.uint8)
    source = target.copy()
    source[:, 44:48] = 250
    mask = ellipse(30, 30, 15, 15, 0, shape)  # ends in the bar
    found = seam.least_cut(source, target, mask, outwards=8)
    assert seam.cut_cost(source, target, mask) > 1e5
    assert seam.cut_cost(source, target, found) < 0.7 * seam.cut_cost(source, target, mask)
    assert (found & ~mask).any() and (mask <= found).all()


def test_equal_images_keep_the_shortest_outline_and_nothing_moves_by_zero():
    source = np.full((50, 60, 3), 90, np.uint8)
    mask = ellipse(30, 25, 14, 10, 0, (50, 60))
    np.testing.assert_array_equal(seam.least_cut(source, source, mask, outwards=0), mask)
    found = seam.least_cut(source, source, mask, outwards=4, inwards=3)
    assert seam.cut_cost(source, source, found) <= seam.cut_cost(source, source, mask)


def test_nothing_is_taken_that_the_source_does_not_have():
    shape = (44, 53)
    source, target = pictures(1, shape)
    mask = ellipse(26, 21, 12, 9, 0, shape)
    available = np.zeros(shape, bool)
    available[:, :30] = True
    found = seam.least_cut(source, target, mask, outwards=6, inwards=1, available=available)
    assert found.any() and not (found & ~available).any()
    tiny = ellipse(26, 21, 2, 2, 0, shape)
    np.testing.assert_array_equal(seam.least_cut(source, target, tiny, outwards=3, inwards=6), tiny)


def test_a_mask_from_which_the_whole_frame_is_within_reach_stays_as_it_is():
    source, target = pictures(3, (24, 31))
    mask = np.zeros((24, 31), bool)
    mask[3:-3, 3:-3] = True
    found = seam.least_cut(source, target, mask, outwards=5, inwards=1)
    np.testing.assert_array_equal(found, mask)


def test_at_the_border_of_the_image_there_is_no_outline():
    shape = (44, 53)
    source, target = pictures(2, shape)
    mask = ellipse(0, 21, 14, 12, 0, shape)
    found = seam.least_cut(source, target, mask, outwards=3, inwards=3)
    assert found[18:24, 0].all()


def test_a_cut_mask_keeps_its_pixels_at_the_border():
    """Where the mask leaves the image nothing is taken off: only its outline moves."""
    rng = np.random.default_rng(2)
    source, target = rng.integers(0, 256, (2, 44, 53, 3), dtype=np.uint8)
    mask = np.zeros((44, 53), bool)
    mask[10:34, :20] = True
    target[12:32, :3] = source[12:32, :3]  # to leave the border out would cost nothing there
    found = seam.least_cut(source, target, mask, outwards=2, inwards=4)
    assert found[15:29, :15].all()


@pytest.mark.parametrize("bad", [{"outwards": -1}, {"outwards": 1, "inwards": -2}])
def test_seam_errors(bad):
    image = np.zeros((9, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="give 0 or more pixels"):
        seam.least_cut(image, image, np.ones((9, 8), bool), **bad)


# --- blending -------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1.0, 1.5])
def test_blend_is_its_formula(width):
    rng = np.random.default_rng(3)
    source, target = rng.integers(60, 190, (2, 33, 41, 3), dtype=np.uint8)
    mask = ellipse(20, 16, 9, 7, 30, (33, 41))

    def smooth(x):  # scipy's, mirrored at the border and cut off as OpenCV's is
        return ndimage.gaussian_filter(x, width, mode="mirror", radius=int(np.ceil(4 * width)))

    found = seam.blend(source, target, mask, width)
    assert found.dtype == np.uint8
    m = smooth(mask.astype(float))
    for k in range(3):
        s, t = source[..., k].astype(float), target[..., k].astype(float)
        coarse = smooth(m * smooth(s) + (1 - m) * smooth(t))
        fine = np.where(mask, s - smooth(smooth(s)), t - smooth(smooth(t)))
        assert np.abs(found[..., k] - (coarse + fine).clip(0, 255)).max() <= 0.6


def test_flat_colours_meet_in_an_error_function():
    """The step is smoothed twice, by a normal density of sqrt(2) times the width each way."""
    source, target = (np.full((20, 40, 3), v, np.uint8) for v in (210, 10))
    mask = np.arange(40)[None].repeat(20, 0) < 20
    found = seam.blend(source, target, mask, 2.0)
    distance = 19.5 - np.arange(40)
    expected = 10 + 200 * special.ndtr(distance / np.sqrt(8))
    inner = np.abs(distance) < 12
    assert np.abs(found[:, inner] - expected[inner][None, :, None]).max() <= 1.5


def test_blending_keeps_the_contrast_that_a_mean_loses():
    rng = np.random.default_rng(4)
    source, target = rng.normal(128, 20, (2, 4000, 30, 3)).clip(0, 255).round().astype(np.uint8)
    mask = np.arange(30)[None].repeat(4000, 0) < 15
    share = ndimage.gaussian_filter(mask.astype(float), (0, 1))[..., None]
    mean = share * source + (1 - share) * target
    at_seam = np.s_[:, 14:16]
    assert mean[at_seam].std() < 0.82 * source[at_seam].std()
    kept = seam.blend(source, target, mask, 1.0)
    assert kept[at_seam].std() == pytest.approx(source[at_seam].std(), rel=0.05)


def test_blending_leaves_equal_images_alone_and_knows_no_order():
    rng = np.random.default_rng(5)
    source, target = rng.integers(60, 190, (2, 40, 46, 3), dtype=np.uint8)
    mask = ellipse(22, 18, 9, 7, 30, (40, 46))
    np.testing.assert_array_equal(seam.blend(source, source, mask, 1.0), source)
    full = rng.integers(0, 256, (40, 46, 3), dtype=np.uint8)
    np.testing.assert_array_equal(seam.blend(full, full, mask, 1.0), full)
    found = seam.blend(source, target, mask, 1.0).astype(int)
    assert np.abs(found - seam.blend(target, source, ~mask, 1.0)).max() <= 1
    far = ~seam.near_outline(mask, 9)
    hard = np.where(mask[..., None], source, target)
    assert far.any() and np.abs(found - hard)[far].max() == 0
    beyond = ~seam.near_outline(mask, seam.BLEND_REACH)
    assert np.abs(found - hard)[beyond].max() <= 4  # of differences up to 130


def test_near_the_outline_is_measured_to_the_other_side():
    mask = ellipse(26, 21, 12, 9, 30, (44, 53))
    found = seam.near_outline(mask, 2.5)
    sides = [np.argwhere(mask), np.argwhere(~mask)]
    for y, x in np.argwhere(np.ones_like(mask))[::5]:
        away = np.hypot(*(sides[int(mask[y, x])] - (y, x)).T).min()
        assert found[y, x] == (away <= 2.5)
    for nothing in (np.zeros((9, 8), bool), np.ones((9, 8), bool)):
        assert not seam.near_outline(nothing, 3).any()


def test_near_includes_the_distance_given():
    mask = np.zeros((20, 30), bool)
    mask[:, 15:] = True
    np.testing.assert_array_equal(np.flatnonzero(seam.near_outline(mask, 3)[0]), np.arange(12, 18))
