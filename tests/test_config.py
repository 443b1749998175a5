import inspect
import types
import typing

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from helpers import (
    anchors,
    classify,
    config,
    diffusion,
    draws,
    placement,
    replacement,
    sam,
    samplers,
)
from helpers.samplers import Sampling
from helpers.seam import BLEND_REACH

GOOD = {
    "00_tissue": dict(
        run="a", seed=0, dataset="phantom", data_root=None, companion="ihc", image_size=64,
        train_per_class=2, val_per_class=1, test_per_class=1, test2_per_class=0,
    ),
}  # fmt: skip


def tissue(**changes):
    return config.build("00_tissue", {**defaults("00_tissue"), **changes})


def defaults(chapter):
    """Good values of a chapter: its notebook's, or those above while there is none."""
    from helpers import execute, runs

    if runs.notebook(chapter).exists():
        return execute.parameters_cell(chapter)
    return dict(GOOD[chapter])


def test_parameters_are_frozen():
    params = tissue()
    with pytest.raises(ValueError, match="frozen"):
        params.seed = 3


def test_an_int_passes_for_a_float_but_no_bool_for_an_int():
    class Model(config.Common):
        x: config.PositiveFloat
        n: config.Positive

    assert Model(run="a", seed=0, x=2, n=1).x == 2.0
    for wrong in ({"x": True, "n": 1}, {"x": 1.0, "n": True}, {"x": 1.0, "n": 1.0}):
        with pytest.raises(ValueError, match="should be a valid"):
            Model(run="a", seed=0, **wrong)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("image_size", "256", "should be a valid integer"),
        ("image_size", 0, "greater than or equal to"),
        ("image_size", 100, "multiple of 32"),
        ("dataset", "fantom", "should be 'phantom'"),
        ("seed", -1, "greater than or equal to 0"),
        ("run", "../up", "should be a folder name"),
        ("run", ".hidden", "should be a folder name"),
        ("companion", "glas", "should be 'ihc'"),
    ],
)
def test_wrong_values_are_named_with_value_and_reason(name, value, said):
    with pytest.raises(ValueError) as error:
        tissue(**{name: value})
    assert f"{name} = {value!r}: " in str(error.value)
    assert said in str(error.value)
    assert "nothing has been run" in str(error.value)


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ValueError, match="3 parameters are wrong") as error:
        tissue(image_size=1, seed="x", dataest="glas")
    assert "did you mean `dataset`?" in str(error.value)


def test_a_missing_parameter_is_named():
    values = defaults("00_tissue")
    del values["companion"]
    with pytest.raises(ValueError, match="companion: the parameters cell does not set it"):
        config.build("00_tissue", values)


def test_a_data_set_in_a_folder_needs_its_folder():
    with pytest.raises(ValueError, match="data_root is None: give the folder"):
        tissue(dataset="glas", data_root=None)


def test_names_of_other_chapters_are_left_out():
    other = next(n for n in config.names("05_sde_mcg_inpainting") if n not in config.COMMON)
    assert not hasattr(tissue(**{other: 1}), other)


def test_read_skips_what_is_no_parameter():
    namespace = {
        **defaults("00_tissue"),
        "np": types,
        "helper": len,
        "Class": dict,
        "_private": 1,
        "In": [],
        "Out": {},
        "__name__": "__main__",
    }
    assert config.read("00_tissue", namespace) == tissue()


def test_read_refuses_a_mistyped_name():
    with pytest.raises(ValueError, match=r"imge_size = 3: no chapter has .* mean `image_size`"):
        config.read("00_tissue", {**defaults("00_tissue"), "imge_size": 3})


def test_a_number_that_yaml_reads_as_text_is_explained():
    for chapter, model in config.CHAPTERS.items():
        for name, field in model.model_fields.items():
            if field.annotation is float:
                with pytest.raises(ValueError, match=r"reads 1e-3 as text, write 0\.001"):
                    config.build(chapter, {name: "1e-3"})
                return
    pytest.fail("no chapter has a float")


def test_none_as_text_is_told_how_to_say_none():
    with pytest.raises(ValueError, match=r"eta = 'none': .*; write null for none"):
        config.build("05_sde_mcg_inpainting", {"eta": "none"})
    with pytest.raises(ValueError, match=r"eta = 'much': (?!.*1e-3)"):
        config.build("05_sde_mcg_inpainting", {"eta": "much"})


