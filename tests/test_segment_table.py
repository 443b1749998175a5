import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from pycocotools.coco import COCO

from helpers import pool as pooling
from helpers import segment_table
from helpers.segment_table import (
    COLUMNS,
    collect,
    cut_by_border,
    drop_duplicates,
    load_coco,
    rows_by_image,
    save_coco,
    tidy,
)
from tests.toy_segments import H, W, disc, masks, records


@pytest.fixture
def segments():
    return collect(records(), masks())


def test_whole_segments_are_preferred_where_there_are_any():
    table = pd.DataFrame({"border": [True, False, True, False]})
    assert segment_table.prefer_whole(table, np.array([3, 0, 1])).tolist() == [3, 1]
    assert segment_table.prefer_whole(table, np.array([2, 0])).tolist() == [2, 0]


def test_collect_measures_every_segment(segments):
    given = masks()
    assert len(segments) == 24
    assert tuple(segments.table.columns) == COLUMNS
    for i, row in segments.table.iterrows():
        mask = given[row["image_id"]][i % 4]
        np.testing.assert_array_equal(segments.mask(i), mask)
        ys, xs = np.nonzero(mask)
        assert row["area"] == len(xs)
        np.testing.assert_allclose([row["cx"], row["cy"]], [xs.mean(), ys.mean()])
        box = [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
        assert [row[k] for k in "xywh"] == box
        on_border = [
            (x, y) for x, y in zip(xs, ys, strict=True) if x in (0, W - 1) or y in (0, H - 1)
        ]
        assert row["border"] == (len(on_border) > 0.1 * 2 * np.pi * np.sqrt(len(xs) / np.pi))
    np.testing.assert_array_equal(segments.masks("im3"), given["im3"])
    for column in ("patient", "dataset"):
        expected = records()[column].astype(str)
        assert segments.images[column].tolist() == expected.tolist()
        assert segments.table[column].tolist() == expected.repeat(4).tolist()
    assert set(segments.images["site"]) == {"A"}


def test_the_centroid_of_one_pixel_is_the_pixel():
    masks = np.zeros((1, H, W), bool)
    masks[0, 7, 11] = True
    table = collect(records(1), {"im0": masks}).table
    assert table.loc[0, ["area", "cx", "cy", *"xywh"]].tolist() == [1, 11, 7, 11, 7, 1, 1]


def test_border_cut_is_found_on_each_side():
    shapes = np.stack(
        [disc(x, y, 4) for x, y in ((2, 20), (W - 2, 20), (20, 2), (20, H - 2), (20, 20))]
    )
    table = collect(records(1), {"im0": shapes}).table
    assert table["border"].tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("lost", [0.001, 0.004, 0.012, 0.05, 0.5])
def test_what_lost_less_than_one_percent_to_the_border_is_not_cut(lost):
    """A disc without a cap of that share of it; the chord of a tenth of 2 pi r takes 0.7 %."""
    radius, angle = 200.0, np.linspace(0, np.pi, 10_001)  # half the angle over the chord
    cap = (angle - np.sin(angle) * np.cos(angle)) / np.pi
    centre = radius * np.cos(angle[np.searchsorted(cap, lost)])  # from the border
    shape = (412, 640)
    for x in (centre - 0.5, shape[1] - 0.5 - centre):
        whole = disc(x, 205.5, radius, shape)
        assert whole[:, [0, -1]].any()
        assert cut_by_border(whole[None]).tolist() == [lost > 0.007]
        assert cut_by_border(whole.T[None]).tolist() == [lost > 0.007]


def test_coco_without_the_mark_is_measured_like_our_own(tmp_path, segments):
    save_coco(tmp_path / "s.json", segments.images, segments)
    document = json.loads((tmp_path / "s.json").read_text())
    for annotation in document["annotations"]:
        del annotation["border"]
    (tmp_path / "s.json").write_text(json.dumps(document))
    again = load_coco(tmp_path / "s.json")
    pd.testing.assert_frame_equal(again.table, segments.table, check_exact=True, check_dtype=False)


def test_compact_segments_are_of_middling_size_and_without_bays():
    y, x = np.indices((80, 110))
    disc = np.hypot(y - 40, x - 50) < 15  # 8 % of the image
    assert segment_table.is_compact(disc)
    assert not segment_table.is_compact(np.hypot(y - 40, x - 50) < 4)
    assert not segment_table.is_compact(np.hypot(y - 40, x - 50) < 30)
    assert segment_table.is_compact(np.hypot(y - 40, x - 50) < 30, areas=(0.3, 0.4))
    assert not segment_table.is_compact(disc & ~((abs(y - 40) < 5) & (x > 45)))  # a bay
    assert not segment_table.is_compact(np.zeros_like(disc))


def test_collect_takes_scores_superpixels_and_border_of_an_object():
    given = SimpleNamespace(
        masks=masks(1)["im0"], scores=np.array([0.1, 0.2, 0.3, 0.4]),
        superpixel=np.array([7, 1, 2, 3]), border=np.array([True, False, False, True]),
    )  # fmt: skip
    table = collect(records(1), {"im0": given}).table
    assert table["score"].tolist() == [0.1, 0.2, 0.3, 0.4]
    assert table["superpixel"].tolist() == [7, 1, 2, 3]
    assert table["border"].tolist() == [True, False, False, True]


def test_image_without_segments_is_kept():
    given = masks(3) | {"im1": np.zeros((0, H, W), bool)}
    segments = collect(records(3), given)
    assert len(segments) == 8
    assert segments.masks("im1").shape == (0, H, W)
    with pytest.raises(KeyError, match="nobody"):
        segments.masks("nobody")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, m: m.update(im0=np.zeros((1, H, W), bool)), "empty"),
        (lambda r, m: m["im2"].__setitem__(3, False), "image 'im2': mask 3 is empty; drop it"),
        (lambda r, m: m.update(im0=np.ones((1, 5, 5), bool)), "expected"),
        (lambda r, m: m.update(other=m["im0"]), "unknown images"),
        (lambda r, m: r.pop("split"), "split"),
        (lambda r, m: r.loc.__setitem__((1, "image_id"), "im0"), "twice"),
    ],
)
def test_collect_errors(change, message):
    table, given = records(), masks()
    change(table, given)
    with pytest.raises(ValueError, match=message):
        collect(table, given)


