"""Small segments for the tests of the segment table and of the pool."""

import numpy as np
import pandas as pd

H, W = 40, 48


def disc(x, y, r, shape=(H, W)):
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return np.hypot(columns - x, rows - y) <= r


def records(n=6, split="train"):
    return pd.DataFrame(
        [
            {
                "image_id": f"im{i}", "label": "ab"[i % 2], "split": split, "patient": i // 2,
                "site": "A", "dataset": "toy", "height": H, "width": W,
            }
            for i in range(n)
        ]
    )  # fmt: skip


def masks(n=6, m=4, seed=0):
    rng = np.random.default_rng(seed)
    return {
        f"im{i}": np.stack([disc(*rng.uniform(8, 32, 2), rng.uniform(2, 6)) for _ in range(m)])
        for i in range(n)
    }
