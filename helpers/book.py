"""Build the HTML book from a finished run.

::

    python -m helpers.book --run tutorial-phantom
    python -m helpers.book --run tutorial-phantom --picture fig-synthesis-compare

Executed chapters are put under ``book/chapters/``: prose, captions and code come from the sources
in ``notebooks/``, outputs from the run, so that editing prose needs no new run.
The build stops at any warning; it is skipped when nothing has changed since the last good one.
The second command takes one figure out of the run into ``book/images/``, for the README.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat

from helpers import config, runs
from helpers.files import sha256

BOOK = runs.REPOSITORY / "book"
INDEX = BOOK / "_build" / "html" / "index.html"

_PROGRESS_BAR = re.compile(r"(\d+%\|)|(\bit/s\b)|(\bs/it\b)")


def chapter_page(run: str, chapter: str) -> nbformat.NotebookNode:
    """Notebook of a chapter with the outputs that it had in a run.

    Raises
    ------
    FileNotFoundError
        If the chapter has not been executed in this run.
    ValueError
        If its code has changed since, or it ended in an error.
    """
    path = runs.executed(run, chapter)
    if not path.exists():
        raise FileNotFoundError(
            f"run {run!r} has no executed chapter {chapter}: "
            f"python -m helpers.execute --run {run} --only {chapter}"
        )
    done = nbformat.read(path, as_version=4)
    page = nbformat.read(runs.notebook(chapter), as_version=4)
    outputs = [cell for cell in done.cells if cell.cell_type == "code"]
    cells = []
    for cell in page.cells:
        cells.append(cell)
        if cell.cell_type != "code":
            continue
        _take(cell, outputs.pop(0) if outputs else None, chapter)
        if outputs and "injected-parameters" in outputs[0].metadata.get("tags", []):
            cells.append(_injected(outputs.pop(0)))
    page.cells = cells
    page.metadata.pop("papermill", None)
    return page


def _take(cell: nbformat.NotebookNode, done: nbformat.NotebookNode | None, chapter: str) -> None:
    if done is None or done.source != cell.source:
        raise ValueError(
            f"code of chapter {chapter} has changed since it was executed: run it again "
            "(python -m helpers.execute)"
        )
    cell.execution_count = done.execution_count
    cell.outputs = [output for output in done.outputs if not _is_progress(output)]
    if any(output.output_type == "error" for output in cell.outputs):
        raise ValueError(f"chapter {chapter} holds a cell that ended in an error")


def _is_progress(output: nbformat.NotebookNode) -> bool:
    if output.output_type != "stream" or output.name != "stderr":
        return False
    return all(_PROGRESS_BAR.search(line) for line in output.text.split("\n") if line.strip())


def _injected(cell: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The cell that papermill put in, without what changes from run to run."""
    new = nbformat.v4.new_code_cell(cell.source, metadata={"tags": ["injected-parameters"]})
    new.id, new.execution_count = "injected-parameters", cell.execution_count
    return new


def run_page(run: str) -> str:
    """Markdown page about the run behind the book: settings, times, memory, versions."""
    record = runs.load(runs.root() / run / "run.json")
    times, versions, rows, total = runs.timings(run), {}, [], 0.0
    for chapter in config.CHAPTERS:
        manifest = runs.load(runs.manifest(run, chapter))
        versions = manifest["versions"]
        time_ = times.get(chapter, manifest)
        seconds, memory = time_["seconds"], manifest["peak_memory_gb"]
        total += seconds
        rows.append(f"| {{doc}}`{chapter}` | {seconds:.1f} | {memory:.2f} |")
    options = {k: v for k, v in record["options"].items() if k != "data_root"}
    extra = ", ".join(f"`{name} = {value!r}`" for name, value in options.items()) or "none"
    libraries = "\n".join(f"| {name} | {version} |" for name, version in sorted(versions.items()))
    body = "\n".join(rows)
    return f"""# The run behind this book

Numbers and pictures in the chapters come from one run, `{run}`, unless another source is named.
It was made with the preset
`{Path(record["preset"]).stem}`; further options: {extra}.
The chapters took {total / 60:.1f} minutes together.
Each one ran in a process of its own; memory is the largest amount that process ever held.

| chapter | seconds | peak memory, GB |
|---|---:|---:|
{body}

| software | version |
|---|---|
{libraries}
"""


