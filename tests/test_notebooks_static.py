"""What can be said of the notebooks without running them."""

import ast
import itertools
import json
import re
from pathlib import Path

import pytest
import yaml

from helpers import config, execute, runs

NOTEBOOKS = sorted((runs.REPOSITORY / "notebooks").glob("*.ipynb"))
BOOK = runs.REPOSITORY / "book"

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind=None):
    """Cells of a notebook, source joined."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for cell in found:
        cell["source"] = "".join(cell["source"])
    return [cell for cell in found if kind in (None, cell["cell_type"])]


def prose(path):
    """Markdown of a notebook, without code blocks."""
    text = "\n\n".join(cell["source"] for cell in cells(path, "markdown"))
    return re.sub(r"^(`{3,}|~{3,})(?!\{).*?^\1", "", text, flags=re.M | re.S)


def figure_functions():
    """Functions of ``helpers.figures`` that return a figure."""
    tree = ast.parse((runs.REPOSITORY / "helpers" / "figures.py").read_text(encoding="utf-8"))
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and isinstance(node.returns, ast.Name)
        and node.returns.id == "Figure"
    }


def draws_figure(source):
    """Whether a code cell draws a figure of ``helpers.figures``."""
    lines = "\n".join("" if line.startswith(("%", "!")) else line for line in source.split("\n"))
    for node in ast.walk(ast.parse(lines)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id == "figures":
                if node.func.attr in figure_functions():
                    return True
    return False


def test_every_chapter_has_its_notebook_and_every_notebook_is_a_chapter():
    assert {path.stem for path in NOTEBOOKS} == set(config.CHAPTERS)


def test_the_table_of_contents_names_every_chapter_in_order_and_every_page_exists():
    toc = yaml.safe_load((BOOK / "_toc.yml").read_text(encoding="utf-8"))
    files = [toc["root"]] + [c["file"] for part in toc["parts"] for c in part["chapters"]]
    listed = [name.removeprefix("chapters/") for name in files if name.startswith("chapters/")]
    assert [name for name in listed if name != "run"] == list(config.CHAPTERS)
    pages = [name for name in files if not name.startswith("chapters/")]
    assert all((BOOK / f"{name}.md").exists() for name in pages)
    written = {path.stem for path in BOOK.glob("*.md")}
    assert written == set(pages), "pages that the table of contents leaves out"


@each_notebook
def test_outputs_are_stripped(path):
    for cell in cells(path, "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None, cell["source"][:60]


@each_notebook
def test_the_kernel_is_named_and_cell_ids_are_unique(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    kernel = notebook["metadata"]["kernelspec"]
    assert (kernel["name"], kernel.get("language")) == ("python3", "python")
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)


@each_notebook
def test_one_parameters_cell_of_literals_with_the_names_of_the_model(path):
    values = execute.parameters_cell(path.stem)
    assert list(values) == list(config.names(path.stem)), "same names, same order as helpers.config"
    config.build(path.stem, values)
    assert values["run"] == "tutorial-phantom" and values["seed"] == 0


@each_notebook
def test_parameters_are_checked_before_anything_else_runs(path):
    code = [cell["source"] for cell in cells(path, "code")]
    tags = [cell["metadata"].get("tags", []) for cell in cells(path, "code")]
    at = next(i for i, tag in enumerate(tags) if "parameters" in tag)
    assert all(
        isinstance(node, ast.Import | ast.ImportFrom | ast.Expr)
        for source in code[:at]
        for node in ast.parse(source).body
    ), "only imports come before the parameters"
    assert f'config.read("{path.stem}", globals())' in code[at + 1]
    assert f'runs.begin("{path.stem}", params)' in code[at + 1]
    assert any("stage.finish(" in source for source in code)


@each_notebook
def test_only_public_names_of_helpers_are_used_and_no_plotting(path):
    for cell in cells(path, "code"):
        source = "\n".join(
            "" if line.startswith(("%", "!")) else line for line in cell["source"].split("\n")
        )
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or ""] + [a.name for a in node.names]
                assert not any(name.startswith("matplotlib") for name in names), "use figures"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                private = node.attr.startswith("_") and not node.attr.startswith("__")
                assert not (private and node.value.id in _HELPERS), ast.unparse(node)


_HELPERS = {path.stem for path in (runs.REPOSITORY / "helpers").glob("*.py")}


@each_notebook
def test_headings_are_in_order(path):
    levels = [len(mark) for mark in re.findall(r"^(#{1,6}) ", prose(path), flags=re.M)]
    assert levels and levels[0] == 1 and levels.count(1) == 1, "one title, first"
    for before, after in itertools.pairwise(levels):
        assert after <= before + 1, f"level {after} after level {before}"


@each_notebook
def test_the_first_cell_has_title_and_table(path):
    first = cells(path)[0]
    assert first["cell_type"] == "markdown"
    assert re.match(r"# \S", first["source"])
    assert "|---" in first["source"].replace(" ", ""), "an at-a-glance table"


@each_notebook
def test_every_chapter_has_the_same_parts_and_its_exercises_have_solutions(path):
    parts = ["Objectives", "Prerequisites", "Where this fails", "Results",
             "Deviations from the paper", "Exercises", "Takeaways", "Artefacts"]  # fmt: skip
    headings = re.findall(r"^## (.*)$", prose(path), flags=re.M)
    assert [heading for heading in headings if heading in parts] == parts
    text = "\n\n".join(cell["source"] for cell in cells(path, "markdown"))
    exercises = re.findall(r"^`{3,}\{exercise\}.*\n:label: (\S+)", text, flags=re.M)
    solutions = re.findall(r"^`{3,}\{solution\} (\S+)", text, flags=re.M)
    assert exercises == solutions and len(exercises) >= 2


@each_notebook
def test_every_figure_has_caption_name_and_alt_text(path):
    names = []
    for cell in cells(path, "code"):
        if not draws_figure(cell["source"]):
            continue
        meta = cell["metadata"].get("mystnb", {})
        where = cell["source"][:80]
        assert meta.get("figure", {}).get("caption", "").strip(), f"no caption: {where}"
        assert meta.get("figure", {}).get("name", "").startswith("fig-"), f"no name: {where}"
        assert len(meta.get("image", {}).get("alt", "")) >= 20, f"no alt text: {where}"
        names.append(meta["figure"]["name"])
    assert names, "a chapter without figures"
    assert len(set(names)) == len(names)


def test_labels_are_unique_in_the_book():
    labels = []
    for path in NOTEBOOKS:
        labels += re.findall(r"^\$\$ \((eq-[^)]+)\)", prose(path), flags=re.M)
        labels += re.findall(r"^\(([a-z][\w-]+)\)=", prose(path), flags=re.M)
        for cell in cells(path, "code"):
            name = cell["metadata"].get("mystnb", {}).get("figure", {}).get("name")
            labels += [name] if name else []
    assert len(set(labels)) == len(labels), sorted({x for x in labels if labels.count(x) > 1})


def test_citations_are_in_the_bibliography():
    keys = set(re.findall(r"^@\w+\{([^,]+),", (BOOK / "references.bib").read_text(), flags=re.M))
    texts = [prose(path) for path in NOTEBOOKS] + [p.read_text() for p in BOOK.glob("*.md")]
    cited = {
        key.strip()
        for text in texts
        for group in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text)
        for key in group.split(",")
    }
    assert cited - keys == set()


@each_notebook
def test_images_in_prose_have_alt_text(path):
    for alt in re.findall(r"!\[([^\]]*)\]\(", prose(path)):
        assert alt.strip()


@each_notebook
def test_presets_fit_the_notebook(path):
    for name in ("smoke", "tutorial", "paper"):
        given = execute.preset(name)
        own = {key: given[key] for key in config.names(path.stem) if key in given}
        config.build(path.stem, {**execute.parameters_cell(path.stem), **own})


def test_each_preset_names_its_run():
    for name in ("smoke", "tutorial", "paper"):
        assert execute.preset(name)["run"].startswith(name)


@each_notebook
def test_helpers_are_found(path):
    assert {"config", "runs", "figures"} <= set(runs.closure(path.stem))
    assert Path(runs.notebook(path.stem)) == path


@each_notebook
def test_boxes_with_code_are_fenced_longer_than_the_code(path):
    """Three backticks within three backticks end the box, and the rest of it is shown raw."""
    fence = None
    text = "\n".join(cell["source"] for cell in cells(path, "markdown"))
    for line in text.splitlines():
        ticks, info = re.match(r"(`*)(.*)", line).groups()
        if len(ticks) < 3:
            continue
        if fence is None:
            fence = ticks
        elif len(ticks) >= len(fence):
            assert not info, f"{info!r} within a fence of {len(fence)} backticks"
            fence = None
    assert fence is None
