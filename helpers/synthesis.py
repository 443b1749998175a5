"""Synthesis: images of a class composed from its segments, healed and written with their making.

It goes in two strides. Composing (:func:`compose_all`) is sequential, since each draw
changes the weights of the next; healing (:func:`synthesise`) is dear with many steps, and
independent from one image to the next. A run that was killed composes everything again, a few
tenths of a second an image, and heals only what is missing: the result is the same bit for bit.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from helpers.files import read_json, replacing, sha256
from helpers.pool import Pool
from helpers.replacement import Composite, CompositeError, Sampler, compose

#: Heals composites: (images (n, H, W, 3) uint8, unknown (n, H, W) bool, generators) -> images.
Heal = Callable[[np.ndarray, np.ndarray, Sequence[torch.Generator]], np.ndarray]

_KINDS = ("pasted", "regions", "images")  # pictures of each image, a folder each


# --- composing ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """One synthetic image to be made, or the record that it could not be.

    Attributes
    ----------
    synthetic_id : str
    label : str
        Class of the target image and of all its sources.
    order : int
        Place within the class, from 0: the first n are the set of n images a class.
    composite : Composite or None
        None if no target of the class met the conditions.
    skipped : tuple of dict
        Targets that were tried before, each with image_id and reason.
    """

    synthetic_id: str
    label: str
    order: int
    composite: Composite | None
    skipped: tuple[dict[str, str], ...]


#: So many times in a row all images of a class are tried in vain before it is given up.
GIVE_UP = 3


def compose_all(
    pool: Pool,
    sampler: Sampler,
    get_image: Callable[[str], np.ndarray],
    *,
    n_per_class: int,
    rng_of: Callable[[str, int], np.random.Generator],
    labels: Sequence[str] | None = None,
    **options: Any,
) -> Iterator[Piece]:
    """Compose the images of every class, one after the other.

    Targets are all images of the class, in a new random order for each image; the first one that
    meets the conditions is taken. When none did, :data:`GIVE_UP` times in a row, the rest of the
    class is not tried.

    Parameters
    ----------
    pool : Pool
    sampler : Sampler
        Its weights go on over the whole run. Classes do not share segments, so the first n images
        of a class are the same however many follow.
    get_image : callable
        image_id to (H, W, 3) uint8 ndarray.
    n_per_class : int
        Images of each class.
    rng_of : callable
        (label, order) to the random generator of that image.
    labels : sequence of str, optional
        Classes, by default all of the pool.
    **options
        Arguments of :func:`helpers.replacement.compose`.

    Yields
    ------
    Piece
        Class by class, `n_per_class` of each.

    Raises
    ------
    ValueError
        If `n_per_class` is below 1 or a class has no segment in the pool.
    """
    if n_per_class < 1:
        raise ValueError(f"n_per_class is {n_per_class}: at least 1 is needed")
    labels = list(pool.classes if labels is None else labels)
    ids = {label: _images_of(pool, label) for label in labels}
    names = _file_names(pool.classes)
    stains: dict[tuple[str, str], Any] = {}
    for label in labels:
        in_vain, skipped = 0, []
        for order in range(n_per_class):
            name = f"{names[label]}-{order:04d}"
            if in_vain == GIVE_UP:
                yield Piece(name, label, order, None, tuple(skipped))
                continue
            rng = rng_of(label, order)
            composite, skipped = None, []
            for image_id in rng.permutation(ids[label]):
                try:
                    composite = compose(
                        get_image(image_id), str(image_id), pool, sampler, get_image,
                        rng=rng, stains=stains, **options,
                    )  # fmt: skip
                    break
                except CompositeError as error:
                    skipped.append({"image_id": str(image_id), "reason": str(error)})
            in_vain = in_vain + 1 if composite is None else 0
            yield Piece(name, label, order, composite, tuple(skipped))


# --- healing --------------------------------------------------------------------------------------


def synthesise(
    pieces: Iterable[Piece],
    heal: Heal,
    folder: str | Path,
    *,
    generator_of: Callable[[str, int], torch.Generator],
    provenance: Mapping[str, Any],
    batch: int = 8,
    total: int | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Heal composites in batches across images and write them, each with its provenance.

    Below `folder`, ``images/<id>.png`` is the healed image, ``pasted/<id>.png`` the composite
    before healing, ``regions/<id>.png`` its regions (1 where pasted, plus 2 where unknown) and
    ``provenance/<id>.json`` the record, written last: an image without a record is made again.

    Parameters
    ----------
    pieces : iterable of Piece
        From :func:`compose_all`; those without a composite are passed over.
    heal : callable
        (images, unknown, generators) to healed images, e.g. :func:`helpers.diffusion.inpaint`.
    folder : str or Path
        Where the images go. Finished ones of the same recipe are kept.
    generator_of : callable
        (label, order) to the torch generator of that image.
    provenance : mapping
        What made the images: method, parameters, seed, hashes of the weights. Part of every record;
        an image made by another recipe is made again.
    batch : int
        Images healed at once. Batches are fixed by the order of the pieces, so that a resumed run
        gives the same bits.
    total : int, optional
        Number of pieces, for the progress bar.
    progress : bool

    Returns
    -------
    list of dict
        The records, in the order of the pieces.

    Raises
    ------
    ValueError
        If `batch` is below 1.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}: at least 1 is needed")
    folder, records = Path(folder), []
    recipe = _digest(provenance)
    made = iter(piece for piece in pieces if piece.composite is not None)
    with tqdm(total=total, desc="healing", unit="image", disable=not progress) as bar:
        while part := list(islice(made, batch)):
            found = [_finished(folder, piece, recipe) for piece in part]
            if not all(found):
                healed = heal(
                    np.stack([piece.composite.image for piece in part]),
                    np.stack([piece.composite.unknown for piece in part]),
                    [generator_of(piece.label, piece.order) for piece in part],
                )
                for i, piece in enumerate(part):
                    if found[i] is None:
                        found[i] = _write(folder, piece, healed[i], provenance, recipe)
            records += found
            bar.update(len(part))
    return records


def weight_hashes(checkpoint: str | Path, shipped: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 of the weights that heal, for the provenance.

    Parameters
    ----------
    checkpoint : str or Path
        "small", a file, or a folder with safetensors files, as for
        :func:`helpers.latent.load_latent_diffusion`.
    shipped : mapping
        File name to SHA-256 of the weights of this project, which "small" stands for; other
        files than safetensors, such as curves, are passed over.

    Returns
    -------
    dict of str to str
        File name to SHA-256; no folders, so that the record is the same on every machine.

    Raises
    ------
    FileNotFoundError
        If there is no such file, or no safetensors file in the folder.
    """
    if str(checkpoint) == "small":
        return {name: sha for name, sha in shipped.items() if name.endswith(".safetensors")}
    path = Path(checkpoint)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise FileNotFoundError(
            f"latent checkpoint {str(checkpoint)!r} holds no weights: give 'small', a file, or a "
            "folder with safetensors files"
        )
    return {file.name: sha256(file) for file in files}


