"""Data sets behind one interface: phantom, one real image, the user's folder, public sets.

:func:`load` returns a :class:`Dataset`: a table of records and functions that give the pixels.
Pixels are read when they are asked for; file headers are checked when the set is loaded, so that a
greyscale or unreadable file is named before any long work.
Splits never share a patient.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from skimage import measure

from helpers import phantom
from helpers.files import spellings

SPLITS = ("train", "val", "test", "test2")
COLUMNS = ("image_id", "label", "split", "patient", "site", "dataset", "height", "width")
#: Of ``pandas.read_csv``: an empty field is missing, but a class may be called NA or None.
_ONLY_EMPTY = {"keep_default_na": False, "na_values": [""]}
_CSV_COLUMNS = ("path", "label", "patient", "split", "site", "mask")
#: Words in other names of a column that may mean one of these, and would be passed over.
_MAY_MEAN = {
    "patient": {"patient", "patients", "subject", "case", "donor", "pat", "pid", "slide"},
    "split": {"split", "splits", "partition", "subset", "fold"},
    "site": {"site", "centre", "center", "hospital", "scanner"},
    "mask": {"mask", "masks", "annotation"},
}
SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")

#: Smallest short side of an image file that is accepted, in pixels.
MIN_SIDE = 32

#: Longest image id, in bytes: it is part of file names, of which most systems take 255 bytes.
LONGEST_ID = 150

#: Share of the images that go to train, val and test where a data set names no split.
FRACTIONS = {"train": 0.6, "val": 0.15, "test": 0.25}

#: Images a class of the phantom, where the caller sets no limit.
PHANTOM_PER_CLASS = {"train": 12, "val": 4, "test": 10, "test2": 10}

GLAS_CLASSES = (
    "healthy",
    "adenomatous",
    "moderately differentiated",
    "moderately-to-poorly differentiated",
    "poorly differentiated",
)
KBSMC_CLASSES = ("BN", "WD", "MD", "PD")
USZ_CLASSES = ("BN", "G3", "G4", "G5")
PATHMNIST_CLASSES = (
    "adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle",
    "normal colon mucosa", "cancer-associated stroma", "colorectal adenocarcinoma epithelium",
)  # fmt: skip

_WHERE = {
    "folder": "Make a folder with one subfolder of images a class (root/<class>/*.png), or with a "
    "CSV that has the columns path and label (and patient, split if you have them).",
    "glas": "Download the GlaS @ MICCAI 2015 data (Warwick-QU, University of Warwick, Tissue Image "
    "Analytics Centre, research use only) and unpack it so that root holds Grade.csv, images/ and "
    "masks/ (or the original *.bmp and *_anno.bmp files).",
    "kbsmc-colon": "Download KBSMC_colon_tma_cancer_grading from the links at "
    "https://github.com/QuIIL/KBSMC_colon_cancer_grading_dataset and unpack it so that root holds "
    "tma_01 ... wsi_03 with *_<label>.jpg.",
    "usz-prostate": "Download doi:10.7910/DVN/OCYCMP from Harvard Dataverse and cut 750 px patches "
    "named *_class_<k>.jpg, k = 0 to 3, with the array (ZT76, ZT80, ...) in the path.",
    "pathmnist": "Install the medmnist package and give a folder to download to, or put "
    "pathmnist.npz (or pathmnist_64.npz, _128, _224; doi:10.5281/zenodo.10519652) into root.",
}


@dataclass(frozen=True)
class Dataset:
    """Records and access to the pixels.

    Attributes
    ----------
    name : str
    classes : tuple of str
        Class names; in order of severity where the classes have one.
    records : DataFrame
        One row an image, columns :data:`COLUMNS`, index 0..n-1. `height` and `width` are those
        that :meth:`image` returns.
    """

    name: str
    classes: tuple[str, ...]
    records: pd.DataFrame
    _image: Mapping[str, Callable[[], np.ndarray]] = field(repr=False)
    _instances: Mapping[str, Callable[[], np.ndarray]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.records)

    def image(self, image_id: str) -> np.ndarray:
        """Pixels of one image, (height, width, 3) uint8.

        Raises
        ------
        KeyError
            If there is no such image.
        ValueError
            If the file cannot be used; the message names it.
        """
        if image_id not in self._image:
            raise KeyError(f"data set {self.name!r} has no image {image_id!r}")
        return self._image[image_id]()

    def instances(self, image_id: str) -> np.ndarray | None:
        """Ground-truth instances of one image, (height, width) int32, 0 = none; None if unknown."""
        if image_id not in self._image:
            raise KeyError(f"data set {self.name!r} has no image {image_id!r}")
        return self._instances[image_id]() if image_id in self._instances else None

    def counts(self) -> pd.DataFrame:
        """Number of images of each class (rows) in each split (columns)."""
        own = self.records[self.records["dataset"] == self.name]
        table = pd.crosstab(own["label"], own["split"])
        return table.reindex(index=list(self.classes), columns=list(SPLITS), fill_value=0)

    def with_companion(self, other: Dataset) -> Dataset:
        """Append the records of another set; the classes stay those of this one."""
        clash = set(self._image) & set(other._image)
        if clash:
            raise ValueError(f"both sets have images named {sorted(clash)[:3]}: rename one of them")
        shared = sorted(set(self.classes) & set(other.classes))
        if shared:
            raise ValueError(
                f"class {shared[0]!r} is in {self.name} and in its companion {other.name}: rename "
                "it, or do without the companion (companion null)"
            )
        return Dataset(
            self.name,
            self.classes,
            pd.concat([self.records, other.records], ignore_index=True),
            {**self._image, **other._image},
            {**self._instances, **other._instances},
        )


def load(
    name: str,
    *,
    root: str | Path | None = None,
    image_size: int = 256,
    seed: int = 0,
    per_class: Mapping[str, int | None] | None = None,
    n_classes: int | None = None,
) -> Dataset:
    """Load a data set by name.

    Images are scaled so that their short side is `image_size`, and cut to a square at the centre.

    Parameters
    ----------
    name : str
        One of :data:`NAMES`.
    root : path, optional
        Folder of the data; not needed for "phantom", "phantom-prostate" and "ihc".
        For "folder" it may also be the CSV file.
    image_size : int
        Side of the square images, pixels, at least 16.
    seed : int
        Seed of the phantom, of splits that have to be drawn, and of the choice of a subset.
    per_class : mapping, optional
        Largest number of images a class in each split, e.g. ``{"train": 12, "val": 4}``;
        splits that are not named, or None, are complete.
    n_classes : int, optional
        GlaS only: 5 grades (default) or 2 (benign, malignant).

    Returns
    -------
    Dataset

    Raises
    ------
    ValueError
        If an argument, a file or a table cannot be used.
    FileNotFoundError
        If the data root or a file is missing; the message says where the data come from.
    """
    if name not in _LOADERS:
        raise ValueError(f"data set {name!r} is unknown; choose one of {', '.join(NAMES)}.")
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 16:
        raise ValueError(f"image_size is {image_size!r}, but a whole number >= 16 is needed.")
    if n_classes is not None and (name != "glas" or n_classes not in (2, 5)):
        raise ValueError(f"n_classes={n_classes} is for 'glas' only, with 2 or 5 classes.")
    limits = _limits(per_class)
    if name in ("phantom", "phantom-prostate", "ihc"):
        return _LOADERS[name](name, image_size, seed, limits)
    base = None if name == "pathmnist" and root is None else _existing_root(name, root)
    extra = {"n_classes": n_classes} if name == "glas" else {}
    return _LOADERS[name](base, image_size, seed, limits, **extra)


# --- reading pixels ------------------------------------------------------------------------------

_MODES = {
    "L": "greyscale; save it as RGB (for PIL: image.convert('RGB')) if it really is stained tissue",
    "1": "black and white; an RGB photograph of the tissue is needed",
    "LA": "greyscale with transparency; save it as RGB",
    "CMYK": "CMYK; convert it to RGB",
    "F": "floating point; convert it to 8-bit RGB",
    "I": "32-bit greyscale; convert it to 8-bit RGB",
}


#: Tags of a TIFF file.
_BITS_PER_SAMPLE = ExifTags.Base.BitsPerSample
_WIDTH_AND_HEIGHT = (ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength)


def _open(path: Path) -> Image.Image:
    """Open an image file and check what its header says."""
    if not path.exists():
        raise FileNotFoundError(f"image file {path} does not exist")
    try:
        picture = Image.open(path)
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{path} is too large to open at once ({error}); cut it into tiles first"
        ) from None
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as an image ({error}). Replace or remove the file; 8-bit RGB "
            "PNG, JPEG and TIFF are supported (16-bit RGB is not)."
        ) from None
    mode = _stored_mode(picture)
    if mode not in ("RGB", "RGBA", "P"):
        reason = "16 bits a channel; convert it to 8-bit RGB" if "16" in mode else "not RGB"
        picture.close()
        raise ValueError(f"{path} has mode {mode}, which is {_MODES.get(mode, reason)}.")
    if min(picture.size) < MIN_SIDE:
        size = picture.size
        picture.close()
        raise ValueError(
            f"{path} is {size[0]} x {size[1]} pixels, but at least {MIN_SIDE} a side are needed: "
            "nothing of tissue can be seen in less."
        )
    return picture


def _stored_mode(picture: Image.Image) -> str:
    """Mode of the pixels in the file: Pillow opens colour of 16 bits as if it had 8."""
    if picture.mode not in ("RGB", "RGBA"):
        return picture.mode
    bits = max(getattr(picture, "tag_v2", {}).get(_BITS_PER_SAMPLE, (8,)))
    if bits > 8:
        return f"{picture.mode};{bits}"
    stored = picture.tile[0][3] if picture.tile else None
    stored = stored[0] if isinstance(stored, tuple) and stored else stored
    return stored if isinstance(stored, str) and "16" in stored else picture.mode


def _upright_size(picture: Image.Image, path: Path) -> tuple[int, int]:
    """Width and height as the picture is shown: a camera may note that it was turned."""
    size = picture.size
    if picture.format == "TIFF":  # turned by Pillow itself, by some versions before it is loaded
        size = tuple(picture.tag_v2[tag] for tag in _WIDTH_AND_HEIGHT)
    try:
        turned = picture.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except (OSError, SyntaxError, ValueError) as error:
        raise _damaged(path, error) from None
    return size[::-1] if turned else size


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is truncated or damaged ({error}). Download or save it again.")


def _as_rgb(picture: Image.Image, path: Path) -> Image.Image:
    """RGB of a picture with a palette or an opaque alpha channel, which loses nothing."""
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    picture = picture.convert("RGBA")
    if picture.getextrema()[3][0] < 255:
        raise ValueError(
            f"{path} has transparent pixels, whose colour is open; flatten it onto white and save "
            "it as RGB."
        )
    return picture.convert("RGB")


def read_image(path: str | Path, image_size: int | None = None) -> np.ndarray:
    """Read an image, scale its short side to `image_size` and cut the centre square.

    An image that a camera has turned, by a note in the file, is read as it is shown.

    Parameters
    ----------
    path : path
    image_size : int, optional
        Side of the result; by default the image is returned as it is.

    Returns
    -------
    (H, W, 3) uint8 ndarray

    Raises
    ------
    FileNotFoundError, ValueError
        If the file is missing, truncated, not an image, not 8-bit colour, transparent, or too
        small.
    """
    path = Path(path)
    with _open(path) as picture:
        try:
            picture.load()
            picture = ImageOps.exif_transpose(picture)
        except (OSError, SyntaxError, ValueError) as error:
            raise _damaged(path, error) from None
        picture = _as_rgb(picture, path)
        if image_size is None:
            return np.array(picture)
        box = _centre_box(*picture.size, image_size)
        square = picture.resize((image_size,) * 2, Image.Resampling.LANCZOS, box=box)
        return np.array(square)


def _read_labels(path: Path, image_path: Path, image_size: int) -> np.ndarray:
    """Read an instance label map that lies over an image, in the same geometry.

    A map with a single value beside 0 is a binary mask: its connected parts are the instances.
    Negative numbers mean no instance; those beyond 16 bits are numbered anew.
    """
    try:
        with Image.open(path) as picture:
            coding = (str(picture.format).lower(), picture.info.get("compression"))
            labels = np.asarray(picture)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise ValueError(
            f"label map {path} cannot be read ({error}). Save it again as PNG or TIFF, or leave "
            "its name empty in the table"
        ) from None
    if "jpeg" in coding:
        raise ValueError(
            f"label map {path} is coded as JPEG, which changes the numbers of the glands: save it "
            "as PNG or TIFF, from the original."
        )
    with _open(image_path) as picture:
        size = _upright_size(picture, image_path)
    if labels.ndim != 2 or labels.shape != size[::-1]:
        raise ValueError(
            f"label map {path} has shape {labels.shape}, but the image {image_path.name} needs "
            f"{size[::-1]}: one channel, one number a gland, same size as the image."
        )
    numbers = np.unique(labels[labels > 0])
    if len(numbers) == 1:
        labels = measure.label(labels > 0, connectivity=1)
    elif len(numbers) and numbers[-1] > np.iinfo(np.uint16).max:  # as they are filed
        labels = np.where(labels > 0, np.searchsorted(numbers, labels) + 1, 0)
    left, top, right, bottom = _centre_box(*size, image_size)
    step = (np.arange(image_size) + 0.5) / image_size
    rows = np.minimum((top + step * (bottom - top)).astype(int), size[1] - 1)
    columns = np.minimum((left + step * (right - left)).astype(int), size[0] - 1)
    return np.maximum(labels[rows[:, None], columns[None]].astype(np.int32), 0)


def _centre_box(width: int, height: int, image_size: int) -> tuple[float, float, float, float]:
    """Centre square; where it is not scaled, of whole pixels, which half a pixel would blur."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    if side == image_size:
        left, top = left // 1, top // 1
    return left, top, left + side, top + side


