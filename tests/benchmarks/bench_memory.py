"""Phase 1: memory above the loaded model for one large image, and after many small ones.

``python -m tests.benchmarks.bench_memory`` prints one table; ``--checkpoint vit_b --random`` is for
the official architecture without weights, ``--images`` names after how many small images to look
(none: leave them out). The large image gets exactly ``--segments`` times ``--points`` prompts in
one view: SLIC runs on it, but the points come from a grid of cells, since SLIC returns another
number of superpixels than asked. The small ones are segmented as by default, but without crops and
with half as many superpixels, to spare time. Each measure has a process of its own. What loading
took and freed is handed back before; blocks that are freed later stay with the process, and count.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd

from helpers import anchors, sam
from helpers.superpixels import draw_points, superpixels
from tests.benchmarks.bench_phase1 import load_model, tissue
from tests.benchmarks.measure import alone, hand_back, peak_memory, resident_memory

#: What ``make bench`` prints; small images take the official architecture too long on a CPU.
RUNS = ("", "--checkpoint vit_b --random --images")

#: Choices among the masks of a prompt: that of the paper, and the default.
CHOICES = {
    "one mask a prompt": ("best",),
    "three masks a prompt": anchors.prompt.__kwdefaults__["mask_choice"],
}


def cells(side: int, n: int) -> np.ndarray:
    """(side, side) int32 ndarray: a grid of exactly n cells, as square as n allows."""
    rows = next(r for r in range(int(n**0.5), 0, -1) if n % r == 0)
    y, x = np.mgrid[:side, :side]
    return (y * rows // side * (n // rows) + x * (n // rows) // side).astype(np.int32)


def one_image(model, image: np.ndarray, n: int, k: int, choices: tuple[str, ...]) -> int:
    """Segments of one view from n x K prompts, with every step; the number of prompts."""
    superpixels(image, n)
    labels = cells(len(image), n)
    points = draw_points(labels, k, rng=np.random.default_rng(0))
    embedding = sam.embed(model, image)
    proposals = sam.propose(model, embedding, points.reshape(-1, 2), mask_choice=choices)
    box, size = (0, 0, *image.shape[1::-1]), image.shape[:2]
    asked = np.ones((n, k), bool)
    anchors.anchors([anchors.Prompted(labels, points, proposals, asked, box, size)])
    return asked.size


def large(loading: tuple, image: np.ndarray, n: int, k: int, choices) -> list[dict]:
    """The row of one large image."""
    model = load_model(*loading)
    return list(_rows([1], lambda _: one_image(model, image, n, k, choices), model))


def many(loading: tuple, images: list[np.ndarray], marks: list[int]) -> list[dict]:
    """Rows of many small images, in all ways that they can be turned, after each of the marks."""
    model = load_model(*loading)

    def segment(i: int) -> int:
        image = np.ascontiguousarray(np.rot90(images[i % len(images)], i // len(images)))
        rng = np.random.default_rng(i)
        prompted = anchors.prompt(model, image, rng=rng, n_segments=24, crop_n_layers=0)
        anchors.anchors(prompted)
        return anchors.n_asked(prompted)

    return list(_rows(marks, segment, model))


def _rows(marks: list[int], work: Callable[[int], int], model) -> Iterator[dict]:
    """Time and memory of the images up to each mark; `work` takes an image's number."""
    hand_back()
    start, done = resident_memory(model.device), 0
    for mark in marks:
        wall, processor = time.perf_counter(), time.process_time()
        prompts = [work(i) for i in range(done, mark)]
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        yield {
            "images": mark,
            "prompts/image": np.mean(prompts),
            "s/image": wall / (mark - done),
            "CPU s/image": processor / (mark - done),
            "peak MB": 1000 * (peak_memory(model.device) - start),
            "resident MB": 1000 * (resident_memory(model.device) - start),
        }
        done = mark


def main(argv: list[str] | None = None) -> pd.DataFrame:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="small")
    parser.add_argument("--random", action="store_true", help="random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--side", type=int, default=1024, help="of the large image")
    parser.add_argument("--segments", type=int, default=30)
    parser.add_argument("--points", type=int, default=15)
    parser.add_argument("--images", type=int, nargs="*", default=[50, 100, 200])
    parser.add_argument("--image-size", type=int, default=256, help="side of the small images")
    o = parser.parse_args(argv)
    loading, size = (o.checkpoint, o.random, o.device), (o.segments, o.points)
    image = tissue(0, o.side)
    tables = {
        f"{o.side} px, {name}": alone(large, loading, image, *size, choices)
        for name, choices in CHOICES.items()
    }
    if o.images:
        small = [tissue(i, o.image_size) for i in range(10)]
        tables[f"{o.image_size} px, one after the other"] = alone(many, loading, small, o.images)
    rows = [{"measure": name, **row} for name, table in tables.items() for row in table]
    table = pd.DataFrame(rows).set_index("measure")
    print(
        f"{o.checkpoint}{' (random)' if o.random else ''}; MB = 10^6 bytes above the loaded model; "
        "times of the images since the row before"
    )
    formats = dict.fromkeys(("s/image", "CPU s/image"), "{:.2f}".format)
    formats |= dict.fromkeys(("prompts/image", "peak MB", "resident MB"), "{:.0f}".format)
    print(table.rename_axis(None).to_string(formatters=formats))
    return table


if __name__ == "__main__":
    main()
