"""Data sets: records, pixels, splits without leaks, and errors that name what is wrong."""

import dataclasses
import sys
import unicodedata
import warnings
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import ExifTags, Image, ImageOps

from helpers import datasets, phantom, runs

GLAS = Path(__file__).resolve().parents[2] / "shared" / "data" / "glas"
needs_glas = pytest.mark.skipif(
    not GLAS.is_dir(), reason=f"the GlaS data are not there ({GLAS}); research use only, by hand"
)


def save(path, *, size=(48, 40), mode="RGB", seed=0):
    """Write a noisy image of a colour that depends on the seed; size is (width, height)."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two classes, ten images each, PNG and JPEG."""
    for i in range(10):
        save(tmp_path / "benign" / f"a {i}.png", seed=i)
        save(tmp_path / "tumour" / f"b{i}.jpg", seed=10 + i)
    return tmp_path


def write_csv(root, rows, columns):
    pd.DataFrame(rows, columns=columns).to_csv(root / "images.csv", index=False)


# --- every data set ------------------------------------------------------------------------------


def check(data, size):
    assert list(data.records.columns) == list(datasets.COLUMNS)
    assert data.records.index.equals(pd.RangeIndex(len(data)))
    assert data.records["image_id"].is_unique
    assert set(data.records["split"]) <= set(datasets.SPLITS)
    assert set(data.records["label"]) == set(data.classes)
    assert (data.records.groupby("patient")["split"].nunique() == 1).all()
    for image_id in data.records["image_id"][:3]:
        image = data.image(image_id)
        assert image.shape == (size, size, 3) and image.dtype == np.uint8
        instances = data.instances(image_id)
        assert instances is None or (
            instances.shape == (size, size) and instances.dtype == np.int32
        )


def test_phantom():
    data = datasets.load("phantom", image_size=32, per_class={"train": 4, "val": 2})
    check(data, 32)
    assert data.classes == phantom.GRADES["colon"]
    assert data.counts().loc["poor"].tolist() == [4, 2, 10, 10]
    sites = data.records.groupby("split")["site"].unique().map(list).to_dict()
    assert sites == {"train": ["A"], "val": ["A"], "test": ["A"], "test2": ["B"]}
    assert data.instances(data.records["image_id"][0]).max() > 0


def test_phantom_of_the_prostate():
    data = datasets.load(
        "phantom-prostate", image_size=32, per_class=dict.fromkeys(datasets.SPLITS, 1)
    )
    check(data, 32)
    assert data.classes == phantom.GRADES["prostate"]


def test_a_larger_phantom_set_holds_the_smaller_one():
    small = datasets.load("phantom", image_size=32, per_class={"train": 2, "val": 0, "test": 1})
    large = datasets.load("phantom", image_size=32, per_class={"train": 5, "val": 2, "test": 3})
    for image_id in small.records["image_id"][:4]:
        assert np.array_equal(small.image(image_id), large.image(image_id))


def test_phantom_depends_on_the_seed_only():
    a, b, c = (datasets.load("phantom", image_size=32, seed=s) for s in (0, 0, 1))
    assert np.array_equal(a.image("test_well_003"), b.image("test_well_003"))
    assert not np.array_equal(a.image("test_well_003"), c.image("test_well_003"))


@pytest.mark.parametrize(
    ("name", "size"), [("phantom", 32), ("ihc", 100), ("ihc", 256), ("folder", 16), ("folder", 32)]
)
def test_the_arrays_handed_out_can_be_changed_without_harm(name, size, tmp_path):
    save(tmp_path / "a" / "1.png")
    data = datasets.load(name, image_size=size, root=tmp_path if name == "folder" else None)
    image_id = data.records["image_id"][0]
    first = data.image(image_id)
    keep = first.copy()
    first[:] = 0
    assert np.array_equal(data.image(image_id), keep)


def test_a_patient_has_one_stain(monkeypatch):
    drawn = []
    monkeypatch.setattr(datasets.phantom, "render", lambda **key: drawn.append(key) or 1 / 0)
    data = datasets.load("phantom", image_size=32, per_class={"train": 4, "val": 0, "test": 0})
    for image_id in data.records["image_id"]:
        with pytest.raises(ZeroDivisionError):
            data.image(image_id)
    said, used = data.records["patient"].tolist(), [key["patient"] for key in drawn]
    assert len(set(said)) == len(set(used)) == len(set(zip(said, used, strict=True)))


def test_ihc_is_the_image_of_scikit_image_in_four_tiles():
    from skimage import data as skimage_data

    data = datasets.load("ihc")
    check(data, 256)
    whole = skimage_data.immunohistochemistry()
    rows = [np.hstack([data.image(f"ihc_{i}{j}") for j in (0, 1)]) for i in (0, 1)]
    assert np.array_equal(np.vstack(rows), whole)
    assert data.instances("ihc_00") is None
    check(datasets.load("ihc", image_size=100), 100)


def test_a_companion_adds_records_but_no_classes():
    data = datasets.load("phantom", image_size=32).with_companion(
        datasets.load("ihc", image_size=32)
    )
    assert data.classes == phantom.GRADES["colon"]
    assert (data.records["dataset"] == "ihc").sum() == 4
    assert "ihc" not in data.counts().index
    assert data.image("ihc_10").shape == (32, 32, 3)
    with pytest.raises(ValueError, match="both sets have images named"):
        data.with_companion(datasets.load("ihc", image_size=32))


