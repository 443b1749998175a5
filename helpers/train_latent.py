"""Training of the small latent diffusion model: first the autoencoder, then the noise network.

``python -m helpers.train_latent autoencoder`` and ``python -m helpers.train_latent unet`` draw
tissue with :mod:`helpers.phantom`, train, measure, and write ``data/weights/autoencoder.*`` and
``unet.*``: weights (fp16 safetensors), training curve (JSON) and model card.
A run that was stopped goes on where it was; ``--images FOLDER`` trains on own images instead, and
``--held-out FOLDER`` measures on own images that the training does not see.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import pickle
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from helpers.config import torch_device
from helpers.diffusion import dsm_loss
from helpers.files import replacing
from helpers.latent import (
    AUTOENCODER_WEIGHTS,
    UNET_WEIGHTS,
    LatentDiffusion,
    build_autoencoder,
    build_unet,
    encoder_digest,
    load_autoencoder,
    load_latent_diffusion,
    psnr,
    save_weights,
    to_tensor,
    to_uint8,
    weights_digest,
)
from helpers.latent_scenes import (
    Scenes,
    colour_jitter,
    drawing_weights,
    held_out,
    prepare,
    random_crops,
    turn,
)
from helpers.samplers import inpaint_latents
from helpers.training import (
    OWN_LICENCE,
    Recipe,
    Trainer,
    add_average,
    average,
    command,
    drawn_with,
    machine,
    positive,
    say,
    with_digest,
    write_card,
)

_SECOND_ROUND = "## Second round of the decoder"
_ADAMW = {"betas": (0.9, 0.99), "weight_decay": 1e-3}
#: Latents that the noise network learns from own images are at least so many.
_FEW = 1000


def pixel_losses(out: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean absolute error of pixels, and of their differences to the neighbours."""
    d = out - x
    return d.abs().mean(), d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean()


