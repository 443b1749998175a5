"""Classifiers that judge augmentation: build, train and apply them in one fixed way.

The networks and the training are those of the paper (design step 16): Adam, cosine annealing with
warm restarts, the state that is best on the validation images.
Two things are added so that training sets of different size can be compared: the number of
optimiser steps is given, not derived from the number of images, and every random choice comes from
one generator.
"""

from __future__ import annotations

import contextlib
import hashlib
import numbers
import pickle
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import timm
import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts
from tqdm import tqdm

from helpers import features
from helpers.files import replacing
from helpers.images import check_images
from helpers.weights import read_tensors

#: Networks of the paper, and the small one whose ImageNet weights are always at hand.
NAMES = ("lite0", "efficientnet_b0", "resnet50", "densenet121", "ctranspath")

#: Adam's settings in the paper.
BETAS, EPSILON = (0.9, 0.999), 1e-8
#: Epochs between two warm restarts in the paper, T_0.
RESTART = 25


class Classifier(nn.Module):
    """A timm network behind its own normalisation.

    Parameters
    ----------
    name : str
        One of :data:`NAMES`.
    network : nn.Module
        Maps normalised (n, 3, H, W) to (n, n_classes) logits.
    n_classes : int

    Notes
    -----
    ``forward`` takes (n, 3, H, W) float tensors in [0, 1].
    """

    def __init__(self, name: str, network: nn.Module, n_classes: int) -> None:
        super().__init__()
        self.name, self.n_classes, self.network = name, n_classes, network
        mean, std = features.HALF if name == "lite0" else features.IMAGENET
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) in [0, 1] to (n, n_classes) logits."""
        return self.network((x - self.mean) / self.std)


@dataclass(frozen=True)
class Training:
    """What :func:`fit` did.

    Attributes
    ----------
    curve : list of dict
        One record an epoch: epoch, step, rate, loss, and val_loss, val_accuracy if validated.
    best_epoch : int
        Epoch whose state the network holds now, counted from 1.
    steps : int
        Optimiser steps made.
    """

    curve: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    steps: int = 0


# --- networks -------------------------------------------------------------------------------------


def native_size(name: str, image_size: int) -> int:
    """Input side of a network: 224 for CTransPath, whose window is fixed, else `image_size`."""
    _known(name)
    return 224 if name == "ctranspath" else image_size


def learning_rates(name: str) -> tuple[float, float]:
    """Highest and lowest learning rate of the paper's schedule for a network."""
    _known(name)
    return (2e-5, 2e-8) if name == "ctranspath" else (1e-3, 1e-5)


def build_classifier(
    name: str,
    n_classes: int,
    *,
    weights: str | Path | None = None,
    generator: torch.Generator | None = None,
) -> Classifier:
    """Build a classifier.

    Parameters
    ----------
    name : str
        One of :data:`NAMES`.
    n_classes : int
        At least 2.
    weights : path or str, optional
        ``"random"``, ``"hub"`` (timm's ImageNet weights; for CTransPath its hub model), or a
        checkpoint, ``.safetensors`` or torch. By default lite0 starts from the ImageNet weights of
        its package, CTransPath from the hub, the others at random. The last layer always starts
        at random.
    generator : torch.Generator, optional
        Source of random weights; by default one with seed 0.

    Returns
    -------
    Classifier
        In evaluation mode, on the CPU.

    Raises
    ------
    ValueError
        For an unknown name, fewer than two classes, or a checkpoint that is damaged or belongs to
        another network.
    FileNotFoundError
        If there is no such checkpoint.
    ConnectionError
        If the hub cannot be reached.
    """
    _known(name)
    if not isinstance(n_classes, numbers.Integral) or n_classes < 2:
        raise ValueError(f"n_classes is {n_classes!r}: a classifier needs at least 2 classes")
    with _seeded(_draw_seed(generator)):
        if name == "ctranspath" and (weights is None or str(weights).startswith(("hub", "hf-"))):
            hub = None if weights in (None, "hub") else weights
            network = features.load_extractor("ctranspath", path=hub).network
            network.requires_grad_(True)
            network.reset_classifier(n_classes)
        elif weights == "hub":
            network = _from_hub(name, n_classes)
        else:
            network = _blank(name, n_classes)
            if weights is None and name == "lite0":
                _load_body(network, features.lite_state_dict(), "the package of lite0")
            elif weights not in (None, "random"):
                remedy = "give a .safetensors or .pth file, 'hub' or 'random'"
                _load_body(network, read_tensors(weights, remedy), str(weights))
    return Classifier(name, network, n_classes).eval()


def _known(name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"no classifier is called {name!r}: use one of {', '.join(NAMES)}")


