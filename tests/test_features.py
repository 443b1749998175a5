import cv2
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import save_file
from skimage import data

from helpers import features
from helpers.pool import Pool, build
from helpers.segment_table import collect
from helpers.weights import tensors_digest
from tests import toy_segments as toy


@pytest.fixture(scope="module")
def lite0():
    return features.load_extractor("lite0")


@pytest.fixture(scope="module")
def ctranspath_file(tmp_path_factory):
    """CTransPath with random weights, under the names its authors use."""
    torch.manual_seed(0)
    network = features.ctranspath_network()
    for layer in network.modules():  # statistics that differ from a fresh network's
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.1, 0.1)
    old = {}
    for key, value in network.state_dict().items():
        parts = key.split(".")
        if "downsample" in parts:
            parts[1] = str(int(parts[1]) - 1)
        old[".".join(parts)] = value
    old["layers.0.blocks.1.attn_mask"] = torch.zeros(1)
    old["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(1, dtype=torch.long)
    path = tmp_path_factory.mktemp("weights") / "ctranspath.pth"
    torch.save({"model": old}, path)
    return path, network.eval()


def crops(n, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (n, 14, 14, 3), dtype=np.uint8)
    return np.stack([cv2.resize(c, (224, 224)) for c in small])


# --- crops ----------------------------------------------------------------------------------------


def test_crop_is_the_resized_bounding_box():
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    mask = np.zeros((30, 40), bool)
    mask[5:15, 10:30] = True
    mask[5, 10] = False  # the box is unchanged
    expected = cv2.resize(image[5:15, 10:30], (64, 64), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(features.crop(image, mask, 64), expected)


@pytest.mark.parametrize("shape", [(40, 300), (300, 40), (300, 200)])
def test_crop_averages_what_it_shrinks(shape):
    """Stripes of a pixel turn grey, also where the box is long and only one side shrinks."""
    stripes = (np.indices(shape)[int(np.argmax(shape))] % 2 * 255).astype(np.uint8)
    image = stripes[..., None].repeat(3, 2)
    out = features.crop(image, np.ones(shape, bool), 60).astype(float)
    assert np.abs(out - 127.5).max() < 30  # 5 pixels into 1: two or three of them are bright
    smooth = np.linspace(0, 255, shape[1]).round().astype(np.uint8)
    image = np.broadcast_to(smooth[None, :, None], (*shape, 3))
    out = features.crop(image, np.ones(shape, bool), 60)[30, :, 0]
    np.testing.assert_allclose(out, np.linspace(0, 255, 61)[:-1] + 2.1, atol=4)


@pytest.mark.parametrize(("background", "colour"), [("white", 255), ("mean", 100)])
def test_crop_background(background, colour):
    image = np.full((20, 20, 3), 100, np.uint8)
    mask = np.zeros((20, 20), bool)
    mask[2:10, 2:10] = True
    mask[2:6, 2:6] = False
    out = features.crop(image, mask, 8, background=background)
    assert (out[:3, :3] == colour).all()
    assert (out[6:, 6:] == 100).all()


def test_the_background_takes_the_mean_of_the_image_not_of_the_crop():
    image = np.full((40, 60, 3), 200, np.uint8)
    image[5:25, 10:40] = (50, 100, 150)
    mask = np.zeros((40, 60), bool)
    mask[5:25, 10:25] = mask[5:10, 10:40] = True
    out = features.crop(image, mask, size=30, background="mean")
    np.testing.assert_array_equal(out[-3, -3], image.mean((0, 1)).round())


def test_crop_of_one_pixel_and_of_everything():
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    one = np.zeros((16, 24), bool)
    one[3, 4] = True
    assert (features.crop(image, one, 5) == image[3, 4]).all()
    assert features.crop(image, np.ones((16, 24), bool), 8).shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("mask", "background", "message"),
    [
        (np.zeros((8, 8), bool), "keep", "empty"),
        (np.ones((8, 9), bool), "keep", r"\(8, 9\)"),
        (np.ones((8, 8), bool), "blur", "'blur'"),
    ],
)
def test_crop_errors(mask, background, message):
    with pytest.raises(ValueError, match=message):
        features.crop(np.zeros((8, 8, 3), np.uint8), mask, background=background)


@pytest.mark.parametrize("image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32)])
def test_crop_refuses_what_is_no_rgb_image(image):
    with pytest.raises(ValueError, match=f"dtype {image.dtype}; expected .* uint8 in RGB"):
        features.crop(image, np.ones((8, 8), bool))


# --- EfficientNet-Lite0 ---------------------------------------------------------------------------


def test_lite0_weights_fit_timm_tensor_by_tensor():
    weights = features.lite_state_dict()
    assert len(weights) == 296
    assert weights["conv_stem.weight"].shape == (32, 3, 3, 3)
    assert weights["classifier.weight"].shape == (1000, 1280)


def test_lite0_sees_a_cat_and_a_cup_of_espresso():
    """The normalisation is the one it was trained with: ImageNet classes come out right."""
    import timm

    network = timm.create_model("tf_efficientnet_lite0")
    network.load_state_dict(features.lite_state_dict())
    network.eval()
    probabilities = []
    for image in (data.chelsea(), data.coffee()):
        h, w = image.shape[:2]
        side = min(h, w)
        centre = image[(h - side) // 2 :, (w - side) // 2 :][:side, :side]
        x = torch.from_numpy(cv2.resize(centre, (224, 224), interpolation=cv2.INTER_AREA))
        x = (x.permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
        with torch.inference_mode():
            probabilities.append(network(x).softmax(1)[0])
    assert probabilities[0][281:286].sum() > 0.7  # domestic cats
    assert probabilities[1][967] > 0.9  # espresso


def test_lite0_features(lite0):
    x = crops(5)
    f = lite0.embed(x, batch=2)
    assert (lite0.name, lite0.dim, f.shape, f.dtype) == ("lite0", 1280, (5, 1280), np.float32)
    np.testing.assert_allclose(f, lite0.embed(x, batch=5), atol=1e-4)  # batch changes nothing
    np.testing.assert_allclose(f[3], lite0.embed(x[3:4])[0], atol=1e-4)
    assert np.linalg.norm(f[0] - f[1]) > 1
    assert lite0.embed(x[:0]).shape == (0, 1280)


def test_lite0_gives_the_features_of_timm_without_a_normalisation_left(lite0):
    network = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    weights = features.lite_state_dict()
    network.load_state_dict({key: weights[key] for key in network.state_dict()})
    x = crops(3)
    with torch.inference_mode():
        theirs = network((torch.from_numpy(x).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)
    np.testing.assert_allclose(lite0.embed(x), theirs.numpy(), atol=1e-4)
    norms = [
        module for module in lite0.network.modules() if isinstance(module, torch.nn.BatchNorm2d)
    ]
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    assert not norms


def test_inputs_are_scaled_as_the_network_was_trained(lite0):
    lite = timm.get_pretrained_cfg("tf_efficientnet_lite0")
    assert (lite0.mean, lite0.std) == (lite.mean, lite.std)


def test_embed_refuses_other_types(lite0):
    with pytest.raises(ValueError, match="float64"):
        lite0.embed(np.zeros((1, 224, 224, 3)))
    for batch in (0, -1):
        with pytest.raises(ValueError, match=f"batch={batch}"):
            lite0.embed(crops(1), batch=batch)
        with pytest.raises(ValueError, match=f"batch={batch}"):
            features.embed_segments(lite0, collect(toy.records(1), toy.masks(1)), None, batch=batch)
    for shape in ((224, 224, 3), (1, 64, 64, 3)):
        with pytest.raises(
            ValueError, match=r"shape .*, expected uint8 of shape \(n, 224, 224, 3\)"
        ):
            lite0.embed(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("progress", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 16])
def test_embed_segments_keeps_the_order(lite0, batch, progress):
    rng = np.random.default_rng(1)
    images = {k: rng.integers(0, 256, (24, 32, 3), dtype=np.uint8) for k in "ab"}
    masks = {k: np.zeros((2, 24, 32), bool) for k in "ab"}
    for k, x in (("a", 3), ("b", 9)):
        masks[k][0, 4:9, x : x + 4] = True
        masks[k][1, 10:20, x : x + 9] = True
    table = pd.DataFrame(
        [{"image_id": k, "label": "c", "split": "train", "height": 24, "width": 32} for k in "ab"]
    )
    segments = collect(table, masks)
    seen = []

    def get_image(image_id):
        seen.append(image_id)
        return images[image_id]

    f = features.embed_segments(lite0, segments, get_image, batch=batch, progress=progress)
    assert seen == ["a", "b"]  # each image is read once
    direct = [features.crop(images[k], m) for k in "ab" for m in masks[k]]
    np.testing.assert_allclose(f, lite0.embed(np.stack(direct)), atol=1e-4)


# --- CTransPath -----------------------------------------------------------------------------------


def test_conv_stem_returns_nhwc_and_takes_timm_arguments():
    stem = features.ConvStem(
        img_size=224, patch_size=4, embed_dim=96, strict_img_size=True, output_fmt="NHWC"
    )
    assert stem(torch.zeros(2, 3, 224, 224)).shape == (2, 56, 56, 96)
    with pytest.raises(ValueError, match="224"):
        stem(torch.zeros(2, 3, 96, 96))
    with pytest.raises(ValueError, match="patch_size=4"):
        features.ConvStem(patch_size=16)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_ctranspath_round_trip(ctranspath_file, tmp_path, suffix, prefix):
    path, network = ctranspath_file
    weights = {prefix + k: v for k, v in torch.load(path, weights_only=True)["model"].items()}
    path = tmp_path / f"ctranspath{suffix}"
    if suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in weights.items()}, path)
    else:
        torch.save({"model": weights}, path)
    extractor = features.load_extractor("ctranspath", path=path)
    assert extractor.digest == tensors_digest(network.state_dict())
    assert extractor.dim == 768
    for key, value in network.state_dict().items():
        assert torch.equal(extractor.network.state_dict()[key], value), key
    x = crops(1)
    f = extractor.embed(x)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (extractor.mean, extractor.std))
    with torch.inference_mode():
        expected = network((torch.from_numpy(x).permute(0, 3, 1, 2) / 255 - mean) / std)
    np.testing.assert_allclose(f, expected.numpy(), atol=1e-4)


def test_ctranspath_errors(tmp_path, ctranspath_file, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"none\.pth: download ctranspath\.pth by hand"):
        features.load_extractor("ctranspath", path=tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.pth could not be read .* damaged"):
        features.load_extractor("ctranspath", path=tmp_path / "text.pth")
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="no CTransPath checkpoint"):
        features.load_extractor("ctranspath", path=tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="dictionary of tensors"):
        features.load_extractor("ctranspath", path=tmp_path / "list.pth")

    def offline(*args, **kwargs):
        raise OSError("name or service not known")

    monkeypatch.setattr(features.timm, "create_model", offline)
    with pytest.raises(ConnectionError, match="lite0"):
        features.load_extractor("ctranspath")


def test_a_checkpoint_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="could not be read"):
        features.load_extractor("ctranspath", path=tmp_path / "evil.pth")


def test_unknown_extractor_and_needless_path():
    with pytest.raises(ValueError, match="'resnet'"):
        features.load_extractor("resnet")
    with pytest.raises(ValueError, match="leave the path out"):
        features.load_extractor("lite0", path="x.pth")


# --- a pool that grows ----------------------------------------------------------------------------


class Counting(torch.nn.Module):
    """Mean colours of the four quarters of a crop; counts what it is asked."""

    seen = 0

    def forward(self, x):
        type(self).seen += len(x)
        return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


@pytest.fixture
def growing(tmp_path):
    """Segments of six images, and a pool of the first four on disk."""
    rng = np.random.default_rng(2)
    ids = [f"im{k}" for k in range(6)]
    images = {k: rng.integers(0, 256, (24, 33, 3), dtype=np.uint8) for k in ids}
    masks = {k: np.zeros((3, 24, 33), bool) for k in ids}
    for k in ids:
        for j in range(3):
            y, x = rng.integers(1, 12, 2)
            masks[k][j, y : y + 6 + j, x : x + 9] = True
    table = pd.DataFrame(
        [
            {"image_id": k, "label": "ab"[i % 2], "split": "train", "patient": f"p{i}",
             "dataset": "toy", "height": 24, "width": 33}
            for i, k in enumerate(ids)
        ]
    )  # fmt: skip
    segments = collect(table, masks)
    network = features.Extractor("toy", 12, Counting(), (0.5,) * 3, (0.5,) * 3)
    first = segments.select(image_id=ids[:4])
    raw = features.embed_segments(network, first, images.__getitem__)
    build(first, raw, n_components=4, provenance={"extractor": "toy"}).save(tmp_path)
    Counting.seen = 0
    return tmp_path, segments, network, images, table


def test_a_saved_pool_grows_without_asking_the_extractor_again(growing):
    folder, segments, network, images, table = growing
    pool, read = Pool.load(folder), []

    def get_image(image_id):
        read.append(image_id)
        return images[image_id]

    more = features.extend(pool, network, segments, get_image, records=table)
    assert Counting.seen == 6 and read == ["im4", "im5"]  # the new ones only
    assert len(more) == 18
    np.testing.assert_array_equal(more.features[:12], pool.features)
    more.save(folder)
    again = Pool.load(folder)
    np.testing.assert_array_equal(again.features, more.features)
    for i in range(18):
        np.testing.assert_array_equal(again.mask(i), more.mask(i))
    same = features.extend(again, network, segments, get_image)
    assert same is again and Counting.seen == 6  # nothing is new
    direct = features.embed_segments(network, segments.select(image_id="im4"), images.__getitem__)
    np.testing.assert_allclose(
        more.features[12:15], pool.pcas["a"].transform(direct), rtol=1e-5, atol=1e-6
    )


def test_a_pool_grows_by_the_rules_it_was_built_with(growing):
    """Islands and duplicates of new segments go as those of the pool did."""
    folder, _, network, images, table = growing
    whole = np.zeros((24, 33), bool)
    whole[4:12, 5:20] = True
    ragged = whole.copy()
    ragged[20:22, 28:31], ragged[7, 9] = True, False
    segments = collect(table.iloc[[4]], {"im4": np.stack([ragged, whole])})
    as_it_is = features.extend(Pool.load(folder), network, segments, images.__getitem__)
    assert len(as_it_is) == 14
    pool = Pool.load(folder)
    pool.provenance.update(tidy=True, iou_duplicate=0.9)
    more = features.extend(pool, network, segments, images.__getitem__)
    assert len(more) == 13
    np.testing.assert_array_equal(more.mask(12), whole)


def test_a_pool_grows_with_the_background_it_was_built_with(monkeypatch):
    segments, seen = collect(toy.records(), toy.masks()), []
    extractor = features.Extractor("toy", 20, None, (0.5,) * 3, (0.5,) * 3)

    def embed(extractor, segments, get_image, *, background, **rest):
        seen.append(background)
        return np.ones((len(segments), 20), np.float32)

    monkeypatch.setattr(features, "embed_segments", embed)
    old = segments.select(image_id=["im0", "im1"])
    raw = np.random.default_rng(0).normal(size=(8, 20))
    for given, expected in (({"background": "white"}, "white"), ({}, "keep")):
        pool = build(old, raw, provenance={"extractor": "toy", **given})
        assert len(features.extend(pool, extractor, segments, dict)) == 24
        assert seen.pop() == expected


def test_what_may_not_grow_is_refused_before_any_work(growing):
    folder, segments, network, images, table = growing
    pool = Pool.load(folder)
    other = features.Extractor("other", 12, Counting(), (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ValueError, match="extractor 'toy', not 'other'"):
        features.extend(pool, other, segments, images.__getitem__)
    pool.provenance["extractor_weights"] = "a digest"
    with pytest.raises(ValueError, match="extractor 'toy', not other weights of it"):
        features.extend(pool, network, segments, images.__getitem__)
    del pool.provenance["extractor_weights"]  # as in a pool of an earlier version
    test = table.assign(split=["train"] * 5 + ["test"])
    with pytest.raises(ValueError, match=r"leakage.*im5"):
        features.extend(pool, network, segments, images.__getitem__, records=test)
    relative = table.tail(1).assign(image_id="x", split="test", patient="p4")
    shared = pd.concat([table, relative])
    with pytest.raises(ValueError, match=r"patients \['p4'\]"):
        features.extend(pool, network, segments, images.__getitem__, records=shared)
    assert Counting.seen == 0
