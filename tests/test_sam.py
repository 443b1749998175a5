"""Loading, embedding, decoding."""

import hashlib
import http.server
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from segment_anything.modeling import ImageEncoderViT, PromptEncoder, Sam

from helpers import phantom, sam
from helpers.sam import (
    SMALL_WEIGHTS,
    Smooth,
    _even_batch,
    build_small_sam,
    decode,
    download,
    embed,
    load_sam,
    propose,
)


@pytest.fixture(scope="module")
def random_sam():
    torch.manual_seed(0)
    return build_small_sam(64, dim=32).requires_grad_(False)


@pytest.fixture(scope="module")
def small():
    if not SMALL_WEIGHTS.exists():
        pytest.skip("data/weights/sam_small.safetensors is not there")
    return load_sam("small")


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 255, (70, 113, 3), dtype=np.uint8)


def _reference(sam, image, points, *, multimask=True):
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    coords = torch.as_tensor(predictor.transform.apply_coords(points, image.shape[:2]))
    return predictor.predict_torch(
        coords.float()[:, None], torch.ones(len(points), 1), multimask_output=multimask
    )


@pytest.mark.parametrize("shape", [(70, 113), (113, 70), (64, 64), (30, 41), (200, 90)])
def test_proposals_equal_predict_torch(random_sam, shape):
    rng = np.random.default_rng(1)
    image = rng.integers(0, 255, (*shape, 3), dtype=np.uint8)
    points = rng.integers(0, shape[::-1], (9, 2)).astype(float)
    masks, iou, low = _reference(random_sam, image, points)
    proposals = propose(random_sam, embed(random_sam, image), points, points_per_batch=4)
    best = iou.argmax(1)
    rows = torch.arange(len(points))
    torch.testing.assert_close(proposals.padded, low[rows, best], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(proposals.iou, iou[rows, best].clamp(0, 1), atol=1e-5)
    for i in range(len(points)):
        assert (proposals.full(i) == masks[i, best[i]].numpy()).mean() > 0.999


def test_trained_model_equals_predict_torch(small):
    image = phantom.render(3, seed=5, size=(180, 240)).image
    points = np.array([[10, 170], [120, 60], [239, 0]], float)
    masks, iou, low = _reference(small, image, points)
    proposals = propose(small, embed(small, image), points)
    best = iou.argmax(1)
    rows = torch.arange(3)
    torch.testing.assert_close(proposals.padded, low[rows, best], rtol=1e-3, atol=1e-3)
    for i in range(3):
        assert (proposals.full(i) == masks[i, best[i]].numpy()).mean() > 0.9995


def test_threads_change_nothing_and_are_given_back(random_sam, picture, monkeypatch):
    points = np.random.default_rng(2).integers(0, 70, (11, 2))
    embedding = embed(random_sam, picture)
    before = torch.get_num_threads()
    try:
        found = []
        for n in (1, 3, 3):
            torch.set_num_threads(n)
            found.append(propose(random_sam, embedding, points, points_per_batch=2))
            assert torch.get_num_threads() == n
        torch.testing.assert_close(found[0].padded, found[1].padded, rtol=1e-4, atol=1e-4)
        assert torch.equal(found[1].padded, found[2].padded)

        def broken(*_, **__):
            raise RuntimeError("broken")

        monkeypatch.setattr(sam, "decode", broken)
        with pytest.raises(RuntimeError, match="broken"):
            propose(random_sam, embedding, points, points_per_batch=2)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("batch", [1, 2, 5, 11, 64])
def test_the_batch_changes_nothing(random_sam, picture, batch):
    points = np.random.default_rng(2).integers(0, 70, (11, 2))
    embedding = embed(random_sam, picture)
    _, iou, low = _reference(random_sam, picture, points.astype(float))
    many = propose(random_sam, embedding, points, points_per_batch=batch)
    best = low[torch.arange(11), iou.argmax(1)]
    torch.testing.assert_close(many.padded, best, rtol=1e-4, atol=1e-4)


def _by_the_mask_decoder(sam, features, points, labels, former=None):
    """All four masks of every prompt, by the original decoder."""
    found = []
    for b in range(len(points)):
        sparse, dense = sam.prompt_encoder(
            (points[b], labels[b]), None, None if former is None else former[b][:, None]
        )
        pe = sam.prompt_encoder.get_dense_pe()
        found.append(sam.mask_decoder.predict_masks(features[b : b + 1], pe, sparse, dense))
    return tuple(torch.stack(x) for x in zip(*found, strict=True))


@pytest.mark.parametrize("clicks", [1, 2, 6])
@pytest.mark.parametrize("with_masks", [False, True])
@pytest.mark.parametrize("prompts", [1, 5])
def test_decoding_equals_the_mask_decoder(random_sam, clicks, with_masks, prompts):
    torch.manual_seed(1)
    features = torch.randn(2, 32, 8, 8)
    points = torch.rand(2, prompts, clicks, 2) * 64
    labels = torch.randint(-1, 2, (2, prompts, clicks)).float()
    former = torch.randn(2, prompts, 32, 32) if with_masks else None
    logits, iou = decode(random_sam, features, points, labels, former)
    expected, quality = _by_the_mask_decoder(random_sam, features, points, labels, former)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(iou, quality, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("piece", [24, 1000])  # of 64 places: unequal pieces, and all at once
def test_decoding_in_pieces_with_what_prompts_share_is_the_same(random_sam, piece, monkeypatch):
    torch.manual_seed(4)
    features = torch.randn(2, 32, 8, 8)
    points, labels = torch.rand(2, 5, 1, 2) * 64, torch.ones(2, 5, 1)
    expected = _by_the_mask_decoder(random_sam, features, points, labels, None)
    monkeypatch.setattr(sam, "_PIECE", piece)
    with torch.no_grad():
        found = decode(
            random_sam, features, points, labels, side=sam.image_side(random_sam, features)
        )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_what_prompts_share_does_not_go_with_masks_of_a_former_round(random_sam):
    features, former = torch.randn(1, 32, 8, 8), torch.randn(1, 1, 32, 32)
    side = sam.image_side(random_sam, features)
    with pytest.raises(ValueError, match="one of the two"):
        decode(random_sam, features, torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1), former, side=side)


def test_only_the_output_asked_for_is_decoded(random_sam):
    torch.manual_seed(2)
    given = torch.randn(2, 32, 8, 8), torch.rand(2, 5, 1, 2) * 64, torch.ones(2, 5, 1)
    logits, iou = decode(random_sam, *given)
    best = 1 + iou[..., 1:].argmax(-1, keepdim=True)
    for outputs, index in (("best", best), ("single", torch.zeros_like(best))):
        one, quality = decode(random_sam, *given, outputs=outputs)
        assert one.shape == (2, 5, 1, 32, 32)
        expected = logits.take_along_dim(index[..., None, None], 2)
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(quality, iou.take_along_dim(index, 2), rtol=1e-4, atol=1e-5)
    three, quality = decode(random_sam, *given, outputs="three")
    torch.testing.assert_close(three, logits[:, :, 1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quality, iou[..., 1:], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="none of 'all', 'three', 'best', 'single'"):
        decode(random_sam, *given, outputs="worst")


@pytest.mark.parametrize("with_masks", [False, True])
def test_gradients_are_those_of_the_mask_decoder(with_masks):
    torch.manual_seed(3)
    sam = build_small_sam(64, dim=32)
    points, labels = torch.rand(1, 4, 1, 2) * 64, torch.ones(1, 4, 1)
    former = torch.randn(1, 4, 32, 32) if with_masks else None
    weight = torch.randn(1, 4, 4, 32, 32) / 1000
    gradients = []
    for work in (decode, _by_the_mask_decoder):
        torch.manual_seed(4)
        features = torch.randn(1, 32, 8, 8, requires_grad=True)
        sam.zero_grad()
        logits, iou = work(sam, features, points, labels, former)
        ((logits * weight).sum() + iou.sum()).backward()
        found = {k: v.grad for k, v in sam.named_parameters() if v.grad is not None}
        gradients.append({"features": features.grad} | found)
    ours, theirs = gradients
    assert set(ours) == set(theirs)
    for key, expected in theirs.items():
        torch.testing.assert_close(ours[key], expected, rtol=2e-3, atol=1e-4, msg=key)


def test_low_precision_gives_nearly_the_same_masks(random_sam, picture):
    points = np.array([[10, 60], [90, 30], [112, 0]])
    exact = propose(random_sam, embed(random_sam, picture), points, mask_choice="single")
    rough = embed(random_sam, picture, dtype=torch.bfloat16)
    rough = propose(random_sam, rough, points, mask_choice="single", dtype=torch.bfloat16)
    assert rough.padded.dtype == torch.float32
    scale = exact.padded.std()
    assert 0 < (rough.padded - exact.padded).abs().mean() < 0.1 * scale
    with pytest.raises(ValueError, match="autocast takes"):
        embed(random_sam, picture, dtype=torch.int8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_gpu_gives_the_masks_of_the_cpu(small, dtype):
    image = phantom.render(3, seed=5, size=(128, 160)).image
    points = np.random.default_rng(0).integers(0, 128, (40, 2))
    exact = propose(small, embed(small, image), points, mask_choice="single")
    sam = load_sam("small", device="cuda")
    found = embed(sam, image, dtype=dtype)
    found = propose(sam, found, points, mask_choice="single", dtype=dtype)
    assert (found.masks() == exact.masks()).mean() > (0.999 if dtype is None else 0.97)


_MEMORY = """
import numpy as np, torch
from helpers import anchors, sam
from tests.benchmarks.measure import peak_memory
torch.set_num_threads(1)
model = sam.load_sam("small") if sam.SMALL_WEIGHTS.exists() else sam.build_small_sam()
peak = lambda: peak_memory("cpu") * 1e9 / 2**20
before, seen = peak(), []
rng = np.random.default_rng(0)
for i in range(4):
    image = rng.integers(0, 255, (1024, 1024, 3), dtype=np.uint8)
    anchors.segment(model, image, rng=rng)
    seen.append(peak())
print(seen[0] - before, seen[-1] - seen[1])
"""


def test_memory_is_small_and_flat(repository):
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY], cwd=repository, capture_output=True, text=True, check=True
    )
    first, growth = map(float, done.stdout.split())
    assert 50 < first < 700, "MiB above the model for an image of 1024 x 1024"
    assert growth < 60, "MiB more after two further images"


@pytest.mark.parametrize("choice", ["largest", "middle", "smallest", "single"])
def test_mask_choices(random_sam, picture, choice):
    points = np.random.default_rng(4).integers(0, picture.shape[1::-1], (9, 2))
    single = choice == "single"
    _, iou, low = _reference(random_sam, picture, points.astype(float), multimask=not single)
    proposals = propose(random_sam, embed(random_sam, picture), points, mask_choice=choice)
    h, w = proposals.logits.shape[1:]
    area = (low[:, :, :h, :w] > 0).flatten(2).sum(-1)
    assert single or (area.diff(dim=1) != 0).all()  # no ties, so the order is one alone
    column = {"single": 0, "smallest": 0, "middle": 1, "largest": 2}[choice]
    chosen = area.argsort(1)[:, column]
    rows = torch.arange(len(points))
    torch.testing.assert_close(proposals.padded, low[rows, chosen], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(proposals.iou, iou[rows, chosen].clamp(0, 1), atol=1e-5)


def test_several_choices_of_mask_come_one_after_the_other(random_sam, picture):
    points = np.random.default_rng(4).integers(0, picture.shape[1::-1], (9, 2))
    embedding, choices = embed(random_sam, picture), ("middle", "best", "smallest")
    found = propose(random_sam, embedding, points, mask_choice=choices, points_per_batch=4)
    assert len(found) == 27
    for k, choice in enumerate(choices):
        alone = propose(random_sam, embedding, points, mask_choice=choice)
        part = np.s_[9 * k : 9 * k + 9]
        torch.testing.assert_close(found.padded[part], alone.padded, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found.iou[part], alone.iou, atol=1e-5)


@pytest.mark.parametrize(("choice", "best"), [("smallest", 2), ("middle", 0), ("largest", 1)])
def test_sizes_of_masks_are_those_within_the_image(choice, best):
    """What a mask covers of the padding does not count."""
    logits = torch.full((1, 1, 3, 16, 16), -1.0)
    logits[0, 0, 0, :4, :5] = logits[0, 0, 1, :4, :7] = logits[0, 0, 2, :2, :6] = 1
    logits[0, 0, 2, 8:] = 1  # below an image of half the height
    iou = torch.tensor([[[0.1, 0.2, 0.3]]])
    mask, score = sam._chosen(logits, iou, (choice,), (8, 16))
    assert torch.equal(mask[0, 0, 0], logits[0, 0, best]) and score == iou[0, 0, best]


def test_logits_cover_the_image_only(random_sam):
    image = np.zeros((32, 128, 3), np.uint8)
    proposals = propose(random_sam, embed(random_sam, image), np.array([[0, 0]]))
    assert proposals.padded.shape == (1, 32, 32) and proposals.logits.shape == (1, 8, 32)
    assert proposals.full(0).shape == (32, 128)


@pytest.mark.parametrize(
    ("size", "expected"), [((171, 256), (43, 64)), ((256, 170), (64, 42)), ((1, 256), (1, 64))]
)
def test_the_image_covers_the_nearest_number_of_rows_of_a_mask(size, expected):
    assert sam._region(64, size, 256) == expected


def test_one_click_finds_a_gland(small):
    scene = phantom.render(1, seed=77, grade="benign", size=(256, 256), microns_per_pixel=0.6)
    ids, areas = np.unique(scene.glands[scene.glands > 0], return_counts=True)
    gland = scene.glands == ids[areas.argmax()]
    y, x = np.argwhere(gland).mean(0).round().astype(int)
    predictor = SamPredictor(small)
    predictor.set_image(scene.image)
    masks, _, _ = predictor.predict(np.array([[x, y]]), np.array([1]))
    iou = (masks & gland).sum((1, 2)) / (masks | gland).sum((1, 2))
    assert iou.max() > 0.6


def test_it_is_a_sam_that_the_mask_generator_takes(small):
    assert isinstance(small, Sam)
    assert not any(p.requires_grad for p in small.parameters())
    image = phantom.render(2, seed=6, size=(96, 96)).image
    generator = SamAutomaticMaskGenerator(small, points_per_side=4)
    assert isinstance(generator.generate(image), list)


def test_other_input_size(small):
    sam = load_sam("small", image_size=128)
    assert sam.image_encoder.img_size == 128
    image = phantom.render(2, seed=6, size=(64, 64)).image
    assert propose(sam, embed(sam, image), np.array([[3, 3]])).padded.shape == (1, 64, 64)


def test_the_input_size_of_an_official_model_is_refused_before_anything_is_fetched(monkeypatch):
    monkeypatch.setattr(sam, "download", lambda *_, **__: pytest.fail("downloads"))
    with pytest.raises(ValueError, match="image_size = 512: official checkpoints"):
        load_sam("vit_h", image_size=512)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.array([[113, 5]]), "outside"),
        (np.array([[5, 70]]), "outside"),
        (np.array([[-1, 5]]), "outside"),
        (np.array([1, 5]), "expected"),
        (np.array([[np.nan, 5]]), "outside"),
    ],
)
def test_bad_points(random_sam, picture, points, message):
    with pytest.raises(ValueError, match=message):
        propose(random_sam, embed(random_sam, picture), points)


