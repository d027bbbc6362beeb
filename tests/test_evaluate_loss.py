"""Losses and likelihoods against the chain rule and the conditionals of the model itself."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fluidscale.data.sources import open_source
from fluidscale.evaluate import likelihood, validation
from fluidscale.evaluate.likelihood import (
    LOG_SNRS,
    StepwiseLikelihood,
    ValidationLikelihood,
    likelihood_view,
    own_schedule,
    raster_schedule,
)
from fluidscale.evaluate.loss import ValidationLoss, ratio
from fluidscale.evaluate.protocol import Subject
from fluidscale.evaluate.validation import DRAWS, stack, validation_batch
from fluidscale.kept import Kept
from fluidscale.model.build import build
from fluidscale.model.order import Random
from fluidscale.model.transformer import Text
from fluidscale.record import Placement
from fluidscale.spec import ARMS


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
        return Subject(network, spec, open_source(spec, Placement(), tmp_path), tmp_path, torch.device("cpu"))

    return make


@pytest.fixture
def forget(monkeypatch):
    """Makes this process know nothing of the runs before."""

    def fresh():
        for name in ("_TOKENS", "_VIEWS"):
            monkeypatch.setattr(validation, name, Kept(2**20, lambda _: 1))

    return fresh


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
        for draw in range(DRAWS):
            view = stack([likelihood_view(subject.model.order, length, draw, rng) for _ in range(repeats)])
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


RASTER = StepwiseLikelihood("val_nll_raster_order", raster_schedule)
K_STEPS = StepwiseLikelihood("val_nll_k_steps", own_schedule)


def with_steps(subject: Subject, num_steps: int) -> Subject:
    sampling = dataclasses.replace(subject.spec.evaluate.sampling, num_inference_steps=num_steps)
    evaluate = dataclasses.replace(subject.spec.evaluate, sampling=sampling)
    return dataclasses.replace(subject, spec=dataclasses.replace(subject.spec, evaluate=evaluate))


@pytest.mark.parametrize(("evaluator", "num_steps"), [(RASTER, 16), (K_STEPS, 5)])
def test_a_fixed_schedule_is_the_sum_of_the_models_stepwise_conditionals(subject_of, evaluator, num_steps):
    subject = with_steps(subject_of("discrete-random", val_images=3), num_steps)
    score = only(evaluator(subject))
    tokens, text = validation_batch(subject, 0, 3)
    totals = []
    for image in range(3):
        known, total = torch.zeros(1, 16, dtype=torch.bool), 0.0
        for written in evaluator.schedule(subject, image):
            with torch.inference_mode():
                words = Text(text.values[image : image + 1], text.mask[image : image + 1])
                view = subject.model.order.view(known)
                z = subject.model(view, tokens[image : image + 1], words)[0]
                logits = subject.model.head.classifier(z).double().log_softmax(-1)
            total -= sum(float(logits[p, tokens[image, p]]) for p in written.tolist())
            known[0, written] = True
        assert known.all()
        totals.append(total)
    assert score.value == pytest.approx(np.mean(totals), rel=1e-5)
    assert score.se == pytest.approx(np.std(totals, ddof=1) / math.sqrt(3), rel=1e-3)
    steps = score.extra["by_step"]["n"]
    assert score.extra["steps"] == len(steps) == num_steps and sum(steps) == 3 * 16


def test_of_a_long_schedule_one_step_of_each_stratum_stands_for_the_others(subject_of, monkeypatch):
    monkeypatch.setattr(likelihood, "STEPS", 4)
    subject = subject_of("discrete-random", val_images=256)
    few = only(RASTER(subject))
    monkeypatch.setattr(likelihood, "STEPS", 16)
    whole = only(RASTER(subject))
    assert few.extra["steps_measured"] == 4 and few.protocol != whole.protocol
    assert abs(few.value - whole.value) < 3 * few.se and whole.se < few.se < 4 * whole.se


def test_one_step_at_a_time_is_what_val_nll_estimates(subject_of):
    """With as many steps as tokens the sampler's schedule and the mean over orders are the same quantity."""
    subject = with_steps(subject_of("discrete-random", val_images=256), 16)
    a, b = only(ValidationLikelihood()(subject)), only(K_STEPS(subject))
    assert abs(a.value - b.value) < 4 * math.hypot(a.se, b.se)
    together = only(K_STEPS(with_steps(subject, 1)))
    assert together.extra["steps"] == 1 and together.protocol != b.protocol


def test_a_causal_order_has_no_schedule_but_its_own(subject_of):
    spec = subject_of("discrete-raster").spec
    assert ValidationLikelihood().wanted(spec) and not RASTER.wanted(spec) and not K_STEPS.wanted(spec)


