"""Segments against annotated glands: anchors, single prompts, automatic masks, classical methods.

``python -m tests.benchmarks.bench_segments`` prints two tables on a few phantoms;
``--dataset glas --root PATH --every 3`` does so on every third image of a data set with masks,
``--checkpoint`` takes other weights. Baselines get as many segments as the anchors have in the
same image, in one run: classical ones, and SAM's automatic masks by the same network with the
same number of prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pandas as pd

from helpers import anchors, baselines, datasets, sam, train_sam
from helpers.superpixels import most_superpixels

#: What ``make bench`` prints: fewer images than by itself.
RUNS = ("--every 72",)


def methods(model, image: np.ndarray, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Names and masks of every method, one after the other."""

    def prompted(**settings):
        return anchors.prompt(model, image, rng=np.random.default_rng(seed), **settings)

    asked = prompted()
    masks = anchors.anchors(asked).masks
    n, n_superpixels = max(1, len(masks)), sum(len(crop.points) for crop in asked)
    n_prompts = anchors.n_asked(asked)
    yield "anchors", masks
    yield "  own outlines", anchors.anchors(asked, iou_vote=1).masks
    yield "  every predicted IoU", anchors.anchors(asked, pred_iou_thresh=0).masks
    yield "  every superpixel asked", anchors.anchors(prompted(explained_iou=1)).masks
    for name, choice in {"middle": "middle", "preferred": "best"}.items():
        yield f"  {name} masks alone", anchors.anchors(prompted(mask_choice=choice)).masks
    most = min(n_superpixels, most_superpixels(image.shape[:2]))
    whole = prompted(crop_n_layers=0, n_segments=most)
    yield "  no crops, as many prompts", anchors.anchors(whole).masks
    paper = prompted(crop_n_layers=0, n_segments=30, n_points=15, mask_choice="best")
    yield "  no crops, 30 x 15 prompts", anchors.anchors(paper, pred_iou_thresh=0, iou_vote=1).masks
    yield "single prompts", baselines.single_prompts(asked, n)
    yield "  voted outlines", baselines.single_prompts(asked, n, voted=True)
    for name, layers in {"automatic masks": 2, "  no crops, automatic": 0}.items():
        found = baselines.automatic(model, image, n, n_prompts=n_prompts, crop_n_layers=layers)
        yield name, found
    for name, classical in baselines.CLASSICAL.items():
        yield name, classical(image, n)


def main(argv: list[str] | None = None) -> pd.DataFrame:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="phantom")
    parser.add_argument("--root", help="folder of the data set")
    parser.add_argument("--every", type=int, default=24, help="take every n-th annotated image")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--checkpoint", default="small")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(argv)
    model = sam.load_sam(options.checkpoint, device=options.device)
    data = datasets.load(options.dataset, root=options.root, image_size=options.image_size)
    every = ((i, data.instances(i)) for i in data.records["image_id"])
    annotated = ((i, labels) for i, labels in every if labels is not None)
    chosen = list(islice(annotated, 0, None, options.every))
    if not chosen:
        raise SystemExit(f"data set {options.dataset!r} has no annotated image to compare with")
    images, truth = [data.image(i) for i, _ in chosen], [labels for _, labels in chosen]
    zooms = train_sam.ZOOMS
    clicks = train_sam.evaluate_zooms(
        model, images, truth, rng=np.random.default_rng(0), clicks_each=2, zooms=zooms
    )
    rows = [
        {"method": name, **anchors.match_glands(masks, labels, min_area=0.002)}
        for seed, (image, labels) in enumerate(zip(images, truth, strict=True))
        for name, masks in methods(model, image, seed)
    ]
    table = _summary(pd.DataFrame(rows))
    print(
        f"{options.dataset}, {len(chosen)} images, {options.checkpoint}; two clicks a gland "
        f"(n = {clicks[0]['n']}): IoU of the best mask, the best of three, and the preferred one"
    )
    for zoom, found in zip(zooms, clicks, strict=True):
        where = f"and 1/{zoom:.3g} of it" if zoom > 1 else "whole image"
        print(
            f"  {where}: {found['oracle_iou']:.3f}, {found['three_iou']:.3f}, "
            f"{found['picked_iou']:.3f}"
        )
    print(table.to_string(float_format="{:.3f}".format))
    return table


def _summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a method."""
    means = {
        name: anchors.mean_match(part.to_dict("records"))
        for name, part in rows.groupby("method", sort=False)
    }
    return pd.DataFrame.from_dict(means, orient="index").rename(
        columns={
            "mean_best_iou": "mean best IoU",
            "recall_50": "recall at 0.5",
            "coverage": "tissue covered",
            "n_segments": "segments",
            "n": "glands",
        }
    )


if __name__ == "__main__":
    main()
