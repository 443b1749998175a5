"""Draws of Eq. 1 (step 10): which segment replaces another, and how often each has served.

:func:`draw_log_probabilities` is the formula, in log space and double precision.
:class:`Sampler` draws from it over a whole run. A draw from a pool of a million segments reads the
features once: a bound of every probability comes from one matrix-vector product in single
precision, and a candidate proposed by the bounds is accepted with the ratio of its exact
probability to its bound (rejection sampling [devroye]_). So single precision costs some repeated
proposals, never exactness.

References
----------
.. [devroye] L. Devroye, Non-Uniform Random Variate Generation, 1986, section II.3.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from helpers.placement import border_sides
from helpers.pool import Pool


class CompositeError(ValueError):
    """No composite of this image meets the conditions; the caller records a skip."""


# --- Eq. 1 ----------------------------------------------------------------------------------------


def feature_distances(f_t: np.ndarray, f_j: np.ndarray, *, chunk: int = 1024) -> np.ndarray:
    """Euclidean distances of one feature vector to many, in double precision.

    Parameters
    ----------
    f_t : (p,) ndarray
        Feature of the target.
    f_j : (n, p) ndarray
        Features of the candidates. They are read once, `chunk` rows at a time, so that a pool of a
        million segments needs no copy of its features.
    chunk : int
        Rows at a time.

    Returns
    -------
    (n,) float64 ndarray
        Exact to rounding also where squares would overflow, and for neighbours however near:
        differences are formed before squares.
    """
    n = len(f_j)
    out = np.empty(n)
    f_t = np.asarray(f_t, np.float64)
    buffer = np.empty((min(chunk, n), len(f_t)))
    for start in range(0, n, chunk):
        part = f_j[start : start + chunk]
        difference = np.subtract(part, f_t, out=buffer[: len(part)])
        with np.errstate(over="ignore", under="ignore"):
            square = np.einsum("ij,ij->i", difference, difference)
        if _safe_squares(square):
            np.sqrt(square, out=out[start : start + chunk])
        else:
            out[start : start + chunk] = _scaled_norms(difference)
    return out


def _safe_squares(square: np.ndarray) -> bool:
    """Whether no square has left the range in which doubles keep all their digits."""
    return bool(np.isfinite(square).all() and ((square > 1e-280) | (square == 0)).all())


def _scaled_norms(difference: np.ndarray) -> np.ndarray:
    """Norms of rows whose squares over- or underflow."""
    largest = np.abs(difference).max(axis=1)
    safe = np.where(largest > 0, largest, 1)[:, None]
    return largest * np.linalg.norm(difference / safe, axis=1)


def draw_log_probabilities(
    f_t: np.ndarray, f_j: np.ndarray, w: np.ndarray, *, allowed: np.ndarray | None = None
) -> np.ndarray:
    r"""Log-probabilities of Eq. 1, :math:`p(j|t) = \mathrm{softmax}_j(-w_j \|f_t - f_j\|_2)`.

    Parameters
    ----------
    f_t : (p,) ndarray
        Feature of the target.
    f_j : (n, p) ndarray
        Features of the candidates.
    w : (n,) ndarray
        Penalty weights, positive; 1 at first, one more for every time a candidate was drawn.
    allowed : (n,) bool ndarray, optional
        Candidates that may be drawn; the others get probability 0.

    Returns
    -------
    (n,) float64 ndarray
        Natural logarithms; the probabilities sum to 1. Computed with the largest exponent taken
        out first, so that neither huge nor tiny distances break it.

    Raises
    ------
    ValueError
        If shapes disagree, a value is no number, or no candidate may be drawn.
    """
    w = np.asarray(w, np.float64)
    if np.ndim(f_j) != 2 or np.shape(f_t) != (np.shape(f_j)[1],) or w.shape != (len(f_j),):
        raise ValueError(
            f"shapes disagree: f_t {np.shape(f_t)}, f_j {np.shape(f_j)}, w {w.shape}; expected "
            "(p,), (n, p) and (n,)"
        )
    exponents = -w * feature_distances(f_t, f_j)
    if np.isnan(exponents).any():
        raise ValueError("a feature or a weight is no number (NaN): build the pool again")
    if allowed is not None:
        exponents = np.where(allowed, exponents, -np.inf)
    largest = exponents.max(initial=-np.inf)
    if largest == -np.inf:
        raise ValueError("no candidate may be drawn: all are excluded or infinitely far away")
    shifted = exponents - largest
    return shifted - np.log(np.exp(shifted).sum())


def effective_sources(counts: np.ndarray) -> float:
    """Number of sources that are used as evenly as `counts` are: exp of their entropy.

    Parameters
    ----------
    counts : (n,) ndarray
        How often each segment was drawn.

    Returns
    -------
    float
        From 1 (always the same one) to n (all equally often); 0 if nothing was drawn.
    """
    counts = np.asarray(counts, float)
    share = counts[counts > 0] / max(counts.sum(), 1)
    return float(np.exp(-(share * np.log(share)).sum())) if len(share) else 0.0


# --- sampler --------------------------------------------------------------------------------------

#: What may become of segments that the border of their image cuts.
CUT_SOURCES = ("at_border", "refuse", "anywhere")
_NOWHERE = np.int8(3)  # more sides than a target can offer
_ANY_SIZE = (0.0, np.inf)  # areas of candidates relative to the target
_ROUNDOFF = 2.0**-24  # of single precision
_PROPOSALS = 32
# Rounding of the exponential and of its argument down to -104, below which it is zero.
_SLACK = 2e-5


class Sampler:
    """Draws replacements from a pool and remembers how often each was drawn.

    A replacement is of the target's class: features of different classes are scores on different
    principal components, and cannot be compared.

    Parameters
    ----------
    pool : Pool
    exclude_own_image : bool
        Leave out all segments of the target's own image. The target itself is never drawn.
    exclude_own_patient : bool
        Leave out all segments of the target's patient, where patients are known.
    cut_sources : {"at_border", "refuse", "anywhere"}
        What becomes of segments that the border of their image cuts: they may replace targets that
        as many sides cut, where :func:`helpers.placement.affine_at_border` lays cut side on cut
        side; or are left out, since they are incomplete; or are treated as whole ones.
    penalty : float
        What a draw adds to the weight w_j (1 in the paper; 0 switches the penalty off).

    Attributes
    ----------
    w : (n,) float64 ndarray
        Weights of Eq. 1, 1 at first; they last over all draws of a run.
    counts : (n,) int64 ndarray
        How often each segment was drawn.

    Raises
    ------
    ValueError
        If `cut_sources` is unknown, or the penalty negative or no finite number.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        exclude_own_image: bool = True,
        exclude_own_patient: bool = False,
        cut_sources: str = "at_border",
        penalty: float = 1.0,
    ) -> None:
        if cut_sources not in CUT_SOURCES:
            raise ValueError(
                f"cut_sources={cut_sources!r} is unknown: use one of {', '.join(CUT_SOURCES)}"
            )
        if not 0 <= penalty < np.inf:
            raise ValueError(
                f"penalty={penalty}: give a finite number that is not negative, 1 as in the paper, "
                "0 for none; a draw must not make the next one likelier"
            )
        self.pool = pool
        self.exclude_own_image = exclude_own_image
        self.exclude_own_patient = exclude_own_patient
        self.cut_sources = cut_sources
        self.penalty = float(penalty)
        self.w = np.ones(len(pool))
        self.counts = np.zeros(len(pool), np.int64)
        self._images = _codes(pool.table["image_id"])
        self._patients = _codes(pool.table["dataset"] + "\n" + pool.table["patient"])
        self._patients[(pool.table["patient"] == "").to_numpy()] = -1
        self._border = pool.table["border"].to_numpy(bool)
        self._wanted, self._offered = self._sides(pool)
        self._labels = pool.table["label"].to_numpy()
        self._blocks = {c: self._block(pool, c) for c in pool.classes}
        self._fingerprint = int(zlib.crc32(np.ascontiguousarray(pool.features)))

    def log_probabilities(
        self,
        target: int,
        *,
        size_range: tuple[float, float] = _ANY_SIZE,
        without: Collection[int] = (),
    ) -> tuple[np.ndarray, np.ndarray]:
        """Candidates for a target and their log-probabilities, in double precision.

        Parameters
        ----------
        target : int
            Row of the pool.
        size_range : tuple of float
            Candidates of another area, relative to that of the target, are left out, such as those
            that could not be fitted (:func:`helpers.placement.size_range`).
        without : collection of int
            Rows of the pool that are left out as well, such as those that were tried before.

        Returns
        -------
        rows : (m,) int ndarray
            All rows of the target's class.
        log_p : (m,) float64 ndarray
            Eq. 1; minus infinity for those left out.

        Raises
        ------
        CompositeError
            If all are left out.
        """
        block = self._blocks[self._labels[target]]
        log_p = draw_log_probabilities(
            self.pool.features[target],
            block.features,
            self._weights(block),
            allowed=self._allowed(target, block, size_range, without),
        )
        return block.rows, log_p

    def allowed(self, target: int, rows: np.ndarray) -> np.ndarray:
        """Which of `rows` may replace `target`, (m,) bool."""
        allowed = rows != target
        if self.exclude_own_image:
            allowed &= self._images[rows] != self._images[target]
        if self.exclude_own_patient and self._patients[target] >= 0:
            allowed &= self._patients[rows] != self._patients[target]
        return allowed & (self._wanted[rows] <= self._offered[target])

    def at_border(self, row: int) -> bool:
        """Whether a source may only be placed cut side on cut side."""
        return self.cut_sources == "at_border" and bool(self._border[row])

    def targets(self) -> np.ndarray:
        """Rows of the pool that something may replace, (m,) int, at a cost linear in the pool.

        Raises
        ------
        CompositeError
            If there is none.
        """
        found = [
            block.rows[(offered == sides) & (others(block.wanted <= sides) > 0)]
            for block, offered, others in self._classes()
            for sides in np.unique(offered)
        ]
        rows = np.sort(np.concatenate(found))
        if not len(rows):
            raise CompositeError(
                f"no segment of the pool may be replaced: of its {len(self.w)} segments in "
                f"{len(self._blocks)} classes, {int(self._border.sum())} are cut by the border. "
                f"Rules: {', '.join(self._rules()) or 'none'}; "
                "add images or switch a rule off"
            )
        return rows

    def sources(self) -> np.ndarray:
        """Rows of the pool that may replace something, (m,) int, at a cost linear in the pool."""
        found = [
            block.rows[(block.wanted == sides) & (others(offered >= sides) > 0)]
            for block, offered, others in self._classes()
            for sides in np.unique(block.wanted)
        ]
        return np.sort(np.concatenate(found))

    def draw(
        self,
        target: int,
        rng: np.random.Generator,
        *,
        size_range: tuple[float, float] = _ANY_SIZE,
        without: Collection[int] = (),
    ) -> int:
        """Draw a replacement by Eq. 1 and raise its weight.

        Parameters
        ----------
        target : int
            Row of the pool.
        rng : numpy.random.Generator
        size_range, without
            As in :meth:`log_probabilities`.

        Returns
        -------
        int
            Row of the pool.

        Raises
        ------
        CompositeError
            If no segment may be drawn.
        """
        left_out = {"size_range": size_range, "without": without}
        row = self._draw_by_bounds(target, rng, **left_out)
        if row is None:  # distances so large that single precision says little
            rows, log_p = self.log_probabilities(target, **left_out)
            row = int(rows[_invert(np.exp(log_p), rng)])
        self.w[row] += self.penalty
        self.counts[row] += 1
        return row

    def undo(self, row: int) -> None:
        """Take a draw back whose segment was not used after all."""
        self.w[row] -= self.penalty
        self.counts[row] -= 1

    def state(self) -> dict[str, Any]:
        """Weights and counts as plain lists (JSON), for :meth:`restore` in a later process."""
        used = np.flatnonzero(self.counts)
        return {
            "fingerprint": self._fingerprint,
            "n": len(self.w),
            "penalty": self.penalty,
            "rows": used.tolist(),
            "counts": self.counts[used].tolist(),
            "w": self.w[used].tolist(),
        }

    def restore(self, state: Mapping[str, Any]) -> Sampler:
        """Continue where :meth:`state` was taken.

        Raises
        ------
        ValueError
            If the state is of another pool or another penalty, or is no state.
        """
        missing = {"fingerprint", "n", "penalty", "rows", "counts", "w"} - set(state)
        if missing:
            raise ValueError(f"this is no state of a sampler: it lacks {sorted(missing)}")
        if state["n"] != len(self.w) or state["fingerprint"] != self._fingerprint:
            raise ValueError(
                f"these weights are of another pool ({state['n']} segments, this one has "
                f"{len(self.w)}, or other features): start with fresh weights"
            )
        if state["penalty"] != self.penalty:
            raise ValueError(
                f"these weights rose by {state['penalty']} a draw, this sampler's by "
                f"{self.penalty}: give penalty={state['penalty']}, or start with fresh weights"
            )
        rows = np.asarray(state["rows"], int)
        self.w[:], self.counts[:] = 1, 0
        self.w[rows], self.counts[rows] = state["w"], state["counts"]
        return self

    # inner parts

    def _draw_by_bounds(
        self,
        target: int,
        rng: np.random.Generator,
        size_range: tuple[float, float],
        without: Collection[int],
    ) -> int | None:
        """Rejection sampling from upper bounds of the probabilities; None if it does not pay."""
        block = self._blocks[self._labels[target]]
        f_t = self.pool.features[target]
        allowed, w = self._allowed(target, block, size_range, without), self._weights(block)
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            exponent = block.nearest_possible(f_t)
            exponent *= (w * -(1 - 8 * _ROUNDOFF)).astype(np.float32)
            exponent[~allowed] = -np.inf
            largest = exponent.max()
            if not np.isfinite(largest):
                return None
            exponent -= largest
            bound = np.exp(exponent, out=exponent)
        cumulative = np.cumsum(bound, dtype=np.float64)
        if not np.isfinite(cumulative[-1]):
            return None
        for _ in range(_PROPOSALS):
            at = _invert_cumulative(cumulative, rng)
            distance = feature_distances(f_t, block.features[at : at + 1])[0]
            log_ratio = -w[at] * distance - float(largest) - math.log(bound[at]) - _SLACK
            if math.log1p(-rng.random()) <= log_ratio:
                return int(block.rows[at])
        return None

    def _allowed(
        self,
        target: int,
        block: _Block,
        size_range: tuple[float, float],
        without: Collection[int],
    ) -> np.ndarray:
        """As :meth:`allowed` for all rows of a block; an error if none is left."""
        allowed = block.images != self._images[target] if self.exclude_own_image else True
        if self.exclude_own_patient and self._patients[target] >= 0:
            allowed &= block.patients != self._patients[target]
        allowed = allowed & (block.wanted <= self._offered[target])
        own = np.searchsorted(block.rows, target)
        allowed[own] = False
        if size_range != _ANY_SIZE:
            low, high = np.asarray(size_range) * block.areas[own]
            allowed &= (block.areas >= low) & (block.areas <= high)
        if without:
            allowed &= ~np.isin(block.rows, list(without))
        if not allowed.any():
            raise CompositeError(self._why_none(target, len(block.rows), size_range))
        return allowed

    def _classes(self) -> Iterator[tuple[_Block, np.ndarray, Callable]]:
        """Each class, the sides its targets offer, and a function that counts.

        The function says for each row of the class how many of a mask of rows are not left out
        with it.
        """
        groups = np.arange(len(self.w))  # what is left out with a segment: itself at least
        if self.exclude_own_image:
            groups = len(self.w) + self._images
        if self.exclude_own_patient:
            known = self._patients >= 0
            groups = np.where(known, 2 * len(self.w) + self._patients, groups)
        for block in self._blocks.values():
            _, own = np.unique(groups[block.rows], return_inverse=True)
            yield (
                block,
                self._offered[block.rows],
                lambda mask, own=own: mask.sum() - np.bincount(own, weights=mask)[own],
            )

    def _weights(self, block: _Block) -> np.ndarray:
        return self.w if len(block.rows) == len(self.w) else self.w[block.rows]

    def _block(self, pool: Pool, label: str) -> _Block:
        rows = pool.of_class(label)
        features = pool.features if len(rows) == len(pool) else pool.features[rows]
        return _Block(
            rows,
            features,
            _squares(features),
            self._images[rows],
            self._patients[rows],
            self._wanted[rows],
            pool.table["area"].to_numpy(float)[rows],
        )

    def _rules(self) -> list[str]:
        names = ("exclude_own_image", "exclude_own_patient")
        rules = [name for name in names if getattr(self, name)]
        if self.cut_sources != "anywhere":
            rules.append(f"cut_sources {self.cut_sources}")
        return rules

    def _sides(self, pool: Pool) -> tuple[np.ndarray, np.ndarray]:
        """Sides of its image that a source wants its target to be cut by, and those that cut each.

        Two sides next to each other count as two, sides that face each other as one. A cut source
        between sides that face each other finds no place: it wants more than there is.
        """
        none = np.zeros(len(pool), np.int8)
        if self.cut_sources == "anywhere":
            return none, none
        if self.cut_sources == "refuse":
            return np.where(self._border, _NOWHERE, none), none
        shapes = pool.images.set_index("image_id")[["height", "width"]]
        shapes = shapes.loc[pool.table["image_id"]].to_numpy()
        sides = border_sides(pool.table[["x", "y", "w", "h"]].to_numpy(), shapes)
        along, facing = sides[:, :2] | sides[:, 2:], sides[:, :2] & sides[:, 2:]
        offered = along.sum(1, dtype=np.int8)
        wanted = np.where(facing.any(1) | (offered == 0), _NOWHERE, offered)
        return np.where(self._border, wanted, none), np.where(self._border, offered, none)

    def _why_none(self, target: int, n: int, size_range: tuple[float, float]) -> str:
        row = self.pool.table.iloc[target]
        nothing = (
            f"no segment may replace segment {row['segment_id']} of image {row['image_id']!r}: "
        )
        if n == 1:
            return (
                f"{nothing}it is the only one of class {row['label']!r}; add images of this class"
            )
        rules = self._rules()
        if size_range != _ANY_SIZE:
            rules.append("an area of {:.2g} to {:.2g} times its own".format(*size_range))
        return (
            f"{nothing}class {row['label']!r} has {n} segments and all are left out "
            f"({', '.join(rules) or 'tried before'}); "
            "add images of this class or switch a rule off"
        )


