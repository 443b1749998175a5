"""The SDE between tissue and noise, and inpainting by running it backwards under a constraint.

Forward, an image latent z is drowned in noise (Eq. 2 of the paper); backward, the score turns noise
into tissue (Eq. 3); the score is learned by denoising (Eq. 4). Inpainting runs backward while the
known part of the picture is imposed at every step: ``projection`` replaces the known latents,
``mcg`` also corrects the unknown ones by a gradient (Chung et al. 2022), ``repaint`` travels back
and forth in time (Lugmayr et al. 2022).

Notation: a_t is the cumulative product of 1 - beta ("alpha bar"),
z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) eps; s is the next lower time of the subsequence that is
visited, and s = -1 stands for a = 1: no noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from helpers.latent import LATENT_SCHEDULE, LatentDiffusion, latent_known, to_tensor, to_uint8

__all__ = [
    "METHODS",
    "VPSDE",
    "GaussianPrior",
    "ddim_step",
    "dsm_loss",
    "euler_maruyama",
    "fill_unknown",
    "inpaint",
    "inpaint_latents",
    "network_calls",
    "noise_strip",
    "spawn",
    "timesteps",
    "tweedie",
]

#: Ways to inpaint.
METHODS = ("mcg", "projection", "repaint")

#: Noise predictor: (z_t, t) to eps, both of shape (N, ...).
Eps = Callable[[torch.Tensor, int], torch.Tensor]


# --- the SDE --------------------------------------------------------------------------------------


class VPSDE:
    """Variance-preserving SDE, dz = -beta(t) z / 2 dt + sqrt(beta(t)) dw, t in [0, 1] (Eq. 2).

    The interface is that of ``sde_lib.py`` of score_sde (Song et al. 2021); beta(t) is the limit of
    the scaled-linear schedule of latent diffusion, whose square root is linear in t.

    Parameters
    ----------
    schedule : mapping, optional
        ``num_train_timesteps``, ``beta_start``, ``beta_end`` of the discrete chain, by default
        :data:`helpers.latent.LATENT_SCHEDULE`.

    Attributes
    ----------
    N : int
        Steps of the discrete chain.
    discrete_betas, alphas_cumprod : (N,) float64 Tensor
        The discrete chain.
    """

    def __init__(self, schedule: Mapping[str, Any] | None = None) -> None:
        schedule = dict(schedule or LATENT_SCHEDULE)
        if schedule.get("beta_schedule", "scaled_linear") != "scaled_linear":
            raise ValueError(f"beta_schedule {schedule['beta_schedule']!r}: use 'scaled_linear'")
        self.N = int(schedule["num_train_timesteps"])
        self._r0 = math.sqrt(float(schedule["beta_start"]))
        self._r1 = math.sqrt(float(schedule["beta_end"]))
        self.discrete_betas = torch.linspace(self._r0, self._r1, self.N, dtype=torch.float64) ** 2
        self.alphas_cumprod = torch.cumprod(1.0 - self.discrete_betas, 0)

    @property
    def T(self) -> float:
        """End of the time interval."""
        return 1.0

    def beta(self, t: torch.Tensor) -> torch.Tensor:
        """Rate of the noise at time t in [0, 1]."""
        return self.N * (self._r0 + t * (self._r1 - self._r0)) ** 2

    def _integral(self, t: torch.Tensor) -> torch.Tensor:
        """Integral of beta from 0 to t."""
        d = self._r1 - self._r0
        return self.N * ((self._r0 + t * d) ** 3 - self._r0**3) / (3 * d)

    def sde(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Drift f(x, t) and diffusion g(t).

        Parameters
        ----------
        x : (N, ...) Tensor
        t : (N,) Tensor
            Times in [0, 1].

        Returns
        -------
        drift : (N, ...) Tensor
        diffusion : (N,) Tensor
        """
        beta = self.beta(t)
        return -0.5 * _like(beta, x) * x, beta.sqrt()

    def marginal_prob(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of p(z_t | z_0 = x).

        Returns
        -------
        mean : (N, ...) Tensor
        std : (N,) Tensor
        """
        integral = self._integral(t)
        return _like(torch.exp(-0.5 * integral), x) * x, torch.sqrt(-torch.expm1(-integral))

    def prior_sampling(
        self, shape: Sequence[int], *, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Noise of the end of time, N(0, 1)."""
        return torch.randn(tuple(shape), generator=generator)

    def prior_logp(self, z: torch.Tensor) -> torch.Tensor:
        """Log density of the noise at the end of time, one value a sample."""
        z = z.flatten(1)
        return -0.5 * (z.shape[1] * math.log(2 * math.pi) + z.square().sum(1))

    def discretize(self, x: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One step of the chain from i - 1 to i: x_i = (x + f) + G noise (Ho et al. 2020).

        Parameters
        ----------
        i : (N,) int Tensor
            Index 0 to N - 1 in the chain.

        Returns
        -------
        f : (N, ...) Tensor
        G : (N,) Tensor
        """
        beta = self.discrete_betas[i].to(x.dtype)
        return (_like((1 - beta).sqrt(), x) - 1) * x, beta.sqrt()

    def reverse(
        self, score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], *,
        probability_flow: bool = False,
    ) -> ReverseSDE:  # fmt: skip
        """Return the SDE that runs back in time (Eq. 3), or its deterministic flow.

        Parameters
        ----------
        score : callable
            ``score(x, t)`` with t : (N,) in [0, 1] gives the gradient of log p_t at x.
        probability_flow : bool
            Drop the noise and halve the score: the same marginals without randomness.
        """
        return ReverseSDE(self, score, probability_flow)


class ReverseSDE:
    """dz = (f - g^2 score) dt + g dw with time running from 1 to 0; see :meth:`VPSDE.reverse`."""

    def __init__(self, forward: VPSDE, score: Callable, probability_flow: bool) -> None:
        self.forward, self.score, self.probability_flow = forward, score, probability_flow
        self.N, self.T = forward.N, forward.T

    def sde(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Drift and diffusion of the reverse SDE."""
        drift, diffusion = self.forward.sde(x, t)
        factor = 0.5 if self.probability_flow else 1.0
        drift = drift - factor * _like(diffusion**2, x) * self.score(x, t)
        return drift, torch.zeros_like(diffusion) if self.probability_flow else diffusion


def _like(v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(N,) to (N, 1, ...), in the type of x."""
    return v.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def euler_maruyama(
    reverse: ReverseSDE, x: torch.Tensor, n: int, *, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Run a reverse SDE from noise at t = 1 to t = 0 in n equal steps.

    Parameters
    ----------
    x : (N, ...) Tensor
        Noise, see :meth:`VPSDE.prior_sampling`.
    n : int
        Steps. The last one adds no noise.

    Returns
    -------
    (N, ...) Tensor
    """
    dt = 1.0 / n
    for k in range(n):
        t = torch.full((len(x),), 1.0 - k * dt, dtype=x.dtype)
        drift, diffusion = reverse.sde(x, t)
        x = x - drift * dt
        if k < n - 1:
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            x = x + _like(diffusion, x) * math.sqrt(dt) * noise
    return x


def dsm_loss(
    network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    z0: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    *,
    t: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    prediction: str = "epsilon",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Denoising score matching (Eq. 4), one value a sample.

    With score = -eps / sqrt(1 - a_t) the loss of Eq. 4, weighted by 1 - a_t, is the squared error
    of the noise. For ``v_prediction``, v = sqrt(a) eps - sqrt(1 - a) z_0, the weight is
    (1 - a_t) / a_t: high noise counts more.

    Parameters
    ----------
    network : callable
        ``network(z_t, t)`` predicts eps, or v.
    z0 : (N, ...) Tensor
        Clean latents.
    alphas_cumprod : (T,) Tensor
        a_t of the chain.
    t : (N,) int Tensor, optional
        Time steps; uniform by default.
    noise : (N, ...) Tensor, optional
        Noise to add; normal by default.
    prediction : {"epsilon", "v_prediction"}
    generator : torch.Generator, optional
        Source of `t` and `noise`.

    Returns
    -------
    (N,) Tensor
    """
    if t is None:
        t = torch.randint(len(alphas_cumprod), (len(z0),), generator=generator)
    if noise is None:
        noise = torch.randn(z0.shape, generator=generator, dtype=z0.dtype)
    t, noise = t.to(z0.device), noise.to(z0.device)
    a = _like(alphas_cumprod.to(z0.device)[t], z0)
    z_t = a.sqrt() * z0 + (1 - a).sqrt() * noise
    target = noise if prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * z0
    return (network(z_t, t) - target).square().flatten(1).mean(1)


# --- steps ----------------------------------------------------------------------------------------


def timesteps(n: int, T: int = 1000, *, spacing: str = "trailing") -> list[int]:
    """Times visited by n steps, highest first.

    Parameters
    ----------
    n : int
        Steps, 1 to T.
    T : int
        Steps of the chain.
    spacing : {"trailing", "leading"}
        ``leading`` is that of latent diffusion (``steps_offset=1``): with few steps it starts well
        below T, where the latents are not yet pure noise. ``trailing`` always starts at T - 1. With
        500 of 1000 steps both are the same.

    Returns
    -------
    list of int
        Strictly decreasing, in 0 to T - 1.
    """
    if not 1 <= n <= T:
        raise ValueError(f"steps={n} is not between 1 and the {T} steps of the schedule")
    if spacing == "leading":
        return [min(k * (T // n) + 1, T - 1) for k in reversed(range(n))]
    if spacing == "trailing":
        return [round(T - k * T / n) - 1 for k in range(n)]
    raise ValueError(f"spacing {spacing!r}: use 'trailing' or 'leading'")


def tweedie(z_t: torch.Tensor, eps: torch.Tensor, a_t: float) -> torch.Tensor:
    """Posterior mean of z_0 given z_t: (z_t - sqrt(1 - a_t) eps) / sqrt(a_t)."""
    return (z_t - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)


def ddim_step(
    z0: torch.Tensor, eps: torch.Tensor, a_t: float, a_s: float, *, eta: float = 0.0,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """One DDIM step from level a_t to level a_s (Song et al. 2021, Eq. 12).

    Parameters
    ----------
    z0, eps : (N, ...) Tensor
        Tweedie estimate and noise at level a_t.
    a_t, a_s : float
        Cumulative alphas of this and the next level, a_t <= a_s <= 1.
    eta : float
        0 is deterministic, 1 has the variance of ancestral sampling.
    noise : (N, ...) Tensor, optional
        Needed when eta > 0.

    Returns
    -------
    (N, ...) Tensor
        z_s = sqrt(a_s) z0 + sqrt(1 - a_s - sigma^2) eps + sigma noise.
    """
    sigma = 0.0
    if eta > 0:
        sigma = eta * math.sqrt(max((1 - a_s) / (1 - a_t) * (1 - a_t / a_s), 0.0))
    z_s = math.sqrt(a_s) * z0 + math.sqrt(max(1 - a_s - sigma**2, 0.0)) * eps
    if sigma > 0:
        if noise is None:
            raise ValueError(f"eta={eta} draws noise: give noise, or eta=0")
        z_s = z_s + sigma * noise
    return z_s


def spawn(generator: torch.Generator | int | None, n: int) -> list[torch.Generator]:
    """N independent CPU generators from one, so that each image has its own noise."""
    if not isinstance(generator, torch.Generator):
        generator = torch.Generator().manual_seed(0 if generator is None else int(generator))
    seeds = torch.randint(2**62, (n,), generator=generator)
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def _noise(
    like: torch.Tensor, generators: Sequence[torch.Generator] | torch.Generator
) -> torch.Tensor:
    """Normal noise, each sample from its own generator, or all from one."""
    if isinstance(generators, torch.Generator):
        return torch.randn(like.shape, generator=generators, dtype=like.dtype).to(like.device)
    rows = [torch.randn(like.shape[1:], generator=g, dtype=like.dtype) for g in generators]
    return torch.stack(rows).to(like.device)


def _path(times: Sequence[int], jump_length: int, n_resample: int) -> list[tuple[int, int]]:
    """Moves (from, to) between time levels; up-moves are the time travel of RePaint."""
    if jump_length < 1 or n_resample < 1:
        raise ValueError(f"jump_length={jump_length}, n_resample={n_resample}: both are at least 1")
    jump_length = max(1, min(jump_length, len(times) // 2))
    levels = [*times, -1]
    left = {k: n_resample - 1 for k in range(jump_length, len(times), jump_length)}
    moves, k = [], 0
    while k < len(times):
        moves.append((levels[k], levels[k + 1]))
        k += 1
        if left.get(k, 0) > 0:
            left[k] -= 1
            moves.append((levels[k], levels[k - jump_length]))
            k -= jump_length
    return moves


def network_calls(
    steps: int, *, method: str = "mcg", T: int = 1000, jump_length: int = 5, n_resample: int = 3
) -> int:
    """Forward passes of the network that :func:`inpaint` makes for one image."""
    times = timesteps(steps, T)
    travel = n_resample if method == "repaint" else 1
    return sum(s < t for t, s in _path(times, jump_length, travel))


def inpaint_latents(
    eps: Eps,
    z_y: torch.Tensor,
    m: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    *,
    method: str = "mcg",
    steps: int = 500,
    eta: float = 1.0,
    alpha: float = 1.0,
    norm: str = "l2",
    spacing: str = "trailing",
    jump_length: int = 5,
    n_resample: int = 3,
    generators: Sequence[torch.Generator] | torch.Generator,
    progress: bool = False,
    callback: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Sample latents whose known part is given, with any noise predictor.

    Parameters
    ----------
    eps : callable
        ``eps(z_t, t)`` with an int t, e.g. :meth:`helpers.latent.LatentDiffusion.eps`.
    z_y : (N, ...) Tensor
        Latents of the pasted images; only their known part is used.
    m : (N, ...) Tensor
        1 = known, 0 = unknown, broadcastable to `z_y`.
    alphas_cumprod : (T,) Tensor
        a_t of the chain.
    method, steps, eta, alpha, norm, spacing, jump_length, n_resample
        See :func:`inpaint`.
    generators : sequence of N torch.Generator, or torch.Generator
        Noise of each sample; one generator for all is faster where samples need not be independent
        of their companions.
    callback : callable, optional
        Called with (t, z_t, Tweedie estimate) at each step.

    Returns
    -------
    (N, ...) Tensor
        Samples at a = 1, equal to `z_y` where m = 1.

    Raises
    ------
    FloatingPointError
        If a sample becomes NaN or infinite.
    """
    from tqdm import tqdm

    if method not in METHODS:
        raise ValueError(f"method {method!r}: use one of {', '.join(METHODS)}")
    if not isinstance(generators, torch.Generator) and len(generators) != len(z_y):
        raise ValueError(f"{len(generators)} generators for {len(z_y)} samples: give one each")
    a = [float(v) for v in alphas_cumprod.double()] + [1.0]  # a[-1]: no noise
    travel = n_resample if method == "repaint" else 1
    moves = _path(timesteps(steps, len(a) - 1, spacing=spacing), jump_length, travel)
    z = _noise(z_y, generators)
    for t, s in tqdm(moves, desc=f"{method} inpainting", disable=not progress, leave=False):
        if s > t:  # time travel: noise everything up again
            ratio = a[s] / a[t]
            z = math.sqrt(ratio) * z + math.sqrt(1 - ratio) * _noise(z, generators)
            continue
        # 1. Noise, Tweedie estimate and, for MCG, the gradient of the misfit of the known part.
        e, z0, g = _predict(eps, z, t, a[t], z_y, m, method == "mcg" and alpha > 0, norm)
        if callback is not None:
            callback(t, z, z0)
        # 2. DDIM step to level s, corrected.
        last = s < 0
        xi = _noise(z, generators) if eta > 0 and not last else None
        z = ddim_step(z0, e, a[t], a[s], eta=0.0 if last else eta, noise=xi)
        if g is not None:
            z = z - alpha * g
        # 3. The known part, noised to level s (not t); at the end exactly z_y.
        known = z_y
        if not last:
            known = math.sqrt(a[s]) * z_y + math.sqrt(1 - a[s]) * _noise(z, generators)
        z = torch.where(m.bool(), known, z)
        if not bool(torch.isfinite(z).all()):
            bad = (~torch.isfinite(z)).flatten(1).any(1).nonzero().flatten().tolist()
            raise FloatingPointError(
                f"{method} inpainting gave NaN or infinity at time {t} in samples {bad}: "
                f"lower alpha (now {alpha}), use full precision, or check the weights"
            )
    return z


def _predict(
    eps: Eps, z: torch.Tensor, t: int, a_t: float, z_y: torch.Tensor, m: torch.Tensor,
    gradient: bool, norm: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Noise, Tweedie estimate, and gradient with respect to z_t of the misfit of the known part."""
    if not gradient:
        with torch.no_grad():
            e = eps(z, t)
        return e, tweedie(z, e, a_t), None
    with torch.enable_grad():
        z_t = z.detach().requires_grad_(True)
        e = eps(z_t, t)
        z0 = tweedie(z_t, e, a_t)
        misfit = (m * (z_y - z0)).flatten(1)
        # One norm a sample: their sum has for each sample the gradient of its own norm.
        if norm == "l2":
            size = torch.linalg.vector_norm(misfit, dim=1)
        elif norm == "squared":
            size = misfit.square().sum(1)
        else:
            raise ValueError(f"norm {norm!r}: use 'l2' or 'squared'")
        (g,) = torch.autograd.grad(size.sum(), z_t)
    return e.detach(), z0.detach(), g


# --- images ---------------------------------------------------------------------------------------


def fill_unknown(image: np.ndarray, unknown: np.ndarray) -> np.ndarray:
    """Replace unknown pixels by the nearest known one, so that the encoder sees no artefact.

    The latents of known cells depend on pixels around them; what the hole happens to hold (black,
    noise, the removed segment) would leak into them.

    Parameters
    ----------
    image : (H, W, 3) uint8 ndarray
    unknown : (H, W) bool ndarray

    Returns
    -------
    (H, W, 3) uint8 ndarray
    """
    from scipy.ndimage import distance_transform_edt

    if unknown.all():
        return np.full_like(image, 128)
    _, (y, x) = distance_transform_edt(unknown, return_indices=True)
    return image[y, x]


def inpaint(
    model: LatentDiffusion,
    images: np.ndarray,
    unknown: np.ndarray,
    *,
    method: str = "mcg",
    steps: int = 500,
    eta: float = 1.0,
    alpha: float = 1.0,
    norm: str = "l2",
    spacing: str = "trailing",
    mask_rule: str = "all",
    fill: str = "nearest",
    jump_length: int = 5,
    n_resample: int = 3,
    generator: torch.Generator | Sequence[torch.Generator] | int | None = None,
    batch: int | None = None,
    progress: bool = False,
    callback: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
) -> np.ndarray:
    """Make the unknown pixels of images anew; all others come back bit for bit.

    Parameters
    ----------
    model : LatentDiffusion
    images : (N, H, W, 3) uint8 ndarray
        Pasted images; what unknown pixels hold does not matter (with ``fill="nearest"``).
    unknown : (N, H, W) bool ndarray
        True where the image shall be made anew.
    method : {"mcg", "projection", "repaint"}
        Known latents replaced at every step; ``mcg`` also moves the unknown ones along the gradient
        of the misfit of the Tweedie estimate; ``repaint`` repeats stretches of the way.
    steps : int
        DDIM steps, 1 to the length of the schedule.
    eta : float
        Noise of a step: 0 none, 1 that of ancestral sampling.
    alpha : float
        Weight of the MCG gradient.
    norm : {"l2", "squared"}
        Misfit whose gradient is taken, one a sample.
    spacing : {"trailing", "leading"}
        See :func:`timesteps`.
    mask_rule : {"all", "any"}
        A latent cell is known if all its pixels are, or if any is.
    fill : {"nearest", "keep"}
        What the encoder sees in the hole: the nearest known pixel, or the image as it is.
    jump_length, n_resample : int
        RePaint: length of a repeated stretch in steps (at most half of them), and how often it is
        walked.
    generator : torch.Generator, sequence of N torch.Generator, or int
        Source of the noise. Each image draws from its own generator, so that its result does not
        depend on its companions.
    batch : int, optional
        Images at once; all by default. Halved, with a message, when the memory does not suffice.
    progress : bool
        Show a progress bar.
    callback : callable, optional
        Called with (t, z_t, Tweedie estimate) at each step of each batch.

    Returns
    -------
    (N, H, W, 3) uint8 ndarray

    Raises
    ------
    ValueError
        If shapes, types or options do not fit.
    FloatingPointError
        If a sample becomes NaN or infinite.
    """
    images, unknown = _check(images, unknown)
    if mask_rule not in ("all", "any") or fill not in ("nearest", "keep"):
        raise ValueError(
            f"mask_rule={mask_rule!r}, fill={fill!r}: use 'all' or 'any', and 'nearest' or 'keep'"
        )
    N = len(images)
    generators = list(generator) if isinstance(generator, Sequence) else spawn(generator, N)
    if len(generators) != N:
        raise ValueError(f"{len(generators)} generators for {N} images: give one each, or one")
    options = {"method": method, "steps": steps, "eta": eta, "alpha": alpha, "norm": norm,
               "spacing": spacing, "jump_length": jump_length, "n_resample": n_resample,
               "progress": progress, "callback": callback}  # fmt: skip
    out = images.copy()
    todo = [i for i in range(N) if unknown[i].any()]
    size = max(1, batch or len(todo) or 1)
    while todo:
        part = todo[:size]
        states = [generators[i].get_state() for i in part]
        try:
            out[part] = _inpaint_batch(
                model, images[part], unknown[part], [generators[i] for i in part],
                mask_rule, fill, options,
            )  # fmt: skip
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
            size = len(part) // 2
            print(f"not enough memory for {len(part)} images at once: going on with {size}")
            for i, state in zip(part, states, strict=True):
                generators[i].set_state(state)
            continue
        todo = todo[size:]
    return out


def _check(images: np.ndarray, unknown: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    images, unknown = np.asarray(images), np.asarray(unknown)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"images of shape {images.shape} and type {images.dtype}: give (N, H, W, 3) uint8"
        )
    if unknown.shape != images.shape[:3] or unknown.dtype != bool:
        raise ValueError(
            f"unknown of shape {unknown.shape} and type {unknown.dtype} does not fit images of "
            f"shape {images.shape}: give (N, H, W) bool"
        )
    return images, unknown


def _inpaint_batch(
    model: LatentDiffusion, images: np.ndarray, unknown: np.ndarray,
    generators: Sequence[torch.Generator], mask_rule: str, fill: str, options: dict[str, Any],
) -> np.ndarray:  # fmt: skip
    H, W = images.shape[1:3]
    pads = [(0, 0), (0, -H % model.multiple), (0, -W % model.multiple)]
    hole = np.pad(unknown, pads, mode="symmetric")
    pasted = np.pad(images, [*pads, (0, 0)], mode="symmetric")
    if fill == "nearest":
        pasted = np.stack([fill_unknown(*pair) for pair in zip(pasted, hole, strict=True)])
    if mask_rule == "all":
        m = latent_known(~hole, model.factor)
    else:
        m = 1.0 - latent_known(hole, model.factor)
    with torch.no_grad():
        z_y = model.encode(to_tensor(pasted, device=model.device))
        z = inpaint_latents(
            model.eps,
            z_y,
            m.to(model.device),
            model.alphas_cumprod,
            generators=generators,
            **options,
        )
        decoded = to_uint8(model.decode(z))[:, :H, :W]
    # Composite in uint8: pixels that were known stay bit-identical.
    return np.where(unknown[..., None], decoded, images)


def noise_strip(
    model: LatentDiffusion,
    image: np.ndarray,
    unknown: np.ndarray,
    *,
    n_shown: int = 6,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Pictures of the way from noise to image.

    Parameters
    ----------
    image : (H, W, 3) uint8 ndarray
    unknown : (H, W) bool ndarray
        All True makes a picture from nothing.
    n_shown : int
        Pictures along the way.
    **options
        Arguments of :func:`inpaint`.

    Returns
    -------
    noisy : (n_shown, H, W, 3) uint8 ndarray
        Decoded z_t.
    estimates : (n_shown, H, W, 3) uint8 ndarray
        Decoded Tweedie estimates of z_0.
    times : list of int
        t of each.
    """
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def keep(t: int, z: torch.Tensor, z0: torch.Tensor) -> None:
        seen.append((t, z.clone(), z0.clone()))

    inpaint(model, image[None], unknown[None], callback=keep, **options)
    pick = np.unique(np.linspace(0, len(seen) - 1, n_shown).round().astype(int))
    H, W = image.shape[:2]
    with torch.no_grad():
        noisy, clean = (
            np.concatenate([to_uint8(model.decode(seen[i][k]))[:, :H, :W] for i in pick])
            for k in (1, 2)
        )
    return noisy, clean, [seen[i][0] for i in pick]


# --- a case with a known answer -------------------------------------------------------------------


class GaussianPrior:
    """Normal prior N(mean, cov), for which noise, score and conditional posterior are exact.

    Parameters
    ----------
    mean : (d,) array_like
    cov : (d, d) array_like
        Symmetric, positive definite.
    alphas_cumprod : (T,) Tensor
        a_t of the chain.
    """

    def __init__(self, mean: Any, cov: Any, alphas_cumprod: torch.Tensor) -> None:
        self.mean = torch.as_tensor(np.asarray(mean), dtype=torch.float64)
        self.cov = torch.as_tensor(np.asarray(cov), dtype=torch.float64)
        self.alphas_cumprod = alphas_cumprod.double()
        self._values, self._vectors = torch.linalg.eigh(self.cov)

    def score(self, z: torch.Tensor, a: float) -> torch.Tensor:
        """Gradient of the log density of z_t, which is N(sqrt(a) mean, a cov + (1 - a) 1)."""
        precision = (self._vectors / (a * self._values + 1 - a)) @ self._vectors.T
        return -(z.double() - math.sqrt(a) * self.mean) @ precision

    def eps(self, z: torch.Tensor, t: int) -> torch.Tensor:
        """Exact noise predictor, (N, d) to (N, d)."""
        a = float(self.alphas_cumprod[t])
        return (-math.sqrt(1 - a) * self.score(z, a)).to(z.dtype)

    def posterior(self, known: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of the unknown coordinates given the known ones.

        Parameters
        ----------
        known : (d,) bool ndarray
        values : (d,) ndarray
            Only its known coordinates are used.

        Returns
        -------
        mean : (u,) ndarray
        cov : (u, u) ndarray
        """
        known = np.asarray(known, bool)
        mu, S = self.mean.numpy(), self.cov.numpy()
        gain = np.linalg.solve(S[np.ix_(known, known)], S[np.ix_(known, ~known)]).T
        mean = mu[~known] + gain @ (np.asarray(values, float)[known] - mu[known])
        return mean, S[np.ix_(~known, ~known)] - gain @ S[np.ix_(known, ~known)]

    def sample(
        self, known: np.ndarray, values: np.ndarray, n: int, *, seed: int = 0, **options: Any
    ) -> np.ndarray:
        """Draw n samples of the unknown coordinates with :func:`inpaint_latents`.

        Returns
        -------
        (n, u) float64 ndarray
        """
        known = np.asarray(known, bool)
        y = torch.as_tensor(np.asarray(values), dtype=torch.float64).expand(n, -1)
        m = torch.as_tensor(known, dtype=torch.float64).expand(n, -1)
        generator = torch.Generator().manual_seed(seed)
        z = inpaint_latents(self.eps, y, m, self.alphas_cumprod, generators=generator, **options)
        return z.numpy()[:, ~known]
