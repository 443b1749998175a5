"""Measures of synthetic images: kernel distance of features, hardness and detection of the seam.

A few hundred images are far too few for the Frechet distance, which is biased upwards at small
samples [1]_; the kernel distance (KID) is unbiased at any size, if no sample is compared with
itself: a synthetic image shares pixels with its target and its sources, which `origins` tell. Pairs
that share an image are of one class, so that leaving them out would leave fewer pairs of one class
among synthetic images than among real ones; `classes` holds the shares of the pairs where they
were. The distance is always read beside that of real images from real images.

References
----------
.. [1] M. Binkowski et al., "Demystifying MMD GANs", ICLR 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import cv2
import numpy as np
from scipy import ndimage
from scipy.sparse import csr_array
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from helpers.images import check_image

#: Images that each sample of x and of y shows, and the class of each.
Origins = tuple[Sequence[Collection[str]], Sequence[Collection[str]]]
Classes = tuple[Sequence[str], Sequence[str]]

_NO_PAIRS = (
    "every pair of samples shares an image, of all or of two classes: give samples of more images"
)

#: Weights of red, green and blue in the luminance (Rec. 601).
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class Estimate:
    """Mean and standard deviation of an estimate over subsets.

    Attributes
    ----------
    mean, std : float
        Over the subsets.
    subset_size, n_subsets : int
        How many samples a subset held of the side of which it held fewer, and how many subsets
        counted.
    """

    mean: float
    std: float
    subset_size: int
    n_subsets: int


def polynomial_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Cubic kernel k(a, b) = (a . b / d + 1)^3 of the kernel distance.

    Parameters
    ----------
    x : (n, d) float ndarray
    y : (m, d) float ndarray

    Returns
    -------
    (n, m) float64 ndarray
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    return (x @ y.T / x.shape[1] + 1) ** 3


def mmd2(
    x: np.ndarray,
    y: np.ndarray,
    *,
    origins: Origins | None = None,
    classes: Classes | None = None,
) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy of two samples.

    Parameters
    ----------
    x : (n, d) float ndarray
    y : (m, d) float ndarray
        Features; n, m >= 2.
    origins : pair of sequences of n and m collections of str, optional
        Images whose pixels each sample of x and of y shows. Pairs that share one are left out of
        every mean, since they are alike for another reason than their distribution. By default no
        two samples share any.
    classes : pair of sequences of n and m str, optional
        Class of each sample of x and of y. Each of the three means is then one over pairs of
        classes, weighted by the shares of the classes in y: both sides have that mixture, and keep
        it when `origins` leaves pairs out. Samples of x of other classes do not count.

    Returns
    -------
    float
        About 0 for samples of one distribution; being unbiased it may be below 0.

    Raises
    ------
    ValueError
        If a side has fewer than two samples, of all or of a class, features differ in length or
        are not finite, or no pair of unrelated samples is left, of all or of two classes.
    """
    x, y = _features(x, "x"), _features(y, "y")
    rows = np.split(np.arange(len(x) + len(y)), [len(x)])
    found = _mmd2(_all_samples((x, y), origins, classes), *rows)
    if np.isnan(found):
        raise ValueError(_NO_PAIRS)
    return found


def kid(
    x: np.ndarray,
    y: np.ndarray,
    *,
    subset_size: int | None = None,
    n_subsets: int = 50,
    origins: Origins | None = None,
    classes: Classes | None = None,
    rng: np.random.Generator,
) -> Estimate:
    """Kernel distance between two samples of features, over random subsets.

    Parameters
    ----------
    x : (n, d) float ndarray
    y : (m, d) float ndarray
        Features of real and synthetic images.
    subset_size : int, optional
        Samples of each side in a subset, drawn without replacement. Default: half of the smaller
        side, at most 100, so that subsets differ.
    n_subsets : int
        Number of subsets. Those without a pair of unrelated samples of some classes do not count.
    origins, classes : pair of sequences, optional
        As for :func:`mmd2`. With classes, a subset holds each in its share, at least twice.
    rng : numpy.random.Generator
        Source of the subsets.

    Returns
    -------
    Estimate
        Mean and spread over the subsets.

    Raises
    ------
    ValueError
        If a side has fewer than two samples, of all or of a class, features differ in length or
        are not finite, the subset is larger than a side, or no subset has unrelated samples.
    """
    x, y = _features(x, "x"), _features(y, "y")
    size = _subset_size(subset_size, min(len(x), len(y)), n_subsets)
    samples = _all_samples((x, y), origins, classes)
    sides = np.split(np.arange(len(x) + len(y)), [len(x)])
    halves = ([_parts(samples, side, size, 1, rng)[0] for side in sides] for _ in range(n_subsets))
    return _over_subsets(samples, halves)


