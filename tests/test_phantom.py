"""Phantom tissue: determinism, ground truth, Beer-Lambert, architecture of the grades, sites."""

import threading

import numpy as np
import pytest
from scipy import ndimage

from helpers import phantom

SMALL = {"size": (96, 96)}
MAPS = ("image", "glands", "lumen", "nuclei")


@pytest.fixture(scope="module")
def fields():
    """Four fields of each colorectal grade, 128 pixels wide, 256 micrometres."""
    return {
        grade: [phantom.render(i, grade=grade, size=(128, 128), patient=i) for i in range(4)]
        for grade in phantom.GRADES["colon"]
    }


def same(a, b):
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in MAPS)


# --- the contract --------------------------------------------------------------------------------


@pytest.mark.parametrize("organ", ["colon", "prostate"])
def test_every_grade_renders_with_the_promised_types(organ):
    for grade in phantom.GRADES[organ]:
        p = phantom.render(3, grade=grade, organ=organ, **SMALL)
        assert p.image.shape == (96, 96, 3) and p.image.dtype == np.uint8
        assert p.glands.shape == p.nuclei.shape == p.lumen.shape == (96, 96)
        assert p.glands.dtype == p.nuclei.dtype == np.int32 and p.lumen.dtype == bool
        assert (p.grade, p.organ, p.site, p.index) == (grade, organ, "A", 3)
        assert p.glands.max() > 0 and p.nuclei.max() > 10


@pytest.mark.parametrize("size", [(64, 150), (151, 67), (17, 33), (128, 128)])
def test_any_size(size):
    p = phantom.render(0, grade="well", size=size)
    assert p.image.shape == (*size, 3)
    assert p.glands.shape == p.nuclei.shape == p.lumen.shape == size


def test_a_phantom_is_frozen():
    p = phantom.render(0, **SMALL)
    with pytest.raises(AttributeError):
        p.grade = "poor"


# --- determinism ---------------------------------------------------------------------------------


def test_same_arguments_same_field_whatever_the_global_state():
    first = phantom.render(5, seed=2, grade="moderate", patient=1, **SMALL)
    np.random.seed(1)  # noqa: NPY002 - the global state is what must not matter
    phantom.render(8, **SMALL)
    assert same(first, phantom.render(5, seed=2, grade="moderate", patient=1, **SMALL))


def test_rendering_in_threads_gives_the_same_fields():
    alone = [phantom.render(i, **SMALL) for i in range(3)]
    together = [None] * 3

    def work(i):
        together[i] = phantom.render(i, **SMALL)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("change", [{"seed": 1}, {"index": 1}, {"grade": "well"}])
def test_other_seed_index_or_grade_is_other_tissue(change):
    base = {"index": 0, "seed": 0, "grade": "benign"}
    a = phantom.render(**base, **SMALL)
    b = phantom.render(**{**base, **change}, **SMALL)
    assert not np.array_equal(a.glands, b.glands)


def test_the_patient_changes_the_stain_but_not_the_glands():
    a, b = (phantom.render(0, patient=p, **SMALL) for p in (0, 1))
    assert np.array_equal(a.glands, b.glands)
    assert np.abs(a.image.mean((0, 1)) - b.image.mean((0, 1))).max() > 2


