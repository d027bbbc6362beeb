import math

import numpy as np
import pytest
import torch

from fluidscale.model import diffusion
from fluidscale.model.diffusion import OBJECTIVES, likelihood_bound
from fluidscale.model.solvers import CLAMP, make_solver, respaced
from fluidscale.spec import SOLVERS, InvalidInput

torch.set_num_threads(1)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def losses(objective, network, x, repeats, rng, stratified):
    return objective.losses(network, x, objective.draw(len(x), x.shape[1], repeats, rng, stratified))


def levels_of(objective, times):
    """alpha and sigma at the network's times, float64, from the definitions and not from the tables."""
    if isinstance(objective, diffusion.Epsilon):
        alpha_bar = np.interp(times, np.arange(1000), np.log(MAR_ALPHA_BAR / (1 - MAR_ALPHA_BAR)))
        return np.sqrt(1 / (1 + np.exp(-alpha_bar))), np.sqrt(1 / (1 + np.exp(alpha_bar)))
    t = np.asarray(times) / 1000
    if isinstance(objective, diffusion.Flow):
        return 1 - t, t
    return np.cos(t * np.pi / 2), np.sin(t * np.pi / 2)


# --- an independent derivation of MAR's loss and sampler, float64 -----------------------------------------------


def _mar_betas():
    def alpha_bar(t):
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - alpha_bar((i + 1) / 1000) / alpha_bar(i / 1000), 0.999) for i in range(1000)]


MAR_BETAS = _mar_betas()
MAR_ALPHA_BAR = np.cumprod([1 - b for b in MAR_BETAS])


def mar_loss(x, t, noise, output):
    """Loss of one token: mean squared noise error + the variational term in bits, from the formulas alone."""
    channels = len(x)
    predicted, variance = output[:channels], output[channels:]
    beta, bar = MAR_BETAS[t], MAR_ALPHA_BAR[t]
    before = MAR_ALPHA_BAR[t - 1] if t else 1.0
    noisy = math.sqrt(bar) * x + math.sqrt(1 - bar) * noise

    def posterior_mean(clean):
        return (math.sqrt(before) * beta * clean + math.sqrt(1 - beta) * (1 - before) * noisy) / (1 - bar)

    smallest = beta * (1 - before) / (1 - bar)
    if t == 0:  # zero: the second step's is used
        smallest = MAR_BETAS[1] * (1 - MAR_ALPHA_BAR[0]) / (1 - MAR_ALPHA_BAR[1])
    log_variance = (variance + 1) / 2 * math.log(beta) + (1 - variance) / 2 * math.log(smallest)
    guess = posterior_mean((noisy - math.sqrt(1 - bar) * predicted) / math.sqrt(bar))
    if t:
        gap = log_variance - math.log(smallest)
        nats = 0.5 * (gap - 1 + np.exp(-gap) + (posterior_mean(x) - guess) ** 2 / np.exp(log_variance))
    else:
        std = np.exp(log_variance / 2)

        def cdf(y):
            return 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))

        upper, lower = cdf((x - guess + 1 / 255) / std), cdf((x - guess - 1 / 255) / std)
        mass = np.where(x < -0.999, upper, np.where(x > 0.999, 1 - lower, upper - lower))
        nats = -np.log(np.maximum(mass, 1e-12))
    return np.mean((noise - predicted) ** 2) + np.mean(nats) / math.log(2)


def small_network(outputs, seed=5):
    """A smooth function of everything a network is given, evaluated in the precision of its input."""
    a, b = (torch.randn(outputs, 4, generator=rng(seed + i), dtype=torch.float64) * 0.4 for i in (0, 1))

    def network(x, times, which):
        time = times[which][..., None].to(x) / 1000
        return torch.tanh(x @ a.T.to(x) + time * (x @ b.T.to(x)) + 0.3)

    return network