# --- splits --------------------------------------------------------------------------------------


def split_by_patient(
    labels: Sequence[str],
    patients: Sequence[str],
    *,
    rng: np.random.Generator,
    fractions: Mapping[str, float] | None = None,
    restarts: int = 12,
) -> np.ndarray:
    """Assign whole patients to splits so that each class comes as near as it can to its share.

    Patients are assigned greedily, large ones first, then moved one at a time while that helps;
    the best of several random orders wins. A class missing from train costs most, then one missing
    from test, then one missing from val.

    Parameters
    ----------
    labels, patients : (n,) sequences of str
        Class and patient of each image.
    rng : numpy.random.Generator
    fractions : mapping, optional
        Share of each split; by default :data:`FRACTIONS`.
    restarts : int
        Random orders tried; one only above 2000 patients.

    Returns
    -------
    (n,) ndarray of str
        Split of each image.
    """
    fractions = dict(FRACTIONS if fractions is None else fractions)
    names = list(fractions)
    share = np.array([fractions[name] for name in names], float)
    share = share / share.sum()
    _, label = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    ids, patient = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    counts = np.zeros((len(ids), label.max() + 1))
    np.add.at(counts, (patient, label), 1)
    target = share[:, None] * counts.sum(0)
    weight = np.array([{"train": 1e6, "test": 1e4, "val": 1e2}.get(name, 1e2) for name in names])

    def cost(total):
        fit = ((total - target) ** 2 / np.maximum(target, 1e-9)).sum((-1, -2))
        return fit + ((total == 0) * weight[:, None]).sum((-1, -2))

    best, best_cost = None, np.inf
    for _ in range(restarts if len(ids) <= 2000 else 1):
        order = rng.permutation(len(ids))
        order = order[np.argsort(-counts[order].sum(1), kind="stable")]
        assigned = np.full(len(ids), -1)
        total = np.zeros((len(names), counts.shape[1]))
        for _sweep in range(6):
            moved = False
            for p in order:
                old = assigned[p]
                if old >= 0:
                    total[old] -= counts[p]
                trial = total[None] + np.eye(len(names))[:, :, None] * counts[p]
                costs = cost(trial)
                new = int(np.argmin(costs))
                if old >= 0 and costs[new] >= costs[old] - 1e-9:
                    new = old
                moved |= new != old
                assigned[p] = new
                total[new] += counts[p]
            if not moved:
                break
        final = float(cost(total))
        if final < best_cost - 1e-9:
            best, best_cost = assigned.copy(), final
    return np.array(names)[best[patient]]


