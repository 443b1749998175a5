"""Segments of images as a table with masks in run-length code; COCO JSON in and out (step 7).

A :class:`Segments` is what chapter 02 writes: every segment of every image, with its mask as
run-length code. On disk it is COCO JSON, so that other tools open it; what COCO has no word for
(split, patient, score, border) travels in further keys, which readers of COCO ignore.
:mod:`helpers.pool` makes a pool of it.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pandas as pd
from pycocotools import mask as coco
from skimage import measure

from helpers import files

#: Columns of a segment table. x, y, w, h is the COCO box; cx, cy the centroid; all in pixels.
COLUMNS = (
    "segment_id", "image_id", "label", "patient", "split", "dataset", "area",
    "cx", "cy", "x", "y", "w", "h", "border", "score", "superpixel",
)  # fmt: skip
_IMAGE_KEYS = ("image_id", "label", "split", "patient", "site", "dataset")
#: Share of a segment's outline that may lie on the border of the image before it counts as cut.
BORDER_SHARE = 0.1
#: A hole that overlaps another segment by this IoU is a structure of its own.
HOLE_IOU = 0.5
#: Format of the files, kept in their ``info``.
FORMAT = 1


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
        return decode(self.rles[i])

    def masks(self, image_id: str) -> np.ndarray:
        """All masks of one image, (m, H, W) bool, in the order of the table."""
        rows = np.flatnonzero(self.table["image_id"].to_numpy() == image_id)
        if len(rows) == 0:
            return np.zeros((0, *self.size(image_id)), bool)
        return np.moveaxis(decode([self.rles[i] for i in rows]), -1, 0)

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
        `border`, each of length m. Without `border`, :func:`cut_by_border` says what is cut.

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
        if codes:
            rows.append(part)
            rles += codes
    table = pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=list(COLUMNS))
    table["segment_id"] = np.arange(1, len(table) + 1)
    return Segments(images, table[list(COLUMNS)], tuple(rles))


def join(parts: Sequence[Segments]) -> Segments:
    """Put the segments of different images into one table, part after part.

    Run-length codes of one image after the other take far less memory than all their masks.

    Parameters
    ----------
    parts : sequence of Segments
        Of different images, at least one part.

    Returns
    -------
    Segments
        Its segments are numbered anew.

    Raises
    ------
    ValueError
        If there is nothing to join, or two parts have the same image.
    """
    if not parts:
        raise ValueError("no segments to join: give at least one part")
    images = _image_table(pd.concat([part.images for part in parts], ignore_index=True))
    filled = [part.table for part in parts if len(part)] or [parts[0].table]
    table = pd.concat(filled, ignore_index=True)
    table["segment_id"] = np.arange(1, len(table) + 1)
    return Segments(images, table, tuple(rle for part in parts for rle in part.rles))


def cut_by_border(masks: np.ndarray) -> np.ndarray:
    """Which masks the border of the image cuts, not only touches.

    A segment counts as cut if more than :data:`BORDER_SHARE` of the circumference of a disc of
    its area lies on the border. A tenth is a chord that takes 0.7 % of a disc away: what has lost
    no more is whole.

    Parameters
    ----------
    masks : (n, H, W) bool ndarray

    Returns
    -------
    (n,) bool ndarray
    """
    on_border = masks[:, [0, -1]].sum((1, 2)) + masks[:, :, [0, -1]].sum((1, 2))
    circumference = 2 * np.sqrt(np.pi * masks.sum((1, 2)))
    return on_border > BORDER_SHARE * circumference


def prefer_whole(table: pd.DataFrame, rows: np.ndarray) -> np.ndarray:
    """Those of `rows` whose segment no border cuts; all of them where there is none."""
    whole = rows[~table["border"].to_numpy(bool)[rows]]
    return whole if len(whole) else rows


def is_compact(
    mask: np.ndarray, *, areas: tuple[float, float] = (0.02, 0.12), solidity: float = 0.85
) -> bool:
    """Whether a segment is of middling size and without deep bays, as a whole gland is.

    Parameters
    ----------
    mask : (H, W) bool ndarray
    areas : (float, float)
        Smallest and largest share of the image.
    solidity : float
        Smallest share of its convex hull that it fills.
    """
    if not areas[0] < mask.mean() < areas[1]:
        return False
    return bool(measure.regionprops(mask.astype(np.uint8))[0].solidity > solidity)


def rows_by_image(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Row numbers of each image, images in the order of the table; cost linear in its rows."""
    return dict(table.groupby("image_id", sort=False).indices)


