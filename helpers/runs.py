"""The run folder: artefacts, results and provenance of every chapter.

A run is a folder ``data/runs/<run>/`` with one folder a chapter.
A chapter works in a hidden sibling, ``.<chapter>.partial``, which takes its place when the chapter
calls :meth:`Stage.finish`: a chapter that fails halfway leaves what it made before untouched, and
a chapter that was killed finds its half-done work again if nothing before it has changed.

Every finished chapter holds

``results.json``
    The numbers it reports: sorted keys, 6 significant digits, no timings, so that the same seed
    gives the same bytes.
``params.json``
    The parameters it ran with.
``manifest.json``
    Parameters, SHA-256 of the inputs it read, of the helper code and of the weights it used,
    library versions, seconds, peak memory.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import fcntl
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import numbers
import os
import platform
import shutil
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from helpers import config
from helpers.files import read_json as load
from helpers.files import replacing, sha256, spellings, unfinished

if TYPE_CHECKING:
    import pandas as pd
    import torch

#: Root of the repository.
REPOSITORY = Path(__file__).resolve().parents[1]

#: What each chapter needs finished before it can run.
NEEDS: dict[str, tuple[str, ...]] = {
    "00_tissue": (),
    "01_superpixel_prompting": ("00_tissue",),
    "02_anchor_clustering": ("00_tissue", "01_superpixel_prompting"),
    "03_pca_pooling": ("00_tissue", "02_anchor_clustering"),
    "04_probabilistic_replacement": ("00_tissue", "03_pca_pooling"),
    "05_sde_mcg_inpainting": ("00_tissue", "04_probabilistic_replacement"),
    "06_synthesis": ("00_tissue", "03_pca_pooling", "04_probabilistic_replacement",
                     "05_sde_mcg_inpainting"),
    "07_classifier_evaluation": ("00_tissue", "06_synthesis"),
    "A1_training_sam": (),
    "A2_training_latent_diffusion": (),
}  # fmt: skip

_VERSIONS = (
    "diffusers", "matplotlib", "numpy", "opencv-python-headless", "pandas", "scikit-image",
    "scikit-learn", "scipy", "segment-anything", "timm", "torch", "torchvision",
)  # fmt: skip

#: Columns of the tables of a run that hold names, which may look like numbers.
_TEXT = (
    "image_id", "label", "dataset", "patient", "site", "split", "synthetic_id", "target", "sources",
)  # fmt: skip

#: Lock files of the chapters that this process is at work on.
_LOCKS: dict[Path, IO[str]] = {}


class Failed(RuntimeError):
    """A chapter, or the build of the book, stopped with an error."""


def root() -> Path:
    """Folder of all runs: ``data/runs``, or ``$USEGMIX_RUNS`` where that is set."""
    return Path(os.environ.get("USEGMIX_RUNS") or REPOSITORY / "data" / "runs")


# --- writing -------------------------------------------------------------------------------------


def read_table(path: Path, text: Sequence[str] = _TEXT) -> pd.DataFrame:
    """Read a CSV file of a run; the columns `text` stay text, and only an empty field is missing.

    By itself pandas would take an image called ``007`` for a number and a class ``NA`` for none.
    """
    import pandas as pd

    types = dict.fromkeys(text, str)
    return pd.read_csv(path, dtype=types, keep_default_na=False, na_values=[""])


def dump(path: Path, value: Any, *, exact: bool = False) -> None:
    """Write `value` as JSON, atomically: sorted keys, no NaN.

    Parameters
    ----------
    path : Path
    value : object
        Numbers, text, lists and dictionaries of them; NaN and infinity become null.
    exact : bool
        Keep floats as they are, as parameters need; otherwise they get 6 significant digits.

    Raises
    ------
    TypeError
        For a value that JSON cannot hold, with its key.
    """
    plain = _plain(value, "results", exact)
    text = json.dumps(plain, indent=2, sort_keys=True, ensure_ascii=False)
    with replacing(path) as tmp:
        tmp.write_text(text + "\n", encoding="utf-8")


def _plain(value: Any, where: str, exact: bool) -> Any:
    """Python's own types for numpy's, dictionaries with text keys, rounded floats."""
    if value is None or isinstance(value, str | bool | np.bool_):
        return bool(value) if isinstance(value, np.bool_) else value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        if not math.isfinite(number):
            return None
        return number if exact else float(f"{number:.6g}")
    if isinstance(value, Mapping):
        return {str(_key(k)): _plain(item, f"{where}.{k}", exact) for k, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist(), where, exact)
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]", exact) for i, item in enumerate(value)]
    if isinstance(value, Path):
        raise TypeError(f"{where} is a path ({value}): results are the same on every machine")
    raise TypeError(f"{where} is a {type(value).__name__}: give numbers, text, lists, dictionaries")


def _key(key: Any) -> Any:
    return key.item() if isinstance(key, np.generic) else key


# --- hashes --------------------------------------------------------------------------------------


class _Hashes:
    """SHA-256 of files, remembered by size and modification time."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, int, int], str] = {}

    def file(self, path: Path) -> str:
        stat = path.stat()
        key = (str(path), stat.st_size, stat.st_mtime_ns)
        if key not in self._seen:
            self._seen[key] = sha256(path)
        return self._seen[key]

    def folder(self, path: Path) -> str:
        digest = hashlib.sha256()
        for item in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{item.relative_to(path).as_posix()} {self.file(item)}\n".encode())
        return digest.hexdigest()

    def any(self, path: Path) -> str | None:
        if path.is_dir():
            return self.folder(path)
        return self.file(path) if path.exists() else None


