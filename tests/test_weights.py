import pytest
import torch

from helpers.weights import read_weights, write_weights


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "folder" / "a.safetensors"
    tensors = {"w": torch.arange(6.0).reshape(2, 3).half().T, "n": torch.tensor(3)}
    write_weights(path, tensors, {"kind": "toy"})
    metadata, found = read_weights(path)
    assert metadata == {"kind": "toy"} and found.keys() == tensors.keys()
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors.items())
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o777 == 0o644


def test_files_that_cannot_be_read_are_named(tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors")
    for path in (broken, tmp_path / "missing.safetensors"):
        with pytest.raises(ValueError, match=rf"{path.name} is not a readable safetensors file"):
            read_weights(path)
