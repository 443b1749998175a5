"""Methods and solvers: against closed forms, diffusers, a literal sampler, and known mistakes."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from helpers import samplers
from helpers.latent import LATENT_SCHEDULE
from helpers.samplers import (
    METHODS,
    SOLVERS,
    Sampling,
    condition,
    ddim_step,
    euler_step,
    inpaint_latents,
    network_calls,
    sample_posterior,
    spawn,
    timesteps,
    tweedie,
)
from helpers.sde import VPSDE, GaussianPrior
from tests.priors import ALPHAS as A
from tests.priors import gaussian

PAIRS = [
    (method, solver)
    for method in METHODS
    for solver in SOLVERS
    if not (method == "repaint" and "dpm" in solver)
]


class Linear(nn.Module):
    """A noise predictor that mixes all entries of a sample, none of another sample."""

    def forward(self, z, t):
        return 0.3 * torch.roll(z, 1, dims=-1) + 0.1 * torch.sin(z).flip(-1) + 1e-4 * t


def field(d=12):
    """Normal prior of neighbours that resemble each other, with a gap in the middle."""
    x = np.arange(d)
    cov = 0.97 * np.exp(-np.abs(x[:, None] - x) / 4) + 0.03 * np.eye(d)
    known = np.ones(d, bool)
    known[4:8] = False
    return GaussianPrior(np.zeros(d), cov, A), known


def run(eps, z_y, m, **options):
    options = {"method": "projection", "steps": 6, **options}
    return inpaint_latents(eps, z_y, m, A, generators=spawn(3, len(z_y)), **options)


# --- times and steps ------------------------------------------------------------------------------


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
@pytest.mark.parametrize("spacing", ["trailing", "leading", "karras"])
def test_times_decrease_and_end_low(n, spacing):
    times = timesteps(n, 1000, spacing=spacing, alphas_cumprod=A)
    assert len(times) == n and min(times) >= 0 and max(times) <= 999
    assert all(a > b for a, b in itertools.pairwise(times))
    assert times[0] == 999 or spacing == "leading"


def test_the_preset_paper_walks_the_times_of_the_paper():
    path = Path(__file__).parents[1] / "notebooks" / "presets" / "paper.yml"
    preset = yaml.safe_load(path.read_text())
    times = timesteps(preset["steps"], 1000, spacing=preset["spacing"])
    assert times == timesteps(500, 1000, spacing="leading") == list(range(999, 0, -2))


@pytest.mark.parametrize(("n", "strength"), [(1, 0.3), (8, 0.3), (20, 0.5), (500, 0.5), (7, 1.0)])
def test_strength_walks_the_lowest_levels_only(n, strength):
    times = timesteps(n, 1000, strength=strength)
    assert len(times) == n and times[0] == round(1000 * strength) - 1 and min(times) >= 0
    assert all(a > b for a, b in itertools.pairwise(times))
    assert timesteps(n, 1000, strength=1.0) == timesteps(n, 1000)
    assert network_calls(n, method="projection", strength=strength) == (n, 0)


@pytest.mark.parametrize(
    ("n", "strength"), [(1, 1.0), (2, 0.01), (10, 0.01), (16, 1.0), (1000, 1.0)]
)
def test_karras_times_are_as_many_as_asked_for(n, strength):
    times = timesteps(n, 1000, spacing="karras", strength=strength, alphas_cumprod=A)
    assert len(times) == n and times[0] == round(1000 * strength) - 1
    assert times[-1] == 0 or n == 1
    assert all(a > b for a, b in itertools.pairwise(times))


def test_karras_levels_that_coincide_move_to_the_next_free_ones():
    """Four levels close together and one far above: half way up, two times would be the last."""
    sigma = np.array([1, 1.01, 1.02, 1.03, 10])
    for n, times in ((5, [4, 3, 2, 1, 0]), (3, [4, 3, 0])):
        found = timesteps(n, 5, spacing="karras", alphas_cumprod=1 / (1 + sigma**2))
        assert found == times


def test_karras_levels_are_those_of_diffusers():
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(**LATENT_SCHEDULE, use_karras_sigmas=True)
    scheduler.set_timesteps(12)
    sigma = ((1 - A) / A).sqrt().numpy()
    mine = sigma[timesteps(12, 1000, spacing="karras", alphas_cumprod=A)]
    # Mine are levels of the chain, which at the lower end lie up to a third apart.
    np.testing.assert_allclose(mine, scheduler.sigmas[:12], rtol=0.15)
    np.testing.assert_allclose(mine[:9], scheduler.sigmas[:9], rtol=0.02)


@pytest.mark.parametrize("solver", ["sde-dpm++", "dpm++"])
def test_karras_levels_keep_the_variance_of_fine_structure(solver):
    """With few steps, a last step from far up gives a mean, and what is small is lost."""
    cov = np.array([1.0, 0.2, 0.05])

    def spread(spacing):
        z = sample_posterior(
            GaussianPrior(np.zeros(3), np.diag(cov), A), np.zeros(3, bool), np.zeros(3), 4000,
            seed=1, method="projection", solver=solver, steps=16, spacing=spacing,
        )  # fmt: skip
        return z.var(0) / cov

    assert spread("trailing")[2] < 0.4
    np.testing.assert_allclose(spread("karras"), 1, atol=0.25)


def test_wrong_numbers_of_steps_are_refused():
    with pytest.raises(ValueError, match=r"steps=200 .* 100 steps .*strength=0.1 of 1000"):
        timesteps(200, 1000, strength=0.1)
    for n in (0, 1001):
        with pytest.raises(ValueError, match=f"steps={n}"):
            timesteps(n, 1000)
    with pytest.raises(ValueError, match="spacing"):
        timesteps(5, 1000, spacing="even")
    for given in (None, A[:500]):
        with pytest.raises(ValueError, match="give alphas_cumprod of the 1000 steps"):
            timesteps(5, 1000, spacing="karras", alphas_cumprod=given)


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


def test_euler_step_is_a_step_of_the_reverse_sde():
    # With the integral of beta over the step in place of beta dt: Euler-Maruyama, literally.
    sde, prior = VPSDE(), gaussian(3)
    z, xi = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a_t, a_s = float(A[500]), float(A[480])
    t = torch.full((4,), 501 / 1000, dtype=torch.float64)
    reverse = sde.reverse(lambda x, t: prior.score(x, a_t))
    drift, diffusion = reverse.sde(z, t)
    dt = math.log(a_s / a_t) / float(sde.beta(t)[0])
    expected = z - drift * dt + diffusion[:, None] * math.sqrt(dt) * xi
    torch.testing.assert_close(euler_step(z, prior.eps(z, 500), a_t, a_s, xi), expected)
    assert dt == pytest.approx(20 / 1000, rel=0.03)


@pytest.mark.parametrize("solver", ["dpm++", "sde-dpm++"])
@pytest.mark.parametrize("steps", [6, 25])
def test_multistep_solver_is_that_of_its_paper(solver, steps):
    """Lu et al. 2022, algorithm 2 and its SDE variant, written out."""
    prior, times = gaussian(3), [*timesteps(steps), -1]
    a = [*A.tolist(), 1.0]
    generators = spawn(0, 5)
    z = torch.stack([torch.randn(3, generator=g, dtype=torch.float64) for g in generators])
    before, lam = None, [0.5 * math.log(v / (1 - v)) if v < 1 else math.inf for v in a]
    for t, s in itertools.pairwise(times):
        z0 = tweedie(z, prior.eps(z, t), a[t])
        if s < 0:
            z = z0
            break
        h = lam[s] - lam[t]
        D = z0
        if before is not None:
            r = (lam[t] - lam[before[1]]) / h
            D = z0 + (z0 - before[0]) / (2 * r)
        before = (z0, t)
        alpha, sigma, sigma_t = math.sqrt(a[s]), math.sqrt(1 - a[s]), math.sqrt(1 - a[t])
        if solver == "dpm++":
            z = sigma / sigma_t * z - alpha * math.expm1(-h) * D
        else:
            xi = torch.stack([torch.randn(3, generator=g, dtype=torch.float64) for g in generators])
            z = sigma / sigma_t * math.exp(-h) * z - alpha * math.expm1(-2 * h) * D
            z = z + sigma * math.sqrt(-math.expm1(-2 * h)) * xi
            for g in generators:  # drawn for the known part, of which there is none here
                torch.randn(3, generator=g, dtype=torch.float64)
    mine = inpaint_latents(
        prior.eps, torch.zeros_like(z), torch.zeros(5, 1), A,
        method="projection", solver=solver, steps=steps, generators=spawn(0, 5),
    )  # fmt: skip
    torch.testing.assert_close(mine, z, rtol=1e-3, atol=1e-3)


def test_moves_of_repaint():
    moves = samplers._path([8, 6, 4, 2], 2, 2)
    assert moves == [(8, 6), (6, 4), (4, 8), (8, 6), (6, 4), (4, 2), (2, -1)]
    assert samplers._path([8, 6, 4, 2], 9, 2) == moves  # half of the steps at most
    assert samplers._path([8], 5, 3) == [(8, -1)]


def test_network_calls_are_those_that_happen():
    prior = gaussian(4)
    z_y, m = torch.zeros(2, 4, dtype=torch.float64), torch.tensor([[1.0, 1, 0, 0]])
    for options in (
        {"method": "projection"},
        {"method": "mcg", "guided": 0.5},
        {"method": "mmps", "n_solve": 2, "guided": 0.3},
        {"method": "mmps", "solver": "sde-dpm++"},
        {"method": "repaint", "jump_length": 2},
    ):
        forward, backward = [], []

        def eps(z, t, forward=forward, backward=backward):
            forward.append(t)
            out = prior.eps(z, t)
            if z.requires_grad:
                out.register_hook(lambda g: backward.append(t))
            return out

        run(eps, z_y, m, steps=10, **options)
        assert network_calls(10, **options) == (len(forward), len(backward)), options
    assert network_calls(50, method="projection") == (50, 0)
    assert network_calls(50, method="mcg", guided=0.001) == (50, 1)  # one guided step at least
    assert network_calls(50, method="repaint", jump_length=10).forward == 50 + 4 * 2 * 10


def test_gradient_steps_are_the_last_ones():
    seen = []

    def eps(z, t):
        seen.append(z.requires_grad)
        return Linear()(z, t)

    z_y = torch.zeros(1, 4, dtype=torch.float64)
    run(eps, z_y, torch.tensor([[1.0, 1, 0, 0]]), method="mmps", guided=0.5, steps=8)
    assert seen == [False] * 4 + [True] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method 'magic'"),
        ({"solver": "heun"}, "solver 'heun'"),
        ({"norm": "l7"}, "norm 'l7'"),
        ({"spacing": "even"}, "spacing"),
        ({"steps": 0}, "steps=0"),
        ({"n_solve": 0}, "n_solve=0"),
        ({"guided": 0.0}, "guided=0.0.*projection"),
        ({"guided": 1.5}, "guided=1.5"),
        ({"strength": 0.0}, "strength=0.0.*pure noise"),
        ({"strength": 1.1}, "strength=1.1"),
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"eta": 2.0}, "eta=2.0"),
        ({"solver": "euler", "eta": 0.5}, "eta=0.5 belongs to solver='ddim'"),
        ({"method": "repaint", "solver": "dpm++"}, "jumps back in time.*'euler'"),
        ({"solver": "sde-dpm++", "spacing": "leading", "steps": 99}, "'leading' ends.*'karras'"),
        ({"method": "repaint", "n_resample": 0}, "n_resample=0"),
    ],
)
def test_nonsense_is_refused_with_a_remedy(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
    with pytest.raises(TypeError, match="stpes"):
        Sampling(stpes=3)


# --- the sampler, written out, and the mistakes of public implementations -------------------------


def rows_of_noise(like, generators):
    return torch.stack(
        [torch.randn(like.shape[1:], generator=g, dtype=like.dtype) for g in generators]
    )


def literal(
    eps, z_y, m, *, steps=6, alpha=0.0, norm="l2", generators, wrong=None, callback=None
):  # fmt: skip
    """DESIGN step 14 line by line, DDIM with eta = 1; `wrong` makes one of the known mistakes."""
    a = [*A.tolist(), 1.0]
    m = m.expand_as(z_y).double()

    def noise():
        return rows_of_noise(z_y, generators)

    times = [*timesteps(steps), -1]
    z = noise()
    z = (1 - m) * z + m * (math.sqrt(a[times[0]]) * z_y + math.sqrt(1 - a[times[0]]) * z)
    for t, s in itertools.pairwise(times):
        z = z.detach().requires_grad_(True)
        e = eps(z, t)
        z0 = (z - math.sqrt(1 - a[t]) * e) / math.sqrt(a[t])
        misfit = m * (z_y - z0)
        sizes = misfit.norm(dim=-1) if norm == "l2" else (misfit**2).sum(-1)
        size = torch.linalg.norm(misfit) if wrong == "coupled" else sizes.sum()
        (g,) = torch.autograd.grad(size, z)
        if callback:
            callback(t, z.detach(), g)
        z, e, z0 = z.detach(), e.detach(), z0.detach()
        if wrong == "clipped":
            z0 = z0.clamp(-1, 1)
        if s < 0:
            z = z0 - alpha * g
            known = z_y
            if wrong == "noisy end":
                known = math.sqrt(a[t]) * z_y + math.sqrt(1 - a[t]) * noise()
        else:
            sigma = math.sqrt((1 - a[s]) / (1 - a[t]) * (1 - a[t] / a[s]))
            z = math.sqrt(a[s]) * z0 + math.sqrt(1 - a[s] - sigma**2) * e + sigma * noise()
            z = z - alpha * g
            level = t if wrong == "level" else s
            known = math.sqrt(a[level]) * z_y + math.sqrt(1 - a[level]) * noise()
        z = (1 - m) * z + m * known
    return z


def ours(eps, z_y, m, *, alpha=0.0, **options):
    method = "mcg" if alpha else "projection"
    return inpaint_latents(eps, z_y, m, A, method=method, alpha=alpha, **{"steps": 6, **options})


def known_level_is_right(sampler):
    """What arrives at time t carries exactly the noise of time t."""
    seen, z_y = [], torch.full((4000, 1), 3.0, dtype=torch.float64)
    sampler(
        lambda z, t: 0 * z, z_y, torch.ones(1, 1), steps=5, generators=spawn(3, 4000),
        callback=lambda t, z, _: seen.append((t, z.clone())),
    )  # fmt: skip
    for t, z in seen:
        assert float(z.std()) == pytest.approx(math.sqrt(1 - A[t]), rel=0.06)
        assert float(z.mean()) == pytest.approx(3 * math.sqrt(A[t]), abs=0.08)


def samples_are_apart(sampler):
    """A companion with a large misfit changes nothing."""
    z_y = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z_y[1] *= 50
    m = torch.tensor([[1.0, 1, 0, 0]])
    together = sampler(Linear(), z_y, m, alpha=0.5, generators=spawn(3, 3))
    for i in range(3):
        alone = sampler(Linear(), z_y[[i]], m, alpha=0.5, generators=[spawn(3, 3)[i]])
        torch.testing.assert_close(together[[i]], alone)


def latents_keep_their_range(sampler):
    z_y = torch.full((2, 6), 7.0, dtype=torch.float64)
    m = torch.tensor([[1.0, 1, 1, 0, 0, 0]])
    prior = GaussianPrior(np.full(6, 7.0), 0.01 * np.eye(6), A)
    assert float(sampler(prior.eps, z_y, m, steps=20, generators=spawn(3, 2))[:, 3:].min()) > 6


def known_part_ends_clean(sampler):
    z_y = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    m = torch.tensor([[1.0, 0, 1, 0, 1, 0]])
    assert torch.equal(sampler(Linear(), z_y, m, generators=spawn(3, 2))[:, ::2], z_y[:, ::2])


TRAPS = {
    "level": known_level_is_right,
    "coupled": samples_are_apart,
    "clipped": latents_keep_their_range,
    "noisy end": known_part_ends_clean,
}


@pytest.mark.parametrize("mistake", TRAPS)
def test_traps_are_avoided_and_the_check_catches_the_wrong_version(mistake):
    check = TRAPS[mistake]
    check(ours)
    check(literal)
    with pytest.raises(AssertionError):
        check(lambda *args, **options: literal(*args, wrong=mistake, **options))


@pytest.mark.parametrize(("alpha", "norm"), [(0.0, "l2"), (0.3, "l2"), (0.02, "squared")])
def test_sampler_equals_the_literal_one(alpha, norm):
    z_y = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    m = torch.tensor([[1.0, 1, 0, 0]])
    options = {"steps": 7, "alpha": alpha, "norm": norm}
    one, other = (f(Linear(), z_y, m, **options, generators=spawn(1, 3)) for f in (ours, literal))
    torch.testing.assert_close(one, other)


def test_repaint_is_that_of_its_paper():
    """Lugmayr et al. 2022, algorithm 1, written out: each step three times, but for the last."""
    z_y = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    m, a, generators = torch.tensor([[1.0, 1, 0, 0]]).double(), [*A.tolist(), 1.0], spawn(1, 3)
    times = [*timesteps(5), -1]
    z = rows_of_noise(z_y, generators)
    z = (1 - m) * z + m * (math.sqrt(a[times[0]]) * z_y + math.sqrt(1 - a[times[0]]) * z)
    for t, s in itertools.pairwise(times):
        beta = 1 - a[t] / a[s]  # of the step from s to t
        for u in range(3 if s >= 0 else 1):
            if u:
                z = math.sqrt(1 - beta) * z + math.sqrt(beta) * rows_of_noise(z, generators)
            e = Linear()(z, t)
            if s < 0:
                z = (1 - m) * tweedie(z, e, a[t]) + m * z_y
                break
            mean = (z - beta / math.sqrt(1 - a[t]) * e) / math.sqrt(1 - beta)
            variance = (1 - a[s]) / (1 - a[t]) * beta
            z = mean + math.sqrt(variance) * rows_of_noise(z, generators)
            known = math.sqrt(a[s]) * z_y + math.sqrt(1 - a[s]) * rows_of_noise(z, generators)
            z = m * known + (1 - m) * z
    mine = inpaint_latents(
        Linear(), z_y, m, A, method="repaint", jump_length=1, n_resample=3, steps=5,
        generators=spawn(1, 3),
    )  # fmt: skip
    torch.testing.assert_close(mine, z)


@pytest.mark.parametrize(("method", "solver"), PAIRS)
def test_the_level_of_the_known_part_is_right_everywhere(method, solver):
    """After a jump back in time too."""

    def sampler(eps, z_y, m, **options):
        options["generators"] = torch.Generator().manual_seed(3)  # one for all is faster
        return inpaint_latents(eps, z_y, m, A, method=method, solver=solver, **options)

    known_level_is_right(sampler)


@pytest.mark.parametrize(("method", "solver"), PAIRS)
def test_known_part_is_exact_and_samples_are_apart_everywhere(method, solver):
    def sampler(eps, z_y, m, **options):
        options.pop("alpha", None)
        return inpaint_latents(eps, z_y, m, A, method=method, solver=solver, steps=6, **options)

    known_part_ends_clean(sampler)
    samples_are_apart(sampler)


@pytest.mark.parametrize(("method", "solver"), PAIRS)
def test_same_generator_same_sample_and_no_other_source(method, solver):
    z_y, m = torch.ones(2, 4), torch.tensor([[1.0, 1, 0, 0]])
    state = torch.get_rng_state()
    one, two = (run(Linear(), z_y, m, method=method, solver=solver) for _ in range(2))
    assert torch.equal(one, two) and torch.equal(state, torch.get_rng_state())
    other = inpaint_latents(
        Linear(), z_y, m, A, method=method, solver=solver, steps=6, generators=spawn(4, 2)
    )
    assert not torch.equal(one, other)


@pytest.mark.parametrize("options", [{"solver": "dpm++"}, {"solver": "ddim", "eta": 0.0}])
def test_a_deterministic_way_keeps_the_noise_of_its_known_part(options):
    z_y, m = torch.full((2, 4), 3.0, dtype=torch.float64), torch.tensor([[1.0, 1, 0, 0]])
    noises = []

    def watch(t, z, z0):
        a = A[t]
        noises.append(((z - a.sqrt() * z_y) / (1 - a).sqrt())[:, :2])

    inpaint_latents(
        lambda z, t: 0.3 * z, z_y, m, A, method="projection", steps=5, generators=spawn(0, 2),
        callback=watch, **options,
    )  # fmt: skip
    assert len(noises) == 5 and noises[0].abs().max() > 0.1
    for noise in noises[1:]:
        torch.testing.assert_close(noise, noises[0])


def test_nan_is_reported_with_sample_and_remedy():
    z_y, m = torch.zeros(3, 4), torch.zeros(3, 4)

    def broken(z, t):
        out = torch.zeros_like(z)
        out[1] = float("nan")
        return out

    with pytest.raises(FloatingPointError, match=r"samples \[1\].*lower alpha"):
        run(broken, z_y, m)


def test_one_generator_each():
    with pytest.raises(ValueError, match="2 generators for 3 samples"):
        inpaint_latents(Linear(), torch.zeros(3, 4), torch.zeros(3, 4), A, generators=spawn(0, 2))


# --- the conditioned estimate ---------------------------------------------------------------------


@pytest.mark.parametrize("t", [10, 300, 700, 999])
def test_conditioned_estimate_is_exact_for_a_normal_prior(t):
    """E[z_0 | z_t, known] from the joint normal of z_0 and z_t, literally."""
    prior, known = field()
    d, a = len(known), float(A[t])
    generator = torch.Generator().manual_seed(t)
    z, z_y = torch.randn(2, 3, d, dtype=torch.float64, generator=generator)
    z = z.requires_grad_(True)
    z0 = tweedie(z, prior.eps(z, t), a)
    m = torch.as_tensor(known).double().expand(3, d)
    found = condition(z0, z, a, z_y, m, n_solve=int(known.sum()))
    S = prior.cov
    joint = torch.cat([S[:, known], math.sqrt(a) * S], 1)  # of z_0 with (known part, z_t)
    top = torch.cat([S[known][:, known], math.sqrt(a) * S[known]], 1)
    low = torch.cat([math.sqrt(a) * S[:, known], a * S + (1 - a) * torch.eye(d)], 1)
    # The known coordinates of z_t carry nothing beyond the known values.
    given = torch.cat([z_y[:, known], z.detach()], 1)
    exact = given @ torch.linalg.solve(torch.cat([top, low]), joint.T)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[:, known], z_y[:, known])


def test_more_solving_fits_the_known_part_better():
    prior, known = field()
    z = torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z = z.requires_grad_(True)
    z0, m = tweedie(z, prior.eps(z, 400), float(A[400])), torch.as_tensor(known).double()
    z_y = torch.ones_like(z)
    exact = condition(z0, z, float(A[400]), z_y, m.expand(4, 12), n_solve=8)
    gaps = []
    for n in (1, 2, 4):
        z0 = tweedie(z, prior.eps(z, 400), float(A[400]))
        found = condition(z0, z, float(A[400]), z_y, m.expand(4, 12), n_solve=n)
        gaps.append(float((found - exact).abs().max()))
    assert gaps[0] > gaps[1] > gaps[2]


def test_a_jacobian_that_is_no_covariance_does_no_harm():
    z = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    m, z_y = torch.tensor([[1.0, 1, 0, 0]]).expand(2, 4), torch.ones(2, 4)
    found = condition(-3 * z, z, 0.5, z_y, m, n_solve=3)  # negative "covariance"
    torch.testing.assert_close(found, torch.where(m.bool(), z_y, -3 * z.detach()))


# --- against an exact posterior -------------------------------------------------------------------


def errors(prior, known, values, *, n=2000, **options):
    """Error of mean (per coordinate, standard deviations) and of covariance (relative)."""
    mean, cov = prior.posterior(known, values)
    x = sample_posterior(prior, known, values, n, seed=1, **options)
    return (
        np.linalg.norm(x.mean(0) - mean) / math.sqrt(len(mean)),
        np.linalg.norm(np.cov(x.T) - cov) / np.linalg.norm(cov),
    )


def mean_errors(**options):
    """Over six random priors of four coordinates, two of them known."""
    known, found = np.array([True, False, True, False]), []
    for seed in range(6):
        prior = gaussian(4, seed=seed)
        values = np.random.default_rng(100 + seed).multivariate_normal(
            prior.mean.numpy(), prior.cov.numpy()
        )
        found.append(errors(prior, known, values, **options))
    return np.mean(found, axis=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_mmps_finds_the_exact_posterior(solver):
    mean, cov = mean_errors(method="mmps", solver=solver, steps=50, n_solve=2)
    assert mean < 0.04 and cov < 0.16, (mean, cov)
    prior, known = field()
    values = np.random.default_rng(0).multivariate_normal(np.zeros(12), prior.cov.numpy())
    mean, cov = errors(prior, known, values, method="mmps", solver=solver, steps=50, n_solve=4)
    assert mean < 0.07 and cov < 0.2, (mean, cov)


@pytest.mark.parametrize("solver", SOLVERS)
def test_other_methods_are_biased_and_no_worse_than_known(solver):
    """Bounds from above for each pair, and from below for the bias of projection."""
    projection = mean_errors(method="projection", solver=solver, steps=50)
    mcg = mean_errors(method="mcg", solver=solver, steps=50, alpha=0.1)
    assert 0.1 < projection[0] < 0.4 and projection[1] < 0.6
    assert mcg[0] < 0.75 * projection[0] and mcg[1] < 0.3
    if "dpm" not in solver:
        repaint = mean_errors(method="repaint", solver=solver, steps=50)
        assert repaint[0] < projection[0] and repaint[1] < 0.3


def test_gradient_brings_the_sample_nearer_to_the_posterior():
    projection = mean_errors(method="projection", steps=50)
    mcg = mean_errors(method="mcg", alpha=0.2, steps=50)
    mmps = mean_errors(method="mmps", steps=50, n_solve=2)
    assert mcg[0] < 0.6 * projection[0] and mcg[1] < projection[1]
    assert mmps[0] < 0.5 * mcg[0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_without_known_part_samples_are_the_prior(solver):
    prior = gaussian(3)
    x = sample_posterior(
        prior, np.zeros(3, bool), np.zeros(3), 6000, method="projection", steps=200, solver=solver
    )
    assert np.abs(x.mean(0) - prior.mean.numpy()).max() < 0.08
    assert np.abs(np.cov(x.T) - prior.cov.numpy()).max() < 0.08


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("strength", [0.3, 0.6])
def test_starting_from_posterior_samples_leaves_the_posterior_as_it_is(solver, strength):
    """Noised and walked back, exact samples of the posterior are exact samples again."""
    prior, known, n = gaussian(4, seed=3), np.array([True, False, True, False]), 4000
    values = np.array([0.8, 0.0, -0.5, 0.0])
    mean, cov = prior.posterior(known, values)
    z_y = np.tile(values, (n, 1))
    z_y[:, ~known] = np.random.default_rng(0).multivariate_normal(mean, cov, n)
    z = inpaint_latents(
        prior.eps, torch.from_numpy(z_y), torch.from_numpy(known)[None].double(), A,
        generators=torch.Generator().manual_seed(0), method="mmps", solver=solver, n_solve=2,
        steps=40, strength=strength,
    ).numpy()  # fmt: skip
    assert np.array_equal(z[:, known], z_y[:, known])
    assert np.linalg.norm(z[:, ~known].mean(0) - mean) < 0.06
    bound = 0.2 if solver == "ddim" else 0.1  # few DDIM steps shrink the variance
    assert np.linalg.norm(np.cov(z[:, ~known].T) - cov) < bound
    apart = [np.corrcoef(z[:, k], z_y[:, k])[0, 1] for k in np.flatnonzero(~known)]
    assert min(apart) < 0.999  # they are other samples


def test_the_weaker_the_nearer_to_what_was_there():
    prior, known = field()
    z_y = torch.from_numpy(np.random.default_rng(1).normal(size=(200, 12)))
    m = torch.from_numpy(known)[None].double()
    moved = []
    for strength in (0.01, 0.2, 0.5, 1.0):
        z = run(prior.eps, z_y, m, method="projection", steps=10, strength=strength)
        moved.append(float((z - z_y).abs().mean()))
    assert moved[0] < 0.05 and moved == sorted(moved)
