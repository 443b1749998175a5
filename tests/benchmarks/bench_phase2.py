"""Inpainting against a literal implementation: images a second, memory, and quality.

``python -m tests.benchmarks.bench_phase2`` prints the times; ``--full`` adds the quality of many
steps against few (minutes to hours); ``--paper`` times networks of the paper's size with random
weights where there is a GPU, and the same code at a small width elsewhere.

The literal implementation follows the formulas one by one: one image at a time, full precision, 500
steps, and a gradient through network and weights at every step. Its time is that
of one step and what comes with it, and of the further steps of a longer run, as every step costs
the same. Each row runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from typing import Any

import numpy as np
import torch

from helpers import features, phantom, quality, replacement
from helpers.diffusion import inpaint, network_calls, spawn, timesteps
from helpers.latent import LatentDiffusion, latent_known, load_latent_diffusion, to_tensor, to_uint8
from helpers.statistics import jackknife
from tests.benchmarks.measure import TIMERS, alone, peak_memory

#: What ``make bench`` prints: fewer images than by itself.
RUNS = ("--images 2",)

#: Settings that are timed: name, options of :func:`inpaint`, options of the loader.
ROWS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("projection", {"method": "projection"}, {}),
    ("repaint", {"method": "repaint", "solver": "ddim"}, {}),
    ("mcg", {"method": "mcg"}, {}),
    ("mmps", {"method": "mmps"}, {}),
    ("mmps, half guided", {"method": "mmps", "guided": 0.5}, {}),
    ("mmps, context 32", {"method": "mmps", "context": 32}, {}),
    ("mmps, channels last", {"method": "mmps"}, {"channels_last": True}),
    ("mmps, checkpointing", {"method": "mmps"}, {"checkpointing": True}),
    ("mmps, bf16", {"method": "mmps"}, {"autocast": torch.bfloat16}),
    ("mmps, compiled", {"method": "mmps"}, {"compile": True}),
)


def literal(
    model: LatentDiffusion, image: np.ndarray, unknown: np.ndarray, *, steps: int, run: int
) -> np.ndarray:
    """MCG as in the paper's formulas; only the first `run` of the steps are walked."""
    model.unet.requires_grad_(True)
    a = model.alphas_cumprod
    z_y = model.encode(to_tensor(image, device=model.device))
    m = latent_known(~unknown, model.factor).to(z_y)
    z = torch.randn_like(z_y)
    times = [*timesteps(steps, len(a)), -1]
    for t, s in list(itertools.pairwise(times))[:run]:
        z = z.detach().requires_grad_(True)
        eps = model.eps(z, t)
        z0 = (z - math.sqrt(1 - a[t]) * eps) / math.sqrt(a[t])
        misfit = torch.linalg.norm(m * (z_y - z0))
        misfit.backward()
        a_s = float(a[s]) if s >= 0 else 1.0
        sigma = math.sqrt((1 - a_s) / (1 - a[t]) * (1 - a[t] / a_s))
        step = math.sqrt(a_s) * z0 + math.sqrt(max(1 - a_s - sigma**2, 0)) * eps
        step = step + sigma * torch.randn_like(z) - z.grad
        known = math.sqrt(a_s) * z_y + math.sqrt(1 - a_s) * torch.randn_like(z)
        z = (1 - m) * step + m * known
    decoded = to_uint8(model.decode(z.detach()))[0]
    model.unet.requires_grad_(False).zero_grad(set_to_none=True)
    return np.where(unknown[..., None], decoded, image)


# --- pictures -------------------------------------------------------------------------------------


