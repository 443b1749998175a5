"""Inpainting of images: the unknown pixels made anew in latents, all others kept bit for bit.

The parts it is made of have modules of their own and can be reached from here: the SDE and its
score in :mod:`helpers.sde`, methods and solvers in :mod:`helpers.samplers`, the networks in
:mod:`helpers.latent`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import torch

from helpers.images import check_images
from helpers.latent import LatentDiffusion, latent_known, to_tensor, to_uint8
from helpers.samplers import (
    METHODS,
    SOLVERS,
    Sampling,
    condition,
    ddim_step,
    euler_step,
    inpaint_latents,
    network_calls,
    sample_posterior,
    spawn,
    timesteps,
    tweedie,
)
from helpers.sde import VPSDE, GaussianPrior, ReverseSDE, dsm_loss, euler_maruyama

__all__ = [
    "METHODS",
    "SOLVERS",
    "VPSDE",
    "GaussianPrior",
    "ReverseSDE",
    "Sampling",
    "condition",
    "ddim_step",
    "dsm_loss",
    "euler_maruyama",
    "euler_step",
    "fill_unknown",
    "inpaint",
    "inpaint_latents",
    "network_calls",
    "noise_strip",
    "sample_posterior",
    "spawn",
    "timesteps",
    "tweedie",
    "windows",
]


def fill_unknown(image: np.ndarray, unknown: np.ndarray) -> np.ndarray:
    """Replace unknown pixels by the nearest known one, so that the encoder sees no artefact.

    The latents of known cells depend on pixels around them; what the hole happens to hold (black,
    noise, the removed segment) would leak into them.

    Parameters
    ----------
    image : (H, W, 3) uint8 ndarray
    unknown : (H, W) bool ndarray

    Returns
    -------
    (H, W, 3) uint8 ndarray
    """
    from scipy.ndimage import distance_transform_edt

    if unknown.all():
        return np.full_like(image, 128)
    _, (y, x) = distance_transform_edt(unknown, return_indices=True)
    return image[y, x]


def windows(unknown: np.ndarray, context: int | None, multiple: int) -> list[tuple[slice, slice]]:
    """Part of each image that inpainting has to look at: the unknown pixels and what is around.

    Parameters
    ----------
    unknown : (N, H, W) bool ndarray
    context : int or None
        Known pixels kept on every side of the unknown ones; None takes the whole image.
    multiple : int
        Sides are rounded up to multiples of this, as far as the image goes.

    Returns
    -------
    list of (slice, slice)
        Rows and columns of each image; without unknown pixels those of a whole image.
    """
    found = []
    for mask in unknown:
        if context is None or not mask.any():
            found.append((slice(0, mask.shape[0]), slice(0, mask.shape[1])))
            continue
        spans = []
        for axis, length in enumerate(mask.shape):
            at = np.flatnonzero(mask.any(1 - axis))
            side = at[-1] - at[0] + 1 + 2 * context
            side = min(-(-side // multiple) * multiple, length)
            first = min(max((at[0] + at[-1] + 1 - side) // 2, 0), length - side)
            spans.append(slice(int(first), int(first + side)))
        found.append((spans[0], spans[1]))
    return found


def inpaint(
    model: LatentDiffusion,
    images: np.ndarray,
    unknown: np.ndarray,
    *,
    context: int | None = None,
    mask_rule: str = "all",
    fill: str | None = None,
    detail: bool | None = None,
    ramp: int = 2,
    generator: torch.Generator | Sequence[torch.Generator] | int | None = None,
    batch: int | None = None,
    progress: bool = False,
    callback: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
    **sampling: Any,
) -> np.ndarray:
    """Make the unknown pixels of images anew; all others come back bit for bit.

    Parameters
    ----------
    model : LatentDiffusion
    images : (N, H, W, 3) uint8 ndarray
        Pasted images; with ``fill="nearest"`` it does not matter what unknown pixels hold.
    unknown : (N, H, W) bool ndarray
        True where the image shall be made anew.
    context : int, optional
        Known pixels around the unknown ones that the networks see; the rest of the image is left
        out, which saves its cost. By default the whole image is seen.
    mask_rule : {"all", "any"}
        A latent cell is known if all its pixels are, or if any is.
    fill : {"nearest", "keep"}, optional
        What the encoder sees in the hole: the nearest known pixel, or the image as it is. By
        default the former, and with ``strength`` < 1, which starts from what is there, the latter.
    detail : bool, optional
        Add what the autoencoder lost of the image, x - D(E(x)), to the unknown pixels, so that
        healing changes what the latents changed and leaves the rest sharp. Needs ``fill="keep"``;
        by default with ``strength`` < 1.
    ramp : int
        Pixels, from the known ones inwards, over which the image that the encoder sees gives way to
        what was made anew, so that no line shows where repainting begins.
    generator : torch.Generator, sequence of N torch.Generator, or int
        Source of the noise. Each image draws from its own generator, so that its result does not
        depend on its companions.
    batch : int, optional
        Images at once; all by default. Halved, with a message, when the memory does not suffice;
        further calls with this model start from there, see :class:`helpers.latent.LatentDiffusion`.
    progress : bool
        Show a progress bar.
    callback : callable, optional
        Called with (t, z_t, estimate of z_0) at each step of each batch.
    **sampling
        Method, solver, steps and so on: the fields of :class:`helpers.samplers.Sampling`.

    Returns
    -------
    (N, H, W, 3) uint8 ndarray

    Raises
    ------
    ValueError
        If shapes, types or options do not fit.
    FloatingPointError
        If a sample becomes NaN or infinite.
    """
    images, unknown = _check(images, unknown)
    fill, detail = _filling(fill, detail, from_image=Sampling(**sampling).strength < 1)
    _check_options(mask_rule, batch, ramp, context)
    N = len(images)
    generators = list(generator) if isinstance(generator, Sequence) else spawn(generator, N)
    if len(generators) != N:
        raise ValueError(f"{len(generators)} generators for {N} images: give one each, or one")
    options = {**sampling, "progress": progress, "callback": callback}
    out, areas = images.copy(), windows(unknown, context, model.multiple)
    todo = [i for i in range(N) if unknown[i].any()]
    seen = {i: images[i] if fill == "keep" else fill_unknown(images[i], unknown[i]) for i in todo}
    for same in _same_size(todo, areas):

        def run(part: list[int]) -> None:
            done = _inpaint_batch(
                model,
                np.stack([seen[i][areas[i]] for i in part]),
                np.stack([unknown[i][areas[i]] for i in part]),
                [generators[i] for i in part],
                mask_rule,
                detail,
                options,
            )
            for i, picture in zip(part, done, strict=True):
                out[i][areas[i]] = picture
                out[i] = _set_in(seen[i], out[i], unknown[i], ramp)

        _in_batches(run, same, batch or N, model, generators)
    return out


def _filling(fill: str | None, detail: bool | None, *, from_image: bool) -> tuple[str, bool]:
    """What the encoder sees in the hole, and whether lost detail is added, with their defaults."""
    if fill is None:
        fill = "keep" if from_image else "nearest"
    if fill not in ("nearest", "keep"):
        raise ValueError(f"fill={fill!r}: use 'nearest' or 'keep'")
    if detail is None:
        detail = from_image and fill == "keep"
    if detail and fill != "keep":
        raise ValueError(
            f"detail=True takes detail from the unknown pixels, which fill={fill!r} overwrites: "
            "use fill='keep'"
        )
    return fill, detail


def _check_options(mask_rule: str, batch: int | None, ramp: int, context: int | None) -> None:
    if mask_rule not in ("all", "any"):
        raise ValueError(f"mask_rule={mask_rule!r}: use 'all' or 'any'")
    if batch is not None and batch < 1:
        raise ValueError(f"batch={batch}: give at least 1 image at once, or None for all")
    if ramp < 0:
        raise ValueError(f"ramp={ramp}: give 0 or more pixels")
    if context is not None and context < 0:
        raise ValueError(f"context={context}: give 0 or more pixels, or None for the whole image")


def _same_size(todo: list[int], areas: Sequence[tuple[slice, slice]]) -> list[list[int]]:
    """Numbers of the images whose windows have the same sides, and so fit in one batch."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i in todo:
        groups.setdefault(tuple(part.stop - part.start for part in areas[i]), []).append(i)
    return list(groups.values())


