"""What a replacement costs in realism: real crops that are only moved, and crops of composites.

``python -m tests.benchmarks.bench_replacement`` measures kernel distances (KID x 1000) on the pool
of a finished run, ``--run NAME`` on that of another. The first table warps whole segments in their
own images, so that nothing but the warp can tell them from real ones; the second replaces segments
with one setting of chapter 04 changed at a time, without any healing; the third mixes source and
target along the same seams in other ways; the fourth heals the same composites from other levels
of noise, and with other bands; the fifth blends in other widths, and heals each. Pairs of crops
that show the same image are left out, and classes weighted by their shares, as in chapter 06.
"""

from __future__ import annotations

import argparse
import time
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd
from PIL import Image

from helpers import (
    config,
    diffusion,
    execute,
    features,
    latent,
    quality,
    runs,
    statistics,
    synthesis,
)
from helpers.placement import moments, warp_image, warp_mask
from helpers.pool import Pool
from helpers.replacement import Composite, Sampler, effective_sources, paste, shown_in
from helpers.seam import blend
from helpers.stain import colour_gap, match_stain

TABLES = ("moves", "settings", "mixes", "healing", "widths")

#: What is changed of the settings of chapter 04, of the draws or of the composing.
CHANGES = {
    "as in chapter 04": {},
    "cut sources refused": {"cut_sources": "refuse"},
    "cut sources anywhere": {"cut_sources": "anywhere"},
    "scales 0.8 to 1.25": {"scale_limits": (0.8, 1.25)},
    "scales 0.5 to 2": {"scale_limits": (0.5, 2.0), "stretch_limit": 2.0},
    "placed by moments": {"method": "moments"},
    "no stain matching": {"stain": "none"},
    "stain by Reinhard": {"stain": "reinhard"},
    "stain by Macenko": {"stain": "macenko"},
    "seam on the outline": {"seam": (0, 0)},
    "hard edge": {"seam": (0, 0), "feather": 0},
}


def settings() -> dict[str, object]:
    """Arguments of the sampler and of :func:`helpers.replacement.compose`, as of chapter 04."""
    chapter = "04_probabilistic_replacement"
    p = config.build(chapter, execute.parameters_cell(chapter))
    return p.options | {"cut_sources": p.cut_sources}


def turn(angle: float) -> np.ndarray:
    """Rotation matrix."""
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


#: Linear maps about the centre of a segment, from a random angle.
MOVES: dict[str, Callable[[float], np.ndarray]] = {
    "as they are": lambda angle: np.eye(2),
    "turned": turn,
    "stretched by 1.12": lambda angle: turn(angle) @ np.diag([1.12, 1 / 1.12]) @ turn(-angle),
    "enlarged by 1.25": lambda angle: 1.25 * np.eye(2),
    "reduced to 0.8": lambda angle: 0.8 * np.eye(2),
}


def moved(image: np.ndarray, mask: np.ndarray, linear: np.ndarray) -> np.ndarray:
    """Crop of a segment after a linear map about its centre, in its own image."""
    centre = moments(mask)[0]
    affine = np.c_[linear, centre - linear @ centre]
    return features.crop(warp_image(image, affine, mask.shape), warp_mask(mask, affine, mask.shape))


def warped(pool: Pool, rows: np.ndarray, image, embed, rng: np.random.Generator) -> pd.DataFrame:
    """Kernel distance between one half of the whole segments and the other, moved, both ways."""
    whole = rng.permutation(rows[~pool.table["border"].to_numpy(bool)[rows]])
    halves = whole[::2], whole[1::2]

    def embedded(rows, move):
        return embed(
            moved(image(pool.table["image_id"].iat[i]), pool.mask(int(i)), move(angle))
            for i, angle in zip(rows, rng.uniform(0, 2 * np.pi, len(rows)), strict=True)
        )

    real = [embedded(rows, MOVES["as they are"]) for rows in halves]
    own = [[{name} for name in pool.table["image_id"].iloc[rows]] for rows in halves]
    found = {}
    for name, move in MOVES.items():
        far = [embedded(rows, move) for rows in halves]
        found[name] = 500 * sum(
            quality.mmd2(real[i], far[j], origins=(own[i], own[j])) for i, j in ((0, 1), (1, 0))
        )
    return pd.DataFrame({"KID x 1000": found, "n": len(whole)})


