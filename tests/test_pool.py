import dataclasses
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from pycocotools.coco import COCO

from helpers import pool as pooling
from helpers.pool import Pool
from helpers.segment_table import Segments, collect, save_coco
from tests.toy_segments import H, W, disc, masks, records


@pytest.fixture
def segments():
    return collect(records(), masks())


@pytest.fixture
def raw(segments):
    return np.random.default_rng(1).normal(size=(len(segments), 20)) * np.linspace(5, 0.1, 20)


def test_pca_is_fitted_within_each_class(segments, raw):
    pool = pooling.build(segments, raw, n_components=5)
    assert pool.features.shape == (24, 5) and pool.features.dtype == np.float32
    for label in "ab":
        rows = pool.of_class(label)
        part = raw[rows] - raw[rows].mean(0)
        _, s, vt = np.linalg.svd(part, full_matrices=False)
        expected = part @ vt[:5].T
        got = pool.features[rows]
        sign = np.sign((expected * got).sum(0))
        np.testing.assert_allclose(got * sign, expected, atol=1e-4)
        ratio = pool.pcas[label].explained_variance_ratio
        np.testing.assert_allclose(ratio, (s**2 / (s**2).sum())[:5], rtol=1e-4)


def test_all_components_keep_all_distances(segments, raw):
    """p is clamped to min(p, n - 1, d); with all of them the projection is a rotation."""
    pool = pooling.build(segments, raw, n_components=128)
    assert [pool.pcas[c].n_components for c in "ab"] == [11, 11]
    rows = pool.of_class("b")
    expected = np.linalg.norm(raw[rows] - raw[rows[0]], axis=1)
    np.testing.assert_allclose(pool.distances(rows[0], rows), expected, rtol=1e-4)
    assert pool.summary().loc["a", "explained_variance"] == pytest.approx(1)


def test_small_classes_are_padded_with_zeros(segments, raw):
    keep = (segments.table["label"] == "a").to_numpy(copy=True)
    keep[[4, 5]] = True  # class b keeps two segments
    pool = pooling.build(segments.select(keep), raw[keep], n_components=8)
    assert pool.features.shape == (14, 8)
    assert pool.pcas["b"].n_components == 1
    assert (pool.features[pool.of_class("b")][:, 1:] == 0).all()


def test_class_of_one_segment_and_of_equal_segments(segments, raw):
    keep = np.zeros(24, bool)
    keep[[0, 1, 4]] = True
    pool = pooling.build(segments.select(keep), np.ones((3, 20)), n_components=3)
    assert pool.pcas["b"].n_components == 1
    assert np.isfinite(pool.features).all() and (pool.features == 0).all()
    later = pool.pcas["b"].transform(np.random.default_rng(0).normal(size=(3, 20)))
    assert (later == 0).all()  # one segment says nothing of any direction
    assert pool.summary()["explained_variance"].tolist() == [0, 0]


def test_minimum_area_is_counted(segments, raw):
    area = segments.table["area"].to_numpy()
    limit = float(np.median(area)) / (H * W)
    pool = pooling.build(segments, raw, min_area=limit, provenance={"extractor": "toy"})
    assert (pool.table["area"] >= np.median(area)).all()
    assert pool.provenance["dropped_small"] == 24 - len(pool) > 0
    assert pool.provenance["extractor"] == "toy"
    with pytest.raises(ValueError, match="lower min_area"):
        pooling.build(segments, raw, min_area=0.9)


def test_segments_of_the_smallest_area_stay(raw):
    shapes = {"im0": np.stack([disc(15, 20, r) for r in (3, 5, 8)])}
    segments = collect(records(1), shapes)
    limit = shapes["im0"][1].sum() / (H * W)
    pool = pooling.build(segments, raw[:3], min_area=limit)
    assert pool.table["segment_id"].tolist() == [2, 3] and pool.provenance["dropped_small"] == 1
    more = collect(records(2).iloc[[1]].assign(label="a"), {"im1": shapes["im0"]})
    assert len(pooling.append(pool, more, raw[3:6])) == 4


def test_leakage_of_a_split_is_refused_by_name(segments, raw):
    table = segments.table.copy()
    table.loc[table["image_id"] == "im3", "split"] = "test"
    leaking = Segments(segments.images, table, segments.rles)
    with pytest.raises(ValueError, match=r"leakage.*'test'.*im3"):
        pooling.build(leaking, raw)
    train = leaking.select(split="train")
    pool = pooling.build(train, raw[(table["split"] == "train").to_numpy()])
    assert set(pool.table["image_id"]) == {"im0", "im1", "im2", "im4", "im5"}


