"""Images that the latent diffusion model is trained on: drawn scenes, or a folder of own images.

Tissue comes from :mod:`helpers.phantom`, with some textures among it; :mod:`helpers.train_latent`
trains on random crops of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch

from helpers import phantom
from helpers.datasets import SUFFIXES, read_image
from helpers.files import replacing
from helpers.latent import to_tensor
from helpers.processes import in_order
from helpers.training import keep_to_settings

#: Side of a stored scene in pixels.
SCENE = 256
_SHARD = 25
_HELD_OUT_SEED = 987_654_321


def scene(index: int, *, seed: int = 0, size: int = SCENE, textures: float = 0.15) -> np.ndarray:
    """Draw one training image: tissue of any organ, grade, stain, site and zoom, or a texture.

    Parameters
    ----------
    index, seed : int
        The image is determined by both.
    size : int
        Side in pixels.
    textures : float
        Share of images that are abstract textures instead of tissue.

    Returns
    -------
    (size, size, 3) uint8 ndarray
    """
    rng = np.random.default_rng([seed, 71, index])
    kind, organ = _kind(rng, textures)
    if kind == "texture":
        return texture(rng, size)
    ihc = kind == "IHC"
    zoom = float(np.exp(rng.normal(0, 0.2)))
    return phantom.render(
        index,
        seed=seed + 1,
        grade=str(rng.choice(phantom.GRADES[organ])),
        organ=organ,
        size=(size, size),
        site=str(rng.choice(phantom.SITES)),
        patient=int(rng.integers(1000)),
        stain=kind,
        microns_per_pixel=min(4.0, zoom * (150 if ihc else 256) / size),
    ).image


def _kind(rng: np.random.Generator, textures: float) -> tuple[str, str]:
    """What a scene shows ("texture", "HE", "IHC"), and its organ."""
    if rng.random() < textures:
        return "texture", ""
    organ = str(rng.choice(list(phantom.GRADES), p=[0.65, 0.35]))
    return ("IHC" if rng.random() < 0.25 else "HE"), organ


def drawing_weights(n: int, *, seed: int = 0, textures: float = 0.15, ihc: int = 2) -> np.ndarray:
    """How often the noise network sees each scene: textures never, IHC `ihc` times as often as H&E.

    The autoencoder should reproduce everything; the noise network should know tissue only.

    Returns
    -------
    (n,) int64 ndarray
    """
    times = {"texture": 0, "HE": 1, "IHC": ihc}
    kinds = [_kind(np.random.default_rng([seed, 71, i]), textures)[0] for i in range(n)]
    return np.array([times[kind] for kind in kinds])


def texture(rng: np.random.Generator, size: int = SCENE) -> np.ndarray:
    """Draw an abstract texture: coloured noise of random scale and direction, with sharp regions.

    Returns
    -------
    (size, size, 3) uint8 ndarray
    """

    def layer() -> np.ndarray:
        sigma = float(np.exp(rng.uniform(np.log(0.6), np.log(12))))
        stretch = float(np.exp(rng.uniform(0, np.log(4))))
        noise = cv2.GaussianBlur(
            rng.standard_normal((size, size)).astype(np.float32),
            (0, 0),
            sigma,
            sigmaY=sigma * stretch,
        )
        turn = cv2.getRotationMatrix2D((size / 2, size / 2), float(rng.uniform(0, 180)), 1.45)
        noise = cv2.warpAffine(noise, turn, (size, size), borderMode=cv2.BORDER_REFLECT)
        return (noise - noise.mean()) / (noise.std() + 1e-6)

    image = np.empty((size, size, 3), np.float32)
    image[:] = rng.uniform(0.25, 0.95, 3)
    for _ in range(int(rng.integers(2, 5))):
        colour = rng.uniform(0.05, 1.0, 3).astype(np.float32)
        where = layer()
        soft = float(np.exp(rng.uniform(np.log(0.02), np.log(1.0))))
        weight = 1 / (1 + np.exp(-np.clip((where - rng.normal(0.3, 0.6)) / soft, -30, 30)))
        detail = 1 + rng.uniform(0, 0.15) * layer()[..., None]
        image += weight[..., None] * (colour * detail - image)
    image += rng.normal(0, rng.uniform(0, 0.02), image.shape)
    return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)


def prepare(
    folder: Path, n: int, *, seed: int = 0, textures: float = 0.15, workers: int = 0,
    log: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Draw the first `n` scenes into shards of a folder; shards that are there are kept.

    `workers` processes draw the same scenes as one.

    Raises
    ------
    ValueError
        If what is there was drawn with another seed or share of textures.
    """
    folder = Path(folder)
    keep_to_settings(folder, seed=seed, textures=textures)
    work = partial(_draw_shard, folder, seed=seed, textures=textures)
    for done in in_order(work, range(-(-n // _SHARD)), workers):
        if done:
            log(f"drew {done} of {n} scenes")


def _shard(folder: Path, k: int) -> Path:
    return Path(folder) / f"shard_{k:04d}.npy"


def _draw_shard(folder: Path, k: int, *, seed: int, textures: float) -> int:
    """Draw a shard that is not there, and return how many scenes there are up to it; else 0."""
    path = _shard(folder, k)
    if path.exists():
        return 0
    images = [scene(k * _SHARD + i, seed=seed, textures=textures) for i in range(_SHARD)]
    with replacing(path) as temporary:
        np.save(temporary, np.stack(images))
    return (k + 1) * _SHARD


class Scenes:
    """Training images: the shards of a folder, the pictures of a folder, or a given array.

    Parameters
    ----------
    source : Path or (N, H, W, 3) uint8 ndarray
        Folder with ``shard_*.npy`` written by :func:`prepare`, up to the first that is missing;
        folder with 8-bit RGB images, PNG, JPEG, TIFF or BMP (searched through; large ones are cut
        into fields of `size`); or the images.
    size : int
        Side of the fields cut from pictures, pixels.
    n : int, optional
        Take the first `n` only, where there are more.

    Raises
    ------
    FileNotFoundError
        If there are no images.
    ValueError
        If a picture of the folder cannot be used, as :func:`helpers.datasets.read_image` says.
    """

    def __init__(
        self, source: Path | np.ndarray, *, size: int = SCENE, n: int | None = None
    ) -> None:
        self.source, self.size, self.n = source, size, n
        self.parts: list[np.ndarray] = []
        if isinstance(source, np.ndarray):
            self.parts = [source]
        else:
            self.refresh()
        if not len(self):
            raise FileNotFoundError(f"no images in {source}: give a folder with images")

    def __len__(self) -> int:
        there = sum(len(part) for part in self.parts)
        return there if self.n is None else min(self.n, there)

    def __getitem__(self, i: int) -> np.ndarray:
        if not 0 <= i < len(self):
            raise IndexError(i)
        for part in self.parts:
            if i < len(part):
                return part[i]
            i -= len(part)

    def spread(self, n: int) -> np.ndarray:
        """At most `n` of the images, spread evenly.

        Returns
        -------
        (min(n, N), H, W, 3) uint8 ndarray
        """
        pick = np.linspace(0, len(self) - 1, min(n, len(self))).astype(int)
        return np.stack([self[i] for i in pick])

    def refresh(self) -> None:
        """Take in shards that were written since."""
        if isinstance(self.source, np.ndarray):
            return
        while self.n is None or len(self) < self.n:
            path = _shard(self.source, len(self.parts))  # so that position is the scene's number
            if not path.exists():
                break
            self.parts.append(np.load(path))
        if not self.parts:
            self.parts = [part for part in [_fields(Path(self.source), self.size)] if len(part)]


def _fields(folder: Path, size: int) -> np.ndarray:
    """Non-overlapping fields of all pictures under a folder, short sides scaled up if needed."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        image = read_image(path)
        short = min(image.shape[:2])
        if short < size:
            side = [max(size, round(s * size / short)) for s in image.shape[:2]]
            image = cv2.resize(image, side[::-1], interpolation=cv2.INTER_CUBIC)
        for y in range(0, image.shape[0] - size + 1, size):
            for x in range(0, image.shape[1] - size + 1, size):
                found.append(image[y : y + size, x : x + size])
    return np.stack(found) if found else np.empty((0, size, size, 3), np.uint8)


def held_out(n: int = 24, *, size: int = SCENE) -> np.ndarray:
    """Phantoms that training never sees: other seeds, all grades, both sites, one in six IHC.

    Returns
    -------
    (n, size, size, 3) uint8 ndarray
    """
    pairs = [(organ, grade) for organ, grades in phantom.GRADES.items() for grade in grades]
    images = []
    for i in range(n):
        organ, grade = pairs[i % len(pairs)]
        images.append(phantom.render(
            i, seed=_HELD_OUT_SEED, organ=organ, grade=grade, size=(size, size),
            site=phantom.SITES[i // len(pairs) % 2], patient=1000 + i,
            stain="IHC" if i % 6 == 5 else "HE",
        ).image)  # fmt: skip
    return np.stack(images)


def colour_jitter(
    x: torch.Tensor, strength: float, *, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Change the stain: optical density times a random matrix near the identity, plus a shift.

    Parameters
    ----------
    x : (N, 3, H, W) Tensor
        Images in [-1, 1].
    strength : float
        0 changes nothing; 1 is a strong change.

    Returns
    -------
    (N, 3, H, W) Tensor
        In [-1, 1].
    """
    if strength <= 0:
        return x
    n = len(x)
    density = -torch.log(((x + 1) / 2).clamp_min(1 / 255))
    gain = torch.exp(0.35 * strength * torch.randn(n, 1, 1, generator=generator))
    mix = torch.eye(3) + 0.15 * strength * torch.randn(n, 3, 3, generator=generator)
    shift = 0.05 * strength * torch.randn(n, 3, 1, generator=generator)
    density = (gain * mix) @ density.flatten(2) + shift
    return (2 * torch.exp(-density.clamp_min(0)) - 1).reshape(x.shape)


def turn(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each square image flipped and turned by a multiple of 90 degrees at random."""
    how = torch.randint(8, (len(x),), generator=generator).tolist()
    return torch.stack([
        torch.rot90(image.flip(-1) if k >= 4 else image, k % 4, (-2, -1))
        for image, k in zip(x, how, strict=True)
    ])  # fmt: skip


def random_crops(
    scenes: Scenes, *, batch: int, crop: int, jitter: float, generator: torch.Generator
) -> torch.Tensor:
    """Random crops with flips, quarter turns and stain jitter.

    Parameters
    ----------
    scenes : Scenes
    batch, crop : int
        Number of crops and their side in pixels.
    jitter : float
        Mean strength of :func:`colour_jitter`.
    generator : torch.Generator

    Returns
    -------
    (batch, 3, crop, crop) float32 Tensor
        In [-1, 1].
    """
    crops = []
    for _ in range(batch):
        image = scenes[int(torch.randint(len(scenes), (1,), generator=generator))]
        y, x = (
            int(torch.randint(side - crop + 1, (1,), generator=generator))
            for side in image.shape[:2]
        )
        crops.append(image[y : y + crop, x : x + crop])
    strength = float(torch.rand(1, generator=generator)) * 2 * jitter
    return colour_jitter(turn(to_tensor(np.stack(crops)), generator), strength,
                         generator=generator)  # fmt: skip
