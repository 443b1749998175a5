"""Runs two tiny chapters in a copy of the repository, so that real chapters may take their time."""

import fcntl
import json
import os
import shutil
import subprocess
import sys

import nbformat
import pytest

from helpers import config, execute, runs

TISSUE, FIRST = "00_tissue", "01_superpixel_prompting"

BODY = {
    TISSUE: """stage.path("images.csv").write_text("image_id\\n1\\n")
stage.finish({"n": params.image_size, "draw": stage.rng().random()});""",
    FIRST: """n = len(stage.records())
if params.n_points == 13:
    raise ValueError("thirteen points bring bad luck: give another number")
stage.finish({"n": n});""",
}

VALUES = {
    "run": "tutorial-phantom", "seed": 0, "device": "auto", "dataset": "phantom",
    "data_root": None, "companion": None, "image_size": 64, "n_segments": 8, "n_points": 5,
    "mask_choice": ["best"],
}  # fmt: skip


def value(chapter, name):
    """A value that the model takes: given above, or the first of some likely ones that passes."""
    if name in VALUES:
        return VALUES[name]
    model = config.CHAPTERS[chapter]
    for guess in (2, 0.5, True, "small", "best", "reinhard", "full", "refuse", None, [1]):
        try:
            model(**{name: guess})
        except ValueError as error:
            if all(problem["loc"] != (name,) for problem in error.errors()):
                return guess
    raise AssertionError(f"no guess for {name}")


def write_chapter(root, chapter):
    cells = [
        nbformat.v4.new_markdown_cell(f"# {chapter}"),
        nbformat.v4.new_code_cell("from helpers import config, runs"),
        nbformat.v4.new_code_cell(
            "\n".join(f"{name} = {value(chapter, name)!r}" for name in config.names(chapter)),
            metadata={"tags": ["parameters"]},
        ),
        nbformat.v4.new_code_cell(
            f'params = config.read("{chapter}", globals())\nstage = runs.begin("{chapter}", params)'
        ),
        nbformat.v4.new_code_cell(BODY[chapter]),
    ]
    for index, cell in enumerate(cells):
        cell.id = f"cell-{index}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(book, root / "notebooks" / f"{chapter}.ipynb")


@pytest.fixture(scope="module")
def project(tmp_path_factory, repository_root):
    """A copy of the repository whose two chapters do next to nothing."""
    root = tmp_path_factory.mktemp("project")
    (root / "helpers").mkdir()
    for name in ("__init__", "config", "files", "runs", "execute"):
        shutil.copy(repository_root / "helpers" / f"{name}.py", root / "helpers")
    shutil.copytree(repository_root / "notebooks" / "presets", root / "notebooks" / "presets")
    for chapter in BODY:
        write_chapter(root, chapter)
    return root


@pytest.fixture(scope="module")
def repository_root():
    return runs.REPOSITORY


def run(project, *arguments):
    """The command line, on the two chapters of the copy."""
    environment = {**os.environ, "USEGMIX_RUNS": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "helpers.execute", "--run", "r", *arguments],
        cwd=project, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def done(result):
    """Chapters that a call has run, from its log."""
    return [line.split()[0] for line in result.stdout.splitlines() if " GB   (" in line]


