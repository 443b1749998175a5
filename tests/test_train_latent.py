"""Training of the latent diffusion model: images, a few steps, resuming, export."""

import hashlib
import json
import sys
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import uniform_filter

from helpers import latent_scenes, train_latent
from helpers.latent import load_autoencoder, load_latent_diffusion
from helpers.latent_scenes import Scenes, drawing_weights, prepare, scene
from helpers.train_latent import (
    AutoencoderRecipe,
    AutoencoderTrainer,
    DecoderRecipe,
    DecoderTrainer,
    Discriminator,
    UNetRecipe,
    UNetTrainer,
    contrast_loss,
    encode_scenes,
    even_times,
    local_contrast,
    main,
    pixel_losses,
    score_autoencoder,
)
from helpers.training import machine, say

AE = AutoencoderRecipe(steps=4, channels=(8, 16), crop=32, batch=2, warmup=2, bf16=False)
DECODER = DecoderRecipe(steps=4, crop=32, batch=2, warmup=2)
UNET = UNetRecipe(steps=4, channels=(32, 32, 32), batch=2, warmup=2, bf16=False)


@pytest.fixture(scope="module")
def images():
    return np.stack([scene(i, size=64) for i in range(6)])


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
    with pytest.raises(FileNotFoundError, match="latent checkpoint 'nowhere'"):
        UNetTrainer(replace(UNET, start="nowhere"), first, z)
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


@pytest.mark.parametrize("n", [4, 24, 48])
def test_held_out_times_are_spread_over_the_schedule_and_go_with_no_image(n):
    t = even_times(n, 1000)
    assert torch.equal(t, even_times(n, 1000))
    quantiles = [(2 * k + 1) * 1000 // (2 * n) for k in range(n)]
    assert sorted(t.tolist()) == quantiles and t.tolist() != quantiles
    if n == 48:
        assert abs(np.corrcoef(np.arange(n), t)[0, 1]) < 0.2
        assert abs(float(t[5::6].float().mean()) - 500) < 100  # those of the IHC images


def test_the_latest_time_that_can_be_drawn_is_the_last_of_the_schedule(pair, monkeypatch):
    """In single precision n - 1 and the largest number below 1 make n."""
    rand, seen = torch.rand, []
    monkeypatch.setattr(torch, "rand", lambda *n, **_: torch.full(n, 1 - 2**-24))

    def loss(network, z, alphas, *, t, **_):
        seen.append(t)
        return rand(len(z))

    monkeypatch.setattr(train_latent, "dsm_loss", loss)
    UNetTrainer(replace(UNET, batch=8), pair, torch.zeros(2, 4, 16, 16)).loss()
    assert len(seen[0]) == 8 and int(seen[0].max()) == 999


def test_held_out_loss_is_that_of_times_spread_evenly(pair, monkeypatch):
    seen = []

    def loss(network, z, alphas, *, t, **_):
        seen.append(t)
        return torch.zeros(len(z))

    monkeypatch.setattr(train_latent, "dsm_loss", loss)
    trainer = UNetTrainer(UNET, pair, torch.zeros(2, 4, 16, 16), test=torch.zeros(48, 4, 16, 16))
    trainer.evaluate()
    assert np.quantile(seen[0], [0, 0.25, 0.5, 0.75, 1]) == pytest.approx(
        [10, 250, 500, 750, 989], abs=8
    )


def test_training_lowers_the_loss(images):
    recipe = AutoencoderRecipe(steps=60, channels=(16, 16), crop=32, batch=4, warmup=5, bf16=False,
                               jitter=0.0, rate=3e-3)  # fmt: skip
    trainer = AutoencoderTrainer(recipe, Scenes(images)).run(every=10, score_every=100, log=None)
    assert trainer.curve[-1]["l1"] < 0.85 * trainer.curve[0]["l1"]
    scores = score_autoencoder(trainer.latent_diffusion(), images[:1])
    assert set(scores) == {"psnr", "ssim", "sharpness"}
    assert scores["sharpness"] < 1  # sixty steps make smooth pictures


def test_pixel_losses_are_means_over_pixels_and_over_neighbours():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 2, 3, 5, 7, generator=generator)
    l1, edges = pixel_losses(a, b)
    d = (a - b).numpy()
    across = np.mean([abs(d[n, c, y, x + 1] - d[n, c, y, x]) for n in range(2) for c in range(3)
                      for y in range(5) for x in range(6)])  # fmt: skip
    down = np.mean([abs(d[n, c, y + 1, x] - d[n, c, y, x]) for n in range(2) for c in range(3)
                    for y in range(4) for x in range(7)])  # fmt: skip
    assert float(l1) == pytest.approx(abs(d).mean(), rel=1e-5)
    assert float(edges) == pytest.approx(across + down, rel=1e-5)


