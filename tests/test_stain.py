import numpy as np
import pytest
from scipy import linalg
from scipy.spatial.distance import cdist
from skimage import color, data

from helpers import stain

METHODS = ["transport", "reinhard", "macenko"]


@pytest.fixture(scope="module")
def stained():
    """Two images with known stain vectors, concentrations and glass."""
    rng = np.random.default_rng(0)
    made = {}
    for name, stains, strength in (
        ("one", [[0.65, 0.70, 0.29], [0.27, 0.92, 0.28]], (1.2, 0.8)),
        ("two", [[0.55, 0.76, 0.34], [0.15, 0.95, 0.27]], (0.8, 1.1)),
    ):
        vectors = np.array(stains) / np.linalg.norm(stains, axis=1, keepdims=True)
        c = rng.gamma(2.0, 0.35, (96, 96, 2)) * strength
        c[:48, :, 0] *= 0.02  # rows of nearly pure eosin, then of nearly pure haematoxylin
        c[48:, :, 1] *= 0.02
        c[:, :12] = 0  # glass
        made[name] = (
            np.clip(np.rint(255 * np.exp(-(c @ vectors))), 0, 255).astype(np.uint8),
            vectors,
        )
    return made


def test_tissue_mask(stained):
    mask = stain.tissue_mask(stained["one"][0])
    assert not mask[:, :12].any() and mask[:, 12:].mean() > 0.7
    assert not stain.tissue_mask(np.full((4, 4, 3), 255, np.uint8)).any()
    assert stain.tissue_mask(np.zeros((4, 4, 3), np.uint8)).all()


def test_colour_space_is_that_of_skimage():
    image = data.immunohistochemistry()[:64, :64]
    np.testing.assert_allclose(stain._lab(image), color.rgb2lab(image), atol=0.4)
    white = np.full((1, 1, 3), 255, np.uint8)
    np.testing.assert_allclose(stain._lab(white)[0, 0], [100, 0, 0], atol=0.01)


def test_reinhard_is_the_closed_form():
    """Mean and standard deviation in CIELAB become those of the reference, where stain is strong.

    Paler pixels go that way in proportion to their optical density.
    """
    source, reference = (
        data.immunohistochemistry()[:128, :128],
        data.immunohistochemistry()[300:, 300:],
    )
    out = stain.match_stain(source, reference, method="reinhard")
    tissue, other = stain.tissue_mask(source), stain.tissue_mask(reference)
    lab = color.rgb2lab(source)
    s, r = lab[tissue], color.rgb2lab(reference)[other]
    matched = color.lab2rgb((lab - s.mean(0)) / s.std(0) * r.std(0) + r.mean(0)) * 255
    density = -np.log(np.maximum(source, 0.5) / 255).mean(-1)
    typical = -np.log(color.lab2rgb(s.mean(0))).mean()
    amount = np.minimum(density / typical, 1)[..., None]
    expected = source + amount * (matched - source)
    np.testing.assert_allclose(out[tissue], expected[tissue], atol=2.0)
    dark = tissue & (density >= typical)
    np.testing.assert_allclose(out[dark], matched[dark], atol=2.0)
    before, after = (np.abs(m - r.mean(0)) for m in (s.mean(0), color.rgb2lab(out)[tissue].mean(0)))
    assert before.max() > 2 and (after < np.maximum(0.35 * before, 0.7)).all()


@pytest.mark.parametrize("method", ["transport", "reinhard"])
def test_pale_tissue_stays_pale(method):
    """Brown tissue matched to blue: what is hardly stained does not turn blue."""
    rng = np.random.default_rng(2)
    brown, blue, pale = np.array([150, 100, 50]), np.array([110, 120, 190]), [238, 234, 230]
    source = (brown + rng.normal(0, 12, (60, 80, 3))).clip(0, 255).astype(np.uint8)
    reference = (blue + rng.normal(0, 12, (60, 80, 3))).clip(0, 255).astype(np.uint8)
    source[:, :6] = pale
    out = stain.match_stain(source, reference, method=method)
    np.testing.assert_allclose(out[:, 6:].mean((0, 1)), blue, atol=8)
    assert np.abs(out[:, :6].astype(int) - pale).max() < 20