def _limits(per_class: Mapping[str, int | None] | None) -> dict[str, int | None]:
    limits = dict(per_class or {})
    for split, value in limits.items():
        if split not in SPLITS:
            raise ValueError(
                f"per_class names the split {split!r}; choose from {', '.join(SPLITS)}."
            )
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if value is not None and (not whole or value < 0):
            raise ValueError(
                f"per_class[{split!r}] is {value!r}; give a whole number >= 0, or None."
            )
    return limits


def _subset(table: pd.DataFrame, limits: Mapping[str, int | None], rng) -> pd.DataFrame:
    """At most so many rows a class and split, taken from as many patients as possible."""
    kept, short = [], []
    for (label, split), group in table.groupby(["label", "split"], sort=True):
        limit = limits.get(split)
        if limit is None:
            kept.append(group)
            continue
        shuffled = group.iloc[rng.permutation(len(group))]
        turn = shuffled.groupby("patient").cumcount()
        kept.append(shuffled.iloc[np.argsort(turn.to_numpy(), kind="stable")[:limit]])
        if len(group) < limit:
            short.append(f"{label}/{split}: {len(group)} of {limit}")
    if short:
        warnings.warn("fewer images than asked for: " + ", ".join(short), stacklevel=4)
    return pd.concat(kept).sort_index() if kept else table


