import json

import cv2
import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from helpers import pool as pooling
from helpers import replacement as rep
from helpers.placement import affine_from_moments, size_range, warp_image, warp_mask
from helpers.replacement import CompositeError, Sampler
from helpers.seam import blend, cut_cost
from helpers.segment_table import collect
from tests.test_placement import egg, ellipse


def toy_pool(n_images=6, m=5, *, classes=("a", "b"), size=96, seed=0, border=False, p=4):
    """Discs on a grid, so that segments of an image do not overlap."""
    rng = np.random.default_rng(seed)
    rows, masks = [], {}
    for i in range(n_images):
        rows.append(
            {"image_id": f"im{i}", "label": classes[i % len(classes)], "split": "train",
             "patient": f"p{i // 4}", "dataset": "toy", "height": size, "width": size}
        )  # fmt: skip
        cells = rng.permutation(9)[:m]
        step = size // 3
        masks[f"im{i}"] = np.stack(
            [
                ellipse(step * (c % 3) + step / 2, step * (c // 3) + step / 2, rng.uniform(7, 14),
                        rng.uniform(7, 14), rng.uniform(0, 180), (size, size))
                for c in cells
            ]
        )  # fmt: skip
    segments = collect(pd.DataFrame(rows), masks)
    if border:
        segments.table["border"] = rng.random(len(segments)) < 0.5
    features = rng.normal(size=(len(segments), p))
    images = {
        f"im{i}": rng.integers(60, 230, (size, size, 3), dtype=np.uint8) for i in range(n_images)
    }
    return pooling.build(segments, features), images


# --- paste, unknown region ---


def test_paste_changes_nothing_beyond_target_and_paste():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (160, 200, 3), dtype=np.uint8)
    donor = rng.integers(0, 256, (160, 200, 3), dtype=np.uint8)
    source, target = ellipse(60, 60, 30, 14, 10), ellipse(120, 90, 30, 25, 70)
    before = image.copy()
    affine = affine_from_moments(source, target)
    out, pasted = rep.paste(image, target, donor, source, affine)
    np.testing.assert_array_equal(image, before)
    outside = ~(target | pasted)
    np.testing.assert_array_equal(out[outside], image[outside])
    # The window moves the origin, and with it the rounding of a position.
    whole = warp_image(donor, affine, (160, 200)).astype(int)
    assert np.abs(out[pasted] - whole[pasted]).max() <= 1
    gap = target & ~pasted
    assert gap.any() and len(np.unique(out[gap], axis=0)) == 1
    black, _ = rep.paste(image, target, donor, source, affine, fill="black")
    assert (black[gap] == 0).all()
    with pytest.raises(ValueError, match="'blue'"):
        rep.paste(image, target, donor, source, affine, fill="blue")


@pytest.mark.parametrize("gap", ["inpaint", "context"])
@pytest.mark.parametrize("feather", [1, 2])
def test_an_outline_is_blended_within_its_reach(feather, gap):
    rng = np.random.default_rng(1)
    image, donor = rng.integers(0, 256, (2, 160, 200, 3), dtype=np.uint8)
    source, target = ellipse(60, 60, 30, 14, 10), ellipse(120, 90, 30, 25, 70)
    affine = affine_from_moments(source, target)
    hard, pasted = rep.paste(image, target, donor, source, affine, gap=gap)
    soft, same = rep.paste(image, target, donor, source, affine, gap=gap, feather=feather)
    np.testing.assert_array_equal(same, pasted)
    inside, outside = (ndimage.distance_transform_edt(part) for part in (pasted, ~pasted))
    far = inside + outside > 3 * feather
    np.testing.assert_array_equal(soft[far & ~pasted], hard[far & ~pasted])
    # The window moves the origin, and with it the rounding of a position.
    assert np.abs(soft[far].astype(int) - hard[far]).max() <= 1
    gap_left = target & ~pasted
    np.testing.assert_array_equal(soft[gap_left], hard[gap_left])  # the target stays out
    assert (soft != hard).any()
    # The same as blending whole frames: the window is not to be seen.
    whole = warp_image(donor, affine, (160, 200))
    expected = blend(whole, image, pasted, feather).astype(int)
    near = ~far & ~gap_left
    assert np.abs(soft.astype(int) - expected)[near].max() <= 2
    within = rep.unknown_region(target, pasted, band=3 * feather)
    assert within[~far].all()  # what is blended is never known
    flat = np.full_like(image, 90)
    even, _ = rep.paste(flat, target, flat, source, affine, gap="context", feather=feather)
    np.testing.assert_array_equal(even, flat)


