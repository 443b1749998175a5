"""Procedural histology: tissue drawn from rules, with exact ground truth.

A phantom is composed the way a slide is made.
Glands, cells and fibres are laid out in micrometres; each structure takes up a density of
haematoxylin, eosin or DAB; light is then absorbed by the dyes (Beer-Lambert law) and recorded
by a scanner with blur, uneven illumination and sensor noise.

Everything is deterministic in the arguments of :func:`render`; no global random state is used.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import NamedTuple

import cv2
import numpy as np
from scipy.spatial import cKDTree

from helpers.phantom_architecture import ARCHITECTURES, GRADES

SITES: tuple[str, ...] = ("A", "B")

#: Optical density per unit of dye (rows: haematoxylin, eosin; columns: red, green, blue).
STAIN_HE = np.array([[0.47, 0.84, 0.27], [0.07, 0.97, 0.23]])
#: Optical density per unit of dye (rows: haematoxylin, DAB; columns: red, green, blue).
STAIN_IHC = np.array([[0.75, 0.61, 0.26], [0.36, 0.53, 0.77]])

_FAR = 1e6  # pixels to what a field has not; OpenCV says the largest float, which overflows
_MARGIN = 14.0  # micrometres drawn beyond the field and cut off, so that nothing knows the border


@dataclass(frozen=True)
class Phantom:
    """One rendered field with its ground truth.

    Attributes
    ----------
    image : (H, W, 3) uint8 ndarray
        The field as a scanner would record it.
    glands : (H, W) int32 ndarray
        Gland (or tumour nest) instances, 0 = none, 1..n without gaps.
    lumen : (H, W) bool ndarray
        Gland lumina; always inside ``glands``.
    nuclei : (H, W) int32 ndarray
        Nucleus instances of all cells, 0 = none, 1..n without gaps.
    grade, organ : str
        See :data:`GRADES`.
    patient : int
        Fixes the stain matrix (at each site) and the size and darkness of the nuclei.
    site : str
        "A" or "B": laboratory and scanner.
    index : int
        Number of the field.
    microns_per_pixel : float
        Edge of one output pixel in micrometres.
    """

    image: np.ndarray
    glands: np.ndarray
    lumen: np.ndarray
    nuclei: np.ndarray
    grade: str
    organ: str
    patient: int
    site: str
    index: int
    microns_per_pixel: float


# --------------------------------------------------------------------------------------------
# Beer-Lambert
# --------------------------------------------------------------------------------------------
def normalise_stains(stains):
    """Scale each stain vector to unit length.

    Parameters
    ----------
    stains : (n, 3) array_like
        Optical density of each dye in red, green and blue; not negative.

    Returns
    -------
    (n, 3) float64 ndarray

    Raises
    ------
    ValueError
        If the shape is wrong, a value is negative or not finite, or a row is zero.
    """
    stains = np.asarray(stains, dtype=np.float64)
    if stains.ndim != 2 or stains.shape[1] != 3:
        raise ValueError(
            f"stains has shape {stains.shape}, but one row of 3 optical densities (red, green, "
            "blue) a dye is needed, for example (2, 3)."
        )
    norms = np.linalg.norm(stains, axis=1, keepdims=True)
    if not np.isfinite(stains).all() or (stains < 0).any() or (norms == 0).any():
        raise ValueError(
            f"stains {stains.tolist()} must be finite and not negative with no zero row: "
            "a dye absorbs light, it does not emit it."
        )
    return stains / norms


def densities_to_rgb(densities, stains, *, white=255.0):
    """Light that is left after the dyes: Beer-Lambert law.

    ``I_c = I_0 * 10 ** -(sum_k densities_k * stains_kc)``

    Parameters
    ----------
    densities : (H, W, n) array_like
        Amount of each dye, in optical density units.
    stains : (n, 3) array_like
        Optical density of a unit of each dye in red, green and blue.
    white : float
        Intensity I_0 of the unstained slide.

    Returns
    -------
    (H, W, 3) float32 ndarray
        Intensities in [0, white]; not rounded.
    """
    od = np.asarray(densities, dtype=np.float32) @ np.asarray(stains, dtype=np.float32)
    return np.float32(white) * np.exp(np.float32(-np.log(10.0)) * od)


def rgb_to_od(image, *, white=255.0, floor=1.0):
    """Optical density ``-log10(I / I_0)``.

    Parameters
    ----------
    image : (..., 3) array_like
        Intensities; values below `floor` are raised to it, since log 0 is infinite.
    white : float
        Intensity of the unstained slide.
    floor : float
        Smallest intensity that is trusted.

    Returns
    -------
    (..., 3) float64 ndarray
    """
    return -np.log10(np.maximum(np.asarray(image, dtype=np.float64), floor) / white)


def unmix(image, stains, *, white=255.0):
    """Densities of the dyes by least squares in optical density space.

    Parameters
    ----------
    image : (H, W, 3) array_like
        Intensities.
    stains : (n, 3) array_like
        Stain vectors, n <= 3, linearly independent.
    white : float
        Intensity of the unstained slide.

    Returns
    -------
    (H, W, n) float64 ndarray

    References
    ----------
    Ruifrok and Johnston (2001), Quantification of histochemical staining by color deconvolution.
    """
    return rgb_to_od(image, white=white) @ np.linalg.pinv(np.asarray(stains, dtype=np.float64))


def stain_matrix(*, seed=0, site="A", patient=0, stain="HE"):
    """Stain vectors and strengths of one patient at one site.

    Parameters
    ----------
    seed : int
    site : {"A", "B"}
    patient : int
    stain : {"HE", "IHC"}

    Returns
    -------
    (2, 3) float64 ndarray
        Optical density of one unit of each dye; the length of a row is the dye's strength.
    """
    if site not in SITES:
        raise ValueError(f"site {site!r} is unknown; choose one of {list(SITES)}.")
    if stain not in ("HE", "IHC"):
        raise ValueError(f"stain {stain!r} is unknown; choose 'HE' or 'IHC'.")
    rng = _rng(seed, "stain", site, patient, stain)
    base = normalise_stains(STAIN_HE if stain == "HE" else STAIN_IHC)
    strength = np.ones(2)
    if site == "B":  # another laboratory: bluer, weaker haematoxylin and a more orange eosin
        shift = [[0.07, -0.05, 0.04], [-0.03, -0.03, 0.12]]
        base = normalise_stains(np.clip(base + np.array(shift), 0.01, None))
        strength = np.array([0.86, 0.78])
    base = normalise_stains(
        np.clip(base + rng.normal(0, 0.03 if stain == "HE" else 0.012, (2, 3)), 0.01, None)
    )
    if stain == "HE":
        strength = strength * [0.80, 0.82]
    strength = strength * np.exp(rng.normal(0, [0.13, 0.20]))
    return base * strength[:, None]


# --------------------------------------------------------------------------------------------
# Random fields and small geometry
# --------------------------------------------------------------------------------------------
def _rng(*key):
    """Independent generator for a key of ints and of strings of at most 8 bytes."""
    words = []
    for part in key:
        if isinstance(part, str):
            if not 0 < len(part.encode()) <= 8:
                raise ValueError(f"key {part!r} has no or more than 8 bytes, and would be cut.")
            words.append(int.from_bytes(part.encode(), "little") % 2**63)
        else:
            words.append(int(part))
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


class _Canvas:
    """The drawing surface: `shape` working pixels at `k` pixels a micrometre."""

    def __init__(self, height_um, width_um, k):
        self.k = float(k)
        self.extent = (float(height_um), float(width_um))
        self.shape = (max(8, round(height_um * k)), max(8, round(width_um * k)))
        y = (np.arange(self.shape[0], dtype=np.float32) + 0.5) / self.k
        x = (np.arange(self.shape[1], dtype=np.float32) + 0.5) / self.k
        self.x, self.y = np.meshgrid(x, y)

    def noise(self, rng, scale, *, shape=None):
        """Smooth Gaussian-like noise, unit variance, `scale` micrometres between knots."""
        h, w = self.extent
        grid = rng.standard_normal((int(h / scale) + 4, int(w / scale) + 4), dtype=np.float32)
        full = self.shape if shape is None else shape
        H, W = full
        if shape is None and scale * self.k >= 8:  # smooth enough to be drawn at a quarter
            H, W = -(-H // 4), -(-W // 4)
        # sample knots at absolute positions, so that the field does not depend on resolution
        sy, sx = h / scale / H, w / scale / W
        M = np.array([[sx, 0, 1 + 0.5 * sx - 0.5], [0, sy, 1 + 0.5 * sy - 0.5]], np.float32)
        out = cv2.warpAffine(
            grid,
            M,
            (W, H),
            flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REFLECT,
        )
        if (H, W) != full:
            out = cv2.resize(out, full[::-1], interpolation=cv2.INTER_LINEAR)
        return out * np.float32(1.35)

    def pixels(self, points):
        """Rows and columns of the working pixels at points in micrometres, (n, 2) XY."""
        columns, rows = (points * self.k).astype(int).T
        return np.clip(rows, 0, self.shape[0] - 1), np.clip(columns, 0, self.shape[1] - 1)

    def at(self, image, points):
        """Values of a working image at points in micrometres, (n, 2) XY."""
        return image[self.pixels(points)]

    def drawn(self, polygons, values=1):
        """(H, W) int32 ndarray: polygons in micrometres, one value each, later ones on top."""
        image = np.zeros(self.shape, np.int32)
        pts = np.round((polygons * self.k - 0.5) * 16).astype(np.int32)  # sub-pixel vertices
        values = np.broadcast_to(values, len(pts)).tolist()
        for p, value in zip(pts, values, strict=True):
            cv2.fillConvexPoly(image, p, value, lineType=cv2.LINE_8, shift=4)
        return image

    def soft(self, polygons, sigma):
        """(H, W) float32 ndarray in [0, 1]: polygons in micrometres, blurred."""
        return self.blur(self.drawn(polygons).astype(np.float32), sigma)

    def distance(self, mask):
        """Distance of each pixel of `mask` to the nearest one outside it, micrometres.

        Where there is none outside, it is far, but finite.
        """
        pixels = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 5)
        return np.minimum(pixels, _FAR) / np.float32(self.k)

    def blur(self, image, sigma):
        """Gaussian blur, sigma in micrometres."""
        return cv2.GaussianBlur(image, (0, 0), max(0.3, sigma * self.k))


def _smoothstep(x, low, high):
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _scatter(rng, extent, distance):
    """Jittered triangular lattice of points, (n, 2) XY micrometres, slightly beyond the field."""
    h, w = extent
    dy = distance * 0.866
    rows, cols = int(h / dy) + 3, int(w / distance) + 3
    jj, ii = np.meshgrid(np.arange(cols), np.arange(rows))
    x = (jj + 0.5 * (ii % 2) - 1 + rng.uniform(-0.3, 0.3, jj.shape) + rng.uniform()) * distance
    y = (ii - 1 + rng.uniform(-0.3, 0.3, jj.shape) + rng.uniform()) * dy
    return np.stack([x.ravel(), y.ravel()], 1)


def _thin(points, sizes, angles, widths, *, overlap=0.8):
    """Keep-mask that drops later nuclei overlapping earlier ones (ellipses, approximate)."""
    keep = np.ones(len(points), bool)
    if len(points) < 2:
        return keep
    pairs = cKDTree(points).query_pairs(float(np.quantile(sizes, 0.98)), output_type="ndarray")
    if not len(pairs):
        return keep
    a, b = pairs.min(1), pairs.max(1)
    d = points[b] - points[a]
    c, s = np.cos(angles[a]), np.sin(angles[a])
    u = (d[:, 0] * c + d[:, 1] * s) / (0.5 * (sizes[a] + sizes[b]))
    v = (-d[:, 0] * s + d[:, 1] * c) / (0.5 * (widths[a] + widths[b]))
    hit = np.hypot(u, v) < overlap
    order = np.lexsort((b[hit], a[hit]))
    for i, j in zip(a[hit][order].tolist(), b[hit][order].tolist(), strict=True):
        if keep[i]:
            keep[j] = False
    return keep


# --------------------------------------------------------------------------------------------
# Architecture
# --------------------------------------------------------------------------------------------
class _Outlines(NamedTuple):
    """Closed curves with angular harmonics, one row a gland; micrometres and radians."""

    centres: np.ndarray  # (n, 2) XY
    radius: np.ndarray
    elongation: np.ndarray
    angle: np.ndarray
    amplitude: np.ndarray  # (n, 4) of the harmonics 2 to 5
    phase: np.ndarray
    present: np.ndarray  # the others leave an empty place
    group: np.ndarray  # glands of a group run into one another
    draw: np.ndarray  # (n, 4) uniform numbers: what is inside, see :func:`_lumina`


def _gland_fields(canvas, rng, spec):
    """Lay out gland outlines.

    Each gland is a closed curve with angular harmonics; neighbours yield to one another along
    the line of equal level, which packs them without overlap.

    Returns
    -------
    labels : (H, W) int32, inside : (H, W) bool, draw : (n, 4) float a gland, direction : float
    """
    x, y = _bent_grid(canvas, rng, spec)
    direction = rng.uniform(0, np.pi)
    glands, gap = _outlines(canvas, rng, spec, direction)
    first = np.full(x.shape, -1e3, np.float32)
    second = np.full(x.shape, -1e3, np.float32)
    owner = np.zeros(x.shape, np.int32)
    for i in np.flatnonzero(_in_sight(glands, canvas.extent)):
        level = _level(glands, i, x, y)
        same = owner == glands.group[i] + 1
        better = level > first
        second = np.where(
            better & ~same, first, np.where(~better & ~same, np.maximum(second, level), second)
        )
        first = np.where(better, level, first)
        owner = np.where(better, glands.group[i] + 1, owner).astype(np.int32)
    level = np.minimum(first, 0.5 * (first - second) - 0.5 * gap).astype(np.float32)
    inside = _stretched(level, canvas.shape, cv2.INTER_CUBIC) > 0
    owner = _stretched(owner.astype(np.float32), canvas.shape, cv2.INTER_NEAREST)
    labels = np.where(inside, owner.astype(np.int32), 0).astype(np.int32)
    return labels, inside, glands.draw, direction


def _bent_grid(canvas, rng, spec):
    """Coordinates (x, y) of a coarse grid over the canvas, bent by noise."""
    h, w = canvas.extent
    step = 1.6
    rows, columns = int(np.ceil(h / step)) + 1, int(np.ceil(w / step)) + 1
    y, x = np.mgrid[:rows, :columns].astype(np.float32)
    x, y = x * (w / (columns - 1)), y * (h / (rows - 1))
    radius = float(np.mean(spec.radius))
    for scale, amplitude in ((radius * 1.2, 1.0), (radius * 0.5, 0.35)):
        x = x + spec.warp * amplitude * canvas.noise(rng, scale, shape=x.shape)
        y = y + spec.warp * amplitude * canvas.noise(rng, scale, shape=x.shape)
    return x, y


def _outlines(canvas, rng, spec, direction):
    """Outlines on a lattice stretched along a direction, and the gap that is kept between them."""
    h, w = canvas.extent
    stretch = np.sqrt(np.mean(spec.elongation))
    c, s = np.cos(direction), np.sin(direction)
    diagonal = np.hypot(h, w) * 1.1
    spacing = spec.spacing * float(np.mean(spec.radius))
    lattice = _scatter(rng, (diagonal, diagonal), spacing) - diagonal / 2
    centres = lattice * [stretch, 1 / stretch] @ np.array([[c, s], [-s, c]]) + [w / 2, h / 2]
    n = len(centres)
    drawn = {
        "radius": rng.uniform(*spec.radius, n),
        "elongation": rng.uniform(*spec.elongation, n),
        "angle": direction + (1 - spec.align) * rng.uniform(-np.pi / 2, np.pi / 2, n),
        "amplitude": rng.normal(0, spec.harmonics, (n, 4)) / np.sqrt([1, 1.5, 2, 3]),
        "phase": rng.uniform(0, 2 * np.pi, (n, 4)),
        "present": rng.uniform(size=n) >= spec.drop,
    }
    gap = rng.uniform(*spec.gap)
    group = _fused(centres, rng.uniform(size=n) < spec.fuse)
    draw = rng.uniform(size=(n, 4))
    return _Outlines(centres=centres, group=group, draw=draw, **drawn), gap


def _fused(centres, fuses):
    """Number of the group of each gland, where some join that of their nearest neighbour."""
    group = np.arange(len(centres))
    for i in np.flatnonzero(fuses):
        distance = np.hypot(*(centres - centres[i]).T)
        distance[i] = np.inf
        group[group == group[i]] = group[int(np.argmin(distance))]
    return group


def _in_sight(glands, extent):
    """Glands that are there and may reach into a field of this extent."""
    reach = glands.radius * np.sqrt(glands.elongation) * 1.5 + 4
    (x, y), (h, w) = glands.centres.T, extent
    return glands.present & (x > -reach) & (x < w + reach) & (y > -reach) & (y < h + reach)


def _level(glands, i, x, y):
    """How far places are inside the outline of gland i, in micrometres; negative outside."""
    c, s = np.cos(glands.angle[i]), np.sin(glands.angle[i])
    dx, dy = x - np.float32(glands.centres[i, 0]), y - np.float32(glands.centres[i, 1])
    stretch = np.sqrt(glands.elongation[i])
    u = ((dx * c + dy * s) / stretch).astype(np.float32)
    v = ((-dx * s + dy * c) * stretch).astype(np.float32)
    r, theta = cv2.cartToPolar(u, v)
    outline = np.ones_like(r)
    for k, (amplitude, phase) in enumerate(zip(glands.amplitude[i], glands.phase[i], strict=True)):
        outline += np.float32(amplitude) * np.cos((k + 2) * theta + np.float32(phase))
    return glands.radius[i] * np.maximum(outline, 0.3) - r


def _stretched(grid, shape, interpolation):
    """Values on a coarse grid, whose ends are those of the canvas, at the pixels of the canvas."""
    (rows, columns), (H, W) = grid.shape, shape
    sx, sy = (columns - 1) / W, (rows - 1) / H
    return cv2.warpAffine(
        grid, np.array([[sx, 0, 0.5 * sx], [0, sy, 0.5 * sy]], np.float32), (W, H),
        flags=interpolation | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE,
    )  # fmt: skip


def _separate(labels, inside, canvas):
    """Connected components of the gland labels without specks, numbered 1..n, and their labels."""
    n, comp, stats, _ = cv2.connectedComponentsWithStats(inside.astype(np.uint8), connectivity=4)
    large = np.flatnonzero(stats[1:, cv2.CC_STAT_AREA] >= 90 * canvas.k**2) + 1
    lut = np.zeros(n, np.int32)
    lut[large] = np.arange(1, len(large) + 1)
    owner = [np.bincount(labels[comp == i]).argmax() for i in large]
    return lut[comp], np.array([0, *owner], np.int64)


def _lumina(canvas, rng, spec, glands, owner, depth, draw):
    """Lumen mask: what lies deeper than the epithelium, and the holes of sieve-like glands."""
    draw = draw[np.maximum(owner - 1, 0) % len(draw)]
    thickness = spec.thickness[0] + draw[:, 0] * (spec.thickness[1] - spec.thickness[0])
    solid = draw[:, 1] < spec.solid
    deepest = np.zeros(len(owner), np.float32)
    np.maximum.at(deepest, glands.ravel(), depth.ravel())
    thickness = np.minimum(thickness, (spec.fill + 0.18 * draw[:, 3]) * deepest)
    cribriform = (draw[:, 2] < spec.cribriform) & ~solid
    thickness = np.where(solid, 1e4, thickness).astype(np.float32)
    local = thickness[glands]
    wave = 1 + 0.10 * canvas.noise(rng, 14.0) + 0.05 * canvas.noise(rng, 4.0)
    if spec.folds:
        wave = wave + spec.folds * np.maximum(canvas.noise(rng, 15.0), -0.35)
    lumen = (depth > local * np.maximum(wave, 0.55)) & (glands > 0)
    if spec.cribriform and cribriform.any():
        mask = cribriform[glands] & (glands > 0)
        lumen &= ~mask
        points = _scatter(rng, canvas.extent, 27.0)
        radii = rng.uniform(3.5, 11.0, len(points))
        ok = (canvas.at(mask.astype(np.uint8), points) > 0) & (canvas.at(depth, points) > radii + 8)
        angles = rng.uniform(0, np.pi, len(points))
        shape = _blobs(rng, points[ok], radii[ok] * 2.2, radii[ok] * 1.7, angles[ok], wobble=0.14)
        lumen |= (canvas.drawn(shape) > 0) & mask
    lumen = cv2.morphologyEx(lumen.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)) > 0
    return lumen


# --------------------------------------------------------------------------------------------
# Cells
# --------------------------------------------------------------------------------------------
_THETA = np.linspace(0, 2 * np.pi, 16, endpoint=False)


def _blobs(rng, centres, lengths, widths, angles, *, wobble=0.05, pear=0.0):
    """Ellipses with angular harmonics as polygons, (n, 16, 2) XY micrometres."""
    n = len(centres)
    r = 1 + wobble * (
        rng.normal(size=(n, 1)) * np.cos(2 * _THETA + rng.uniform(0, 6.28, (n, 1)))
        + rng.normal(size=(n, 1)) * np.cos(3 * _THETA + rng.uniform(0, 6.28, (n, 1)))
        + 0.6 * rng.normal(size=(n, 1)) * np.cos(4 * _THETA + rng.uniform(0, 6.28, (n, 1)))
    )
    u = 0.5 * np.asarray(lengths)[:, None] * r * np.cos(_THETA)
    v = 0.5 * np.asarray(widths)[:, None] * r * np.sin(_THETA) * (1 + pear * np.cos(_THETA))
    c, s = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return np.stack([centres[:, :1] + u * c - v * s, centres[:, 1:] + u * s + v * c], axis=-1)


def _row_points(canvas, rng, field_um, depth, pitch):
    """Points along the level curve ``field_um == depth`` every `pitch` micrometres."""
    mask = (field_um > depth).astype(np.uint8)
    contours, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    out = []
    for contour in contours:
        p = (contour[:, 0, :].astype(np.float64) + 0.5) / canvas.k
        if len(p) < 6:
            continue
        closed = np.vstack([p, p[:1]])
        arc = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(closed, axis=0).T))]) * 0.95
        n = max(1, round(arc[-1] / pitch))
        t = (np.arange(n) + rng.uniform(-0.22, 0.22, n) + rng.uniform()) * arc[-1] / n % arc[-1]
        out.append(np.stack([np.interp(t, arc, closed[:, 0]), np.interp(t, arc, closed[:, 1])], 1))
    return np.concatenate(out) if out else np.zeros((0, 2))


def _concat(parts):
    return {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}


def _cells(rng, points, angles, length, width, spread, chroma, *, kind, wobble=0.05):
    n = len(points)
    size = np.exp(rng.normal(0, spread, n))
    aspect = np.exp(rng.normal(0, 0.08, n))
    return {
        "points": points,
        "angles": np.broadcast_to(angles, n).astype(float),
        "length": length * size * aspect,
        "width": width * size / aspect,
        "chroma": chroma * np.exp(rng.normal(0, 0.14, n)),
        "kind": np.full(n, kind),
        "wobble": np.full(n, wobble),
    }


def _epithelium(canvas, rng, spec, glands, depth, to_lumen, size):
    """Nuclei of the glands: rows along the basement membrane, oriented towards the lumen."""
    toward = canvas.blur(np.minimum(depth, 60) - np.minimum(to_lumen, 60), 2.5)
    gx = cv2.Sobel(toward, cv2.CV_32F, 1, 0, ksize=3)
    gy = cv2.Sobel(toward, cv2.CV_32F, 0, 1, ksize=3)
    parts = []
    length, width = spec.nucleus[0] * size, spec.nucleus[1] * size

    def add(points, tangential=False, spread=spec.pleomorphism, scale=1.0, squash=1.0, tilt=0.16):
        if not len(points):
            return
        points = points + rng.normal(0, 0.5, points.shape)
        angle = np.arctan2(canvas.at(gy, points), canvas.at(gx, points))
        angle = angle + (np.pi / 2 if tangential else 0) + rng.normal(0, tilt, len(points))
        parts.append(
            _cells(
                rng,
                points,
                angle,
                length * scale,
                width * scale * squash,
                spread,
                spec.chroma,
                kind=0,
                wobble=0.04 + 0.25 * spec.pleomorphism**1.5,
            )
        )

    if spec.basal:
        add(_row_points(canvas, rng, depth, 2.4, spec.pitch * 1.5), tangential=True, squash=0.5)
    for row, d in enumerate(spec.rows):
        points = _row_points(canvas, rng, depth, d, spec.pitch * (1 + 0.12 * row))
        if len(points):
            angle = np.arctan2(canvas.at(gy, points), canvas.at(gx, points))
            shift = rng.normal(0, spec.row_jitter, len(points))
            points = points + np.stack([np.cos(angle), np.sin(angle)], 1) * shift[:, None]
            local = canvas.at(np.minimum(depth + to_lumen, 1e4), points)
            inside = canvas.at(depth, points)
            keep = (inside > 1.8) & (canvas.at(to_lumen, points) > 3.2)
            keep &= (row == 0) | (inside < spec.reach * local)
            add(points[keep], tilt=0.16 + 0.5 * spec.pleomorphism)
    deep = (depth > (spec.rows[-1] + 5)) & (glands > 0) & (to_lumen > 4.0)
    if spec.cribriform or spec.solid > 0.3:
        points = _scatter(rng, canvas.extent, spec.pitch * 1.12)
        add(points[canvas.at(deep.astype(np.uint8), points) > 0], tilt=0.7)
    return parts


def _stroma_cells(canvas, rng, spec, clear, flow, inflammation, size):
    """Fibroblasts along the fibres, lymphocytes in clusters, tumour cells between nests."""
    gx = cv2.Sobel(flow, cv2.CV_32F, 1, 0, ksize=3)
    gy = cv2.Sobel(flow, cv2.CV_32F, 0, 1, ksize=3)

    def scattered(distance, chance, room):
        """Places at least `distance` apart, each with a chance and some room from the glands."""
        points = _scatter(rng, canvas.extent, distance)
        likely = chance(points)
        return points[(rng.uniform(size=len(points)) < likely) & (canvas.at(clear, points) > room)]

    def along(points, spread):
        """Angles of the fibres, more or less."""
        angles = np.arctan2(canvas.at(gy, points), canvas.at(gx, points)) + np.pi / 2
        return angles + rng.normal(0, spread, len(points))

    points = scattered(6.6, lambda p: spec.lymphocytes * canvas.at(inflammation, p), 2.6)
    angles = rng.uniform(0, 3.14, len(points))
    parts = [_cells(rng, points, angles, 5.2, 4.5, 0.14, 0.75, kind=1, wobble=0.03)]
    points = scattered(10.5, lambda p: spec.fibroblasts, 1.6)
    angles = along(points, 0.12)
    parts.append(_cells(rng, points, angles, 9.5, 2.5, 0.25, 0.55, kind=2, wobble=0.10))
    if spec.single_cells:

        def in_patches(points):
            patch = canvas.at(canvas.noise(rng, 30.0), points)
            return spec.single_cells * _smoothstep(patch, -0.6, 1.0)

        points = scattered(9.5, in_patches, 4.5)
        angles = along(points, 0.5)
        length, width = spec.nucleus[0] * size, spec.nucleus[1] * size
        parts.append(
            _cells(
                rng, points, angles, length, width, spec.pleomorphism, spec.chroma, kind=3,
                wobble=0.08,
            )
        )  # fmt: skip
    return parts


# --------------------------------------------------------------------------------------------
# Composition
# --------------------------------------------------------------------------------------------
def _fibres(canvas, rng, outside, direction):
    """Stream function of the stroma and a fibre texture in about [-1, 1] along it.

    Fibres are level lines of a potential: a straight direction, bent by noise, and drawn around
    the glands by the distance to them.
    """
    c, s = np.float32(np.cos(direction)), np.float32(np.sin(direction))
    along = canvas.x * c + canvas.y * s
    across = -canvas.x * s + canvas.y * c
    across = across + 8 * canvas.noise(rng, 60.0) + 1.6 * canvas.noise(rng, 18.0)
    pull = np.exp(-outside / 12.0)
    flow = across + 9.0 * (1 - pull)
    along = along + 6 * canvas.noise(rng, 40.0)
    wavy = flow + 0.8 * canvas.noise(rng, 7.0)
    bound = float(np.hypot(*canvas.extent)) + 80.0  # nothing lies further out than this
    texture = np.zeros(canvas.shape, np.float32)
    for pitch, length, gain in ((0.8, 7.0, 0.55), (1.7, 14.0, 0.75), (4.5, 34.0, 0.6)):
        knots = (int(2 * bound / pitch) + 2, int(2 * bound / length) + 2)
        grid = rng.standard_normal(knots, dtype=np.float32)
        u = (along + np.float32(bound)) * np.float32(1 / length)
        v = (wavy + np.float32(bound)) * np.float32(1 / pitch)
        texture += np.float32(gain) * cv2.remap(grid, u, v, cv2.INTER_LINEAR)
    return flow.astype(np.float32), texture


def _densities(canvas, rng, spec, size, darkness, ihc):
    """Draw one field: dye densities and ground truth at working resolution."""
    labels, inside, draw, direction = _gland_fields(canvas, rng, spec)
    glands, owner = _separate(labels, inside, canvas)
    mask = glands > 0
    depth, outside = canvas.distance(mask), canvas.distance(~mask)
    lumen = _lumina(canvas, rng, spec, glands, owner, canvas.blur(depth, 1.5), draw)
    to_lumen = np.minimum(canvas.distance(~lumen), 1e3)
    tissue = mask & ~lumen

    flow, fibre = _fibres(canvas, rng, outside, direction + rng.normal(0, 0.3))
    texture = _Texture(*(canvas.noise(rng, scale) for scale in (0.9, 2.2, 24.0)))
    inflammation = _smoothstep(canvas.noise(rng, 32.0) + 0.4 * canvas.noise(rng, 9.0), -0.9, 1.2)
    haem, eosin, cleft = _stroma(canvas, rng, spec, outside, fibre, inflammation, texture)
    haem, eosin, blocked = _vessels(canvas, rng, outside, haem, eosin, texture.fine)

    cytoplasm = _cytoplasm(spec, depth, to_lumen, texture)
    haem, eosin = (
        np.where(tissue, own, rest) for own, rest in zip(cytoplasm, (haem, eosin), strict=True)
    )
    rim = np.exp(-(np.minimum(outside, 50) ** 2) / 1.1)
    eosin = eosin + 0.14 * rim * (outside > 0) * (1 - cleft)
    *content, debris = _lumen_content(canvas, rng, spec, glands, lumen)
    haem, eosin = (
        np.where(lumen, own, rest) for own, rest in zip(content, (haem, eosin), strict=True)
    )
    vacuole = np.zeros(canvas.shape, np.float32)
    if spec.goblet:
        haem, eosin, vacuole = _goblets(canvas, rng, spec, glands, depth, to_lumen, haem, eosin)

    clear = np.where(mask, 0, outside) * (1 - blocked) - cleft * 1.5
    cells = _concat(
        _epithelium(canvas, rng, spec, glands, depth, to_lumen, size)
        + _stroma_cells(canvas, rng, spec, clear, flow, inflammation, size)
    )
    keep = _thin(cells["points"], cells["length"], cells["angles"], cells["width"])
    cells = {key: value[keep] for key, value in cells.items()}
    haem, eosin, nuclei, borders = _paint_nuclei(
        canvas, rng, spec, cells, haem, eosin, tissue, texture, darkness, vacuole
    )
    haem, eosin = _paint_debris(canvas, rng, debris, haem, eosin)
    if ihc:
        haem, eosin = _immunostain(
            canvas, rng, haem, eosin, nuclei, tissue, borders, to_lumen, texture, vacuole
        )
    return haem, eosin, glands, lumen, nuclei


@dataclass(frozen=True)
class _Texture:
    """Noise that many structures share, from under a micrometre to the width of a gland."""

    fine: np.ndarray
    grain: np.ndarray
    cloud: np.ndarray


def _stroma(canvas, rng, spec, outside, fibre, inflammation, texture):
    """Fibres, loose patches, gaps between fibres, and clefts around glands where tissue shrank."""
    level, contrast = spec.fibre
    patch = canvas.noise(rng, 12.0)
    fibre = fibre + 0.25 * texture.fine
    eosin = level * (1 + 0.25 * texture.cloud + 0.15 * patch) + contrast * 0.42 * fibre
    loose = _smoothstep(0.7 * texture.cloud + 0.5 * patch, 0.2, 1.6)
    open_space = _smoothstep(0.8 * fibre - 0.9 * loose + 0.2 * patch, -0.5, -1.5)
    eosin = np.maximum(eosin, 0.04) * (1 - 0.8 * open_space) * (1 - 0.35 * loose)
    haem = 0.06 + 0.05 * inflammation * spec.lymphocytes + 0.012 * fibre
    haem = haem * (1 - 0.6 * open_space)

    width = spec.retraction * 6.5 * np.maximum(canvas.noise(rng, 26.0), 0)
    width = width * (1 + 0.4 * canvas.noise(rng, 5.0))
    cleft = (1 - _smoothstep(outside, width - 1.2, width + 1.2)) * (outside > 0)
    cleft *= width > 0.6
    return haem * (1 - 0.9 * cleft), eosin * (1 - 0.93 * cleft), cleft


def _cytoplasm(spec, depth, to_lumen, texture):
    """Bodies of the epithelial cells, with a denser edge at the lumen."""
    fine, grain, cloud = texture.fine, texture.grain, texture.cloud
    haem = spec.cytoplasm[0] * (1 + 0.18 * grain + 0.12 * fine + 0.15 * cloud)
    eosin = spec.cytoplasm[1] * (1 + 0.14 * grain + 0.10 * fine - 0.10 * cloud)
    brush = np.exp(-((to_lumen - 1.0) ** 2) / 1.4)
    eosin = eosin * (1 + (0.2 if spec.goblet > 0.5 else 0.4) * brush)
    pale = 1 - 0.2 * spec.goblet * _smoothstep(depth, 7.0, 14.0)
    return haem * pale, eosin * pale


def _vessels(canvas, rng, outside, haem, eosin, fine):
    """Capillaries with erythrocytes, and spilled erythrocytes, where the stroma is wide."""
    blocked = np.zeros(canvas.shape, np.float32)
    points = _scatter(rng, canvas.extent, 60.0)
    rooms = canvas.at(outside, points)
    take = (rooms > 7) & (rng.uniform(size=len(points)) < 0.5)
    for p, room in zip(points[take], rooms[take], strict=True):
        r = float(min(room - 2.0, rng.uniform(4, 10)))
        angle = rng.uniform(0, np.pi)
        shape = _blobs(rng, p[None], [2.6 * r], [1.5 * r], [angle], wobble=0.10)
        soft = canvas.soft(shape, 0.5)
        haem = haem * (1 - 0.9 * soft)
        eosin = eosin * (1 - 0.9 * soft) + 0.25 * canvas.blur(soft * (1 - soft), 0.5)
        blocked = np.maximum(blocked, soft)
        cells = p + rng.normal(0, r * 0.45, (int(rng.integers(2, 14)), 2))
        cells = cells[canvas.at(soft, cells) > 0.6]
        if len(cells):
            sides = np.full((2, len(cells)), [[5.2], [4.6]])
            shape = _blobs(rng, cells, *sides, rng.uniform(0, 3, len(cells)), wobble=0.06)
            redness = canvas.soft(shape, 0.4)
            eosin = eosin * (1 - redness) + redness * (0.75 + 0.08 * fine)
    return haem, eosin, blocked


def _lumen_content(canvas, rng, spec, glands, lumen):
    """Mucin strands and debris in lumina; returns densities and where debris lies."""
    draw = rng.uniform(size=(int(glands.max()) + 1, 2))
    has_mucin = (draw[:, 0] < spec.mucin)[glands] & lumen
    has_debris = (draw[:, 1] < spec.debris)[glands] & lumen
    strands = _smoothstep(canvas.noise(rng, 5.0) + 0.8 * canvas.noise(rng, 2.0), 0.1, 1.8)
    body = _smoothstep(canvas.noise(rng, 18.0), -0.8, 0.9)
    haem = np.full(canvas.shape, 0.008, np.float32)
    eosin = np.full(canvas.shape, 0.012, np.float32)
    haem = haem + has_mucin * (0.045 * body + 0.07 * strands * body)
    eosin = eosin + has_mucin * (0.05 * body + 0.06 * strands * body)
    inner = canvas.blur(lumen.astype(np.float32), 3.0) > 0.8
    lump = _smoothstep(canvas.noise(rng, 10.0) + 0.5 * canvas.noise(rng, 3.0), -0.2, 0.7)
    amount = has_debris * inner * lump
    eosin = eosin + amount * (0.30 + 0.12 * canvas.noise(rng, 2.0))
    haem = haem + 0.10 * amount
    return haem, np.maximum(eosin, 0.01), amount


def _paint_debris(canvas, rng, debris, haem, eosin):
    """Dark nuclear dust of dead cells inside the debris."""
    points = _scatter(rng, canvas.extent, 5.0)
    points = points[(canvas.at(debris, points) > 0.5) & (rng.uniform(size=len(points)) < 0.5)]
    if len(points):
        d = rng.uniform(1.2, 4.2, len(points))
        shape = _blobs(rng, points, d, d * 0.8, rng.uniform(0, 3, len(d)), wobble=0.12)
        soft = canvas.soft(shape, 0.4)
        haem = haem + 0.55 * soft
        eosin = eosin + 0.10 * soft
    return haem, eosin


def _goblets(canvas, rng, spec, glands, depth, to_lumen, haem, eosin):
    """Pale mucin vacuoles of goblet cells between the basal nuclei and the lumen."""
    vac = np.zeros(canvas.shape, np.uint8)
    parts = []
    for d, size in ((14.0, 9.5), (23.0, 8.0), (31.0, 7.0)):
        points = _row_points(canvas, rng, depth, d, size)
        if len(points):
            points = points + rng.normal(0, 0.9, points.shape)
            parts.append((points, np.full(len(points), size)))
    if parts:
        points, sizes = (np.concatenate(p) for p in zip(*parts, strict=True))
        keep = _thin(points, sizes, np.zeros(len(points)), sizes, overlap=0.72)
        points, sizes = points[keep], sizes[keep]
        seeds = np.full(canvas.shape, 1, np.uint8)
        at = canvas.pixels(points)
        seeds[at] = 0
        reach, zone = cv2.distanceTransformWithLabels(
            seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
        )
        take = np.zeros(int(zone.max()) + 1, np.float32)
        limit = 0.58 * sizes * np.exp(rng.normal(0, 0.12, len(points)))
        take[zone[at]] = np.where(rng.uniform(size=len(points)) < spec.goblet, limit, 0)
        vac = (reach / np.float32(canvas.k) < take[zone]) & ~_seams(zone) & (depth > 8.2)
        vac = (vac & (to_lumen > 1.2)).astype(np.uint8)
    vac &= (glands > 0).astype(np.uint8)
    edge = cv2.distanceTransform(vac, cv2.DIST_L2, 3) / np.float32(canvas.k)
    soft = canvas.blur(_smoothstep(edge, 0.1, 1.3), 0.35)
    mucin = 0.05 + 0.03 * canvas.noise(rng, 3.0)
    haem = haem * (1 - soft) + soft * np.maximum(mucin + 0.02, 0.01)
    eosin = eosin * (1 - soft) + soft * np.maximum(mucin, 0.01)
    return haem, eosin, soft


def _paint_nuclei(canvas, rng, spec, cells, haem, eosin, tissue, texture, darkness, vacuole):
    """Nuclei with chromatin, membrane and nucleoli; returns densities, labels, cell borders."""
    n = len(cells["points"])
    if n == 0:
        nuclei, borders = np.zeros(canvas.shape, np.int32), np.zeros(canvas.shape, np.float32)
        return haem, eosin, nuclei, borders
    outlines = _blobs(
        rng, cells["points"], cells["length"], cells["width"], cells["angles"],
        wobble=cells["wobble"][:, None],
    )  # fmt: skip
    haem, eosin = _lone_cytoplasm(canvas, rng, spec, cells, haem, eosin)
    nuclei = canvas.drawn(outlines, np.arange(1, n + 1))
    inside = (nuclei > 0).astype(np.uint8)
    soft = canvas.blur(inside.astype(np.float32), 0.5)
    body = _chromatin(canvas, rng, spec, cells, nuclei, inside, texture, darkness)
    haem = haem * (1 - 0.8 * soft) + body
    eosin = eosin * (1 - 0.45 * soft) + 0.10 * soft
    dot = _nucleoli(canvas, rng, spec, cells, inside)
    if dot is not None:
        haem, eosin = haem + 0.40 * dot, eosin + 0.12 * dot
    borders = canvas.blur(_seams(_territories(nuclei, inside)).astype(np.float32), 0.45) * tissue
    eosin = eosin + 0.10 * borders * (1 - soft) * (1 - vacuole)
    return haem, eosin, nuclei, borders


def _lone_cytoplasm(canvas, rng, spec, cells, haem, eosin):
    """Densities with the little cytoplasm that tumour cells in the stroma bring with them."""
    lone = cells["kind"] == 3
    if not lone.any():
        return haem, eosin
    length, width = cells["length"][lone] * 1.7, cells["width"][lone] * 1.7
    shape = _blobs(rng, cells["points"][lone], length, width, cells["angles"][lone], wobble=0.10)
    soft = canvas.soft(shape, 0.6)
    return tuple(
        density * (1 - soft) + soft * own
        for density, own in zip((haem, eosin), spec.cytoplasm, strict=True)
    )


def _chromatin(canvas, rng, spec, cells, nuclei, inside, texture, darkness):
    """Haematoxylin of the nuclei: granular, darker at the rim, pale inside vesicular ones."""
    chroma = np.concatenate([[0], cells["chroma"] * darkness]).astype(np.float32)
    of_tumour = (cells["kind"] != 1) & (cells["kind"] != 2)
    pale = (rng.uniform(size=len(of_tumour)) < spec.nucleoli) & of_tumour
    vesicular = np.concatenate([[0], pale]).astype(np.float32)[nuclei]
    edge = cv2.distanceTransform(inside, cv2.DIST_L2, 5) / np.float32(canvas.k)
    rim = np.exp(-((edge - 0.7) ** 2) / 0.5)
    grain = 0.86 + 0.24 * texture.fine + 0.14 * texture.grain + 0.12 * rim
    grain = grain * (1 - vesicular * 0.42 * _smoothstep(edge, 0.5, 1.6))
    return canvas.blur(chroma[nuclei] * np.clip(grain, 0.25, 1.5), 0.5)


def _nucleoli(canvas, rng, spec, cells, inside):
    """Dark dots in some nuclei of epithelium and tumour; None if there is none."""
    n = len(cells["points"])
    spots = np.flatnonzero((rng.uniform(size=n) < spec.nucleoli) & (cells["kind"] % 3 == 0))
    if not len(spots):
        return None
    where = cells["points"][spots] + rng.normal(0, 0.7, (len(spots), 2))
    d = rng.uniform(1.2, 2.0, len(spots))
    return canvas.soft(_blobs(rng, where, d, d, np.zeros(len(d))), 0.3) * inside


def _territories(nuclei, inside):
    """Label of the nearest nucleus, everywhere."""
    _, pixel = cv2.distanceTransformWithLabels(
        1 - inside, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    ids = np.zeros(int(pixel.max()) + 1, np.int32)
    ids[pixel[inside > 0]] = nuclei[inside > 0]
    return ids[pixel]


def _seams(labels):
    """Pixels whose label is not that of the neighbour to the left or above."""
    seams = np.zeros(labels.shape, bool)
    seams[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    seams[1:, :] |= labels[1:, :] != labels[:-1, :]
    return seams


def _immunostain(canvas, rng, haem, eosin, nuclei, tissue, borders, to_lumen, texture, vacuole):
    """Haematoxylin counterstain and membranous DAB in the epithelium."""
    soft = canvas.blur((nuclei > 0).astype(np.float32), 0.35)
    counter = 0.46 * canvas.blur(np.maximum(haem - 0.12, 0), 0.35) + 0.20 * eosin * ~tissue + 0.03
    counter = counter * (1 - 0.30 * tissue)
    apical = np.exp(-to_lumen / 1.4)
    streaks = canvas.noise(rng, 1.3)
    brown = (
        0.50 * (1 + 0.22 * texture.cloud + 0.12 * texture.grain + 0.10 * streaks)
        + 0.70 * borders
        + 0.35 * apical
    )
    brown = brown * tissue * (1 - 0.45 * soft + 0.2 * borders) * (1 - 0.8 * vacuole)
    dab = canvas.blur(brown.astype(np.float32), 0.35) + 0.10 * eosin * ~tissue + 0.01
    return counter.astype(np.float32), np.maximum(dab, 0)


# --------------------------------------------------------------------------------------------
# The scanner
# --------------------------------------------------------------------------------------------
def _scan(rgb, rng, shape, site, ss):
    """Optics and sensor: blur, falloff of the illumination, down-sampling, noise."""
    sigma = (0.85 if site == "A" else 1.25) * ss / 2
    rgb = cv2.GaussianBlur(rgb, (0, 0), sigma)
    H, W = shape
    rgb = cv2.resize(rgb, (W, H), interpolation=cv2.INTER_AREA)
    if site == "A":  # a scanner that sharpens
        rgb = rgb + 0.30 * (rgb - cv2.GaussianBlur(rgb, (0, 0), 1.0))
    cx, cy = rng.uniform(0.3, 0.7, 2)
    y = (np.arange(H, dtype=np.float32)[:, None] + 0.5) / H - np.float32(cy)
    x = (np.arange(W, dtype=np.float32)[None] + 0.5) / W - np.float32(cx)
    fall = 1 - np.float32(0.035 if site == "A" else 0.08) * (x * x + y * y) * 2
    noise = rng.standard_normal((H, W, 3), dtype=np.float32)
    noise = (
        noise * (1.6 + 0.8 * np.sqrt(np.clip(rgb, 0, 255) / 255)) * (1.0 if site == "A" else 1.4)
    )
    white = np.array([0.985, 0.975, 0.98] if site == "A" else [0.955, 0.95, 0.925], np.float32)
    out = rgb * fall[..., None] * white + noise
    return np.clip(np.round(out), 0, 255).astype(np.uint8)


def _resize_labels(labels, shape):
    """Labels of output pixels of which at least half is labelled, numbered without gaps.

    The number is that of a pixel at the centre; where several meet there, as of 2 x 2 that make
    one, that of the first which is labelled: any fixed one of them would shift all outlines.
    """
    covered = cv2.resize((labels > 0).astype(np.float32), shape[::-1], interpolation=cv2.INTER_AREA)
    rows, columns = (
        [
            np.clip((middle + side).astype(int), 0, old - 1)
            for middle in [(np.arange(new) + 0.5) * old / new]
            for side in (-1e-6, 0)
        ]
        for new, old in zip(shape, labels.shape, strict=True)
    )
    small = np.zeros(shape, labels.dtype)
    for i, j in itertools.product(rows, columns):
        small = np.where(small == 0, labels[i[:, None], j], small)
    small[covered < 0.5] = 0
    present = np.bincount(small.ravel(), minlength=1) > 0
    present[0] = False
    lut = np.zeros(len(present), np.int32)
    lut[present] = np.arange(1, present.sum() + 1)
    return lut[small]


def _check(index, seed, grade, organ, size, site, patient, stain, microns_per_pixel):
    if organ not in GRADES:
        raise ValueError(f"organ {organ!r} is unknown; choose one of {sorted(GRADES)}.")
    if grade not in GRADES[organ]:
        raise ValueError(
            f"grade {grade!r} is unknown for {organ}; choose one of {list(GRADES[organ])}."
        )
    if site not in SITES:
        raise ValueError(f"site {site!r} is unknown; choose one of {list(SITES)}.")
    for name, value in (("index", index), ("seed", seed), ("patient", patient)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
            raise ValueError(f"{name} is {value!r}, but a whole number >= 0 is needed.")
    size = tuple(size) if np.iterable(size) else (size, size)
    if len(size) != 2 or not all(isinstance(v, (int, np.integer)) and v >= 16 for v in size):
        raise ValueError(
            f"size is {size!r}, but (height, width) of at least 16 pixels each is needed."
        )
    if isinstance(stain, str) and stain not in ("HE", "IHC"):
        raise ValueError(f"stain {stain!r} is unknown; choose 'HE', 'IHC' or a (2, 3) matrix.")
    if not isinstance(stain, str):
        rows = len(normalise_stains(stain))
        if rows != 2:
            raise ValueError(f"stain has {rows} rows, but haematoxylin and eosin are 2.")
    if microns_per_pixel is not None and not 0.1 <= microns_per_pixel <= 4:
        raise ValueError(f"microns_per_pixel is {microns_per_pixel!r}, but 0.1 to 4 is supported.")
    return int(size[0]), int(size[1])


def render(
    index,
    *,
    seed=0,
    grade="benign",
    organ="colon",
    size=(256, 256),
    site="A",
    patient=0,
    stain="HE",
    microns_per_pixel=None,
    architecture=None,
):
    """Render one field of tissue.

    The tissue depends on (seed, index, grade, organ, patient) and on the extent of the field in
    micrometres: the same field at another site is the same tissue, and with another number of
    pixels it has the same glands, while nuclei are drawn anew.

    Parameters
    ----------
    index : int
        Number of the field, >= 0.
    seed : int
        Seed of the whole series, >= 0.
    grade, organ : str
        See :data:`GRADES`.
    size : (int, int)
        Height and width in pixels, at least 16 each.
    site : {"A", "B"}
        Laboratory and scanner: stain vectors, strengths, sharpness, noise.
    patient : int
        Fixes stain jitter and the size and darkness of nuclei.
    stain : {"HE", "IHC"} or (2, 3) array_like
        Haematoxylin and eosin; haematoxylin and DAB; or stain vectors to use for H&E as they are.
    microns_per_pixel : float, optional
        Edge of a pixel, 0.1 to 4. By default the short side of the field spans 256 micrometres
        (1 micrometre a pixel at 256 pixels), or 120 micrometres for IHC.
    architecture : Architecture, optional
        What glands and stroma look like; by default that of the organ and grade.

    Returns
    -------
    Phantom

    Raises
    ------
    ValueError
        If an argument is unknown or out of range.
    """
    H, W = _check(index, seed, grade, organ, size, site, patient, stain, microns_per_pixel)
    ihc = isinstance(stain, str) and stain == "IHC"
    mpp = microns_per_pixel or (120.0 if ihc else 256.0) / min(H, W)
    ss = 2.0 if mpp >= 0.75 else max(1.0, 1.5 * mpp / 0.75)
    rng = _rng(seed, "field", index, organ, grade)
    person = _rng(seed, "patient", patient)
    size_factor = float(np.exp(person.normal(0, 0.06)))
    darkness = float(np.exp(person.normal(0, 0.08)))
    spec = architecture or ARCHITECTURES[organ, grade]
    if ihc:
        spec = replace(spec, retraction=0.05, lymphocytes=0.3 * spec.lymphocytes)
    k = ss / mpp
    canvas = _Canvas(H * mpp + 2 * _MARGIN, W * mpp + 2 * _MARGIN, k)
    haem, eosin, glands, lumen, nuclei = _densities(canvas, rng, spec, size_factor, darkness, ihc)
    edge = round(_MARGIN * k)
    crop = np.s_[edge : canvas.shape[0] - edge, edge : canvas.shape[1] - edge]
    if isinstance(stain, str):
        stains = stain_matrix(seed=seed, site=site, patient=patient, stain=stain)
    else:
        stains = np.asarray(stain, dtype=np.float64)
    densities = np.stack([np.maximum(haem[crop], 0.0), np.maximum(eosin[crop], 0.0)], -1)
    rgb = densities_to_rgb(densities, stains)
    noise_rng = _rng(seed, "sensor", index, organ, grade, site, patient, H, W)
    image = _scan(rgb, noise_rng, (H, W), site, ss)
    gland_map = _resize_labels(glands[crop], (H, W))
    lumen_map = _resize_labels(lumen[crop].astype(np.int32), (H, W)) > 0
    return Phantom(
        image=image,
        glands=gland_map,
        lumen=lumen_map & (gland_map > 0),
        nuclei=_resize_labels(nuclei[crop], (H, W)),
        grade=grade,
        organ=organ,
        patient=int(patient),
        site=site,
        index=int(index),
        microns_per_pixel=float(mpp),
    )
