"""What all trainings share: the course of the learning rate, averages, checkpoints, the curve.

:mod:`helpers.train_sam` and :mod:`helpers.train_latent` say what is learnt; a :class:`Trainer` says
how a run goes on: by steps or by time, with an average of the weights, stopped and taken up again
at any step with the same result. A checkpoint, and a folder of drawn scenes, know the settings they
were made with, and serve no others.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import sys
import time
from collections import ChainMap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from helpers.config import torch_device
from helpers.files import read_json, replacing, sha256
from helpers.weights import read_weights, write_weights

_SETTINGS = "scenes.json"

#: Settings that count something of which there has to be one at least, where a recipe has them.
_COUNTS = ("steps", "batch", "views", "scenes", "images", "prompts", "crop", "corrections")

#: Seconds of training after which a checkpoint is written, whatever the number of steps.
_SAVE_AFTER = 300.0


@dataclass(frozen=True)
class Recipe:
    """Settings that every training has; a subclass adds its own, and may have other defaults.

    A run ends at ``steps`` or ``minutes``, whichever comes first.
    """

    seed: int = 0
    steps: int = 20000
    minutes: float | None = None
    rate: float = 1e-3
    warmup: int = 200
    decay_from: float = 0.5
    ema: float = 0.998
    bf16: bool = False

    def __post_init__(self) -> None:
        wrong = {
            "minutes": self.minutes is not None and not self.minutes > 0,
            "rate": not self.rate > 0,
            "warmup": self.warmup < 0,
            "decay_from": not 0 <= self.decay_from < 1,
            "ema": not 0 <= self.ema < 1,
        }
        counts = {name: getattr(self, name, None) for name in _COUNTS}
        wrong |= {name: n < 1 for name, n in counts.items() if isinstance(n, int)}
        if names := [name for name, bad in wrong.items() if bad]:
            given = ", ".join(f"{name} = {getattr(self, name)}" for name in names)
            raise ValueError(
                f"{given}: a training needs counts >= 1, minutes and rate > 0, warmup >= 0, and "
                "decay_from and ema in [0, 1)"
            )


def learning_rate(progress: float, step: int, *, warmup: int, decay_from: float) -> float:
    """Learning rate relative to its largest: linear warm-up, constant, cosine to a hundredth.

    Parameters
    ----------
    progress : float
        Share of the run that is done, in [0, 1].
    step : int
        Steps that are done.
    warmup : int
        Steps of the warm-up.
    decay_from : float
        Progress at which the decay begins, in [0, 1).
    """
    if step < warmup:
        return (step + 1) / warmup
    x = np.clip((progress - decay_from) / (1 - decay_from), 0, 1)
    return 0.01 + 0.99 * 0.5 * (1 + float(np.cos(np.pi * x)))


def machine(device: str | torch.device) -> str:
    """What a training runs on, for its model card: the GPU, or the number of threads of the CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    threads = torch.get_num_threads()
    return f"{threads} CPU threads" if threads > 1 else "one CPU thread"


def keep_to_settings(folder: Path, **settings: Any) -> None:
    """Make a folder for drawn scenes and note how they are drawn, or see that it says the same.

    Parameters
    ----------
    folder : Path
        Of ``shard_*.npy``, whose names have numbers only.
    **settings
        What a scene depends on beside its number; values of JSON.

    Raises
    ------
    ValueError
        If there are scenes drawn with other settings, or nothing says with which.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _SETTINGS
    if not path.exists() and not any(folder.glob("shard_*.npy")):
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    elif differ := _differences(drawn_with(folder), settings):
        raise ValueError(
            f"{folder} holds scenes drawn with other settings ({differ}): work in another folder, "
            "or remove this one"
        )


def drawn_with(folder: Path) -> dict[str, Any]:
    """Settings that :func:`keep_to_settings` noted in a folder of drawn scenes.

    Raises
    ------
    ValueError
        If there are none.
    """
    try:
        return read_json(Path(folder) / _SETTINGS)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} does not say how its scenes were drawn, {_SETTINGS} is missing or damaged: "
            "work in another folder, or remove this one"
        ) from error


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Settings that are not what they were, with both values; empty if there are none."""
    return ", ".join(
        f"{key} was {before.get(key)!r}, is now {value!r}"
        for key, value in now.items()
        if before.get(key) != value
    )


