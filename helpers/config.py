"""Typed, frozen chapter parameters: a notebook's parameters cell becomes one checked object.

Papermill only warns about a parameter that no cell knows, and never checks types or ranges.
Here every chapter has a pydantic model; :func:`read` collects the plain variables of the notebook,
checks all of them before anything runs, and names each mistake with its value, reason and fix.

The models carry no defaults on purpose: the parameters cell of each notebook is the one place that
holds them.
"""

from __future__ import annotations

import difflib
import html
import math
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

if TYPE_CHECKING:
    import torch


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Positive = Annotated[int, Field(ge=1)]
#: Lists in the parameters cell are stored as tuples, so that a configuration is immutable.
Counts = Annotated[tuple[Positive, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Overlap = Annotated[float, Field(gt=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

#: Parameters that name a checkpoint, and what each may be beside a path.
CHECKPOINTS = {
    "sam_checkpoint": ("small", "vit_b", "vit_l", "vit_h"),
    "latent_checkpoint": ("small",),
    "extractor_path": (),
}

#: Weights that a folder given as ``latent_checkpoint`` has to hold. (Without the suffix: chapters
#: depend on the shipped files that their helpers name, and every chapter has this one.)
LATENT_PAIR = ("autoencoder", "unet")

#: Share of the noise levels from which a gap that nothing was pasted into gets a structure.
LEAST_STRENGTH = 0.5
#: Steps that spacing "leading" takes with a solver of second order; of :mod:`helpers.samplers`,
#: which all chapters would depend on if it were imported.
FEWEST_LEADING = 100

#: Data sets that are read from a folder the user names.
NEED_ROOT = ("folder", "glas", "kbsmc-colon", "usz-prostate", "pathmnist")


class Common(BaseModel):
    """Parameters that every chapter has."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    run: Annotated[str, Field(min_length=1, description="name of the run folder in data/runs")]
    seed: Annotated[int, Field(ge=0, lt=2**32, description="seed of every random draw")]

    @field_validator("run")
    @classmethod
    def _run_is_a_folder_name(cls, value: str) -> str:
        if value.startswith(".") or any(not (c.isalnum() or c in "-_.") for c in value):
            raise ValueError("should be a folder name of letters, digits, '-', '_' and '.'")
        return value


class WithDevice(Common):
    """Parameters of the chapters that run a network."""

    device: Annotated[
        str,
        Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:0, mps"),
    ]


# --- one model a chapter --------------------------------------------------------------------------
# A name belongs to one chapter only (tests check it); later chapters read it from the run with
# ``stage.parameters``. The parameters cell of the notebook lists exactly the names of its model.


class Tissue(Common):
    """00 tissue."""

    dataset: Annotated[
        Literal[
            "phantom",
            "phantom-prostate",
            "ihc",
            "folder",
            "glas",
            "kbsmc-colon",
            "usz-prostate",
            "pathmnist",
        ],
        Field(description="data set that the run studies"),
    ]
    data_root: Annotated[
        str | None, Field(description="folder of the data set, where it needs one")
    ]
    companion: Annotated[
        Literal["ihc"] | None, Field(description="real image that goes along beside the data set")
    ]
    image_size: Annotated[
        int,
        Field(
            ge=32, le=4096, multiple_of=32,  # of the cells at the lowest level of the latent model
            description="side of the square images, pixels; a multiple of 32",
        ),
    ]  # fmt: skip
    train_per_class: Annotated[Positive | None, Field(description="training images a class")]
    val_per_class: Annotated[Natural | None, Field(description="validation images a class")]
    test_per_class: Annotated[Natural | None, Field(description="test images a class, same site")]
    test2_per_class: Annotated[Natural | None, Field(description="test images a class, other site")]

    @model_validator(mode="after")
    def _root_is_given(self) -> Tissue:
        if self.dataset in NEED_ROOT and not self.data_root:
            raise ValueError(
                f"dataset={self.dataset!r} is read from a folder, but data_root is "
                f"{self.data_root!r}: give the folder, e.g. make book DATASET={self.dataset} "
                "DATA_ROOT=PATH"
            )
        return self


class SuperpixelPrompting(WithDevice):
    """01 superpixel prompting."""

    n_segments: Annotated[int, Field(ge=2, le=2000, description="superpixels asked for, N_s")]
    compactness: Annotated[PositiveFloat, Field(description="SLIC weight of space against colour")]
    sigma: Annotated[NonNegative, Field(description="SLIC smoothing, pixels")]
    n_points: Annotated[int, Field(ge=1, le=1000, description="prompts a superpixel, K")]
    crop_n_layers: Annotated[
        int, Field(ge=0, le=3, description="layers of crops, each with twice the superpixels")
    ]
    explained_iou: Annotated[
        Fraction,
        Field(
            description="predicted IoU of a segment inside which crops too small for it ask no "
            "further; 1 asks always"
        ),
    ]
    sam_checkpoint: Annotated[
        str, Field(min_length=1, description="small, vit_b, vit_l, vit_h, or a file")
    ]
    sam_precision: Annotated[
        Literal["full", "bfloat16"],
        Field(description="of SAM's matrix products; bfloat16 where the hardware has it"),
    ]
    points_per_batch: Annotated[
        Positive | None, Field(description="prompts decoded at once; None: as suits the device")
    ]
    mask_choice: Annotated[
        tuple[Literal["best", "smallest", "middle", "largest"], ...],
        BeforeValidator(_as_tuple),
        Field(
            min_length=1,
            description="which of the three masks of an ambiguous prompt; each has an anchor",
        ),
    ]
    n_shown: Annotated[Positive, Field(description="images whose proposals are shown")]

    @model_validator(mode="after")
    def _each_mask_once(self) -> SuperpixelPrompting:
        if len(set(self.mask_choice)) < len(self.mask_choice):
            raise ValueError(f"mask_choice={list(self.mask_choice)}: give each mask once")
        return self

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of :func:`helpers.anchors.prompt`, all but those that chapter 02 sets."""
        names = ("n_segments", "n_points", "crop_n_layers", "explained_iou", "compactness", "sigma",
                 "points_per_batch", "mask_choice")  # fmt: skip
        given = {name: getattr(self, name) for name in names}
        return given | {"dtype": torch_dtype(self.sam_precision)}


class AnchorClustering(WithDevice):
    """02 anchor clustering."""

    distance_threshold: Annotated[
        PositiveFloat, Field(description="cluster threshold, relative to the image side")
    ]
    linkage: Annotated[
        Literal["average", "complete", "single"], Field(description="agglomerative linkage")
    ]
    iou_duplicate: Annotated[Overlap, Field(description="IoU from which two masks are the same")]
    pred_iou_thresh: Annotated[Fraction, Field(description="smallest predicted IoU of a segment")]
    iou_merge: Annotated[Overlap, Field(description="IoU from which two anchors are one segment")]
    iou_vote: Annotated[
        Overlap, Field(description="IoU from which an anchor has a say in the outline of a segment")
    ]
    min_area: Annotated[
        float, Field(ge=0, lt=0.9, description="smallest segment, fraction of the image")
    ]
    early_stop: Annotated[
        bool, Field(description="ask no further prompts where the anchor is settled")
    ]
    n_ablation_images: Annotated[Positive, Field(description="annotated images of the ablations")]

    @property
    def clustering(self) -> dict[str, Any]:
        """Arguments of :func:`helpers.anchors.choose_anchors`."""
        names = ("distance_threshold", "linkage", "iou_duplicate")
        return {name: getattr(self, name) for name in names}

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of :func:`helpers.anchors.anchors`."""
        names = ("pred_iou_thresh", "iou_merge", "iou_vote", "min_area")
        return self.clustering | {name: getattr(self, name) for name in names}


class PcaPooling(WithDevice):
    """03 PCA pooling."""

    extractor: Annotated[Literal["lite0", "ctranspath"], Field(description="feature network")]
    extractor_path: Annotated[str | None, Field(description="file of its weights, if any")]
    background: Annotated[
        Literal["keep", "white", "mean"], Field(description="what a crop shows outside its mask")
    ]
    tidy: Annotated[bool, Field(description="keep the largest part of a segment, holes filled")]
    n_components: Annotated[Positive, Field(description="features kept by PCA, p")]

    @model_validator(mode="after")
    def _path_is_used(self) -> PcaPooling:
        if self.extractor == "lite0" and self.extractor_path:
            raise ValueError(
                f"extractor_path={self.extractor_path!r} is given, but extractor='lite0' takes its "
                "weights from a package: leave the path out, or set extractor to 'ctranspath'"
            )
        return self


class ProbabilisticReplacement(Common):
    """04 probabilistic replacement."""

    exclude_own_image: Annotated[bool, Field(description="never draw from the target's own image")]
    exclude_own_patient: Annotated[bool, Field(description="nor from the target's own patient")]
    cut_sources: Annotated[
        Literal["at_border", "refuse", "anywhere"],
        Field(description="where segments cut by the border of their image may go"),
    ]
    placement: Annotated[
        Literal["fit", "moments", "boxes"], Field(description="affine transform from")
    ]
    scale_min: Annotated[PositiveFloat, Field(description="smallest scale of the transform")]
    scale_max: Annotated[PositiveFloat, Field(description="largest scale of the transform")]
    stretch_max: Annotated[
        float, Field(ge=1, allow_inf_nan=False, description="largest ratio of its two scales")
    ]
    fit_min: Annotated[Fraction, Field(description="smallest IoU of the paste with its target")]
    fit_tries: Annotated[Positive, Field(description="draws for a target until one fits")]
    gap: Annotated[
        Literal["inpaint", "context"],
        Field(description="uncovered target: repainted, or covered with the source's surroundings"),
    ]
    stain: Annotated[
        Literal["transport", "reinhard", "macenko", "none"],
        Field(description="stain matching of the paste"),
    ]
    seam_out: Annotated[
        Natural, Field(description="how far the seam may leave its outline outwards, pixels")
    ]
    seam_in: Annotated[Natural, Field(description="and inwards")]
    feather: Annotated[
        NonNegative, Field(description="width of the blending along its outline, pixels")
    ]
    band: Annotated[Natural, Field(description="band repainted around the paste, pixels")]
    area_min: Annotated[Fraction, Field(description="smallest new-area ratio")]
    area_max: Annotated[Fraction, Field(description="largest new-area ratio")]
    n_composites: Annotated[Positive, Field(description="composites made a class")]

    @property
    def rules(self) -> dict[str, Any]:
        """Arguments of :class:`helpers.draws.Sampler`."""
        names = ("exclude_own_image", "exclude_own_patient", "cut_sources")
        return {name: getattr(self, name) for name in names}

    @property
    def limits(self) -> dict[str, Any]:
        """Arguments of the placements of :mod:`helpers.placement`."""
        return {
            "scale_limits": (self.scale_min, self.scale_max),
            "stretch_limit": self.stretch_max,
        }

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of :func:`helpers.replacement.compose`."""
        return self.limits | {
            "area_range": (self.area_min, self.area_max),
            "method": self.placement,
            "stain": self.stain,
            "band": self.band,
            "min_fit": self.fit_min,
            "tries": self.fit_tries,
            "gap": self.gap,
            "seam": (self.seam_out, self.seam_in),
            "feather": self.feather,
        }

    @model_validator(mode="after")
    def _ordered(self) -> ProbabilisticReplacement:
        for low, high in (("scale_min", "scale_max"), ("area_min", "area_max")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(
                    f"{low}={getattr(self, low)} is above {high}={getattr(self, high)}: "
                    f"lower {low} or raise {high}"
                )
        changed = 3 * self.feather  # seam.BLEND_REACH; imported, all chapters would depend on it
        if changed > self.band:
            raise ValueError(
                f"feather={self.feather} changes {changed:g} pixels on either "
                f"side, more than band={self.band}: blended pixels would pass as known ones; lower "
                "feather or raise band"
            )
        if self.band == 0 and self.gap == "context":
            raise ValueError(
                "band=0 with gap='context' leaves no pixel to inpaint: raise band, or set gap to "
                "'inpaint'"
            )
        return self


class SdeMcgInpainting(WithDevice):
    """05 SDE and MCG inpainting."""

    latent_checkpoint: Annotated[
        str, Field(min_length=1, description="small, or a CompVis checkpoint")
    ]
    method: Annotated[
        Literal["mmps", "mcg", "projection", "repaint"],
        Field(description="how the known part is imposed"),
    ]
    solver: Annotated[
        Literal["ddim", "euler", "dpm++", "sde-dpm++"],
        Field(description="how to step from one noise level to the next"),
    ]
    steps: Annotated[int, Field(ge=1, le=1000, description="noise levels visited")]
    spacing: Annotated[
        Literal["karras", "trailing", "leading"],
        Field(description="how they are spread; trailing, by time, suits solver euler"),
    ]
    eta: Annotated[
        Fraction | None,
        Field(description="solver ddim only: noise of a step, 0 none, 1 (None) ancestral"),
    ]
    alpha: Annotated[NonNegative, Field(description="method mcg only: weight of the gradient")]
    n_solve: Annotated[
        Positive, Field(description="method mmps only: steps of conjugate gradients")
    ]
    guided: Annotated[
        float,
        Field(gt=0, le=1, description="mmps and mcg: share of steps, the last, with a gradient"),
    ]
    context: Annotated[
        Natural | None, Field(description="pixels seen around the unknown region; None: all")
    ]
    inpaint_batch: Annotated[Positive, Field(description="images inpainted at once")]

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of :func:`helpers.diffusion.inpaint`, all but the method."""
        names = ("solver", "steps", "spacing", "eta", "alpha", "n_solve", "guided", "context")
        return {name: getattr(self, name) for name in names}

    @model_validator(mode="after")
    def _go_together(self) -> SdeMcgInpainting:
        if self.eta is not None and self.solver != "ddim":
            raise ValueError(
                f"eta={self.eta} belongs to solver='ddim', not to {self.solver!r}: set eta to None"
            )
        if self.method == "repaint" and "dpm" in self.solver:
            raise ValueError(
                f"method='repaint' jumps back in time, which solver={self.solver!r} cannot: use "
                "solver 'ddim' or 'euler'"
            )
        self.check_steps("steps", self.steps)
        return self

    def check_steps(self, name: str, steps: int) -> None:
        """Refuse so few of these levels that the solver goes astray in the last step."""
        if self.spacing == "leading" and "dpm" in self.solver and steps < FEWEST_LEADING:
            raise ValueError(
                f"{name}={steps} with spacing='leading' and solver={self.solver!r}, whose last "
                f"step goes wrong with fewer than {FEWEST_LEADING}: raise {name}, or set spacing "
                "to 'karras'"
            )


class Synthesis(WithDevice):
    """06 synthesis."""

    n_per_class: Annotated[Counts, Field(description="synthetic images a class, one set each")]
    synthesis_steps: Annotated[int, Field(ge=1, le=1000, description="steps of an image")]
    synthesis_strength: Annotated[
        float,
        Field(gt=0, le=1, description="share of the noise levels walked; 1: from pure noise"),
    ]
    synthesis_batch: Annotated[Positive, Field(description="images healed at once")]

    @model_validator(mode="after")
    def _steps_fit(self) -> Synthesis:
        levels = round(1000 * self.synthesis_strength)
        if self.synthesis_steps > levels:
            raise ValueError(
                f"synthesis_steps={self.synthesis_steps} are more than the {levels} noise levels "
                f"that synthesis_strength={self.synthesis_strength} leaves: lower the first or "
                "raise the second"
            )
        return self


class ClassifierEvaluation(WithDevice):
    """07 classifier evaluation."""

    classifiers: Annotated[
        tuple[Literal["lite0", "efficientnet_b0", "resnet50", "densenet121", "ctranspath"], ...],
        BeforeValidator(_as_tuple),
        Field(min_length=1, description="networks compared"),
    ]
    classifier_weights: Annotated[
        Literal["default", "hub", "random"],
        Field(description="start: of a package, of ImageNet by download, or random"),
    ]
    conditions: Annotated[
        tuple[Literal["real", "cutout", "mixup", "cutmix", "pasted", "ours"], ...],
        BeforeValidator(_as_tuple),
        Field(min_length=1, description="training sets compared, real first"),
    ]
    metric: Annotated[
        Literal["accuracy", "macro_f1", "kappa"], Field(description="score that is tested")
    ]
    epochs: Annotated[Positive, Field(description="epochs of each training")]
    steps_per_epoch: Annotated[
        Positive | None, Field(description="steps an epoch; None: as the real images need")
    ]
    batch_size: Annotated[int, Field(ge=2, description="images a step")]
    classifier_image_size: Annotated[int, Field(ge=32, le=2048, description="input side, pixels")]
    workers: Annotated[
        Natural, Field(description="processes that make batches ahead; they change speed alone")
    ]
    n_seeds: Annotated[Positive, Field(description="trainings a cell of the table")]
    n_bootstrap: Annotated[Positive, Field(description="bootstrap resamples by patient")]

    @model_validator(mode="after")
    def _each_once_and_real_first(self) -> ClassifierEvaluation:
        if len(set(self.classifiers)) < len(self.classifiers):
            raise ValueError(f"classifiers={list(self.classifiers)}: give each network once")
        if self.conditions[0] != "real" or len(set(self.conditions)) < len(self.conditions):
            raise ValueError(
                f"conditions={list(self.conditions)}: give 'real' first, the baseline of all "
                "others, and each condition once"
            )
        return self


class TrainingSam(WithDevice):
    """A1 training SAM."""

    sam_steps: Annotated[Positive, Field(description="optimiser steps of the toy run")]
    sam_batch: Annotated[Positive, Field(description="images a step of the toy run")]
    sam_held_out: Annotated[Positive, Field(description="unseen phantoms that are clicked on")]


class TrainingLatentDiffusion(WithDevice):
    """A2 training the latent diffusion model."""

    latent_images: Annotated[
        str | None, Field(description="folder of own images for the toy run; none: phantoms")
    ]
    autoencoder_steps: Annotated[Positive, Field(description="autoencoder steps of the toy run")]
    decoder_steps: Annotated[Positive, Field(description="steps of the decoder's second toy run")]
    unet_steps: Annotated[Positive, Field(description="UNet steps of the toy run")]
    latent_batch: Annotated[Positive, Field(description="images a step of the toy run")]


#: Chapters in the order in which they run, and the model of each one's parameters.
CHAPTERS: dict[str, type[Common]] = {
    "00_tissue": Tissue,
    "01_superpixel_prompting": SuperpixelPrompting,
    "02_anchor_clustering": AnchorClustering,
    "03_pca_pooling": PcaPooling,
    "04_probabilistic_replacement": ProbabilisticReplacement,
    "05_sde_mcg_inpainting": SdeMcgInpainting,
    "06_synthesis": Synthesis,
    "07_classifier_evaluation": ClassifierEvaluation,
    "A1_training_sam": TrainingSam,
    "A2_training_latent_diffusion": TrainingLatentDiffusion,
}

#: Names that several chapters share; every other name belongs to exactly one chapter.
COMMON = tuple(WithDevice.model_fields)

#: How many a network is given at once, and what makes them: memory and speed, not results.
SIZES_OF_BATCHES = ("points_per_batch", "inpaint_batch", "synthesis_batch", "workers")

_IPYTHON = {"In", "Out", "exit", "quit", "open", "get_ipython"}
_NOT_A_PARAMETER = (types.ModuleType, type)


def names(chapter: str) -> tuple[str, ...]:
    """Parameter names of one chapter, in the order of its model."""
    return tuple(_model(chapter).model_fields)


def known() -> tuple[str, ...]:
    """Parameter names of all chapters, each once."""
    return tuple(dict.fromkeys(name for chapter in CHAPTERS for name in names(chapter)))


def unknown(given: Iterable[str]) -> list[str]:
    """One line for each name that no chapter has, with the nearest known name."""
    lines = []
    for name in given:
        if name not in known():
            near = difflib.get_close_matches(name, known(), n=1, cutoff=0.6)
            hint = f"did you mean `{near[0]}`?" if near else "see `make parameters`"
            lines.append(f"{name}: no chapter has a parameter of this name; {hint}")
    return lines


def build(chapter: str, values: Mapping[str, Any]) -> Common:
    """Check `values` and return the frozen parameters of `chapter`.

    Parameters
    ----------
    chapter : str
        Name of the chapter, e.g. ``"05_sde_mcg_inpainting"``.
    values : mapping of str to object
        At least every parameter of the chapter. Names that belong to other chapters are left out,
        so that one preset serves all chapters.

    Returns
    -------
    Common
        The chapter's model, immutable.

    Raises
    ------
    ValueError
        Names every wrong parameter with its value, the reason and a fix.
    """
    model = _model(chapter)
    problems = []
    for line in unknown(values):
        name = line.split(":", 1)[0]
        problems.append(f"{name} = {values[name]!r}: {line.split(': ', 1)[1]}")
    own = {name: value for name, value in values.items() if name in model.model_fields}
    params = None
    try:
        params = model(**own)
    except ValidationError as error:
        problems += [_explain(model, problem) for problem in error.errors()]
    if problems:
        count = "1 parameter is" if len(problems) == 1 else f"{len(problems)} parameters are"
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise ValueError(
            f"chapter {chapter}: {count} wrong.{lines}\n"
            "Correct the parameters cell, the preset file or the -p option that set it; "
            "nothing has been run or changed."
        ) from None
    return params


def check_healing(
    params: Synthesis,
    drawing: ProbabilisticReplacement | None = None,
    healing: SdeMcgInpainting | None = None,
) -> None:
    """Refuse settings of chapter 06 that those of chapters 04 and 05 do not allow.

    Parameters
    ----------
    params : Synthesis
    drawing : ProbabilisticReplacement, optional
    healing : SdeMcgInpainting, optional
        Those that are known.

    Raises
    ------
    ValueError
        If a gap is to be inpainted from a strength below :data:`LEAST_STRENGTH`, where it would
        stay flat, or the solver needs more steps.
    """
    if drawing and drawing.gap == "inpaint" and params.synthesis_strength < LEAST_STRENGTH:
        raise ValueError(
            f"gap='inpaint' leaves gaps with a flat colour, which healing from the lowest "
            f"{params.synthesis_strength:.1%} of the noise levels would keep: set "
            "synthesis_strength to 1, with more synthesis_steps (500 in the paper), or gap to "
            "'context' (chapter 04)"
        )
    if healing:
        healing.check_steps("synthesis_steps", params.synthesis_steps)


def checkpoint_paths(params: Common) -> dict[str, str]:
    """Checkpoints that a chapter is to load from a path, by parameter, without those of a name."""
    given = {name: getattr(params, name, None) for name in CHECKPOINTS}
    return {
        name: path
        for name, path in given.items()
        if path and path not in CHECKPOINTS[name] and not path.startswith("hf-hub:")
    }


def missing_files(params: Common) -> list[str]:
    """One line for each checkpoint or folder of images to load, and device, that is not there.

    Files of weights that are cut short are named as well.
    """
    lines = []
    if (device := getattr(params, "device", "auto")) not in ("auto", "cpu"):
        try:
            torch_device(device)
        except ValueError as error:
            lines.append(str(error))
    for name, path in checkpoint_paths(params).items():
        if not Path(path).exists():
            near = difflib.get_close_matches(path, CHECKPOINTS[name], n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}?" if near else "correct the path"
            may = f" (or {', '.join(CHECKPOINTS[name])})" if CHECKPOINTS[name] else ""
            lines.append(f"{name} = {path!r}: there is no such file{may}; {hint}")
            continue
        files = [Path(path)]
        if name == "latent_checkpoint" and Path(path).is_dir():
            files = [Path(path) / f"{network}.safetensors" for network in LATENT_PAIR]
            if gone := [file.name for file in files if not file.exists()]:
                lines.append(f"{name} = {path!r}: the folder has no {' and no '.join(gone)}")
                continue
        from helpers.weights import check_whole  # and torch, which takes a while

        for file in files:
            try:
                check_whole(file)
            except (ValueError, OSError) as error:
                lines.append(f"{name} = {path!r}: {error}")
    images = getattr(params, "latent_images", None)
    if images and not Path(images).is_dir():
        lines.append(f"latent_images = {images!r}: there is no such folder; correct the path")
    return lines


def absolute(values: Mapping[str, Any]) -> dict[str, str]:
    """Those of the values that are paths of checkpoints or images, seen from where we are.

    Chapters run in the folder of the repository. Names, and what is not there, are left out.
    """
    found = {}
    for name in (*CHECKPOINTS, "latent_images"):
        given = values.get(name)
        if isinstance(given, str) and given and given not in CHECKPOINTS.get(name, ()):
            path = Path(given).expanduser()
            if path.exists():
                found[name] = str(path.resolve())
    return found


def read(chapter: str, namespace: Mapping[str, Any]) -> Common:
    """Turn the plain variables of a notebook into the chapter's frozen parameters.

    Call it with ``globals()`` right after the parameters cell: modules, functions, classes, names
    that start with an underscore and IPython's own names are no parameters.

    Parameters
    ----------
    chapter : str
        Name of the chapter.
    namespace : mapping of str to object
        The notebook's ``globals()``.

    Returns
    -------
    Common
        The chapter's model, immutable.

    Raises
    ------
    ValueError
        As :func:`build`.
    """
    values = {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_")
        and name not in _IPYTHON
        and not isinstance(value, _NOT_A_PARAMETER)
        and not callable(value)
    }
    return build(chapter, values)


def show(params: Common) -> None:
    """Display the parameters of a chapter as a small table: name, value, meaning."""
    from IPython.display import display

    display(_Table(params))


def torch_device(device: str | torch.device) -> str:
    """Device that ``"auto"`` stands for here: ``cuda`` if there is one, else ``cpu``.

    Raises
    ------
    ValueError
        If the device asked for is not there.
    """
    import torch

    device = str(device)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"device={device!r}, but torch sees no GPU here: use device='auto' or 'cpu'"
        )
    if device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device='mps', but torch sees none here: use device='auto' or 'cpu'")
    return device


def torch_dtype(precision: str) -> torch.dtype | None:
    """Lower precision that a parameter stands for: ``torch.bfloat16``, or None for "full"."""
    import torch

    return torch.bfloat16 if precision == "bfloat16" else None


def _model(chapter: str) -> type[Common]:
    if chapter not in CHAPTERS:
        near = difflib.get_close_matches(chapter, CHAPTERS, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(CHAPTERS)}"
        raise ValueError(f"no chapter is called {chapter!r}: {hint}")
    return CHAPTERS[chapter]


def _explain(model: type[Common], problem: Mapping[str, Any]) -> str:
    """One line for one pydantic error: name, value, reason, meaning of the parameter."""
    reason = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not problem["loc"]:
        return reason
    name = str(problem["loc"][0])
    label = name + "".join(f"[{part}]" for part in problem["loc"][1:] if isinstance(part, int))
    meaning = model.model_fields[name].description
    if problem["type"] == "missing":
        return f"{name}: the parameters cell does not set it ({meaning})"
    value = problem["input"]
    if problem["type"] == "float_type" and _is_number(value):
        reason += "; YAML reads 1e-3 as text, write 0.001 or 1.0e-3"
    elif problem["type"] == "string_pattern_mismatch":
        reason = "is none of those known"
    elif isinstance(value, str) and value.lower() == "none":
        reason += "; write null for none"
    if problem["type"] == "tuple_type":
        reason = f"should be a list, e.g. [{value}]"
    return f"{label} = {value!r}: {reason} ({meaning})"


def _is_number(value: Any) -> bool:
    """Whether a text reads as a number."""
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


class _Table:
    """Parameters as a table, in HTML for notebooks and as text elsewhere."""

    def __init__(self, params: Common) -> None:
        self.rows = [
            (name, repr(getattr(params, name)), field.description or "")
            for name, field in type(params).model_fields.items()
        ]

    def __repr__(self) -> str:
        width = max(len(name) for name, _, _ in self.rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value, _ in self.rows)

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td><code>{html.escape(n)}</code></td><td><code>{html.escape(v)}</code></td>"
            f"<td>{html.escape(d)}</td></tr>"
            for n, v, d in self.rows
        )
        head = "<tr><th>parameter</th><th>value</th><th>meaning</th></tr>"
        return (
            f'<table class="table parameters"><thead>{head}</thead><tbody>{cells}</tbody></table>'
        )
