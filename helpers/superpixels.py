"""Superpixels and the random prompts drawn inside them (steps 1 and 2 of the method)."""

from __future__ import annotations

import warnings

import numpy as np
from skimage.segmentation import slic
from skimage.util import regular_grid

from helpers.images import check_image

#: Returned and asked numbers of superpixels may differ by this factor before a warning.
TOLERANCE = 1.5


class SuperpixelWarning(UserWarning):
    """The number of superpixels is far from the number asked."""


def superpixels(
    image: np.ndarray,
    n_segments: int = 48,
    *,
    compactness: float = 40.0,
    sigma: float = 2.0,
) -> np.ndarray:
    """Cut an image into superpixels with SLIC (Achanta et al. 2012).

    Parameters
    ----------
    image : (H, W, 3) uint8 ndarray
    n_segments : int
        Number asked, N_s = 30 in the paper. The number returned differs a little: SLIC starts from
        a regular grid and merges what gets too small. SLIC is asked a second time with a corrected
        number, if that gives another grid, and the result nearer to `n_segments` is kept.
    compactness : float
        Weight of spatial distance against colour distance. scikit-image's default of 10 lets
        colour decide: on stained tissue the superpixels then follow single nuclei, fall to
        pieces, and are merged until far fewer than N_s are left.
    sigma : float
        Gaussian smoothing before the clustering, in pixels.

    Returns
    -------
    (H, W) int32 ndarray
        Labels 0 .. n-1.

    Raises
    ------
    ValueError
        If an argument is out of range.

    Warns
    -----
    SuperpixelWarning
        If the number returned is more than 1.5 times away from the number asked.
    """
    image = check_image(image)
    if n_segments < 1:
        raise ValueError(f"n_segments = {n_segments}; ask for at least 1 superpixel.")
    if n_segments > most_superpixels(image.shape[:2]):
        raise ValueError(
            f"n_segments = {n_segments} leaves fewer than 16 pixels each in an image of "
            f"{image.shape[0]} x {image.shape[1]}; ask for fewer or use a larger image."
        )
    if not compactness > 0:
        raise ValueError(f"compactness = {compactness}; it must be positive (try 40).")
    if not sigma >= 0:
        raise ValueError(f"sigma = {sigma}; it must not be negative (try 2).")
    if n_segments == 1:
        return np.zeros(image.shape[:2], np.int32)
    labels = slic_labels(image, n_segments, compactness, sigma)
    n = int(labels.max()) + 1
    other_way = max(1, round(n_segments**2 / n))
    if _seeds(image, other_way) != _seeds(image, n_segments):
        again = slic_labels(image, other_way, compactness, sigma)
        if abs(int(again.max()) + 1 - n_segments) < abs(n - n_segments):
            labels, n = again, int(again.max()) + 1
    if not n_segments / TOLERANCE <= n <= n_segments * TOLERANCE:
        warnings.warn(
            f"SLIC returned {n} superpixels for n_segments = {n_segments}. "
            f"Raise compactness (now {compactness}) or sigma (now {sigma}) to come closer.",
            SuperpixelWarning,
            stacklevel=2,
        )
    return labels


def most_superpixels(size: tuple[int, int]) -> int:
    """Superpixels that an image of this height and width has room for, 16 pixels each."""
    return size[0] * size[1] // 16


def slic_labels(image: np.ndarray, n: int, compactness: float, sigma: float) -> np.ndarray:
    """(H, W) int32 ndarray: labels 0 .. m-1 of SLIC asked for `n` superpixels."""
    labels = slic(image, n, compactness=compactness, sigma=sigma, start_label=0, channel_axis=-1)
    _, labels = np.unique(labels, return_inverse=True)
    return labels.reshape(image.shape[:2]).astype(np.int32)


def _seeds(image: np.ndarray, n: int) -> tuple[slice, ...]:
    """Grid on which SLIC starts; all that it takes from the number asked."""
    return regular_grid((1, *image.shape[:2]), n)


def draw_points(labels: np.ndarray, n_points: int = 3, *, rng: np.random.Generator) -> np.ndarray:
    """Draw K random pixels inside each superpixel.

    Parameters
    ----------
    labels : (H, W) int ndarray
        Labels 0 .. n-1, each present; nothing is drawn where they are -1.
    n_points : int
        K = 15 in the paper. Without replacement where the superpixel has that many pixels.
    rng : numpy.random.Generator

    Returns
    -------
    (n, K, 2) int64 ndarray
        XY pixel coordinates.

    Raises
    ------
    ValueError
        If `n_points` is below 1 or a label is missing.
    """
    labels = np.asarray(labels)
    if n_points < 1:
        raise ValueError(f"n_points = {n_points}; draw at least 1 point in each superpixel.")
    if labels.ndim != 2 or labels.min() < -1:
        raise ValueError(f"labels must be (H, W) with values -1 .. n-1, got shape {labels.shape}.")
    count = np.bincount(labels.ravel() + 1)
    none, count = count[0], count[1:]
    if (count == 0).any():
        raise ValueError(f"labels have gaps: no pixel carries {np.flatnonzero(count == 0)[:5]}.")
    order = np.argsort(labels.ravel(), kind="stable")
    starts = none + np.concatenate([[0], np.cumsum(count)])
    points = np.empty((len(count), n_points, 2), np.int64)
    for i, n in enumerate(count):
        pick = rng.choice(n, n_points, replace=bool(n < n_points))
        y, x = np.divmod(order[starts[i] + pick], labels.shape[1])
        points[i, :, 0], points[i, :, 1] = x, y
    return points
