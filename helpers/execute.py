"""Run the chapters of a run in order, each in a process of its own.

::

    python -m helpers.execute --preset tutorial
    python -m helpers.execute --preset tutorial --dataset glas --data-root PATH
    python -m helpers.execute --run tutorial-phantom --only 05 -p steps 100

Parameters come from the notebook's parameters cell, then the preset, then ``--dataset`` and
``--data-root``, then ``-p``; all of them are checked for all chapters to run before any does.
A chapter whose code, parameters, helpers, weights and inputs are those of its last run is left
alone.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from helpers import config, runs
from helpers.files import sha256
from helpers.runs import executed, timings

PRESETS = runs.REPOSITORY / "notebooks" / "presets"


def preset(name: str) -> dict[str, Any]:
    """Read a preset.

    Parameters
    ----------
    name : str
        ``smoke``, ``tutorial``, ``paper``, or a path to a YAML file.

    Returns
    -------
    dict
        Parameter names to values.

    Raises
    ------
    FileNotFoundError
        If there is no such preset.
    ValueError
        If the file is no flat mapping.
    """
    path = Path(name) if name.endswith((".yml", ".yaml")) else PRESETS / f"{name}.yml"
    if not path.exists():
        there = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yml")))
        raise FileNotFoundError(f"no preset {name!r}: there are {there}, or give a .yml file")
    values = _yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a preset is a flat mapping 'name: value', one a line")
    return values


def _yaml(text: str, where: str) -> Any:
    """Value of a YAML text; an error that says where it came from."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{where}: this is no YAML value ({reason}); quote or correct it"
        ) from None


def parameters_cell(chapter: str) -> dict[str, Any]:
    """Values in the parameters cell of a chapter's notebook.

    Raises
    ------
    FileNotFoundError
        If the chapter has no notebook.
    ValueError
        If there is not exactly one such cell, or it holds more than literals.
    """
    path = runs.notebook(chapter)
    if not path.exists():
        raise FileNotFoundError(f"chapter {chapter} has no notebook {path.name} in notebooks/")
    cells = [
        cell
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if "parameters" in cell.get("metadata", {}).get("tags", [])
    ]
    if len(cells) != 1:
        raise ValueError(f"{path.name}: {len(cells)} cells are tagged 'parameters', should be one")
    values = {}
    for node in ast.parse("".join(cells[0]["source"])).body:
        simple = isinstance(node, ast.Assign) and len(node.targets) == 1
        if not simple or not isinstance(node.targets[0], ast.Name):
            raise ValueError(f"{path.name}: the parameters cell holds more than 'name = literal'")
        values[node.targets[0].id] = ast.literal_eval(node.value)
    return values