def average(paths: Sequence[Path], path: Path) -> None:
    """Write the mean of several weights of one architecture.

    Rounds that go on from each other lie in one valley of the loss; their mean keeps what each
    has learnt and is less bound to the images of the last (Wortsman et al., "Model soups", 2022).

    Parameters
    ----------
    paths : sequence of Path
        Safetensors that a training exported. What they say of themselves is taken from the first
        that says it.
    path : Path
        Where the mean goes, in the same precision. The model card beside it, if there is one, gets
        its digest, and says of which files it is the mean.

    Raises
    ------
    ValueError
        If there are no files, one cannot be read, or their tensors or settings do not agree.
    """
    if not paths:
        raise ValueError("no weights to average: give at least one file")
    said, states = zip(*map(read_weights, paths), strict=True)
    configs = {each.get("config") for each in said}
    others = {each["builds_on"] for each in said if "builds_on" in each}  # older files say nothing
    if kinds := next((found for found in (configs, others) if len(found) > 1), None):
        raise ValueError(
            f"{', '.join(map(str, paths))} say different things of themselves "
            f"({'; '.join(map(str, kinds))}), such as the scale of their latents: average rounds "
            "that share it"
        )
    shapes = [{key: value.shape for key, value in state.items()} for state in states]
    for each, shape in zip(paths, shapes, strict=True):
        if shape != shapes[0]:
            raise ValueError(
                f"{each} has other tensors than {paths[0]}: average rounds of one architecture"
            )
    mean = {
        key: torch.stack([state[key].float() for state in states]).mean(0).to(last.dtype)
        if last.is_floating_point()
        else last
        for key, last in states[-1].items()
    }
    write_weights(path, mean, {**ChainMap(*said), "mean_of": str(len(states))})
    if (card := Path(path).with_suffix(".md")).exists():
        names = ", ".join(f"`{Path(each).name}`" for each in paths)
        text = with_digest(card.read_text(encoding="utf-8"), path)
        with replacing(card) as temporary:
            temporary.write_text(f"{text.rstrip()}\n\nMean of {names}.\n", encoding="utf-8")


#: What the weights may be used under that were trained on drawn scenes alone.
OWN_LICENCE = "MIT, as the code of this repository"


def write_card(
    trainer: Trainer, path: Path, what: str, *, architecture: str, data: str, command: str,
    batch: str, score: str, licence: str = OWN_LICENCE, start: str | None = None,
) -> None:  # fmt: skip
    """Write the model card of weights beside them, in Markdown.

    Parameters
    ----------
    trainer : Trainer
        The training when it ended.
    path : Path
        The weights, written already.
    what, architecture, data, command, score, licence, start
        What the network is, how it is built, what it has seen, the command that trains it, its
        score on what was held out, and its licence; what it started from, if not at random.
    batch : str
        What one step sees, e.g. ``8 crops of 64 px``.
    """
    path = Path(path)
    parameters = sum(v.numel() for v in trainer.average.values()) / 1e6
    minutes = f"{trainer.seconds / 60:.0f} minutes on {machine(trainer.device)}"
    rows = {
        "architecture": architecture,
        "parameters": f"{parameters:.2f} million, fp16, {path.stat().st_size / 1e6:.1f} MB, "
        "average of the weights over the run",
        "start": start,
        "data": data,
        "command": f"`{command}`",
        "seed": trainer.recipe.seed,
        "steps": f"{trainer.step} of {batch}, {minutes}",
        "held-out score": score,
        "licence": licence,
        "SHA-256": f"`{sha256(path)}`",
    }
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items() if text is not None)
    text = f"""# {path.name}

{what}

| | |
|---|---|
{table}

The training curve is in `{path.with_suffix(".json").name}`.
"""
    with replacing(path.with_suffix(".md")) as temporary:
        temporary.write_text(text, encoding="utf-8")


def with_digest(card: str, path: Path) -> str:
    """Text of a model card with the SHA-256 that its weights have now."""
    return re.sub(r"(\| SHA-256 \| )`\w+`", rf"\1`{sha256(path)}`", card)


def positive(text: str) -> int:
    """Whole number from a command line that has to be 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} should be a whole number of at least 1")
    return int(text)


def say(line: str) -> None:
    """Print a line at once; a progress bar makes room for it."""
    tqdm.write(line)
    sys.stdout.flush()


def command(main: Callable[[], None]) -> int:
    """Run a command; an error that its user can mend becomes a message. Returns the exit status."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def add_average(parser: argparse.ArgumentParser) -> None:
    """Give a command line the option of :func:`average`."""
    parser.add_argument(
        "--average",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="write the mean of these weights instead of training",
    )