_hashes = _Hashes()


def _listing(folder: Path) -> str:
    """Digest of names, sizes and times of the files of a data folder: fast for any size.

    Files and folders whose name starts with a dot, such as ``.DS_Store``, are no data.
    """
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else [f for f in folders if not f.startswith(".")]
        seen.add(real)  # links can lead in a circle
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return _stats(found, folder)


def _stats(paths: Iterable[Path], folder: Path) -> str:
    """Digest of names, seen from `folder`, sizes and times of those files that are there."""
    digest = hashlib.sha256()
    for path in sorted(filter(os.path.isfile, paths)):
        stat, name = path.stat(), Path(os.path.relpath(path, folder)).as_posix()
        digest.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _named_files(table: Path) -> Iterator[Path]:
    """Files that fields of a CSV table may name, seen from its folder."""
    with (
        table.open(newline="", encoding="utf-8", errors="replace") as stream,
        contextlib.suppress(csv.Error),  # the loader tells what is wrong with it
    ):
        for field in itertools.chain.from_iterable(csv.reader(stream)):
            yield from (table.parent / way for way in spellings(field.strip()))


# --- chapters ------------------------------------------------------------------------------------


def notebook(chapter: str) -> Path:
    """Source notebook of a chapter."""
    return REPOSITORY / "notebooks" / f"{chapter}.ipynb"


def code(chapter: str) -> str:
    """Code cells of a chapter's notebook, joined; IPython's ``%`` and ``!`` lines are left out."""
    cells = json.loads(notebook(chapter).read_text(encoding="utf-8"))["cells"]
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    lines = "\n\n".join(sources).split("\n")
    return "\n".join("" if line.lstrip().startswith(("%", "!")) else line for line in lines)


