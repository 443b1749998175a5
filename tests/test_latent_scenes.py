import numpy as np
import pytest
import torch
from PIL import Image

from helpers import latent_scenes
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


def test_held_out_phantoms_cover_grades_sites_and_stains():
    assert held_out(3, size=32).shape == (3, 32, 32, 3)


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
    Image.fromarray(np.zeros((70, 130, 3), np.uint8)).save(tmp_path / "a" / "wide.png")
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "small.png")
    assert len(Scenes(tmp_path, size=32)) == 2 * 4 + 1
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="no images in"):
        Scenes(tmp_path / "none")


def test_stain_jitter_keeps_structure_and_range():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 16, 16, generator=generator) * 2 - 1
    assert torch.equal(colour_jitter(x, 0.0), x)
    y = colour_jitter(x, 1.0, generator=generator)
    assert y.shape == x.shape and float(y.min()) >= -1 and float(y.max()) <= 1
    assert not torch.allclose(x, y)