def test_bad_settings(random_sam, picture):
    embedding = embed(random_sam, picture)
    for choice in ("worst", [], ["best", "worst"], ["best", "best"], ["single", "best"]):
        with pytest.raises(ValueError, match=r"mask_choice = .*give one of \('best'"):
            propose(random_sam, embedding, np.array([[1, 1]]), mask_choice=choice)
    with pytest.raises(ValueError, match="points_per_batch"):
        propose(random_sam, embedding, np.array([[1, 1]]), points_per_batch=0)
    with pytest.raises(ValueError, match="uint8"):
        embed(random_sam, picture / 255.0)
    with pytest.raises(ValueError, match="multiple of 32"):
        build_small_sam(100)


def test_smoothing_takes_away_what_repeats_with_the_cells_and_keeps_slopes():
    rng = np.random.default_rng(0)
    cell = torch.from_numpy(rng.normal(size=(4, 4)))
    smooth = Smooth()
    repeated = smooth(cell.repeat(5, 7)[None])[0]
    inner = repeated[2:-2, 2:-2]
    torch.testing.assert_close(inner, torch.full_like(inner, float(cell.mean())))
    slope = torch.arange(24.0)[:, None] + 3 * torch.arange(20.0)
    torch.testing.assert_close(smooth(slope)[2:-2, 2:-2], slope[2:-2, 2:-2])
    x = torch.from_numpy(rng.normal(size=(2, 3, 9, 11)))
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge")
    weights = np.outer([1, 2, 2, 2, 1], [1, 2, 2, 2, 1]) / 64
    for i, j, y, k in np.ndindex(2, 3, 9, 11):
        expected = (padded[i, j, y : y + 5, k : k + 5] * weights).sum()
        assert float(smooth(x)[i, j, y, k]) == pytest.approx(expected)


