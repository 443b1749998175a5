"""Scores of a classifier, and how sure a difference between two classifiers is.

Everything is computed from confusion matrices, one a patient: a bootstrap sample of patients is a
weighted sum of them, so that thousands of samples cost one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pandas as pd
from scipy.stats import t as student
from statsmodels.stats.multitest import multipletests

#: Metrics of the paper's Table 1, in its order.
METRICS = ("accuracy", "macro_f1", "kappa")


def confusion(y, yhat, n_classes: int) -> np.ndarray:
    """Count pairs of true and predicted class.

    Parameters
    ----------
    y, yhat : (n,) int array_like
        True and predicted class indices in ``0 .. n_classes - 1``.
    n_classes : int
        Number of classes, whether they occur or not.

    Returns
    -------
    (n_classes, n_classes) int64 ndarray
        Rows are true classes, columns predicted ones.

    Raises
    ------
    ValueError
        If shapes differ, nothing is given, or an index is out of range.
    """
    y, yhat = _indices(y, "y", n_classes), _indices(yhat, "yhat", n_classes)
    if y.shape != yhat.shape:
        raise ValueError(
            f"y has shape {y.shape} but yhat {yhat.shape}: give one prediction an image"
        )
    counts = np.bincount(y * n_classes + yhat, minlength=n_classes**2)
    return counts.reshape(n_classes, n_classes)


def scores_from_confusion(matrix) -> dict[str, np.ndarray]:
    """Accuracy, macro F1 and quadratically weighted kappa of confusion matrices.

    Parameters
    ----------
    matrix : (..., C, C) array_like
        Confusion matrices, rows true classes; entries may be fractional weights.

    Returns
    -------
    dict of str to (...) float64 ndarray
        ``accuracy`` and ``macro_f1`` in [0, 1], ``kappa`` in [-1, 1].

    Notes
    -----
    The average of F1 runs over all C classes; a class that is neither present nor predicted has
    F1 = 0, as with ``zero_division=0`` in scikit-learn.
    Kappa = 1 - sum(w O) / sum(w E), w = (i - j)^2 [1]_. Where all truth and all predictions are one
    and the same class it is 0/0, and is set to 1: there is no disagreement.

    References
    ----------
    .. [1] J. Cohen, "Weighted kappa", Psychological Bulletin 70, 1968.
    """
    matrix = np.asarray(matrix, float)
    total = matrix.sum((-2, -1))
    true, predicted = matrix.sum(-1), matrix.sum(-2)
    hits = np.diagonal(matrix, axis1=-2, axis2=-1)
    f1 = 2 * hits / np.maximum(true + predicted, np.finfo(float).tiny)
    index = np.arange(matrix.shape[-1])
    weight = (index[:, None] - index[None, :]) ** 2.0
    observed = (weight * matrix).sum((-2, -1)) * total
    expected = (weight * true[..., :, None] * predicted[..., None, :]).sum((-2, -1))
    ratio = np.divide(observed, expected, out=np.zeros_like(observed), where=expected > 0)
    return {"accuracy": hits.sum(-1) / total, "macro_f1": f1.mean(-1), "kappa": 1 - ratio}


def scores(y, yhat, labels: int | Sequence) -> dict[str, float]:
    """Scores of one set of predictions.

    Parameters
    ----------
    y, yhat : (n,) array_like
        True and predicted classes: indices, or elements of `labels`.
    labels : int or sequence
        Number of classes, or all classes in grade order. They are fixed by the study, not by what
        happens to occur, so that scores of different subsets can be compared.

    Returns
    -------
    dict of str to float
        The metrics of :data:`METRICS`.
    """
    if isinstance(labels, int | np.integer):
        n_classes = int(labels)
    else:
        y, yhat = _lookup(y, labels, "y"), _lookup(yhat, labels, "yhat")
        n_classes = len(labels)
    found = scores_from_confusion(confusion(y, yhat, n_classes))
    return {name: float(value) for name, value in found.items()}


def average_relative_gain(scores: Mapping[str, float], baseline: Mapping[str, float]) -> float:
    """Mean relative gain over a baseline, in percent, as the paper's Table 1 summarises it.

    Parameters
    ----------
    scores, baseline : mapping of str to float
        The same metrics (of one or several test sets) for a method and for the baseline.

    Returns
    -------
    float
        100 * mean over metrics of (score - baseline) / baseline.

    Raises
    ------
    ValueError
        If the metrics differ, or a baseline is not positive (the gain is then undefined).
    """
    if set(scores) != set(baseline) or not scores:
        raise ValueError(
            f"scores has the metrics {sorted(scores)} but baseline {sorted(baseline)}: "
            "give the same ones, at least one"
        )
    bad = {name: value for name, value in baseline.items() if not value > 0}
    if bad:
        raise ValueError(
            f"a relative gain needs positive baselines, got {bad}: compare differences"
        )
    return float(
        100 * np.mean([(scores[name] - baseline[name]) / baseline[name] for name in scores])
    )


#: Weight that samples lose for a derivative.
_A_LITTLE = 1e-4
#: Up to so many ways to swap two methods patient by patient, all are gone through.
_ALL_SWAPS = 4096


@dataclass(frozen=True)
class Comparison:
    """Difference of a metric between two methods on the same images.

    Attributes
    ----------
    difference : float
        Metric of b minus metric of a, averaged over training seeds.
    low, high : float
        Percentile confidence interval of the difference.
    p : float
        Two-sided p-value of "no difference", from swapping the methods patient by patient.
    n_groups : int
        Patients resampled.
    """

    difference: float
    low: float
    high: float
    p: float
    n_groups: int


def paired_bootstrap(
    y,
    yhat_a,
    yhat_b,
    groups,
    *,
    labels: int | Sequence,
    metric: str = "accuracy",
    n_boot: int = 2000,
    level: float = 0.95,
    rng: np.random.Generator,
) -> Comparison:
    """Compare two methods by resampling patients, keeping predictions for one image together.

    Images of one patient are alike, so patients, not images, are drawn with replacement [1]_, and
    training seeds with them; both methods are scored on the same draw.
    The p-value comes from a permutation test [2]_: if the methods are equally good, their
    predictions for a patient may be swapped. It keeps its level with few patients, where an
    interval by bootstrap is too narrow: with n of them it is at least 2^(1-n). With up to twelve
    patients it is exact.

    Parameters
    ----------
    y : (n,) array_like
        True classes.
    yhat_a, yhat_b : (n,) or (n_seeds, n) array_like
        Predictions of the two methods; with several training seeds the metric is averaged over
        those drawn. Seed i of one method belongs to seed i of the other.
    groups : (n,) array_like
        Patient of each image.
    labels : int or sequence
        As in :func:`scores`.
    metric : str
        One of :data:`METRICS`.
    n_boot : int
        Bootstrap samples, and random swaps where there are more than that, and than 4096.
    level : float
        Coverage of the interval, in (0, 1).
    rng : numpy.random.Generator
        Source of the draws.

    Returns
    -------
    Comparison

    Raises
    ------
    ValueError
        For an unknown metric, fewer than two patients, an image without one, or shapes that do not
        agree.

    Notes
    -----
    Two or three seeds say little about how much trainings differ: with n of them the interval
    holds (n - 1) / n of that variance, and the p-value none, so that a verdict is one on the
    trainings at hand.

    References
    ----------
    .. [1] A. C. Davison, D. V. Hinkley, "Bootstrap Methods and their Application", 1997, 3.8.
    .. [2] The same, 4.3.
    """
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}: choose one of {', '.join(METRICS)}")
    _check_draws(n_boot, level)
    if (missing := pd.isna(np.asarray(groups, object))).any():
        raise ValueError(f"{missing.sum()} images have no patient: name one for each")
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"{len(names)} patient: resampling patients needs at least two")
    a = _by_group(y, yhat_a, index, len(names), labels)
    b = _by_group(y, yhat_b, index, len(names), labels)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} training seeds: give as many for both methods")
    patients, seeds = (_draw(n, n_boot, rng) for n in (len(names), len(a)))
    sample = _difference(a, b, patients, metric, seeds)
    low, high = np.quantile(sample, [(1 - level) / 2, (1 + level) / 2])
    difference = float(_difference(a, b, np.ones((1, len(names)), int), metric)[0])
    swaps, known = _swaps(len(names), n_boot, rng)
    null = _swapped(a, b, swaps, metric)
    p = (known + (np.abs(null) >= abs(difference) - 1e-12).sum()) / (known + len(null))
    return Comparison(difference, float(low), float(high), float(p), len(names))


def resampled(
    measure: Callable[..., float],
    *groups,
    n_boot: int = 1000,
    level: float = 0.95,
    rng: np.random.Generator,
) -> tuple[float, float, float]:
    """Value of a measure, and its interval by resampling groups of samples.

    Parameters
    ----------
    measure : callable
        Takes the weights of the samples, (n,) each for one of `groups`: how often each comes.
        Draws for which it is NaN do not count.
    *groups : (n,) array_like
        Group of each sample, e.g. the image it was cut from, of one or several sets of samples. The
        same groups are drawn for all sets, with replacement.
    n_boot : int
        Draws.
    level : float
        Coverage of the interval, in (0, 1).
    rng : numpy.random.Generator
        Source of the draws.

    Returns
    -------
    (float, float, float)
        Value of all samples, lower and upper end.

    Raises
    ------
    ValueError
        If there are fewer than two groups, or `n_boot` or `level` are out of range.
    """
    _check_draws(n_boot, level)
    sizes = [len(each) for each in groups]
    names, index = np.unique(np.concatenate([np.asarray(g) for g in groups]), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"{len(names)} group: resampling needs at least two")
    index = np.split(index, np.cumsum(sizes)[:-1])
    found = [measure(*(draw[i] for i in index)) for draw in _draw(len(names), n_boot, rng)]
    low, high = np.nanquantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(measure(*(np.ones(n) for n in sizes))), float(low), float(high)


def jackknife(
    measure: Callable[..., float],
    *shows: Sequence[Collection[str]],
    level: float = 0.95,
) -> tuple[float, float, float]:
    r"""Value of a measure, and its interval from how much each image matters [1]_.

    For samples that show several images each, as a composite shows its target and its sources:
    resampling one kind of image would take the others for independent. The influence U_i of an
    image is the derivative of the measure when all samples that show it count a little less, and
    the standard error of n images is the root of n / (n - 1) times the sum of U_i^2 (infinitesimal
    jackknife). Where samples show several images, it is rather too large.

    Parameters
    ----------
    measure : callable
        Takes the weights of the samples, (n,) each for one of `shows`, and depends smoothly on
        them.
    *shows : (n,) sequence of collections of str
        Images that each sample shows, of one or several sets of samples.
    level : float
        Coverage of the interval, in (0, 1).

    Returns
    -------
    (float, float, float)
        Value of all samples, lower and upper end: the value and its standard error times a quantile
        of Student's distribution with n - 1 degrees of freedom.

    Raises
    ------
    ValueError
        If there are fewer than two images, or `level` is out of range.

    References
    ----------
    .. [1] B. Efron, R. J. Tibshirani, "An Introduction to the Bootstrap", 1993, 21.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: need 0 < level < 1")
    names = dict.fromkeys(chain.from_iterable(chain.from_iterable(shows)))
    n = len(names)
    if n < 2:
        raise ValueError(f"{n} image: an interval needs at least two")
    value = float(measure(*(np.ones(len(each)) for each in shows)))
    less = (
        measure(*(np.array([1 - _A_LITTLE * (name in own) for own in each]) for each in shows))
        for name in names
    )
    influence = (np.fromiter(less, float, n) - value) / _A_LITTLE
    error = np.sqrt(n / (n - 1) * (influence**2).sum())
    reach = float(student.ppf((1 + level) / 2, n - 1) * error)
    return value, value - reach, value + reach