def test_feather_errors():
    mask, image = egg(90, 80, 30, 40), np.zeros((160, 200, 3), np.uint8)
    with pytest.raises(ValueError, match="feather=-1"):
        rep.paste(image, mask, image, mask, np.eye(2, 3), feather=-1)
    pool, images = toy_pool(8, 6)
    with pytest.raises(
        ValueError, match="feather=1 changes 3 pixels on either side, more than band=2"
    ):
        rep.compose(
            images["im0"], "im0", pool, Sampler(pool), images.__getitem__,
            rng=np.random.default_rng(0), band=2, feather=1,
        )  # fmt: skip


def test_pasting_a_segment_onto_itself_is_the_identity():
    image = np.random.default_rng(0).integers(0, 256, (160, 200, 3), dtype=np.uint8)
    mask = egg(90, 80, 30, 40)
    out, pasted = rep.paste(image, mask, image, mask, affine_from_moments(mask, mask))
    np.testing.assert_array_equal(pasted, mask)
    np.testing.assert_array_equal(out, image)


def test_the_fill_is_the_colour_around_the_target():
    image = np.full((60, 80, 3), 90, np.uint8)
    target, away = ellipse(40, 30, 14, 9, 0, (60, 80)), np.array([[1.0, 0, 500], [0, 1, 500]])
    image[target] = 220
    out, _ = rep.paste(image, target, image, target, away)
    assert (out == 90).all()
    image[:, 41:][~target[:, 41:]] = 91  # a little less than half of the rim
    image[:22, 20:41][~target[:22, 20:41]] = 93
    rim = ndimage.binary_dilation(target, np.ones((9, 9))) & ~target
    mean = image[rim].mean()
    assert mean % 1 > 0.5
    out, _ = rep.paste(image, target, image, target, away)
    assert (out[target] == round(mean)).all()  # rounded, not cut off


@pytest.mark.parametrize("band", [0, 1, 3, 6])
def test_unknown_region_is_gap_plus_band(band):
    target, pasted = ellipse(80, 80, 40, 30), ellipse(90, 85, 30, 30)
    unknown = rep.unknown_region(target, pasted, band=band)
    gap = target & ~pasted
    assert (unknown & gap).sum() == gap.sum()
    if band == 0:
        np.testing.assert_array_equal(unknown, gap)
        return
    inside = cv2.distanceTransform(pasted.astype(np.uint8), cv2.DIST_L2, 5)
    outside = cv2.distanceTransform((~pasted).astype(np.uint8), cv2.DIST_L2, 5)
    distance = np.where(pasted, inside, outside)  # 1 for the pixels at the outline
    assert unknown[distance <= band - 0.5].all()
    assert not unknown[(distance > band + 1) & ~gap].any()


def test_the_image_border_is_no_outline():
    whole = np.ones((40, 40), bool)
    assert not rep.unknown_region(whole, whole, band=4).any()
    half = whole.copy()
    half[:, 20:] = False
    unknown = rep.unknown_region(half, half, band=3)
    assert unknown[:, 17:23].all() and unknown.sum() == 40 * 6
    nothing = rep.unknown_region(half, ~whole, band=3)  # nothing pasted: all of the target
    np.testing.assert_array_equal(nothing, half)
    with pytest.raises(ValueError, match="band=-1"):
        rep.unknown_region(half, half, band=-1)


# --- composites ---


