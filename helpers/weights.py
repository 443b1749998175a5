"""Files of weights: tensors in safetensors, written as a whole or not at all."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from helpers.files import replacing


def read_weights(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of a safetensors file.

    Raises
    ------
    ValueError
        If the file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}): copy or download it again"
        ) from error


def check_whole(path: Path) -> None:
    """Look at both ends of a file of weights, before the time has come to load it.

    Raises
    ------
    ValueError
        If it is neither safetensors nor a torch file, or cut short.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="np"):  # reads the header, knows the length
                return
        except (OSError, SafetensorError) as error:
            reason = str(error)
    else:
        with path.open("rb") as stream:
            old_format = stream.read(1) == b"\x80"  # a bare pickle, which has no end to look at
        if old_format or zipfile.is_zipfile(path):
            return
        reason = "neither a whole torch file nor safetensors"
    raise ValueError(f"{path.name} cannot be read ({reason}): copy or download it again")


def read_tensors(
    path: str | Path, remedy: str = "correct the path, or download the file"
) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint, safetensors or torch, without running any code that it may hold.

    Parameters
    ----------
    path : path or str
        A torch file holds a state dictionary, by itself or as its ``model`` or ``state_dict``.
    remedy : str
        What to do if there is no such file; ends the message of the error.

    Returns
    -------
    dict of str to Tensor
        On the CPU, in the precision of the file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is damaged, or holds other things than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}: {remedy}")
    if path.suffix == ".safetensors":
        return read_weights(path)[1]
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # many kinds, from zip errors to refused pickles
        raise ValueError(
            f"{path} could not be read as plain weights ({type(error).__name__}): it is damaged or "
            "holds other objects; download it again, or save its state dictionary alone"
        ) from error
    for key in ("model", "state_dict"):
        content = content.get(key, content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping) or not all(map(torch.is_tensor, content.values())):
        raise ValueError(
            f"{path} holds no state dictionary of tensors: it is no checkpoint of a network"
        )
    return dict(content)


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names and values of tensors, whatever file they came from."""
    digest = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        plain = value.detach().cpu().contiguous()
        digest.update(f"{key} {plain.dtype} {tuple(plain.shape)}\n".encode())
        digest.update(plain.view(-1).view(torch.uint8).numpy() if plain.numel() else b"")
    return digest.hexdigest()


def write_weights(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors as safetensors that everybody may read, the whole file or nothing.

    Parameters
    ----------
    path : Path
        Folders that are not there are made.
    tensors : mapping of str to Tensor
    metadata : mapping of str to str
    """
    from safetensors.torch import save_file

    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with replacing(path) as temporary:
        save_file(plain, str(temporary), metadata=dict(metadata))
        temporary.chmod(0o644)