def test_local_contrast_is_the_rms_of_two_bands_of_detail():
    x = torch.rand(2, 3, 11, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = local_contrast(x, window=5)
    for n in range(2):
        for c in range(3):
            rest = x[n, c].double().numpy()
            for side, band in zip((3, 5), found, strict=True):
                smooth = uniform_filter(rest, side, mode="mirror")
                detail, rest = rest - smooth, smooth
                expected = [
                    [np.sqrt((detail[i : i + 5, j : j + 5] ** 2).mean() + 1e-5)
                     for j in range(0, 12, 2)] for i in range(0, 7, 2)
                ]  # fmt: skip
                np.testing.assert_allclose(band[n, c].numpy(), expected, rtol=1e-4)


def test_local_contrast_asks_how_strong_a_grain_is_not_where_it_lies():
    def error(a, b):
        return float(contrast_loss(a, b))

    x, other = torch.randn(2, 1, 3, 40, 56, generator=torch.Generator().manual_seed(0)) * 0.2
    mean = torch.zeros_like(x)
    assert (mean - x).abs().mean() < 0.8 * (other - x).abs().mean()  # an error of pixels: the mean
    assert error(other, x) < 0.2 * error(mean, x)  # an error of contrast: any grain of its kind
    assert error(x + 0.3, x) < 1e-5
    assert error(2 * x, x) == pytest.approx(
        sum(float(b.mean()) for b in local_contrast(x)), rel=2e-2
    )
    assert torch.isfinite(
        torch.autograd.grad(sum(b.sum() for b in local_contrast(mean.requires_grad_())), mean)[0]
    ).all()


# --- second round of the decoder ------------------------------------------------------------------


@pytest.fixture
def pair(images, tmp_path):
    """A small autoencoder and noise network, saved and loaded."""
    stage = AutoencoderTrainer(AE, Scenes(images))
    stage.export(tmp_path / "autoencoder.safetensors", "command")
    first = load_autoencoder(tmp_path / "autoencoder.safetensors")
    z = torch.zeros(2, 4, 16, 16).half()
    UNetTrainer(UNET, first, z).export(tmp_path / "unet.safetensors", "command")
    return load_latent_diffusion(tmp_path)


def test_a_noise_network_belongs_to_its_encoder(pair, images, tmp_path):
    DecoderTrainer(DECODER, pair, Scenes(images)).export(
        tmp_path / "autoencoder.safetensors", "command"
    )
    load_latent_diffusion(tmp_path)  # another decoder is fine
    other = AutoencoderTrainer(replace(AE, seed=AE.seed + 1), Scenes(images))
    other.export(tmp_path / "autoencoder.safetensors", "command")
    with pytest.raises(ValueError, match=r"latents of another autoencoder .* keep the files"):
        load_latent_diffusion(tmp_path)


def test_decoder_learns_resumes_and_leaves_the_encoder_alone(pair, images, tmp_path):
    encoder = {k: v.clone() for k, v in pair.autoencoder.state_dict().items() if "encoder" in k}
    decoder = pair.autoencoder.decoder.conv_out.weight.clone()
    copies = [load_latent_diffusion(tmp_path) for _ in range(2)]
    whole = DecoderTrainer(DECODER, pair, Scenes(images), test=images[:2])
    whole.run(every=2, score_every=2, log=None)
    assert {"l1", "contrast", "hinge", "match", "fool", "psnr", "sharpness"} <= set(whole.curve[-1])
    half = DecoderTrainer(DECODER, copies[0], Scenes(images))
    for _ in range(2):
        half.advance()
    half.save(tmp_path / "decoder.pt")
    rest = DecoderTrainer(DECODER, copies[1], Scenes(images)).run(
        checkpoint=tmp_path / "decoder.pt", every=2, score_every=2, log=None,
        export=lambda t: t.export(tmp_path / "new.safetensors", "command"),
    )  # fmt: skip
    for key, value in whole.average.items():
        torch.testing.assert_close(rest.average[key], value)
    new = load_autoencoder(tmp_path / "new.safetensors").autoencoder
    for key, value in encoder.items():
        torch.testing.assert_close(new.state_dict()[key], value)
    assert not torch.equal(new.decoder.conv_out.weight, decoder)
    log = json.loads((tmp_path / "decoder.json").read_text())
    assert log["recipe"]["adversarial"] > 0 and log["curve"]


def test_second_round_is_added_to_the_card_once(pair, images, tmp_path):
    path = tmp_path / "autoencoder.safetensors"
    before = path.with_suffix(".md").read_text()
    trainer = DecoderTrainer(replace(DECODER, alone=0), pair, Scenes(images))
    for _ in range(2):
        trainer.advance()
        trainer.export(path, "python -m helpers.train_latent decoder")
    card = path.with_suffix(".md").read_text()
    assert card.startswith(before.split("| SHA-256")[0])
    assert card.count("## Second round") == card.count("train_latent decoder") == 1
    assert hashlib.sha256(path.read_bytes()).hexdigest() in card


@pytest.mark.parametrize("bf16", [False, True])
def test_all_networks_train_in_the_precision_of_the_recipe(pair, images, bf16):
    scenes, seen = Scenes(images), []
    mixed = {"bf16": bf16}
    trainers = [
        AutoencoderTrainer(replace(AE, **mixed), scenes),
        UNetTrainer(replace(UNET, **mixed), pair, torch.zeros(2, 4, 16, 16)),
        DecoderTrainer(replace(DECODER, smoothed=0.0, sampled=0.0, **mixed), pair, scenes),
    ]
    layers = trainers[0].model.decoder, trainers[1].model, pair.autoencoder.decoder
    for trainer, layer in zip(trainers, layers, strict=True):
        layer.conv_in.register_forward_hook(lambda layer, given, out: seen.append(out.dtype))
        trainer.loss()
    assert seen == [torch.bfloat16 if bf16 else torch.float32] * 3


def test_decoder_sees_a_share_of_latents_noised_and_denoised(pair, images):
    x = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    exact = pair.encode(x)
    none = DecoderTrainer(DecoderRecipe(smoothed=0.0, sampled=0.0), pair, Scenes(images))
    torch.testing.assert_close(none._latents(x)[0], exact)
    some = DecoderTrainer(DecoderRecipe(smoothed=0.5, sampled=0.0), pair, Scenes(images))
    changed = ((some._latents(x)[0] - exact).abs().flatten(1).amax(1) > 1e-3).float().mean()
    assert 0.2 < float(changed) < 0.8


def test_decoder_sees_a_share_of_latents_as_sampling_leaves_them(pair, images):
    x = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    exact = pair.encode(x)
    recipe = DecoderRecipe(smoothed=0.0, sampled=0.5, strength_max=0.1)
    z, made = DecoderTrainer(recipe, pair, Scenes(images))._latents(x)
    moved = (z - exact).abs().flatten(1).amax(1) > 1e-3
    assert 3 < made < 17 and moved.tolist() == [i < made for i in range(20)]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_decoder_trains_with_all_or_no_latents_sampled(pair, images, share):
    recipe = replace(DECODER, smoothed=0.0, sampled=share, alone=0)
    losses = DecoderTrainer(recipe, pair, Scenes(images)).advance()
    assert all(np.isfinite(value) for value in losses.values())
    assert (losses["match"] == 0) == (share == 1)


def test_decoder_refuses_shares_beyond_one(pair, images):
    with pytest.raises(ValueError, match=r"smoothed = 0.7 and sampled = 0.5 .* together at most 1"):
        DecoderTrainer(DecoderRecipe(smoothed=0.7, sampled=0.5), pair, Scenes(images))


def test_command_line_averages_decoders(pair, images, tmp_path):
    files = [tmp_path / name / "autoencoder.safetensors" for name in ("one", "two")]
    for seed, file in enumerate(files):
        trainer = DecoderTrainer(replace(DECODER, seed=seed, alone=0), pair, Scenes(images))
        trainer.advance()
        file.parent.mkdir()
        trainer.export(file, "command")
    out = tmp_path / "mean.safetensors"
    main(["decoder", "--average", *map(str, files), "--weights", str(out)])
    one, two, mean = (load_autoencoder(file).state_dict() for file in (*files, out))
    for key, value in mean.items():
        torch.testing.assert_close(value, (one[key] + two[key]) / 2, rtol=2e-3, atol=1e-5)


def test_decoder_balances_its_losses_at_the_last_layer(pair, images):
    trainer = DecoderTrainer(DECODER, pair, Scenes(images))
    weight = trainer.latents.autoencoder.decoder.conv_out.weight
    one, three = weight.square().sum(), 3 * weight.square().sum()
    assert float(trainer._balance(one, three)) == pytest.approx(1 / 3, rel=1e-4)


def test_decoder_needs_a_noise_network_for_smoothed_latents(images, tmp_path):
    AutoencoderTrainer(AE, Scenes(images)).export(tmp_path / "autoencoder.safetensors", "command")
    first = load_autoencoder(tmp_path / "autoencoder.safetensors")
    with pytest.raises(ValueError, match=r"smoothed = 0.2, .* needs a noise network"):
        DecoderTrainer(DECODER, first, Scenes(images))


def test_discriminator_learns_to_tell_sharp_from_blurred():
    torch.manual_seed(0)
    judge, generator = Discriminator((8, 8, 8)), torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(judge.parameters(), 1e-2)
    for _ in range(60):
        sharp = torch.rand(4, 3, 32, 32, generator=generator) * 2 - 1
        blurred = torch.nn.functional.avg_pool2d(sharp, 3, 1, 1)
        loss = (1 - judge(sharp)).relu().mean() + (1 + judge(blurred)).relu().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        assert float(judge(sharp).mean()) > float(judge(blurred).mean()) + 0.5
    assert len(judge.features(sharp)) == 4


def test_time_limit_ends_the_run(images):
    recipe = AutoencoderRecipe(**{**AE.__dict__, "steps": 10**6, "minutes": 1e-4})
    assert AutoencoderTrainer(recipe, Scenes(images)).run(log=None).step < 50


def test_nan_stops_with_a_reason(images):
    trainer = AutoencoderTrainer(AE, Scenes(images))
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="loss is nan at step 0"):
        trainer.advance()


