"""Autoencoder and noise network: from images to the latents in which the SDE runs, and back.

``load_latent_diffusion("small")`` reads the shipped pair of ``data/weights``;
``load_latent_diffusion("path/model.ckpt")`` reads a checkpoint of the CompVis latent diffusion
repository (VQ-f4 first stage and its UNet), key by key, into the classes of diffusers.
Both give a :class:`LatentDiffusion`, which the samplers of :mod:`helpers.diffusion` use.

Conventions: images are NCHW float tensors in [-1, 1], latents NCHW with unit variance.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

__all__ = [
    "AUTOENCODER_WEIGHTS",
    "LATENT_SCHEDULE",
    "UNET_WEIGHTS",
    "LatentDiffusion",
    "build_autoencoder",
    "build_unet",
    "latent_known",
    "load_autoencoder",
    "load_latent_diffusion",
    "psnr",
    "save_weights",
    "to_tensor",
    "to_uint8",
]

_WEIGHTS = Path(__file__).resolve().parents[1] / "data" / "weights"
#: Shipped first stage.
AUTOENCODER_WEIGHTS = _WEIGHTS / "autoencoder.safetensors"
#: Shipped noise network.
UNET_WEIGHTS = _WEIGHTS / "unet.safetensors"

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
    array = array[None] if array.ndim == 3 else array
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        raise ValueError(
            f"images of shape {array.shape} and type {array.dtype}: give (N, H, W, 3) uint8"
        )
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
        if prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction {prediction!r}: use 'epsilon' or 'v_prediction'")
        self.autoencoder, self.unet = autoencoder, unet
        self.image_patch, self.latent_patch = image_patch, latent_patch
        self.shift, self.scale = float(shift), float(scale)
        self.prediction, self.autocast = prediction, autocast
        self.schedule = dict(schedule or LATENT_SCHEDULE)
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

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """z = E(x), without sampling.

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
        """x = D(z).

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
    T, kind = int(schedule["num_train_timesteps"]), schedule.get("beta_schedule", "linear")
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
    """``diffusers.UNet2DModel`` on latents folded into channels, attention at the coarsest level."""
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
    path: Path, kind: str, state: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> None:
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
    """
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().half().contiguous() for k, v in state.items()}
    temporary = path.with_name(f".{path.stem}.tmp")
    save_file(tensors, str(temporary), metadata={"kind": kind, "config": json.dumps(config)})
    temporary.replace(path)


def _read_weights(path: Path, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"no {kind} weights at {path}: restore the file, or train it with "
            f"python -m helpers.train_latent {kind}"
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != kind:
                raise ValueError(
                    f"{path.name} holds {metadata.get('kind', 'unknown')!r} weights, not {kind!r}: "
                    "give the file that helpers.train_latent wrote"
                )
            state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path.name} is no safetensors file ({error})") from None
    return state, json.loads(metadata["config"])


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


def load_latent_diffusion(
    checkpoint: str | Path = "small",
    *,
    device: str | torch.device = "cpu",
    autocast: torch.dtype | None = None,
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
    autocast : torch.dtype, optional
        Precision of the networks, see :class:`LatentDiffusion`.

    Returns
    -------
    LatentDiffusion

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is of another kind; the message says what was found.
    """
    path = _WEIGHTS if str(checkpoint) == "small" else Path(checkpoint)
    if not path.exists():
        raise FileNotFoundError(
            f"latent checkpoint {str(checkpoint)!r} is neither 'small' nor an existing file or "
            "folder: correct the path"
        )
    if path.is_dir():
        state, config = _read_weights(path / "unet.safetensors", "unet")
        unet = build_unet(**config["build"])
        unet.load_state_dict(state)
        options = {**config["model"], "unet": unet, "autocast": autocast}
        model = load_autoencoder(path / "autoencoder.safetensors", **options)
    else:
        raise ValueError(f"{path.name}: only folders so far")
    return model.to(device)