def _from_files(
    name: str,
    classes: Sequence[str],
    table: pd.DataFrame,
    *,
    image_size: int,
    seed: int,
    limits: Mapping[str, int | None],
) -> Dataset:
    """Finish a set of files: split where needed, check, take the subset.

    `table` has the columns path and label; patient, split, site and mask are optional.
    """
    table = table.reset_index(drop=True)
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0x5EED]))
    base = _common_folder(table["path"])
    table["image_id"] = _image_ids([Path(p).relative_to(base) for p in table["path"]])
    if "patient" not in table:
        warnings.warn(
            f"{name}: no patients are given, so that each image counts as one: images of one "
            "patient may lie in several splits, and intervals are too narrow then. A CSV table can "
            "name them in a column patient",
            stacklevel=4,
        )
    for column, value in (("patient", table["image_id"]), ("site", "A"), ("mask", None)):
        if column not in table:
            table[column] = value
    for column, value in (("patient", table["image_id"]), ("site", "A")):
        table[column] = table[column].where(table[column].notna(), value).astype(str)
    if "split" not in table:
        table["split"] = split_by_patient(table["label"], table["patient"], rng=rng)
        if none := [s for s in FRACTIONS if s not in set(table["split"])]:
            warnings.warn(
                f"{name}: patients are kept together, and with {table['patient'].nunique()} of "
                f"them no images are left for {', '.join(none)}",
                stacklevel=3,
            )
    _check_splits(name, classes, table)
    whole = len(table)
    table = _subset(table, limits, rng).reset_index(drop=True)
    if len(table) < whole:
        warnings.warn(
            f"{name}: {len(table)} of {whole} images are used; train_per_class, val_per_class, "
            "test_per_class and test2_per_class of chapter 00 limit them, null takes all",
            stacklevel=4,
        )
    small, paged, wrong = 0, [], []
    for path in map(Path, table["path"]):
        try:
            with _open(path) as picture:
                small += min(picture.size) < image_size
                paged += [path.name] if getattr(picture, "n_frames", 1) > 1 else []
        except (ValueError, FileNotFoundError) as error:
            wrong.append(error)
    if wrong:
        raise wrong[0] if len(wrong) == 1 else unusable(wrong, len(table))
    if paged:
        warnings.warn(
            f"{name}: {len(paged)} of {len(table)} images have several pages, of which the first "
            f"is used, e.g. {paged[0]}",
            stacklevel=3,
        )
    _check_label_maps(name, table, image_size)
    if small:
        warnings.warn(
            f"{name}: {small} of {len(table)} images have a short side below "
            f"image_size={image_size} and are enlarged, which adds no detail",
            stacklevel=3,
        )
    table["dataset"], table["height"], table["width"] = name, image_size, image_size
    images = {
        row.image_id: (lambda p=Path(row.path): read_image(p, image_size))
        for row in table.itertuples()
    }
    instances = {
        row.image_id: (lambda m=Path(row.mask), p=Path(row.path): _read_labels(m, p, image_size))
        for row in table.itertuples()
        if isinstance(row.mask, str | Path)
    }
    return Dataset(name, tuple(classes), table[list(COLUMNS)], images, instances)


def unusable(errors: Sequence[Exception | str], n: int, most: int = 20) -> ValueError:
    """One error for those of several of `n` images, of which `most` are told."""
    lines = [f"{len(errors)} of {n} images cannot be used:", *map(str, errors[:most])]
    more = len(errors) - most
    return ValueError("\n".join([*lines, f"and {more} more"] if more > 0 else lines))


#: Unconnected parts for each number, above which a label map hardly holds glands.
_PARTS_A_GLAND = 3


def _check_label_maps(name: str, table: pd.DataFrame, image_size: int, n: int = 3) -> None:
    """Warn if the first label maps do not look as if each number were one gland."""
    for row in table[table["mask"].notna()].head(n).itertuples():
        try:
            labels = _read_labels(Path(row.mask), Path(row.path), image_size)
        except (ValueError, OSError):  # named with all others when they are filed
            continue
        numbers = len(np.unique(labels[labels > 0]))
        parts = int(measure.label(labels, background=0, connectivity=1).max())
        if parts > _PARTS_A_GLAND * numbers:
            warnings.warn(
                f"{name}: label map {Path(row.mask).name} has {numbers} numbers in {parts} "
                "unconnected parts, but each number should be one gland. A map of classes, or one "
                "that was resized with interpolation, has to become a binary mask, of 0 and one "
                "other number, whose parts are taken for glands",
                stacklevel=4,
            )
            return


def check_copies(records: pd.DataFrame, digests: Sequence[str | None]) -> str | None:
    """Find images with the same pixels.

    Parameters
    ----------
    records : (n rows) DataFrame
        With the columns image_id, label and split.
    digests : (n,) sequence of str or None
        Hash of the pixels of each; None for one that does not count, such as a blank field.

    Returns
    -------
    str or None
        A note on copies within a split, which would be drawn as if they were other tissue.

    Raises
    ------
    ValueError
        If images of two splits are the same: what is tested on would be trained on.
    """
    given = records.assign(digest=list(digests)).dropna(subset="digest")
    groups = [part for _, part in given.groupby("digest", sort=False) if len(part) > 1]
    across = [part for part in groups if part["split"].nunique() > 1]
    if across:
        names = ", ".join(f"{r.image_id} ({r.split})" for r in across[0].head(4).itertuples())
        raise ValueError(
            f"{len(across)} images are in several splits, pixel for pixel, e.g. {names}: remove "
            "the copies, or put them into one split"
        )
    if not groups:
        return None
    several = sum(part["label"].nunique() > 1 for part in groups)
    names = ", ".join(groups[0]["image_id"].head(4))
    classes = f", {several} of them in several classes" if several else ""
    return (
        f"{len(groups)} images are there more than once, pixel for pixel{classes}, e.g. {names}; "
        "remove the copies, which else replace each other as if they were other tissue"
    )


def redrawn(records: pd.DataFrame, before: pd.DataFrame) -> str | None:
    """Compare the splits of images with those that they had in an earlier run.

    Parameters
    ----------
    records, before : DataFrame
        With the columns image_id and split.

    Returns
    -------
    str or None
        A note if an image is in another split than before: what was learned then has seen images
        that test now.
    """
    both = records.merge(before, on="image_id", suffixes=("", "_before"))
    moved = both[both["split"] != both["split_before"]]
    if moved.empty:
        return None
    first = moved.iloc[0]
    return (
        f"{len(moved)} of {len(both)} images are in another split than before, e.g. "
        f"{first['image_id']} in {first['split']}, not {first['split_before']}; a column split in "
        "a table keeps them where they are"
    )