@pytest.mark.parametrize("method", ["moments", "boxes"])
@pytest.mark.parametrize(
    ("stain", "feather"),
    [("transport", 0), ("transport", 1), ("reinhard", 0), ("macenko", 0), ("none", 1)],
)
def test_composite_keeps_its_promises(method, stain, feather):
    pool, images = toy_pool(8, 6)
    sampler = Sampler(pool)
    c = rep.compose(
        images["im0"], "im0", pool, sampler, images.__getitem__, rng=np.random.default_rng(0),
        area_range=(0.3, 0.9), method=method, stain=stain, band=3, feather=feather,
    )  # fmt: skip
    assert (c.image_id, c.label) == ("im0", "a")
    np.testing.assert_array_equal(c.original, images["im0"])
    new = c.pasted | c.unknown
    assert c.new_area_ratio == pytest.approx(new.mean()) and 0.3 <= new.mean() <= 0.9
    np.testing.assert_array_equal(c.image[~new], c.original[~new])
    assert (c.image[c.pasted] != c.original[c.pasted]).any()
    for r in c.replacements:
        target, source = pool.table.iloc[r["target_row"]], pool.table.iloc[r["source_row"]]
        assert target["image_id"] == "im0" and target["segment_id"] == r["target"]
        assert source["image_id"] == r["source_image"] != "im0"
        assert source["label"] == "a" and not source["border"]
        assert r["stain"] == stain and 0.5 - 1e-6 <= r["scales"][1] <= r["scales"][0] <= 2 + 1e-6
        assert pool.mask(r["target_row"])[~new].sum() == 0  # the target is gone everywhere
    drawn = [r["source_row"] for r in c.replacements]
    np.testing.assert_array_equal(sampler.counts, np.bincount(drawn, minlength=len(pool)))
    json.dumps(c.replacements)


def test_composite_is_deterministic_and_stain_cache_changes_nothing(monkeypatch):
    pool, images = toy_pool(8, 6)

    def make(seed, stains=None):
        return rep.compose(
            images["im1"], "im1", pool, Sampler(pool), images.__getitem__,
            rng=np.random.default_rng(seed), stains=stains,
        )  # fmt: skip

    cache = {}
    a, b, c = make(0), make(0, cache), make(0, cache)
    np.testing.assert_array_equal(a.image, b.image)
    np.testing.assert_array_equal(a.image, c.image)
    assert cache and a.replacements == c.replacements
    measured, measure = [], rep.measure_stain
    monkeypatch.setattr(
        rep, "measure_stain", lambda image, **how: measured.append(image) or measure(image, **how)
    )
    make(0, cache)
    assert len(measured) == 1 and measured[0] is images["im1"]  # the sources are in the cache
    assert [r["source"] for r in make(1).replacements] != [r["source"] for r in a.replacements]


def test_area_bounds_are_met_by_further_replacements_or_refused():
    pool, images = toy_pool(8, 7)
    arguments = (images["im2"], "im2", pool)
    ratios = []
    for low in (0.05, 0.2, 0.4):
        c = rep.compose(
            *arguments, Sampler(pool), images.__getitem__, rng=np.random.default_rng(0),
            area_range=(low, low + 0.2),
        )  # fmt: skip
        assert low <= c.new_area_ratio <= low + 0.2
        ratios.append(len(c.replacements))
    assert ratios == sorted(ratios) and ratios[-1] > ratios[0]
    for bounds in ((0.95, 1.0), (0.3, 0.3001), (0.0, 0.001)):
        sampler = Sampler(pool)
        with pytest.raises(CompositeError, match="im2"):
            rep.compose(
                *arguments, sampler, images.__getitem__, rng=np.random.default_rng(0),
                area_range=bounds,
            )  # fmt: skip
        assert (sampler.w == 1).all()  # draws of a composite that failed do not count


def test_misfits_are_taken_back():
    pool, images = toy_pool()
    for floor in (0.0, 0.9):
        sampler = Sampler(pool)
        for seed in range(8):
            try:
                composite = rep.compose(
                    images["im0"], "im0", pool, sampler, images.__getitem__, stain="none",
                    rng=np.random.default_rng(seed), area_range=(0.02, 1.0), min_fit=floor,
                )  # fmt: skip
            except CompositeError:
                continue
            assert all(done["iou"] >= floor for done in composite.replacements)
    whole = Sampler(pool)
    with pytest.raises(CompositeError, match="0 of 5 segments were replaced"):
        rep.compose(images["im0"], "im0", pool, whole, images.__getitem__, stain="none",
                    rng=np.random.default_rng(0), min_fit=1.0)  # fmt: skip
    assert whole.counts.sum() == 0 and (whole.w == 1).all()