def test_a_card_says_what_was_measured_and_on_what(images, tmp_path):
    checkpoint, path = tmp_path / "autoencoder.pt", tmp_path / "autoencoder.safetensors"
    scenes, card = Scenes(images), path.with_suffix(".md")

    def finished():
        AutoencoderTrainer(AE, scenes, test=images[:3]).run(
            checkpoint=checkpoint, log=None, export=lambda t: t.export(path, "command")
        )
        return card.read_text()

    trainer = AutoencoderTrainer(AE, scenes)
    for _ in range(AE.steps):
        trainer.advance()
    trainer.save(checkpoint)
    assert "| held-out score | not measured |" in finished() and "0.00 dB" not in card.read_text()
    trainer.curve = [{"step": 4, "psnr": 21.5, "ssim": 0.75}]
    trainer.save(checkpoint)
    assert "| held-out score | PSNR 21.50 dB, SSIM 0.750 on 3 phantoms" in finished()
    assert f"minutes on {machine('cpu')} |" in card.read_text()


@pytest.fixture
def small(images, tmp_path, monkeypatch):
    """Options of the command line for small drawn scenes and a small first stage."""
    monkeypatch.setattr(latent_scenes, "_SHARD", 4)
    draw = latent_scenes.scene
    monkeypatch.setattr(latent_scenes, "scene", lambda i, **given: draw(i, size=64, **given))
    monkeypatch.setattr(train_latent, "held_out", lambda n=2: images[:2])
    first = tmp_path / "autoencoder.safetensors"
    AutoencoderTrainer(AE, Scenes(images)).export(first, "command")
    return ["--work", str(tmp_path), "--scenes", "6", "--steps", "1", "--threads", "1",
            "--autoencoder", str(first)]  # fmt: skip