def _check_splits(name: str, classes: Sequence[str], table: pd.DataFrame) -> None:
    """Refuse a patient in two splits and a class without training images; warn of other gaps."""
    wrong = sorted(set(table["split"]) - set(SPLITS))
    if wrong:
        raise ValueError(f"{name}: split {wrong[0]!r} is unknown; choose from {', '.join(SPLITS)}.")
    per_patient = table.groupby("patient")["split"].unique()
    leaks = per_patient[per_patient.map(len) > 1]
    if len(leaks):
        patient, where = leaks.index[0], " and ".join(sorted(leaks.iloc[0]))
        raise ValueError(
            f"{name}: {len(leaks)} patients are in two splits, e.g. {patient!r} in {where}. "
            "Put all images of a patient into one split, or leave the split out and have it drawn."
        )
    count = Counter(zip(table["label"], table["split"], strict=True))
    empty = [c for c in classes if not any(count[c, s] for s in SPLITS)]
    if empty:
        raise ValueError(
            f"{name}: no images for {', '.join(map(repr, empty))}: add some or remove the class."
        )
    missing = [c for c in classes if not count[c, "train"]]
    if missing:
        held = {s: count[missing[0], s] for s in SPLITS if count[missing[0], s]}
        raise ValueError(
            f"{name}: class {missing[0]!r} has no training images (it has {held}). Nothing can be "
            "learnt of it: move some patients to train, or drop the class."
        )
    for split in sorted(set(table["split"]) - {"train"}, key=SPLITS.index):
        gone = [c for c in classes if not count[c, split]]
        if gone:
            counts = ", ".join(f"{c} {count[c, split]}" for c in classes)
            warnings.warn(
                f"{name}: split {split!r} has no images of {', '.join(gone)} ({counts}); scores on "
                "it do not cover these classes",
                stacklevel=4,
            )


def _common_folder(paths: Sequence[Path]) -> Path:
    parents = [Path(p).parent for p in paths]
    base = parents[0]
    for parent in set(parents):
        while base not in (parent, *parent.parents):
            base = base.parent
    return base


def _image_ids(paths: Sequence[Path]) -> list[str]:
    """Names fit for files, unique, from relative paths; long ones end with a hash of the path."""
    used: Counter = Counter()
    ids = []
    for path in paths:
        text = "__".join(path.with_suffix("").parts)
        text = re.sub(r"[^\w.-]+", "_", text).strip("._") or "image"
        if len(text.encode()) > LONGEST_ID:
            mark = hashlib.sha256(path.as_posix().encode()).hexdigest()[:8]
            text = text.encode()[: LONGEST_ID - 9].decode(errors="ignore") + f"-{mark}"
        used[text.lower()] += 1
        n = used[text.lower()]
        ids.append(text if n == 1 else f"{text}--{n}")
    if len({name.lower() for name in ids}) < len(ids):
        ids = [f"{n:06d}__{name}" for n, name in enumerate(ids)]
    return ids


def _existing_root(name: str, root: str | Path | None) -> Path:
    if root is None or str(root) == "":
        raise ValueError(f"data set {name!r} needs a data root, and none was given. {_WHERE[name]}")
    path = Path(root).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"data root {path} of {name!r} does not exist. {_WHERE[name]}")
    return path.resolve()


def _pictures(folder: Path, pattern: str = "*") -> list[Path]:
    return sorted(
        p for p in folder.glob(pattern)
        if p.suffix.lower() in SUFFIXES and p.is_file() and not p.name.startswith(".")
    )  # fmt: skip


# --- drawn and built-in images -------------------------------------------------------------------


def _load_phantom(name, image_size, seed, limits):
    """Draw the colon (or prostate) phantom; every patient has two fields of one grade."""
    organ = "prostate" if name == "phantom-prostate" else "colon"
    classes = phantom.GRADES[organ]
    draw = lru_cache(maxsize=2)(phantom.render)  # pixels and instances of one field, drawn once
    rows, images, instances = [], {}, {}
    for s, split in enumerate(SPLITS):
        limit = limits.get(split)
        limit = PHANTOM_PER_CLASS[split] if limit is None else limit
        site = "B" if split == "test2" else "A"
        for c, grade in enumerate(classes):
            for i in range(limit):
                # numbers do not depend on the limits: a larger set holds the smaller one
                index = (s * len(classes) + c) * 100_000 + i
                patient = (s * len(classes) + c) * 100_000 + i // 2
                image_id = f"{split}_{grade}_{i:03d}"
                key = {
                    "index": index, "seed": seed, "grade": grade, "organ": organ,
                    "size": (image_size, image_size), "site": site, "patient": patient,
                }  # fmt: skip
                rows.append((image_id, grade, split, f"{split}-{grade}-{i // 2:03d}", site))
                images[image_id] = lambda key=key: draw(**key).image.copy()
                instances[image_id] = lambda key=key: draw(**key).glands.copy()
    records = pd.DataFrame(rows, columns=list(COLUMNS[:5]))
    records["dataset"], records["height"], records["width"] = name, image_size, image_size
    return Dataset(name, classes, records, images, instances)


def _ihc_image() -> np.ndarray:
    """Image that skimage.data.immunohistochemistry returns, (512, 512, 3) uint8."""
    file = files("skimage") / "data" / "ihc.png"
    if file.is_file():  # spares the download manager, which the installed file does not need
        with file.open("rb") as stream, Image.open(stream) as picture:
            return np.asarray(picture.convert("RGB"))
    from skimage import data

    return data.immunohistochemistry()


def _load_ihc(name, image_size, seed, limits):
    """Cut the immunohistochemistry image of scikit-image into 4 tiles."""
    tiles = [("ihc_00", 0, 0), ("ihc_01", 0, 256), ("ihc_10", 256, 0), ("ihc_11", 256, 256)]

    def tile(top, left):
        cut = _ihc_image()[top : top + 256, left : left + 256]
        if image_size == 256:
            return cut.copy()
        square = Image.fromarray(cut).resize((image_size,) * 2, Image.Resampling.LANCZOS)
        return np.array(square)

    limit = limits.get("train")
    tiles = tiles if limit is None else tiles[:limit]
    records = pd.DataFrame(
        [(i, "ihc", "train", "ihc", "ihc", "ihc", image_size, image_size) for i, _, _ in tiles],
        columns=list(COLUMNS),
    )
    images = {i: (lambda top=top, left=left: tile(top, left)) for i, top, left in tiles}
    return Dataset("ihc", ("ihc",), records, images, {})


# --- sets of files -------------------------------------------------------------------------------


