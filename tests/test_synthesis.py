"""Synthesis that survives a kill bit for bit."""

import hashlib
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import config, synthesis
from helpers.draws import CompositeError
from helpers.files import replacing, unfinished
from helpers.replacement import Sampler
from tests.test_replacement import toy_pool

PROVENANCE = {"method": "test", "seed": 0}


def _rng(label, order):
    return np.random.default_rng([len(label), ord(label[0]), order])


def _generator(label, order):
    return torch.Generator().manual_seed(1000 * ord(label[0]) + order)


def _heal(images, unknown, generators):
    """Noise in the unknown region, from each image's own generator."""
    noise = [
        torch.randint(0, 256, image.shape, generator=g, dtype=torch.uint8).numpy()
        for image, g in zip(images, generators, strict=True)
    ]
    return np.where(unknown[..., None], np.stack(noise), images)


def _pieces(n_per_class=3, **options):
    pool, images = toy_pool(n_images=8)
    sampler = Sampler(pool, cut_sources="anywhere")
    options = {"area_range": (0.05, 1.0), "stain": "none", **options}
    return synthesis.compose_all(
        pool, sampler, images.__getitem__, n_per_class=n_per_class, rng_of=_rng, **options
    )


def _synthesise(folder, pieces=None, heal=_heal, **kwargs):
    kwargs = {"generator_of": _generator, "provenance": PROVENANCE, "batch": 2, **kwargs}
    return synthesis.synthesise(_pieces() if pieces is None else pieces, heal, folder, **kwargs)


