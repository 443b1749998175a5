"""Probabilistic segment replacement (steps 10 to 12): draw, place, match stain, paste, mask.

A segment of the target image is taken out and a similar one of the same class is put in its place.
What remains to be healed, the seam and the pixels that the new segment does not cover, is the
*unknown* region that chapter 05 repaints.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import pandas as pd

from helpers.pool import Pool

__all__ = [
    "Composite",
    "CompositeError",
    "Sampler",
    "affine_from_boxes",
    "affine_from_moments",
    "axis_scales",
    "compose",
    "draw_log_probabilities",
    "effective_sources",
    "feature_distances",
    "macenko_stains",
    "match_stain",
    "moments",
    "paste",
    "stain_gap",
    "tissue_mask",
    "unknown_region",
    "warp_image",
    "warp_mask",
]


class CompositeError(ValueError):
    """No composite of this image meets the conditions; the caller records a skip."""


# --- draws (Eq. 1) --------------------------------------------------------------------------------


def feature_distances(f_t: np.ndarray, f_j: np.ndarray, *, chunk: int = 1024) -> np.ndarray:
    """Euclidean distances of one feature vector to many, in double precision.

    Parameters
    ----------
    f_t : (p,) ndarray
        Feature of the target.
    f_j : (n, p) ndarray
        Features of the candidates. They are read once, `chunk` rows at a time, so that a pool of a
        million segments needs no copy of its features.
    chunk : int
        Rows at a time.

    Returns
    -------
    (n,) float64 ndarray
        Exact also where squares would overflow.
    """
    n = len(f_j)
    out = np.empty(n)
    f_t = np.asarray(f_t, np.float64)
    buffer = np.empty((min(chunk, n), len(f_t)))
    for start in range(0, n, chunk):
        part = f_j[start : start + chunk]
        difference = np.subtract(part, f_t, out=buffer[: len(part)])
        with np.errstate(over="ignore"):
            square = np.einsum("ij,ij->i", difference, difference)
            if not np.isfinite(square).all():
                largest = np.abs(difference).max(axis=1)
                safe = np.where(largest > 0, largest, 1)[:, None]
                out[start : start + chunk] = largest * np.linalg.norm(difference / safe, axis=1)
                continue
        np.sqrt(square, out=out[start : start + chunk])
    return out


def draw_log_probabilities(
    f_t: np.ndarray, f_j: np.ndarray, w: np.ndarray, *, allowed: np.ndarray | None = None
) -> np.ndarray:
    r"""Log-probabilities of Eq. 1, :math:`p(j|t) = \mathrm{softmax}_j(-w_j \|f_t - f_j\|_2)`.

    Parameters
    ----------
    f_t : (p,) ndarray
        Feature of the target.
    f_j : (n, p) ndarray
        Features of the candidates.
    w : (n,) ndarray
        Penalty weights, positive; 1 at first, one more for every time a candidate was drawn.
    allowed : (n,) bool ndarray, optional
        Candidates that may be drawn; the others get probability 0.

    Returns
    -------
    (n,) float64 ndarray
        Natural logarithms; the probabilities sum to 1. Computed with the largest exponent taken
        out first, so that neither huge nor tiny distances break it.

    Raises
    ------
    ValueError
        If shapes disagree, a value is no number, or no candidate may be drawn.
    """
    w = np.asarray(w, np.float64)
    if np.ndim(f_j) != 2 or np.shape(f_t) != (np.shape(f_j)[1],) or w.shape != (len(f_j),):
        raise ValueError(
            f"shapes disagree: f_t {np.shape(f_t)}, f_j {np.shape(f_j)}, w {w.shape}; expected "
            "(p,), (n, p) and (n,)"
        )
    return _log_softmax(-w * feature_distances(f_t, f_j), allowed)


def effective_sources(counts: np.ndarray) -> float:
    """Number of sources that are used as evenly as `counts` are: exp of their entropy.

    Parameters
    ----------
    counts : (n,) ndarray
        How often each segment was drawn.

    Returns
    -------
    float
        From 1 (always the same one) to n (all equally often); 0 if nothing was drawn.
    """
    counts = np.asarray(counts, float)
    share = counts[counts > 0] / max(counts.sum(), 1)
    return float(np.exp(-(share * np.log(share)).sum())) if len(share) else 0.0


class Sampler:
    """Draws replacements from a pool and remembers how often each was drawn.

    Parameters
    ----------
    pool : Pool
    exclude_own_image : bool
        Leave out all segments of the target's own image. The target itself is never drawn.
    exclude_own_patient : bool
        Leave out all segments of the target's patient, where patients are known.
    same_class : bool
        Draw from the target's class. Features of different classes are scores on different
        principal components, so False is refused for a pool of several classes.
    refuse_border : bool
        Leave out segments cut by the image border: they are incomplete.
    penalty : float
        What a draw adds to the weight w_j (1 in the paper; 0 switches the penalty off).

    Attributes
    ----------
    w : (n,) float64 ndarray
        Weights of Eq. 1, 1 at first; they last over all draws of a run.
    counts : (n,) int64 ndarray
        How often each segment was drawn.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        exclude_own_image: bool = True,
        exclude_own_patient: bool = False,
        same_class: bool = True,
        refuse_border: bool = True,
        penalty: float = 1.0,
    ) -> None:
        if not same_class and len(pool.classes) > 1:
            raise ValueError(
                f"same_class=False, but the pool has the classes {pool.classes}: their features "
                "are scores on different components and cannot be compared; build one pool a class"
            )
        if penalty < 0:
            raise ValueError(f"penalty={penalty}: a draw must not make the next one likelier")
        self.pool = pool
        self.exclude_own_image = exclude_own_image
        self.exclude_own_patient = exclude_own_patient
        self.refuse_border = refuse_border
        self.penalty = float(penalty)
        self.w = np.ones(len(pool))
        self.counts = np.zeros(len(pool), np.int64)
        self._images = _codes(pool.table["image_id"])
        self._patients = _codes(pool.table["dataset"] + "\n" + pool.table["patient"])
        self._patients[(pool.table["patient"] == "").to_numpy()] = -1
        self._border = pool.table["border"].to_numpy(bool)
        # Rows and features of a class lie together, so that a draw reads one block of memory.
        self._blocks = {c: _block(pool, c) for c in pool.classes}
        self._fingerprint = int(zlib.crc32(np.ascontiguousarray(pool.features)))

    def log_probabilities(self, target: int) -> tuple[np.ndarray, np.ndarray]:
        """Candidates for a target and their log-probabilities.

        Parameters
        ----------
        target : int
            Row of the pool.

        Returns
        -------
        rows : (m,) int ndarray
            All rows of the target's class.
        log_p : (m,) float64 ndarray
            Eq. 1; minus infinity for those left out.

        Raises
        ------
        CompositeError
            If all are left out.
        """
        rows, features = self._blocks[self.pool.table["label"].iat[target]]
        allowed = self.allowed(target, rows)
        if not allowed.any():
            raise CompositeError(self._why_none(target, len(rows)))
        log_p = draw_log_probabilities(
            self.pool.features[target], features, self.w[rows], allowed=allowed
        )
        return rows, log_p

    def allowed(self, target: int, rows: np.ndarray) -> np.ndarray:
        """Which of `rows` may replace `target`, (m,) bool."""
        allowed = rows != target
        if self.exclude_own_image:
            allowed &= self._images[rows] != self._images[target]
        if self.exclude_own_patient and self._patients[target] >= 0:
            allowed &= self._patients[rows] != self._patients[target]
        if self.refuse_border:
            allowed &= ~self._border[rows]
        return allowed

    def draw(self, target: int, rng: np.random.Generator) -> int:
        """Draw a replacement by Eq. 1 and raise its weight.

        Parameters
        ----------
        target : int
            Row of the pool.
        rng : numpy.random.Generator

        Returns
        -------
        int
            Row of the pool.

        Raises
        ------
        CompositeError
            If no segment may be drawn.
        """
        rows, log_p = self.log_probabilities(target)
        cumulative = np.cumsum(np.exp(log_p))
        at = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
        row = int(rows[min(at, len(rows) - 1)])
        self.w[row] += self.penalty
        self.counts[row] += 1
        return row

    def undo(self, row: int) -> None:
        """Take a draw back whose segment was not used after all."""
        self.w[row] -= self.penalty
        self.counts[row] -= 1

    def state(self) -> dict[str, Any]:
        """Weights and counts as plain lists (JSON), for :meth:`restore` in a later process."""
        used = np.flatnonzero(self.counts)
        return {
            "fingerprint": self._fingerprint,
            "n": len(self.w),
            "rows": used.tolist(),
            "counts": self.counts[used].tolist(),
            "w": self.w[used].tolist(),
        }

    def restore(self, state: Mapping[str, Any]) -> Sampler:
        """Continue where :meth:`state` was taken.

        Raises
        ------
        ValueError
            If the state is of another pool.
        """
        if state["n"] != len(self.w) or state["fingerprint"] != self._fingerprint:
            raise ValueError(
                f"these weights are of another pool ({state['n']} segments, this one has "
                f"{len(self.w)}, or other features): start with fresh weights"
            )
        rows = np.asarray(state["rows"], int)
        self.w[:], self.counts[:] = 1, 0
        self.w[rows], self.counts[rows] = state["w"], state["counts"]
        return self

    def _why_none(self, target: int, n: int) -> str:
        rules = [
            name
            for name in ("exclude_own_image", "exclude_own_patient", "refuse_border")
            if getattr(self, name)
        ]
        row = self.pool.table.iloc[target]
        return (
            f"no segment may replace segment {row['segment_id']} of image {row['image_id']!r}: "
            f"class {row['label']!r} has {n} segments and all are left out "
            f"({', '.join(rules) or 'it is the only one'}); "
            "add images of this class or switch a rule off"
        )