def _load_folder(root, image_size, seed, limits):
    """Read ``root/<class>/*``, ``root/<split>/<class>/*``, or a CSV."""
    if root.is_file():
        table = _read_csv(root)
        folder = root.parent
    else:
        folder = root
        tables = sorted(path for path in root.iterdir() if path.suffix.lower() == ".csv")
        if len(tables) > 1:
            names = ", ".join(p.name for p in tables)
            raise ValueError(
                f"{root} holds {len(tables)} CSV files ({names}): give the path of the one that "
                "lists the images as root, or move the others elsewhere."
            )
        table = _read_csv(tables[0]) if tables else _walk_classes(root)
    classes = _class_order(folder, sorted(set(table["label"]), key=_natural))
    if alike := [c for c in classes if sum(c.casefold() == d.casefold() for d in classes) > 1]:
        warnings.warn(
            f"the classes {', '.join(map(repr, alike))} differ in capital letters only and are "
            "taken for different ones",
            stacklevel=3,
        )
    return _from_files("folder", classes, table, image_size=image_size, seed=seed, limits=limits)


def _natural(text: str):
    """Key of an order in which 10 comes after 9, and capitals count only between equals."""
    parts = [int(t) if t.isdigit() else t.lower() for t in re.split(r"(\d+)", text)]
    return parts, text


def _class_order(folder: Path, found: list[str]) -> tuple[str, ...]:
    """Order of the classes from classes.txt, if there is one."""
    path = folder / "classes.txt"
    if not path.exists():
        return tuple(found)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}): save it as UTF-8") from None
    wanted = [line.strip() for line in lines if line.strip()]
    if sorted(wanted) != sorted(found):
        raise ValueError(
            f"{path} lists {wanted}, but the images have the classes {found}: make them agree."
        )
    return tuple(wanted)


def _walk_classes(root: Path) -> pd.DataFrame:
    folders = _folders(root)
    if not folders:
        raise ValueError(f"{root} has no class folders and no CSV. {_WHERE['folder']}")
    splits = _are_splits(root, folders)
    rows, passed = [], _pictures(root)
    for folder in folders:
        groups = _folders(folder) if splits else [folder]
        if splits:
            passed += _others(folder, groups)
        for group in groups:
            files = _pictures(group)
            passed += _others(group, files)
            if not files:
                raise ValueError(
                    f"class folder {group} has no images ({', '.join(SUFFIXES)}): add some or "
                    "remove the folder."
                )
            rows += [(str(p), group.name, folder.name) for p in files]
    if not rows:
        raise ValueError(
            f"{root} has the split folders {_names(folders)}, but no class folders in them: sort "
            "the images into root/<split>/<class>/*.png."
        )
    if passed:
        warnings.warn(
            f"{len(passed)} files and folders are passed over, e.g. "
            f"{passed[0].relative_to(root)}: only {', '.join(SUFFIXES)} directly in a class folder "
            "are read",
            stacklevel=4,
        )
    table = pd.DataFrame(rows, columns=["path", "label", "split"])
    return table if splits else table.drop(columns="split")


def _are_splits(root: Path, folders: list[Path]) -> bool:
    """Whether all folders are splits, by name; a mixture of splits and classes is refused."""
    others = [p for p in folders if p.name not in SPLITS]
    nested = any(_folders(p) and not _pictures(p) for p in folders)
    if others and (nested or len(others) < len(folders)):
        raise ValueError(
            f"{root} has the folders {_names(folders)}, which are neither all splits nor all "
            f"classes. Splits must be called {', '.join(SPLITS)} and hold one folder a class; "
            "classes must have other names and hold images. Rename or move what does not fit."
        )
    return not others


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _others(folder: Path, known: list[Path]) -> list[Path]:
    return sorted(p for p in set(folder.iterdir()) - set(known) if not p.name.startswith("."))


def _names(folders: list[Path]) -> str:
    return ", ".join(p.name for p in folders)


def _read_lines(path: Path) -> pd.DataFrame:
    """Fields of a CSV as text, under the names of its first line; the index is the line number."""
    try:
        lines = pd.read_csv(
            path, header=None, dtype=str, skipinitialspace=True, skip_blank_lines=False,
            **_ONLY_EMPTY,
        )  # fmt: skip
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeError) as error:
        reason = str(error).rpartition("C error: ")[2].strip()
        raise ValueError(
            f"{path} cannot be read as a CSV table ({reason}): save it as UTF-8, separated by "
            "commas, with a name for every column in its first line and quotes around what holds "
            "a comma."
        ) from None
    lines.index += 1
    names = [str(name).strip() for name in lines.iloc[0].fillna("")]
    return lines.iloc[1:].dropna(how="all").set_axis(names, axis=1)


def _read_csv(path: Path) -> pd.DataFrame:
    table = _read_lines(path)
    if twice := [c for c in _CSV_COLUMNS if list(table.columns).count(c) > 1]:
        raise ValueError(f"{path} has more than one column {twice[0]!r}: keep one of them.")
    missing = [c for c in ("path", "label") if c not in table]
    if missing and re.search("[;\t\0]", "".join(table.columns)):
        raise ValueError(
            f"{path} has the first line {','.join(table.columns)!r}, whose columns cannot be told "
            "apart: save it as UTF-8, separated by commas."
        )
    if missing:
        raise ValueError(
            f"{path} has the columns {list(table.columns)}, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing: the first line must name path and "
            "label, and may name patient, split, site and mask. Move a table of other things "
            "elsewhere."
        )
    if table.empty:
        raise ValueError(f"{path} has no rows: add one line an image.")
    for column in (c for c in table if c not in _CSV_COLUMNS):
        meant = _meant(column)
        if meant and meant not in table:
            raise ValueError(
                f"{path} has a column {column!r}, which means nothing here: name it {meant!r}, "
                "or something less alike if it is not meant"
            )
    table = table[[c for c in _CSV_COLUMNS if c in table]]
    table = table.apply(lambda column: column.str.strip())
    table = table.mask(table == "")
    for column in ("path", "label", *(c for c in ("split", "patient") if c in table)):
        if table[column].isna().any():
            raise ValueError(
                f"{path}, line {table.index[table[column].isna()][0]}: {column} is empty; fill it "
                "in, or remove the column if it is optional."
            )
    gone = []
    for column, kind in (("path", "image file"), ("mask", "label map")):
        for line, text in table[column].dropna().items() if column in table else ():
            try:
                table.loc[line, column] = _named_file(path, line, kind, text)
            except FileNotFoundError as error:
                gone.append(error)
    if gone:
        raise gone[0] if len(gone) == 1 else unusable(gone, len(table))
    twice = table["path"][table["path"].map(os.path.normpath).duplicated()]
    if len(twice):
        raise ValueError(f"{path} names {Path(twice.iloc[0]).name} twice: one line an image.")
    _note_unnamed(path, table)
    return table