def test_two_chapters_in_the_life_of_a_run(project):
    folder = project / "data" / "runs" / "r"
    both = ("--only", "00", "01_superpixel_prompting")

    result = run(project, *both)
    assert result.returncode == 0, result.stderr
    assert done(result) == [TISSUE, FIRST]
    assert " s " in result.stdout and "not run yet" in result.stdout
    times = json.loads((folder / "timings.json").read_text())
    assert set(times) == {TISSUE, FIRST} and times[FIRST]["peak_memory_gb"] > 0
    assert (folder / "notebooks" / f"{FIRST}.ipynb").exists()
    before = (folder / TISSUE / "results.json").read_bytes()

    result = run(project, *both)
    assert done(result) == [] and result.stdout.count("up to date") == 3

    # prose is no reason to run again, code is
    path = project / "notebooks" / f"{FIRST}.ipynb"
    source = path.read_text()
    path.write_text(source.replace(f"# {FIRST}", "# Another title"))
    assert done(run(project, *both)) == []
    path.write_text(source.replace('"n\\": n', '"n\\": n + 1'))
    result = run(project, *both)
    path.write_text(source)
    assert done(result) == [FIRST] and "notebook code changed" in result.stdout
    assert done(run(project, *both)) == [FIRST]

    # a failing chapter says why and keeps what was there
    kept = (folder / FIRST / "results.json").read_bytes()
    result = run(project, *both, "-p", "n_points", "13")
    assert result.returncode == 1
    assert "ValueError: thirteen points bring bad luck: give another number" in result.stderr
    assert "Traceback" not in result.stderr
    assert (folder / FIRST / "results.json").read_bytes() == kept
    failed = folder / "notebooks" / f"{FIRST}.failed.ipynb"
    assert "thirteen" in failed.read_text()

    # what an earlier failure left is no explanation of another
    (folder / "notebooks" / f".{FIRST}.running.ipynb").write_text(failed.read_text())
    path.write_text("{")
    result = run(project, "--only", "01", "--force")
    path.write_text(source)
    assert result.returncode == 1 and "thirteen" not in result.stderr

    # results of the last time are not those of a chapter that no longer writes any
    path.write_text(source.replace("stage.finish(", "print("))
    result = run(project, *both)
    path.write_text(source)
    assert result.returncode == 1 and "ended without stage.finish(results)" in result.stderr
    assert (folder / FIRST / "results.json").read_bytes() == kept

    # the same seed gives the same bytes; a failed option is not remembered
    assert done(run(project, *both)) == []
    assert done(run(project, "--only", "00", "--force")) == [TISSUE]
    assert (folder / TISSUE / "results.json").read_bytes() == before


def test_wrong_parameters_are_refused_before_anything_runs(project):
    result = run(project, "--only", "00", "-p", "imge_size", "3")
    assert result.returncode == 1 and "did you mean `image_size`" in result.stderr
    result = run(project, "--only", "00", "-p", "image_size", "many")
    assert result.returncode == 1 and "image_size = 'many': should be a valid" in result.stderr
    assert "GB" not in result.stdout


def test_chapters_that_do_not_go_together_are_refused_before_anything_runs(run_root, capsys):
    for given, said in (
        (("gap", "inpaint"), "chapter 06_synthesis: gap='inpaint' leaves gaps"),
        (("band", "0", "-p", "feather", "0"), "band=0 with gap='context' leaves no pixel"),
        (("spacing", "leading", "-p", "steps", "100"), "06_synthesis: synthesis_steps=2 with"),
    ):
        assert execute.main(["--run", "r", "-p", *given]) != 0
        assert said in capsys.readouterr().err and not (run_root / "r").exists()