def test_unknown_names_are_answered_with_the_list():
    with pytest.raises(ValueError, match="'gals' is unknown; choose one of phantom"):
        datasets.load("gals")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 8}, "image_size is 8"),
        ({"image_size": 64.0}, "image_size is 64.0"),
        ({"per_class": {"dev": 3}}, "names the split 'dev'"),
        ({"per_class": {"train": -1}}, r"per_class\['train'\] is -1"),
        ({"per_class": {"train": 1.5}}, r"per_class\['train'\] is 1.5"),
        ({"n_classes": 2}, "is for 'glas' only"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        datasets.load("phantom", **arguments)


@pytest.mark.parametrize("name", ["folder", "glas", "kbsmc-colon", "usz-prostate"])
def test_a_missing_root_says_what_to_download(name, tmp_path):
    with pytest.raises(ValueError, match="needs a data root"):
        datasets.load(name)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        datasets.load(name, root=tmp_path / "nowhere")
    with pytest.raises((ValueError, FileNotFoundError), match=r"Download|Make a folder"):
        datasets.load(name, root=tmp_path)


def test_an_unknown_image_is_a_key_error():
    data = datasets.load("ihc")
    with pytest.raises(KeyError, match="has no image 'ihc_99'"):
        data.image("ihc_99")
    with pytest.raises(KeyError, match="has no image"):
        data.instances("ihc_99")


# --- folder --------------------------------------------------------------------------------------


def test_folder_of_classes(folder):
    data = datasets.load("folder", root=folder, image_size=32)
    check(data, 32)
    assert data.classes == ("benign", "tumour")
    assert "benign__a_0" in set(data.records["image_id"])
    assert data.counts()["train"].tolist() == [6, 6]
    again = datasets.load("folder", root=folder, image_size=32)
    pd.testing.assert_frame_equal(data.records, again.records)
    other = datasets.load("folder", root=folder, image_size=32, seed=1)
    assert not data.records["split"].equals(other.records["split"])


def test_folder_of_splits(tmp_path):
    for split in ("train", "test"):
        for label in ("x", "y"):
            save(tmp_path / split / label / "1.tif", seed=len(split + label))
    data = datasets.load("folder", root=tmp_path, image_size=32)
    assert data.counts().loc["x", ["train", "test"]].tolist() == [1, 1]


def test_images_right_in_a_split_folder_are_named(tmp_path):
    for label in ("x", "y"):
        for i in range(3):
            save(tmp_path / "train" / label / f"{i}.png", seed=i)
    for i in range(5):
        save(tmp_path / "test" / f"{i}.png")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    with pytest.warns(UserWarning, match=r"5 files and folders are .* test/0\.png: only"):
        data = datasets.load("folder", root=tmp_path, image_size=32)
    assert len(data) == 6


def test_images_beside_the_class_folders_are_named(folder):
    save(folder / "loose.png")
    (folder / "readme.txt").write_text("not an image")
    with pytest.warns(UserWarning, match=r"1 files and folders are passed over, e\.g\. loose\.png"):
        assert len(datasets.load("folder", root=folder, image_size=32)) == 20


def test_split_folders_without_classes(tmp_path):
    for split in ("train", "test"):
        save(tmp_path / split / "1.png")
    with pytest.raises(ValueError, match=r"split folders test, train, but no class folders in"):
        datasets.load("folder", root=tmp_path)


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (("test", "train", "validation"), "x"),
        (("test", "train", "validation"), ""),
        (("masks", "test", "train"), "x"),
        (("Test", "Train"), "x"),
    ],
)
def test_folders_of_which_not_all_are_splits(tmp_path, names, label):
    for name in names:
        save(tmp_path / name / label / "1.png")
    found = ", ".join(names)
    with pytest.raises(ValueError, match=f"folders {found}, .* called train, val, test, test2"):
        datasets.load("folder", root=tmp_path)


def test_one_of_two_tables_is_given_by_its_path(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / f"{name}.png")
        table = pd.DataFrame({"path": [f"{name}.png"], "label": [name], "split": ["train"]})
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    with pytest.raises(ValueError, match=r"holds 2 CSV files .* give the path of the one"):
        datasets.load("folder", root=tmp_path)
    for name in ("a", "b"):
        data = datasets.load("folder", root=str(tmp_path / f"{name}.csv"), image_size=32)
        assert data.classes == (name,) and data.records["image_id"].tolist() == [name]
        assert data.image(name).shape == (32, 32, 3)


def test_an_empty_site_is_the_first_site(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", seed=i)
    rows = '0.png,a,train,\n1.png,a,train," "\n2.png,a,test,C\n'
    (tmp_path / "images.csv").write_text("path,label,split,site\n" + rows)
    records = datasets.load("folder", root=tmp_path, image_size=32).records
    assert records["site"].tolist() == ["A", "A", "C"]
    (tmp_path / "images.csv").write_text("path,label,site\n0.png,a,\n")
    records = datasets.load("folder", root=tmp_path, image_size=32).records
    assert records["site"].tolist() == ["A"]


def test_a_label_map_in_jpeg_is_refused(tmp_path):
    save(tmp_path / "1.png")
    mask = np.zeros((40, 48), np.uint8)
    mask[10:30, 10:30] = 255
    for name, options in (("m.jpg", {}), ("m.tif", {"compression": "jpeg"})):
        Image.fromarray(mask).save(tmp_path / name, **options)
        write_csv(tmp_path, [("1.png", "a", name)], ["path", "label", "mask"])
        data = datasets.load("folder", root=tmp_path, image_size=40)
        with pytest.raises(ValueError, match=rf"{name} is coded as JPEG.* save it as PNG or TIFF"):
            data.instances("1")
    Image.fromarray(mask).save(tmp_path / "m.tif", compression="tiff_lzw")
    assert data.instances("1").max() == 1


def test_paths_as_windows_writes_them(tmp_path):
    save(tmp_path / "slides" / "0.png")
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.full((40, 48), 3, np.uint8)).save(tmp_path / "masks" / "0.png")
    rows = [("slides\\0.png", "a", "masks\\0.png")]
    write_csv(tmp_path, rows, ["path", "label", "mask"])
    data = datasets.load("folder", root=tmp_path, image_size=32)
    assert data.image("0").shape == (32, 32, 3) and data.instances("0").min() == 1
    write_csv(tmp_path, [("slides\\1.png", "a")], ["path", "label"])
    with pytest.raises(FileNotFoundError, match=r"line 2: image file .*slides\\1\.png does not"):
        datasets.load("folder", root=tmp_path)
    write_csv(tmp_path, [("slides/0.png", "a", "m.png")], ["path", "label", "mask"])
    with pytest.raises(FileNotFoundError, match=r"line 2: label map .*m\.png does not exist"):
        datasets.load("folder", root=tmp_path)


@pytest.mark.parametrize(
    ("separator", "encoding"),
    [(",", "utf-16"), (",", "utf-16-le"), (",", "cp1252"), (";", "utf-8"), ("\t", "utf-8-sig")],
)
def test_tables_in_another_encoding_or_with_another_separator(tmp_path, separator, encoding):
    save(tmp_path / "1.png")
    text = "\r\n".join(separator.join(row) for row in (("path", "label"), ("1.png", "Drüse"), ()))
    (tmp_path / "images.csv").write_bytes(text.encode(encoding))
    with pytest.raises(ValueError, match="save it as UTF-8, separated by commas"):
        datasets.load("folder", root=tmp_path)