@pytest.mark.parametrize("size", [(100, 100), (192, 192), (192, 288)])
@pytest.mark.parametrize("grade", ["benign", "moderate"])
def test_the_same_field_of_other_pixels_has_the_same_glands(size, grade):
    shape = (256, 256 * size[1] // size[0])
    a = phantom.render(1, grade=grade, size=shape).glands
    b = phantom.render(1, grade=grade, size=size).glands
    rows, columns = (
        ((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(size, shape, strict=True)
    )
    a, b = a[rows[:, None], columns] > 0, b > 0
    assert (a & b).sum() / (a | b).sum() > 0.85


def test_the_same_field_at_another_resolution_is_the_same_tissue():
    large = phantom.render(1, grade="well", size=(256, 256))
    small = phantom.render(1, grade="well", size=(128, 128))
    assert small.microns_per_pixel == pytest.approx(2 * large.microns_per_pixel)
    a, b = large.glands.reshape(128, 2, 128, 2).max((1, 3)) > 0, small.glands > 0
    assert (a & b).sum() / (a | b).sum() > 0.85
    reduced = large.image.reshape(128, 2, 128, 2, 3).mean((1, 3))
    correlation = np.corrcoef(reduced.ravel(), small.image.ravel().astype(float))[0, 1]
    assert correlation > 0.75


@pytest.mark.parametrize("shape", [(30, 40), (20, 80), (23, 31)])
def test_labels_of_fewer_pixels_lie_where_they_lay(shape):
    """A mirror image is reduced to the mirror image: no side is preferred. And half is covered."""
    rng = np.random.default_rng(2)
    labels, _ = ndimage.label(ndimage.gaussian_filter(rng.normal(size=(60, 80)), 3) > 0.02)
    small = phantom._resize_labels(labels.astype(np.int32), shape) > 0
    for flip in (np.flipud, np.fliplr):
        mirrored = phantom._resize_labels(flip(labels).astype(np.int32), shape) > 0
        assert (flip(mirrored) != small).mean() < 0.005
    if shape == (30, 40):
        covered = (labels > 0).reshape(30, 2, 40, 2).mean((1, 3))
        np.testing.assert_array_equal(small, covered >= 0.5)


def test_a_wider_field_shows_more_glands():
    narrow = phantom.render(0, size=(96, 96), microns_per_pixel=1.0)
    wide = phantom.render(0, size=(96, 288), microns_per_pixel=1.0)
    assert wide.glands.max() > 1.5 * narrow.glands.max()


# --- ground truth --------------------------------------------------------------------------------


def test_labels_have_no_gaps_and_lumina_lie_in_glands(fields):
    for p in (p for group in fields.values() for p in group):
        for labels in (p.glands, p.nuclei):
            assert np.array_equal(np.unique(labels[labels > 0]), np.arange(1, labels.max() + 1))
        assert not (p.lumen & (p.glands == 0)).any()


def test_gland_instances_do_not_touch():
    for grade in ("benign", "well"):
        p = phantom.render(2, grade=grade, size=(192, 192))
        _, n = ndimage.label(p.glands > 0)
        # thin bridges may break a gland, so components may only outnumber instances
        assert n >= p.glands.max()


def test_the_image_agrees_with_the_ground_truth():
    p = phantom.render(0, grade="benign", size=(192, 192))
    light = p.image.mean(-1)
    assert light[p.nuclei > 0].mean() < light[(p.nuclei == 0) & ~p.lumen].mean() - 25
    assert light[p.lumen].mean() > light[(p.glands > 0) & ~p.lumen].mean() + 15


def test_nuclei_have_the_size_of_nuclei():
    p = phantom.render(0, grade="benign", size=(256, 256))
    areas = np.bincount(p.nuclei.ravel())[1:] * p.microns_per_pixel**2
    assert 12 < np.median(areas) < 60  # square micrometres
    assert p.nuclei.max() > 200


# --- colour --------------------------------------------------------------------------------------


def test_beer_lambert_closed_form():
    stains = np.array([[0.5, 1.0, 0.25]])
    rgb = phantom.densities_to_rgb(np.array([[[0.0], [1.0], [2.0]]]), stains)
    expected = 255 * 10.0 ** (-np.array([0, 1, 2])[:, None] * stains)
    np.testing.assert_allclose(rgb[0], expected, rtol=1e-5)


def test_unmixing_recovers_the_densities():
    rng = np.random.default_rng(0)
    densities = rng.uniform(0, 1, (9, 7, 2))
    stains = phantom.stain_matrix(patient=4)
    found = phantom.unmix(phantom.densities_to_rgb(densities, stains), stains)
    np.testing.assert_allclose(found, densities, atol=1e-4)


def test_optical_density_has_a_floor_and_is_zero_on_the_empty_slide():
    od = phantom.rgb_to_od(np.array([0.0, 1.0, 255.0]))
    assert od[0] == od[1] == pytest.approx(np.log10(255)) and od[2] == 0


def test_unmixed_haematoxylin_of_a_field_lies_in_the_nuclei():
    p = phantom.render(0, grade="benign", patient=2, size=(192, 192))
    stains = phantom.stain_matrix(patient=2)
    haematoxylin = phantom.unmix(p.image, stains)[..., 0]
    assert haematoxylin[p.nuclei > 0].mean() > 2 * haematoxylin[p.nuclei == 0].mean()


@pytest.mark.parametrize("wrong", [{"site": "Z"}, {"stain": "PAS"}])
def test_stains_of_unknown_sites_or_dyes_are_refused(wrong):
    with pytest.raises(ValueError, match="is unknown; choose"):
        phantom.stain_matrix(**wrong)


def test_names_that_would_share_a_stream_are_refused():
    assert phantom._rng("gleason3").random() != phantom._rng("gleason4").random()
    with pytest.raises(ValueError, match="'gleason10' has no or more than 8 bytes"):
        phantom._rng("gleason10")


def test_a_stain_matrix_can_be_given():
    grey = phantom.render(0, stain=np.ones((2, 3)) / np.sqrt(3), **SMALL).image.astype(float)
    assert np.abs(grey[..., 0] - grey[..., 1]).mean() < 8
    a = phantom.render(0, stain=np.ones((2, 3)) / np.sqrt(3), **SMALL)
    assert np.array_equal(a.glands, phantom.render(0, **SMALL).glands)


def test_ihc_is_brown_in_the_epithelium_and_blue_in_the_stroma():
    p = phantom.render(0, grade="well", stain="IHC", size=(160, 160))
    epithelium = (p.glands > 0) & ~p.lumen
    red, _, blue = p.image[epithelium].mean(0)
    assert red > blue + 20
    red, _, blue = p.image[(p.glands == 0) & (p.nuclei > 0)].mean(0)
    assert blue > red + 10


def test_sites_show_the_same_tissue_in_other_colours_and_less_sharply():
    gaps = []
    for i in range(6):
        a, b = (phantom.render(i, patient=i, site=site, size=(128, 128)) for site in "AB")
        assert np.array_equal(a.glands, b.glands) and np.array_equal(a.nuclei, b.nuclei)
        gaps.append(
            phantom.rgb_to_od(a.image).mean((0, 1)) - phantom.rgb_to_od(b.image).mean((0, 1))
        )
        assert ndimage.laplace(a.image[..., 1].astype(float)).std() > (
            1.2 * ndimage.laplace(b.image[..., 1].astype(float)).std()
        )
    assert np.mean(gaps, axis=0)[1] > 0.02  # less green absorbed: weaker dyes
    assert np.mean(gaps, axis=0)[2] < 0  # more blue absorbed: a more orange eosin


# --- architecture --------------------------------------------------------------------------------


def test_the_grades_differ_as_pathologists_describe_them(fields):
    def mean(grade, measure):
        return np.mean([measure(p) for p in fields[grade]])

    lumen = {g: mean(g, lambda p: p.lumen.mean()) for g in fields}
    assert lumen["poor"] < 0.5 * min(lumen["benign"], lumen["well"], lumen["moderate"])

    epithelium = {
        g: mean(g, lambda p: ((p.nuclei > 0) & (p.glands > 0)).sum() / (p.glands > 0).sum())
        for g in fields
    }
    assert epithelium["benign"] < min(epithelium[g] for g in ("well", "moderate", "poor"))

    def roundness(p):
        """Mean of 4 pi area / perimeter^2 over the larger glands, from pixel counts."""
        values = []
        for i in range(1, p.glands.max() + 1):
            mask = np.pad(p.glands == i, 1)
            if mask.sum() < 150:
                continue
            edge = mask & ~ndimage.binary_erosion(mask)
            values.append(4 * np.pi * mask.sum() / edge.sum() ** 2)
        return np.mean(values)

    shape = {g: mean(g, roundness) for g in fields}
    assert shape["benign"] > shape["moderate"] > shape["poor"]


def test_gleason_3_has_more_and_smaller_glands_than_benign_prostate():
    def count(grade):
        return np.mean(
            [
                phantom.render(i, grade=grade, organ="prostate", size=(128, 128)).glands.max()
                for i in range(3)
            ]
        )

    assert count("gleason3") > 2 * count("benign")


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"organ": "liver"}, r"organ 'liver' is unknown; choose one of \['colon', 'prostate'\]"),
        ({"grade": "gleason3"}, r"grade 'gleason3' is unknown for colon; choose one of"),
        ({"site": "C"}, "site 'C' is unknown"),
        ({"index": -1}, "index is -1, but a whole number >= 0"),
        ({"index": 1.5}, "index is 1.5"),
        ({"seed": True}, "seed is True"),
        ({"patient": -2}, "patient is -2"),
        ({"size": (8, 64)}, "at least 16 pixels"),
        ({"size": (64, 64, 3)}, "size is"),
        ({"stain": "PAS"}, "stain 'PAS' is unknown; choose 'HE', 'IHC'"),
        ({"stain": np.ones((3, 3, 3))}, "stains has shape"),
        ({"stain": np.ones((3, 3))}, "stain has 3 rows"),
        ({"stain": [[0.5, 0.5, 0.5], [0, 0, 0]]}, "no zero row"),
        ({"microns_per_pixel": 40}, "0.1 to 4"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        phantom.render(**{"index": 0, **SMALL, **change})


def test_far_from_everything_is_finite():
    """A field that is all gland: OpenCV's answer, in micrometres, would overflow."""
    canvas = phantom._Canvas(8.0, 12.0, 0.7)
    with np.errstate(all="raise"):
        found = canvas.distance(np.ones(canvas.shape, bool))
    assert np.isfinite(found).all() and found.min() > 1e5
    near = np.ones(canvas.shape, bool)
    near[2, 3] = False
    assert canvas.distance(near)[2, 5] == pytest.approx(2 / 0.7)
