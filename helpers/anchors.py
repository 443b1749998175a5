"""Anchors: from many unreliable proposals to one segment a superpixel (steps 4 to 7).

Each superpixel gets K proposals, in the whole image and, in finer layers, in crops of it.
A proposal is summarised by its identity vector, the vectors are clustered, and the most frequent
mask of the largest cluster becomes the superpixel's anchor: one for each choice among the masks of
a prompt.
Identity vectors and clusters are computed on masks of low resolution; only anchors are scaled up.
Whatever touches pixels runs where the masks are, on a GPU too; only small tables come back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.cluster.hierarchy import fcluster
from scipy.cluster.hierarchy import linkage as scipy_linkage
from segment_anything.modeling import Sam

from helpers.crops import Box, crop_boxes, explained, resample, share_out, without
from helpers.files import read_json, replacing
from helpers.images import MIN_SIDE, check_image
from helpers.processes import in_threads
from helpers.sam import Embedding, Proposals, embed, propose
from helpers.segment_table import Segments, cut_by_border, join, load_coco, save_coco
from helpers.superpixels import draw_points, most_superpixels, superpixels

LINKAGES = ("average", "complete", "single")

#: Pixels of masks compared at once, on a CPU few enough for its cache, and elsewhere.
_PIXELS_IN_CACHE, _PIXELS_AT_ONCE = 2**18, 2**27


def identity_vectors(
    masks: np.ndarray | torch.Tensor, original_size: tuple[int, int]
) -> np.ndarray:
    r"""Compute identity vectors v = (X, Y, sqrt(CNT)) of masks.

    Parameters
    ----------
    masks : (n, h, w) bool ndarray or Tensor
        At any resolution, covering the image.
    original_size : (int, int)
        Height and width of the image; the vectors are in its pixels.

    Returns
    -------
    (n, 3) float64 ndarray
        Centroid and square root of the pixel count. Rows of empty masks are NaN.
    """
    masks = _tensor(masks)
    if masks.ndim != 3 or masks.dtype != torch.bool:
        raise ValueError(
            f"masks have shape {tuple(masks.shape)} and dtype {masks.dtype}; "
            "expected (n, h, w) bool."
        )
    n, h, w = masks.shape
    sy, sx = original_size[0] / h, original_size[1] / w
    ones = masks.float()
    rows, columns = (ones.sum(axis).cpu().numpy().astype(np.float64) for axis in (2, 1))
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
    if len(vectors) < 2 or np.linalg.norm(np.ptp(vectors, axis=0)) <= distance_threshold:
        return np.zeros(len(vectors), np.int64)  # no two are further apart: one, by any linkage
    tree = scipy_linkage(vectors, method=linkage)
    raw = fcluster(tree, distance_threshold, criterion="distance")
    _, first, inverse = np.unique(raw, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def iou_matrix(
    a: np.ndarray | torch.Tensor, b: np.ndarray | torch.Tensor | None = None
) -> np.ndarray:
    """IoU of every mask of `a` with every mask of `b` (default `a`).

    Parameters
    ----------
    a, b : (..., n, H, W) and (..., m, H, W) bool ndarray or Tensor
        Leading axes are gone through side by side.

    Returns
    -------
    (..., n, m) float64 ndarray
        0 where both masks are empty.
    """
    x = _tensor(a).flatten(-2).float()
    y = x if b is None else _tensor(b).flatten(-2).float()
    counts = (x @ y.mT, x.sum(-1), y.sum(-1))  # whole numbers, exact in single precision
    both, count_x, count_y = (count.cpu().double() for count in counts)
    either = count_x[..., :, None] + count_y[..., None, :] - both
    return (both / either.clamp(min=1)).numpy()


def _tensor(masks: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Masks as a tensor where they are; arrays are copied, as torch takes no flipped ones."""
    return (
        masks if isinstance(masks, torch.Tensor) else torch.from_numpy(np.array(masks, order="C"))
    )