def _note_unnamed(path: Path, table: pd.DataFrame) -> None:
    """Warn of images beside those of a table that it does not name."""
    columns = [table[column].dropna() for column in ("path", "mask") if column in table]
    named = set(map(os.path.realpath, pd.concat(columns)))
    folders = sorted({Path(p).parent for p in table["path"]})
    there = [p for folder in folders for p in _pictures(folder)]
    if beside := [p for p in there if os.path.realpath(p) not in named]:
        warnings.warn(
            f"{path.name} leaves out {len(beside)} of the images in the folders of those that it "
            f"names, e.g. {beside[0].name}: add lines for them if they are meant",
            stacklevel=4,
        )


def _meant(column: str) -> str | None:
    """Column that one of another name probably means, e.g. ``PatientID`` or ``spilt``."""
    words = set(re.findall("[a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", " ", column).lower()))
    words |= {word.removesuffix("id") for word in words}
    for meant, hints in _MAY_MEAN.items():
        if words & hints:
            return meant
    near = difflib.get_close_matches(column.lower(), _CSV_COLUMNS, n=1, cutoff=0.75)
    return near[0] if near else None


def _named_file(table: Path, line: int, kind: str, text: str) -> str:
    """Path of a file that a table names."""
    for written in spellings(text):
        if (table.parent / written).is_file():
            return str(table.parent / written)
    raise FileNotFoundError(f"{table}, line {line}: {kind} {table.parent / text} does not exist.")


def _load_glas(root, image_size, seed, limits, *, n_classes=None):
    """Read GlaS: fields with gland instances, grades and patients."""
    path = root / "Grade.csv"
    if not path.exists():
        raise FileNotFoundError(f"{root} has no Grade.csv. {_WHERE['glas']}")
    table = pd.read_csv(path, dtype=str, skipinitialspace=True, **_ONLY_EMPTY)
    table.columns = [c.strip() for c in table.columns]
    wanted = ["name", "patient ID", "grade (GlaS)", "grade (Sirinukunwattana et al. 2015)"]
    missing = [c for c in wanted if c not in table]
    if missing:
        raise ValueError(
            f"{path} has the columns {list(table.columns)}, but {missing} are missing."
        )
    table = table[wanted].apply(lambda column: column.str.strip()).dropna()
    table.columns = ["name", "patient", "two", "five"]
    table["five"] = table["five"].str.replace("differentated", "differentiated")
    classes = ("benign", "malignant") if n_classes == 2 else GLAS_CLASSES
    table["label"] = table["two"] if n_classes == 2 else table["five"]
    odd = sorted(set(table["label"]) - set(classes))
    if odd:
        raise ValueError(f"{path} has the grade {odd[0]!r}; known are {', '.join(classes)}.")
    table["path"] = [_glas_file(root, n) for n in table["name"]]
    table["mask"] = [_glas_mask(root, n) for n in table["name"]]
    found = table["path"].notna()
    if not found.any():
        raise FileNotFoundError(
            f"no image that {path} names is in {root / 'images'}. {_WHERE['glas']}"
        )
    if not found.all():
        warnings.warn(
            f"glas: {int((~found).sum())} of {len(table)} images of Grade.csv are not there",
            stacklevel=3,
        )
    table = table[found]
    if absent := [c for c in classes if c not in set(table["label"])]:
        warnings.warn(f"glas: no images are {' or '.join(absent)}", stacklevel=3)
        classes = tuple(c for c in classes if c not in absent)
    table["patient"] = "glas-" + table["patient"].str.zfill(2)
    return _from_files(
        "glas", classes, table[["path", "label", "patient", "mask"]],
        image_size=image_size, seed=seed, limits=limits,
    )  # fmt: skip


def _glas_file(root: Path, name: str) -> str | None:
    for folder in (root / "images", root):
        for suffix in SUFFIXES:
            if (folder / f"{name}{suffix}").exists():
                return str(folder / f"{name}{suffix}")
    return None


def _glas_mask(root: Path, name: str) -> str | None:
    for path in (
        root / "masks" / f"{name}.png",
        root / "masks" / f"{name}.bmp",
        root / f"{name}_anno.bmp",
    ):
        if path.exists():
            return str(path)
    return None


_KBSMC_SPLIT = {
    "tma01": "train", "tma02": "train", "tma03": "train", "tma05": "train", "wsi01": "train",
    "tma06": "val", "wsi03": "val", "tma04": "test", "wsi02": "test",
}  # fmt: skip


def _load_kbsmc(root, image_size, seed, limits):
    """Read the colorectal set of the paper: arrays and slides for Test I, 45 slides for Test II."""
    rows = []
    for path in _pictures(root, "**/*.jpg"):
        parents = path.relative_to(root).parents
        folder = next((p.name for p in parents if _kbsmc_key(p.name) in _KBSMC_SPLIT), None)
        if folder is None:
            continue
        k, split = _digit(path, r"_(\d)$", 0), _KBSMC_SPLIT[_kbsmc_key(folder)]
        core = re.sub(r"_\d$", "", path.stem).split("_")[0]
        rows.append((str(path), KBSMC_CLASSES[k], split, f"{folder}/{core}", "A"))
    for path in _pictures(root, "**/wsi_*/*/*.png"):
        k = _digit(path, r"(\d)$", 1)
        slide = path.parents[1].name
        rows.append((str(path), KBSMC_CLASSES[k], "test2", f"test2/{slide}", "B"))
    return _paper_set("kbsmc-colon", KBSMC_CLASSES, rows, root, image_size, seed, limits)


def _kbsmc_key(folder: str) -> str:
    return folder.lower().replace("_", "")


