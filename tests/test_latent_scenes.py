from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import latent_scenes, phantom
from helpers.latent_scenes import (
    Scenes,
    colour_jitter,
    drawing_weights,
    held_out,
    prepare,
    scene,
    texture,
)


def test_scenes_are_determined_by_seed_and_index():
    assert np.array_equal(scene(3, seed=1, size=48), scene(3, seed=1, size=48))
    assert not np.array_equal(scene(3, seed=1, size=48), scene(4, seed=1, size=48))
    assert not np.array_equal(scene(3, seed=1, size=48), scene(3, seed=2, size=48))


def test_textures_are_images_with_structure():
    for k in range(5):
        image = texture(np.random.default_rng(k), 40)
        assert image.shape == (40, 40, 3) and image.dtype == np.uint8 and image.std() > 3
        assert np.array_equal(image, texture(np.random.default_rng(k), 40))
        assert not np.array_equal(image, texture(np.random.default_rng(k + 1), 40))


def test_held_out_phantoms_cover_grades_sites_and_stains(monkeypatch):
    asked = []

    def render(index, **given):
        asked.append({"index": index, **given})
        return SimpleNamespace(image=np.full((*given["size"], 3), index, np.uint8))

    monkeypatch.setattr(latent_scenes.phantom, "render", render)
    images = held_out(24, size=32)
    assert images.shape == (24, 32, 32, 3) and images[:, 0, 0, 0].tolist() == list(range(24))
    grades = {(organ, g) for organ, each in phantom.GRADES.items() for g in each}
    assert {(a["organ"], a["grade"], a["site"]) for a in asked} == {
        (*pair, site) for pair in grades for site in phantom.SITES
    }
    assert [a["stain"] for a in asked].count("IHC") == 4
    assert len({a["patient"] for a in asked}) == 24
    held = {(a["seed"], a["index"]) for a in asked}
    asked.clear()
    for i in range(24):
        scene(i, seed=0, size=32, textures=0.0)
    assert not held & {(a["seed"], a["index"]) for a in asked}


def test_prepare_keeps_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(latent_scenes, "_SHARD", 2)
    monkeypatch.setattr(latent_scenes, "scene", lambda i, **_: np.full((8, 8, 3), i, np.uint8))
    prepare(tmp_path, 4, log=lambda _: None)
    np.save(tmp_path / "shard_0000.npy", np.full((2, 8, 8, 3), 99, np.uint8))
    (tmp_path / "shard_0001.npy").unlink()
    prepare(tmp_path, 4, log=lambda _: None)
    scenes = Scenes(tmp_path)
    assert [int(scenes[i][0, 0, 0]) for i in range(len(scenes))] == [99, 99, 2, 3]
    with pytest.raises(IndexError):
        scenes[4]


def test_prepare_refuses_scenes_of_another_seed_or_share(tmp_path, monkeypatch):
    monkeypatch.setattr(latent_scenes, "_SHARD", 2)
    monkeypatch.setattr(
        latent_scenes, "scene", lambda i, seed, **_: np.full((8, 8, 3), 9 * seed + i, np.uint8)
    )
    prepare(tmp_path, 2, seed=0, log=lambda _: None)
    with pytest.raises(ValueError, match=r"\(seed was 0, is now 3\): work in another folder"):
        prepare(tmp_path, 4, seed=3, log=lambda _: None)
    with pytest.raises(ValueError, match=r"\(textures was 0\.15, is now 0\.5\)"):
        prepare(tmp_path, 4, textures=0.5, log=lambda _: None)
    prepare(tmp_path, 4, seed=0, log=lambda _: None)
    assert [int(image[0, 0, 0]) for image in Scenes(tmp_path)] == [0, 1, 2, 3]


def test_the_first_scenes_of_a_folder_are_taken_if_so_many_are_asked_for(tmp_path):
    for k in range(3):
        np.save(tmp_path / f"shard_{k:04d}.npy", np.full((2, 8, 8, 3), k, np.uint8))
    scenes = Scenes(tmp_path, n=3)
    scenes.refresh()
    assert len(scenes) == 3 and len(scenes.parts) == 2
    assert [int(image[0, 0, 0]) for image in scenes] == [0, 0, 1]
    assert len(Scenes(tmp_path, n=9)) == 6
    for i in (3, -1):
        with pytest.raises(IndexError):
            scenes[i]


