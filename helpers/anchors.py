"""Anchors: from many unreliable proposals to one segment a superpixel (steps 4 to 7).

Each superpixel gets K proposals.
A proposal is summarised by its identity vector, the vectors are clustered, and the most frequent
mask of the largest cluster becomes the superpixel's anchor.
Identity vectors and clusters are computed on masks of low resolution; only anchors are scaled up.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.cluster.hierarchy import fcluster
from scipy.cluster.hierarchy import linkage as scipy_linkage
from segment_anything.modeling import Sam
from skimage.segmentation import felzenszwalb, slic

from helpers.sam import Proposals, check_image, embed, propose
from helpers.superpixels import draw_points, superpixels

LINKAGES = ("average", "complete", "single")


def identity_vectors(masks: np.ndarray, original_size: tuple[int, int]) -> np.ndarray:
    r"""Compute identity vectors v = (X, Y, sqrt(CNT)) of masks.

    Parameters
    ----------
    masks : (n, h, w) bool ndarray
        At any resolution, covering the image.
    original_size : (int, int)
        Height and width of the image; the vectors are in its pixels.

    Returns
    -------
    (n, 3) float64 ndarray
        Centroid and square root of the pixel count. Rows of empty masks are NaN.
    """
    masks = np.asarray(masks)
    if masks.ndim != 3 or masks.dtype != bool:
        raise ValueError(
            f"masks have shape {masks.shape} and dtype {masks.dtype}; expected (n, h, w) bool."
        )
    n, h, w = masks.shape
    sy, sx = original_size[0] / h, original_size[1] / w
    rows, columns = masks.sum(2, dtype=np.float64), masks.sum(1, dtype=np.float64)
    count = rows.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        x = (columns @ np.arange(w)) / count
        y = (rows @ np.arange(h)) / count
    x, y = (x + 0.5) * sx - 0.5, (y + 0.5) * sy - 0.5
    vectors = np.stack([x, y, np.sqrt(count * sx * sy)], axis=1)
    vectors[count == 0] = np.nan
    return vectors.reshape(n, 3)


def cluster(
    vectors: np.ndarray, *, distance_threshold: float, linkage: str = "average"
) -> np.ndarray:
    """Cluster identity vectors agglomeratively by L2 distance.

    Parameters
    ----------
    vectors : (n, 3) float ndarray
        Finite.
    distance_threshold : float
        Clusters further apart than this are not merged, in pixels.
    linkage : {"average", "complete", "single"}

    Returns
    -------
    (n,) int64 ndarray
        Cluster labels 0 .. k-1, numbered by first appearance.
    """
    vectors = np.asarray(vectors, dtype=np.float64)
    if linkage not in LINKAGES:
        raise ValueError(f"linkage = {linkage!r} is none of {LINKAGES}.")
    if not distance_threshold > 0:
        raise ValueError(f"distance_threshold = {distance_threshold}; it must be positive.")
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise ValueError(
            f"vectors of shape {vectors.shape} must be (n, 3) and finite; "
            "leave out the rows of empty masks."
        )
    if len(vectors) < 2:
        return np.zeros(len(vectors), np.int64)
    tree = scipy_linkage(vectors, method=linkage)
    raw = fcluster(tree, distance_threshold, criterion="distance")
    _, first, inverse = np.unique(raw, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def iou_matrix(a: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
    """IoU of every mask of `a` with every mask of `b` (default `a`).

    Parameters
    ----------
    a, b : (n, H, W) and (m, H, W) bool ndarray

    Returns
    -------
    (n, m) float64 ndarray
        0 where both masks are empty.
    """
    pixels = int(np.prod(a.shape[1:]))
    x = a.reshape(len(a), pixels).astype(np.float32)
    y = x if b is None else b.reshape(len(b), pixels).astype(np.float32)
    both = (x @ y.T).astype(np.float64)
    either = x.sum(1, dtype=np.float64)[:, None] + y.sum(1, dtype=np.float64) - both
    return both / np.maximum(either, 1)


def anchor_index(
    masks: np.ndarray, iou: np.ndarray, labels: np.ndarray, *, iou_duplicate: float = 0.9
) -> int:
    """Choose the anchor among the proposals of one superpixel.

    The largest cluster wins, ties go to the higher mean predicted IoU. Within it, the mask with
    the most near-duplicates is the anchor; ties go to the medoid, then to the first.

    Parameters
    ----------
    masks : (K, h, w) bool ndarray
    iou : (K,) float ndarray
        Predicted IoU.
    labels : (K,) int ndarray
        Clusters 0 .. k-1.
    iou_duplicate : float
        IoU from which two masks count as the same, in (0, 1].

    Returns
    -------
    int
        Index into `masks`.
    """
    if len(masks) == 0:
        raise ValueError("no proposals to choose an anchor from.")
    if not 0 < iou_duplicate <= 1:
        raise ValueError(f"iou_duplicate = {iou_duplicate}; it must lie in (0, 1].")
    labels, iou = np.asarray(labels), np.asarray(iou, dtype=np.float64)
    size = np.bincount(labels)
    mean = np.bincount(labels, iou) / np.maximum(size, 1)
    winner = max(range(len(size)), key=lambda c: (size[c], round(mean[c], 9), -c))
    members = np.flatnonzero(labels == winner)
    overlap = iou_matrix(masks[members])
    frequent = (overlap >= iou_duplicate).sum(1)
    closeness = np.round(overlap.sum(1), 9)
    best = np.lexsort((-closeness, -frequent))[0]
    return int(members[best])


def deduplicate(masks: np.ndarray, scores: np.ndarray, iou: float) -> np.ndarray:
    """Keep one of each group of overlapping masks, best score first.

    Parameters
    ----------
    masks : (n, H, W) bool ndarray
    scores : (n,) float ndarray
    iou : float
        Masks that overlap a kept one by at least this IoU are dropped.

    Returns
    -------
    (m,) int64 ndarray
        Indices kept, ascending.
    """
    overlap = iou_matrix(masks)
    kept: list[int] = []
    for i in np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable"):
        if not (overlap[i, kept] >= iou).any():
            kept.append(int(i))
    return np.sort(np.array(kept, dtype=np.int64))


@dataclass(frozen=True)
class Segmentation:
    """Segments of one image.

    Attributes
    ----------
    masks : (m, H, W) bool ndarray
    scores : (m,) float64 ndarray
        Predicted IoU of each anchor.
    support : (m,) float64 ndarray
        Share of the superpixel's proposals that lie in the winning cluster.
    superpixel : (m,) int64 ndarray
        Superpixel whose anchor the segment is.
    border : (m,) bool ndarray
        Segment touches the border of the image, so it may be cut.
    n_superpixels : int
    n_dropped : dict of str to int
        Superpixels without a segment, by reason: empty, small, large, duplicate.
    labels : (H, W) int32 ndarray
        Superpixels.
    """

    masks: np.ndarray
    scores: np.ndarray
    support: np.ndarray
    superpixel: np.ndarray
    border: np.ndarray
    n_superpixels: int
    n_dropped: dict[str, int] = field(default_factory=dict)
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.masks)


@dataclass(frozen=True)
class Prompted:
    """Superpixels, prompts and proposals of one image.

    Attributes
    ----------
    labels : (H, W) int32 ndarray
        Superpixels 0 .. n-1.
    points : (n, K, 2) int64 ndarray
        XY of the prompts.
    proposals : Proposals
        n x K masks, superpixel by superpixel.
    """

    labels: np.ndarray
    points: np.ndarray
    proposals: Proposals


def prompt(
    sam: Sam,
    image: np.ndarray,
    *,
    rng: np.random.Generator,
    n_segments: int = 30,
    n_points: int = 15,
    compactness: float = 40.0,
    sigma: float = 2.0,
    points_per_batch: int | None = None,
    mask_choice: str = "best",
) -> Prompted:
    """Superpixels of an image, K random prompts in each, and the masks they propose.

    Parameters
    ----------
    sam : Sam
    image : (H, W, 3) uint8 ndarray
    rng : numpy.random.Generator
        Draws the prompts.
    n_segments, n_points : int
        N_s and K of the paper.
    compactness, sigma : float
        Of :func:`helpers.superpixels.superpixels`.
    points_per_batch, mask_choice
        Of :func:`helpers.sam.propose`.

    Returns
    -------
    Prompted
    """
    image = check_image(image)
    labels = superpixels(image, n_segments, compactness=compactness, sigma=sigma)
    points = draw_points(labels, n_points, rng=rng)
    proposals = propose(
        sam,
        embed(sam, image),
        points.reshape(-1, 2),
        points_per_batch=points_per_batch,
        mask_choice=mask_choice,
    )
    return Prompted(labels, points, proposals)


def choose_anchors(
    proposals: Proposals,
    n_superpixels: int,
    *,
    distance_threshold: float = 0.1,
    linkage: str = "average",
    iou_duplicate: float = 0.9,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose the anchor of every superpixel from its K consecutive proposals.

    Parameters
    ----------
    proposals : Proposals
        n_superpixels x K proposals, superpixel by superpixel.
    n_superpixels : int
    distance_threshold : float
        Relative to the image side s = sqrt(H W).
    linkage, iou_duplicate
        As in :func:`cluster` and :func:`anchor_index`.

    Returns
    -------
    index : (n_superpixels,) int64 ndarray
        Index into `proposals`, -1 where all proposals are empty.
    support : (n_superpixels,) float64 ndarray
        Share of the proposals in the winning cluster.
    """
    masks = proposals.masks()
    k = len(masks) // n_superpixels
    vectors = identity_vectors(masks, proposals.original_size)
    side = float(np.sqrt(np.prod(proposals.original_size)))
    index = np.full(n_superpixels, -1, np.int64)
    support = np.zeros(n_superpixels)
    for i in range(n_superpixels):
        rows = np.arange(i * k, (i + 1) * k)
        rows = rows[np.isfinite(vectors[rows, 0])]
        if not len(rows):
            continue
        labels = cluster(
            vectors[rows], distance_threshold=distance_threshold * side, linkage=linkage
        )
        best = anchor_index(masks[rows], proposals.iou[rows], labels, iou_duplicate=iou_duplicate)
        index[i] = rows[best]
        support[i] = (labels == labels[best]).sum() / k
    return index, support


