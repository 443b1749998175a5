"""Files: written as a whole or not at all, told apart by their SHA-256, found, read as JSON."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` and move it over `path` when the block succeeds.

    The temporary name is hidden, and keeps the suffix, so that writers which look at it behave the
    same. Folders that are not there are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        if not temporary.exists():
            raise FileNotFoundError(f"nothing was written to {temporary.name} for {path.name}")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def unfinished(folder: str | Path) -> list[Path]:
    """Temporary files of :func:`replacing` that a process that was killed left below `folder`."""
    return sorted(path for path in Path(folder).rglob(".*.tmp*") if path.is_file())


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def spellings(text: str) -> list[str]:
    """Ways in which a path may be written: as given, as on Windows, its accents composed or not.

    Two systems may give one name in different bytes, e.g. an umlaut in a table and on a disk.
    """
    ways = (text, text.replace("\\", "/"))
    forms = [unicodedata.normalize(form, way) for form in ("NFC", "NFD") for way in ways]
    return list(dict.fromkeys([*ways, *forms]))


def read_json(
    path: str | Path, remedy: str = "delete it and run again; what it held is made anew"
) -> Any:
    """Read a JSON file.

    Parameters
    ----------
    path : path or str
    remedy : str
        What to do if it is damaged; ends the message of the error.

    Raises
    ------
    ValueError
        If the file is no longer JSON; the message names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, or of bytes that are no text
        raise ValueError(f"{path} is damaged, it is no JSON ({error}): {remedy}") from None
