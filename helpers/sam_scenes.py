"""Drawn scenes that the small Segment Anything model is trained on: tissue, textures and shapes.

A scene is an image with label maps of what is in it, coarse objects first. Tissue comes from
:mod:`helpers.phantom`; textures and shapes keep the network from learning that tissue only.
:mod:`helpers.train_sam` trains on them.
"""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from helpers import phantom
from helpers.files import replacing
from helpers.phantom_architecture import ARCHITECTURES, vary
from helpers.processes import in_order

#: Side of a stored scene; training crops are cut from it.
SCENE = 320
#: Label maps stored for a scene, coarse objects first.
LEVELS = 4


def phantom_scene(rng: np.random.Generator, size: int = SCENE) -> tuple[np.ndarray, np.ndarray]:
    """Draw a tissue phantom of random organ, grade, stain, site and magnification.

    Most have an architecture of their own (:func:`helpers.phantom_architecture.vary`), and some
    lie at the edge of the tissue, with bare glass beside it.

    Returns
    -------
    image : (size, size, 3) uint8 ndarray
    levels : (LEVELS, size, size) uint8 ndarray
        Label maps: glands, lumina, stroma, bare glass.
    """
    organ = str(rng.choice(["colon", "prostate"], p=[0.65, 0.35]))
    grade = str(rng.choice(phantom.GRADES[organ], p=[0.3, 0.3, 0.3, 0.1]))
    scene = phantom.render(
        int(rng.integers(1 << 30)),
        seed=int(rng.integers(1, 1 << 30)),
        grade=grade,
        organ=organ,
        size=(size, size),
        site=str(rng.choice(["A", "B"])),
        patient=int(rng.integers(1000)),
        stain="IHC" if rng.random() < 0.2 else "HE",
        microns_per_pixel=float(np.exp(rng.uniform(np.log(0.4), np.log(1.6)))),
        architecture=vary(ARCHITECTURES[organ, grade], rng) if rng.random() < 0.7 else None,
    )
    image, glass = scene.image, np.zeros((size, size), bool)
    if rng.random() < 0.25:
        image, glass = _bare_glass(rng, image)
    levels = np.zeros((LEVELS, size, size), np.uint8)
    stroma = ((scene.glands == 0) & ~glass).astype(np.uint8)
    levels[0] = np.where(glass, 0, np.minimum(scene.glands, 255))
    levels[1] = _components(scene.lumen & ~glass)
    levels[2] = _components(cv2.morphologyEx(stroma, cv2.MORPH_OPEN, np.ones((5, 5), np.uint8)))
    levels[3] = _components(glass)
    return image, levels


