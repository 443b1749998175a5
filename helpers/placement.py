"""Placement (step 11): affine transforms that carry one segment onto another, and their warps.

Coordinates are (x, y) in pixels, the centre of the first pixel at (0, 0). An affine transform is a
(2, 3) array that maps (x, y, 1) of the source to (x, y) of the target.

Warping is done by PyTorch, many images at once, on the CPU as on a GPU. Images are interpolated by
Lanczos' windowed sinc, since nothing gives a paste away like texture that interpolation has blurred
(measured in book/deviations.md); masks bilinearly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
from scipy.optimize import minimize
from torch.nn.functional import grid_sample
from torchvision.transforms.functional import gaussian_blur

#: Lobes of the windowed sinc on either side: how far interpolation looks, in pixels.
LOBES = 4
#: Overlap that a mirror image has to gain before it is taken.
_MIRROR_GAIN = 0.01
_FIT_SIDE = 48  # pixels across the target, for the search of the best overlap
_FIT_STEPS = 100  # evaluations of the overlap
_LEAST_BLUR = 0.25  # pixels; less moves no grey level
#: Directions (x, y) that leave an image at its left, top, right and bottom side.
_OUTWARDS = np.array([[-1.0, 0], [0, -1], [1, 0], [0, 1]])


# --- moments and boxes ----------------------------------------------------------------------------


def moments(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centroid and covariance of a mask.

    Parameters
    ----------
    mask : (H, W) bool ndarray

    Returns
    -------
    centroid : (2,) float64 ndarray
        (x, y), pixels.
    covariance : (2, 2) float64 ndarray
        Pixels squared, with every pixel taken as a unit square (1/12 on the diagonal), so that
        lines and single pixels have a size, too.

    Raises
    ------
    ValueError
        If the mask is empty.
    """
    m = cv2.moments(np.ascontiguousarray(mask, np.uint8), binaryImage=True)
    if m["m00"] == 0:
        raise ValueError("the mask is empty: a segment needs at least one pixel")
    centroid = np.array([m["m10"], m["m01"]]) / m["m00"]
    covariance = np.array([[m["mu20"], m["mu11"]], [m["mu11"], m["mu02"]]]) / m["m00"]
    return centroid, covariance + np.eye(2) / 12


def affine_from_moments(
    source_mask: np.ndarray,
    target_mask: np.ndarray,
    *,
    scale_limits: tuple[float, float] = (0.5, 2.0),
    stretch_limit: float = 1.5,
    mirror: bool = True,
) -> np.ndarray:
    r"""Affine transform that carries centroid and second moments of one mask onto another's.

    With the principal axes :math:`C = R\,\mathrm{diag}(\lambda)\,R^\top` of both masks,
    :math:`A = R_t\,\mathrm{diag}(\sqrt{\lambda_t / \lambda_s})\,R_s^\top`. Axes have no direction,
    so A, its turn by 180 degrees, and their mirror images all match the moments: the one whose
    warped mask overlaps the target most is taken, a mirror image only if it gains a hundredth, and
    at a tie the smaller turn.

    Parameters
    ----------
    source_mask, target_mask : (h, w) and (H, W) bool ndarray
    scale_limits : tuple of float
        The scale along each principal axis is held within these limits.
    stretch_limit : float
        Largest ratio of the two scales; both give way equally, which keeps the area. A strong
        stretch would turn round nuclei into spindles, and the shape of nuclei is what a grade is
        read from. Where a limit holds, the moments match as far as it allows.
    mirror : bool
        Allow mirror images. Tissue has no handedness, and a section may lie either way up.

    Returns
    -------
    (2, 3) float64 ndarray

    Raises
    ------
    ValueError
        If a mask is empty or the limits are not ``0 < low <= high``.
    """
    _check_limits(scale_limits, stretch_limit)
    (c_s, cov_s), (c_t, cov_t) = moments(source_mask), moments(target_mask)
    (lam_s, r_s), (lam_t, r_t) = _axes(cov_s), _axes(cov_t)
    scale = _limited(np.sqrt(lam_t / lam_s), scale_limits, stretch_limit)
    flips = np.array([[1, 1], [-1, -1], [1, -1], [-1, 1]])[: 4 if mirror else 2]
    affines = [_about(r_t @ np.diag(scale * flip) @ r_s.T, c_s, c_t) for flip in flips]
    overlap = _overlaps(source_mask, target_mask, affines)
    overlap[2:] -= _MIRROR_GAIN
    best = np.flatnonzero(overlap >= overlap.max() - 1e-9)
    return affines[max(best, key=lambda k: np.trace(affines[k][:, :2]))]


