"""Seam of a paste (step 11): where two images meet, and how one fades into the other.

Where the surroundings of a segment come along, its outline need not be the place where its image
ends. The seam may run where both images show nearly the same [kwatra]_: then there is little to
hide. What is left of it fades over a few pixels without losing contrast [heitz]_, and chapter 05
repaints it.

References
----------
.. [kwatra] Kwatra et al., Graphcut textures: image and video synthesis using graph cuts,
   SIGGRAPH 2003.
.. [heitz] Heitz and Neyret, High-performance by-example noise using a histogram-preserving
   blending operator, Proceedings of the ACM on Computer Graphics and Interactive Techniques, 2018.
"""

from __future__ import annotations

import cv2
import numpy as np

__all__ = ["FADE_REACH", "blend", "cut_cost", "disc", "fade", "least_cut"]

#: A fade ends at this many times its width: what is left there is less than a grey level.
FADE_REACH = 3


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


def fade(mask: np.ndarray, width: float) -> np.ndarray:
    r"""Share of the source across the outline of a mask, from 1 inside to 0 outside.

    .. math:: w = \tfrac{1}{2} (1 + \tanh(d / \text{width}))

    with d the distance from the outline, positive inside. Beyond :data:`FADE_REACH` widths, one
    image is all there is.

    Parameters
    ----------
    mask : (h, w) bool ndarray
    width : float
        Pixels, above 0; at this distance the share is 0.88 inside, 0.12 outside.

    Returns
    -------
    (h, w, 1) float ndarray
    """
    inside, outside = (
        cv2.distanceTransform(part.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        for part in (mask, ~mask)
    )
    depth = np.where(mask, inside - 0.5, 0.5 - outside)  # the outline lies between two pixels
    near = inside + outside <= FADE_REACH * width
    return np.where(near, 0.5 + 0.5 * np.tanh(depth / width), mask)[..., None]


def blend(
    source: np.ndarray, target: np.ndarray, share: np.ndarray, *, sigma: float = 1.0
) -> np.ndarray:
    r"""Mix two images without losing contrast on the way from one to the other.

    The mean of two textures that know nothing of each other has less contrast than either, which
    gives a faded outline away. So each image is split into what a Gaussian passes, L, and the
    detail H that it takes away, and the mixture of details is brought back to their contrast
    [heitz]_,

    .. math::
        w L_s + (1 - w) L_t
        + \frac{w H_s + (1 - w) H_t}{\sqrt{w^2 + (1 - w)^2 + 2 w (1 - w) \rho}}.

    :math:`\rho \ge 0` is the correlation of both details around the pixel: 1 where both images
    are the same, which leaves them as they are, 0 where they are independent, as in [heitz]_.

    Parameters
    ----------
    source, target : (h, w, 3) ndarray
        Grey levels of 0 to 255.
    share : (h, w, 1) float ndarray
        w, in [0, 1].
    sigma : float
        Standard deviation of the Gaussian, pixels; the correlation is measured over twice as many.

    Returns
    -------
    (h, w, 3) uint8 ndarray
    """

    def smooth(x: np.ndarray, scale: float = 1.0) -> np.ndarray:
        return cv2.GaussianBlur(x, (0, 0), scale * sigma)

    s, t = (np.asarray(image, np.float32) for image in (source, target))
    coarse_s, coarse_t = smooth(s), smooth(t)
    s, t = s - coarse_s, t - coarse_t
    common, power_s, power_t = (smooth((a * b).mean(-1), 2) for a, b in ((s, t), (s, s), (t, t)))
    rho = np.maximum(common, 0) / np.sqrt(np.maximum(power_s * power_t, 1e-3))
    w, rest = share, 1 - share
    contrast = np.sqrt(w**2 + rest**2 + 2 * w * rest * rho[..., None])
    mixed = w * coarse_s + rest * coarse_t + (w * s + rest * t) / contrast
    return mixed.round().clip(0, 255).astype(np.uint8)


def disc(radius: int) -> np.ndarray:
    """Disc for morphology, (2 radius + 1, 2 radius + 1) uint8 ndarray."""
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1,) * 2)
