"""Runs every chapter with the smoke preset, twice side by side, and looks at what it leaves."""

import json
import os
import shutil
import subprocess
import sys

import nbformat
import pytest
from PIL import Image

from helpers import config, execute, latent_scenes, runs

RUN = "smoke-phantom"


def command(*arguments):
    return [sys.executable, "-m", "helpers.execute", "--preset", "smoke", *arguments]


def environment(root):
    inline = "module://matplotlib_inline.backend_inline"
    given = {"USEGMIX_RUNS": str(root), "OMP_NUM_THREADS": "1", "MPLBACKEND": inline}
    return {**os.environ, **given}


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """Two run roots, filled by the same command with the same seed at the same time."""
    roots = [tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")]
    started = [
        subprocess.Popen(
            command(), cwd=runs.REPOSITORY, env=environment(root), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for root in roots
    ]  # fmt: skip
    logs = [process.communicate()[0] for process in started]
    for process, log in zip(started, logs, strict=True):
        if process.returncode:
            pytest.fail(f"a chapter failed\n{log}", pytrace=False)
    return roots


@pytest.fixture
def first(two_runs, monkeypatch):
    """Folder of the first run, in place of ``data/runs/smoke-phantom``."""
    monkeypatch.setenv("USEGMIX_RUNS", str(two_runs[0]))
    return two_runs[0] / RUN


def results(folder, chapter):
    return json.loads((folder / chapter / "results.json").read_text(encoding="utf-8"))


def stale(chapters=config.CHAPTERS):
    """Chapters of the smoke run that would run now."""
    checked, _ = execute.settings(list(chapters), execute.preset("smoke"))
    return [c for c in chapters if not execute._up_to_date(RUN, c, checked[c])[0]]


#: What has no value with the few images of the smoke run.
UNDEFINED = {"06_synthesis": {"kid_x_1000", "kid_x_1000_std"}, "07_classifier_evaluation": {"gain"}}


@pytest.mark.parametrize("chapter", config.CHAPTERS)
def test_results_are_there_and_finite(first, chapter):
    found = results(first, chapter)
    assert found, "a chapter without results"
    holes = {key for key, value in found.items() if "null" in json.dumps(value)}
    assert holes <= UNDEFINED.get(chapter, set())
    manifest = json.loads((first / chapter / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["params"]["run"] == RUN
    assert 0 < manifest["peak_memory_gb"] < 4
    assert {"config", "runs", "figures"} <= set(manifest["helpers"])


def test_tissue_files_what_the_preset_asks_for(first):
    given, found = execute.preset("smoke"), results(first, "00_tissue")
    assert found["classes"] == ["benign", "well", "moderate", "poor"]
    for split in ("train", "val", "test", "test2"):
        assert set(found["counts"][split].values()) == {given[f"{split}_per_class"]}


def test_segments_are_counted_without_loss(first):
    found = results(first, "02_anchor_clustering")
    assert sum(found["segments_by_class"].values()) == found["n_segments"] > 0
    per_image = found["n_segments"] + sum(found["dropped"].values())
    params = json.loads((first / "01_superpixel_prompting" / "params.json").read_text())
    asked = found["superpixels_an_image"] * found["n_images"]
    assert per_image == pytest.approx(asked * len(params["mask_choice"]))
    assert {"anchors", "SLIC", "Felzenszwalb"} <= set(found["methods"])
    assert "ihc" in found["segments_by_class"], "the real image goes along"


def test_the_pool_holds_training_segments_only(first):
    found = results(first, "03_pca_pooling")
    assert found["n_not_training"] == 0
    wanted = execute.preset("smoke")["n_components"]
    assert all(0 < part["components"] <= wanted for part in found["classes"].values())


def test_composites_keep_to_the_bounds(first):
    found = results(first, "04_probabilistic_replacement")
    params = json.loads((first / "04_probabilistic_replacement" / "params.json").read_text())
    assert params["area_min"] <= found["new_area_ratio"]["min"]
    assert found["new_area_ratio"]["max"] <= params["area_max"]
    assert sum(found["composites_by_class"].values()) == found["n_composites"] > 0


def test_inpainting_changes_no_known_pixel(first):
    found = results(first, "05_sde_mcg_inpainting")
    assert found["known_pixels_identical"] and found["filling_independent_of_hole"]
    assert found["steps"] == execute.preset("smoke")["steps"]


def test_synthesis_makes_what_was_asked_for(first):
    found = results(first, "06_synthesis")
    wanted = max(execute.preset("smoke")["n_per_class"])
    classes = results(first, "00_tissue")["classes"]
    assert {c: found["made_by_class"][c] for c in classes} == dict.fromkeys(classes, wanted)


def test_every_synthetic_image_says_how_it_was_made(first):
    folder, found = first / "06_synthesis", results(first, "06_synthesis")
    lines = (folder / "provenance.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == found["n_images"]
    assert len({record["synthetic_id"] for record in records}) == len(records)
    for record in records:
        made, name = record["made_by"], record["synthetic_id"]
        assert made["seed"] == 0 and made["sampling"]["method"] == "mmps"
        assert set(made["weights"]) == {"autoencoder.safetensors", "unet.safetensors"}
        assert all(len(digest) == 64 for digest in made["weights"].values())
        assert made["drawing"]["fit_min"] and len(record["sources"]) == len(record["replacements"])
        assert all((folder / kind / f"{name}.png").exists() for kind in ("images", "pasted"))


def test_toy_trainings_ran_their_steps(first):
    assert results(first, "A1_training_sam")["toy_steps"] == execute.preset("smoke")["sam_steps"]
    assert results(first, "A2_training_latent_diffusion")["toy"]["contrast_and_judge"]["psnr"] > 0


@pytest.mark.parametrize("chapter", config.CHAPTERS)
def test_the_same_seed_gives_the_same_results(two_runs, chapter):
    one, other = ((root / RUN / chapter / "results.json").read_bytes() for root in two_runs)
    assert one == other


@pytest.mark.parametrize("chapter", config.CHAPTERS)
def test_no_cell_ends_in_an_error_or_warns(first, chapter):
    notebook = nbformat.read(runs.executed(RUN, chapter), as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            assert output.output_type != "error"
            if output.output_type == "stream" and output.name == "stderr":
                assert "Warning" not in output.text, output.text
            assert str(runs.REPOSITORY) not in json.dumps(output), "a path of this machine"


@pytest.mark.parametrize("chapter", config.CHAPTERS)
def test_numbers_for_the_text_are_plain(first, chapter):
    """What is glued is read from its representation, in which NumPy's numbers have a name."""
    notebook = nbformat.read(runs.executed(RUN, chapter), as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "scrapbook" in output.get("metadata", {}):
                name, (text,) = output.metadata.scrapbook.name, output.data.values()
                assert not text.startswith("np."), f"{name}: {text}"
                assert text != "nan" or name.startswith("kid-"), f"{name} has no value"


@pytest.mark.parametrize("chapter", config.CHAPTERS)
def test_every_figure_is_drawn(first, chapter):
    notebook = nbformat.read(runs.executed(RUN, chapter), as_version=4)
    for cell in notebook.cells:
        if "figure" in cell.metadata.get("mystnb", {}):
            pictures = [o for o in cell.outputs if "image/png" in o.get("data", {})]
            assert len(pictures) == 1, f"{len(pictures)} pictures from: {cell.source[:80]}"


def test_a_finished_run_is_left_alone(two_runs):
    done = subprocess.run(
        command(), cwd=runs.REPOSITORY, env=environment(two_runs[0]), text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    assert f"0 chapters run, {len(config.CHAPTERS)} up to date" in done.stdout


@pytest.mark.parametrize(
    "helper", ["superpixels", "pool", "seam", "diffusion", "classify", "train_sam"]
)
def test_a_changed_helper_makes_stale_what_depends_on_it(first, helper, monkeypatch):
    assert stale() == []
    original = runs._hashes.file
    changed = runs.REPOSITORY / "helpers" / f"{helper}.py"
    monkeypatch.setattr(
        runs._hashes, "file", lambda path: "changed" if path == changed else original(path)
    )
    expected = [c for c in config.CHAPTERS if helper in runs.closure(c)]
    assert stale() == expected
    assert 0 < len(expected) < len(config.CHAPTERS)


def test_a_changed_parameter_makes_one_chapter_stale(first):
    checked, _ = execute.settings(
        list(config.CHAPTERS), {**execute.preset("smoke"), "steps": 9, "run": RUN}
    )
    fresh = {c: execute._up_to_date(RUN, c, checked[c]) for c in config.CHAPTERS}
    assert [c for c, (good, _) in fresh.items() if not good] == ["05_sde_mcg_inpainting"]
    assert fresh["05_sde_mcg_inpainting"][1] == "steps changed"


def test_one_chapter_by_hand_with_papermill(two_runs, tmp_path):
    """``papermill notebooks/05_*.ipynb out.ipynb -f notebooks/presets/smoke.yml -p steps 7``."""
    root = tmp_path / "runs"
    shutil.copytree(two_runs[1], root)
    chapter = "05_sde_mcg_inpainting"
    out = tmp_path / "out.ipynb"
    preset = runs.REPOSITORY / "notebooks" / "presets" / "smoke.yml"
    subprocess.run(
        [sys.executable, "-m", "papermill", str(runs.notebook(chapter)), str(out), "-f",
         str(preset), "-p", "steps", "7", "--no-progress-bar"],
        cwd=tmp_path, env=environment(root), check=True, capture_output=True,
    )  # fmt: skip
    manifest = json.loads((root / RUN / chapter / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["params"]["steps"] == 7
    assert out.exists()


def test_the_toy_runs_of_a2_on_a_folder_of_ones_own(tmp_path):
    for i in range(5):
        picture = latent_scenes.scene(i, seed=7, size=128)
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    root, chapter = tmp_path / "runs", "A2_training_latent_diffusion"
    done = subprocess.run(
        command("--only", "A2", "-p", "latent_images", str(tmp_path)),
        cwd=runs.REPOSITORY, env=environment(root), text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    toy = results(root / RUN, chapter)["toy"]
    assert (toy["images"], toy["unseen"]) == (4, 1) and toy["held_out_loss"] > 0


def test_a_mistyped_parameter_by_hand_is_refused_with_the_nearest(two_runs, tmp_path):
    chapter, out = "05_sde_mcg_inpainting", tmp_path / "out.ipynb"
    preset = runs.REPOSITORY / "notebooks" / "presets" / "smoke.yml"
    before = (two_runs[0] / RUN / chapter / "manifest.json").read_bytes()
    done = subprocess.run(
        [sys.executable, "-m", "papermill", str(runs.notebook(chapter)), str(out), "-f",
         str(preset), "-p", "stpes", "7", "--no-progress-bar"],
        cwd=tmp_path, env=environment(two_runs[0]), text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert (
        "stpes = 7: no chapter has a parameter of this name; did you mean `steps`?" in done.stderr
    )
    assert (two_runs[0] / RUN / chapter / "manifest.json").read_bytes() == before
