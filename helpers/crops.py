"""Crops: windows of an image in layers, each layer finer than the one before.

A network that sees a whole image at once has few pixels for a small structure.
Segment Anything's own automatic generator therefore asks again on crops, which the network sees
enlarged; the boxes here are its boxes.
Layer 0 is the whole image, layer l has 4^l overlapping crops.
Each superpixel of a layer is asked in one crop only, that whose middle is nearest.
"""

from __future__ import annotations

import numpy as np
import torch
from segment_anything.utils.amg import generate_crop_boxes
from torch.nn import functional as F

Box = tuple[int, int, int, int]  # x0, y0, x1, y1; the last two are outside

#: Overlap of neighbouring crops of layer 1, as a share of the image's short side; half as much in
#: each further layer. The default of ``SamAutomaticMaskGenerator``.
OVERLAP = 512 / 1500


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
    nearest, least = np.zeros(labels.shape, np.int64), np.full(labels.shape, np.inf)
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        square = (2 * x + 1 - x0 - x1) ** 2 + (2 * y + 1 - y0 - y1) ** 2
        nearest[square < least] = i
        least = np.minimum(least, square)
    n = int(labels.max()) + 1
    votes = np.bincount((labels * len(boxes) + nearest).ravel(), minlength=n * len(boxes))
    owner = votes.reshape(n, -1).argmax(1)
    parts = []
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        new = np.where(owner == i, np.cumsum(owner == i) - 1, -1).astype(np.int32)
        parts.append(new[labels[y0:y1, x0:x1]])
    return parts


def inner_edges(box: Box, size: tuple[int, int]) -> tuple[bool, bool, bool, bool]:
    """Whether the left, top, right and bottom edge of a box lie inside the image."""
    x0, y0, x1, y1 = box
    return x0 > 0, y0 > 0, x1 < size[1], y1 < size[0]


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