def test_what_is_not_there_is_known_before_anything_runs(tmp_path, monkeypatch):
    """A GPU, and both files of a latent diffusion model."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def missing(**given):
        return config.missing_files(types.SimpleNamespace(**given))

    assert missing(device="auto") == missing(device="cpu") == missing() == []
    (said,) = missing(device="cuda:1")
    assert said.startswith("device='cuda:1', but torch sees no GPU here")
    (tmp_path / "autoencoder.safetensors").touch()
    (said,) = missing(latent_checkpoint=str(tmp_path))
    assert said.endswith("the folder has no unet.safetensors")
    for name in ("autoencoder", "unet"):
        save_file({"w": np.ones(2)}, tmp_path / f"{name}.safetensors")
    assert missing(latent_checkpoint=str(tmp_path)) == []
    (tmp_path / "unet.safetensors").write_bytes(b"half")
    (said,) = missing(latent_checkpoint=str(tmp_path))
    assert "unet.safetensors cannot be read" in said and said.endswith("copy or download it again")
    (tmp_path / "mine.pth").write_bytes(b"<html>")
    (said,) = missing(sam_checkpoint=str(tmp_path / "mine.pth"))
    assert said.startswith("sam_checkpoint = ") and "mine.pth cannot be read" in said


def test_a_path_that_no_network_takes_is_refused():
    given = {"run": "r", "seed": 0, "device": "cpu", "background": "keep", "tidy": True}
    given |= {"n_components": 8, "extractor_path": "mine.pth"}
    with pytest.raises(ValueError, match=r"extractor_path='mine\.pth' is given, but extractor="):
        config.build("03_pca_pooling", given | {"extractor": "lite0"})
    assert config.build("03_pca_pooling", given | {"extractor": "ctranspath"}).extractor_path


def test_a_device_of_another_name_is_refused_in_words():
    with pytest.raises(ValueError, match=r"device = 'gpu': is none of those known \(auto, cpu"):
        config.build("06_synthesis", {"device": "gpu"})


def test_a_wrong_list_item_is_named_by_its_place():
    with pytest.raises(ValueError, match=r"n_per_class\[1\] = True"):
        config.build("06_synthesis", {"n_per_class": [1, True]})
    with pytest.raises(ValueError, match=r"n_per_class = 4: should be a list, e.g. \[4\]"):
        config.build("06_synthesis", {"n_per_class": 4})


def test_an_unknown_chapter_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean '06_synthesis'"):
        config.build("06_sinthesis", {})


def test_every_name_belongs_to_one_chapter():
    owners = {}
    for chapter in config.CHAPTERS:
        for name in config.names(chapter):
            owners.setdefault(name, []).append(chapter)
    shared = {n: c for n, c in owners.items() if len(c) > 1 and n not in config.COMMON}
    assert not shared, f"shared between chapters: {shared}"


def test_checkpoints_with_a_name_are_those_that_can_be_loaded():
    assert config.CHECKPOINTS["sam_checkpoint"] == ("small", *sam.OFFICIAL)
    assert all(name in config.known() for name in config.CHECKPOINTS)


def test_checkpoints_of_a_hub_or_of_a_name_are_no_paths():
    def of(**given):
        return config.checkpoint_paths(types.SimpleNamespace(**given))

    assert of(sam_checkpoint="small", extractor_path="hf-hub:owner/model") == {}
    assert of(extractor_path=None, latent_checkpoint="a/b.ckpt") == {
        "latent_checkpoint": "a/b.ckpt"
    }


def test_classifiers_are_those_that_can_be_built():
    field = config.CHAPTERS["07_classifier_evaluation"].model_fields["classifiers"]
    assert typing.get_args(typing.get_args(field.annotation)[0]) == classify.NAMES


def keywords(function):
    """Names of the arguments of a function that can only be given by name."""
    given = inspect.signature(function).parameters.values()
    return {p.name for p in given if p.kind is p.KEYWORD_ONLY}


def test_options_are_arguments_of_the_functions_they_are_for():
    """All of them where nothing else sets any: a new argument is not forgotten."""
    prompts, clusters, replacing, painting = (
        config.build(chapter, defaults(chapter))
        for chapter in ("01_superpixel_prompting", "02_anchor_clustering",
                        "04_probabilistic_replacement", "05_sde_mcg_inpainting")
    )  # fmt: skip
    assert clusters.clustering.keys() == keywords(anchors.choose_anchors)
    assert clusters.options.keys() | {"max_area"} == keywords(anchors.anchors)
    given = prompts.options.keys() | clusters.clustering.keys() | {"early_stop", "rng"}
    assert given == keywords(anchors.prompt)
    assert prompts.options["dtype"] is None and prompts.options["n_points"] == prompts.n_points
    assert clusters.options["min_area"] == clusters.min_area
    assert replacing.rules.keys() <= keywords(draws.Sampler)
    assert replacing.limits.keys() <= keywords(placement.affine_by_fit)
    assert replacing.options.keys() <= keywords(replacement.compose)
    passed_on = inspect.signature(samplers.Sampling).parameters.keys()
    assert painting.options.keys() <= keywords(diffusion.inpaint) | passed_on


def test_options_carry_each_parameter_to_its_argument():
    chapter = "04_probabilistic_replacement"
    values = defaults(chapter) | {
        "scale_min": 0.7, "scale_max": 1.4, "stretch_max": 1.3, "fit_min": 0.21, "fit_tries": 4,
        "seam_out": 6, "seam_in": 2, "band": 5, "feather": 1.5, "area_min": 0.31, "area_max": 0.93,
        "placement": "boxes", "stain": "macenko", "gap": "context",
        "exclude_own_image": False, "exclude_own_patient": True, "cut_sources": "refuse",
    }  # fmt: skip
    params = config.build(chapter, values)
    assert params.options == {
        "scale_limits": (0.7, 1.4), "stretch_limit": 1.3, "area_range": (0.31, 0.93),
        "method": "boxes", "stain": "macenko", "band": 5, "min_fit": 0.21, "tries": 4,
        "gap": "context", "seam": (6, 2), "feather": 1.5,
    }  # fmt: skip
    assert params.rules == {
        "exclude_own_image": False, "exclude_own_patient": True, "cut_sources": "refuse",
    }  # fmt: skip
    chapter = "05_sde_mcg_inpainting"
    params = config.build(chapter, defaults(chapter))
    assert all(value == getattr(params, name) for name, value in params.options.items())


@pytest.mark.parametrize("chapter", config.CHAPTERS)
def test_every_parameter_says_what_it_is(chapter):
    fields = config.CHAPTERS[chapter].model_fields
    for name, field in fields.items():
        assert field.description, f"{chapter}: {name} has no description"
        assert field.is_required(), f"{chapter}: {name} has a default outside the notebook"


def test_the_table_shows_name_value_and_meaning():
    table = config._Table(tissue(run="abc"))
    page = table._repr_html_()
    assert "<code>image_size</code>" in page and "&#x27;abc&#x27;" in page
    assert "image_size" in repr(table)


def test_auto_is_a_device_that_is_there():
    assert config.torch_device("auto") in {"cpu", "cuda"}
    assert config.torch_device("cpu") == "cpu"
    assert config.torch_dtype("full") is None
    assert str(config.torch_dtype("bfloat16")) == "torch.bfloat16"


@pytest.mark.parametrize(("there", "device"), [(True, "cuda"), (False, "cpu")])
def test_auto_follows_the_gpu(there, device, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert config.torch_device("auto") == device


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no GPU here: use device='auto'"):
        config.torch_device("cuda:0")


def test_gaps_are_not_left_to_a_low_level_of_noise():
    drawing = defaults("04_probabilistic_replacement")
    context, inpaint = (
        config.build("04_probabilistic_replacement", drawing | {"gap": gap, "band": 4})
        for gap in ("context", "inpaint")
    )
    low, high = (
        config.build(
            "06_synthesis",
            defaults("06_synthesis") | {"synthesis_strength": s, "synthesis_steps": 2},
        )
        for s in (0.005, 1.0)
    )
    config.check_healing(low, context)
    config.check_healing(high, inpaint)
    config.check_healing(low)
    with pytest.raises(ValueError, match=r"lowest 0\.5% .*synthesis_strength to 1"):
        config.check_healing(low, inpaint)


def test_levels_too_few_for_the_solver_are_refused_by_all_that_use_them():
    """The same bound as of the samplers, which the parameters cannot import."""
    n = config.FEWEST_LEADING
    leading = {"solver": "sde-dpm++", "spacing": "leading"}
    assert Sampling(**leading, steps=n).steps == n
    with pytest.raises(ValueError, match="'leading' ends"):
        Sampling(**leading, steps=n - 1)
    values = defaults("05_sde_mcg_inpainting") | leading
    healing = config.build("05_sde_mcg_inpainting", values | {"steps": n})
    with pytest.raises(ValueError, match=r"steps=99 with spacing='leading' .*set spacing to 'karr"):
        config.build("05_sde_mcg_inpainting", values | {"steps": n - 1})
    assert config.build("05_sde_mcg_inpainting", values | {"steps": 5, "solver": "ddim"})
    few, enough = (
        config.build(
            "06_synthesis",
            defaults("06_synthesis") | {"synthesis_strength": 1.0, "synthesis_steps": steps},
        )
        for steps in (n - 1, n)
    )
    config.check_healing(enough, healing=healing)
    with pytest.raises(ValueError, match=r"^synthesis_steps=99 with spacing='leading'"):
        config.check_healing(few, healing=healing)


def test_something_is_left_to_inpaint():
    values = defaults("04_probabilistic_replacement") | {"band": 0, "feather": 0.0}
    assert config.build("04_probabilistic_replacement", values | {"gap": "inpaint"})
    with pytest.raises(ValueError, match="leaves no pixel to inpaint: raise band"):
        config.build("04_probabilistic_replacement", values | {"gap": "context"})


def test_what_is_blended_lies_in_the_band():
    """The same bound as of composing, which the parameters cannot import."""
    values = defaults("04_probabilistic_replacement") | {"band": 3}
    widest = 3 / BLEND_REACH
    assert config.build("04_probabilistic_replacement", values | {"feather": widest})
    with pytest.raises(ValueError, match=r"feather=1\.1 changes 3\.3 pixels on either side, more"):
        config.build("04_probabilistic_replacement", values | {"feather": 1.1 * widest})


@pytest.mark.parametrize(
    ("chapter", "change", "message"),
    [
        ("04_probabilistic_replacement", {"scale_min": 1.2, "scale_max": 1.1},
         r"scale_min=1\.2 is above scale_max=1\.1: lower scale_min or raise scale_max"),
        ("01_superpixel_prompting", {"mask_choice": ["best", "best"]}, "give each mask once"),
        ("04_probabilistic_replacement", {"area_min": 0.5, "area_max": 0.4},
         "area_min=0.5 is above"),
        ("04_probabilistic_replacement", {"scale_max": float("inf")},
         "scale_max = inf: should be a finite"),
        ("05_sde_mcg_inpainting", {"eta": 0.5, "solver": "dpm++"}, "belongs to solver='ddim'"),
        ("05_sde_mcg_inpainting", {"eta": None, "method": "repaint", "solver": "dpm++"},
         "jumps back"),
        ("06_synthesis", {"synthesis_steps": 301, "synthesis_strength": 0.3},
         "synthesis_steps=301 are more than the 300 noise levels"),
        ("07_classifier_evaluation", {"conditions": ["ours", "real"]}, "give 'real' first"),
        ("07_classifier_evaluation", {"conditions": ["real", "ours", "ours"]},
         "each condition once"),
        ("07_classifier_evaluation", {"classifiers": ["lite0", "lite0"]}, "each network once"),
    ],
)  # fmt: skip
def test_parameters_that_do_not_go_together_are_refused(chapter, change, message):
    values = defaults(chapter)
    config.build(chapter, values)
    with pytest.raises(ValueError, match=message):
        config.build(chapter, values | change)


def test_bounds_that_meet_are_allowed():
    values = defaults("04_probabilistic_replacement")
    config.build(
        "04_probabilistic_replacement",
        values | {"scale_min": 1.0, "scale_max": 1.0, "area_min": 0.4, "area_max": 0.4},
    )
    values = defaults("06_synthesis")
    config.build("06_synthesis", values | {"synthesis_steps": 300, "synthesis_strength": 0.3})
