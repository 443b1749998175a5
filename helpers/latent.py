"""Autoencoder and noise network: from images to the latents in which the SDE runs, and back.

``load_latent_diffusion("small")`` reads the shipped pair of ``data/weights``;
``load_latent_diffusion("path/model.ckpt")`` reads a checkpoint of the CompVis latent diffusion
repository (VQ-f4 first stage and its UNet), key by key, into the classes of diffusers.
Both give a :class:`LatentDiffusion`, which the samplers of :mod:`helpers.diffusion` use.

Conventions: images are NCHW float tensors in [-1, 1], latents NCHW with unit variance.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from helpers.images import check_images
from helpers.weights import read_tensors, read_weights, write_weights

_WEIGHTS = Path(__file__).resolve().parents[1] / "data" / "weights"
#: Shipped first stage.
AUTOENCODER_WEIGHTS = _WEIGHTS / "autoencoder.safetensors"
#: Shipped noise network.
UNET_WEIGHTS = _WEIGHTS / "unet.safetensors"

#: What a noise network may predict.
PREDICTIONS = ("epsilon", "v_prediction")
#: The schedule of latent diffusion (Rombach et al. 2022): arguments of diffusers' schedulers.
LATENT_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "beta_schedule": "scaled_linear",
}


# --- images and tensors ---------------------------------------------------------------------------


def to_tensor(images: np.ndarray | Sequence[np.ndarray], *, device: str = "cpu") -> torch.Tensor:
    """Turn images into a tensor in [-1, 1].

    Parameters
    ----------
    images : (N, H, W, 3) or (H, W, 3) uint8 ndarray
        One image or several of the same size.

    Returns
    -------
    (N, 3, H, W) float32 Tensor

    Raises
    ------
    ValueError
        If the array is not uint8 RGB.
    """
    array = np.asarray(images)
    array = check_images(array[None] if array.ndim == 3 else array)
    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(device)
    return tensor.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """Turn a tensor in [-1, 1] into images; what lies outside is clipped.

    Returns
    -------
    (N, H, W, 3) uint8 ndarray

    Raises
    ------
    ValueError
        If the tensor holds NaN or infinity.
    """
    if not bool(torch.isfinite(x).all()):
        raise ValueError("the tensor holds NaN or infinity and is no image: see where it came from")
    x = ((x.detach().float() + 1.0) * 127.5).round().clamp(0, 255)
    return x.permute(0, 2, 3, 1).to("cpu", torch.uint8).contiguous().numpy()


def latent_known(known: np.ndarray | torch.Tensor, factor: int) -> torch.Tensor:
    """Bring a mask of known pixels to latent cells: known only if all pixels of the cell are.

    Parameters
    ----------
    known : (N, H, W) or (H, W) bool array
        True where the pixel is given.
    factor : int
        Pixels along the side of a latent cell; H and W are multiples of it.

    Returns
    -------
    (N, 1, H / factor, W / factor) float32 Tensor
        1 = known, 0 = to be made.
    """
    mask = torch.as_tensor(known)
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim != 3 or any(side % factor for side in mask.shape[1:]):
        raise ValueError(
            f"known of shape {tuple(mask.shape)} cannot be cut into cells of {factor} pixels: "
            f"give (N, H, W) with sides that are multiples of {factor}"
        )
    return 1.0 - F.max_pool2d(1.0 - mask[:, None].float(), factor)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images, in decibels."""
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return float(10 * np.log10(255.0**2 / max(error, 1e-12)))


# --- the model ------------------------------------------------------------------------------------