def test_columns_that_are_meant_otherwise_are_named(tmp_path):
    save(tmp_path / "1.png")
    for column, meant in (
        ("patient_id", "patient"), ("Patient", "patient"), ("patient_number", "patient"),
        ("PatientIdentifier", "patient"), ("subject", "patient"), ("caseid", "patient"),
        ("slide_id", "patient"), ("spilt", "split"), ("dataset_split", "split"),
        ("fold", "split"), ("site_name", "site"), ("mask_path", "mask"),
    ):  # fmt: skip
        write_csv(tmp_path, [("1.png", "a", "train")], ["path", "label", column])
        with pytest.raises(ValueError, match=f"column '{column}'.* name it '{meant}'"):
            datasets.load("folder", root=tmp_path)
    write_csv(
        tmp_path, [("1.png", "a", "x", "y", "p", "1")],
        ["path", "label", "notes", "stage", "patient", "case_id"],
    )  # fmt: skip
    (tmp_path / "images.csv").rename(tmp_path / "IMAGES.CSV")
    assert datasets.load("folder", root=tmp_path, image_size=32).classes == ("a",)


def test_images_without_patients_are_said_to_count_as_one_each(folder):
    with pytest.warns(UserWarning, match=r"no patients are given.*each image counts as one"):
        data = datasets.load("folder", root=folder, image_size=32)
    assert data.records["patient"].is_unique
    rows = [(p.relative_to(folder), p.parent.name, "p" + p.stem) for p in folder.glob("*/*")]
    write_csv(folder, rows, ["path", "label", "patient"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no patients are given")
        datasets.load("folder", root=folder, image_size=32)


def test_images_left_out_are_counted(folder):
    with pytest.warns(UserWarning, match=r"folder: 10 of 20 images are used.*null takes all"):
        data = datasets.load("folder", root=folder, image_size=32, per_class={"train": 1})
    assert len(data.records) == 10


def test_gland_numbers_beyond_16_bits_and_below_zero(tmp_path):
    save(tmp_path / "1.png")
    mask = np.zeros((40, 48), np.int32)
    mask[:10], mask[10:20], mask[20:30], mask[30:35] = 70001, 135537, 65536, -1
    Image.fromarray(mask).save(tmp_path / "m.tif")
    write_csv(tmp_path, [("1.png", "a", "m.tif")], ["path", "label", "mask"])
    data = datasets.load("folder", root=tmp_path, image_size=40)
    labels = data.instances(data.records["image_id"][0])
    assert [labels[y, 20] for y in (5, 15, 25, 32, 38)] == [2, 3, 1, 0, 0]


def test_a_companion_of_the_same_class_is_refused(folder):
    data = datasets.load("folder", root=folder, image_size=32)
    other = dataclasses.replace(data, name="ihc", _image={}, _instances={})
    with pytest.raises(ValueError, match="class 'benign' is in folder and in its companion ihc"):
        data.with_companion(other)


def test_classes_and_patients_may_be_called_na(tmp_path):
    for i, label in enumerate(("NA", "None", "NA", "None")):
        save(tmp_path / label / f"{i}.png", seed=i)
    assert datasets.load("folder", root=tmp_path, image_size=32).classes == ("NA", "None")
    rows = [(f"{c}/{i}.png", c, "NA", "train") for i, c in enumerate(("NA", "None", "NA", "None"))]
    write_csv(tmp_path, rows, ["path", "label", "patient", "split"])
    records = datasets.load("folder", root=tmp_path, image_size=32).records
    assert records["label"].tolist() == ["NA", "None", "NA", "None"]
    assert set(records["patient"]) == {"NA"}


def test_the_order_of_classes_is_natural_or_given(tmp_path):
    for label in ("grade 2", "grade 10", "grade 1"):
        save(tmp_path / label / "1.png")
    rows = [(f"{label}/1.png", label, "train") for label in ("grade 2", "grade 10", "grade 1")]
    write_csv(tmp_path, rows, ["path", "label", "split"])
    data = datasets.load("folder", root=tmp_path, image_size=32)
    assert data.classes == ("grade 1", "grade 2", "grade 10")
    (tmp_path / "classes.txt").write_text("grade 10\ngrade 1\ngrade 2\n")
    data = datasets.load("folder", root=tmp_path, image_size=32)
    assert data.classes == ("grade 10", "grade 1", "grade 2")
    (tmp_path / "classes.txt").write_text("grade 10\n")
    with pytest.raises(ValueError, match="make them agree"):
        datasets.load("folder", root=tmp_path)


def test_csv_with_patients_splits_and_masks(tmp_path):
    rows = []
    for i in range(12):
        save(tmp_path / "pictures" / f"{i}.png", seed=i)
        rows.append((f"pictures/{i}.png", "ab"[i % 2], f"p{i // 3}"))
    mask = np.zeros((40, 48), np.uint8)
    mask[10:30, 20:40] = 7
    mask[2:8, 10:16] = 9
    Image.fromarray(mask).save(tmp_path / "m.png")
    table = pd.DataFrame(rows, columns=["path", " label", "patient"])
    table["mask"] = ["m.png"] + [None] * 11
    table.to_csv(tmp_path / "images.csv", index=False)
    data = datasets.load("folder", root=tmp_path / "images.csv", image_size=40)
    check(data, 40)
    assert data.records["patient"].nunique() == 4
    # 48 x 40 is cut to the central 40 x 40: columns 4 to 44
    instances = data.instances(data.records["image_id"][0])
    assert set(np.unique(instances)) == {0, 7, 9}
    assert np.array_equal(instances, mask[:, 4:44])
    assert data.instances(data.records["image_id"][1]) is None


def test_images_are_scaled_to_the_short_side_and_cut_at_the_centre(tmp_path):
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[:, 40:80] = 200
    (tmp_path / "x").mkdir()
    Image.fromarray(pixels).save(tmp_path / "x" / "1.png")
    data = datasets.load("folder", root=tmp_path, image_size=40)
    assert (data.image(data.records["image_id"][0]) == 200).all()


def test_label_maps_are_read_at_the_centres_of_the_pixels(tmp_path):
    """96 x 60 pixels cut to columns 18 .. 77 and shrunk threefold: the middle of every three."""
    rows, columns = np.mgrid[:60, :96]
    for name, values, axis in (("x", columns, 18), ("y", rows, 0)):
        Image.fromarray(np.zeros((60, 96, 3), np.uint8)).save(tmp_path / "image.png")
        Image.fromarray((values + 1).astype(np.uint16)).save(tmp_path / f"{name}.png")
        found = datasets._read_labels(tmp_path / f"{name}.png", tmp_path / "image.png", 20)
        line = axis + 3 * np.arange(20) + 2
        expected = np.tile(line, (20, 1)) if name == "x" else np.tile(line[:, None], (1, 20))
        np.testing.assert_array_equal(found, expected)


def test_a_subset_takes_many_patients_and_says_when_it_falls_short(tmp_path):
    rows = []
    for i in range(12):
        save(tmp_path / f"{i}.png", seed=i)
        rows.append((f"{i}.png", "a", f"p{i // 4}", "train"))
    write_csv(tmp_path, rows, ["path", "label", "patient", "split"])
    data = datasets.load("folder", root=tmp_path, image_size=32, per_class={"train": 3})
    assert len(data) == 3 and data.records["patient"].nunique() == 3
    with pytest.warns(UserWarning, match="a/train: 12 of 20"):
        datasets.load("folder", root=tmp_path, image_size=32, per_class={"train": 20})


def test_a_subset_is_drawn_by_the_seed(tmp_path):
    fake_pathmnist(tmp_path / "pathmnist.npz", n=90)

    def chosen(seed):
        data = datasets.load(
            "pathmnist", root=tmp_path, image_size=28, seed=seed, per_class={"train": 2}
        )
        return tuple(data.records.loc[data.records["split"] == "train", "image_id"])

    assert chosen(1) == chosen(1) and len({chosen(seed) for seed in range(4)}) == 4


def test_small_images_are_enlarged_with_a_warning(folder):
    with pytest.warns(UserWarning, match="20 of 20 images have a short side below image_size=64"):
        check(datasets.load("folder", root=folder, image_size=64), 64)


@pytest.mark.parametrize(
    ("mode", "suffix", "message"),
    [
        ("L", "png", "mode L, which is greyscale"),
        ("1", "png", "black and white"),
        ("CMYK", "jpg", "mode CMYK"),
        ("F", "tif", "floating point"),
    ],
)
def test_other_modes_than_rgb(folder, mode, suffix, message):
    path = save(folder / "tumour" / f"odd.{suffix}", mode=mode)
    with pytest.raises(ValueError, match=message) as error:
        datasets.load("folder", root=folder, image_size=32)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("mode", ["P", "RGBA"])
def test_palettes_and_opaque_alpha_lose_nothing(folder, mode):
    path = save(folder / "tumour" / "exported.png", size=(40, 36))
    with Image.open(path) as picture:
        converted = picture.quantize(64) if mode == "P" else picture.convert("RGBA")
    converted.save(path)
    np.testing.assert_array_equal(datasets.read_image(path), converted.convert("RGB"))
    data = datasets.load("folder", root=folder, image_size=32)
    assert data.image("tumour__exported").shape == (32, 32, 3)


def test_transparent_pixels_are_refused(folder):
    path = save(folder / "tumour" / "hole.png", size=(40, 36))
    with Image.open(path) as picture:
        picture = picture.convert("RGBA")
    picture.putpixel((3, 4), (0, 0, 0, 0))
    picture.save(path)
    data = datasets.load("folder", root=folder, image_size=32)
    with pytest.raises(ValueError, match=r"hole\.png has transparent pixels"):
        data.image("tumour__hole")


def test_16_bit_grey(folder):
    Image.fromarray(np.full((40, 40), 3000, np.uint16)).save(folder / "tumour" / "deep.png")
    with pytest.raises(ValueError, match=r"deep\.png has mode I;16, which is 16 bits a channel"):
        datasets.load("folder", root=folder, image_size=32)


def test_16_bit_colour_which_pillow_opens_as_if_it_had_8(folder):
    colour = np.full((40, 44, 3), 30000, np.uint16)
    cv2.imwrite(str(folder / "tumour" / "deep.png"), colour)
    with Image.open(folder / "tumour" / "deep.png") as picture:
        assert picture.mode == "RGB"
    with pytest.raises(ValueError, match=r"deep\.png has mode RGB;16B, which is 16 bits a channel"):
        datasets.load("folder", root=folder, image_size=32)


def test_what_is_passed_over_in_a_class_folder_is_named(folder):
    save(folder / "benign" / "slide 2" / "c.png")
    (folder / "tumour" / "x.webp").write_bytes(b"RIFF")
    (folder / "tumour" / ".hidden").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"2 files and folders .* e\.g\. benign/slide 2: only"):
        assert len(datasets.load("folder", root=folder, image_size=32)) == 20


def test_a_file_that_is_no_image(folder):
    (folder / "benign" / "note.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"note\.png cannot be read as an image"):
        datasets.load("folder", root=folder, image_size=32)


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg"])
def test_a_truncated_image_is_named_when_it_is_read(folder, name):
    path = save(folder / "benign" / name, size=(64, 64))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    data = datasets.load("folder", root=folder, image_size=32)
    with pytest.raises(ValueError, match=rf"{name} is truncated or damaged"):
        data.image("benign__cut")


def test_a_tiny_image(folder):
    save(folder / "benign" / "dot.png", size=(20, 200))
    with pytest.raises(ValueError, match=r"dot\.png is 20 x 200 pixels, but at least 32"):
        datasets.load("folder", root=folder, image_size=32)


def test_a_class_without_images(folder):
    (folder / "stroma").mkdir()
    with pytest.raises(ValueError, match="stroma has no images"):
        datasets.load("folder", root=folder, image_size=32)


def test_bad_tables(tmp_path):
    save(tmp_path / "1.png")
    write_csv(tmp_path, [("1.png", "a")], ["file", "label"])
    with pytest.raises(ValueError, match="path is missing"):
        datasets.load("folder", root=tmp_path)
    write_csv(tmp_path, [("1.png", None)], ["path", "label"])
    with pytest.raises(ValueError, match="line 2: label is empty"):
        datasets.load("folder", root=tmp_path)
    write_csv(tmp_path, [("2.png", "a")], ["path", "label"])
    with pytest.raises(FileNotFoundError, match=r"line 2: image file .*2\.png does not exist"):
        datasets.load("folder", root=tmp_path)
    write_csv(tmp_path, [(f"{i}.png", "a") for i in range(30)], ["path", "label"])
    with pytest.raises(ValueError, match=r"^29 of 30 images cannot be used:\n") as error:
        datasets.load("folder", root=tmp_path)
    said = str(error.value).splitlines()
    assert "line 2: image file" in said[1] and "line 4: image file" in said[2]
    assert len(said) == 22 and said[-1] == "and 9 more"
    write_csv(tmp_path, [("1.png", "a"), ("1.png", "a")], ["path", "label"])
    with pytest.raises(ValueError, match=r"names 1\.png twice"):
        datasets.load("folder", root=tmp_path)
    write_csv(tmp_path, [("1.png", "a", "dev")], ["path", "label", "split"])
    with pytest.raises(ValueError, match="split 'dev' is unknown"):
        datasets.load("folder", root=tmp_path)
    write_csv(tmp_path, [], ["path", "label"])
    with pytest.raises(ValueError, match="has no rows"):
        datasets.load("folder", root=tmp_path)
    (tmp_path / "images.csv").write_text("")
    with pytest.raises(ValueError, match="cannot be read as a CSV"):
        datasets.load("folder", root=tmp_path)
    (tmp_path / "second.csv").write_text("")
    with pytest.raises(ValueError, match="holds 2 CSV files"):
        datasets.load("folder", root=tmp_path)


def test_images_that_a_table_does_not_name_are_counted(tmp_path):
    for name in ("a/1.png", "a/2.png", "a/3.png", "a/1_glands.png", "b/4.png"):
        save(tmp_path / name, seed=len(name))
    Image.fromarray(np.ones((40, 48), np.uint8)).save(tmp_path / "a" / "1_glands.png")
    rows = [("a/1.png", "x", "a/1_glands.png"), ("a/2.png", "x", None)]
    write_csv(tmp_path, rows, ["path", "label", "mask"])
    with pytest.warns(UserWarning, match=r"^images\.csv leaves out 1 of .* e\.g\. 3\.png"):
        data = datasets.load("folder", root=tmp_path, image_size=32)
    assert len(data) == 2


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_with_accents_are_found_however_they_are_written(tmp_path, form):
    name, other = (unicodedata.normalize(f, "Gewebe_ü.png") for f in ("NFC", "NFD"))
    written, there = (name, other) if form == "NFC" else (other, name)
    save(tmp_path / there)
    write_csv(tmp_path, [(written, "a")], ["path", "label"])
    assert len(datasets.load("folder", root=tmp_path, image_size=32)) == 1
    assert tmp_path / there in set(runs._named_files(tmp_path / "images.csv"))


def test_splits_that_are_drawn_anew_are_noted(tmp_path):
    def drawn(n):
        for i in range(n):
            save(tmp_path / "a" / f"{i:02}.png", seed=i)
            save(tmp_path / "b" / f"{i:02}.png", seed=100 + i)
        return datasets.load("folder", root=tmp_path, image_size=32).records

    before, now = drawn(10), drawn(16)
    assert datasets.redrawn(before, before) is None
    both = now.set_index("image_id")["split"].loc[before["image_id"]]
    moved = int((both.to_numpy() != before["split"].to_numpy()).sum())
    said = datasets.redrawn(now, before)
    assert moved > 0 and said.startswith(f"{moved} of 20 images are in another split than before")
    assert datasets.redrawn(now.assign(split=now["image_id"]), before.iloc[:0]) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path,label\n1.png,a,\n2.png,b,\n", r"Expected 2 fields in line 2, saw 3\): .*quotes"),
        ("path,label\n1.png,a\n2.png,b, c\n", r"Expected 2 fields in line 3, saw 3\): "),
        ("path,label,label\n1.png,a,b\n2.png,b,a\n", "more than one column 'label'"),
        ("path,label,label \n1.png,a,b\n2.png,b,a\n", "more than one column 'label'"),
    ],
)
def test_tables_whose_columns_are_not_clear(tmp_path, text, said):
    for name in ("1.png", "2.png"):
        save(tmp_path / name)
    (tmp_path / "images.csv").write_text(text)
    with pytest.raises(ValueError, match=said):
        datasets.load("folder", root=tmp_path, image_size=32)