@pytest.mark.parametrize("seed", [0, 3])
def test_noise_network_sees_scenes_as_often_as_what_they_show_says(
    small, seed, tmp_path, monkeypatch
):
    prepare(tmp_path / "scenes", 8, seed=3, log=lambda _: None)
    seen = []
    monkeypatch.setattr(
        train_latent, "UNetTrainer", lambda recipe, first, z, **_: seen.append(z) or mock.Mock()
    )
    main(["unet", *small, "--seed", str(seed), "--no-prepare"])
    z = torch.load(tmp_path / "latents.pt")["z"]
    times = np.tile(drawing_weights(6, seed=3), 2)
    assert times.tolist() != np.tile(drawing_weights(6, seed=0), 2).tolist()
    assert torch.equal(seen[0], torch.cat([z[[i] * k] for i, k in enumerate(times)]))


def test_latents_are_kept_for_the_same_pictures_and_made_anew_if_damaged(pair, images, tmp_path):
    path, calls = tmp_path / "latents.pt", []

    def latents(scenes):
        return train_latent._cached_latents(path, pair, Scenes(scenes), UNET, calls.append)

    z = latents(images)
    assert torch.equal(latents(images), z) and len(calls) == UNET.views
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no latents"):
        path.write_bytes(damaged)
        assert torch.equal(latents(images), z) and path.read_bytes() == whole
    torch.save([1], path)
    assert torch.equal(latents(images), z)
    calls.clear()
    other = images.copy()
    other[2] = 255 - other[2]  # neither the first nor the last
    assert not torch.equal(latents(other), z) and calls
    assert not [file for file in tmp_path.iterdir() if "tmp" in file.name]