def affine_from_boxes(
    source_mask: np.ndarray,
    target_mask: np.ndarray,
    *,
    scale_limits: tuple[float, float] = (0.5, 2.0),
    stretch_limit: float = 1.5,
) -> np.ndarray:
    """Affine transform that carries one bounding box onto another, without turning.

    Parameters, returns and errors as :func:`affine_from_moments`.
    """
    _check_limits(scale_limits, stretch_limit)
    (x_s, y_s, w_s, h_s), (x_t, y_t, w_t, h_t) = _box(source_mask), _box(target_mask)
    scale = _limited(np.array([w_t / w_s, h_t / h_s]), scale_limits, stretch_limit)
    centre_s = np.array([x_s + (w_s - 1) / 2, y_s + (h_s - 1) / 2])
    centre_t = np.array([x_t + (w_t - 1) / 2, y_t + (h_t - 1) / 2])
    return _about(np.diag(scale), centre_s, centre_t)


def axis_scales(affine: np.ndarray) -> tuple[float, float]:
    """Largest and smallest scale of an affine transform (its singular values)."""
    large, small = np.linalg.svd(np.asarray(affine)[:, :2], compute_uv=False)
    return float(large), float(small)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks; 0 for two empty ones."""
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 0.0


# --- best overlap ---------------------------------------------------------------------------------


def affine_by_fit(
    source_mask: np.ndarray,
    target_mask: np.ndarray,
    *,
    scale_limits: tuple[float, float] = (0.5, 2.0),
    stretch_limit: float = 1.5,
    mirror: bool = True,
) -> np.ndarray:
    """Affine transform of the largest overlap, searched from the one by moments.

    Moments describe an ellipse; where a segment is none, a shift or turn overlaps more. Position,
    turn, size and stretch are improved by the simplex method [nelder]_ on small pictures of both
    masks; the limits of :func:`affine_from_moments` hold throughout, and what it gives is kept
    where nothing better is found. What the source covers beyond the image counts for nothing, so
    that a whole segment in the place of one that the border cuts is cut by it, too.

    Parameters, returns and errors as :func:`affine_from_moments`.

    References
    ----------
    .. [nelder] Nelder and Mead, A simplex method for function minimization, 1965.
    """
    start = affine_from_moments(
        source_mask, target_mask,
        scale_limits=scale_limits, stretch_limit=stretch_limit, mirror=mirror,
    )  # fmt: skip
    radius = np.sqrt(np.count_nonzero(target_mask) / np.pi)
    vary = _variations(start, moments(target_mask)[0], radius, scale_limits, stretch_limit)
    steps = [0.08, 0.08, 0.15, 0.15, 0.08, 0.15]
    return _improved(source_mask, target_mask, start, vary, steps)


def affine_at_border(
    source_mask: np.ndarray,
    target_mask: np.ndarray,
    *,
    scale_limits: tuple[float, float] = (0.5, 2.0),
    stretch_limit: float = 1.5,
    mirror: bool = True,
) -> np.ndarray:
    """Affine transform of a source that the border cuts: its cut sides stay at the border.

    A side of the source's image lies on a side of the target's, or beyond it, so that no straight
    cut shows within the image. That leaves quarter turns and mirror images. Each is begun with
    scales and centroid as the moments have them, moved outwards as far as the sides want it; the
    one that overlaps the target most is improved as in :func:`affine_by_fit`.

    Parameters, returns and errors as :func:`affine_from_moments`.

    Raises
    ------
    ValueError
        Also if the source reaches no side of its image or two that face each other, or the target
        does not reach as many sides as the source, next to each other where there are two.
    """
    _check_limits(scale_limits, stretch_limit)
    (c_s, cov_s), (c_t, cov_t) = moments(source_mask), moments(target_mask)
    sides, offered = (border_sides(_box(mask), mask.shape) for mask in (source_mask, target_mask))
    turns = [turn for turn in _quarter_turns(mirror) if _fits_sides(turn, sides, offered)]
    if not sides.any() or (sides[:2] & sides[2:]).any() or not turns:
        raise ValueError(
            f"a source that reaches {_named(sides)} of its image cannot lie at the border of one "
            f"whose target reaches {_named(offered)}: draw another one"
        )
    radius = np.sqrt(np.count_nonzero(target_mask) / np.pi)

    def variations(turn: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        base = np.sqrt(np.diag(cov_t) / np.diag(turn @ cov_s @ turn.T))
        outwards = _outwards(turn, sides, source_mask.shape, target_mask.shape)

        def vary(parameters: np.ndarray) -> np.ndarray:
            x, y, size, stretched = parameters
            scale = _varied(base, size, stretched, scale_limits, stretch_limit)
            matrix = np.diag(scale) @ turn
            return outwards(_about(matrix, c_s, c_t + radius * np.array([x, y])))

        return vary

    every = [variations(turn) for turn in turns]
    starts = [vary(np.zeros(4)) for vary in every]
    first = int(np.argmax(_overlaps(source_mask, target_mask, starts)))
    steps = [0.08, 0.08, 0.08, 0.15]
    return _improved(source_mask, target_mask, starts[first], every[first], steps)


def border_sides(boxes: np.ndarray, shapes: np.ndarray | tuple[int, int]) -> np.ndarray:
    """Which sides of their images segments reach.

    Parameters
    ----------
    boxes : (..., 4) int ndarray
        Bounding boxes: x, y, width, height.
    shapes : (..., 2) int ndarray or tuple of int
        H, W of their images.

    Returns
    -------
    (..., 4) bool ndarray
        Left, top, right, bottom.
    """
    start, size = np.split(np.asarray(boxes), 2, axis=-1)
    end = np.asarray(shapes)[..., ::-1]
    return np.concatenate([start <= 0, start + size >= end], axis=-1)


def size_range(scale_limits: tuple[float, float], min_fit: float) -> tuple[float, float]:
    """Areas of sources, relative to the target, with which an overlap is within reach.

    The IoU of two masks is at most the ratio of the smaller area to the larger one, and the scales
    bound what area a source can take.

    Parameters
    ----------
    scale_limits : tuple of float
        As in :func:`affine_from_moments`.
    min_fit : float
        The IoU wanted, in [0, 1].

    Returns
    -------
    low, high : float
        (0, inf) if `min_fit` is 0. The upper bound is that of a source that lies in the image.
    """
    _check_limits(scale_limits)
    low, high = scale_limits
    return min_fit / high**2, 1 / (min_fit * low**2) if min_fit else np.inf


def _improved(
    source_mask: np.ndarray,
    target_mask: np.ndarray,
    start: np.ndarray,
    vary: Callable[[np.ndarray], np.ndarray],
    steps: Sequence[float],
) -> np.ndarray:
    """Affine of a family, `vary`, that overlaps most, by the simplex method on small pictures.

    `start` is kept where at full size it overlaps as much.
    """
    small_target, to_small = _small(target_mask, margin=0.25)
    small_source, from_source = _small(source_mask, margin=0.02)
    from_small = cv2.invertAffineTransform(from_source)
    shape = small_target.shape[::-1]
    frame = cv2.warpAffine(np.ones(target_mask.shape, np.float32), to_small, shape)

    def loss(parameters: np.ndarray) -> float:
        affine = _chain(to_small, vary(parameters), from_small)
        moved = frame * cv2.warpAffine(small_source, affine, shape)
        shared = np.minimum(moved, small_target).sum()
        return -float(shared / (moved.sum() + small_target.sum() - shared))

    zero = np.zeros(len(steps))
    simplex = np.vstack([zero, np.diag(steps)])
    options = {"initial_simplex": simplex, "maxfev": _FIT_STEPS}
    best = vary(minimize(loss, zero, method="Nelder-Mead", options=options).x)
    overlap = _overlaps(source_mask, target_mask, [start, best])
    return best if overlap[1] > overlap[0] else start


def _overlaps(
    source_mask: np.ndarray, target_mask: np.ndarray, affines: Sequence[np.ndarray]
) -> np.ndarray:
    """IoU of the target with the source under each transform."""
    warped = warp_masks([source_mask] * len(affines), affines, target_mask.shape)
    return np.array([iou(mask, target_mask) for mask in warped])


def _quarter_turns(mirror: bool) -> list[np.ndarray]:
    """Turns by multiples of 90 degrees, the smallest first, and their mirror images."""
    turns = [_turn(np.pi / 2 * k).round() for k in (0, 1, 3, 2)]
    return turns + ([turn @ np.diag([-1.0, 1.0]) for turn in turns] if mirror else [])


def _fits_sides(turn: np.ndarray, sides: np.ndarray, offered: np.ndarray) -> bool:
    """Whether a turn carries every side of a source onto one of those offered."""
    carried = _OUTWARDS[sides] @ turn.T
    return all((normal == _OUTWARDS[offered]).all(axis=1).any() for normal in carried)


def _outwards(
    turn: np.ndarray, sides: np.ndarray, shape: tuple[int, int], frame: tuple[int, int]
) -> Callable[[np.ndarray], np.ndarray]:
    """Function that shifts an affine until the sides of its source lie at the frame or beyond."""
    # The outlines of the outermost pixels, (x, y).
    far_s, far_t = np.array(shape[::-1]) - 0.5, np.array(frame[::-1]) - 0.5
    corners = [(np.where(normal > 0, far_s, -0.5), turn @ normal) for normal in _OUTWARDS[sides]]

    def shifted(affine: np.ndarray) -> np.ndarray:
        affine = affine.copy()
        for corner, outward in corners:
            k = int(np.abs(outward).argmax())
            at = affine[k] @ [*corner, 1]
            if outward[k] > 0:
                affine[k, 2] += max(far_t[k] - at, 0)
            else:
                affine[k, 2] -= max(at + 0.5, 0)
        return affine

    return shifted


def _named(sides: np.ndarray) -> str:
    named = np.array(["left", "top", "right", "bottom"])[sides]
    return f"the {' and '.join(named)} side" if len(named) else "no side"


def _variations(affine, centre, radius, limits, stretch):
    """Function of (shift x, y, turn after, turn before, log size, log stretch) around an affine."""
    matrix = affine[:, :2]
    fixed = np.linalg.solve(matrix, centre - affine[:, 2])  # goes to the centre
    left, scale, right = np.linalg.svd(matrix)

    def vary(parameters: np.ndarray) -> np.ndarray:
        x, y, after, before, size, stretched = parameters
        varied = _varied(scale, size, stretched, limits, stretch)
        turned = _turn(after) @ left @ np.diag(varied) @ _turn(before) @ right
        return _about(turned, fixed, centre + radius * np.array([x, y]))

    return vary


def _small(mask: np.ndarray, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """Small picture of a mask, coverage in [0, 1], and the affine transform that leads to it."""
    x, y, w, h = _box(mask)
    pad = int(np.ceil(margin * max(w, h))) + 1
    part = np.pad(mask[y : y + h, x : x + w].astype(np.float32), pad)
    k = min(_FIT_SIDE / max(part.shape), 1.0)
    shape = [max(round(side * k), 1) for side in part.shape]
    small = cv2.resize(part, shape[::-1], interpolation=cv2.INTER_AREA)
    k_x, k_y = shape[1] / part.shape[1], shape[0] / part.shape[0]
    # Pixel centres: (x + 1/2) k - 1/2.
    shift_x = (pad - x + 0.5) * k_x - 0.5
    shift_y = (pad - y + 0.5) * k_y - 0.5
    return small, np.array([[k_x, 0, shift_x], [0, k_y, shift_y]])


def _chain(*affines: np.ndarray) -> np.ndarray:
    """One transform for several, the last one first."""
    product = np.eye(3)
    for affine in affines:
        product = product @ np.vstack([affine, [0, 0, 1]])
    return product[:2]


# --- warps ----------------------------------------------------------------------------------------


@torch.inference_mode()
def warp_images(
    images: Sequence[np.ndarray] | np.ndarray,
    affines: Sequence[np.ndarray] | np.ndarray,
    shape: tuple[int, int],
    *,
    device: str = "cpu",
) -> np.ndarray:
    r"""Warp images into frames of one shape, mirrored beyond their border.

    Interpolation is by Lanczos' windowed sinc of four lobes [duchon]_ over 8 x 8 pixels, so that
    texture stays as sharp as it was,

    .. math:: w(x) = \mathrm{sinc}(x)\, \mathrm{sinc}(x / 4), \quad |x| < 4,

    with the weights of each pixel scaled to a sum of 1. Images that shrink are smoothed before, by
    a Gaussian of :math:`\sigma = (1/s - 1) / 2` at a scale s, so that nothing aliases.

    Parameters
    ----------
    images : (n, h, w, 3) uint8 ndarray or sequence
    affines : (n, 2, 3) ndarray or sequence
    shape : tuple of int
        H, W of the frames.
    device : str
        A torch device.

    Returns
    -------
    (n, H, W, 3) uint8 ndarray

    Raises
    ------
    ValueError
        If the numbers of images and transforms differ, or a transform cannot be inverted.

    References
    ----------
    .. [duchon] Duchon, Lanczos filtering in one and two dimensions, J. Appl. Meteorology, 1979.
    """
    stack = np.ascontiguousarray(np.asarray(images))
    at = _back(len(stack), affines, shape, device)
    x = torch.from_numpy(stack).to(device).permute(0, 3, 1, 2).float()
    out = _lanczos(_smoothed(x, affines), at).round().clamp(0, 255)
    return out.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


@torch.inference_mode()
def warp_masks(
    masks: Sequence[np.ndarray] | np.ndarray,
    affines: Sequence[np.ndarray] | np.ndarray,
    shape: tuple[int, int],
    *,
    device: str = "cpu",
) -> np.ndarray:
    """Warp masks into frames of one shape: inside is what they cover, bilinearly, at least by half.

    Parameters, returns and errors as :func:`warp_images`, with (n, h, w) bool masks.
    """
    stack = np.ascontiguousarray(np.asarray(masks), np.uint8)
    (h, w), at = stack.shape[1:], _back(len(stack), affines, shape, device)
    # grid_sample wants -1 and 1 at the outer edges of the outermost pixels.
    grid = (2 * at.permute(0, 2, 3, 1) + 1) / torch.tensor([w, h], device=at.device) - 1
    x = torch.from_numpy(stack).to(device)[:, None].float()
    inside = grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (inside[:, 0] >= 0.5).cpu().numpy()


def warp_image(image: np.ndarray, affine: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """One image of :func:`warp_images`."""
    return warp_images(image[None], affine[None], shape)[0]


def warp_mask(mask: np.ndarray, affine: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """One mask of :func:`warp_masks`."""
    return warp_masks(mask[None], affine[None], shape)[0]


def reach(
    mask: np.ndarray, affine: np.ndarray, shape: tuple[int, int], *, margin: int = 2
) -> tuple[slice, slice]:
    """Box of a frame (rows, columns) outside of which the warped mask has no pixel.

    Parameters
    ----------
    mask : (h, w) bool ndarray
        Not empty.
    affine : (2, 3) ndarray
    shape : tuple of int
        H, W of the frame.
    margin : int
        Pixels around it.

    Returns
    -------
    tuple of slice
        Within the frame; empty where the mask leaves it.
    """
    x, y, w, h = _box(mask)
    corners = np.array([[x - 1, y - 1], [x + w, y - 1], [x - 1, y + h], [x + w, y + h]], float)
    moved = corners @ affine[:, :2].T + affine[:, 2]
    low = np.floor(moved.min(axis=0)).astype(int) - margin
    high = np.ceil(moved.max(axis=0)).astype(int) + margin + 1
    return tuple(
        slice(int(np.clip(low[k], 0, side)), int(np.clip(high[k], 0, side)))
        for k, side in ((1, shape[0]), (0, shape[1]))
    )


# --- inner parts ----------------------------------------------------------------------------------


def _back(
    n: int, affines: Sequence[np.ndarray] | np.ndarray, frame: tuple[int, int], device: str
) -> torch.Tensor:
    """Where in its image (x, y) each pixel of a frame comes from, (n, 2, H, W)."""
    affines = np.asarray(affines, np.float64)
    if affines.shape != (n, 2, 3):
        raise ValueError(
            f"{n} images, but affine transforms of shape {affines.shape}: give ({n}, 2, 3)"
        )
    determinant = np.linalg.det(affines[:, :, :2])
    if not np.isfinite(affines).all() or (np.abs(determinant) < 1e-12).any():
        raise ValueError("an affine transform cannot be inverted: it flattens its image")
    back = np.linalg.inv(affines[:, :, :2])
    offset = -np.einsum("nij,nj->ni", back, affines[:, :, 2])
    theta = np.concatenate([back, offset[:, :, None]], axis=2).astype(np.float32)
    theta = torch.from_numpy(theta).to(device)[..., None, None]
    along = torch.arange(frame[1], device=theta.device).float()
    down = torch.arange(frame[0], device=theta.device).float()[:, None]
    return theta[:, :, 0] * along + (theta[:, :, 1] * down + theta[:, :, 2])


def _smoothed(x: torch.Tensor, affines: Sequence[np.ndarray] | np.ndarray) -> torch.Tensor:
    """Images without the detail that their transforms make too small for a pixel."""
    for k, affine in enumerate(affines):
        scale = np.sqrt(abs(np.linalg.det(affine[:, :2])))
        sigma = (1 / scale - 1) / 2
        if sigma > _LEAST_BLUR:
            side = min(2 * int(np.ceil(3 * sigma)) + 1, *(2 * d - 1 for d in x.shape[-2:]))
            x[k] = gaussian_blur(x[k], side, sigma)
    return x


def _lanczos(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Values of images (n, c, h, w) at positions (n, 2, H, W)."""
    (n, c, h, w), frame = x.shape, at.shape[-2:]
    taps = torch.arange(1 - LOBES, 1 + LOBES, device=at.device)[:, None, None]
    first = at.floor()
    away = (at - first)[:, :, None] - taps  # (n, 2, taps, H, W)
    weight = torch.sinc(away) * torch.sinc(away / LOBES)
    weight = weight / weight.sum(2, keepdim=True)
    column = _mirrored(first[:, 0, None].long() + taps, w)
    row = _mirrored(first[:, 1, None].long() + taps, h) * w
    flat, out = x.flatten(2), x.new_zeros(n, c, *frame)
    for j in range(2 * LOBES):
        line = torch.zeros_like(out)
        for i in range(2 * LOBES):
            index = (row[:, j] + column[:, i]).reshape(n, 1, -1).expand(-1, c, -1)
            line += flat.gather(2, index).view_as(out) * weight[:, 0, i, None]
        out += line * weight[:, 1, j, None]
    return out