def test_a_missing_predecessor_is_named(project):
    result = subprocess.run(
        [sys.executable, "-m", "helpers.execute", "--run", "empty", "--only", "01"],
        cwd=project, env={**os.environ, "USEGMIX_RUNS": ""}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert "--run empty --only 00_tissue" in result.stderr


def test_all_missing_predecessors_are_named_at_once(run_root):
    """Those that the missing ones build on too, but none behind a finished one."""
    names = {c.split("_")[0]: c for c in config.CHAPTERS}

    def missing(*numbers):
        with pytest.raises(runs.Failed) as error:
            execute._check_needs("r", [names[n] for n in numbers])
        said = str(error.value)
        assert said.startswith("run 'r' has not finished ")
        return [c.split("_")[0] for c in said.rpartition("--run r --only ")[2].split()]

    assert missing("05", "A1") == ["00", "01", "02", "03", "04", "05", "A1"]
    assert missing("00", "02") == ["00", "01", "02"]
    for chapter in ("00", "03"):
        runs.dump(run_root / "r" / names[chapter] / "manifest.json", {})
    assert missing("06") == ["04", "05", "06"]
    execute._check_needs("r", [names["04"], names["05"], names["06"], names["A2"]])
    execute._check_needs("r", list(config.CHAPTERS))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "smok"], "no preset 'smok': there are"),
        (["--data-root", "no/such/folder"], "data_root='no/such/folder' is no folder"),
        (["--only", "5x"], "no chapter '5x'"),
        (["-p", "stpes", "7"], "did you mean `steps`"),
        (
            ["-p", "latent_checkpoint", "no/such.ckpt"],
            "chapter 05_sde_mcg_inpainting: latent_checkpoint = 'no/such.ckpt': there is no such "
            "file (or small); correct the path",
        ),
        (["-p", "sam_checkpoint", "vitb"], "did you mean 'vit_b'"),
        (
            ["-p", "extractor", "ctranspath", "-p", "extractor_path", "c.pth"],
            "extractor_path = 'c.pth': there is no such file;",
        ),
        (["-p", "sigma", "[2"], "-p sigma [2: this is no YAML value ("),
        (
            ["--only", "00", "-p", "n_segments", "abc"],
            "-p n_segments belongs to chapter 01_superpixel_prompting, which --only or --from "
            "leaves out: leave the option out",
        ),
        (["--only", "05", "--dataset", "glsa"], "dataset = 'glsa': should be 'phantom'"),
        (["--from", "06", "-p", "steps", "5"], "-p steps belongs to chapter 05_sde_mcg_inpainting"),
    ],
)
def test_mistakes_on_the_command_line(arguments, said, run_root, capsys):
    assert execute.main(arguments) == 1
    assert said in capsys.readouterr().err


def test_a_run_keeps_its_data_set_with_and_without_a_preset(run_root, tmp_path):
    data = tmp_path / "mine"
    data.mkdir()
    options = {"dataset": "folder", "data_root": str(data)}
    runs.dump(runs.root() / "own" / "run.json", {"preset": "smoke", "options": options})
    runs.dump(runs.root() / "own" / TISSUE / "manifest.json", {})

    def resolved(*arguments):
        return execute.resolve(execute._parse(["--run", "own", *arguments]))

    for arguments in ((), ("--preset", "smoke"), ("--preset", "tutorial", "-p", "steps", "5")):
        _, given, _, record = resolved(*arguments)
        assert options.items() <= given.items() and options.items() <= record["options"].items()
    with pytest.raises(ValueError, match=r"made from other data \(folder, .*\) .*--force"):
        resolved("--dataset", "phantom")
    assert resolved("--dataset", "phantom", "--force")[1]["dataset"] == "phantom"


def test_a_run_that_holds_nothing_yet_takes_other_data(run_root, tmp_path, monkeypatch):
    """A first command that failed, of the wrong folder perhaps, binds the run to nothing."""
    data = [tmp_path / name for name in ("wrong", "right")]

    def fail(*args, **kwargs):
        raise runs.Failed("no images")

    monkeypatch.setattr(execute, "execute", fail)
    for folder in data:
        folder.mkdir()
        given = ["--preset", "smoke", "--dataset", "folder", "--data-root", str(folder)]
        assert execute.main(["--run", "own", *given]) == 1
        note = runs.load(run_root / "own" / "run.json")
        assert note["options"]["data_root"] == str(folder)


def test_options_that_made_a_chapter_are_kept_after_an_error(run_root, monkeypatch):
    """Chapter 00 took the new data, 01 failed: the run holds the new data."""
    note, manifest = run_root / "r" / "run.json", run_root / "r" / TISSUE / "manifest.json"
    runs.dump(note, {"preset": "smoke", "options": {"seed": 5}})
    runs.dump(manifest, {})
    os.utime(manifest, ns=(0, 0))

    def work(*args, **kwargs):
        runs.dump(manifest, {"seed": 6})
        raise runs.Failed("01 failed")

    monkeypatch.setattr(execute, "execute", work)
    assert execute.main(["--run", "r", "-p", "seed", "6"]) == 1
    assert runs.load(note)["options"] == {"seed": 6}