def test_no_points_give_no_proposals(random_sam, picture):
    assert len(propose(random_sam, embed(random_sam, picture), np.zeros((0, 2)))) == 0


def test_an_official_checkpoint_is_loaded_and_gives_what_the_predictor_gives(tmp_path, monkeypatch):
    """An encoder as wide as vit_b's, with a block of windows and a global one, on 64 pixels."""
    torch.manual_seed(0)
    encoder = {"depth": 2, "embed_dim": 768, "img_size": 64, "mlp_ratio": 0.5, "num_heads": 12}
    encoder |= {"window_size": 3, "global_attn_indexes": (1,), "use_rel_pos": True}

    def build():
        official = build_small_sam(64, dim=256)
        official.image_encoder = ImageEncoderViT(patch_size=16, qkv_bias=True, **encoder)
        grid = (4, 4)
        official.prompt_encoder = PromptEncoder(256, grid, (64, 64), mask_in_chans=16)
        official.mask_decoder.output_upscaling = official.mask_decoder.output_upscaling[:5]
        return official.eval()

    original = build()
    for name, weight in original.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:
            torch.nn.init.normal_(weight, std=0.3)
    torch.save(original.state_dict(), tmp_path / "mine.pth")
    monkeypatch.setattr(sam, "sam_model_registry", {"vit_b": build})
    loaded = load_sam(tmp_path / "mine.pth")
    assert any(block.attn.forward.__func__ is sam._attend_by_head
               for block in loaded.image_encoder.blocks)  # fmt: skip
    image = np.random.default_rng(0).integers(0, 255, (47, 80, 3), dtype=np.uint8)
    points = np.array([[3, 40], [79, 0], [40, 20]], float)
    _, iou, low = _reference(original, image, points)
    found = propose(loaded, embed(loaded, image), points)
    best = low[torch.arange(3), iou.argmax(1)]
    assert best.std() > 0.01
    torch.testing.assert_close(found.padded, best, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.iou, iou.max(1).values.clamp(0, 1), atol=1e-5)


