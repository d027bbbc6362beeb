import pytest
import torch
from tiny_models import CHANNELS, CODES, SOLVERS, arm_spec, awake

from fluidscale.model.denoiser import step_chunks
from fluidscale.model.draws import ImageDraws
from fluidscale.model.head import guide
from fluidscale.spec import InvalidInput, SamplingSpec


def draws(images, per_image=1, seed=0):
    generators = [torch.Generator().manual_seed(seed + i) for i in range(images)]
    return ImageDraws(generators, per_image, torch.device("cpu"))


def softmax_head():
    return awake(arm_spec("discrete-raster")).head


def diffusion_head(objective="flow", repeats=2):
    return awake(arm_spec("continuous-raster", objective=objective, repeats=repeats)).head


def rows(count, width=16, seed=1):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


CODES_AT = SamplingSpec(1.0, 1.0, 4)


@torch.no_grad()
def test_codes_are_drawn_with_the_guided_tempered_probabilities():
    head, count, scale, temperature = softmax_head(), 20000, 1.7, 1.3
    z, null = rows(2)
    sample = head.sampler(SamplingSpec(scale, temperature, 4))
    drawn = sample(z.expand(count, -1), null.expand(count, -1), scale, draws(1, count))
    logits = guide(head.classifier(z), head.classifier(null), scale)
    assert torch.allclose(guide(torch.tensor(3.0), torch.tensor(1.0), 2.0), torch.tensor(5.0))
    expected = torch.softmax(logits / temperature, -1)
    seen = torch.bincount(drawn, minlength=CODES) / count
    assert (seen - expected).abs().max() < 4 * (expected.max() / count).sqrt()


@torch.no_grad()
def test_temperature_zero_takes_the_most_likely_code():
    head, z = softmax_head(), rows(5)
    drawn = head.sampler(SamplingSpec(1.0, 0.0, 4))(z, None, 1.0, draws(5))
    assert torch.equal(drawn, head.classifier(z).argmax(-1))


@pytest.mark.parametrize("change", [{"temperature": -1.0}, {"solver": "ddpm"}])
def test_sampling_that_does_not_fit_codes_is_refused(change):
    with pytest.raises(InvalidInput):
        softmax_head().sampler(SamplingSpec(**{**CODES_AT.__dict__, **change}))


@torch.no_grad()
def test_code_losses_are_cross_entropies_and_likelihoods():
    head, z = softmax_head(), rows(4)
    codes = torch.tensor([0, 3, 5, 7])
    expected = -torch.log_softmax(head.classifier(z), -1)[torch.arange(4), codes]
    rng = torch.Generator()
    assert head.draw(4, rng) is None
    assert torch.allclose(head.losses(z, codes, None), expected)
    assert torch.allclose(head.nll(z, codes, rng), expected)


@torch.no_grad()
@pytest.mark.parametrize("objective", list(SOLVERS))
def test_sampling_asks_the_network_that_was_trained(objective):
    """Conditions projected once and AdaLN rows computed ahead change nothing, in guided sampling too."""
    head = diffusion_head(objective)
    z, null, x = rows(3), rows(3, seed=2), rows(3, CHANNELS, seed=3)
    times = torch.tensor([10.0, 500.0, 990.0])
    network = head._bind(z, null, 2.5, head.denoiser.embed_time(times))
    for step in range(3):
        which = torch.full((3, 1), step)
        c, u = (head.denoiser(x[:, None], times, which, w).squeeze(1) for w in (z, null))
        guided = torch.cat([guide(c, u, 2.5)[:, :CHANNELS], c[:, CHANNELS:]], -1)
        assert torch.allclose(network(x, step), guided, atol=1e-5)


@torch.no_grad()
def test_rows_do_not_depend_on_how_many_steps_are_computed_at_once(monkeypatch):
    head = diffusion_head()
    sampler = head.sampler(SamplingSpec(1.0, 1.0, 4, num_denoising_steps=7, solver="euler"))
    z = rows(3)
    whole = sampler(z, None, 1.0, draws(3))
    monkeypatch.setattr("fluidscale.model.head.step_chunks", lambda steps, size: step_chunks(steps, size, 2 * size))
    assert torch.allclose(whole, sampler(z, None, 1.0, draws(3)), atol=1e-6)
    assert step_chunks(7, 10, 25) == [range(0, 2), range(2, 4), range(4, 6), range(6, 7)]
    assert step_chunks(3, 100, 1) == [range(0, 1), range(1, 2), range(2, 3)]


@torch.no_grad()
@pytest.mark.parametrize("objective", list(SOLVERS))
def test_repeats_are_averaged_and_cost_no_bias(objective):
    z, tokens = rows(800), rows(800, CHANNELS, seed=4)
    few, many = (diffusion_head(objective, repeats) for repeats in (1, 8))
    noises = [h.draw(800, torch.Generator().manual_seed(0), stratified=True) for h in (few, many)]
    losses = [h.losses(z, tokens, noise) for h, noise in zip((few, many), noises, strict=True)]
    assert losses[0].shape == losses[1].shape == (800,)
    assert losses[1].std() < losses[0].std()
    assert float(losses[0].mean()) == pytest.approx(float(losses[1].mean()), rel=0.1)


@torch.no_grad()
def test_draws_of_an_image_are_its_own():
    together = draws(4, per_image=3).normal(2, 5)
    assert together.shape == (2, 12, 5)
    alone = draws(1, per_image=3, seed=2).normal(2, 5)
    assert torch.equal(together[:, 6:9], alone)
    assert torch.equal(draws(4, 3).uniform()[6:9], draws(1, 3, seed=2).uniform())