def anchors(
    prompted: Prompted,
    *,
    distance_threshold: float = 0.1,
    linkage: str = "average",
    iou_duplicate: float = 0.9,
    iou_merge: float = 0.7,
    min_area: float = 0.002,
    max_area: float = 0.9,
    clustered: bool = True,
) -> Segmentation:
    """Turn proposals into segments: an anchor a superpixel, sizes checked, duplicates removed.

    Parameters
    ----------
    prompted : Prompted
    distance_threshold : float
        Clustering threshold, relative to the image side.
    linkage, iou_duplicate
        Of :func:`cluster` and :func:`anchor_index`.
    iou_merge : float
        Anchors that overlap by at least this IoU are one segment.
    min_area, max_area : float
        Segments outside these shares of the image are dropped and counted.
    clustered : bool
        False takes the first proposal of each superpixel instead of its anchor: what a single
        random prompt would give, for comparison.

    Returns
    -------
    Segmentation

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """
    if not 0 <= min_area < max_area <= 1:
        raise ValueError(
            f"min_area = {min_area} and max_area = {max_area}; need 0 <= min < max <= 1."
        )
    if not 0 < iou_merge <= 1:
        raise ValueError(f"iou_merge = {iou_merge}; it must lie in (0, 1].")
    n, k = prompted.points.shape[:2]
    if clustered:
        index, support = choose_anchors(
            prompted.proposals,
            n,
            distance_threshold=distance_threshold,
            linkage=linkage,
            iou_duplicate=iou_duplicate,
        )
    else:
        filled = prompted.proposals.masks()[::k].any((1, 2))
        index, support = np.where(filled, np.arange(n) * k, -1), np.full(n, 1 / k)
    return _finish(prompted, index, support, iou_merge, min_area, max_area)


