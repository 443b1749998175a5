"""Inpainting of images: what is known stays, what is unknown is new, whatever the options."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from helpers import diffusion
from helpers.diffusion import METHODS, SOLVERS, fill_unknown, inpaint, noise_strip, spawn, windows
from helpers.latent import LatentDiffusion, build_autoencoder, build_unet, to_tensor, to_uint8

PAIRS = [(method, "ddim") for method in METHODS] + [("mmps", solver) for solver in SOLVERS[1:]]


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    autoencoder = build_autoencoder((8, 16), image_patch=2)
    return autoencoder, build_unet((16, 16, 32), attention_head_dim=8, groups=8)


@pytest.fixture
def model(networks):
    """A model of its own for every test: it remembers a lack of memory."""
    return LatentDiffusion(*networks, image_patch=2, latent_patch=2, prediction="v_prediction")


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    unknown = np.zeros((3, 64, 64), bool)
    unknown[0, 10:40, 13:41] = True
    unknown[1, 30:63, 5:20] = True
    unknown[2, :, 40:] = True
    return images, unknown


@pytest.mark.parametrize(("method", "solver"), PAIRS)
@pytest.mark.parametrize("context", [None, 4])
def test_known_pixels_are_bit_identical_and_unknown_ones_new(model, pair, method, solver, context):
    images, unknown = pair
    options = {"method": method, "solver": solver, "steps": 3, "context": context}
    out = inpaint(model, images, unknown, generator=0, **options)
    assert out.dtype == np.uint8 and np.array_equal(out[~unknown], images[~unknown])
    assert (out[unknown] != images[unknown]).mean() > 0.9


def test_the_decoder_would_change_known_pixels(model, pair):
    """The trap behind the test above: the decoded image itself is not what is given back."""
    images, unknown = pair
    with torch.no_grad():
        decoded = to_uint8(model.decode(model.encode(to_tensor(images))))
    assert not np.array_equal(decoded[~unknown], images[~unknown])


@pytest.mark.parametrize(("method", "solver"), PAIRS)
def test_results_do_not_depend_on_companions(model, pair, method, solver):
    images, unknown = pair
    options = {"method": method, "solver": solver, "steps": 4, "alpha": 0.5}
    together = inpaint(model, images, unknown, generator=spawn(5, 3), **options)
    in_two = inpaint(model, images, unknown, generator=spawn(5, 3), batch=2, **options)
    alone = [
        inpaint(model, images[[i]], unknown[[i]], generator=[spawn(5, 3)[i]], **options)[0]
        for i in range(3)
    ]
    # Float sums may be ordered otherwise in another batch: at most a rounding of the last level.
    assert np.abs(together.astype(int) - np.stack(alone)).max() <= 1
    assert np.abs(together.astype(int) - in_two).max() <= 1
    other = inpaint(model, images, unknown, generator=spawn(6, 3), **options)
    assert (other != together).any()


def test_same_generator_same_image(model, pair):
    one, two = (
        inpaint(model, *pair, steps=3, generator=torch.Generator().manual_seed(4)) for _ in range(2)
    )
    assert np.array_equal(one, two)


@pytest.mark.parametrize("content", ["black", "noise"])
def test_what_the_hole_holds_does_not_matter(model, pair, content):
    images, unknown = pair
    changed = images.copy()
    noise = np.random.default_rng(9).integers(0, 256, images.shape, dtype=np.uint8)
    changed[unknown] = 0 if content == "black" else noise[unknown]
    a = inpaint(model, images, unknown, steps=3, generator=1)
    b = inpaint(model, changed, unknown, steps=3, generator=1)
    assert np.array_equal(a[unknown], b[unknown])
    kept = inpaint(model, changed, unknown, steps=3, generator=1, fill="keep")
    assert not np.array_equal(a[unknown], kept[unknown])


def test_detail_keeps_what_the_autoencoder_loses(model, pair, monkeypatch):
    """Where the latents come back as they were, so does the image, whatever the decoder does."""
    images, unknown = pair
    options = {"steps": 1, "strength": 0.001, "generator": 3, "ramp": 0}
    as_it_was = lambda eps, z, *rest, **more: z  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(diffusion, "inpaint_latents", as_it_was)
        assert np.array_equal(inpaint(model, images, unknown, **options), images)
        assert not np.array_equal(inpaint(model, images, unknown, detail=False, **options), images)
        whole = inpaint(model, images, unknown, steps=1, generator=3)  # from pure noise: no detail
        assert np.array_equal(
            whole, inpaint(model, images, unknown, steps=1, generator=3, detail=False)
        )
        kept = {"steps": 1, "generator": 3, "fill": "keep"}  # the same, though the hole is seen
        assert np.array_equal(
            inpaint(model, images, unknown, **kept),
            inpaint(model, images, unknown, detail=False, **kept),
        )
    with_it, without = (
        inpaint(model, images, unknown, detail=d, **options).astype(int) for d in (True, False)
    )
    x = to_tensor(images)
    lost = 127.5 * (x - model.decode(model.encode(x))).detach().permute(0, 2, 3, 1).numpy()
    inner = unknown & ((without > 0) & (without < 255) & (with_it > 0) & (with_it < 255)).all(-1)
    assert inner.any() and np.abs((with_it - without - lost)[inner]).max() <= 1.01
    with pytest.raises(ValueError, match="detail=True takes detail"):
        inpaint(model, images, unknown, detail=True, steps=2)


@pytest.mark.parametrize("context", [None, 0])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_the_change_sets_in_over_the_ramp(model, pair, strength, context):
    """The first pixels take a third and two thirds of it, wherever the window ends."""
    images, unknown = pair
    options = {"steps": 2, "strength": strength, "generator": 3, "context": context}
    full = inpaint(model, images, unknown, ramp=0, **options).astype(int)
    eased = inpaint(model, images, unknown, **options)
    assert np.array_equal(eased, inpaint(model, images, unknown, ramp=2, **options))
    before = images  # from pure noise, the hole does not count
    if strength == 1:
        before = np.stack([fill_unknown(*one) for one in zip(images, unknown, strict=True)])
    depth = np.stack([ndimage.distance_transform_edt(u) for u in unknown])[..., None]
    expected = before + np.minimum(depth / 3, 1) * (full - before)
    assert (full != before).any() and np.abs(eased - expected).max() <= 0.51
    assert np.array_equal(eased[~unknown], images[~unknown])
    with pytest.raises(ValueError, match="ramp=-1"):
        inpaint(model, images, unknown, ramp=-1, **options)


def test_any_size_and_no_hole_or_nothing_else(model):
    image = np.random.default_rng(0).integers(0, 256, (1, 45, 70, 3), dtype=np.uint8)
    nothing, everything = np.zeros((1, 45, 70), bool), np.ones((1, 45, 70), bool)
    assert np.array_equal(inpaint(model, image, nothing, steps=2), image)
    out = inpaint(model, image, everything, steps=2)
    assert out.shape == image.shape and (out != image).any()
    half = everything.copy()
    half[:, :, :33] = False
    out = inpaint(model, image, half, steps=2)
    assert np.array_equal(out[~half], image[~half])


def test_masks_of_latent_cells_by_both_rules(model, monkeypatch):
    """Cells of 4 pixels; beyond the image the mask goes on as the mirrored image does."""
    seen = []

    def catch(eps, z_y, m, *rest, **options):
        seen.append(m)
        return z_y

    monkeypatch.setattr(diffusion, "inpaint_latents", catch)
    image = np.random.default_rng(0).integers(0, 256, (1, 40, 70, 3), dtype=np.uint8)
    unknown = np.zeros((1, 40, 70), bool)
    unknown[0, 6:14, 50:] = True  # half of the cells of rows 1 and 3, all of row 2
    for rule in ("all", "any"):
        inpaint(model, image, unknown, mask_rule=rule, generator=0)
    strict, loose = (1 - m[0, 0].numpy() for m in seen)
    expected = np.zeros((2, 16, 24))  # 64 x 96 pixels
    expected[0, 1:4, 12:23] = 1  # any pixel unknown; columns 70 .. 89 mirror the unknown ones
    expected[1, 2, 13:22] = 1  # every pixel unknown
    np.testing.assert_array_equal(strict, expected[0])
    np.testing.assert_array_equal(loose, expected[1])


def test_bad_input_is_named(model, pair):
    images, unknown = pair
    with pytest.raises(ValueError, match="float64"):
        inpaint(model, images / 255.0, unknown)
    with pytest.raises(ValueError, match="does not fit"):
        inpaint(model, images, unknown[:2])
    with pytest.raises(ValueError, match="method 'magic'"):
        inpaint(model, images, np.zeros_like(unknown), method="magic")
    with pytest.raises(ValueError, match="2 generators for 3 images"):
        inpaint(model, images, unknown, generator=spawn(0, 2), steps=2)
    with pytest.raises(ValueError, match="mask_rule='most': use 'all' or 'any'"):
        inpaint(model, images, unknown, mask_rule="most", steps=2)
    with pytest.raises(ValueError, match="fill='black': use 'nearest' or 'keep'"):
        inpaint(model, images, unknown, fill="black", steps=2)
    with pytest.raises(ValueError, match="context=-1"):
        inpaint(model, images, unknown, context=-1, steps=2)
    with pytest.raises(TypeError, match="stpes"):
        inpaint(model, images, unknown, stpes=2)


@pytest.mark.parametrize(("batch", "sizes"), [(None, [3]), (1, [1, 1, 1]), (2, [2, 1]), (9, [3])])
def test_no_more_images_than_asked_are_in_a_batch(model, pair, batch, sizes, monkeypatch):
    seen = []
    monkeypatch.setattr(
        diffusion, "_inpaint_batch", lambda model, images, *_: seen.append(len(images)) or images
    )
    inpaint(model, *pair, batch=batch, generator=0)
    assert seen == sizes


def test_little_memory_halves_the_batch(model, pair, monkeypatch, capsys):
    images, unknown = pair
    whole = inpaint(model, images, unknown, steps=2, generator=2)
    real = diffusion._inpaint_batch

    def small(model, images, *rest):
        if len(images) > 1:
            raise torch.OutOfMemoryError("too much")
        return real(model, images, *rest)

    monkeypatch.setattr(diffusion, "_inpaint_batch", small)
    pieces = inpaint(model, images, unknown, steps=2, generator=2)
    assert np.abs(whole.astype(int) - pieces).max() <= 1
    assert "not enough memory for 3" in capsys.readouterr().out
    corner, whole = np.zeros_like(unknown), np.ones_like(unknown)
    corner[:, :4, :4] = True
    twice, both = np.concatenate([images, images]), np.concatenate([corner, whole])
    model.most_at_once = None
    inpaint(model, twice, both, steps=2, generator=2, context=2)  # two sizes of windows
    assert capsys.readouterr().out.count("not enough memory") == 1
    with pytest.raises(ValueError, match="batch=-1"):
        inpaint(model, images, unknown, batch=-1, generator=0)


def allocate_too_much(device):
    """Fail as torch does on a GPU, which is pretended, or on this CPU, which is not."""
    if device == "cuda":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    torch.empty(10**15)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_half_the_images_are_tried_and_further_calls_start_there(
    model, monkeypatch, capsys, device
):
    images, unknown, sizes = np.zeros((8, 32, 32, 3), np.uint8), np.ones((8, 32, 32), bool), []

    def at_most(model, images, *_):
        sizes.append(len(images))
        if len(images) > most:
            allocate_too_much(device)
        return images

    monkeypatch.setattr(diffusion, "_inpaint_batch", at_most)
    most = 4
    for _ in range(2):  # as synthesis does, batch by batch
        inpaint(model, images, unknown, generator=0)
    inpaint(model, images, unknown, generator=0, batch=3)
    assert sizes == [8, 4, 4, 4, 4, 3, 3, 2]
    assert "not enough memory for 8 images at once: going on with 4" in capsys.readouterr().out
    most = 2
    inpaint(model, images[:7], unknown[:7], generator=0)
    assert sizes[8:] == [4, 2, 2, 2, 1]
    model.most_at_once, most = None, 8
    inpaint(model, images, unknown, generator=0)
    assert sizes[13:] == [8]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_too_little_memory_for_one_image_is_an_error(model, pair, monkeypatch, device):
    monkeypatch.setattr(diffusion, "_inpaint_batch", lambda *_: allocate_too_much(device))
    with pytest.raises(RuntimeError, match=r"[Tt]ried to allocate"):
        inpaint(model, *pair, generator=0)


def test_other_errors_do_not_make_batches_smaller(model, pair, monkeypatch):
    sizes = []

    def broken(model, images, *_):
        sizes.append(len(images))
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")

    monkeypatch.setattr(diffusion, "_inpaint_batch", broken)
    with pytest.raises(RuntimeError, match="must match"):
        inpaint(model, *pair, generator=0)
    assert sizes == [3] and model.most_at_once is None


def test_a_batch_cut_short_by_memory_draws_its_noise_again(model, monkeypatch):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    unknown = np.zeros((2, 64, 64), bool)
    unknown[:, 10:40, 13:41] = True
    whole = inpaint(model, images, unknown, steps=2, generator=2)
    real = diffusion._inpaint_batch

    def late(model, images, *rest):
        done = real(model, images, *rest)
        if len(images) > 1:  # the noise is drawn by now
            raise torch.OutOfMemoryError("too much")
        return done

    monkeypatch.setattr(diffusion, "_inpaint_batch", late)
    pieces = inpaint(model, images, unknown, steps=2, generator=2)
    assert np.abs(whole.astype(int) - pieces).max() <= 1


def test_a_strip_needs_something_unknown(model):
    image = np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match="unknown is empty"):
        noise_strip(model, image, np.zeros((32, 32), bool))


def test_windows_hold_the_unknown_and_its_context():
    unknown = np.zeros((4, 100, 128), bool)
    unknown[0, 40:50, 60:70] = True
    unknown[1, :3, 120:] = True
    unknown[2] = True
    whole = (slice(0, 100), slice(0, 128))
    found = windows(unknown, 8, 16)
    assert found[0] == (slice(29, 61), slice(49, 81))  # 10 + 2 * 8 pixels, rounded up to 32
    assert found[1] == (slice(0, 32), slice(96, 128))  # as large as the first, within the image
    assert found[2:] == [whole, whole] and windows(unknown, None, 16) == [whole] * 4
    for i in (0, 1):
        rows, columns = (np.flatnonzero(unknown[i].any(1 - axis)) for axis in (0, 1))
        for at, span, length in ((rows, found[i][0], 100), (columns, found[i][1], 128)):
            assert span.start <= max(at[0] - 8, 0) and span.stop >= min(at[-1] + 9, length)


def test_context_is_kept_on_every_side():
    unknown = np.zeros((1, 60, 90), bool)
    unknown[0, 20:30, 40:55] = True
    assert windows(unknown, 7, 1) == [(slice(13, 37), slice(33, 62))]


def test_a_window_as_large_as_the_image_is_the_image(model, pair):
    images, unknown = pair
    whole = inpaint(model, images, unknown, steps=2, generator=1)
    assert np.array_equal(inpaint(model, images, unknown, steps=2, generator=1, context=64), whole)


def test_only_methods_with_a_gradient_differentiate(model, pair, monkeypatch):
    states = []
    forward = model.eps
    monkeypatch.setattr(model, "eps", lambda z, t: states.append(z.requires_grad) or forward(z, t))
    for method in METHODS:
        states.clear()
        inpaint(model, *pair, method=method, steps=2)
        assert set(states) == {method in ("mcg", "mmps")}


def test_fill_takes_the_nearest_known_pixel():
    image = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    unknown = np.zeros((3, 3), bool)
    unknown[:, 0] = True
    assert np.array_equal(fill_unknown(image, unknown)[:, 0], image[:, 1])
    assert np.array_equal(fill_unknown(image, np.ones((3, 3), bool)), np.full_like(image, 128))


def test_noise_strip_goes_from_noise_to_image(model, pair):
    noisy, clean, times = noise_strip(
        model, pair[0][0], pair[1][0], n_shown=4, steps=6, generator=0
    )
    assert noisy.shape == clean.shape == (4, 64, 64, 3)
    assert times[0] == 999 and times == sorted(times, reverse=True)
    image = pair[0][0, :45, :50]  # no multiple of what the networks take
    noisy, clean, times = noise_strip(model, image, pair[1][0, :45, :50], steps=2, generator=0)
    assert noisy.shape == clean.shape == (2, 45, 50, 3) and len(times) == 2