def test_a_preset_file_may_name_the_data(run_root, tmp_path, monkeypatch):
    """By a path from where one is: both are kept as full paths."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine.yml").write_text(
        "dataset: folder\ndata_root: mine\nscale_min: 0.3333333333\n"
    )
    monkeypatch.chdir(tmp_path)
    run, given, _, record = execute.resolve(execute._parse(["--preset", "mine.yml"]))
    assert run == "mine-folder" and given["data_root"] == str(tmp_path / "mine")
    with execute._remembered(run, record):
        runs.dump(run_root / run / TISSUE / "manifest.json", {})
    monkeypatch.chdir("/")
    for arguments in (["--run", run], ["--run", run, "--preset", str(tmp_path / "mine.yml")]):
        again = execute.resolve(execute._parse(arguments))
        assert again[1] == given and again[3] == record


@pytest.mark.parametrize("made", [None, "half", "whole"])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), runs.Failed("x"), ValueError("x")])
def test_options_are_kept_if_they_have_made_something(run_root, monkeypatch, error, made):
    """A command that fails, or is stopped, before it has done so may well be a mistake."""
    note = run_root / "r" / "run.json"
    old, new = ({"preset": "smoke", "options": {"steps": n}} for n in (5, 6))
    runs.dump(note, old)
    runs.dump(run_root / "r" / TISSUE / "manifest.json", {})
    partial = run_root / "r" / f".{FIRST}.partial"
    runs.dump(partial / "old.json", {})

    def work(*args, **kwargs):
        assert runs.load(note) == new  # so that it is there after a kill as well
        shutil.rmtree(partial)
        runs.dump(partial / "params.json", {})
        if made:
            folder = partial / "work" if made == "half" else run_root / "r" / FIRST
            runs.dump(folder / "manifest.json", {})
        if error:
            raise error

    monkeypatch.setattr(execute, "execute", work)
    status = 0 if error is None else 130 if isinstance(error, KeyboardInterrupt) else 1
    assert execute.main(["--run", "r", "-p", "steps", "6"]) == status
    assert runs.load(note) == (new if error is None or made else old)


def test_a_folder_of_data_that_has_gone_stops_only_what_reads_it(run_root, tmp_path):
    folder, record = tmp_path / "mine", run_root / "r" / "run.json"
    options = {"dataset": "folder", "data_root": str(folder)}
    runs.dump(record, {"preset": "smoke", "options": options})
    runs.dump(run_root / "r" / TISSUE / "manifest.json", {})
    _, given, chapters, _ = execute.resolve(execute._parse(["--run", "r", "--only", "04"]))
    assert given["data_root"] == str(folder) and chapters == ["04_probabilistic_replacement"]
    with pytest.raises(FileNotFoundError, match="is no folder"):
        execute.resolve(execute._parse(["--run", "r"]))
    (tmp_path / "moved").mkdir()
    moved = ["--run", "r", "--data-root", str(tmp_path / "moved")]
    with pytest.raises(ValueError, match="in another place, --force --only 00 files them again"):
        execute.resolve(execute._parse(moved))
    execute.resolve(execute._parse([*moved, "--force", "--only", "00"]))


def test_a_run_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, capsys):
    path = tmp_path / "file"
    path.write_text("")
    monkeypatch.setenv("USEGMIX_RUNS", str(path))
    assert execute.main(["--preset", "smoke"]) == 1
    said = capsys.readouterr().err
    assert f"runs are kept in {path}, which has to be a folder" in said


@pytest.mark.parametrize(
    ("arguments", "wrong"), [(["-p", "seed", "-1"], "seed = -1"), (["--run", "a b"], "run = 'a b'")]
)
def test_what_all_chapters_share_is_refused_once(run_root, capsys, arguments, wrong):
    assert execute.main(arguments) == 1
    said = capsys.readouterr().err
    assert said.count(wrong) == said.count("chapter ") == 1


def test_only_and_from_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        execute.main(["--only", "05", "--from", "03"])
    assert "not allowed with argument --only" in capsys.readouterr().err


def test_make_leaves_the_preset_to_the_run():
    """`make book RUN=...` takes a run up again as it was made, unless a preset is given."""

    def called(*given):
        done = subprocess.run(
            ["make", "--dry-run", "run", "RUN=mine", *given],
            cwd=execute.runs.REPOSITORY, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout

    assert "--run" in called() and "--preset" not in called()
    assert '--preset "paper"' in called("PRESET=paper")


def test_names_that_look_like_numbers_are_names(run_root, tmp_path):
    data = tmp_path / "7"
    data.mkdir()
    given = ["--preset", "smoke", "--dataset", "folder", "-p", "run", "007"]
    run, found, _, _ = execute.resolve(execute._parse([*given, "-p", "data_root", str(data)]))
    assert run == "007" and found["run"] == "007" and found["data_root"] == str(data)
    with pytest.raises(FileNotFoundError, match="data_root='7' is no folder"):
        execute.resolve(execute._parse([*given, "-p", "data_root", "7"]))


def test_paths_of_weights_and_pictures_are_seen_from_where_one_is(run_root, tmp_path, monkeypatch):
    (tmp_path / "mine.pth").write_bytes(b"\x80")  # as a pickle begins
    (tmp_path / "pictures").mkdir()
    (tmp_path / "small").mkdir()  # a name of weights all the same
    monkeypatch.chdir(tmp_path)
    given = ["--run", "r", "-p", "sam_checkpoint", "mine.pth", "-p", "latent_images", "pictures"]
    _, found, _, record = execute.resolve(
        execute._parse([*given, "-p", "latent_checkpoint", "small"])
    )
    paths = {"sam_checkpoint": "mine.pth", "latent_images": "pictures"}
    for name, path in paths.items():
        assert found[name] == record["options"][name] == str(tmp_path / path)
    assert found["latent_checkpoint"] == "small"
    with pytest.raises(ValueError, match="latent_images = 'none': there is no such folder"):
        execute.resolve(execute._parse(["-p", "latent_images", "none"]))


def test_a_table_of_images_may_be_the_data(run_root, tmp_path):
    table = tmp_path / "mine.csv"
    given = ["--preset", "smoke", "--dataset", "folder", "--data-root", str(table)]
    with pytest.raises(FileNotFoundError, match="no folder, nor a table"):
        execute.resolve(execute._parse(given))
    table.write_text("path,label\n")
    assert execute.resolve(execute._parse(given))[1]["data_root"] == str(table)


def images_of(run_root, classes, *, train=4, **counts):
    tissue = {"classes": classes, "counts": {"train": dict.fromkeys(classes, train)}}
    for split in ("val", "test", "test2"):
        tissue["counts"][split] = dict.fromkeys(classes, counts.get(split, 0))
    runs.dump(run_root / "r" / TISSUE / "results.json", tissue)


def test_images_that_the_last_chapter_cannot_use_are_known_after_the_first(run_root):
    last = "07_classifier_evaluation"
    images_of(run_root, ["benign"], test=3)
    with pytest.raises(runs.Failed, match=r"all images are of one, 'benign'.* --only 00 A1$"):
        execute._check_images("r", [TISSUE, last, "A1_training_sam"])
    images_of(run_root, ["benign", "tumour"], val=2)
    with pytest.raises(runs.Failed, match="needs test images, and there are none"):
        execute._check_images("r", [TISSUE, last])
    execute._check_images("r", [TISSUE, FIRST])
    for split in ("test", "test2"):
        images_of(run_root, ["benign", "tumour"], **{split: 1})
        execute._check_images("r", [TISSUE, last])


def test_one_training_image_a_class_is_too_few_to_replace_anything(run_root):
    replacing = "04_probabilistic_replacement"
    images_of(run_root, ["benign", "tumour"], train=1, test=2)
    with pytest.raises(runs.Failed, match=r"no class has two training images.* --only 00 01 A2$"):
        execute._check_images(
            "r", [TISSUE, FIRST, replacing, "05_sde_mcg_inpainting", "06_synthesis",
                  "07_classifier_evaluation", "A2_training_latent_diffusion"],
        )  # fmt: skip
    execute._check_images("r", [TISSUE, FIRST])


def test_a_second_command_on_a_run_is_refused_and_changes_nothing(run_root, monkeypatch, capsys):
    note = run_root / "r" / "run.json"
    runs.dump(note, {"preset": "smoke", "options": {"seed": 5}})
    monkeypatch.setattr(execute, "execute", lambda *a, **k: pytest.fail("it was run"))
    with (run_root / "r" / ".command.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert execute.main(["--run", "r", "-p", "seed", "6"]) == 1
    assert "another command is at work on this run" in capsys.readouterr().err
    assert runs.load(note)["options"] == {"seed": 5}
    monkeypatch.setattr(execute, "execute", lambda *a, **k: [])
    assert execute.main(["--run", "r", "-p", "seed", "6"]) == 0  # given back
    assert execute.main(["--run", "r", "-p", "seed", "7"]) == 0
    assert runs.load(note)["options"] == {"seed": 7}


def test_a_relative_folder_of_runs_is_the_same_for_chapters(tmp_path, monkeypatch):
    """They run in the repository, not where the command was given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("USEGMIX_RUNS", "mine")
    assert execute._environment()["USEGMIX_RUNS"] == str(tmp_path / "mine")


