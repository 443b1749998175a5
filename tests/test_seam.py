import numpy as np
import pytest
from scipy import ndimage
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


def test_at_the_border_of_the_image_there_is_no_outline():
    shape = (44, 53)
    source, target = pictures(2, shape)
    mask = ellipse(0, 21, 14, 12, 0, shape)
    found = seam.least_cut(source, target, mask, outwards=3, inwards=3)
    assert found[18:24, 0].all()


@pytest.mark.parametrize("bad", [{"outwards": -1}, {"outwards": 1, "inwards": -2}])
def test_seam_errors(bad):
    image = np.zeros((9, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="give 0 or more pixels"):
        seam.least_cut(image, image, np.ones((9, 8), bool), **bad)


# --- fading ---------------------------------------------------------------------------------------


def test_the_share_is_a_tanh_of_the_distance_and_ends_at_its_reach():
    mask = ellipse(26, 21, 12, 9, 30, (44, 53))
    share = seam.fade(mask, 1.5)[..., 0]
    inside, outside = (ndimage.distance_transform_edt(part) for part in (mask, ~mask))
    for y, x in np.argwhere(np.ones_like(mask))[::7]:
        d = inside[y, x] - 0.5 if mask[y, x] else 0.5 - outside[y, x]
        expected = (1 + np.tanh(d / 1.5)) / 2 if abs(d) <= 4 else float(mask[y, x])
        assert share[y, x] == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(seam.fade(~mask, 1.5), 1 - seam.fade(mask, 1.5), atol=1e-6)
    line = seam.fade(np.arange(20)[None].repeat(9, 0) < 10, 1)[4, :, 0]
    left = np.abs(line - (np.arange(20) < 10))
    assert (np.diff(line) <= 0).all() and 0 < left[left > 0].min() < 0.01  # a grey level of 127


def literal_blend(source, target, share, sigma):
    """Pixel by pixel, with scipy's Gaussian."""

    def smooth(x, s):
        r = int(np.ceil(4 * s))
        return ndimage.gaussian_filter(x, s, mode="mirror", radius=r)

    out = np.empty(source.shape)
    layers = [
        [(smooth(c, sigma), c - smooth(c, sigma)) for c in np.moveaxis(image.astype(float), -1, 0)]
        for image in (source, target)
    ]
    h, w = share.shape[:2]
    moments = {
        (a, b): smooth(
            np.mean([layers[a][k][1] * layers[b][k][1] for k in range(3)], axis=0), 2 * sigma
        )
        for a, b in ((0, 0), (0, 1), (1, 1))
    }
    for y in range(h):
        for x in range(w):
            power = moments[0, 0][y, x] * moments[1, 1][y, x]
            rho = max(moments[0, 1][y, x], 0) / np.sqrt(max(power, 1e-3))
            v = share[y, x, 0]
            contrast = np.sqrt(v**2 + (1 - v) ** 2 + 2 * v * (1 - v) * rho)
            for k in range(3):
                (ls, hs), (lt, ht) = (layers[i][k] for i in (0, 1))
                out[y, x, k] = v * ls[y, x] + (1 - v) * lt[y, x]
                out[y, x, k] += (v * hs[y, x] + (1 - v) * ht[y, x]) / contrast
    return out.clip(0, 255)


@pytest.mark.parametrize("sigma", [1.0, 1.5])
def test_blend_is_its_formula(sigma):
    rng = np.random.default_rng(3)
    source, target = rng.integers(30, 220, (2, 23, 31, 3), dtype=np.uint8)
    target[:, :12] = (0.7 * target[:, :12] + 0.3 * source[:, :12]).astype(np.uint8)  # correlated
    share = rng.uniform(size=(23, 31, 1))
    found = seam.blend(source, target, share, sigma=sigma)
    assert found.dtype == np.uint8
    assert np.abs(found - literal_blend(source, target, share, sigma)).max() <= 0.6


def test_blending_keeps_the_contrast_of_independent_textures():
    """The mean of two has 0.71 of their contrast, the blend all of it, wherever it is measured."""
    rng = np.random.default_rng(4)
    source, target = rng.normal(128, 20, (2, 300, 40, 3)).clip(0, 255).round().astype(np.uint8)
    share = np.full((300, 40, 1), 0.5)

    def contrast(image):
        fine = image - ndimage.gaussian_filter(image.astype(float), (1, 1, 0))
        return fine[8:-8, 8:-8].std()

    before = contrast(source)
    mean = contrast((source.astype(float) + target) / 2)
    assert mean == pytest.approx(before / np.sqrt(2), rel=0.02)
    assert contrast(seam.blend(source, target, share)) == pytest.approx(before, rel=0.04)


def test_equal_images_are_left_as_they_are_and_so_are_the_ends():
    rng = np.random.default_rng(5)
    source, target = rng.integers(0, 256, (2, 20, 26, 3), dtype=np.uint8)
    share = rng.uniform(size=(20, 26, 1))
    np.testing.assert_array_equal(seam.blend(source, source, share), source)
    np.testing.assert_array_equal(seam.blend(source, target, np.ones((20, 26, 1))), source)
    np.testing.assert_array_equal(seam.blend(source, target, np.zeros((20, 26, 1))), target)
    np.testing.assert_array_equal(
        seam.blend(source, target, share), seam.blend(target, source, 1 - share)
    )
    flat = [np.full((9, 8, 3), v, np.uint8) for v in (10, 250)]
    half = np.full((9, 8, 1), 0.5)
    np.testing.assert_array_equal(seam.blend(*flat, half), np.full((9, 8, 3), 130))