def kid_floor(
    x: np.ndarray,
    *,
    subset_size: int | None = None,
    n_subsets: int = 50,
    origins: Sequence[Collection[str]] | None = None,
    classes: Sequence[str] | None = None,
    rng: np.random.Generator,
) -> Estimate:
    """Kernel distance of real images from other real images: what no method can be asked to beat.

    Each subset pair is drawn without overlap from the one sample.

    Parameters
    ----------
    x : (n, d) float ndarray
        Features of real images, n >= 4.
    subset_size, n_subsets, rng
        As for :func:`kid`; the default subset is half of the sample, at most 100.
    origins, classes : sequence of n, optional
        Images that each sample shows, and its class, as for :func:`mmd2`.

    Returns
    -------
    Estimate

    Raises
    ------
    ValueError
        As :func:`kid`, and if there are fewer than four samples, of all or of a class.
    """
    x = _features(x, "x")
    if len(x) < 4:
        raise ValueError(f"x has {len(x)} samples: two disjoint halves need at least 4")
    if classes is not None:
        names, number = np.unique(classes, return_counts=True)
        if (few := number < 4).any():
            raise ValueError(
                f"x has {number[few][0]} samples of class '{names[few][0]}', but two disjoint "
                "halves need at least 4 of each class: give more images, or leave the class out"
            )
    size = _subset_size(subset_size, len(x) // 2, n_subsets, share=1)
    samples = _all_samples(
        (x,), None if origins is None else (origins,), None if classes is None else (classes,)
    )
    rows = np.arange(len(x))
    return _over_subsets(samples, (_parts(samples, rows, size, 2, rng) for _ in range(n_subsets)))


def stratified(
    labels: Sequence[str], like: Sequence[str], *, most: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw samples whose classes have the shares that they have among others.

    What is measured on real images for comparison, as a floor or how hard their outlines are,
    differs from class to class.

    Parameters
    ----------
    labels : sequence of n str
        Classes of the samples drawn from.
    like : sequence of str
        Classes of the samples to be compared with.
    most : int
        Samples at most; fewer where a class has not enough.
    rng : numpy.random.Generator
        Source of the draw, without replacement.

    Returns
    -------
    (k,) int64 ndarray
        Which of the n samples, in random order.

    Raises
    ------
    ValueError
        If a class of `like` has no sample.
    """
    labels = np.asarray(labels)
    names, number = np.unique(np.asarray(like), return_counts=True)
    there = np.array([(labels == name).sum() for name in names])
    if not (there > 0).all():
        raise ValueError(f"no sample of class '{names[there == 0][0]}' to compare with")
    share = number / number.sum()
    wanted = np.maximum(1, np.floor(min(most, (there / share).min()) * share + 1e-9).astype(int))
    rows = [
        rng.choice(np.flatnonzero(labels == name), k, replace=False)
        for name, k in zip(names, wanted, strict=True)
    ]
    return rng.permutation(np.concatenate(rows))


def with_unrelated(
    origins: Sequence[Collection[str]], classes: Sequence[str], *, least: float = 1.0
) -> list[str]:
    """Classes whose samples have others of the class to be compared with.

    A synthetic image shows its target and its sources, and where a class has few images, all of its
    synthetic ones may have one in common; then :func:`mmd2` has no pair to take a mean of.

    Parameters
    ----------
    origins : sequence of n collections of str
        Images that each sample shows.
    classes : sequence of n str
    least : float
        Samples of its class that share no image with a sample, at least, on average.

    Returns
    -------
    list of str
        In order of their first sample.
    """
    if len(origins) != len(classes):
        raise ValueError(
            f"origins of {len(origins)} samples and classes of {len(classes)}: "
            "give those of every sample"
        )
    shows, classes = _shows(origins), np.asarray(classes)
    found = []
    for name in dict.fromkeys(classes.tolist()):
        own = np.flatnonzero(classes == name)
        if _unrelated(shows, own, own).sum(1).mean() >= least:
            found.append(name)
    return found


def kid_difference(
    x: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    *,
    origins: Origins | None = None,
    classes: Classes | None = None,
) -> Callable[[np.ndarray, np.ndarray], float]:
    """How much farther one version of synthetic images is from real ones than another.

    Parameters
    ----------
    x : (n, d) float ndarray
        Features of real images.
    a, b : (m, d) float ndarray
        Features of two versions of the same synthetic images.
    origins, classes : pair of sequences, optional
        As for :func:`mmd2`, of x and of both versions.

    Returns
    -------
    callable
        Takes the weights of the real and of the synthetic images, (n,) and (m,), such as 0 for
        those left out; returns the kernel distance of `a` from `x` minus that of `b`, or NaN if no
        pair of unrelated images of two classes is left. Two copies of one image are no pair.

    Raises
    ------
    ValueError
        As :func:`mmd2`, and if the versions differ in shape.
    """
    x, a, b = _features(x, "x"), _features(a, "a"), _features(b, "b")
    if a.shape != b.shape:
        raise ValueError(f"a has shape {a.shape} but b {b.shape}: give two versions of each image")
    samples = _all_samples((x, a), origins, classes)
    i, j = np.split(np.arange(len(x) + len(a)), [len(x)])
    members, shares = samples.members, samples.shares
    pairs, cross = _unrelated(samples.shows, j, j), _unrelated(samples.shows, i, j)
    gain = (polynomial_kernel(a, a) - polynomial_kernel(b, b)) * pairs
    towards = (polynomial_kernel(x, a) - polynomial_kernel(x, b)) * cross

    def difference(real: np.ndarray, made: np.ndarray) -> float:
        of_real, of = (
            members[side] * np.asarray(weights, float)[:, None]
            for side, weights in ((i, real), (j, made))
        )
        with np.errstate(invalid="ignore"):
            within = (of.T @ gain @ of) / (of.T @ pairs @ of)
            between = (of_real.T @ towards @ of) / (of_real.T @ cross @ of)
        return float(shares @ (within - 2 * between) @ shares)

    if np.isnan(difference(np.ones(len(x)), np.ones(len(a)))):
        raise ValueError(_NO_PAIRS)
    return difference


# --- the seam ------------------------------------------------------------------------------------


def normal_gradient(image: np.ndarray, mask: np.ndarray, *, sigma: float = 1.0) -> np.ndarray:
    """Luminance change across the outline of a mask, at each pixel of the outline.

    The outline is where the signed distance to the mask's border is below one pixel; its normal is
    the gradient of that distance. Pixels within ``2 sigma`` of the image border are left out: there
    the mask is cut by the field of view, not by a seam.

    Parameters
    ----------
    image : (H, W, 3) uint8 ndarray
    mask : (H, W) bool ndarray
    sigma : float
        Width of the Gaussian derivative, pixels.

    Returns
    -------
    (n,) float64 ndarray
        Absolute derivative along the normal, luminance in [0, 1] per pixel; empty if the mask has
        no outline inside the image.
    """
    image, mask = check_image(image), _mask(mask, image)
    if not mask.any() or mask.all():
        return np.empty(0)
    pad = int(np.ceil(4 * sigma)) + 2
    rows, columns = _window(mask, pad)
    luminance = (image[rows, columns] @ _LUMA / 255).astype(np.float64)
    mask = mask[rows, columns]
    distance = ndimage.distance_transform_edt(mask) - ndimage.distance_transform_edt(~mask)
    distance -= 0.5 * np.sign(distance)
    normal = np.stack([ndimage.gaussian_filter(distance, 1.0, order=o) for o in ((1, 0), (0, 1))])
    length = np.hypot(*normal)
    slope = np.stack([ndimage.gaussian_filter(luminance, sigma, order=o) for o in ((1, 0), (0, 1))])
    across = np.abs((slope * normal).sum(0)) / np.maximum(length, 1e-9)
    inside = _interior(image.shape[:2], int(np.ceil(2 * sigma)))[rows, columns]
    return across[(np.abs(distance) < 1) & (length > 1e-6) & inside]


def outline_gradients(
    images: Sequence[np.ndarray], masks: Sequence[np.ndarray], *, sigma: float = 1.0,
    name: str = "images",
) -> np.ndarray:  # fmt: skip
    """Mean of :func:`normal_gradient` along the outline of each mask.

    Returns
    -------
    (n,) float64 ndarray
        NaN where a mask has no outline inside its image.

    Raises
    ------
    ValueError
        If the numbers of images and masks differ; `name` says of which images.
    """
    if len(images) != len(masks):
        raise ValueError(f"{len(images)} {name} but {len(masks)} masks: give one mask an image")
    found = [normal_gradient(i, m, sigma=sigma) for i, m in zip(images, masks, strict=True)]
    return np.array([values.mean() if values.size else np.nan for values in found])


def outline_change(after: np.ndarray, before: np.ndarray) -> Callable[[np.ndarray], float]:
    """How much more images change across outlines than the same lines did before.

    Parameters
    ----------
    after, before : (n,) float ndarray
        Of :func:`outline_gradients`, with the same masks; NaN does not count.

    Returns
    -------
    callable
        Takes the weight of each of the n images, (n,), such as how often each comes in a resample;
        returns the logarithm of the ratio of the means, or NaN if no image with a weight has an
        outline.
    """
    there = np.isfinite(after)

    def change(weights: np.ndarray) -> float:
        if not weights[there].any():
            return float("nan")
        a, b = (np.average(x[there], weights=weights[there]) for x in (after, before))
        return float(np.log(a / b))

    return change


@dataclass(frozen=True)
class Seam:
    """Strength of pasted outlines against that of real ones.

    Attributes
    ----------
    score : float
        Log ratio of `gradient` to `reference`: 0 where pasted outlines look like real ones,
        positive where the seam is harder, negative where it is blurred.
    gradient, reference : float
        Mean luminance change across pasted and real outlines, per pixel.
    n, n_reference : int
        Outlines that went in.
    """

    score: float
    gradient: float
    reference: float
    n: int
    n_reference: int


def seam_score(
    images: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    reference_images: Sequence[np.ndarray],
    reference_masks: Sequence[np.ndarray],
    *,
    sigma: float = 1.0,
) -> Seam:
    """Compare pasted outlines with outlines of real segments in real images.

    Every outline counts once, whatever its length. The reference says how hard the border of a
    tissue structure is anyway; for an outline no reader can find, the two agree.

    Parameters
    ----------
    images, reference_images : sequence of (H, W, 3) uint8 ndarray
        Synthetic images, and real ones.
    masks, reference_masks : sequence of (H, W) bool ndarray
        Mask of the pasted segments of each synthetic image, and of a segment in each real one.
    sigma : float
        As for :func:`normal_gradient`.

    Returns
    -------
    Seam

    Raises
    ------
    ValueError
        If the numbers of images and masks differ, or one side has no outline inside an image.
    """
    gradient, n = _mean_outline(images, masks, sigma, "images")
    reference, n_reference = _mean_outline(
        reference_images, reference_masks, sigma, "reference_images"
    )
    tiny = np.finfo(float).tiny
    score = float(np.log(max(gradient, tiny) / max(reference, tiny)))
    return Seam(score, gradient, reference, n, n_reference)


def outline_strips(
    image: np.ndarray, mask: np.ndarray, *, depth: int = 8, length: int = 32
) -> np.ndarray:
    """Unrolled surroundings of the outline of a mask, in strips.

    Parameters
    ----------
    image : (H, W, 3) uint8 ndarray
    mask : (H, W) bool ndarray
    depth : int
        Pixels to either side of the outline.
    length : int
        Pixels of the outline a strip.

    Returns
    -------
    (n, length, 2 depth + 1, 3) float32 ndarray
        From outside to inside along the second last axis. Strips that reach the border of the
        image are left out, and so are ends of outlines shorter than a strip.
    """
    image, mask = check_image(image), _mask(mask, image)
    inside = mask.astype(np.uint8)
    distance = cv2.distanceTransform(inside, cv2.DIST_L2, 5)
    distance -= cv2.distanceTransform(1 - inside, cv2.DIST_L2, 5)
    distance = cv2.GaussianBlur(distance, (0, 0), 2)
    normal = np.stack([cv2.Sobel(distance, cv2.CV_32F, *axis) for axis in ((1, 0), (0, 1))], -1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True) + 1e-6
    picture, steps = image.astype(np.float32), np.arange(-depth, depth + 1, dtype=np.float32)
    found = []
    limit = np.array(mask.shape[::-1]) - depth - 2
    outlines, _ = cv2.findContours(inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    for outline in outlines:
        for start in range(0, len(outline) - length + 1, length):
            points = outline[start : start + length, 0]
            if (points > depth).all() and (points < limit).all():
                n = normal[points[:, 1], points[:, 0]]
                at = points[:, None] + steps[:, None] * n[:, None]
                x, y = np.ascontiguousarray(np.moveaxis(at, -1, 0), np.float32)
                found.append(cv2.remap(picture, x, y, cv2.INTER_LINEAR))
    return np.array(found, np.float32).reshape(-1, length, 2 * depth + 1, 3)


@dataclass(frozen=True)
class Detection:
    """What a detector of seams says of strips of images that it has not learned from.

    Attributes
    ----------
    evidence : (n,) float64 ndarray
        For a seam, of each strip.
    pasted : (n,) bool ndarray
        Whether there is one.
    groups : (n,) str ndarray
        Original of the image of each strip.
    """

    evidence: np.ndarray
    pasted: np.ndarray
    groups: np.ndarray

    def auc(self, weights: np.ndarray | None = None) -> float:
        """Area under the curve: 0.5 by chance, 1 if all are found.

        The share of pairs, of a strip with a seam and one without, in which the former has more
        evidence; with (n,) weights of the strips, weighted; NaN if no pair has a weight.
        """
        weights = np.ones(len(self.evidence)) if weights is None else np.asarray(weights, float)
        seam, none = (
            np.bincount(self._rank, weights=weights * (self.pasted == kind))
            for kind in (True, False)
        )
        pairs = seam.sum() * none.sum()
        return float(seam @ (none.cumsum() - none / 2) / pairs) if pairs else float("nan")

    @cached_property
    def _rank(self) -> np.ndarray:
        return np.unique(self.evidence, return_inverse=True)[1]


def detect_seams(
    images: Sequence[np.ndarray],
    originals: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    *,
    groups: Sequence[str],
    n_folds: int = 5,
) -> Detection:
    """Train a detector to tell pasted outlines from the same lines before pasting, and ask it.

    Strips along the outlines are described by what a seam changes, at each distance from it: the
    contrast across and along, the spread, and the correlation with the next line of pixels, as they
    are and smoothed by Gaussians of 1 and 2 pixels. A logistic regression learns from four fifths
    of the images and is asked about the others.

    Parameters
    ----------
    images, originals : sequence of (H, W, 3) uint8 ndarray
        Synthetic images, and what they were made of.
    masks : sequence of (H, W) bool ndarray
        Pasted pixels.
    groups : sequence of str
        Original of each image; all images of one original are in the same fold.
    n_folds : int
        Fewer where there are fewer originals.

    Returns
    -------
    Detection

    Raises
    ------
    ValueError
        If there is not one of each for every image, or fewer than two originals have an outline
        long enough for a strip.
    """
    if not len(images) == len(originals) == len(masks) == len(groups):
        raise ValueError(
            f"{len(images)} images, {len(originals)} originals, {len(masks)} masks and "
            f"{len(groups)} groups: give one of each for every image"
        )
    x, y, group = [], [], []
    for image, original, mask, name in zip(images, originals, masks, groups, strict=True):
        for picture, pasted in ((original, False), (image, True)):
            strips = outline_strips(picture, mask)
            x.append(_describe(strips))
            y += [pasted] * len(strips)
            group += [name] * len(strips)
    n_groups = len(set(group))
    if n_groups < 2:
        raise ValueError(
            f"{n_groups} originals with a strip of outline: a detector that learns from some and "
            "is asked about others needs at least two"
        )
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
    folds = GroupKFold(min(n_folds, n_groups))
    evidence = cross_val_predict(
        model, np.concatenate(x), y, groups=group, cv=folds, method="decision_function"
    )
    return Detection(evidence, np.array(y), np.array(group))


# --- inside --------------------------------------------------------------------------------------


def _mean_outline(images, masks, sigma: float, name: str) -> tuple[float, int]:
    means = outline_gradients(images, masks, sigma=sigma, name=name)
    means = means[np.isfinite(means)]
    if not len(means):
        raise ValueError(f"{name}: no mask has an outline inside its image, nothing to compare")
    return float(means.mean()), len(means)


def _window(mask: np.ndarray, pad: int) -> tuple[slice, slice]:
    """Bounding box of a mask with a margin, so that large images cost no more than small ones."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (
        slice(max(rows[0] - pad, 0), rows[-1] + pad + 1),
        slice(max(columns[0] - pad, 0), columns[-1] + pad + 1),
    )


def _interior(shape: tuple[int, int], margin: int) -> np.ndarray:
    inside = np.zeros(shape, bool)
    inside[margin : shape[0] - margin, margin : shape[1] - margin] = True
    return inside


def _describe(strips: np.ndarray) -> np.ndarray:
    """Numbers of each strip, (n, features), at three scales; see :func:`detect_seams`."""
    smooth = [ndimage.gaussian_filter(strips, (0, sigma, sigma, 0)) for sigma in (1.0, 2.0)]
    return np.concatenate([_numbers(each) for each in (strips, *smooth)], axis=1)


def _numbers(strips: np.ndarray) -> np.ndarray:
    across = np.abs(np.diff(strips, axis=2)).mean((1, 3))
    along = np.abs(np.diff(strips, axis=1)).mean((1, 3))
    lines = strips.mean(-1)
    spread = lines.std(1)
    lines = (lines - lines.mean(1, keepdims=True)) / (spread[:, None] + 1e-3)
    alike = (lines[:, :, 1:] * lines[:, :, :-1]).mean(1)
    return np.concatenate([np.log1p(across), np.log1p(along), np.log1p(spread), alike], axis=1)


def _mask(mask, image: np.ndarray) -> np.ndarray:
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.shape != image.shape[:2]:
        raise ValueError(
            f"mask has shape {mask.shape} and dtype {mask.dtype}: "
            f"give {image.shape[:2]} bool, as the image"
        )
    return mask


@dataclass(frozen=True)
class _Samples:
    """Samples of both sides, one below the other.

    `features` (n, d); `shows` (n, images) of 0 and 1; `members` (n, C), 1 for the class of each;
    `shares` (C,), those of the classes among the last side.
    """

    features: np.ndarray
    shows: csr_array
    members: np.ndarray
    shares: np.ndarray


def _all_samples(sides: Sequence[np.ndarray], origins, classes) -> _Samples:
    """Put the sides together, each with its origins and classes; without classes, all are of one.

    Classes that the last side has not are left out.
    """
    sizes = [len(side) for side in sides]
    if len(lengths := {side.shape[1] for side in sides}) > 1:
        raise ValueError(f"x and y have {sorted(lengths)} features: use one extractor")
    for what, given in (("origins", origins), ("classes", classes)):
        if given is not None and (found := [len(each) for each in given]) != sizes:
            raise ValueError(f"{what} of {found} samples for {sizes}: give those of every sample")
    shows = _shows([()] * sum(sizes) if origins is None else list(chain.from_iterable(origins)))
    classes = [np.zeros(n, int) for n in sizes] if classes is None else classes
    names = np.unique(classes[-1])
    members = [(np.asarray(each)[:, None] == names).astype(float) for each in classes]
    for side, each in zip("xy", members, strict=False):
        if (few := each.sum(0) < 2).any():
            raise ValueError(
                f"{side} has fewer than two samples of class '{names[few][0]}': "
                "give more images, or leave the class out of y"
            )
    return _Samples(np.concatenate(sides), shows, np.concatenate(members), members[-1].mean(0))


def _shows(origins: Sequence[Collection[str]]) -> csr_array:
    """Which sample shows which image, (n, images)."""
    if name := next((own for own in origins if isinstance(own, str)), None):
        raise ValueError(
            f"origins hold {name!r}, a single name: give a collection of names for each sample, "
            f"such as {{{name!r}}}"
        )
    number = {name: k for k, name in enumerate(dict.fromkeys(chain.from_iterable(origins)))}
    pairs = np.array([(i, number[o]) for i, own in enumerate(origins) for o in own], int)
    rows, columns = pairs.reshape(-1, 2).T
    shape = (len(origins), max(1, len(number)))
    return csr_array((np.ones(len(rows), int), (rows, columns)), shape=shape)


def _parts(samples: _Samples, rows: np.ndarray, size: int, n: int, rng) -> list[np.ndarray]:
    """`n` disjoint subsets of about `size` of the rows, with the classes in their shares."""
    order, shares = rng.permutation(rows), samples.shares
    of_class = [order[own > 0] for own in samples.members[order].T]
    wanted = [
        max(2, min(round(size * share), len(own) // n))
        for share, own in zip(shares, of_class, strict=True)
    ]
    return [
        np.concatenate([own[i * k : (i + 1) * k] for own, k in zip(of_class, wanted, strict=True)])
        for i in range(n)
    ]


def _over_subsets(samples: _Samples, halves) -> Estimate:
    """Estimate from the rows of both sides of each subset; those without pairs do not count."""
    halves = list(halves)
    found = np.array([_mmd2(samples, i, j) for i, j in halves])
    found = found[np.isfinite(found)]
    if not len(found):
        raise ValueError(_NO_PAIRS)
    return Estimate(float(found.mean()), float(found.std()), min(map(len, halves[0])), len(found))


def _mmd2(samples: _Samples, i: np.ndarray, j: np.ndarray) -> float:
    """As :func:`mmd2`, of some rows from others; NaN where two classes have no unrelated pair."""
    return (
        _mean_of_unrelated(samples, i, i)
        + _mean_of_unrelated(samples, j, j)
        - 2 * _mean_of_unrelated(samples, i, j)
    )


def _mean_of_unrelated(samples: _Samples, i: np.ndarray, j: np.ndarray) -> float:
    """Mean of the kernel over pairs that share no image, classes weighted by their shares."""
    shares, unrelated = samples.shares, _unrelated(samples.shows, i, j)
    kernel = polynomial_kernel(samples.features[i], samples.features[j])
    of_i, of_j = samples.members[i].T, samples.members[j]
    counts = of_i @ unrelated @ of_j
    if not counts.all():
        return float("nan")
    return float(shares @ (of_i @ (kernel * unrelated) @ of_j / counts) @ shares)


def _unrelated(shows: csr_array, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Pairs of rows that are not the same and share no image, (len(i), len(j)) bool."""
    return (i[:, None] != j) & ((shows[i] @ shows[j].T).toarray() == 0)


def _features(x, name: str) -> np.ndarray:
    x = np.asarray(x, float)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"{name} has shape {x.shape}: give (n, d) features with n >= 2")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} has values that are not finite: look at the images behind them")
    return x


def _subset_size(wanted: int | None, available: int, n_subsets: int, *, share: int = 2) -> int:
    if n_subsets < 1:
        raise ValueError(f"n_subsets is {n_subsets}: at least 1 is needed")
    if wanted is None:
        return max(2, min(100, available // share))
    if not 2 <= wanted <= available:
        raise ValueError(
            f"subset_size is {wanted}, but it has to lie in 2 .. {available}, "
            "the number of samples that the smaller side can give"
        )
    return int(wanted)
