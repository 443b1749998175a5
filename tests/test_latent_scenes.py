import numpy as np
import pytest
import torch
from PIL import Image

from helpers import latent_scenes
from helpers.latent_scenes import Scenes, colour_jitter, held_out, prepare, scene, texture


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