def holm(p) -> np.ndarray:
    """Adjust p-values of several comparisons by Holm's step-down method.

    Parameters
    ----------
    p : (n,) array_like
        Raw p-values in [0, 1].

    Returns
    -------
    (n,) float64 ndarray
        Adjusted p-values, in the order given; empty for no comparison.

    Raises
    ------
    ValueError
        If a value lies outside [0, 1].

    References
    ----------
    .. [1] S. Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    p = np.asarray(p, float).reshape(-1)
    if p.size == 0:
        return p
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values lie in [0, 1], got {p.tolist()}")
    return multipletests(p, method="holm")[1]


def verdict(
    difference: float, low: float, high: float, p_adjusted: float, *, alpha: float = 0.05
) -> str:
    """Put a comparison into words.

    Parameters
    ----------
    difference, low, high : float
        Difference and its confidence interval.
    p_adjusted : float
        p-value after correction for the number of comparisons.
    alpha : float
        Level of the test.

    Returns
    -------
    {"better", "worse", "no difference"}
        "no difference" means that none was shown, not that there is none.
    """
    shown = p_adjusted < alpha and (low > 0 or high < 0)
    if not shown:
        return "no difference"
    return "better" if difference > 0 else "worse"


def _by_group(y, yhat, index: np.ndarray, n_groups: int, labels) -> np.ndarray:
    """Confusion matrices of each training seed and patient, (n_seeds, n_groups, C, C)."""
    if isinstance(labels, int | np.integer):
        n_classes = int(labels)
    else:
        n_classes = len(labels)
        y, yhat = _lookup(y, labels, "y"), _lookup(yhat, labels, "yhat")
    y = _indices(y, "y", n_classes)
    yhat = np.atleast_2d(_indices(yhat, "yhat", n_classes))
    if yhat.shape[1:] != y.shape or index.shape != y.shape:
        raise ValueError(
            f"y has shape {y.shape}, predictions {yhat.shape} and groups {index.shape}: "
            "give one prediction and one patient for each image"
        )
    cell = (index * n_classes + y) * n_classes + yhat
    size = n_groups * n_classes**2
    counts = np.stack([np.bincount(row, minlength=size) for row in cell])
    return counts.reshape(len(yhat), n_groups, n_classes, n_classes)


def in_words(found: tuple[float, float, float], digits: int) -> str:
    """A change and its interval, with signs: +0.3 (-0.1 to +0.6)."""
    value, low, high = (f"{v:+.{digits}f}" for v in found)
    return f"{value} ({low} to {high})"


def _check_draws(n_boot: int, level: float) -> None:
    if n_boot < 1 or not 0 < level < 1:
        raise ValueError(f"n_boot is {n_boot} and level {level}: need n_boot >= 1, 0 < level < 1")


def _draw(n: int, n_boot: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of n comes in n draws with replacement, (n_boot, n)."""
    return rng.multinomial(n, np.full(n, 1 / n), size=n_boot)