def test_transport_is_the_optimal_map_between_gaussians():
    """Of all linear maps that carry one covariance to the other, the symmetric positive one.

    Literal, with general matrix roots; limits of contrast are not reached by these images.
    """
    source = data.immunohistochemistry()[:96, :128]
    reference = data.immunohistochemistry()[300:, 280:]
    out = stain.match_stain(source, reference)
    tissue, other = stain.tissue_mask(source), stain.tissue_mask(reference)
    density = -np.log(np.maximum(source, 0.5) / 255)
    s, r = density[tissue], -np.log(np.maximum(reference, 0.5) / 255)[other]
    a, b = np.cov(s.T), np.cov(r.T)
    root = linalg.sqrtm(a)
    linear = linalg.inv(root) @ linalg.sqrtm(root @ b @ root) @ linalg.inv(root)
    np.testing.assert_allclose(linear @ a @ linear, b, atol=1e-8)
    assert ((linalg.eigvalsh(linear) > 0.5) & (linalg.eigvalsh(linear) < 2)).all()
    share = np.minimum(density.mean(-1) / (s.mean() / 2), 1)[..., None]
    expected = density @ linear + share * (r.mean(0) - s.mean(0) @ linear)
    assert 0.01 < (share[tissue] < 1).mean() < 0.5
    expected = np.clip(255 * np.exp(-expected[tissue]), 0, 255)
    np.testing.assert_allclose(out[tissue], expected, atol=0.51)
    whole = share[..., 0] == 1
    moved = 255 * np.exp(-((density - s.mean(0)) @ linear + r.mean(0)))
    np.testing.assert_allclose(out[whole], np.clip(moved[whole], 0, 255), atol=0.51)


def test_transport_undoes_another_strength_of_the_dyes():
    """The same amounts of dye at other strengths and colours: the image itself comes back."""
    rng = np.random.default_rng(5)
    amounts = rng.gamma(6.0, 0.1, (70, 90, 2))
    one, two = (
        np.rint(255 * np.exp(-amounts @ np.array(dyes))).astype(np.uint8)
        for dyes in (
            [[0.62, 0.70, 0.35], [0.17, 0.95, 0.27]],
            [[0.50, 0.60, 0.33], [0.2, 0.8, 0.2]],
        )
    )
    apart = np.abs(one.astype(int) - two).mean()
    errors = {m: np.abs(stain.match_stain(one, two, method=m) - two.astype(int)) for m in METHODS}
    assert apart > 10
    assert errors["transport"].mean() < 0.1 * apart
    assert errors["transport"].mean() < errors["reinhard"].mean()


@pytest.mark.parametrize("method", ["transport", "reinhard"])
def test_contrast_is_changed_at_most_twofold(method):
    rng = np.random.default_rng(6)
    amount = rng.normal(0, 1, (50, 60, 3))
    flat, lively = (
        np.rint(255 * np.exp(-(0.6 + spread * amount).clip(0.2))).astype(np.uint8)
        for spread in (0.01, 0.12)
    )
    for source, reference, ratio in ((flat, lively, 2), (lively, flat, 0.5)):
        out = stain.match_stain(source, reference, method=method)
        density = -np.log(source / 255).mean(-1)
        dark = density > density.mean()  # paler pixels are shifted less
        spread = [np.log(picture / 255)[dark].std(0) for picture in (out, source)]
        np.testing.assert_allclose(spread[0] / spread[1], ratio, rtol=0.2)