_USZ_SPLIT = {"111": "train", "199": "train", "204": "train", "76": "val", "80": "test"}


def _load_usz(root, image_size, seed, limits):
    """Read the prostate set of the paper: patches of five tissue arrays."""
    rows = []
    for path in _pictures(root, "**/*_class_*.jpg"):
        found = re.finditer(r"ZT(\d+)(_\d+_[A-Z]_\d+_\d+)?", path.relative_to(root).as_posix())
        array = max(found, key=lambda match: len(match[0]), default=None)  # core, else array
        if array is None or array[1] not in _USZ_SPLIT:
            raise ValueError(
                f"{path}: no tissue array in the path; one of "
                f"{', '.join('ZT' + a for a in _USZ_SPLIT)} is needed to know the split."
            )
        k = _digit(path, r"_class_(\d)$", 0)
        rows.append((str(path), USZ_CLASSES[k], _USZ_SPLIT[array[1]], array[0], "A"))
    return _paper_set("usz-prostate", USZ_CLASSES, rows, root, image_size, seed, limits)


def _digit(path: Path, pattern: str, first: int) -> int:
    match = re.search(pattern, path.stem)
    k = int(match[1]) - first if match else -1
    if not 0 <= k <= 3:
        raise ValueError(
            f"{path}: the file name must end with a label from {first} to {first + 3}."
        )
    return k


def _paper_set(name, classes, rows, root, image_size, seed, limits):
    if not rows:
        raise FileNotFoundError(f"{root} holds no images of {name!r}. {_WHERE[name]}")
    table = pd.DataFrame(rows, columns=["path", "label", "split", "patient", "site"])
    return _from_files(name, classes, table, image_size=image_size, seed=seed, limits=limits)


def _load_pathmnist(root, image_size, seed, limits):
    """Read PathMNIST from its npz; only the rows that are used are kept in memory."""
    path = _pathmnist_file(root, image_size)
    rng = np.random.default_rng(np.random.SeedSequence([seed, 0x5EED]))
    frames, images = [], {}
    with _open_npz(path) as archive:
        for split in ("train", "val", "test"):
            labels = np.concatenate(list(_npy_rows(archive, f"{split}_labels", path))).ravel()
            if labels.max() >= len(PATHMNIST_CLASSES):
                raise ValueError(f"{path} has the label {labels.max()}; PathMNIST has 9 classes.")
            ids = [f"{split}_{i:06d}" for i in range(len(labels))]
            table = pd.DataFrame({"image_id": ids, "label": [PATHMNIST_CLASSES[k] for k in labels]})
            # the set names no patients; its test part comes from other patients at another centre
            table["split"], table["patient"] = split, table["image_id"]
            table["site"] = "B" if split == "test" else "A"
            table = _subset(table, limits, rng)
            wanted = dict(zip(table.index.tolist(), table["image_id"], strict=True))
            for i, row in enumerate(_npy_rows(archive, f"{split}_images", path)):
                if i in wanted:
                    images[wanted[i]] = row[0]
            frames.append(table)
    records = pd.concat(frames, ignore_index=True)
    records["dataset"], records["height"], records["width"] = "pathmnist", image_size, image_size
    _check_splits("pathmnist", PATHMNIST_CLASSES, records)

    def scaled(pixels):
        picture = Image.fromarray(pixels)
        return np.array(picture.resize((image_size,) * 2, Image.Resampling.LANCZOS))

    access = {i: (lambda pixels=pixels: scaled(pixels)) for i, pixels in images.items()}
    return Dataset("pathmnist", PATHMNIST_CLASSES, records[list(COLUMNS)], access, {})


def _pathmnist_file(root: Path | None, image_size: int) -> Path:
    """The npz whose images are the smallest that are large enough; downloaded if need be."""
    if root is not None and root.is_file():
        return root
    sizes = {
        28: "pathmnist.npz",
        64: "pathmnist_64.npz",
        128: "pathmnist_128.npz",
        224: "pathmnist_224.npz",
    }
    order = sorted(sizes, key=lambda s: (s < image_size, abs(s - image_size)))
    for size in order:
        if root is not None and (root / sizes[size]).exists():
            return root / sizes[size]
    try:
        import medmnist
    except ImportError:
        raise ImportError(
            f"data set 'pathmnist': no pathmnist*.npz in {root}, and the medmnist package is not "
            f"installed. {_WHERE['pathmnist']}"
        ) from None
    if root is None:
        raise ValueError(
            f"data set 'pathmnist' needs a data root, and none was given. {_WHERE['pathmnist']}"
        )
    try:
        medmnist.PathMNIST(split="val", size=order[0], root=str(root), download=True)
    except Exception as error:
        raise FileNotFoundError(
            f"pathmnist could not be downloaded ({error}). {_WHERE['pathmnist']}"
        ) from error
    return root / sizes[order[0]]


@contextmanager
def _open_npz(path: Path) -> Iterator[zipfile.ZipFile]:
    """Archive of an npz; damage found when it is opened or read is a ``ValueError``."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): remove it and download it again. {_WHERE['pathmnist']}"
        ) from None


def _npy_rows(archive: zipfile.ZipFile, name: str, path: Path):
    """Yield the rows of one array of an npz, (1, ...) each, without holding the whole array."""
    if f"{name}.npy" not in archive.namelist():
        raise ValueError(f"{path} has no array {name!r}: it is not a PathMNIST file.")
    with archive.open(f"{name}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read(stream)
        if fortran or dtype.hasobject:
            raise ValueError(f"{path}: array {name!r} is not stored row by row.")
        size = int(np.prod(shape[1:], dtype=int)) * dtype.itemsize
        for _ in range(shape[0]):
            data = stream.read(size)
            yield np.frombuffer(data, dtype=dtype).reshape(1, *shape[1:])


_LOADERS = {
    "phantom": _load_phantom,
    "phantom-prostate": _load_phantom,
    "ihc": _load_ihc,
    "folder": _load_folder,
    "glas": _load_glas,
    "kbsmc-colon": _load_kbsmc,
    "usz-prostate": _load_usz,
    "pathmnist": _load_pathmnist,
}

#: Names that :func:`load` knows.
NAMES = tuple(_LOADERS)
