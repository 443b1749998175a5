"""Stain of histological images (step 11): measure it, and give one image the stain of another.

Linear optimal transport of optical density is the default, and two classical methods serve beside
it, all measured on tissue only. A match is limited where it would do harm: contrast is changed at
most twofold, an image that shows a single stain is refused by Macenko's method, pale tissue is
changed in proportion to its stain, and glass keeps its colour.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from scipy.spatial import KDTree

#: Ways to match stains.
METHODS = ("transport", "reinhard", "macenko", "none")

#: Smallest angle between two stain vectors, degrees; below it they are taken for one stain.
#: Haematoxylin and eosin were found 13 to 37 degrees apart, on synthetic and on real tissue.
MIN_ANGLE = 8.0
#: Largest change of contrast by a match, and its inverse the smallest.
MAX_GAIN = 2.0
_TISSUE = 0.15  # mean optical density above which a pixel is tissue
_MIN_TISSUE = 64  # pixels
_FULL = 0.5  # share of the mean optical density from which transport shifts a pixel in full

#: What a method measures of an image: (mean, covariance) of optical density, (mean, std) in CIELAB,
#: or (stain vectors, strengths).
Stain = tuple[np.ndarray, np.ndarray]


def tissue_mask(image: np.ndarray, *, threshold: float = 0.15) -> np.ndarray:
    """Pixels that carry stain: mean optical density above `threshold`.

    Parameters
    ----------
    image : (H, W, 3) uint8 ndarray
    threshold : float
        Mean optical density (natural logarithm) of the three channels; glass has nearly 0.

    Returns
    -------
    (H, W) bool ndarray
    """
    return _mean_density(image) > threshold


def match_stain(
    source: np.ndarray,
    reference: np.ndarray,
    *,
    method: str = "transport",
    mask: np.ndarray | None = None,
    reference_mask: np.ndarray | None = None,
) -> np.ndarray:
    """Give an image the stain of another one.

    Parameters
    ----------
    source, reference : (h, w, 3) and (H, W, 3) uint8 ndarray
    method : {"transport", "reinhard", "macenko", "none"}
        ``transport`` gives the optical density the mean and the covariance of the reference, by
        the linear map that moves the colours least [pitie]_: dyes mix linearly there, and the
        covariance knows how their colours go together;
        ``reinhard`` equalises mean and standard deviation of each CIELAB channel [reinhard]_.
        Both shift pale pixels in proportion to their optical density (below half its mean, and
        below its mean), or else pale tissue takes on the colour that is added to the dark;
        ``macenko`` estimates the two stain vectors of each image, and gives the source the vectors
        and the 99th percentile concentrations of the reference [macenko]_. What the two stains do
        not explain is kept, so that an image matched to itself comes back.
    mask, reference_mask : bool ndarray, optional
        Pixels that the colours are measured on; by default the tissue (:func:`tissue_mask`).

    Returns
    -------
    (h, w, 3) uint8 ndarray
        Unstained pixels (glass, empty lumen) keep their colour, with a gradual change between.

    Raises
    ------
    ValueError
        If the method is unknown, or an image has too little tissue to measure its stain.

    References
    ----------
    .. [pitie] Pitie and Kokaram, The linear Monge-Kantorovitch linear colour mapping for
       example-based colour transfer, CVMP 2007 (there in colour spaces, here in optical density).
    .. [reinhard] Reinhard et al., Color transfer between images, 2001 (there in l-alpha-beta).
    .. [macenko] Macenko et al., A method for normalizing histology slides, ISBI 2009.
    """
    if method == "none":
        return source.copy()
    theirs = measure_stain(source, method=method, mask=mask)
    ours = measure_stain(reference, method=method, mask=reference_mask)
    return apply_stain(source, theirs, ours, method=method)


def measure_stain(
    image: np.ndarray, *, method: str = "transport", mask: np.ndarray | None = None
) -> Stain:
    """Measure what :func:`apply_stain` needs to know of an image, once for many matches.

    Parameters
    ----------
    image : (H, W, 3) uint8 ndarray
    method : {"transport", "reinhard", "macenko"}
    mask : (H, W) bool ndarray, optional
        Pixels to measure on, by default the tissue.

    Returns
    -------
    (ndarray, ndarray)
        :func:`density_moments`, :func:`reinhard_statistics` or :func:`macenko_stains`.

    Raises
    ------
    ValueError
        If the method is unknown or the image has too little tissue.
    """
    return _method(method)[0](image, mask=mask)


def apply_stain(
    image: np.ndarray, source: Stain, reference: Stain, *, method: str = "transport"
) -> np.ndarray:
    """Carry an image from one measured stain to another.

    Parameters
    ----------
    image : (h, w, 3) uint8 ndarray
        All or part of the image that `source` was measured on.
    source, reference : pair of ndarray
        From :func:`measure_stain`, by the same method.
    method : {"transport", "reinhard", "macenko"}

    Returns
    -------
    (h, w, 3) uint8 ndarray
        Full effect on tissue, none on glass, and a ramp between so that no edge appears.
    """
    matched = _method(method)[1](image, source, reference)
    density = _mean_density(image)[..., None]
    weight = np.clip((density - _TISSUE / 3) / (_TISSUE - _TISSUE / 3), 0, 1)
    return np.clip(np.rint(image + weight * (matched - image)), 0, 255).astype(np.uint8)


def colour_gap(
    image: np.ndarray,
    mask: np.ndarray,
    other: np.ndarray,
    other_mask: np.ndarray,
    *,
    sigma: float = 2.0,
    n: int = 4000,
) -> float:
    """How foreign the colours of a region are to another: mean distance to the nearest there.

    Regions need not show the same structures: a colour counts as known wherever the other region
    has it, so that a gland may be compared with stroma and glands around it.

    Parameters
    ----------
    image, other : (H, W, 3) uint8 ndarray
    mask, other_mask : (H, W) bool ndarray
        Regions; unstained pixels in them are left out.
    sigma : float
        Of the Gaussian that smooths colours before they are compared, pixels.
    n : int
        Pixels of each region that are compared at most, evenly spaced.

    Returns
    -------
    float
        CIELAB units; not a number where a region has no tissue.
    """
    colours = []
    for picture, region in ((image, mask), (other, other_mask)):
        lab = cv2.GaussianBlur(_lab(picture), (0, 0), sigma)[region & tissue_mask(picture)]
        if not len(lab):
            return float("nan")
        colours.append(lab[:: -(-len(lab) // n)])
    return float(KDTree(colours[1]).query(colours[0])[0].mean())


def density_moments(
    image: np.ndarray, *, mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the optical density of the tissue of an image.

    Parameters
    ----------
    image : (H, W, 3) uint8 ndarray
    mask : (H, W) bool ndarray, optional
        Pixels to look at, by default the tissue.

    Returns
    -------
    mean : (3,) float64 ndarray
    covariance : (3, 3) float64 ndarray

    Raises
    ------
    ValueError
        If there is too little tissue.
    """
    density = _density(image)[_measured(image, mask)].astype(np.float64)
    return density.mean(axis=0), np.cov(density, rowvar=False)


