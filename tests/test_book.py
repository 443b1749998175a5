import nbformat
import pytest

from helpers import book, runs

CHAPTER = "00_tissue"


@pytest.fixture
def chapter(tmp_path, monkeypatch, run_root):
    """A source and its executed copy, as papermill leaves it."""
    v4 = nbformat.v4
    cells = [
        v4.new_markdown_cell("# Title"),
        v4.new_code_cell("seed = 0", metadata={"tags": ["parameters"]}),
        v4.new_code_cell("print(seed)", metadata={"mystnb": {"figure": {"caption": "old"}}}),
    ]
    source = v4.new_notebook(cells=cells)
    (tmp_path / "notebooks").mkdir()
    done = nbformat.from_dict(source.copy())
    done = nbformat.reads(nbformat.writes(source), as_version=4)
    injected = v4.new_code_cell("# Parameters\nseed = 3\n")
    injected.metadata = {"tags": ["injected-parameters"], "papermill": {"start_time": "now"}}
    done.cells.insert(2, injected)
    done.cells[3].outputs = [
        v4.new_output("stream", name="stderr", text=" 50%|###   | 1/2 [00:01<00:01, 1.0it/s]"),
        v4.new_output("stream", name="stderr", text="careful: something real\n"),
        v4.new_output("stream", name="stdout", text="3\n"),
    ]
    done.metadata["papermill"] = {"input_path": "somewhere"}
    monkeypatch.setattr(runs, "REPOSITORY", tmp_path)
    path = runs.executed("r", CHAPTER)
    path.parent.mkdir(parents=True)
    nbformat.write(source, runs.notebook(CHAPTER))
    nbformat.write(done, path)
    return source, done, path


def test_outputs_come_from_the_run_and_prose_from_the_source(chapter):
    source, _, _ = chapter
    source.cells[0].source = "# New title"
    source.cells[2].metadata["mystnb"]["figure"]["caption"] = "new"
    nbformat.write(source, runs.notebook(CHAPTER))
    page = book.chapter_page("r", CHAPTER)
    assert page.cells[0].source == "# New title"
    assert page.cells[-1].metadata["mystnb"]["figure"]["caption"] == "new"
    assert [output.text for output in page.cells[-1].outputs] == [
        "careful: something real\n",
        "3\n",
    ]


def test_injected_values_are_shown_without_traces_of_the_run(chapter):
    page = book.chapter_page("r", CHAPTER)
    assert page.cells[2].source == "# Parameters\nseed = 3\n"
    text = nbformat.writes(page)
    assert "papermill" not in text and text == nbformat.writes(book.chapter_page("r", CHAPTER))


def test_changed_code_is_refused(chapter):
    source, _, _ = chapter
    source.cells[2].source = "print(seed + 1)"
    nbformat.write(source, runs.notebook(CHAPTER))
    with pytest.raises(ValueError, match="has changed since it was executed"):
        book.chapter_page("r", CHAPTER)


def test_an_error_output_is_refused(chapter):
    _, done, path = chapter
    error = nbformat.v4.new_output("error", ename="ValueError", evalue="x", traceback=[])
    done.cells[3].outputs.append(error)
    nbformat.write(done, path)
    with pytest.raises(ValueError, match="ended in an error"):
        book.chapter_page("r", CHAPTER)


def test_a_chapter_that_was_not_executed_is_named(run_root):
    with pytest.raises(FileNotFoundError, match="--run nothing --only 00_tissue"):
        book.chapter_page("nothing", CHAPTER)
    assert book.main(["--run", "nothing"]) == 1


def test_warnings_are_picked_from_a_log():
    log = "reading\n\x1b[31mpage.md:3: WARNING: undefined label\x1b[39m\ndone\n"
    assert book._notable(log) == "page.md:3: WARNING: undefined label"


def test_one_figure_is_taken_out_of_the_run(chapter, tmp_path, monkeypatch):
    source, done, path = chapter
    name = {"mystnb": {"figure": {"name": "fig-one", "caption": "new"}}}
    source.cells[2].metadata = nbformat.from_dict(name)
    nbformat.write(source, runs.notebook(CHAPTER))
    drawn = nbformat.v4.new_output("display_data", data={"image/png": "cGljdHVyZQ=="})
    done.cells[3].outputs.append(drawn)
    nbformat.write(done, path)
    monkeypatch.setattr(book, "BOOK", tmp_path / "book")
    monkeypatch.setattr(book.config, "CHAPTERS", {CHAPTER: None})
    (tmp_path / "book" / "images").mkdir(parents=True)
    assert book.picture("r", "fig-one").read_bytes() == b"picture"
    with pytest.raises(ValueError, match="has drawn a figure called 'fig-two'"):
        book.picture("r", "fig-two")