class Trainer:
    """One run of a training: optimiser, average of the weights, curve, checkpoints.

    A subclass gives :meth:`loss`, and names in `kind` what it trains and in `keep` the attributes
    that belong to a checkpoint.

    Parameters
    ----------
    recipe : Recipe
    model : torch.nn.Module
        What is trained.
    device : str or torch.device
        "auto" takes a GPU where there is one.
    averaged : torch.nn.Module, optional
        The part of `model` whose weights are averaged; by default all.
    groups : sequence of dict, optional
        Parameters and largest learning rates ("lr") of the optimiser; by default all at one rate.
        What no group names stays as it is.
    **adamw
        Further settings of :class:`torch.optim.AdamW`.

    Attributes
    ----------
    average : dict of str to Tensor
        Moving average of the weights.
    step, seconds : int, float
        Steps that are done, and the time they took.
    curve : list of dict
        Mean losses and scores, one entry every few steps.
    builds_on : dict of str to str
        Digests of networks that the training uses as they are, by name: a checkpoint made on
        others is not taken up.
    """

    kind: str
    keep: tuple[str, ...] = ()
    scenes: Any = None

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        device: str | torch.device = "cpu",
        *,
        averaged: nn.Module | None = None,
        groups: Sequence[dict[str, Any]] | None = None,
        **adamw: Any,
    ) -> None:
        self.recipe, self.device = recipe, torch.device(torch_device(device))
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.model.train().requires_grad_(False)
        groups = groups or [{"params": model.parameters(), "lr": recipe.rate}]
        groups = [
            {**group, "params": list(group["params"]), "largest": group["lr"]} for group in groups
        ]
        for parameter in (p for group in groups for p in group["params"]):
            parameter.requires_grad_(True)
        self.optimiser = torch.optim.AdamW(groups, **adamw)
        self.averaged_part = self.model if averaged is None else averaged
        self.average = {k: v.clone() for k, v in self.averaged_part.state_dict().items()}
        self.generator = torch.Generator().manual_seed(recipe.seed + 1)
        self.step, self.seconds = 0, 0.0
        self.curve: list[dict[str, float]] = []
        self.builds_on: dict[str, str] = {}

    # what a subclass gives

    def loss(self) -> dict[str, torch.Tensor]:
        """Draw a batch and return its losses; "loss" is minimised."""
        raise NotImplementedError

    def evaluate(self) -> dict[str, float]:
        """Score of the averaged weights on held-out images."""
        return {}

    # a step

    def autocast(self) -> torch.autocast:
        """Mixed precision, if the recipe asks for it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.bf16)

    def progress(self) -> float:
        """Share of the run that is done, by steps or by time, whichever is further."""
        by_time = self.seconds / 60 / self.recipe.minutes if self.recipe.minutes else 0.0
        return max(self.step / self.recipe.steps, by_time)

    def advance(self) -> dict[str, float]:
        """Take one step of the optimiser and return its losses.

        Raises
        ------
        FloatingPointError
            If the loss or its gradient is NaN or infinite; the weights are those of the step
            before.
        """
        start, r = time.perf_counter(), self.recipe
        relative = learning_rate(
            self.progress(), self.step, warmup=r.warmup, decay_from=r.decay_from
        )
        for group in self.optimiser.param_groups:
            group["lr"] = group["largest"] * relative
        losses = self.loss()
        self._check_finite("loss", losses["loss"])
        self.optimiser.zero_grad(set_to_none=True)
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._check_finite("gradient", norm)
        self.optimiser.step()
        self.step += 1
        self._average(min(r.ema, (1 + self.step) / (10 + self.step)))
        self.seconds += time.perf_counter() - start
        return {key: float(value.detach()) for key, value in losses.items()}

    def _check_finite(self, what: str, value: torch.Tensor) -> None:
        if not bool(torch.isfinite(value)):
            raise FloatingPointError(
                f"the {self.kind} {what} is {float(value.detach())} at step {self.step}: "
                "lower the learning rate and start from the last checkpoint"
            )

    @torch.no_grad()
    def _average(self, decay: float) -> None:
        """Move the average towards the weights; counters are taken as they are."""
        mine = self.averaged_part.state_dict()
        floats = [key for key, value in mine.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [self.average[k] for k in floats], [mine[k] for k in floats], 1 - decay
        )
        for key in mine.keys() - set(floats):
            self.average[key].copy_(mine[key])

    # checkpoints

    def state(self) -> dict[str, Any]:
        """Everything needed to go on later."""
        return {
            "kind": self.kind, "model": self.model.state_dict(), "average": self.average,
            "optimiser": self.optimiser.state_dict(), "step": self.step, "seconds": self.seconds,
            "curve": self.curve, "generator": self.generator.get_state(),
            "recipe": json.dumps(asdict(self.recipe)), "builds_on": self.builds_on,
            **{k: getattr(self, k) for k in self.keep},
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.average, self.step, self.seconds = state["average"], state["step"], state["seconds"]
        self.curve = state["curve"]
        self.generator.set_state(state["generator"].cpu())
        for key in self.keep:
            setattr(self, key, state[key])

    def save(self, path: Path) -> None:
        """Write a checkpoint, the whole file or nothing."""
        with replacing(path) as temporary:
            torch.save(self.state(), temporary)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint that :meth:`save` wrote, perhaps for longer.

        Raises
        ------
        ValueError
            If the file is damaged, a checkpoint of another training, or one with another recipe or
            on other networks: only ``steps`` and ``minutes`` may differ.
        """
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except FileNotFoundError:
            raise
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{path} cannot be read as a checkpoint: it is damaged or something else; "
                "remove it to start anew"
            ) from error
        if not isinstance(state, dict) or state.get("kind") != self.kind:
            raise ValueError(
                f"{path} is no checkpoint of the {self.kind}: remove it or name another"
            )
        if differ := _differences(*self._recipes(state)):
            raise ValueError(
                f"{path} was made with other settings ({differ}): work in another folder, or "
                "remove it to start anew"
            )
        before = state.get("builds_on", {})
        if other := [name for name, digest in self.builds_on.items() if before.get(name) != digest]:
            raise ValueError(
                f"{path} was trained on another {' and another '.join(other)}: work in another "
                "folder, or remove it to start anew"
            )
        self.restore(state)

    def _recipes(self, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Recipes of a checkpoint and of this run, without the length of the run.

        What was no setting when the checkpoint was made counts as its default.
        """
        known = [f for f in fields(self.recipe) if f.name not in ("steps", "minutes")]
        before = {f.name: f.default for f in known} | json.loads(state["recipe"])
        now = {f.name: getattr(self.recipe, f.name) for f in known}
        return json.loads(json.dumps(before)), json.loads(json.dumps(now))

    # a run

    @property
    def last(self) -> dict[str, float]:
        """Last entry of the curve, which after :meth:`run` has scores; empty before the first.

        It has none where nothing is held out: a model card then says so.
        """
        return self.curve[-1] if self.curve else {}

    def write_log(self, path: Path, **more: Any) -> None:
        """Write recipe, curve and last scores as JSON beside the weights."""
        log = {"recipe": asdict(self.recipe), **more, "curve": self.curve, "held_out": self.last}
        Path(path).with_suffix(".json").write_text(json.dumps(log, indent=1) + "\n", "utf-8")

    def run(
        self,
        *,
        checkpoint: Path | None = None,
        export: Callable[[Any], None] | None = None,
        every: int = 100,
        score_every: int = 1000,
        progress: bool = False,
        log: Callable[[str], None] | None = say,
    ) -> Any:
        """Train to the end of the recipe, from `checkpoint` where it exists.

        Parameters
        ----------
        checkpoint : Path, optional
            Written every `score_every` steps and every few minutes, and read at the start.
        export : callable, optional
            Called with the trainer after each scoring.
        every, score_every : int
            Steps between entries of the curve, and between scores on held-out images.
        progress : bool
            Show a progress bar, on standard error.
        log : callable, optional
            Receives one line of JSON an entry.

        Returns
        -------
        Trainer
            This one.
        """
        if checkpoint is not None and Path(checkpoint).exists():
            self.resume(Path(checkpoint))
            if self.progress() >= 1:
                self._finished_before(checkpoint, export, log)
        sums: dict[str, list[float]] = {}
        saved = self.seconds
        with tqdm(total=self.recipe.steps, initial=self.step, disable=not progress,
                  desc=self.kind) as bar:  # fmt: skip
            while self.progress() < 1:
                for key, value in self.advance().items():
                    sums.setdefault(key, []).append(value)
                bar.update()
                last = self.progress() >= 1
                score = self.step % score_every == 0 or last
                if self.step % every == 0 or score:
                    self._note(sums, self.evaluate() if score else {}, log)
                    sums = {}
                if checkpoint is not None and (score or self.seconds - saved > _SAVE_AFTER):
                    self.save(Path(checkpoint))
                    saved = self.seconds
                if score and export:
                    export(self)
        return self

    def _finished_before(self, checkpoint: Path, export, log) -> None:
        if log:
            log(
                f"{checkpoint} is that of a training which is finished, at step {self.step}: "
                "nothing is left to do. Remove it, or work in another folder, to train anew"
            )
        if export:
            export(self)

    def _note(
        self,
        sums: dict[str, list[float]],
        scores: dict[str, float],
        log: Callable[[str], None] | None,
    ) -> None:
        """Add an entry to the curve, and take in scenes that were drawn since."""
        entry: dict[str, float] = {"step": self.step, "minutes": round(self.seconds / 60, 3)}
        entry |= {key: round(float(np.mean(values)), 5) for key, values in sums.items()}
        entry |= {key: round(value, 4) for key, value in scores.items()}
        self.curve.append(entry)
        if log:
            log(json.dumps(entry))
        if self.scenes is not None:
            self.scenes.refresh()