def _mirrored(index: torch.Tensor, length: int) -> torch.Tensor:
    """Indices beyond 0 and length - 1, mirrored there."""
    if length == 1:
        return torch.zeros_like(index)
    index = index.remainder(2 * length - 2)
    return torch.minimum(index, 2 * length - 2 - index)


def _check_limits(limits: tuple[float, float], stretch: float = 1.0) -> None:
    if not 0 < limits[0] <= limits[1]:
        raise ValueError(f"scale_limits={limits}: give 0 < low <= high")
    if not stretch >= 1:
        raise ValueError(f"stretch_limit={stretch}: give a ratio of 1 or more")


def _limited(scale: np.ndarray, limits: tuple[float, float], stretch: float) -> np.ndarray:
    """Scales of the two axes with their ratio, then their size, held within the limits."""
    mean = np.sqrt(scale[0] * scale[1])
    half = np.sqrt(stretch)
    return np.clip(np.clip(scale, mean / half, mean * half), *limits)


def _varied(
    scale: np.ndarray, size: float, stretched: float, limits: tuple[float, float], stretch: float
) -> np.ndarray:
    """Scales of the two axes, changed by the logarithms of a size and of a ratio, then limited."""
    return _limited(scale * np.exp(size + np.array([stretched, -stretched]) / 2), limits, stretch)


def _axes(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, largest first, and a proper rotation whose columns are the axes."""
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1], vectors[:, ::-1].copy()
    # Sign of the long axis fixed (x up, then y up), the short one follows by a quarter turn.
    if vectors[0, 0] < 0 or (vectors[0, 0] == 0 and vectors[1, 0] < 0):
        vectors[:, 0] *= -1
    vectors[:, 1] = [-vectors[1, 0], vectors[0, 0]]
    return values, vectors


def _turn(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _about(matrix: np.ndarray, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Affine with linear part `matrix` that maps the point `source` to `target`."""
    return np.column_stack([matrix, target - matrix @ source])


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    x, y, w, h = cv2.boundingRect(np.ascontiguousarray(mask, np.uint8))
    if w == 0:
        raise ValueError("the mask is empty: a segment needs at least one pixel")
    return x, y, w, h