def test_only_sources_that_can_fit_are_drawn(monkeypatch):
    pool, images = toy_pool(12, 7)
    areas, drawn = pool.table["area"].to_numpy(), []
    draw = Sampler.draw

    def watched(self, target, rng, *, size_range, without):
        row = draw(self, target, rng, size_range=size_range, without=without)
        drawn.append((areas[row] / areas[target], self.pool.table["border"].iat[target]))
        return row

    monkeypatch.setattr(Sampler, "draw", watched)
    pool.table["border"] = np.arange(len(pool)) % 2 == 0
    limits, wanted = (0.95, 1.05), 0.8
    low, high = size_range(limits, wanted)
    for k in range(6):  # so much new area is out of reach: all targets are tried
        with pytest.raises(CompositeError, match="of 7 segments were replaced"):
            rep.compose(
                images[f"im{k}"], f"im{k}", pool, Sampler(pool, cut_sources="anywhere"),
                images.__getitem__, stain="none", rng=np.random.default_rng(k),
                scale_limits=limits, min_fit=wanted, area_range=(0.9, 1.0),
            )  # fmt: skip
    ratio, cut = np.array(drawn).T
    assert (ratio >= low).all() and (ratio[cut == 0] <= high).all()
    assert (ratio[cut == 1] > high).any()  # what is larger may go on beyond the border


def cut_pool(size=(96, 120)):
    """Four images of one class, each with a half disc at another side, brighter than its field."""
    h, w = size
    centres = [(0, 50), (60, 0), (w - 1, 40), (50, h - 1)]
    rows, masks, images = [], {}, {}
    rng = np.random.default_rng(3)
    for i, (x, y) in enumerate(centres):
        rows.append(
            {"image_id": f"im{i}", "label": "a", "split": "train", "patient": f"p{i}",
             "dataset": "toy", "height": h, "width": w}
        )  # fmt: skip
        masks[f"im{i}"] = ellipse(x, y, 26 + i, 26 + i, 0, size)[None]
        field = 100 + 10 * i + 80 * masks[f"im{i}"][0][..., None]
        images[f"im{i}"] = (field + rng.integers(0, 9, (h, w, 3))).astype(np.uint8)
    segments = collect(pd.DataFrame(rows), masks)
    assert segments.table["border"].all()
    return pooling.build(segments, rng.normal(size=(4, 3))), images


@pytest.mark.parametrize("target", range(4))
@pytest.mark.parametrize("gap", ["inpaint", "context"])
def test_cut_segments_replace_each_other_at_the_border(target, gap):
    """A half disc of another side covers nearly all of the target, up to the very border."""
    pool, images = cut_pool()
    name = f"im{target}"
    with pytest.raises(CompositeError, match="cut_sources refuse"):
        rep.compose(
            images[name], name, pool, Sampler(pool, cut_sources="refuse"), images.get,
            rng=np.random.default_rng(0),
        )  # fmt: skip
    made = rep.compose(
        images[name], name, pool, Sampler(pool), images.get, rng=np.random.default_rng(0),
        area_range=(0.05, 1), scale_limits=(0.8, 1.25), stain="none", gap=gap, min_fit=0.8,
    )  # fmt: skip
    (done,) = made.replacements
    mask = pool.mask(target)
    side = np.zeros_like(mask)
    side[[0, -1]], side[:, [0, -1]] = True, True
    assert done["cut"] and done["source_row"] != target and done["iou"] > 0.85
    assert (made.pasted & mask & side).sum() > 0.85 * (mask & side).sum()
    # What is pasted is the bright half disc, without a row of its dark field at the border.
    inner = made.pasted & ~made.unknown & mask
    assert (made.image[inner] > 160).mean() > 0.97


def test_a_target_without_a_source_is_passed_over():
    pool, images = toy_pool(4, 5)
    alone = pool.of_image("im0")[2]
    pool.table.loc[alone, "area"] = 10**9
    for seed in range(6):
        composite = rep.compose(
            images["im0"], "im0", pool, Sampler(pool), images.__getitem__, stain="none",
            rng=np.random.default_rng(seed), min_fit=0.3, area_range=(0.1, 1.0),
        )  # fmt: skip
        assert alone not in {done["target_row"] for done in composite.replacements}


