"""Segments and the segment pool (steps 7 to 9): COCO JSON in and out, per-class PCA, neighbours.

A :class:`Segments` is what chapter 02 writes: every segment of every image, with its mask as
run-length code. A :class:`Pool` is what chapter 03 makes of it: the segments of the *training*
images with a short feature vector each, P^c = {(segment, f)} of the paper.

Both are COCO JSON on disk, so that other tools open them; what COCO has no word for (split,
patient, score, border) travels in further keys, which readers of COCO ignore.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pandas as pd
from pycocotools import mask as coco
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors

__all__ = [
    "COLUMNS",
    "ClassPca",
    "Pool",
    "Segments",
    "append",
    "build",
    "check_leakage",
    "collect",
    "drop_duplicates",
    "load_coco",
    "map_to_plane",
    "neighbour_agreement",
    "neighbour_recall",
    "rows_by_image",
    "save_coco",
    "tidy",
]

#: Columns of a segment table. x, y, w, h is the COCO box; cx, cy the centroid; all in pixels.
COLUMNS = (
    "segment_id", "image_id", "label", "patient", "split", "dataset", "area",
    "cx", "cy", "x", "y", "w", "h", "border", "score", "superpixel",
)  # fmt: skip
_IMAGE_KEYS = ("image_id", "label", "split", "patient", "site", "dataset")
FORMAT = 1
_POOL_FILES = ("segments.json", "features.npz")


@dataclass(frozen=True)
class Segments:
    """Segments of a set of images.

    Attributes
    ----------
    images : DataFrame
        One row an image: image_id, label, split, patient, site, dataset, height, width.
    table : DataFrame
        One row a segment, columns :data:`COLUMNS`, index ``0 .. n-1``.
    rles : tuple of dict
        Compressed run-length code of each mask, as `pycocotools.mask` makes it.
    """

    images: pd.DataFrame
    table: pd.DataFrame
    rles: tuple[dict, ...]

    def __len__(self) -> int:
        return len(self.rles)

    def mask(self, i: int) -> np.ndarray:
        """Mask of segment `i`, (H, W) bool, in the pixels of its image."""
        return _decode(self.rles[i])

    def masks(self, image_id: str) -> np.ndarray:
        """All masks of one image, (m, H, W) bool, in the order of the table."""
        rows = np.flatnonzero(self.table["image_id"].to_numpy() == image_id)
        if len(rows) == 0:
            return np.zeros((0, *self.size(image_id)), bool)
        return np.moveaxis(_decode([self.rles[i] for i in rows]), -1, 0)

    def size(self, image_id: str) -> tuple[int, int]:
        """Height and width of an image.

        Raises
        ------
        KeyError
            If no image has this id.
        """
        row = self.images.loc[self.images["image_id"] == image_id]
        if row.empty:
            raise KeyError(f"no image {image_id!r} among the {len(self.images)} images of the file")
        return int(row["height"].iloc[0]), int(row["width"].iloc[0])

    def select(self, keep: np.ndarray | None = None, **equal: Any) -> Segments:
        """Segments for which `keep` holds and whose columns have the values `equal`.

        Parameters
        ----------
        keep : (n,) bool ndarray, optional
            Which rows stay.
        **equal
            Column = value (or a list of values), e.g. ``split="train"``. Images are narrowed down
            by the same columns where they have them.
        """
        rows = np.ones(len(self), bool) if keep is None else np.asarray(keep, bool).copy()
        images = self.images
        for column, value in equal.items():
            values = list(value) if isinstance(value, list | tuple | set) else [value]
            if column not in self.table:
                raise KeyError(f"segments have no column {column!r}: use one of {list(COLUMNS)}")
            rows &= self.table[column].isin(values).to_numpy()
            if column in images:
                images = images[images[column].isin(values)]
        return Segments(
            images.reset_index(drop=True),
            self.table[rows].reset_index(drop=True),
            tuple(self.rles[i] for i in np.flatnonzero(rows)),
        )


def collect(images: pd.DataFrame, segments: Mapping[str, Any]) -> Segments:
    """Gather the segments of many images into one table.

    Parameters
    ----------
    images : DataFrame
        One row an image: image_id, label, split, height, width; patient, site, dataset if known.
    segments : mapping of image_id to (m, H, W) bool ndarray or object
        The masks of each image. An object needs `masks` and may carry `scores`, `superpixel` and
        `border`, each of length m. Without `border` a segment is border-cut if its mask touches the
        first or last row or column.

    Returns
    -------
    Segments
        Segments in the order of `images`; empty masks are refused.

    Raises
    ------
    ValueError
        If an image is unknown, a mask is empty, or sizes do not agree.
    """
    images = _image_table(images)
    unknown = sorted(set(segments) - set(images["image_id"]))
    if unknown:
        raise ValueError(
            f"segments of unknown images {unknown[:5]}: every image needs a row in `images`"
        )
    rows, rles = [], []
    for record in images.to_dict("records"):
        if record["image_id"] not in segments:
            continue
        part, codes = _rows_of_image(record, segments[record["image_id"]])
        rows.append(part)
        rles += codes
    table = pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=list(COLUMNS))
    table["segment_id"] = np.arange(1, len(table) + 1)
    return Segments(images, table[list(COLUMNS)], tuple(rles))


def rows_by_image(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Row numbers of each image, images in the order of the table; cost linear in its rows."""
    return dict(table.groupby("image_id", sort=False).indices)