def _bytes(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_classes_that_differ_in_punctuation_or_case_have_files_of_their_own():
    names = synthesis._file_names(["3+4", "3-4", "a b", "A b", "x"])
    assert names == {"3+4": "3_4", "3-4": "3_4-2", "a b": "a_b", "A b": "A_b-2", "x": "x"}
    pool, images = toy_pool(n_images=8, classes=("3+4", "3-4"))
    made = [
        piece.synthetic_id
        for label in pool.classes  # class by class, as chapter 06 does
        for piece in synthesis.compose_all(
            pool, Sampler(pool, cut_sources="anywhere"), images.__getitem__, n_per_class=2,
            rng_of=_rng, labels=[label], area_range=(0.05, 1.0), stain="none",
        )
    ]  # fmt: skip
    assert made == ["3_4-0000", "3_4-0001", "3_4-2-0000", "3_4-2-0001"]


# --- composing ------------------------------------------------------------------------------------


def test_small_set_is_the_beginning_of_the_large_one():
    small = {p.synthetic_id: p.composite for p in _pieces(1)}
    large = {p.synthetic_id: p.composite for p in _pieces(3)}
    assert len(large) == 6 and set(small) < set(large)
    for name, composite in small.items():
        np.testing.assert_array_equal(composite.image, large[name].image)


def test_sources_are_of_the_class_and_never_of_the_target():
    pool, _ = toy_pool(n_images=8)
    label_of = pool.table.drop_duplicates("image_id").set_index("image_id")["label"]
    for piece in _pieces():
        assert label_of[piece.composite.image_id] == piece.label
        for done in piece.composite.replacements:
            assert label_of[done["source_image"]] == piece.label
            assert done["source_image"] != piece.composite.image_id


def test_every_image_has_its_own_numbers_and_its_own_target(tmp_path):
    pool, images = toy_pool(n_images=8)
    asked, healed = [], []

    def rng_of(label, order):
        asked.append((label, order))
        return _rng(label, order)

    def generator_of(label, order):
        healed.append((label, order))
        return _generator(label, order)

    pieces = list(synthesis.compose_all(
        pool, Sampler(pool, cut_sources="anywhere"), images.__getitem__, n_per_class=6,
        rng_of=rng_of, area_range=(0.05, 1.0), stain="none",
    ))  # fmt: skip
    _synthesise(tmp_path, pieces, generator_of=generator_of)
    expected = [(label, order) for label in "ab" for order in range(6)]
    assert asked == healed == expected == [(piece.label, piece.order) for piece in pieces]
    for label in "ab":  # targets come in a new order each time
        assert len({p.composite.image_id for p in pieces if p.label == label}) > 1


def test_conditions_that_cannot_be_met_are_recorded():
    pieces = list(_pieces(1, area_range=(0.99, 1.0)))
    assert all(piece.composite is None for piece in pieces)
    assert len(pieces[0].skipped) == 4  # every image of the class was tried
    assert "outside [0.99, 1.0]" in pieces[0].skipped[0]["reason"]


def test_a_class_whose_conditions_cannot_be_met_is_given_up(monkeypatch):
    pool, images = toy_pool(n_images=8)
    tried = []

    def compose(image, image_id, *_, **__):
        tried.append(image_id)
        if order_of_success is not None and len(tried) > 4 * order_of_success:
            return SimpleNamespace(image_id=image_id)
        raise CompositeError(f"{image_id} is too small")

    def pieces(n):
        tried.clear()
        return list(synthesis.compose_all(
            pool, Sampler(pool), images.__getitem__, n_per_class=n, rng_of=_rng, labels=["a"]
        ))  # fmt: skip

    monkeypatch.setattr(synthesis, "compose", compose)
    order_of_success = None
    made = pieces(7)
    assert len(made) == 7 and len(tried) == 4 * synthesis.GIVE_UP
    assert all(p.composite is None and len(p.skipped) == 4 for p in made)
    assert [p.order for p in made] == list(range(7)) and made[6].skipped == made[2].skipped
    assert made[:5] == pieces(5)
    order_of_success = synthesis.GIVE_UP - 1  # in vain all times but the last
    made = pieces(7)
    assert [p.composite is not None for p in made] == [False, False, *[True] * 5]


# --- healing --------------------------------------------------------------------------------------


def test_images_records_and_kept_pixels(tmp_path):
    records = _synthesise(tmp_path)
    assert [r["order"] for r in records] == [0, 1, 2, 0, 1, 2]
    for record in records:
        name = f"{record['synthetic_id']}.png"
        healed, pasted, regions = (
            np.asarray(Image.open(tmp_path / kind / name))
            for kind in ("images", "pasted", "regions")
        )
        np.testing.assert_array_equal(healed[regions < 2], pasted[regions < 2])
        assert (healed[regions >= 2] != pasted[regions >= 2]).any()
        assert (regions % 2).any()
        assert record["pasted_share"] == pytest.approx((regions % 2).mean())
        assert record["unknown_share"] == pytest.approx((regions >= 2).mean())
        assert record["made_by"] == PROVENANCE
        saved = tmp_path / "provenance" / f"{record['synthetic_id']}.json"
        assert json.loads(saved.read_text()) == record


def test_result_does_not_depend_on_the_batch(tmp_path):
    _synthesise(tmp_path / "a", batch=1)
    _synthesise(tmp_path / "b", batch=4)
    assert _bytes(tmp_path / "a") == _bytes(tmp_path / "b")


@pytest.mark.parametrize("calls", [1, 2])
def test_killed_run_goes_on_and_gives_the_same_bytes(tmp_path, calls):
    left = calls

    def dies(*args):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return _heal(*args)

    with pytest.raises(KeyboardInterrupt):
        _synthesise(tmp_path / "killed", heal=dies)
    done = _bytes(tmp_path / "killed")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed").rglob("*.png")}
    assert len(done) == 4 * 2 * calls
    _synthesise(tmp_path / "killed")
    assert all(path.stat().st_mtime_ns == t for path, t in times.items())  # not made twice
    _synthesise(tmp_path / "whole")
    assert _bytes(tmp_path / "killed") == _bytes(tmp_path / "whole")


#: A process that stands still when half of the twelfth picture, a healed image, is on the disk.
_STANDS_STILL = """
import sys, time
from PIL import Image
from tests.test_synthesis import _synthesise

saved, save = [], Image.Image.save

def slow(picture, path, **options):
    save(picture, path, **options)
    saved.append(path)
    if len(saved) == 12:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        print("now", flush=True)
        time.sleep(60)

Image.Image.save = slow
_synthesise(sys.argv[1])
"""


def test_a_process_killed_while_it_writes_leaves_no_half_image(tmp_path, repository):
    killed = tmp_path / "killed"
    command = [sys.executable, "-c", _STANDS_STILL, str(killed)]
    with subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "now\n"
        finally:
            process.kill()  # SIGKILL: nothing in the process can answer it
    half = unfinished(killed)
    pictures = set(killed.rglob("*.png")) - set(half)
    assert all(map(synthesis._whole, pictures)) and len(pictures) == 11 and len(half) == 1
    assert len(list(killed.rglob("*.json"))) == 3
    half[0].unlink()
    _synthesise(killed)
    _synthesise(tmp_path / "whole")
    assert _bytes(killed) == _bytes(tmp_path / "whole")


def test_finished_images_are_not_healed_again_unless_the_recipe_changes(tmp_path):
    calls = []

    def counting(images, *rest):
        calls.append(len(images))
        return _heal(images, *rest)

    _synthesise(tmp_path, heal=counting)
    _synthesise(tmp_path, heal=counting)
    assert sum(calls) == 6
    shutil.rmtree(tmp_path / "images")
    _synthesise(tmp_path, heal=counting)
    assert sum(calls) == 12
    _synthesise(tmp_path, heal=counting, provenance={**PROVENANCE, "seed": 1})
    assert sum(calls) == 18
    with pytest.raises(TypeError, match="not JSON serializable"):  # before anything is healed
        _synthesise(tmp_path, heal=counting, provenance={"folder": tmp_path})
    assert sum(calls) == 18


def test_a_record_does_not_speak_for_pictures_of_another_recipe(tmp_path, monkeypatch):
    """Killed while an image is made anew, and then made as at first: all as it was."""
    _synthesise(tmp_path)
    whole = _bytes(tmp_path)

    def killed_before_the_record(path):
        if path.parent.name == "provenance":
            raise KeyboardInterrupt
        return replacing(path)

    def otherwise(images, unknown, generators):
        return 255 - images

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(synthesis, "replacing", killed_before_the_record)
        _synthesise(tmp_path, heal=otherwise, provenance={**PROVENANCE, "seed": 1})
    assert _bytes(tmp_path) != whole
    _synthesise(tmp_path)
    assert _bytes(tmp_path) == whole


def test_images_of_other_composites_are_healed_again(tmp_path):
    calls = []

    def counting(images, *rest):
        calls.append(len(images))
        return _heal(images, *rest)

    _synthesise(tmp_path, heal=counting)
    _synthesise(tmp_path, _pieces(area_range=(0.2, 1.0)), heal=counting)  # the same recipe
    assert sum(calls) == 12


def _damage(path, how):
    whole = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "flipped":  # the name of a chunk of a PNG, the brace of a record
        at = whole.find(b"IDAT") if path.suffix == ".png" else 0
        path.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
    else:
        path.write_bytes(b"[]")


@pytest.mark.parametrize("how", ["missing", "cut short", "flipped", "something else"])
@pytest.mark.parametrize("kind", ["images", "pasted", "regions", "provenance"])
def test_damaged_files_are_made_again(tmp_path, kind, how):
    _synthesise(tmp_path)
    before = _bytes(tmp_path)
    _damage(sorted((tmp_path / kind).iterdir())[2], how)
    assert _bytes(tmp_path) != before
    _synthesise(tmp_path)
    assert _bytes(tmp_path) == before


def test_failing_write_leaves_no_half_image(tmp_path, monkeypatch):
    def broken(self, path, *args, **kwargs):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        _synthesise(tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_hashes_are_those_of_the_weights_in_use(tmp_path):
    shipped = {"unet.safetensors": "abc"}
    assert synthesis.weight_hashes("small", shipped | {"unet.json": "def"}) == shipped
    (tmp_path / "own.ckpt").write_bytes(b"weights")
    (tmp_path / "unet.safetensors").write_bytes(b"more")
    own = hashlib.sha256(b"weights").hexdigest()
    assert synthesis.weight_hashes(tmp_path / "own.ckpt", shipped) == {"own.ckpt": own}
    more = hashlib.sha256(b"more").hexdigest()
    assert synthesis.weight_hashes(tmp_path, shipped) == {"unet.safetensors": more}
    (tmp_path / "empty").mkdir()
    for wrong in ("missing.ckpt", "empty"):
        with pytest.raises(FileNotFoundError, match=f"{wrong}.*holds no weights"):
            synthesis.weight_hashes(tmp_path / wrong, shipped)


def test_number_of_images_is_checked_before_anything_runs():
    with pytest.raises(ValueError, match=r"n_per_class\[0\] = 0: should be greater"):
        config.build("06_synthesis", {"n_per_class": [0, 8]})


def test_bad_input(tmp_path):
    pool, images = toy_pool()
    with pytest.raises(ValueError, match="n_per_class is 0"):
        next(_pieces(0))
    with pytest.raises(ValueError, match="class 'z' has no segment in the pool"):
        next(synthesis.compose_all(
            pool, Sampler(pool), images.__getitem__, n_per_class=1, rng_of=_rng, labels=["z"]
        ))  # fmt: skip
    with pytest.raises(ValueError, match="batch is 0"):
        _synthesise(tmp_path, batch=0)
