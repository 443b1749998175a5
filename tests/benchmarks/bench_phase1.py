"""Phase 1: the fast path against the literal form of the paper, and against its bare passes.

The literal form runs on the model as the package `segment_anything` builds it, one `predict` a
prompt with masks at the size of the image, and keeps one mask a prompt, as the paper does. Its
prompting and its clustering are timed apart: the clustering is plain loops of the tests, slower
than it would have to be. The last rows are of the fast form with an anchor for each choice of mask
that is the default (``several``), and of passes that give all masks of a prompt.
``python -m tests.benchmarks.bench_phase1`` prints a table; ``--images``, ``--points`` and
``--side`` change the size, ``--crop-layers 2`` asks on crops too, ``--checkpoint vit_b --random``
times the official architecture without weights, ``--bf16`` asks in lower precision where the
hardware has it (the literal form stays as it is), ``--literal 30`` extrapolates the literal form
from its first superpixels with so many prompts, which is what takes long there; masks of random
weights are ragged, so that other anchors may come of the same masks. ``--clock cpu`` takes the
processor's time, ``--batches 1 4 8`` prints milliseconds a prompt by the batch of the decoder
instead, which ``sam.default_batch`` rests on.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import numpy as np
import pandas as pd
import torch
from segment_anything import SamPredictor, sam_model_registry

from helpers import anchors, config, phantom, sam
from helpers.processes import at_once, in_threads
from tests.benchmarks.measure import TIMERS, clock, clock_in_turn, peak_memory
from tests.literal_phase1 import literal_anchor, literal_answers

#: What ``make bench`` prints: the small model, and the official architecture of the same kind.
RUNS = ("", "--checkpoint vit_b --random --images 1 --literal 30 --repeats 1")

#: Times of one view, by key of its row.
TIMES = {
    "literal_prompting_s": "literal: encoder and prompts, s",
    "literal_s": "literal: with clustering, s",
    "prompting_s": "fast: encoder and prompts, s",
    "fast_s": "fast: with clustering, s",
    "early_s": "fast, stopping early, s",
    "bare_s": "bare passes, s",
    "several_s": "several masks, s",
    "several_bare_s": "several masks: bare passes, s",
}
#: The other keys of an image's row.
FIGURES = {
    "ratio_prompting": "literal / fast: encoder and prompts",
    "ratio": "literal / fast: with clustering",
    "ratio_early": "literal / fast, stopping early",
    "over_bare": "fast / bare passes",
    "several_over_bare": "several masks / bare passes",
    "same_masks": "share of masks that are the same",
    "same": "share of anchors that are the same",
    "asked": "stopping early: share of prompts asked",
    "early_iou": "stopping early: IoU with the anchor",
}


def load_model(checkpoint: str, random: bool, device: str):
    """A model, on request with random weights."""
    if not random:
        return sam.load_sam(checkpoint, device=device)
    torch.manual_seed(0)
    build = (
        sam.build_small_sam if checkpoint == "small" else partial(sam.build_official, checkpoint)
    )
    return build().eval().requires_grad_(False).to(config.torch_device(device))


def as_built(model, kind: str):
    """The same weights in the model of the package, without this project's attention."""
    if kind not in sam_model_registry:
        return model
    plain = sam_model_registry[kind]().eval().requires_grad_(False)
    plain.load_state_dict(model.state_dict())
    return plain.to(model.device)


def tissue(i: int, side: int) -> np.ndarray:
    """A square phantom, one grade after the other."""
    grade = phantom.GRADES["colon"][i % 4]
    return phantom.render(i, seed=42, grade=grade, size=(side, side)).image