def tidy(segments: Segments) -> Segments:
    """Keep the largest connected part of every segment and fill its holes.

    A mask from a network may come with islands, or miss the lumen of its gland. Islands would be
    pasted along with a segment and spoil its moments; a hole would leave the old lumen in place.

    Parameters
    ----------
    segments : Segments

    Returns
    -------
    Segments
        In the same order; area, centroid, box and border are measured anew.
    """
    cleaned = {}
    for image_id, rows in rows_by_image(segments.table).items():
        cleaned[image_id] = SimpleNamespace(
            masks=np.stack([_largest_part(segments.mask(i)) for i in rows]),
            scores=segments.table["score"].to_numpy()[rows],
            superpixel=segments.table["superpixel"].to_numpy()[rows],
        )
    return collect(segments.images, cleaned)


def drop_duplicates(segments: Segments, *, iou: float = 0.9) -> Segments:
    """Drop segments that are nearly the same as a better one of their image.

    Parameters
    ----------
    segments : Segments
    iou : float
        Overlap from which two masks are the same; the one with the higher score stays.

    Returns
    -------
    Segments
        Those that stay, in the same order. The cost grows with the square of the number of segments
        of one image, not of all.
    """
    if not 0 < iou <= 1:
        raise ValueError(f"iou={iou}: give an overlap above 0 and up to 1")
    keep = np.ones(len(segments), bool)
    scores = segments.table["score"].to_numpy()
    for rows in rows_by_image(segments.table).values():
        order = rows[np.argsort(-scores[rows], kind="stable")]
        codes = [segments.rles[i] for i in order]
        same = np.asarray(coco.iou(codes, codes, [0] * len(codes))) >= iou
        for k in range(1, len(order)):
            keep[order[k]] = not (same[k, :k] & keep[order[:k]]).any()
    return segments.select(keep)


def save_coco(
    path: str | os.PathLike,
    images: pd.DataFrame,
    segments: Segments | Mapping[str, Any],
    *,
    info: Mapping[str, Any] | None = None,
) -> Segments:
    """Write segments as COCO JSON.

    Parameters
    ----------
    path : path
        File to write; it appears only when complete.
    images, segments
        As in :func:`collect`; `segments` may also be a :class:`Segments` already.
    info : mapping, optional
        Goes into the ``info`` block of the file.

    Returns
    -------
    Segments
        What was written.
    """
    if not isinstance(segments, Segments):
        segments = collect(images, segments)
    document = _to_coco(segments, dict(info or {}))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(document, sort_keys=True, allow_nan=False), encoding="utf-8")
    os.replace(partial, path)
    return segments


