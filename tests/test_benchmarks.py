"""The benchmarks that own images may be measured with; the others only print times."""

import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from helpers import anchors, diffusion, execute, features, latent, phantom, sam
from tests.benchmarks import (
    __main__,
    bench_memory,
    bench_phase1,
    bench_replacement,
    bench_segments,
    measure,
)


@pytest.fixture
def annotated(tmp_path):
    """Two phantoms with masks, as a table of images."""
    rows = []
    for i in range(2):
        tissue = phantom.render(i, size=(64, 72), microns_per_pixel=3.0)
        Image.fromarray(tissue.image).save(tmp_path / f"{i}.png")
        Image.fromarray(tissue.glands.astype(np.uint8)).save(tmp_path / f"{i}_mask.png")
        rows.append({"path": f"{i}.png", "label": "a", "split": "train", "mask": f"{i}_mask.png"})
    pd.DataFrame(rows).to_csv(tmp_path / "images.csv", index=False)
    return tmp_path


def test_an_unknown_benchmark_is_named_beside_those_there_are(capsys):
    assert __main__.main(["measure"]) == 1
    said = capsys.readouterr().err
    assert "'measure': there are bench_memory, bench_phase1, bench_phase2" in said


def test_every_run_is_named_as_its_own_command(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(bench_phase1, "main", seen.append)
    assert __main__.main(["bench_phase1"]) == 0
    assert seen == [options.split() for options in bench_phase1.RUNS]
    said = capsys.readouterr().out
    assert "-- python -m tests.benchmarks.bench_phase1 --checkpoint vit_b --random" in said


TINY = ["--side", "64", "--segments", "4", "--points", "3"]


def test_phase_1_is_compared_with_its_literal_form(capsys):
    (row,) = bench_phase1.main([*TINY, "--images", "1", "--repeats", "1"])
    said = capsys.readouterr().out
    assert "phase 1, small, full precision, 64 px" in said
    assert "literal / fast: encoder and prompts" in said
    assert row["same"] == row["same_masks"] == 1 and row["prompts"] % 3 == 0
    assert row["literal_s"] > row["literal_prompting_s"] > 0
    assert row["fast_s"] > row["prompting_s"] > 0


def test_the_literal_form_may_stop_after_some_superpixels():
    model, image = bench_phase1.load_model("small", False, "cpu"), bench_phase1.tissue(0, 64)
    points = np.random.default_rng(0).integers(0, 64, (4, 3, 2))
    index = bench_phase1.fast(model, image, points, None)
    proposals = bench_phase1.ask(model, image, points, None)
    *_, reference, masks = bench_phase1.literal(model, image, points, 2)
    assert list(index[:2]) == reference and masks.shape == (6, 64, 64)
    row = bench_phase1._literal_row(
        model, image, points, 4, (index, proposals), measure.TIMERS["cpu"]
    )  # 4 prompts: the first two superpixels, of 3 each
    assert row["same"] == 1


@pytest.mark.parametrize("outputs", ["best", "three"])
def test_bare_passes_are_those_that_the_fast_form_makes(monkeypatch, outputs):
    model, image = bench_phase1.load_model("small", False, "cpu"), bench_phase1.tissue(0, 64)
    choices = {"best": ("best",), "three": ("middle", "largest", "best")}[outputs]
    points, passes, decode = np.full((5, 7, 2), 30), [], sam.decode

    def noted(model, features, xy, *args, **settings):
        passes.append((xy.shape, settings["outputs"], settings["side"] is not None))
        return decode(model, features, xy, *args, **settings)

    monkeypatch.setattr(sam, "decode", noted)
    bench_phase1.ask(model, image, points, None, choices)
    made = sorted(passes)
    passes.clear()
    bench_phase1.bare(model, image, 35, None, outputs)
    assert sorted(passes) == made and made[0][1] == outputs


def test_batches_are_compared_at_full_size(capsys):
    table = bench_phase1.main(["--side", "64", "--batches", "1", "32", "--repeats", "1"])
    assert list(table.index) == [1, 32] and (table["ms/prompt"] > 0).all()
    assert (table["prompts"] % (table.index * table["at once"]) == 0).all()
    assert "default batch 32" in capsys.readouterr().out


def test_memory_is_measured_after_each_number_of_images(monkeypatch, capsys):
    monkeypatch.setattr(bench_memory, "alone", lambda work, *args: work(*args))
    table = bench_memory.main([*TINY, "--images", "1", "3", "--image-size", "64"])
    assert "MB = 10^6 bytes above the loaded model" in capsys.readouterr().out
    assert list(table["images"]) == [1, 1, 1, 3]
    assert list(table["prompts/image"][:2]) == [12, 12]
    assert (table[["s/image", "CPU s/image"]] > 0).all(axis=None)
    assert (table["peak MB"] >= table["resident MB"]).all()


@pytest.mark.parametrize("n", [1, 7, 12, 30])
def test_cells_of_the_large_image(n):
    labels = bench_memory.cells(64, n)
    assert labels.shape == (64, 64) and (np.bincount(labels.ravel()) > 0).sum() == n
    assert labels[0, 0] == 0 and labels[-1, -1] == n - 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_a_large_image_takes_little_memory_whatever_its_parent_holds():
    held = b"x" * 2**30
    image, choices = bench_phase1.tissue(0, 1024), anchors.prompt.__kwdefaults__["mask_choice"]
    loading = ("small", False, "cpu")
    (row,) = measure.alone(bench_memory.large, loading, image, 30, 15, choices)
    assert len(held) and row["prompts/image"] == 450
    assert 50 < row["peak MB"] < 700


def test_segments_are_measured_on_own_images(annotated, capsys):
    table = bench_segments.main(
        ["--dataset", "folder", "--root", str(annotated), "--every", "2", "--image-size", "64"]
    )
    assert "folder, 1 images" in capsys.readouterr().out
    assert table.index[0] == "anchors" and len(table) == 15
    assert table["recall at 0.5"].between(0, 1).all() and table["glands"].nunique() == 1
    number = table["segments"]
    assert number["SLIC, merged"] == pytest.approx(number["anchors"], rel=0.05)
    assert table.loc["anchors", "mean best IoU"] > table.loc["Felzenszwalb", "mean best IoU"]


def test_images_without_masks_are_refused(annotated):
    rows = pd.read_csv(annotated / "images.csv").drop(columns="mask")
    rows.to_csv(annotated / "images.csv", index=False)
    with pytest.raises(SystemExit, match="'folder' has no annotated image"):
        bench_segments.main(["--dataset", "folder", "--root", str(annotated), "--image-size", "64"])


def test_replacements_need_a_run(capsys):
    bench_replacement.main(["--run", "nowhere"])
    assert "run 'nowhere' has no pool: make run RUN=nowhere" in capsys.readouterr().out


def test_moved_crops():
    tissue = phantom.render(0, size=(64, 72), microns_per_pixel=3.0)
    mask = np.zeros((64, 72), bool)
    mask[20:41, 25:52] = True
    moves = bench_replacement.MOVES
    still = bench_replacement.moved(tissue.image, mask, moves["as they are"](0.3))
    np.testing.assert_array_equal(still, features.crop(tissue.image, mask))
    half = bench_replacement.moved(tissue.image, mask, moves["turned"](np.pi))
    assert np.abs(half.astype(int) - still[::-1, ::-1]).mean() < 2
    for name, area in {"stretched by 1.12": 1, "enlarged by 1.25": 1.25**2}.items():
        assert np.linalg.det(moves[name](0.7)) == pytest.approx(area)


def test_every_change_is_of_a_setting_of_chapter_04():
    settings = bench_replacement.settings()
    assert settings["feather"] == bench_replacement.WIDTH
    for change in bench_replacement.CHANGES.values():
        assert change.keys() <= settings.keys()
        assert not change or settings | change != settings


def test_healing_starts_from_the_settings_of_chapter_06():
    settings = bench_replacement.healing()
    assert settings["strength"] == execute.parameters_cell("06_synthesis")["synthesis_strength"]
    image, unknown = np.full((1, 32, 40, 3), 150, np.uint8), np.zeros((1, 32, 40), bool)
    unknown[:, 10:20, 10:20] = True
    model, seen = latent.load_latent_diffusion(), []
    for change in bench_replacement.HEALINGS.values():
        if change is not None:
            assert not change or {"ramp": 2} | settings | change != {"ramp": 2} | settings
            seen.append(diffusion.inpaint(model, image, unknown, generator=0, **settings | change))
    assert len(np.unique(np.concatenate(seen), axis=0)) == len(seen)


def test_half_the_contrast_is_half_the_gradient_of_the_same_line():
    rng = np.random.default_rng(0)
    originals, masks, pictures = [], [], []
    for k in range(6):
        original = rng.integers(100, 156, (60, 70, 3)).astype(np.uint8)
        mask = np.zeros((60, 70), bool)
        mask[15:45, 20 + k : 50] = k > 0  # the first has no outline
        originals.append(original)
        masks.append(mask)
        pictures.append((128 + (original.astype(int) - 128) // 2).astype(np.uint8))
    targets = [f"{k // 2}" for k in range(6)]
    off, low, high = bench_replacement.off_the_line(pictures, originals, masks, targets)
    assert -52 < low <= off <= high < -48
    assert bench_replacement.off_the_line(originals, originals, masks, targets) == (0, 0, 0)


@pytest.mark.parametrize("name", bench_replacement.MIXES)
def test_ways_to_mix_show_the_source_inside_and_the_target_outside(name):
    rng = np.random.default_rng(0)
    source, target = rng.integers(100, 150, (2, 90, 120, 3), dtype=np.uint8)
    mask = np.zeros((90, 120), bool)
    mask[20:70, 30:90] = True
    mix = bench_replacement.MIXES[name]
    before = source.copy(), target.copy()
    out = mix(source, target, mask)
    assert out.dtype == np.uint8 and out.shape == target.shape
    assert np.array_equal(source, before[0]) and np.array_equal(target, before[1])
    if name != "five levels":  # as wide as the picture
        np.testing.assert_array_equal(out[:8], target[:8])
    inner = out[40:50, 55:65].astype(float) - source[40:50, 55:65]
    assert np.abs(inner - inner.mean()).max() <= 4  # the texture of the source, up to its level
    assert np.abs(mix(source, source, mask).astype(int) - source).max() <= 1