def test_leakage_of_a_patient_is_refused(segments, raw):
    other = records(2, split="test").assign(image_id=["t0", "t1"], patient=["9", "2"])
    with pytest.raises(ValueError, match=r"patients \['2'\]"):
        pooling.build(segments, raw, records=pd.concat([records(), other]))
    other = other.assign(patient=["9", "8"])
    pooling.build(segments, raw, records=pd.concat([records(), other]))
    holes = other.assign(patient=[np.nan, 2.0])  # numbers beside a hole become floats
    with pytest.raises(ValueError, match=r"patients \['2'\]"):
        pooling.build(segments, raw, records=pd.concat([records(), holes]))
    unknown = other.assign(patient=[None, ""])  # unknown patients cannot be compared
    pooling.build(segments, raw, records=pd.concat([records().assign(patient=None), unknown]))


def test_patients_are_told_apart_by_data_set_and_unknown_ones_not_at_all(raw):
    others = records(2, split="test").assign(image_id=["t0", "t1"])
    elsewhere = others.assign(patient=["0", "1"], dataset="another")
    pooling.build(collect(records(), masks()), raw, records=pd.concat([records(), elsewhere]))
    table = records().assign(patient="")
    unknown = pd.concat([table, others.assign(patient="")])
    pooling.build(collect(table, masks()), raw, records=unknown)


def test_a_tampered_pool_does_not_load(tmp_path, segments, raw):
    pooling.build(segments, raw).save(tmp_path)
    text = (tmp_path / "segments.json").read_text()
    (tmp_path / "segments.json").write_text(text.replace('"split": "train"', '"split": "val"', 1))
    with pytest.raises(ValueError, match="leakage"):
        Pool.load(tmp_path)


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (np.zeros((3, 4)), {}, "24 segments"),
        (np.zeros((24, 4)), {"n_components": 0}, "n_components=0"),
        (np.full((24, 4), np.nan), {}, "not finite"),
    ],
)
def test_build_errors(segments, features, options, message):
    with pytest.raises(ValueError, match=message):
        pooling.build(segments, features, **options)


def test_save_and_load_without_recomputation(tmp_path, segments, raw, monkeypatch):
    pool = pooling.build(segments, raw, n_components=5, provenance={"extractor": "toy"})
    pool.save(tmp_path)
    monkeypatch.setattr(pooling, "PCA", None)
    again = Pool.load(tmp_path)
    np.testing.assert_array_equal(again.features, pool.features)
    assert again.provenance == pool.provenance and again.classes == pool.classes
    pd.testing.assert_frame_equal(again.summary(), pool.summary())
    np.testing.assert_array_equal(again.mask(7), pool.mask(7))
    np.testing.assert_array_equal(
        again.pcas["a"].transform(raw[again.of_class("a")]), pool.features[pool.of_class("a")]
    )
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(files) == {"features.npz", "provenance.json", "segments.json"}


def test_a_save_that_fails_leaves_the_pool_that_was_there(tmp_path, segments, raw):
    pooling.build(segments, raw).save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    worse = pooling.build(segments, raw[::-1], provenance={"extractor": object()})
    with pytest.raises(TypeError, match="not JSON serializable"):
        worse.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    Pool.load(tmp_path)


def test_images_without_segments_change_no_types(segments, raw):
    first = (segments.table["image_id"] != "im4").to_numpy()
    pool = pooling.build(
        segments.select(first, image_id=[f"im{i}" for i in (0, 1, 2, 3, 5)]), raw[first]
    )
    none = segments.select(np.zeros(len(segments), bool), image_id="im4")
    none = dataclasses.replace(none, table=none.table.astype(object))  # as of an empty list
    more = pooling.append(pool, none, raw[:0])
    assert len(more) == len(pool)
    pd.testing.assert_series_equal(more.table.dtypes, pool.table.dtypes)
    assert "im4" in more.images["image_id"].tolist()


def test_load_errors(tmp_path, segments, raw):
    with pytest.raises(FileNotFoundError, match="03_pca_pooling"):
        Pool.load(tmp_path)
    pooling.build(segments, raw).save(tmp_path)
    half = segments.select(label="a")
    save_coco(tmp_path / "segments.json", half.images, half)
    with pytest.raises(ValueError, match="different pools"):
        Pool.load(tmp_path)


