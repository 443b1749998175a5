"""Seam of a paste (step 11): where two images meet, and how one fades into the other.

Where the surroundings of a segment come along, its outline need not be the place where its image
ends. The seam may run where both images show nearly the same [kwatra]_: then there is little to
hide. What is left of it fades over a few pixels without losing contrast [burt]_, and chapter 05
repaints it.

References
----------
.. [kwatra] Kwatra et al., Graphcut textures: image and video synthesis using graph cuts,
   SIGGRAPH 2003.
.. [burt] Burt and Adelson, A multiresolution spline with application to image mosaics, ACM
   Transactions on Graphics, 1983.
"""

from __future__ import annotations

import cv2
import numpy as np

#: Blending ends at this many times its width: what is left there is about a grey level.
BLEND_REACH = 3


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


def blend(source: np.ndarray, target: np.ndarray, mask: np.ndarray, width: float) -> np.ndarray:
    r"""Put the source into the mask without an edge, and without losing contrast along it.

    The weighted mean of two textures has less contrast than either, which gives a faded outline
    away. So only what is coarse fades, and what is fine changes from one pixel to the next
    [burt]_, here in two bands of full size. With G a Gaussian and M the mask,

    .. math::
        G\bigl[(GM)\,(Gs) + (1 - GM)\,(Gt)\bigr] +
        \begin{cases} s - GGs & \text{inside} \\ t - GGt & \text{outside.} \end{cases}

    Parameters
    ----------
    source, target : (h, w, 3) uint8 ndarray
        The two images in one frame.
    mask : (h, w) bool ndarray
        Where the source shows.
    width : float
        Standard deviation of the Gaussian, pixels.

    Returns
    -------
    (h, w, 3) uint8 ndarray
        Where both images are the same, they come back as they are.
    """

    def smooth(x: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(x, (0, 0), width)

    s, t, share = (np.float32(x) for x in (source, target, mask))
    share, coarse_s, coarse_t = smooth(share)[..., None], smooth(s), smooth(t)
    coarse = smooth(share * coarse_s + (1 - share) * coarse_t)
    fine = np.where(mask[..., None], s - smooth(coarse_s), t - smooth(coarse_t))
    return (coarse + fine).round().clip(0, 255).astype(np.uint8)


def near_outline(mask: np.ndarray, distance: float) -> np.ndarray:
    """Pixels at most so far from one that lies on the other side of the outline of a mask.

    Parameters
    ----------
    mask : (h, w) bool ndarray
    distance : float
        Pixels.

    Returns
    -------
    (h, w) bool ndarray
    """
    away = sum(
        cv2.distanceTransform(side.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        for side in (mask, ~mask)
    )
    return away <= distance


def disc(radius: int) -> np.ndarray:
    """Disc for morphology, (2 radius + 1, 2 radius + 1) uint8 ndarray."""
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1,) * 2)
