import fcntl
import itertools
import json
import os
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from helpers import config, runs

TISSUE, FIRST, SECOND = "00_tissue", "01_superpixel_prompting", "02_anchor_clustering"


def params(chapter, **changes):
    """Parameters of a chapter that skip the checks: the run folder does not look at them."""
    model = config.CHAPTERS[chapter]
    values = {name: None for name in model.model_fields} | {"run": "r", "seed": 0}
    return model.model_construct(**{**values, **changes})


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A repository with two chapters and three helpers, one of which imports another."""
    root = tmp_path / "repository"
    (root / "helpers").mkdir(parents=True)
    (root / "notebooks").mkdir()
    (root / "data" / "weights").mkdir(parents=True)
    for name in ("config", "runs", "leaf", "other"):
        (root / "helpers" / f"{name}.py").write_text("x = 1\n")
    (root / "helpers" / "stem.py").write_text("def f():\n    from helpers import leaf\n")
    (root / "helpers" / "leaf.py").write_text("FILE = 'tiny_net.safetensors'\n")
    for name in ("tiny_net", "unused_net"):
        (root / "data" / "weights" / f"{name}.safetensors").write_bytes(b"1")
    write_notebook(root, TISSUE, "from helpers import other, runs\n%matplotlib inline")
    write_notebook(root, FIRST, "from helpers.stem import f\nimport numpy as np")
    monkeypatch.setattr(runs, "REPOSITORY", root)
    monkeypatch.setattr(config, "build", lambda chapter, values: params(chapter, **values))
    return root


def write_notebook(root, chapter, code):
    cell = {"cell_type": "code", "source": code.splitlines(keepends=True), "metadata": {}}
    (root / "notebooks" / f"{chapter}.ipynb").write_text(json.dumps({"cells": [cell]}))


def finish_tissue(**changes):
    stage = runs.begin(TISSUE, params(TISSUE, **changes))
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    Image.fromarray(image).save(stage.path("images/007.png"))
    Image.fromarray(np.full((4, 4), 300, np.uint16)).save(stage.path("instances/007.png"))
    stage.path("images.csv").write_text("image_id,label,split\n007,benign,train\n")
    stage.finish({"n": 1, "classes": ["benign"]})
    return image


# --- writing


def test_results_are_rounded_sorted_and_plain(tmp_path):
    value = {"b": np.float32(1 / 3), "a": np.int64(2), 3: [np.bool_(True), None], "c": np.arange(2)}
    runs.dump(tmp_path / "x.json", value)
    assert list(json.loads((tmp_path / "x.json").read_text())) == ["3", "a", "b", "c"]
    assert json.loads((tmp_path / "x.json").read_text()) == {
        "3": [True, None], "a": 2, "b": 0.333333, "c": [0, 1],
    }  # fmt: skip


def test_not_a_number_becomes_null(tmp_path):
    runs.dump(tmp_path / "x.json", {"a": float("nan"), "b": np.inf})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": None}


@pytest.mark.parametrize("value", [{"a": {"b": object()}}, {"a": {"b": {1, 2}}}])
def test_what_json_cannot_hold_is_named(tmp_path, value):
    with pytest.raises(TypeError, match=r"results\.a\.b is a"):
        runs.dump(tmp_path / "x.json", value)
    assert not list(tmp_path.iterdir())


def test_parameters_are_kept_exactly(run_root, source):
    third = 1 / 3
    runs.dump(run_root / "x.json", {"a": third}, exact=True)
    assert runs.load(run_root / "x.json") == {"a": third}
    finish_tissue()
    runs.begin(FIRST, params(FIRST, sigma=third)).finish({})
    assert runs.begin(SECOND, params(SECOND)).parameters(FIRST).sigma == third
    assert runs.up_to_date("r", FIRST, params(FIRST, sigma=third)) == (True, "up to date")


def test_paths_are_refused_in_results(tmp_path):
    with pytest.raises(TypeError, match="same on every machine"):
        runs.dump(tmp_path / "x.json", {"a": tmp_path})


# --- a chapter


def test_artefacts_appear_when_the_chapter_finishes(run_root, source):
    stage = runs.begin(TISSUE, params(TISSUE))
    with stage.writing("sub/a.txt") as tmp:
        tmp.write_text("x")
    assert not (run_root / "r" / TISSUE).exists()
    stage.timing("draw", 1.5)
    assert stage.finish({"n": np.int64(3)}) == {"n": 3}
    assert stage.path("sub/a.txt").read_text() == "x"
    manifest = json.loads(stage.path("manifest.json").read_text())
    assert manifest["timings"] == {"draw": 1.5}
    assert manifest["seconds"] >= 0 and manifest["peak_memory_gb"] > 0
    assert set(manifest["helpers"]) == {"config", "runs", "other"}
    assert "numpy" in manifest["versions"]


def test_a_chapter_that_fails_leaves_its_last_results(run_root, source):
    finish_tissue()
    stage = runs.begin(TISSUE, params(TISSUE, seed=5))
    stage.path("images.csv").write_text("half")
    assert "007" in (run_root / "r" / TISSUE / "images.csv").read_text()
    runs.begin(FIRST, params(FIRST)).image("007")


def test_half_done_work_is_found_again_unless_parameters_changed(run_root, source):
    runs.begin(TISSUE, params(TISSUE)).path("a.txt").write_text("kept")
    assert runs.begin(TISSUE, params(TISSUE)).path("a.txt").read_text() == "kept"
    assert not runs.begin(TISSUE, params(TISSUE, seed=1)).path("a.txt").exists()


def test_half_done_work_is_kept_with_smaller_batches(run_root, source):
    """It is what one is told to try when memory runs out."""
    last = "06_synthesis"
    for name in itertools.takewhile(lambda name: name != last, runs.NEEDS):
        runs.begin(name, params(name, inpaint_batch=8)).finish({})
    runs.begin(last, params(last, synthesis_batch=8)).path("a.txt").write_text("kept")
    assert runs.begin(last, params(last, synthesis_batch=2)).path("a.txt").exists()
    healing = "05_sde_mcg_inpainting"
    runs.begin(healing, params(healing, inpaint_batch=1)).finish({})
    again = runs.begin(last, params(last, synthesis_batch=2))
    assert again.path("a.txt").exists()
    again.finish({})
    assert runs.up_to_date("r", last, params(last, synthesis_batch=4)) == (
        False, "synthesis_batch changed",
    )  # fmt: skip
    runs.begin(last, params(last)).path("a.txt").write_text("kept")
    runs.begin(healing, params(healing, steps=3)).finish({})
    assert not runs.begin(last, params(last)).path("a.txt").exists()


@pytest.mark.parametrize("result", [1, 2])
def test_half_done_work_is_kept_if_a_predecessor_gave_the_same_again(run_root, source, result):
    runs.begin(TISSUE, params(TISSUE)).finish({"n": 1})
    runs.begin(FIRST, params(FIRST)).path("a.txt").write_text("kept")
    runs.begin(TISSUE, params(TISSUE)).finish({"n": result})
    assert runs.begin(FIRST, params(FIRST)).path("a.txt").exists() == (result == 1)


def test_what_a_chapter_left_the_last_time_is_found_until_it_finishes(run_root, source):
    assert runs.begin(TISSUE, params(TISSUE)).earlier("images.csv") is None
    finish_tissue()
    stage = runs.begin(TISSUE, params(TISSUE, seed=5))
    stage.path("images.csv").write_text("new")
    assert "007" in stage.earlier("images.csv").read_text()
    stage.finish({})
    assert stage.earlier("images.csv") is None


def test_half_a_file_of_a_killed_process_is_swept_away(run_root, source):
    """What is found again is what an uninterrupted run would have."""
    stage = runs.begin(TISSUE, params(TISSUE))
    with stage.writing("images/a.png") as temporary:
        temporary.write_bytes(b"whole")
        left = temporary.with_name(temporary.name.replace(str(os.getpid()), "4711"))
        left.write_bytes(b"half")
    again = runs.begin(TISSUE, params(TISSUE))
    assert [p.name for p in again.path("images/a.png").parent.iterdir()] == ["a.png"]


def test_half_done_work_of_other_code_is_dropped(run_root, source):
    def half_done():
        return runs.begin(TISSUE, params(TISSUE)).path("a.txt")

    changes = {
        "helper": lambda: (source / "helpers" / "other.py").write_text("x = 2\n"),
        "notebook": lambda: write_notebook(source, TISSUE, "from helpers import other\nx = 3"),
    }
    for change in changes.values():
        half_done().write_text("kept")
        assert half_done().exists()
        change()
        assert not half_done().exists()


def test_a_chapter_is_worked_on_by_one_process_at_a_time(run_root, source):
    path = run_root / "r" / f".{TISSUE}.lock"
    path.parent.mkdir(parents=True)
    with path.open("w") as other:  # as another process would
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(runs.Failed, match=r"r: another process.* chapter 00_tissue"):
            runs.begin(TISSUE, params(TISSUE))
    finish_tissue()
    with path.open("w") as other:  # free again when the chapter is finished
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_half_done_work_is_dropped_when_a_predecessor_changed(run_root, source):
    finish_tissue()
    runs.begin(FIRST, params(FIRST)).path("a.txt").write_text("x")
    finish_tissue(seed=9)
    assert not runs.begin(FIRST, params(FIRST)).path("a.txt").exists()


def test_half_done_work_is_dropped_when_weights_of_a_predecessor_changed(
    run_root, source, tmp_path
):
    weights = tmp_path / "mine.pth"
    weights.write_bytes(b"one")
    finish_tissue()
    runs.begin(FIRST, params(FIRST, sam_checkpoint=str(weights))).finish({})
    for text, kept in ((b"one", True), (b"two", False)):
        runs.begin(SECOND, params(SECOND)).path("a.txt").write_text("x")
        weights.write_bytes(text)
        assert runs.begin(SECOND, params(SECOND)).path("a.txt").exists() == kept


def test_a_kill_between_the_moves_of_finish_is_mended(run_root, source):
    finish_tissue()
    os.replace(run_root / "r" / TISSUE, run_root / "r" / f".{TISSUE}.old")
    runs.begin(TISSUE, params(TISSUE))
    assert (run_root / "r" / TISSUE / "results.json").exists()


@pytest.mark.parametrize("while_it_runs", [False, True])
def test_leftovers_of_an_older_run_do_no_harm(run_root, source, while_it_runs):
    """Of a process that was killed while it removed what a chapter had been before."""
    finish_tissue()
    old = run_root / "r" / f".{TISSUE}.old"

    def leave():
        old.mkdir()
        (old / "images.csv").write_text("x")

    if not while_it_runs:
        leave()
    stage = runs.begin(TISSUE, params(TISSUE, seed=3))
    if while_it_runs:
        leave()
    stage.path("images.csv").write_text("y")
    stage.finish({"seed": 3})
    assert runs.load(run_root / "r" / TISSUE / "results.json") == {"seed": 3}
    assert not old.exists() and not (run_root / "r" / TISSUE / ".key").exists()


def test_a_missing_predecessor_is_named_with_the_command(run_root, source):
    with pytest.raises(FileNotFoundError) as error:
        runs.begin(FIRST, params(FIRST))
    assert "no finished chapter 00_tissue" in str(error.value)
    assert "python -m helpers.execute --run r --only 00_tissue" in str(error.value)


def test_a_missing_artefact_is_named_with_the_command(run_root, source):
    finish_tissue()
    with pytest.raises(FileNotFoundError, match=r"no 'x\.npz', which .* Run it first: .*00_tissue"):
        runs.begin(FIRST, params(FIRST)).input(TISSUE, "x.npz")


def test_parameters_must_come_from_the_chapter(run_root):
    with pytest.raises(TypeError, match=r"config\.read"):
        runs.begin(FIRST, params(TISSUE))


def test_tables_keep_classes_that_look_like_numbers_or_like_nothing(tmp_path):
    written = pd.DataFrame({"label": ["NA", "None", "01", "null"], "area": [1.5, None, 2, 3]})
    written.to_csv(tmp_path / "t.csv", index=False)
    table = runs.read_table(tmp_path / "t.csv")
    assert table["label"].tolist() == ["NA", "None", "01", "null"]
    assert table["area"].isna().tolist() == [False, True, False, False]


def test_tables_keep_ids_that_are_all_digits(tmp_path):
    """Of files called ``007.png``: as numbers they would match no image of the run."""
    names = ("image_id", "patient", "site", "split", "dataset", "synthetic_id", "target", "sources")
    written = pd.DataFrame({name: ["007", "12"] for name in names} | {"n": [3, 4]})
    written.to_csv(tmp_path / "t.csv", index=False)
    table = runs.read_table(tmp_path / "t.csv")
    pd.testing.assert_frame_equal(table, written)
    assert table["image_id"].isin(["007"]).sum() == 1


def test_what_a_run_says_of_its_chapters(run_root):
    assert runs.executed("r", FIRST) == run_root / "r" / "notebooks" / f"{FIRST}.ipynb"
    assert runs.timings("r") == {}
    times = {FIRST: {"seconds": 1.5, "peak_memory_gb": 0.3}}
    runs.dump(run_root / "r" / "timings.json", times)
    assert runs.timings("r") == times


def test_images_instances_and_records(run_root, source):
    image = finish_tissue()
    stage = runs.begin(FIRST, params(FIRST))
    np.testing.assert_array_equal(stage.image("007"), image)
    instances = stage.instances("007")
    assert instances.dtype == np.int32 and instances.max() == 300
    assert stage.instances("nothing") is None
    table = stage.records()
    assert table.loc["007", "label"] == "benign" and table["image_id"].tolist() == ["007"]
    with pytest.raises(KeyError, match="no image 'nothing'"):
        stage.image("nothing")
    stage.finish({})
    manifest = json.loads(stage.path("manifest.json").read_text())
    assert set(manifest["inputs"]) == {
        "00_tissue/images", "00_tissue/instances", "00_tissue/images.csv",
    }  # fmt: skip


def test_results_and_parameters_of_another_chapter(run_root, source):
    finish_tissue(image_size=4)
    stage = runs.begin(FIRST, params(FIRST))
    assert stage.results(TISSUE) == {"n": 1, "classes": ["benign"]}
    assert stage.parameters(TISSUE).image_size == 4


def test_random_numbers_depend_on_seed_chapter_and_key(run_root, source):
    finish_tissue()
    draws = [
        runs.begin(TISSUE, params(TISSUE)).rng("a", 1).random(),
        runs.begin(TISSUE, params(TISSUE)).rng("a", 2).random(),
        runs.begin(TISSUE, params(TISSUE, seed=1)).rng("a", 1).random(),
        runs.begin(FIRST, params(FIRST)).rng("a", 1).random(),
    ]
    assert len(set(draws)) == 4
    assert runs.begin(TISSUE, params(TISSUE)).rng("a", 1).random() == draws[0]
    seeds = {runs.begin(TISSUE, params(TISSUE)).generator(k).initial_seed() for k in (0, 0, 1)}
    assert len(seeds) == 2


def test_the_same_work_gives_the_same_bytes(run_root, source):
    finish_tissue()
    first = (run_root / "r" / TISSUE / "results.json").read_bytes()
    finish_tissue()
    assert (run_root / "r" / TISSUE / "results.json").read_bytes() == first


# --- what is out of date


def test_what_was_damaged_or_lost_is_found(run_root, source):
    finish_tissue()
    folder = run_root / "r" / TISSUE
    assert runs.up_to_date("r", TISSUE, params(TISSUE)) == (True, "up to date")
    whole = (folder / "images" / "007.png").read_bytes()
    (folder / "images" / "007.png").write_bytes(whole[:20])
    assert runs.up_to_date("r", TISSUE, params(TISSUE)) == (False, "damaged or missing: images")
    (folder / "images" / "007.png").write_bytes(whole)
    (folder / "images.csv").unlink()
    assert runs.up_to_date("r", TISSUE, params(TISSUE)) == (False, "damaged or missing: images.csv")


def test_an_input_counts_as_it_was_when_it_was_read(run_root, source):
    """Another process may finish chapter 00 anew while 01 still works on the old one."""
    finish_tissue()
    stage = runs.begin(FIRST, params(FIRST))
    assert stage.results(TISSUE)["n"] == 1
    runs.dump(run_root / "r" / TISSUE / "results.json", {"n": 2})
    stage.finish({})
    changed = (False, "input changed: 00_tissue/results.json")
    assert runs.up_to_date("r", FIRST, params(FIRST)) == changed


def test_a_checkpoint_trained_anew_in_place_is_found(run_root, source, tmp_path):
    """By the chapter that names it, and by a later one that reads the name from that chapter."""
    file = tmp_path / "w.safetensors"
    given = {"sam_checkpoint": str(file)}
    write_notebook(source, SECOND, "from helpers import other")

    def state():
        first = runs.up_to_date("r", FIRST, params(FIRST, **given))
        return first, runs.up_to_date("r", SECOND, params(SECOND))

    file.write_bytes(b"1")
    finish_tissue()
    runs.begin(FIRST, params(FIRST, **given)).finish({})
    stage = runs.begin(SECOND, params(SECOND))
    assert stage.parameters(FIRST).sam_checkpoint == str(file)
    stage.finish({})
    assert state() == ((True, "up to date"),) * 2
    file.write_bytes(b"22")
    assert state() == ((False, f"input changed: {file}"),) * 2
    file.write_bytes(b"1")
    assert state() == ((True, "up to date"),) * 2
    file.unlink()
    assert state() == ((False, f"input changed: {file}"),) * 2


@pytest.mark.parametrize("name", ["small", "hf-hub:owner/model"])
def test_checkpoints_by_name_are_no_files(run_root, source, name):
    finish_tissue()
    stage = runs.begin(FIRST, params(FIRST, sam_checkpoint=name))
    stage.finish({})
    assert json.loads(stage.path("manifest.json").read_text())["inputs"] == {}


def test_closure_follows_imports_inside_functions(source):
    assert set(runs.closure(FIRST)) == {"config", "runs", "stem", "leaf"}
    assert set(runs.closure(TISSUE)) == {"config", "runs", "other"}


def test_weights_are_those_that_the_code_names_with_their_curves(source):
    assert set(runs.weights(FIRST)) == {"tiny_net.safetensors"}
    before = {}
    for name in ("tiny_net.json", "other.json"):
        (source / "data" / "weights" / name).write_text("[]")
        before = before or runs.weights(FIRST)
        assert runs.weights(FIRST) == before and set(before) == {
            "tiny_net.json",
            "tiny_net.safetensors",
        }
    (source / "data" / "weights" / "tiny_net.json").write_text("[1]")
    assert runs.weights(FIRST) != before
    assert runs.weights(TISSUE) == {}


def test_weights_of_the_chapters_of_the_book():
    """By the name of their file: ``unet`` alone is a word of many helpers."""
    small = {"sam_small.safetensors", "sam_small.json"}
    pair = {
        f"{name}.{kind}" for name in ("autoencoder", "unet") for kind in ("json", "safetensors")
    }
    expected = {
        "00_tissue": set(), "01_superpixel_prompting": small, "02_anchor_clustering": small,
        "03_pca_pooling": set(), "04_probabilistic_replacement": set(),
        "05_sde_mcg_inpainting": pair, "06_synthesis": pair, "07_classifier_evaluation": set(),
        "A1_training_sam": small, "A2_training_latent_diffusion": {*pair, "decoder.json"},
    }  # fmt: skip
    assert {chapter: set(runs.weights(chapter)) for chapter in config.CHAPTERS} == expected


def test_what_has_changed_is_found(run_root, source):
    def state(chapter, **changes):
        return runs.up_to_date("r", chapter, params(chapter, **changes))

    assert state(TISSUE) == (False, "not run yet")
    finish_tissue()
    runs.begin(FIRST, params(FIRST)).input(TISSUE, "images.csv")
    stage = runs.begin(FIRST, params(FIRST))
    stage.records()
    stage.finish({})
    assert state(TISSUE)[0] and state(FIRST)[0]
    assert state(TISSUE, seed=1) == (False, "seed changed")

    (source / "helpers" / "leaf.py").write_text("FILE = 'tiny_net.safetensors'  # new\n")
    assert state(TISSUE)[0]
    assert state(FIRST) == (False, "helpers changed: leaf")
    (source / "helpers" / "leaf.py").write_text("FILE = 'tiny_net.safetensors'\n")
    assert state(FIRST)[0]

    (source / "data" / "weights" / "tiny_net.safetensors").write_bytes(b"22")
    assert state(FIRST) == (False, "weights changed: tiny_net.safetensors")
    (source / "data" / "weights" / "tiny_net.safetensors").write_bytes(b"1")

    finish_tissue()
    assert state(FIRST)[0], "the same images again leave the next chapter as it is"
    (run_root / "r" / TISSUE / "images.csv").write_text("image_id,label,split\n007,poor,train\n")
    assert state(FIRST) == (False, "input changed: 00_tissue/images.csv")


def test_a_change_in_the_data_folder_is_found(run_root, source, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    finish_tissue(data_root=str(data))
    assert runs.up_to_date("r", TISSUE, params(TISSUE, data_root=str(data)))[0]
    (data / ".DS_Store").write_bytes(b"x")
    (data / ".ipynb_checkpoints").mkdir()
    (data / ".ipynb_checkpoints" / "a.csv").write_bytes(b"x")
    assert runs.up_to_date("r", TISSUE, params(TISSUE, data_root=str(data)))[0]
    (data / "new.png").write_bytes(b"x")
    changed = runs.up_to_date("r", TISSUE, params(TISSUE, data_root=str(data)))
    assert changed == (False, "data folder changed")


def test_a_table_of_images_counts_with_what_it_names_and_not_with_what_lies_beside_it(tmp_path):
    table = tmp_path / "images.csv"
    found = []
    for name, text in {
        "images.csv": "path,label\na.png,x\n", "a.png": "one", "classes.txt": "x\n",
        "notes.txt": "other", "b.png": "other",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
        found.append(runs._data(SimpleNamespace(data_root=str(table))))
    assert None not in found and len(set(found[:3])) == 3
    assert found[2] == found[3] == found[4]


@pytest.mark.parametrize("name", ["images.csv", "IMAGES.CSV"])
def test_files_elsewhere_that_a_table_names_count_as_well(tmp_path, name):
    folder, pixels = tmp_path / "tables", tmp_path / "pixels"
    folder.mkdir()
    pixels.mkdir()
    (pixels / "a.png").write_bytes(b"one")
    table = folder / name
    table.write_text("path,label\n..\\pixels\\a.png," + "long" * 100 + "\n")
    for root in (folder, table):
        before = runs._data(SimpleNamespace(data_root=str(root)))
        assert runs._data(SimpleNamespace(data_root=str(root))) == before
        (pixels / "a.png").write_bytes((pixels / "a.png").read_bytes() + b"more")
        assert runs._data(SimpleNamespace(data_root=str(root))) != before


def test_folders_behind_links_count_and_circles_end(tmp_path):
    root, pixels = tmp_path / "root", tmp_path / "pixels"
    root.mkdir()
    pixels.mkdir()
    (root / "benign").symlink_to(pixels)
    (pixels / "back").symlink_to(root)
    before = runs._listing(root)
    (pixels / "a.png").write_bytes(b"one")
    assert runs._listing(root) != before


def test_pictures_for_the_latent_model_count_as_data(tmp_path):
    given = SimpleNamespace(data_root=None, latent_images=str(tmp_path))
    before = runs._data(given)
    (tmp_path / "a.png").write_bytes(b"one")
    assert None not in (before, runs._data(given)) and runs._data(given) != before


def test_names_and_times_of_files_belong_to_the_hash_of_a_folder(tmp_path):
    (tmp_path / "a.png").write_bytes(b"one")
    (tmp_path / "b.png").write_bytes(b"two")
    os.utime(tmp_path / "a.png", ns=(10**18, 10**18))
    hashed, listed = runs._hashes.folder(tmp_path), runs._listing(tmp_path)
    os.utime(tmp_path / "a.png", ns=(2 * 10**18, 2 * 10**18))
    assert runs._listing(tmp_path) != listed  # of the same name and size, but written again
    assert runs._hashes.folder(tmp_path) == hashed  # contents alone count there
    (tmp_path / "b.png").rename(tmp_path / "c.png")
    assert runs._hashes.folder(tmp_path) != hashed


def test_every_chapter_says_what_it_needs():
    order = list(config.CHAPTERS)
    assert list(runs.NEEDS) == order
    for chapter, needs in runs.NEEDS.items():
        assert all(order.index(need) < order.index(chapter) for need in needs)