class LatentDiffusion(nn.Module):
    """Autoencoder and noise network behind one interface.

    Parameters
    ----------
    autoencoder : diffusers.AutoencoderKL or diffusers.VQModel
        First stage.
    unet : diffusers.UNet2DModel, optional
        Noise network; without it only :meth:`encode` and :meth:`decode` work.
    image_patch, latent_patch : int
        Side of the blocks of pixels (of latent cells) that are folded into channels before the
        first stage (before the UNet): the same network then costs a fraction.
    shift, scale : float
        Latents are ``(z - shift) * scale``, so that they have zero mean and unit variance.
    prediction : {"epsilon", "v_prediction"}
        What the UNet predicts; :meth:`eps` converts.
    schedule : mapping, optional
        Arguments of a diffusers scheduler, by default :data:`LATENT_SCHEDULE`.
    autocast : torch.dtype, optional
        Run the networks in this type, e.g. ``torch.bfloat16``; None is full precision.

    Attributes
    ----------
    factor : int
        Pixels along the side of a latent cell.
    multiple : int
        Image sides must be multiples of this.
    most_at_once : int or None
        Images that :func:`helpers.diffusion.inpaint` takes at once at most, whatever it is asked
        for: it halves them where memory does not suffice, and the model keeps that for its next
        calls. None, as at first, is no limit; set it to None again to try anew.
    """

    def __init__(
        self,
        autoencoder: nn.Module,
        unet: nn.Module | None = None,
        *,
        image_patch: int = 1,
        latent_patch: int = 1,
        shift: float = 0.0,
        scale: float = 1.0,
        prediction: str = "epsilon",
        schedule: Mapping[str, Any] | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction {prediction!r}: use {' or '.join(PREDICTIONS)}")
        self.autoencoder, self.unet = autoencoder, unet
        self.image_patch, self.latent_patch = image_patch, latent_patch
        self.shift, self.scale = float(shift), float(scale)
        self.prediction, self.autocast = prediction, autocast
        self.schedule = dict(schedule or LATENT_SCHEDULE)
        self.most_at_once: int | None = None
        self.channels = int(autoencoder.config.latent_channels)
        self.factor = image_patch * 2 ** (len(autoencoder.config.block_out_channels) - 1)
        deeper = 2 ** (len(unet.config.block_out_channels) - 1) if unet is not None else 1
        self.multiple = self.factor * latent_patch * deeper
        self.register_buffer("alphas_cumprod", _alphas_cumprod(self.schedule), persistent=False)
        self.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.alphas_cumprod.device

    def _precision(self) -> contextlib.AbstractContextManager:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    def tune(
        self, *, channels_last: bool = False, compile: bool = False, checkpointing: bool = False
    ) -> LatentDiffusion:
        """Trade memory, starting time and speed of the networks; results change by rounding only.

        Parameters
        ----------
        channels_last : bool
            Keep the channels of a pixel next to each other in memory.
        compile : bool
            ``torch.compile`` the UNet: slow at its first calls, faster later. Needs a C++ compiler.
        checkpointing : bool
            Compute the UNet's activations again for its gradient instead of keeping them: less
            memory, one more forward pass for each gradient.

        Returns
        -------
        LatentDiffusion
            This model.
        """
        if self.unet is None and (compile or checkpointing):
            raise ValueError("this LatentDiffusion has no unet to compile or checkpoint: load one")
        if channels_last:
            self.to(memory_format=torch.channels_last)
        if checkpointing:
            self.unet.enable_gradient_checkpointing()
        if compile:
            self.unet.compile()
        return self

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Z = E(x), without sampling.

        Parameters
        ----------
        x : (N, 3, H, W) Tensor
            Images in [-1, 1].

        Returns
        -------
        (N, c, H / factor, W / factor) float32 Tensor
            Latents of unit variance; of a VQ first stage those before quantisation.
        """
        sides = tuple(x.shape[-2:])
        if any(side % self.factor for side in sides):
            raise ValueError(
                f"image sides {sides} are no multiples of {self.factor}: pad or crop the images"
            )
        with self._precision():
            x = F.pixel_unshuffle(x, self.image_patch) if self.image_patch > 1 else x
            out = self.autoencoder.encode(x)
            z = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latents
        return (z.float() - self.shift) * self.scale

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """X = D(z).

        Parameters
        ----------
        z : (N, c, h, w) Tensor
            Latents; a VQ first stage quantises them here.

        Returns
        -------
        (N, 3, h * factor, w * factor) float32 Tensor
            Images, about in [-1, 1] (not clipped).
        """
        with self._precision():
            x = self.autoencoder.decode(z / self.scale + self.shift).sample
            x = F.pixel_shuffle(x, self.image_patch) if self.image_patch > 1 else x
        return x.float()

    def network(self, z: torch.Tensor, t: int | torch.Tensor) -> torch.Tensor:
        """Output of the UNet as it was trained: eps, or v."""
        if self.unet is None:
            raise ValueError("this LatentDiffusion has no unet: load one to run the SDE")
        t = torch.as_tensor(t, device=z.device).expand(len(z))
        with self._precision():
            p = self.latent_patch
            out = self.unet(F.pixel_unshuffle(z, p) if p > 1 else z, t).sample
            out = F.pixel_shuffle(out, p) if p > 1 else out
        return out.float()

    def eps(self, z: torch.Tensor, t: int | torch.Tensor) -> torch.Tensor:
        """Noise that the network sees in z_t; the score is ``-eps / sqrt(1 - a_t)``.

        Parameters
        ----------
        z : (N, c, h, w) Tensor
            Noisy latents.
        t : int or (N,) int Tensor
            Time step, 0 to T - 1.

        Returns
        -------
        (N, c, h, w) float32 Tensor
        """
        out = self.network(z, t)
        if self.prediction == "epsilon":
            return out
        a = self.alphas_cumprod[torch.as_tensor(t, device=z.device)].reshape(-1, 1, 1, 1)
        return a.sqrt() * out + (1 - a).sqrt() * z


def _alphas_cumprod(schedule: Mapping[str, Any]) -> torch.Tensor:
    T, kind = int(schedule["num_train_timesteps"]), schedule.get("beta_schedule")
    first, last = float(schedule["beta_start"]), float(schedule["beta_end"])
    if kind == "scaled_linear":
        beta = torch.linspace(first**0.5, last**0.5, T, dtype=torch.float64) ** 2
    elif kind == "linear":
        beta = torch.linspace(first, last, T, dtype=torch.float64)
    else:
        raise ValueError(f"beta_schedule {kind!r}: use 'scaled_linear' or 'linear'")
    return torch.cumprod(1.0 - beta, 0).float()


# --- architectures of the shipped pair ------------------------------------------------------------


def build_autoencoder(
    channels: Sequence[int] = (64, 128), *, layers: int = 1, latent_channels: int = 4,
    image_patch: int = 2,
) -> nn.Module:  # fmt: skip
    """``diffusers.AutoencoderKL`` on pixels folded `image_patch` x `image_patch` into channels."""
    from diffusers import AutoencoderKL

    n = len(channels)
    return AutoencoderKL(
        in_channels=3 * image_patch**2,
        out_channels=3 * image_patch**2,
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        latent_channels=latent_channels,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=128,
    )


def build_unet(
    channels: Sequence[int] = (96, 128, 160), *, layers: int = 1, latent_channels: int = 4,
    latent_patch: int = 2, attention_head_dim: int = 32, groups: int = 16,
) -> nn.Module:  # fmt: skip
    """``diffusers.UNet2DModel`` on folded latents, with attention at the coarsest level."""
    from diffusers import UNet2DModel

    n, c = len(channels), latent_channels * latent_patch**2
    return UNet2DModel(
        sample_size=32,
        in_channels=c,
        out_channels=c,
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        down_block_types=("DownBlock2D",) * (n - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (n - 1),
        norm_num_groups=groups,
        attention_head_dim=attention_head_dim,
    )


# --- files ----------------------------------------------------------------------------------------


def save_weights(
    path: Path, kind: str, state: Mapping[str, torch.Tensor], config: Mapping[str, Any],
    *, builds_on: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Write weights as fp16 safetensors, atomically, with what is needed to build the network.

    Parameters
    ----------
    path : Path
        File to write.
    kind : {"autoencoder", "unet"}
    state : mapping of str to Tensor
        State dictionary.
    config : mapping
        Arguments of the builder and of :class:`LatentDiffusion`, kept as JSON in the header.
    builds_on : mapping of str to str, optional
        Digests of the networks that these weights belong to, by name; kept likewise.
    """
    tensors = {key: value.half() for key, value in state.items()}
    said = {"config": json.dumps({"kind": kind, **config})}
    if builds_on:
        said["builds_on"] = json.dumps(dict(builds_on), sort_keys=True)
    write_weights(path, tensors, said)


def _read_weights(path: Path, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State dictionary in single precision and settings of a file of :func:`save_weights`."""
    if not path.exists():
        raise FileNotFoundError(
            f"no {kind} weights at {path}: restore the file, or train it with "
            f"python -m helpers.train_latent {kind}"
        )
    metadata, state = read_weights(path)
    config = json.loads(metadata.get("config", "{}"))
    if config.get("kind") != kind:
        raise ValueError(
            f"{path.name} holds no {kind!r} weights (kind: {config.get('kind')!r}): give the "
            "file that helpers.train_latent wrote"
        )
    config["builds_on"] = json.loads(metadata.get("builds_on", "{}"))
    return {key: value.float() for key, value in state.items()}, config


def weights_digest(*networks: nn.Module, more: str = "") -> str:
    """SHA-256 of the weights of networks, whatever the file that they came from."""
    digest = hashlib.sha256(more.encode())
    for network in networks:
        for name, value in network.state_dict().items():
            digest.update(name.encode())
            digest.update(value.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def encoder_digest(model: LatentDiffusion) -> str:
    """Digest of what latents depend on; the decoder may be trained on."""
    parts = model.autoencoder.encoder, model.autoencoder.quant_conv
    return weights_digest(*parts, more=f"{model.shift} {model.scale}")


def load_autoencoder(path: str | Path = AUTOENCODER_WEIGHTS, **options: Any) -> LatentDiffusion:
    """Load a first stage alone.

    Parameters
    ----------
    path : str or Path
        File written by :func:`save_weights`.
    **options
        Further arguments of :class:`LatentDiffusion`.

    Returns
    -------
    LatentDiffusion
        Without ``unet``.
    """
    state, config = _read_weights(Path(path), "autoencoder")
    autoencoder = build_autoencoder(**config["build"])
    autoencoder.load_state_dict(state)
    return LatentDiffusion(autoencoder, **{**config["model"], **options})


def default_autocast(device: str | torch.device) -> torch.dtype | None:
    """Precision of the networks that suits a device: bfloat16 on a GPU that has it, else full.

    Processors without bfloat16 units emulate it, which is slower than full precision.
    """
    if torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return None


def load_latent_diffusion(
    checkpoint: str | Path = "small",
    *,
    device: str | torch.device = "cpu",
    autocast: torch.dtype | Literal["auto"] | None = "auto",
    channels_last: bool = False,
    compile: bool = False,
    checkpointing: bool = False,
) -> LatentDiffusion:
    """Load autoencoder and noise network.

    Parameters
    ----------
    checkpoint : str or Path
        "small": the shipped pair; a folder with ``autoencoder.safetensors`` and
        ``unet.safetensors``; or a CompVis checkpoint (``.ckpt``, ``.pt``, ``.pth``), which must be
        a VQ first stage with an unconditional UNet.
    device : str or torch.device
        Where the networks run.
    autocast : torch.dtype or "auto", optional
        Precision of the networks, see :class:`LatentDiffusion`; "auto" is that of
        :func:`default_autocast`, None full precision.
    channels_last, compile, checkpointing : bool
        See :meth:`LatentDiffusion.tune`.

    Returns
    -------
    LatentDiffusion

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is of another kind (the message says what was found), or the noise network was
        trained on the latents of another autoencoder.
    """
    path = _WEIGHTS if str(checkpoint) == "small" else Path(checkpoint)
    if not path.exists():
        raise FileNotFoundError(
            f"latent checkpoint {str(checkpoint)!r} is neither 'small' nor an existing file or "
            "folder: correct the path"
        )
    autocast = default_autocast(device) if autocast == "auto" else autocast
    if path.is_dir():
        state, config = _read_weights(path / "unet.safetensors", "unet")
        unet = build_unet(**config["build"])
        unet.load_state_dict(state)
        options = {**config["model"], "unet": unet, "autocast": autocast}
        model = load_autoencoder(path / "autoencoder.safetensors", **options)
        trained_on = config["builds_on"].get("first stage")
        if trained_on is not None and trained_on != encoder_digest(model):
            raise ValueError(
                f"unet.safetensors in {path} was trained on the latents of another autoencoder "
                "than the one beside it: keep the files of one training together"
            )
    else:
        model = _from_compvis(path, autocast)
    model = model.to(device)
    return model.tune(channels_last=channels_last, compile=compile, checkpointing=checkpointing)


# --- checkpoints of the CompVis latent diffusion repository ---------------------------------------


def _from_compvis(path: Path, autocast: torch.dtype | None) -> LatentDiffusion:
    """VQ first stage and unconditional UNet of one checkpoint, settings of LSUN beds 256."""
    state = {key: value.float() for key, value in read_tensors(path).items()}
    first = _part(state, ("first_stage_model.",))
    network = _averaged(state) or _part(state, ("model.diffusion_model.",))
    if not first or not network:
        missing = "first_stage_model" if not first else "model.diffusion_model"
        raise ValueError(
            f"{path.name} has no {missing!r} weights (it has {_some(state)}): give a whole latent "
            "diffusion checkpoint, e.g. lsun_beds256"
        )
    if any(".attn2." in key for key in network):
        raise ValueError(
            f"{path.name} is conditioned on text or classes (cross-attention 'attn2'): this book "
            "uses unconditional checkpoints, e.g. lsun_beds256"
        )
    if "quantize.embedding.weight" not in first:
        raise ValueError(
            f"{path.name} has no VQ first stage (no 'quantize.embedding.weight'): KL first stages "
            "of CompVis are not supported, give e.g. lsun_beds256"
        )
    return LatentDiffusion(
        vq_from_compvis(first, name=path.name),
        unet_from_compvis(network, name=path.name),
        autocast=autocast,
    )


def _some(state: Mapping[str, Any]) -> str:
    heads = sorted({key.split(".")[0] for key in state})
    return ", ".join(heads[:5]) or "nothing"


def _part(state: Mapping[str, torch.Tensor], prefixes: Sequence[str]) -> dict[str, torch.Tensor]:
    return {k[len(p) :]: v for p in prefixes for k, v in state.items() if k.startswith(p)}


def _averaged(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Averaged weights of the UNet; CompVis keeps them under names without dots."""
    found = {}
    for key in _part(state, ("model.diffusion_model.",)):
        flat = "model_ema." + f"diffusion_model.{key}".replace(".", "")
        if flat not in state:
            return {}
        found[key] = state[flat]
    return found


class _Renamer:
    """Moves tensors from a CompVis state dictionary to diffusers' names, each exactly once."""

    def __init__(self, source: Mapping[str, torch.Tensor], name: str) -> None:
        self.source, self.name = dict(source), name
        self.target: dict[str, torch.Tensor] = {}

    def has(self, key: str) -> bool:
        return f"{key}.weight" in self.source

    def move(self, old: str, new: str, *, linear: bool = False) -> None:
        """Weight and bias of a layer; `linear` drops the extent of a 1 x 1 convolution."""
        for kind in ("weight", "bias"):
            tensor = self.take(f"{old}.{kind}")
            self.target[f"{new}.{kind}"] = (
                tensor.flatten(1) if linear and kind == "weight" else tensor
            )

    def take(self, key: str) -> torch.Tensor:
        try:
            return self.source.pop(key)
        except KeyError:
            raise ValueError(
                f"{self.name} lacks {key!r}, which a CompVis checkpoint of this kind has: it is of "
                "another architecture, or cut off"
            ) from None

    def load(self, module: nn.Module) -> nn.Module:
        """Put everything into `module`; nothing may be missing or left over."""
        if self.source:
            raise ValueError(
                f"{self.name} has {len(self.source)} tensors that fit nowhere, e.g. "
                f"{sorted(self.source)[:3]}: it is of another architecture"
            )
        missing, unexpected = module.load_state_dict(self.target, strict=False)
        if missing or unexpected:
            raise ValueError(
                f"{self.name} does not fill {type(module).__name__}: missing {missing[:3]}, "
                f"unexpected {unexpected[:3]}"
            )
        return module.eval()


def unet_from_compvis(
    state: Mapping[str, torch.Tensor], *, head_channels: int = 32, name: str = "checkpoint"
) -> nn.Module:
    """Turn the weights of a CompVis ``UNetModel`` into a ``diffusers.UNet2DModel``.

    Widths, depth and places of attention are read from the shapes.

    Parameters
    ----------
    state : mapping of str to Tensor
        Keys as in ``model.diffusion_model``, without that prefix.
    head_channels : int
        Channels of an attention head (``num_head_channels``); cannot be read from shapes.
    name : str
        Used in messages.

    Returns
    -------
    diffusers.UNet2DModel

    Raises
    ------
    ValueError
        If a tensor is missing, left over or of the wrong shape.
    """
    from diffusers import UNet2DModel

    r = _Renamer(state, name)
    levels = _unet_levels(r)
    layers = {len(blocks) for blocks, _ in levels}
    if len(layers) != 1 or any(len(set(att)) != 1 for _, att in levels):
        raise ValueError(f"{name}: the levels of its UNet differ in depth, which is not supported")
    widths = [int(state[f"{blocks[-1]}.0.out_layers.3.weight"].shape[0]) for blocks, _ in levels]
    attention = [att[0] for _, att in levels]
    unet = UNet2DModel(
        in_channels=int(state["input_blocks.0.0.weight"].shape[1]),
        out_channels=int(state["out.2.weight"].shape[0]),
        block_out_channels=tuple(widths),
        layers_per_block=layers.pop(),
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in attention[::-1]),
        attention_head_dim=head_channels,
        norm_num_groups=32,
        norm_eps=1e-5,
        downsample_padding=1,
        flip_sin_to_cos=True,
        freq_shift=0,
    )
    r.move("time_embed.0", "time_embedding.linear_1")
    r.move("time_embed.2", "time_embedding.linear_2")
    r.move("input_blocks.0.0", "conv_in")
    r.move("out.0", "conv_norm_out")
    r.move("out.2", "conv_out")
    for level, (blocks, att) in enumerate(levels):
        for j, block in enumerate(blocks):
            _unet_block(r, block, f"down_blocks.{level}", j, att[j], head_channels)
        after = f"input_blocks.{int(blocks[-1].split('.')[1]) + 1}.0.op"
        if level < len(levels) - 1:
            r.move(after, f"down_blocks.{level}.downsamplers.0.conv")
    _resnet(r, "middle_block.0", "mid_block.resnets.0")
    _attention(r, "middle_block.1", "mid_block.attentions.0", head_channels)
    _resnet(r, "middle_block.2", "mid_block.resnets.1")
    k = 0
    for up, level in enumerate(reversed(range(len(levels)))):
        for j in range(len(levels[level][0]) + 1):
            _unet_block(
                r, f"output_blocks.{k}", f"up_blocks.{up}", j, attention[level], head_channels
            )
            k += 1
        if level:
            place = 2 if attention[level] else 1
            r.move(f"output_blocks.{k - 1}.{place}.conv", f"up_blocks.{up}.upsamplers.0.conv")
    return r.load(unet)


def _unet_levels(r: _Renamer) -> list[tuple[list[str], list[bool]]]:
    """Residual blocks of each resolution, and whether attention follows them."""
    levels: list[tuple[list[str], list[bool]]] = [([], [])]
    k = 1
    while True:
        block = f"input_blocks.{k}"
        if r.has(f"{block}.0.op"):
            levels.append(([], []))
        elif r.has(f"{block}.0.in_layers.0"):
            levels[-1][0].append(block)
            levels[-1][1].append(r.has(f"{block}.1.qkv"))
        else:
            break
        k += 1
    if not levels[0][0]:
        raise ValueError(f"{r.name} holds no UNet of CompVis (no 'input_blocks.1.0.in_layers.0')")
    return levels


def _unet_block(
    r: _Renamer, old: str, new: str, j: int, attention: bool, head_channels: int
) -> None:
    _resnet(r, f"{old}.0", f"{new}.resnets.{j}")
    if attention:
        _attention(r, f"{old}.1", f"{new}.attentions.{j}", head_channels)


def _resnet(r: _Renamer, old: str, new: str) -> None:
    """Residual block of the UNet."""
    pairs = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
             "out_layers.0": "norm2", "out_layers.3": "conv2"}  # fmt: skip
    for a, b in pairs.items():
        r.move(f"{old}.{a}", f"{new}.{b}")
    if r.has(f"{old}.skip_connection"):
        r.move(f"{old}.skip_connection", f"{new}.conv_shortcut")