def composed(
    pool: Pool, classes: list[str], image, n: int, **change: object
) -> tuple[list[Composite], Sampler]:
    """`n` composites a class with a change of the settings of chapter 04, and their sampler."""
    options = settings() | change
    sampler = Sampler(pool, cut_sources=options.pop("cut_sources"))
    pieces = synthesis.compose_all(
        pool, sampler, image, n_per_class=n, labels=classes,
        rng_of=lambda label, k: np.random.default_rng([zlib.crc32(label.encode()), k]),
        **options,
    )  # fmt: skip
    return [p.composite for p in pieces if p.composite is not None], sampler


def places(made: list[Composite]) -> list[tuple[Composite, int]]:
    """Composite and row of the pool of every segment that was replaced."""
    return [(c, done["target_row"]) for c in made for done in c.replacements]


def foreign(c: Composite, pool: Pool) -> float:
    """How far the colours of what is pasted are from the rest of the target image."""
    gone = np.any([pool.mask(done["target_row"]) for done in c.replacements], axis=0)
    return colour_gap(c.image, c.pasted, c.original, ~gone)


def replaced(
    pool: Pool, classes: list[str], image, embed, distance: Callable[..., float], n: int
) -> Iterator[dict]:
    """One row a setting: kernel distances of crops of `n` composites a class."""
    for name, change in CHANGES.items():
        start = time.perf_counter()
        made, sampler = composed(pool, classes, image, n, **change)
        seconds = time.perf_counter() - start
        before, after = (
            embed(features.crop(getattr(c, what), pool.mask(row)) for c, row in places(made))
            for what in ("original", "image")
        )
        yield {
            "setting": name,
            "before": distance(before, made),
            "replaced": distance(after, made),
            "overlap": np.mean([r["iou"] for c in made for r in c.replacements]),
            "colours": np.nanmedian([foreign(c, pool) for c in made]),
            "images": len(made),
            "sources": effective_sources(sampler.counts),
            "crops": len(after),
            "s/image": seconds / max(len(made), 1),
        }