def segment(sam: Sam, image: np.ndarray, *, rng: np.random.Generator, **settings) -> Segmentation:
    """Segment an image without annotation: superpixels, prompts, proposals, anchors.

    Parameters
    ----------
    sam : Sam
    image : (H, W, 3) uint8 ndarray
    rng : numpy.random.Generator
        Draws the prompts.
    **settings
        Of :func:`prompt` (n_segments, n_points, compactness, sigma, points_per_batch, mask_choice)
        and :func:`anchors` (distance_threshold, linkage, iou_duplicate, iou_merge, min_area,
        max_area).

    Returns
    -------
    Segmentation

    Raises
    ------
    TypeError
        If a setting is unknown.
    ValueError
        If the image or a setting is out of range.
    """
    known = prompt.__kwdefaults__
    first = {key: value for key, value in settings.items() if key in known}
    second = {key: value for key, value in settings.items() if key not in known}
    unknown = set(second) - set(anchors.__kwdefaults__)
    if unknown:
        raise TypeError(
            f"segment() has no setting {sorted(unknown)}; "
            f"known are {sorted({*known, *anchors.__kwdefaults__})}."
        )
    return anchors(prompt(sam, image, rng=rng, **first), **second)


def _finish(prompted, index, support, iou_merge, min_area, max_area) -> Segmentation:
    """Scale the anchors up; drop the empty, small, large and duplicate ones, and count them."""
    proposals = prompted.proposals
    found = np.flatnonzero(index >= 0)
    masks = np.array([proposals.full(index[i]) for i in found], bool)
    masks = masks.reshape(-1, *proposals.original_size)
    area = masks.mean((1, 2))
    small, large = area < max(min_area, 1 / max(1, masks[:1].size)), area > max_area
    dropped = {
        "empty": int((index < 0).sum()),
        "small": int(small.sum()),
        "large": int(large.sum()),
    }
    found, masks = found[~small & ~large], masks[~small & ~large]
    scores = proposals.iou[index[found]].astype(np.float64)
    kept = deduplicate(masks, scores, iou_merge)
    dropped["duplicate"] = len(found) - len(kept)
    masks, found = masks[kept], found[kept]
    return Segmentation(
        masks=masks,
        scores=scores[kept],
        support=support[found],
        superpixel=found,
        border=touches_border(masks),
        n_superpixels=len(index),
        n_dropped=dropped,
        labels=prompted.labels,
    )


