"""The SDE, its steps, and inpainting: against closed forms, diffusers, and known mistakes."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from helpers import diffusion
from helpers.diffusion import (
    METHODS,
    VPSDE,
    GaussianPrior,
    ddim_step,
    dsm_loss,
    euler_maruyama,
    fill_unknown,
    inpaint,
    inpaint_latents,
    network_calls,
    noise_strip,
    spawn,
    timesteps,
    tweedie,
)
from helpers.latent import LATENT_SCHEDULE, LatentDiffusion, build_autoencoder, build_unet

SDE = VPSDE()
A = SDE.alphas_cumprod


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    autoencoder = build_autoencoder((8, 16), image_patch=2)
    unet = build_unet((16, 16, 32), attention_head_dim=8, groups=8)
    return LatentDiffusion(
        autoencoder, unet, image_patch=2, latent_patch=2, prediction="v_prediction"
    )


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    unknown = np.zeros((3, 64, 64), bool)
    unknown[0, 10:40, 13:41] = True
    unknown[1, 30:63, 5:20] = True
    unknown[2, :, 40:] = True
    return images, unknown


def gaussian(d=4, seed=0):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(d, d))
    cov = root @ root.T + 0.1 * np.eye(d)
    scale = np.sqrt(np.diag(cov))
    return GaussianPrior(rng.normal(size=d) * 0.3, cov / np.outer(scale, scale), A)


class Linear(nn.Module):
    """A noise predictor that mixes all entries of a sample, none of another sample."""

    def forward(self, z, t):
        return 0.3 * torch.roll(z, 1, dims=-1) + 0.1 * torch.sin(z).flip(-1) + 1e-4 * t


# --- SDE ------------------------------------------------------------------------------------------


def test_discrete_chain_is_that_of_diffusers():
    from diffusers import DDPMScheduler

    reference = DDPMScheduler(**LATENT_SCHEDULE).alphas_cumprod
    torch.testing.assert_close(A.float(), reference, rtol=1e-5, atol=1e-7)


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


# --- steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("n", [5, 50])
def test_steps_equal_those_of_diffusers(eta, n):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        **LATENT_SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    scheduler.alphas_cumprod = a = A  # in double precision, so that the comparison is sharp
    scheduler.final_alpha_cumprod = a[0]
    scheduler.set_timesteps(n)
    times = timesteps(n, 1000, spacing="leading")
    assert scheduler.timesteps.tolist() == times
    generator = torch.Generator().manual_seed(0)
    mine = theirs = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    for k, t in enumerate(times):
        s = times[k + 1] if k + 1 < len(times) else 0  # set_alpha_to_one=False: ends at a_0
        noise = torch.randn(mine.shape, generator=generator, dtype=torch.float64)
        eps = Linear()(theirs, t)
        theirs = scheduler.step(eps, t, theirs, eta=eta, variance_noise=noise).prev_sample
        eps = Linear()(mine, t)
        a_t, a_s = float(a[t]), float(a[s])
        mine = ddim_step(tweedie(mine, eps, a_t), eps, a_t, a_s, eta=eta, noise=noise)
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 7, 25, 333, 500, 1000])
def test_times_decrease_and_end_low(n):
    times = timesteps(n, 1000)
    assert len(times) == n and times[0] == 999 and min(times) >= 0
    assert all(a > b for a, b in itertools.pairwise(times))
    if n in (500,):
        assert times == timesteps(n, 1000, spacing="leading")


def test_wrong_numbers_of_steps_are_refused():
    for n in (0, 1001):
        with pytest.raises(ValueError, match=f"steps={n}"):
            timesteps(n, 1000)
    with pytest.raises(ValueError, match="spacing"):
        timesteps(5, 1000, spacing="even")


def test_tweedie_inverts_the_forward_step():
    z0, eps = torch.randn(2, 5), torch.randn(2, 5)
    a = float(A[700])
    torch.testing.assert_close(
        tweedie(math.sqrt(a) * z0 + math.sqrt(1 - a) * eps, eps, a), z0, rtol=1e-4, atol=1e-4
    )


def test_ddim_at_full_noise_needs_noise():
    z = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="eta"):
        ddim_step(z, z, 0.5, 0.6, eta=1.0)


def test_moves_of_repaint():
    moves = diffusion._path([8, 6, 4, 2], 2, 2)
    assert moves == [(8, 6), (6, 4), (4, 8), (8, 6), (6, 4), (4, 2), (2, -1)]
    assert network_calls(50, method="projection") == 50
    assert network_calls(50, method="repaint", jump_length=10, n_resample=3) == 50 + 4 * 2 * 10


# --- the traps: each test fails on the wrong version ----------------------------------------------


def run(eps, z_y, m, **options):
    options = {"method": "projection", "steps": 6, "eta": 1.0, **options}
    return inpaint_latents(eps, z_y, m, A, generators=spawn(3, len(z_y)), **options)


def test_known_part_is_noised_to_the_next_level_not_one_too_high():
    n, seen = 4000, []
    z_y = torch.full((n, 1), 3.0, dtype=torch.float64)
    run(
        lambda z, t: torch.zeros_like(z),
        z_y,
        torch.ones(1, 1),
        steps=5,
        callback=lambda t, z, z0: seen.append((t, z.clone())),
    )
    for t, z in seen[1:]:  # what arrives at time t carries exactly the noise of time t
        assert float(z.std()) == pytest.approx(math.sqrt(1 - A[t]), rel=0.06)
        assert float(z.mean()) == pytest.approx(3 * math.sqrt(A[t]), abs=0.08)


def test_gradient_of_a_sample_is_its_own():
    z_y = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z_y[1] *= 50  # a companion with a large misfit would dominate a norm over the batch
    m = torch.ones(3, 1, 4, dtype=torch.float64)
    m[..., 2:] = 0
    z = torch.randn_like(z_y)
    together = diffusion._predict(Linear(), z, 500, float(A[500]), z_y, m, True, "l2")[2]
    for i in range(3):
        alone = diffusion._predict(
            Linear(), z[[i]], 500, float(A[500]), z_y[[i]], m[[i]], True, "l2"
        )[2]
        torch.testing.assert_close(together[[i]], alone)
    wrong = z.clone().requires_grad_(True)
    e = Linear()(wrong, 500)
    misfit = torch.linalg.vector_norm(m * (z_y - tweedie(wrong, e, float(A[500]))))
    (coupled,) = torch.autograd.grad(misfit, wrong)
    assert (coupled[0] - together[0]).abs().max() > 0.1 * together[0].abs().max()


def test_latents_are_not_clipped():
    z_y = torch.full((2, 6), 7.0, dtype=torch.float64)
    m = torch.zeros(2, 6, dtype=torch.float64)
    m[:, :3] = 1
    prior = GaussianPrior(np.full(6, 7.0), 0.01 * np.eye(6), A)
    z = run(prior.eps, z_y, m, steps=20)
    assert float(z[:, 3:].min()) > 6


def test_known_part_is_clean_at_the_end():
    z_y = torch.randn(2, 6, dtype=torch.float64)
    m = torch.zeros(2, 6)
    m[:, ::2] = 1
    for method in METHODS:
        z = run(Linear(), z_y, m, method=method)
        assert torch.equal(z[:, ::2], z_y[:, ::2])


@pytest.mark.parametrize("method", METHODS)
def test_known_pixels_are_bit_identical_and_unknown_ones_new(model, pair, method):
    images, unknown = pair
    out = inpaint(model, images, unknown, method=method, steps=3, generator=0)
    assert out.dtype == np.uint8 and np.array_equal(out[~unknown], images[~unknown])
    assert (out[unknown] != images[unknown]).mean() > 0.9


# --- inpainting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_results_do_not_depend_on_companions(model, pair, method):
    images, unknown = pair
    options = {"method": method, "steps": 4, "alpha": 0.5}
    together = inpaint(model, images, unknown, generator=spawn(5, 3), **options)
    in_two = inpaint(model, images, unknown, generator=spawn(5, 3), batch=2, **options)
    alone = [
        inpaint(model, images[[i]], unknown[[i]], generator=[spawn(5, 3)[i]], **options)[0]
        for i in range(3)
    ]
    # Float sums may be ordered otherwise in another batch: at most a rounding of the last level.
    assert np.abs(together.astype(int) - np.stack(alone)).max() <= 1
    assert np.abs(together.astype(int) - in_two).max() <= 1
    other = inpaint(model, images, unknown, generator=spawn(6, 3), **options)
    assert (other != together).any()


def test_same_generator_same_image(model, pair):
    one, two = (
        inpaint(model, *pair, steps=3, generator=torch.Generator().manual_seed(4)) for _ in range(2)
    )
    assert np.array_equal(one, two)


@pytest.mark.parametrize("content", ["black", "noise"])
def test_what_the_hole_holds_does_not_matter(model, pair, content):
    images, unknown = pair
    changed = images.copy()
    noise = np.random.default_rng(9).integers(0, 256, images.shape, dtype=np.uint8)
    changed[unknown] = 0 if content == "black" else noise[unknown]
    a = inpaint(model, images, unknown, steps=3, generator=1)
    b = inpaint(model, changed, unknown, steps=3, generator=1)
    assert np.array_equal(a[unknown], b[unknown])
    kept = inpaint(model, changed, unknown, steps=3, generator=1, fill="keep")
    assert not np.array_equal(a[unknown], kept[unknown])


def test_any_size_and_no_hole_or_nothing_else(model):
    image = np.random.default_rng(0).integers(0, 256, (1, 45, 70, 3), dtype=np.uint8)
    nothing, everything = np.zeros((1, 45, 70), bool), np.ones((1, 45, 70), bool)
    assert np.array_equal(inpaint(model, image, nothing, steps=2), image)
    out = inpaint(model, image, everything, steps=2)
    assert out.shape == image.shape and (out != image).any()
    half = everything.copy()
    half[:, :, :33] = False
    out = inpaint(model, image, half, steps=2)
    assert np.array_equal(out[~half], image[~half])


def test_bad_input_is_named(model, pair):
    images, unknown = pair
    with pytest.raises(ValueError, match="float64"):
        inpaint(model, images / 255.0, unknown)
    with pytest.raises(ValueError, match="does not fit"):
        inpaint(model, images, unknown[:2])
    with pytest.raises(ValueError, match="method 'magic'"):
        inpaint(model, images, unknown, method="magic", steps=2)
    with pytest.raises(ValueError, match="generators"):
        inpaint(model, images, unknown, generator=spawn(0, 2), steps=2)
    with pytest.raises(ValueError, match="norm"):
        inpaint(model, images, unknown, norm="l7", steps=2)
    with pytest.raises(ValueError, match="mask_rule"):
        inpaint(model, images, unknown, mask_rule="most", steps=2)


def test_nan_is_reported_with_sample_and_remedy():
    z_y, m = torch.zeros(3, 4), torch.zeros(3, 4)

    def broken(z, t):
        out = torch.zeros_like(z)
        out[1] = float("nan")
        return out

    with pytest.raises(FloatingPointError, match=r"samples \[1\].*lower alpha"):
        run(broken, z_y, m)


def test_little_memory_halves_the_batch(model, pair, monkeypatch, capsys):
    images, unknown = pair
    whole = inpaint(model, images, unknown, steps=2, generator=2)
    real = diffusion._inpaint_batch

    def small(model, images, *rest):
        if len(images) > 1:
            raise torch.OutOfMemoryError("too much")
        return real(model, images, *rest)

    monkeypatch.setattr(diffusion, "_inpaint_batch", small)
    pieces = inpaint(model, images, unknown, steps=2, generator=2)
    assert np.abs(whole.astype(int) - pieces).max() <= 1
    assert "not enough memory for 3" in capsys.readouterr().out


def test_projection_and_repaint_need_no_gradient(model, pair, monkeypatch):
    states = []
    forward = model.eps
    monkeypatch.setattr(model, "eps", lambda z, t: states.append(z.requires_grad) or forward(z, t))
    for method in METHODS:
        states.clear()
        inpaint(model, *pair, method=method, steps=2)
        assert set(states) == {method == "mcg"}


def test_fill_takes_the_nearest_known_pixel():
    image = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    unknown = np.zeros((3, 3), bool)
    unknown[:, 0] = True
    assert np.array_equal(fill_unknown(image, unknown)[:, 0], image[:, 1])
    assert fill_unknown(image, np.ones((3, 3), bool)).shape == image.shape


def test_noise_strip_goes_from_noise_to_image(model, pair):
    noisy, clean, times = noise_strip(
        model, pair[0][0], pair[1][0], n_shown=4, steps=6, generator=0
    )
    assert noisy.shape == clean.shape == (4, 64, 64, 3)
    assert times[0] == 999 and times == sorted(times, reverse=True)


# --- against an exact posterior -------------------------------------------------------------------


def errors(prior, known, values, **options):
    mean, cov = prior.posterior(known, values)
    x = prior.sample(known, values, 3000, seed=1, **options)
    return np.linalg.norm(x.mean(0) - mean), np.linalg.norm(np.cov(x.T) - cov)


def test_posterior_is_that_of_the_joint_normal():
    prior = gaussian(4)
    known, values = np.array([True, False, True, False]), np.array([0.7, 0, -0.4, 0])
    rng = np.random.default_rng(0)
    x = rng.multivariate_normal(prior.mean.numpy(), prior.cov.numpy(), 400_000)
    near = x[(np.abs(x[:, known] - values[known]) < 0.1).all(1)][:, ~known]
    mean, cov = prior.posterior(known, values)
    assert np.abs(near.mean(0) - mean).max() < 0.05 and np.abs(np.cov(near.T) - cov).max() < 0.06


def test_gradient_brings_the_sample_nearer_to_the_posterior():
    known, found = np.array([True, False, True, False]), []
    for seed in range(6):
        prior = gaussian(4, seed=seed)
        values = np.random.default_rng(100 + seed).multivariate_normal(
            prior.mean.numpy(), prior.cov.numpy()
        )
        found.append(
            [
                errors(prior, known, values, method=method, alpha=0.2, steps=50, eta=1.0)
                for method in ("projection", "mcg")
            ]
        )
    (mean_p, cov_p), (mean_m, cov_m) = np.mean(found, axis=0)
    assert mean_m < 0.6 * mean_p and cov_m < cov_p


def test_without_known_part_samples_are_the_prior():
    prior = gaussian(3)
    x = prior.sample(np.zeros(3, bool), np.zeros(3), 6000, method="projection", steps=400, eta=1.0)
    assert np.abs(x.mean(0) - prior.mean.numpy()).max() < 0.08
    assert np.abs(np.cov(x.T) - prior.cov.numpy()).max() < 0.08