def tidy(segments: Segments) -> Segments:
    """Keep the largest connected part of every segment and fill its holes.

    A mask from a network may come with islands, or miss the lumen of its gland. Islands would be
    pasted along with a segment and spoil its moments; a hole would leave the old lumen in place.
    A hole that is another segment of the image stays open (:data:`HOLE_IOU`): stroma between
    glands must not swallow them.

    Parameters
    ----------
    segments : Segments

    Returns
    -------
    Segments
        In the same order and under the same numbers and labels; area, centroid, box and border
        are measured anew.
    """
    table, rows = segments.table, rows_by_image(segments.table)
    cleaned = {
        image_id: SimpleNamespace(
            masks=_tidied(np.stack([segments.mask(i) for i in at])),
            scores=table["score"].to_numpy()[at],
            superpixel=table["superpixel"].to_numpy()[at],
        )
        for image_id, at in rows.items()
    }
    by_image = collect(segments.images, cleaned)
    given = [rows[i] for i in segments.images["image_id"] if i in rows]
    order = np.argsort(np.concatenate(given)) if given else np.zeros(0, int)
    measured = by_image.table.iloc[order].reset_index(drop=True)
    kept = ["segment_id", *(key for key in _IMAGE_KEYS if key in table)]
    measured[kept] = table[kept]
    return Segments(by_image.images, measured, tuple(by_image.rles[i] for i in order))


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
    with files.replacing(path) as partial:
        partial.write_text(json.dumps(document, sort_keys=True, allow_nan=False), encoding="utf-8")
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
    document = read_json(path, "02")
    missing = {"images", "annotations", "categories"} - set(document)
    if missing:
        raise ValueError(f"{path} is no COCO file: it lacks {sorted(missing)}")
    try:
        return _from_coco(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}): write it again with chapter 02"
        ) from error


def decode(rles: dict | list[dict]) -> np.ndarray:
    """Mask (H, W) of one code, or (H, W, n) of several, bool."""
    with warnings.catch_warnings():  # pycocotools has not followed numpy 2 in one signature
        warnings.simplefilter("ignore", DeprecationWarning)
        return coco.decode(rles).astype(bool)


def read_json(path: Path, chapter: str) -> dict:
    """JSON object of a file that `chapter` has written, or ``ValueError`` if it is damaged."""
    remedy = f"write it again with chapter {chapter}"
    document = files.read_json(path, remedy)
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds no JSON object: {remedy}")
    return document


# --- inner parts ----------------------------------------------------------------------------------


def _image_table(images: pd.DataFrame) -> pd.DataFrame:
    missing = {"image_id", "label", "split", "height", "width"} - set(images)
    if missing:
        raise ValueError(f"the image table lacks the columns {sorted(missing)}")
    images = images.reset_index(drop=True).copy()
    for column in ("patient", "site", "dataset"):
        images[column] = as_text(images[column]) if column in images else ""
    for column in ("image_id", "label", "split"):
        images[column] = as_text(images[column])
    if images["image_id"].duplicated().any():
        twice = images.loc[images["image_id"].duplicated(), "image_id"].tolist()
        raise ValueError(f"image ids must be unique, but {twice[:5]} come twice")
    return images[[*_IMAGE_KEYS, "height", "width"]]


def as_text(column: pd.Series) -> pd.Series:
    """Text of each value, "" where it is missing; 2.0 is "2", as pandas makes floats of holes."""

    def text(value):
        if pd.isna(value):
            return ""
        whole = isinstance(value, float) and value.is_integer()
        return str(int(value) if whole else value)

    return column.map(text).astype(str)


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
            "border": _per_segment(given, "border", lambda: cut_by_border(masks), n).astype(bool),
            "score": _per_segment(given, "scores", lambda: np.ones(n), n).astype(float),
            "superpixel": _per_segment(given, "superpixel", lambda: np.full(n, -1), n).astype(int),
        }
    )
    return part, list(codes)


def _per_segment(given: Any, name: str, default: Callable[[], np.ndarray], n: int) -> np.ndarray:
    value = getattr(given, name, None) if not isinstance(given, np.ndarray) else None
    value = default() if value is None else np.asarray(value)
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
            "centroid": [float(row["cx"]), float(row["cy"])],
            "iscrowd": 0,
            "border": bool(row["border"]),
            "score": float(row["score"]),
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
    by_id = _image_rows(document["images"])
    images = _image_table(pd.DataFrame(by_id.values(), columns=[*_IMAGE_KEYS, "height", "width"]))
    ours = "format" in (document.get("info") or {})
    rows, rles = [], []
    for a in document["annotations"]:
        image = by_id[a["image_id"]]
        rle = _rle(a, image["height"], image["width"])
        area = int(coco.area(rle))
        if not area:
            raise ValueError(f"the mask of annotation {a['id']} is empty: leave it out")
        if ours and area != a["area"]:
            raise ValueError(f"the mask of annotation {a['id']} has not the area it was saved with")
        rles.append(rle)
        label = labels.get(a.get("category_id"), "")
        rows.append(_segment_row(a, image, label, rle, area))
    labelled = dict(zip((r["image_id"] for r in rows), (r["label"] for r in rows), strict=True))
    images["label"] = [
        label or labelled.get(image, "")
        for image, label in zip(images["image_id"], images["label"], strict=True)
    ]
    return Segments(images, pd.DataFrame(rows, columns=list(COLUMNS)), tuple(rles))


