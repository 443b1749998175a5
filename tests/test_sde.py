"""The SDE, its marginals and its loss: against closed forms and diffusers."""

import math

import numpy as np
import pytest
import torch

from helpers.latent import LATENT_SCHEDULE
from helpers.samplers import ddim_step, tweedie
from helpers.sde import VPSDE, dsm_loss, euler_maruyama
from tests.priors import ALPHAS as A
from tests.priors import gaussian

SDE = VPSDE()


def test_discrete_chain_is_that_of_diffusers():
    from diffusers import DDPMScheduler

    reference = DDPMScheduler(**LATENT_SCHEDULE).alphas_cumprod
    torch.testing.assert_close(A.float(), reference, rtol=1e-5, atol=1e-7)


def test_schedule_is_that_of_latent_diffusion():
    """The numbers of the paper written out: everything else takes them from one dictionary."""
    assert LATENT_SCHEDULE == {
        "num_train_timesteps": 1000,
        "beta_start": 0.0015,
        "beta_end": 0.0195,
        "beta_schedule": "scaled_linear",
    }
    k = np.arange(1000) / 999
    betas = (np.sqrt(0.0015) * (1 - k) + np.sqrt(0.0195) * k) ** 2
    np.testing.assert_allclose(VPSDE().alphas_cumprod, np.cumprod(1 - betas), rtol=1e-9)


def test_another_schedule_may_be_given():
    given = {**LATENT_SCHEDULE, "num_train_timesteps": 50, "beta_start": 0.01, "beta_end": 0.09}
    sde = VPSDE(given)
    betas = np.linspace(0.1, 0.3, 50) ** 2
    assert sde.N == 50
    np.testing.assert_allclose(sde.discrete_betas, betas, rtol=1e-12)
    np.testing.assert_allclose(sde.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-12)
    ends = sde.beta(torch.tensor([0.0, 1.0], dtype=torch.float64))
    np.testing.assert_allclose(ends, [50 * 0.01, 50 * 0.09])
    with pytest.raises(ValueError, match="beta_schedule 'linear': use 'scaled_linear'"):
        VPSDE({**given, "beta_schedule": "linear"})