def nothing(real: np.ndarray, names, labels, rng: np.random.Generator, n: int = 40) -> None:
    """Print the distance of real crops from other real ones, told that each has a source: 0."""
    names, labels = np.asarray(names), np.asarray(labels)
    images = {label: np.unique(names[labels == label]) for label in labels}
    found: dict[str, list[float]] = {"classes weighted": [], "pairs left out only": []}
    for _ in range(n):
        y, x = np.split(rng.permutation(len(real)), [len(real) // 3])
        origins = ([{names[i]} for i in x], [{names[i], rng.choice(images[labels[i]])} for i in y])
        for way, classes in zip(found, ((labels[x], labels[y]), None), strict=True):
            value = quality.mmd2(real[x], real[y], origins=origins, classes=classes)
            found[way].append(1000 * value)
    for way, values in found.items():
        error = np.std(values) / np.sqrt(n)
        print(f"real crops with a source each, {way}: {np.mean(values):.2f} +- {error:.2f}")


# --- ways to mix ----------------------------------------------------------------------------------

#: Of the Gaussian in the ways that have one, pixels: `feather` of chapter 04.
WIDTH = 0.6


def mean(source: np.ndarray, target: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Weighted mean, with a smoothed mask for the share of the source."""
    share = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), WIDTH)[..., None]
    return (share * source + (1 - share) * target).round().astype(np.uint8)


def pyramid(source: np.ndarray, target: np.ndarray, mask: np.ndarray, *, n: int) -> np.ndarray:
    """Laplacian pyramids of n + 1 levels, each mixed by the mask of its size, as they were found.

    Burt and Adelson 1983; :func:`helpers.seam.blend` is the case of two levels of full size.
    """
    layers = [np.float32(source), np.float32(target), np.float32(mask[..., None].repeat(3, 2))]
    details = []
    for _ in range(n):
        smaller = [cv2.pyrDown(layer) for layer in layers]
        s, t = (
            layer - cv2.pyrUp(small, dstsize=layer.shape[1::-1])
            for layer, small in zip(layers[:2], smaller[:2], strict=True)
        )
        details.append(layers[2] * s + (1 - layers[2]) * t)
        layers = smaller
    s, t, share = layers
    out = share * s + (1 - share) * t
    for detail in reversed(details):
        out = cv2.pyrUp(out, dstsize=detail.shape[1::-1]) + detail
    return out.round().clip(0, 255).astype(np.uint8)


def poisson(source: np.ndarray, target: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Gradients of the source from the colours of the target (Perez et al. 2003)."""
    inner = np.pad(255 * mask[1:-1, 1:-1].astype(np.uint8), 1)
    if not inner.any():
        return np.where(mask[..., None], source, target)
    x, y, width, height = cv2.boundingRect(inner)
    centre = (x + width // 2, y + height // 2)
    return cv2.seamlessClone(source, target, inner, centre, cv2.NORMAL_CLONE)


#: (source, target, mask) to an image.
MIXES: dict[str, Callable[..., np.ndarray]] = {
    "hard": lambda source, target, mask: np.where(mask[..., None], source, target),
    "weighted mean": mean,
    "two levels": partial(pyramid, n=1),
    "five levels": partial(pyramid, n=4),
    "Poisson": poisson,
    "two bands": partial(blend, width=WIDTH),
}


class Version(NamedTuple):
    """Crops of all places of a version of composites, its detector of seams, and the scores."""

    crops: np.ndarray
    detection: quality.Detection
    scores: dict[str, float]


def looked_at(
    pictures: list[np.ndarray], masks: list[np.ndarray], made: list[Composite], pool: Pool, embed,
    distance: Callable[..., float],
) -> Version:  # fmt: skip
    """Kernel distance of the crops of a version of composites, and how well seams are detected."""
    crops = embed(
        features.crop(picture, pool.mask(row))
        for picture, c in zip(pictures, made, strict=True)
        for _, row in places([c])
    )
    targets, originals = [c.image_id for c in made], [c.original for c in made]
    off, low, high = off_the_line(pictures, originals, masks, targets)
    found = quality.detect_seams(pictures, originals, masks, groups=targets)
    return Version(crops, found, {
        "KID x 1000": distance(crops, made), "detected": found.auc(),
        "off, %": off, "low": low, "high": high, "crops": len(crops),
    })  # fmt: skip


def off_the_line(
    pictures: list[np.ndarray], originals: list[np.ndarray], masks: list[np.ndarray],
    targets: list[str],
) -> tuple[float, float, float]:  # fmt: skip
    """How much more pictures change across seams than the same lines before, %; 95 % interval."""
    gradients = (quality.outline_gradients(images, masks) for images in (pictures, originals))
    change = quality.outline_change(*gradients)
    found = statistics.resampled(change, targets, rng=np.random.default_rng(1))
    return tuple(100 * np.expm1(found))


def mixed(
    made: list[Composite], pool: Pool, image, embed, distance: Callable[..., float],
    seam: tuple[int, int],
) -> Iterator[dict]:  # fmt: skip
    """One row a way to mix: kernel distance of the crops, and how well the seam is detected."""
    for name, mix in MIXES.items():
        pictures, masks = [], []
        for c in made:
            out, pasted = c.original, np.zeros(c.pasted.shape, bool)
            for done in c.replacements:
                donor = match_stain(image(done["source_image"]), c.original, method=done["stain"])
                target, source = pool.mask(done["target_row"]), pool.mask(done["source_row"])
                affine = np.asarray(done["affine"])
                _, here = paste(out, target, donor, source, affine, gap="context", seam=seam)
                out = mix(warp_image(donor, affine, here.shape), out, here)
                pasted |= here
            pictures.append(out)
            masks.append(pasted)
        yield {"mixed by": name, **looked_at(pictures, masks, made, pool, embed, distance).scores}


# --- ways to heal ---------------------------------------------------------------------------------

#: Of the blend that is healed, pixels: `feather` of chapter 04.
WIDTHS = (0.3, 0.4, 0.5, 0.6, 0.7)

#: Changes of how composites are healed in chapter 06; None leaves them as they are pasted.
HEALINGS: dict[str, dict[str, object] | None] = {
    "not healed": None,
    "from the lowest 0.3 % of the levels": {"strength": 0.003},
    "from 0.5 %, as in chapter 06": {},
    "from 1 %": {"strength": 0.01},
    "from 2 %": {"strength": 0.02},
    "from 0.5 %, without a ramp": {"ramp": 0},
    "from pure noise": {"strength": 1.0, "steps": 16},
    "from pure noise, without a ramp": {"strength": 1.0, "steps": 16, "ramp": 0},
}


def healing() -> dict[str, object]:
    """Arguments of :func:`helpers.diffusion.inpaint` as of chapter 06."""
    sampling, making = (
        config.build(chapter, execute.parameters_cell(chapter))
        for chapter in ("05_sde_mcg_inpainting", "06_synthesis")
    )
    return sampling.options | {
        "method": sampling.method,
        "steps": making.synthesis_steps,
        "strength": making.synthesis_strength,
    }


def healed(
    made: list[Composite], pool: Pool, embed, distance: Callable[..., float],
    farther: Callable[..., tuple], *, batch: int = 8,
    healings: dict[str, dict[str, object] | None] = HEALINGS,
) -> Iterator[dict]:  # fmt: skip
    """One row a way to heal: kernel distance of the crops, and how well the seam is detected.

    After a row without healing, what healing changes in both, with its 95 % interval.
    """
    model = latent.load_latent_diffusion()
    pasted, unknown = (np.stack([getattr(c, name) for c in made]) for name in ("image", "unknown"))
    before = None
    for name, change in healings.items():
        start, pictures = time.perf_counter(), pasted
        if change is not None:
            pictures = diffusion.inpaint(
                model, pasted, unknown, generator=0, batch=batch, **healing() | change
            )
        seconds = time.perf_counter() - start
        seen = looked_at(list(pictures), [c.pasted for c in made], made, pool, embed, distance)
        row = {"healed": name, **seen.scores, "s/image": seconds / len(made)}
        if change is None:
            before = seen
        elif before is not None:
            row |= changes(seen, before, made, farther)
        yield row


def changes(
    after: Version, before: Version, made: list[Composite], farther: Callable[..., tuple]
) -> dict[str, str]:
    """Change of kernel distance and detection from one version to another, with intervals."""
    a, b = after.detection, before.detection
    detected = statistics.resampled(
        lambda w, v: a.auc(w) - b.auc(v), a.groups, b.groups, rng=np.random.default_rng(1)
    )
    return {
        "KID gained": statistics.in_words(farther(after.crops, before.crops, made), 1),
        "detected gained": statistics.in_words(detected, 3),
    }


def main(argv: list[str] | None = None) -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="tutorial-phantom", help="finished run with a pool")
    parser.add_argument("--n-per-class", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES, help="these tables")
    options = parser.parse_args(argv)
    folder = runs.root() / options.run
    if not (folder / "03_pca_pooling" / "pool").is_dir():
        print(f"run {options.run!r} has no pool: make run RUN={options.run} makes it")
        return
    pool = Pool.load(folder / "03_pca_pooling" / "pool")
    classes = _drawable(pool)
    rows = np.flatnonzero(pool.table["label"].isin(classes))
    files = {path.stem: path for path in Path(folder / "00_tissue" / "images").iterdir()}

    @lru_cache(maxsize=256)
    def image(image_id: str) -> np.ndarray:
        with Image.open(files[image_id]) as picture:
            return np.array(picture.convert("RGB"))

    extractor = features.load_extractor("lite0")

    def embed(crops) -> np.ndarray:
        return extractor.embed(np.stack(list(crops)))

    rng = np.random.default_rng(0)
    chosen = rng.permutation(rows)[:1000]
    names = pool.table["image_id"].iloc[chosen].tolist()
    real = embed(
        features.crop(image(name), pool.mask(int(i))) for i, name in zip(chosen, names, strict=True)
    )
    own, labels = [{name} for name in names], pool.table["label"].iloc[chosen].tolist()

    margin = settings()["seam"][0]

    def related(made: list[Composite]) -> dict[str, tuple]:
        """Images that real crops and those of all places show, and their classes."""
        shown = [shown_in(pool, row, c.replacements, margin=margin) for c, row in places(made)]
        return {"origins": (own, shown), "classes": (labels, [c.label for c, _ in places(made)])}

    def distance(crops: np.ndarray, made: list[Composite]) -> float:
        """Kernel distance x 1000 of the crops of all places from real crops of other images."""
        return 1000 * quality.mmd2(real, crops, **related(made))

    def farther(
        after: np.ndarray, before: np.ndarray, made: list[Composite]
    ) -> tuple[float, float, float]:
        """How much farther crops are from real ones than before, x 1000, with its interval."""
        given = related(made)
        gained = quality.kid_difference(real, after, before, **given)
        return statistics.jackknife(lambda *w: 1000 * gained(*w), *given["origins"])

    floor = quality.kid_floor(real, origins=own, classes=labels, rng=rng)
    print(f"{len(rows)} segments of {len(classes)} classes; real against real, x 1000: "
          f"{1000 * floor.mean:.1f}, standard deviation {1000 * floor.std:.1f} "
          f"at {floor.subset_size} crops")  # fmt: skip
    nothing(real, names, labels, np.random.default_rng(1))

    def show(table: pd.DataFrame) -> None:
        print(table.to_string(float_format="{:.2f}".format), flush=True)

    if "moves" in options.only:
        show(warped(pool, rows, image, embed, rng))
    if "settings" in options.only:
        found = replaced(pool, classes, image, embed, distance, options.n_per_class)
        show(pd.DataFrame(found).set_index("setting"))
    made, _ = composed(pool, classes, image, options.n_per_class)
    if "mixes" in options.only:
        ways = mixed(made, pool, image, embed, distance, settings()["seam"])
        show(pd.DataFrame(ways).set_index("mixed by"))
    if "healing" in options.only:
        ways = list(healed(made, pool, embed, distance, farther))
        for band in (5, 8):
            wider, _ = composed(pool, classes, image, options.n_per_class, band=band)
            named = {f"band of {band} pixels, not healed": None, f"band of {band} pixels": {}}
            ways += healed(wider, pool, embed, distance, farther, healings=named)
        show(pd.DataFrame(ways).set_index("healed"))
    if "widths" in options.only:
        ways = []
        for width in WIDTHS:
            blended, _ = composed(pool, classes, image, options.n_per_class, feather=width)
            both = {f"not healed, {width} pixels": None, f"healed, {width} pixels": {}}
            ways += healed(blended, pool, embed, distance, farther, healings=both)
        show(pd.DataFrame(ways).set_index("healed"))


def _drawable(pool: Pool, least: int = 5) -> list[str]:
    """Classes that have more than hardly a whole segment to draw, and images to compare."""
    whole = pool.table.loc[~pool.table["border"], "label"].value_counts()
    images = pool.table.groupby("label")["image_id"].nunique()
    return [c for c in pool.classes if min(whole.get(c, 0), images[c]) >= least]


if __name__ == "__main__":
    main()