def _bare_glass(rng: np.random.Generator, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take tissue away, so that light falls through bare glass; often a row of cells lines it."""
    size = image.shape[0]
    field = _noise(rng, size, rng.uniform(30, 120)) + 0.08 * _noise(rng, size, 6)
    glass = field > np.quantile(field, rng.uniform(0.5, 0.95))
    depth = cv2.distanceTransform((~glass).astype(np.uint8), cv2.DIST_L2, 5)
    image = image.astype(np.float32)
    if rng.random() < 0.5:
        radius = rng.uniform(1.5, 4)
        band = (depth > 0) & (depth < radius * rng.uniform(2, 6))
        colour = np.array([rng.uniform(60, 130), rng.uniform(30, 90), rng.uniform(90, 160)])
        _grains(rng, image, colour, int(9000 / radius), radius, band)
    light = rng.uniform(228, 252) + rng.normal(0, 3, 3)
    light = light + rng.normal(0, rng.uniform(0.3, 2.5), image.shape)
    clear = cv2.GaussianBlur(glass.astype(np.float32), (0, 0), rng.uniform(0.5, 1.5))[..., None]
    image = image + clear * (light - image)
    return np.clip(image, 0, 255).astype(np.uint8), glass


def texture_scene(rng: np.random.Generator, size: int = SCENE) -> tuple[np.ndarray, np.ndarray]:
    """Draw random shapes filled with random textures, some nested, some like glands.

    Returns
    -------
    image : (size, size, 3) uint8 ndarray
    levels : (LEVELS, size, size) uint8 ndarray
        Label maps: shapes, parts inside them, background.
    """
    levels = np.zeros((LEVELS, size, size), np.uint8)
    kind = str(rng.choice(["blobs", "glands", "voronoi", "perlin"], p=[0.3, 0.35, 0.15, 0.2]))
    tissue = rng.random() < 0.5
    background = texture(rng, size, tissue)
    if kind == "voronoi":
        levels[0] = _voronoi(rng, size)
    elif kind == "perlin":
        field = _noise(rng, size, rng.uniform(12, 50))
        levels[0] = _components(field > rng.uniform(-0.3, 0.8))
        levels[2] = _components(levels[0] == 0)
    else:
        levels[0], inner = _blobs(rng, size, nested=kind == "glands")
        levels[1] = inner
        levels[2] = _components(levels[0] == 0)
    image = background
    shared = kind != "voronoi" and rng.random() < 0.6
    first = texture(rng, size, tissue)
    for i in range(1, int(levels[0].max()) + 1):
        mask = levels[0] == i
        if kind == "voronoi" and rng.random() < 0.15:
            continue
        image[mask] = (first if shared else texture(rng, size, tissue))[mask]
    if levels[1].any():
        pale = texture(rng, size, tissue, pale=rng.random() < 0.6)
        image[levels[1] > 0] = pale[levels[1] > 0]
    image = _outlines(rng, image, levels)
    if kind == "glands":
        image = _rings(rng, image, levels)
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.0))
    image += rng.normal(0, rng.uniform(0, 6), image.shape)
    return np.clip(image, 0, 255).astype(np.uint8), levels


def texture(
    rng: np.random.Generator, size: int, tissue: bool = False, *, pale: bool = False
) -> np.ndarray:
    """Draw a texture: coloured noise of random scale and direction, often with grains.

    Returns
    -------
    (size, size, 3) float32 ndarray
        About 0 to 255.
    """
    if pale:
        base = rng.uniform(190, 250, 3)
    elif tissue:
        base = np.array([rng.uniform(120, 235), rng.uniform(50, 190), rng.uniform(120, 225)])
    else:
        base = rng.uniform(20, 240, 3)
    image = np.broadcast_to(base, (size, size, 3)).astype(np.float32).copy()
    for _ in range(int(rng.integers(1, 4))):
        sigma = np.exp(rng.uniform(np.log(1), np.log(25)))
        stretch = np.exp(rng.uniform(0, np.log(6))) if rng.random() < 0.5 else 1.0
        field = _noise(rng, size, sigma, stretch=stretch)
        image += field[..., None] * rng.normal(0, rng.uniform(3, 22), 3).astype(np.float32)
    if rng.random() < (0.75 if tissue else 0.4) and not pale:
        dark = base * rng.uniform(0.3, 0.75) if rng.random() < 0.8 else rng.uniform(20, 250, 3)
        _grains(rng, image, dark, int(rng.integers(60, 1500)), rng.uniform(1.2, 5))
    return image


def _noise(rng, size, sigma, *, stretch=1.0):
    """Unit-variance noise of a given correlation length, optionally stretched along a direction."""
    step = max(1, int(sigma / 2))
    side = int(np.ceil(size * 1.5 / step)) + 8
    small = rng.normal(size=(side, side)).astype(np.float32)
    small = cv2.GaussianBlur(small, (0, 0), sigma / step * stretch, sigmaY=sigma / step)
    angle, scale = rng.uniform(0, 180), float(step)
    matrix = cv2.getRotationMatrix2D((side / 2, side / 2), angle, scale)
    matrix[:, 2] += size / 2 - side / 2
    field = cv2.warpAffine(
        small, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
    )
    return (field - field.mean()) / (field.std() + 1e-6)


def _grains(rng, image, colour, n, radius, mask=None):
    size = image.shape[0]
    angle0 = rng.uniform(0, 180)
    spread = rng.choice([15, 180])
    elongation = rng.uniform(1, 2.5)
    for _ in range(n):
        x, y = rng.integers(0, size, 2)
        if mask is not None and not mask[y, x]:
            continue
        r = radius * rng.uniform(0.7, 1.3)
        shade = np.clip(colour * rng.uniform(0.8, 1.2), 0, 255)
        cv2.ellipse(
            image,
            (int(x), int(y)),
            (max(1, int(r * elongation)), max(1, int(r))),
            angle0 + rng.normal(0, spread),
            0,
            360,
            shade.tolist(),
            -1,
            cv2.LINE_AA,
        )


def _curve(rng, centre, radius, rough, elongation):
    t = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    r = np.ones_like(t)
    for k in range(2, 8):
        r += rough * rng.normal() / k * np.cos(k * t + rng.uniform(0, 2 * np.pi))
    r = np.clip(r, 0.35, None) * radius
    phi = rng.uniform(0, np.pi)
    x, y = r * np.cos(t) * elongation**0.5, r * np.sin(t) / elongation**0.5
    rot = np.stack([x * np.cos(phi) - y * np.sin(phi), x * np.sin(phi) + y * np.cos(phi)], 1)
    return rot, centre + rot


def _blobs(rng, size, *, nested):
    outer = np.zeros((size, size), np.uint8)
    inner = np.zeros((size, size), np.uint8)
    radius = np.exp(rng.uniform(np.log(12), np.log(80)))
    rough = rng.uniform(0, 0.5)
    gap = int(rng.integers(0, 8))
    count = 0
    for _ in range(int(np.clip(4 * (size / radius / 2) ** 2, 6, 150))):
        if count >= 80:
            break
        centre = rng.uniform(-0.05 * size, 1.05 * size, 2)
        shape, curve = _curve(
            rng, centre, radius * rng.uniform(0.7, 1.3), rough, np.exp(abs(rng.normal(0, 0.4)))
        )
        mask = np.zeros((size, size), np.uint8)
        cv2.fillPoly(mask, [np.round(curve).astype(np.int32)], 1)
        wide = cv2.dilate(mask, np.ones((2 * gap + 1,) * 2, np.uint8)) if gap else mask
        if not mask.any() or (outer[wide > 0] > 0).mean() > 0.02:
            continue
        count += 1
        outer[(mask > 0) & (outer == 0)] = count
        if nested and rng.random() < 0.85:
            hole = np.zeros_like(mask)
            part = centre + shape * rng.uniform(0.2, 0.7) + rng.normal(0, 0.05 * radius, 2)
            cv2.fillPoly(hole, [np.round(part).astype(np.int32)], 1)
            inner[(hole > 0) & (outer == count)] = count
    return outer, inner


def _voronoi(rng, size):
    n = int(rng.integers(4, 40))
    seeds = rng.uniform(0, size, (n, 2)).astype(np.float32)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    x = x + 6 * _noise(rng, size, 8) * rng.uniform(0, 1.5)
    y = y + 6 * _noise(rng, size, 8) * rng.uniform(0, 1.5)
    distance = (x[..., None] - seeds[:, 0]) ** 2 + (y[..., None] - seeds[:, 1]) ** 2
    return (distance.argmin(-1) + 1).astype(np.uint8)


def edges(labels: np.ndarray) -> np.ndarray:
    """Pixels of a label map whose neighbourhood of 3 x 3 holds another label."""
    kernel = np.ones((3, 3), np.uint8)
    return cv2.dilate(labels, kernel) != cv2.erode(labels, kernel)


def _outlines(rng, image, levels):
    """Paint some outlines darker, lighter or as a pale cleft."""
    for level in levels[:2]:
        if level.any() and rng.random() < 0.5:
            edge = cv2.GaussianBlur(edges(level).astype(np.float32), (0, 0), rng.uniform(0.5, 2.0))
            shade = rng.choice([0.5, 0.75, 1.4]) * image.mean((0, 1))
            image = image + edge[..., None] * (np.clip(shade, 0, 255) - image)
    return image.astype(np.float32)


def _rings(rng, image, levels):
    """Line the shapes with one or two rows of dark grains, as nuclei line a gland."""
    if rng.random() < 0.15:
        return image
    depth = cv2.distanceTransform((levels[0] > 0).astype(np.uint8), cv2.DIST_L2, 3)
    depth[edges(levels[0])] = 0
    radius = rng.uniform(1.5, 4)
    colour = np.array([rng.uniform(40, 120), rng.uniform(20, 80), rng.uniform(80, 160)])
    rows = int(rng.integers(1, 4))
    band = (depth > radius) & (depth < radius * (1 + 2.2 * rows)) & (levels[1] == 0)
    image = np.ascontiguousarray(image)
    _grains(rng, image, colour, int(9000 / radius), radius, band)
    return image


def _components(mask, limit=255):
    """Label the connected components of a mask, the `limit` largest only."""
    n, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    order = np.argsort(-stats[1:, cv2.CC_STAT_AREA])[:limit] + 1
    table = np.zeros(n, np.uint8)
    table[order] = np.arange(1, len(order) + 1)
    return table[labels]


def prepare(
    folder: Path,
    n_scenes: int,
    *,
    seed: int,
    shard: int = 50,
    share: float = 0.75,
    first: int = 0,
    workers: int = 0,
) -> None:
    """Render scenes into shards of `shard`; shards that exist are left alone.

    `share` of the scenes is tissue, the others are textures. Each shard has its own random
    generator, so that `workers` processes make the same shards as one.

    Raises
    ------
    ValueError
        If what is there was rendered with another seed, size of a shard or share of tissue.
    """
    from helpers.training import keep_to_settings  # loads torch, which workers need not

    folder = Path(folder)
    keep_to_settings(folder, seed=seed, shard=shard, share=share)
    work = partial(_render_shard, folder, seed=seed, shard=shard, share=share)
    for _ in in_order(work, range(first, first + -(-n_scenes // shard)), workers):
        pass


def _render_shard(folder: Path, k: int, *, seed: int, shard: int, share: float) -> None:
    path = folder / f"shard_{k:04d}.npy"
    if path.exists():
        return
    rng = np.random.default_rng([seed, k])
    data = np.zeros((shard, 3 + LEVELS, SCENE, SCENE), np.uint8)
    for i in range(shard):
        draw = phantom_scene if rng.random() < share else texture_scene
        image, levels = draw(rng)
        data[i, :3] = image.transpose(2, 0, 1)
        data[i, 3:] = levels
    with replacing(path) as temporary:
        np.save(temporary, data)


class Scenes:
    """Random access to the shards in a folder; shards added later are found by `refresh`."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.shards: dict[str, np.ndarray] = {}
        self.refresh()

    def refresh(self) -> None:
        """Open shards that have appeared since."""
        for path in sorted(self.folder.glob("shard_*.npy")):
            if path.name not in self.shards:
                self.shards[path.name] = np.load(path, mmap_mode="r")

    def __getstate__(self) -> dict:
        """What another process is given: where the shards are, not their pixels."""
        return {"folder": self.folder, "shards": {}}

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards.values())

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return image (S, S, 3) and levels (LEVELS, S, S) of a random scene."""
        if not self.shards:
            raise ValueError(
                f"{self.folder} holds no scenes (shard_*.npy): draw them first with "
                "`python -m helpers.train_sam --prepare-only`, or leave out --no-prepare."
            )
        shard = self.shards[sorted(self.shards)[int(rng.integers(len(self.shards)))]]
        data = np.asarray(shard[int(rng.integers(len(shard)))])
        return data[:3].transpose(1, 2, 0), data[3:]


def augment(
    image: np.ndarray, levels: np.ndarray, rng: np.random.Generator, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Crop, scale, turn, recolour, blur and disturb a scene.

    Returns
    -------
    image : (size, size, 3) uint8 ndarray
    levels : (LEVELS, size, size) uint8 ndarray
    """
    side = int(rng.integers(int(0.5 * SCENE), SCENE + 1))
    y, x = rng.integers(0, SCENE - side + 1, 2)
    image = image[y : y + side, x : x + side]
    how = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
    image = cv2.resize(np.ascontiguousarray(image), (size, size), interpolation=how)
    levels = np.stack(
        [
            cv2.resize(
                np.ascontiguousarray(level[y : y + side, x : x + side]),
                (size, size),
                interpolation=cv2.INTER_NEAREST_EXACT,  # the other one is off by half a pixel
            )
            for level in levels
        ]
    )
    turns = int(rng.integers(4))
    image, levels = np.rot90(image, turns), np.rot90(levels, turns, axes=(1, 2))
    if rng.random() < 0.5:
        image, levels = image[:, ::-1], levels[:, :, ::-1]
    return recolour(np.ascontiguousarray(image), rng), np.ascontiguousarray(levels)


