"""Training of the latent diffusion model: images, a few steps, resuming, export."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import train_latent
from helpers.latent import load_autoencoder, load_latent_diffusion
from helpers.train_latent import (
    AutoencoderRecipe,
    AutoencoderTrainer,
    Scenes,
    UNetRecipe,
    UNetTrainer,
    colour_jitter,
    encode_scenes,
    held_out,
    prepare,
    scene,
    score_autoencoder,
    texture,
)

AE = AutoencoderRecipe(steps=4, channels=(8, 16), crop=32, batch=2, warmup=2, bf16=False)
UNET = UNetRecipe(steps=4, channels=(32, 32, 32), batch=2, warmup=2, bf16=False)


@pytest.fixture(scope="module")
def images():
    return np.stack([scene(i, size=64) for i in range(6)])


# --- images ---------------------------------------------------------------------------------------


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
    monkeypatch.setattr(train_latent, "_SHARD", 2)
    monkeypatch.setattr(train_latent, "scene", lambda i, **_: np.full((8, 8, 3), i, np.uint8))
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


# --- training -------------------------------------------------------------------------------------


def test_autoencoder_learns_resumes_and_is_exported(images, tmp_path):
    checkpoint, path = tmp_path / "autoencoder.pt", tmp_path / "autoencoder.safetensors"
    lines = []
    whole = AutoencoderTrainer(AE, Scenes(images), test=images[:2])
    whole.run(every=2, score_every=2, log=lines.append)
    assert [json.loads(line)["step"] for line in lines] == [2, 4]
    assert {"loss", "l1", "psnr", "ssim"} <= set(json.loads(lines[-1]))

    first = AutoencoderTrainer(AE, Scenes(images))
    for _ in range(2):
        first.advance()
    first.save(checkpoint)
    second = AutoencoderTrainer(AE, Scenes(images))
    command = "python -m helpers.train_latent autoencoder"
    second.run(checkpoint=checkpoint, every=2, score_every=2, log=None,
               export=lambda t: t.export(path, command))  # fmt: skip
    for key, value in whole.average.items():
        torch.testing.assert_close(second.average[key], value)

    model = load_autoencoder(path)
    with torch.no_grad():
        z = encode_scenes(model, Scenes(images))
    assert abs(float(z.float().mean())) < 0.1 and float(z.float().std()) == pytest.approx(
        1, abs=0.1
    )
    card = path.with_suffix(".md").read_text()
    for word in (
        "| seed | 0 |",
        "SHA-256",
        "licence",
        "python -m helpers.train_latent autoencoder",
    ):
        assert word in card
    assert json.loads(path.with_suffix(".json").read_text())["curve"]


def test_unet_learns_resumes_and_is_exported(images, tmp_path):
    ae = AutoencoderTrainer(AE, Scenes(images))
    ae.export(tmp_path / "autoencoder.safetensors", "command")
    first = load_autoencoder(tmp_path / "autoencoder.safetensors")
    z = encode_scenes(first, Scenes(images), views=2, jitter=0.2)
    assert z.shape == (12, 4, 16, 16)
    assert torch.equal(z, encode_scenes(first, Scenes(images), views=2, jitter=0.2))

    whole = UNetTrainer(UNET, first, z, test=z[:3].float()).run(every=2, score_every=2, log=None)
    assert "held_out_loss" in whole.curve[-1]
    half = UNetTrainer(UNET, first, z)
    for _ in range(2):
        half.advance()
    half.save(tmp_path / "unet.pt")
    rest = UNetTrainer(UNET, first, z).run(
        checkpoint=tmp_path / "unet.pt", every=2, score_every=2, log=None,
        export=lambda t: t.export(tmp_path / "unet.safetensors", "command"),
    )  # fmt: skip
    for key, value in whole.average.items():
        torch.testing.assert_close(rest.average[key], value)
    model = load_latent_diffusion(tmp_path)
    assert model.prediction == "v_prediction" and model.multiple == 32
    with pytest.raises(ValueError, match="no checkpoint of the autoencoder"):
        AutoencoderTrainer(AE, Scenes(images)).resume(tmp_path / "unet.pt")


def test_training_lowers_the_loss(images):
    recipe = AutoencoderRecipe(steps=60, channels=(16, 16), crop=32, batch=4, warmup=5, bf16=False,
                               jitter=0.0, rate=3e-3)  # fmt: skip
    trainer = AutoencoderTrainer(recipe, Scenes(images)).run(every=10, score_every=100, log=None)
    assert trainer.curve[-1]["l1"] < 0.85 * trainer.curve[0]["l1"]
    assert set(score_autoencoder(trainer.latent_diffusion(), images[:1])) == {"psnr", "ssim"}


def test_time_limit_ends_the_run(images):
    recipe = AutoencoderRecipe(**{**AE.__dict__, "steps": 10**6, "minutes": 1e-4})
    assert AutoencoderTrainer(recipe, Scenes(images)).run(log=None).step < 50


def test_nan_stops_with_a_reason(images):
    trainer = AutoencoderTrainer(AE, Scenes(images))
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="loss is nan at step 0"):
        trainer.advance()


def test_command_line_trains_on_a_folder(images, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.png")
    monkeypatch.setattr(train_latent, "held_out", lambda n=2: images[:2])
    arguments = ["--work", str(tmp_path), "--images", str(folder), "--steps", "1", "--threads", "1"]
    train_latent.main(
        ["autoencoder", *arguments, "--weights", str(tmp_path / "autoencoder.safetensors")]
    )
    train_latent.main(
        ["unet", *arguments, "--weights", str(tmp_path / "unet.safetensors"),
         "--autoencoder", str(tmp_path / "autoencoder.safetensors")]
    )  # fmt: skip
    assert (tmp_path / "unet.safetensors").exists()
    assert "held_out_loss" in capsys.readouterr().out
