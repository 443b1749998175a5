"""Files of weights: tensors in safetensors, written as a whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

__all__ = ["read_weights", "write_weights"]


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
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


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

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp")
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    save_file(plain, str(temporary), metadata=dict(metadata))
    temporary.chmod(0o644)
    temporary.replace(path)