def build(run: str, *, force: bool = False) -> bool:
    """Write the executed chapters of `run` into the book and build it.

    Parameters
    ----------
    run : str
        Name of a finished run.
    force : bool
        Build even if nothing has changed.

    Returns
    -------
    bool
        Whether it was built; False when it was up to date.

    Raises
    ------
    runs.Failed
        If the build has a warning or an error; its log is printed.
    """
    folder = BOOK / "chapters"
    pages = {f"{c}.ipynb": nbformat.writes(chapter_page(run, c)) for c in config.CHAPTERS}
    pages["run.md"] = run_page(run)
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.name not in pages:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    mark, digest = BOOK / "_build" / ".digest", _digest()
    if not force and INDEX.exists() and mark.exists() and mark.read_text() == digest:
        print(f"book: up to date, {_relative(INDEX)}")
        return False
    shutil.rmtree(BOOK / "_build", ignore_errors=True)
    start = time.perf_counter()
    print("book: building ...", flush=True)
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    command += ["build", str(BOOK), "-n", "-W", "--keep-going"]
    done = subprocess.run(command, cwd=runs.REPOSITORY, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    if done.returncode != 0:
        raise runs.Failed(f"the book was not built:\n{_notable(text)}")
    mark.write_text(_digest())
    print(f"book: built in {time.perf_counter() - start:.0f} s, {_relative(INDEX)}")
    return True


def picture(run: str, figure: str) -> Path:
    """Copy one figure of a run to ``book/images/<figure>.png``.

    Parameters
    ----------
    run : str
        Name of a finished run.
    figure : str
        Name of the figure, e.g. ``fig-synthesis-compare``.

    Returns
    -------
    Path

    Raises
    ------
    FileNotFoundError
        If a chapter has not been executed in this run.
    ValueError
        If no chapter has drawn such a figure.
    """
    for chapter in config.CHAPTERS:
        for cell in chapter_page(run, chapter).cells:
            if cell.metadata.get("mystnb", {}).get("figure", {}).get("name") != figure:
                continue
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    path = BOOK / "images" / f"{figure}.png"
                    path.write_bytes(base64.b64decode(output.data["image/png"]))
                    return path
    raise ValueError(f"no chapter of run {run!r} has drawn a figure called {figure!r}")


def _digest() -> str:
    """Digest of everything that the build reads: pages, pictures, configuration, tools."""
    digest = hashlib.sha256()
    for path in sorted(p for p in BOOK.rglob("*") if p.is_file()):
        name = path.relative_to(BOOK).as_posix()
        if not name.startswith("_build/"):
            digest.update(f"{name} {sha256(path)}\n".encode())
    for tool in ("jupyter-book", "sphinx", "myst-nb", "sphinx-exercise"):
        digest.update(f"{tool} {importlib.metadata.version(tool)}\n".encode())
    return digest.hexdigest()


def _notable(text: str) -> str:
    """Warnings and errors of a build log, or its end."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    found = [line for line in plain if re.search(r"WARNING|ERROR|CRITICAL|Error", line)]
    return "\n".join(found or plain[-30:])


def _relative(path: Path) -> str:
    return path.relative_to(runs.REPOSITORY).as_posix()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: see the module's description. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.book", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("--run", default="tutorial-phantom", help="run whose chapters are shown")
    parser.add_argument("--force", action="store_true", help="build even if nothing has changed")
    parser.add_argument("--picture", metavar="FIGURE", help="only copy this figure of the run")
    parsed: Any = parser.parse_args(arguments)
    try:
        if parsed.picture:
            print(_relative(picture(parsed.run, parsed.picture)))
        else:
            build(parsed.run, force=parsed.force)
    except (FileNotFoundError, ValueError, runs.Failed) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