def test_empty_lines_of_a_table_are_passed_over_and_counted(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", seed=i)
    start = "path,label,\n0.png,a,\n\n,,\n1.png,a,x\n"
    (tmp_path / "images.csv").write_text(start + "\n2.png,a,\n\n", encoding="utf-8-sig")
    assert len(datasets.load("folder", root=tmp_path, image_size=32)) == 3
    for line, error, said in (
        ("2.png,,", ValueError, "line 7: label is empty"),
        ("3.png,a,", FileNotFoundError, "line 7: image file"),
    ):
        (tmp_path / "images.csv").write_text(start + f"\n{line}\n")
        with pytest.raises(error, match=said):
            datasets.load("folder", root=tmp_path, image_size=32)


def test_a_patient_in_two_splits_is_refused(tmp_path):
    for i in range(2):
        save(tmp_path / f"{i}.png")
    rows = [("0.png", "a", "p", "train"), ("1.png", "a", "p", "test")]
    write_csv(tmp_path, rows, ["path", "label", "patient", "split"])
    with pytest.raises(ValueError, match="'p' in test and train"):
        datasets.load("folder", root=tmp_path, image_size=32)


def test_a_class_missing_from_a_split(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", seed=i)
    rows = [("0.png", "a", "train"), ("1.png", "b", "train"), ("2.png", "a", "test")]
    write_csv(tmp_path, rows, ["path", "label", "split"])
    with pytest.warns(UserWarning, match=r"split 'test' has no images of b \(a 1, b 0\)"):
        datasets.load("folder", root=tmp_path, image_size=32)
    rows[1] = ("1.png", "b", "test")
    write_csv(tmp_path, rows, ["path", "label", "split"])
    with pytest.raises(ValueError, match="class 'b' has no training images"):
        datasets.load("folder", root=tmp_path, image_size=32)


def test_names_that_collide_are_kept_apart(tmp_path):
    for name in ("a b.png", "a_b.png", "a b.jpg"):
        save(tmp_path / "x" / name)
    data = datasets.load("folder", root=tmp_path, image_size=32)
    assert len({i.lower() for i in data.records["image_id"]}) == 3


def test_long_ids_are_cut_and_stay_unique(tmp_path):
    parts = ("k" * 100, "s" * 100)
    names = ["n" * 100 + end for end in ("a.png", "b.png")]
    paths = [save(tmp_path.joinpath(*parts, name)) for name in names] + [save(tmp_path / "o.png")]
    write_csv(tmp_path, [(p.relative_to(tmp_path), "a") for p in paths], ["path", "label"])
    ids = datasets.load("folder", root=tmp_path, image_size=32).records["image_id"].tolist()
    assert ids[2] == "o" and len(set(ids)) == 3
    assert max(map(len, ids)) == datasets.LONGEST_ID
    assert ids[0].startswith("k" * 100 + "__s")
    assert datasets._image_ids([Path("x" * 150 + ".png")]) == ["x" * 150]
    (wide,) = datasets._image_ids([Path("\u65e5" * 80 + ".png")])  # three bytes each
    assert wide.startswith("\u65e5" * 47) and len(wide.encode()) <= datasets.LONGEST_ID


# --- splits --------------------------------------------------------------------------------------


def test_splits_are_near_their_shares_and_keep_patients_whole():
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(60), 5).astype(str)
    labels = np.repeat(np.tile(["a", "b", "c"], 20), 5)
    splits = datasets.split_by_patient(labels, patients, rng=rng)
    table = pd.DataFrame({"label": labels, "patient": patients, "split": splits})
    assert (table.groupby("patient")["split"].nunique() == 1).all()
    share = pd.crosstab(table["label"], table["split"], normalize="index")
    for split, wanted in datasets.FRACTIONS.items():
        assert (share[split] - wanted).abs().max() <= 0.05


def test_a_rare_class_goes_to_train_first():
    labels = ["a"] * 30 + ["b"]
    patients = [str(i) for i in range(31)]
    splits = datasets.split_by_patient(labels, patients, rng=np.random.default_rng(0))
    assert splits[-1] == "train"
    splits = datasets.split_by_patient(
        [*labels, "b"], [*patients, "31"], rng=np.random.default_rng(0)
    )
    assert set(splits[-2:]) == {"train", "test"}


def test_splitting_is_deterministic_and_names_do_not_matter():
    labels = list("aabbccaabb")
    patients = list("0011223344")
    a = datasets.split_by_patient(labels, patients, rng=np.random.default_rng(3))
    renamed = [f"patient {p}" for p in patients]
    b = datasets.split_by_patient(labels, renamed, rng=np.random.default_rng(3))
    assert np.array_equal(a, b)


# --- public sets, as tiny folders in their layout ------------------------------------------------


def test_kbsmc_colon(tmp_path):
    for k, name in enumerate(("tma_01", "tma_02", "tma_03", "tma_05", "wsi_01")):
        save(tmp_path / "set1" / name / f"c{k}_10_{k % 4}.jpg")
    for name in ("tma_06", "wsi_03", "tma_04", "wsi_02"):
        for k in range(4):
            save(tmp_path / "set1" / name / f"d{k}_7_{k}.jpg")
    save(tmp_path / "set1" / "tma_01" / "tma_01" / "c0_11_0.jpg")  # unzipped into its own folder
    for k in (1, 2, 3, 4):
        save(tmp_path / "set2" / "wsi_001" / "patches" / f"x_{k}.png")
    data = datasets.load("kbsmc-colon", root=tmp_path, image_size=32)
    check(data, 32)
    assert data.classes == ("BN", "WD", "MD", "PD")
    counts = data.counts()
    assert counts["train"].tolist() == [3, 1, 1, 1]
    same_core = data.records["image_id"].str.contains("c0_1")
    assert data.records.loc[same_core, "patient"].tolist() == ["tma_01/c0"] * 2
    assert counts["val"].tolist() == [2, 2, 2, 2] == counts["test"].tolist()
    assert counts["test2"].tolist() == [1, 1, 1, 1]
    assert set(data.records[data.records["split"] == "test2"]["site"]) == {"B"}
    save(tmp_path / "set1" / "tma_01" / "broken_9.jpg")
    with pytest.raises(ValueError, match=r"broken_9\.jpg: the file name must end with a label"):
        datasets.load("kbsmc-colon", root=tmp_path, image_size=32)


def test_usz_prostate(tmp_path):
    for array in ("ZT111", "ZT199", "ZT204", "ZT76", "ZT80"):
        for k in range(4):
            name = f"{array}_4_A_1_{k}"
            save(tmp_path / array / name / f"{name}_patch_0_class_{k}.jpg")
    data = datasets.load("usz-prostate", root=tmp_path, image_size=32)
    check(data, 32)
    assert data.classes == ("BN", "G3", "G4", "G5")
    assert data.counts().loc["G5"].tolist() == [3, 1, 1, 0]
    assert "ZT76_4_A_1_2" in set(data.records["patient"])
    save(tmp_path / "other" / "x_class_1.jpg")
    with pytest.raises(ValueError, match="no tissue array in the path"):
        datasets.load("usz-prostate", root=tmp_path, image_size=32)


def fake_pathmnist(path, n=27, side=28):
    rng = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(n) % 9).astype(np.uint8)[:, None]
    np.savez_compressed(path, **arrays)
    return arrays