def _blank(name: str, n_classes: int) -> nn.Module:
    if name == "ctranspath":
        network = features.ctranspath_network()
        network.reset_classifier(n_classes)
        return network
    model = "tf_efficientnet_lite0" if name == "lite0" else name
    return timm.create_model(model, pretrained=False, num_classes=n_classes)


def _from_hub(name: str, n_classes: int) -> nn.Module:
    model = "tf_efficientnet_lite0" if name == "lite0" else name
    try:
        return timm.create_model(model, pretrained=True, num_classes=n_classes)
    except Exception as error:  # the hub client raises many kinds
        raise ConnectionError(
            f"ImageNet weights of {name} could not be fetched ({type(error).__name__}): give a "
            "file with weights=PATH, or weights='random', or use 'lite0', which needs no network"
        ) from error


def _load_body(network: nn.Module, found: Mapping[str, torch.Tensor], where: str) -> None:
    """All layers but the last from a state dictionary."""
    found = {k.removeprefix("module.").removeprefix("network."): v for k, v in found.items()}
    last = f"{_head(network)}."
    wanted = {k: v for k, v in network.state_dict().items() if not k.startswith(last)}
    missing = [k for k in wanted if k not in found]
    wrong = [k for k in wanted if k in found and found[k].shape != wanted[k].shape]
    if missing or wrong:
        raise ValueError(
            f"{where} belongs to another network: {len(missing)} of {len(wanted)} tensors are "
            f"absent and {len(wrong)} have another shape (e.g. {(missing + wrong)[0]})"
        )
    network.load_state_dict({**network.state_dict(), **{k: found[k] for k in wanted}})


def _head(network: nn.Module) -> str:
    """Name of the last layer, e.g. ``classifier``."""
    layer = network.get_classifier()
    return next(name for name, module in network.named_modules() if module is layer)


# --- training -------------------------------------------------------------------------------------