def recolour(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change stain, colour, contrast, sharpness and noise of a uint8 image at random."""
    x = image.astype(np.float32) / 255
    if rng.random() < 0.8:  # stain strength and colour, in optical density
        density = -np.log(np.clip(x, 1 / 255, 1))
        mix = np.eye(3) + rng.normal(0, 0.10, (3, 3))
        density = np.clip(density @ mix.T.astype(np.float32), 0, None)
        density *= np.exp(rng.normal(0, 0.30)) * np.exp(rng.normal(0, 0.12, 3))
        x = np.exp(-density.astype(np.float32))
    chance = rng.random()
    if chance < 0.05:
        x = x[..., rng.permutation(3)]
    elif chance < 0.11:
        x = np.repeat(x.mean(-1, keepdims=True), 3, -1)
    elif chance < 0.16:
        x = 1 - x
    x = (x - x.mean()) * np.exp(rng.normal(0, 0.15)) + x.mean() + rng.normal(0, 0.05)
    x = np.clip(x, 0, 1) ** np.exp(rng.normal(0, 0.15))
    if rng.random() < 0.4:
        x = cv2.GaussianBlur(x, (0, 0), rng.uniform(0.3, 1.6))
    elif rng.random() < 0.3:
        x = x + 0.8 * (x - cv2.GaussianBlur(x, (0, 0), 1.5))
    if rng.random() < 0.4:
        x = x + rng.normal(0, rng.uniform(0.005, 0.05), x.shape)
    x = np.clip(x * 255, 0, 255).astype(np.uint8)
    if rng.random() < 0.25:
        quality = int(rng.integers(25, 90))
        x = cv2.imdecode(cv2.imencode(".jpg", x, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], 1)
    return x


def held_out(n: int = 24, *, seed: int = 987_654_321, size: int = 256):
    """Images and gland maps that training never sees: other seeds, all grades of both organs."""
    pairs = [(organ, grade) for organ, grades in phantom.GRADES.items() for grade in grades]
    scenes = [
        phantom.render(
            i,
            seed=seed,
            organ=organ,
            grade=grade,
            size=(size, size),
            patient=1000 + i,
            site="AB"[i // len(pairs) % 2],
        )
        for i, (organ, grade) in zip(range(n), itertools.cycle(pairs), strict=False)
    ]
    return [scene.image for scene in scenes], [scene.glands for scene in scenes]