def macenko_stains(
    image: np.ndarray, *, mask: np.ndarray | None = None, percentile: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Stain vectors and strengths of an image by Macenko's method.

    Parameters
    ----------
    image : (H, W, 3) uint8 ndarray
    mask : (H, W) bool ndarray, optional
        Pixels to look at, by default the tissue.
    percentile : float
        Robust extreme of the angle in the plane of the two stains, percent.

    Returns
    -------
    stains : (2, 3) float64 ndarray
        Unit optical-density vectors; haematoxylin (the one that absorbs more red) first.
    strength : (2,) float64 ndarray
        99th percentile of their concentrations.

    Raises
    ------
    ValueError
        If there is too little tissue.
    """
    density = _density(image)[_measured(image, mask)].astype(np.float64)
    _, vectors = np.linalg.eigh(np.cov(density, rowvar=False))
    plane = vectors[:, [2, 1]]  # the two directions of largest variance
    plane = plane * np.where(plane.sum(axis=0) < 0, -1.0, 1.0)
    flat = density @ plane
    low, high = np.percentile(np.arctan2(flat[:, 1], flat[:, 0]), [percentile, 100 - percentile])
    if np.degrees(high - low) < MIN_ANGLE:
        raise ValueError(
            f"the stains of this image are {np.degrees(high - low):.1f} degrees apart, less than "
            f"{MIN_ANGLE}: it shows a single stain; use method='reinhard' for it"
        )
    stains = np.array([[np.cos(a), np.sin(a)] for a in (low, high)]) @ plane.T
    stains = stains[np.argsort(-stains[:, 0])]
    concentration = density @ np.linalg.pinv(stains)
    return stains, np.maximum(np.percentile(concentration, 99, axis=0), 1e-3)


def reinhard_statistics(
    image: np.ndarray, *, mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the tissue of an image in CIELAB.

    Parameters
    ----------
    image : (H, W, 3) uint8 ndarray
    mask : (H, W) bool ndarray, optional
        Pixels to look at, by default the tissue.

    Returns
    -------
    mean, std : (3,) float64 ndarray
        Of L*, a*, b*.

    Raises
    ------
    ValueError
        If there is too little tissue.
    """
    mean, std = cv2.meanStdDev(_lab(image), mask=_measured(image, mask).astype(np.uint8))
    return mean.ravel(), np.maximum(std.ravel(), 1e-3)


# --- inner parts ----------------------------------------------------------------------------------


def _density(image: np.ndarray) -> np.ndarray:
    """Optical density -ln(I / 255), (H, W, 3) float32; black counts as one half grey level."""
    return _DENSITY_OF[image]


def _mean_density(image: np.ndarray) -> np.ndarray:
    density = _density(image)
    return (density[..., 0] + density[..., 1] + density[..., 2]) / 3


_DENSITY_OF = -np.log(np.maximum(np.arange(256), 0.5) / 255).astype(np.float32)


def _measured(image: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    mask = tissue_mask(image, threshold=_TISSUE) if mask is None else np.asarray(mask, bool)
    if np.count_nonzero(mask) < _MIN_TISSUE:
        raise ValueError(
            f"only {np.count_nonzero(mask)} stained pixels to measure a stain on, {_MIN_TISSUE} "
            "are needed: use method='none' for this image"
        )
    return mask


def _lab(image: np.ndarray) -> np.ndarray:
    """CIELAB (D65), float32."""
    return cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)


def _rgb(lab: np.ndarray) -> np.ndarray:
    """RGB of a CIELAB image, float32, 0 to 255."""
    return cv2.cvtColor(lab.astype(np.float32), cv2.COLOR_LAB2RGB) * 255


def _gain(ratio: np.ndarray) -> np.ndarray:
    return np.clip(ratio, 1 / MAX_GAIN, MAX_GAIN)


def _root(symmetric: np.ndarray, power: float = 0.5) -> np.ndarray:
    """Power of a positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(symmetric)
    return (vectors * np.maximum(values, 1e-12) ** power) @ vectors.T


def _transport_apply(image: np.ndarray, source: Stain, reference: Stain) -> np.ndarray:
    (mean_s, cov_s), (mean_r, cov_r) = source, reference
    root, inverse = _root(cov_s), _root(cov_s, -0.5)
    gains, axes = np.linalg.eigh(inverse @ _root(root @ cov_r @ root) @ inverse)
    linear = ((axes * _gain(gains)) @ axes.T).astype(np.float32)
    shift = (mean_r - mean_s @ linear).astype(np.float32)
    full = max(_FULL * mean_s.mean(), 1e-3)
    amount = np.minimum(_mean_density(image) / full, 1)[..., None]
    return 255 * np.exp(-np.maximum(_density(image) @ linear + amount * shift, 0))


def _reinhard_apply(image: np.ndarray, source: Stain, reference: Stain) -> np.ndarray:
    (mean_s, std_s), (mean_r, std_r) = source, reference
    lab = (_lab(image) - mean_s) * _gain(std_r / std_s) + mean_r
    typical = -np.log(np.clip(_rgb(mean_s[None, None]) / 255, 0.002, 0.99)).mean()
    amount = np.minimum(_mean_density(image) / typical, 1)[..., None]
    return image + amount * (_rgb(lab) - image)


def _macenko_apply(image: np.ndarray, source: Stain, reference: Stain) -> np.ndarray:
    (stains_s, strength_s), (stains_r, strength_r) = source, reference
    density = _density(image)
    concentration = density @ np.linalg.pinv(stains_s)
    residual = density - concentration @ stains_s
    matched = (concentration * _gain(strength_r / strength_s)) @ stains_r + residual
    return 255 * np.exp(-np.maximum(matched, 0))


_MATCHES: dict[str, tuple[Callable[..., Stain], Callable[..., np.ndarray]]] = {
    "transport": (density_moments, _transport_apply),
    "reinhard": (reinhard_statistics, _reinhard_apply),
    "macenko": (macenko_stains, _macenko_apply),
}


def _method(name: str) -> tuple[Callable[..., Stain], Callable[..., np.ndarray]]:
    if name not in _MATCHES:
        raise ValueError(f"stain method {name!r} is unknown: use {', '.join(_MATCHES)}")
    return _MATCHES[name]