def _in_batches(
    run: Callable[[list[int]], None], todo: list[int], size: int, model: LatentDiffusion,
    generators: Sequence[torch.Generator],
) -> None:  # fmt: skip
    """Run batch by batch, with half as many, from now on, where memory does not suffice."""
    while todo:
        part = todo[: min(size, model.most_at_once or size)]
        states = [generators[i].get_state() for i in part]
        try:
            run(part)
        except RuntimeError as error:
            if len(part) == 1 or not _out_of_memory(error):
                raise
            model.most_at_once = half = len(part) // 2
            print(f"not enough memory for {len(part)} images at once: going on with {half}")
            for i, state in zip(part, states, strict=True):
                generators[i].set_state(state)
            continue
        todo = todo[len(part) :]


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether memory did not suffice; torch has a class for that on a GPU, and a text on a CPU."""
    told = any(text in str(error) for text in ("DefaultCPUAllocator", "can't allocate memory"))
    return told or isinstance(error, torch.OutOfMemoryError)


def _check(images: np.ndarray, unknown: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    images, unknown = check_images(images), np.asarray(unknown)
    if unknown.shape != images.shape[:3] or unknown.dtype != bool:
        raise ValueError(
            f"unknown of shape {unknown.shape} and type {unknown.dtype} does not fit images of "
            f"shape {images.shape}: give (N, H, W) bool"
        )
    return images, unknown


def _inpaint_batch(
    model: LatentDiffusion, images: np.ndarray, unknown: np.ndarray,
    generators: Sequence[torch.Generator], mask_rule: str, detail: bool,
    options: dict[str, Any],
) -> np.ndarray:  # fmt: skip
    H, W = images.shape[1:3]
    pads = [(0, 0), (0, -H % model.multiple), (0, -W % model.multiple)]
    hole = np.pad(unknown, pads, mode="symmetric")
    seen = np.pad(images, [*pads, (0, 0)], mode="symmetric")
    if mask_rule == "all":
        m = latent_known(~hole, model.factor)
    else:
        m = 1.0 - latent_known(hole, model.factor)
    with torch.no_grad():
        x = to_tensor(seen, device=model.device)
        z_y = model.encode(x)
        z = inpaint_latents(
            model.eps,
            z_y,
            m.to(model.device),
            model.alphas_cumprod,
            generators=generators,
            **options,
        )
        decoded = model.decode(z)
        if detail:
            decoded = decoded + x - model.decode(z_y)
        return to_uint8(decoded)[:, :H, :W]


def _set_in(seen: np.ndarray, painted: np.ndarray, unknown: np.ndarray, ramp: int) -> np.ndarray:
    """Unknown pixels as painted, from the known ones inwards more and more so.

    `seen` holds the image where it is known. Composited in uint8: known pixels stay bit-identical.
    """
    depth = cv2.distanceTransform(unknown.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    share = np.minimum(depth / (ramp + 1), 1)[..., None]
    return (share * painted + (1 - share) * seen).round().astype(np.uint8)


def noise_strip(
    model: LatentDiffusion,
    image: np.ndarray,
    unknown: np.ndarray,
    *,
    n_shown: int = 6,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Pictures of the way from noise to image.

    Parameters
    ----------
    image : (H, W, 3) uint8 ndarray
    unknown : (H, W) bool ndarray
        Not empty; all True makes a picture from nothing.
    n_shown : int
        Pictures along the way; fewer if there are fewer steps.
    **options
        Arguments of :func:`inpaint`.

    Returns
    -------
    noisy : (n, h, w, 3) uint8 ndarray
        Decoded z_t of the window that is repainted: the whole image without `context`.
    estimates : (n, h, w, 3) uint8 ndarray
        Decoded Tweedie estimates of z_0.
    times : list of int
        t of each.

    Raises
    ------
    ValueError
        If no pixel is unknown, or as :func:`inpaint`.
    """
    if not np.any(unknown):
        raise ValueError("unknown is empty: nothing is repainted, so there is no way to show")
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def keep(t: int, z: torch.Tensor, z0: torch.Tensor) -> None:
        seen.append((t, z.clone(), z0.clone()))

    inpaint(model, image[None], unknown[None], callback=keep, **options)
    pick = np.unique(np.linspace(0, len(seen) - 1, n_shown).round().astype(int))
    H, W = image.shape[:2]
    with torch.no_grad():
        noisy, clean = (
            np.concatenate([to_uint8(model.decode(seen[i][k]))[:, :H, :W] for i in pick])
            for k in (1, 2)
        )
    return noisy, clean, [seen[i][0] for i in pick]