def test_macenko_finds_the_stains(stained):
    for image, vectors in stained.values():
        stains, strength = stain.macenko_stains(image)
        angle = np.degrees(np.arccos(np.clip((stains * vectors).sum(1), -1, 1)))
        assert angle.max() < 3
        assert (strength > 0).all()


def test_macenko_carries_one_stain_to_the_other(stained):
    (one, _), (two, vectors) = stained["one"], stained["two"]
    out = stain.match_stain(one, two, method="macenko")
    stains, strength = stain.macenko_stains(out)
    assert np.degrees(np.arccos(np.clip((stains * vectors).sum(1), -1, 1))).max() < 4
    np.testing.assert_allclose(strength, stain.macenko_stains(two)[1], rtol=0.1)


def test_macenko_gives_back_colours_that_two_stains_do_not_explain():
    """A third dye, blue-green, in some of the pixels: matched to itself the image comes back."""
    rng = np.random.default_rng(0)
    vectors = np.array([[0.65, 0.70, 0.29], [0.27, 0.92, 0.28], [0.8, 0.2, 0.56]])
    amount = rng.gamma(2.0, 0.35, (60, 90, 3)) * [1, 0.9, 0.15]
    image = np.rint(255 * np.exp(-(amount @ vectors))).astype(np.uint8)
    same = stain.match_stain(image, image, method="macenko")
    assert np.abs(same.astype(int) - image).max() <= 1


@pytest.mark.parametrize("method", METHODS)
def test_matching_round_trip_and_identity(stained, method):
    one, two = stained["one"][0], stained["two"][0]
    same = stain.match_stain(one, one, method=method)
    assert np.abs(same.astype(int) - one).max() <= 1
    there = stain.match_stain(one, two, method=method)
    back = stain.match_stain(there, one, method=method)
    assert np.abs(there.astype(int) - one).mean() > 5
    assert np.abs(back.astype(int) - one).mean() < 3
    np.testing.assert_array_equal(there[:, :12], one[:, :12])  # glass stays glass


@pytest.mark.parametrize("method", ["transport", "reinhard", "macenko"])
def test_the_change_sets_in_with_the_density(method):
    """None below a density of 0.05, full from 0.15 on, half of it half way between."""
    stains = np.array([[0.65, 0.70, 0.29], [0.27, 0.92, 0.28]])
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    source, reference = {
        "transport": (
            (np.full(3, 0.1), np.eye(3) / 100),
            (np.array([0.3, 0.5, 0.2]), np.eye(3) / 60),
        ),
        "reinhard": (
            (np.array([60.0, 20, -10]), np.full(3, 8.0)),
            (np.array([40.0, 5, -30]), np.full(3, 9.0)),
        ),
        "macenko": ((stains, np.array([1.0, 1])), (stains[:, [2, 1, 0]], np.array([1.9, 0.6]))),
    }[method]
    image = np.array([[246, 243, 231, 217, 150]], np.uint8)[..., None].repeat(3, 2)
    full = stain._method(method)[1](image, source, reference)
    weight = np.clip((-np.log(image / 255) - 0.05) / 0.10, 0, 1)
    assert (weight[0, :2] == 0).all() and (weight[0, 3:] == 1).all()
    out = stain.apply_stain(image, source, reference, method=method)
    expected = image + weight * (full - image)
    np.testing.assert_allclose(out, expected.clip(0, 255), atol=0.51)
    assert (np.abs(full - image)[0, 2:].max(-1) > 3).all()


def test_matching_brings_sites_together(stained):
    """Nearer to the reference than before, measured in CIELAB over tissue."""
    one, two = stained["one"][0], stained["two"][0]

    def apart(image):
        a, b = (color.rgb2lab(i)[stain.tissue_mask(i)].mean(0) for i in (image, two))
        return np.linalg.norm(a - b)

    for method in METHODS:
        assert apart(stain.match_stain(one, two, method=method)) < 0.35 * apart(one)