def views(image: np.ndarray, options, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The image and its crops, each with its prompts; crops are images of their own here."""
    prompts = anchors.draw_prompts(
        image,
        options.segments,
        options.points,
        rng=np.random.default_rng(seed),
        crop_n_layers=options.crop_layers,
    )
    return [
        (np.ascontiguousarray(image[y0:y1, x0:x1]), points)
        for _, (x0, y0, x1, y1), _, points in prompts
    ]


# --- what is timed --------------------------------------------------------------------------------


def ask(model, image, points: np.ndarray, dtype: torch.dtype | None, choices=("best",)):
    """Proposals of one view: the encoder and all prompts."""
    embedding = sam.embed(model, image, dtype=dtype)
    return sam.propose(model, embedding, points.reshape(-1, 2), dtype=dtype, mask_choice=choices)


def fast(model, image, points: np.ndarray, dtype: torch.dtype | None, choices=("best",)):
    """Anchors of one view."""
    proposals = ask(model, image, points, dtype, choices)
    return anchors.choose_anchors(proposals, len(points) * len(choices))


def early(model, image, points: np.ndarray, dtype: torch.dtype | None):
    """Anchors of one view, and which prompts they took, in rounds."""
    embedding = sam.embed(model, image, dtype=dtype)
    proposals, asked = anchors.ask_in_rounds(model, embedding, points, how={"dtype": dtype})
    return anchors.choose_anchors(proposals, len(points)), asked


def bare(model, image, n_points: int, dtype: torch.dtype | None, outputs: str = "best") -> None:
    """One encoder pass and decoder passes for `n_points` prompts, in the batches of the helper."""
    xy = (torch.rand(1, n_points, 1, 2) * model.image_encoder.img_size).to(model.device)
    ones = torch.ones(1, n_points, 1, device=model.device)
    lower = partial(torch.autocast, model.device.type, torch.bfloat16, enabled=dtype is not None)
    features = sam.embed(model, image, dtype=dtype).features
    with torch.no_grad(), lower():
        side = sam.image_side(model, features)
    batch = sam._even_batch(n_points, sam.default_batch(model), model.device)

    def decode(start: int) -> None:
        part = slice(start, start + batch)  # each thread has its own settings of torch
        with torch.no_grad(), lower():
            sam.decode(model, features, xy[:, part], ones[:, part], outputs=outputs, side=side)

    for _ in in_threads(decode, range(0, n_points, batch), model.device):
        pass


def literal(model, image, points: np.ndarray, first: int, timer=time.perf_counter):
    """The literal form on the first superpixels of a view.

    Returns
    -------
    prompting, whole : float
        Seconds for all superpixels, extrapolated from those.
    index : list of int
        Anchors of the first superpixels, -1 for none.
    masks : (first * K, H, W) bool ndarray
    """
    n, k, _ = points.shape
    side = np.sqrt(image.shape[0] * image.shape[1])
    predictor = SamPredictor(model)
    encoder, _ = clock(lambda: predictor.set_image(image), timer=timer)
    prompts, (masks, scores) = clock(
        lambda: literal_answers(predictor, points[:first]), timer=timer
    )

    def cluster():
        rows = [slice(i * k, (i + 1) * k) for i in range(first)]
        return [literal_anchor(masks[row], scores[row], 0.1 * side) for row in rows]

    clustering, found = clock(cluster, timer=timer)
    index = [-1 if best is None else i * k + best for i, best in enumerate(found)]
    prompting = encoder + prompts * n / first
    return prompting, prompting + clustering * n / first, index, masks


# --- the table ------------------------------------------------------------------------------------


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="small")
    parser.add_argument("--random", action="store_true", help="random weights, for timing only")
    parser.add_argument("--bf16", action="store_true", help="lower precision of the fast form")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--segments", type=int, default=30)
    parser.add_argument("--points", type=int, default=15)
    parser.add_argument("--crop-layers", type=int, default=0)
    parser.add_argument("--literal", type=int, help="prompts of the literal form; default: all")
    parser.add_argument("--repeats", type=int, default=3, help="runs of all but the literal form")
    parser.add_argument(
        "--clock", choices=TIMERS, default="wall",
        help="cpu: processor time, for a machine that does other work too",
    )  # fmt: skip
    parser.add_argument("--batches", type=int, nargs="+", help="time these batches instead")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[dict] | pd.DataFrame:
    """Time, compare, print."""
    options = _options(argv)
    model = load_model(options.checkpoint, options.random, options.device)
    dtype = torch.bfloat16 if options.bf16 else None
    print(
        f"phase 1, {options.checkpoint}{' (random)' if options.random else ''}, "
        f"{'bfloat16' if options.bf16 else 'full precision'}, {options.side} px, "
        f"{torch.get_num_threads()} threads, "
        f"{options.clock} time, median of {options.repeats} runs"
    )
    if options.batches:
        return by_batch(model, options, dtype)
    plain = as_built(model, options.checkpoint)
    rows, memory, how = [], None, _how(options)
    for i in range(options.images):
        seen = views(tissue(i, options.side), options, i)
        fast(model, seen[0][0], seen[0][1][:2], dtype)  # warm up
        parts = []
        for image, points in seen:
            row, found = _fast_row(model, image, points, dtype, how)
            memory = memory or peak_memory(model.device)  # before the literal form has run
            row |= _literal_row(plain, image, points, options.literal, found, how["timer"])
            parts.append(row)
        rows.append(_together(parts))
    _print(rows, sam.default_batch(model), memory)
    return rows


def _how(options) -> dict:
    return {"repeats": options.repeats, "timer": TIMERS[options.clock]}


def _fast_row(model, image, points, dtype, how: dict) -> tuple[dict, tuple]:
    """Times and agreement of one view but for the literal form; its anchors and proposals."""
    n, k, _ = points.shape
    choices = anchors.prompt.__kwdefaults__["mask_choice"]
    times, found = clock_in_turn(
        {
            "prompting_s": lambda: ask(model, image, points, dtype),
            "bare_s": lambda: bare(model, image, n * k, dtype),
            "early_s": lambda: early(model, image, points, dtype),
            "several_s": lambda: fast(model, image, points, dtype, choices),
            "several_bare_s": lambda: bare(model, image, n * k, dtype, outputs="three"),
        },
        **how,
    )
    proposals, (stopped, asked) = found["prompting_s"], found["early_s"]
    of_anchors, chosen = clock_in_turn({0: lambda: anchors.choose_anchors(proposals, n)}, **how)
    index = chosen[0]
    masks = proposals.masks()
    kept = [_iou(masks[a], masks[b]) for a, b in zip(index, stopped, strict=True) if a >= 0]
    row = times | {
        "prompts": n * k,
        "fast_s": times["prompting_s"] + of_anchors[0],
        "asked": float(asked.mean()),
        "early_iou": float(np.mean(kept)) if kept else float("nan"),
    }
    return row, (index, proposals)


def _literal_row(model, image, points, n_literal, found, timer) -> dict:
    """Times of the literal form, and the share of its anchors that the fast path found too."""
    (n, k, _), (index, proposals) = points.shape, found
    first = n if n_literal is None else min(n, -(-n_literal // k))
    prompting, whole, reference, masks = literal(model, image, points, first, timer)
    same = [
        a == b or (a >= 0 and b >= 0 and _iou(proposals.full(a), masks[b]) >= 0.95)
        for a, b in zip(index[:first], reference, strict=True)
    ]
    ours = [proposals.full(i) for i in range(len(masks))]
    same_masks = [
        _iou(a, b) >= 0.95 or not (a.any() or b.any()) for a, b in zip(ours, masks, strict=True)
    ]
    return {
        "literal_prompting_s": prompting,
        "literal_s": whole,
        "same": float(np.mean(same)),
        "same_masks": float(np.mean(same_masks)),
    }


def _together(parts: list[dict]) -> dict:
    """One row of all views of an image: sums of prompts and times, means over the prompts."""
    table = pd.DataFrame(parts)
    row = table[["prompts", *TIMES]].sum().to_dict()
    row |= {
        "ratio_prompting": row["literal_prompting_s"] / row["prompting_s"],
        "ratio": row["literal_s"] / row["fast_s"],
        "ratio_early": row["literal_s"] / row["early_s"],
        "over_bare": row["fast_s"] / row["bare_s"],
        "several_over_bare": row["several_s"] / row["several_bare_s"],
    }
    for key in ("same", "same_masks", "asked", "early_iou"):
        known = table[table[key].notna()]
        row[key] = np.average(known[key], weights=known["prompts"]) if len(known) else float("nan")
    return row


def _iou(a, b):
    return (a & b).sum() / max(1, (a | b).sum())


def _print(rows: list[dict], batch: int, memory: float) -> None:
    table = pd.DataFrame(rows)[["prompts", *TIMES, *FIGURES]].rename(columns=TIMES | FIGURES).T
    table.columns = [f"image {i}" for i in table.columns]
    print(table.to_string(float_format="{:.2f}".format))
    mean = pd.DataFrame(rows).mean()
    print(
        f"literal / fast: encoder and prompts {mean['ratio_prompting']:.1f}, "
        f"with clustering {mean['ratio']:.1f}, stopping early {mean['ratio_early']:.1f}; "
        f"fast / bare passes: {mean['over_bare']:.2f}, "
        f"several masks {mean['several_over_bare']:.2f}; "
        f"batches of at most {batch}; peak memory of the fast form {memory:.2f} GB"
    )


def by_batch(model, options, dtype: torch.dtype | None) -> pd.DataFrame:
    """Print milliseconds a prompt by the largest batch of the decoder."""
    image, rng = tissue(0, options.side), np.random.default_rng(0)
    embedding, threads = sam.embed(model, image, dtype=dtype), at_once(model.device)
    points = {}
    for batch in options.batches:  # at least 128, and full batches only
        n = batch * threads * -(-128 // (batch * threads))
        points[batch] = rng.integers(0, options.side, (n, 2))

    def propose(batch: int):
        sam.propose(model, embedding, points[batch], points_per_batch=batch, dtype=dtype)

    propose(options.batches[0])  # warm up
    times, _ = clock_in_turn({b: partial(propose, b) for b in points}, **_how(options))
    rows = [
        {"batch": b, "at once": threads, "prompts": len(xy), "ms/prompt": 1000 * times[b] / len(xy)}
        for b, xy in points.items()
    ]
    table = pd.DataFrame(rows).set_index("batch")
    print(table.to_string(float_format="{:.2f}".format))
    print(f"default batch {sam.default_batch(model)}")
    return table


if __name__ == "__main__":
    main()
