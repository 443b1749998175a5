"""Figures of the book: every plot is drawn here, from arrays, and returned.

No other helper imports matplotlib.
Colours are those of Okabe and Ito, which stay apart for colour-blind readers; sizes are made for
the column of the book (about 7.5 inches wide), where text is read at its printed size.
"""

from __future__ import annotations

import contextlib
import itertools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike
from scipy.ndimage import binary_dilation, binary_erosion
from skimage.segmentation import find_boundaries

#: Okabe-Ito colours, strongest contrast first; a dark grey in place of yellow, pale on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#404040")

#: Of dots and outlines on tissue: no stain has this colour, RGB in [0, 1].
YELLOW = (1.0, 0.93, 0.2)

#: Of the region that a composite leaves to be inpainted: as bright, and no stain either.
GREEN = (0.0, 0.85, 0.35)

#: Width of a figure, inches.
WIDTH = 7.5


def use_style() -> None:
    """Set the look of the book's figures; call it once in a notebook, before the first figure."""
    _show_each_figure_once()
    plt.rcParams.update(
        {
            "figure.dpi": 144,
            "savefig.dpi": 144,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "axes.titlesize": 10,
            "axes.labelsize": 10,
            "legend.fontsize": 9,
            "xtick.labelsize": 9,
            "ytick.labelsize": 9,
            "axes.prop_cycle": mpl.cycler(color=PALETTE),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e3e3e3",
            "grid.linewidth": 0.7,
            "lines.linewidth": 1.8,
            "legend.frameon": False,
            "image.interpolation": "antialiased",
        }
    )


def _subplots(*args: Any, **settings: Any) -> tuple[Figure, Any]:
    """As ``plt.subplots``, but pyplot lets go of the figure, so that a notebook shows it once."""
    figure, axes = plt.subplots(*args, **settings)
    plt.close(figure)
    return figure, axes


def _show_each_figure_once() -> None:
    """In a notebook, show a figure that ends a cell once, and close it.

    The inline backend shows every open figure after a cell, and the cell's value besides.
    """
    import sys

    if "IPython" not in sys.modules or (shell := sys.modules["IPython"].get_ipython()) is None:
        return
    if "inline" not in mpl.get_backend():
        return
    from matplotlib_inline.backend_inline import flush_figures

    plt.switch_backend(mpl.get_backend())

    def show(result: Any) -> None:
        if isinstance(result.result, Figure):
            plt.close("all")
        else:
            flush_figures()

    with contextlib.suppress(ValueError):
        shell.events.unregister("post_execute", flush_figures)
        shell.events.register("post_run_cell", show)


def palette(n: int) -> np.ndarray:
    """Return `n` colours that are told apart: the palette first, then a turn of the hue circle.

    Returns
    -------
    (n, 3) float64 ndarray
        RGB in [0, 1].
    """
    base = np.array([mpl.colors.to_rgb(colour) for colour in PALETTE])
    if n <= len(base):
        return base[:n]
    hue = (0.13 + 0.61803398875 * np.arange(n - len(base))) % 1.0
    value = np.where(np.arange(len(hue)) % 2, 0.95, 0.7)
    more = mpl.colors.hsv_to_rgb(np.stack([hue, np.full_like(hue, 0.75), value], axis=1))
    return np.concatenate([base, more])