@dataclass(frozen=True)
class _Block:
    """One class, its arrays side by side in memory, so that a draw reads them in one stroke."""

    rows: np.ndarray
    features: np.ndarray
    squares: np.ndarray  # (n,) float32: squared norms, shrunk by their rounding
    images: np.ndarray
    patients: np.ndarray
    wanted: np.ndarray  # sides of its image that a target has to reach
    areas: np.ndarray

    def nearest_possible(self, f_t: np.ndarray) -> np.ndarray:
        r"""Lower bounds of the distances to `f_t`, (n,) float32, by one matrix-vector product.

        The squared distance is :math:`\|f_j\|^2 + \|f_t\|^2 - 2 f_j^\top f_t`. A product of p
        terms in single precision, in any order of summation, errs by at most
        :math:`\gamma_p \|f_j\| \|f_t\|` with :math:`\gamma_p = p u / (1 - p u)` (Higham, Accuracy
        and Stability of Numerical Algorithms, 2002, section 3.1), which is at most half of
        :math:`\gamma_p` times the sum of the squared norms.
        """
        f_t = np.ascontiguousarray(f_t, np.float32)
        low = self.features @ f_t
        low *= -2
        low += self.squares
        low += np.float32(_shrunk(float(f_t.astype(np.float64) @ f_t), len(f_t)))
        np.maximum(low, 0, out=low)
        return np.sqrt(low, out=low)