def test_compose_errors():
    pool, images = toy_pool()
    make = dict(rng=np.random.default_rng(0))
    with pytest.raises(CompositeError, match="image 'other' has no segment in the pool"):
        rep.compose(images["im0"], np.str_("other"), pool, Sampler(pool), images.get, **make)
    for bad in (
        {"area_range": (0.5, 0.2)}, {"method": "tps"}, {"stain": "best"}, {"max_overlap": 7},
        {"min_fit": -3}, {"scale_limits": (0, 2), "min_fit": 0.5},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(bad))):
            rep.compose(images["im0"], "im0", pool, Sampler(pool), images.get, **make, **bad)
    other = images["im0"][:-3]
    with pytest.raises(ValueError, match=f"'im0' is {len(other)} x .* segments in the pool"):
        rep.compose(other, "im0", pool, Sampler(pool), images.get, **make)
    enlarged = {k: v if k == "im0" else v.repeat(2, 0).repeat(2, 1) for k, v in images.items()}
    for wrong in (images["im0"] / 255, images["im0"][..., 0]):
        with pytest.raises(ValueError, match=r"'im0' has shape .*expected \(H, W, 3\) uint8"):
            rep.compose(wrong, "im0", pool, Sampler(pool), images.get, **make)
    with pytest.raises(ValueError, match="is 192 x 192 pixels, its segments in the pool 96 x 96"):
        rep.compose(images["im0"], "im0", pool, Sampler(pool), enlarged.get, **make)


def test_glass_is_pasted_without_stain_matching():
    pool, images = toy_pool(8, 6)
    images = {k: v if k == "im0" else np.full_like(v, 255) for k, v in images.items()}
    c = rep.compose(
        images["im0"], "im0", pool, Sampler(pool), images.__getitem__, rng=np.random.default_rng(0)
    )
    assert {r["stain"] for r in c.replacements} == {"none"}


# --- gaps, tries, fit -----------------------------------------------------------------------------


def test_context_covers_the_gap_with_the_surroundings_of_the_source():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (160, 200, 3), dtype=np.uint8)
    donor = rng.integers(0, 256, (150, 190, 3), dtype=np.uint8)
    source, target = ellipse(90, 70, 30, 14, 10, (150, 190)), ellipse(120, 90, 30, 25, 70)
    affine = affine_from_moments(source, target)
    out, pasted = rep.paste(image, target, donor, source, affine, gap="context")
    own = warp_mask(source, affine, (160, 200))
    np.testing.assert_array_equal(pasted, own | target)  # the donor reaches all of the target
    whole = warp_image(donor, affine, (160, 200)).astype(int)
    assert np.abs(out.astype(int) - whole)[pasted].max() <= 1
    np.testing.assert_array_equal(out[~pasted], image[~pasted])
    with pytest.raises(ValueError, match="gap='stroma'"):
        rep.paste(image, target, donor, source, affine, gap="stroma")


def test_context_ends_where_the_source_image_ends():
    rng = np.random.default_rng(0)
    image, donor = (
        rng.integers(0, 150, (60, 80, 3), dtype=np.uint8),
        np.full((40, 40, 3), 200, np.uint8),
    )
    target = ellipse(40, 30, 25, 20, 0, (60, 80))
    source = ellipse(3, 20, 6, 6, 0, (40, 40))  # at the left border of its image
    affine = np.array([[1.0, 0, 35], [0, 1, 10]])
    out, pasted = rep.paste(image, target, donor, source, affine, gap="context")
    frame = np.zeros((60, 80), bool)
    frame[10:50, 35:75] = True
    np.testing.assert_array_equal(pasted, target & frame)
    assert (out[pasted] == 200).all()
    np.testing.assert_array_equal(out[~pasted], image[~pasted])  # the target stays, nothing is lost
    blended, again = rep.paste(image, target, donor, source, affine, gap="context", feather=2)
    np.testing.assert_array_equal(again, pasted)
    changed = (blended != image).any(-1)
    near = ndimage.distance_transform_edt(~pasted) <= 3 * 2
    assert (changed & ~pasted).any() and not (changed & ~near).any()


