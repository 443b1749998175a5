"""Loading, embedding, decoding."""

import hashlib
import http.server
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from segment_anything.modeling import Sam

from helpers import phantom
from helpers.sam import (
    SMALL_WEIGHTS,
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


def _reference(sam, image, points):
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    coords = torch.as_tensor(predictor.transform.apply_coords(points, image.shape[:2]))
    return predictor.predict_torch(
        coords.float()[:, None], torch.ones(len(points), 1), multimask_output=True
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


def test_the_batch_changes_nothing(random_sam, picture):
    points = np.random.default_rng(2).integers(0, 70, (11, 2))
    embedding = embed(random_sam, picture)
    one = propose(random_sam, embedding, points, points_per_batch=1)
    many = propose(random_sam, embedding, points, points_per_batch=11)
    torch.testing.assert_close(one.padded, many.padded, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(one.iou, many.iou, atol=1e-5)


def test_decoding_several_images_at_once_equals_the_mask_decoder(random_sam):
    torch.manual_seed(1)
    features = torch.randn(2, 32, 8, 8)
    points, labels = torch.rand(2, 5, 2, 2) * 64, torch.randint(0, 2, (2, 5, 2)).float()
    for former in (None, torch.randn(2, 5, 32, 32)):
        logits, iou = decode(random_sam, features, points, labels, former)
        for b in range(2):
            sparse, dense = random_sam.prompt_encoder(
                (points[b], labels[b]), None, None if former is None else former[b][:, None]
            )
            expected, quality = random_sam.mask_decoder.predict_masks(
                features[b : b + 1], random_sam.prompt_encoder.get_dense_pe(), sparse, dense
            )
            torch.testing.assert_close(logits[b], expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(iou[b], quality, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("choice", ["largest", "middle", "smallest", "single"])
def test_mask_choices(random_sam, picture, choice):
    points = np.array([[5, 6], [100, 60]])
    _, _, low = _reference(random_sam, picture, points.astype(float))
    proposals = propose(random_sam, embed(random_sam, picture), points, mask_choice=choice)
    if choice == "single":
        assert proposals.padded.shape == low[:, 0].shape
        return
    h, w = proposals.logits.shape[1:]
    area = (low[:, :, :h, :w] > 0).flatten(2).sum(-1).sort(1).values
    column = {"smallest": 0, "middle": 1, "largest": 2}[choice]
    torch.testing.assert_close((proposals.logits > 0).flatten(1).sum(1), area[:, column])


def test_logits_cover_the_image_only(random_sam):
    image = np.zeros((32, 128, 3), np.uint8)
    proposals = propose(random_sam, embed(random_sam, image), np.array([[0, 0]]))
    assert proposals.padded.shape == (1, 32, 32) and proposals.logits.shape == (1, 8, 32)
    assert proposals.full(0).shape == (32, 128)


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
    with pytest.raises(ValueError, match="mask_choice"):
        propose(random_sam, embedding, np.array([[1, 1]]), mask_choice="worst")
    with pytest.raises(ValueError, match="points_per_batch"):
        propose(random_sam, embedding, np.array([[1, 1]]), points_per_batch=0)
    with pytest.raises(ValueError, match="uint8"):
        embed(random_sam, picture / 255.0)
    with pytest.raises(ValueError, match="multiple of 32"):
        build_small_sam(100)


def test_no_points_give_no_proposals(random_sam, picture):
    assert len(propose(random_sam, embed(random_sam, picture), np.zeros((0, 2)))) == 0


def test_missing_and_wrong_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match="train_sam"):
        load_sam(tmp_path / "none.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="not a Segment Anything checkpoint"):
        load_sam(tmp_path / "other.pth")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="sam_small"):
        load_sam(tmp_path / "other.safetensors")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="could not be read"):
        load_sam(tmp_path / "text.pth")
    torch.save({"image_encoder.pos_embed": torch.zeros(1, 2, 2, 99)}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="width 99"):
        load_sam(tmp_path / "odd.pth")


class _Server(http.server.BaseHTTPRequestHandler):
    body = bytes(range(256)) * 40

    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.body) - start))
        self.end_headers()
        self.wfile.write(self.body[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/x.pth"
        httpd.shutdown()


def test_download_resumes_and_verifies(server, tmp_path):
    digest = hashlib.sha256(_Server.body).hexdigest()
    (tmp_path / "a.pth.part").write_bytes(_Server.body[:1000])
    path = download(server, digest, tmp_path / "a.pth", progress=False)
    assert path.read_bytes() == _Server.body and not (tmp_path / "a.pth.part").exists()
    with pytest.raises(ValueError, match="SHA-256"):
        download(server, "0" * 64, tmp_path / "b.pth", progress=False)
    assert not list(tmp_path.glob("b.pth*"))


def test_download_without_network_says_what_to_do(tmp_path):
    with pytest.raises(ConnectionError, match="put it at"):
        download("http://127.0.0.1:9/x.pth", "0" * 64, tmp_path / "x.pth", progress=False)
