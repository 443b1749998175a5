"""Pool and draws: cost a segment as the pool grows, and a draw against one pass over the features.

``python -m tests.benchmarks.bench_pool`` prints two tables; ``--sizes`` and ``--draws`` change the
number of segments. Baselines: for the pool, its own cost a segment at the smallest size (1 is
linear, the ratio of the sizes would be quadratic); for a draw, one matrix-vector product over the
features of the whole pool in single precision (BLAS sgemv), and one ``np.linalg.norm`` over them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial

import numpy as np
import pandas as pd

from helpers import features, pool, segment_table
from helpers.draws import Sampler, draw_log_probabilities
from helpers.placement import affine_by_fit, affine_from_moments, iou, warp_mask
from tests.benchmarks import measure

SIDE, A_IMAGE = 64, 25  # pixels of an image, segments of an image


#: Processor time, which other work on the machine does not lengthen.
clock = partial(measure.clock, timer=measure.TIMERS["cpu"])


def stamps() -> np.ndarray:
    """Masks of one image: discs of several sizes on a grid."""
    y, x = np.mgrid[:SIDE, :SIDE]
    at = np.arange(8, SIDE, 12)
    return np.stack([np.hypot(x - a, y - b) < 3 + (a + b) % 4 for a in at for b in at])[:A_IMAGE]


def image_table(n: int, start: int = 0) -> pd.DataFrame:
    """Rows of n training images."""
    return pd.DataFrame(
        {
            "image_id": [f"image-{start + k}" for k in range(n)],
            "label": [f"class {k % 4}" for k in range(n)],
            "split": "train", "patient": [f"p{(start + k) // 8}" for k in range(n)],
            "dataset": "bench", "height": SIDE, "width": SIDE,
        }
    )  # fmt: skip


class Cheap:
    """Stands for an extractor, so that the table shows the cost of everything but the network."""

    name, dim = "cheap", 256

    def embed(self, crops, batch=32, *, progress=False):
        """Random features; crops are made but not looked at."""
        return np.random.default_rng(len(crops)).normal(size=(len(crops), self.dim))


def of_size(n: int, d: int, p: int) -> dict[str, float]:
    """Processor seconds of every step with a pool of n segments."""
    masks, images = stamps(), image_table(n // A_IMAGE)
    picture = np.full((SIDE, SIDE, 3), 128, np.uint8)
    times = {}
    times["collect"], segments = clock(
        lambda: segment_table.collect(images, dict.fromkeys(images["image_id"], masks))
    )
    times["duplicates"], segments = clock(lambda: segment_table.drop_duplicates(segments))
    times["crops"], raw = clock(
        lambda: features.embed_segments(Cheap(), segments, lambda _: picture)
    )
    raw = np.random.default_rng(0).normal(size=(len(segments), d)).astype(np.float32)
    times["build, PCA"], built = clock(lambda: pool.build(segments, raw, n_components=p))
    more = image_table(4, len(images))
    new = segment_table.collect(more, dict.fromkeys(more["image_id"], masks))
    times["append 100"], _ = clock(
        lambda: pool.append(built, new, np.zeros((len(new), d), np.float32))
    )
    with tempfile.TemporaryDirectory() as folder:
        times["save"], _ = clock(lambda: built.save(folder))
        times["load"], _ = clock(lambda: pool.Pool.load(folder))
    return times


def draw_table(n: int, p: int) -> list[tuple[str, float]]:
    """Processor seconds of a draw and of its baselines, for a pool of n segments of one class."""
    rng = np.random.default_rng(0)
    spread = np.geomspace(8, 0.3, p).astype(np.float32)
    f = rng.standard_normal((n, p), dtype=np.float32) * spread
    images = image_table(-(-n // A_IMAGE))
    image_of = np.arange(n) // A_IMAGE
    table = pd.DataFrame(
        {
            "segment_id": np.arange(n), "image_id": images["image_id"].to_numpy()[image_of],
            "label": "a", "patient": "", "dataset": "bench", "border": rng.random(n) < 0.2,
            "x": 0, "y": 0, "w": SIDE // 4, "h": SIDE // 4, "area": SIDE,
        }
    )  # fmt: skip
    big = pool.Pool(table, ({},) * n, f, {}, images)
    sampler, targets = Sampler(big), rng.integers(n, size=20)
    product, _ = clock(lambda: f @ f[0], repeats=7)
    norm, _ = clock(lambda: np.linalg.norm(f, axis=1), repeats=3)
    start = time.process_time()
    for target in targets:
        sampler.draw(int(target), rng)
    draw = (time.process_time() - start) / len(targets)
    formula, _ = clock(lambda: draw_log_probabilities(f[0], f, sampler.w), repeats=2)
    return [
        ("one matrix-vector product (sgemv)", product),
        ("one np.linalg.norm of the rows", norm),
        ("a draw, exact by rejection", draw),
        ("Eq. 1 in double precision, all of it", formula),
    ]


def placements(n: int = 40) -> dict[str, tuple[float, float]]:
    """Mean overlap and processor milliseconds of placements, between glands of phantom tissue."""
    from helpers import phantom

    masks = []
    for i in range(6):
        glands = phantom.render(i, seed=3, grade="moderate", size=(256, 256)).glands
        masks += [glands == k for k in range(1, glands.max() + 1)]
    masks = [m for m in masks if 0.01 < m.mean() < 0.3 and not _cut(m)]
    rng, rows = np.random.default_rng(0), {}
    pairs = [rng.choice(len(masks), 2, replace=False) for _ in range(n)]
    for name, place in (
        ("moments, no mirror", lambda s, t: affine_from_moments(s, t, mirror=False)),
        ("moments", affine_from_moments),
        ("fit", affine_by_fit),
    ):
        seconds, affines = clock(lambda p=place: [p(masks[a], masks[b]) for a, b in pairs])
        overlaps = [
            iou(warp_mask(masks[a], affine, masks[b].shape), masks[b])
            for (a, b), affine in zip(pairs, affines, strict=True)
        ]
        rows[name] = (float(np.mean(overlaps)), 1000 * seconds / n)
    return rows


def _cut(mask: np.ndarray) -> bool:
    return bool(mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[5_000, 20_000, 50_000])
    parser.add_argument("--draws", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--components", type=int, default=128)
    o = parser.parse_args(argv)
    times = {n: of_size(n, o.features, o.components) for n in o.sizes}
    small = o.sizes[0]
    print(f"processor seconds, {o.features} features, {o.components} components; in brackets the")
    print(f"cost a segment relative to {small} segments (1: linear)\n")
    print(f"{'':14s}" + "".join(f"{n:>20d}" for n in o.sizes))
    for step in times[small]:
        cells = [
            f"{times[n][step]:10.2f} ({times[n][step] / n / (times[small][step] / small):5.2f})"
            for n in o.sizes
        ]
        print(f"{step:14s}" + "".join(f"{cell:>20s}" for cell in cells))
    rows = draw_table(o.draws, o.components)
    print(f"\na pool of {o.draws} segments, {o.components} components")
    print(f"{'':40s}{'ms':>8s}{'/ sgemv':>9s}{'/ norm':>9s}")
    for name, seconds in rows:
        print(
            f"{name:40s}{1000 * seconds:8.1f}{seconds / rows[0][1]:9.2f}{seconds / rows[1][1]:9.2f}"
        )
    print("\nplacement of phantom glands, moderately differentiated")
    for name, (overlap, ms) in placements().items():
        print(f"{name:40s}overlap {overlap:.3f}{ms:9.1f} ms")


if __name__ == "__main__":
    main()