def test_pathmnist(tmp_path):
    arrays = fake_pathmnist(tmp_path / "pathmnist.npz")
    data = datasets.load("pathmnist", root=tmp_path, image_size=28)
    check(data, 28)
    assert len(data.classes) == 9 and data.counts().to_numpy().sum() == 81
    assert np.array_equal(data.image("val_000013"), arrays["val_images"][13])
    assert data.records.set_index("image_id").loc["val_000013", "label"] == data.classes[13 % 9]
    few = datasets.load("pathmnist", root=tmp_path, image_size=32, per_class={"train": 1})
    assert few.counts()["train"].tolist() == [1] * 9
    check(few, 32)


def test_splits_and_sites_are_those_of_the_papers(tmp_path):
    """Written out: which array or slide is for what."""
    for array in ("ZT111", "ZT199", "ZT204", "ZT76", "ZT80"):
        for k in range(4):
            save(tmp_path / "usz" / array / f"{array}_4_A_1_{k}_patch_0_class_{k}.jpg")
    table = datasets.load("usz-prostate", root=tmp_path / "usz", image_size=32).records
    split = dict(zip(table["patient"].str.split("_").str[0], table["split"], strict=True))
    assert split == {
        "ZT111": "train",
        "ZT199": "train",
        "ZT204": "train",
        "ZT76": "val",
        "ZT80": "test",
    }
    assert datasets._KBSMC_SPLIT == {
        "tma01": "train", "tma02": "train", "tma03": "train", "tma05": "train", "wsi01": "train",
        "tma06": "val", "wsi03": "val", "tma04": "test", "wsi02": "test",
    }  # fmt: skip
    fake_pathmnist(tmp_path / "pathmnist.npz")
    table = datasets.load("pathmnist", root=tmp_path, image_size=28).records
    assert set(zip(table["split"], table["site"], strict=True)) == {
        ("train", "A"), ("val", "A"), ("test", "B")
    }  # fmt: skip