def anchor_index(
    overlap: np.ndarray, iou: np.ndarray, labels: np.ndarray, *, iou_duplicate: float = 0.9
) -> int:
    """Choose the anchor among the proposals of one superpixel.

    The largest cluster wins, ties go to the higher mean predicted IoU. Within it, the mask with
    the most near-duplicates is the anchor; ties go to the medoid, then to the first.

    Parameters
    ----------
    overlap : (K, K) float ndarray
        :func:`iou_matrix` of the proposals.
    iou : (K,) float ndarray
        Predicted IoU.
    labels : (K,) int ndarray
        Clusters 0 .. k-1.
    iou_duplicate : float
        IoU from which two masks count as the same, in (0, 1].

    Returns
    -------
    int
        Which of the K proposals.
    """
    if len(overlap) == 0:
        raise ValueError("no proposals to choose an anchor from.")
    if not 0 < iou_duplicate <= 1:
        raise ValueError(f"iou_duplicate = {iou_duplicate}; it must lie in (0, 1].")
    labels, iou = np.asarray(labels), np.asarray(iou, dtype=np.float64)
    size = np.bincount(labels)
    mean = np.bincount(labels, iou) / np.maximum(size, 1)
    winner = max(range(len(size)), key=lambda c: (size[c], round(mean[c], 9), -c))
    members = np.flatnonzero(labels == winner)
    within = overlap[np.ix_(members, members)]
    frequent = (within >= iou_duplicate).sum(1)
    closeness = np.round(within.sum(1), 9)
    best = np.lexsort((-closeness, -frequent))[0]
    return int(members[best])


