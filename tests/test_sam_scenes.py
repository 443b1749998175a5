import warnings

import numpy as np
import pytest
from scipy import ndimage

from helpers import phantom, sam_scenes
from helpers.sam_scenes import (
    LEVELS,
    Scenes,
    augment,
    edges,
    phantom_scene,
    prepare,
    recolour,
    texture_scene,
)
from tests.toy_segments import disc


@pytest.mark.parametrize("draw", [phantom_scene, texture_scene])
def test_scenes_have_objects_and_are_deterministic(draw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image, levels = draw(np.random.default_rng(4), 96)
        again, _ = draw(np.random.default_rng(4), 96)
    assert image.shape == (96, 96, 3) and image.dtype == np.uint8
    assert levels.shape == (LEVELS, 96, 96) and levels.any()
    np.testing.assert_array_equal(image, again)


def test_bare_glass_is_light_and_holds_no_tissue():
    drawn = [phantom_scene(np.random.default_rng(i), 96) for i in range(24)]
    edges = [(image, levels) for image, levels in drawn if levels[3].any()]
    assert 2 <= len(edges) <= 14  # a quarter on average
    for image, levels in edges:
        glass = levels[3] > 0
        assert not levels[:3, glass].any()
        assert image[glass].mean() > 215 > image[~glass].mean()


def test_texture_scenes_come_in_many_kinds():
    pictures = [texture_scene(np.random.default_rng(i), 96) for i in range(12)]
    assert all(image.std() > 1 for image, _ in pictures)
    assert len({int(levels[0].max()) for _, levels in pictures}) >= 4


def test_augmentation_keeps_image_and_labels_together(monkeypatch):
    """256 squares, whose colour is their label."""
    rng = np.random.default_rng(0)
    squares = rng.permutation(256).astype(np.uint8).reshape(16, 16).repeat(20, 0).repeat(20, 1)
    image, levels = squares[..., None].repeat(3, 2), squares[None].repeat(LEVELS, 0)
    monkeypatch.setattr(sam_scenes, "recolour", lambda image, rng: image)
    for size in [64] * 10 + [128] * 10:
        x, y = augment(image, levels, rng, size)
        assert x.shape == (size, size, 3) and y.shape == (LEVELS, size, size)
        inside = ~edges(y[0])  # at their borders the squares mix
        assert (abs(x[..., 0].astype(int) - y[0])[inside] <= 1).mean() > 0.97


@pytest.mark.parametrize("size", [128, 256])
def test_augmentation_moves_labels_exactly_as_the_image(monkeypatch, size):
    """A smooth disc: the place of its middle in the image and in the labels, over many crops."""
    y, x = np.ogrid[:320, :320]
    distance = np.hypot(y - 170.3, x - 149.8)
    image = np.clip(40 * (60 - distance) + 128, 0, 255).astype(np.uint8)[..., None].repeat(3, 2)
    levels = (distance < 60).astype(np.uint8)[None].repeat(LEVELS, 0)
    monkeypatch.setattr(sam_scenes, "recolour", lambda image, rng: image)
    monkeypatch.setattr(sam_scenes.np, "rot90", lambda a, *_, **__: a)  # turns would hide a shift
    rng, shifts = np.random.default_rng(1), []
    for _ in range(40):
        drawn, found = augment(image, levels, rng, size)
        drawn, found = drawn[..., 0] / 255, found[0].astype(float)
        if found[[0, -1]].any() or found[:, [0, -1]].any():
            continue  # cut by the border
        middles = [ndimage.center_of_mass(picture)[0] for picture in (drawn, found)]
        shifts.append(middles[1] - middles[0])
    assert len(shifts) > 10 and np.abs(np.mean(shifts)) < 0.05


def test_lumina_are_the_light_parts_of_glands():
    for seed in range(30):
        image, levels = phantom_scene(np.random.default_rng(seed), 160)
        lumen, rest = levels[1] > 0, (levels[0] > 0) & (levels[1] == 0)
        if min(lumen.sum(), rest.sum()) > 300:
            break
    assert not (lumen & (levels[0] == 0)).any()
    assert image[lumen].mean() > image[rest].mean() + 20


def test_recolouring_changes_colours_not_shapes():
    """A disc on a ground: in other colours, light on dark perhaps, but where it was."""
    inside = disc(27, 34, 15, (60, 80))
    image = np.where(inside[..., None], (130, 70, 140), (225, 190, 215)).astype(np.uint8)
    overlaps, colours = [], []
    for seed in range(40):
        out = recolour(image, np.random.default_rng(seed))
        assert out.shape == image.shape and out.dtype == np.uint8
        means = np.stack([out[inside].mean(0), out[~inside].mean(0)])
        axis = means[0] - means[1]
        found = (out - means.mean(0)) @ axis > 0  # nearer to the colour of the disc
        overlaps.append((found & inside).sum() / (found | inside).sum())
        colours.append(means[0])
    assert np.mean(np.array(overlaps) > 0.9) > 0.9
    assert np.std(colours, axis=0).min() > 15
    np.testing.assert_array_equal(out, recolour(image, np.random.default_rng(39)))


def test_recolouring_inverts_greys_and_blurs_now_and_then():
    """Half dark, half light: which half is which, in what colours, and how wide the edge is."""
    image = np.full((60, 80, 3), (130, 60, 140), np.uint8)
    image[:, 40:] = (225, 190, 215)
    found = []
    for seed in range(400):
        row = recolour(image, np.random.default_rng(seed)).astype(float).mean(0)
        dark, light = row[10:30].mean(0), row[50:70].mean(0)
        edge = np.abs(np.diff(row.mean(1)))[30:50].max() / np.abs(dark - light).mean()
        found.append((dark.mean() > light.mean(), np.ptp(dark) < 2, edge < 0.65))
    inverted, grey, blurred = np.mean(found, 0)
    assert 0.02 < inverted < 0.09 and 0.03 < grey < 0.12 and 0.15 < blurred < 0.45


def test_scenes_are_of_both_organs_all_grades_both_stains_and_several_magnifications(monkeypatch):
    drawn = []

    class Enough(Exception):
        pass

    def note(*_, **settings):
        drawn.append(settings)
        raise Enough

    monkeypatch.setattr(sam_scenes.phantom, "render", note)
    for seed in range(300):
        with pytest.raises(Enough):
            phantom_scene(np.random.default_rng(seed))
    pairs = {(s["organ"], s["grade"]) for s in drawn}
    assert pairs == {(o, g) for o, grades in phantom.GRADES.items() for g in grades}
    assert 0.12 < np.mean([s["stain"] == "IHC" for s in drawn]) < 0.28
    scale = [s["microns_per_pixel"] for s in drawn]
    assert 0.4 <= min(scale) < 0.45 and 1.45 < max(scale) <= 1.6
    assert 0.6 < np.mean([s["architecture"] is not None for s in drawn]) < 0.8


def test_shards_are_not_made_twice(tmp_path):
    prepare(tmp_path, 2, seed=1, shard=1)
    paths = sorted(tmp_path.glob("*.npy"))
    before = [p.stat().st_mtime_ns for p in paths]
    prepare(tmp_path, 3, seed=1, shard=1)
    assert [p.stat().st_mtime_ns for p in paths] == before
    assert len(Scenes(tmp_path)) == 3


def test_scenes_of_another_seed_shard_or_share_are_refused(tmp_path):
    prepare(tmp_path, 1, seed=1, shard=1)
    for other, words in (
        ({"seed": 2}, r"seed was 1, is now 2"),
        ({"shard": 2}, r"shard was 1, is now 2"),
        ({"share": 0.5}, r"share was 0\.75, is now 0\.5"),
    ):
        with pytest.raises(ValueError, match=rf"other settings \({words}\): work in another"):
            prepare(tmp_path, 2, **{"seed": 1, "shard": 1, **other})
    assert len(Scenes(tmp_path)) == 1


def test_workers_draw_the_same_scenes(tmp_path):
    for name, workers in (("one", 0), ("two", 2)):
        prepare(tmp_path / name, 3, seed=5, shard=1, workers=workers)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert len(files) == 4 and files.pop(0) == "scenes.json"
    for name in files:
        one, two = (np.load(tmp_path / folder / name) for folder in ("one", "two"))
        assert np.array_equal(one, two)
