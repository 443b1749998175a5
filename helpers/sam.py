"""Segment Anything: loading, embedding and batched decoding of point prompts.

Two kinds of checkpoints give the same kind of object, a ``segment_anything.modeling.Sam``:
the official ``vit_b``, ``vit_l`` and ``vit_h``, and a small one trained for this book
(:mod:`helpers.train_sam`), whose image encoder is an EfficientNet-Lite0 with a feature pyramid.

An image is embedded once; all prompts are decoded against that embedding in batches, as masks of
low resolution.
Only the masks that are kept are ever scaled up to the size of the image.
"""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.utils.transforms import ResizeLongestSide
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

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
_STRIDE = 8


class PyramidEncoder(nn.Module):
    """EfficientNet-Lite0 and a light feature pyramid, in the place of SAM's image encoder.

    Parameters
    ----------
    image_size : int
        Side of the square input in pixels, a multiple of 32.
    dim : int
        Channels of the embedding.

    Notes
    -----
    Maps a (B, 3, S, S) batch, normalised as SAM does, to (B, dim, S/8, S/8).
    Features of stride 4 enter through a space-to-depth step, so that outlines stay sharp.
    """

    def __init__(self, image_size: int = 256, dim: int = 128) -> None:
        super().__init__()
        timm = import_timm()
        self.img_size = image_size
        self.body = timm.create_model(
            "tf_efficientnet_lite0", features_only=True, out_indices=(1, 2, 3, 4)
        )
        c4, c8, c16, c32 = self.body.feature_info.channels()
        self.lateral4 = nn.Conv2d(4 * c4, dim, 1)
        self.lateral8 = nn.Conv2d(c8, dim, 1)
        self.lateral16 = nn.Conv2d(c16, dim, 1)
        self.lateral32 = nn.Conv2d(c32, dim, 1)
        self.smooth16 = _separable(dim)
        self.smooth8 = _separable(dim)
        self.neck = nn.Sequential(
            LayerNorm2d(dim), nn.Conv2d(dim, dim, 3, padding=1, bias=False), LayerNorm2d(dim)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embed a batch of square images."""
        f4, f8, f16, f32 = self.body(x)
        up = {"scale_factor": 2.0, "mode": "bilinear", "align_corners": False}
        p16 = self.lateral16(f16) + F.interpolate(self.lateral32(f32), **up)
        p16 = p16 + self.smooth16(p16)
        p8 = self.lateral8(f8) + F.interpolate(p16, **up)
        p8 = p8 + self.lateral4(F.pixel_unshuffle(f4, 2))
        p8 = p8 + self.smooth8(p8)
        return self.neck(p8)


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


def build_small_sam(image_size: int = 256, *, dim: int = 128) -> Sam:
    """Build the small model with random weights.

    Parameters
    ----------
    image_size : int
        Side of the network's square input, a multiple of 32 and at least 64.
    dim : int
        Width of the embedding and of the two-way transformer.

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
        image_encoder=PyramidEncoder(image_size, dim),
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
    device = resolve_device(device)
    name = str(checkpoint)
    if name in OFFICIAL:
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
        if image_size is not None:
            raise ValueError(
                f"image_size = {image_size}: official checkpoints work at 1024 only; "
                "leave image_size at None."
            )
        sam = _read_official(path)
    return sam.eval().requires_grad_(False).to(device)


def resolve_device(device: str | torch.device) -> torch.device:
    """Turn "auto" into a GPU where there is one, else the CPU; pass anything else on."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def _read_small(path: Path, image_size: int | None) -> Sam:
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key).float() for key in file.keys()}
    except Exception as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    if metadata.get("kind") != "sam_small":
        raise ValueError(
            f"{path} holds weights of kind {metadata.get('kind')!r}, not 'sam_small'. "
            "Give the file that `python -m helpers.train_sam` writes."
        )
    sam = build_small_sam(image_size or int(metadata["image_size"]), dim=int(metadata["dim"]))
    sam.load_state_dict(state)
    return sam


def _read_official(path: Path) -> Sam:
    kinds = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} could not be read as a checkpoint of plain tensors "
            f"({type(error).__name__}). Download it again, or give a .safetensors small model."
        ) from error
    key = "image_encoder.pos_embed"
    if not isinstance(state, dict) or key not in state:
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
    sam = sam_model_registry[kind]()
    try:
        sam.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit {kind}: {str(error)[:300]}") from error
    return sam


def download(url: str, sha256: str, path: Path, *, progress: bool = True) -> Path:
    """Download a file once, resuming a partial download, and verify its SHA-256.

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
        If the digest differs; the file is removed.
    """
    path = Path(path)
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        _fetch(request, part, have, progress)
    except (urllib.error.URLError, OSError) as error:
        if not (isinstance(error, urllib.error.HTTPError) and error.code == 416):
            raise ConnectionError(
                f"could not download {url} ({error}). Without network, fetch the file elsewhere "
                f"and put it at {path}, or use checkpoint='small', which ships with the book."
            ) from error
    digest = hashlib.sha256()
    with part.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    if digest.hexdigest() != sha256:
        part.unlink()
        raise ValueError(
            f"{url}: SHA-256 is {digest.hexdigest()}, expected {sha256}. "
            "The damaged file was removed; download it again."
        )
    part.replace(path)
    return path


def _fetch(request: urllib.request.Request, part: Path, have: int, progress: bool) -> None:
    with urllib.request.urlopen(request, timeout=30) as reply:
        resumed = have and getattr(reply, "status", 200) == 206
        start = have if resumed else 0
        total = start + int(reply.headers.get("Content-Length") or 0) or None
        with (
            part.open("ab" if resumed else "wb") as file,
            tqdm(
                total=total, initial=start, unit="B", unit_scale=True, disable=not progress
            ) as bar,
        ):
            while block := reply.read(1 << 20):
                file.write(block)
                bar.update(len(block))


@dataclass(frozen=True)
class Embedding:
    """Image embedding and the sizes needed to go back to the image.

    Attributes
    ----------
    features : (1, C, h, w) float tensor
    input_size : (int, int)
        Height and width of the image after the resize, before padding.
    original_size : (int, int)
        Height and width of the image.
    """

    features: torch.Tensor
    input_size: tuple[int, int]
    original_size: tuple[int, int]


@dataclass(frozen=True)
class Proposals:
    """Masks proposed for point prompts, kept at low resolution.

    Attributes
    ----------
    padded : (n, L, L) float tensor
        Logits over the padded square that the network sees.
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
        x = F.interpolate(
            self.padded[i][None, None].float(),
            (self.image_size, self.image_size),
            mode="bilinear",
            align_corners=False,
        )
        x = x[..., : self.input_size[0], : self.input_size[1]]
        x = F.interpolate(x, self.original_size, mode="bilinear", align_corners=False)
        return (x[0, 0] > 0).cpu().numpy()


def _region(side: int, input_size: tuple[int, int], image_size: int) -> tuple[int, int]:
    """Rows and columns of a low-resolution mask that the image covers."""
    h, w = (max(1, round(side * s / image_size)) for s in input_size)
    return h, w


def check_image(image: np.ndarray) -> np.ndarray:
    """Return `image` if it is an (H, W, 3) uint8 array, else raise ``ValueError``."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"image has shape {image.shape} and dtype {image.dtype}; expected (H, W, 3) uint8 in "
            "RGB order. Convert grey or RGBA images with PIL's convert('RGB')."
        )
    if min(image.shape[:2]) < 8:
        raise ValueError(f"image of {image.shape[:2]} pixels is too small; both sides need >= 8.")
    return image


@torch.no_grad()
def embed(sam: Sam, image: np.ndarray) -> Embedding:
    """Embed one image, scaled and padded exactly as ``SamPredictor.set_image`` does.

    Parameters
    ----------
    sam : Sam
    image : (H, W, 3) uint8 ndarray
        Any size and aspect ratio.

    Returns
    -------
    Embedding
    """
    image = check_image(image)
    scaled = ResizeLongestSide(sam.image_encoder.img_size).apply_image(image)
    x = torch.as_tensor(scaled, device=sam.device).permute(2, 0, 1).contiguous()[None]
    features = sam.image_encoder(sam.preprocess(x))
    return Embedding(features, tuple(x.shape[-2:]), tuple(image.shape[:2]))


def decode(
    sam: Sam,
    features: torch.Tensor,
    points: torch.Tensor,
    labels: torch.Tensor,
    mask_inputs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode P prompts for each of B images; the same numbers as ``sam.mask_decoder``.

    In the first layer of the two-way transformer the image side is the same for every prompt of
    an image, so its projections are computed once and shared.

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

    Returns
    -------
    logits : (B, P, m, 4h, 4w) float tensor
        m = 4: the single mask first, then the three of an ambiguous prompt.
    iou : (B, P, m) float tensor
        Predicted IoU.
    """
    b, p = points.shape[:2]
    masks = None if mask_inputs is None else mask_inputs.flatten(0, 1)[:, None]
    sparse, dense = sam.prompt_encoder(
        points=(points.flatten(0, 1), labels.flatten(0, 1)), boxes=None, masks=masks
    )
    head = sam.mask_decoder
    fixed = torch.cat([head.iou_token.weight, head.mask_tokens.weight])
    tokens = torch.cat([fixed[None].expand(b * p, -1, -1), sparse], dim=1)
    pe = sam.prompt_encoder.get_dense_pe().flatten(2).transpose(1, 2)
    if masks is None:
        image = features + sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
        image = image.flatten(2).transpose(1, 2)
    else:
        image = features.repeat_interleave(p, dim=0) + dense
        image = image.flatten(2).transpose(1, 2)
    hs, keys = _two_way(head.transformer, image, pe, tokens)
    return _heads(head, hs, keys, features.shape[-2:], (b, p))


def _two_way(transformer, image, pe, tokens):
    """Two-way transformer; `image` may hold fewer rows than `tokens`, one for P prompts each."""
    queries, keys = tokens, image
    for layer in transformer.layers:
        if len(keys) != len(queries):
            queries, keys = _shared_layer(layer, queries, keys, tokens, pe)
        else:
            queries, keys = layer(queries=queries, keys=keys, query_pe=tokens, key_pe=pe)
    attention = transformer.final_attn_token_to_image(q=queries + tokens, k=keys + pe, v=keys)
    return transformer.norm_final_attn(queries + attention), keys


def _shared_layer(layer, queries, keys, query_pe, key_pe):
    """First two-way block, with keys (B, N, C) shared by the P prompts of each image."""
    b, n, _ = keys.shape
    t = queries.shape[1]
    p = len(queries) // b
    if layer.skip_first_layer_pe:
        queries = layer.self_attn(q=queries, k=queries, v=queries)
    else:
        q = queries + query_pe
        queries = queries + layer.self_attn(q=q, k=q, v=queries)
    queries = layer.norm1(queries)

    positioned = keys + key_pe
    attn = layer.cross_attn_token_to_image
    q = attn.q_proj(queries + query_pe).reshape(b, p * t, -1)
    out = _attend(attn, q, attn.k_proj(positioned), attn.v_proj(keys))
    queries = layer.norm2(queries + attn.out_proj(out.reshape(b * p, t, -1)))
    queries = layer.norm3(queries + layer.mlp(queries))

    attn = layer.cross_attn_image_to_token
    heads = attn.num_heads
    q = attn._separate_heads(attn.q_proj(positioned), heads)[:, None]  # (B, 1, heads, N, c)
    k = attn._separate_heads(attn.k_proj(queries + query_pe), heads).unflatten(0, (b, p))
    v = attn._separate_heads(attn.v_proj(queries), heads).unflatten(0, (b, p))
    weights = torch.softmax(q @ k.transpose(-1, -2) / k.shape[-1] ** 0.5, dim=-1)
    out = (weights @ v).transpose(2, 3).reshape(b, p, n, -1)
    keys = layer.norm4(keys[:, None] + attn.out_proj(out))
    return queries, keys.flatten(0, 1)


def _attend(attn, q, k, v):
    q, k, v = (attn._separate_heads(x, attn.num_heads) for x in (q, k, v))
    weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)
    return attn._recombine_heads(weights @ v)