def local_contrast(x: torch.Tensor, *, window: int = 7) -> list[torch.Tensor]:
    """Root mean square of the detail around each place, in two bands.

    The first band is what a mean of 3 x 3 pixels takes away, the second what a mean of 5 x 5 takes
    away from that. Unlike an error of pixels it does not ask where the grains of a texture lie,
    only how strong they are.

    Parameters
    ----------
    x : (N, c, H, W) Tensor
    window : int
        Side of the squares that are averaged, pixels; they overlap by about half.

    Returns
    -------
    list of two (N, c, h, w) Tensor
    """
    found = []
    for side in (3, 5):
        coarse = _smoothed(x, side)
        detail, x = x - coarse, coarse
        power = F.avg_pool2d(detail.square(), window, stride=window // 2)
        found.append((power + 1e-5).sqrt())
    return found


def contrast_loss(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of :func:`local_contrast`, summed over the bands."""
    bands = zip(local_contrast(out), local_contrast(x), strict=True)
    return sum(F.l1_loss(a, b) for a, b in bands)


def _smoothed(x: torch.Tensor, side: int) -> torch.Tensor:
    """Mean of `side` x `side` pixels around each, mirrored at the border."""
    return F.avg_pool2d(F.pad(x, (side // 2,) * 4, mode="reflect"), side, stride=1)


# --- recipes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AutoencoderRecipe(Recipe):
    """Settings of the first stage; the defaults are those of the shipped weights.

    ``images`` is a folder of own images, without which ``scenes`` are drawn; ``held_out`` is one of
    images to measure on, without which these are phantoms; so it is in the other two recipes.
    ``start`` is a folder of weights to go on from, or "small" for the shipped ones.
    """

    channels: tuple[int, ...] = (64, 128)
    layers: int = 1
    latent_channels: int = 4
    image_patch: int = 2
    crop: int = 64
    batch: int = 8
    scenes: int = 2000
    textures: float = 0.15
    images: str | None = None
    held_out: str | None = None
    rate: float = 8e-4
    gradient: float = 0.5
    kl: float = 1e-4
    jitter: float = 0.5
    start: str | None = None


@dataclass(frozen=True)
class DecoderRecipe(Recipe):
    """Settings of the second round of the decoder, against a discriminator.

    Of the latents a share is ``smoothed``, by noise up to the time ``t_max`` and its removal at
    once, and a share ``sampled`` from strengths of 0.01 to ``strength_max``, evenly by logarithm.
    """

    steps: int = 100000
    crop: int = 64
    batch: int = 32
    scenes: int = 3000
    textures: float = 0.15
    images: str | None = None
    held_out: str | None = None
    rate: float = 5e-4
    judge_rate: float = 1e-4
    contrast: float = 4.0
    adversarial: float = 1.0
    features: float = 1.0
    alone: int = 100
    smoothed: float = 0.2
    t_max: int = 200
    sampled: float = 0.5
    strength_max: float = 0.3
    judge_channels: tuple[int, ...] = (64, 128, 128)
    jitter: float = 0.3
    warmup: int = 50


@dataclass(frozen=True)
class UNetRecipe(Recipe):
    """Settings of the noise network; the defaults are those of the shipped weights."""

    steps: int = 60000
    channels: tuple[int, ...] = (96, 128, 160)
    layers: int = 1
    latent_patch: int = 2
    batch: int = 8
    scenes: int = 2000
    textures: float = 0.15
    images: str | None = None
    held_out: str | None = None
    rate: float = 5e-4
    ema: float = 0.9995
    jitter: float = 0.15
    views: int = 2
    ihc: int = 2
    start: str | None = None


# --- training -------------------------------------------------------------------------------------


def _take_weights(network: nn.Module, given: nn.Module, recipe: Recipe) -> None:
    """Load the weights of a network of the same architecture, or say what differs."""
    try:
        network.load_state_dict(given.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"start = {recipe.start!r} has another architecture than the recipe (channels = "
            f"{recipe.channels}, layers = {recipe.layers}): make them equal, or train anew"
        ) from error


class AutoencoderTrainer(Trainer):
    """First stage: L1 on pixels and on their differences, and a very small KL term."""

    kind = "autoencoder"
    keep = ("shift", "scale")

    def __init__(
        self, recipe: AutoencoderRecipe, scenes: Scenes, *, test: np.ndarray | None = None,
        device: str | torch.device = "cpu",
    ) -> None:  # fmt: skip
        torch.manual_seed(recipe.seed)
        build = {
            "channels": list(recipe.channels),
            "layers": recipe.layers,
            "latent_channels": recipe.latent_channels,
            "image_patch": recipe.image_patch,
        }
        autoencoder = build_autoencoder(**build)
        if recipe.start:
            small = recipe.start == "small"
            path = AUTOENCODER_WEIGHTS if small else Path(recipe.start) / AUTOENCODER_WEIGHTS.name
            _take_weights(autoencoder, load_autoencoder(path).autoencoder, recipe)
        super().__init__(recipe, autoencoder, device, **_ADAMW)
        self.build, self.scenes, self.test = build, scenes, test
        self.shift, self.scale = 0.0, 1.0

    def loss(self) -> dict[str, torch.Tensor]:
        """Reconstruction of a batch of crops."""
        r = self.recipe
        x = random_crops(
            self.scenes, batch=r.batch, crop=r.crop, jitter=r.jitter, generator=self.generator
        ).to(self.device)
        with self.autocast():
            moments = self.model._encode(F.pixel_unshuffle(x, r.image_patch))
            mean, logvar = moments.float().chunk(2, dim=1)
            logvar = logvar.clamp(-20, 5)
            noise = torch.randn(mean.shape, generator=self.generator).to(self.device)
            out = self.model.decode(mean + torch.exp(0.5 * logvar) * noise).sample
        l1, edges = pixel_losses(F.pixel_shuffle(out.float(), r.image_patch), x)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return {"loss": l1 + r.gradient * edges + r.kl * kl, "l1": l1, "kl": kl}

    def latent_diffusion(self) -> LatentDiffusion:
        """Return a model of the averaged weights, latents scaled to unit variance."""
        autoencoder = build_autoencoder(**self.build)
        autoencoder.load_state_dict(self.average)
        model = LatentDiffusion(autoencoder, image_patch=self.recipe.image_patch).to(self.device)
        with torch.no_grad():
            z = model.encode(to_tensor(self.scenes.spread(32), device=self.device))
        self.shift, self.scale = float(z.mean()), float(1 / z.std())
        model.shift, model.scale = self.shift, self.scale
        return model

    def evaluate(self) -> dict[str, float]:
        """PSNR and SSIM on the held-out images."""
        return (
            score_autoencoder(self.latent_diffusion(), self.test) if self.test is not None else {}
        )

    def export(self, path: Path, command: str) -> None:
        """Write weights, curve and model card."""
        self.latent_diffusion()
        model = {"image_patch": self.recipe.image_patch, "shift": self.shift, "scale": self.scale}
        save_weights(path, "autoencoder", self.average, {"build": self.build, "model": model})
        self.write_log(path)
        r = self.recipe
        _write_card(
            self, path, command,
            what="First stage of the small latent diffusion model: `diffusers.AutoencoderKL`.",
            architecture=f"pixels folded {r.image_patch} x {r.image_patch}, channels {r.channels}, "
            f"factor {r.image_patch * 2 ** (len(r.channels) - 1)}, {r.latent_channels} latent "
            "channels, scaled to unit variance "
            f"(shift {self.shift:.4f}, scale {self.scale:.4f})",
            others=f"abstract textures ({r.textures:.0%})",
            batch=f"{r.batch} crops of {r.crop} px",
            score=_score(self),
        )  # fmt: skip


class Discriminator(nn.Module):
    """Patch discriminator: says of each patch of about 30 pixels whether it is a photograph.

    As in pix2pix (Isola et al. 2017). Beside the image it is given what is left of it when a mean
    of 3 x 3 pixels is taken away, enlarged: that is where decoded images differ, and with it a
    hundred steps teach what takes thousands without.
    """

    def __init__(self, channels: Sequence[int] = (32, 64, 64), *, detail: float = 6.0) -> None:
        super().__init__()
        self.detail = detail
        self.layers = nn.ModuleList()
        before = 6
        for i, c in enumerate(channels):
            last = i == len(channels) - 1
            conv = nn.Conv2d(before, c, 3 if last else 4, stride=1 if last else 2, padding=1)
            norm = nn.GroupNorm(8, c) if i else nn.Identity()
            self.layers.append(nn.Sequential(conv, norm, nn.LeakyReLU(0.2)))
            before = c
        self.layers.append(nn.Conv2d(before, 1, 3, padding=1))

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Outputs of all layers; the last one is the verdict on each patch."""
        found = [torch.cat([x, self.detail * (x - _smoothed(x, 3))], 1)]
        for layer in self.layers:
            found.append(layer(found[-1]))
        return found[1:]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Verdicts, (N, 1, h, w): positive for photographs."""
        return self.features(x)[-1]


class DecoderTrainer(Trainer):
    """Second round of the decoder: sharper pictures, also from latents that are a little smooth.

    Trained on pixel errors alone, a decoder answers doubt with the mean, which is smooth. Here the
    strength of detail counts too (:func:`local_contrast`), and a discriminator (hinge loss) and its
    features (Wang et al. 2018) judge the pictures. The encoder stays as it is, so that a noise
    network trained on its latents stays valid.

    A share of the latents has first been noised to a low level and denoised by the noise network
    at once (``recipe.smoothed``), another has been brought back from a higher level by the sampler
    (``recipe.sampled``): that is how latents look at the end of sampling. The latter need only
    look like tissue; grain by grain they cannot agree with the image.

    Parameters
    ----------
    recipe : DecoderRecipe
    model : LatentDiffusion
        Where to start; with a noise network unless all latents are left as they are.
    scenes : Scenes
    test : (n, H, W, 3) uint8 ndarray, optional
        Held-out images.
    card : Path, optional
        Model card of the first stage, which :meth:`export` adds to; by default the one that lies
        beside the file written.
    """

    kind = "decoder"

    def __init__(
        self, recipe: DecoderRecipe, model: LatentDiffusion, scenes: Scenes, *,
        test: np.ndarray | None = None, device: str | torch.device = "cpu",
        card: Path | None = None,
    ) -> None:  # fmt: skip
        torch.manual_seed(recipe.seed)
        if recipe.smoothed + recipe.sampled > 1:
            raise ValueError(
                f"smoothed = {recipe.smoothed} and sampled = {recipe.sampled} are shares of the "
                "latents: together at most 1"
            )
        if recipe.smoothed + recipe.sampled > 0 and model.unet is None:
            raise ValueError(
                f"smoothed = {recipe.smoothed}, sampled = {recipe.sampled}: that needs a noise "
                "network; give a model that has one, or make both 0"
            )
        self.latents = model.to(torch_device(device))
        autoencoder = model.autoencoder
        parts = nn.ModuleList([autoencoder.post_quant_conv, autoencoder.decoder])
        super().__init__(recipe, parts, device, **_ADAMW)
        self.builds_on = {"first stage": encoder_digest(model)}
        if recipe.smoothed + recipe.sampled > 0:
            self.builds_on["noise network"] = weights_digest(model.unet)
        self.discriminator = Discriminator(recipe.judge_channels).to(
            self.device, memory_format=torch.channels_last
        )
        self.judge = torch.optim.AdamW(
            self.discriminator.parameters(), lr=recipe.judge_rate, betas=(0.5, 0.9)
        )
        self.scenes, self.test, self.card = scenes, test, card

    def state(self) -> dict[str, Any]:
        """Everything needed to go on later, the discriminator included."""
        return {
            **super().state(),
            "discriminator": self.discriminator.state_dict(),
            "judge": self.judge.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        super().restore(state)
        self.discriminator.load_state_dict(state["discriminator"])
        self.judge.load_state_dict(state["judge"])

    def _latents(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Latents of images, the first ones as sampling leaves them, and how many these are.

        Of the others a share is noised and denoised at once.
        """
        r, model, g = self.recipe, self.latents, self.generator
        with torch.no_grad(), self.autocast():
            z = model.encode(x)
            kind = torch.rand(len(z), generator=g)
            made, smooth = int((kind < r.sampled).sum()), int((kind > 1 - r.smoothed).sum())
            first, second, rest = z.split([made, smooth, len(z) - made - smooth])
            if made:
                first = self._sampled(first)
            if smooth:
                t = torch.randint(r.t_max, (smooth,), generator=g).to(self.device)
                a = model.alphas_cumprod[t].reshape(-1, 1, 1, 1)
                noise = torch.randn(second.shape, generator=g).to(self.device)
                z_t = a.sqrt() * second + (1 - a).sqrt() * noise
                second = (z_t - (1 - a).sqrt() * model.eps(z_t, t)) / a.sqrt()
        return torch.cat([first, second, rest]), made

    def _sampled(self, z: torch.Tensor) -> torch.Tensor:
        """Latents noised to a random level and brought back by the sampler, all of them new."""
        level, steps = torch.rand(2, generator=self.generator).tolist()
        return inpaint_latents(
            self.latents.eps,
            z,
            torch.zeros_like(z[:, :1]),
            self.latents.alphas_cumprod,
            generators=self.generator,
            method="projection",
            solver="sde-dpm++",
            spacing="karras",
            steps=4 + int(5 * steps),
            strength=0.01 * (self.recipe.strength_max / 0.01) ** level,
        )

    def loss(self) -> dict[str, torch.Tensor]:
        """One step of the discriminator, and the losses of the decoder."""
        r = self.recipe
        x = random_crops(
            self.scenes, batch=r.batch, crop=r.crop, jitter=r.jitter, generator=self.generator
        ).to(self.device)
        z, made = self._latents(x)
        with self.autocast():
            out = self.latents.decode(z)
        verdicts = [self.discriminator(y) for y in (x, out.detach())]
        hinge = F.relu(1 - verdicts[0]).mean() + F.relu(1 + verdicts[1]).mean()
        self.judge.zero_grad(set_to_none=True)
        hinge.backward()
        self.judge.step()

        # What was sampled shows other grains than the image: there only coarse colours must agree.
        coarse = [_smoothed(y[:made], 5) for y in (out, x)]
        l1 = ((out[made:] - x[made:]).abs().sum() + (coarse[0] - coarse[1]).abs().sum()) / x.numel()
        with torch.no_grad():
            real = self.discriminator.features(x)
        fake = self.discriminator.features(out)
        match = sum(
            (a[made:] - b[made:]).abs().sum() / a.numel()
            for a, b in zip(fake[:-1], real[:-1], strict=True)
        )
        fool = -fake[-1].mean()
        contrast = contrast_loss(out, x)
        weight = r.adversarial * float(self.step >= r.alone)  # the judge has a head start
        judged = fool + r.features * match
        loss = l1 + r.contrast * contrast + weight * self._balance(l1, judged) * judged
        parts = {"l1": l1, "contrast": contrast, "hinge": hinge, "match": match, "fool": fool}
        return {"loss": loss, **parts}

    def _balance(self, pixels: torch.Tensor, judged: torch.Tensor) -> torch.Tensor:
        """Ratio of the gradients of two losses at the last layer (Esser et al. 2021, Eq. 7)."""
        last = self.latents.autoencoder.decoder.conv_out.weight
        sizes = [
            torch.autograd.grad(v, last, retain_graph=True)[0].norm() for v in (pixels, judged)
        ]
        return (sizes[0] / (sizes[1] + 1e-6)).clamp(max=1e4).detach()

    def latent_diffusion(self) -> LatentDiffusion:
        """Return the whole model with the averaged decoder."""
        model = copy.deepcopy(self.latents).requires_grad_(False).eval()
        parts = nn.ModuleList([model.autoencoder.post_quant_conv, model.autoencoder.decoder])
        parts.load_state_dict(self.average)
        return model

    def evaluate(self) -> dict[str, float]:
        """PSNR, SSIM and sharpness on the held-out images."""
        if self.test is None:
            return {}
        return score_autoencoder(self.latent_diffusion(), self.test)

    def export(self, path: Path, command: str) -> None:
        """Write the first stage with the new decoder, curve and model card."""
        model = self.latent_diffusion()
        config = model.autoencoder.config
        build = {
            "channels": list(config.block_out_channels),
            "layers": config.layers_per_block,
            "latent_channels": config.latent_channels,
            "image_patch": model.image_patch,
        }
        scales = {"image_patch": model.image_patch, "shift": model.shift, "scale": model.scale}
        save_weights(
            path, "autoencoder", model.autoencoder.state_dict(), {"build": build, "model": scales}
        )
        self.write_log(Path(path).with_name("decoder.json"))
        _add_to_card(self, Path(path), command)


class UNetTrainer(Trainer):
    """Noise network: denoising score matching (Eq. 4) on the latents of the first stage.

    Parameters
    ----------
    recipe : UNetRecipe
    first_stage : LatentDiffusion
        Autoencoder that the latents come from.
    z : (N, c, h, w) Tensor
        Latents, e.g. of :func:`encode_scenes`.
    test : (n, c, h, w) Tensor, optional
        Held-out latents.
    """

    kind = "unet"

    def __init__(
        self, recipe: UNetRecipe, first_stage: LatentDiffusion, z: torch.Tensor, *,
        test: torch.Tensor | None = None, device: str | torch.device = "cpu",
    ) -> None:  # fmt: skip
        torch.manual_seed(recipe.seed)
        self.build = {
            "channels": list(recipe.channels),
            "layers": recipe.layers,
            "latent_channels": first_stage.channels,
            "latent_patch": recipe.latent_patch,
        }
        unet = build_unet(**self.build)
        if recipe.start:
            _take_weights(unet, load_latent_diffusion(recipe.start).unet, recipe)
        super().__init__(recipe, unet, device, **_ADAMW)
        self.builds_on = {"first stage": encoder_digest(first_stage)}
        self.first_stage, self.z, self.test = first_stage.to(self.device), z, test
        self.keep_config = {"latent_patch": recipe.latent_patch, "prediction": "v_prediction"}

    def _network(self, model: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        p = self.recipe.latent_patch

        def network(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            with self.autocast():
                folded = F.pixel_unshuffle(z, p) if p > 1 else z
                out = model(folded.contiguous(memory_format=torch.channels_last), t).sample
            return F.pixel_shuffle(out.float(), p) if p > 1 else out.float()

        return network

    def loss(self) -> dict[str, torch.Tensor]:
        """Denoising score matching on a batch of latents, with times spread evenly over it."""
        g, n, a = self.generator, self.recipe.batch, self.first_stage.alphas_cumprod
        pick = torch.randint(len(self.z), (n,), generator=g)
        t = ((torch.arange(n) + torch.rand(1, generator=g)) / n * len(a)).long()
        t.clamp_(max=len(a) - 1)  # n - 1 + 0.9999999 is n in single precision
        loss = dsm_loss(
            self._network(self.model), self.z[pick].float().to(self.device), a, t=t,
            prediction="v_prediction", generator=g,
        ).mean()  # fmt: skip
        return {"loss": loss}

    def latent_diffusion(self) -> LatentDiffusion:
        """Return autoencoder and averaged noise network."""
        unet = build_unet(**self.build)
        unet.load_state_dict(self.average)
        first = self.first_stage
        return LatentDiffusion(
            first.autoencoder, unet, image_patch=first.image_patch, shift=first.shift,
            scale=first.scale, schedule=first.schedule, **self.keep_config,
        ).to(self.device)  # fmt: skip

    def evaluate(self) -> dict[str, float]:
        """Denoising loss of the averaged weights on held-out latents, noise and times fixed."""
        if self.test is None:
            return {}
        model = self.latent_diffusion()
        generator = torch.Generator().manual_seed(0)
        t = even_times(len(self.test), len(model.alphas_cumprod))
        with torch.no_grad():
            loss = dsm_loss(self._network(model.unet), self.test.to(self.device),
                            model.alphas_cumprod, t=t, prediction="v_prediction",
                            generator=generator)  # fmt: skip
        return {"held_out_loss": float(loss.mean())}

    def export(self, path: Path, command: str) -> None:
        """Write weights, curve and model card."""
        config = {"build": self.build, "model": self.keep_config}
        save_weights(path, "unet", self.average, config, builds_on=self.builds_on)
        self.write_log(path)
        r = self.recipe
        p = r.latent_patch
        folded = f"latents folded {p} x {p}, " if p > 1 else ""
        _write_card(
            self, path, command,
            what="Noise network of the small latent diffusion model: `diffusers.UNet2DModel`.",
            architecture=f"{folded}channels {r.channels}, attention at the coarsest level, "
            "predicts v, unconditional",
            others=f"abstract textures ({r.textures:.0%}, left out here); IHC drawn {r.ihc} times "
            "as often",
            batch=f"{r.batch} latents of 256 px images",
            score=_score(self),
        )  # fmt: skip


def even_times(n: int, end: int) -> torch.Tensor:
    """`n` times spread evenly over a schedule of `end` steps, always the same, in a shuffled order.

    Shuffled, because the images they are given to take turns in what they show.

    Returns
    -------
    (n,) int64 Tensor
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return (2 * order + 1) * end // (2 * n)


def encode_scenes(
    model: LatentDiffusion, scenes: Scenes, *, views: int = 1, jitter: float = 0.0, seed: int = 0,
    batch: int = 8, log: Callable[[str], None] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Latents of all images, each in `views` random turns, flips and mild stain changes.

    Turns and flips are of the image, not of the latents: the autoencoder does not commute with
    them.

    Returns
    -------
    (views * N, c, h, w) float16 Tensor
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    with torch.no_grad():
        for view in range(views):
            for i in range(0, len(scenes), batch):
                x = to_tensor(np.stack([scenes[k] for k in range(i, min(i + batch, len(scenes)))]))
                x = turn(x, generator)
                x = torch.cat([colour_jitter(y[None], jitter, generator=generator) for y in x])
                found.append(model.encode(x.to(model.device)).half().cpu())
            if log:
                log(f"encoded view {view + 1} of {views}: {len(scenes)} images")
    return torch.cat(found)


def repeated(z: torch.Tensor, times: np.ndarray) -> torch.Tensor:
    """Latents of :func:`encode_scenes`, each as often as the noise network is to see its image.

    Parameters
    ----------
    z : (views * N, c, h, w) Tensor
    times : (N,) int ndarray
        0 leaves an image out, e.g. of :func:`helpers.latent_scenes.drawing_weights`.

    Returns
    -------
    (views * times.sum(), c, h, w) Tensor
    """
    return z[np.repeat(np.arange(len(z)), np.tile(times, len(z) // len(times)))]


def score_autoencoder(model: LatentDiffusion, images: np.ndarray) -> dict[str, float]:
    """Mean PSNR (dB), SSIM and sharpness of reconstructions of images.

    Parameters
    ----------
    images : (N, H, W, 3) uint8 ndarray

    Returns
    -------
    dict
        "psnr", "ssim", and "sharpness": the mean absolute Laplacian of the reconstruction over
        that of the image; below 1 it is smoother.
    """
    from skimage.metrics import structural_similarity

    scores = []
    with torch.no_grad():
        for image in images:
            back = to_uint8(model.decode(model.encode(to_tensor(image, device=model.device))))[0]
            ssim = structural_similarity(image, back, channel_axis=-1, data_range=255)
            scores.append((psnr(image, back), ssim, _roughness(back) / _roughness(image)))
    return dict(zip(("psnr", "ssim", "sharpness"), np.mean(scores, axis=0).tolist(), strict=True))


def _roughness(image: np.ndarray) -> float:
    """Mean absolute Laplacian of the luminance, plus a trifle, so that ratios are finite."""
    return float(np.abs(cv2.Laplacian(image.mean(-1), cv2.CV_64F)).mean()) + 1e-6


def _write_card(
    trainer: Trainer, path: Path, command: str, *, what: str, architecture: str, batch: str,
    score: str, others: str,
) -> None:  # fmt: skip
    """Write the model card of a network of the latent diffusion model.

    `batch` is what a step sees, and `others` are the scenes that show no tissue.
    """
    r = trainer.recipe
    data, licence = f"the images of {r.images}", "that of the images, as far as it covers weights"
    if r.images is None:
        licence = OWN_LICENCE
        data = (
            f"{r.scenes} scenes drawn by `helpers.phantom` (both organs, all grades and sites, a "
            f"quarter IHC) and {others}; no real tissue"
        )
    write_card(
        trainer, path, what, architecture=architecture, data=data, command=command, batch=batch,
        score=score, licence=licence,
    )  # fmt: skip


def _score(trainer: Trainer) -> str:
    """What was measured on held-out images at the end of a training, for its model card."""
    words = {
        "psnr": "PSNR {:.2f} dB",
        "ssim": "SSIM {:.3f}",
        "sharpness": "sharpness {:.2f} (mean absolute Laplacian over that of the image)",
        "held_out_loss": "denoising loss (v), times spread evenly, {:.4f}",
    }
    last, folder = trainer.last, trainer.recipe.held_out
    found = ", ".join(word.format(last[key]) for key, word in words.items() if key in last)
    if not found:
        return "not measured"
    phantoms = "phantoms of other seeds and patients, both sites, one in six IHC"
    return f"{found} on {len(trainer.test)} {phantoms if folder is None else f'images of {folder}'}"


def _add_to_card(trainer: DecoderTrainer, path: Path, command: str) -> None:
    """Add the second round of the decoder to the card of the first stage, and the new digest."""
    r, card = trainer.recipe, trainer.card or path.with_suffix(".md")
    before = card.read_text(encoding="utf-8") if card.exists() else f"# {path.name}\n"
    before = before.split(_SECOND_ROUND)[0].rstrip()
    drawn = f"{r.scenes} other scenes of the same kind"
    data = drawn if r.images is None else f"images of {r.images}"
    before = with_digest(before, path)
    path.with_suffix(".md").write_text(f"""{before}

{_SECOND_ROUND}

The decoder went on against a discriminator; the encoder, and so the latents, stayed as they were. \
The digest above is that of the file as it is now.

| | |
|---|---|
| data | {data} |
| command | `{command}` |
| seed | {r.seed} |
| steps | {trainer.step} of {r.batch} crops of {r.crop} px, {trainer.seconds / 60:.0f} minutes \
on {machine(trainer.device)} |
| held-out score | {_score(trainer)} |

The training curve of this round is in `decoder.json`.
""", encoding="utf-8")  # fmt: skip


def _cached_latents(
    path: Path, model: LatentDiffusion, scenes: Scenes, recipe: UNetRecipe,
    log: Callable[[str], None],
) -> torch.Tensor:  # fmt: skip
    """Latents of the scenes, from `path` if they were made of the same, with the same settings."""
    pictures = hashlib.sha256()
    for i in range(len(scenes)):
        pictures.update(np.ascontiguousarray(scenes[i]).data)
    key = [
        encoder_digest(model), pictures.hexdigest(), len(scenes), recipe.views, recipe.jitter,
        recipe.seed,
    ]  # fmt: skip
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        if stored["key"] == key:
            return stored["z"]
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, pickle.UnpicklingError):
        pass  # not there, or damaged: they are made anew
    z = encode_scenes(
        model, scenes, views=recipe.views, jitter=recipe.jitter, seed=recipe.seed, log=log
    )
    with replacing(path) as temporary:
        torch.save({"key": key, "z": z}, temporary)
    return z


# --- command line ---------------------------------------------------------------------------------


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("prepare", "autoencoder", "decoder", "unet"))
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("data/runs/train_latent"),
        help="folder of drawn scenes and checkpoints",
    )
    parser.add_argument("--images", help="train on the images of this folder instead")
    parser.add_argument("--weights", type=Path, help="file to write")
    parser.add_argument(
        "--autoencoder",
        type=Path,
        default=AUTOENCODER_WEIGHTS,
        help="first stage of the unet; the decoder goes on from the pair in its folder",
    )
    parser.add_argument(
        "--held-out",
        help="measure on the images of this folder instead of phantoms",
    )
    parser.add_argument("--start", help='weights that autoencoder or unet go on from, e.g. "small"')
    parser.add_argument("--rate", type=float, help="learning rate")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--bf16", action="store_true", default=None, help="mixed precision")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument(
        "--smoothed", type=float, help="share of latents that are denoised, decoder"
    )
    parser.add_argument("--sampled", type=float, help="share of latents that are sampled, decoder")
    parser.add_argument(
        "--views",
        type=int,
        help="times the unet sees each image, turned and stained anew; "
        f"by default 2, or more where that is less than {_FEW} of own images",
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that draw scenes")
    parser.add_argument("--minutes", type=float, help="stop by time, with the decay fitted to it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int)
    parser.add_argument("--no-prepare", action="store_true", help="use the scenes that are there")
    parser.add_argument("--score-every", type=positive, default=1000, help="steps between scores")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    add_average(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see ``python -m helpers.train_latent --help``."""
    o = _parse(argv)
    torch.set_num_threads(o.threads)
    cv2.setNumThreads(o.threads)
    path = o.weights or (UNET_WEIGHTS if o.what == "unet" else AUTOENCODER_WEIGHTS)
    if o.average:
        average(o.average, path)
        return
    kind = {"autoencoder": AutoencoderRecipe, "decoder": DecoderRecipe}.get(o.what, UNetRecipe)
    names = (
        "steps", "minutes", "scenes", "images", "held_out", "rate", "start", "bf16", "batch",
        "sampled", "smoothed", "views",
    )  # fmt: skip
    given = {k: v for k in names if (v := getattr(o, k)) is not None}
    if strange := sorted(given.keys() - {f.name for f in fields(kind)}):
        options = ", ".join(f"--{name}" for name in strange)
        raise ValueError(f"{options}: no setting of the {o.what}, leave it out")
    if o.images and o.scenes is not None:
        raise ValueError(
            "--scenes counts drawn scenes, and --images takes a folder's: leave one out"
        )
    recipe = kind(seed=o.seed, **given)
    folder = Path(o.images or o.work / "scenes")
    _check_apart(folder, o.held_out)
    if o.images is None and not o.no_prepare:
        prepare(
            folder, recipe.scenes, seed=o.seed, textures=recipe.textures, workers=o.workers,
            log=say,
        )  # fmt: skip
    if o.what == "prepare":
        return
    o.work.mkdir(parents=True, exist_ok=True)
    scenes = Scenes(folder, n=None if o.images else recipe.scenes)
    if o.what == "unet":
        trainer: Trainer = _unet_trainer(o, recipe, scenes, folder)
    elif o.what == "decoder":
        if o.autoencoder.name != AUTOENCODER_WEIGHTS.name or not o.autoencoder.exists():
            raise ValueError(
                f"--autoencoder {o.autoencoder}: the decoder goes on from a pair in one folder, "
                f"{AUTOENCODER_WEIGHTS.name} and {UNET_WEIGHTS.name}; name the first of them"
            )
        pair = load_latent_diffusion(o.autoencoder.parent)
        trainer = DecoderTrainer(
            recipe, pair, scenes, test=_images_to_measure(o, 24), device=o.device,
            card=o.autoencoder.with_suffix(".md"),
        )  # fmt: skip
    else:
        trainer = AutoencoderTrainer(
            recipe, scenes, test=_images_to_measure(o, 24), device=o.device
        )
    trainer.run(
        checkpoint=o.work / f"{o.what}.pt", score_every=o.score_every,
        progress=sys.stderr.isatty(), log=say,
    )  # fmt: skip
    words = ["python", "-m", "helpers.train_latent", *(argv or sys.argv[1:])]
    trainer.export(path, shlex.join(words))


def _check_apart(images: Path, held_out: str | None) -> None:
    """Refuse folders of which one lies in the other: both are searched through."""
    if held_out is None:
        return
    a, b = images.resolve(), Path(held_out).resolve()
    if a.is_relative_to(b) or b.is_relative_to(a):
        raise ValueError(
            f"held-out images in {held_out} are among those to train on, in {images}: "
            "put them into two folders beside each other"
        )


def _images_to_measure(o: argparse.Namespace, n: int) -> np.ndarray:
    """Images to measure on: `n` phantoms, or at most `n` fields of a folder."""
    return held_out(n) if o.held_out is None else Scenes(Path(o.held_out)).spread(n)


def _unet_trainer(
    o: argparse.Namespace, recipe: UNetRecipe, scenes: Scenes, folder: Path
) -> UNetTrainer:
    """Trainer of the noise network on the latents of the scenes, encoded once."""
    first_stage = load_autoencoder(o.autoencoder, autocast=torch.bfloat16 if recipe.bf16 else None)
    first_stage = first_stage.to(torch_device(o.device))
    times = None
    if not o.images:
        times = drawing_weights(len(scenes), **drawn_with(folder), ihc=recipe.ihc)
    elif o.views is None:
        recipe = replace(recipe, views=max(recipe.views, -(-_FEW // len(scenes))))
    test = encode_scenes(first_stage, Scenes(_images_to_measure(o, 48))).float()
    z = _cached_latents(o.work / "latents.pt", first_stage, scenes, recipe, say)
    z = z if times is None else repeated(z, times)
    return UNetTrainer(recipe, first_stage, z, test=test, device=o.device)


if __name__ == "__main__":
    raise SystemExit(command(main))
