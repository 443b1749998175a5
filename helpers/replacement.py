"""Segment replacement (steps 11 and 12): paste a drawn segment, say what is unknown, compose.

A segment of the target image is taken out and a similar one of the same class is put in its place.
What remains to be healed, the seam and the pixels that the new segment does not cover, is the
*unknown* region that chapter 05 repaints. Draws are those of :mod:`helpers.draws`, placement and
warps those of :mod:`helpers.placement`, stain matching that of :mod:`helpers.stain`, the seam that
of :mod:`helpers.seam`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np

from helpers.draws import CompositeError, Sampler, effective_sources
from helpers.images import check_image
from helpers.placement import (
    LOBES,
    affine_at_border,
    affine_by_fit,
    affine_from_boxes,
    affine_from_moments,
    axis_scales,
    iou,
    reach,
    size_range,
    warp_image,
    warp_mask,
)
from helpers.pool import Pool
from helpers.seam import BLEND_REACH, blend, disc, least_cut, near_outline
from helpers.stain import METHODS, apply_stain, match_stain, measure_stain

__all__ = [
    "PLACEMENTS",
    "Composite",
    "CompositeError",
    "Sampler",
    "compose",
    "effective_sources",
    "paste",
    "paste_again",
    "shown_in",
    "unknown_region",
]

#: How a source is carried onto its target.
PLACEMENTS: dict[str, Callable[..., np.ndarray]] = {
    "fit": affine_by_fit,
    "moments": affine_from_moments,
    "boxes": affine_from_boxes,
}


_IDENTITY = np.array([[1.0, 0, 0], [0, 1, 0]])


# --- paste ----------------------------------------------------------------------------------------


def paste(
    image: np.ndarray,
    target_mask: np.ndarray,
    source_image: np.ndarray,
    source_mask: np.ndarray,
    affine: np.ndarray,
    *,
    fill: str = "surround",
    gap: str = "inpaint",
    seam: tuple[int, int] = (0, 0),
    feather: float = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Take the target segment out and put the warped source segment in.

    Parameters
    ----------
    image : (H, W, 3) uint8 ndarray
        Target image; it is not changed.
    target_mask : (H, W) bool ndarray
    source_image, source_mask : (h, w, 3) uint8 and (h, w) bool ndarray
    affine : (2, 3) ndarray
        Source to target, see :mod:`helpers.placement`.
    fill : {"surround", "black"}
        What the pixels left to be repainted show until then: the mean colour of the rim around the
        target, or black. They are unknown to chapter 05 either way; a calm fill keeps the encoder
        from carrying an edge into the known pixels beside them.
    gap : {"inpaint", "context"}
        What becomes of the target pixels that the source segment does not cover: left to be
        repainted, as in the paper, or covered with the tissue that surrounds the source segment in
        its own image. Where that image ends before the target does, the target stays as it was.
    seam : tuple of int
        Pixels by which the outline may move outwards and inwards, to where both images differ
        least (:func:`helpers.seam.least_cut`). Only where `gap` is "context": without the
        surroundings of the source there is nothing to choose from.
    feather : float
        Width in pixels of the blending of both images along the outline of the source, see
        :func:`helpers.seam.blend`; it changes three times as many on either side. 0 cuts hard.

    Returns
    -------
    image : (H, W, 3) uint8 ndarray
    pasted_mask : (H, W) bool ndarray
        Where pixels of the source lie.

    Raises
    ------
    ValueError
        If `fill` or `gap` is unknown, or `seam` or `feather` negative.
    """
    if fill not in ("surround", "black"):
        raise ValueError(f"fill={fill!r} is unknown: use 'surround' or 'black'")
    if gap not in ("inpaint", "context"):
        raise ValueError(f"gap={gap!r} is unknown: use 'inpaint' or 'context'")
    if feather < 0:
        raise ValueError(f"feather={feather}: give 0 or more pixels")
    shape = image.shape[:2]
    outwards, inwards = seam if gap == "context" else (0, 0)
    margin = max(2, math.ceil(BLEND_REACH * feather)) + outwards
    window = reach(source_mask, affine, shape, margin=margin)
    if gap == "context":
        window = _hull(window, reach(target_mask, _IDENTITY, shape, margin=margin))
    out, pasted_mask = image.copy(), np.zeros(shape, bool)
    if gap == "inpaint":
        out[target_mask] = _rim_colour(image, target_mask) if fill == "surround" else 0
    size = (window[0].stop - window[0].start, window[1].stop - window[1].start)
    if 0 in size:  # carried out of the frame
        return out, pasted_mask
    local = affine - np.array([[0, 0, window[1].start], [0, 0, window[0].start]])
    here = warp_mask(source_mask, local, size)
    source = warp_image(source_image, local, size)
    if gap == "context":
        there = warp_mask(np.ones_like(source_mask), local, size)
        here |= target_mask[window] & there
        if outwards or inwards:
            here = least_cut(
                source, image[window], here, outwards=outwards, inwards=inwards, available=there
            )
    pasted_mask[window] = here
    np.copyto(out[window], source, where=here[..., None])
    if feather:
        edge = near_outline(here, BLEND_REACH * feather)
        if gap == "inpaint":  # what is uncovered of the target stays out
            edge &= here | ~target_mask[window]
        mixed = blend(source, image[window], here, feather)
        np.copyto(out[window], mixed, where=edge[..., None])
    return out, pasted_mask


