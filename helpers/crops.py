"""Crops: windows of an image in layers, each layer finer than the one before.

A network that sees a whole image at once has few pixels for a small structure.
Segment Anything's own automatic generator therefore asks again on crops, which the network sees
enlarged; the boxes here are its boxes.
Layer 0 is the whole image, layer l has 4^l overlapping crops.
Each superpixel of a layer is asked in one crop only, that whose middle is nearest; where a segment
too large for the crop has explained it already, it is not asked again.
"""

from __future__ import annotations

import numpy as np
import torch
from segment_anything.utils.amg import generate_crop_boxes
from torch.nn import functional as F

from helpers.images import MIN_SIDE

Box = tuple[int, int, int, int]  # x0, y0, x1, y1; the last two are outside

#: Overlap of neighbouring crops of layer 1, as a share of the image's short side; half as much in
#: each further layer. The default of ``SamAutomaticMaskGenerator``.
OVERLAP = 512 / 1500
#: Share of a superpixel that has to lie in a segment for the segment to explain it.
EXPLAINED_SHARE = 0.95


def crop_boxes(size: tuple[int, int], n_layers: int) -> list[list[Box]]:
    """Boxes of the whole image and of `n_layers` layers of crops.

    Parameters
    ----------
    size : (int, int)
        Height and width of the image.
    n_layers : int
        0 for the whole image alone.

    Returns
    -------
    list of list of (int, int, int, int)
        One list a layer, with 4**layer boxes (x0, y0, x1, y1).
    """
    if n_layers < 0:
        raise ValueError(f"n_layers = {n_layers}; 0 is the whole image alone.")
    boxes, layers = generate_crop_boxes(size, n_layers, OVERLAP)
    return [
        [tuple(box) for box, at in zip(boxes, layers, strict=True) if at == layer]
        for layer in range(n_layers + 1)
    ]


def centred(x: int, y: int, size: tuple[int, int], zoom: float) -> Box:
    """Box of an image's shape around a pixel, which lies as near its middle as the image allows.

    Parameters
    ----------
    x, y : int
        Column and row of the pixel.
    size : (int, int)
        Height and width of the image.
    zoom : float
        How many times longer the sides of the image are; 1 is the whole image.

    Returns
    -------
    (int, int, int, int)

    Raises
    ------
    ValueError
        If `zoom` is below 1, or leaves hardly a pixel.
    """
    if not zoom >= 1:
        raise ValueError(f"zoom = {zoom}; 1 is the whole image, more a part of it.")
    height, width = (round(side / zoom) for side in size)
    if min(height, width) < MIN_SIDE:
        raise ValueError(
            f"zoom = {zoom} leaves {height} x {width} pixels of an image of {size[0]} x {size[1]}, "
            "too few to see; ask for less."
        )
    x0 = min(max(int(x) - width // 2, 0), size[1] - width)
    y0 = min(max(int(y) - height // 2, 0), size[0] - height)
    return x0, y0, x0 + width, y0 + height


def nearest(boxes: list[Box], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which box has its middle nearest to each pixel; the first of several.

    Parameters
    ----------
    boxes : list of (int, int, int, int)
        One layer of :func:`crop_boxes`.
    x, y : int ndarray
        Columns and rows of the pixels; they are broadcast.

    Returns
    -------
    int64 ndarray
    """
    shape = np.broadcast_shapes(np.shape(x), np.shape(y))
    found, least = np.zeros(shape, np.int64), np.full(shape, np.inf)
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        square = (2 * x + 1 - x0 - x1) ** 2 + (2 * y + 1 - y0 - y1) ** 2
        found[square < least] = i
        least = np.minimum(least, square)
    return found


def share_out(labels: np.ndarray, boxes: list[Box]) -> list[np.ndarray]:
    """Share the superpixels of an image out to the crops of a layer.

    A pixel belongs to the crop whose middle is nearest, a superpixel to the crop that most of its
    pixels belong to.

    Parameters
    ----------
    labels : (H, W) int ndarray
        Superpixels 0 .. n-1.
    boxes : list of (int, int, int, int)
        One layer of :func:`crop_boxes`.

    Returns
    -------
    list of (h, w) int32 ndarray
        The part of `labels` inside each box, its own superpixels numbered anew from 0 in their
        order, -1 where another crop asks.
    """
    y, x = np.ogrid[: labels.shape[0], : labels.shape[1]]
    n = int(labels.max()) + 1
    pairs = labels * len(boxes) + nearest(boxes, x, y)
    votes = np.bincount(pairs.ravel(), minlength=n * len(boxes))
    owner = votes.reshape(n, -1).argmax(1)
    parts = []
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        new = np.where(owner == i, np.cumsum(owner == i) - 1, -1).astype(np.int32)
        parts.append(new[labels[y0:y1, x0:x1]])
    return parts


def explained(labels: np.ndarray, box: Box, size: tuple[int, int], masks: np.ndarray) -> np.ndarray:
    """Which superpixels of a crop lie in a segment that the crop cuts.

    Asked again, they would most often give that segment, which comes back empty from the crop, or
    a part of it.

    Parameters
    ----------
    labels : (h, w) int ndarray
        Superpixels of the crop, of :func:`share_out`.
    box : (int, int, int, int)
        Of the crop.
    size : (int, int)
        Height and width of the image.
    masks : (m, rows, columns) bool ndarray
        Segments found on coarser layers, at any resolution, covering the whole image.

    Returns
    -------
    (n,) bool ndarray
    """
    x0, y0, x1, y1 = box
    n = int(labels.max()) + 1
    middles = [
        (np.arange(k) + 0.5) * side / k for k, side in zip(masks.shape[1:], size, strict=True)
    ]
    rows, columns = (
        slice(*np.searchsorted(at, (low, high)))
        for at, low, high in zip(middles, (y0, x0), (y1, x1), strict=True)
    )
    windows = masks[:, rows, columns]
    if 0 in windows.shape[1:]:  # a strip so thin that no cell has its middle here
        return np.zeros(n, bool)
    here = labels[middles[0][rows].astype(int) - y0][:, middles[1][columns].astype(int) - x0]
    cut = reaches(windows, inner_edges(box, size))
    cells = (here.ravel()[:, None] == np.arange(n)).astype(np.float32)
    covered = windows[cut].reshape(-1, here.size).astype(np.float32) @ cells
    return (covered >= EXPLAINED_SHARE * np.maximum(cells.sum(0), 1)).any(0)


def without(labels: np.ndarray, drop: np.ndarray) -> np.ndarray:
    """Superpixels 0 .. n-1 without those that the (n,) bool ndarray `drop` marks, numbered anew."""
    new = np.where(drop, -1, np.cumsum(~drop) - 1).astype(labels.dtype)
    return np.where(labels < 0, -1, new[labels])


def inner_edges(box: Box, size: tuple[int, int]) -> tuple[bool, bool, bool, bool]:
    """Whether the left, top, right and bottom edge of a box lie inside the image."""
    x0, y0, x1, y1 = box
    return x0 > 0, y0 > 0, x1 < size[1], y1 < size[0]


def reaches(masks: np.ndarray | torch.Tensor, edges: tuple[bool, bool, bool, bool]):
    """Which of (n, h, w) bool masks reach one of the edges marked: left, top, right, bottom."""
    lines = masks[:, :, 0], masks[:, 0], masks[:, :, -1], masks[:, -1]
    found = masks[:, 0, 0] & False
    for line, marked in zip(lines, edges, strict=True):
        if marked:
            found = found | line.any(1)
    return found


def resample(
    logits: torch.Tensor, box: Box, size: tuple[int, int], shape: tuple[int, int]
) -> torch.Tensor:
    """Masks of a crop on a raster that covers the whole image.

    Parameters
    ----------
    logits : (n, h, w) float tensor
        At any resolution, covering the crop.
    box : (int, int, int, int)
        Of the crop.
    size : (int, int)
        Height and width of the image.
    shape : (int, int)
        Rows and columns of the raster.

    Returns
    -------
    (n, rows, columns) bool tensor
        False outside the crop.
    """
    x0, y0, x1, y1 = box
    at = [
        ((torch.arange(n, device=logits.device) + 0.5) * (side / n) - low) / (high - low) * 2 - 1
        for n, side, low, high in zip(shape, size, (y0, x0), (y1, x1), strict=True)
    ]
    inside = (at[0].abs() < 1)[:, None] & (at[1].abs() < 1)
    grid = torch.stack(torch.meshgrid(*at, indexing="ij")[::-1], dim=-1).to(logits.dtype)
    sampled = F.grid_sample(
        logits[None], grid[None], mode="bilinear", padding_mode="border", align_corners=False
    )[0]
    return (sampled > 0) & inside
