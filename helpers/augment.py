"""Augmentation on the fly: the traditional kind and its mixing relatives.

Images made once and for all, by segment replacement, are those of :mod:`helpers.synthesis`.
"""

from __future__ import annotations

import math

import torch
from torchvision.transforms import v2

#: What CutOut leaves of a square.
GREY = 0.5


def traditional(image_size: int) -> v2.Transform:
    """Flips, blur, noise, and shifts of hue, saturation and contrast, as in the paper.

    Parameters
    ----------
    image_size : int
        Side of the images, pixels; the blur grows with it.

    Returns
    -------
    torchvision.transforms.v2.Transform
        (3, H, W) uint8 tensor to (3, H, W) float32 in [0, 1].
    """
    _positive(image_size, "image_size")
    sigma_max = 2 * max(image_size / 512, 0.1)
    kernel_size = 2 * math.ceil(3 * sigma_max) + 1
    return v2.Compose([
        v2.RandomHorizontalFlip(),
        v2.RandomVerticalFlip(),
        v2.ColorJitter(contrast=0.2, saturation=0.2, hue=0.04),
        v2.RandomApply([v2.GaussianBlur(kernel_size, sigma=(0.1, sigma_max))], p=0.3),
        v2.ToDtype(torch.float32, scale=True),
        v2.RandomApply([v2.GaussianNoise(sigma=0.02)], p=0.3),
    ])  # fmt: skip


def cutout(share: float = 0.2, *, p: float = 1.0) -> v2.Transform:
    """Put grey in the place of one random square of an image: CutOut (DeVries and Taylor, 2017).

    Grey of 0.5 is about what normalisation turns into zero, as there; black is a colour that no
    tissue has.

    Parameters
    ----------
    share : float
        Part of the image that is erased, in (0, 0.9]. A square has to fit: of an image that is
        not square, at most its short side over its long one.
    p : float
        Probability that an image is changed at all.

    Returns
    -------
    torchvision.transforms.v2.Transform
        For (3, H, W) float tensors in [0, 1].
    """
    if not 0 < share <= 0.9:
        raise ValueError(f"share is {share}: the erased part of an image lies in (0, 0.9]")
    return v2.RandomErasing(p=p, scale=(share, share), ratio=(1.0, 1.0), value=GREY)


def mixup(n_classes: int, *, alpha: float = 0.4) -> v2.Transform:
    """Blend pairs of a batch and their labels: MixUp (Zhang et al., 2018).

    Parameters
    ----------
    n_classes : int
    alpha : float
        Parameter of the Beta distribution of the blending weight.

    Returns
    -------
    torchvision.transforms.v2.Transform
        (images (n, 3, H, W) float, labels (n,) int64) to (images, soft labels (n, n_classes)).
    """
    _positive(n_classes, "n_classes")
    return v2.MixUp(alpha=alpha, num_classes=n_classes)


def cutmix(n_classes: int, *, alpha: float = 1.0) -> v2.Transform:
    """Exchange a rectangle between pairs of a batch: CutMix (Yun et al., 2019).

    Parameters and result are those of :func:`mixup`.
    """
    _positive(n_classes, "n_classes")
    return v2.CutMix(alpha=alpha, num_classes=n_classes)


def _positive(value: int, name: str) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}: at least 1 is needed")
