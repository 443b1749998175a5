import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage

from helpers import placement as place


def ellipse(x, y, a, b, degrees=0.0, shape=(160, 200)):
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    t = np.deg2rad(degrees)
    u = (columns - x) * np.cos(t) + (rows - y) * np.sin(t)
    v = -(columns - x) * np.sin(t) + (rows - y) * np.cos(t)
    return (u / a) ** 2 + (v / b) ** 2 <= 1


# --- moments and boxes ---


def test_moments_of_an_ellipse():
    """Closed form: second moments a^2/4 and b^2/4 along the axes."""
    a, b, degrees = 40, 18, 25
    centroid, covariance = place.moments(ellipse(90.3, 71.6, a, b, degrees))
    t = np.deg2rad(degrees)
    r = np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]])
    np.testing.assert_allclose(centroid, [90.3, 71.6], atol=0.1)
    np.testing.assert_allclose(
        covariance, r @ np.diag([a**2 / 4, b**2 / 4]) @ r.T, rtol=0.02, atol=1
    )


@pytest.mark.parametrize("angle_s", [0, 33, 90, 171])
@pytest.mark.parametrize("angle_t", [0, 60, 135])
def test_affine_between_ellipses_is_the_closed_form(angle_s, angle_t):
    source = ellipse(60, 62, 40, 20, angle_s)
    target = ellipse(110, 80, 48, 30, angle_t)
    affine = place.affine_from_moments(source, target, stretch_limit=9)
    centroid, covariance = place.moments(source)
    matrix = affine[:, :2]
    np.testing.assert_allclose(
        matrix @ centroid + affine[:, 2], place.moments(target)[0], atol=1e-9
    )
    np.testing.assert_allclose(
        matrix @ covariance @ matrix.T, place.moments(target)[1], rtol=1e-9, atol=1e-7
    )
    assert np.linalg.det(matrix) == pytest.approx(48 * 30 / (40 * 20), rel=0.02)  # no reflection
    np.testing.assert_allclose(place.axis_scales(affine), [30 / 20, 48 / 40], rtol=0.02)
    warped = place.warp_mask(source, affine, target.shape)
    assert (warped & target).sum() / (warped | target).sum() > 0.95


def egg(x, y, r, degrees, shape=(160, 200)):
    """A shape with one blunt and one pointed end."""
    t = np.deg2rad(degrees)
    tip = ellipse(x + r * np.cos(t), y + r * np.sin(t), r * 0.45, r * 0.3, degrees, shape)
    return ellipse(x, y, r, r * 0.6, degrees, shape) | tip


@pytest.mark.parametrize("turn", range(0, 360, 30))
def test_the_half_turn_is_resolved_by_overlap(turn):
    source, target = egg(70, 80, 35, 20), egg(100, 75, 35, 20 + turn)
    affine = place.affine_from_moments(source, target)
    warped = place.warp_mask(source, affine, target.shape)
    assert (warped & target).sum() / (warped | target).sum() > 0.93
    t = np.deg2rad(turn)
    rotation = np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]])
    np.testing.assert_allclose(affine[:, :2], rotation, atol=0.06)


def test_same_mask_gives_the_identity_and_shift_a_shift():
    mask = egg(80, 70, 30, 15)
    identity = np.array([[1.0, 0, 0], [0, 1, 0]])
    np.testing.assert_allclose(place.affine_from_moments(mask, mask), identity, atol=1e-9)
    np.testing.assert_allclose(place.affine_from_boxes(mask, mask), identity, atol=1e-9)
    moved = np.roll(mask, (7, -12), axis=(0, 1))
    shift = np.array([[1.0, 0, -12], [0, 1, 7]])
    np.testing.assert_allclose(place.affine_from_moments(mask, moved), shift, atol=1e-9)
    np.testing.assert_allclose(place.affine_from_boxes(mask, moved), shift, atol=1e-9)


def test_symmetric_shapes_take_the_smaller_turn():
    mask = np.zeros((60, 60), bool)
    mask[20:40, 10:50] = True  # a half turn changes nothing
    assert np.trace(place.affine_from_moments(mask, mask)[:, :2]) > 0


