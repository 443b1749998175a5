"""Samplers: latents whose known part is given, by running the SDE backward under a constraint.

A sampler is a *method*, a *solver* and its numbers (:class:`Sampling`). The method says how the
known part m * z_y is imposed on the estimate of the clean latents:

- ``projection`` only puts the known part back after each step;
- ``repaint`` does so too, and walks stretches of the way several times (Lugmayr et al. 2022);
- ``mcg`` also moves the unknown part along the gradient of the misfit (Chung et al. 2022);
- ``mmps`` conditions the estimate itself, with the covariance that the network implies: moment
  matching posterior sampling (Rozet et al. 2024). Exact for a normal prior, and without a weight.

The solver says how to go from one noise level to the next: ``ddim``, ``euler`` (Euler-Maruyama on
the reverse SDE), ``dpm++`` and ``sde-dpm++`` (DPM-Solver++ of second order, multistep).

Notation: a_t is the cumulative product of 1 - beta ("alpha bar"); s is the next lower time of the
subsequence that is visited, and s = -1 stands for a = 1: no noise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from helpers.sde import GaussianPrior

#: Ways to impose the known part.
METHODS = ("mmps", "mcg", "projection", "repaint")
#: Ways to go from one noise level to the next.
SOLVERS = ("ddim", "euler", "dpm++", "sde-dpm++")

#: Noise predictor: (z_t, t) to eps, both of shape (N, ...).
Eps = Callable[[torch.Tensor, int], torch.Tensor]
Generators = Sequence[torch.Generator] | torch.Generator

#: Where noise levels lie.
SPACINGS = ("karras", "trailing", "leading")
#: Exponent of the spacing of Karras et al. 2022.
RHO = 7
#: Steps from which a solver of second order may take times of even distance that end at 1: with
#: fewer, its last step goes much farther than the one it extrapolates from, and adds variance.
_FEWEST_LEADING = 100


@dataclass(frozen=True)
class Sampling:
    """Method, solver and numbers of a sampler; checked when it is made.

    Parameters
    ----------
    method : {"mmps", "mcg", "projection", "repaint"}
        How the known part is imposed, see the module.
    solver : {"ddim", "euler", "dpm++", "sde-dpm++"}
        How to go from one noise level to the next. ``dpm++`` is deterministic.
    steps : int
        Noise levels visited, 1 to the length of the schedule.
    eta : float, optional
        ``ddim`` only: 0 adds no noise, 1 (default) that of ancestral sampling.
    alpha : float
        ``mcg`` only: weight of the gradient.
    norm : {"l2", "squared"}
        ``mcg`` only: misfit whose gradient is taken, one a sample.
    n_solve : int
        ``mmps`` only: steps of conjugate gradients; each costs a product with the Jacobian.
    guided : float
        ``mcg`` and ``mmps``: share of the steps that use the network's gradient, the last ones of
        the way; the others are those of ``projection``. 1 uses it at every step.
    strength : float
        Share of the noise levels that are walked, the lowest ones. 1 starts from pure noise; less
        starts from the pasted image, noised to that level (Meng et al. 2022), so that what the
        image shows there is kept in its coarse features, and its seam is not.
    spacing : {"karras", "trailing", "leading"}
        Where the noise levels lie, see :func:`timesteps`. ``leading`` with a solver of second order
        needs 100 steps.
    jump_length, n_resample : int
        ``repaint`` only: length of a repeated stretch in steps (at most half of them), and how
        often it is walked.

    Raises
    ------
    ValueError
        If a value is unknown or out of range, or two of them do not go together.
    """

    method: str = "mmps"
    solver: str = "ddim"
    steps: int = 500
    eta: float | None = None
    alpha: float = 1.0
    norm: str = "l2"
    n_solve: int = 1
    guided: float = 1.0
    strength: float = 1.0
    spacing: str = "trailing"
    jump_length: int = 5
    n_resample: int = 3

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _one_of("solver", self.solver, SOLVERS)
        _one_of("norm", self.norm, ("l2", "squared"))
        _one_of("spacing", self.spacing, SPACINGS)
        for name in ("steps", "n_solve", "jump_length", "n_resample"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1 is needed")
        if not 0 < self.guided <= 1:
            raise ValueError(
                f"guided={self.guided}: the share of guided steps lies in (0, 1]; for none, use "
                "method='projection'"
            )
        if not 0 < self.strength <= 1:
            raise ValueError(
                f"strength={self.strength}: the share of noise levels walked lies in (0, 1]; "
                "1 starts from pure noise"
            )
        if not self.alpha >= 0:
            raise ValueError(f"alpha={self.alpha}: the weight of the gradient is 0 or more")
        if self.eta is not None and self.solver != "ddim":
            raise ValueError(
                f"eta={self.eta} belongs to solver='ddim', and solver={self.solver!r} fixes its "
                "own noise: leave eta out, or use 'ddim'"
            )
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta}: the noise of a DDIM step lies in [0, 1]")
        second_order = self.solver in ("dpm++", "sde-dpm++")
        if second_order and self.spacing == "leading" and self.steps < _FEWEST_LEADING:
            raise ValueError(
                f"spacing='leading' ends with a step in which solver={self.solver!r} goes wrong if "
                f"it takes few ({self.steps}, at least {_FEWEST_LEADING} are needed): use 'karras'"
            )
        if self.method == "repaint" and second_order:
            raise ValueError(
                f"method='repaint' jumps back in time, and solver={self.solver!r} needs the steps "
                "before: use solver 'ddim' or 'euler', or another method"
            )

    @property
    def deterministic(self) -> bool:
        """Whether the solver adds no noise of its own."""
        return self.solver == "dpm++" or (self.solver == "ddim" and self.eta == 0)

    @property
    def gradient(self) -> bool:
        """Whether any step differentiates the network."""
        return self.method == "mmps" or (self.method == "mcg" and self.alpha > 0)


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} {value!r}: use one of {', '.join(known)}")


# --- times ----------------------------------------------------------------------------------------


def timesteps(
    n: int, T: int = 1000, *, spacing: str = "trailing", strength: float = 1.0,
    alphas_cumprod: Sequence[float] | None = None,
) -> list[int]:  # fmt: skip
    r"""Times visited by n steps, highest first.

    Parameters
    ----------
    n : int
        Steps, 1 to T.
    T : int
        Steps of the chain.
    spacing : {"trailing", "leading", "karras"}
        ``leading`` is that of latent diffusion (``steps_offset=1``): with few steps it starts well
        below T, where the latents are not yet pure noise. ``trailing`` always starts at T - 1. With
        500 of 1000 steps both are the same. ``karras`` starts there too and spreads the noise
        levels :math:`\sigma = \sqrt{(1 - a_t) / a_t}`, not the times, so that
        :math:`\sigma^{1/\rho}` falls evenly (Karras et al. 2022, Eq. 5): the last step ends the
        noise from a low level, where little is left to guess. From a high one it would give the
        mean of what is possible, which has less fine structure than any of it.
    strength : float
        Only the lowest ``strength * T`` levels are visited.
    alphas_cumprod : sequence of T float
        ``karras`` only: a_t of the chain.

    Returns
    -------
    list of int
        Strictly decreasing, in 0 to T - 1.
    """
    _one_of("spacing", spacing, SPACINGS)
    all_levels, T = T, round(strength * T)
    if not 1 <= n <= T:
        part = f" (strength={strength} of {all_levels})" if T < all_levels else ""
        raise ValueError(f"steps={n} is not between 1 and the {T} steps of the schedule{part}")
    if spacing == "karras":
        if alphas_cumprod is None or len(alphas_cumprod) != all_levels:
            given = "none" if alphas_cumprod is None else len(alphas_cumprod)
            raise ValueError(
                f"spacing='karras' spreads noise levels: give alphas_cumprod of the {all_levels} "
                f"steps of the chain (given: {given})"
            )
        return _karras_times(n, np.asarray(alphas_cumprod[:T], float))
    if spacing == "leading":
        first = min(1, T - 1 - (n - 1) * (T // n))  # no room for diffusers' offset if n = T
        return [k * (T // n) + first for k in reversed(range(n))]
    return [round(T - k * T / n) - 1 for k in range(n)]


def _karras_times(n: int, a: np.ndarray) -> list[int]:
    """Times of n levels from the highest to the lowest of a chain, see :func:`timesteps`."""
    sigma = np.sqrt((1 - a) / a)
    wanted = np.linspace(sigma[-1] ** (1 / RHO), sigma[0] ** (1 / RHO), n) ** RHO
    times = np.interp(np.log(wanted), np.log(sigma), np.arange(len(a))).round().astype(int)
    for k in range(1, n):  # levels closer than those of the chain: the next one that is free
        times[k] = min(times[k], times[k - 1] - 1)
    return np.maximum(times, np.arange(n)[::-1]).tolist()


def _path(times: Sequence[int], jump_length: int, n_resample: int) -> list[tuple[int, int]]:
    """Moves (from, to) between time levels; up-moves are the time travel of RePaint."""
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


def _plan(sampling: Sampling, times: Sequence[int]) -> tuple[list[tuple[int, int]], int]:
    """Moves, and the time from which on (downward) the gradient is used."""
    if sampling.method == "repaint":
        return _path(times, sampling.jump_length, sampling.n_resample), -1
    n = max(1, round(sampling.guided * len(times))) if sampling.gradient else 0
    return list(itertools.pairwise([*times, -1])), times[-n] if n else -1


class Calls(NamedTuple):
    """Passes through the network for one image."""

    forward: int
    backward: int


def network_calls(steps: int, *, T: int = 1000, **options: Any) -> Calls:
    """Count the passes through the network that a sampler makes for one image.

    Parameters
    ----------
    steps : int
    T : int
        Steps of the chain.
    **options
        Other fields of :class:`Sampling`.

    Returns
    -------
    forward, backward : int
        A backward pass (a product with the Jacobian) costs about one to two forward passes.
    """
    sampling = Sampling(steps=steps, **options)
    # However the times are spread, there are as many of them.
    moves, first = _plan(sampling, timesteps(steps, T, strength=sampling.strength))
    each = sampling.n_solve if sampling.method == "mmps" else 1
    forward = sum(s < t for t, s in moves)
    return Calls(forward, each * sum(t <= first for t, s in moves))


# --- single steps ---------------------------------------------------------------------------------


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


def euler_step(
    z_t: torch.Tensor, eps: torch.Tensor, a_t: float, a_s: float, noise: torch.Tensor | None
) -> torch.Tensor:
    """One Euler-Maruyama step of the reverse SDE (Eq. 3) from level a_t to level a_s.

    With B = log(a_s / a_t), the integral of beta over the step, and score = -eps / sqrt(1 - a_t),
    z_s = z_t + (z_t / 2 + score) B + sqrt(B) noise. Without noise it is the last step.

    Parameters
    ----------
    z_t, eps : (N, ...) Tensor
    a_t, a_s : float
        Cumulative alphas of this and the next level, a_t <= a_s <= 1.
    noise : (N, ...) Tensor or None

    Returns
    -------
    (N, ...) Tensor
    """
    B = math.log(a_s / a_t)
    z_s = z_t + B * (0.5 * z_t - eps / math.sqrt(1 - a_t))
    return z_s if noise is None else z_s + math.sqrt(B) * noise


def _stepper(sampling: Sampling, a: Sequence[float], times: Sequence[int]) -> Callable:
    """``step(z_t, z0, eps, t, s, noise)`` to z_s, of the solver asked for."""
    if sampling.solver == "ddim":
        eta = 1.0 if sampling.eta is None else sampling.eta
        return lambda z, z0, e, t, s, xi: ddim_step(
            z0, e, a[t], a[s], eta=eta if s >= 0 else 0.0, noise=xi
        )
    if sampling.solver == "euler":
        return lambda z, z0, e, t, s, xi: euler_step(z, e, a[t], a[s], xi)
    scheduler = _dpm_scheduler(sampling.solver, a, times)
    return lambda z, z0, e, t, s, xi: scheduler.step(
        z0, t, z, variance_noise=torch.zeros_like(z) if xi is None else xi, return_dict=False
    )[0]


def _dpm_scheduler(solver: str, a: Sequence[float], times: Sequence[int]) -> Any:
    """DPM-Solver++ (2M) of diffusers for the levels a, fed with estimates of z_0."""
    from diffusers import DPMSolverMultistepScheduler

    alphas = np.asarray(a[:-1])
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=len(alphas),
        trained_betas=1 - alphas / np.concatenate([[1.0], alphas[:-1]]),
        prediction_type="sample",
        algorithm_type="sde-dpmsolver++" if solver == "sde-dpm++" else "dpmsolver++",
        solver_order=2,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(timesteps=list(times))
    return scheduler


# --- noise ----------------------------------------------------------------------------------------


def spawn(generator: torch.Generator | int | None, n: int) -> list[torch.Generator]:
    """N independent CPU generators from one, so that each image has its own noise."""
    if not isinstance(generator, torch.Generator):
        generator = torch.Generator().manual_seed(0 if generator is None else int(generator))
    seeds = torch.randint(2**62, (n,), generator=generator)
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def _noise(like: torch.Tensor, generators: Generators) -> torch.Tensor:
    """Normal noise, each sample from its own generator, or all from one."""
    if isinstance(generators, torch.Generator):
        return torch.randn(like.shape, generator=generators, dtype=like.dtype).to(like.device)
    rows = [torch.randn(like.shape[1:], generator=g, dtype=like.dtype) for g in generators]
    return torch.stack(rows).to(like.device)


# --- estimates of the clean latents ---------------------------------------------------------------


def condition(
    z0: torch.Tensor,
    z_t: torch.Tensor,
    a_t: float,
    z_y: torch.Tensor,
    m: torch.Tensor,
    *,
    n_solve: int = 1,
) -> torch.Tensor:
    r"""Mean of the clean latents given z_t *and* the known part (Rozet et al. 2024).

    Given z_t alone, the clean latents have the mean z0 and, by the second-order Tweedie formula,
    the covariance :math:`C = \frac{1 - a_t}{\sqrt{a_t}} \frac{\partial z_0}{\partial z_t}`. Taken
    as normal, conditioning on the known part gives

    .. math:: z_0 + C m\, (m C m)^{-1} m (z_y - z_0).

    The equation is solved by conjugate gradients; C times a vector is one product with the Jacobian
    of the network (transposed: C is symmetric).

    Parameters
    ----------
    z0 : (N, ...) Tensor
        Tweedie estimate, with its graph back to `z_t`.
    z_t : (N, ...) Tensor
        Requires grad. Samples must not depend on each other.
    a_t : float
    z_y, m : (N, ...) Tensor
        Known latents, and their mask of 0 and 1 in the type of `z_y`.
    n_solve : int
        Steps of conjugate gradients.

    Returns
    -------
    (N, ...) Tensor
        Equal to `z_y` where m = 1; detached.
    """
    shape = (-1, *[1] * (z0.ndim - 1))

    def dot(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (u * v).flatten(1).sum(1).reshape(shape)  # one number a sample, never over the batch

    def covariance(v: torch.Tensor, last: bool) -> torch.Tensor:
        (product,) = torch.autograd.grad(z0, z_t, v, retain_graph=not last)
        return (1 - a_t) / math.sqrt(a_t) * product

    residual = m * (z_y - z0.detach())
    direction, size = residual, dot(residual, residual)
    correction = torch.zeros_like(residual)
    for k in range(n_solve):
        moved = covariance(direction, k == n_solve - 1)
        curvature = dot(direction, m * moved)
        # A network's Jacobian is only roughly a covariance: no step where it is not positive.
        good = curvature > 1e-6 * (1 - a_t) * dot(direction, direction)
        step = torch.where(good, size / curvature, 0.0)
        correction = correction + step * moved
        residual = residual - step * m * moved
        before, size = size, dot(residual, residual)
        direction = residual + torch.where(before > 0, size / before, 0.0) * direction
    return torch.where(m.bool(), z_y, z0.detach() + correction)


def _estimate(
    eps: Eps, z: torch.Tensor, t: int, a_t: float, z_y: torch.Tensor, m: torch.Tensor,
    sampling: Sampling, gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """Noise, estimate of z_0 and, for MCG, the gradient of the misfit with respect to z_t."""
    if not gradient:
        with torch.no_grad():
            e = eps(z, t)
        return e, tweedie(z, e, a_t), None
    with torch.enable_grad():
        z_t = z.detach().requires_grad_(True)
        e = eps(z_t, t)
        z0 = tweedie(z_t, e, a_t)
        if sampling.method == "mmps":
            z0 = condition(z0, z_t, a_t, z_y, m, n_solve=sampling.n_solve)
            return (z - math.sqrt(a_t) * z0) / math.sqrt(1 - a_t), z0, None
        misfit = (m * (z_y - z0)).flatten(1)
        # One norm a sample: their sum has for each sample the gradient of its own norm.
        if sampling.norm == "l2":
            size = torch.linalg.vector_norm(misfit, dim=1)
        else:
            size = misfit.square().sum(1)
        (g,) = torch.autograd.grad(size.sum(), z_t)
    return e.detach(), z0.detach(), g


# --- the sampler ----------------------------------------------------------------------------------


def inpaint_latents(
    eps: Eps,
    z_y: torch.Tensor,
    m: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    *,
    generators: Generators,
    progress: bool = False,
    callback: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
    **options: Any,
) -> torch.Tensor:
    """Sample latents whose known part is given, with any noise predictor.

    Parameters
    ----------
    eps : callable
        ``eps(z_t, t)`` with an int t, e.g. :meth:`helpers.latent.LatentDiffusion.eps`.
    z_y : (N, ...) Tensor
        Latents of the pasted images; with strength 1 only their known part is used.
    m : (N, ...) Tensor
        1 = known, 0 = unknown, broadcastable to `z_y`.
    alphas_cumprod : (T,) Tensor
        a_t of the chain.
    generators : sequence of N torch.Generator, or torch.Generator
        Noise of each sample; one generator for all is faster where samples need not be independent
        of their companions.
    callback : callable, optional
        Called with (t, z_t, estimate of z_0) at each step.
    **options
        Fields of :class:`Sampling`.

    Returns
    -------
    (N, ...) Tensor
        Samples at a = 1, equal to `z_y` where m = 1.

    Raises
    ------
    ValueError
        If options or shapes do not fit.
    FloatingPointError
        If a sample becomes NaN or infinite.
    """
    from tqdm import tqdm

    sampling = Sampling(**options)
    if not isinstance(generators, torch.Generator) and len(generators) != len(z_y):
        raise ValueError(f"{len(generators)} generators for {len(z_y)} samples: give one each")
    a = [*alphas_cumprod.detach().cpu().double().tolist(), 1.0]  # a[-1]: no noise
    times = timesteps(
        sampling.steps, len(a) - 1, spacing=sampling.spacing, strength=sampling.strength,
        alphas_cumprod=a[:-1],
    )  # fmt: skip
    moves, first_guided = _plan(sampling, times)
    step = _stepper(sampling, a, times)
    fixed = m.bool().expand_as(z_y)
    m = fixed.to(z_y.dtype)
    z = xi_known = _noise(z_y, generators)

    def put_back(z: torch.Tensor, s: int) -> torch.Tensor:
        """Known part at level s; at the end exactly z_y."""
        if s < 0:
            return torch.where(fixed, z_y, z)
        # A deterministic way keeps the noise it started with, a random one gets fresh noise.
        xi = xi_known if sampling.deterministic else _noise(z, generators)
        return torch.where(fixed, math.sqrt(a[s]) * z_y + math.sqrt(1 - a[s]) * xi, z)

    noised = math.sqrt(a[times[0]]) * z_y + math.sqrt(1 - a[times[0]]) * z
    z = torch.where(fixed, noised, z) if sampling.strength == 1 else noised
    for t, s in tqdm(
        moves, desc=f"{sampling.method} inpainting", disable=not progress, leave=False
    ):
        if s > t:  # time travel: noise everything up again
            ratio = a[s] / a[t]
            z = math.sqrt(ratio) * z + math.sqrt(1 - ratio) * _noise(z, generators)
            continue
        # 1. Noise and estimate of z_0; for MCG also the gradient of the misfit of the known part.
        e, z0, g = _estimate(eps, z, t, a[t], z_y, m, sampling, t <= first_guided)
        if callback is not None:
            callback(t, z, z0)
        # 2. Step to level s, corrected.
        xi = None if sampling.deterministic or s < 0 else _noise(z, generators)
        z = step(z, z0, e, t, s, xi)
        if g is not None:
            z = z - sampling.alpha * g
        # 3. The known part, noised to level s (not t).
        z = put_back(z, s)
        _check_finite(z, t, sampling)
    return z


def _check_finite(z: torch.Tensor, t: int, sampling: Sampling) -> None:
    if not bool(torch.isfinite(z).all()):
        bad = (~torch.isfinite(z)).flatten(1).any(1).nonzero().flatten().tolist()
        raise FloatingPointError(
            f"{sampling.method} inpainting gave NaN or infinity at time {t} in samples {bad}: "
            f"lower alpha (now {sampling.alpha}) if the method is mcg, use full precision, or "
            "check the weights"
        )


def sample_posterior(
    prior: GaussianPrior,
    known: np.ndarray,
    values: np.ndarray,
    n: int,
    *,
    seed: int = 0,
    **options: Any,
) -> np.ndarray:
    """Draw from a normal prior given some coordinates, with a sampler instead of the formula.

    Parameters
    ----------
    prior : GaussianPrior
    known : (d,) bool ndarray
    values : (d,) ndarray
        Only its known coordinates are used.
    n : int
        Samples.
    seed : int
    **options
        Fields of :class:`Sampling`.

    Returns
    -------
    (n, u) float64 ndarray
        The unknown coordinates, to be held against :meth:`GaussianPrior.posterior`.
    """
    known = np.asarray(known, bool)
    y = torch.as_tensor(np.asarray(values), dtype=torch.float64).expand(n, -1)
    m = torch.as_tensor(known, dtype=torch.float64).expand(n, -1)
    generator = torch.Generator().manual_seed(seed)
    z = inpaint_latents(prior.eps, y, m, prior.alphas_cumprod, generators=generator, **options)
    return z.numpy()[:, ~known]
