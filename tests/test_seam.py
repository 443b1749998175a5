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
