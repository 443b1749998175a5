"""Traditional and mixing augmentation."""

import numpy as np
import pytest
import torch

from helpers import augment


def test_traditional_keeps_shape_and_range_and_follows_the_seed():
    image = torch.randint(0, 256, (3, 20, 28), dtype=torch.uint8)
    transform = augment.traditional(28)
    torch.manual_seed(0)
    one = transform(image)
    torch.manual_seed(0)
    assert torch.equal(one, transform(image))
    assert one.shape == image.shape
    assert one.dtype == torch.float32
    assert 0 <= one.min() and one.max() <= 1
    assert not torch.equal(transform(image), transform(image))


def test_traditional_flips_both_ways_and_changes_hue_but_not_the_tissue():
    """A bright corner comes to lie in each of the four; what is bright stays so."""
    image = torch.full((3, 20, 28), 60, dtype=torch.uint8)
    image[:, :10, :14] = torch.tensor([220, 120, 180], dtype=torch.uint8)[:, None, None]
    transform = augment.traditional(28)
    torch.manual_seed(0)
    corners, hues = set(), []
    for _ in range(40):
        quarters = transform(image).unfold(1, 10, 10).unfold(2, 14, 14).mean((3, 4))
        bright = quarters.mean(0).flatten()
        corners.add(int(bright.argmax()))
        assert bright.max() > 0.55 and bright.sum() - bright.max() < 3 * 0.35
        red, _, blue = quarters.flatten(1)[:, bright.argmax()]
        hues.append(float(red - blue))
    assert corners == {0, 1, 2, 3}
    assert np.std(hues) > 0.02


def test_cutout_erases_its_share_and_nothing_else():
    image = torch.rand(3, 40, 40) + 0.1
    torch.manual_seed(1)
    out = augment.cutout(0.25)(image)
    gone = (out == 0).all(0)
    assert gone.sum() == 400
    rows, columns = torch.where(gone)
    assert rows.max() - rows.min() == columns.max() - columns.min() == 19
    assert torch.equal(out[:, ~gone], image[:, ~gone])


@pytest.mark.parametrize("mix", [augment.mixup, augment.cutmix])
def test_labels_are_mixed_as_the_pixels_are(mix):
    """Each image is one grey of its own class, so that its mean tells the share of each class."""
    torch.manual_seed(2)
    labels = torch.tensor([0, 1, 2, 3])
    images = (labels / 3.0).view(-1, 1, 1, 1).expand(4, 3, 30, 20).clone()
    mixed, soft = mix(4)(images, labels)
    assert soft.shape == (4, 4)
    torch.testing.assert_close(soft.sum(1), torch.ones(4))
    expected = soft @ (torch.arange(4) / 3.0)
    torch.testing.assert_close(mixed.mean((1, 2, 3)), expected, atol=1e-5, rtol=0)


def test_bad_input():
    with pytest.raises(ValueError, match=r"lies in \(0, 1\)"):
        augment.cutout(1.5)
    with pytest.raises(ValueError, match="image_size is 0"):
        augment.traditional(0)
    for mix in (augment.mixup, augment.cutmix):
        with pytest.raises(ValueError, match="n_classes is 0"):
            mix(0)