def _difference(
    a: np.ndarray, b: np.ndarray, draws: np.ndarray, metric: str, seeds: np.ndarray | None = None
) -> np.ndarray:
    """Metric of b minus that of a for each draw of patients and of seeds, (n_boot,).

    A draw of few patients may have none of a class, which says nothing about its F1: the mean is
    that of the other classes then.
    """
    first, second = (  # exact as floats, too, whose products are ten times as fast
        np.einsum("bg,sgij->bsij", draws.astype(float), x.astype(float), optimize=True)
        for x in (a, b)
    )
    gain = scores_from_confusion(second)[metric] - scores_from_confusion(first)[metric]
    if metric == "macro_f1":
        there = [np.count_nonzero(x.sum(-1), axis=-1) for x in (a.sum(1), first)]
        gain = gain * there[0] / np.maximum(there[1], 1)
    return gain.mean(1) if seeds is None else np.average(gain, axis=1, weights=seeds)


def least_p(n_groups: int, n_boot: int) -> float:
    """Smallest p-value that :func:`paired_bootstrap` can give for so many patients and swaps."""
    drawn = 0.0 if _all_swaps(n_groups, n_boot) else 1 / (n_boot + 1)
    return max(2.0 ** (1 - n_groups), drawn)


def _all_swaps(n: int, n_boot: int) -> bool:
    return 2**n <= max(n_boot, _ALL_SWAPS)


