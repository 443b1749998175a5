"""What distinguishes the grades of :mod:`helpers.phantom`: sizes, shapes and numbers of structures.

:data:`ARCHITECTURES` holds one entry for each organ and grade; :func:`vary` draws tissue that
lies between and beyond them, so that a network trained on it does not learn eight patterns only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

GRADES: dict[str, tuple[str, ...]] = {
    "colon": ("benign", "well", "moderate", "poor"),
    "prostate": ("benign", "gleason3", "gleason4", "gleason5"),
}


@dataclass(frozen=True)
class Architecture:
    """Architecture of one grade. Lengths in micrometres, ranges as (low, high)."""

    radius: tuple[float, float]
    elongation: tuple[float, float]
    spacing: float  # between gland centres, in units of the mean radius
    gap: tuple[float, float]  # stroma left between neighbours
    harmonics: float  # relative amplitude of the outline's angular harmonics
    warp: float  # amplitude of the irregular displacement of outlines
    thickness: tuple[float, float]  # epithelium, from basement membrane to lumen
    rows: tuple[float, ...]  # depths of the rows of nuclei
    row_jitter: float
    nucleus: tuple[float, float]  # length and width
    pitch: float  # distance of nuclei along a row
    pleomorphism: float  # relative spread of nuclear size
    chroma: float  # haematoxylin in the nuclei
    cytoplasm: tuple[float, float]  # haematoxylin and eosin in the cell body
    fill: float = 0.62  # least share of the half-width that the epithelium takes up
    reach: float = 0.85  # share of the epithelium that nuclei occupy
    align: float = 0.8  # 0 = glands point anywhere, 1 = all along one direction
    drop: float = 0.0  # share of gland sites left empty
    fuse: float = 0.0  # probability that neighbours fuse
    cribriform: float = 0.0  # probability that a gland is filled and pierced by round lumina
    solid: float = 0.0  # probability that a gland has no lumen
    goblet: float = 0.0  # share of goblet cells
    folds: float = 0.0  # relative depth of papillary infoldings of the lumen
    basal: bool = False  # an outer row of flat basal cells
    lymphocytes: float = 0.5  # in the stroma, 0..1
    fibroblasts: float = 0.5
    fibre: tuple[float, float] = (0.30, 0.20)  # eosin in the stroma: level and contrast
    single_cells: float = 0.0  # tumour cells in the stroma that belong to no nest
    debris: float = 0.2  # share of lumina with necrotic debris
    mucin: float = 0.3  # share of lumina with mucin
    retraction: float = 0.25  # white cleft between gland and stroma
    nucleoli: float = 0.2


ARCHITECTURES: dict[tuple[str, str], Architecture] = {
    ("colon", "benign"): Architecture(
        radius=(33, 43),
        elongation=(1.0, 1.6),
        spacing=2.25,
        gap=(10, 18),
        harmonics=0.035,
        warp=2.5,
        thickness=(23, 29),
        rows=(4.2, 7.5),
        row_jitter=1.0,
        nucleus=(7.0, 4.4),
        pitch=4.5,
        pleomorphism=0.10,
        chroma=0.66,
        cytoplasm=(0.17, 0.24),
        align=0.95,
        goblet=0.92,
        fill=0.76,
        lymphocytes=0.85,
        fibroblasts=0.25,
        fibre=(0.20, 0.16),
        debris=0.0,
        mucin=0.9,
        retraction=0.35,
        nucleoli=0.0,
    ),
    ("colon", "well"): Architecture(
        radius=(34, 52),
        elongation=(1.15, 2.3),
        spacing=2.05,
        gap=(5, 10),
        harmonics=0.07,
        warp=6,
        thickness=(23, 30),
        reach=0.62,
        rows=(5.0, 9.5, 13.5),
        row_jitter=2.2,
        nucleus=(10.5, 4.0),
        pitch=4.9,
        pleomorphism=0.16,
        chroma=0.62,
        cytoplasm=(0.20, 0.34),
        align=0.7,
        goblet=0.12,
        lymphocytes=0.55,
        fibroblasts=0.35,
        debris=0.25,
        mucin=0.4,
        retraction=0.3,
        nucleoli=0.1,
    ),
    ("colon", "moderate"): Architecture(
        radius=(24, 56),
        elongation=(1.1, 2.4),
        spacing=2.2,
        gap=(8, 16),
        harmonics=0.13,
        warp=11,
        thickness=(16, 22),
        reach=0.68,
        rows=(5.0, 10.0),
        row_jitter=2.4,
        nucleus=(9.4, 5.2),
        pitch=5.6,
        pleomorphism=0.22,
        chroma=0.58,
        cytoplasm=(0.20, 0.33),
        align=0.35,
        drop=0.05,
        fuse=0.22,
        cribriform=0.45,
        solid=0.04,
        lymphocytes=0.35,
        fibroblasts=0.6,
        fibre=(0.30, 0.22),
        debris=0.45,
        mucin=0.2,
        retraction=0.3,
        nucleoli=0.5,
    ),
    ("colon", "poor"): Architecture(
        radius=(11, 36),
        elongation=(1.0, 3.2),
        spacing=2.15,
        gap=(4, 10),
        harmonics=0.16,
        warp=10,
        thickness=(15, 20),
        rows=(5.0, 11.5, 18.0, 24.5),
        row_jitter=3.5,
        nucleus=(8.6, 6.6),
        pitch=7.0,
        pleomorphism=0.30,
        chroma=0.56,
        cytoplasm=(0.20, 0.32),
        align=0.5,
        drop=0.12,
        fuse=0.25,
        solid=0.82,
        lymphocytes=0.45,
        fibroblasts=0.75,
        fibre=(0.30, 0.24),
        single_cells=0.35,
        debris=0.3,
        mucin=0.1,
        retraction=0.2,
        nucleoli=0.8,
    ),
    ("prostate", "benign"): Architecture(
        radius=(34, 66),
        elongation=(1.0, 1.7),
        spacing=2.25,
        gap=(14, 26),
        harmonics=0.10,
        warp=8,
        thickness=(14, 18),
        rows=(8.5,),
        row_jitter=1.4,
        nucleus=(6.6, 5.4),
        pitch=5.8,
        pleomorphism=0.10,
        chroma=0.60,
        cytoplasm=(0.10, 0.26),
        align=0.2,
        folds=0.55,
        basal=True,
        lymphocytes=0.12,
        fibroblasts=0.6,
        fibre=(0.42, 0.20),
        debris=0.05,
        mucin=0.15,
        retraction=0.15,
        nucleoli=0.0,
    ),
    ("prostate", "gleason3"): Architecture(
        radius=(15, 27),
        elongation=(1.0, 1.45),
        spacing=2.45,
        gap=(6, 14),
        harmonics=0.06,
        warp=4,
        thickness=(11, 15),
        rows=(5.0,),
        row_jitter=1.2,
        nucleus=(6.8, 6.0),
        pitch=6.3,
        pleomorphism=0.14,
        chroma=0.60,
        cytoplasm=(0.15, 0.28),
        align=0.2,
        drop=0.06,
        solid=0.03,
        lymphocytes=0.12,
        fibroblasts=0.55,
        fibre=(0.40, 0.20),
        debris=0.02,
        mucin=0.3,
        retraction=0.25,
        nucleoli=0.7,
    ),
    ("prostate", "gleason4"): Architecture(
        radius=(20, 58),
        elongation=(1.0, 1.6),
        spacing=1.95,
        gap=(4, 10),
        harmonics=0.12,
        warp=9,
        thickness=(12, 16),
        rows=(5.0, 12.0),
        row_jitter=2.2,
        nucleus=(7.2, 6.4),
        pitch=6.8,
        pleomorphism=0.18,
        chroma=0.60,
        cytoplasm=(0.17, 0.27),
        align=0.2,
        fuse=0.5,
        cribriform=0.7,
        solid=0.1,
        lymphocytes=0.12,
        fibroblasts=0.55,
        fibre=(0.40, 0.20),
        debris=0.05,
        mucin=0.2,
        retraction=0.35,
        nucleoli=0.8,
    ),
    ("prostate", "gleason5"): Architecture(
        radius=(6, 26),
        elongation=(1.0, 3.6),
        spacing=2.0,
        gap=(3, 8),
        harmonics=0.16,
        warp=9,
        thickness=(15, 20),
        rows=(4.5, 11.5, 18.5, 25.5),
        row_jitter=3.2,
        nucleus=(7.8, 6.8),
        pitch=7.2,
        pleomorphism=0.28,
        chroma=0.60,
        cytoplasm=(0.17, 0.27),
        align=0.6,
        drop=0.15,
        fuse=0.25,
        solid=0.97,
        lymphocytes=0.15,
        fibroblasts=0.6,
        fibre=(0.40, 0.22),
        single_cells=0.9,
        debris=0.15,
        mucin=0.05,
        retraction=0.2,
        nucleoli=0.85,
    ),
}


def vary(architecture: Architecture, rng: np.random.Generator) -> Architecture:
    """Draw an architecture around and beyond a given one.

    Glands become smaller or up to two and a half times larger, longer, closer or farther apart;
    their epithelium thinner or stratified, pale with goblet cells or dark; stroma loose or dense.
    """

    def factor(low, high):
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))

    def maybe(chance, low, high, otherwise):
        return float(rng.uniform(low, high)) if rng.random() < chance else otherwise

    a, size = architecture, factor(0.7, 2.5)
    length, width = a.nucleus[0] * factor(0.8, 1.3), a.nucleus[1] * factor(0.85, 1.2)
    rows = 4.5 + factor(0.45, 0.9) * length * np.arange(int(rng.integers(1, 5)))
    return replace(
        a,
        radius=(a.radius[0] * size, a.radius[1] * size * factor(1, 1.3)),
        elongation=(a.elongation[0], a.elongation[1] * factor(1, 2.5)),
        spacing=a.spacing * factor(0.9, 1.3),
        gap=(a.gap[0] * factor(0.5, 1), a.gap[1] * factor(0.8, 2)),
        harmonics=a.harmonics * factor(0.6, 1.6),
        warp=a.warp * factor(0.5, 1.8),
        thickness=tuple(t * factor(0.75, 1.5) for t in a.thickness),
        fill=float(rng.uniform(0.3, 0.8)),
        rows=tuple(rows.tolist()),
        reach=float(rng.uniform(0.5, 0.95)),
        nucleus=(length, min(width, length)),
        pitch=a.pitch * factor(0.8, 1.2),
        chroma=a.chroma * factor(0.85, 1.2),
        cytoplasm=(a.cytoplasm[0] * factor(0.6, 1.6), a.cytoplasm[1] * factor(0.7, 1.4)),
        align=float(rng.uniform(0, 1)),
        drop=maybe(0.5, 0, 0.4, a.drop),
        fuse=maybe(0.3, 0, 0.3, a.fuse),
        cribriform=maybe(0.3, 0, 0.6, a.cribriform),
        solid=maybe(0.3, 0, 0.4, a.solid),
        goblet=maybe(0.4, 0, 0.95, a.goblet),
        folds=maybe(0.25, 0, 0.6, a.folds),
        lymphocytes=float(rng.uniform(0, 1)),
        fibroblasts=float(rng.uniform(0.1, 0.9)),
        fibre=(a.fibre[0] * factor(0.6, 1.4), a.fibre[1] * factor(0.7, 1.4)),
        single_cells=0.5 * a.single_cells,
        debris=float(rng.uniform(0, 0.5)),
        mucin=float(rng.uniform(0, 1)),
        retraction=float(rng.uniform(0, 0.6)),
    )
