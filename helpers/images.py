"""The one form of an image in this package: (H, W, 3) uint8, RGB; several are (N, H, W, 3)."""

from __future__ import annotations

import numpy as np

#: Shortest side of an image, in pixels.
MIN_SIDE = 8


def check_image(image: np.ndarray, name: str = "image") -> np.ndarray:
    """Return `image` if it is an (H, W, 3) uint8 array, else raise ``ValueError``.

    Parameters
    ----------
    image : (H, W, 3) uint8 ndarray
        Both sides at least :data:`MIN_SIDE`.
    name : str
        What the message calls it.
    """
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"{name} has shape {image.shape} and dtype {image.dtype}; expected (H, W, 3) uint8 in "
            "RGB order. Convert grey or RGBA images with PIL's convert('RGB')."
        )
    if min(image.shape[:2]) < MIN_SIDE:
        raise ValueError(
            f"{name} of {image.shape[:2]} pixels is too small; both sides need >= {MIN_SIDE}."
        )
    return image


def check_images(images: np.ndarray, name: str = "images") -> np.ndarray:
    """Return `images` if they are one (N, H, W, 3) uint8 array, else raise ``ValueError``."""
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise ValueError(
            f"{name} have shape {images.shape} and dtype {images.dtype}; expected (N, H, W, 3) "
            "uint8 in RGB order, all of one size."
        )
    return images