@pytest.mark.parametrize("arm", ARMS)
def test_tables_say_where_the_nats_are(subject_of, arm):
    subject = subject_of(arm, val_images=32)
    score = only(ValidationLikelihood()(subject))
    by_position = score.extra["by_position"]
    assert len(by_position["mean"]) == 16 and min(by_position["n"]) > 0
    if arm.endswith("raster"):
        assert sum(by_position["mean"]) == pytest.approx(score.value, rel=1e-6)
        assert score.extra["by_known"] == by_position
    assert ("by_log_snr" in score.extra) is arm.startswith("continuous")
    if "by_log_snr" in score.extra:
        noise = score.extra["by_log_snr"]
        assert len(noise["mean"]) == len(LOG_SNRS) and all(value > 0 for value in noise["mean"])
        assert score.extra["log_snr_ends"] == [-9.0, 9.0]
        scale = subject.tokenizer.network.scale
        assert score.extra["log_det_scaling"] == pytest.approx(16 * float(scale.double().log().sum()))
    loss = only(ValidationLoss()(subject)).extra["by_position"]
    counted = sum(n * mean for n, mean in zip(loss["n"], loss["mean"], strict=True)) / sum(loss["n"])
    assert counted == pytest.approx(only(ValidationLoss()(subject)).value, rel=1e-9)


@pytest.mark.parametrize("arm", ["continuous-random", "discrete-raster"])
def test_values_by_image_carry_the_score_and_its_error(subject_of, arm):
    for evaluator in (ValidationLoss(), ValidationLikelihood()):
        found = []
        for change in (1.0, 0.9):
            subject = subject_of(arm, val_images=64)
            subject.model.load_state_dict({k: change * v for k, v in subject.model.state_dict().items()})
            score = only(evaluator(subject))
            found.append(values := np.array(score.extra["per_image"]))
            assert (len(values), values.mean()) == (64, pytest.approx(score.value, rel=1e-6))
            assert values.std(ddof=1) == pytest.approx(8 * score.se, rel=1e-4)
        assert np.std(found[0] - found[1]) < 0.9 * np.hypot(np.std(found[0]), np.std(found[1]))


def test_prefix_lengths_are_stratified_and_uniform():
    rng = torch.Generator().manual_seed(0)
    for draw in range(4):
        prefixes = {16 - int(likelihood_view(Random("uniform"), 16, draw, rng).counted.sum()) for _ in range(200)}
        assert prefixes == set(range(4 * draw, 4 * draw + 4))


@pytest.mark.parametrize("arm", ARMS)
def test_a_second_measurement_is_the_same_number(subject_of, arm, forget):
    subject = subject_of(arm)
    for evaluator in (ValidationLoss(), ValidationLikelihood()):
        first = only(evaluator(subject))
        forget()
        again = only(evaluator(subject))
        assert first == again and first.se > 0 and math.isfinite(first.value)
        assert first.protocol == evaluator.protocol(subject)
    unit = "nats/token" if arm.startswith("discrete") else "diffusion loss"
    assert only(ValidationLoss()(subject)).metric.unit == unit


def test_what_other_runs_were_asked_moves_no_number(subject_of, forget):
    """Runs that one process evaluates one after the other share what images are asked, where that is the same."""
    evaluators = (ValidationLoss(), ValidationLikelihood(), RASTER, K_STEPS)
    random = [subject_of("continuous-random", mask_law=law) for law in ("uniform", "cosine")]
    subjects = [*random, with_steps(random[0], 3), subject_of("continuous-raster"), subject_of("discrete-random")]
    asked = [(e, s) for s in [*subjects, *(subject_of("continuous-random", val_images=n) for n in (8, 16))]
             for e in evaluators if e.wanted(s.spec)]  # fmt: skip
    forget()
    together = [only(evaluator(subject)) for evaluator, subject in asked]
    for (evaluator, subject), score in zip(asked, together, strict=True):
        forget()
        assert only(evaluator(subject)) == score, (evaluator.name, subject.spec.model)


@pytest.mark.parametrize("arm", ["discrete-random", "continuous-random"])
def test_everything_random_is_common_to_all_sizes(subject_of, arm, monkeypatch, forget):
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

    small = shown()
    forget()
    large = shown(width=32, num_heads=2, depth=1)
    assert len(small) == len(large) == DRAWS
    for a, b in zip(small, large, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True)) and a[3] == b[3]
    assert len({view[1].numpy().tobytes() for view in small}) == DRAWS


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


def test_cross_entropy_of_a_fresh_model_is_that_of_guessing(tiny_spec, tmp_path):
    spec = tiny_spec("discrete-raster")
    network = build(spec.model).eval()
    subject = Subject(network, spec, open_source(spec, Placement(), tmp_path), tmp_path, torch.device("cpu"))
    tokens, _ = validation_batch(subject, 0, 4)
    guess = F.cross_entropy(torch.zeros(4 * 16, spec.model.vocab_size), tokens.flatten()).item()
    assert only(ValidationLoss()(subject)).value == pytest.approx(guess, rel=0.05)
