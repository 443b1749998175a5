"""The form of images that every stage expects."""

import numpy as np
import pytest

from helpers.images import MIN_SIDE, check_image, check_images


def test_images_pass_as_they_are():
    image = np.zeros((MIN_SIDE, MIN_SIDE + 3, 3), np.uint8)
    assert check_image(image) is image
    images = np.stack([image, image])
    assert check_images(images) is images
    assert check_images(images[:0]).shape == (0, MIN_SIDE, MIN_SIDE + 3, 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((20, 24), np.uint8), r"target has shape \(20, 24\) and dtype uint8; expected"),
        (np.zeros((20, 24, 4), np.uint8), r"target has shape \(20, 24, 4\) .* convert\('RGB'\)"),
        (np.zeros((3, 20, 24), np.uint8), r"target has shape \(3, 20, 24\)"),
        (np.zeros((20, 24, 3), np.float32), "dtype float32; expected .* uint8 in RGB order"),
        (np.zeros((MIN_SIDE - 1, 24, 3), np.uint8), r"target of \(7, 24\) pixels is too small"),
    ],
)
def test_what_is_no_image_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        check_image(wrong, "target")


@pytest.mark.parametrize(
    "wrong", [np.zeros((20, 24, 3), np.uint8), np.zeros((2, 20, 24, 3)), np.zeros((2, 3, 20, 24))]
)
def test_what_are_no_images_is_refused(wrong):
    with pytest.raises(ValueError, match=f"val images have shape .* dtype {wrong.dtype}; .* size"):
        check_images(wrong, "val images")