def test_a_damaged_record_of_a_run_is_named(run_root, capsys):
    path = run_root / "r" / "run.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    assert execute.main(["--run", "r"]) == 1
    said = capsys.readouterr().err
    assert f"{path} is damaged" in said and "delete it and run again" in said


def test_chapters_are_found_by_number_and_name():
    assert execute.chapter_named("05") == execute.chapter_named("5") == "05_sde_mcg_inpainting"
    assert execute.chapter_named("a1") == "A1_training_sam"
    assert execute.chapter_named("notebooks/06_synthesis.ipynb") == "06_synthesis"


def test_all_parameters_are_listed(capsys):
    assert execute.main(["--parameters"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in config.known())


@pytest.mark.parametrize("name", ["smoke", "tutorial", "paper"])
def test_presets_name_known_parameters_only(name):
    assert config.unknown(execute.preset(name)) == []


def test_a_preset_that_is_no_mapping_is_refused(tmp_path):
    path = tmp_path / "x.yml"
    path.write_text("- a\n")
    with pytest.raises(ValueError, match="flat mapping"):
        execute.preset(str(path))
    path.write_text("steps:\t- 5\n\t: [")
    with pytest.raises(ValueError, match=r"x\.yml: this is no YAML value"):
        execute.preset(str(path))


def test_the_failure_of_a_kernel_shows_the_log(tmp_path):
    log = tmp_path / "x.log"
    log.write_text("\n".join(f"line {i}" for i in range(30)) + "\nNoSuchKernel: python3")
    said = execute._failure("05", tmp_path / "none.ipynb", log)
    assert "NoSuchKernel" in said and "line 3\n" not in said


def test_a_killed_kernel_is_said_to_have_been_killed(tmp_path):
    log = tmp_path / "x.log"
    log.write_text("Traceback ...\nnbclient.exceptions.DeadKernelError: Kernel died\n")
    said = execute._failure("06_synthesis", tmp_path / "none.ipynb", log)
    assert said.startswith("06_synthesis: its process was killed")
    assert "the same command goes on" in said and "Traceback" not in said
    assert "lower synthesis_batch, or image_size" in said
    said = execute._failure("03_pca_pooling", tmp_path / "none.ipynb", log)
    assert said.endswith("lower image_size, with which all chapters begin again")


def test_notes_of_a_chapter_are_found(tmp_path):
    cells = [nbformat.v4.new_markdown_cell("note: prose"), nbformat.v4.new_code_cell("1")]
    printed = ("stream", "7 images\nnote: 3 are copies\n a note: inside\n"), ("stream", "note: b")
    cells[1].outputs = [nbformat.v4.new_output(kind, text=text) for kind, text in printed]
    cells[1].outputs.append(nbformat.v4.new_output("display_data", {"text/plain": "note: no"}))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    assert execute._notes(tmp_path / "a.ipynb") == ["note: 3 are copies", "note: b"]