def paste_again(
    image: np.ndarray,
    replacements: Sequence[Mapping[str, Any]],
    pool: Pool,
    get_image: Callable[[str], np.ndarray],
    **how: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """The replacements of a composite, pasted in another way.

    Parameters
    ----------
    image : (H, W, 3) uint8 ndarray
        Target image.
    replacements : sequence of mapping
        Of :attr:`Composite.replacements`, or of a record of provenance.
    pool : Pool
    get_image : callable
        image_id -> (h, w, 3) uint8 ndarray, for the sources.
    **how
        `fill`, `gap`, `seam`, `feather` of :func:`paste`.

    Returns
    -------
    image, pasted : ndarray
        As of :func:`paste`, for all replacements together.
    """
    out, pasted = image, np.zeros(image.shape[:2], bool)
    repainted = how.get("gap", "inpaint") == "inpaint"
    for done in replacements:
        donor = get_image(done["source_image"])
        target, source = pool.mask(done["target_row"]), pool.mask(done["source_row"])
        _check_image(donor, source.shape, done["source_image"])
        donor = match_stain(donor, image, method=done["stain"])
        out, here = paste(out, target, donor, source, np.asarray(done["affine"]), **how)
        removed = target if repainted else here
        pasted = (pasted & ~removed) | here
    return out, pasted


def shown_in(
    pool: Pool,
    row: int,
    replacements: Sequence[Mapping[str, Any]],
    *,
    margin: float = 0.0,
) -> set[str]:
    """Images whose pixels the box of a segment shows after replacements in its image.

    Parameters
    ----------
    pool : Pool
    row : int
        The segment, as a row of the pool.
    replacements : sequence of mapping
        Of :attr:`Composite.replacements` of its image, or of a record of provenance.
    margin : float
        How far a pasted segment may go beyond its outline and its target's, such as ``seam[0]``
        of :func:`paste`, pixels.

    Returns
    -------
    set of str
        The image itself, and that of every source whose box, where it was placed, or whose
        target's box meets that of the segment.
    """
    start, stop = _corners(pool, row)
    shown = {str(pool.table["image_id"].iat[row])}
    for done in replacements:
        affine = np.asarray(done["affine"])
        (x0, y0), (x1, y1) = _corners(pool, done["source_row"])
        placed = np.array([(x0, y0), (x1, y0), (x0, y1), (x1, y1)]) @ affine[:, :2].T + affine[:, 2]
        reached = np.concatenate([placed, _corners(pool, done["target_row"])])
        if (reached.min(0) - margin <= stop).all() and (reached.max(0) + margin >= start).all():
            shown.add(done["source_image"])
    return shown


def _corners(pool: Pool, row: int) -> np.ndarray:
    """First and last pixel of a segment's box, (2, 2), XY."""
    x, y, w, h = pool.table[["x", "y", "w", "h"]].iloc[row].to_numpy(float)
    return np.array([[x, y], [x + w - 1, y + h - 1]])


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
        pasted = np.ascontiguousarray(pasted_mask, np.uint8)
        # OpenCV's morphological gradient: dilation minus erosion, the image border left out.
        unknown |= cv2.morphologyEx(pasted, cv2.MORPH_GRADIENT, disc(band)).astype(bool)
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
    stain: str = "transport",
    band: int = 3,
    fill: str = "surround",
    gap: str = "inpaint",
    seam: tuple[int, int] = (0, 0),
    feather: float = 0,
    max_overlap: float = 0.5,
    min_fit: float = 0.0,
    tries: int = 3,
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
    method : {"fit", "moments", "boxes"}
        Placement, see :data:`PLACEMENTS`. A source that the border of its image cuts lies cut side
        on cut side instead, unless the sampler treats it as a whole one.
    scale_limits, stretch_limit
        As in :func:`helpers.placement.affine_from_moments`.
    stain : {"transport", "reinhard", "macenko", "none"}
        Stain matching, see :func:`helpers.stain.match_stain`. Where an image has too little tissue
        to measure a stain on, the paste keeps its colours and the record says "none".
    band, fill, gap, seam, feather
        As in :func:`unknown_region` and :func:`paste`. What is blended has to lie in the band, so
        that known pixels show one image only.
    max_overlap : float
        Share of a target that may be new already.
    min_fit : float
        Smallest IoU of the pasted segment with its target; what fits worse is taken back, since
        most of the target would have to be invented. Candidates too small or too large for it
        within the limits of scale are not drawn at all.
    tries : int
        Draws for a target before it is passed over. Draws until one fits are draws by Eq. 1 among
        the candidates that fit.
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
    _check_compose(area_range, method, stain, max_overlap, min_fit, tries, band, feather)
    target_image_id = str(target_image_id)  # an array of names gives np.str_, whose repr says so
    targets = pool.of_image(target_image_id)
    if len(targets) == 0:
        raise CompositeError(f"image {target_image_id!r} has no segment in the pool")
    _check_image(image, pool.mask(targets[0]).shape, target_image_id)
    limits = {"scale_limits": scale_limits, "stretch_limit": stretch_limit}
    options = _Options(
        place=partial(PLACEMENTS[method], **limits),
        place_at_border=partial(affine_at_border, **limits),
        stain=stain,
        band=band,
        how={"fill": fill, "gap": gap, "seam": seam, "feather": feather},
        area_max=area_range[1],
        max_overlap=max_overlap,
        min_fit=min_fit,
        sizes=size_range(scale_limits, min_fit),
        tries=tries,
    )
    work = _Work(image, options, {} if stains is None else stains)
    without = []  # why nothing may replace a target
    for target in rng.permutation(targets):
        try:
            work.replace(pool, int(target), sampler, get_image, rng)
        except CompositeError as error:
            without.append(error)
        if work.replacements and work.ratio >= area_range[0]:
            label = str(pool.table["label"].iat[int(targets[0])])
            return work.finish(target_image_id, label)
    work.undo(sampler)
    if len(without) == len(targets):
        raise without[0]
    raise CompositeError(
        f"image {target_image_id!r}: {len(work.replacements)} of {len(targets)} segments were "
        f"replaced and {work.ratio:.2f} of the image is new, outside [{area_range[0]}, "
        f"{area_range[1]}]: lower area_min or fit_min, raise area_max, widen the limits of scale, "
        "or take another image"
    )


# --- inner parts ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Options:
    """Settings of :func:`compose` that hold for every replacement."""

    place: Callable[[np.ndarray, np.ndarray], np.ndarray]
    place_at_border: Callable[[np.ndarray, np.ndarray], np.ndarray]
    stain: str
    band: int
    how: dict[str, Any]  # of `paste`
    area_max: float
    max_overlap: float
    min_fit: float
    sizes: tuple[float, float]
    tries: int


class _Work:
    """State of one composite while segments are replaced one after the other."""

    def __init__(
        self, image: np.ndarray, options: _Options, stains: dict[tuple[str, str], Any]
    ) -> None:
        self.original, self.image = image, image.copy()
        self.pasted = np.zeros(image.shape[:2], bool)
        self.unknown = np.zeros(image.shape[:2], bool)
        self.replacements: list[dict[str, Any]] = []
        self.ratio = 0.0
        self.options, self.stains = options, stains
        self.reference: Any = None

    def replace(
        self,
        pool: Pool,
        target: int,
        sampler: Sampler,
        get_image: Callable[[str], np.ndarray],
        rng: np.random.Generator,
    ) -> None:
        """Replace one target, or pass it over."""
        target_mask = pool.mask(target)
        new = self.pasted | self.unknown
        overlap = np.count_nonzero(new & target_mask) / np.count_nonzero(target_mask)
        full = _share(new | target_mask) > self.options.area_max
        if overlap > self.options.max_overlap or full:
            return
        low, high = self.options.sizes
        if pool.table["border"].iat[target]:  # a larger source may go on beyond the border
            high = np.inf
        tried: list[int] = []
        while len(tried) < self.options.tries:
            try:
                source = sampler.draw(target, rng, size_range=(low, high), without=tried)
            except CompositeError:
                if not tried:
                    raise
                return
            cut = sampler.at_border(source)
            place = self.options.place_at_border if cut else self.options.place
            if self._put(pool, target, target_mask, source, place, get_image):
                return
            sampler.undo(source)
            tried.append(source)

    def _put(
        self,
        pool: Pool,
        target: int,
        target_mask: np.ndarray,
        source: int,
        place: Callable[[np.ndarray, np.ndarray], np.ndarray],
        get_image: Callable[[str], np.ndarray],
    ) -> bool:
        """Paste a source if it fits and the new area stays within its bound."""
        o, source_mask = self.options, pool.mask(source)
        affine = place(source_mask, target_mask)
        placed = warp_mask(source_mask, affine, target_mask.shape)
        fit = iou(placed, target_mask)
        if not placed.any() or fit < o.min_fit:
            return False
        source_id = pool.table["image_id"].iat[source]
        source_image = get_image(source_id)
        _check_image(source_image, source_mask.shape, source_id)
        donor, stain = self._stained(source_image, source_mask, source_id)
        image, pasted = paste(self.image, target_mask, donor, source_mask, affine, **o.how)
        removed = target_mask if o.how["gap"] == "inpaint" else pasted
        unknown = (self.unknown & ~pasted) | unknown_region(removed, pasted, band=o.band)
        kept = (self.pasted & ~removed) | pasted
        ratio = _share(kept | unknown)
        if ratio > o.area_max:
            return False
        self.image, self.unknown, self.pasted, self.ratio = image, unknown, kept, ratio
        self.replacements.append(_record(pool, target, source, affine, stain, fit))
        return True

    def _stained(
        self, source_image: np.ndarray, source_mask: np.ndarray, source_id: str
    ) -> tuple[np.ndarray, str]:
        """Source image, matched to the target's stain where the paste takes from it."""
        method, how = self.options.stain, self.options.how
        if method == "none":
            return source_image, "none"
        try:
            if self.reference is None:
                self.reference = measure_stain(self.original, method=method)
            key = (method, source_id)
            if key not in self.stains:
                self.stains[key] = measure_stain(source_image, method=method)
        except ValueError:  # too little tissue, or a single stain
            return source_image, "none"
        box = np.s_[:, :]  # its surroundings are pasted or blended too
        if how["gap"] == "inpaint" and not how["feather"]:  # but for what interpolation looks at
            box = reach(source_mask, _IDENTITY, source_mask.shape, margin=2 * LOBES)
        donor = source_image.copy()
        donor[box] = apply_stain(source_image[box], self.stains[key], self.reference, method=method)
        return donor, method

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
    pool: Pool, target: int, source: int, affine: np.ndarray, stain: str, fit: float
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
        "affine": np.asarray(affine).round(9).tolist(),
        "scales": [round(large, 6), round(small, 6)],
        "cut": bool(table["border"].iat[source]),
        "mirrored": bool(np.linalg.det(affine[:, :2]) < 0),
        "area_ratio": float(table["area"].iat[source] / table["area"].iat[target]),
        "iou": float(fit),
        "stain": stain,
    }