def test_eps_loss_is_mars_to_1e5_in_every_term():
    x, repeats = torch.randn(2000, 4, generator=rng(1)) * 0.9, 2
    seen = {}

    def network(noisy, times, which):
        seen.update(t=times[which].flatten(), noisy=noisy)
        return small_network(8)(noisy, times, which)

    scores = losses(OBJECTIVES["eps"](), network, x, repeats, rng(7), False)
    again = rng(7)
    t = torch.randint(0, 1000, (len(x) * repeats,), generator=again)
    noise = torch.randn(len(x), repeats, 4, generator=again)
    assert torch.equal(seen["t"], t) and (t == 0).sum() >= 2 and (t == 999).sum() >= 1
    bar = torch.from_numpy(MAR_ALPHA_BAR)[t].view(len(x), repeats, 1)
    noisy = bar.sqrt() * x[:, None] + (1 - bar).sqrt() * noise
    assert torch.allclose(seen["noisy"].double(), noisy, atol=1e-6)
    output = small_network(8)(seen["noisy"], t, torch.arange(len(t)).view(len(x), repeats)).double().numpy()
    for i in [*range(200), *((t == 0).nonzero().flatten() // repeats).tolist()]:
        rows = [
            mar_loss(x[i].double().numpy(), int(t[i * repeats + r]), noise[i, r].double().numpy(), output[i, r])
            for r in range(repeats)
        ]
        assert float(scores[i]) == pytest.approx(np.mean(rows), rel=1e-5)


def test_eps_bound_trains_the_variance_and_leaves_the_mean_alone():
    x = torch.randn(64, 4, generator=rng(1))
    mean = torch.zeros(4, requires_grad=True)
    variance = torch.zeros(4, requires_grad=True)

    def network(noisy, times, which):
        return torch.cat([mean.expand_as(noisy), variance.expand_as(noisy)], -1)

    losses(OBJECTIVES["eps"](), network, x, 2, rng(7), False).mean().backward()
    again = rng(7)
    torch.randint(0, 1000, (128,), generator=again)
    noise = torch.randn(64, 2, 4, generator=again)
    assert torch.allclose(mean.grad, -2 * noise.mean((0, 1)) / 4, atol=1e-6)
    assert variance.grad.abs().min() > 0


def test_betas_and_respacing_are_mars():
    assert np.allclose(diffusion.cosine_betas(), MAR_BETAS, rtol=1e-12)
    assert MAR_ALPHA_BAR[-1] == pytest.approx(2.4e-9, rel=0.02)
    kept, betas = respaced(100)
    assert kept[0] == 0 and kept[-1] == 999 and len(set(kept)) == 100
    assert np.allclose(np.cumprod(1 - betas), MAR_ALPHA_BAR[kept], rtol=1e-9)


def test_ddpm_is_mars_ancestral_sampler():
    temperature, count, seed = 0.9, 5, 3
    solver = make_solver("ddpm", OBJECTIVES["eps"](), 20)
    noise = torch.randn(solver.num_noises, count, 4, generator=rng(seed), dtype=torch.float64)
    network = small_network(8)

    def step_network(x, step):
        return network(x, solver.times, torch.full((len(x),), step))

    kept = [round(999 / 19 * i) for i in range(20)]
    bars = MAR_ALPHA_BAR[kept]
    x = noise[0].numpy()
    for step, i in enumerate(reversed(range(20))):
        before = bars[i - 1] if i else 1.0
        beta = 1 - bars[i] / before
        output = network(torch.from_numpy(x), torch.tensor([kept[i]]), torch.zeros(count, dtype=torch.long)).numpy()
        clean = (x - math.sqrt(1 - bars[i]) * output[:, :4]) / math.sqrt(bars[i])
        mean = (math.sqrt(before) * beta * clean + math.sqrt(1 - beta) * (1 - before) * x) / (1 - bars[i])
        if i:
            smallest = beta * (1 - before) / (1 - bars[i])
            fraction = (output[:, 4:] + 1) / 2
            std = np.exp(0.5 * (fraction * math.log(beta) + (1 - fraction) * math.log(smallest)))
            mean = mean + temperature * std * noise[step + 1].numpy()
        x = mean
    drawn = solver.solve(step_network, noise, temperature).numpy()
    assert np.allclose(drawn, x, rtol=1e-9)


# --- the other objectives ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "start"), [("v", 1.0), ("flow", 2.0)])
def test_a_zero_network_scores_the_variance_of_the_target(name, start):
    x = torch.randn(4000, 3, generator=rng(1))
    scores = losses(OBJECTIVES[name](), lambda x, times, which: torch.zeros_like(x), x, 2, rng(), True)
    assert scores.shape == (4000,)
    assert float(scores.mean()) == pytest.approx(start, rel=0.03)


@pytest.mark.parametrize("name", ["v", "flow"])
@pytest.mark.parametrize("stratified", [False, True])
def test_training_shows_the_stated_path_and_asks_for_the_stated_target(name, stratified):
    objective = OBJECTIVES[name]()
    x = torch.randn(300, 3, generator=rng(1))
    seen = {}

    def network(noisy, times, which):
        alpha, sigma = (torch.from_numpy(a)[which][..., None] for a in levels_of(objective, times.double().numpy()))
        noise = (noisy - alpha * x[:, None]) / sigma
        seen.update(time=times[which], noise=noise)
        return (noise - x[:, None] if name == "flow" else alpha * noise - sigma * x[:, None]).float()

    assert losses(objective, network, x, 4, rng(), stratified).max() < 1e-5
    # Dividing by a small sigma amplifies rounding, hence the trimmed mean.
    assert seen["noise"].clamp(-5, 5).std() == pytest.approx(1, abs=0.05)


def test_flow_times_are_logit_normal_and_v_times_uniform():
    for name, law in (("v", lambda u: u), ("flow", lambda u: torch.special.ndtr(torch.logit(u)))):
        seen = []

        def network(x, times, which, seen=seen):
            seen.append(times[which].double() / 1000)
            return x

        for seed in range(20):
            losses(OBJECTIVES[name](), network, torch.zeros(200, 1), 2, rng(seed), False)
        u = torch.cat([law(t.flatten()) for t in seen]).sort().values
        grid = (torch.arange(len(u)) + 0.5) / len(u)
        assert (u - grid).abs().max() < 0.01  # Kolmogorov distance


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_stratified_levels_cover_the_law_and_repeat_exactly(name):
    objective = OBJECTIVES[name]()
    x = torch.randn(500, 2, generator=rng(1))
    a = losses(objective, zero_network, x, 2, rng(4), True)
    assert torch.equal(a, losses(objective, zero_network, x, 2, rng(4), True))
    spread = [losses(objective, zero_network, x, 2, rng(s), True).mean() for s in range(8)]
    loose = [losses(objective, zero_network, x, 2, rng(s), False).mean() for s in range(8)]
    assert torch.stack(spread).std() < 1.5 * torch.stack(loose).std()


def zero_network(x, times, which):
    return x.new_zeros(*x.shape[:-1], 2 * x.shape[-1]) if times.dtype == torch.long else torch.zeros_like(x)


# --- exact denoisers --------------------------------------------------------------------------------------------

MEAN, STD = 0.3, 0.8


def exact(objective, mean=MEAN, std=STD):
    """The best possible network for tokens from N(mean, std^2)."""

    def network(x, times, which):
        alpha, sigma = levels_of(objective, times.double().numpy())
        alpha, sigma = (torch.from_numpy(np.asarray(a)).to(x)[which][..., None] for a in (alpha, sigma))
        clean = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)
        noise = alpha * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2) * sigma / alpha.clamp(min=1e-12)
        if isinstance(objective, diffusion.Epsilon):
            return torch.cat([noise, -torch.ones_like(noise)], -1)
        return noise - clean if isinstance(objective, diffusion.Flow) else alpha * noise - sigma * clean

    return network


