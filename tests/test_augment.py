"""Traditional and mixing augmentation."""

from math import erf

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


def test_traditional_adds_noise_to_a_third_and_blurs_a_third_by_at_most_two_pixels():
    """Noise seen in a plain image, of a blur the steepest step of an edge (image side 512).

    Under a Gaussian of width s it is the probability of the half pixel around its middle.
    """
    edge = torch.zeros(3, 16, 64, dtype=torch.uint8)
    edge[:, :, 32:] = 255
    plain = torch.full((3, 40, 28), 120, dtype=torch.uint8)
    transform = augment.traditional(512)
    torch.manual_seed(0)
    noise = np.sort([float(transform(plain)[0].std()) for _ in range(60)])
    assert noise[30] < 1e-4 and 0.018 < noise[-10] <= noise[-1] < 0.022
    steps = []
    for _ in range(60):
        out = transform(edge).mean((0, 1))
        steps.append(float(out.diff().abs().max() / (out[-8:].mean() - out[:8].mean()).abs()))
    steps = np.sort(steps)
    assert erf(0.25 / np.sqrt(2)) - 0.005 < steps[0] < 0.25 and steps[5] < 0.7 and steps[30] > 0.95


def test_cutout_erases_its_share_and_nothing_else():
    image = torch.rand(3, 40, 40) + 0.1
    torch.manual_seed(1)
    out = augment.cutout(0.25)(image)
    gone = (out == augment.GREY).all(0)
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


def test_cutmix_exchanges_a_rectangle_and_mixup_blends():
    labels = torch.tensor([0, 1, 2, 3])
    images = (labels / 3.0).view(-1, 1, 1, 1).expand(4, 3, 30, 20).clone()
    torch.manual_seed(0)
    cut = augment.cutmix(4)(images, labels)[0]
    assert all(len(one.unique()) == 2 for one in cut)
    assert torch.isin(cut, images.unique()).all()  # no new grey
    rows, columns = torch.where(cut[0, 0] != images[0, 0])
    box = cut[0, 0, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert box.numel() < 600 and len(box.unique()) == 1  # one whole rectangle of another image
    torch.manual_seed(0)
    mixed = augment.mixup(4)(images, labels)[0]
    assert all(len(one.unique()) == 1 for one in mixed)  # every pixel alike


@pytest.mark.parametrize(("mix", "default"), [(augment.mixup, 0.4), (augment.cutmix, 1.0)])
def test_shares_of_mixtures_are_those_of_their_beta_distribution(mix, default):
    """CutMix, literally: a box of the share's area around a random pixel, cut at the border."""
    rng, side = np.random.default_rng(0), 64
    images, labels = torch.zeros(2, 3, side, side), torch.tensor([0, 1])
    for given in (None, 3.0):
        share = rng.beta(*[given or default] * 2, 20_000)
        if mix is augment.cutmix:
            half = side * np.sqrt(1 - share) / 2
            centre = rng.integers(0, side, (2, len(share)))
            low, high = (centre - half).clip(0), (centre + half).clip(None, side)
            share = 1 - np.prod(high - low, axis=0) / side**2
        transform = mix(2) if given is None else mix(2, alpha=given)
        torch.manual_seed(0)
        found = torch.stack([transform(images, labels)[1][0, 0] for _ in range(1500)]).numpy()
        at = [0.1, 0.25, 0.5, 0.75, 0.9]
        np.testing.assert_allclose(np.quantile(found, at), np.quantile(share, at), atol=0.05)


def test_bad_input():
    with pytest.raises(ValueError, match=r"lies in \(0, 0.9\]"):
        augment.cutout(0.97)
    with pytest.raises(ValueError, match="image_size is 0"):
        augment.traditional(0)
    for mix in (augment.mixup, augment.cutmix):
        with pytest.raises(ValueError, match="n_classes is 0"):
            mix(0)
