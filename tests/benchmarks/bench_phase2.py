"""Inpainting against a literal implementation: images a second, and memory.

``python -m tests.benchmarks.bench_phase2`` prints a table.

The literal implementation follows the formulas one by one: one image at a time, full precision, 500
steps, and a gradient through network and weights at every step. Its time is measured over a few
steps and scaled, as every step costs the same.
"""

from __future__ import annotations

import argparse
import itertools
import math
import resource
import time

import numpy as np
import torch

from helpers import phantom
from helpers.diffusion import inpaint, network_calls, spawn, timesteps
from helpers.latent import LatentDiffusion, latent_known, load_latent_diffusion, to_tensor, to_uint8


def literal(
    model: LatentDiffusion, image: np.ndarray, unknown: np.ndarray, *, steps: int, run: int
) -> np.ndarray:
    """MCG as in the paper's formulas; only the first `run` of the steps are walked."""
    model.unet.requires_grad_(True)
    a = model.alphas_cumprod
    z_y = model.encode(to_tensor(image))
    m = latent_known(~unknown, model.factor)
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


def peak() -> float:
    """Largest memory of the process so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument(
        "--steps", type=int, default=500, help="steps of the literal implementation"
    )
    parser.add_argument("--fast", type=int, default=25, help="steps of the fast setting")
    parser.add_argument("--run", type=int, default=10, help="steps of the literal one that are run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    images = np.stack([
        phantom.render(i, size=(o.size, o.size), patient=i).image for i in range(o.images)
    ])  # fmt: skip
    unknown = np.zeros(images.shape[:3], bool)
    q = o.size // 4
    unknown[:, q : 2 * q, q : 2 * q] = True
    model = load_latent_diffusion()
    low = LatentDiffusion(
        model.autoencoder, model.unet, image_patch=model.image_patch,
        latent_patch=model.latent_patch, shift=model.shift, scale=model.scale,
        prediction=model.prediction, autocast=torch.bfloat16,
    )  # fmt: skip

    literal(model, images[0], unknown[0], steps=o.steps, run=1)  # warm up
    start = time.perf_counter()
    literal(model, images[0], unknown[0], steps=o.steps, run=o.run)
    seconds = (time.perf_counter() - start) * o.steps / o.run
    base = seconds
    rows = [("literal, one image at a time", o.steps, o.steps, seconds, peak())]
    for name, network, method, steps in (
        ("mcg", model, "mcg", o.fast),
        ("mcg, bf16", low, "mcg", o.fast),
        ("projection", model, "projection", o.fast),
        ("projection, bf16", low, "projection", o.fast),
        ("repaint, bf16", low, "repaint", o.fast),
    ):
        inpaint(network, images[:1], unknown[:1], method=method, steps=1)
        start = time.perf_counter()
        inpaint(network, images, unknown, method=method, steps=steps, generator=spawn(0, o.images))
        seconds = (time.perf_counter() - start) / o.images
        rows.append((name, steps, network_calls(steps, method=method), seconds, peak()))
    print(f"{o.images} images of {o.size} px, {o.threads} threads\n")
    print(f"{'':30s} {'steps':>6s} {'calls':>6s} {'s/image':>9s} {'faster':>8s} {'peak GB':>8s}")
    for name, steps, calls, seconds, memory in rows:
        print(
            f"{name:30s} {steps:6d} {calls:6d} {seconds:9.2f} {base / seconds:7.1f}x {memory:8.2f}"
        )
    print("\nPeak memory is that of the process so far: rows add up to the largest.")


if __name__ == "__main__":
    main()