@pytest.mark.parametrize(
    ("device", "side", "batch"), [("cpu", 256, 32), ("cpu", 1024, 4), ("cuda", 256, 256),
                                  ("cuda", 1024, 64)],
)  # fmt: skip
def test_without_a_size_the_batch_is_that_of_the_device(device, side, batch):
    encoder = SimpleNamespace(img_size=side)
    model = SimpleNamespace(device=torch.device(device), image_encoder=encoder)
    assert sam.default_batch(model) == batch


def test_the_batch_of_the_device_is_what_is_decoded_at_once(random_sam, picture, monkeypatch):
    sizes, original = [], sam.decode
    monkeypatch.setattr(sam, "default_batch", lambda model: 3)

    def counted(model, features, points, *rest, **options):
        sizes.append(points.shape[1])
        return original(model, features, points, *rest, **options)

    monkeypatch.setattr(sam, "decode", counted)
    points = np.random.default_rng(2).integers(0, 70, (11, 2))
    propose(random_sam, embed(random_sam, picture), points, points_per_batch=None)
    assert sum(sizes) == 11 and max(sizes) <= 3


def test_missing_and_wrong_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match="train_sam"):
        load_sam(tmp_path / "none.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not a Segment Anything checkpoint"):
        load_sam(tmp_path / "other.pth")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="sam_small"):
        load_sam(tmp_path / "other.safetensors")
    kind = {"kind": "sam_small", "image_size": "64", "dim": "32"}
    save_file({"a": torch.zeros(1)}, tmp_path / "early.safetensors", metadata=kind)
    with pytest.raises(ValueError, match=r"does not say .* \(blocks, body, width\)"):
        load_sam(tmp_path / "early.safetensors")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="could not be read"):
        load_sam(tmp_path / "text.pth")
    torch.save({"image_encoder.pos_embed": torch.zeros(1, 2, 2, 99)}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="width 99"):
        load_sam(tmp_path / "odd.pth")