# --- placement ------------------------------------------------------------------------------------


def moments(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centroid and covariance of a mask.

    Parameters
    ----------
    mask : (H, W) bool ndarray

    Returns
    -------
    centroid : (2,) float64 ndarray
        (x, y), pixels.
    covariance : (2, 2) float64 ndarray
        Pixels squared, with every pixel taken as a unit square (1/12 on the diagonal), so that
        lines and single pixels have a size, too.

    Raises
    ------
    ValueError
        If the mask is empty.
    """
    m = cv2.moments(np.ascontiguousarray(mask, np.uint8), binaryImage=True)
    if m["m00"] == 0:
        raise ValueError("the mask is empty: a segment needs at least one pixel")
    centroid = np.array([m["m10"], m["m01"]]) / m["m00"]
    covariance = np.array([[m["mu20"], m["mu11"]], [m["mu11"], m["mu02"]]]) / m["m00"]
    return centroid, covariance + np.eye(2) / 12


def affine_from_moments(
    source_mask: np.ndarray,
    target_mask: np.ndarray,
    *,
    scale_limits: tuple[float, float] = (0.5, 2.0),
    stretch_limit: float = 1.5,
) -> np.ndarray:
    r"""Affine transform that carries centroid and second moments of one mask onto another's.

    With the principal axes :math:`C = R\,\mathrm{diag}(\lambda)\,R^\top` of both masks,
    :math:`A = R_t\,\mathrm{diag}(\sqrt{\lambda_t / \lambda_s})\,R_s^\top`. Axes have no direction,
    so A and its turn by 180 degrees fit equally well: the one whose warped mask overlaps the target
    more is taken, at a tie the smaller turn. Both are free of reflections.

    Parameters
    ----------
    source_mask, target_mask : (h, w) and (H, W) bool ndarray
    scale_limits : tuple of float
        The scale along each principal axis is held within these limits.
    stretch_limit : float
        Largest ratio of the two scales; both give way equally, which keeps the area. A strong
        stretch would turn round nuclei into spindles, and the shape of nuclei is what a grade is
        read from. Where a limit holds, the moments match as far as it allows.

    Returns
    -------
    (2, 3) float64 ndarray
        Maps (x, y, 1) of the source to (x, y) of the target.

    Raises
    ------
    ValueError
        If a mask is empty or the limits are not ``0 < low <= high``.
    """
    _check_limits(scale_limits, stretch_limit)
    (c_s, cov_s), (c_t, cov_t) = moments(source_mask), moments(target_mask)
    (lam_s, r_s), (lam_t, r_t) = _axes(cov_s), _axes(cov_t)
    scale = _limited(np.sqrt(lam_t / lam_s), scale_limits, stretch_limit)
    matrix = r_t @ np.diag(scale) @ r_s.T
    both = [_about(sign * matrix, c_s, c_t) for sign in (1, -1)]
    ious = [_iou(warp_mask(source_mask, a, target_mask.shape), target_mask) for a in both]
    if abs(ious[0] - ious[1]) > 1e-9:
        return both[int(np.argmax(ious))]
    return both[0] if np.trace(r_t @ r_s.T) >= 0 else both[1]


def affine_from_boxes(
    source_mask: np.ndarray,
    target_mask: np.ndarray,
    *,
    scale_limits: tuple[float, float] = (0.5, 2.0),
    stretch_limit: float = 1.5,
) -> np.ndarray:
    """Affine transform that carries one bounding box onto another, without turning.

    Parameters, returns and errors as :func:`affine_from_moments`.
    """
    _check_limits(scale_limits, stretch_limit)
    (x_s, y_s, w_s, h_s), (x_t, y_t, w_t, h_t) = _box(source_mask), _box(target_mask)
    scale = _limited(np.array([w_t / w_s, h_t / h_s]), scale_limits, stretch_limit)
    centre_s = np.array([x_s + (w_s - 1) / 2, y_s + (h_s - 1) / 2])
    centre_t = np.array([x_t + (w_t - 1) / 2, y_t + (h_t - 1) / 2])
    return _about(np.diag(scale), centre_s, centre_t)


def axis_scales(affine: np.ndarray) -> tuple[float, float]:
    """Largest and smallest scale of an affine transform (its singular values)."""
    large, small = np.linalg.svd(np.asarray(affine)[:, :2], compute_uv=False)
    return float(large), float(small)


def warp_image(image: np.ndarray, affine: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Warp an image bilinearly into a frame of `shape` (H, W), mirrored beyond its border."""
    return cv2.warpAffine(
        np.ascontiguousarray(image),
        affine,
        (shape[1], shape[0]),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT_101,
    )


def warp_mask(mask: np.ndarray, affine: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Warp a mask into a frame of `shape`: bilinear coverage, at least one half is inside."""
    coverage = cv2.warpAffine(
        np.ascontiguousarray(mask, np.float32), affine, (shape[1], shape[0]), flags=cv2.INTER_LINEAR
    )
    return coverage >= 0.5


# --- stain ----------------------------------------------------------------------------------------


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
    method: str = "reinhard",
    mask: np.ndarray | None = None,
    reference_mask: np.ndarray | None = None,
) -> np.ndarray:
    """Give an image the stain of another one.

    Parameters
    ----------
    source, reference : (h, w, 3) and (H, W, 3) uint8 ndarray
    method : {"reinhard", "macenko", "none"}
        ``reinhard`` equalises mean and standard deviation of each CIELAB channel [reinhard]_;
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
    .. [reinhard] Reinhard et al., Color transfer between images, 2001 (there in l-alpha-beta).
    .. [macenko] Macenko et al., A method for normalizing histology slides, ISBI 2009.
    """
    if method == "none":
        return source.copy()
    if method not in _STAIN_METHODS:
        raise ValueError(f"stain method {method!r} is unknown: use reinhard, macenko or none")
    s = _STAIN_METHODS[method](source, mask)
    r = _STAIN_METHODS[method](reference, reference_mask)
    return _apply_stain(source, s, r, method)


def stain_gap(
    image: np.ndarray, mask: np.ndarray, other: np.ndarray, other_mask: np.ndarray
) -> float:
    """Distance of the mean CIELAB colours of the tissue in two regions.

    Parameters
    ----------
    image, other : (H, W, 3) uint8 ndarray
    mask, other_mask : (H, W) bool ndarray
        Regions; unstained pixels in them are left out.

    Returns
    -------
    float
        About 2 is just visible; not a number where a region has no tissue.
    """
    means = []
    for picture, region in ((image, mask), (other, other_mask)):
        tissue = region & tissue_mask(picture)
        if not tissue.any():
            return float("nan")
        means.append(_lab(picture)[tissue].mean(axis=0))
    return float(np.linalg.norm(means[0] - means[1]))


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
    stains = np.array([[np.cos(a), np.sin(a)] for a in (low, high)]) @ plane.T
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    stains = stains[np.argsort(-stains[:, 0])]
    concentration = density @ np.linalg.pinv(stains)
    return stains, np.maximum(np.percentile(concentration, 99, axis=0), 1e-3)


# --- paste ----------------------------------------------------------------------------------------


def paste(
    image: np.ndarray,
    target_mask: np.ndarray,
    source_image: np.ndarray,
    source_mask: np.ndarray,
    affine: np.ndarray,
    *,
    fill: str = "surround",
) -> tuple[np.ndarray, np.ndarray]:
    """Take the target segment out and put the warped source segment in.

    Parameters
    ----------
    image : (H, W, 3) uint8 ndarray
        Target image; it is not changed.
    target_mask : (H, W) bool ndarray
    source_image, source_mask : (h, w, 3) uint8 and (h, w) bool ndarray
    affine : (2, 3) ndarray
        Source to target, see :func:`affine_from_moments`.
    fill : {"surround", "black"}
        What removed pixels show until they are repainted: the mean colour of the rim around the
        target, or black. They are unknown to chapter 05 either way; a calm fill keeps the encoder
        from carrying an edge into the known pixels beside them.

    Returns
    -------
    image : (H, W, 3) uint8 ndarray
    pasted_mask : (H, W) bool ndarray
        Where the new segment lies.
    """
    if fill not in ("surround", "black"):
        raise ValueError(f"fill={fill!r} is unknown: use 'surround' or 'black'")
    shape = image.shape[:2]
    pasted_mask = warp_mask(source_mask, affine, shape)
    out = image.copy()
    out[target_mask] = _rim_colour(image, target_mask) if fill == "surround" else 0
    warped = warp_image(source_image, affine, shape)
    np.copyto(out, warped, where=pasted_mask[..., None])
    return out, pasted_mask


def unknown_region(
    target_mask: np.ndarray, pasted_mask: np.ndarray, *, band: int = 3
) -> np.ndarray:
    """Pixels to repaint: target pixels left uncovered, and a band along the pasted outline.

    Parameters
    ----------
    target_mask, pasted_mask : (H, W) bool ndarray
    band : int
        Pixels on either side of the outline; 0 leaves only the uncovered ones. The border of the
        image is no outline.

    Returns
    -------
    (H, W) bool ndarray
    """
    if band < 0:
        raise ValueError(f"band={band}: give 0 or more pixels")
    unknown = target_mask & ~pasted_mask
    if band and pasted_mask.any():
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * band + 1, 2 * band + 1))
        pasted = np.ascontiguousarray(pasted_mask, np.uint8)
        # OpenCV's morphological gradient: dilation minus erosion, the image border left out.
        unknown |= cv2.morphologyEx(pasted, cv2.MORPH_GRADIENT, disc).astype(bool)
    return unknown


@dataclass(frozen=True)
class Composite:
    """A pasted image, ready to be healed.

    Attributes
    ----------
    image_id, label : str
        Target image and its class, which is also the label of the composite.
    original, image : (H, W, 3) uint8 ndarray
        Before and after pasting.
    unknown : (H, W) bool ndarray
        Pixels to repaint.
    pasted : (H, W) bool ndarray
        Pixels that come from other images; the band of `unknown` overlaps them.
    replacements : list of dict
        One a segment: ids and rows of target and source, affine, scales, IoU, stain.
    new_area_ratio : float
        Share of pixels in ``pasted | unknown``.
    """

    image_id: str
    label: str
    original: np.ndarray
    image: np.ndarray
    unknown: np.ndarray
    pasted: np.ndarray
    replacements: list[dict[str, Any]]
    new_area_ratio: float


def compose(
    image: np.ndarray,
    target_image_id: str,
    pool: Pool,
    sampler: Sampler,
    get_image: Callable[[str], np.ndarray],
    *,
    rng: np.random.Generator,
    area_range: tuple[float, float] = (0.3, 1.0),
    method: str = "moments",
    scale_limits: tuple[float, float] = (0.5, 2.0),
    stretch_limit: float = 1.5,
    stain: str = "reinhard",
    band: int = 3,
    fill: str = "surround",
    max_overlap: float = 0.5,
    min_fit: float = 0.0,
    stains: dict[tuple[str, str], Any] | None = None,
) -> Composite:
    """Replace segments of an image until enough of it is new.

    Targets come in random order; one that is already more than `max_overlap` new, or that would
    carry the new-area ratio over its upper bound, is passed over.

    Parameters
    ----------
    image : (H, W, 3) uint8 ndarray
        Target image.
    target_image_id : str
        Its id in the pool.
    pool : Pool
    sampler : Sampler
        Of this pool; its weights rise with every segment used.
    get_image : callable
        image_id -> (h, w, 3) uint8 ndarray, for the sources.
    rng : numpy.random.Generator
    area_range : tuple of float
        Bounds of the new-area ratio.
    method : {"moments", "boxes"}
        Placement.
    scale_limits, stretch_limit, stain, band, fill
        As in :func:`affine_from_moments`, :func:`match_stain`, :func:`unknown_region`,
        :func:`paste`.
    max_overlap : float
        Share of a target that may be new already.
    min_fit : float
        Smallest IoU of the pasted segment with its target; what fits worse is taken back, since
        most of the target would have to be invented.
    stains : dict, optional
        Keeps the measured stain of each source image; pass the same dict for all composites of a
        run, so that every image is measured once.

    Returns
    -------
    Composite

    Raises
    ------
    CompositeError
        If the image has no segment in the pool, no segment may be drawn, or the bounds of the
        new-area ratio cannot be met.
    ValueError
        If an argument is wrong.
    """
    _check_compose(area_range, method, stain)
    targets = pool.of_image(target_image_id)
    if len(targets) == 0:
        raise CompositeError(f"image {target_image_id!r} has no segment in the pool")
    place = partial(
        {"moments": affine_from_moments, "boxes": affine_from_boxes}[method],
        scale_limits=scale_limits,
        stretch_limit=stretch_limit,
    )
    stains = {} if stains is None else stains
    work = _Work(image, place, stain, stains, band, fill, area_range[1], max_overlap, min_fit)
    for target in rng.permutation(targets):
        try:
            work.replace(pool, int(target), sampler, get_image, rng)
        except CompositeError:
            work.undo(sampler)
            raise
        if work.replacements and work.ratio >= area_range[0]:
            label = str(pool.table["label"].iat[int(targets[0])])
            return work.finish(target_image_id, label)
    work.undo(sampler)
    raise CompositeError(
        f"image {target_image_id!r}: {len(work.replacements)} of {len(targets)} segments were "
        f"replaced and {work.ratio:.2f} of the image is new, outside [{area_range[0]}, "
        f"{area_range[1]}]: lower area_min, raise area_max, or take another image"
    )


# --- inner parts ----------------------------------------------------------------------------------


class _Work:
    """State of one composite while segments are replaced one after the other."""

    def __init__(
        self,
        image: np.ndarray,
        place: Callable[[np.ndarray, np.ndarray], np.ndarray],
        stain: str,
        stains: dict[tuple[str, str], Any],
        band: int,
        fill: str,
        area_max: float,
        max_overlap: float,
        min_fit: float,
    ) -> None:
        self.original = image
        self.image = image.copy()
        self.pasted = np.zeros(image.shape[:2], bool)
        self.unknown = np.zeros(image.shape[:2], bool)
        self.replacements: list[dict[str, Any]] = []
        self.ratio = 0.0
        self.place, self.stain, self.stains = place, stain, stains
        self.band, self.fill = band, fill
        self.area_max, self.max_overlap, self.min_fit = area_max, max_overlap, min_fit
        self.reference: Any = None

    def replace(
        self,
        pool: Pool,
        target: int,
        sampler: Sampler,
        get_image: Callable[[str], np.ndarray],
        rng: np.random.Generator,
    ) -> bool:
        """Replace one target if that is possible; False if it was passed over."""
        target_mask = pool.mask(target)
        new = self.pasted | self.unknown
        overlap = np.count_nonzero(new & target_mask) / np.count_nonzero(target_mask)
        if overlap > self.max_overlap or _share(new | target_mask) > self.area_max:
            return False
        source = sampler.draw(target, rng)
        source_mask = pool.mask(source)
        affine = self.place(source_mask, target_mask)
        source_id = pool.table["image_id"].iat[source]
        donor, stain = self._stained(get_image(source_id), source_mask, source_id)
        image, pasted = paste(self.image, target_mask, donor, source_mask, affine, fill=self.fill)
        unknown = (self.unknown & ~pasted) | unknown_region(target_mask, pasted, band=self.band)
        ratio = _share(self.pasted | pasted | unknown)
        misfit = not pasted.any() or _iou(pasted, target_mask) < self.min_fit
        if ratio > self.area_max or misfit:
            sampler.undo(source)
            return False
        self.image, self.unknown, self.ratio = image, unknown, ratio
        self.pasted = self.pasted | pasted
        self.replacements.append(_record(pool, target, source, affine, stain, pasted, target_mask))
        return True

    def _stained(
        self, source_image: np.ndarray, source_mask: np.ndarray, source_id: str
    ) -> tuple[np.ndarray, str]:
        """Source image with the box of the segment matched to the target's stain."""
        if self.stain == "none":
            return source_image, "none"
        measure = _STAIN_METHODS[self.stain]
        try:
            if self.reference is None:
                self.reference = measure(self.original, None)
            key = (self.stain, source_id)
            if key not in self.stains:
                self.stains[key] = measure(source_image, None)
        except ValueError:  # too little tissue to measure a stain on
            return source_image, "none"
        x, y, w, h = _box(source_mask)
        margin = 2  # bilinear interpolation looks one pixel beyond the mask
        box = np.s_[max(y - margin, 0) : y + h + margin, max(x - margin, 0) : x + w + margin]
        donor = source_image.copy()
        donor[box] = _apply_stain(source_image[box], self.stains[key], self.reference, self.stain)
        return donor, self.stain

    def undo(self, sampler: Sampler) -> None:
        """Give back the draws of a composite that came to nothing."""
        for done in self.replacements:
            sampler.undo(done["source_row"])

    def finish(self, image_id: str, label: str) -> Composite:
        """Freeze what has been made."""
        return Composite(
            image_id,
            label,
            self.original,
            self.image,
            self.unknown,
            self.pasted,
            self.replacements,
            self.ratio,
        )


def _record(
    pool: Pool,
    target: int,
    source: int,
    affine: np.ndarray,
    stain: str,
    pasted: np.ndarray,
    target_mask: np.ndarray,
) -> dict[str, Any]:
    table = pool.table
    large, small = axis_scales(affine)
    return {
        "target": int(table["segment_id"].iat[target]),
        "source": int(table["segment_id"].iat[source]),
        "target_row": int(target),
        "source_row": int(source),
        "source_image": str(table["image_id"].iat[source]),
        "distance": float(np.linalg.norm(pool.features[target] - pool.features[source])),
        "affine": np.asarray(affine).round(6).tolist(),
        "scales": [round(large, 6), round(small, 6)],
        "area_ratio": float(table["area"].iat[source] / table["area"].iat[target]),
        "iou": float(_iou(pasted, target_mask)),
        "stain": stain,
    }


def _check_compose(area_range: tuple[float, float], method: str, stain: str) -> None:
    if not 0 <= area_range[0] <= area_range[1] <= 1:
        raise ValueError(f"area_range={area_range}: give 0 <= low <= high <= 1")
    if method not in ("moments", "boxes"):
        raise ValueError(f"method={method!r} is unknown: use 'moments' or 'boxes'")
    if stain not in ("none", *_STAIN_METHODS):
        raise ValueError(f"stain={stain!r} is unknown: use reinhard, macenko or none")


def _log_softmax(exponents: np.ndarray, allowed: np.ndarray | None) -> np.ndarray:
    if np.isnan(exponents).any():
        raise ValueError("a feature or a weight is no number (NaN): build the pool again")
    if allowed is not None:
        exponents = np.where(allowed, exponents, -np.inf)
    largest = exponents.max(initial=-np.inf)
    if largest == -np.inf:
        raise ValueError("no candidate may be drawn: all are excluded or infinitely far away")
    shifted = exponents - largest
    return shifted - np.log(np.exp(shifted).sum())


def _codes(values: pd.Series) -> np.ndarray:
    return np.unique(values.to_numpy(str), return_inverse=True)[1]


def _block(pool: Pool, label: str) -> tuple[np.ndarray, np.ndarray]:
    rows = pool.of_class(label)
    return rows, pool.features if len(rows) == len(pool) else pool.features[rows]


def _check_limits(limits: tuple[float, float], stretch: float) -> None:
    if not 0 < limits[0] <= limits[1]:
        raise ValueError(f"scale_limits={limits}: give 0 < low <= high")
    if not stretch >= 1:
        raise ValueError(f"stretch_limit={stretch}: give a ratio of 1 or more")


def _limited(scale: np.ndarray, limits: tuple[float, float], stretch: float) -> np.ndarray:
    """Scales of the two axes with their ratio, then their size, held within the limits."""
    mean = np.sqrt(scale[0] * scale[1])
    half = np.sqrt(stretch)
    return np.clip(np.clip(scale, mean / half, mean * half), *limits)


def _axes(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, largest first, and a proper rotation whose columns are the axes."""
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1], vectors[:, ::-1].copy()
    # Sign of the long axis fixed (x up, then y up), the short one follows by a quarter turn.
    if vectors[0, 0] < 0 or (vectors[0, 0] == 0 and vectors[1, 0] < 0):
        vectors[:, 0] *= -1
    vectors[:, 1] = [-vectors[1, 0], vectors[0, 0]]
    return values, vectors


def _about(matrix: np.ndarray, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Affine with linear part `matrix` that maps the point `source` to `target`."""
    return np.column_stack([matrix, target - matrix @ source])


def _share(mask: np.ndarray) -> float:
    return np.count_nonzero(mask) / mask.size


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 0.0


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    x, y, w, h = cv2.boundingRect(np.ascontiguousarray(mask, np.uint8))
    if w == 0:
        raise ValueError("the mask is empty: a segment needs at least one pixel")
    return x, y, w, h


def _rim_colour(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean colour of the pixels up to four beside the mask."""
    thick = cv2.dilate(np.ascontiguousarray(mask, np.uint8), np.ones((9, 9), np.uint8)) > 0
    rim = thick & ~mask
    return image[rim if rim.any() else mask].mean(axis=0).round().astype(np.uint8)


def _density(image: np.ndarray) -> np.ndarray:
    """Optical density -ln(I / 255), (H, W, 3) float32; black counts as one half grey level."""
    return _DENSITY_OF[image]


def _mean_density(image: np.ndarray) -> np.ndarray:
    density = _density(image)
    return (density[..., 0] + density[..., 1] + density[..., 2]) / 3


_DENSITY_OF = -np.log(np.maximum(np.arange(256), 0.5) / 255).astype(np.float32)
_TISSUE = 0.15
_MIN_TISSUE = 64


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


def _reinhard_measure(image: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    pixels = _measured(image, mask).astype(np.uint8)
    mean, std = cv2.meanStdDev(_lab(image), mask=pixels)
    return mean.ravel(), np.maximum(std.ravel(), 1e-3)


def _macenko_measure(image: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    return macenko_stains(image, mask=mask)


_STAIN_METHODS: dict[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {
    "reinhard": _reinhard_measure,
    "macenko": _macenko_measure,
}


def _apply_stain(image: np.ndarray, source: tuple, reference: tuple, method: str) -> np.ndarray:
    change = {"reinhard": _reinhard_apply, "macenko": _macenko_apply}[method]
    matched = change(image, source, reference)
    # Full effect on tissue, none on glass, and a ramp between so that no edge appears.
    density = _mean_density(image)[..., None]
    weight = np.clip((density - _TISSUE / 3) / (_TISSUE - _TISSUE / 3), 0, 1)
    mixed = image + weight * (matched - image)
    return np.clip(np.rint(mixed), 0, 255).astype(np.uint8)


def _reinhard_apply(image: np.ndarray, source: tuple, reference: tuple) -> np.ndarray:
    (mean_s, std_s), (mean_r, std_r) = source, reference
    lab = (_lab(image) - mean_s) * (std_r / std_s) + mean_r
    return cv2.cvtColor(lab.astype(np.float32), cv2.COLOR_LAB2RGB) * 255


def _macenko_apply(image: np.ndarray, source: tuple, reference: tuple) -> np.ndarray:
    (stains_s, strength_s), (stains_r, strength_r) = source, reference
    density = _density(image)
    concentration = density @ np.linalg.pinv(stains_s)
    residual = density - concentration @ stains_s
    matched = (concentration * (strength_r / strength_s)) @ stains_r + residual
    return 255 * np.exp(-np.maximum(matched, 0))