def test_limits_of_scale_and_stretch():
    small, large = ellipse(60, 60, 10, 8), ellipse(100, 80, 60, 50)
    up = place.affine_from_moments(small, large, scale_limits=(0.5, 2))
    np.testing.assert_allclose(place.axis_scales(up), [2, 2])
    down = place.affine_from_moments(large, small, scale_limits=(0.5, 2))
    np.testing.assert_allclose(place.axis_scales(down), [0.5, 0.5])
    long, disc = ellipse(80, 80, 40, 10), ellipse(80, 80, 20, 20)
    free = place.axis_scales(place.affine_from_moments(long, disc, stretch_limit=9))
    np.testing.assert_allclose(free, [2, 0.5], rtol=0.02)
    held = place.axis_scales(place.affine_from_moments(long, disc, stretch_limit=1.5))
    assert held[0] / held[1] == pytest.approx(1.5)
    assert held[0] * held[1] == pytest.approx(free[0] * free[1], rel=0.02)  # the area is kept
    for bad in ({"scale_limits": (2, 1)}, {"scale_limits": (0, 1)}, {"stretch_limit": 0.5}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            place.affine_from_moments(long, disc, **bad)


def test_boxes_are_carried_onto_boxes():
    source, target = np.zeros((40, 60), bool), np.zeros((80, 90), bool)
    source[10:20, 5:25] = True
    target[30:45, 40:60] = True
    affine = place.affine_from_boxes(source, target)
    np.testing.assert_allclose(affine, [[1, 0, 35], [0, 1.5, 37 - 1.5 * 14.5]])
    np.testing.assert_array_equal(place.warp_mask(source, affine, target.shape), target)


@pytest.mark.parametrize(
    "make", [place.affine_from_moments, place.affine_from_boxes, place.affine_by_fit]
)
def test_degenerate_masks(make):
    one, line, none = np.zeros((3, 30, 30), bool)
    one[4, 5] = line[3:20, 7] = True
    for source, target in ((one, one), (one, line), (line, one), (line, line)):
        assert np.isfinite(make(source, target)).all()
    with pytest.raises(ValueError, match="empty"):
        make(none, one)
    with pytest.raises(ValueError, match="empty"):
        make(one, none)


# --- warps ---


def test_warps_agree_with_the_affine_on_points():
    image = np.zeros((50, 70, 3), np.uint8)
    image[20:23, 30:33] = 255
    affine = np.array([[0.0, -1, 60], [1, 0, 5]])  # (31, 21) -> (39, 36)
    out = place.warp_image(image, affine, (60, 80))
    assert out.shape == (60, 80, 3) and (out[35:38, 38:41] == 255).all()
    mask = place.warp_mask(image[..., 0] > 0, affine, (60, 80))
    np.testing.assert_array_equal(np.argwhere(mask).mean(0), [36, 39])


def test_pixels_covered_by_half_belong_to_a_mask():
    mask = np.zeros((12, 20), bool)
    mask[4:8, 5:11] = True
    moved = place.warp_mask(mask, np.array([[1.0, 0, 0.5], [0, 1, 0]]), (12, 20))
    expected = np.zeros((12, 20), bool)
    expected[4:8, 5:12] = True
    np.testing.assert_array_equal(moved, expected)


@pytest.mark.parametrize("shape", [(5, 1), (1, 5), (1, 1)])
def test_a_mask_one_pixel_wide_covers_what_it_covers(shape):
    moved = place.warp_mask(np.ones(shape, bool), np.array([[1.0, 0, 2], [0, 1, 1]]), (8, 9))
    expected = np.zeros((8, 9), bool)
    expected[1 : 1 + shape[0], 2 : 2 + shape[1]] = True
    np.testing.assert_array_equal(moved, expected)


def lanczos_at(image, x, y, lobes=4):
    """One value, the slow literal way."""
    window = lambda t: np.sinc(t) * np.sinc(t / lobes)  # noqa: E731
    padded = np.pad(image, 300, mode="reflect")
    total = weights = 0.0
    for j in range(int(np.floor(y)) - lobes + 1, int(np.floor(y)) + lobes + 1):
        for i in range(int(np.floor(x)) - lobes + 1, int(np.floor(x)) + lobes + 1):
            weight = window(x - i) * window(y - j)
            total, weights = total + weight * padded[j + 300, i + 300], weights + weight
    return total / weights


def test_images_are_warped_by_the_windowed_sinc():
    rng = np.random.default_rng(3)
    image = rng.integers(60, 180, (14, 19, 3), dtype=np.uint8)
    affine = np.array([[1.2, -0.5, 3.3], [0.4, 1.1, -2.7]])
    got = place.warp_image(image, affine, (17, 23))
    inverse = cv2.invertAffineTransform(affine)
    for y, x in [(0, 0), (3, 8), (9, 11), (16, 22), (12, 2)]:
        at = inverse @ [x, y, 1]
        expected = lanczos_at(image[..., 1].astype(float), *at)
        assert abs(got[y, x, 1] - np.clip(expected, 0, 255)) <= 0.51


@pytest.mark.parametrize("seed", range(4))
def test_batched_warps_are_those_of_opencv_one_by_one(seed):
    """Mirrored beyond the border; OpenCV rounds positions to 1/32 pixel."""
    rng = np.random.default_rng(seed)
    n, h, w, shape = 5, 37, 53, (61, 45)
    small = rng.integers(60, 196, (n, 6, 8, 3), dtype=np.uint8)
    images = np.stack([cv2.resize(i, (w, h), interpolation=cv2.INTER_CUBIC) for i in small])
    matrices = np.eye(2) * rng.uniform(1.2, 1.7, (n, 1, 1)) + rng.normal(size=(n, 2, 2)) * 0.1
    affines = np.concatenate([matrices, rng.uniform(-8, 12, (n, 2, 1))], axis=2)
    got = place.warp_images(images, affines, shape)
    assert got.shape == (n, *shape, 3) and got.dtype == np.uint8
    for k in range(n):
        expected = cv2.warpAffine(
            images[k].astype(np.float32),
            affines[k],
            shape[::-1],
            flags=cv2.INTER_LANCZOS4,
            borderMode=cv2.BORDER_REFLECT_101,
        )
        difference = np.abs(got[k] - expected)
        assert difference.mean() < 0.6 and np.quantile(difference, 0.99) < 4
        np.testing.assert_array_equal(got[k], place.warp_image(images[k], affines[k], shape))
    masks = images[..., 0] > 128
    warped = place.warp_masks(masks, affines, shape)
    for k in range(n):
        coverage = cv2.warpAffine(masks[k].astype(np.float32), affines[k], shape[::-1])
        assert (warped[k] == (coverage >= 0.5)).mean() > 0.99
        np.testing.assert_array_equal(warped[k], place.warp_mask(masks[k], affines[k], shape))


def test_a_turn_by_90_degrees_and_whole_pixels_changes_no_value():
    image = np.random.default_rng(0).integers(0, 256, (21, 34, 3), dtype=np.uint8)
    turned = place.warp_image(image, np.array([[0.0, -1, 20], [1, 0, 0]]), (34, 21))
    np.testing.assert_array_equal(turned, np.rot90(image, -1))


def test_a_turned_texture_stays_as_sharp_as_it_was():
    """Waves of 3 pixels, turned by 30 degrees and shifted: the closed form, and no blur."""
    wave = lambda x: 127.5 + 100 * np.cos(2 * np.pi * x / 3)  # noqa: E731
    y, x = np.mgrid[:90, :110].astype(float)
    image = np.repeat(wave(x)[..., None], 3, axis=2).round().astype(np.uint8)
    c, s = np.cos(np.pi / 6), np.sin(np.pi / 6)
    affine = np.array([[c, -s, 30.4], [s, c, -20.7]])
    back = cv2.invertAffineTransform(affine)
    inner = np.s_[35:60, 40:70]
    expected = wave(back[0, 0] * x + back[0, 1] * y + back[0, 2])[inner]
    got = place.warp_image(image, affine, (90, 110))[inner][..., 0]
    bilinear = cv2.warpAffine(image, affine, (110, 90))[inner][..., 0]
    assert got.std() > 0.95 * expected.std() > 1.3 * bilinear.std()
    assert np.abs(got - expected).mean() < 4 < np.abs(bilinear - expected).mean() / 3


def test_what_shrinks_does_not_alias():
    """Stripes too fine for the frame become grey instead of coarser stripes."""
    image = np.zeros((120, 160, 3), np.uint8)
    image[:, ::2] = 255
    out = place.warp_image(image, np.array([[0.36, 0, 3.0], [0, 0.36, 2.0]]), (40, 50))
    assert out[5:35, 5:45].std() < 25
    assert abs(out[5:35, 5:45].mean() - 127.5) < 5


def test_what_shrinks_is_smoothed_by_the_gaussian_of_its_scale():
    image = np.random.default_rng(0).integers(40, 216, (45, 60, 3), dtype=np.uint8)
    affine = np.array([[0.4, 0, 1.3], [0, 0.4, -0.7]])  # sigma (1 / 0.4 - 1) / 2
    got = place.warp_image(image, affine, (16, 24))
    blurred = ndimage.gaussian_filter(image[..., 0].astype(float), 0.75, mode="mirror", radius=3)
    for y, x in [(3, 5), (8, 12), (12, 20), (5, 17)]:
        expected = lanczos_at(blurred, (x - 1.3) / 0.4, (y + 0.7) / 0.4)
        assert abs(got[y, x, 0] - expected) <= 0.6


def test_a_mirrored_image_is_smoothed_as_much():
    image = np.random.default_rng(2).integers(0, 256, (40, 51, 3), dtype=np.uint8)
    plain = place.warp_image(image, np.array([[0.4, 0, 2], [0, 0.4, 1]]), (18, 25))
    turned = place.warp_image(image, np.array([[-0.4, 0, 22], [0, 0.4, 1]]), (18, 25))
    assert np.abs(plain.astype(int) - turned[:, ::-1]).max() <= 1


def test_a_small_image_is_smoothed_as_far_as_its_mirror_goes():
    image = np.random.default_rng(1).integers(40, 216, (3, 4, 3), dtype=np.uint8)
    got = place.warp_image(image, np.array([[0.2, 0, 1.3], [0, 0.2, 0.4]]), (3, 4))  # sigma 2
    weights = np.exp(-(np.arange(-2, 3) ** 2) / 8)  # a mirror of 3 pixels goes on for 2
    blurred = image[..., 0].astype(float)
    for axis in (0, 1):
        blurred = ndimage.correlate1d(blurred, weights / weights.sum(), axis, mode="mirror")
    for y, x in [(0, 0), (0, 1), (1, 2), (2, 3)]:
        expected = lanczos_at(blurred, (x - 1.3) / 0.2, (y - 0.4) / 0.2)
        assert abs(got[y, x, 0] - expected) <= 0.6
    dot = place.warp_image(image[:1, :1], np.array([[0.2, 0, 0], [0, 0.2, 0]]), (2, 3))
    np.testing.assert_array_equal(dot, np.broadcast_to(image[0, 0], (2, 3, 3)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_warps_on_the_gpu_are_those_of_the_cpu():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 40, 52, 3), dtype=np.uint8)
    affines = np.tile([[0.9, -0.2, 6.0], [0.3, 1.1, -4.0]], (4, 1, 1))
    a, b = (place.warp_images(images, affines, (33, 47), device=d) for d in ("cpu", "cuda"))
    assert np.abs(a.astype(int) - b).max() <= 1


def test_warp_errors():
    image = np.zeros((2, 8, 9, 3), np.uint8)
    with pytest.raises(ValueError, match="2 images"):
        place.warp_images(image, np.zeros((1, 2, 3)), (4, 4))
    with pytest.raises(ValueError, match="flattens"):
        place.warp_images(image, np.zeros((2, 2, 3)), (4, 4))


@pytest.mark.parametrize("seed", range(5))
def test_nothing_of_a_mask_lies_beyond_its_reach(seed):
    rng = np.random.default_rng(seed)
    mask = ellipse(*rng.uniform(20, 60, 2), *rng.uniform(4, 15, 2), 30, (80, 90))
    matrix = rng.normal(size=(2, 2)) + np.eye(2)
    affine = np.column_stack([matrix, rng.uniform(-60, 60, 2)])
    warped = place.warp_mask(mask, affine, (70, 100))
    window = place.reach(mask, affine, (70, 100))
    inside = np.zeros_like(warped)
    inside[window] = True
    assert not (warped & ~inside).any()
    size = inside[window].shape
    if 0 not in size:  # the window alone gives the same mask
        local = affine - [[0, 0, window[1].start], [0, 0, window[0].start]]
        assert (place.warp_mask(mask, local, size) != warped[window]).mean() < 1e-3


def test_the_reach_of_a_mask_ends_with_the_frame():
    mask = np.zeros((9, 12), bool)
    mask[2:5, 3:7] = True

    def moved(x, y, **options):
        return place.reach(mask, np.array([[1.0, 0, x], [0, 1, y]]), (20, 30), **options)

    assert moved(10, 8, margin=1) == (slice(8, 15), slice(11, 19))  # and a pixel of interpolation
    assert moved(0, 0) == (slice(0, 8), slice(0, 10))
    assert moved(22, 15) == (slice(14, 20), slice(22, 30))
    assert moved(-50, -50) == (slice(0, 0), slice(0, 0))
    assert moved(50, 50) == (slice(20, 20), slice(30, 30))


def comma(turn, shape=(160, 200)):
    """A shape without mirror symmetry."""
    parts = np.zeros(shape, bool)
    for t, r in zip(np.linspace(0, 2.2, 12), np.linspace(16, 5, 12), strict=True):
        x, y = np.cos(t + turn) * 34, np.sin(t + turn) * 34
        parts |= ellipse(100 + x, 80 + y, r, r, 0, shape)
    return parts


def test_a_mirror_image_is_taken_where_it_fits_better():
    source = comma(0.3)
    target = comma(0.3)[:, ::-1]
    allowed = place.affine_from_moments(source, target)
    held = place.affine_from_moments(source, target, mirror=False)
    assert np.linalg.det(allowed[:, :2]) == pytest.approx(-1, abs=1e-3)
    assert np.linalg.det(held[:, :2]) > 0
    fits = [place.iou(place.warp_mask(source, a, target.shape), target) for a in (allowed, held)]
    assert fits[0] > 0.95 > 0.8 > fits[1]


@pytest.mark.parametrize("seed", range(6))
def test_fit_never_overlaps_less_than_moments_and_holds_the_limits(seed):
    rng = np.random.default_rng(seed)

    def blob():
        parts = [
            ellipse(*rng.uniform(80, 120, 2), *rng.uniform(8, 30, 2), rng.uniform(0, 180))
            for _ in range(3)
        ]
        return np.logical_or.reduce(parts)

    source, target = blob(), blob()
    limits = {"scale_limits": (0.7, 1.4), "stretch_limit": 1.3}
    before = place.affine_from_moments(source, target, **limits)
    after = place.affine_by_fit(source, target, **limits)
    overlaps = [
        place.iou(place.warp_mask(source, a, target.shape), target) for a in (before, after)
    ]
    assert overlaps[1] >= overlaps[0]
    large, small = place.axis_scales(after)
    assert 0.7 - 1e-6 <= small <= large <= 1.4 + 1e-6 and large / small <= 1.3 + 1e-6


def test_fit_overlaps_more_where_moments_are_drawn_away():
    source = comma(0.0)
    target = place.warp_mask(source, np.array([[0.8, -0.3, 30.0], [0.3, 0.8, 4.0]]), (160, 200))
    target[20:34, 20:60] = True  # an island
    overlaps = [
        place.iou(place.warp_mask(source, make(source, target), target.shape), target)
        for make in (place.affine_from_moments, place.affine_by_fit)
    ]
    assert overlaps[1] > overlaps[0] + 0.03


@pytest.mark.parametrize(
    ("centre", "shape"), [((0, 70), (150, 190)), ((130, 0), (140, 190)), ((189, 149), (150, 190))]
)
def test_a_whole_segment_hangs_over_the_border_that_cuts_its_target(centre, shape):
    """Half or a quarter of a disc: a whole one covers it, centred on the border.

    By moments its centre would lie on that of the half, 14 pixels inside.
    """
    source = ellipse(100, 80, 34, 34, 0, (160, 200))
    target = ellipse(*centre, 34, 34, 0, shape)
    affine = place.affine_by_fit(source, target, scale_limits=(0.9, 1.1), stretch_limit=1.1)
    np.testing.assert_allclose(affine @ [100, 80, 1], centre, atol=5)
    assert place.iou(place.warp_mask(source, affine, shape), target) > 0.9


def spot(sides, shape, r=30):
    """An oval centred on the middle of a side of the image, or on a corner."""
    h, w = shape
    x = 0 if "left" in sides else w - 1 if "right" in sides else 0.45 * w
    y = 0 if "top" in sides else h - 1 if "bottom" in sides else 0.55 * h
    return ellipse(x, y, r, 0.8 * r, 25, shape)


SIDES = ("left", "top", "right", "bottom")
CORNERS = ("left top", "right top", "right bottom", "left bottom")


@pytest.mark.parametrize(
    ("source_sides", "target_sides"),
    [(s, t) for s in SIDES for t in SIDES + CORNERS] + [(s, t) for s in CORNERS for t in CORNERS],
)
def test_cut_sides_come_to_lie_at_the_border(source_sides, target_sides):
    """No part of a cut side lies inside the frame, whichever side it goes to."""
    source, target = spot(source_sides, (150, 190), r=33), spot(target_sides, (160, 140))
    limits = {"scale_limits": (0.8, 1.25), "stretch_limit": 1.3}
    affine = place.affine_at_border(source, target, **limits)
    h, w = source.shape
    edges = {
        "left": [(-0.5, y) for y in range(h) if source[y, 0]],
        "right": [(w - 0.5, y) for y in range(h) if source[y, -1]],
        "top": [(x, -0.5) for x in range(w) if source[0, x]],
        "bottom": [(x, h - 0.5) for x in range(w) if source[-1, x]],
    }
    cut = np.array([point for name in source_sides.split() for point in edges[name]])
    x, y = (cut @ affine[:, :2].T + affine[:, 2]).T
    inside = (x > -0.499) & (x < 140 - 0.501) & (y > -0.499) & (y < 160 - 0.501)
    assert len(cut) > 20 and not inside.any()
    large, small = place.axis_scales(affine)
    assert 0.8 - 1e-9 <= small <= large <= 1.25 + 1e-9 and large / small <= 1.3 + 1e-9
    matrix = affine[:, :2]
    assert np.isclose(matrix, 0).sum() == 2  # a quarter turn or its mirror image
    enough = 0.6 if len(source_sides.split()) < len(target_sides.split()) else 0.8
    assert place.iou(place.warp_mask(source, affine, target.shape), target) > enough


@pytest.mark.parametrize("seed", range(3))
def test_placement_at_the_border_against_a_search_of_all(seed):
    """Blobs cut at the left side: as good as the best of a grid of turns, scales and shifts."""
    rng = np.random.default_rng(seed)
    shape = (72, 64)

    def blob():
        return np.logical_or.reduce(
            [ellipse(rng.uniform(-4, 12), rng.uniform(28, 46), *rng.uniform(6, 15, 2),
                     rng.uniform(0, 180), shape) for _ in range(3)]
        )  # fmt: skip

    source, target = blob(), blob()
    affine = place.affine_at_border(source, target, scale_limits=(0.8, 1.25))
    found = place.iou(place.warp_mask(source, affine, shape), target)
    best = 0.0
    for flip in (1, -1):  # a source cut at the left stays left: as it is, or upside down
        for k in np.linspace(0.8, 1.25, 7):
            for x in (0, -1, -2, -4):
                affines = [
                    np.array([[k, 0, 0.5 * (k - 1) + x], [0, flip * k, 37 - flip * k * 37 + y]])
                    for y in range(-16, 17, 2)
                ]
                masks = place.warp_masks([source] * len(affines), affines, shape)
                best = max(best, *(place.iou(m, target) for m in masks))
    assert found > best - 0.02


@pytest.mark.parametrize("sides", [*SIDES, *CORNERS])
def test_a_cut_segment_onto_itself_is_the_identity(sides):
    mask = spot(sides, (150, 190))
    np.testing.assert_allclose(place.affine_at_border(mask, mask), np.eye(2, 3), atol=1e-9)
    held = place.affine_at_border(mask, mask[:, ::-1], mirror=False)
    assert np.linalg.det(held[:, :2]) > 0


def test_cut_sides_that_find_no_place_are_an_error():
    shape = (150, 190)
    side, corner, inside = spot("left", shape), spot("left top", shape), spot("", shape)
    across = np.zeros(shape, bool)
    across[40:70] = True
    for source, target, message in (
        (corner, side, "the left and top side .* whose target reaches the left side"),
        (side, inside, "reaches no side: draw another"),
        (inside, side, "reaches no side of its image cannot"),
        (across, across, "the left and right side"),
    ):
        with pytest.raises(ValueError, match=message):
            place.affine_at_border(source, target)
    with pytest.raises(ValueError, match="empty"):
        place.affine_at_border(np.zeros(shape, bool), side)


def test_sides_of_boxes():
    boxes = np.array([[0, 5, 10, 9], [3, 0, 17, 2], [0, 0, 20, 15], [4, 4, 4, 11], [4, 4, 4, 4]])
    expected = [[1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
    shapes = np.tile([15, 20], (5, 1))
    np.testing.assert_array_equal(place.border_sides(boxes, shapes), np.array(expected, bool))
    np.testing.assert_array_equal(place.border_sides(boxes, (15, 20)), np.array(expected, bool))


@pytest.mark.parametrize("seed", range(4))
def test_no_source_beyond_the_range_of_sizes_can_fit(seed):
    rng = np.random.default_rng(seed)
    limits, wanted = (0.8, 1.2), 0.6
    low, high = place.size_range(limits, wanted)
    target = ellipse(100, 80, 24, 20, 30)
    inside = []
    for size in np.linspace(0.5, 1.8, 14):
        source = ellipse(*rng.uniform(80, 120, 2), 24 * size, 20 * size, rng.uniform(0, 180))
        affine = place.affine_by_fit(source, target, scale_limits=limits)
        fits = place.iou(place.warp_mask(source, affine, target.shape), target) >= wanted
        ratio = source.sum() / target.sum()
        inside.append(0.97 * low <= ratio <= 1.03 * high)  # the outline is a row of pixels
        assert inside[-1] or not fits
    assert 0 < sum(inside) < len(inside)
    assert place.size_range(limits, 0.0) == (0.0, np.inf)
    # The bounds are sharp: a source of the same shape at the bound just fits.
    assert low * limits[1] ** 2 == pytest.approx(wanted)
    assert 1 / (high * limits[0] ** 2) == pytest.approx(wanted)


def test_the_small_picture_lies_where_its_transform_says():
    mask = ellipse(120, 70, 40, 22, 20)
    small, affine = place._small(mask, margin=0.25)
    assert max(small.shape) == place._FIT_SIDE
    expected = cv2.warpAffine(mask.astype(np.float32), affine, small.shape[::-1])
    assert np.abs(small - expected).mean() < 0.03
    m = cv2.moments(small)
    moved = affine[:, :2] @ place.moments(mask)[0] + affine[:, 2]
    np.testing.assert_allclose([m["m10"] / m["m00"], m["m01"] / m["m00"]], moved, atol=0.05)
    tiny, shift = place._small(mask[60:70, 100:115], margin=0.2)  # is not enlarged
    np.testing.assert_array_equal(tiny, np.pad(np.ones((10, 15)), 4))
    np.testing.assert_allclose(shift, [[1, 0, 4], [0, 1, 4]])


def test_scales_vary_by_logarithms_within_the_limits():
    def varied(size, stretched):
        return place._varied(np.array([1.2, 0.8]), size, stretched, (0.7, 1.6), 4.0)

    np.testing.assert_allclose(varied(0.1, 0.2), [1.2 * np.exp(0.1 + 0.1), 0.8 * np.exp(0.1 - 0.1)])
    np.testing.assert_allclose(varied(1.0, 0.0), [1.6, 1.6])
    mean = np.sqrt(1.2 * 0.8)
    np.testing.assert_allclose(varied(0.0, 3.0), [1.6, 0.7])
    np.testing.assert_allclose(
        place._varied(np.array([1.2, 0.8]), 0.0, 3.0, (0.1, 9), 4.0), [2 * mean, mean / 2]
    )