def touches_border(masks: np.ndarray) -> np.ndarray:
    """(n,) bool ndarray: which of the (n, H, W) masks reach the first or last row or column."""
    edge = masks[:, [0, -1]].any((1, 2)) | masks[:, :, [0, -1]].any((1, 2))
    return edge.astype(bool)


def segmentation_map(masks: np.ndarray) -> np.ndarray:
    """Paint masks into one map, large ones first.

    Parameters
    ----------
    masks : (m, H, W) bool ndarray

    Returns
    -------
    (H, W) int32 ndarray
        0 = none; i + 1 = mask i.
    """
    painted = np.zeros(masks.shape[1:], np.int32)
    for i in np.argsort(-masks.sum((1, 2)), kind="stable"):
        painted[masks[i]] = i + 1
    return painted


def match_glands(
    masks: np.ndarray, instances: np.ndarray, *, min_area: float = 0.0
) -> dict[str, float]:
    """Compare segments with annotated glands.

    Parameters
    ----------
    masks : (m, H, W) bool ndarray
    instances : (H, W) int ndarray
        Gland instances, 0 = none.
    min_area : float
        Instances below this share of the image are left out.

    Returns
    -------
    dict
        ``mean_best_iou``: mean over glands of the best IoU of any segment (NaN without glands);
        ``recall_50``: share of glands with a best IoU of at least 0.5;
        ``coverage``: share of the image under any segment;
        ``n``: glands; ``n_segments``: segments.
    """
    masks, instances = np.asarray(masks), np.asarray(instances)
    if masks.shape[1:] != instances.shape:
        raise ValueError(f"masks are {masks.shape[1:]}, instances {instances.shape}; must agree.")
    best = best_iou(masks, instances, min_area=min_area)
    return {
        "mean_best_iou": float(best.mean()) if len(best) else float("nan"),
        "recall_50": float((best >= 0.5).mean()) if len(best) else float("nan"),
        "coverage": float(masks.any(0).mean()) if len(masks) else 0.0,
        "n": len(best),
        "n_segments": len(masks),
    }