def test_the_seam_moves_within_its_reach_and_only_with_context():
    rng = np.random.default_rng(5)
    image, donor = (
        (128 + 200 * ndimage.gaussian_filter(rng.normal(size=(120, 150, 3)), (3, 3, 0)))
        .clip(0, 255).astype(np.uint8)
        for _ in range(2)
    )  # fmt: skip
    source, target = (
        ellipse(70, 50, 24, 16, 10, (120, 150)),
        ellipse(80, 60, 24, 16, 40, (120, 150)),
    )
    affine = affine_from_moments(source, target)
    how = {"gap": "context", "feather": 1}
    _, plain = rep.paste(image, target, donor, source, affine, **how)
    out, moved = rep.paste(image, target, donor, source, affine, seam=(6, 2), **how)
    far_out = ndimage.distance_transform_edt(~plain) > 7
    far_in = ndimage.distance_transform_edt(plain) > 3
    assert (moved != plain).any() and not (moved & far_out).any() and moved[far_in].all()
    there = warp_image(donor, affine, image.shape[:2])
    assert cut_cost(there, image, moved) < 0.8 * cut_cost(there, image, plain)
    away = ndimage.distance_transform_edt(~moved) > 3
    np.testing.assert_array_equal(out[away], image[away])
    for seam in ((0, 0), (6, 2)):
        _, same = rep.paste(image, target, donor, source, affine, gap="inpaint", seam=seam)
        np.testing.assert_array_equal(same, rep.paste(image, target, donor, source, affine)[1])
    with pytest.raises(ValueError, match="outwards=-1"):
        rep.paste(image, target, donor, source, affine, gap="context", seam=(-1, 3))


@pytest.mark.parametrize("gap", ["inpaint", "context"])
def test_records_paste_the_same_again(gap):
    pool, images = toy_pool()
    how = {"gap": gap, "seam": (4, 1), "feather": 1}
    made = rep.compose(
        images["im1"], "im1", pool, Sampler(pool), images.get, rng=np.random.default_rng(2), **how
    )
    image, pasted = rep.paste_again(images["im1"], made.replacements, pool, images.get, **how)
    assert (pasted != made.pasted).mean() < 1e-3
    assert (np.abs(image.astype(int) - made.image).max(-1) > 3).mean() < 0.02
    hard, _ = rep.paste_again(images["im1"], made.replacements, pool, images.get, gap=gap)
    assert (hard != made.image).any()


@pytest.mark.parametrize(("gap", "seam"), [("inpaint", (0, 0)), ("context", (4, 1))])
def test_a_crop_shows_its_image_and_the_sources_that_reach_it(gap, seam):
    """Literally: every image has a colour of its own, and the colours in the crop are counted."""
    pool, _ = toy_pool(8, 6, classes=("a",), size=144)
    images = {f"im{i}": np.full((144, 144, 3), 10 + 30 * i, np.uint8) for i in range(8)}
    made = rep.compose(
        images["im0"], "im0", pool, Sampler(pool), images.get, rng=np.random.default_rng(0),
        stain="none", gap=gap, seam=seam, feather=0.0, area_range=(0.1, 1.0),
    )  # fmt: skip
    assert len(made.replacements) > 2
    found = []
    for row in pool.of_image("im0"):
        x, y, w, h = pool.table[["x", "y", "w", "h"]].iloc[row]
        values = np.unique(made.image[y : y + h, x : x + w])
        colours = {f"im{(value - 10) // 30}" for value in values}
        shown = rep.shown_in(pool, row, made.replacements, margin=seam[0])
        assert colours | {"im0"} <= shown
        found.append(len(shown))
    assert min(found) < 1 + len({done["source_image"] for done in made.replacements})


def test_the_place_of_a_target_shows_the_image_of_its_source():
    """With the surroundings of the source, also where the source itself does not reach."""
    pool, _ = toy_pool(4, 5, classes=("a",))
    row, other = pool.of_image("im0")[:2]
    source = int(pool.of_image("im1")[0])
    beyond = {"affine": [[1, 0, 900], [0, 1, 900]], "source_row": source, "source_image": "im1"}
    assert rep.shown_in(pool, row, [beyond | {"target_row": int(row)}]) == {"im0", "im1"}
    assert rep.shown_in(pool, row, [beyond | {"target_row": int(other)}]) == {"im0"}