def test_append_leaves_the_rest_as_it_is(segments, raw):
    first = (segments.table["image_id"] != "im4").to_numpy()
    pool = pooling.build(
        segments.select(first, image_id=[f"im{i}" for i in (0, 1, 2, 3, 5)]), raw[first]
    )
    more = pooling.append(pool, segments.select(image_id="im4"), raw[~first])
    np.testing.assert_array_equal(more.features[:20], pool.features)
    np.testing.assert_allclose(
        more.features[20:, :7], pool.pcas["a"].transform(raw[~first])[:, :7], rtol=1e-6
    )
    assert len(more) == 24 and more.table["segment_id"].is_unique
    with pytest.raises(ValueError, match="already"):
        pooling.append(more, segments.select(image_id="im4"), raw[~first])
    other = segments.select(image_id="im4")
    other.table["label"] = "z"
    with pytest.raises(ValueError, match="'z'"):
        pooling.append(pool, other, raw[~first])


def test_appended_segments_are_projected_with_the_components_of_their_class(raw):
    segments = collect(records(), masks())
    new = segments.table["image_id"].isin(["im4", "im5"]).to_numpy()  # one of each class
    pool = pooling.build(
        segments.select(image_id=[f"im{i}" for i in range(4)]), raw[~new], n_components=5
    )
    more = pooling.append(pool, segments.select(image_id=["im4", "im5"]), raw[new])
    for row, (label, features) in enumerate(
        zip(more.table["label"][16:], raw[new], strict=True), 16
    ):
        pca = pool.pcas[label]
        expected = (features - pca.mean) @ pca.components.T
        np.testing.assert_allclose(more.features[row], expected, atol=1e-4)


@pytest.mark.parametrize("own", [True, False])
def test_nearest_against_brute_force(segments, raw, own):
    pool = pooling.build(segments, raw, n_components=6)
    for i in range(len(pool)):
        rows = [
            j for j in range(24)
            if j != i and pool.table["label"][j] == pool.table["label"][i]
            and not (own and pool.table["image_id"][j] == pool.table["image_id"][i])
        ]  # fmt: skip
        distance = np.linalg.norm(pool.features[rows] - pool.features[i], axis=1)
        order = np.argsort(distance)
        got, d = pool.nearest(i, 3, exclude_own_image=own)
        assert got.tolist() == [rows[k] for k in order[:3]]
        np.testing.assert_allclose(d, distance[order[:3]], rtol=1e-6)
    assert len(pool.nearest(0, 100)[0]) == 8 and len(pool.nearest(0, 0)[0]) == 0
    with pytest.raises(KeyError, match="'z'"):
        pool.of_class("z")


def test_memory_is_linear_in_segments():
    """No table of all pairs: four times the segments, four times the memory.

    Processor time is measured by ``tests.benchmarks.bench_pool``.
    """
    shape = (64, 64)
    stamp = np.stack([disc(x, y, 5, shape) for x in range(8, 60, 5) for y in range(8, 60, 5)])
    peaks = []
    for n in (20, 80):
        ids = [f"i{k}" for k in range(n)]
        table = pd.DataFrame(
            {"image_id": ids, "label": "a", "split": "train", "height": 64, "width": 64}
        )
        tracemalloc.start()
        segments = collect(table, dict.fromkeys(ids, stamp))
        features = np.random.default_rng(0).normal(size=(len(segments), 32)).astype(np.float32)
        pool = pooling.build(segments, features, n_components=16)
        pool.nearest(17, 10)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert len(pool) == 80 * len(stamp) > 9_000
    assert peaks[1] < 6 * peaks[0]
    assert peaks[1] < len(pool) ** 2, "a byte a pair"


def test_neighbour_measures():
    rng = np.random.default_rng(0)
    full = rng.normal(size=(60, 10)) * np.r_[10, 10, np.full(8, 0.01)]
    assert pooling.neighbour_recall(full, full) == 1
    assert pooling.neighbour_recall(full, full[:, :2]) > 0.95
    assert pooling.neighbour_recall(full, full[:, 5:]) < 0.3
    assert pooling.neighbour_recall(full[:1], full[:1]) == 1
    labels = np.repeat(["a", "b"], 30)
    apart = full + (labels == "b")[:, None] * 100
    images = [f"i{k // 3}" for k in range(60)]
    assert pooling.neighbour_agreement(apart, labels, images) == 1
    mixed = pooling.neighbour_agreement(full, labels, images, max_queries=20)
    assert 0.2 < mixed < 0.8
    assert np.isnan(pooling.neighbour_agreement(apart, labels, ["i"] * 60))