def test_colour_gap(stained):
    """Against all pairs of distances; nothing where each colour is known, whatever is beside."""
    one, two = stained["one"][0], stained["two"][0][:60]
    part, whole = np.zeros((96, 96), bool), np.ones((60, 96), bool)
    part[30:70, 5:90] = True
    lab, other = (
        color.rgb2lab(i)[m & stain.tissue_mask(i)] for i, m in ((one, part), (two, whole))
    )
    sharp = stain.colour_gap(one, part, two, whole, sigma=1e-3, n=10**6)
    assert sharp == pytest.approx(cdist(lab, other).min(axis=1).mean(), rel=0.01)
    thinned = stain.colour_gap(one, part, two, whole, sigma=1e-3, n=1500)
    assert thinned == pytest.approx(sharp, rel=0.25)
    assert stain.colour_gap(one, part, one, np.ones_like(part), n=10**6) == 0
    matched = stain.match_stain(one, stained["two"][0], method="macenko")
    assert stain.colour_gap(matched, part, two, whole) < 0.5 * stain.colour_gap(
        one, part, two, whole
    )
    assert np.isnan(stain.colour_gap(one, part, np.full_like(two, 255), whole))
    assert np.isnan(stain.colour_gap(one, np.zeros_like(part), two, whole))


def test_grain_finer_than_the_smoothing_is_no_gap():
    """A fine chequerboard of two colours against their mean, and against one of them."""
    one, two = np.array([180, 90, 160]), np.array([150, 120, 190])
    board = np.where((np.indices((40, 60)).sum(0) % 2)[..., None], one, two).astype(np.uint8)
    mean = np.full((30, 50, 3), (one + two) // 2, np.uint8)
    regions = np.ones((40, 60), bool), np.ones((30, 50), bool)
    gaps = [stain.colour_gap(board, regions[0], mean, regions[1], sigma=s) for s in (1e-3, 2.0)]
    assert gaps[0] > 10 > 1 > gaps[1]
    for axis in (0, 1):  # stripes of either direction
        stripes = np.where((np.indices((40, 60))[axis] % 2)[..., None], one, two).astype(np.uint8)
        assert stain.colour_gap(stripes, regions[0], mean, regions[1]) < 1


@pytest.mark.parametrize("method", METHODS)
def test_sixty_four_stained_pixels_are_enough(stained, method):
    image, mask = stained["one"][0], np.zeros((96, 96), bool)
    mask[44:52, 30:38] = True
    stain.measure_stain(image, method=method, mask=mask)
    mask[44, 30] = False
    with pytest.raises(ValueError, match="only 63 stained pixels"):
        stain.measure_stain(image, method=method, mask=mask)


def test_stain_masks_and_errors(stained):
    one, two = stained["one"][0], stained["two"][0]
    np.testing.assert_array_equal(stain.match_stain(one, two, method="none"), one)
    part = np.zeros((96, 96), bool)
    part[48:] = True
    a = stain.match_stain(one, two, mask=part, reference_mask=part)
    assert (a != stain.match_stain(one, two)).any()
    with pytest.raises(ValueError, match="'vahadane'"):
        stain.match_stain(one, two, method="vahadane")
    for method in METHODS:
        with pytest.raises(ValueError, match="stained pixels"):
            stain.match_stain(one, np.full_like(two, 255), method=method)


# --- literal versions and degenerate images -------------------------------------------------------


def literal_macenko(image, alpha=1.0, beta=0.15):
    """The steps of the paper one by one, with a singular value decomposition and least squares."""
    density = []
    for pixel in image.reshape(-1, 3):
        od = [-np.log(max(float(v), 0.5) / 255) for v in pixel]
        if sum(od) / 3 > beta:
            density.append(od)
    density = np.array(density)
    _, _, directions = np.linalg.svd(density - density.mean(0), full_matrices=False)
    plane = directions[:2].T
    for k in range(2):
        if plane[:, k].sum() < 0:
            plane[:, k] *= -1
    angles = np.array([np.arctan2(*(row @ plane)[::-1]) for row in density])
    ends = [plane @ [np.cos(a), np.sin(a)] for a in np.percentile(angles, [alpha, 100 - alpha])]
    stains = np.array(sorted(ends, key=lambda v: -v[0]))
    amounts = np.linalg.lstsq(stains.T, density.T, rcond=None)[0]
    return stains, np.percentile(amounts, 99, axis=1)


def test_macenko_is_the_literal_version():
    image = data.immunohistochemistry()[100:164, 200:260]
    stains, strength = stain.macenko_stains(image)
    expected, amounts = literal_macenko(image)
    np.testing.assert_allclose(stains, expected, atol=1e-4)
    np.testing.assert_allclose(strength, amounts, rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(stains, axis=1), 1)


@pytest.mark.parametrize("method", METHODS)
def test_parts_measured_once_are_matched_as_the_whole(stained, method):
    one, two = stained["one"][0], stained["two"][0]
    measured = [stain.measure_stain(image, method=method) for image in (one, two)]
    part = stain.apply_stain(one[20:50, 30:70], *measured, method=method)
    np.testing.assert_array_equal(part, stain.match_stain(one, two, method=method)[20:50, 30:70])
    by_default = stain.apply_stain(one, *(stain.measure_stain(image) for image in (one, two)))
    np.testing.assert_array_equal(by_default, stain.match_stain(one, two))
    with pytest.raises(ValueError, match=r"'none' is unknown: use transport, reinhard, macenko$"):
        stain.measure_stain(one, method="none")


def test_a_single_stain_is_no_case_for_macenko(stained):
    rng = np.random.default_rng(0)
    amount = rng.gamma(2.0, 0.35, (64, 64, 1))
    image = 255 * np.exp(-amount * np.array([0.65, 0.70, 0.29]))
    image = np.clip(np.rint(image + rng.normal(size=image.shape)), 0, 255).astype(np.uint8)
    with pytest.raises(ValueError, match="single stain"):
        stain.match_stain(stained["one"][0], image, method="macenko")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "image",
    [
        np.full((40, 30, 3), 255, np.uint8),
        np.full((40, 30, 3), 128, np.uint8),
        np.zeros((40, 30, 3), np.uint8),
        np.full((40, 30, 3), (180, 90, 160), np.uint8),
        (np.indices((40, 30)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, 2),
    ],
    ids=["white", "grey", "black", "one colour", "chessboard"],
)
def test_extreme_images_are_refused_or_matched_within_bounds(stained, method, image):
    """Either a clear error, or a picture whose contrast grew at most by the largest gain."""
    for source, reference in ((image, stained["one"][0]), (stained["one"][0], image)):
        try:
            out = stain.match_stain(source, reference, method=method)
        except ValueError as error:
            assert "stained pixels" in str(error) or "single stain" in str(error)
            continue
        lab = color.rgb2lab(source)[stain.tissue_mask(source)]
        got = color.rgb2lab(out)[stain.tissue_mask(source)]
        assert (got.std(0) <= stain.MAX_GAIN * lab.std(0) + 3).all()


@pytest.mark.parametrize("method", METHODS)
def test_noise_of_a_faint_image_is_not_blown_up(stained, method):
    """A nearly flat source keeps a flat look: its contrast rises by the largest gain at most."""
    rng = np.random.default_rng(1)
    flat = (np.array([190, 120, 180]) + rng.normal(size=(64, 64, 3)) * 1.5).round().astype(np.uint8)
    try:
        out = stain.match_stain(flat, stained["one"][0], method=method)
    except ValueError as error:
        assert "single stain" in str(error)
        return
    before, after = (color.rgb2lab(picture).std((0, 1)).max() for picture in (flat, out))
    assert after <= stain.MAX_GAIN * before + 1