def settled(
    overlap: np.ndarray,
    iou: np.ndarray,
    labels: np.ndarray,
    remaining: int,
    *,
    iou_duplicate: float = 0.9,
) -> bool:
    r"""Whether the anchor of a superpixel can no longer be overtaken by prompts still to come.

    Two conditions, for `remaining` prompts that have not been decoded:

    1. The largest cluster is larger than the second by more than `remaining`.
    2. The anchor a has more near-duplicates, itself counted, than `remaining` plus the most that
       any mask unlike it could have by now.

    Why that is enough: 1 - IoU is a metric (Jaccard distance). Let tau be `iou_duplicate`. A mask
    that shares a near-duplicate with a has an IoU of at least 1 - 2 (1 - tau) with a, 0.8 for
    tau = 0.9. One that shares none draws its near-duplicates from the other masks, and any two of
    them have an IoU of at least 1 - 2 (1 - tau) with each other, which bounds how many it can have.

    So as long as the clusters found so far only gain members, the anchor of all prompts has an
    IoU of at least 1 - 2 (1 - tau) with this one, and is the same mask where masks are equal or
    far apart. Agglomerative clustering can re-arrange clusters when points are added; how often
    that changes an anchor is measured in chapter 02.

    Parameters
    ----------
    overlap, iou, labels, iou_duplicate
        Of the proposals so far, as in :func:`anchor_index`.
    remaining : int
        Prompts of the superpixel that are not decoded yet.

    Returns
    -------
    bool
    """
    if remaining < 1:
        return True
    if not len(overlap):
        return False
    size = np.sort(np.append(np.bincount(labels), 0))
    if size[-1] <= size[-2] + remaining:
        return False
    anchor = anchor_index(overlap, iou, labels, iou_duplicate=iou_duplicate)
    members = np.flatnonzero(np.asarray(labels) == labels[anchor])
    near = overlap[anchor, members] >= iou_duplicate
    others = members[~near]
    related = overlap[np.ix_(others, others)] >= 1 - 2 * (1 - iou_duplicate)
    return bool(near.sum() > related.sum(1).max(initial=0) + remaining)


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
    superpixel : (m,) int64 ndarray
        Superpixel whose anchor the segment is, counted through all crops.
    layer : (m,) int64 ndarray
        Layer of crops in which it was found; 0 is the whole image.
    border : (m,) bool ndarray
        Segment is cut by the border of the image, see
        :func:`helpers.segment_table.cut_by_border`.
    n_superpixels : int
        Asked, in all layers.
    n_dropped : dict of str to int
        Anchors that are no segment, by reason: empty (or cut by every crop asked), unsure, small,
        large, duplicate. There is one for each superpixel and choice of mask.
    """

    masks: np.ndarray
    scores: np.ndarray
    superpixel: np.ndarray
    layer: np.ndarray
    border: np.ndarray
    n_superpixels: int
    n_dropped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.masks)

    @property
    def counts(self) -> dict[str, int]:
        """Segments, superpixels, anchors, segments cut by the border, and what was dropped."""
        return {
            "segments": len(self),
            "superpixels": self.n_superpixels,
            "anchors": len(self) + sum(self.n_dropped.values()),
            "cut by border": int(self.border.sum()),
            **self.n_dropped,
        }


@dataclass(frozen=True)
class Prompted:
    """Superpixels, prompts and proposals of one image, or of one crop of it.

    Attributes
    ----------
    labels : (h, w) int32 ndarray
        Superpixels 0 .. n-1; -1 where another crop asks, or nothing has to be asked again.
    points : (n, K, 2) int64 ndarray
        XY of the prompts in the crop.
    proposals : Proposals
        C x n x K masks of the crop: for each choice of mask, superpixel by superpixel; empty where
        a prompt was not decoded or the crop cuts the mask.
    asked : (n, K) bool ndarray
        Which prompts were decoded: all of them without early stopping.
    box : (int, int, int, int)
        The crop in the image, (x0, y0, x1, y1).
    size : (int, int)
        Height and width of the image.
    layer : int
        Layer of the crop; 0 is the whole image.
    """

    labels: np.ndarray
    points: np.ndarray
    proposals: Proposals
    asked: np.ndarray
    box: Box
    size: tuple[int, int]
    layer: int = 0

    def full(self, i: int) -> np.ndarray:
        """(H, W) bool ndarray: mask `i` at the size and place that it has in the image."""
        x0, y0, x1, y1 = self.box
        mask = np.zeros(self.size, bool)
        mask[y0:y1, x0:x1] = self.proposals.full(i)
        return mask

    def probability(self, i: int) -> torch.Tensor:
        """(H, W) float tensor: how sure the network is of each pixel of mask `i`, 0 to 1."""
        x0, y0, x1, y1 = self.box
        found = self.proposals.padded.new_zeros(self.size, dtype=torch.float32)
        found[y0:y1, x0:x1] = self.proposals.scaled(i).sigmoid()
        return found


def prompt(
    sam: Sam,
    image: np.ndarray,
    *,
    rng: np.random.Generator,
    n_segments: int = 48,
    n_points: int = 3,
    crop_n_layers: int = 2,
    explained_iou: float = 0.7,
    compactness: float = 40.0,
    sigma: float = 2.0,
    points_per_batch: int | None = None,
    mask_choice: str | Sequence[str] = ("middle", "largest", "best"),
    dtype: torch.dtype | None = None,
    early_stop: bool = False,
    distance_threshold: float = 0.1,
    linkage: str = "average",
    iou_duplicate: float = 0.9,
) -> list[Prompted]:
    """Superpixels of an image, K random prompts in each, and the masks they propose.

    Parameters
    ----------
    sam : Sam
    image : (H, W, 3) uint8 ndarray
    rng : numpy.random.Generator
        Draws the prompts, all of them, with and without early stopping; those of the whole image
        first.
    n_segments, n_points : int
        N_s and K of the paper. Each layer of crops has twice the superpixels of the one before.
    crop_n_layers : int
        Layers of crops beside the whole image, as in ``SamAutomaticMaskGenerator``; 0 in the
        paper. Layer l has 4**l crops, and each takes the encoder once.
    explained_iou : float
        Anchors of coarser layers with a predicted IoU above this explain the superpixels inside
        them, if those of every choice of mask do: a crop that cuts such anchors does not ask these
        superpixels again, see :func:`helpers.crops.explained`. 1 asks all.
    compactness, sigma : float
        Of :func:`helpers.superpixels.superpixels`.
    points_per_batch, mask_choice, dtype
        Of :func:`helpers.sam.propose`. Each choice of mask has an anchor in each superpixel; one
        choice alone is that of the paper.
    early_stop : bool
        Decode the prompts in rounds, and leave a superpixel alone once it is :func:`settled`.
    distance_threshold, linkage, iou_duplicate
        Of :func:`choose_anchors`; used by early stopping and for what is explained.

    Returns
    -------
    list of Prompted
        The whole image first, then crop by crop. Crops that have no superpixel to ask are left out.

    Raises
    ------
    ValueError
        If a setting is out of range, or the image too small for so many superpixels or layers.
    """
    image = check_image(image)
    size = image.shape[:2]
    how = {"points_per_batch": points_per_batch, "mask_choice": mask_choice, "dtype": dtype}
    clustering = {
        "distance_threshold": distance_threshold,
        "linkage": linkage,
        "iou_duplicate": iou_duplicate,
    }
    if not 0 <= explained_iou <= 1:
        raise ValueError(f"explained_iou = {explained_iou}; it must lie in [0, 1].")
    where = {"compactness": compactness, "sigma": sigma, "crop_n_layers": crop_n_layers}
    prompted, at, sure = [], 0, []
    for layer, box, labels, points in draw_prompts(image, n_segments, n_points, rng=rng, **where):
        if layer > at:
            at, found = layer, _candidates(prompted, **clustering)
            good = (found["index"] >= 0) & (found["iou"] > explained_iou)
            which = np.arange(found["choice"].max() + 1)
            sure = [found["masks"][good & (found["choice"] == c)] for c in which]
        if layer and all(map(len, sure)):
            spared = np.all([explained(labels, box, size, masks) for masks in sure], axis=0)
            labels, points = without(labels, spared), points[~spared]
            if not len(points):
                continue
        embedding = embed(sam, image, box=box, dtype=dtype)
        if early_stop:
            proposals, asked = ask_in_rounds(sam, embedding, points, how=how, **clustering)
        else:
            proposals = propose(sam, embedding, points.reshape(-1, 2), **how)
            asked = np.ones(points.shape[:2], bool)
        prompted.append(Prompted(labels, points, proposals, asked, box, size, layer))
    return prompted


def draw_prompts(
    image: np.ndarray,
    n_segments: int,
    n_points: int,
    *,
    rng: np.random.Generator,
    crop_n_layers: int = 2,
    compactness: float = 40.0,
    sigma: float = 2.0,
) -> Iterator[tuple[int, Box, np.ndarray, np.ndarray]]:
    """Superpixels and prompts of an image and its crops, crop by crop; settings of :func:`prompt`.

    Yields
    ------
    layer : int
    box : (int, int, int, int)
    labels : (h, w) int32 ndarray
    points : (n, K, 2) int64 ndarray
        As in :class:`Prompted`; n > 0.
    """
    size = image.shape[:2]
    finest = n_segments * 2 ** max(crop_n_layers, 0)
    if crop_n_layers and finest > most_superpixels(size):
        raise ValueError(
            f"crop_n_layers = {crop_n_layers} with n_segments = {n_segments} asks for "
            f"{finest} superpixels, fewer than 16 pixels each in an image "
            f"of {size[0]} x {size[1]}; lower either, or use a larger image."
        )
    layers = crop_boxes(size, crop_n_layers)
    shortest = min(side for x0, y0, x1, y1 in layers[-1] for side in (x1 - x0, y1 - y0))
    if shortest < MIN_SIDE:
        raise ValueError(
            f"crop_n_layers = {crop_n_layers} cuts an image of {size[0]} x {size[1]} into crops "
            f"of {shortest} pixels, too small to see; ask for fewer layers."
        )
    for layer, boxes in enumerate(layers):
        whole = superpixels(image, n_segments * 2**layer, compactness=compactness, sigma=sigma)
        for box, labels in zip(boxes, share_out(whole, boxes), strict=True):
            points = draw_points(labels, n_points, rng=rng)
            if len(points):
                yield layer, box, labels, points


def ask_in_rounds(
    sam: Sam,
    embedding: Embedding,
    points: np.ndarray,
    *,
    distance_threshold: float = 0.1,
    linkage: str = "average",
    iou_duplicate: float = 0.9,
    step: int = 2,
    how: dict | None = None,
) -> tuple[Proposals, np.ndarray]:
    """Decode prompts in rounds over all superpixels that are not :func:`settled`.

    The first round asks just over half of the K prompts of every superpixel, since fewer can
    never settle it; each further one asks `step` more where the anchor is still open.

    Parameters
    ----------
    sam : Sam
    embedding : Embedding
    points : (n, K, 2) int ndarray
        XY of the prompts, decoded in this order.
    distance_threshold, linkage, iou_duplicate
        Of :func:`choose_anchors`.
    step : int
        Prompts of a further round in one superpixel.
    how : dict, optional
        Settings of :func:`helpers.sam.propose`.

    Returns
    -------
    proposals : Proposals
        n x K, empty where a prompt was not decoded.
    asked : (n, K) bool ndarray
    """
    n, k = points.shape[:2]
    side = float(np.sqrt(np.prod(embedding.original_size)))
    asked, unsettled = np.zeros((n, k), bool), np.arange(n)
    padded, masks, iou, at = None, None, None, 0
    for stop in [*range(k // 2 + 1, k, step), k]:
        part = propose(sam, embedding, points[unsettled, at:stop].reshape(-1, 2), **(how or {}))
        of_round = (-1, len(unsettled), stop - at)  # for each choice of mask
        logits, scores = part.padded.unflatten(0, of_round), part.iou.reshape(of_round)
        if padded is None:
            padded = logits.new_full((len(logits), n, k, *logits.shape[3:]), -1.0)
            iou = np.zeros((len(logits), n, k), np.float32)
        asked[unsettled, at:stop] = True
        padded[:, unsettled, at:stop], iou[:, unsettled, at:stop] = logits, scores
        if stop == k:  # nothing remains to be spared
            break
        new = (part.logits > 0).unflatten(0, of_round)
        masks = new if masks is None else torch.cat([masks, new], dim=2)
        vectors, overlap = _compare(masks.flatten(0, 1), embedding.original_size)
        done = np.array(
            [
                _is_settled(
                    vectors[j], overlap[j], predicted, k - stop,
                    distance_threshold * side, linkage, iou_duplicate,
                )
                for j, predicted in enumerate(iou[:, unsettled, :stop].reshape(-1, stop))
            ]
        )  # fmt: skip
        still_open = ~done.reshape(masks.shape[:2]).all(0)
        masks, unsettled, at = masks[:, still_open], unsettled[still_open], stop
        if not len(unsettled):
            break
    return replace(part, padded=padded.flatten(0, 2), iou=iou.ravel()), asked


def _is_settled(vectors, overlap, iou, remaining, threshold, linkage, iou_duplicate) -> bool:
    filled, labels, among = _cluster_filled(vectors, overlap, threshold, linkage)
    return settled(among, iou[filled], labels, remaining, iou_duplicate=iou_duplicate)


def _cluster_filled(vectors, overlap, threshold, linkage):
    """Which proposals of a superpixel are not empty, their clusters, and IoU with each other."""
    filled = np.flatnonzero(np.isfinite(vectors[:, 0]))
    labels = cluster(vectors[filled], distance_threshold=threshold, linkage=linkage)
    return filled, labels, overlap[np.ix_(filled, filled)]


def _compare(masks: torch.Tensor, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Identity vectors (n, K, 3) of masks (n, K, h, w), and IoU (n, K, K) within each of the n."""
    most = _PIXELS_IN_CACHE if masks.device.type == "cpu" else _PIXELS_AT_ONCE
    parts = masks.split(max(1, most // masks[0].numel()))
    vectors = [identity_vectors(part.flatten(0, 1), size) for part in parts]
    overlap = [iou_matrix(part) for part in parts]
    return np.concatenate(vectors).reshape(*masks.shape[:2], 3), np.concatenate(overlap)


def n_asked(prompted: Sequence[Prompted]) -> int:
    """Number of prompts that were decoded, in all crops."""
    return sum(int(crop.asked.sum()) for crop in prompted)


def take(
    prompted: Sequence[Prompted], columns: slice = slice(None), choices: slice = slice(None)
) -> list[Prompted]:
    """Part of the prompts of every superpixel, e.g. ``slice(5)`` for the first five.

    Prompts are drawn in random order without replacement, so the first few of many are a random
    draw of few: one run with many prompts serves to study smaller K. `choices` takes part of the
    choices of mask, in the order in which they were asked for.
    """
    parts = []
    for crop in prompted:
        proposals, (n, k) = crop.proposals, crop.points.shape[:2]
        rows = np.arange(len(proposals)).reshape(-1, n, k)[choices, :, columns].ravel()
        part = replace(proposals, padded=proposals.padded[rows], iou=proposals.iou[rows])
        points, asked = crop.points[:, columns], crop.asked[:, columns]
        parts.append(replace(crop, points=points, proposals=part, asked=asked))
    return parts


def choose_anchors(
    proposals: Proposals,
    n: int,
    *,
    distance_threshold: float = 0.1,
    linkage: str = "average",
    iou_duplicate: float = 0.9,
) -> np.ndarray:
    """Choose an anchor from every K consecutive proposals.

    Parameters
    ----------
    proposals : Proposals
        n x K proposals, superpixel by superpixel.
    n : int
        Superpixels; with C choices of mask C times as many.
    distance_threshold : float
        Relative to the image side s = sqrt(H W).
    linkage, iou_duplicate
        As in :func:`cluster` and :func:`anchor_index`.

    Returns
    -------
    (n,) int64 ndarray
        Index into `proposals`, -1 where all K proposals are empty.
    """
    masks = (proposals.logits > 0).unflatten(0, (n, -1))
    k = masks.shape[1]
    vectors, overlap = _compare(masks, proposals.original_size)
    scores = proposals.iou.reshape(n, k)
    threshold = distance_threshold * float(np.sqrt(np.prod(proposals.original_size)))
    index = np.full(n, -1, np.int64)
    for i in range(n):
        filled, labels, among = _cluster_filled(vectors[i], overlap[i], threshold, linkage)
        if not len(filled):
            continue
        best = anchor_index(among, scores[i, filled], labels, iou_duplicate=iou_duplicate)
        index[i] = i * k + filled[best]
    return index


def repeated(prompted: Sequence[Prompted], **clustering: Any) -> tuple[np.ndarray, np.ndarray]:
    """How two runs with other random prompts agree: by one prompt and by the anchor.

    The first K and the last K of 2K prompts play the two runs, superpixel by superpixel.

    Parameters
    ----------
    prompted : sequence of Prompted
        With 2K prompts in each superpixel.
    **clustering
        Of :func:`choose_anchors`.

    Returns
    -------
    answered : (C n, 2, 2) bool ndarray
        Whether superpixel, way (its first prompt, its anchor) and run have a mask that is not
        empty, for each choice of mask.
    iou : (C n, 2) float64 ndarray
        Of the masks of the two runs, by superpixel and way; 0 where both are empty.
    """
    answered, overlap = [], []
    for crop in prompted:
        k = crop.points.shape[1] // 2
        halves = (take([crop], part)[0] for part in (slice(k), slice(k, 2 * k)))
        one, two = (_both_ways(half, **clustering) for half in halves)
        answered.append(np.stack([one.any((-2, -1)), two.any((-2, -1))], axis=-1))
        overlap.append(iou_matrix(one[:, :, None], two[:, :, None])[..., 0, 0])
    return np.concatenate(answered), np.concatenate(overlap)


def _both_ways(crop: Prompted, **clustering: Any) -> np.ndarray:
    """Masks (C n, 2, h, w) of a crop's superpixels: of the first prompt and of the anchor."""
    masks, k = crop.proposals.masks(), crop.points.shape[1]
    index = choose_anchors(crop.proposals, len(masks) // k, **clustering)
    chosen = masks[index]
    chosen[index < 0] = False
    return np.stack([masks[::k], chosen], axis=1)


def anchors(
    prompted: Sequence[Prompted],
    *,
    distance_threshold: float = 0.1,
    linkage: str = "average",
    iou_duplicate: float = 0.9,
    pred_iou_thresh: float = 0.35,
    iou_merge: float = 0.5,
    iou_vote: float = 0.7,
    min_area: float = 0.002,
    max_area: float = 0.9,
) -> Segmentation:
    """Turn proposals into segments: anchors of superpixels, checked, duplicates made one.

    Parameters
    ----------
    prompted : sequence of Prompted
        The whole image first, then its crops, if any, as :func:`prompt` gives them.
    distance_threshold : float
        Clustering threshold, relative to the side of the image, or of the crop.
    linkage, iou_duplicate
        Of :func:`cluster` and :func:`anchor_index`.
    pred_iou_thresh : float
        Anchors of a lower predicted IoU are dropped and counted, as in
        ``SamAutomaticMaskGenerator``; 0 in the paper.
    iou_merge : float
        Anchors that overlap by at least this IoU are one segment, the one of highest predicted
        IoU.
    iou_vote : float
        The outline of a segment is where the mean probability of all anchors that overlap it by at
        least this IoU is one half, its own among them. At 1 only equal ones have a say.
    min_area, max_area : float
        Segments outside these shares of the image are dropped and counted.

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
    for name, value in {"iou_merge": iou_merge, "iou_vote": iou_vote}.items():
        if not 0 < value <= 1:
            raise ValueError(f"{name} = {value}; it must lie in (0, 1].")
    if not 0 <= pred_iou_thresh <= 1:
        raise ValueError(f"pred_iou_thresh = {pred_iou_thresh}; it must lie in [0, 1].")
    found = _candidates(
        prompted,
        distance_threshold=distance_threshold,
        linkage=linkage,
        iou_duplicate=iou_duplicate,
    )
    index, area, iou = found["index"], found["area"], found["iou"]
    keep = index >= 0
    dropped = {"empty": int((~keep).sum())}
    for reason, bad in {
        "unsure": iou < pred_iou_thresh, "small": area < min_area, "large": area > max_area,
    }.items():  # fmt: skip
        dropped[reason] = int((keep & bad).sum())
        keep &= ~bad
    rows = np.flatnonzero(keep)
    low = found["masks"][rows]
    kept = deduplicate(low, iou[rows], iou_merge)
    dropped["duplicate"] = len(rows) - len(kept)
    agree = iou_matrix(low[kept], low) >= iou_vote
    masks = [_voted([(prompted[found["crop"][i]], index[i]) for i in rows[a]]) for a in agree]
    masks, rows = np.array(masks, bool).reshape(-1, *prompted[0].size), rows[kept]
    filled = masks.any((1, 2))  # a speck may vanish where the image is smaller than its masks
    dropped["small"] += int((~filled).sum())
    masks, rows = masks[filled], rows[filled]
    return Segmentation(
        masks=masks,
        scores=iou[rows],
        superpixel=found["superpixel"][rows],
        layer=np.array([prompted[i].layer for i in found["crop"][rows]], np.int64),
        border=cut_by_border(masks),
        n_superpixels=sum(len(crop.points) for crop in prompted),
        n_dropped=dropped,
    )


def _voted(anchors: Sequence[tuple[Prompted, int]]) -> np.ndarray:
    """Where the mean probability of anchors, each a crop and its proposal, is above one half."""
    if len(anchors) == 1:
        crop, i = anchors[0]
        return crop.full(i)
    total = sum(crop.probability(i) for crop, i in anchors)
    return (total > len(anchors) / 2).cpu().numpy()


def _candidates(prompted: Sequence[Prompted], **clustering) -> dict[str, np.ndarray]:
    """Anchors of all crops, a row for each superpixel and choice of mask, to judge and compare.

    Masks are those of low resolution, on the raster of the whole image. Rows without an anchor
    have an index of -1 and an empty mask.
    """
    raster = prompted[0].proposals.logits.shape[-2:]
    parts, before = [], 0
    for number, crop in enumerate(prompted):
        (m, k), (x0, y0, x1, y1) = crop.points.shape[:2], crop.box
        n = len(crop.proposals) // k
        index = choose_anchors(crop.proposals, n, **clustering)
        logits = crop.proposals.logits[index]
        logits[index < 0] = -1.0
        share = (x1 - x0) * (y1 - y0) / (crop.size[0] * crop.size[1])
        parts.append(
            {
                "crop": np.full(n, number),
                "superpixel": before + np.arange(n) % m,
                "choice": np.arange(n) // m,
                "index": index,
                "iou": crop.proposals.iou[index].astype(np.float64),
                "area": (logits > 0).float().mean((1, 2)).cpu().numpy() * share,
                "masks": resample(logits, crop.box, crop.size, raster).cpu().numpy(),
            }
        )
        before += m
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def segment(sam: Sam, image: np.ndarray, *, rng: np.random.Generator, **settings) -> Segmentation:
    """Segment an image without annotation: superpixels, prompts, proposals, anchors.

    Parameters
    ----------
    sam : Sam
    image : (H, W, 3) uint8 ndarray
    rng : numpy.random.Generator
        Draws the prompts.
    **settings
        Of :func:`prompt` (n_segments, n_points, crop_n_layers, explained_iou, compactness, sigma,
        points_per_batch, mask_choice, dtype, early_stop) and :func:`anchors` (distance_threshold,
        linkage, iou_duplicate, pred_iou_thresh, iou_merge, iou_vote, min_area, max_area).

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
    of_prompt, of_anchors = set(prompt.__kwdefaults__), set(anchors.__kwdefaults__)
    if unknown := set(settings) - of_prompt - of_anchors:
        raise TypeError(
            f"segment() has no setting {sorted(unknown)}; "
            f"known are {sorted(of_prompt | of_anchors)}."
        )
    first = {key: value for key, value in settings.items() if key in of_prompt}
    second = {key: value for key, value in settings.items() if key in of_anchors}
    return anchors(prompt(sam, image, rng=rng, **first), **second)


def segment_all(
    work: Callable[[Any], tuple[Segmentation, Any]],
    images: pd.DataFrame,
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
) -> tuple[Segments, list[Any]]:
    """Segment many images, and go on where a run that was stopped left off.

    Below `folder`, ``<image_id>.json`` holds the segments of an image as COCO JSON and
    ``rows/<image_id>.json`` what else is kept of it, written last: an image that has the second
    file is not segmented again.

    Parameters
    ----------
    work : callable
        Row of `images`, a Series, to the segments of the image and what else is to be kept of it,
        as JSON can hold it.
    images : DataFrame
        One row an image, as for :func:`helpers.segment_table.collect`.
    folder : str or Path
        Where the files lie. It has to be emptied when `work` changes.
    device : str or torch.device
        Where `work` runs its network; a CPU works on several images at once.

    Returns
    -------
    segments : Segments
        Of all images, in their order.
    kept : list
        What else is kept of each.
    """

    def file(row: int) -> None:
        image_id = images["image_id"].iloc[row]
        found, rest = work(images.iloc[row])
        save_coco(folder / f"{image_id}.json", images.iloc[[row]], {image_id: found})
        with replacing(folder / "rows" / f"{image_id}.json") as path:
            path.write_text(json.dumps(rest), encoding="utf-8")

    folder = Path(folder)
    rows = [folder / "rows" / f"{image_id}.json" for image_id in images["image_id"]]
    for _ in in_threads(file, [i for i, path in enumerate(rows) if not path.exists()], device):
        pass
    parts = [load_coco(folder / f"{image_id}.json") for image_id in images["image_id"]]
    return join(parts), [read_json(path) for path in rows]


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


def mean_match(matches: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average :func:`match_glands` over images.

    Parameters
    ----------
    matches : sequence of mapping
        One an image, not empty.

    Returns
    -------
    dict
        The same keys. ``mean_best_iou`` and ``recall_50`` weigh every gland the same (NaN without
        glands), ``coverage`` and ``n_segments`` every image; ``n`` is the sum.
    """
    n = np.array([match["n"] for match in matches])
    judged = [match for match in matches if match["n"]]  # without glands both are NaN
    mean = {
        key: float(np.average([match[key] for match in judged], weights=n[n > 0]))
        if judged
        else float("nan")
        for key in ("mean_best_iou", "recall_50")
    }
    mean |= {
        key: float(np.mean([match[key] for match in matches])) for key in ("coverage", "n_segments")
    }
    return {**mean, "n": int(n.sum())}


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