# --- inside ---------------------------------------------------------------------------------------


def _finished(folder: Path, piece: Piece, recipe: str) -> dict[str, Any] | None:
    """Record of a finished image of the same recipe and composite, or None."""
    try:
        record = read_json(folder / "provenance" / f"{piece.synthetic_id}.json")
        digests = record["recipe"], record["composite"]
    except (OSError, ValueError, LookupError, TypeError):  # not there, or damaged
        return None
    whole = all(_whole(folder / kind / f"{piece.synthetic_id}.png") for kind in _KINDS)
    return record if whole and digests == (recipe, _composite_digest(piece.composite)) else None


def _whole(path: Path) -> bool:
    """Whether a picture is there, and neither cut short nor damaged."""
    try:
        with Image.open(path) as picture:
            picture.load()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def _write(
    folder: Path, piece: Piece, healed: np.ndarray, provenance: Mapping[str, Any], recipe: str
) -> dict[str, Any]:
    composite = piece.composite
    record = folder / "provenance" / f"{piece.synthetic_id}.json"
    record.unlink(missing_ok=True)  # of another recipe: it does not speak for these pictures
    regions = composite.pasted + 2 * composite.unknown.astype(np.uint8)
    for kind, picture in zip(_KINDS, (composite.image, regions, healed), strict=True):
        path = folder / kind / f"{piece.synthetic_id}.png"
        with replacing(path) as tmp:
            Image.fromarray(picture).save(tmp)
    made = {
        "synthetic_id": piece.synthetic_id,
        "label": piece.label,
        "order": piece.order,
        "target": composite.image_id,
        "sources": [done["source_image"] for done in composite.replacements],
        "replacements": composite.replacements,
        "new_area_ratio": float(composite.new_area_ratio),
        "pasted_share": float(composite.pasted.mean()),
        "unknown_share": float(composite.unknown.mean()),
        "skipped": list(piece.skipped),
        "composite": _composite_digest(composite),
        "recipe": recipe,
        "made_by": dict(provenance),
    }
    text = json.dumps(made, sort_keys=True, ensure_ascii=False)
    with replacing(record) as tmp:
        tmp.write_text(text + "\n", encoding="utf-8")
    return json.loads(text)


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _composite_digest(composite: Composite) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(composite.image).tobytes())
    digest.update(np.packbits(composite.unknown).tobytes())
    return digest.hexdigest()


def _images_of(pool: Pool, label: str) -> list[str]:
    ids = list(dict.fromkeys(pool.table.loc[pool.table["label"] == label, "image_id"]))
    if not ids:
        raise ValueError(
            f"class {label!r} has no segment in the pool, which has {list(pool.classes)}: "
            "leave the class out, or segment images of it"
        )
    return ids


def _file_names(labels: Sequence[str]) -> dict[str, str]:
    """Names of classes that are fit for files, and differ; of alike ones all but the first end so.

    Names that differ in upper and lower case alone are alike, as some file systems take them.
    """
    used: Counter = Counter()
    names = {}
    for label in labels:
        name = "".join(c if c.isalnum() else "_" for c in label)
        used[name.lower()] += 1
        number = used[name.lower()]
        names[label] = name if number == 1 else f"{name}-{number}"
    return names
