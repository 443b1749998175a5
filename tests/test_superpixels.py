"""Superpixels and prompts."""

import warnings

import numpy as np
import pytest
from skimage.data import immunohistochemistry
from skimage.segmentation import slic

from helpers import superpixels as module
from helpers.superpixels import SuperpixelWarning, draw_points, most_superpixels, superpixels


@pytest.fixture(scope="module")
def tissue():
    return immunohistochemistry()[:200, :240]


def test_labels_are_complete_and_in_range(tissue):
    labels = superpixels(tissue, 30)
    assert labels.shape == tissue.shape[:2] and labels.dtype == np.int32
    assert set(np.unique(labels)) == set(range(labels.max() + 1))


@pytest.mark.parametrize("n", [6, 15, 30, 60, 120])
def test_the_number_asked_is_met_on_real_tissue(tissue, n):
    found = superpixels(tissue, n).max() + 1
    assert n / 1.5 <= found <= n * 1.5


@pytest.mark.parametrize(("size", "n", "found"), [((64, 96), 12, 12), ((90, 150), 17, 18)])
def test_superpixels_are_the_nearer_of_two_attempts(size, n, found):
    """The grid of SLIC's seeds rounds the number; asked for more, it comes nearer."""
    image = immunohistochemistry()[: size[0], : size[1]]
    first = slic(image, n, compactness=40, sigma=2, start_label=0)
    assert len(np.unique(first)) < found
    labels = superpixels(image, n)
    assert labels.max() + 1 == found
    more = round(n**2 / len(np.unique(first)))
    second = slic(image, more, compactness=40, sigma=2, start_label=0)
    np.testing.assert_array_equal(labels, np.unique(second, return_inverse=True)[1].reshape(size))


@pytest.mark.parametrize(
    ("first", "again", "kept"),
    [(16, 23, 23), (16, 24, 16), (16, 25, 16), (16, 15, 16), (12, 14, 14)],
)
def test_the_second_attempt_is_kept_only_if_it_is_nearer(first, again, kept, monkeypatch):
    """20 are asked for: 24 are as far away as 16, and 14 no reason to warn."""
    answers = iter([first, again])
    monkeypatch.setattr(
        module, "slic_labels", lambda *_: np.arange(1800).reshape(30, 60) % next(answers)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert superpixels(np.zeros((30, 60, 3), np.uint8), 20).max() + 1 == kept


def test_a_grid_that_stays_the_same_is_not_asked_again(monkeypatch):
    """Whatever the second answer would be, it costs nothing where it is the first one again."""
    image, asked = immunohistochemistry()[:120, :300], []
    plain = module.slic_labels
    monkeypatch.setattr(
        module, "slic_labels", lambda *given: asked.append(given[1]) or plain(*given)
    )
    superpixels(image, 60)
    assert asked == [60] and len(np.unique(plain(image, 60, 40, 2))) == 59
    np.testing.assert_array_equal(plain(image, 60, 40, 2), plain(image, 61, 40, 2))


def test_default_compactness_of_scikit_image_is_a_trap(tissue):
    assert slic(tissue, 30, start_label=0).max() + 1 < 20
    with pytest.warns(SuperpixelWarning, match="Raise compactness"):
        superpixels(tissue, 30, compactness=1.0, sigma=0.0)


def test_a_superpixel_has_room_for_sixteen_pixels():
    assert most_superpixels((20, 30)) == 37
    image = np.zeros((20, 30, 3), np.uint8)
    with pytest.raises(ValueError, match=r"n_segments = 38 leaves fewer than 16 .* of 20 x 30"):
        superpixels(image, 38)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SuperpixelWarning)
        superpixels(image, 37)


@pytest.mark.parametrize(("found", "warned"), [(13, True), (14, False), (30, False), (31, True)])
def test_a_number_more_than_half_as_many_again_away_is_warned_of(found, warned, monkeypatch):
    monkeypatch.setattr(
        module,
        "slic_labels",
        lambda image, *_: np.arange(image[..., 0].size).reshape(20, 30) % found,
    )
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        superpixels(np.zeros((20, 30, 3), np.uint8), 20)
    assert [issubclass(w.category, SuperpixelWarning) for w in seen] == [True] * warned


def test_same_input_same_labels(tissue):
    np.testing.assert_array_equal(superpixels(tissue), superpixels(tissue.copy()))


def test_constant_image_gives_a_grid():
    assert 4 <= superpixels(np.full((60, 90, 3), 200, np.uint8), 6).max() + 1 <= 9


def test_one_superpixel_is_the_whole_image(tissue):
    np.testing.assert_array_equal(superpixels(tissue, 1), np.zeros(tissue.shape[:2]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_segments": 0}, "at least 1"),
        ({"n_segments": 100_000}, "fewer than 16 pixels"),
        ({"compactness": 0.0}, "positive"),
        ({"sigma": -1.0}, "negative"),
    ],
)
def test_bad_settings(tissue, change, message):
    with pytest.raises(ValueError, match=message):
        superpixels(tissue, **({"n_segments": 10} | change))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((40, 40), np.uint8),
        np.zeros((40, 40, 4), np.uint8),
        np.zeros((40, 40, 3), np.float32),
        np.zeros((4, 40, 3), np.uint8),
    ],
)
def test_bad_images(image):
    with pytest.raises(ValueError, match="image"):
        superpixels(image)


def test_points_lie_in_their_superpixel():
    labels = np.repeat(np.arange(6).reshape(2, 3), 20, 0).repeat(10, 1)
    points = draw_points(labels, 15, rng=np.random.default_rng(0))
    assert points.shape == (6, 15, 2)
    inside = labels[points[..., 1], points[..., 0]]
    np.testing.assert_array_equal(inside, np.repeat(np.arange(6)[:, None], 15, 1))


def test_points_do_not_repeat_unless_they_must():
    labels = np.zeros((4, 10), np.int32)
    labels[0, :3] = 1
    points = draw_points(labels, 5, rng=np.random.default_rng(1))
    assert len(np.unique(points[0], axis=0)) == 5
    assert len(np.unique(points[1], axis=0)) <= 3


def test_as_many_points_as_pixels_are_all_of_them():
    labels = np.zeros((4, 10), np.int32)
    labels[1, 2:7] = 1
    for seed in range(5):
        points = draw_points(labels, 5, rng=np.random.default_rng(seed))[1]
        assert sorted(points[:, 0]) == [2, 3, 4, 5, 6] and (points[:, 1] == 1).all()


def test_points_cover_a_superpixel_evenly():
    points = draw_points(np.zeros((20, 50), np.int32), 400, rng=np.random.default_rng(2))[0]
    assert abs(points[:, 0].mean() - 24.5) < 2 and abs(points[:, 1].mean() - 9.5) < 1


def test_points_depend_on_the_generator_only():
    labels = np.arange(4).repeat(25).reshape(10, 10)
    one, two, three = (draw_points(labels, 5, rng=np.random.default_rng(s)) for s in (3, 3, 4))
    np.testing.assert_array_equal(one, two)
    assert (one != three).any()


def test_bad_points():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="at least 1 point"):
        draw_points(np.zeros((4, 4), int), 0, rng=rng)
    with pytest.raises(ValueError, match=r"labels must be \(H, W\).* got shape \(8,\)"):
        draw_points(np.zeros(8, int), 3, rng=rng)
    with pytest.raises(ValueError, match="gaps"):
        draw_points(np.full((4, 4), 2), 3, rng=rng)