def _attention(r: _Renamer, old: str, new: str, head_channels: int) -> None:
    """Attention of the UNet: one tensor holds, head by head, query, key and value."""
    r.move(f"{old}.norm", f"{new}.group_norm")
    r.move(f"{old}.proj_out", f"{new}.to_out.0", linear=True)
    for kind in ("weight", "bias"):
        qkv = r.take(f"{old}.qkv.{kind}").squeeze(-1)
        channels = len(qkv) // 3
        if channels % head_channels:
            raise ValueError(
                f"{r.name}: {channels} channels of {old} are no multiple of head_channels="
                f"{head_channels}"
            )
        heads = qkv.reshape(channels // head_channels, 3, head_channels, *qkv.shape[1:])
        for i, part in enumerate(("to_q", "to_k", "to_v")):
            tensor = heads[:, i].reshape(channels, *qkv.shape[1:])
            r.target[f"{new}.{part}.{kind}"] = tensor.contiguous()


def vq_from_compvis(state: Mapping[str, torch.Tensor], *, name: str = "checkpoint") -> nn.Module:
    """Turn the weights of a CompVis ``VQModelInterface`` into a ``diffusers.VQModel``.

    Parameters
    ----------
    state : mapping of str to Tensor
        Keys as in ``first_stage_model``, without that prefix; those of its training loss are
        ignored.
    name : str
        Used in messages.

    Returns
    -------
    diffusers.VQModel

    Raises
    ------
    ValueError
        If a tensor is missing, left over or of the wrong shape.
    """
    from diffusers import VQModel

    r = _Renamer({k: v for k, v in state.items() if not k.startswith("loss.")}, name)
    n = 0
    while r.has(f"encoder.down.{n}.block.0.conv1"):
        n += 1
    layers = 0
    while r.has(f"encoder.down.0.block.{layers}.conv1"):
        layers += 1
    if not n:
        raise ValueError(f"{name} holds no first stage of CompVis (no 'encoder.down.0.block.0')")
    widths = [int(state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0]) for i in range(n)]
    entries, width = state["quantize.embedding.weight"].shape
    vq = VQModel(
        in_channels=int(state["encoder.conv_in.weight"].shape[1]),
        out_channels=int(state["decoder.conv_out.weight"].shape[0]),
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        block_out_channels=tuple(widths),
        layers_per_block=layers,
        latent_channels=int(state["encoder.conv_out.weight"].shape[0]),
        num_vq_embeddings=int(entries),
        vq_embed_dim=int(width),
        norm_num_groups=32,
        scaling_factor=1.0,
    )
    for side in ("encoder", "decoder"):
        r.move(f"{side}.conv_in", f"{side}.conv_in")
        r.move(f"{side}.norm_out", f"{side}.conv_norm_out")
        r.move(f"{side}.conv_out", f"{side}.conv_out")
        for i in (1, 2):
            _vq_resnet(r, f"{side}.mid.block_{i}", f"{side}.mid_block.resnets.{i - 1}")
        attention = f"{side}.mid_block.attentions.0"
        r.move(f"{side}.mid.attn_1.norm", f"{attention}.group_norm")
        for a, b in {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}.items():
            r.move(f"{side}.mid.attn_1.{a}", f"{attention}.{b}", linear=True)
    for i in range(n):
        for j in range(layers):
            _vq_resnet(r, f"encoder.down.{i}.block.{j}", f"encoder.down_blocks.{i}.resnets.{j}")
        for j in range(layers + 1):
            # CompVis counts the levels of the decoder from the finest.
            _vq_resnet(r, f"decoder.up.{n - 1 - i}.block.{j}", f"decoder.up_blocks.{i}.resnets.{j}")
        if i < n - 1:
            r.move(
                f"encoder.down.{i}.downsample.conv", f"encoder.down_blocks.{i}.downsamplers.0.conv"
            )
            r.move(f"decoder.up.{n - 1 - i}.upsample.conv",
                   f"decoder.up_blocks.{i}.upsamplers.0.conv")  # fmt: skip
    r.move("quant_conv", "quant_conv")
    r.move("post_quant_conv", "post_quant_conv")
    r.target["quantize.embedding.weight"] = r.take("quantize.embedding.weight")
    return r.load(vq)


def _vq_resnet(r: _Renamer, old: str, new: str) -> None:
    """Residual block of the first stage."""
    for part in ("norm1", "conv1", "norm2", "conv2"):
        r.move(f"{old}.{part}", f"{new}.{part}")
    if r.has(f"{old}.nin_shortcut"):
        r.move(f"{old}.nin_shortcut", f"{new}.conv_shortcut")