def test_pathmnist_takes_the_size_that_fits(tmp_path):
    fake_pathmnist(tmp_path / "pathmnist.npz")
    fake_pathmnist(tmp_path / "pathmnist_64.npz", side=64)
    assert datasets._pathmnist_file(tmp_path, 32).name == "pathmnist_64.npz"
    assert datasets._pathmnist_file(tmp_path, 28).name == "pathmnist.npz"
    assert datasets._pathmnist_file(tmp_path, 512).name == "pathmnist_64.npz"


def test_pathmnist_without_file_and_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "medmnist", None)
    with pytest.raises(ImportError, match="medmnist package is not installed"):
        datasets.load("pathmnist", root=tmp_path)


def test_a_wrong_npz_is_named(tmp_path):
    np.savez(tmp_path / "pathmnist.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="has no array 'train_labels'"):
        datasets.load("pathmnist", root=tmp_path)


def test_a_damaged_npz_is_named(tmp_path):
    path = tmp_path / "pathmnist.npz"
    fake_pathmnist(path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    damaged = (
        b"PK\x03\x04broken",
        whole[:middle],
        whole[:middle] + bytes(200) + whole[middle + 200 :],
    )
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"pathmnist\.npz is damaged .*download it again"):
            datasets.load("pathmnist", root=tmp_path, image_size=32)


# --- GlaS ----------------------------------------------------------------------------------------


def fake_glas(root, *, header=None):
    """15 patients with 2 fields each, in a table with the real one's spaces and misspelling."""
    grades = (
        ("benign", "healthy"),
        ("benign", "adenomatous"),
        ("malignant", "moderately differentiated"),
        ("malignant", "moderately-to-poorly differentated"),
        ("malignant", "poorly differentiated"),
    )
    lines = [header or "name,patient ID, grade (GlaS), grade (Sirinukunwattana et al. 2015)"]
    (root / "masks").mkdir(parents=True)
    for i in range(30):
        two, five = grades[i // 2 % 5]
        lines.append(f"train_{i},{i // 2}, {two}, {five}")
        save(root / "images" / f"train_{i}.bmp", size=(60, 40), seed=i)
        mask = np.zeros((40, 60), np.uint8)
        mask[5:20, 20:40] = i + 1
        mask[25:35, 22:30] = i + 2
        Image.fromarray(mask).save(root / "masks" / f"train_{i}.png")
    (root / "Grade.csv").write_text("\n".join(lines) + "\n")


def test_glas_layout(tmp_path):
    fake_glas(tmp_path)
    data = datasets.load("glas", root=tmp_path, image_size=40)
    check(data, 40)
    assert data.classes == datasets.GLAS_CLASSES
    assert (data.counts()[["train", "val", "test"]] == 2).all().all()
    assert np.unique(data.instances("train_6")).tolist() == [0, 7, 8]
    assert datasets.load("glas", root=tmp_path, image_size=40, n_classes=2).classes == (
        "benign", "malignant",
    )  # fmt: skip
    (tmp_path / "images" / "train_3.bmp").unlink()
    with pytest.warns(UserWarning, match="1 of 30 images"):
        assert len(datasets.load("glas", root=tmp_path, image_size=40)) == 29


def test_the_parts_of_a_binary_mask_are_instances(tmp_path):
    fake_glas(tmp_path)
    path = tmp_path / "masks" / "train_6.png"
    Image.fromarray(np.where(np.array(Image.open(path)), 255, 0).astype(np.uint8)).save(path)
    labels = datasets.load("glas", root=tmp_path, image_size=40).instances("train_6")
    assert np.unique(labels).tolist() == [0, 1, 2]
    assert [(labels == i).sum() for i in (1, 2)] == [15 * 20, 10 * 8]


def test_glas_without_images_of_a_grade(tmp_path):
    fake_glas(tmp_path)
    whole = datasets.load("glas", root=tmp_path, image_size=40)
    path = tmp_path / "Grade.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "healthy" not in line))
    with pytest.warns(UserWarning, match="no images are healthy"):
        data = datasets.load("glas", root=tmp_path, image_size=40)
    assert data.classes == tuple(c for c in whole.classes if c != "healthy")


def test_glas_with_another_table(tmp_path):
    fake_glas(tmp_path, header="name,patient,a,b")
    with pytest.raises(ValueError, match="'patient ID'"):
        datasets.load("glas", root=tmp_path)


def test_a_mask_of_another_size_is_named(tmp_path):
    fake_glas(tmp_path)
    Image.fromarray(np.zeros((10, 10), np.uint8)).save(tmp_path / "masks" / "train_0.png")
    data = datasets.load("glas", root=tmp_path, image_size=40)
    with pytest.raises(ValueError, match=r"train_0\.png has shape \(10, 10\)"):
        data.instances("train_0")


@needs_glas
@pytest.mark.parametrize("n_classes", [2, 5])
def test_glas(n_classes):
    for seed in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = datasets.load("glas", root=GLAS, n_classes=n_classes, seed=seed, image_size=64)
        check(data, 64)
        counts = data.counts()
        assert len(data) == 85 and (counts[["train", "test"]] > 0).all().all()
        assert data.instances(data.records["image_id"][0]).max() >= 1


# --- what users' files have in them --------------------------------------------------------------


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_16_bit_tiff_is_refused_however_it_is_laid_out(folder, planar):
    """Pillow opens both as if they had 8 bits, and the second one wrongly."""
    pixels = np.random.default_rng(0).integers(0, 4096, (40, 48, 3)).astype(np.uint16)
    if planar == "separate":
        pixels = np.moveaxis(pixels, -1, 0)
    path = folder / "benign" / "deep.tif"
    tifffile.imwrite(path, pixels, photometric="rgb", planarconfig=planar)
    with pytest.raises(ValueError, match=r"deep\.tif has mode RGB;16.*convert it to 8-bit RGB"):
        datasets.load("folder", root=folder, image_size=32)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph_is_read_as_it_is_shown(tmp_path, orientation, suffix):
    """The label map is drawn on what is shown; only its upright size fits."""
    path = save(tmp_path / f"turned{suffix}", size=(52, 40), seed=3)
    with Image.open(path) as picture:
        picture.load()
        exif = picture.getexif()
        exif[ExifTags.Base.Orientation] = orientation
        picture.save(path, exif=exif)
        picture.getexif()[ExifTags.Base.Orientation] = orientation
        shown = np.asarray(ImageOps.exif_transpose(picture))
    assert np.array_equal(datasets.read_image(path), shown)
    labels = np.zeros(shown.shape[:2], np.uint8)
    labels[3:15, 6:30] = 1
    Image.fromarray(labels).save(tmp_path / "labels.png")
    found = datasets._read_labels(tmp_path / "labels.png", path, 40)
    rows, columns = ((np.array(labels.shape) - 40) // 2)[:, None] + np.arange(40)
    assert np.array_equal(found, labels[rows[:, None], columns])


def test_a_damaged_note_of_a_camera_is_named_with_its_file(tmp_path):
    path = tmp_path / "note.png"
    save(tmp_path / "good.png", size=(40, 40))
    with Image.open(tmp_path / "good.png") as picture:
        picture.save(path, exif=b"garbage-and-no-tiff-header")
    Image.fromarray(np.ones((40, 40), np.uint8)).save(tmp_path / "labels.png")
    for read in (
        lambda: datasets.read_image(path),
        lambda: datasets._read_labels(tmp_path / "labels.png", path, 40),
    ):
        with pytest.raises(ValueError, match=r"note\.png is truncated or damaged"):
            read()


@pytest.mark.parametrize("width", [40, 52, 53])
def test_what_is_not_scaled_is_cut_out_as_it_is(tmp_path, width):
    path = save(tmp_path / "a.png", size=(width, 40))
    whole, left = datasets.read_image(path), (width - 40) // 2
    assert np.array_equal(datasets.read_image(path, 40), whole[:, left : left + 40])
    labels = np.arange(40 * width, dtype=np.uint16).reshape(40, width)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    found = datasets._read_labels(tmp_path / "labels.png", path, 40)
    assert np.array_equal(found, labels[:, left : left + 40])


def test_a_colour_that_stands_for_transparent_is_refused(tmp_path):
    pixels = np.full((40, 40, 3), 200, np.uint8)
    pixels[:8] = 7
    Image.fromarray(pixels).save(tmp_path / "a.png", transparency=(7, 7, 7))
    with pytest.raises(ValueError, match=r"a\.png has transparent pixels"):
        datasets.read_image(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "b.png", transparency=(1, 2, 3))
    assert np.array_equal(datasets.read_image(tmp_path / "b.png"), pixels)


def test_pages_beyond_the_first_are_named(folder):
    pages = [Image.new("RGB", (48, 40), colour) for colour in ("red", "blue")]
    path = folder / "benign" / "pages.tif"
    pages[0].save(path, save_all=True, append_images=pages[1:])
    with pytest.warns(UserWarning, match=r"1 of 21 images have several pages.*pages\.tif"):
        datasets.load("folder", root=folder, image_size=32)


def test_all_images_that_cannot_be_opened_are_named_together(folder):
    save(folder / "benign" / "grey.png", mode="L")
    save(folder / "tumour" / "print.jpg", mode="CMYK")
    with pytest.raises(ValueError, match=r"2 of 22 images cannot be used:\n.*grey.*\n.*print"):
        datasets.load("folder", root=folder, image_size=32)


def test_a_label_map_of_classes_or_grey_levels_is_pointed_out(tmp_path):
    """Two numbers in many parts are no two glands; and neither are the levels of a soft edge."""
    rows = []
    for i in range(2):
        save(tmp_path / f"{i}.png", seed=i)
        rows.append((f"{i}.png", "a", f"m{i}.png"))
    write_csv(tmp_path, rows, ["path", "label", "mask"])
    semantic = np.zeros((40, 48), np.uint8)
    semantic[::4, ::4], semantic[2::4, 2::4] = 1, 2
    for i in range(2):
        Image.fromarray(semantic).save(tmp_path / f"m{i}.png")
    with pytest.warns(UserWarning, match=r"m0\.png has 2 numbers in \d+ unconnected parts"):
        datasets.load("folder", root=tmp_path, image_size=40)
    instances = np.zeros((40, 48), np.uint8)
    for number in range(1, 6):
        instances[7 * number : 7 * number + 5, 5:40] = number
    for i in range(2):
        Image.fromarray(instances).save(tmp_path / f"m{i}.png")
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        datasets.load("folder", root=tmp_path, image_size=40)
    assert not any("unconnected" in str(note.message) for note in notes)


def test_classes_that_differ_in_capitals_only_are_pointed_out(folder):
    save(folder / "Benign" / "c.png", seed=40)
    with pytest.warns(UserWarning, match="classes 'Benign', 'benign' differ in capital letters"):
        datasets.load("folder", root=folder, image_size=32)


def test_the_order_of_classes_has_to_be_utf_8(folder):
    (folder / "classes.txt").write_bytes("dr\xfcsig\nbenign\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"classes\.txt is no UTF-8 text .*save it as UTF-8"):
        datasets.load("folder", root=folder, image_size=32)


def test_one_patient_leaves_splits_empty_and_says_so(tmp_path):
    rows = [(str(save(tmp_path / f"{i}.png", seed=i).name), "ab"[i % 2], "P") for i in range(6)]
    write_csv(tmp_path, rows, ["path", "label", "patient"])
    with pytest.warns(UserWarning, match="and with 1 of them no images are left for val, test"):
        datasets.load("folder", root=tmp_path, image_size=32)


def test_names_in_other_alphabets_stay_readable(tmp_path):
    for name in ("\u00c4rzte/\u65e5\u672c.png", "b/x y.png"):
        save(tmp_path / name)
    data = datasets.load("folder", root=tmp_path, image_size=32)
    assert sorted(data.records["image_id"]) == ["b__x_y", "\u00c4rzte__\u65e5\u672c"]


def test_copies_across_splits_are_refused_and_others_noted():
    records = pd.DataFrame(
        {"image_id": list("abcde"), "label": list("xxyyy"), "split": ["train"] * 4 + ["test"]}
    )
    assert datasets.check_copies(records, ["1", "2", "3", "4", "5"]) is None
    assert datasets.check_copies(records, [None] * 5) is None  # blank fields are no copies
    found = datasets.check_copies(records, ["1", "2", "2", "2", "5"])
    assert found.startswith("1 images are there more than once, pixel for pixel, 1 of them in sev")
    assert "e.g. b, c, d;" in found
    with pytest.raises(ValueError, match=r"1 images are in several splits.*d \(train\), e \(test"):
        datasets.check_copies(records, ["1", "2", "3", "5", "5"])