@pytest.mark.parametrize("axis", [0, 1])
def test_a_box_shows_what_shares_a_row_or_column_with_it(axis):
    """Columns and rows 50 .. 59; the source ends or begins there, or a pixel before or after."""
    pool, _ = toy_pool(4, 5, classes=("a",))
    row, other = pool.of_image("im0")[:2]
    source = int(pool.of_image("im1")[0])
    box = ["x", "y", "w", "h"]
    pool.table.loc[row, box], pool.table.loc[source, box] = [50, 50, 10, 10], [3, 1, 8, 6]
    start, length = ((3, 8), (1, 6))[axis]
    ends = (51 - length, 50 - length, 59, 60)
    for target, first, shown in zip((0, 0, 90, 90), ends, (True, False) * 2, strict=True):
        pool.table.loc[other, box] = [target, target, 5, 5]
        affine = np.eye(2, 3)
        affine[axis, 2], affine[1 - axis, 2] = first - start, 51
        done = {"affine": affine.tolist(), "source_row": source, "source_image": "im1",
                "target_row": int(other)}  # fmt: skip
        assert ("im1" in rep.shown_in(pool, row, [done])) == shown
        assert "im1" in rep.shown_in(pool, row, [done], margin=1)


def test_a_paste_out_of_the_frame_pastes_nothing():
    image = np.full((60, 80, 3), 90, np.uint8)
    mask = ellipse(40, 30, 12, 9, 0, (60, 80))
    away = np.array([[1.0, 0, 500], [0, 1, 500]])
    _, pasted = rep.paste(image, mask, image, mask, away)
    assert not pasted.any()
    _, context = rep.paste(image, mask, image, mask, away, gap="context")
    assert not context.any()
    for gap in ("inpaint", "context"):
        same, nothing = rep.paste(image, mask, image, mask, -away, gap=gap, feather=1)
        assert not nothing.any() and (same == image).all()


def test_context_leaves_less_to_be_repainted_at_the_same_draws():
    pool, images = toy_pool(8, 6)

    def make(gap):
        return rep.compose(
            images["im0"], "im0", pool, Sampler(pool), images.__getitem__, stain="none", gap=gap,
            rng=np.random.default_rng(0), area_range=(0.05, 1.0), method="boxes", band=0,
        )  # fmt: skip

    a, b = make("inpaint"), make("context")
    assert [r["source"] for r in a.replacements] == [r["source"] for r in b.replacements]
    assert [r["iou"] for r in a.replacements] == [r["iou"] for r in b.replacements]
    assert b.unknown.mean() < a.unknown.mean()
    assert not b.unknown.any()  # without a band nothing is left to invent


@pytest.mark.parametrize("tries", [1, 3])
def test_a_target_is_tried_again_and_only_what_was_used_counts(tries, monkeypatch):
    pool, images = toy_pool(12, 7)
    fits = iter([0.1, 0.2])  # the first two draws do not fit
    monkeypatch.setattr(rep, "iou", lambda a, b: next(fits, 0.9))
    sampler = Sampler(pool)
    composite = rep.compose(
        images["im0"], "im0", pool, sampler, images.__getitem__, stain="none",
        rng=np.random.default_rng(0), area_range=(0.01, 1.0), min_fit=0.5, tries=tries,
    )  # fmt: skip
    order = np.random.default_rng(0).permutation(pool.of_image("im0"))
    passed_over = 2 if tries == 1 else 0
    assert composite.replacements[0]["target_row"] == order[passed_over]
    assert sampler.counts.sum() == len(composite.replacements)
    np.testing.assert_array_equal(sampler.w, 1 + sampler.counts)
    with pytest.raises(ValueError, match="tries=0"):
        rep.compose(images["im0"], "im0", pool, sampler, images.get,
                    rng=np.random.default_rng(0), tries=0)  # fmt: skip


def test_a_target_is_given_up_when_every_source_was_tried(monkeypatch):
    pool, images = toy_pool(12, 7)
    sampler = Sampler(pool)
    drawn, draw = [], sampler.draw
    monkeypatch.setattr(rep, "iou", lambda a, b: 0.0)
    monkeypatch.setattr(sampler, "draw", lambda *a, **k: drawn.append(draw(*a, **k)) or drawn[-1])
    with pytest.raises(CompositeError, match="0 of"):
        rep.compose(
            images["im0"], "im0", pool, sampler, images.__getitem__, stain="none",
            rng=np.random.default_rng(0), min_fit=0.5, tries=1000,
        )  # fmt: skip
    targets = pool.of_image("im0")
    possible = [sampler.allowed(t, pool.of_class(pool.table["label"][t])).sum() for t in targets]
    assert len(drawn) == sum(possible)  # each of them once for each target
    assert (sampler.w == 1).all()


