"""Segment Anything: loading, embedding and batched decoding of point prompts.

Two kinds of checkpoints give the same kind of object, a ``segment_anything.modeling.Sam``:
the official ``vit_b``, ``vit_l`` and ``vit_h``, and a small one trained for this book
(:mod:`helpers.train_sam`), whose image encoder is an EfficientNet-Lite with a feature pyramid.

An image is embedded once; all prompts are decoded against that embedding in batches, as masks of
low resolution.
Only the masks that are kept are ever scaled up to the size of the image.
"""

from __future__ import annotations

import os
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import numpy as np
import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.image_encoder import get_rel_pos
from segment_anything.utils.transforms import ResizeLongestSide
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from helpers import files
from helpers.config import torch_device
from helpers.crops import Box, inner_edges, reaches
from helpers.images import check_image
from helpers.processes import at_once, in_threads
from helpers.weights import read_tensors, read_weights

#: Weights of the small model, shipped with the book.
SMALL_WEIGHTS = Path(__file__).resolve().parents[1] / "data" / "weights" / "sam_small.safetensors"
#: Where official checkpoints are kept after the download.
DOWNLOADS = Path(__file__).resolve().parents[1] / "data" / "downloads"
#: Official checkpoints: address and SHA-256.
OFFICIAL: dict[str, tuple[str, str]] = {
    "vit_b": (
        "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth",
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    "vit_l": (
        "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_l_0b3195.pth",
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "vit_h": (
        "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth",
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
}
#: Ways to take one mask of the three that a single click gives.
MASK_CHOICES = ("best", "smallest", "middle", "largest", "single")
#: Arguments of :func:`build_small_sam`, which the file of its weights names.
SMALL_SETTINGS = ("image_size", "dim", "body", "width", "blocks")
_STRIDE = 8
#: Places of the image upscaled at once on a CPU: their 16 times as many vectors fit the cache.
_PIECE = 1024


class PyramidEncoder(nn.Module):
    """EfficientNet-Lite and a light feature pyramid, in the place of SAM's image encoder.

    Parameters
    ----------
    image_size : int
        Side of the square input in pixels, a multiple of 32.
    dim : int
        Channels of the embedding.
    body : str
        "lite0", "lite1" or "lite2": how large an EfficientNet-Lite.
    width : int
        Channels of the pyramid.
    blocks : int
        Residual blocks at each of its two finer levels.

    Notes
    -----
    Maps a (B, 3, S, S) batch, normalised as SAM does, to (B, dim, S/8, S/8).
    Features of stride 4 enter through a space-to-depth step, so that outlines stay sharp.
    """

    def __init__(
        self,
        image_size: int = 256,
        dim: int = 128,
        *,
        body: str = "lite2",
        width: int = 192,
        blocks: int = 3,
    ) -> None:
        super().__init__()
        timm = import_timm()
        self.img_size = image_size
        self.body = timm.create_model(
            f"tf_efficientnet_{body}", features_only=True, out_indices=(1, 2, 3, 4)
        )
        c4, c8, c16, c32 = self.body.feature_info.channels()
        self.lateral4 = nn.Conv2d(4 * c4, width, 1)
        self.lateral8 = nn.Conv2d(c8, width, 1)
        self.lateral16 = nn.Conv2d(c16, width, 1)
        self.lateral32 = nn.Conv2d(c32, width, 1)
        self.smooth16 = nn.ModuleList(_separable(width) for _ in range(blocks))
        self.smooth8 = nn.ModuleList(_separable(width) for _ in range(blocks))
        self.neck = nn.Sequential(
            LayerNorm2d(width), nn.Conv2d(width, dim, 3, padding=1, bias=False), LayerNorm2d(dim)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embed a batch of square images."""
        f4, f8, f16, f32 = self.body(x)
        up = {"scale_factor": 2.0, "mode": "bilinear", "align_corners": False}
        p16 = self.lateral16(f16) + F.interpolate(self.lateral32(f32), **up)
        for block in self.smooth16:
            p16 = p16 + block(p16)
        p8 = self.lateral8(f8) + F.interpolate(p16, **up)
        p8 = p8 + self.lateral4(F.pixel_unshuffle(f4, 2))
        for block in self.smooth8:
            p8 = p8 + block(p8)
        return self.neck(p8)


class Smooth(nn.Module):
    """Mean over the places that a cell of the embedding is cut into, four along each side.

    Transposed convolutions cut each cell into 4 x 4 places by weights of their own. Where the
    network is in doubt, the logits then repeat with the cells, and masks look like a chequerboard.
    The weights (1, 2, 2, 2, 1) / 8 along rows and columns take away exactly what repeats after
    two or four places. At the end of the upscaling this smooths the logits, since these are linear
    in it.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Smooth (..., h, w) along its last two dimensions; the border is continued."""
        planes = F.pad(x.reshape(-1, 1, *x.shape[-2:]), (2, 2, 2, 2), mode="replicate")
        for shift in (1, 1, 2):  # (1, 1) * (1, 1) * (1, 0, 1) = (1, 2, 2, 2, 1)
            planes = planes[..., shift:, :] + planes[..., :-shift, :]
        for shift in (1, 1, 2):
            planes = planes[..., shift:] + planes[..., :-shift]
        return (planes / 64).reshape(x.shape)


def import_timm():
    """Import timm without the advice on notebook widgets that its imports print."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")
        import timm
    return timm


def _separable(dim: int) -> nn.Sequential:
    return nn.Sequential(
        LayerNorm2d(dim),
        nn.Conv2d(dim, dim, 5, padding=2, groups=dim),
        nn.Conv2d(dim, dim, 1),
        nn.GELU(),
        nn.Conv2d(dim, dim, 1),
    )


def build_small_sam(image_size: int = 256, *, dim: int = 128, **encoder: Any) -> Sam:
    """Build the small model with random weights.

    Parameters
    ----------
    image_size : int
        Side of the network's square input, a multiple of 32 and at least 64.
    dim : int
        Width of the embedding and of the two-way transformer.
    **encoder
        Further settings of :class:`PyramidEncoder`.

    Returns
    -------
    Sam
        A ``segment_anything.modeling.Sam``, in evaluation mode.

    Raises
    ------
    ValueError
        If `image_size` is not a multiple of 32 or below 64.
    """
    if image_size % 32 or image_size < 64:
        raise ValueError(
            f"image_size = {image_size} does not fit the encoder's strides. "
            "Use a multiple of 32, at least 64 (the shipped weights were trained at 256)."
        )
    grid = (image_size // _STRIDE,) * 2
    sam = Sam(
        image_encoder=PyramidEncoder(image_size, dim, **encoder),
        prompt_encoder=PromptEncoder(
            embed_dim=dim,
            image_embedding_size=grid,
            input_image_size=(image_size, image_size),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=dim,
            transformer=TwoWayTransformer(depth=2, embedding_dim=dim, num_heads=4, mlp_dim=512),
            num_multimask_outputs=3,
            iou_head_depth=3,
            iou_head_hidden_dim=128,
        ),
    )
    sam.mask_decoder.output_upscaling.append(Smooth())
    return sam.eval()


def load_sam(
    checkpoint: str | os.PathLike = "small",
    *,
    device: str | torch.device = "cpu",
    image_size: int | None = None,
    progress: bool = True,
) -> Sam:
    """Load a Segment Anything model.

    Parameters
    ----------
    checkpoint : str or path
        "small" for the weights shipped with the book; "vit_b", "vit_l" or "vit_h" for the
        official ones (downloaded once, checksum verified); or a path to a checkpoint of any of
        these kinds (``.safetensors`` small model, ``.pth`` official).
    device : str or torch.device
        "auto" takes a GPU where there is one.
    image_size : int, optional
        Side of the network's input, small model only; by default the size it was trained at.
    progress : bool
        Show a progress bar while downloading.

    Returns
    -------
    Sam
        In evaluation mode, without gradients.

    Raises
    ------
    FileNotFoundError
        If the checkpoint does not exist.
    ValueError
        If the file is not a checkpoint of a known kind, or `image_size` does not fit it.
    ConnectionError
        If an official checkpoint has to be downloaded and its host cannot be reached.
    """
    device = torch_device(device)
    name = str(checkpoint)
    if name in OFFICIAL:
        _check_official(image_size)
        path = DOWNLOADS / OFFICIAL[name][0].rsplit("/", 1)[1]
        download(*OFFICIAL[name], path, progress=progress)
    elif name == "small":
        path = SMALL_WEIGHTS
    else:
        path = Path(checkpoint)
    if not path.is_file():
        raise FileNotFoundError(
            f"checkpoint {name!r}: no file at {path}. Use 'small', one of {sorted(OFFICIAL)}, or "
            "the path of a checkpoint; `python -m helpers.train_sam` trains the small one anew."
        )
    sam = _read_small(path, image_size) if path.suffix == ".safetensors" else None
    if sam is None:
        _check_official(image_size)
        sam = _read_official(path)
    return sam.eval().requires_grad_(False).to(device)


def _check_official(image_size: int | None) -> None:
    if image_size is not None:
        raise ValueError(
            f"image_size = {image_size}: official checkpoints work at 1024 only; "
            "leave image_size at None."
        )


def _read_small(path: Path, image_size: int | None) -> Sam:
    metadata, state = read_weights(path)
    if metadata.get("kind") != "sam_small":
        raise ValueError(
            f"{path} holds weights of kind {metadata.get('kind')!r}, not 'sam_small'. "
            "Give the file that `python -m helpers.train_sam` writes."
        )
    missing = set(SMALL_SETTINGS) - metadata.keys()
    if missing:
        raise ValueError(
            f"{path} does not say how its network is built ({', '.join(sorted(missing))}): it was "
            "written by another version. Train it anew with `python -m helpers.train_sam`."
        )
    built = {key: metadata[key] if key == "body" else int(metadata[key]) for key in SMALL_SETTINGS}
    if image_size:
        built["image_size"] = image_size
    sam = build_small_sam(**built)
    _fill(sam, {key: value.float() for key, value in state.items()}, path)
    return sam


def _read_official(path: Path) -> Sam:
    kinds = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
    state, key = read_tensors(path), "image_encoder.pos_embed"
    if key not in state:
        raise ValueError(
            f"{path} is not a Segment Anything checkpoint: it has no {key!r}. "
            f"Give an official {'/'.join(OFFICIAL)} file or a small model (.safetensors)."
        )
    kind = kinds.get(state[key].shape[-1])
    if kind is None:
        raise ValueError(
            f"{path}: encoder width {state[key].shape[-1]} is none of {kinds}. "
            "Only the official architectures are supported."
        )
    sam = build_official(kind)
    _fill(sam, state, path)
    return sam


def _fill(sam: Sam, state: dict[str, torch.Tensor], path: Path) -> None:
    try:
        sam.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{path} holds other tensors than its network has ({str(error)[:300]}). Download the "
            "checkpoint, or train it, again."
        ) from error


def build_official(kind: str) -> Sam:
    """Build "vit_b", "vit_l" or "vit_h" with random weights, with a fast attention.

    The encoder's attention is computed head by head by a fused kernel: the same numbers, without
    the maps of 4096 x 4096 weights of all heads in memory.
    """
    sam = sam_model_registry[kind]()
    for block in sam.image_encoder.blocks:
        block.attn.forward = MethodType(_attend_by_head, block.attn)
    return sam


def _attend_by_head(attn: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``segment_anything.modeling.image_encoder.Attention.forward``, one head after the other."""
    b, h, w, _ = x.shape
    qkv = attn.qkv(x).view(b, h, w, 3, attn.num_heads, -1)
    rows = get_rel_pos(h, h, attn.rel_pos_h)  # (h, h, c)
    columns = get_rel_pos(w, w, attn.rel_pos_w)
    heads = []
    for i in range(attn.num_heads):
        q, k, v = qkv[..., i, :].unbind(3)
        bias = torch.einsum("bhwc,hkc->bhwk", q, rows)[..., None]
        bias = bias + torch.einsum("bhwc,wkc->bhwk", q, columns)[..., None, :]
        heads.append(
            F.scaled_dot_product_attention(
                *(part.flatten(1, 2)[:, None] for part in (q, k, v)),
                attn_mask=bias.flatten(3).flatten(1, 2)[:, None],
                scale=attn.scale,
            )[:, 0]
        )
    return attn.proj(torch.cat(heads, -1).view(b, h, w, -1))


def download(url: str, sha256: str, path: Path, *, progress: bool = True) -> Path:
    """Download a file once, resuming a partial download; verify its SHA-256 each time.

    Parameters
    ----------
    url, sha256 : str
        Address and expected digest.
    path : Path
        Where the file goes; ``<path>.part`` holds an unfinished download.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Path

    Raises
    ------
    ConnectionError
        If the host cannot be reached or the transfer breaks; the partial file stays.
    ValueError
        If the digest differs; a file just downloaded is removed.
    """
    path = Path(path)
    if path.is_file():
        if (digest := files.sha256(path)) != sha256:
            raise ValueError(
                f"{path}: SHA-256 is {digest}, expected {sha256}. It is not the file of {url}: "
                "remove it, and it is downloaded again."
            )
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        complete = _fetch(request, part, have, progress)
    except (urllib.error.URLError, OSError) as error:
        if not (isinstance(error, urllib.error.HTTPError) and error.code == 416):
            raise ConnectionError(
                f"could not download {url} ({error}). Without network, fetch the file elsewhere "
                f"and put it at {path}, or use 'small' (sam_checkpoint of chapter 01), which ships "
                "with the book."
            ) from error
        complete = True  # nothing is left to fetch
    if not complete:
        raise ConnectionError(
            f"the download of {url} broke off after {part.stat().st_size} bytes. "
            "What has arrived is kept; run the same again to go on from there."
        )
    if (digest := files.sha256(part)) != sha256:
        part.unlink()
        raise ValueError(
            f"{url}: SHA-256 is {digest}, expected {sha256}. "
            "The damaged file was removed; download it again."
        )
    part.replace(path)
    return path


def _fetch(request: urllib.request.Request, part: Path, have: int, progress: bool) -> bool:
    """Write what the server sends; return whether it was all that it announced."""
    with urllib.request.urlopen(request, timeout=30) as reply:
        resumed = have and getattr(reply, "status", 200) == 206
        start = have if resumed else 0
        total = start + int(reply.headers.get("Content-Length") or 0) or None
        with (
            part.open("ab" if resumed else "wb") as file,
            tqdm(
                total=total,
                initial=start,
                unit="B",
                unit_scale=True,
                disable=not progress,
                desc=part.stem,
            ) as bar,  # fmt: skip
        ):
            while block := reply.read(1 << 20):
                file.write(block)
                bar.update(len(block))
            return total is None or file.tell() >= total


@dataclass(frozen=True)
class Embedding:
    """Image embedding and the sizes needed to go back to the image.

    Attributes
    ----------
    features : (1, C, h, w) float tensor
    input_size : (int, int)
        Height and width after the resize, before padding.
    original_size : (int, int)
        Height and width of the image, or of the crop.
    cut : (bool, bool, bool, bool)
        Whether the left, top, right and bottom edge are those of a crop inside an image.
    """

    features: torch.Tensor
    input_size: tuple[int, int]
    original_size: tuple[int, int]
    cut: tuple[bool, bool, bool, bool] = (False,) * 4


@dataclass(frozen=True)
class Proposals:
    """Masks proposed for point prompts, kept at low resolution.

    Attributes
    ----------
    padded : (n, L, L) float tensor
        Logits over the padded square that the network sees, on its device.
    iou : (n,) float32 ndarray
        Predicted IoU of each mask, clipped to [0, 1].
    input_size, original_size : (int, int)
        As in :class:`Embedding`.
    image_size : int
        Side of the network's input.
    """

    padded: torch.Tensor
    iou: np.ndarray
    input_size: tuple[int, int]
    original_size: tuple[int, int]
    image_size: int

    def __len__(self) -> int:
        return len(self.padded)

    @property
    def logits(self) -> torch.Tensor:
        """(n, h, w) float tensor: logits of the part that the image covers."""
        h, w = _region(self.padded.shape[-1], self.input_size, self.image_size)
        return self.padded[:, :h, :w]

    def masks(self) -> np.ndarray:
        """(n, h, w) bool ndarray: masks at low resolution, over the image only."""
        return (self.logits > 0).cpu().numpy()

    def full(self, i: int) -> np.ndarray:
        """(H, W) bool ndarray: mask `i` at the size of the image, as ``SamPredictor`` scales it."""
        return (self.scaled(i) > 0).cpu().numpy()

    def scaled(self, i: int) -> torch.Tensor:
        """(H, W) float tensor: logits of mask `i` at the size of the image."""
        x = F.interpolate(
            self.padded[i][None, None].float(),
            (self.image_size, self.image_size),
            mode="bilinear",
            align_corners=False,
        )
        x = x[..., : self.input_size[0], : self.input_size[1]]
        return F.interpolate(x, self.original_size, mode="bilinear", align_corners=False)[0, 0]


def _region(side: int, input_size: tuple[int, int], image_size: int) -> tuple[int, int]:
    """Rows and columns of a low-resolution mask that the image covers."""
    h, w = (max(1, round(side * s / image_size)) for s in input_size)
    return h, w


@torch.no_grad()
def embed(
    sam: Sam, image: np.ndarray, *, box: Box | None = None, dtype: torch.dtype | None = None
) -> Embedding:
    """Embed one image, scaled and padded exactly as ``SamPredictor.set_image`` does.

    Parameters
    ----------
    sam : Sam
    image : (H, W, 3) uint8 ndarray
        Any size and aspect ratio.
    box : (int, int, int, int), optional
        Embed this crop (x0, y0, x1, y1) instead, as an image of its own.
    dtype : torch.dtype, optional
        Lower precision of the matrix products, e.g. ``torch.bfloat16`` on a GPU that has it;
        by default that of the weights.

    Returns
    -------
    Embedding
    """
    image = check_image(image)
    cut = (False,) * 4
    if box is not None:
        x0, y0, x1, y1 = box
        cut = inner_edges(box, image.shape[:2])
        image = check_image(image[y0:y1, x0:x1])
    scaled = ResizeLongestSide(sam.image_encoder.img_size).apply_image(image)
    x = torch.as_tensor(scaled, device=sam.device).permute(2, 0, 1).contiguous()[None]
    with _precision(sam, dtype):
        features = sam.image_encoder(sam.preprocess(x))
    return Embedding(features.float(), tuple(x.shape[-2:]), tuple(image.shape[:2]), cut)


def _precision(sam: Sam, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to `dtype`, or a context that changes nothing."""
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(
            f"dtype = {dtype}; autocast takes torch.bfloat16 or torch.float16, None for neither."
        )
    return torch.autocast(sam.device.type, dtype or torch.bfloat16, enabled=dtype is not None)


class Projected(NamedTuple):
    """The image's side of one attention, as far as no prompt changes it.

    Attributes
    ----------
    places : (B or 1, heads, N, c) float tensor
        Projected image and positions if `shared`, else the positions alone.
    shared : bool
        Whether all prompts of an image attend to the same image.
    values : (B, heads, N, c) float tensor or None
        What tokens gather from a shared image.
    """

    places: torch.Tensor
    shared: bool
    values: torch.Tensor | None = None


class ImageSide(NamedTuple):
    """The image's side of the two-way transformer, as far as no prompt changes it.

    Attributes
    ----------
    image : (B, 1 or P, N, C) float tensor
        Embedding of the N places of the grid; one for each prompt where it was given a mask.
    attentions : list of Projected
        One for each attention between tokens and image, in their order.
    """

    image: torch.Tensor
    attentions: list[Projected]


def image_side(sam: Sam, features: torch.Tensor, dense: torch.Tensor | None = None) -> ImageSide:
    """Project what the prompts of an image have in common, once for all of them.

    Parameters
    ----------
    sam : Sam
    features : (B, C, h, w) float tensor
        Image embeddings.
    dense : (B, P, C, h, w) float tensor, optional
        Embedded masks of a former round; by default the embedding that stands for none.

    Returns
    -------
    ImageSide
    """
    if dense is None:
        dense = sam.prompt_encoder.no_mask_embed.weight[..., None, None, None]
        dense = dense.transpose(1, 2)
    image = (features[:, None] + dense).flatten(3).transpose(2, 3).contiguous()
    pe = sam.prompt_encoder.get_dense_pe().flatten(2).transpose(1, 2)
    transformer, attentions = sam.mask_decoder.transformer, []
    for i, layer in enumerate(transformer.layers):
        shared = i == 0 and image.shape[1] == 1
        place = image[:, 0] + pe if shared else pe
        attn = layer.cross_attn_token_to_image
        values = _split(attn.v_proj(image[:, 0]), attn.num_heads) if shared else None
        attentions.append(Projected(_split(attn.k_proj(place), attn.num_heads), shared, values))
        attn = layer.cross_attn_image_to_token
        attentions.append(Projected(_split(attn.q_proj(place), attn.num_heads), shared))
    attn = transformer.final_attn_token_to_image
    attentions.append(Projected(_split(attn.k_proj(pe), attn.num_heads), shared=False))
    return ImageSide(image, attentions)


def decode(
    sam: Sam,
    features: torch.Tensor,
    points: torch.Tensor,
    labels: torch.Tensor,
    mask_inputs: torch.Tensor | None = None,
    *,
    outputs: str = "all",
    side: ImageSide | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode P prompts for each of B images; the same numbers as ``sam.mask_decoder``.

    Three re-orderings make it cheaper without changing the result.
    What is the same for every prompt of an image is projected once and shared: in the first layer
    of the two-way transformer the image side, in later ones the positions.
    In later layers a prompt has few tokens (seven for a click), so the weight matrix is applied
    to the tokens instead of the image: (x W) k = x (W k), with far fewer columns.
    The keys are scaled up in pieces that stay in the processor's cache.

    Parameters
    ----------
    features : (B, C, h, w) float tensor
        Image embeddings.
    points : (B, P, n, 2) float tensor
        XY in the network's input frame.
    labels : (B, P, n) float tensor
        1 inside, 0 outside, -1 padding.
    mask_inputs : (B, P, 4h, 4w) float tensor, optional
        Logits of a former round.
    outputs : {"all", "three", "best", "single"}
        "all" gives m = 4: the single mask first, then the three of an ambiguous prompt;
        "three" only the latter, m = 3;
        "best" only that of the three with the highest predicted IoU, m = 1;
        "single" only the single mask, m = 1.
    side : ImageSide, optional
        Of :func:`image_side` for the same `features`, where several calls decode one image
        without mask inputs; it spares their projection.

    Returns
    -------
    logits : (B, P, m, 4h, 4w) float tensor
    iou : (B, P, m) float tensor
        Predicted IoU.
    """
    if outputs not in ("all", "three", "best", "single"):
        raise ValueError(f"outputs = {outputs!r} is none of 'all', 'three', 'best', 'single'.")
    if side is not None and mask_inputs is not None:
        raise ValueError("side holds images without mask inputs; give one of the two.")
    b, p = points.shape[:2]
    masks = None if mask_inputs is None else mask_inputs.flatten(0, 1)[:, None]
    sparse, dense = sam.prompt_encoder(
        points=(points.flatten(0, 1), labels.flatten(0, 1)), boxes=None, masks=masks
    )
    head = sam.mask_decoder
    fixed = torch.cat([head.iou_token.weight, head.mask_tokens.weight])
    tokens = torch.cat([fixed.expand(b * p, -1, -1), sparse], dim=1).unflatten(0, (b, p))
    if side is None:
        side = image_side(sam, features, None if masks is None else dense.unflatten(0, (b, p)))
    hs, keys = _two_way(head.transformer, side, tokens)
    iou = head.iou_prediction_head(hs[..., 0, :])
    hyper = torch.stack(
        [mlp(hs[..., 1 + i, :]) for i, mlp in enumerate(head.output_hypernetworks_mlps)], dim=2
    )
    if outputs == "single":
        iou, hyper = iou[..., :1], hyper[:, :, :1]
    elif outputs != "all":
        iou, hyper = iou[..., 1:], hyper[:, :, 1:]
    if outputs == "best":
        best = iou.argmax(-1, keepdim=True)
        iou, hyper = iou.take_along_dim(best, 2), hyper.take_along_dim(best[..., None], 2)
    return _mask_logits(head, keys, hyper, features.shape[-2:]), iou


def _two_way(transformer, side: ImageSide, tokens):
    """Two-way transformer on tokens (B, P, T, C) and the image."""
    queries, keys = tokens, side.image
    attentions = iter(side.attentions)
    for layer in transformer.layers:
        queries = layer.norm1(_self_attention(layer, queries, tokens))
        attn = layer.cross_attn_token_to_image
        attention = _tokens_to_image(attn, queries + tokens, keys, next(attentions))
        queries = layer.norm2(queries + attention)
        queries = layer.norm3(queries + layer.mlp(queries))
        attn = layer.cross_attn_image_to_token
        keys = _image_to_tokens(attn, queries + tokens, queries, keys, next(attentions))
        keys = layer.norm4(keys)
    attn = transformer.final_attn_token_to_image
    attention = _tokens_to_image(attn, queries + tokens, keys, next(attentions))
    return transformer.norm_final_attn(queries + attention), keys


def _self_attention(layer, queries, tokens):
    """Attention of the tokens to each other, with its residual."""
    lead = queries.shape[:2]
    x, pe = queries.flatten(0, 1), tokens.flatten(0, 1)
    if layer.skip_first_layer_pe:
        return layer.self_attn(q=x, k=x, v=x).unflatten(0, lead)
    return queries + layer.self_attn(q=x + pe, k=x + pe, v=x).unflatten(0, lead)


def _tokens_to_image(attn, tokens, keys, projected: Projected):
    """Each token gathers from the image: softmax over its N places."""
    q = _split(attn.q_proj(tokens), attn.num_heads)
    weights = _scores(q, attn.k_proj, keys, projected).softmax(-1)  # (B, P, heads, T, N)
    p, heads, t = weights.shape[1:4]
    if projected.shared:
        out = weights.transpose(1, 2).flatten(2, 3) @ projected.values
        out = out.unflatten(2, (p, t)).transpose(1, 2)
    else:  # gather first, project then; the weights sum to one, so the bias is added as it is
        gathered = (weights.flatten(2, 3) @ keys).unflatten(2, (heads, t))
        out = gathered @ attn.v_proj.weight.unflatten(0, (heads, -1)).transpose(1, 2)
        out = out + attn.v_proj.bias.reshape(heads, 1, -1)
    return attn.out_proj(out.transpose(2, 3).flatten(3))


def _image_to_tokens(attn, k_tokens, v_tokens, keys, projected: Projected):
    """Each place of the image gathers from the tokens: softmax over T tokens; with residual."""
    heads = attn.num_heads
    k = _split(attn.k_proj(k_tokens), heads)
    weights = _scores(k, attn.q_proj, keys, projected).softmax(-2).flatten(2, 3)
    v = _split(attn.v_proj(v_tokens), heads)
    v = v @ attn.out_proj.weight.unflatten(1, (heads, -1)).permute(1, 2, 0)
    v = v + attn.out_proj.bias / heads  # weights of a head sum to one, so the bias comes out whole
    start = keys.expand(*weights.shape[:2], -1, -1).flatten(0, 1)
    moved = torch.baddbmm(
        start, weights.flatten(0, 1).transpose(1, 2), v.flatten(2, 3).flatten(0, 1)
    )
    return moved.unflatten(0, weights.shape[:2])


def _scores(tokens, project, keys, projected: Projected):
    """Scaled products of projected tokens (B, P, heads, T, c) with the projected image.

    Where the image is not shared, its positions alone are projected, and the keys of each prompt
    meet the tokens in the image's space.
    """
    p, heads, t, c = tokens.shape[1:]
    tokens = tokens / c**0.5
    scores = tokens.transpose(1, 2).flatten(2, 3) @ projected.places.transpose(-1, -2)
    scores = scores.unflatten(2, (p, t)).transpose(1, 2)
    if not projected.shared:
        moved = tokens @ project.weight.unflatten(0, (heads, c))  # (B, P, heads, T, C)
        scores = scores + (moved.flatten(2, 3) @ keys.transpose(-1, -2)).unflatten(2, (heads, t))
    return scores


def _split(x, heads):
    """(..., n, heads c) to (..., heads, n, c)."""
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def _mask_logits(head: MaskDecoder, keys, hyper, grid):
    """Upscale the keys four times and multiply them with the outputs' vectors."""
    upscaled = _upscaling(head)

    def piecewise(places, v):
        parts = [[v @ row.flatten(0, -2).T for row in upscaled(p)] for p in places.split(_PIECE)]
        return torch.stack([torch.cat(row, 1) for row in zip(*parts, strict=True)])

    if keys.device.type == "cpu" and not torch.is_grad_enabled():
        prompts = zip(keys.flatten(0, 1), hyper.flatten(0, 1), strict=True)
        logits = torch.stack([piecewise(*prompt) for prompt in prompts])
    else:
        rows = [hyper @ row.flatten(2, -2).transpose(-1, -2) for row in upscaled(keys)]
        logits = torch.stack(rows, dim=2)
    b, p, m = hyper.shape[:3]
    logits = logits.reshape(b, p, 2, m, *grid, 2, 4).permute(0, 1, 3, 4, 6, 2, 5, 7)
    logits = logits.reshape(b, p, m, 4 * grid[0], 4 * grid[1])
    for smooth in head.output_upscaling[5:]:
        logits = smooth(logits)
    return logits


def _upscaling(head: MaskDecoder) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    """The upscaling of keys (..., N, C), in the order of the places.

    Transposed convolutions of stride and side 2 are matrix products, so places and channels keep
    their order until the logits, which are few, are put in their places. The first cuts each place
    into two rows of two, the second each of these four once more. The function returned gives the
    two rows of the second, (..., N, 4, 2, c) each, whose two columns then lie side by side.
    """
    first, norm, act, second, act2 = head.output_upscaling[:5]
    whole = first.weight.permute(2, 3, 1, 0).flatten(0, 2), first.bias.repeat(4)
    halves = [(w.flatten(0, 1), second.bias.repeat(2)) for w in second.weight.permute(2, 3, 1, 0)]

    def upscaled(keys: torch.Tensor) -> list[torch.Tensor]:
        x = F.linear(keys, *whole).unflatten(-1, (4, -1))
        x = act(F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps))
        return [act2(F.linear(x, *half)).unflatten(-1, (2, -1)) for half in halves]

    return upscaled


def default_batch(sam: Sam) -> int:
    """Prompts decoded at once: few on a CPU, where the cache decides, many on a GPU."""
    if sam.device.type != "cpu":
        return 256 if sam.image_encoder.img_size <= 512 else 64
    return 32 if sam.image_encoder.img_size <= 512 else 4


def check_points(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return `points` as (n, 2) float32 if all lie in an image of `size` (H, W), else raise."""
    points = np.asarray(points, dtype=np.float32)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"points has shape {points.shape}; expected (n, 2), XY in pixels.")
    h, w = size
    outside = ~((points >= 0).all(1) & (points[:, 0] < w) & (points[:, 1] < h))
    if outside.any():
        raise ValueError(
            f"{int(outside.sum())} of {len(points)} points lie outside the image of {h} x {w} "
            f"pixels (height x width), first {points[outside][0].tolist()}. "
            "Points are XY: column first, then row."
        )
    return points


@torch.no_grad()
def propose(
    sam: Sam,
    embedding: Embedding,
    points: np.ndarray,
    *,
    points_per_batch: int | None = None,
    mask_choice: str | Sequence[str] = "best",
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Proposals:
    """Propose a mask for each point, all decoded against one embedding.

    Against a crop, masks that reach its edge inside the image come back empty: the crop does not
    show where they end.

    Parameters
    ----------
    sam : Sam
    embedding : Embedding
        From :func:`embed`.
    points : (n, 2) ndarray
        XY in pixels of the image.
    points_per_batch : int, optional
        Largest number of prompts decoded at once; by default chosen by device. It changes time and
        memory only.
    mask_choice : {"best", "smallest", "middle", "largest", "single"}, or a sequence of them
        Which of the three masks of an ambiguous prompt to take: highest predicted IoU, or by
        their number of pixels; or, by itself, the decoder's single-mask output.
    dtype : torch.dtype, optional
        As in :func:`embed`.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Proposals
        n masks; with C choices C x n, those of the first choice first.

    Raises
    ------
    ValueError
        If a point lies outside the image or an argument is out of range.
    """
    choices = _check_choices(mask_choice)
    if points_per_batch is not None and points_per_batch < 1:
        raise ValueError(f"points_per_batch = {points_per_batch}; it must be at least 1.")
    points = check_points(points, embedding.original_size)
    size = sam.image_encoder.img_size
    batch = _even_batch(len(points), points_per_batch or default_batch(sam), sam.device)
    scaled = ResizeLongestSide(size).apply_coords(points, embedding.original_size)
    xy = torch.as_tensor(scaled, dtype=torch.float32, device=sam.device)
    low = 4 * embedding.features.shape[-1]
    region = _region(low, embedding.input_size, size)
    kept = torch.empty(len(choices), len(xy), low, low, device=sam.device)
    scores = torch.empty(len(choices), len(xy), device=sam.device)
    outputs = choices[0] if choices in (("best",), ("single",)) else "three"
    with _precision(sam, dtype):
        side = image_side(sam, embedding.features)

    @torch.no_grad()
    def answer(start: int) -> None:
        part = xy[start : start + batch]
        ones = torch.ones(1, len(part), 1).to(part)
        with _precision(sam, dtype):
            logits, iou = decode(
                sam, embedding.features, part[None, :, None], ones, outputs=outputs, side=side
            )
        if outputs == "three":
            logits, iou = _chosen(logits, iou, choices, region)
        kept[:, start : start + batch] = logits[0].transpose(0, 1)
        scores[:, start : start + batch] = iou[0].T

    starts = range(0, len(xy), batch)
    done = in_threads(answer, starts, sam.device)
    for _ in tqdm(done, total=len(starts), disable=not progress, desc="prompts"):
        pass
    kept = kept.flatten(0, 1)
    if any(embedding.cut):
        h, w = region
        kept[reaches(kept[:, :h, :w] > 0, embedding.cut)] = -1.0
    return Proposals(
        kept,
        scores.flatten().clamp(0, 1).cpu().numpy(),
        embedding.input_size,
        embedding.original_size,
        size,
    )


def _even_batch(n: int, largest: int, device: torch.device) -> int:
    """Size of batches of n prompts, at most `largest`; on a CPU as many for each thread."""
    threads = at_once(device)
    rounds = -(-n // (largest * threads))
    return max(1, -(-n // (max(1, rounds) * threads))) if threads > 1 else largest


def _check_choices(mask_choice: str | Sequence[str]) -> tuple[str, ...]:
    """Return the choices of mask as a tuple, else raise ``ValueError``."""
    choices = (mask_choice,) if isinstance(mask_choice, str) else tuple(mask_choice)
    known = choices and set(choices) <= set(MASK_CHOICES)
    if not known or len(set(choices)) < len(choices) or ("single" in choices and len(choices) > 1):
        raise ValueError(
            f"mask_choice = {mask_choice!r}; give one of {MASK_CHOICES}, or several of them "
            "without 'single', each once."
        )
    return choices


def _chosen(logits, iou, choices, region):
    """Of the three masks (B, P, 3, ...) of ambiguous prompts those chosen, (B, P, C, ...)."""
    h, w = region
    order = (logits[..., :h, :w] > 0).flatten(3).sum(-1).argsort(dim=-1)
    which = dict(zip(("smallest", "middle", "largest"), order.unbind(-1), strict=True))
    which["best"] = iou.argmax(-1)
    index = torch.stack([which[choice] for choice in choices], dim=-1)
    batch, prompt = (torch.arange(n, device=index.device) for n in index.shape[:2])
    at = (batch[:, None, None], prompt[:, None], index)
    return logits[at], iou[at]
