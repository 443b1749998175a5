"""Phase 1: the fast path against the literal form of the paper, and against its bare passes.

The literal form runs on the model as the package `segment_anything` builds it, and keeps one mask
a prompt, as the paper does; the last columns are of the fast form with an anchor for each choice of
mask that is the default (``several``), and of passes that give all masks of a prompt.
``python -m tests.benchmarks.bench_phase1`` prints a table; ``--images``, ``--points`` and
``--side`` change the size, ``--crop-layers 2`` asks on crops too, ``--checkpoint vit_b --random``
times the official architecture without weights, ``--bf16`` asks in lower precision where the
hardware has it (the literal form stays as it is), ``--literal 20`` extrapolates the literal form
from 20 of its prompts, which is what takes long there.
"""

from __future__ import annotations

import argparse

import numpy as np
import pandas as pd
import torch
from segment_anything import SamPredictor, sam_model_registry

from helpers import anchors, config, phantom, sam
from tests.benchmarks.measure import clock, peak_memory
from tests.literal_phase1 import literal_anchors, literal_answers


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


def fast(model, image, points: np.ndarray, dtype: torch.dtype | None, choices=("best",)):
    """Anchors of one view and the proposals behind them."""
    embedding = sam.embed(model, image, dtype=dtype)
    proposals = sam.propose(
        model, embedding, points.reshape(-1, 2), dtype=dtype, mask_choice=choices
    )
    return anchors.choose_anchors(proposals, len(points) * len(choices)), proposals


def bare(
    model, image, n_points: int, batch: int, dtype: torch.dtype | None, outputs: str = "best"
) -> float:
    """Seconds of one encoder pass and of decoder passes for `n_points` prompts."""
    xy = (torch.rand(1, n_points, 1, 2) * model.image_encoder.img_size).to(model.device)
    ones = torch.ones(1, n_points, 1, device=model.device)

    def passes():
        features = sam.embed(model, image, dtype=dtype).features
        side = sam.image_side(model, features)
        for i in range(0, n_points, batch):
            part = slice(i, i + batch)
            sam.decode(model, features, xy[:, part], ones[:, part], outputs=outputs, side=side)

    lower = torch.autocast(model.device.type, torch.bfloat16, enabled=dtype is not None)
    with torch.no_grad(), lower:
        return clock(passes)[0]


def as_built(model, kind: str):
    """The same weights in the model of the package, without this project's attention."""
    if kind not in sam_model_registry:
        return model
    plain = sam_model_registry[kind]().eval().requires_grad_(False)
    plain.load_state_dict(model.state_dict())
    return plain.to(model.device)


def main(argv: list[str] | None = None) -> list[dict]:
    """Time, compare, print."""
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
    options = parser.parse_args(argv)
    if options.random:
        model = sam.build_official(options.checkpoint).eval().requires_grad_(False)
        model = model.to(config.torch_device(options.device))
    else:
        model = sam.load_sam(options.checkpoint, device=options.device)
    plain = as_built(model, options.checkpoint)
    batch = sam.default_batch(model)
    dtype = torch.bfloat16 if options.bf16 else None
    rows, memory = [], None
    for i in range(options.images):
        grade = phantom.GRADES["colon"][i % 4]
        image = phantom.render(i, seed=42, grade=grade, size=(options.side,) * 2).image
        seen = views(image, options, i)
        fast(model, *seen[0], dtype)  # warm up
        memory = memory or peak_memory(model.device)  # before the literal form has run
        parts = [_row(model, plain, *view, options.literal, batch, dtype) for view in seen]
        rows.append(_together(parts))
    _print(rows, options, batch, memory)
    return rows


def _row(model, plain, image, points, n_literal, batch, dtype) -> dict:
    """Times and agreement of one view."""
    n, k, _ = points.shape

    def rounds():
        embedding = sam.embed(model, image, dtype=dtype)
        proposals, asked = anchors.ask_in_rounds(model, embedding, points, how={"dtype": dtype})
        return anchors.choose_anchors(proposals, n), asked

    quick, (index, proposals) = clock(lambda: fast(model, image, points, dtype))
    early, (stopped, asked) = clock(rounds)
    slow, same = _literal(plain, image, points, n_literal, index, proposals)
    masks = proposals.masks()
    kept = [_iou(masks[a], masks[b]) for a, b in zip(index, stopped, strict=True) if a >= 0]
    needed = bare(model, image, n * k, batch, dtype)
    choices = anchors.prompt.__kwdefaults__["mask_choice"]
    several, _ = clock(lambda: fast(model, image, points, dtype, choices))
    of_several = bare(model, image, n * k, batch, dtype, outputs="three")
    return {
        "prompts": n * k,
        "literal_s": slow,
        "fast_s": quick,
        "early_s": early,
        "bare_s": needed,
        "same": same,
        "asked": float(asked.mean()),
        "early_iou": float(np.mean(kept)) if kept else float("nan"),
        "several_s": several,
        "several_bare_s": of_several,
    }


def _together(parts: list[dict]) -> dict:
    """One row of all views of an image: sums of prompts and times, means over the prompts."""
    table = pd.DataFrame(parts)
    sums = ["prompts", "literal_s", "fast_s", "early_s", "bare_s", "several_s", "several_bare_s"]
    row = table[sums].sum().to_dict()
    return row | {
        "ratio": row["literal_s"] / row["fast_s"],
        "ratio_early": row["literal_s"] / row["early_s"],
        "over_bare": row["fast_s"] / row["bare_s"],
        "several_over_bare": row["several_s"] / row["several_bare_s"],
        **{
            key: float(
                np.average(table[key].dropna(), weights=table["prompts"][table[key].notna()])
            )
            if table[key].notna().any()
            else float("nan")
            for key in ("same", "asked", "early_iou")
        },
    }


def _literal(model, image, points, n_literal, index, proposals):
    """Seconds of the literal form, and the share of its anchors that the fast path gives too."""
    if n_literal is None:
        slow, (reference, masks) = clock(
            lambda: literal_anchors(model, image, points, distance_threshold=0.1)
        )
        same = [
            a == b or (a >= 0 and b >= 0 and _iou(proposals.full(a), masks[b]) >= 0.95)
            for a, b in zip(index, reference, strict=True)
        ]
        return slow, float(np.mean(same))
    predictor, flat = SamPredictor(model), points.reshape(-1, 2)
    encoder, _ = clock(lambda: predictor.set_image(image))
    prompts, _ = clock(lambda: literal_answers(predictor, flat[:n_literal]))
    return encoder + prompts * len(flat) / min(n_literal, len(flat)), float("nan")


def _iou(a, b):
    return (a & b).sum() / max(1, (a | b).sum())


def _print(rows, options, batch, memory) -> None:
    print(
        f"phase 1, {options.checkpoint}{' (random)' if options.random else ''}, "
        f"{'bfloat16' if options.bf16 else 'full precision'}, "
        f"{options.side} px, {torch.get_num_threads()} threads, batches of {batch}"
    )
    print("  ".join(f"{key:>12}" for key in rows[0]))
    for row in rows:
        print("  ".join(f"{value:12.2f}" for value in row.values()))
    print(
        f"literal / fast: {np.mean([r['ratio'] for r in rows]):.1f}, "
        f"stopping early {np.mean([r['ratio_early'] for r in rows]):.1f}; "
        f"fast / bare passes: {np.mean([r['over_bare'] for r in rows]):.2f}, "
        f"several masks {np.mean([r['several_over_bare'] for r in rows]):.2f}; "
        f"peak memory of the fast form {memory:.2f} GB"
    )


if __name__ == "__main__":
    main()