def test_coco_round_trip(tmp_path, segments):
    path = tmp_path / "deep" / "segments.json"
    save_coco(path, segments.images, segments, info={"chapter": "02"})
    again = load_coco(path)
    pd.testing.assert_frame_equal(again.images, segments.images)
    pd.testing.assert_frame_equal(again.table, segments.table, check_exact=True, check_dtype=False)
    for i in range(len(segments)):
        np.testing.assert_array_equal(again.mask(i), segments.mask(i))
    first = path.read_bytes()
    save_coco(path, again.images, again, info={"chapter": "02"})
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["segments.json"]


def test_scores_superpixels_and_borders_survive_the_file(tmp_path):
    given = SimpleNamespace(
        masks=masks(1)["im0"], scores=np.array([0.1, 0.25, 0.3, 0.875]),
        superpixel=np.array([7, 1, 2, 3]), border=np.array([True, False, False, True]),
    )  # fmt: skip
    segments = save_coco(tmp_path / "s.json", records(1), {"im0": given})
    again = load_coco(tmp_path / "s.json").table
    pd.testing.assert_frame_equal(again, segments.table, check_exact=True, check_dtype=False)
    assert again["score"].tolist() == [0.1, 0.25, 0.3, 0.875]
    assert again["superpixel"].tolist() == [7, 1, 2, 3]


def test_pycocotools_reads_it(tmp_path, segments, capsys):
    save_coco(tmp_path / "s.json", records(), masks())
    coco = COCO(str(tmp_path / "s.json"))
    assert sorted(c["name"] for c in coco.cats.values()) == ["a", "b"]
    assert len(coco.anns) == 24
    for number, annotation in enumerate(coco.anns.values()):
        np.testing.assert_array_equal(coco.annToMask(annotation), segments.mask(number))
        assert annotation["area"] == segments.mask(number).sum()
    assert {len(coco.getAnnIds(imgIds=i)) for i in coco.imgs} == {4}