def test_scenes_end_where_a_shard_is_missing(tmp_path):
    """The position of a scene is its number, which says what it shows."""
    for k in (0, 1, 3):
        np.save(tmp_path / f"shard_{k:04d}.npy", np.full((2, 8, 8, 3), k, np.uint8))
    scenes = Scenes(tmp_path)
    assert [int(image[0, 0, 0]) for image in scenes] == [0, 0, 1, 1]
    np.save(tmp_path / "shard_0002.npy", np.full((2, 8, 8, 3), 2, np.uint8))
    scenes.refresh()
    assert [int(image[0, 0, 0]) for image in scenes] == [0, 0, 1, 1, 2, 2, 3, 3]
    (tmp_path / "shard_0000.npy").unlink()
    with pytest.raises(FileNotFoundError, match="no images in"):
        Scenes(tmp_path)


@pytest.mark.parametrize("seed", [0, 3])
def test_drawing_weights_are_those_of_what_the_scenes_show(seed, monkeypatch):
    class Drawn:
        def __init__(self, stain):
            self.image = stain

    monkeypatch.setattr(latent_scenes, "texture", lambda *_: "texture")
    monkeypatch.setattr(latent_scenes.phantom, "render", lambda *_, stain, **__: Drawn(stain))
    shown = [scene(i, seed=seed, textures=0.3) for i in range(60)]
    assert set(shown) == {"texture", "HE", "IHC"}
    times = drawing_weights(60, seed=seed, textures=0.3, ihc=3)
    assert times.tolist() == [{"texture": 0, "HE": 1, "IHC": 3}[kind] for kind in shown]


def test_own_images_are_cut_into_fields(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.zeros((140, 260, 3), np.uint8)).save(tmp_path / "a" / "wide.png")
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / "small.png")
    (tmp_path / "._small.png").write_bytes(b"what another system keeps of it")
    assert len(Scenes(tmp_path, size=64)) == 2 * 4 + 1
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="no images in"):
        Scenes(tmp_path / "none")


def test_own_images_that_would_be_read_otherwise_than_they_look_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    clear = rng.integers(0, 256, (40, 60, 4), dtype=np.uint8)
    pictures = {
        "deep": Image.fromarray(rng.integers(0, 2**16, (40, 60), dtype=np.uint16)),
        "clear": Image.fromarray(clear),
    }
    for name, picture in pictures.items():
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / "own.png")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "own.png").write_bytes(b"no picture")
    for name, reason in (("deep", "has mode I;16"), ("clear", "has transparent pixels"),
                         ("broken", "cannot be read as an image")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{name}.own\.png {reason}"):
            Scenes(tmp_path / name)


@pytest.mark.parametrize("n", [1, 3, 5, 9])
def test_images_are_spread_evenly(n):
    images = np.arange(5, dtype=np.uint8).repeat(48).reshape(5, 4, 4, 3)
    found = Scenes(images).spread(n)[:, 0, 0, 0]
    assert found.tolist() == {1: [0], 3: [0, 2, 4]}.get(n, [0, 1, 2, 3, 4])


def test_stain_jitter_keeps_structure_and_range():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 16, 12, generator=generator) * 2 - 1
    assert torch.equal(colour_jitter(x, 0.0), x)
    y = colour_jitter(x, 1.0, generator=generator)
    assert y.shape == x.shape and float(y.min()) >= -1 and float(y.max()) <= 1
    assert not torch.allclose(x, y)


def test_stain_jitter_is_one_affine_map_of_the_optical_density_of_an_image():
    """Fitted by least squares to the densities before and after, and another for each image."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(3, 3, 16, 12, generator=generator) * 1.2 - 1
    y = colour_jitter(x, 0.3, generator=generator)
    maps = []
    for before, after in zip(x, y, strict=True):
        grey = [((z + 1) / 2).clamp_min(1 / 255).flatten(1).T.double() for z in (before, after)]
        there = ((grey[1] > 1.1 / 255) & (grey[1] < 1)).all(1)  # where nothing was clipped
        density = [-g.log()[there].numpy() for g in grey]
        design = np.column_stack([density[0], np.ones(len(density[0]))])
        found, *_ = np.linalg.lstsq(design, density[1], rcond=None)
        np.testing.assert_allclose(design @ found, density[1], atol=1e-4)
        assert np.abs(found[:3] / np.trace(found[:3]) * 3 - np.eye(3)).max() < 0.3
        maps.append(found)
    assert not np.allclose(maps[0], maps[1], atol=0.02)