def test_marginals_solve_the_moment_equations():
    # d mean / dt = -beta mean / 2 and d var / dt = beta (1 - var), integrated with small steps.
    mean, var, n = 1.0, 0.0, 20_000
    rates = SDE.beta((torch.arange(n, dtype=torch.float64) + 0.5) / n).tolist()
    for k, beta in enumerate(rates):
        mean, var = mean * (1 - 0.5 * beta / n), var + beta * (1 - var) / n
        if (k + 1) % (n // 4) == 0:
            t = torch.tensor([(k + 1) / n], dtype=torch.float64)
            exact, std = SDE.marginal_prob(torch.ones(1, 1, dtype=torch.float64), t)
            assert float(exact) == pytest.approx(mean, rel=1e-3)
            assert float(std) ** 2 == pytest.approx(var, rel=1e-3)


def test_continuous_and_discrete_marginals_agree():
    t = (torch.arange(SDE.N, dtype=torch.float64) + 1) / SDE.N
    mean, std = SDE.marginal_prob(torch.ones(SDE.N, 1, dtype=torch.float64), t)
    assert (mean.flatten() - A.sqrt()).abs().max() < 3e-3
    assert (std - (1 - A).sqrt()).abs().max() < 3e-3
    x = torch.randn(SDE.N, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(SDE.marginal_prob(x, t)[0], mean[..., None] * x)


def test_forward_chain_has_the_closed_form_marginal():
    generator = torch.Generator().manual_seed(0)
    x = torch.full((20_000, 1), 2.0, dtype=torch.float64)
    for i in range(300):
        f, g = SDE.discretize(x, torch.full((1,), i))
        x = x + f + g * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    assert float(x.mean()) == pytest.approx(2 * math.sqrt(A[299]), abs=0.02)
    assert float(x.var()) == pytest.approx(float(1 - A[299]), abs=0.02)


@pytest.mark.parametrize("flow", [False, True])
def test_reverse_sde_brings_noise_back_to_the_prior(flow):
    prior = gaussian(2)

    def score(x, t):
        mean, _ = SDE.marginal_prob(torch.ones(1, 1, dtype=torch.float64), t[:1])
        return prior.score(x, float(mean) ** 2)

    noise = SDE.prior_sampling((20_000, 2), generator=torch.Generator().manual_seed(1)).double()
    x = euler_maruyama(
        SDE.reverse(score, probability_flow=flow),
        noise,
        200,
        generator=torch.Generator().manual_seed(2),
    ).numpy()
    assert np.abs(x.mean(0) - prior.mean.numpy()).max() < 0.08
    assert np.abs(np.cov(x.T) - prior.cov.numpy()).max() < 0.08


def test_euler_maruyama_is_its_recursion():
    """Three steps written out: times 1, 2/3, 1/3, noise in all but the last."""
    reverse = SDE.reverse(lambda x, t: -x * t[:, None])
    x = torch.tensor([[0.5, -1.0], [2.0, 0.1]], dtype=torch.float64)
    xi = torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = x
    for k, t in enumerate((1.0, 2 / 3, 1 / 3)):
        beta = float(SDE.beta(torch.tensor(t, dtype=torch.float64)))
        drift = -0.5 * beta * expected + beta * t * expected
        expected = expected - drift / 3
        if k < 2:
            expected = expected + (beta / 3) ** 0.5 * xi[k]
    found = euler_maruyama(reverse, x, 3, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(found, expected)


def score_of(prior):
    """Exact score by time: level i of the chain is at (i + 1) / N."""

    def score(x, t):
        assert t.shape == (len(x),)
        return prior.score(x, float(A[round(float(t[0]) * SDE.N) - 1]))

    return score


@pytest.mark.parametrize("flow", [False, True])
def test_reverse_chain_brings_noise_back_to_the_prior(flow):
    prior, generator = gaussian(2), torch.Generator().manual_seed(1)
    reverse = SDE.reverse(score_of(prior), probability_flow=flow)
    x = SDE.prior_sampling((8000, 2), generator=generator).double()
    for i in reversed(range(SDE.N)):
        f, G = reverse.discretize(x, torch.full((1,), i))
        x = x - f
        if i:
            x = x + G * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    x = x.numpy()
    assert np.abs(x.mean(0) - prior.mean.numpy()).max() < 0.05
    assert np.abs(np.cov(x.T) - prior.cov.numpy()).max() < 0.05


@pytest.mark.parametrize("i", [1, 30, 500, 999])
def test_reverse_chain_takes_the_steps_of_the_samplers(i):
    """(2 - sqrt(1 - beta)) x + beta score, to first order in beta the ancestral mean and spread."""
    prior, beta, a = gaussian(3), float(SDE.discrete_betas[i]), A.tolist()
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
    at = torch.full((5,), i)
    f, G = SDE.reverse(score_of(prior)).discretize(x, at)
    score = prior.score(x, a[i])
    torch.testing.assert_close(x - f, (2 - math.sqrt(1 - beta)) * x + beta * score)
    torch.testing.assert_close(G, torch.full((5,), math.sqrt(beta), dtype=torch.float64))
    eps = prior.eps(x, i)
    z0, zero = tweedie(x, eps, a[i]), torch.zeros_like(x)
    mean = ddim_step(z0, eps, a[i], a[i - 1], eta=1.0, noise=zero)
    assert (x - f - mean).abs().max() < beta**2 * (x.abs().max() + score.abs().max())
    if i > 100:  # lower, ancestral steps know how near the end is
        spread = ddim_step(z0, eps, a[i], a[i - 1], eta=1.0, noise=zero + 1) - mean
        torch.testing.assert_close(spread, G[:, None].expand(5, 3), rtol=0.02, atol=0)
    f, G = SDE.reverse(score_of(prior), probability_flow=True).discretize(x, at)
    mean = ddim_step(z0, eps, a[i], a[i - 1])
    assert not G.any() and (x - f - mean).abs().max() < beta * 0.1 * score.abs().max()


def test_prior_logp_is_the_normal_density():
    z = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    normal = torch.distributions.Normal(0, 1).log_prob(z).flatten(1).sum(1)
    torch.testing.assert_close(SDE.prior_logp(z), normal)


def test_dsm_loss_is_smallest_at_the_true_score():
    prior = gaussian(3)
    generator = torch.Generator().manual_seed(0)
    root = torch.linalg.cholesky(prior.cov)
    z0 = prior.mean + torch.randn(20_000, 3, generator=generator, dtype=torch.float64) @ root.T
    t = torch.full((len(z0),), 400)
    noise = torch.randn(z0.shape, generator=generator, dtype=torch.float64)

    def loss(change):
        def network(z, _):
            return change(prior.eps(z, 400))

        return float(dsm_loss(network, z0, A, t=t, noise=noise).mean())

    best = loss(lambda e: e)
    assert best < loss(lambda e: 1.1 * e) and best < loss(lambda e: 0.9 * e)
    assert best < loss(lambda e: e + 0.1) and best < loss(lambda e: e.flip(-1))


def test_dsm_loss_is_the_mean_square_of_each_sample():
    z0 = torch.arange(12.0, dtype=torch.float64).reshape(2, 2, 3)
    noise, t = torch.ones_like(z0), torch.tensor([3, 700])
    found = dsm_loss(lambda z, t: torch.zeros_like(z), z0, A, t=t, noise=2 * noise)
    torch.testing.assert_close(found, torch.full((2,), 4.0, dtype=torch.float64))


def test_v_loss_is_the_weighted_eps_loss():
    z0 = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise, t = torch.randn_like(z0), torch.tensor([0, 9, 200, 500, 900, 999])
    a = A[t].reshape(-1, 1, 1, 1)
    guess = torch.randn_like(z0)

    def to_eps(z, _):
        return a.sqrt() * guess + (1 - a).sqrt() * z

    v = dsm_loss(lambda z, t: guess, z0, A, t=t, noise=noise, prediction="v_prediction")
    e = dsm_loss(to_eps, z0, A, t=t, noise=noise)
    torch.testing.assert_close(e, A[t] * v)
    with pytest.raises(ValueError, match="prediction 'eps': use epsilon or v_prediction"):
        dsm_loss(to_eps, z0, A, t=t, noise=noise, prediction="eps")


def test_posterior_is_that_of_the_joint_normal():
    prior = gaussian(4)
    known, values = np.array([True, False, True, False]), np.array([0.7, 0, -0.4, 0])
    rng = np.random.default_rng(0)
    x = rng.multivariate_normal(prior.mean.numpy(), prior.cov.numpy(), 400_000)
    near = x[(np.abs(x[:, known] - values[known]) < 0.1).all(1)][:, ~known]
    mean, cov = prior.posterior(known, values)
    assert np.abs(near.mean(0) - mean).max() < 0.05 and np.abs(np.cov(near.T) - cov).max() < 0.06


def test_all_noise_comes_from_the_generator():
    z0, state = torch.ones(3, 2, 4), torch.get_rng_state()

    def both(draw):
        one, two = (draw(torch.Generator().manual_seed(s)) for s in (1, 1))
        assert torch.equal(one, two)
        assert not torch.equal(one, draw(torch.Generator().manual_seed(2)))

    both(lambda g: dsm_loss(lambda z, t: z + t[:, None, None], z0, A, generator=g))
    both(lambda g: SDE.prior_sampling((3, 2), generator=g))
    both(lambda g: euler_maruyama(SDE.reverse(lambda x, t: -x), z0, 3, generator=g))
    assert torch.equal(state, torch.get_rng_state())