def test_the_first_stage_encodes_on_the_device_asked_for(small, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train_latent, "torch_device", lambda name: f"asked-for-{name}")
    monkeypatch.setattr(train_latent.LatentDiffusion, "to", lambda self, where: seen.append(where))
    monkeypatch.setattr(train_latent, "encode_scenes", mock.Mock())
    monkeypatch.setattr(train_latent, "_cached_latents", lambda *_: torch.zeros(12, 4, 16, 16))
    monkeypatch.setattr(train_latent, "UNetTrainer", mock.Mock())
    main(["unet", *small, "--device", "cpu"])
    assert seen == ["asked-for-cpu"]


def test_command_line_refuses_scenes_and_checkpoints_of_other_settings(small, images, tmp_path):
    new = ["--weights", str(tmp_path / "new.safetensors")]
    main(["autoencoder", *small, *new])
    with pytest.raises(ValueError, match=r"scenes holds scenes .*\(seed was 0, is now 3\)"):
        main(["unet", *small, *new, "--seed", "3"])
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(images[0]).save(folder / "0.png")
    own = [*new, "--images", str(folder)]
    with pytest.raises(ValueError, match="--scenes counts drawn scenes"):
        main(["autoencoder", *small, *own])
    at = small.index("--scenes")
    with pytest.raises(ValueError, match=r"autoencoder\.pt was .*images was None, is now '.*s'"):
        main(["autoencoder", *small[:at], *small[at + 2 :], *own])
    with pytest.raises(ValueError, match=r"goes on from a pair in one folder, autoencoder\."):
        main(["decoder", *small, *new, "--autoencoder", str(tmp_path / "new.safetensors")])
    assert "6 scenes drawn" in (tmp_path / "new.md").read_text()


def test_a_checkpoint_is_not_taken_up_on_another_first_stage(images, tmp_path):
    """What latents depend on counts; a decoder may have gone on meanwhile."""
    path, scenes = tmp_path / "unet.pt", Scenes(images)
    first, other = (
        AutoencoderTrainer(replace(AE, seed=seed), scenes).latent_diffusion() for seed in (0, 1)
    )
    z = torch.zeros(2, first.channels, 16, 16)
    UNetTrainer(UNET, first, z).save(path)
    with torch.no_grad():
        first.autoencoder.decoder.conv_out.bias.add_(1)
    UNetTrainer(UNET, first, z).resume(path)
    with pytest.raises(ValueError, match=r"unet\.pt was trained on another first stage: work in"):
        UNetTrainer(UNET, other, z).resume(path)
    plain, path = replace(DECODER, smoothed=0, sampled=0), tmp_path / "decoder.pt"
    DecoderTrainer(plain, other, scenes).save(path)
    with pytest.raises(ValueError, match=r"decoder\.pt was trained on another first stage"):
        DecoderTrainer(plain, first, scenes).resume(path)


@pytest.fixture
def folders(images, tmp_path):
    """Own images to train on (four) and to measure on (two), and options for a short training."""
    for i, image in enumerate(images):
        folder = tmp_path / ("own" if i < 4 else "unseen")
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    return ["--work", str(tmp_path), "--images", str(tmp_path / "own"), "--steps", "1",
            "--held-out", str(tmp_path / "unseen"), "--threads", "1"]  # fmt: skip