def _swaps(n: int, n_boot: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Patients to swap, (k, n) of 0 and 1, and how many results are known beside them.

    All of them where there are few, which makes the p-value exact; else random ones, with the
    difference found as one more.
    """
    if _all_swaps(n, n_boot):
        return np.arange(2**n)[:, None] >> np.arange(n) & 1, 0
    return rng.integers(0, 2, (n_boot, n)), 1


def _swapped(a: np.ndarray, b: np.ndarray, swaps: np.ndarray, metric: str) -> np.ndarray:
    """The difference when the methods change places for the patients marked, (n_boot,)."""
    swaps = np.concatenate([1 - swaps, swaps], axis=1)
    first, second = np.concatenate([a, b], axis=1), np.concatenate([b, a], axis=1)
    return _difference(first, second, swaps, metric)


def _indices(values, name: str, n_classes: int) -> np.ndarray:
    values = np.asarray(values)
    if values.size == 0:
        raise ValueError(f"{name} is empty: there is nothing to score")
    if values.dtype.kind not in "iu":
        raise ValueError(f"{name} has dtype {values.dtype}: give class indices or pass labels")
    if values.min() < 0 or values.max() >= n_classes:
        raise ValueError(
            f"{name} has class {values.min()} .. {values.max()}, outside 0 .. {n_classes - 1}"
        )
    return values.astype(np.int64)


def _lookup(values, labels: Sequence, name: str) -> np.ndarray:
    order = {label: i for i, label in enumerate(labels)}
    values = np.asarray(values)
    unknown = sorted({str(v) for v in values.reshape(-1).tolist() if v not in order})
    if unknown:
        raise ValueError(
            f"{name} has classes {unknown} that are not among the labels {list(labels)}"
        )
    return np.array([order[v] for v in values.reshape(-1).tolist()], int).reshape(values.shape)