@pytest.mark.parametrize("max_queries", [1, 7, 150, 2000])
def test_neighbours_are_those_of_a_search_in_loops(max_queries):
    """150 queries are more than one block, and 200 neighbours more than there are."""
    rng = np.random.default_rng(3)
    full, reduced = rng.normal(size=(150, 6)), rng.normal(size=(150, 3))
    labels, images = rng.choice(list("abc"), 150), rng.integers(0, 40, 150)

    def nearest(features, i, allowed, k):
        allowed = [j for j in range(150) if allowed(j)]
        return sorted(allowed, key=lambda j: np.linalg.norm(features[j] - features[i]))[:k]

    queries = sorted({int(q) for q in np.linspace(0, 149, max_queries)})
    agree, kept = [], []
    for i in queries:
        near = nearest(full, i, lambda j, i=i: images[j] != images[i], 200)
        if near:
            agree.append(np.mean([labels[j] == labels[i] for j in near]))
        two = [set(nearest(f, i, lambda j, i=i: j != i, 5)) for f in (full, reduced)]
        kept.append(len(two[0] & two[1]) / 5)
    got = pooling.neighbour_agreement(full, labels, images, k=200, max_queries=max_queries)
    assert got == pytest.approx(np.mean(agree))
    got = pooling.neighbour_recall(full, reduced, max_queries=max_queries)
    assert got == pytest.approx(np.mean(kept))


def test_agreement_by_chance_is_that_of_any_segment_of_another_image():
    rng = np.random.default_rng(4)
    images = rng.integers(0, 9, 60)
    labels = np.array(list("abc"))[images % 3]
    expected = np.mean(
        [np.mean([labels[j] == labels[i] for j in range(60) if images[j] != images[i]])
         for i in range(60)]
    )  # fmt: skip
    assert pooling.agreement_by_chance(labels, images) == pytest.approx(expected)
    # All other segments as neighbours are those of chance.
    features = rng.normal(size=(60, 3))
    found = pooling.neighbour_agreement(features, labels, images, k=60)
    assert found == pytest.approx(expected)
    assert pooling.agreement_by_chance(images, images) == 0  # one image a patient
    assert np.isnan(pooling.agreement_by_chance(labels, ["one"] * 60))


def test_agreement_within_groups_exchanges_each_neighbour_for_any_of_its_group():
    rng = np.random.default_rng(5)
    images = rng.integers(0, 8, 50)
    patients, grades = images // 2, images % 3
    features = rng.normal(size=(50, 4)) + 0.8 * grades[:, None]
    found = pooling.agreement_within(features, patients, grades, images, k=4)
    shares = []
    for i in range(50):
        others = [j for j in range(50) if images[j] != images[i]]
        near = sorted(others, key=lambda j: np.linalg.norm(features[j] - features[i]))[:4]
        for j in near:
            group = [m for m in others if grades[m] == grades[j]]
            shares.append(np.mean([patients[m] == patients[i] for m in group]))
    assert found == pytest.approx(np.mean(shares))
    one = pooling.agreement_within(features, patients, np.zeros(50), images)
    assert one == pytest.approx(pooling.agreement_by_chance(patients, images))
    alone = pooling.agreement_within(features, patients, patients, images)
    assert alone == pytest.approx(pooling.neighbour_agreement(features, patients, images))
    assert np.isnan(pooling.agreement_within(features, patients, grades, ["one"] * 50))


def test_nothing_agrees_with_nothing():
    assert np.isnan(pooling.neighbour_agreement(np.zeros((0, 3)), [], []))
    assert np.isnan(pooling.agreement_by_chance([], []))


@pytest.mark.parametrize(("labels", "share"), [("aa", 1), ("ab", 0)])
def test_one_neighbour_is_enough_to_agree_with(labels, share):
    given = list(labels), ["i", "j"]
    assert pooling.neighbour_agreement(np.eye(2), *given) == share
    assert pooling.agreement_by_chance(*given) == share
    assert pooling.agreement_within(np.eye(2), given[0], ["g", "g"], given[1]) == share


@pytest.mark.parametrize("d", [1, 6])
@pytest.mark.parametrize("n", [1, 2, 5, 19, 40])
def test_map_to_plane(n, d):
    features = np.random.default_rng(0).normal(size=(n, d))
    plane = pooling.map_to_plane(features)
    assert plane.shape == (n, 2) and np.isfinite(plane).all()
    np.testing.assert_array_equal(plane, pooling.map_to_plane(features))


def saved(tmp_path, segments, raw):
    pooling.build(segments, raw, provenance={"extractor": "toy"}).save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["segments.json", "features.npz", "provenance.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_damaged_files_give_one_clear_error(tmp_path, segments, raw, name, damage):
    path = saved(tmp_path, segments, raw) / name
    content = bytearray(path.read_bytes())
    if damage == "noise":
        content[len(content) // 2 : len(content) // 2 + 40] = bytes(range(90, 130))
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "noise": content}[damage])
    with pytest.raises(ValueError, match=r"chapter 0[23]"):
        Pool.load(tmp_path)