def settings(
    chapters: Sequence[str], given: Mapping[str, Any]
) -> tuple[dict[str, config.Common], dict[str, dict[str, Any]]]:
    """Check the parameters of all chapters and say what each has to be told.

    Returns
    -------
    (dict, dict)
        Chapter to its frozen parameters; chapter to the values that differ from its notebook.

    Raises
    ------
    ValueError
        Names every wrong parameter and every missing checkpoint of every chapter; of what the
        chapters share, such as the seed or a device, only the first.
    """
    if wrong := config.unknown(given):
        raise ValueError("unknown parameters, nothing has been run:\n  - " + "\n  - ".join(wrong))
    _check_common(chapters, given)
    checked, told, problems = {}, {}, []
    for chapter in chapters:
        cell = parameters_cell(chapter)
        own = {name: given[name] for name in config.names(chapter) if name in given}
        try:
            checked[chapter] = config.build(chapter, {**cell, **own})
            for line in config.missing_files(checked[chapter]):
                if not any(problem.endswith(f": {line}") for problem in problems):
                    problems.append(f"chapter {chapter}: {line}")
        except ValueError as error:
            problems.append(str(error))
        told[chapter] = {name: value for name, value in own.items() if cell.get(name) != value}
    if (synthesis := checked.get("06_synthesis")) is not None:
        others = map(checked.get, ("04_probabilistic_replacement", "05_sde_mcg_inpainting"))
        try:
            config.check_healing(synthesis, *others)
        except ValueError as error:
            problems.append(f"chapter 06_synthesis: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    return checked, told


def _check_common(chapters: Sequence[str], given: Mapping[str, Any]) -> None:
    """Check what chapters share in the first that has it: each of them would repeat the error."""
    for name in config.COMMON:
        chapter = next((c for c in chapters if name in config.names(c)), None)
        if chapter and name in given:
            config.build(chapter, {**parameters_cell(chapter), name: given[name]})


def execute(
    run: str,
    given: Mapping[str, Any],
    *,
    only: Sequence[str] | None = None,
    force: bool = False,
) -> list[str]:
    """Run the chapters that are not up to date.

    Parameters
    ----------
    run : str
        Name of the run folder.
    given : mapping of str to object
        Parameters that replace those of the notebooks.
    only : sequence of str, optional
        Chapters to consider; all by default.
    force : bool
        Run them even if they are up to date.

    Returns
    -------
    list of str
        Chapters that were run.

    Raises
    ------
    ValueError
        For wrong parameters, before anything runs.
    runs.Failed
        When a chapter that they build on is missing, before anything runs, or when one stops
        with an error; what was there before it is kept.
    """
    chapters = list(only) if only else list(config.CHAPTERS)
    checked, told = settings(chapters, {**given, "run": run})
    _check_needs(run, chapters)
    start, done = time.perf_counter(), []
    print(f"run {run}: {len(chapters)} chapters")
    for chapter in chapters:
        good, why = _up_to_date(run, chapter, checked[chapter])
        if good and not force:
            print(f"  {chapter:<30} up to date", flush=True)
        else:
            why = "forced" if good else why
            with _status(chapter, why) as status:
                status.memory = _papermill(run, chapter, told[chapter])
            _note(run, chapter, status.seconds, status.memory)
            for line in _notes(executed(run, chapter)):
                print(f"    {line}", flush=True)
            done.append(chapter)
        if chapter == "00_tissue":
            _check_images(run, chapters)
    minutes = (time.perf_counter() - start) / 60
    peak = max((t["peak_memory_gb"] for t in timings(run).values()), default=0.0)
    rest = f", {minutes:.1f} min, peak memory {peak:.1f} GB" if done else ""
    print(f"run {run}: {len(done)} chapters run, {len(chapters) - len(done)} up to date{rest}")
    return done


def _check_needs(run: str, chapters: Sequence[str]) -> None:
    """Name all chapters at once that are neither to be run nor finished, and that others need."""
    wanted = set(chapters)
    for chapter in reversed(runs.NEEDS):
        if chapter in wanted:
            wanted |= {need for need in runs.NEEDS[chapter] if not _finished(run, need)}
    if missing := [c for c in runs.NEEDS if c in wanted.difference(chapters)]:
        every = " ".join(c for c in runs.NEEDS if c in wanted)
        raise runs.Failed(
            f"run {run!r} has not finished {', '.join(missing)}, which the others build on. Run "
            f"them as well: python -m helpers.execute --run {run} --only {every}"
        )


def _finished(run: str, chapter: str) -> bool:
    return runs.manifest(run, chapter).exists()


def _check_images(run: str, chapters: Sequence[str]) -> None:
    """Stop before the long chapters if later ones cannot work with the images of the run."""
    replacing, last = "04_probabilistic_replacement", "07_classifier_evaluation"
    if not {replacing, last} & set(chapters):
        return
    tissue = runs.load(runs.root() / run / "00_tissue" / "results.json")
    counts, chapter = tissue["counts"], last
    if replacing in chapters and max(counts["train"].values()) < 2:
        chapter = replacing
        problem = (
            "replaces segments by those of other images of their class, but no class has two "
            "training images (see train_per_class)"
        )
    elif last not in chapters:
        return
    elif len(tissue["classes"]) < 2:
        problem = f"tells classes apart, but all images are of one, {tissue['classes'][0]!r}"
    elif not any(sum(counts[split].values()) for split in ("test", "test2")):
        problem = "needs test images, and there are none (see test_per_class and test2_per_class)"
    else:
        return
    blocked = _built_on(chapter)
    others = " ".join(c.split("_")[0] for c in chapters if c not in blocked)
    raise runs.Failed(
        f"chapter {chapter} {problem}. Add images, or run the others alone: "
        f"python -m helpers.execute --run {run} --only {others}"
    )


def _built_on(chapter: str) -> set[str]:
    """A chapter and all that need it, directly or not."""
    found = {chapter}
    for other, needs in runs.NEEDS.items():  # in order: what is needed comes first
        if found & set(needs):
            found.add(other)
    return found


# --- one chapter ---------------------------------------------------------------------------------


def _up_to_date(run: str, chapter: str, params: config.Common) -> tuple[bool, str]:
    good, why = runs.up_to_date(run, chapter, params)
    if not good:
        return good, why
    target = executed(run, chapter)
    record = target.with_suffix(".json")
    if not (record.exists() and target.exists()):
        return False, "no executed notebook"
    if _code(target) != _code(runs.notebook(chapter)):
        return False, "notebook code changed"
    before = runs.load(record)
    if before["manifest"] != _record(run, chapter)["manifest"]:
        return False, "was run by hand since"
    return True, why


def _code(path: Path) -> list[str]:
    """Code cells of a notebook, without the one that papermill puts in."""
    return [
        "".join(cell["source"])
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
        and "injected-parameters" not in cell["metadata"].get("tags", [])
    ]


def _record(run: str, chapter: str) -> dict[str, str]:
    return {"manifest": sha256(runs.manifest(run, chapter))}


def _made(run: str, chapter: str) -> int | None:
    """When a chapter was last finished, in nanoseconds; None if it never was."""
    manifest = runs.manifest(run, chapter)
    return manifest.stat().st_mtime_ns if manifest.exists() else None


def _papermill(run: str, chapter: str, values: Mapping[str, Any]) -> float:
    """Execute one notebook in a process of its own; return its peak memory in GB."""
    target = executed(run, chapter)
    target.parent.mkdir(parents=True, exist_ok=True)
    failed = target.with_suffix(".failed.ipynb")
    working = target.with_name(f".{chapter}.running.ipynb")
    log = target.with_suffix(".log")
    for path in (working, failed):  # of an earlier try
        path.unlink(missing_ok=True)
    before = _made(run, chapter)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "parameters.yml"
        file.write_text(yaml.safe_dump(dict(values)), encoding="utf-8")
        command = [sys.executable, "-m", "papermill", str(runs.notebook(chapter)), str(working)]
        command += ["-f", str(file), "-k", "python3", "--no-progress-bar"]
        command += ["--cwd", str(runs.REPOSITORY)]
        with log.open("w", encoding="utf-8") as stream:
            code = subprocess.run(
                command, stdout=stream, stderr=stream, env=_environment(), check=False
            ).returncode
    if code != 0:
        if working.exists():
            os.replace(working, failed)
        raise runs.Failed(_failure(chapter, failed, log))
    if _made(run, chapter) == before:
        os.replace(working, failed)
        raise runs.Failed(f"{chapter} ended without stage.finish(results), so it left no results")
    os.replace(working, target)
    for path in (failed, log):
        path.unlink(missing_ok=True)
    runs.dump(target.with_suffix(".json"), _record(run, chapter))
    return float(runs.load(runs.manifest(run, chapter))["peak_memory_gb"])


def _environment() -> dict[str, str]:
    """Environment of a chapter: the kernel of this very Python, quiet logs."""
    kernels = str(Path(sys.prefix) / "share" / "jupyter")
    path = os.pathsep.join(filter(None, [kernels, os.environ.get("JUPYTER_PATH")]))
    backend = "module://matplotlib_inline.backend_inline"
    # Threads that wait spin for some microseconds, then sleep: see the Makefile.
    default = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "5000"}
    fixed = {"JUPYTER_PATH": path, "MPLBACKEND": backend, "PYTHONHASHSEED": "0"}
    fixed["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    fixed["USEGMIX_RUNS"] = str(runs.root().resolve())  # chapters run in the repository
    return {**default, **os.environ, **fixed}


#: What sets how much a chapter has in memory at once.
_LOWER = {
    "01_superpixel_prompting": "points_per_batch",
    "02_anchor_clustering": "points_per_batch (of chapter 01)",
    "05_sde_mcg_inpainting": "inpaint_batch",
    "06_synthesis": "synthesis_batch",
    "07_classifier_evaluation": "batch_size, with which it begins again",
}


def _failure(chapter: str, failed: Path, log: Path) -> str:
    """Message of a failed chapter: its own error, or the last lines of the log."""
    if failed.exists():
        for cell in json.loads(failed.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", ()):
                if output["output_type"] == "error":
                    said = f"{output['ename']}: {output['evalue']}"
                    return f"{chapter} failed: {said}\n(notebook with the traceback: {failed})"
    said = log.read_text(encoding="utf-8").strip()
    if "DeadKernelError" in said:
        lower = f"{_LOWER[chapter]}, or " if chapter in _LOWER else ""
        return (
            f"{chapter}: its process was killed, by hand or by the system for want of memory. What "
            f"was done is kept; the same command goes on. With little memory lower {lower}"
            "image_size, with which all chapters begin again"
        )
    tail = "\n".join(said.splitlines()[-15:])
    return f"{chapter} could not be executed:\n{tail}"


def _notes(path: Path) -> list[str]:
    """Lines that an executed notebook prints and that begin with ``note:``."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    text = "".join("".join(output["text"]) for output in outputs if "text" in output)
    return [line for line in text.splitlines() if line.startswith("note:")]


def _note(run: str, chapter: str, seconds: float, memory: float) -> None:
    table = timings(run)
    table[chapter] = {"seconds": round(seconds, 1), "peak_memory_gb": round(memory, 2)}
    runs.dump(runs.root() / run / "timings.json", table)


class _Status:
    seconds = 0.0
    memory = 0.0


@contextlib.contextmanager
def _status(chapter: str, why: str) -> Iterator[_Status]:
    """One line a chapter: its name while it runs, then seconds and memory on the same line."""
    status, start = _Status(), time.perf_counter()
    print(f"  {chapter:<30} ", end="", flush=True)
    try:
        yield status
    except BaseException:
        print(f"FAILED after {time.perf_counter() - start:.0f} s", flush=True)
        raise
    status.seconds = time.perf_counter() - start
    print(f"{status.seconds:6.1f} s {status.memory:6.2f} GB   ({why})", flush=True)


# --- command line --------------------------------------------------------------------------------


#: Options that say which data a run is made from.
_DATA = ("dataset", "data_root")


def chapter_named(text: str) -> str:
    """Full name of a chapter from its name or its number, e.g. ``05``, ``5`` or ``A1``.

    Raises
    ------
    ValueError
        If no chapter starts like that.
    """
    name = Path(text).stem
    number = name.upper().zfill(2)
    found = [c for c in config.CHAPTERS if c == name or c.split("_")[0] == number]
    if not found:
        near = difflib.get_close_matches(name, config.CHAPTERS, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(config.CHAPTERS)}"
        raise ValueError(f"no chapter {text!r}: {hint}")
    return found[0]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m helpers.execute", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("--preset", help="smoke, tutorial (default), paper, or a .yml file")
    parser.add_argument("--dataset", help="data set, in place of the preset's")
    parser.add_argument("--data-root", help="folder of the data set")
    parser.add_argument("--run", help="run folder; default <preset>-<dataset>")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--only", nargs="+", metavar="CHAPTER", help="these chapters, e.g. 05 A1")
    part.add_argument("--from", dest="start", metavar="CHAPTER", help="this chapter and later")
    parser.add_argument("--force", action="store_true", help="run them even if up to date")
    parser.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="one parameter"
    )
    parser.add_argument("--book", action="store_true", help="build the book afterwards")
    parser.add_argument("--parameters", action="store_true", help="list all parameters and stop")
    return parser.parse_args(arguments)


def resolve(
    arguments: argparse.Namespace,
) -> tuple[str, dict[str, Any], list[str], dict[str, Any]]:
    """Run name, parameters, chapters and what to remember of a command line.

    With ``--run`` of an existing run and no ``--preset``, the run's own preset and options are
    taken up again; with a preset, its data set is.

    Raises
    ------
    ValueError
        If a parameter is wrong, or the run was made from other data and ``--force`` is not given.
    """
    options = {name: _yaml(value, f"-p {name} {value}") for name, value in arguments.p}
    for name, value in arguments.p:
        if name in ("run", "data_root") and options[name] is not None:
            options[name] = value  # 7 is a name as well
    if arguments.dataset:
        options["dataset"] = arguments.dataset
    if arguments.data_root:
        options["data_root"] = arguments.data_root
    name, run = arguments.preset, arguments.run or options.pop("run", None)
    record = runs.root() / run / "run.json" if run else None
    old = runs.load(record) if record and record.exists() else None
    if old and name is None:
        name, options = old["preset"], {**old["options"], **options}
    elif old:
        kept = {key: old["options"][key] for key in _DATA if key in old["options"]}
        options = {**kept, **options}
    name = name or "tutorial"
    if name.endswith((".yml", ".yaml")):
        name = str(Path(name).resolve())
    given = {**preset(name), **options}
    chapters = [chapter_named(text) for text in arguments.only or ()]
    if arguments.start:
        every = list(config.CHAPTERS)
        chapters = every[every.index(chapter_named(arguments.start)) :]
    ordered = [c for c in config.CHAPTERS if not chapters or c in chapters]
    if given.get("data_root"):
        folder = Path(given["data_root"]).expanduser().resolve()
        if "00_tissue" in ordered or not old:  # the others read what it has filed
            folder = _existing(given["data_root"])
        options["data_root"] = given["data_root"] = str(folder)
    for key, path in config.absolute(given).items():
        options[key] = given[key] = path
    if old and _finished(run, "00_tissue") and not arguments.force:
        _same_data(run, old, given)
    run = run or f"{Path(name).stem}-{given.get('dataset') or 'phantom'}"
    _check_owners([name for name, _ in arguments.p], ordered)
    given["run"] = run
    settings(sorted({"00_tissue", *ordered}), given)  # any command may name the data
    return run, given, ordered, {"preset": name, "options": options}


def _check_owners(names: Sequence[str], chapters: Sequence[str]) -> None:
    """Refuse options of chapters that are not to run: they would neither be checked nor used."""
    for name in names:
        owners = [c for c in config.CHAPTERS if name in config.names(c)]
        if owners and not set(owners) & set(chapters):
            raise ValueError(
                f"-p {name} belongs to chapter {owners[0]}, which --only or --from leaves out: "
                "leave the option out, or take the chapter in"
            )


def _same_data(run: str, old: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    before = {**preset(old["preset"]), **old["options"]}
    was, now = (f"{v.get('dataset') or 'phantom'}, {v.get('data_root')}" for v in (before, given))
    if was != now:
        raise ValueError(
            f"run {run!r} was made from other data ({was}) than are given now ({now}): give "
            "another --run, or --force to replace what it holds. If these are the same images in "
            "another place, --force --only 00 files them again, and the other chapters stay as "
            "they are"
        )


def _existing(folder: str) -> Path:
    path = Path(folder).expanduser().resolve()
    if not (path.is_dir() or (path.suffix.lower() == ".csv" and path.is_file())):
        raise FileNotFoundError(
            f"data_root={folder!r} is no folder, nor a table of images ending in .csv (looked at "
            f"{path}): correct the path, or see data/README.md for where to download the data set"
        )
    return path


@contextlib.contextmanager
def _remembered(run: str, record: Mapping[str, Any]) -> Iterator[None]:
    """Keep what a run is made with in its ``run.json``, from the start, also if it is stopped.

    If nothing was made by then, it is again what made the chapters that are there.
    """
    note = runs.root() / run / "run.json"
    old = runs.load(note) if note.exists() and _finished(run, "00_tissue") else record
    before = _work(run)
    runs.dump(note, record, exact=True)
    try:
        yield
    except BaseException:
        if _work(run) <= before:
            runs.dump(note, old, exact=True)
        raise


def _work(run: str) -> set[tuple[str, int]]:
    """Chapters of a run that are finished, and files of half-done ones, with their times."""
    folder = runs.root() / run
    found = {folder / chapter / "manifest.json" for chapter in config.CHAPTERS}
    found |= {
        path for path in folder.glob(".*.partial/**/*") if path.name not in (".key", "params.json")
    }
    return {(str(path), path.stat().st_mtime_ns) for path in found if path.is_file()}


def _list_parameters() -> None:
    for chapter, model in config.CHAPTERS.items():
        print(chapter)
        for name, field in model.model_fields.items():
            print(f"  {name:<24} {field.description}")


def _said(error: Exception) -> str:
    """Message of an error; one of the system also says where runs are written."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    return (
        f"{error}: runs are kept in {runs.root()}, which has to be a folder that you may write to, "
        "with space left; USEGMIX_RUNS names another"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: see the module's description. Returns the exit status."""
    parsed = _parse(arguments)
    if parsed.parameters:
        _list_parameters()
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stopped like by Ctrl-C
    try:
        run, given, chapters, record = resolve(parsed)
        with runs.alone(run), _remembered(run, record):
            execute(run, given, only=chapters, force=parsed.force)
        if parsed.book:
            from helpers import book

            book.build(run)
    except (ValueError, OSError, runs.Failed) as error:
        print(f"\n{_said(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; what was done is kept, the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