def best_iou(masks: np.ndarray, instances: np.ndarray, *, min_area: float = 0.0) -> np.ndarray:
    """(g,) float64 ndarray: for each gland of `instances`, the best IoU of any of `masks`."""
    ids, areas = np.unique(instances[instances > 0], return_counts=True)
    ids, areas = ids[areas >= min_area * instances.size], areas[areas >= min_area * instances.size]
    if not len(ids) or not len(masks):
        return np.zeros(len(ids))
    table = np.zeros(int(instances.max()) + 1, np.int64)
    table[ids] = np.arange(1, len(ids) + 1)
    glands = table[instances]
    best = np.zeros(len(ids))
    for mask in masks:
        both = np.bincount(glands[mask], minlength=len(ids) + 1)[1:]
        best = np.maximum(best, both / (areas + mask.sum() - both))
    return best


def slic_baseline(image: np.ndarray, n: int, *, compactness: float = 10.0) -> np.ndarray:
    """Segments by SLIC alone, about `n` of them.

    The number asked is adjusted until the number returned is nearest to `n`.

    Returns
    -------
    (m, H, W) bool ndarray
    """

    def attempt(ask: float) -> np.ndarray:
        return slic(
            check_image(image),
            max(1, round(ask)),
            compactness=compactness,
            sigma=2.0,
            start_label=0,
        )

    return _nearest_count(attempt, n, start=n, rising=True)


def felzenszwalb_baseline(image: np.ndarray, n: int) -> np.ndarray:
    """Segments by the graph method of Felzenszwalb and Huttenlocher, about `n` of them.

    The scale is adjusted until the number returned is nearest to `n`.

    Returns
    -------
    (m, H, W) bool ndarray
    """
    min_size = max(20, round(0.001 * image.shape[0] * image.shape[1]))

    def attempt(scale: float) -> np.ndarray:
        return felzenszwalb(check_image(image), scale=scale, sigma=1.0, min_size=min_size)

    return _nearest_count(attempt, n, start=300.0, rising=False)


def _nearest_count(attempt, n, *, start, rising, rounds=6):
    """Search the parameter whose segmentation has the number of segments nearest to `n`."""
    if n < 1:
        raise ValueError(f"n = {n}; a baseline needs at least one segment.")
    low, high, value, best = None, None, float(start), None
    for _ in range(rounds):
        labels = attempt(value)
        count = int(labels.max()) + 1
        if best is None or abs(count - n) < abs(int(best.max()) + 1 - n):
            best = labels
        if count == n:
            break
        if (count < n) == rising:
            low = value
        else:
            high = value
        value = (
            value * 2 if high is None else value / 2 if low is None else float(np.sqrt(low * high))
        )
    ids = np.unique(best)
    return best[None] == ids[:, None, None]
