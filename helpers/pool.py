"""The segment pool (steps 8 and 9): features reduced by per-class PCA, neighbours, leakage guard.

A :class:`Pool` is what chapter 03 makes of the segments of chapter 02
(:mod:`helpers.segment_table`): those of the *training* images with a short feature vector each,
P^c = {(segment, f)} of the paper. On disk its segments are COCO JSON like all others.
"""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from helpers.files import replacing, sha256
from helpers.segment_table import (
    FORMAT,
    Segments,
    as_text,
    decode,
    load_coco,
    read_json,
    save_coco,
)

_POOL_FILES = ("segments.json", "features.npz")
#: Rows of distances to all segments that are in memory at once.
_QUERIES_AT_ONCE = 64


@dataclass(frozen=True)
class ClassPca:
    """Principal components of the features of one class.

    Attributes
    ----------
    mean : (d,) float32 ndarray
    components : (p, d) float32 ndarray
        Rows are orthonormal, largest variance first; one row of zeros for a class of one segment.
    explained_variance_ratio : (p,) float64 ndarray
    n_samples : int
        Segments it was fitted to.
    """

    mean: np.ndarray
    components: np.ndarray
    explained_variance_ratio: np.ndarray
    n_samples: int

    @property
    def n_components(self) -> int:
        """Components kept: min(p asked for, n - 1, d), but one of a class of one segment."""
        return len(self.components)

    def transform(self, features: np.ndarray) -> np.ndarray:
        """Project (n, d) features onto the components, (n, p) float32."""
        return (np.asarray(features, np.float32) - self.mean) @ self.components.T


@dataclass(frozen=True)
class Pool:
    """Segment pool: training segments, one short feature vector each.

    Attributes
    ----------
    table : DataFrame
        One row a segment, columns :data:`helpers.segment_table.COLUMNS`.
    rles : tuple of dict
        Masks as run-length codes.
    features : (n, p) float32 ndarray
        PCA scores. The components belong to a class, so distances are meaningful within a class
        only; classes that support fewer than p components are padded with zeros, which leaves
        their distances as they are.
    pcas : dict of str to ClassPca
        The projection of each class.
    images : DataFrame
        The images the segments come from.
    provenance : dict
        Extractor, number of components asked for, segments dropped, and what the caller adds.
    """

    table: pd.DataFrame
    rles: tuple[dict, ...]
    features: np.ndarray
    pcas: dict[str, ClassPca]
    images: pd.DataFrame
    provenance: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rles)

    @property
    def classes(self) -> tuple[str, ...]:
        """Labels with at least one segment, in the order of the table."""
        return tuple(dict.fromkeys(self.table["label"]))

    @property
    def segments(self) -> Segments:
        """The pool without its features."""
        return Segments(self.images, self.table, self.rles)

    def mask(self, i: int) -> np.ndarray:
        """Mask of segment `i`, (H, W) bool, in the pixels of its image."""
        return decode(self.rles[i])

    def of_class(self, label: str) -> np.ndarray:
        """Row numbers of a class, ascending.

        Raises
        ------
        KeyError
            If the pool has no segment of this class.
        """
        rows = np.flatnonzero(self.table["label"].to_numpy() == label)
        if len(rows) == 0:
            raise KeyError(f"the pool has no segment of class {label!r}; it has {self.classes}")
        return rows

    def of_image(self, image_id: str) -> np.ndarray:
        """Row numbers of the segments of one image, ascending (may be empty)."""
        return np.flatnonzero(self.table["image_id"].to_numpy() == image_id)

    def distances(self, i: int, rows: np.ndarray) -> np.ndarray:
        """Euclidean distances of the features of segment `i` to those of `rows`, (m,) float32."""
        return np.linalg.norm(self.features[rows] - self.features[i], axis=1)

    def nearest(
        self, i: int, k: int = 5, *, exclude_own_image: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Nearest segments of the same class.

        Parameters
        ----------
        i : int
            Row of the query; itself never among the answers.
        k : int
            Neighbours asked for; fewer come back where the class has fewer.
        exclude_own_image : bool
            Leave out the segments of the query's own image.

        Returns
        -------
        rows : (k,) int ndarray
            Nearest first.
        distances : (k,) float32 ndarray
        """
        rows = self.of_class(self.table["label"].iat[i])
        keep = rows != i
        if exclude_own_image:
            images = self.table["image_id"].to_numpy()
            keep &= images[rows] != images[i]
        rows = rows[keep]
        distances = self.distances(i, rows)
        k = min(k, len(rows))
        if k < len(rows):
            part = np.argpartition(distances, k)[:k] if k else np.zeros(0, int)
            rows, distances = rows[part], distances[part]
        order = np.argsort(distances, kind="stable")
        return rows[order], distances[order]

    def summary(self) -> pd.DataFrame:
        """One row a class: segments, images, border-cut, median area, components, variance kept."""
        rows = []
        for label in self.classes:
            part = self.table[self.table["label"] == label]
            pca = self.pcas[label]
            rows.append(
                {
                    "label": label,
                    "segments": len(part),
                    "images": part["image_id"].nunique(),
                    "border_cut": int(part["border"].sum()),
                    "median_area": float(part["area"].median()),
                    "components": pca.n_components,
                    "explained_variance": float(pca.explained_variance_ratio.sum()),
                }
            )
        return pd.DataFrame(rows).set_index("label")

    def save(self, folder: str | os.PathLike) -> Path:
        """Write ``segments.json`` (COCO), ``features.npz`` and ``provenance.json`` to `folder`.

        Loading them again gives the same pool without any network or PCA. A pool that is there
        already is replaced when all three are written, the provenance last: it holds the hashes of
        the other two, so that a save that was cut short is noticed.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, np.ndarray] = {"features": self.features}
        for number, label in enumerate(self.pcas):
            pca = self.pcas[label]
            arrays[f"mean_{number}"] = pca.mean
            arrays[f"components_{number}"] = pca.components
            arrays[f"ratio_{number}"] = pca.explained_variance_ratio
        meta = {
            "format": FORMAT,
            "provenance": self.provenance,
            "pcas": [[label, pca.n_samples] for label, pca in self.pcas.items()],
        }
        with contextlib.ExitStack() as stack:  # all are written before the first takes its place
            last, *parts = (
                stack.enter_context(replacing(folder / name))
                for name in ("provenance.json", *_POOL_FILES)
            )
            partial = dict(zip(_POOL_FILES, parts, strict=True))
            save_coco(partial["segments.json"], self.images, self.segments)
            np.savez(partial["features.npz"], **arrays)
            meta["sha256"] = {name: sha256(path) for name, path in partial.items()}
            last.write_text(json.dumps(meta, indent=1, sort_keys=True), encoding="utf-8")
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Pool:
        """Read a pool that :meth:`save` wrote.

        Raises
        ------
        FileNotFoundError, ValueError
            If a file is absent or damaged, the files do not belong together, or a segment is not
            for training.
        """
        folder = Path(folder)
        for name in (*_POOL_FILES, "provenance.json"):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"no pool in {folder}: {name} is absent; run chapter 03_pca_pooling first"
                )
        segments = load_coco(folder / "segments.json")
        check_leakage(segments.table)
        meta = read_json(folder / "provenance.json", "03")
        features, pcas = _read_arrays(folder / "features.npz", meta)
        wrong = [n for n in _POOL_FILES if meta.get("sha256", {}).get(n) != sha256(folder / n)]
        if wrong or len(features) != len(segments):
            raise ValueError(
                f"{folder}: {', '.join(wrong) or 'features'} not as saved with this pool "
                f"({len(features)} feature rows for {len(segments)} segments): the files are "
                "damaged or of different pools, run chapter 03_pca_pooling again"
            )
        return cls(
            segments.table, segments.rles, features, pcas, segments.images, meta["provenance"]
        )


def build(
    segments: Segments,
    features: np.ndarray,
    *,
    n_components: int = 128,
    min_area: float = 0.0,
    records: pd.DataFrame | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Pool:
    """Build the segment pool: guard against leakage, drop fragments, fit PCA within each class.

    Parameters
    ----------
    segments : Segments
        Segments of the training split only; anything else is refused.
    features : (n, d) ndarray
        One feature vector a segment, same order.
    n_components : int
        p of the paper (128). Kept are min(p, n_c - 1, d) components for a class of n_c segments,
        but at least one: n centred vectors span n - 1 dimensions.
    min_area : float
        Smallest segment, as a fraction of its image; smaller ones are dropped and counted.
    records : DataFrame, optional
        All images of the study, for :func:`check_leakage`.
    provenance : mapping, optional
        Kept with the pool, e.g. extractor and parameters.

    Returns
    -------
    Pool

    Raises
    ------
    ValueError
        If a segment is not for training, a patient is in two splits, numbers of segments and
        features differ, features are not finite, or nothing is left.
    """
    features = _checked(features, len(segments))
    if n_components < 1:
        raise ValueError(f"n_components={n_components}: keep at least one component")
    check_leakage(segments.table, records=records)
    large = _fraction(segments) >= min_area
    dropped = int((~large).sum())
    segments, features = segments.select(large), features[large]
    if len(segments) == 0:
        raise ValueError(
            f"no segment is left for the pool ({dropped} are smaller than min_area={min_area}): "
            "lower min_area, or check the segmentation"
        )
    provenance = dict(provenance or {}) | {"min_area": float(min_area), "dropped_small": dropped}
    return _fit(segments, features, n_components, provenance)


def append(
    pool: Pool,
    segments: Segments,
    features: np.ndarray,
    *,
    records: pd.DataFrame | None = None,
) -> Pool:
    """Add segments of new images to a pool without fitting anything again.

    The new features are projected with the components of their class, so that the rows that are
    there stay as they are. :func:`helpers.features.extend` computes the features as well.

    Parameters
    ----------
    pool : Pool
        It is not changed.
    segments : Segments
        Of classes and split that the pool has; images must be new. Those below the smallest area
        that the pool was built with are dropped and counted.
    features : (m, d) ndarray
        From the same extractor.
    records : DataFrame, optional
        All images of the study, as for :func:`build`.

    Returns
    -------
    Pool
        Its provenance counts the segments appended, on which no component was fitted.

    Raises
    ------
    ValueError
        If a class is new, an image is in the pool already, features do not fit, or a segment is
        not for training.
    """
    features = _checked(features, len(segments))
    check_leakage(segments.table, records=records)
    _check_new(pool, segments, features)
    large = _fraction(segments) >= pool.provenance.get("min_area", 0.0)
    dropped = int((~large).sum())
    segments, features = segments.select(large), features[large]
    labels = segments.table["label"].to_numpy()
    scores = np.zeros((len(segments), pool.features.shape[1]), np.float32)
    for label in dict.fromkeys(labels):
        rows = labels == label
        part = pool.pcas[label].transform(features[rows])
        scores[rows, : part.shape[1]] = part
    new = segments.table.assign(segment_id=_first_free(pool) + np.arange(len(segments)))
    tables = [t for t in (pool.table, new) if len(t)]  # an empty one has no types
    table = pd.concat(tables, ignore_index=True)
    provenance = dict(pool.provenance)
    for key, more in (("appended", len(segments)), ("dropped_small", dropped)):
        provenance[key] = provenance.get(key, 0) + more
    return replace(
        pool,
        table=table,
        rles=pool.rles + segments.rles,
        features=np.concatenate([pool.features, scores]),
        images=pd.concat([pool.images, segments.images], ignore_index=True),
        provenance=provenance,
    )


def _first_free(pool: Pool) -> int:
    """Number of the first segment to come; those that are there keep theirs, which runs record."""
    return int(pool.table["segment_id"].max()) + 1 if len(pool.table) else 1


def check_leakage(table: pd.DataFrame, *, records: pd.DataFrame | None = None) -> None:
    """Refuse segments that would carry validation or test pixels into training.

    Parameters
    ----------
    table : DataFrame
        Segments with image_id, split, patient and dataset.
    records : DataFrame, optional
        All images of the study with the same columns: images of `table` must be training images
        there too, and their patients must have images in no other split.

    Raises
    ------
    ValueError
        Names the images, or the patients; or a column that is missing.
    """
    wrong = table[table["split"] != "train"]
    if len(wrong):
        ids = list(dict.fromkeys(wrong["image_id"]))
        more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
        raise ValueError(
            f"leakage: {len(wrong)} segments are not of the split 'train' but of "
            f"{sorted(set(map(str, wrong['split'])))}, from images {ids[:5]}{more}; the pool takes "
            "training images only, pass segments.select(split='train')"
        )
    if records is None:
        return
    missing = {"image_id", "split", "patient", "dataset"} - set(records)
    if missing:
        raise ValueError(f"the records lack the columns {sorted(missing)}: leakage cannot be seen")
    elsewhere = records["split"] != "train"
    unknown = sorted(set(table["image_id"]) - set(as_text(records.loc[~elsewhere, "image_id"])))
    if unknown:
        raise ValueError(
            f"leakage: images {unknown[:5]} are said to be of 'train', but the records do not have "
            "them there; make the segments again from the records"
        )
    both = sorted(_patients(table) & _patients(records[elsewhere]))
    if both:
        raise ValueError(
            f"leakage: patients {[patient for _, patient in both[:5]]} have images in 'train' and "
            "in another split; split the data by patient"
        )


# --- measures of a pool ---------------------------------------------------------------------------


def neighbour_recall(
    full: np.ndarray, reduced: np.ndarray, *, k: int = 5, max_queries: int = 2000
) -> float:
    """Share of the k nearest neighbours that survives a reduction of the features.

    Parameters
    ----------
    full : (n, d) ndarray
        Features before, of one class.
    reduced : (n, p) ndarray
        The same after.
    k : int
        Neighbours looked at; fewer where n is small.
    max_queries : int
        Evenly spaced queries, so that the cost stays linear in n.

    Returns
    -------
    float
        1 if every segment keeps its nearest neighbours; chance is k / (n - 1).
    """
    k = min(k, len(full) - 1)
    if k < 1:
        return 1.0
    itself = np.arange(len(full))
    before, after = (_nearest(f, itself, k, max_queries)[1] for f in (full, reduced))
    kept = [len(np.intersect1d(a, b)) for a, b in zip(before, after, strict=True)]
    return float(np.mean(kept) / k)


def neighbour_agreement(
    features: np.ndarray,
    labels: Sequence[str],
    images: Sequence[str],
    *,
    k: int = 5,
    max_queries: int = 2000,
) -> float:
    """Share of nearest neighbours, taken from other images, that have the query's label.

    Parameters
    ----------
    features : (n, d) ndarray
        On common axes, so not the scores of a pool of several classes.
    labels, images : sequence of n str
    k : int
        Neighbours a query.
    max_queries : int
        Evenly spaced queries, so that the cost stays linear in n.

    Returns
    -------
    float
        From 0 to 1.
    """
    labels = np.asarray(labels)
    queries, near = _nearest(features, np.asarray(images), k, max_queries)
    found = near >= 0
    agree = (labels[near] == labels[queries, None]) & found
    number = found.sum(axis=1)
    share = agree.sum(axis=1)[number > 0] / number[number > 0]
    return float(share.mean()) if len(share) else float("nan")


def agreement_by_chance(labels: Sequence[str], images: Sequence[str]) -> float:
    """What :func:`neighbour_agreement` is if any segments of other images are the neighbours.

    Parameters
    ----------
    labels, images : sequence of n str

    Returns
    -------
    float
        From 0 to 1; 0 where no two images share a label, NaN where there is one image only.
    """
    label, image = (
        np.unique(np.asarray(each), return_inverse=True)[1] for each in (labels, images)
    )
    if not len(label):
        return float("nan")
    together = np.zeros((label.max() + 1, image.max() + 1))
    np.add.at(together, (label, image), 1)
    alike = together.sum(1)[label] - together[label, image]
    others = len(label) - together.sum(0)[image]
    share = alike[others > 0] / others[others > 0]
    return float(share.mean()) if len(share) else float("nan")


def agreement_within(
    features: np.ndarray,
    labels: Sequence[str],
    groups: Sequence[str],
    images: Sequence[str],
    *,
    k: int = 5,
    max_queries: int = 2000,
) -> float:
    """What :func:`neighbour_agreement` is if each neighbour is any segment of its group instead.

    Where a label belongs to one group, as a patient to one grade, neighbours of the right group
    alone share labels more often than by :func:`agreement_by_chance`; this is how often.

    Parameters
    ----------
    features, labels, images, k, max_queries
        As of :func:`neighbour_agreement`.
    groups : sequence of n str

    Returns
    -------
    float
        From 0 to 1; with a single group that of :func:`agreement_by_chance`, over the queries.
    """
    label, group, image = (
        np.unique(np.asarray(each), return_inverse=True)[1] for each in (labels, groups, images)
    )
    queries, near = _nearest(features, image, k, max_queries)
    shares = []
    for query, row in zip(queries, near, strict=True):
        other = image != image[query]
        total = np.bincount(group[other], minlength=group.max() + 1)
        alike = np.bincount(group[other & (label == label[query])], minlength=len(total))
        among = group[row[row >= 0]]
        shares.append((alike[among] / total[among]).mean() if len(among) else np.nan)
    shares = np.array(shares)[np.isfinite(shares)]
    return float(shares.mean()) if len(shares) else float("nan")


def _nearest(
    features: np.ndarray, groups: np.ndarray, k: int, max_queries: int
) -> tuple[np.ndarray, np.ndarray]:
    """Evenly spaced queries (q,), and the rows (q, k) nearest to each, of other groups than its.

    Rows are -1 where there are fewer than k of them.
    """
    if not len(features):
        return np.zeros(0, int), np.zeros((0, k), int)
    features = np.asarray(features, np.float64)
    norms = (features**2).sum(axis=1)
    queries = np.unique(np.linspace(0, len(features) - 1, max_queries).astype(int))
    near = np.full((len(queries), k), -1)
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        block = queries[start : start + _QUERIES_AT_ONCE]
        distance = norms - 2 * features[block] @ features.T  # and the square of the query
        distance[groups[block, None] == groups] = np.inf
        order = np.argpartition(distance, min(k, len(features) - 1), axis=1)[:, :k]
        order.sort(axis=1)
        at = np.argsort(np.take_along_axis(distance, order, axis=1), axis=1, kind="stable")
        order = np.take_along_axis(order, at, axis=1)
        here = np.isfinite(np.take_along_axis(distance, order, axis=1))
        near[start : start + len(block), : order.shape[1]] = np.where(here, order, -1)
    return queries, near


def map_to_plane(features: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Positions of features in a plane by t-SNE, for looking at; plain PCA below 20 rows.

    Parameters
    ----------
    features : (n, d) ndarray
    seed : int
        The layout depends on it.

    Returns
    -------
    (n, 2) float64 ndarray
    """
    features = np.asarray(features, np.float64)
    n = len(features)
    if n < 3:
        return np.stack([np.arange(n), np.zeros(n)], axis=1).astype(float)
    if features.shape[1] < 2:
        features = np.pad(features, ((0, 0), (0, 1)))
    short = PCA(min(50, *features.shape), svd_solver="full").fit_transform(features)
    if n < 20:
        return short[:, :2]
    tsne = TSNE(perplexity=min(30, (n - 1) / 3), init="pca", max_iter=500, random_state=seed)
    return tsne.fit_transform(short).astype(np.float64)


# --- inner parts ----------------------------------------------------------------------------------


def _checked(features: np.ndarray, n: int) -> np.ndarray:
    """Features as float32, one finite row a segment."""
    features = np.asarray(features, np.float32)
    if features.ndim != 2 or len(features) != n:
        raise ValueError(
            f"features have shape {features.shape}, but there are {n} segments: "
            "give one row a segment"
        )
    if not np.isfinite(features).all():
        bad = np.flatnonzero(~np.isfinite(features).all(axis=1))[:5]
        raise ValueError(f"features of rows {bad.tolist()} are not finite: check the extractor")
    return features


def _check_new(pool: Pool, segments: Segments, features: np.ndarray) -> None:
    """Refuse what a pool cannot take in without being fitted again."""
    new = sorted(set(segments.table["label"]) - set(pool.pcas))
    if new:
        raise ValueError(f"the pool has no components for class {new[0]!r}: build the pool again")
    again = sorted(set(segments.images["image_id"]) & set(pool.images["image_id"]))
    if again:
        raise ValueError(f"images {again[:5]} are in the pool already: append new images only")
    d = len(next(iter(pool.pcas.values())).mean)
    if features.shape[1] != d:
        raise ValueError(
            f"the features have length {features.shape[1]}, those of the pool {d}: use the "
            f"extractor of the pool ({pool.provenance.get('extractor', 'not recorded')})"
        )


def _fit(segments: Segments, features: np.ndarray, n_components: int, provenance: dict) -> Pool:
    labels = segments.table["label"].to_numpy()
    order = dict.fromkeys(labels)
    spanned = {c: max(1, int((labels == c).sum()) - 1) for c in order}
    kept = {c: min(n_components, spanned[c], features.shape[1]) for c in order}
    scores = np.zeros((len(segments), max(kept.values())), np.float32)
    pcas = {}
    for label in order:
        rows = np.flatnonzero(labels == label)
        pcas[label] = _fit_class(features[rows], kept[label])
        scores[rows, : kept[label]] = pcas[label].transform(features[rows])
    provenance |= {"n_components": n_components}
    return Pool(segments.table, segments.rles, scores, pcas, segments.images, provenance)


def _fit_class(features: np.ndarray, p: int) -> ClassPca:
    """PCA of one class; a class of one segment has no direction, and keeps one that is zero."""
    if len(features) == 1:
        none = np.zeros((1, features.shape[1]), np.float32)
        return ClassPca(features[0].copy(), none, np.zeros(1), 1)
    mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    # Many rows: eigenvectors of the (d, d) covariance cost n d^2 once, where the decomposition of
    # the whole matrix costs several times that. Centring first keeps its digits.
    solver = "covariance_eigh" if len(features) > 2 * features.shape[1] else "full"
    with np.errstate(invalid="ignore", divide="ignore"):  # identical rows have no variance
        pca = PCA(p, svd_solver=solver).fit(features - mean)
    ratio = np.nan_to_num(np.asarray(pca.explained_variance_ratio_, np.float64))
    components = np.ascontiguousarray(pca.components_, np.float32)
    return ClassPca(mean + pca.mean_.astype(np.float32), components, ratio, len(features))


def _fraction(segments: Segments) -> np.ndarray:
    """Area of each segment as a fraction of its image."""
    pixels = np.array([h * w for h, w in (rle["size"] for rle in segments.rles)], float)
    return segments.table["area"].to_numpy(float) / pixels if len(segments) else np.zeros(0)


def _patients(table: pd.DataFrame) -> set[tuple[str, str]]:
    """Data set and number of every patient that is known."""
    pairs = zip(as_text(table["dataset"]), as_text(table["patient"]), strict=True)
    return {(dataset, patient) for dataset, patient in pairs if patient}


def _read_arrays(path: Path, meta: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, ClassPca]]:
    """Features and projections of a saved pool; one error for whatever is wrong with the file."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            pcas = {
                label: ClassPca(
                    arrays[f"mean_{k}"], arrays[f"components_{k}"], arrays[f"ratio_{k}"], n
                )
                for k, (label, n) in enumerate(meta["pcas"])
            }
            return arrays["features"], pcas
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or not of this pool ({type(error).__name__}: {error}): run "
            "chapter 03_pca_pooling again"
        ) from error
