import hashlib
import json
import os

import numpy as np
import pytest

from helpers.files import read_json, replacing, sha256, unfinished


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_an_interruption_leaves_the_old_file_and_nothing_else(tmp_path, stop):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(stop), replacing(path) as temporary:
        temporary.write_text("half")
        raise stop
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == path.parent
        assert temporary.name.startswith("."), "no pattern of shards finds it"
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_what_a_killed_process_was_writing_is_found(tmp_path):
    with replacing(tmp_path / "images" / "a.png") as temporary:
        temporary.write_bytes(b"half")
        assert unfinished(tmp_path) == [temporary]
    (tmp_path / "images" / "b.tmp.png").write_bytes(b"a name of the user's")
    assert unfinished(tmp_path) == [] == unfinished(tmp_path / "not there")


def test_folders_are_made_and_the_suffix_is_kept(tmp_path):
    path = tmp_path / "more" / "folders" / "a.npz"
    with replacing(path) as temporary:
        np.savez(temporary, a=1)
    assert np.load(path)["a"] == 1


def test_nothing_written_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(FileNotFoundError, match=r"nothing was written to .* for a\.txt"):
        with replacing(tmp_path / "a.txt"):
            pass
    assert (tmp_path / "a.txt").read_text() == "old"


def test_modes_are_those_of_a_file_written_in_place_or_those_set(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "plain") as temporary:
            temporary.write_text("x")
        with replacing(tmp_path / "set") as temporary:
            temporary.write_text("x")
            temporary.chmod(0o604)
    finally:
        os.umask(before)
    assert (tmp_path / "plain").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "set").stat().st_mode & 0o777 == 0o604


def test_names_and_contents_may_be_of_any_script(tmp_path):
    path, value = tmp_path / "Drüse 腺.json", {"Gewebe": "Prostata – größer", "組織": [1, None]}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    assert read_json(path) == value
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_sha256_of_a_known_text(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-4, example
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "abc") == expected == sha256(str(tmp_path / "abc"))


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b'{"a": "\xff"}'])
def test_a_damaged_file_is_named_with_the_remedy(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json is damaged, it is no JSON .*: delete it"):
        read_json(path)
    with pytest.raises(ValueError, match=r"a\.json is damaged.*: write it again with chapter 02$"):
        read_json(path, "write it again with chapter 02")


def test_an_absent_file_is_an_error_of_its_own(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")