def test_files_of_two_pools_of_equal_size_are_told_apart(tmp_path, segments, raw):
    a, b = saved(tmp_path / "deep" / "a", segments, raw), saved(tmp_path / "b", segments, raw[::-1])
    (b / "features.npz").replace(a / "features.npz")
    with pytest.raises(ValueError, match=r"features\.npz not as saved"):
        Pool.load(a)


def test_pycocotools_loads_the_annotations_of_a_saved_pool(tmp_path, segments, raw):
    pool = pooling.build(segments, raw)
    pool.save(tmp_path)
    coco = COCO(str(tmp_path / "segments.json"))
    annotations = coco.loadAnns(coco.getAnnIds())
    assert [a["id"] for a in annotations] == pool.table["segment_id"].tolist()
    for i, annotation in enumerate(annotations):
        mask = coco.annToMask(annotation)
        assert mask.shape == (H, W)  # not square
        np.testing.assert_array_equal(mask, pool.mask(i))
        x, y, w, h = (int(v) for v in annotation["bbox"])
        assert mask[y : y + h, x : x + w].sum() == annotation["area"]
    b = coco.getAnnIds(catIds=coco.getCatIds(catNms=["b"]))
    assert len(b) == len(pool.of_class("b"))


def test_append_checks_features_area_and_records(segments, raw):
    old = segments.select(image_id=["im0", "im1", "im2"])
    new = segments.select(image_id=["im4", "im5"])
    limit = float(np.median(new.table["area"])) / (H * W)
    pool = pooling.build(old, raw[:12], n_components=5, min_area=0.002)
    pool.provenance["min_area"] = limit
    more = pooling.append(pool, new, raw[16:])
    assert (more.table["area"][len(pool) :] >= limit * H * W).all()
    assert more.provenance["appended"] == len(more) - len(pool) < len(new)
    assert more.provenance["dropped_small"] == len(new) - more.provenance["appended"]
    assert "appended" not in pool.provenance  # the pool given is as it was
    with pytest.raises(ValueError, match="length 7, those of the pool 20"):
        pooling.append(pool, new, np.zeros((8, 7)))
    with pytest.raises(ValueError, match="one row a segment"):
        pooling.append(pool, new, raw[:3])
    elsewhere = records().assign(split=["train"] * 4 + ["test"] * 2)
    with pytest.raises(ValueError, match=r"leakage: images \['im4', 'im5'\]"):
        pooling.append(pool, new, raw[16:], records=elsewhere)


def test_appending_leaves_the_numbers_of_segments_alone(segments, raw):
    old, new = segments.select(image_id=["im0", "im1", "im2"]), segments.select(image_id="im4")
    smallest = old.table["area"].min() / (H * W)
    pool = pooling.build(old, raw[:12], n_components=5, min_area=smallest * 1.01)
    before = pool.table["segment_id"].tolist()
    assert before != list(range(1, len(pool) + 1)), "dropping the smallest leaves a gap"
    more = pooling.append(pool, new, raw[16:20])
    assert more.table["segment_id"].tolist()[: len(pool)] == before
    added = range(max(before) + 1, max(before) + 1 + len(more) - len(pool))
    assert more.table["segment_id"].tolist()[len(pool) :] == list(added)


def test_the_records_overrule_what_segments_say_of_their_split(segments, raw):
    truth = records().assign(patient=range(6), split=["train"] * 5 + ["val"])
    with pytest.raises(ValueError, match=r"images \['im5'\].*records"):
        pooling.build(segments, raw, records=truth)
    with pytest.raises(ValueError, match=r"images \['im4', 'im5'\].*records"):
        pooling.build(segments, raw, records=records(4))
    with pytest.raises(ValueError, match=r"lack the columns \['dataset'\]"):
        pooling.build(segments, raw, records=records().drop(columns="dataset"))


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_pca_of_many_rows_by_its_covariance_is_the_decomposition(offset):
    """The fast solver keeps its digits also far from the origin, where covariances cancel."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(500, 12)) * np.geomspace(3, 0.05, 12) + offset).astype(np.float32)
    pca = pooling._fit_class(x, 8)
    centred = x.astype(float) - x.astype(float).mean(0)
    _, s, vt = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(pca.explained_variance_ratio, (s**2 / (s**2).sum())[:8], rtol=1e-3)
    scores, expected = pca.transform(x), centred @ vt[:8].T
    sign = np.sign((scores * expected).sum(0))
    np.testing.assert_allclose(scores * sign, expected, atol=2e-3 + offset * 1e-5)