def test_own_images_are_held_out_and_named_in_the_card(folders, images, tmp_path, monkeypatch):
    monkeypatch.setattr(train_latent, "held_out", mock.Mock(side_effect=AssertionError))
    first = tmp_path / "autoencoder.safetensors"
    main(["autoencoder", *folders, "--weights", str(first)])
    scored = score_autoencoder(load_autoencoder(first), Scenes(tmp_path / "unseen").spread(9))
    text = first.with_suffix(".md").read_text()
    assert f"SSIM {scored['ssim']:.3f}" in text and f" on 2 images of {tmp_path / 'unseen'}" in text
    assert json.loads(first.with_suffix(".json").read_text())["recipe"]["held_out"]

    z = torch.zeros(2, 4, 16, 16)
    UNetTrainer(UNET, load_autoencoder(first), z).export(tmp_path / "unet.safetensors", "command")
    sharper = tmp_path / "new" / "autoencoder.safetensors"
    share = ["--smoothed", "0", "--sampled", "0"]
    main(["decoder", *folders, *share, "--autoencoder", str(first), "--weights", str(sharper)])
    added = sharper.with_suffix(".md").read_text()
    assert added.startswith(text.split("| SHA-256")[0]) and "Second round" in added
    assert hashlib.sha256(sharper.read_bytes()).hexdigest() in added


@pytest.mark.parametrize("terminal", [True, False])
def test_command_line_shows_a_bar_in_a_terminal_only(folders, monkeypatch, terminal):
    trainer = mock.Mock()
    monkeypatch.setattr(train_latent, "AutoencoderTrainer", lambda *_, **__: trainer)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    main(["autoencoder", *folders])
    given = trainer.run.call_args.kwargs
    assert given["progress"] == terminal and given["log"] is say


@pytest.mark.parametrize("inside", ["own", "own/part", "."])
def test_held_out_images_must_not_be_trained_on(folders, tmp_path, inside):
    (tmp_path / "own" / "part").mkdir()
    with pytest.raises(ValueError, match=r"held-out images in .* are among those to train on"):
        main(["autoencoder", *folders, "--held-out", str(tmp_path / inside)])


def test_command_line_refuses_settings_of_another_network(folders):
    with pytest.raises(ValueError, match="--start, --views: no setting of the decoder"):
        main(["decoder", *folders, "--views", "3", "--start", "small"])


def test_few_own_images_are_seen_in_many_views(folders, pair, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train_latent, "load_autoencoder", lambda *_, **__: pair)
    monkeypatch.setattr(train_latent, "encode_scenes", mock.Mock())
    monkeypatch.setattr(train_latent, "_cached_latents", lambda *given: seen.append(given[3].views))
    monkeypatch.setattr(train_latent, "UNetTrainer", mock.Mock())
    for options in ([], ["--views", "3"]):
        main(["unet", *folders, *options])
    assert seen == [250, 3]  # of four images, of which 1000 latents are wanted


def test_autoencoder_goes_on_from_weights_of_its_architecture(images, tmp_path):
    AutoencoderTrainer(AE, Scenes(images)).run(log=None).export(
        tmp_path / "autoencoder.safetensors", "command"
    )
    goes_on = AutoencoderTrainer(replace(AE, start=str(tmp_path), seed=5), Scenes(images))
    before = load_autoencoder(tmp_path / "autoencoder.safetensors").autoencoder.state_dict()
    for key, value in goes_on.model.state_dict().items():
        torch.testing.assert_close(value, before[key].float(), atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match=r"start = '.*' has another architecture .*\(8, 32\)"):
        AutoencoderTrainer(replace(AE, start=str(tmp_path), channels=(8, 32)), Scenes(images))


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
         "--autoencoder", str(tmp_path / "autoencoder.safetensors"), "--views", "2"]
    )  # fmt: skip
    assert (tmp_path / "unet.safetensors").exists()
    train_latent.main(
        ["decoder", *arguments, "--weights", str(tmp_path / "sharper.safetensors"),
         "--autoencoder", str(tmp_path / "autoencoder.safetensors")]
    )  # fmt: skip
    assert (tmp_path / "sharper.safetensors").exists() and (tmp_path / "decoder.json").exists()
    assert "held_out_loss" in capsys.readouterr().out
