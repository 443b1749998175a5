from pathlib import Path

import pytest
import torch

from helpers.weights import check_whole, read_tensors, read_weights, tensors_digest, write_weights


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


def test_a_digest_is_that_of_names_and_values_in_any_order():
    a = {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3), "none": torch.zeros(0, 2)}
    digest = tensors_digest(a)
    assert digest == tensors_digest({k: a[k].clone() for k in reversed(a)})
    assert digest == tensors_digest(a | {"w": a["w"].T.contiguous().T})
    others = [{"w": a["w"] + 1e-6}, {"w": a["w"].reshape(3, 2)}, {"w": a["w"].double()},
              {"n": torch.tensor(4)}]  # fmt: skip
    assert len({digest, *(tensors_digest(a | other) for other in others)}) == 5
    assert tensors_digest({"v": a["w"]}) != tensors_digest({"w": a["w"]})


def test_interrupted_writing_leaves_the_old_weights(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_weights(path, {"w": torch.ones(2)}, {})
    before = path.read_bytes()

    def half(tensors, file, metadata):
        Path(file).write_bytes(before[:10])
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(OSError, match="no space left"):
        write_weights(path, {"w": torch.zeros(3)}, {})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)}


@pytest.mark.parametrize(
    "nested",
    [
        TENSORS,
        {"model": TENSORS},
        {"state_dict": TENSORS, "epoch": 3},
        {"model": {"state_dict": TENSORS}, "name": "toy"},
    ],
)
def test_tensors_are_found_where_checkpoints_have_them(tmp_path, nested):
    torch.save(nested, tmp_path / "a.pth")
    found = read_tensors(str(tmp_path / "a.pth"))
    assert list(found) == list(TENSORS)
    for key, value in TENSORS.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0)


def test_tensors_of_safetensors_are_those_written(tmp_path):
    write_weights(tmp_path / "a.safetensors", TENSORS, {"kind": "toy"})
    found = read_tensors(tmp_path / "a.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[key], value) for key, value in TENSORS.items())


def test_an_absent_checkpoint_is_named_with_the_remedy(tmp_path):
    for name in ("a.pth", "a.safetensors"):
        with pytest.raises(FileNotFoundError, match=rf"no checkpoint .*{name}: correct the path"):
            read_tensors(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"a\.pth: ask its authors$"):
        read_tensors(tmp_path / "a.pth", "ask its authors")


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("share", [0, 0.5])
def test_a_damaged_checkpoint_is_named(tmp_path, name, share):
    path = tmp_path / name
    if path.suffix == ".pth":
        torch.save(TENSORS, path)
    else:
        write_weights(path, TENSORS, {})
    whole = path.read_bytes()
    for damaged in (whole[: int(share * len(whole))], b"no weights"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name} (could not be read|is not a readable)"):
            read_tensors(path)


@pytest.mark.parametrize("name", ["a.pth", "a.ckpt", "a.safetensors", "old.pth"])
def test_a_file_that_is_cut_short_is_known_without_loading_it(tmp_path, name):
    path = tmp_path / name
    if path.suffix == ".safetensors":
        write_weights(path, TENSORS, {})
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=name != "old.pth")
    check_whole(path)
    whole = path.read_bytes()
    for damaged in (b"", b"<html>no such page", whole[:-1]):
        path.write_bytes(damaged)
        if damaged == whole[:-1] and name == "old.pth":  # it has no end to look at
            check_whole(path)
            continue
        with pytest.raises(ValueError, match=rf"{name} cannot be read .* copy or download it"):
            check_whole(path)


class Surprise:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize("content", [Surprise(), {"model": {"a": torch.zeros(1), "b": Surprise()}}])
def test_a_checkpoint_with_other_objects_is_refused_and_no_code_runs(tmp_path, capsys, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="damaged or holds other objects; download it again"):
        read_tensors(tmp_path / "a.pth")
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [[torch.zeros(1)], torch.zeros(2), {"a": 1}, {"model": "a"}])
def test_what_is_no_state_dictionary_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth holds no state dictionary of tensors"):
        read_tensors(tmp_path / "a.pth")
