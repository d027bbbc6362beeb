"""Losses and likelihoods against what is known: the chain rule, and distributions whose entropy has a closed form."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fluidscale.evaluate import loss
from fluidscale.evaluate.loss import ValidationLikelihood, ValidationLoss, likelihood_view, ratio, validation_batch
from fluidscale.evaluate.protocol import Subject
from fluidscale.model.build import build
from fluidscale.model.order import Random
from fluidscale.model.transformer import Text
from fluidscale.spec import ARMS, DiffusionSpec, ModelSpec
from fluidscale.tokens.image import load_tokenizer
from fluidscale.world import World


@pytest.fixture
def subject_of(tiny_spec, tmp_path):
    """A run's subject with weights that are random everywhere (a fresh model predicts the same everywhere)."""

    def make(arm: str, val_images: int = 16, **model) -> Subject:
        spec = tiny_spec(arm)
        evaluate = dataclasses.replace(spec.evaluate, val_images=val_images)
        spec = dataclasses.replace(spec, evaluate=evaluate, model=dataclasses.replace(spec.model, **model))
        torch.manual_seed(0)
        network = build(spec.model).eval()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        world = World(spec.data.world)
        return Subject(network, load_tokenizer(spec.tokenizer_sha256), spec, world, tmp_path, torch.device("cpu"))

    return make


def only(scores):
    (score,) = scores
    return score


def test_a_causal_order_is_measured_by_the_chain_rule(subject_of):
    subject = subject_of("discrete-raster")
    score = only(ValidationLikelihood()(subject))
    tokens, text = validation_batch(subject, 0, 16)
    length, total = tokens.shape[1], torch.zeros(16)
    with torch.inference_mode():
        for k in range(length):
            known = (torch.arange(length) < k).expand(16, length)
            total += subject.model.nll(tokens, text, subject.model.order.view(known), torch.Generator()).sum(1)
    assert score.value == pytest.approx(total.mean().item(), rel=1e-5)
    assert score.se == pytest.approx(total.std().item() / 4, rel=1e-4)
    assert (score.n, score.metric.unit) == (16, "nats/image")


def test_a_random_order_is_measured_by_its_stepwise_conditionals(subject_of):
    """Averaged over prefixes and orders, L times the mean over unseen tokens is the sum of the steps' own nats."""
    subject = subject_of("discrete-random")
    tokens, text = validation_batch(subject, 0, 1)
    length, repeats = tokens.shape[1], 400
    many, words = tokens.expand(repeats, -1), Text(text.values.expand(repeats, -1), text.mask.expand(repeats, -1))
    rng = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        estimates = []
        for draw in range(loss._DRAWS):
            view = loss.stack([likelihood_view(subject.model.order, length, draw, rng) for _ in range(repeats)])
            nats = subject.model.nll(many, words, view, rng) * view.counted
            estimates.append(length * nats.sum(1) / view.counted.sum(1))
        estimate = torch.stack(estimates).mean(0)
        ranks = torch.rand(repeats, length, generator=rng).argsort(1)
        stepwise = torch.zeros(repeats)
        for k in range(length):
            nats = subject.model.nll(many, words, subject.model.order.view(ranks < k), rng)
            stepwise += nats[ranks == k]
    error = math.sqrt(estimate.var().item() / repeats + stepwise.var().item() / repeats)
    assert abs(estimate.mean() - stepwise.mean()).item() < 4 * error
    assert error < 0.01 * stepwise.mean().item()


def test_prefix_lengths_are_stratified_and_uniform():
    rng = torch.Generator().manual_seed(0)
    for draw in range(4):
        prefixes = {16 - int(likelihood_view(Random("uniform"), 16, draw, rng).counted.sum()) for _ in range(200)}
        assert prefixes == set(range(4 * draw, 4 * draw + 4))


@pytest.mark.parametrize("arm", ARMS)
def test_a_second_measurement_is_the_same_number(subject_of, arm):
    subject = subject_of(arm)
    for evaluator in (ValidationLoss(), ValidationLikelihood()):
        first, again = only(evaluator(subject)), only(evaluator(subject))
        assert first == again and first.se > 0 and math.isfinite(first.value)
        assert first.protocol == evaluator.protocol(subject)
    unit = "nats/token" if arm.startswith("discrete") else "diffusion loss"
    assert only(ValidationLoss()(subject)).metric.unit == unit


@pytest.mark.parametrize("arm", ["discrete-random", "continuous-random"])
def test_everything_random_is_common_to_all_sizes(subject_of, arm, monkeypatch):
    def shown(**model):
        subject, seen = subject_of(arm, **model), []
        original = type(subject.model).losses

        def spy(self, tokens, text, view, rng, **options):
            seen.append((tokens.clone(), view.reads, view.counted, rng.initial_seed()))
            return original(self, tokens, text, view, rng, **options)

        with monkeypatch.context() as patch:
            patch.setattr(type(subject.model), "losses", spy)
            list(ValidationLoss()(subject))
        return seen

    small, large = shown(), shown(width=32, num_heads=2, depth=1)
    assert len(small) == len(large) == loss._DRAWS
    for a, b in zip(small, large, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True)) and a[3] == b[3]
    assert len({view[1].numpy().tobytes() for view in small}) == loss._DRAWS