def fit(
    classifier: Classifier,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    val_images: np.ndarray | None = None,
    val_labels: np.ndarray | None = None,
    epochs: int = 50,
    steps_per_epoch: int | None = None,
    batch_size: int = 64,
    rates: tuple[float, float] | None = None,
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
    batch_transform: Callable[..., Any] | None = None,
    generator: torch.Generator,
    device: str = "cpu",
    workers: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> Training:
    """Train a classifier in place, and leave it in its best state on the validation images.

    Parameters
    ----------
    classifier : Classifier
    images : (n, H, W, 3) uint8 ndarray
        Training images of the network's input size (see :func:`resize`).
    labels : (n,) int ndarray
        Classes, 0 to n_classes - 1; each must occur.
    val_images, val_labels : ndarray, optional
        As `images` and `labels`. The best epoch has the highest validation accuracy, ties go to
        the lower loss, then to the later epoch. Without them the last state is kept.
    epochs : int
        Epochs; validation follows each.
    steps_per_epoch : int, optional
        Optimiser steps an epoch, by default ``ceil(n / batch_size)``. Fix it to give training sets
        of different size the same amount of training.
    batch_size : int
        Images a step, at least 2. Images come in the order of one permutation after another, so
        that every batch is full.
    rates : (float, float), optional
        Highest and lowest learning rate, by default :func:`learning_rates`: cosine annealing with
        a warm restart every :data:`RESTART` epochs, or every `epochs` if they are fewer.
    transform : callable, optional
        Augmentation of one image: (3, H, W) uint8 tensor to (3, H, W) uint8 or float in [0, 1].
    batch_transform : callable, optional
        Augmentation of a batch, e.g. MixUp: (images, labels) to (images, soft labels).
    generator : torch.Generator
        Source of the order and of all augmentation; the same state gives the same weights.
    device : str
    workers : int
        Processes that make batches ahead; they change the speed alone. What transforms has to be
        such that it can be pickled, then.
    checkpoint : path or str, optional
        Written after each epoch; a training that finds the file goes on from it. Images, labels and
        settings are compared, augmentation is not. Remove it when the training is done with.
    progress : bool

    Returns
    -------
    Training

    Raises
    ------
    ValueError
        For labels out of range, a class without training image, or shapes that do not agree.
    FloatingPointError
        If the loss is not finite; the network is left as it was after the best epoch so far, or
        before the training.
    """
    images, labels = _checked(images, labels, classifier.n_classes, "training")
    _check_training(labels, classifier.n_classes, batch_size, epochs, steps_per_epoch)
    validation = None
    if val_images is not None and len(val_images):
        validation = _checked(val_images, val_labels, classifier.n_classes, "validation")
    steps_per_epoch = steps_per_epoch or -(-len(images) // batch_size)
    high, low = rates or learning_rates(classifier.name)
    seed = _draw_seed(generator)
    settings = {
        "seed": seed, "images": len(images), "epochs": epochs, "steps_per_epoch": steps_per_epoch,
        "batch_size": batch_size, "rates": [high, low],
        "images and labels": _digest(images, labels, *(validation or ())),
    }  # fmt: skip

    classifier.to(device, memory_format=torch.channels_last)  # faster on CPU and GPU
    optimiser = torch.optim.Adam(classifier.parameters(), lr=high, betas=BETAS, eps=EPSILON)
    schedule = CosineAnnealingWarmRestarts(optimiser, min(RESTART, epochs), eta_min=low)
    state = _resume(checkpoint, classifier, optimiser, settings) or {
        "epoch": 0, "curve": [], "best": _copy(classifier), "best_epoch": 0,
        "best_key": (-1.0, 0.0, 0),
    }  # fmt: skip
    batches = _Batches(images, labels, batch_size, seed, transform, batch_transform)
    ahead = iter(torch.utils.data.DataLoader(
        batches, batch_size=None, num_workers=workers, generator=torch.Generator(),
        sampler=range(state["epoch"] * steps_per_epoch, epochs * steps_per_epoch),
        multiprocessing_context="spawn" if workers else None,
        pin_memory=torch.device(device).type == "cuda",
    ))  # fmt: skip
    bar = tqdm(
        total=epochs * steps_per_epoch, initial=state["epoch"] * steps_per_epoch,
        desc="training", disable=not progress, leave=False,
    )  # fmt: skip
    try:
        with bar:
            for epoch in range(state["epoch"], epochs):
                start = epoch * steps_per_epoch
                with _seeded((seed + 1 + epoch) % 2**62):
                    steps = range(start, start + steps_per_epoch)
                    loss = _epoch(classifier, optimiser, schedule, steps, ahead, device, bar)
                record = {"epoch": epoch + 1, "step": start + steps_per_epoch, "loss": loss}
                record["rate"] = optimiser.param_groups[0]["lr"]
                key = (0.0, 0.0, epoch)
                if validation:
                    measured = _validate(classifier, *validation, batch_size, device)
                    record |= measured
                    key = (measured["val_accuracy"], -measured["val_loss"], epoch)
                state["curve"].append(record)
                if key >= tuple(state["best_key"]):
                    state |= {"best": _copy(classifier), "best_epoch": epoch + 1, "best_key": key}
                state["epoch"] = epoch + 1
                _keep(checkpoint, classifier, optimiser, settings, state)
    finally:
        classifier.load_state_dict(state["best"])
        classifier.eval()
    return Training(state["curve"], state["best_epoch"], epochs * steps_per_epoch)


def predict(
    classifier: Classifier,
    images: Iterable[np.ndarray],
    *,
    size: int | None = None,
    batch: int = 64,
    device: str = "cpu",
) -> np.ndarray:
    """Class probabilities of images.

    Parameters
    ----------
    classifier : Classifier
    images : iterable of (H, W, 3) uint8 ndarray
        Of the network's input size. They are asked for batch by batch: of a set that is read from
        files, only as many are in memory.
    size : int, optional
        Input side to which each batch is brought first, see :func:`resize`.
    batch : int
        Images a pass; it changes speed, not the result.
    device : str

    Returns
    -------
    (n, n_classes) float32 ndarray
        Rows sum to 1.
    """
    classifier.to(device).eval()  # outside of inference mode: what is moved in it cannot be trained
    images, found = iter(images), [np.zeros((0, classifier.n_classes), np.float32)]
    with torch.inference_mode():
        while part := list(islice(images, batch)):
            part = check_images(np.stack(part) if size is None else resize(part, size))
            x = _tensor(part).to(device).float().div_(255)
            found.append(classifier(x).float().softmax(1).cpu().numpy())
    return np.concatenate(found)


def resize(images: Any, size: int) -> np.ndarray:
    """Bring images to one size, once, before training.

    Parameters
    ----------
    images : iterable of (H, W, 3) uint8 ndarray
        Square images of any size.
    size : int
        Side of the result, pixels.

    Returns
    -------
    (n, size, size, 3) uint8 ndarray
    """
    out = []
    for image in images:
        if image.shape[:2] != (size, size):
            way = cv2.INTER_AREA if max(image.shape[:2]) > size else cv2.INTER_LINEAR
            image = cv2.resize(image, (size, size), interpolation=way)
        out.append(image)
    return np.stack(out) if out else np.zeros((0, size, size, 3), np.uint8)


class _Batches(torch.utils.data.Dataset):
    """Batches by number: batch k is the same whenever it is asked for, in whichever process."""

    def __init__(self, images, labels, size, seed, transform, batch_transform) -> None:
        self._images = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
        self._labels = torch.from_numpy(labels)
        self._size, self._seed = size, seed
        self._transform, self._batch_transform = transform, batch_transform
        self._permutations: dict[int, torch.Tensor] = {}

    def __getitem__(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        index = self._index(k)
        chosen = [self._images[i].contiguous() for i in index.tolist()]
        with _seeded((self._seed + 104_729 * (k + 1)) % 2**62, devices=()):
            if self._transform is not None:
                chosen = [self._transform(image) for image in chosen]
            x = torch.stack([torch.as_tensor(image) for image in chosen])
            x = x.float().div_(255) if x.dtype == torch.uint8 else x.float().clamp_(0, 1)
            y = self._labels[index]
            if self._batch_transform is not None:
                x, y = self._batch_transform(x, y)
        return x, y

    def _index(self, k: int) -> torch.Tensor:
        n = len(self._images)
        positions = torch.arange(k * self._size, (k + 1) * self._size)
        return torch.stack([self._permutation(int(p) // n)[int(p) % n] for p in positions])

    def _permutation(self, number: int) -> torch.Tensor:
        if number not in self._permutations:
            own = torch.Generator().manual_seed((self._seed + 7919 * (number + 1)) % 2**62)
            self._permutations[number] = torch.randperm(len(self._images), generator=own)
        return self._permutations[number]


def _epoch(classifier, optimiser, schedule, steps: range, ahead: Iterator, device, bar) -> float:
    """One epoch of optimiser steps, on the batches that come next; mean loss."""
    classifier.train()
    losses = []
    for step, (x, y) in zip(steps, ahead, strict=False):
        schedule.step(step / len(steps))
        x, y = (each.to(device, non_blocking=True) for each in (x, y))
        loss = functional.cross_entropy(classifier(x), y)
        value = loss.item()
        if not np.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} in step {step + 1} (learning rate "
                f"{optimiser.param_groups[0]['lr']:.2g}): lower the rates, or look for images of "
                "one colour"
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        losses.append(value)
        bar.update()
    return float(np.mean(losses))


def _check_training(labels, n_classes: int, batch_size: int, epochs: int, steps) -> None:
    absent = sorted(set(range(n_classes)) - set(labels.tolist()))
    if absent:
        raise ValueError(
            f"no training image has class {', '.join(map(str, absent))} of {n_classes}: add "
            "images of it, or leave the class out of the study"
        )
    if batch_size < 2 or epochs < 1 or (steps is not None and steps < 1):
        raise ValueError(
            f"batch_size={batch_size}, epochs={epochs}, steps_per_epoch={steps}: need at least 2 "
            "images a batch (for batch normalisation), 1 epoch and 1 step"
        )


def _validate(classifier, images, labels, batch: int, device: str) -> dict[str, float]:
    p = predict(classifier, images, batch=batch, device=device)
    own = np.maximum(p[np.arange(len(labels)), labels], np.finfo(np.float32).tiny)
    return {
        "val_loss": float(-np.log(own).mean()),
        "val_accuracy": float((p.argmax(1) == labels).mean()),
    }


def _checked(images, labels, n_classes: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels = check_images(images, f"{kind} images"), np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        raise ValueError(
            f"{kind} labels are {labels.dtype} of shape {labels.shape}: give one class index for "
            f"each of the {len(images)} images"
        )
    if len(labels) and (labels.min() < 0 or labels.max() >= n_classes):
        raise ValueError(
            f"{kind} labels run from {labels.min()} to {labels.max()}: with {n_classes} classes "
            f"they lie between 0 and {n_classes - 1}"
        )
    return images, labels.astype(np.int64)


def _tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _copy(classifier: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in classifier.state_dict().items()}


def _draw_seed(generator: torch.Generator | None) -> int:
    if generator is None:
        return 0
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


@contextlib.contextmanager
def _seeded(seed: int, devices: Collection[int] | None = None) -> Iterator[None]:
    """Torch's global random state, which layers and torchvision draw from, set for a while.

    It is that of the CPU and of all GPUs, or of those in `devices`.
    """
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:12]


def _keep(path: str | Path | None, classifier, optimiser, settings: dict, state: dict) -> None:
    if path is None:
        return
    content = {
        "settings": settings,
        "network": classifier.state_dict(),
        "optimiser": optimiser.state_dict(),
        "state": {**state, "best_key": list(state["best_key"])},
    }
    with replacing(path) as temporary:
        torch.save(content, temporary)


def _resume(path: str | Path | None, classifier, optimiser, settings: dict) -> dict | None:
    if path is None or not Path(path).exists():
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        begun = found["settings"]
        if other := [f"{key} {begun[key]}" for key in settings if begun[key] != settings[key]]:
            raise ValueError(f"it was begun with {', '.join(other)}")
        classifier.load_state_dict(found["network"])
        optimiser.load_state_dict(found["optimiser"])
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"{path} is no checkpoint of this training ({str(error)[:120]}): remove it to start "
            "afresh"
        ) from error
    return found["state"]