def _squares(features: np.ndarray, chunk: int = 4096) -> np.ndarray:
    """Squared norms of rows, rounded down far enough for :meth:`_Block.nearest_possible`."""
    out = np.empty(len(features), np.float32)
    with np.errstate(over="ignore"):
        for start in range(0, len(features), chunk):
            part = features[start : start + chunk].astype(np.float64)
            square = np.einsum("ij,ij->i", part, part)
            out[start : start + chunk] = _shrunk(square, features.shape[1])
    return out


def _shrunk(square: Any, p: int) -> Any:
    """A squared norm less its share of all rounding in single precision."""
    gamma = p * _ROUNDOFF / (1 - p * _ROUNDOFF)
    return square * (1 - gamma - 16 * _ROUNDOFF)


def _invert(weights: np.ndarray, rng: np.random.Generator) -> int:
    return _invert_cumulative(np.cumsum(weights), rng)


def _invert_cumulative(cumulative: np.ndarray, rng: np.random.Generator) -> int:
    """Index drawn with probability proportional to the steps of `cumulative`."""
    at = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
    last = np.searchsorted(cumulative, cumulative[-1])  # the product may round to the total
    return int(min(at, last))


def _codes(values: pd.Series) -> np.ndarray:
    return pd.factorize(values)[0].astype(np.int32)