def _check_compose(
    area_range: tuple[float, float],
    method: str,
    stain: str,
    max_overlap: float,
    min_fit: float,
    tries: int,
    band: int,
    feather: float,
) -> None:
    if not 0 <= area_range[0] <= area_range[1] <= 1:
        raise ValueError(f"area_range={area_range}: give 0 <= low <= high <= 1")
    if method not in PLACEMENTS:
        raise ValueError(f"method={method!r} is unknown: use one of {', '.join(PLACEMENTS)}")
    if stain not in METHODS:
        raise ValueError(f"stain={stain!r} is unknown: use {', '.join(METHODS)}")
    if not (0 <= max_overlap <= 1 and 0 <= min_fit <= 1):
        raise ValueError(
            f"max_overlap={max_overlap}, min_fit={min_fit}: both are shares, from 0 to 1"
        )
    if tries < 1:
        raise ValueError(f"tries={tries}: draw at least once for a target")
    if feather * BLEND_REACH > band:
        raise ValueError(
            f"feather={feather} changes {BLEND_REACH * feather:g} pixels on either side, more than "
            f"band={band}: blended pixels would pass as known ones; lower the first or raise the "
            "second"
        )


def _check_image(image: np.ndarray, size: tuple[int, int], image_id: str) -> None:
    check_image(image, f"image {image_id!r}")
    if image.shape[:2] != size:
        raise ValueError(
            f"image {image_id!r} is {image.shape[0]} x {image.shape[1]} pixels, its segments in "
            f"the pool {size[0]} x {size[1]}: give the image that was segmented, or segment anew"
        )


def _share(mask: np.ndarray) -> float:
    return np.count_nonzero(mask) / mask.size


def _hull(a: tuple[slice, slice], b: tuple[slice, slice]) -> tuple[slice, slice]:
    """Smallest box that holds two boxes, of which the second is not empty."""
    if any(side.start == side.stop for side in a):
        return b
    return tuple(
        slice(min(x.start, y.start), max(x.stop, y.stop)) for x, y in zip(a, b, strict=True)
    )


def _rim_colour(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean colour of the pixels up to four beside the mask."""
    thick = cv2.dilate(np.ascontiguousarray(mask, np.uint8), np.ones((9, 9), np.uint8)) > 0
    rim = thick & ~mask
    return image[rim if rim.any() else mask].mean(axis=0).round().astype(np.uint8)