@pytest.mark.parametrize("name", list(OBJECTIVES))
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (MEAN, STD)])
def test_the_bound_of_an_exact_denoiser_is_the_entropy(name, mean, std):
    objective = OBJECTIVES[name]()
    x = mean + std * torch.randn(20000, 2, generator=rng(1))
    bound = likelihood_bound(objective, exact(objective, mean, std), x, 8, rng(2))
    analytic = 0.5 * ((x - mean) ** 2 / std**2 + math.log(2 * math.pi * std**2)).sum(1)
    error = float((bound - analytic).std()) / math.sqrt(len(x))
    # What the ends of the integral cut off is less than 1e-3 here.
    assert abs(float((bound - analytic).mean())) < 4 * error + 1e-3
    assert error < (1e-4 if std == 1 else 0.01)


def test_a_worse_denoiser_has_a_larger_bound():
    objective = OBJECTIVES["v"]()
    x = MEAN + STD * torch.randn(5000, 2, generator=rng(1))
    right, wrong = (likelihood_bound(objective, exact(objective, m), x, 8, rng(2)).mean() for m in (MEAN, -1.0))
    assert wrong > right + 0.1


FITTING = [(objective, solver) for objective, fitting in SOLVERS.items() for solver in fitting]


@pytest.mark.parametrize(("name", "solver"), FITTING)
def test_solvers_recover_the_distribution_of_an_exact_denoiser(name, solver):
    objective = OBJECTIVES[name]()
    fixed = make_solver(solver, objective, 100)
    network = exact(objective)
    noise = torch.randn(fixed.num_noises, 4000, 1, generator=rng(), dtype=torch.float64)
    x = fixed.solve(lambda x, i: network(x, fixed.times, torch.full((len(x),), i)), noise, 1.0)
    # MAR's eps objective starts a deterministic solver at log-SNR -4.5, where a tenth of the mean is missing.
    late = name == "eps" and fixed.num_noises == 1
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.05 if late else 0.03)
    assert float(x.std()) == pytest.approx(STD, rel=0.04)


