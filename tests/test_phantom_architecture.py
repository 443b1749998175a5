"""Architectures: those of the grades, and those drawn around them."""

from dataclasses import fields, replace

import numpy as np
import pytest

from helpers import phantom
from helpers.phantom_architecture import ARCHITECTURES, GRADES, vary


def test_every_grade_has_an_architecture():
    assert set(ARCHITECTURES) == {(o, g) for o, grades in GRADES.items() for g in grades}


@pytest.mark.parametrize("key", sorted(ARCHITECTURES))
def test_varied_architectures_stay_possible_tissue(key):
    rng = np.random.default_rng(3)
    shares = ("fill", "reach", "align", "drop", "fuse", "cribriform", "solid", "goblet",
              "lymphocytes", "fibroblasts", "debris", "mucin", "retraction")  # fmt: skip
    for _ in range(50):
        a = vary(ARCHITECTURES[key], rng)
        assert 0 < a.radius[0] < a.radius[1] and 1 <= a.elongation[0] <= a.elongation[1]
        assert 0 < a.gap[0] <= a.gap[1] and 0 < a.thickness[0] and a.thickness[1] > 0
        assert 0 < a.nucleus[1] <= a.nucleus[0] and a.pitch > 0
        assert 1 <= len(a.rows) <= 4 and all(np.diff(a.rows) > 0)
        assert all(0 <= getattr(a, name) <= 1 for name in shares)
        assert all(np.isfinite(getattr(a, f.name)).all() for f in fields(a))


def test_vary_depends_on_the_generator_alone():
    base = ARCHITECTURES["colon", "well"]
    assert vary(base, np.random.default_rng(1)) == vary(base, np.random.default_rng(1))
    assert vary(base, np.random.default_rng(1)) != vary(base, np.random.default_rng(2))


def test_the_architecture_of_the_grade_is_the_default():
    given = phantom.render(
        2, grade="well", size=(64, 80), architecture=ARCHITECTURES["colon", "well"]
    )
    np.testing.assert_array_equal(given.image, phantom.render(2, grade="well", size=(64, 80)).image)


def test_larger_radii_give_fewer_and_larger_glands():
    base = ARCHITECTURES["colon", "benign"]
    large = replace(base, radius=(66, 86), thickness=(46, 58))
    few, many = (
        phantom.render(0, size=(96, 128), microns_per_pixel=3.0, architecture=a)
        for a in (large, base)
    )
    assert few.glands.max() < 0.5 * many.glands.max()
    area = [np.bincount(p.glands.ravel())[1:].max() for p in (few, many)]
    assert area[0] > 2 * area[1]