@functools.cache
def _imported(source: str) -> frozenset[str]:
    """Names of modules of ``helpers`` that a piece of code imports, wherever it does so."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = f"helpers.{base}".rstrip(".")
            dotted = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {name.split(".")[1] for name in dotted if name.startswith("helpers.")}
    return frozenset(found)


def closure(chapter: str) -> dict[str, str]:
    """Helper modules that a chapter's code imports, directly or through others, with SHA-256.

    Returns
    -------
    dict of str to str
        Module name, e.g. ``"superpixels"``, to the hash of its source file.
    """
    todo, found = {"runs", "config", *_imported(code(chapter))}, {}
    while todo:
        name = todo.pop()
        path = REPOSITORY / "helpers" / f"{name}.py"
        if not path.exists():  # the name of something else, such as a function
            continue
        found[name] = _hashes.file(path)
        todo |= _imported(path.read_text(encoding="utf-8")) - set(found)
    return dict(sorted(found.items()))


def weights(chapter: str) -> dict[str, str]:
    """Files of ``data/weights`` that a chapter's helpers or code name, with SHA-256.

    With weights counts the curve of their training, the JSON file beside them.
    """
    sources = [code(chapter)] + [
        (REPOSITORY / "helpers" / f"{name}.py").read_text(encoding="utf-8")
        for name in closure(chapter)
    ]
    text = "\n".join(sources)
    folder = REPOSITORY / "data" / "weights"
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")])
    return {
        path.name: _hashes.file(path)
        for path in files
        if path.name in text or path.with_suffix(".safetensors").name in text
    }


def executed(run: str, chapter: str) -> Path:
    """Executed notebook of a chapter in the run folder."""
    return root() / run / "notebooks" / f"{chapter}.ipynb"


def manifest(run: str, chapter: str) -> Path:
    """Manifest of a chapter in the run folder, which is there once the chapter has finished."""
    return root() / run / chapter / "manifest.json"


def timings(run: str) -> dict[str, dict[str, float]]:
    """Seconds and peak memory of each chapter when it last ran: ``timings.json`` of the run."""
    path = root() / run / "timings.json"
    return load(path) if path.exists() else {}


# --- a chapter at work ---------------------------------------------------------------------------


def begin(chapter: str, params: config.Common) -> Stage:
    """Open the run folder for a chapter.

    Parameters
    ----------
    chapter : str
        Name of the chapter.
    params : Common
        Its checked parameters, from :func:`helpers.config.read`.

    Returns
    -------
    Stage
        Where the chapter reads its inputs and writes its artefacts.

    Raises
    ------
    FileNotFoundError
        If a chapter that this one builds on has not been finished in this run; the message gives
        the command that does it.
    """
    return Stage(chapter, params)


class Stage:
    """One chapter in one run: its inputs, artefacts, random numbers and results.

    Attributes
    ----------
    chapter, run : str
        Names of the chapter and of the run.
    params : Common
        Parameters of the chapter.
    """

    def __init__(self, chapter: str, params: config.Common) -> None:
        if type(params) is not config.CHAPTERS.get(chapter):
            raise TypeError(f"params of {chapter!r} should come from config.read({chapter!r}, ...)")
        self.chapter, self.params, self.run = chapter, params, params.run
        self.folder = root() / params.run
        self._final = self.folder / chapter
        self._start, self._cpu = time.perf_counter(), time.process_time()
        self._timings: dict[str, float] = {}
        self._inputs: dict[str, str | None] = {}  # hashes, taken when first read
        self._data = _data(params)
        self._add_checkpoints(params)
        for need in NEEDS[chapter]:
            self._finished(need)
        self._finished_now = False
        self._code = _code(chapter)
        self._open()

    # reading

    def input(self, chapter: str, name: str) -> Path:
        """Path of an artefact of another chapter (a file, or a folder of files).

        Raises
        ------
        FileNotFoundError
            If it is not there; the message names the chapter to run.
        """
        self._finished(chapter)
        path = self.folder / chapter / name
        if not path.exists():
            raise FileNotFoundError(
                f"run {self.run!r}: chapter {chapter} has written no {name!r}, which "
                f"{self.chapter} needs. {self._how(chapter)}"
            )
        self._add_input(f"{chapter}/{name}", path)
        return path

    def results(self, chapter: str) -> dict[str, Any]:
        """Numbers that another chapter of this run has reported."""
        return load(self.input(chapter, "results.json"))

    def parameters(self, chapter: str) -> config.Common:
        """Parameters that another chapter of this run was run with."""
        values = load(self.input(chapter, "params.json"))
        params = config.build(chapter, values)
        self._add_checkpoints(params)
        return params

    def records(self) -> pd.DataFrame:
        """Images of the run, one row each: ``00_tissue/images.csv``, text columns as text."""
        return self._records.copy()

    def image(self, image_id: str) -> np.ndarray:
        """One image of the run.

        Returns
        -------
        (H, W, 3) uint8 ndarray
        """
        from PIL import Image

        with Image.open(self._picture("images", image_id)) as picture:
            return np.array(picture.convert("RGB"))

    def instances(self, image_id: str) -> np.ndarray | None:
        """Ground-truth gland instances of one image, or None where the data set has none.

        Returns
        -------
        (H, W) int32 ndarray or None
            0 is background.
        """
        from PIL import Image

        self._finished("00_tissue")
        path = self.folder / "00_tissue" / "instances" / f"{image_id}.png"
        if not path.exists():
            return None
        self._add_input("00_tissue/instances", path.parent)
        with Image.open(path) as picture:
            return np.asarray(picture).astype(np.int32)

    def earlier(self, name: str) -> Path | None:
        """Path of the artefact `name` of this chapter as it was last finished, if it is there."""
        path = self._final / name
        return path if path.exists() and not self._finished_now else None

    # writing

    def path(self, name: str) -> Path:
        """Where the artefact `name` of this chapter lies; its folder exists."""
        path = (self._final if self._finished_now else self._partial) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yield a temporary path that becomes the artefact `name` when the block succeeds."""
        with replacing(self.path(name)) as tmp:
            yield tmp

    def timing(self, name: str, seconds: float) -> None:
        """Record how long a part took; timings go to the manifest, never to the results."""
        self._timings[name] = float(seconds)

    def finish(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Write results and manifest, and put the chapter's folder in its place.

        Parameters
        ----------
        results : mapping
            Numbers, text, lists and dictionaries of them; numpy types are fine. NaN and infinity
            become null. No timings and no paths: the same seed gives the same bytes.

        Returns
        -------
        dict
            The results as written.
        """
        dump(self._partial / "results.json", results)
        written = (p for p in sorted(self._partial.iterdir()) if p.name != ".key")
        outputs = {path.name: _hashes.any(path) for path in written}
        record = self._manifest() | {"outputs": outputs}
        dump(self._partial / "manifest.json", record, exact=True)
        if self._final.exists():
            shutil.rmtree(self._old, ignore_errors=True)
            os.replace(self._final, self._old)
        os.replace(self._partial, self._final)
        (self._final / ".key").unlink(missing_ok=True)
        shutil.rmtree(self._old, ignore_errors=True)
        self._finished_now = True
        if held := _LOCKS.pop(self._lock_file, None):
            held.close()
        return load(self._final / "results.json")

    # random numbers

    def rng(self, *key: Any) -> np.random.Generator:
        """Random generator that depends on the seed, the chapter and `key` only."""
        return np.random.default_rng(self._seed(key))

    def generator(self, *key: Any) -> torch.Generator:
        """Torch generator (CPU) that depends on the seed, the chapter and `key` only."""
        import torch

        state = self._seed(key).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(state >> np.uint64(1)))

    # inside

    def _seed(self, key: tuple[Any, ...]) -> np.random.SeedSequence:
        words = [zlib.crc32(str(part).encode()) for part in (self.chapter, *key)]
        return np.random.SeedSequence([self.params.seed, *words])

    @property
    def _lock_file(self) -> Path:
        return self.folder / f".{self.chapter}.lock"

    @property
    def _partial(self) -> Path:
        return self.folder / f".{self.chapter}.partial"

    @property
    def _old(self) -> Path:
        return self.folder / f".{self.chapter}.old"

    @cached_property
    def _records(self) -> pd.DataFrame:
        table = read_table(self.input("00_tissue", "images.csv"))
        return table.set_index("image_id", drop=False).rename_axis(None)

    def _picture(self, folder: str, image_id: str) -> Path:
        self._finished("00_tissue")
        path = self.folder / "00_tissue" / folder / f"{image_id}.png"
        if not path.exists():
            raise KeyError(f"run {self.run!r} has no image {image_id!r} (see 00_tissue/images.csv)")
        self._add_input(f"00_tissue/{folder}", path.parent)
        return path

    def _add_input(self, name: str, path: Path) -> None:
        """Note the hash of an input when it is first read: it may be made anew meanwhile."""
        if name not in self._inputs:
            self._inputs[name] = _hashes.any(path)

    def _add_checkpoints(self, params: config.Common) -> None:
        """Count checkpoints given by path among the inputs, under their full path."""
        for path in map(Path, config.checkpoint_paths(params).values()):
            self._add_input(str(path.resolve()), path)

    def _finished(self, chapter: str) -> None:
        if chapter == self.chapter:
            return
        if not manifest(self.run, chapter).exists():
            raise FileNotFoundError(
                f"run {self.run!r} has no finished chapter {chapter}, which {self.chapter} builds "
                f"on. {self._how(chapter)}"
            )

    def _how(self, chapter: str) -> str:
        return f"Run it first: python -m helpers.execute --run {self.run} --only {chapter}"

    def _open(self) -> None:
        """Take up half-done work of the same parameters, predecessors and code, or start afresh."""
        _lock(
            self._lock_file,
            "another process, perhaps a notebook that is still open, is at work on chapter "
            f"{self.chapter} of this run. Wait for it, stop it",
        )
        if self._old.exists() and not self._final.exists():  # killed between two moves of finish
            os.replace(self._old, self._final)
        shutil.rmtree(self._old, ignore_errors=True)
        state = [self.params.model_dump_json(exclude=set(config.SIZES_OF_BATCHES))]
        state += [_gave(manifest(self.run, need)) for need in NEEDS[self.chapter]]
        state += [json.dumps(self._code, sort_keys=True), _source(self.chapter)]
        state += [str(_hashes.any(path)) for path in self._earlier_checkpoints()]
        key = hashlib.sha256("\n".join(state).encode()).hexdigest()
        mark = self._partial / ".key"
        if not (mark.exists() and mark.read_text() == key):
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
            mark.write_text(key)
        for path in unfinished(self._partial):
            path.unlink()
        dump(self._partial / "params.json", self.params.model_dump(mode="json"), exact=True)

    def _earlier_checkpoints(self) -> list[Path]:
        """Files of weights that the chapters before this one were given by path, as it may be."""
        found = []
        for path in (self.folder / need / "params.json" for need in NEEDS[self.chapter]):
            with contextlib.suppress(FileNotFoundError, ValueError):
                params = config.build(path.parent.name, load(path))
                found += map(Path, config.checkpoint_paths(params).values())
        return found

    def _manifest(self) -> dict[str, Any]:
        return {
            "chapter": self.chapter,
            "run": self.run,
            "params": self.params.model_dump(mode="json"),
            "inputs": self._inputs,
            "data": self._data,
            **self._code,
            "versions": _versions(),
            "seconds": round(time.perf_counter() - self._start, 3),
            "cpu_seconds": round(time.process_time() - self._cpu, 3),
            "timings": {name: round(seconds, 6) for name, seconds in self._timings.items()},
            "peak_memory_gb": round(peak_memory(), 3),
        }


def _gave(path: Path) -> str:
    """What a finished chapter was given and gave, but for sizes of batches, times and memory."""
    told = ("peak_memory_gb", "seconds", "cpu_seconds", "timings")
    record = {name: value for name, value in load(path).items() if name not in told}
    for name, left_out in (("params", config.SIZES_OF_BATCHES), ("outputs", ("params.json",))):
        record[name] = {k: v for k, v in record[name].items() if k not in left_out}
    return json.dumps(record, sort_keys=True)


@contextlib.contextmanager
def alone(run: str) -> Iterator[None]:
    """Keep other commands away from a run as long as this one is at work on it.

    Raises
    ------
    Failed
        If another is; it has changed nothing then.
    """
    path = root() / run / ".command.lock"
    _lock(path, "another command is at work on this run. Wait for it, or stop it")
    try:
        yield
    finally:
        _LOCKS.pop(path).close()


def _lock(path: Path, why: str) -> None:
    """Hold a run or a chapter of it, until it is given back or this process ends.

    Two processes at work on it would lose each other's files.
    """
    if path in _LOCKS:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = path.open("w")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise Failed(f"{path.parent.name}: {why}, or give another run.") from None
    _LOCKS[path] = stream


def up_to_date(run: str, chapter: str, params: config.Common) -> tuple[bool, str]:
    """Whether a chapter of a run would give again what it has given, and if not, why.

    Compares parameters, helper code, weights, every input that the chapter read, and what it
    wrote, by hash.

    Returns
    -------
    (bool, str)
        The verdict and its reason, in words fit for a log line.
    """
    folder = root() / run
    if not manifest(run, chapter).exists():
        return False, "not run yet"
    try:
        last = load(manifest(run, chapter))
        old = config.build(chapter, last["params"])
    except (ValueError, KeyError):
        return False, "recorded with other parameters"
    changed = [n for n in type(params).model_fields if getattr(params, n) != getattr(old, n)]
    if changed:
        return False, f"{', '.join(changed)} changed"
    if last.get("data") != _data(params):
        return False, "data folder changed"
    for kind, now in (("helpers", closure(chapter)), ("weights", weights(chapter))):
        before = last.get(kind, {})
        different = sorted(n for n in {*now, *before} if now.get(n) != before.get(n))
        if different:
            return False, f"{kind} changed: {', '.join(different)}"
    for name, digest in last["inputs"].items():
        if _hashes.any(folder / name) != digest:  # of a full path, folder / name is that path
            return False, f"input changed: {name}"
    for name, digest in last.get("outputs", {}).items():
        if _hashes.any(folder / chapter / name) != digest:
            return False, f"damaged or missing: {name}"
    return True, "up to date"


def _code(chapter: str) -> dict[str, dict[str, str]]:
    """Hashes of what a chapter is about to run with; empty for one without a notebook."""
    if not notebook(chapter).exists():
        return {"helpers": {}, "weights": {}}
    return {"helpers": closure(chapter), "weights": weights(chapter)}


def _source(chapter: str) -> str:
    """Code of a chapter; empty for one without a notebook."""
    return code(chapter) if notebook(chapter).exists() else ""


def peak_memory() -> float:
    """Largest memory this process has held so far, in GB (10**9 bytes)."""
    if (peak := status_of_process("VmHWM")) is not None:
        return peak  # Linux starts ru_maxrss at what the process that started this one had
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def status_of_process(field: str) -> float | None:
    """A field of what Linux says of the memory of this process, GB (10**9 bytes); None elsewhere.

    ``VmHWM`` is the largest memory so far, ``VmRSS`` that in use now.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024 / 1e9
    return None


def _data(params: config.Common) -> str | None:
    """Hash of the folders of images; tables of images count, and all files that they name."""
    found = []
    for name in ("data_root", "latent_images"):
        if not (given := getattr(params, name, None)) or not Path(given).exists():
            continue
        folder, tables = Path(given).parent, [Path(given)]
        if Path(given).is_dir():
            folder = Path(given)
            tables = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".csv")
            found.append(_listing(folder))
        else:  # a table, beside which anything may lie
            found.append(_stats([folder / "classes.txt"], folder))
        for table in tables:
            found += [_hashes.file(table), _stats(set(_named_files(table)), folder)]
    return hashlib.sha256("\n".join(found).encode()).hexdigest() if found else None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