def test_twelve_second_order_steps_beat_twelve_first_order_ones():
    objective = OBJECTIVES["v"]()
    network = exact(objective)
    errors = {}
    for solver in ("ddim", "dpmpp_2m"):
        fixed = make_solver(solver, objective, 12)
        noise = torch.randn(1, 20000, 1, generator=rng(), dtype=torch.float64)
        x = fixed.solve(lambda x, i: network(x, fixed.times, torch.full((len(x),), i)), noise, 1.0)  # noqa: B023
        errors[solver] = abs(float(x.std()) - STD)
    assert errors["dpmpp_2m"] < errors["ddim"] / 2


@pytest.mark.parametrize(("name", "solver"), FITTING)
def test_temperature_zero_is_deterministic_up_to_the_initial_noise(name, solver):
    objective = OBJECTIVES[name]()
    fixed = make_solver(solver, objective, 10)
    network = exact(objective)
    noise = torch.randn(fixed.num_noises, 100, 1, generator=rng(), dtype=torch.float64)
    other = noise.clone()
    other[1 if fixed.num_noises > 1 else 0] += 1
    x, y = (fixed.solve(lambda x, i: network(x, fixed.times, torch.full((len(x),), i)), n, 0.0) for n in (noise, other))
    # Ancestral: the added noise is off. Deterministic: the initial noise is off, so that all tokens are equal.
    assert torch.equal(x, y)
    if fixed.num_noises == 1:
        assert float(x.std()) < 1e-12


def test_an_undertrained_eps_head_diverges_unclamped_and_stays_bounded_clamped():
    network = small_network(8)
    drawn = {}
    for solver in ("ddpm", "ddpm_clamped", "dpmpp_2m", "ddim"):
        fixed = make_solver(solver, OBJECTIVES["eps"](), 100)
        noise = torch.randn(fixed.num_noises, 50, 4, generator=rng())
        drawn[solver] = fixed.solve(lambda x, i: network(x, fixed.times, torch.full((len(x),), i)), noise, 1.0)  # noqa: B023
    assert drawn["ddpm"].abs().max() > 100
    for solver in ("ddpm_clamped", "dpmpp_2m", "ddim"):
        assert drawn[solver].abs().max() <= CLAMP + 0.5


@pytest.mark.parametrize(("name", "solver", "steps"), [("flow", "ddpm", 10), ("eps", "euler", 10), ("v", "none", 10),
                                                       ("eps", "ddpm", 1001), ("v", "ddim", 0)])  # fmt: skip
def test_solvers_that_do_not_fit_are_refused(name, solver, steps):
    with pytest.raises(InvalidInput, match=r"solver|num_denoising_steps"):
        make_solver(solver, OBJECTIVES[name](), steps)
