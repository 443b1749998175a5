"""Classical and automatic segmentations that the anchors are compared with, at an equal number.

The more segments, the easier it is to hit a gland, so every method is asked for as many segments
as the anchors have in the same image.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy.sparse import coo_matrix
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import Sam
from skimage.color import rgb2lab
from skimage.segmentation import felzenszwalb
from sklearn.cluster import AgglomerativeClustering

from helpers.anchors import Prompted, anchors, match_glands, n_asked, take
from helpers.images import check_image
from helpers.sam import default_batch
from helpers.superpixels import slic_labels

#: Compactness and sigma of SLIC as a baseline: the customary ones, smoothed.
_SLIC = (10.0, 2.0)


def slic_alone(image: np.ndarray, n: int) -> np.ndarray:
    """Segments by SLIC alone, about `n` of them.

    Parameters
    ----------
    image : (H, W, 3) uint8 ndarray
    n : int
        Number of segments; the number asked of SLIC is adjusted until the number returned is
        nearest to it.

    Returns
    -------
    (m, H, W) bool ndarray
        They tile the image.
    """
    image = check_image(image)

    def attempt(ask: float) -> np.ndarray:
        return slic_labels(image, max(1, round(ask)), *_SLIC)

    return _nearest_count(attempt, n, start=n, rising=True)


def slic_merged(image: np.ndarray, n: int, *, finer: int = 8) -> np.ndarray:
    """Segments by SLIC and merging of regions, exactly `n` where SLIC gives that many.

    `finer` times `n` superpixels are merged along their region adjacency graph, always the two
    neighbours whose union adds least to the variance of the Lab colour (Ward's criterion).

    Returns
    -------
    (m, H, W) bool ndarray
        They tile the image.
    """
    _check_count(n)
    image = check_image(image)
    labels = slic_labels(image, finer * n, *_SLIC)
    count = np.bincount(labels.ravel())
    if len(count) <= n:
        return _masks(labels)
    lab = rgb2lab(image).reshape(-1, 3)
    mean = np.stack([np.bincount(labels.ravel(), c) / count for c in lab.T], axis=1)
    merge = AgglomerativeClustering(n, connectivity=_adjacency(labels), linkage="ward")
    return _masks(merge.fit_predict(mean)[labels])


def graph_based(image: np.ndarray, n: int) -> np.ndarray:
    """Segments by the graph method of Felzenszwalb and Huttenlocher, about `n` of them.

    The scale is adjusted until the number returned is nearest to `n`.

    Returns
    -------
    (m, H, W) bool ndarray
        They tile the image.
    """
    image = check_image(image)
    min_size = max(20, round(0.001 * image.shape[0] * image.shape[1]))

    def attempt(scale: float) -> np.ndarray:
        return felzenszwalb(image, scale=scale, sigma=1.0, min_size=min_size)

    return _nearest_count(attempt, n, start=300.0, rising=False)


def automatic(
    sam: Sam,
    image: np.ndarray,
    n: int,
    *,
    n_prompts: int = 450,
    crop_n_layers: int = 2,
    min_area: float = 0.002,
    max_area: float = 0.9,
    iou_merge: float = 0.7,
) -> np.ndarray:
    """Segments by ``SamAutomaticMaskGenerator``: prompts on a grid, its `n` best masks.

    Its absolute thresholds suit the official checkpoints, whose scores another model need not
    share; so they are switched off, and its own suppression of overlaps and its ranking by
    predicted IoU choose. Masks that the anchors would drop for their size are dropped here too,
    before the `n` best are taken.

    Parameters
    ----------
    sam : Sam
    image : (H, W, 3) uint8 ndarray
    n : int
        Masks returned; fewer if the generator finds fewer.
    n_prompts : int
        Of all layers together. The side of the grid is chosen so that it comes nearest.
    crop_n_layers : int
        Layers of crops beside the whole image; each has as many prompts as the whole image.
    min_area, max_area : float
        Shares of the image.
    iou_merge : float
        Overlap of boxes from which the generator drops a mask: within a crop that of the lower
        predicted IoU, of two crops that of the larger crop.

    Returns
    -------
    (m, H, W) bool ndarray
    """
    _check_count(n)
    image = check_image(image)
    side = grid_side(n_prompts, crop_n_layers)
    generator = SamAutomaticMaskGenerator(
        sam,
        points_per_side=side,
        crop_n_layers=_layers(side, crop_n_layers),
        crop_n_points_downscale_factor=2,
        points_per_batch=default_batch(sam),
        pred_iou_thresh=0.0,
        stability_score_thresh=0.0,
        box_nms_thresh=iou_merge,
        crop_nms_thresh=iou_merge,
    )
    pixels = image.shape[0] * image.shape[1]
    found = generator.generate(image)
    found = [m for m in found if min_area * pixels <= m["area"] <= max_area * pixels]
    found.sort(key=lambda m: -m["predicted_iou"])
    masks = np.array([m["segmentation"] for m in found[:n]], bool)
    return masks.reshape(-1, *image.shape[:2])


def single_prompts(
    prompted: Sequence[Prompted], n: int, *, voted: bool = False, **settings
) -> np.ndarray:
    """Segments without any clustering: one prompt a superpixel, the `n` best by predicted IoU.

    Parameters
    ----------
    prompted : sequence of Prompted
        Of :func:`helpers.anchors.prompt`. The first prompt of each superpixel is taken.
    n : int
        Masks returned; fewer if there are fewer.
    voted : bool
        Take the mean outline of masks that agree, as of anchors; otherwise each keeps its own.
    **settings
        Of :func:`helpers.anchors.anchors`: sizes and duplicates are handled as for anchors. No
        predicted IoU is too low, since the `n` best are taken.

    Returns
    -------
    (m, H, W) bool ndarray
    """
    _check_count(n)
    alone = {"pred_iou_thresh": 0.0} | ({} if voted else {"iou_vote": 1.0})
    found = anchors(take(prompted, slice(1)), **{**settings, **alone})
    return found.masks[np.argsort(-found.scores, kind="stable")[:n]]


#: Methods that need no network; each takes an image and the number of segments.
CLASSICAL = {"SLIC": slic_alone, "SLIC, merged": slic_merged, "Felzenszwalb": graph_based}


def rivals(
    sam: Sam,
    image: np.ndarray,
    prompted: Sequence[Prompted],
    n: int,
    *,
    settings: Mapping[str, Any],
    crop_n_layers: int,
    with_automatic: bool = False,
) -> dict[str, Callable[[], np.ndarray]]:
    """The methods that the anchors of an image are compared with.

    Parameters
    ----------
    sam : Sam
    image : (H, W, 3) uint8 ndarray
    prompted : sequence of Prompted
        Of this image, as for :func:`single_prompts`.
    n : int
        Segments asked of each method.
    settings : mapping
        Of :func:`helpers.anchors.anchors`.
    crop_n_layers : int
        Of :func:`automatic`, which is asked for as many prompts as `prompted` has.
    with_automatic : bool
        Whether :func:`automatic`, which is slow, is among them.

    Returns
    -------
    dict of str to callable
        Name of each method, and (m, H, W) masks when called, so that each can be timed.
    """
    ways = {
        "single prompts": partial(single_prompts, prompted, n, **settings),
        "single prompts, voted": partial(single_prompts, prompted, n, voted=True, **settings),
    }
    ways |= {name: partial(method, image, n) for name, method in CLASSICAL.items()}
    if with_automatic:
        ways["automatic masks"] = partial(
            automatic, sam, image, n, n_prompts=n_asked(prompted),
            crop_n_layers=crop_n_layers,
            **{name: settings[name] for name in ("min_area", "max_area") if name in settings},
        )  # fmt: skip
    return ways


def judged(
    ways: Mapping[str, Callable[[], np.ndarray]],
    instances: np.ndarray,
    *,
    min_area: float = 0.0,
    spent: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Call each method and compare its segments with annotated glands.

    Parameters
    ----------
    ways : mapping of str to callable
        Name of each method, and (m, H, W) masks when called.
    instances : (H, W) int ndarray
        Gland instances, 0 = none.
    min_area : float
        Of :func:`helpers.anchors.match_glands`.
    spent : mapping of str to float, optional
        Seconds that a method has taken before it is called.

    Returns
    -------
    list of dict
        One a method: method, seconds, and what :func:`helpers.anchors.match_glands` gives.
    """
    rows = []
    for method, way in ways.items():
        start = time.perf_counter()
        masks = way()
        seconds = time.perf_counter() - start + (spent or {}).get(method, 0.0)
        match = match_glands(masks, instances, min_area=min_area)
        rows.append({"method": method, "seconds": seconds, **match})
    return rows


def grid_side(n_prompts: int, n_layers: int = 0) -> int:
    """Points a side of the grid with which the generator asks nearest to `n_prompts` in all.

    Layer l has 4^l crops, whose grids have 2^l times fewer points a side, rounded down.
    """

    def asked(side: int) -> int:
        return sum((2**k * (side // 2**k)) ** 2 for k in range(_layers(side, n_layers) + 1))

    return min(range(1, int(np.sqrt(n_prompts)) + 2), key=lambda side: abs(asked(side) - n_prompts))


def _layers(side: int, n_layers: int) -> int:
    """Layers of crops that have a prompt in each crop at least."""
    return min(n_layers, side.bit_length() - 1)


def _adjacency(labels: np.ndarray) -> coo_matrix:
    """Region adjacency graph: which labels have pixels side by side."""
    across = np.stack([labels[:, :-1].ravel(), labels[:, 1:].ravel()])
    down = np.stack([labels[:-1].ravel(), labels[1:].ravel()])
    pairs = np.concatenate([across, down], axis=1)
    pairs = np.unique(pairs[:, pairs[0] != pairs[1]], axis=1)
    n = int(labels.max()) + 1
    graph = coo_matrix((np.ones(pairs.shape[1]), pairs), shape=(n, n))
    return graph + graph.T


def _masks(labels: np.ndarray) -> np.ndarray:
    return labels[None] == np.unique(labels)[:, None, None]


def _check_count(n: int) -> None:
    if n < 1:
        raise ValueError(f"n = {n}; a baseline needs at least one segment.")


def _nearest_count(
    attempt: Callable[[float], np.ndarray], n: int, *, start: float, rising: bool, rounds: int = 6
) -> np.ndarray:
    """Search the parameter whose segmentation has the number of segments nearest to `n`."""
    _check_count(n)
    low, high, value, best = None, None, float(start), None
    for _ in range(rounds):
        labels = attempt(value)
        count = int(labels.max()) + 1
        if best is None or abs(count - n) < abs(int(best.max()) + 1 - n):
            best = labels
        if count == n:
            break
        if (count < n) == rising:
            low = value
        else:
            high = value
        if low is None or high is None:
            value = value * 2 if high is None else value / 2
        else:
            value = float(np.sqrt(low * high))
    return _masks(best)