class _Server(http.server.BaseHTTPRequestHandler):
    """Serves `body`; /whole ignores ranges, /short breaks off, anything else than .pth is gone."""

    body = bytes(range(256)) * 40

    def do_GET(self):
        if not self.path.endswith(".pth"):
            self.send_error(404)
            return
        start = 0 if "whole" in self.path else int(self.headers.get("Range", "bytes=0-")[6:-1])
        if start >= len(self.body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.body) - start))
        self.end_headers()
        end = 3000 if "short" in self.path else None
        self.wfile.write(self.body[start:end])

    def log_message(self, *_):
        pass


DIGEST = hashlib.sha256(_Server.body).hexdigest()


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.mark.parametrize("name", ["x.pth", "whole.pth"])
@pytest.mark.parametrize("have", [0, 1000, len(_Server.body)])
def test_download_resumes_and_verifies(server, tmp_path, name, have):
    (tmp_path / "a.pth.part").write_bytes(_Server.body[:have])
    path = download(f"{server}/{name}", DIGEST, tmp_path / "a.pth", progress=False)
    assert path.read_bytes() == _Server.body and not (tmp_path / "a.pth.part").exists()
    assert download("http://127.0.0.1:9/x.pth", DIGEST, path) == path, "is there already"
    path.write_bytes(b"another file")
    with pytest.raises(ValueError, match=r"a\.pth: SHA-256 is .*remove it"):
        download("http://127.0.0.1:9/x.pth", DIGEST, path)
    assert path.read_bytes() == b"another file", "it is not ours to remove"