def image_grid(
    images: Sequence[np.ndarray],
    *,
    titles: Sequence[str] | None = None,
    ncols: int = 4,
    rows: Sequence[str] | None = None,
    width: float = WIDTH,
    cmap: str = "viridis",
    **show: Any,
) -> Figure:
    """Show images in a grid without axes.

    Parameters
    ----------
    images : sequence of (H, W, 3) uint8 or (H, W) ndarray
        Pictures, row by row; None leaves a place empty. 2-D arrays are shown with `cmap`.
    titles : sequence of str, optional
        Title of each picture; if there are only `ncols` of them, they head the columns. Titles
        and row labels that are too long for their picture go over several lines.
    ncols : int
        Pictures in a row.
    rows : sequence of str, optional
        Label at the left of each row.
    width : float
        Width of the figure, inches.
    cmap : str
        Colour map of 2-D arrays.
    **show
        Further arguments of ``Axes.imshow``, e.g. ``vmin``.

    Returns
    -------
    Figure
    """
    images = list(images)
    if not images:
        raise ValueError("image_grid got no images: give at least one")
    ncols = min(ncols, len(images))
    nrows = -(-len(images) // ncols)
    first = next((image for image in images if image is not None), np.ones((1, 1)))
    aspect = np.shape(first)[0] / np.shape(first)[1]
    side = width / ncols
    titles = [wrapped(title, side) for title in (() if titles is None else titles)]
    rows = [wrapped(row, side * aspect) for row in (() if rows is None else rows)]
    heads = [titles[i : i + ncols] for i in range(0, len(titles), ncols)]
    lines = sum(1 + max(title.count("\n") for title in head) for head in heads)
    title_height = 0.18 * lines + 0.06 * len(heads)
    figure, axes = _subplots(
        nrows, ncols, figsize=(width, nrows * aspect * side + title_height), squeeze=False
    )
    for index, axis in enumerate(axes.flat):
        bare(axis)
        if index >= len(images) or images[index] is None:
            axis.set_visible(False)
            continue
        axis.imshow(images[index], cmap=cmap, **show)
        if index < len(titles):
            axis.set_title(titles[index])
    longest = max((len(line) for row in rows for line in row.split("\n")), default=1)
    fitting = 72 * side * aspect / (0.65 * longest)  # points, of letters about 0.6 as wide as high
    size = min(mpl.rcParams["axes.labelsize"], fitting)
    for label, axis in zip(rows, axes[:, 0], strict=False):
        axis.set_ylabel(label, fontsize=size)
    return figure


def wrapped(label: str, inches: float) -> str:
    """Break a label into lines that fit a length; a word that is too long keeps its line."""
    width = max(1, int(13 * inches))  # characters of the book's font an inch
    lines = [textwrap.wrap(line, width, break_long_words=False) for line in str(label).split("\n")]
    return "\n".join(line for part in lines for line in part)


def bare(axis: Axes) -> Axes:
    """Take ticks, grid and frame from an axis that shows a picture."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)
    return axis


def overlay(
    image: np.ndarray,
    labels: np.ndarray | Sequence[np.ndarray],
    *,
    alpha: float = 0.35,
    outline: bool = True,
    colours: ArrayLike | None = None,
) -> np.ndarray:
    """Tint the segments of an image and draw their outlines.

    Parameters
    ----------
    image : (H, W, 3) uint8 ndarray
        Picture underneath.
    labels : (H, W) int or bool ndarray, or (m, H, W) bool ndarray
        Label map, where 0 is left alone, a single mask, or a stack of masks, large ones painted
        first.
    alpha : float
        Strength of the tint, 0 to 1; 0 draws outlines only.
    outline : bool
        Draw outlines at full strength.
    colours : (m, 3) array_like, optional
        RGB in [0, 1] of each segment; by default :func:`palette`.

    Returns
    -------
    (H, W, 3) uint8 ndarray
        To be shown with :func:`image_grid`.
    """
    labels = _label_map(np.asarray(labels))
    if labels.shape != image.shape[:2]:
        raise ValueError(
            f"labels of shape {labels.shape} do not lie on an image of shape {image.shape[:2]}"
        )
    count = int(labels.max(initial=0))
    colours = palette(count) if colours is None else np.asarray(colours, dtype=float)
    table = np.concatenate([np.zeros((1, 3)), colours])[np.minimum(labels, len(colours))] * 255
    weight = np.where(labels > 0, alpha, 0.0)[..., None]
    if outline:
        edge = find_boundaries(labels, mode="inner")
        if (thick := max(image.shape) // 200) > 1:
            edge = binary_dilation(edge, iterations=thick - 1)
        weight[edge & (labels > 0)] = 1.0
    return np.rint(image * (1 - weight) + table * weight).astype(np.uint8)


def outline(image: np.ndarray, mask: np.ndarray, *, colour: Sequence[float] = YELLOW) -> np.ndarray:
    """Draw a line with a dark rim around a segment, so that it shows on any stain.

    Parameters
    ----------
    image : (H, W, 3) uint8 ndarray
    mask : (H, W) bool ndarray
        The line is drawn on its outermost pixels, the rim outside.
    colour : (3,) sequence of float
        RGB in [0, 1].

    Returns
    -------
    (H, W, 3) uint8 ndarray
        To be shown with :func:`image_grid`.
    """
    width = max(1, round(max(image.shape[:2]) / 90))
    line = mask & ~binary_erosion(mask, iterations=width)
    rim = binary_dilation(mask, iterations=max(1, width // 2)) & ~mask
    return _lined(image, line, rim, colour)


def boundaries(
    image: np.ndarray, labels: np.ndarray, *, colour: Sequence[float] = YELLOW
) -> np.ndarray:
    """Draw lines with dark rims where labels meet, so that they show on any stain.

    Parameters
    ----------
    image : (H, W, 3) uint8 ndarray
    labels : (H, W) int ndarray
        A partition, such as superpixels.
    colour : (3,) sequence of float
        RGB in [0, 1].

    Returns
    -------
    (H, W, 3) uint8 ndarray
        To be shown with :func:`image_grid`.
    """
    width = max(1, round(max(image.shape[:2]) / 256))
    line = find_boundaries(labels, mode="inner")
    if width > 1:
        line = binary_dilation(line, iterations=width - 1)
    return _lined(image, line, binary_dilation(line, iterations=width), colour)


def _lined(
    image: np.ndarray, line: np.ndarray, rim: np.ndarray, colour: Sequence[float]
) -> np.ndarray:
    """Paint a dark rim and a line on it."""
    out = image.copy()
    out[rim] = 20
    out[line] = np.rint(255 * np.asarray(colour))
    return out


def closeup(
    image: np.ndarray,
    mask: np.ndarray,
    *,
    around: np.ndarray | None = None,
    margin: float = 0.25,
    size: int = 180,
) -> np.ndarray:
    """Enlarge the surroundings of a segment, with its :func:`outline`.

    Parameters
    ----------
    image : (H, W, 3) uint8 ndarray
    mask : (H, W) bool ndarray
        The segment.
    around : (H, W) bool ndarray, optional
        What is to be in sight, not empty; by default the segment.
    margin : float
        Room at each side, relative to the longer side of the bounding box; there is less where
        the image ends.
    size : int
        Side of the result, pixels.

    Returns
    -------
    (size, size, 3) uint8 ndarray
    """
    around = mask if around is None else around
    longest = int(np.ptp(np.argwhere(around), axis=0).max()) + 1
    side = min(round((1 + 2 * margin) * longest), *mask.shape)
    window = most_of(around, side)
    how = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
    seen = cv2.resize(np.ascontiguousarray(image[window]), (size, size), interpolation=how)
    inside = cv2.resize(mask[window].astype(np.float32), (size, size)) > 0.5
    return outline(seen, inside)


def most_of(mask: np.ndarray, size: int) -> tuple[slice, slice]:
    """Square of an image that holds most of a mask, as near to the middle of the mask as can be.

    Parameters
    ----------
    mask : (H, W) bool ndarray
        If it is empty, the square is that in the middle of the image.
    size : int
        Side of the square, cut to the image's where that is smaller.

    Returns
    -------
    tuple of slice
        Rows and columns, within the image.
    """
    h, w = (min(size, side) for side in mask.shape)
    total = cv2.integral(mask.astype(np.uint8))
    held = total[h:, w:] - total[:-h, w:] - total[h:, :-w] + total[:-h, :-w]
    ties = np.argwhere(held == held.max())
    at = np.argwhere(mask if mask.any() else ~mask)
    middle = (at.min(0) + at.max(0) + 1 - (h, w)) / 2
    y, x = ties[((ties - middle) ** 2).sum(1).argmin()]
    return np.s_[y : y + h, x : x + w]


def _label_map(labels: np.ndarray) -> np.ndarray:
    if labels.ndim != 3:
        return labels.astype(np.int64)
    painted = np.zeros(labels.shape[1:], dtype=np.int64)
    for index in np.argsort(-labels.reshape(len(labels), -1).sum(1), kind="stable"):
        painted[labels[index]] = index + 1
    return painted


def lines(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike] | tuple[ArrayLike, ArrayLike, ArrayLike]],
    *,
    xlabel: str,
    ylabel: str,
    logx: bool = False,
    logy: bool = False,
    height: float = 3.0,
    markers: bool = False,
) -> Figure:
    """Draw named curves, each with its own colour and dash so that print keeps them apart.

    Parameters
    ----------
    curves : mapping of str to (x, y) or (x, y, error)
        Equal-length vectors; `error` draws a band of y minus and plus error. An axis of integers
        has ticks at integers only, and at all of them if they are few.
    xlabel, ylabel : str
        Axis labels, with units.
    logx, logy : bool
        Logarithmic axes.
    height : float
        Height of the figure, inches.
    markers : bool
        Mark each point.

    Returns
    -------
    Figure
    """
    figure, axis = _subplots(figsize=(WIDTH, height))
    dashes = ("-", "--", "-.", ":")
    for index, (name, curve) in enumerate(curves.items()):
        x, y = np.asarray(curve[0], dtype=float), np.asarray(curve[1], dtype=float)
        style = {"linestyle": dashes[index % 4], "marker": "osD^v"[index % 5] if markers else None}
        (line,) = axis.plot(x, y, label=name, markersize=5, **style)
        if len(curve) == 3:
            error = np.asarray(curve[2], dtype=float)
            axis.fill_between(x, y - error, y + error, color=line.get_color(), alpha=0.18, lw=0)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    for k, (side, log) in enumerate(((axis.xaxis, logx), (axis.yaxis, logy))):
        given = [np.asarray(curve[k]) for curve in curves.values()]
        values = np.unique(np.concatenate(given)).astype(float)
        if log:
            axis.set(**{f"{'xy'[k]}scale": "log"})
            few = len(values) <= 12  # label the values themselves, but for those too near
            apart = [v for before, v in zip([0, *values], values, strict=False) if v > 1.3 * before]
            side.set_major_locator(FixedLocator(apart) if few else LogLocator(subs=(1, 2, 5)))
            side.set_major_formatter("{x:g}")
            side.set_minor_locator(NullLocator())
        elif all(each.dtype.kind in "iu" for each in given):
            few = len(values) <= 6 and np.ptp(values) < 12 * np.diff(values).min(initial=np.inf)
            integers = MaxNLocator("auto", integer=True)
            side.set_major_locator(FixedLocator(values) if few else integers)
    if len(curves) > 4:  # there is hardly a corner that so many leave free
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    elif len(curves) > 1:
        axis.legend()
    return figure


def bars(
    values: Mapping[str, float] | Mapping[str, Mapping[str, float]],
    *,
    ylabel: str,
    errors: Mapping[str, Any] | None = None,
    height: float = 3.0,
    fmt: str | None = "{:.2f}",
) -> Figure:
    """Draw bars with their values written on top; one group a key where values are mappings.

    Parameters
    ----------
    values : mapping of str to float, or of str to mapping of str to float
        ``{bar: value}`` or ``{group: {bar: value}}``.
    ylabel : str
        Label of the value axis, with units.
    errors : mapping, optional
        Of the same form: half length of the error bar, or a pair (below, above).
    height : float
        Height of the figure, inches.
    fmt : str, optional
        Format of the numbers; None writes none.

    Returns
    -------
    Figure
    """
    nested = all(isinstance(value, Mapping) for value in values.values())
    groups: dict[str, dict[str, float]] = (
        {group: dict(series) for group, series in values.items()}  # type: ignore[union-attr]
        if nested
        else {name: {"": float(value)} for name, value in values.items()}  # type: ignore[arg-type]
    )
    series = list(dict.fromkeys(name for group in groups.values() for name in group))
    figure, axis = _subplots(figsize=(WIDTH, height))
    step = 0.8 / max(len(series), 1)
    for index, name in enumerate(series):
        at = [g for g, group in enumerate(groups.values()) if name in group]
        drawn = [group[name] for group in groups.values() if name in group]
        x = np.array(at) - 0.4 + step * (index + 0.5)
        error = _errors(errors, groups, name, nested)
        container = axis.bar(x, drawn, step * 0.92, yerr=error, label=name or None, capsize=3)
        if fmt:
            axis.bar_label(container, [fmt.format(v) for v in drawn], padding=2, fontsize=8)
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set_ylabel(ylabel)
    axis.grid(axis="x", visible=False)
    axis.margins(y=0.12)
    if len(series) > 1:
        axis.legend(ncols=min(len(series), 4), loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def shares(samples: Mapping[str, ArrayLike], edges: ArrayLike) -> dict[str, dict[str, float]]:
    """Share of each sample in each range of values, as :func:`bars` draws them.

    Parameters
    ----------
    samples : mapping of str to (n,) array_like
        ``{name: values}``; those outside the edges count in no range.
    edges : (k + 1,) array_like
        Rising ends of the ranges. A value on an edge belongs to the range above it, one on the
        last to the last.

    Returns
    -------
    dict of str to dict of str to float
        ``{"0-0.2": {name: share}}``, shares from 0 to 1, of an empty sample 0.
    """
    counts = {
        name: np.histogram(values, edges)[0] / max(1, np.size(values))
        for name, values in samples.items()
    }
    return {
        f"{low:g}-{high:g}": {name: float(share[k]) for name, share in counts.items()}
        for k, (low, high) in enumerate(itertools.pairwise(np.asarray(edges)))
    }


#: Panels of :func:`sweeps` side by side; more would be too narrow for their labels.
_PANELS = 4


def sweeps(
    values: Mapping[str, Mapping[str, float]],
    *,
    chosen: Mapping[str, str],
    ylabel: str,
    noise: float = 0.0,
) -> Figure:
    """Draw what changing one parameter at a time does: a panel of dots for each parameter.

    Parameters
    ----------
    values : mapping of str to mapping of str to float
        ``{parameter: {setting: value}}``.
    chosen : mapping of str to str
        The setting in use, drawn in another colour, with a line through all of its panel.
    ylabel : str
        Label of the value axis that the panels share, with units. It need not begin at 0.
    noise : float
        Half width of the band around that line: differences as small as this mean nothing.

    Returns
    -------
    Figure
    """
    panels = list(values.items())
    parts = np.array_split(range(len(panels)), -(-len(panels) // _PANELS))
    rows = [[panels[i] for i in part] for part in parts]  # about as many in each
    figure = plt.figure(figsize=(WIDTH, 2.6 * len(rows)))
    plt.close(figure)
    for part, row in zip(figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        widths = [max(2, len(dots)) for _, dots in row]
        axes = part.subplots(1, len(row), sharey=True, squeeze=False, width_ratios=widths)[0]
        for axis, (name, dots) in zip(axes, row, strict=True):
            if (own := dots.get(chosen.get(name, ""))) is not None:
                axis.axhline(own, color=PALETTE[1], lw=1, zorder=1)
                axis.axhspan(own - noise, own + noise, color=PALETTE[1], alpha=0.15, lw=0)
            for x, (key, value) in enumerate(dots.items()):
                colour = PALETTE[1] if key == chosen.get(name) else PALETTE[0]
                axis.plot(x, value, "o", color=colour, markersize=5, zorder=2)
                label = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center"}
                axis.annotate(f"{value:.2f}", (x, value), fontsize=7, **label)
            turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
            axis.set_xticks(range(len(dots)), list(dots), fontsize=8, **turned)
            axis.set_title(name, fontsize=9)
            axis.grid(axis="x", visible=False)
            axis.set_xlim(-0.6, len(dots) - 0.4)
        axes[0].set_ylabel(ylabel)
    drawn = np.array([value for _, dots in panels for value in dots.values()])
    low, high = drawn.min() - noise, drawn.max() + noise
    for axis in figure.axes:
        axis.set_ylim(low - 0.06 * (high - low or 1), high + 0.12 * (high - low or 1))
    return figure


def _errors(
    errors: Mapping[str, Any] | None, groups: Mapping[str, Mapping[str, float]], name: str,
    nested: bool,
) -> np.ndarray | None:  # fmt: skip
    if errors is None:
        return None
    found = [
        np.broadcast_to(errors[group][name] if nested else errors[group], 2)
        for group, series in groups.items()
        if name in series
    ]
    return np.array(found, dtype=float).T


# --- 00 tissue -----------------------------------------------------------------------------------


def stain_ramps(ramps: Mapping[str, np.ndarray], densities: ArrayLike) -> Figure:
    """Show the colour that each dye, or mixture, takes on as its density rises.

    Parameters
    ----------
    ramps : mapping of str to (n, 3) ndarray
        Colours in [0, 255] of each row.
    densities : (n,) array_like
        Density that belongs to each colour.

    Returns
    -------
    Figure
    """
    densities = np.asarray(densities, dtype=float)
    figure, axes = _subplots(
        len(ramps), 1, figsize=(WIDTH, 0.62 * len(ramps) + 0.5), sharex=True, squeeze=False
    )
    for axis, (name, colours) in zip(axes[:, 0], ramps.items(), strict=True):
        strip = np.clip(np.rint(colours), 0, 255).astype(np.uint8)[None]
        axis.imshow(strip, aspect="auto", extent=(densities[0], densities[-1], 0, 1))
        axis.grid(False)
        axis.set_yticks([])
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    axes[-1, 0].set_xlabel("density of the dye (optical density units)")
    return figure


def labelled(image: np.ndarray, places: Mapping[str, tuple[float, float]]) -> Figure:
    """Show an image with names beside it, each with a line to the place that it names.

    The image takes the middle half of the width.

    Parameters
    ----------
    image : (H, W, 3) uint8 ndarray
    places : mapping of str to (float, float)
        XY in pixels. A name stands at the side that its place is nearer to.

    Returns
    -------
    Figure
    """
    h, w = image.shape[:2]
    figure, axis = _subplots(figsize=(WIDTH, WIDTH / 2 * h / w), layout="none")
    axis.set_position((0.25, 0, 0.5, 1))
    bare(axis).imshow(image)
    line = {"arrowstyle": "-", "color": "black", "shrinkA": 2, "shrinkB": 0}
    for right in (False, True):
        here = {name: at for name, at in places.items() if (at[0] >= w / 2) == right}
        here = dict(sorted(here.items(), key=lambda item: item[1][1]))
        heights = (np.arange(len(here)) + 0.5) / max(len(here), 1)
        for (name, at), y in zip(here.items(), heights, strict=True):
            axis.annotate(
                name, at, (1.05 if right else -0.05, 1 - y), textcoords="axes fraction",
                ha="left" if right else "right", va="center", arrowprops=line,
            )  # fmt: skip
            axis.plot(*at, "o", color=YELLOW, mec="black", ms=5)
    return figure


# --- chapters 03 and 04: pool and replacement -----------------------------------------------------


#: Groups that can be told apart by colour and marker.
_TELLABLE = 10


def embedding(
    points: np.ndarray,
    groups: Mapping[str, Sequence[str]],
    *,
    order: Mapping[str, Sequence[str]] | None = None,
    pictures: Callable[[int], np.ndarray] | None = None,
    n_pictures: int = 30,
) -> Figure:
    """Scatter points in the plane, one panel a grouping, with some of their pictures.

    Parameters
    ----------
    points : (n, 2) ndarray
        Positions.
    groups : mapping of str to sequence of n str
        ``{title of the panel: group of each point}``. Of more groups than colours can tell apart
        the first four of `order`, or else the four largest, are coloured, and the others grey.
    order : mapping of str to sequence of str, optional
        ``{title of the panel: its groups}`` in the order of their colours, which is that of the
        curves of :func:`lines` and :func:`bars`; by default that of their first points.
    pictures : callable, optional
        Number of a point -> (h, w, 3) uint8 ndarray; shown in a further panel, at points that lie
        well apart, and asked for there alone.
    n_pictures : int
        At most so many of them.

    Returns
    -------
    Figure
    """
    panels = len(groups) + (pictures is not None)
    figure, axes = _subplots(
        1, panels, figsize=(WIDTH, WIDTH / panels + 0.75), squeeze=False, layout="constrained"
    )
    span = np.ptp(points, axis=0)
    limits = [
        (points[:, k].min() - 0.07 * span[k], points[:, k].max() + 0.07 * span[k]) for k in (0, 1)
    ]
    for axis in axes.flat:
        bare(axis).set(xlim=limits[0], ylim=limits[1])
        axis.set_box_aspect(1)
    for axis, (title, labels) in zip(axes.flat, groups.items(), strict=False):
        labels = np.asarray(labels)
        names = list(dict.fromkeys([*(order or {}).get(title, ()), *labels]))
        if len(names) > _TELLABLE:
            if title not in (order or {}):
                names.sort(key=lambda name: -np.count_nonzero(labels == name))
            names = names[:4]
            others = ~np.isin(labels, names)
            axis.scatter(*points[others].T, s=6, color="0.78", label="others", lw=0)
        for index, (name, colour) in enumerate(zip(names, palette(len(names)), strict=True)):
            if not (at := labels == name).any():
                continue
            axis.scatter(
                *points[at].T, s=9, color=colour, marker="osD^v"[index % 5], label=name, lw=0
            )
        axis.set_title(title)
        axis.legend(
            loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2 if panels > 2 else 3,
            handletextpad=0.1, columnspacing=0.8, markerscale=1.6, fontsize=8,
        )  # fmt: skip
    if pictures is not None:
        axis = axes.flat[-1]
        axis.set_title("crops")
        side = 0.12
        for index in _spread(
            (points - points.min(axis=0)) / np.maximum(span, 1e-9), n_pictures, side
        ):
            x, y = points[index]
            half = np.array([span[0], span[1]]) * side / 2
            axis.imshow(
                pictures(index), extent=(x - half[0], x + half[0], y - half[1], y + half[1]),
                aspect="auto", zorder=2,
            )  # fmt: skip
        axis.set(xlim=limits[0], ylim=limits[1])
    return figure


def _spread(points: np.ndarray, n: int, apart: float) -> list[int]:
    """Up to `n` points of which no two are nearer than `apart` in both coordinates."""
    kept: list[int] = []
    for index in range(len(points)):
        if len(kept) < n and all(np.abs(points[index] - points[k]).max() > apart for k in kept):
            kept.append(index)
    return kept


def candidates(
    target: np.ndarray,
    crops: Sequence[np.ndarray],
    probabilities: Mapping[str, ArrayLike],
    *,
    titles: Sequence[str] | None = None,
) -> Figure:
    """A target and its candidates, with bars of their probabilities below.

    Parameters
    ----------
    target : (h, w, 3) uint8 ndarray
    crops : sequence of m (h, w, 3) uint8 ndarray
    probabilities : mapping of str to (m,) array_like
        ``{series: probability of each candidate}``.
    titles : sequence of m str, optional
        Above the crops.

    Returns
    -------
    Figure
    """
    m = len(crops)
    cell = WIDTH / (m + 1)
    figure = plt.figure(figsize=(WIDTH, cell + 2.2), layout="constrained")
    grid = figure.add_gridspec(2, m + 1, height_ratios=[cell, 1.9])
    for k, picture in enumerate([target, *crops]):
        axis = bare(figure.add_subplot(grid[0, k]))
        axis.imshow(picture)
        axis.set_title("target" if k == 0 else titles[k - 1] if titles is not None else f"{k}")
    axis = figure.add_subplot(grid[1, 1:])
    step = 0.8 / len(probabilities)
    for index, (name, values) in enumerate(probabilities.items()):
        axis.bar(np.arange(m) - 0.4 + step * (index + 0.5), values, step * 0.92, label=name)
    axis.set(xlim=(-0.5, m - 0.5), xticks=[], ylabel="probability")
    axis.grid(axis="x", visible=False)
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(probabilities))
    return figure


def principal_axes(
    images: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    moments: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    titles: Sequence[str],
) -> Figure:
    """Images with the outline of a mask, its centroid, its principal axes and their ellipse.

    Parameters
    ----------
    images : sequence of (H, W, 3) uint8 ndarray
    masks : sequence of (H, W) bool ndarray
    moments : sequence of ((2,), (2, 2)) ndarray
        Centroid (x, y) and covariance of each mask.
    titles : sequence of str

    Returns
    -------
    Figure
    """
    n = len(images)
    figure, axes = _subplots(1, n, figsize=(WIDTH, WIDTH / n + 0.3), squeeze=False)
    turn = np.linspace(0, 2 * np.pi, 100)
    for axis, image, mask, (centre, covariance), title in zip(
        axes.flat, images, masks, moments, titles, strict=True
    ):
        bare(axis).imshow(image)
        axis.contour(mask.astype(float), [0.5], colors=["#000000"], linewidths=1.2)
        values, vectors = np.linalg.eigh(covariance)
        radii = 2 * np.sqrt(values)  # semi-axes of the ellipse with these second moments
        ellipse = centre + (vectors * radii @ np.stack([np.cos(turn), np.sin(turn)])).T
        axis.plot(*ellipse.T, color=YELLOW, lw=1.6)
        for k, colour in ((1, PALETTE[1]), (0, PALETTE[5])):
            ends = centre + np.outer([-1, 1], vectors[:, k] * radii[k])
            axis.plot(*ends.T, color=colour, lw=2)
        axis.plot(*centre, "o", color="white", mec="black", ms=4)
        axis.set(title=title, xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))
    return figure


def mark(image: np.ndarray, points: ArrayLike, *, colour: Sequence[float] = YELLOW) -> np.ndarray:
    """Draw dots with a dark rim on a picture, smaller ones where there are many.

    Parameters
    ----------
    image : (H, W, 3) uint8 ndarray
    points : (n, 2) array_like
        XY in pixels.
    colour : (3,) or (n, 3) sequence of float
        RGB in [0, 1].

    Returns
    -------
    (H, W, 3) uint8 ndarray
        To be shown with :func:`image_grid`.
    """
    points = np.asarray(points, dtype=float).reshape(-1, 2)
    colours = np.broadcast_to(np.asarray(colour, dtype=float), (len(points), 3)) * 255
    crowd = np.clip(np.sqrt(len(points) / 100), 1.0, 1.5)
    out, radius, rim = image.copy(), max(image.shape) / 90 / crowd, 1.2 / crowd
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    for (px, py), rgb in zip(points, colours, strict=True):
        distance = np.hypot(x - px, y - py)
        out[distance <= radius + rim] = 20
        out[distance <= radius] = np.rint(rgb)
    return out


def identity_clusters(
    vectors: np.ndarray, clusters: np.ndarray, *, anchor: int, side: float
) -> Figure:
    """Draw identity vectors: centroids on the left, horizontal position against size on the right.

    Parameters
    ----------
    vectors : (K, 3) float ndarray
        (X, Y, sqrt(CNT)) in pixels.
    clusters : (K,) int ndarray
        Cluster of each vector.
    anchor : int
        Row of the anchor, ringed.
    side : float
        Side of the image in pixels, for the axes.

    Returns
    -------
    Figure
    """
    figure, axes = _subplots(1, 2, figsize=(WIDTH, 3.4))
    marks = "osD^vP*X<>"
    order = np.argsort(-np.bincount(clusters), kind="stable")
    for axis, column, label in ((axes[0], 1, "Y, pixels"), (axes[1], 2, "√CNT, pixels")):
        for rank, c in enumerate(order):
            rows = vectors[clusters == c]
            name = f"{len(rows)} proposal{'s' if len(rows) > 1 else ''}"
            axis.scatter(
                rows[:, 0], rows[:, column], s=42, marker=marks[rank % len(marks)], alpha=0.85,
                color=PALETTE[rank % len(PALETTE)], label=name, edgecolor="white", linewidth=0.6,
            )  # fmt: skip
        axis.scatter(
            vectors[anchor, 0], vectors[anchor, column], s=190, facecolor="none",
            edgecolor="black", linewidth=1.4, label="anchor",
        )  # fmt: skip
        axis.set(xlabel="X, pixels", ylabel=label, xlim=(0, side), ylim=(0, side))
    axes[0].invert_yaxis()
    axes[0].set_aspect("equal")
    axes[1].set_aspect("equal")
    axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def training_curves(
    curve: Sequence[Mapping[str, float]], panels: Mapping[str, Mapping[str, str]]
) -> Figure:
    """Draw the curves of a training run, one panel a quantity.

    Parameters
    ----------
    curve : sequence of mapping
        Records with a ``step`` each; a key that a record lacks is left out of its curve.
    panels : mapping of str to mapping of str to str
        ``{label of the vertical axis: {key of the records: name of the curve}}``.

    Returns
    -------
    Figure
    """
    figure, axes = _subplots(1, len(panels), figsize=(WIDTH, 3.0), squeeze=False)
    dashes = ("-", "--", "-.", ":")
    for axis, (ylabel, keys) in zip(axes[0], panels.items(), strict=True):
        for index, (key, name) in enumerate(keys.items()):
            rows = [record for record in curve if key in record]
            axis.plot(
                [record["step"] for record in rows], [record[key] for record in rows],
                label=name, linestyle=dashes[index % 4], marker="o" if len(rows) < 25 else None,
                markersize=3.5,
            )  # fmt: skip
        axis.set(xlabel="step", ylabel=ylabel)
        if len(keys) > 1:  # below, where it covers no curve
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=min(2, len(keys)))
    return figure


def sde_paths(
    times: np.ndarray,
    forward: np.ndarray,
    backward: np.ndarray,
) -> Figure:
    """Paths of a one-dimensional SDE into noise and back, with the histogram of their ends.

    At most 30 paths are drawn; the histograms are of all.

    Parameters
    ----------
    times : (n + 1,) ndarray
        Times of the points, 0 to 1.
    forward, backward : (n + 1, m) ndarray
        Paths, one column each; both arrays are ordered by time, so that ``backward[0]`` is where
        the way back ends.

    Returns
    -------
    Figure
    """
    figure, axes = _subplots(1, 4, figsize=(WIDTH, 3.2), sharey=True, width_ratios=(1, 4, 4, 1))
    for axis, paths, title in (
        (axes[1], forward, "forward: into noise"),
        (axes[2], backward, "backward: out of noise"),
    ):
        axis.plot(times, paths[:, :30], color=PALETTE[0], lw=0.6, alpha=0.55)
        axis.set(title=title, xlabel="time $t$")
    axes[2].invert_xaxis()
    edges = np.linspace(-3.5, 3.5, 57)
    for axis, values, title in ((axes[0], forward[0], "start"), (axes[3], backward[0], "end")):
        axis.hist(values, edges, orientation="horizontal", color=PALETTE[1], density=True)
        axis.set(title=title, xticks=[])
        axis.grid(False)
    axes[0].set(ylabel="$z$", ylim=(-3.5, 3.5))
    return figure


def posterior_errors(
    alphas: Sequence[float],
    mcg: np.ndarray,
    others: Mapping[str, np.ndarray],
) -> Figure:
    """Error of mean and covariance of samples against an exact posterior, by gradient weight.

    Parameters
    ----------
    alphas : (k,) sequence of float
        Weights of the gradient.
    mcg : (k, p, 2) ndarray
        Error of mean and of covariance for each weight and each of p priors.
    others : mapping of str to (p, 2) ndarray
        The same for methods without a weight, drawn as horizontal lines.

    Returns
    -------
    Figure
    """
    figure, axes = _subplots(1, 2, figsize=(WIDTH, 3.0))
    for axis, j, title in (
        (axes[0], 0, "error of the mean"),
        (axes[1], 1, "error of the covariance"),
    ):
        mean, error = mcg[..., j].mean(1), mcg[..., j].std(1) / np.sqrt(mcg.shape[1])
        axis.plot(alphas, mean, marker="o", markersize=5, label="mcg", color=PALETTE[0])
        axis.fill_between(alphas, mean - error, mean + error, color=PALETTE[0], alpha=0.18, lw=0)
        for index, (name, values) in enumerate(others.items()):
            mean, error = values[:, j].mean(), values[:, j].std() / np.sqrt(len(values))
            look = {"color": PALETTE[index + 1]}
            axis.axhline(mean, ls=("--", "-.", ":")[index % 3], label=name, **look)
            axis.axhspan(mean - error, mean + error, alpha=0.18, lw=0, **look)
        axis.set(title=title, xlabel="gradient weight $\\alpha$")
        axis.set_ylim(bottom=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def forest(
    estimates: Mapping[str, Any],
    *,
    xlabel: str,
) -> Figure:
    """Draw values with their intervals, one row each, around a line at zero.

    Parameters
    ----------
    estimates : mapping of str to (value, low, high), or of str to such a mapping
        Rows from top to bottom; of a mapping of mappings, panels side by side with the same rows.
        What does not reach zero is filled.
    xlabel : str
        Label of the axis.

    Returns
    -------
    Figure
    """
    nested = all(isinstance(rows, Mapping) for rows in estimates.values())
    panels = dict(estimates) if nested and estimates else {"": estimates}
    names = list(dict.fromkeys(name for rows in panels.values() for name in rows))
    figure, axes = _subplots(
        1, len(panels), figsize=(WIDTH, 0.9 + 0.3 * max(1, len(names))), sharey=True,
        squeeze=False,
    )  # fmt: skip
    for axis, (title, rows) in zip(axes[0], panels.items(), strict=True):
        axis.axvline(0, color="0.4", lw=1)
        for name, (value, low, high) in rows.items():
            y, clear = names.index(name), low > 0 or high < 0
            axis.plot([low, high], [y, y], color=PALETTE[0], lw=2, alpha=1.0 if clear else 0.6)
            axis.plot(value, y, "o", color=PALETTE[0], mfc=PALETTE[0] if clear else "white")
        axis.set_yticks(range(len(names)), names)
        axis.set(xlabel=xlabel, ylim=(max(1, len(names)) - 0.5, -0.5), title=title)
        axis.grid(axis="y", visible=False)
    return figure


def confusions(matrices: Mapping[str, np.ndarray], classes: Sequence[str]) -> Figure:
    """Draw confusion matrices side by side, shaded by the share of their row.

    Parameters
    ----------
    matrices : mapping of str to (C, C) ndarray
        Counts, rows true classes.
    classes : sequence of str
        Names of the C classes.

    Returns
    -------
    Figure
    """
    ncols = min(2, len(matrices))
    nrows = -(-len(matrices) // ncols)
    figure, axes = _subplots(nrows, ncols, figsize=(WIDTH, nrows * WIDTH / 2.1), squeeze=False)
    figure.get_layout_engine().set(h_pad=0.12)
    for axis in axes.flat[len(matrices) :]:
        axis.remove()
    for axis, (title, matrix) in zip(axes.flat, matrices.items(), strict=False):
        matrix = np.asarray(matrix)
        share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(matrix):
            colour = "white" if share[row, column] > 0.55 else "0.15"
            axis.text(column, row, f"{count:g}", ha="center", va="center", color=colour)
        axis.set_xticks(range(len(classes)), classes, rotation=30, ha="right")
        axis.set_yticks(range(len(classes)), classes)
        axis.set(title=title, xlabel="predicted", ylabel="true")
        axis.grid(False)
    return figure