def glands(n: int, size: int, first: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Phantoms of all grades in turn, each with the mask of one of its glands."""
    grades, rng, found, index = phantom.GRADES["colon"], np.random.default_rng(first), [], first
    while len(found) < n:
        field = phantom.render(
            index, seed=77, size=(size, size), grade=grades[len(found) % len(grades)],
            patient=index % 40, microns_per_pixel=1.0,
        )  # fmt: skip
        index += 1
        masks = [field.glands == k for k in np.unique(field.glands) if k > 0]
        masks = [mask for mask in masks if 0.03 < mask.mean() < 0.45]
        if masks:
            found.append((field.image, masks[int(rng.integers(len(masks)))]))
    return found


def composites(n: int, size: int) -> dict[str, np.ndarray]:
    """Gland pasted over gland of the same grade: pictures before and after, and their masks."""
    found: dict[str, list] = {k: [] for k in ("original", "target", "image", "pasted", "unknown")}
    for (image, target), (source, mask) in zip(
        glands(n, size, 0), glands(n, size, 20_000), strict=True
    ):
        affine = replacement.affine_from_moments(mask, target)
        pasted, where = replacement.paste(image, target, source, mask, affine)
        unknown = replacement.unknown_region(target, where, band=4)
        for key, value in zip(found, (image, target, pasted, where, unknown), strict=True):
            found[key].append(value)
    return {key: np.stack(value) for key, value in found.items()}


# --- times ----------------------------------------------------------------------------------------


def _holes(images: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    pictures = [phantom.render(i, size=(size, size), patient=i).image for i in range(images)]
    unknown = np.zeros((images, size, size), bool)
    q = size // 4
    unknown[:, q : 2 * q, q : 2 * q] = True
    return np.stack(pictures), unknown


def timed(row: tuple, o: argparse.Namespace) -> tuple[str, int, str, float, float]:
    """Name, steps, network calls, seconds an image and peak memory of one row."""
    torch.set_num_threads(o.threads)
    clock = TIMERS[o.clock]
    name, sampling, loading = row
    model = load_latent_diffusion(device=o.device, **{"autocast": None, **loading})
    images, unknown = _holes(o.images, o.size)
    if name.startswith("literal"):
        literal(model, images[0], unknown[0], steps=o.steps, run=1)  # warm up
        ends = []
        for run in (1, 1 + o.run):  # what is not a step, to encode and decode, comes once
            start = clock()
            literal(model, images[0], unknown[0], steps=o.steps, run=run)
            ends.append(clock() - start)
        seconds = ends[0] + (o.steps - 1) * (ends[1] - ends[0]) / o.run
        return name, o.steps, f"{o.steps}+{o.steps}", seconds, peak_memory(o.device)
    sampling = {"solver": "sde-dpm++", "spacing": "karras", **sampling}
    inpaint(model, images, unknown, steps=1, **sampling)
    start = clock()
    inpaint(model, images, unknown, steps=o.fast, generator=0, **sampling)
    seconds = (clock() - start) / o.images
    counted = {k: v for k, v in sampling.items() if k != "context"}
    calls = "+".join(str(c) for c in network_calls(o.fast, **counted))
    return name, o.fast, calls, seconds, peak_memory(o.device)


def times(o: argparse.Namespace) -> None:
    """Print seconds an image and memory of every setting, and how much faster it is."""
    rows = [("literal, one at a time", {}, {})]
    rows += [row for row in ROWS if o.compile or not row[2].get("compile")]
    rows = [row for row in rows if not o.only or row[0] in o.only or row is rows[0]]
    print(f"{o.images} images of {o.size} px, {o.threads} threads, {o.device}, {o.clock} time\n")
    print(f"{'':24s} {'steps':>6s} {'calls':>9s} {'s/image':>9s} {'faster':>8s} {'peak GB':>8s}")
    base = None
    for row in rows:
        name, steps, calls, seconds, memory = alone(timed, row, o)
        base = base or seconds
        print(
            f"{name:24s} {steps:6d} {calls:>9s} {seconds:9.2f} {base / seconds:7.1f}x "
            f"{memory:8.2f}",
            flush=True,
        )
    print("\ncalls: forward + backward passes through the UNet for one image")


# --- quality --------------------------------------------------------------------------------------


def quality_table(o: argparse.Namespace) -> None:
    """Print kernel distance of crops around pasted glands, and how it differs from many steps."""
    torch.set_num_threads(o.threads)
    model, n = load_latent_diffusion(device=o.device), o.crops
    extractor, made = features.load_extractor("lite0", device=o.device), composites(o.crops, 128)
    around = made["target"] | made["pasted"]

    def embed(images, masks):
        crops = [features.crop(i, m) for i, m in zip(images, masks, strict=True)]
        return extractor.embed(np.stack(crops))

    others = glands(max(200, n), 128, 40_000)
    real = embed(*zip(*others, strict=True))
    seams = ([image for image, _ in others[:100]], [mask for _, mask in others[:100]])
    rows = (
        ("projection", "ddim", o.fast, "karras"),
        ("mcg", "ddim", o.fast, "karras"),
        ("repaint", "ddim", o.fast, "karras"),
        ("mmps", "ddim", o.fast, "karras"),
        ("mmps", "sde-dpm++", o.fast, "trailing"),
        ("mmps", "sde-dpm++", o.fast, "karras"),
        ("mmps", "dpm++", o.fast, "karras"),
        ("mmps", "sde-dpm++", o.steps, "karras"),
    )
    keys = ("method", "solver", "steps", "spacing")
    settings = {" ".join(map(str, row)): dict(zip(keys, row, strict=True)) for row in rows}
    settings = {name: row for name, row in settings.items() if not o.only or name in o.only}
    print(f"{n} composites of 128 px, {made['unknown'].mean():.1%} unknown, KID x 1000\n")
    floor = quality.kid_floor(real, rng=np.random.default_rng(0))
    print(f"{'real against real':32s} {1000 * floor.mean:7.1f} +- {1000 * floor.std:.1f}")
    found = {"pasted": embed(made["image"], around)}
    _report("pasted", found["pasted"], real, made["image"], made["pasted"], seams, 0.0)
    for name, sampling in settings.items():
        start = time.perf_counter()
        images = inpaint(
            model, made["image"], made["unknown"], generator=spawn(0, n), batch=o.batch,
            alpha=5.0, **sampling,
        )  # fmt: skip
        seconds = (time.perf_counter() - start) / n
        found[name] = embed(images, around)
        _report(name, found[name], real, images, made["pasted"], seams, seconds)
    few, many = (f"mmps sde-dpm++ {n} karras" for n in (o.fast, o.steps))
    if few in found and many in found:
        difference = quality.kid_difference(real, found[few], found[many])
        shows = [{f"real {i}"} for i in range(len(real))], [{f"made {i}"} for i in range(n)]
        _, low, high = jackknife(difference, *shows)
        print(f"\nKID x 1000 of {o.fast} minus {o.steps} steps, 95 % interval: "
              f"{1000 * low:.1f} to {1000 * high:.1f}")  # fmt: skip


def _report(name, mine, real, images, masks, seams, seconds: float) -> None:
    kid = quality.kid(real, mine, rng=np.random.default_rng(0))
    seam = quality.seam_score(list(images), list(masks), *seams).score
    print(
        f"{name:32s} {1000 * kid.mean:7.1f} +- {1000 * kid.std:4.1f}  seam {seam:6.2f} "
        f"{seconds:7.2f} s/image", flush=True,
    )  # fmt: skip


# --- the size of the paper ------------------------------------------------------------------------


def paper_model(width: int, *, device: str) -> LatentDiffusion:
    """VQ-f4 and UNet of LSUN beds 256, random weights; 224 channels on a GPU."""
    from diffusers import UNet2DModel, VQModel

    torch.manual_seed(0)
    first = max(32, width * 4 // 7 // 32 * 32)
    vq = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(first, 2 * first, 4 * first), layers_per_block=2, latent_channels=3,
        num_vq_embeddings=8192, vq_embed_dim=3, scaling_factor=1.0,
    )  # fmt: skip
    unet = UNet2DModel(
        in_channels=3, out_channels=3, block_out_channels=[width * k for k in (1, 2, 3, 4)],
        down_block_types=("DownBlock2D",) + ("AttnDownBlock2D",) * 3,
        up_block_types=("AttnUpBlock2D",) * 3 + ("UpBlock2D",), attention_head_dim=32,
    )  # fmt: skip
    autocast = torch.bfloat16 if device.startswith("cuda") else None
    return LatentDiffusion(vq, unet, autocast=autocast).to(device)


def paper(o: argparse.Namespace) -> None:
    """Time networks of the paper's size at 512 px."""
    gpu = o.device.startswith("cuda")
    width, size, batch, steps = (224, 512, o.batch, o.fast) if gpu else (32, 128, 2, 2)
    model = paper_model(width, device=o.device).tune(channels_last=gpu)
    images, unknown = _holes(batch, size)
    count = sum(p.numel() for p in model.unet.parameters()) / 1e6
    where = torch.cuda.get_device_name() if gpu else f"no GPU: small width, {o.threads} threads"
    print(f"{size} px, UNet of {width} channels ({count:.0f} million weights), {where}")
    for method in ("projection", "mmps"):
        options = {"method": method, "solver": "sde-dpm++", "batch": batch}
        inpaint(model, images, unknown, steps=1, **options)
        start = time.perf_counter()
        inpaint(model, images, unknown, steps=steps, generator=0, **options)
        seconds = (time.perf_counter() - start) / batch
        print(f"{method:12s} {steps} steps, batch {batch}: {seconds:.2f} s/image, "
              f"peak {peak_memory(o.device):.1f} GB")  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=500, help="steps of the slow settings")
    parser.add_argument("--fast", type=int, default=25, help="steps of the fast setting")
    parser.add_argument("--run", type=int, default=4, help="steps of the literal one that are run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=16, help="images at once, --full and --paper")
    parser.add_argument("--crops", type=int, default=120, help="composites of --full")
    parser.add_argument(
        "--only",
        nargs="*",
        help="these settings, e.g. 'mmps, bf16', or 'mmps ddim 25 karras' of --full",
    )
    parser.add_argument(
        "--clock", choices=TIMERS, default="wall",
        help="cpu: processor time, for a machine that does other work too",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="time torch.compile too")
    parser.add_argument("--full", action="store_true", help="print the quality table instead")
    parser.add_argument("--paper", action="store_true", help="time networks of the paper's size")
    o = parser.parse_args(argv)
    (paper if o.paper else quality_table if o.full else times)(o)


if __name__ == "__main__":
    main()