def _heads(head: MaskDecoder, hs, keys, grid, lead):
    n = head.num_mask_tokens
    mask_tokens = hs[:, 1 : 1 + n]
    up = head.output_upscaling(keys.transpose(1, 2).reshape(len(keys), -1, *grid))
    hyper = torch.stack(
        [mlp(mask_tokens[:, i]) for i, mlp in enumerate(head.output_hypernetworks_mlps)], dim=1
    )
    logits = (hyper @ up.flatten(2)).unflatten(-1, up.shape[-2:])
    iou = head.iou_prediction_head(hs[:, 0])
    return logits.unflatten(0, lead), iou.unflatten(0, lead)


def default_batch(sam: Sam) -> int:
    """Prompts decoded at once: few on a CPU, where the cache decides, many on a GPU."""
    if sam.device.type != "cpu":
        return 256 if sam.image_encoder.img_size <= 512 else 64
    return 16 if sam.image_encoder.img_size <= 512 else 4


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
    mask_choice: str = "best",
    progress: bool = False,
) -> Proposals:
    """Propose one mask for each point, all decoded against one embedding.

    Parameters
    ----------
    sam : Sam
    embedding : Embedding
        From :func:`embed`.
    points : (n, 2) ndarray
        XY in pixels of the image.
    points_per_batch : int, optional
        Prompts decoded at once; by default chosen by device. It changes time and memory only.
    mask_choice : {"best", "smallest", "middle", "largest", "single"}
        Which of the three masks of an ambiguous prompt to take: highest predicted IoU, or by
        their number of pixels; or the decoder's single-mask output.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Proposals

    Raises
    ------
    ValueError
        If a point lies outside the image or an argument is out of range.
    """
    if mask_choice not in MASK_CHOICES:
        raise ValueError(f"mask_choice = {mask_choice!r} is none of {MASK_CHOICES}.")
    if points_per_batch is not None and points_per_batch < 1:
        raise ValueError(f"points_per_batch = {points_per_batch}; it must be at least 1.")
    points = check_points(points, embedding.original_size)
    size = sam.image_encoder.img_size
    batch = points_per_batch or default_batch(sam)
    scaled = ResizeLongestSide(size).apply_coords(points, embedding.original_size)
    xy = torch.as_tensor(scaled, dtype=torch.float32, device=sam.device)
    low = 4 * embedding.features.shape[-1]
    kept = torch.empty(len(xy), low, low)
    scores = torch.empty(len(xy))
    for start in tqdm(range(0, len(xy), batch), disable=not progress, desc="prompts"):
        part = xy[start : start + batch]
        logits, iou = decode(
            sam, embedding.features, part[None, :, None], torch.ones(1, len(part), 1).to(part)
        )
        kept[start : start + batch], scores[start : start + batch] = _choose(
            logits[0].float(), iou[0].float(), mask_choice, embedding, size
        )
    return Proposals(
        kept,
        scores.clamp(0, 1).numpy(),
        embedding.input_size,
        embedding.original_size,
        size,
    )


def _choose(logits, iou, choice, embedding, size):
    if choice == "single":
        return logits[:, 0].cpu(), iou[:, 0].cpu()
    logits, iou = logits[:, 1:], iou[:, 1:]
    if choice == "best":
        index = iou.argmax(1)
    else:
        h, w = _region(logits.shape[-1], embedding.input_size, size)
        order = (logits[..., :h, :w] > 0).flatten(2).sum(-1).argsort(dim=1)
        index = order[:, {"smallest": 0, "middle": 1, "largest": 2}[choice]]
    row = torch.arange(len(index), device=index.device)
    return logits[row, index].cpu(), iou[row, index].cpu()