def test_validation_tokens_depend_on_the_image_alone(subject_of):
    subject = subject_of("continuous-raster")
    many, few = validation_batch(subject, 0, 8)[0], validation_batch(subject, 4, 2)[0]
    # The encoder's arithmetic may differ in the last digit between batch sizes; the posterior's noise may not.
    assert torch.allclose(many[4:6], few, atol=1e-4) and not torch.allclose(many[:2], few, atol=1e-2)


def test_the_error_of_a_ratio_is_the_jackknifes():
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 17, 300).astype(float)
    sums = counts * (2 + 0.3 * rng.normal(size=300))
    value, se = ratio(sums, counts)
    left_out = (sums.sum() - sums) / (counts.sum() - counts)
    assert value == sums.sum() / counts.sum()
    assert se == pytest.approx(math.sqrt(299 / 300 * ((left_out - left_out.mean()) ** 2).sum()), rel=0.02)


class Known:
    """Pictures of 2 x 2 pixels whose four values are a stationary Markov chain in raster order; no words, no loss.

    Stands for world and tokenizer at once. `codes` > 0: a chain that stays with probability .7, else moves to any other
    state; 0: a Gaussian one with correlation .8.
    """

    stay, correlation = 0.7, 0.8

    def __init__(self, codes: int) -> None:
        self.codes = codes

    @property
    def entropy(self) -> float:
        if not self.codes:
            return 2 * math.log(2 * math.pi * math.e) + 1.5 * math.log(1 - self.correlation**2)
        move = (1 - self.stay) / (self.codes - 1)
        step = -self.stay * math.log(self.stay) - (self.codes - 1) * move * math.log(move)
        return math.log(self.codes) + 3 * step

    def draw(self, rng: np.random.Generator, count: int) -> torch.Tensor:
        chain = [rng.normal(size=count) if not self.codes else rng.integers(self.codes, size=count)]
        for _ in range(3):
            if self.codes:
                moved = (chain[-1] + rng.integers(1, self.codes, size=count)) % self.codes
                chain.append(np.where(rng.random(count) < self.stay, chain[-1], moved))
            else:
                noise = math.sqrt(1 - self.correlation**2) * rng.normal(size=count)
                chain.append(self.correlation * chain[-1] + noise)
        tokens = torch.from_numpy(np.stack(chain, 1))
        return tokens if self.codes else tokens.float()[..., None]

    def scenes(self, start: int, count: int, split: str):
        return self.draw(np.random.default_rng(start), count), np.ones((count, 1), np.int64), None

    def encode(self, images):
        return images

    def sample(self, moments, rng):
        return moments


# Fitted for seconds only: what is asked is a bound from below, and that the fit comes near it.
@pytest.mark.parametrize(
    ("order", "codes", "slack"), [("raster", 4, 0.05), ("random", 4, 0.15), ("raster", 0, 0.6), ("random", 0, 0.9)]
)
def test_a_fitted_model_stays_above_the_entropy_and_comes_near(tiny_spec, tmp_path, order, codes, slack):
    torch.manual_seed(0)
    model_spec = ModelSpec(
        token_kind="discrete" if codes else "continuous",
        order=order,
        depth=1,
        width=32,
        num_heads=2,
        grid=2,
        token_channels=0 if codes else 1,
        vocab_size=codes,
        text_vocab_size=2,
        text_width=8,
        text_length=1,
        aligner_depth=0,
        mask_law="uniform" if order == "random" else "none",
        head=None if codes else DiffusionSpec(32, 1, "v", 2),
    )
    truth, network, rng = Known(codes), build(model_spec), np.random.default_rng(7)
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3)
    torch_rng, steps = torch.Generator().manual_seed(0), 300
    for step in range(steps):
        tokens = truth.draw(rng, 128)
        text = Text(torch.ones(128, 1, dtype=torch.long), torch.ones(128, 1, dtype=torch.bool))
        view = network.order.training_view(128, 4, torch_rng)
        losses, counted = network.losses(tokens, text, view, torch_rng)
        optimizer.zero_grad()
        (losses.sum() / counted.sum()).backward()
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, 2 - 2 * step / steps)
        optimizer.step()
    spec = tiny_spec(f"{model_spec.token_kind}-{order}")
    evaluate = dataclasses.replace(spec.evaluate, val_images=1024)
    spec = dataclasses.replace(spec, model=model_spec, evaluate=evaluate)
    subject = Subject(network.eval(), truth, spec, truth, tmp_path, torch.device("cpu"))
    score = only(ValidationLikelihood()(subject))
    assert truth.entropy - 3 * score.se < score.value < truth.entropy + slack + 3 * score.se


def test_cross_entropy_of_a_fresh_model_is_that_of_guessing(tiny_spec, tmp_path):
    spec = tiny_spec("discrete-raster")
    network = build(spec.model).eval()
    subject = Subject(
        network, load_tokenizer(spec.tokenizer_sha256), spec, World(spec.data.world), tmp_path, torch.device("cpu")
    )
    tokens, _ = validation_batch(subject, 0, 4)
    guess = F.cross_entropy(torch.zeros(4 * 16, spec.model.vocab_size), tokens.flatten()).item()
    assert only(ValidationLoss()(subject)).value == pytest.approx(guess, rel=0.05)