def _image_rows(images: Sequence[Mapping[str, Any]]) -> dict[Any, dict]:
    """Rows of the image table by COCO id; other tools name images by their files alone."""
    rows = {}
    for image in images:
        row = {key: "" if image.get(key) is None else str(image[key]) for key in _IMAGE_KEYS}
        rows[image["id"]] = row | {k: int(image[k]) for k in ("height", "width")}
    files = {i["id"]: Path(str(i["file_name"])) for i in images if not rows[i["id"]]["image_id"]}
    twice = len({path.stem for path in files.values()}) < len(files)
    for number, path in files.items():
        name = "__".join(path.with_suffix("").parts) if twice else path.stem
        rows[number]["image_id"] = name
    return rows


def _segment_row(
    a: Mapping[str, Any], image: Mapping[str, Any], label: str, rle: dict, area: int
) -> dict:
    x, y, w, h = (int(v) for v in coco.toBbox(rle))  # other tools round theirs
    if "centroid" in a and "border" in a:
        (cx, cy), cut = a["centroid"], a["border"]
    else:
        mask = decode(rle)
        ys, xs = np.nonzero(mask)
        cx, cy, cut = float(xs.mean()), float(ys.mean()), cut_by_border(mask[None])[0]
    return {
        "segment_id": int(a["id"]),
        "image_id": image["image_id"],
        "label": label,
        **{key: image[key] for key in ("patient", "split", "dataset")},
        "area": area,
        "cx": float(cx),
        "cy": float(cy),
        **dict(zip("xywh", (x, y, w, h), strict=True)),
        "border": bool(cut),
        "score": 1.0 if a.get("score") is None else float(a["score"]),
        "superpixel": int(a.get("superpixel", -1)),
    }


def _rle(a: Mapping[str, Any], height: int, width: int) -> dict:
    """Compressed run-length code of any COCO segmentation."""
    segmentation = a["segmentation"]
    if isinstance(segmentation, Sequence):
        polygons = [p for p in segmentation if len(p) >= 6]  # two points enclose nothing
        if not polygons:
            raise ValueError(f"annotation {a['id']} has no polygon of three points: leave it out")
        return coco.merge(coco.frPyObjects(polygons, height, width))
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(
            f"the mask of annotation {a['id']} has the size {segmentation['size']}, but its image "
            f"[{height}, {width}] (height, width): give it in the pixels of the image"
        )
    if isinstance(segmentation["counts"], list):
        if sum(segmentation["counts"]) != height * width:  # the rest would be read as noise
            raise ValueError(f"the runs of annotation {a['id']} do not add up to its image")
        return coco.frPyObjects(segmentation, height, width)
    return {"size": [height, width], "counts": segmentation["counts"].encode("ascii")}


def _tidied(masks: np.ndarray) -> np.ndarray:
    """Largest part of each mask of an image, without the holes that no other mask fills."""
    area = masks.sum((1, 2))
    tidied = []
    for mask in masks:
        part = _largest_part(mask)
        filled = _filled(part)
        n, holes = cv2.connectedComponents((filled & ~part).astype(np.uint8), connectivity=4)
        for k in range(1, n):
            hole = holes == k
            size = hole.sum()
            like = (area >= HOLE_IOU * size) & (HOLE_IOU * area <= size)  # others cannot reach it
            both = (masks[like] & hole).sum((1, 2))
            if (both >= HOLE_IOU * (area[like] + size - both)).any():
                filled &= ~hole
        tidied.append(filled)
    return np.stack(tidied)


def _largest_part(mask: np.ndarray) -> np.ndarray:
    """Largest connected part (4-neighbours) of a mask."""
    _, parts, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    return parts == 1 + stats[1:, cv2.CC_STAT_AREA].argmax() if len(stats) > 1 else mask


def _filled(part: np.ndarray) -> np.ndarray:
    """A connected mask with all of its holes filled."""
    outlines, _ = cv2.findContours(part.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = part.astype(np.uint8)
    cv2.drawContours(filled, outlines, -1, 1, cv2.FILLED)
    return filled.astype(bool)


def _ascii(counts: bytes | str) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts
