"""Seam of a paste (step 11): where two images meet, and how one fades into the other.

Where the surroundings of a segment come along, its outline need not be the place where its image
ends. The seam may run where both images show nearly the same [kwatra]_: then there is little to
hide. What is left of it fades over a few pixels, and chapter 05 repaints it.

References
----------
.. [kwatra] Kwatra et al., Graphcut textures: image and video synthesis using graph cuts,
   SIGGRAPH 2003.
"""

from __future__ import annotations

import cv2
import numpy as np

__all__ = ["cut_cost", "disc", "fade", "least_cut"]


def least_cut(
    source: np.ndarray,
    target: np.ndarray,
    mask: np.ndarray,
    *,
    outwards: int,
    inwards: int = 0,
    available: np.ndarray | None = None,
) -> np.ndarray:
    r"""Move the outline of a paste to where source and target differ least.

    Of all regions between the mask made smaller by `inwards` and the mask made larger by
    `outwards` pixels, the one is taken whose outline has the least :func:`cut_cost`. It is a
    minimum cut of a graph of pixels, found by OpenCV's maximum flow.

    Parameters
    ----------
    source, target : (h, w, 3) uint8 ndarray
        The two images in one frame.
    mask : (h, w) bool ndarray
        Pixels that the paste would take from the source.
    outwards, inwards : int
        Pixels that the outline may move either way.
    available : (h, w) bool ndarray, optional
        Pixels that the source has; others are never taken.

    Returns
    -------
    (h, w) bool ndarray
        Pixels to take from the source.

    Raises
    ------
    ValueError
        If a distance is negative.
    """
    if outwards < 0 or inwards < 0:
        raise ValueError(f"outwards={outwards}, inwards={inwards}: give 0 or more pixels")
    available = np.ones_like(mask) if available is None else available
    # The border of the frame is no outline: beyond it, everything goes on as it is.
    border = {"borderType": cv2.BORDER_REPLICATE}
    most = cv2.dilate(mask.astype(np.uint8), disc(outwards), **border).astype(bool) & available
    least = cv2.erode(mask.astype(np.uint8), disc(inwards), **border).astype(bool) & available
    if not least.any() or most.all():  # nothing to choose from
        return mask & available
    may = [255 * side.astype(np.uint8) for side in (most, ~least)]
    images = [image.astype(np.float32) for image in (source, target)]
    # Ties to the two ends stronger than any sum of differences, no other penalty.
    finder = cv2.detail_GraphCutSeamFinder("COST_COLOR", 1e9, 0.0)
    cut, _ = finder.find(images, [(0, 0), (0, 0)], may)
    return (cut.get() if isinstance(cut, cv2.UMat) else np.asarray(cut)) > 0


def cut_cost(source: np.ndarray, target: np.ndarray, mask: np.ndarray) -> float:
    r"""What shows of the outline of a mask between two images.

    .. math:: \sum_{(p, q)} \|s_p - t_p\|^2 + \|s_q - t_q\|^2 + 1

    over all pairs of neighbours p, q (above and below, left and right) of which one lies in the
    mask. The constant, a grey level squared, prefers the shorter of two paths without a difference.

    Parameters
    ----------
    source, target : (h, w, 3) uint8 ndarray
    mask : (h, w) bool ndarray
    """
    difference = ((source.astype(float) - target) ** 2).sum(-1)
    across = mask[:, 1:] != mask[:, :-1]
    down = mask[1:] != mask[:-1]
    return float(
        (difference[:, 1:] + difference[:, :-1] + 1)[across].sum()
        + (difference[1:] + difference[:-1] + 1)[down].sum()
    )


def fade(mask: np.ndarray, width: int) -> np.ndarray:
    """Share of the source across the outline of a mask: linear, 1 inside, 0 outside.

    Parameters
    ----------
    mask : (h, w) bool ndarray
    width : int
        Pixels on either side of the outline, 1 or more.

    Returns
    -------
    (h, w, 1) float ndarray
    """
    inside, outside = (
        cv2.distanceTransform(part.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        for part in (mask, ~mask)
    )
    depth = np.where(mask, inside - 0.5, 0.5 - outside)  # the outline lies between two pixels
    share = np.where(inside + outside <= width, 0.5 + depth / (2 * width), mask)
    return share[..., None]


def disc(radius: int) -> np.ndarray:
    """Disc for morphology, (2 radius + 1, 2 radius + 1) uint8 ndarray."""
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1,) * 2)