def test_pasted_is_what_the_image_shows_of_sources():
    """A later replacement that takes an earlier paste out leaves no pixel that claims to be one."""
    pool, images = toy_pool(8, 7)
    composite = rep.compose(
        images["im0"], "im0", pool, Sampler(pool), images.__getitem__, stain="none", band=0,
        rng=np.random.default_rng(3), area_range=(0.2, 1.0), max_overlap=1.0,
    )  # fmt: skip
    assert not (composite.pasted & composite.unknown).any()


@pytest.fixture
def crossing():
    """Image im0 with two segments that overlap, and a round source in each of three others."""
    rng, shape = np.random.default_rng(0), (96, 120)
    rows, shapes = [], {}
    for i in range(4):
        rows.append(
            {"image_id": f"im{i}", "label": "a", "split": "train", "height": 96, "width": 120}
        )
        two = ellipse(60, 48, 34, 9, 0, shape), ellipse(86, 48, 22, 20, 0, shape)
        shapes[f"im{i}"] = np.stack(two if i == 0 else [ellipse(60, 48, 18 + i, 18, 0, shape)])
    pool = pooling.build(collect(pd.DataFrame(rows), shapes), rng.normal(size=(5, 3)))
    colours = [(200, 150, 190), (150, 60, 140), (120, 90, 180), (210, 120, 150)]
    images = {
        f"im{i}": np.clip(np.array(c) + rng.normal(0, 12, (*shape, 3)), 0, 255).astype(np.uint8)
        for i, c in enumerate(colours)
    }
    return pool, images


def compose_crossing(crossing, seed, **options):
    pool, images = crossing
    options = {"stain": "none", "band": 0, "area_range": (0.15, 1.0), "max_overlap": 1.0, **options}
    return rep.compose(
        images["im0"], "im0", pool, Sampler(pool), images.get,
        rng=np.random.default_rng(seed), **options,
    )  # fmt: skip


def test_pasted_unknown_and_records_agree_where_targets_overlap(crossing):
    """Later pastes make earlier gaps known, and take earlier pastes out with their target."""
    pool, images = crossing
    orders = set()
    for seed in range(6):
        made = compose_crossing(crossing, seed)
        orders.add(tuple(done["target_row"] for done in made.replacements))
        assert not (made.pasted & made.unknown).any()
        _, again = rep.paste_again(images["im0"], made.replacements, pool, images.get)
        np.testing.assert_array_equal(again, made.pasted)
    assert {(0, 1), (1, 0)} <= orders


def test_a_target_that_is_new_already_is_passed_over(crossing):
    pool, _ = crossing
    shared = (pool.mask(0) & pool.mask(1)).sum()
    assert shared > 0.15 * max(pool.mask(0).sum(), pool.mask(1).sum())
    for seed in range(4):  # so much new area takes both
        made = compose_crossing(crossing, seed, area_range=(0.16, 1.0))
        assert len(made.replacements) == 2
        with pytest.raises(rep.CompositeError, match="1 of 2 segments were replaced"):
            compose_crossing(crossing, seed, area_range=(0.16, 1.0), max_overlap=0.1)


@pytest.mark.parametrize(
    ("stain", "feather"), [("transport", 0), ("reinhard", 0), ("transport", 4)]
)
def test_a_stained_paste_is_that_of_the_whole_source_matched(crossing, stain, feather):
    """Only the part of the source that shows is matched, which must not show."""
    pool, images = crossing
    made = compose_crossing(
        crossing, 0, stain=stain, feather=feather, band=3 * feather, area_range=(0.15, 1.0),
        scale_limits=(0.4, 0.6),
    )  # fmt: skip
    assert {done["stain"] for done in made.replacements} == {stain}
    image, _ = rep.paste_again(images["im0"], made.replacements, pool, images.get, feather=feather)
    difference = np.abs(image.astype(int) - made.image)[made.pasted | made.unknown]
    assert (difference > 1).mean() < 1e-3
