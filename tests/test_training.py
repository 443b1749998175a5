import argparse
import io
import json
import re
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from helpers.files import sha256
from helpers.training import (
    Recipe,
    Trainer,
    average,
    command,
    drawn_with,
    keep_to_settings,
    learning_rate,
    machine,
    positive,
    say,
)

RECIPE = Recipe(steps=6, rate=0.1, warmup=2, ema=0.9)


class Line(Trainer):
    """Fits a line through noisy points; counts its batches in a buffer."""

    kind = "line"
    keep = ("offset",)

    def __init__(self, recipe=None, **options):
        torch.manual_seed(3)
        model = nn.Linear(2, 1)
        model.register_buffer("batches", torch.zeros((), dtype=torch.long))
        super().__init__(recipe or RECIPE, model, **options)
        self.offset = 0.5

    def loss(self):
        x = torch.randn(8, 2, generator=self.generator)
        self.model.batches += 1
        error = self.model(x).squeeze(1) - x.sum(1) - self.offset
        return {"loss": error.square().mean(), "largest": error.abs().max()}

    def evaluate(self):
        return {"score": float(self.average["bias"].mean())}


def test_learning_rate():
    rates = [learning_rate(k / 100, k, warmup=10, decay_from=0.4) for k in range(101)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose(rates[10:41], 1)
    assert (np.diff(rates[40:]) < 0).all()
    assert rates[70] == pytest.approx(0.505) and rates[100] == pytest.approx(0.01)
    assert learning_rate(1.7, 300, warmup=10, decay_from=0.4) == pytest.approx(0.01)


def test_a_step_is_adamw_at_the_rate_of_the_schedule():
    trainer, plain = Line(), nn.Linear(2, 1)
    plain.load_state_dict({k: v for k, v in trainer.model.state_dict().items() if k != "batches"})
    optimiser = torch.optim.AdamW(plain.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    for k in range(4):
        optimiser.param_groups[0]["lr"] = 0.1 * learning_rate(k / 6, k, warmup=2, decay_from=0.5)
        x = torch.randn(8, 2, generator=generator)
        loss = (plain(x).squeeze(1) - x.sum(1) - 0.5).square().mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimiser.step()
        assert trainer.advance()["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    torch.testing.assert_close(trainer.model.weight, plain.weight)


def test_average_is_the_literal_moving_average_and_counters_are_copied():
    trainer = Line()
    expected = trainer.model.weight.detach().clone()
    for step in range(1, 6):
        trainer.advance()
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * trainer.model.weight.detach()
    torch.testing.assert_close(trainer.average["weight"], expected)
    assert int(trainer.average["batches"]) == 5


def test_a_part_may_be_averaged_and_groups_have_their_rates():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    trainer = Trainer(
        replace(RECIPE, warmup=4), model, averaged=model[1],
        groups=[{"params": model[0].parameters(), "lr": 0.01},
                {"params": model[1].parameters(), "lr": 0.1}],
    )  # fmt: skip
    trainer.loss = lambda: {"loss": model(torch.ones(1, 2)).square().sum()}
    trainer.advance()
    assert trainer.average.keys() == {"weight", "bias"}
    assert [g["lr"] for g in trainer.optimiser.param_groups] == pytest.approx([0.0025, 0.025])


def test_what_no_group_names_stays_as_it_is():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    before = [p.detach().clone() for p in model.parameters()]
    trainer = Trainer(RECIPE, model, groups=[{"params": model[1].parameters(), "lr": 0.1}])
    trainer.loss = lambda: {"loss": model(torch.ones(1, 2)).square().sum()}
    trainer.advance()
    same = [torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert same == [True, True, False, False]


@pytest.mark.parametrize("stopped", [1, 3, 5])
def test_a_stopped_run_ends_as_an_unbroken_one(stopped, tmp_path):
    whole = Line().run(every=2, score_every=3, log=None)
    first = Line()
    first.offset = 0.5
    for _ in range(stopped):
        first.advance()
    first.save(tmp_path / "line.pt")
    again = Line()
    again.offset = -7.0  # belongs to the checkpoint
    again.run(checkpoint=tmp_path / "line.pt", every=2, score_every=3, log=None)
    assert again.step == whole.step == 6 and again.offset == 0.5
    for key, value in whole.average.items():
        assert torch.equal(again.average[key], value)
    assert [path.name for path in tmp_path.iterdir()] == ["line.pt"]


def test_the_curve_holds_means_and_scores(tmp_path):
    lines, exported = [], []
    trainer = Line().run(
        every=2, score_every=3, log=lines.append, checkpoint=tmp_path / "line.pt",
        export=lambda t: exported.append(t.step),
    )  # fmt: skip
    assert [e["step"] for e in trainer.curve] == [2, 3, 4, 6]
    assert ["score" in e for e in trainer.curve] == [False, True, False, True]
    assert [json.loads(line) for line in lines] == trainer.curve and exported == [3, 6]
    plain = Line()
    losses = [plain.advance()["loss"] for _ in range(6)]
    means = [np.mean(losses[:2]), losses[2], losses[3], np.mean(losses[4:])]
    assert [e["loss"] for e in trainer.curve] == pytest.approx(means, abs=1e-5)


def test_a_run_ends_by_time():
    trainer = Line(replace(RECIPE, steps=10**6, minutes=0.001)).run(log=None)
    assert 0 < trainer.step < 10**6 and trainer.progress() >= 1


@pytest.mark.parametrize("bf16", [False, True])
def test_precision_is_mixed_if_the_recipe_asks_for_it(bf16):
    trainer = Line(replace(RECIPE, bf16=bf16))
    with trainer.autocast():
        out = trainer.model(torch.ones(1, 2))
    assert out.dtype == (torch.bfloat16 if bf16 else torch.float32)


def test_a_bar_shows_the_steps_if_asked_for(capsys):
    Line().run(log=None)
    assert capsys.readouterr().err == ""
    first = Line()
    first.advance()
    first.run(log=None, progress=True)
    said = capsys.readouterr()
    assert re.search(r"line: +17%.* 1/6 .*line: 100%.* 6/6 ", said.err) and said.out == ""


def test_a_bar_makes_room_for_the_lines_of_the_log(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    trainer = Line().run(every=2, log=say, progress=True)
    text = screen.getvalue()
    for entry in trainer.curve:  # from the start of a line to its end
        assert re.search(rf"[\r\n]{re.escape(json.dumps(entry))}\n", text)
    assert len(trainer.curve) == 3


def test_progress_is_that_of_steps_or_of_minutes():
    trainer = Line(replace(RECIPE, minutes=2.0))
    trainer.step, trainer.seconds = 1, 60.0
    assert trainer.progress() == pytest.approx(0.5)  # one minute of two, one step of six
    trainer.seconds = 6.0
    assert trainer.progress() == pytest.approx(1 / 6)


def test_a_loss_that_is_no_number_stops_before_the_weights_are_spoilt():
    trainer = Line()
    trainer.advance()
    before = trainer.model.weight.detach().clone()
    trainer.offset = float("nan")
    with pytest.raises(FloatingPointError, match="the line loss is nan at step 1: lower"):
        trainer.advance()
    assert torch.equal(trainer.model.weight, before) and trainer.step == 1


def test_a_gradient_that_is_no_number_stops_before_the_weights_are_spoilt():
    trainer = Line()
    trainer.advance()
    before = trainer.model.weight.detach().clone(), trainer.average["weight"].clone()
    trainer.loss = lambda: {"loss": (0 * trainer.model(torch.ones(1, 2))).sqrt().sum()}  # of 0
    with pytest.raises(FloatingPointError, match="the line gradient is nan at step 1"):
        trainer.advance()
    for now, then in zip((trainer.model.weight, trainer.average["weight"]), before, strict=True):
        assert torch.equal(now, then)
    assert trainer.step == 1


def test_resume_says_what_is_wrong(tmp_path):
    path = tmp_path / "line.pt"
    Line().save(path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"line\.pt cannot be read as a checkpoint.*remove it"):
            Line().resume(path)
    torch.save({"kind": "plane"}, path)
    with pytest.raises(ValueError, match=r"line\.pt is no checkpoint of the line"):
        Line().resume(path)
    torch.save([1], path)
    with pytest.raises(ValueError, match="no checkpoint of the line"):
        Line().resume(path)


@pytest.mark.parametrize("done", [2, 6])
def test_a_checkpoint_serves_its_own_recipe_only(done, tmp_path):
    path, exported = tmp_path / "line.pt", []
    trainer = Line()
    for _ in range(done):
        trainer.advance()
    trainer.save(path)
    other = Line(replace(RECIPE, seed=5, rate=0.2))
    expected = (
        r"line\.pt was made with other settings \(seed was 0, is now 5, rate was 0\.1, is now "
        r"0\.2\): work in another folder, or remove it"
    )
    with pytest.raises(ValueError, match=expected):
        other.run(checkpoint=path, log=None, export=exported.append)
    assert other.step == 0 and not exported
    longer = Line(replace(RECIPE, steps=8, minutes=1.0)).run(checkpoint=path, log=None)
    assert longer.step == 8


def test_a_setting_that_a_checkpoint_does_not_know_counts_as_its_default(tmp_path):
    @dataclass(frozen=True)
    class Wider(Recipe):
        widths: tuple[int, ...] = (2, 1)

    path = tmp_path / "line.pt"
    Line(Recipe()).save(path)
    Line(Wider()).resume(path)
    with pytest.raises(ValueError, match=r"\(widths was \[2, 1\], is now \[3\]\)"):
        Line(Wider(widths=(3,))).resume(path)
    Line(Wider(widths=(3,))).save(path)
    Line(Wider(widths=(3,))).resume(path)  # a tuple is a list in JSON


def test_a_folder_of_scenes_keeps_to_its_settings(tmp_path):
    folder = tmp_path / "scenes"
    for _ in range(2):
        keep_to_settings(folder, seed=1, share=0.75)
    assert drawn_with(folder) == {"seed": 1, "share": 0.75}
    with pytest.raises(
        ValueError,
        match=r"scenes holds .* other settings \(seed was 1, is now 2\): work in another",
    ):
        keep_to_settings(folder, seed=2, share=0.75)
    assert [path.name for path in folder.iterdir()] == ["scenes.json"]


@pytest.mark.parametrize("text", [None, "", "{"])
def test_scenes_that_nothing_is_known_of_are_refused(text, tmp_path):
    np.save(tmp_path / "shard_0000.npy", np.zeros(1))
    if text is not None:
        (tmp_path / "scenes.json").write_text(text)
    with pytest.raises(ValueError, match="does not say how its scenes were drawn"):
        keep_to_settings(tmp_path, seed=0)


def test_machine(monkeypatch):
    for threads, words in ((1, "one CPU thread"), (7, "7 CPU threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert machine("cpu") == words
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert machine(torch.device("cuda", 1)) == "GPU 1" and machine("mps") == "mps"


def test_another_seed_sees_other_batches():
    assert Line().advance() == Line().advance()
    assert Line().advance() != Line(replace(RECIPE, seed=1)).advance()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"steps": 0}, "steps = 0"), ({"decay_from": 1.0}, "decay_from = 1.0"),
     ({"minutes": 0.0, "ema": 1.0}, "minutes = 0.0, ema = 1.0"), ({"rate": -1.0}, "rate = -1.0"),
     ({"warmup": -1}, "warmup = -1")],
)  # fmt: skip
def test_recipes_that_cannot_be_followed_are_refused(wrong, said):
    with pytest.raises(ValueError, match=f"^{said}: a training needs counts >= 1"):
        Recipe(**wrong)


@dataclass(frozen=True)
class WithBatches(Recipe):
    batch: int = 8
    images: str | None = None


def test_a_recipe_needs_one_at_least_of_what_it_counts():
    with pytest.raises(ValueError, match=r"^batch = 0: a training needs counts >= 1"):
        WithBatches(batch=0)
    assert WithBatches(batch=1, images="a folder").images == "a folder"


def test_a_checkpoint_is_written_after_some_minutes_whatever_the_steps(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(Line, "save", lambda self, path: saved.append(self.step))
    Line().run(checkpoint=tmp_path / "line.pt", every=2, score_every=100, log=None)
    assert saved == [6]
    advance = Line.advance

    def slow(self):
        self.seconds += 200
        return advance(self)

    monkeypatch.setattr(Line, "advance", slow)
    Line().run(checkpoint=tmp_path / "line.pt", every=2, score_every=100, log=None)
    assert saved == [6, 2, 4, 6]


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [(None, 0, ""), (ValueError("no such folder"), 1, "\nno such folder\n"),
     (FileNotFoundError("a.pt"), 1, "\na.pt\n"), (KeyboardInterrupt(), 130, "\nstopped; the same")],
)  # fmt: skip
def test_a_command_says_what_its_user_can_mend(error, status, said, capsys):
    def main():
        if error:
            raise error

    assert command(main) == status
    assert capsys.readouterr().err.startswith(said)
    with pytest.raises(ZeroDivisionError):  # a mistake of ours keeps its traceback
        command(lambda: 1 / 0)


def test_counts_of_a_command_line_are_whole_and_positive():
    assert positive("3") == 3
    for text in ("0", "-1", "1.5", "x"):
        with pytest.raises(argparse.ArgumentTypeError, match="whole number of at least 1"):
            positive(text)


def test_average_of_files_is_their_mean_and_keeps_their_words(tmp_path):
    rng = torch.Generator().manual_seed(0)
    states = [
        {"w": torch.randn(3, 5, generator=rng).half(), "n": torch.tensor(k)} for k in range(3)
    ]
    files = [tmp_path / f"{k}.safetensors" for k in range(3)]
    for file, state in zip(files, states, strict=True):
        save_file(state, str(file), metadata={"kind": "toy", "file": file.name})
    card = tmp_path / "mean.md"
    card.write_text("| licence | MIT |\n| SHA-256 | `0ff` |\n")
    average(files, tmp_path / "mean.safetensors")
    assert card.read_text() == (
        f"| licence | MIT |\n| SHA-256 | `{sha256(tmp_path / 'mean.safetensors')}` |\n\n"
        "Mean of `0.safetensors`, `1.safetensors`, `2.safetensors`.\n"
    )
    with safe_open(str(tmp_path / "mean.safetensors"), framework="pt") as file:
        assert file.metadata() == {"kind": "toy", "file": "0.safetensors", "mean_of": "3"}
        mean = {key: file.get_tensor(key) for key in file.keys()}
    expected = sum(state["w"].double() for state in states) / 3
    assert mean["w"].dtype == torch.float16 and mean["n"] == 2
    torch.testing.assert_close(mean["w"].double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("first", [0, 1])
def test_average_keeps_what_a_network_builds_on_and_refuses_two_of_these(tmp_path, first):
    """Older files do not say it; those that do have to agree."""
    files = [tmp_path / f"{k}.safetensors" for k in range(3)]
    for file, said in zip(files, ({}, {"builds_on": "a"}, {"builds_on": "b"}), strict=True):
        save_file({"w": torch.zeros(2)}, str(file), metadata={"config": "{}", **said})
    average([files[first], files[1 - first]], tmp_path / "mean.safetensors")
    with safe_open(str(tmp_path / "mean.safetensors"), framework="pt") as file:
        assert file.metadata() == {"config": "{}", "builds_on": "a", "mean_of": "2"}
    with pytest.raises(ValueError, match=r"say different things .*\((a; b|b; a)\)"):
        average(files, tmp_path / "mean.safetensors")


def test_average_refuses_latents_of_other_scales(tmp_path):
    files = [tmp_path / f"{k}.safetensors" for k in range(2)]
    for scale, file in enumerate(files):
        said = {"kind": "toy", "config": f'{{"scale": {scale}}}'}
        save_file({"w": torch.zeros(2)}, str(file), metadata=said)
    with pytest.raises(ValueError, match=r'say different things .*"scale": [01].*share it'):
        average(files, tmp_path / "mean.safetensors")


def test_average_refuses_what_does_not_go_together(tmp_path):
    with pytest.raises(ValueError, match="no weights to average"):
        average([], tmp_path / "mean.safetensors")
    one, two, broken = (tmp_path / f"{name}.safetensors" for name in ("one", "two", "broken"))
    save_file({"w": torch.zeros(3)}, str(one))
    save_file({"w": torch.zeros(4)}, str(two))
    broken.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"two.safetensors has other tensors than .*one"):
        average([one, two], tmp_path / "mean.safetensors")
    with pytest.raises(ValueError, match=r"broken.safetensors is not a readable"):
        average([one, broken], tmp_path / "mean.safetensors")
    assert not (tmp_path / "mean.safetensors").exists()
