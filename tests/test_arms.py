"""The contract that all four arms keep, in both position schemes."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from golden.losses import measure
from tiny_models import ARMS, POSITIONS, arm_spec, awake, sampling_of, text_of, tokens_of

from fluidscale.model.build import build
from fluidscale.model.generator import generate
from fluidscale.model.order import View
from fluidscale.model.transformer import rows_of
from fluidscale.spec import InvalidInput

both = pytest.mark.parametrize(("arm", "position"), [(a, p) for a in ARMS for p in POSITIONS])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def changed(tokens, spec):
    """Every token replaced by another one."""
    return (tokens + 1) % spec.vocab_size if spec.token_kind == "discrete" else tokens + 100.0


@both
@torch.no_grad()
def test_no_slot_sees_what_it_predicts_nor_what_comes_later(arm, position):
    model = awake(arm_spec(arm, position))
    spec, batch = model.spec, 4
    tokens, text = tokens_of(spec, batch), text_of(spec, batch)
    view = model.order.training_view(batch, spec.num_tokens, rng())
    z = model(view, tokens, text)
    other = changed(tokens, spec)
    for slot in range(spec.num_tokens):
        if model.order.causal:
            unseen = torch.arange(spec.num_tokens).expand(batch, -1) >= slot
        else:
            unseen = torch.zeros(batch, spec.num_tokens, dtype=torch.bool).scatter(1, view.positions, view.counted)
        hidden = unseen if spec.token_kind == "discrete" else unseen[..., None]
        z_other = model(view, torch.where(hidden, other, tokens), text)
        counted = view.counted[:, slot]
        assert torch.equal(z[counted, slot], z_other[counted, slot])
    seen = model(view, other, text)
    assert not torch.allclose(z[:, -1], seen[:, -1], atol=1e-3)  # and what may be seen is


@both
@torch.no_grad()
def test_sampling_visits_the_states_of_training(arm, position):
    """z of each sampling step, with the cache, is z of the uncached view in which exactly those tokens are known."""
    model = awake(arm_spec(arm, position))
    spec, batch = model.spec, 3
    tokens, text = tokens_of(spec, batch), text_of(spec, batch)
    permutations = torch.stack([torch.randperm(spec.num_tokens, generator=rng(s)) for s in range(batch)])
    known = torch.zeros(batch, spec.num_tokens, dtype=torch.bool)
    cache = model.trunk.new_cache(spec.num_tokens)
    whole = model(model.order.training_view(batch, spec.num_tokens, rng()), tokens, text)
    for written in model.order.steps(spec.num_tokens, 4, permutations):
        view = model.order.view(known)
        fresh = model(view, tokens, text)
        slots, again = _slots(view, written), copy.deepcopy(cache)
        stepped = model(view, tokens, text, cache=cache)
        assert torch.allclose(stepped, fresh[:, -stepped.shape[1] :], atol=1e-5)
        alone = model(view, tokens, text, cache=again, wanted=slots)
        assert torch.allclose(alone, rows_of(fresh, slots), atol=1e-5) and again.length == cache.length
        if model.order.causal:
            assert stepped.shape[1] == 1
            assert torch.allclose(stepped[:, 0], whole[:, int(written[0, 0])], atol=1e-5)
        assert view.counted.gather(1, slots).all()
        known = known.scatter(1, written, True)
    assert known.all()


def _slots(view: View, written: torch.Tensor) -> torch.Tensor:
    return (view.positions[:, None] == written[:, :, None]).int().argmax(-1)


@torch.no_grad()
def test_a_cache_takes_several_slots_at_once():
    model = awake(arm_spec("continuous-raster", "every_layer"))
    tokens, text = tokens_of(model.spec, 2), text_of(model.spec, 2)
    whole = model(model.order.training_view(2, 9, rng()), tokens, text)
    cache = model.trunk.new_cache(9)
    parts = []
    for size in (4, 7, 9):
        known = (torch.arange(9) < size - 1).expand(2, -1)
        parts.append(model(model.order.view(known), tokens, text, cache=cache))
    assert [p.shape[1] for p in parts] == [4, 3, 2]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


@both
def test_every_token_is_written_exactly_once_for_any_number_of_steps(arm, position):
    model = awake(arm_spec(arm, position))
    spec, batch = model.spec, 2
    for num_steps in range(1, spec.num_tokens + 1):
        writes = torch.zeros(batch, spec.num_tokens)
        shown: list[tuple[int, int]] = []
        steps = model.order.steps(spec.num_tokens, num_steps, torch.arange(9).expand(batch, -1))
        for written in steps:
            writes.scatter_add_(1, written, torch.ones_like(written, dtype=torch.float))
        assert (writes == 1).all()
        unguided = sampling_of(spec, num_steps, guidance=1.0)
        tokens = generate(model, text_of(spec, batch), unguided, [1, 2], lambda *at, shown=shown: shown.append(at))
        assert len(shown) == len(steps)
        assert tokens.shape == tokens_of(spec, batch).shape
        if spec.token_kind == "continuous":
            assert (tokens != 0).all()  # nothing was left blank
        assert tokens.isfinite().all()


@pytest.mark.parametrize("arm", ARMS)
def test_the_first_loss_is_what_a_blank_head_must_score(arm):
    objectives = ("eps", "v", "flow") if arm.startswith("continuous") else ("flow",)
    for objective in objectives:
        torch.manual_seed(0)
        spec = arm_spec(arm, objective=objective, repeats=8)
        model = build(spec)
        # Half of eps' variational term sits in its very last step, one draw in a thousand.
        batch, tolerance = (1024, 0.1) if spec.head and objective == "eps" else (256, 0.05)
        view = model.order.training_view(batch, spec.num_tokens, rng())
        with torch.no_grad():
            losses, counted = model.losses(tokens_of(spec, batch), text_of(spec, batch), view, rng(1), stratified=True)
        assert torch.equal(losses != 0, counted)
        expected = {"v": 1.0, "flow": 2.0, "eps": 1.0 + variance_bits()}[objective]
        expected = math.log(spec.vocab_size) if spec.head is None else expected
        assert float(losses.sum() / counted.sum()) == pytest.approx(expected, rel=tolerance)


def variance_bits():
    """The variational term, in bits, of a head that predicts no noise and the middle of the variance range."""
    t = torch.arange(1001, dtype=torch.float64) / 1000
    bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    bar = torch.cumprod(1 - beta, 0)
    before = torch.cat([torch.ones(1), bar[:-1]])
    smallest = (beta * (1 - before) / (1 - bar))[1:]
    gap = 0.5 * (beta[1:].log() - smallest.log())
    # The clean token is misjudged by sigma / alpha times the noise, which has variance 1.
    error = (before.sqrt() * beta / (1 - bar))[1:] ** 2 * (1 - bar[1:]) / bar[1:]
    nats = 0.5 * (gap - 1 + (-gap).exp() * (1 + error / smallest))
    return float(nats.sum() / 1000) / math.log(2)  # the first step's decoder term is a thousandth


@both
def test_losses_and_gradients_reach_every_parameter(arm, position):
    model = awake(arm_spec(arm, position))
    spec = model.spec
    view = model.order.training_view(8, spec.num_tokens, rng())
    drop = torch.tensor([True] + [False] * 7)
    losses, counted = model.losses(tokens_of(spec, 8), text_of(spec, 8), view, rng(1), drop)
    (losses.sum() / counted.sum()).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == []
    silent = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.any()]
    assert silent == []


@both
@torch.no_grad()
def test_likelihoods_are_given_where_counted(arm, position):
    model = awake(arm_spec(arm, position))
    view = model.order.training_view(4, 9, rng())
    nll = model.nll(tokens_of(model.spec, 4), text_of(model.spec, 4), view, rng(1))
    assert torch.equal(nll != 0, view.counted) and nll.isfinite().all()


@both
def test_autocast_and_the_meta_device(arm, position):
    spec = arm_spec(arm, position)
    model = awake(spec)
    tokens, text = tokens_of(spec, 8), text_of(spec, 8)
    view = model.order.training_view(8, spec.num_tokens, rng())
    exact, counted = model.losses(tokens, text, view, rng(1))
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = model.losses(tokens, text, view, rng(1))
        drawn = generate(model, text, sampling_of(spec), range(8))
    rough.sum().backward()
    assert rough.dtype == torch.float32 and drawn.isfinite().all()
    assert rough.sum().item() == pytest.approx(exact.sum().item(), rel=0.05)
    with torch.device("meta"):
        hollow = build(spec)
    losses, _ = hollow.losses(tokens.to("meta"), text.to(torch.device("meta")), view, rng(1))
    assert losses.shape == counted.shape and losses.device.type == "meta"
    hollow.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(hollow.losses(tokens, text, view, rng(1))[0], exact)


@pytest.mark.parametrize("arm", ARMS)
def test_training_goes_on_after_sampling(arm):
    """Tables that sampling asked for first, in inference mode, serve training too."""
    spec = dataclasses.replace(arm_spec(arm, "every_layer", "eps"), width=24, grid=4)  # used by no other test
    model = awake(spec)
    generate(model, text_of(spec, 2), sampling_of(spec), [1, 2])
    losses, _ = model.losses(tokens_of(spec, 2), text_of(spec, 2), model.order.training_view(2, 16, rng()), rng(1))
    losses.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("arm", ARMS)
def test_only_building_touches_the_global_generator(arm):
    model = awake(arm_spec(arm))
    before = torch.get_rng_state()
    view = model.order.training_view(2, 9, rng())
    model.losses(tokens_of(model.spec, 2), text_of(model.spec, 2), view, rng(1))
    generate(model, text_of(model.spec, 2), sampling_of(model.spec), [1, 2])
    assert torch.equal(torch.get_rng_state(), before)


IMPOSSIBLE = (
    {"token_kind": "analog"},
    {"order": "spiral"},
    {"position": "none"},
    {"mask_law": "linear"},
    {"vocab_size": 0},
    {"num_heads": 3},
    {"num_heads": 8, "position": "every_layer"},
    {"encoder_depth": 2},
    {"buffer_tokens": -1},
    {"order": "raster", "mask_law": "none", "buffer_tokens": 2},
)


@pytest.mark.parametrize("change", IMPOSSIBLE)
def test_a_spec_that_cannot_be_built_is_refused(change):
    with pytest.raises(InvalidInput):
        build(dataclasses.replace(arm_spec("discrete-random"), **change))


def test_golden_losses():
    """Any change of numerics shows here; regenerate on purpose with `python tests/golden/losses.py`."""
    golden = json.loads((Path(__file__).parent / "golden" / "losses.json").read_text())
    measured = measure()
    assert measured.keys() == golden.keys()
    for case, values in golden.items():
        for quantity, value in values.items():
            assert measured[case][quantity] == pytest.approx(value, rel=1e-6), (case, quantity)