def test_coco_of_other_tools(tmp_path):
    """Polygons, uncompressed run lengths, and none of our own keys."""
    document = {
        "images": [{"id": 9, "file_name": "slide/a.png", "height": 10, "width": 12}],
        "categories": [{"id": 3, "name": "gland"}],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 3, "iscrowd": 0, "area": 16,
             "segmentation": [[2, 3, 6, 3, 6, 7, 2, 7]]},
            {"id": 2, "image_id": 9, "category_id": 3, "iscrowd": 1, "area": 10,
             "bbox": [0.4, 1, 2, 9], "segmentation": {"size": [10, 12], "counts": [0, 10, 110]}},
        ],
    }  # fmt: skip
    (tmp_path / "c.json").write_text(json.dumps(document))
    segments = load_coco(tmp_path / "c.json")
    assert segments.images["image_id"].tolist() == ["a"]
    assert segments.images["label"].tolist() == ["gland"]
    assert segments.mask(0)[3:7, 2:6].all() and segments.table["area"].tolist() == [16, 10]
    assert segments.table["border"].tolist() == [False, True]
    assert segments.mask(1)[:, 0].all()
    assert segments.table.loc[1, list("xywh")].tolist() == [0, 0, 1, 10]  # of the mask
    with pytest.raises(ValueError, match="leakage"):  # no split is no training split
        pooling.build(segments, np.zeros((2, 3)))
    document["annotations"][0]["area"] = document["annotations"][1]["area"] = 999.5
    document["images"][0] |= {"label": None, "patient": None}
    document["images"].append({"id": 2, "file_name": "other/a.png", "height": 10, "width": 12})
    document["annotations"].append({**document["annotations"][0], "id": 3, "image_id": 2})
    (tmp_path / "c.json").write_text(json.dumps(document))
    segments = load_coco(tmp_path / "c.json")
    assert segments.images["image_id"].tolist() == ["slide__a", "other__a"]
    assert segments.images["label"].tolist() == ["gland", "gland"]
    assert segments.table["patient"].tolist() == ["", "", ""]
    assert segments.table["area"].tolist() == [16, 10, 16]
    assert segments.masks("other__a").shape == (1, 10, 12)
    document["images"][1]["file_name"] = "slide/a.tif"
    (tmp_path / "c.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"'slide__a'.* come twice"):
        load_coco(tmp_path / "c.json")
    document["images"][1]["file_name"] = "other/a.png"
    document["annotations"][1]["segmentation"]["counts"] = [120]
    (tmp_path / "c.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="mask of annotation 2 is empty"):
        load_coco(tmp_path / "c.json")


def test_load_coco_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="02_anchor_clustering"):
        load_coco(tmp_path / "none.json")
    (tmp_path / "a.json").write_text('{"images": [')
    with pytest.raises(ValueError, match="no JSON"):
        load_coco(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('["images"]')
    with pytest.raises(ValueError, match="holds no JSON object: write it again with chapter 02"):
        load_coco(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="annotations"):
        load_coco(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], "annotation 7 has no polygon of three points: leave it out"),
        ([[2, 3, 6, 3]], "annotation 7 has no polygon of three points"),
        ({"size": [12, 10], "counts": [0, 10, 110]}, r"7 has the size \[12, 10\].*\[10, 12\]"),
        ({"size": [5, 12], "counts": "0:"}, r"7 has the size \[5, 12\].*\[10, 12\]"),
        ({"size": [10, 12], "counts": [0, 10, 20]}, "runs of annotation 7 do not add up"),
    ],
)
def test_masks_that_do_not_fit_their_image_are_refused(tmp_path, segmentation, message):
    document = {
        "images": [{"id": 1, "file_name": "a.png", "height": 10, "width": 12}],
        "categories": [{"id": 1, "name": "gland"}],
        "annotations": [{"id": 7, "image_id": 1, "category_id": 1, "segmentation": segmentation}],
    }
    (tmp_path / "c.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        load_coco(tmp_path / "c.json")


def test_nulls_of_another_tool_are_absent_values(tmp_path):
    document = {
        "info": None,
        "images": [{"id": 1, "file_name": "a.png", "height": 20, "width": 30}],
        "categories": [{"id": 1, "name": "gland"}],
        "annotations": [
            {"id": 7, "image_id": 1, "category_id": 1, "score": None,
             "segmentation": [[2, 3, 12, 3, 12, 13]]},
        ],
    }  # fmt: skip
    path = tmp_path / "other.json"
    path.write_text(json.dumps(document))
    assert load_coco(path).table["score"].tolist() == [1.0]


def test_polygons_of_two_points_are_left_out(tmp_path):
    square = [2, 3, 6, 3, 6, 7, 2, 7]
    document = {
        "images": [{"id": 1, "file_name": "a.png", "height": 10, "width": 12}],
        "categories": [{"id": 1, "name": "gland"}],
        "annotations": [
            {"id": 7, "image_id": 1, "category_id": 1, "segmentation": [[8, 8, 9, 9], square]}
        ],
    }
    (tmp_path / "c.json").write_text(json.dumps(document))
    assert load_coco(tmp_path / "c.json").table["area"].tolist() == [16]


def test_all_polygons_of_an_annotation_make_its_mask(tmp_path):
    parts = [[2, 3, 6, 3, 6, 7, 2, 7], [8, 1, 11, 1, 11, 4, 8, 4]]
    document = {
        "images": [{"id": 1, "file_name": "a.png", "height": 10, "width": 12}],
        "categories": [{"id": 1, "name": "gland"}],
        "annotations": [{"id": 7, "image_id": 1, "category_id": 1, "segmentation": parts}],
    }
    (tmp_path / "c.json").write_text(json.dumps(document))
    segments = load_coco(tmp_path / "c.json")
    expected = np.zeros((10, 12), bool)
    expected[3:7, 2:6] = expected[1:4, 8:11] = True
    np.testing.assert_array_equal(segments.mask(0), expected)


def test_select(segments):
    part = segments.select(label="a")
    assert set(part.table["label"]) == {"a"} and set(part.images["label"]) == {"a"}
    np.testing.assert_array_equal(part.mask(4), segments.masks("im2")[0])
    big = segments.select(segments.table["area"].to_numpy() > 50)
    assert len(big.images) == 6 and (big.table["area"] > 50).all()
    two = segments.select(image_id=("im0", "im3"))
    assert two.images["image_id"].tolist() == ["im0", "im3"] and len(two) == 8
    with pytest.raises(KeyError, match="stage"):
        segments.select(stage=1)


def test_tidy_keeps_the_largest_part_without_holes():
    ring = disc(20, 20, 10) & ~disc(20, 20, 5)
    islands = disc(20, 20, 8) | disc(38, 36, 2) | disc(1, 1, 4)
    segments = collect(records(2), {"im0": np.stack([ring, islands]), "im1": ring[None]})
    assert segments.table["border"].tolist() == [False, True, False]
    clean = tidy(segments)
    np.testing.assert_array_equal(clean.mask(0), disc(20, 20, 10))
    np.testing.assert_array_equal(clean.mask(1), disc(20, 20, 8))
    assert clean.table["border"].tolist() == [False, False, False]
    assert clean.table["image_id"].tolist() == ["im0", "im0", "im1"]
    again = tidy(clean)
    pd.testing.assert_frame_equal(again.table, clean.table)


def test_parts_that_touch_at_a_corner_are_two():
    mask = np.zeros((1, H, W), bool)
    mask[0, 5:15, 5:15] = mask[0, 15:20, 15:22] = True
    clean = tidy(collect(records(1), {"im0": mask}))
    assert clean.mask(0).sum() == 100 and clean.mask(0)[5:15, 5:15].all()


def test_tidy_leaves_holes_open_that_are_segments_of_their_own():
    """A lumen without a segment is filled; a gland in stroma is not, though only roughly met."""
    gland, lumen = disc(13, 20, 8), disc(36, 20, 4)
    stroma = np.ones((H, W), bool) & ~gland & ~lumen
    rough = disc(14.5, 20, 7)  # IoU of about 0.64 with the hole
    far = disc(17, 20, 4)  # lies in the hole, and is much smaller
    assert 0.5 < (rough & gland).sum() / (rough | gland).sum() < 0.8
    assert (far & gland).sum() / gland.sum() < 0.3
    for other, expected in ((rough, ~gland), (far, np.ones((H, W), bool))):
        segments = collect(records(1), {"im0": np.stack([stroma, other])})
        clean = tidy(segments)
        np.testing.assert_array_equal(clean.mask(0), expected)
        np.testing.assert_array_equal(clean.mask(1), other)
    elsewhere = collect(records(2), {"im0": stroma[None], "im1": gland[None]})
    assert tidy(elsewhere).mask(0).all()  # segments of another image do not matter


def test_tidy_keeps_what_segments_say_of_themselves(segments):
    """Foreign files have segments of several classes in one image."""
    table = segments.table.assign(label=[f"kind {i % 3}" for i in range(len(segments))])
    mixed = segment_table.Segments(segments.images, table, segments.rles)
    clean = tidy(mixed).table
    for column in ("segment_id", "label", "split", "patient", "dataset", "site"):
        if column in table:
            assert clean[column].tolist() == table[column].tolist()


def test_tidy_keeps_the_order_of_segments_that_are_not_sorted_by_image(segments):
    rows = np.random.default_rng(0).permutation(len(segments))
    table = segments.table.iloc[rows].reset_index(drop=True)
    mixed = segment_table.Segments(segments.images, table, tuple(segments.rles[i] for i in rows))
    clean = tidy(mixed)
    for column in ("segment_id", "image_id", "area", "cx"):  # discs are tidy already
        assert clean.table[column].tolist() == table[column].tolist()
    for i in range(len(mixed)):
        np.testing.assert_array_equal(clean.mask(i), mixed.mask(i))
    nothing = tidy(segments.select(np.zeros(len(segments), bool)))
    assert len(nothing) == 0 and len(nothing.images) == 6


def test_join_is_the_table_of_all(segments):
    table, given = records(), masks() | {"im4": np.zeros((0, H, W), bool)}
    parts = [collect(table.iloc[[i]], {f"im{i}": given[f"im{i}"]}) for i in range(6)]
    joined, whole = segment_table.join(parts), collect(table, given)
    pd.testing.assert_frame_equal(joined.table, whole.table)
    pd.testing.assert_frame_equal(joined.images, whole.images)
    assert joined.rles == whole.rles
    assert len(segment_table.join([parts[4]])) == 0
    with pytest.raises(ValueError, match="twice"):
        segment_table.join([parts[0], parts[0]])
    with pytest.raises(ValueError, match="no segments to join"):
        segment_table.join([])


def test_duplicates_count_once_and_the_better_score_stays():
    shapes = np.stack([disc(20, 20, 10), disc(20.4, 20, 10), disc(20, 20, 6), disc(20, 20, 10)])
    given = SimpleNamespace(masks=shapes, scores=np.array([0.5, 0.9, 0.8, 0.5]))
    segments = collect(records(2), {"im0": given, "im1": shapes[:1]})
    kept = drop_duplicates(segments, iou=0.9)
    assert kept.table["segment_id"].tolist() == [2, 3, 5]
    assert len(drop_duplicates(segments, iou=1.0)) == 4
    with pytest.raises(ValueError, match="iou=0"):
        drop_duplicates(segments, iou=0)


def test_what_was_dropped_drops_nothing_itself():
    """Three discs in a row: the first and the last are each like the middle one alone."""
    shapes = np.stack([disc(x, 20, 10) for x in (18, 21, 24)])
    iou = [
        (shapes[i] & shapes[j]).sum() / (shapes[i] | shapes[j]).sum()
        for i, j in ((0, 1), (1, 2), (0, 2))
    ]
    assert min(iou[:2]) > 0.6 > iou[2]
    given = SimpleNamespace(masks=shapes, scores=np.array([0.9, 0.8, 0.7]))
    kept = drop_duplicates(collect(records(1), {"im0": given}), iou=0.6)
    assert kept.table["segment_id"].tolist() == [1, 3]


class CountedId(str):
    """An image id that counts how often one is compared with another."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other):
        CountedId.compared += 1
        return str.__eq__(self, other)


@pytest.mark.parametrize("n", [100, 1000])
def test_rows_are_grouped_once_not_searched_for_each_image(n):
    ids = pd.Series([CountedId(f"image-{k // 4}") for k in range(n)], dtype=object)
    CountedId.compared = 0
    groups = rows_by_image(pd.DataFrame({"image_id": ids}))
    assert CountedId.compared <= n, "a search compares each row with each image"
    assert len(groups) == n // 4 and list(groups)[:2] == ["image-0", "image-1"]
    np.testing.assert_array_equal(groups["image-3"], [12, 13, 14, 15])


def test_a_mask_that_was_changed_is_noticed(tmp_path, segments):
    save_coco(tmp_path / "s.json", segments.images, segments)
    document = json.loads((tmp_path / "s.json").read_text())
    counts = document["annotations"][5]["segmentation"]["counts"]
    document["annotations"][5]["segmentation"]["counts"] = counts[: len(counts) // 2]
    (tmp_path / "s.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="annotation 6 has not the area"):
        load_coco(tmp_path / "s.json")
    del document["annotations"][5]["segmentation"]
    (tmp_path / "s.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"damaged \(KeyError: 'segmentation'\)"):
        load_coco(tmp_path / "s.json")
