"""The SDE between tissue and noise (Eqs. 2 to 4 of the paper), and a prior with a known answer.

Forward, an image latent z is drowned in noise (Eq. 2); backward, the score turns noise into tissue
(Eq. 3); the score is learned by denoising (Eq. 4). :class:`GaussianPrior` is the one case in which
score and conditional posterior are closed formulas, against which every sampler is held.

Notation: a_t is the cumulative product of 1 - beta ("alpha bar"),
z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) eps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from helpers.latent import LATENT_SCHEDULE, PREDICTIONS


class VPSDE:
    """Variance-preserving SDE, dz = -beta(t) z / 2 dt + sqrt(beta(t)) dw, t in [0, 1] (Eq. 2).

    The interface is that of ``sde_lib.py`` of score_sde (Song et al. 2021); beta(t) is the limit of
    the scaled-linear schedule of latent diffusion, whose square root is linear in t.

    Parameters
    ----------
    schedule : mapping, optional
        ``num_train_timesteps``, ``beta_start``, ``beta_end`` of the discrete chain and
        ``beta_schedule``, "scaled_linear"; by default :data:`helpers.latent.LATENT_SCHEDULE`.

    Attributes
    ----------
    N : int
        Steps of the discrete chain.
    discrete_betas, alphas_cumprod : (N,) float64 Tensor
        The discrete chain.
    """

    def __init__(self, schedule: Mapping[str, Any] | None = None) -> None:
        schedule = dict(schedule or LATENT_SCHEDULE)
        if schedule.get("beta_schedule") != "scaled_linear":
            kind = schedule.get("beta_schedule")
            raise ValueError(f"beta_schedule {kind!r}: use 'scaled_linear'")
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
        self,
        shape: Sequence[int],
        *,
        generator: torch.Generator | None = None,
        device: str | torch.device = "cpu",
    ) -> torch.Tensor:
        """Noise of the end of time, N(0, 1), drawn on the generator's device."""
        drawn_on = device if generator is None else generator.device
        return torch.randn(tuple(shape), generator=generator, device=drawn_on).to(device)

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
        beta = self.discrete_betas.to(x.device)[i.to(x.device)].to(x.dtype)
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
        return self._turned(*self.forward.sde(x, t), x, t)

    def discretize(self, x: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One step of the chain back from i to i - 1: x_{i-1} = (x - f) + G noise.

        The reverse diffusion sampler of Song et al. 2021 (Appendix E), as in score_sde: the forward
        step with its f turned round and the score added. To first order in beta it is the ancestral
        step, ``ddim_step`` of :mod:`helpers.samplers` with eta = 1 between neighbours.

        Parameters
        ----------
        x : (N, ...) Tensor
            At index i, where the time of the score is (i + 1) / N of the chain.
        i : (N,) int Tensor
            Index 0 to N - 1 in the chain.

        Returns
        -------
        f : (N, ...) Tensor
        G : (N,) Tensor
            Zero in the probability flow.
        """
        t = ((i + 1) / self.N).to(x).expand(len(x))
        return self._turned(*self.forward.discretize(x, i), x, t)

    def _turned(
        self, f: torch.Tensor, g: torch.Tensor, x: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Drift and noise forward in time, made those back: with the score, or half of it alone."""
        factor = 0.5 if self.probability_flow else 1.0
        f = f - factor * _like(g**2, x) * self.score(x, t)
        return f, torch.zeros_like(g) if self.probability_flow else g


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
        t = torch.full((len(x),), 1.0 - k * dt, dtype=x.dtype, device=x.device)
        drift, diffusion = reverse.sde(x, t)
        x = x - drift * dt
        if k < n - 1:
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
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
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction {prediction!r}: use {' or '.join(PREDICTIONS)}")
    if t is None:
        t = torch.randint(len(alphas_cumprod), (len(z0),), generator=generator)
    if noise is None:
        noise = torch.randn(z0.shape, generator=generator, dtype=z0.dtype)
    t, noise = t.to(z0.device), noise.to(z0.device)
    a = _like(alphas_cumprod.to(z0.device)[t], z0)
    z_t = a.sqrt() * z0 + (1 - a).sqrt() * noise
    target = noise if prediction == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * z0
    return (network(z_t, t) - target).square().flatten(1).mean(1)


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