def test_a_broken_transfer_is_taken_up_again(server, tmp_path):
    path = tmp_path / "a.pth"
    with pytest.raises(ConnectionError, match=r"broke off.*again"):
        download(f"{server}/short.pth", DIGEST, path, progress=False)
    assert not path.exists() and len((tmp_path / "a.pth.part").read_bytes()) == 3000
    assert download(f"{server}/x.pth", DIGEST, path, progress=False).read_bytes() == _Server.body


def test_a_wrong_file_is_removed(server, tmp_path):
    with pytest.raises(ValueError, match=r"SHA-256.*removed"):
        download(f"{server}/x.pth", "0" * 64, tmp_path / "b.pth", progress=False)
    assert not list(tmp_path.glob("b.pth*"))


def test_download_shows_its_progress(server, tmp_path, capsys):
    download(f"{server}/x.pth", DIGEST, tmp_path / "a.pth")
    assert "a.pth" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["http://127.0.0.1:9/x.pth", "{server}/none"])
def test_download_without_network_says_what_to_do(server, tmp_path, where):
    with pytest.raises(ConnectionError, match="put it at"):
        download(where.format(server=server), "0" * 64, tmp_path / "x.pth", progress=False)


def test_attention_head_by_head_is_that_of_the_original():
    from segment_anything.modeling.image_encoder import Attention

    torch.manual_seed(0)
    attention = Attention(24, num_heads=3, use_rel_pos=True, input_size=(6, 9))
    for table in (attention.rel_pos_h, attention.rel_pos_w):
        torch.nn.init.normal_(table)
    x = torch.randn(2, 6, 9, 24)
    torch.testing.assert_close(sam._attend_by_head(attention, x), attention(x))


@pytest.mark.parametrize(("n", "largest", "expected"), [
    (36, 32, 18), (64, 32, 32), (65, 32, 17), (450, 32, 29), (3, 32, 2), (1, 32, 1), (0, 32, 1),
])  # fmt: skip
def test_batches_are_even_over_two_threads(monkeypatch, n, largest, expected):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    batch = _even_batch(n, largest, torch.device("cpu"))
    assert batch == expected <= largest
    assert _even_batch(n, largest, torch.device("cuda")) == largest
