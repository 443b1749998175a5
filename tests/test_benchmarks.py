"""The benchmarks that own images may be measured with; the others only print times."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from helpers import diffusion, execute, features, latent, phantom
from tests.benchmarks import __main__, bench_replacement, bench_segments


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
    assert "'measure': there are bench_phase1, bench_phase2, bench_pool" in said


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