def load_coco(path: str | os.PathLike) -> Segments:
    """Read segments from COCO JSON, written by :func:`save_coco` or by another tool.

    Polygons and uncompressed run-length codes are converted; keys beyond COCO that are absent get
    neutral values (split ``"train"`` is *not* assumed: it stays empty).

    Raises
    ------
    FileNotFoundError, ValueError
        If the file is absent, is no COCO document, or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no segment file {path}: run chapter 02_anchor_clustering first")
    document = _read_json(path, "02")
    missing = {"images", "annotations", "categories"} - set(document)
    if missing:
        raise ValueError(f"{path} is no COCO file: it lacks {sorted(missing)}")
    try:
        return _from_coco(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}): write it again with chapter 02"
        ) from error


# --- pool -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassPca:
    """Principal components of the features of one class.

    Attributes
    ----------
    mean : (d,) float32 ndarray
    components : (p, d) float32 ndarray
        Rows are orthonormal, largest variance first.
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
        """Components kept, min(p asked for, n, d)."""
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
        One row a segment, columns :data:`COLUMNS`.
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
        return _decode(self.rles[i])

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

        Loading them again gives the same pool without any network or PCA. The provenance holds the
        hashes of the other two and is written last, so that a save that was cut short is noticed.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_coco(folder / "segments.json", self.images, self.segments)
        arrays: dict[str, np.ndarray] = {"features": self.features}
        for number, label in enumerate(self.pcas):
            pca = self.pcas[label]
            arrays[f"mean_{number}"] = pca.mean
            arrays[f"components_{number}"] = pca.components
            arrays[f"ratio_{number}"] = pca.explained_variance_ratio
        partial = folder / "features.partial.npz"
        np.savez(partial, **arrays)
        os.replace(partial, folder / "features.npz")
        meta = {
            "format": FORMAT,
            "provenance": self.provenance,
            "pcas": [[label, pca.n_samples] for label, pca in self.pcas.items()],
            "sha256": {name: _sha256(folder / name) for name in _POOL_FILES},
        }
        partial = folder / "provenance.json.partial"
        partial.write_text(json.dumps(meta, indent=1, sort_keys=True), encoding="utf-8")
        os.replace(partial, folder / "provenance.json")
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
        meta = _read_json(folder / "provenance.json", "03")
        features, pcas = _read_arrays(folder / "features.npz", meta)
        wrong = [n for n in _POOL_FILES if meta.get("sha256", {}).get(n) != _sha256(folder / n)]
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
    split: str = "train",
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
        p of the paper (128). Kept are min(p, n_c, d) components for a class of n_c segments.
    split : str
        The split that may go into the pool.
    min_area : float
        Smallest segment, as a fraction of its image; smaller ones are dropped and counted.
    records : DataFrame, optional
        All images of the study with `split` and `patient`: then no patient of the pool may have an
        image in another split.
    provenance : mapping, optional
        Kept with the pool, e.g. extractor and parameters.

    Returns
    -------
    Pool

    Raises
    ------
    ValueError
        If a segment is from another split, a patient is in two splits, numbers of segments and
        features differ, features are not finite, or nothing is left.
    """
    features = _checked(features, len(segments))
    if n_components < 1:
        raise ValueError(f"n_components={n_components}: keep at least one component")
    check_leakage(segments.table, split=split, records=records)
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
    table = pd.concat([pool.table, segments.table], ignore_index=True)
    table["segment_id"] = np.arange(1, len(table) + 1)
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


def check_leakage(
    table: pd.DataFrame, *, split: str = "train", records: pd.DataFrame | None = None
) -> None:
    """Refuse segments that would carry validation or test pixels into training.

    Parameters
    ----------
    table : DataFrame
        Segments with image_id, split and patient.
    split : str
        The only split allowed.
    records : DataFrame, optional
        All images with image_id, split, patient and dataset: images of `table` must be in `split`
        there too, and their patients in `split` alone.

    Raises
    ------
    ValueError
        Names the images, or the patients.
    """
    wrong = table[table["split"] != split]
    if len(wrong):
        ids = list(dict.fromkeys(wrong["image_id"]))
        more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
        raise ValueError(
            f"leakage: {len(wrong)} segments are not of the split {split!r} but of "
            f"{sorted(set(map(str, wrong['split'])))}, from images {ids[:5]}{more}; the pool takes "
            f"training images only, pass segments.select(split={split!r})"
        )
    if records is None:
        return
    elsewhere = records.loc[records["split"] != split, "image_id"].astype(str)
    named = sorted(set(elsewhere) & set(table["image_id"]))
    if named:
        raise ValueError(
            f"leakage: images {named[:5]} are said to be of {split!r}, but the records put them "
            "in another split; make the segments again from the records"
        )
    inside = _patients(table)
    outside = _patients(records[records["split"] != split])
    both = sorted(inside & outside)
    if both:
        raise ValueError(
            f"leakage: patients {[patient for _, patient in both[:5]]} have images in "
            f"{split!r} and in another split; split the data by patient"
        )


# --- measures of a pool ---------------------------------------------------------------------------


def neighbour_recall(full: np.ndarray, reduced: np.ndarray, *, k: int = 5) -> float:
    """Share of the k nearest neighbours that survives a reduction of the features.

    Parameters
    ----------
    full : (n, d) ndarray
        Features before, of one class.
    reduced : (n, p) ndarray
        The same after.
    k : int
        Neighbours looked at; fewer where n is small.

    Returns
    -------
    float
        1 if every segment keeps its nearest neighbours; chance is k / (n - 1).
    """
    k = min(k, len(full) - 1)
    if k < 1:
        return 1.0
    near = [
        NearestNeighbors(n_neighbors=k).fit(f).kneighbors(return_distance=False)
        for f in (np.asarray(full), np.asarray(reduced))
    ]
    kept = [len(np.intersect1d(a, b)) for a, b in zip(*near, strict=True)]
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
    features, labels, images = np.asarray(features, float), np.asarray(labels), np.asarray(images)
    norms = (features**2).sum(axis=1)
    agree = []
    for i in np.unique(np.linspace(0, len(labels) - 1, max_queries).astype(int)):
        other = np.flatnonzero(images != images[i])
        if len(other) == 0:
            continue
        distance = norms[other] - 2 * features[other] @ features[i]
        near = other[np.argsort(distance, kind="stable")[:k]]
        agree.append((labels[near] == labels[i]).mean())
    return float(np.mean(agree)) if agree else float("nan")


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
    kept = {c: min(n_components, int((labels == c).sum()), features.shape[1]) for c in order}
    scores = np.zeros((len(segments), max(kept.values())), np.float32)
    pcas = {}
    for label in order:
        rows = np.flatnonzero(labels == label)
        pcas[label] = _fit_class(features[rows], kept[label])
        scores[rows, : kept[label]] = pcas[label].transform(features[rows])
    provenance |= {"n_components": n_components}
    return Pool(segments.table, segments.rles, scores, pcas, segments.images, provenance)


def _fit_class(features: np.ndarray, p: int) -> ClassPca:
    """PCA of one class; a class of one segment has no variance and keeps one empty component."""
    if len(features) == 1:
        unit = np.zeros((1, features.shape[1]), np.float32)
        unit[0, 0] = 1
        return ClassPca(features[0].copy(), unit, np.zeros(1), 1)
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
    known = table[table["patient"].notna() & (table["patient"].astype(str) != "")]
    return set(zip(known["dataset"].astype(str), known["patient"].astype(str), strict=True))


def _image_table(images: pd.DataFrame) -> pd.DataFrame:
    missing = {"image_id", "label", "split", "height", "width"} - set(images)
    if missing:
        raise ValueError(f"the image table lacks the columns {sorted(missing)}")
    images = images.reset_index(drop=True).copy()
    for column in ("patient", "site", "dataset"):
        images[column] = _text(images[column]) if column in images else ""
    for column in ("image_id", "label", "split"):
        images[column] = _text(images[column])
    if images["image_id"].duplicated().any():
        twice = images.loc[images["image_id"].duplicated(), "image_id"].tolist()
        raise ValueError(f"image ids must be unique, but {twice[:5]} come twice")
    return images[[*_IMAGE_KEYS, "height", "width"]]


def _text(column: pd.Series) -> pd.Series:
    return column.map(lambda value: "" if pd.isna(value) else str(value)).astype(str)


def _rows_of_image(record: Mapping[str, Any], given: Any) -> tuple[pd.DataFrame, list[dict]]:
    masks = np.asarray(getattr(given, "masks", given), bool)
    shape = (record["height"], record["width"])
    if masks.ndim != 3 or masks.shape[1:] != shape:
        raise ValueError(
            f"masks of image {record['image_id']!r} have shape {masks.shape}, expected (m, "
            f"{shape[0]}, {shape[1]}): give them in the pixels of the image"
        )
    n = len(masks)
    columns, rows = masks.sum(1, dtype=np.int64), masks.sum(2, dtype=np.int64)  # (m, W), (m, H)
    area = rows.sum(1)
    if n and area.min() == 0:
        raise ValueError(
            f"image {record['image_id']!r}: mask {int(area.argmin())} is empty; drop it"
        )
    touches = (columns[:, [0, -1]] + rows[:, [0, -1]]).any(1)
    codes = coco.encode(np.asfortranarray(np.moveaxis(masks, 0, -1).astype(np.uint8))) if n else []
    boxes = coco.toBbox(codes) if n else np.zeros((0, 4))
    part = pd.DataFrame(
        {
            "segment_id": 0,
            **{k: [record[k]] * n for k in ("image_id", "label", "patient", "split", "dataset")},
            "area": area,
            "cx": columns @ np.arange(shape[1]) / np.maximum(area, 1),
            "cy": rows @ np.arange(shape[0]) / np.maximum(area, 1),
            **{k: boxes[:, i].astype(int) for i, k in enumerate("xywh")},
            "border": _per_segment(given, "border", touches, n).astype(bool),
            "score": _per_segment(given, "scores", np.ones(n), n).astype(float),
            "superpixel": _per_segment(given, "superpixel", np.full(n, -1), n).astype(int),
        }
    )
    return part, list(codes)


def _per_segment(given: Any, name: str, default: np.ndarray, n: int) -> np.ndarray:
    value = getattr(given, name, None) if not isinstance(given, np.ndarray) else None
    value = default if value is None else np.asarray(value)
    if len(value) != n:
        raise ValueError(f"{name} has length {len(value)} for {n} masks")
    return value


def _to_coco(segments: Segments, info: dict) -> dict:
    labels = list(dict.fromkeys([*segments.images["label"], *segments.table["label"]]))
    category = {label: k for k, label in enumerate(labels, start=1)}
    number = {image: k for k, image in enumerate(segments.images["image_id"], start=1)}
    images = [
        {
            "id": number[row["image_id"]],
            "file_name": f"{row['image_id']}.png",
            "height": int(row["height"]),
            "width": int(row["width"]),
            **{key: row[key] for key in _IMAGE_KEYS},
        }
        for row in segments.images.to_dict("records")
    ]
    annotations = [
        {
            "id": int(row["segment_id"]),
            "image_id": number[row["image_id"]],
            "category_id": category[row["label"]],
            "segmentation": {
                "size": [int(v) for v in rle["size"]],
                "counts": _ascii(rle["counts"]),
            },
            "area": int(row["area"]),
            "bbox": [int(row[k]) for k in "xywh"],
            "centroid": [round(float(row["cx"]), 4), round(float(row["cy"]), 4)],
            "iscrowd": 0,
            "border": bool(row["border"]),
            "score": round(float(row["score"]), 6),
            "superpixel": int(row["superpixel"]),
        }
        for row, rle in zip(segments.table.to_dict("records"), segments.rles, strict=True)
    ]
    return {
        "info": {"description": "tissue segments", "format": FORMAT, **info},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": k, "name": label} for label, k in category.items()],
    }


def _from_coco(document: Mapping[str, Any]) -> Segments:
    labels = {c["id"]: str(c["name"]) for c in document["categories"]}
    boxes_of = {image["id"]: image for image in document["images"]}
    images = pd.DataFrame(
        [_image_row(image) for image in document["images"]],
        columns=[*_IMAGE_KEYS, "height", "width"],
    )
    ours = "format" in document.get("info", {})
    rows, rles = [], []
    for a in document["annotations"]:
        image = boxes_of[a["image_id"]]
        rle = _rle(a["segmentation"], image["height"], image["width"])
        if ours and int(coco.area(rle)) != a["area"]:
            raise ValueError(f"the mask of annotation {a['id']} has not the area it was saved with")
        rles.append(rle)
        rows.append(_segment_row(a, _image_row(image), labels.get(a.get("category_id"), ""), rle))
    labelled = dict(zip((r["image_id"] for r in rows), (r["label"] for r in rows), strict=True))
    images["label"] = [
        label or labelled.get(image, "")
        for image, label in zip(images["image_id"], images["label"], strict=True)
    ]
    return Segments(images, pd.DataFrame(rows, columns=list(COLUMNS)), tuple(rles))


def _image_row(image: Mapping[str, Any]) -> dict:
    row = {key: str(image.get(key, "")) for key in _IMAGE_KEYS}
    row["image_id"] = row["image_id"] or Path(str(image["file_name"])).stem
    return row | {"height": int(image["height"]), "width": int(image["width"])}


def _segment_row(a: Mapping[str, Any], image: Mapping[str, Any], label: str, rle: dict) -> dict:
    x, y, w, h = (int(v) for v in a.get("bbox") or coco.toBbox(rle))
    if "centroid" in a:
        cx, cy = a["centroid"]
    else:
        ys, xs = np.nonzero(_decode(rle))
        cx, cy = float(xs.mean()), float(ys.mean())
    cut = x <= 0 or y <= 0 or x + w >= image["width"] or y + h >= image["height"]
    return {
        "segment_id": int(a["id"]),
        "image_id": image["image_id"],
        "label": label,
        **{key: image[key] for key in ("patient", "split", "dataset")},
        "area": int(a["area"]) if "counts" in a["segmentation"] else int(coco.area(rle)),
        "cx": float(cx),
        "cy": float(cy),
        **dict(zip("xywh", (x, y, w, h), strict=True)),
        "border": bool(a.get("border", cut)),
        "score": float(a.get("score", 1.0)),
        "superpixel": int(a.get("superpixel", -1)),
    }


def _rle(segmentation: Any, height: int, width: int) -> dict:
    """Compressed run-length code of any COCO segmentation."""
    if isinstance(segmentation, Sequence):  # polygons
        return coco.merge(coco.frPyObjects(list(segmentation), height, width))
    if isinstance(segmentation["counts"], list):
        return coco.frPyObjects(segmentation, height, width)
    return {"size": list(segmentation["size"]), "counts": segmentation["counts"].encode("ascii")}


def _largest_part(mask: np.ndarray) -> np.ndarray:
    """Largest connected part (4-neighbours) of a mask, holes filled."""
    _, parts, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    if len(stats) < 2:
        return mask
    part = (parts == 1 + stats[1:, cv2.CC_STAT_AREA].argmax()).astype(np.uint8)
    outlines, _ = cv2.findContours(part, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(part, outlines, -1, 1, cv2.FILLED)
    return part.astype(bool)


def _decode(rles: dict | list[dict]) -> np.ndarray:
    """Mask (H, W) of one code, or (H, W, n) of several, bool."""
    with warnings.catch_warnings():  # pycocotools has not followed numpy 2 in one signature
        warnings.simplefilter("ignore", DeprecationWarning)
        return coco.decode(rles).astype(bool)


def _read_json(path: Path, chapter: str) -> dict:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is no JSON, or cut short ({error}): write it again with chapter {chapter}"
        ) from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds no JSON object: write it again with chapter {chapter}")
    return document


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


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _ascii(counts: bytes | str) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts
