import dataclasses

import pytest
import torch
from tiny_models import ARMS, POSITIONS, arm_spec, sampling_of, text_of, with_encoder
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fluidscale.flops import flops_per_image, mean_counted, params, sampling_flops, train_flops
from fluidscale.model import transformer
from fluidscale.model.build import FluidModel, build
from fluidscale.model.generator import generate
from fluidscale.model.head import DiffusionHead
from fluidscale.model.order import MASK_LAWS
from fluidscale.model.transformer import Text
from fluidscale.spec import DiffusionSpec, ModelSpec, SamplingSpec

# arXiv 2410.13863, Table 1: reported parameters, blocks, channels, heads.
PAPER = {"166M": (166e6, 12, 768, 12), "369M": (369e6, 16, 1024, 16), "665M": (665e6, 20, 1280, 16),
         "1.1B": (1.1e9, 24, 1536, 16), "3.1B": (3.1e9, 32, 2304, 24), "10.5B": (10.5e9, 34, 4096, 64)}  # fmt: skip


def paper_spec(size: str, arm: str) -> ModelSpec:
    _, depth, width, heads = PAPER[size]
    kind, order = arm.split("-")
    continuous = kind == "continuous"
    return ModelSpec(
        token_kind=kind, order=order, depth=depth, width=width, num_heads=heads, grid=16,
        token_channels=16 if continuous else 0, vocab_size=0 if continuous else 8192, text_vocab_size=0,
        text_width=4096, text_length=128, aligner_depth=6, mask_law="none" if order == "raster" else "mar",
        head=DiffusionSpec(width, 3, "eps", 4) if continuous else None,
    )  # fmt: skip


def meta(spec: ModelSpec):
    with torch.device("meta"):
        return build(spec)


def built(model) -> dict[str, int]:
    """Parameters by component, counted by where they live in the built model."""
    parts = {"embed": 0, "text": 0, "body": 0, "head": 0}
    for name, parameter in model.named_parameters():
        entry = name.startswith(("head.codes", "head.inward", "trunk.special", "trunk.position"))
        part = "embed" if entry else {"text": "text", "trunk": "body", "head": "head"}[name.split(".")[0]]
        parts[part] += parameter.numel()
    return {**parts, "total": sum(parts.values())}


@pytest.mark.parametrize("size", list(PAPER))
@pytest.mark.parametrize("arm", ["continuous-random", "discrete-raster"])
def test_the_papers_ladder_in_closed_form_is_the_built_model_within_4_percent_of_the_report(size, arm):
    spec = paper_spec(size, arm)
    assert params(spec) == built(meta(spec))
    if size == "10.5B" and arm != "continuous-random":
        return  # not in the paper
    assert params(spec)["total"] == pytest.approx(PAPER[size][0], rel=0.04)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("objective", ["eps", "v", "flow"])
@pytest.mark.parametrize("arm", ARMS)
def test_small_models_in_closed_form_are_the_built_models(arm, objective, position):
    spec = arm_spec(arm, position, objective)
    other = dataclasses.replace(spec, text_vocab_size=0, aligner_depth=0, mlp_ratio=3)
    for variant in (spec, other, *with_encoder(spec)):
        assert params(variant) == built(meta(variant))


@pytest.mark.parametrize("law", list(MASK_LAWS))
@pytest.mark.parametrize("grid", [3, 16])
def test_the_mean_number_of_counted_tokens_is_exact(law, grid):
    length, rng = grid * grid, torch.Generator().manual_seed(0)
    draws = torch.stack([MASK_LAWS[law](1, length, rng) for _ in range(6000)]).double()
    error = float(draws.std()) / 6000**0.5
    expected = mean_counted(arm_spec("discrete-random", grid=grid, mask_law=law))
    assert abs(float(draws.mean()) - expected) < 4 * error


class Counted(nn.Module):
    """A model's loss with its parts as children: the counter knows modules by the one they are called below."""

    def __init__(self, model: FluidModel) -> None:
        super().__init__()
        self.losses, self.trunk, self.text = model.losses, model.trunk, model.text
        if isinstance(model.head, DiffusionHead):
            self.inward = model.head.inward

    def forward(self, *arguments):
        return self.losses(*arguments)


def counted_flops(spec: ModelSpec, batch: int) -> tuple[dict[str, float], float]:
    """Torch's count per image on the meta device at the mask law's mean ratio: forward by component, and backward."""
    model = meta(spec)
    length = spec.num_tokens
    view = model.order.training_view(batch, length, torch.Generator())
    if not model.order.causal:
        hidden = torch.arange(batch * length) < round(mean_counted(spec) * batch)
        view = model.order.view(~hidden.view(batch, length))
    kind = torch.zeros(batch, length, dtype=torch.long, device="meta")
    tokens = torch.zeros(batch, length, spec.token_channels, device="meta") if spec.head else kind
    words = torch.zeros(batch, spec.text_length, spec.text_width, device="meta")
    words = words[..., 0].long() if spec.text_vocab_size else words
    text = Text(words, torch.ones(batch, spec.text_length, dtype=torch.bool, device="meta"))
    with FlopCounterMode(display=False) as forward:
        losses, _ = Counted(model)(tokens, text, view, torch.Generator())
    with FlopCounterMode(display=False) as backward:
        losses.sum().backward()
    modules = {name: sum(ops.values()) / batch for name, ops in forward.get_flop_counts().items()}
    body = modules["Counted.trunk"] + modules.get("Counted.inward", 0)
    total = forward.get_total_flops() / batch
    parts = {"text": modules["Counted.text"], "body": body, "total": total}
    parts["head"] = total - parts["text"] - body
    return parts, backward.get_total_flops() / batch


@pytest.mark.parametrize(
    ("size", "arm"),
    [*(("166M", arm) for arm in ARMS), *((size, "continuous-random") for size in PAPER if size != "166M")],
)
def test_flops_are_torchs_count_on_the_papers_scale(size, arm):
    spec = paper_spec(size, arm)
    forward, backward = counted_flops(spec, 16)
    assert flops_per_image(spec, 16) == pytest.approx(forward, rel=0.005)
    # The convention of twice the forward pass ignores that the first layers need no gradient of their input.
    assert 2 * forward["total"] == pytest.approx(backward, rel=0.02)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("objective", ["eps", "flow"])
def test_flops_are_torchs_count_on_small_models(arm, objective):
    for position in POSITIONS:
        spec = arm_spec(arm, position, objective, grid=4, repeats=2)
        for variant in (spec, *with_encoder(spec)):
            forward, _ = counted_flops(variant, 64)
            assert flops_per_image(variant, 64) == pytest.approx(forward, rel=0.005)


def test_time_embeddings_vanish_in_a_large_batch():
    spec = paper_spec("166M", "continuous-random")
    assert flops_per_image(spec, 2048)["total"] == pytest.approx(flops_per_image(spec)["total"], rel=1e-4)
    assert flops_per_image(spec, 1)["head"] > flops_per_image(spec)["head"]


def test_training_costs_three_forward_passes_an_image(tiny_spec):
    spec = tiny_spec("discrete-raster")
    assert train_flops(spec) == 3 * flops_per_image(spec.model, spec.train.batch)["total"] * 24 * 8


@pytest.mark.parametrize("arm", ARMS)
def test_drawing_an_image_costs_its_passes(arm):
    spec = arm_spec(arm, repeats=1)
    length, d, solver_steps = spec.num_tokens, spec.width, 1 if spec.head else 0
    whole = flops_per_image(dataclasses.replace(spec, mask_law="none"))
    # What the cache of a causal order spares: token k attends to k others, not to all; embedding is done again.
    spared = 2 * spec.depth * (length**2 - length) * d - 2 * (length - 1) * length * spec.token_channels * d
    spared = spared if spec.order == "raster" else 0

    def cost(guidance: float, num_steps: int, solver: int = solver_steps) -> float:
        return sampling_flops(spec, SamplingSpec(guidance, 1.0, num_steps, "constant", solver))

    assert cost(1.0, 1) == pytest.approx(whole["total"] - spared)
    assert cost(3.0, 1) == pytest.approx(2 * cost(1.0, 1))
    assert (cost(1.0, 5) == cost(1.0, 1)) == (spec.order == "raster")
    if spec.head:
        # Five solver steps repeat all of the head but its condition.
        condition = 2 * length * d * spec.head.width
        assert cost(1.0, 1, 5) == pytest.approx(cost(1.0, 1) + 4 * (whole["head"] - condition))


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(("guidance", "num_steps"), [(1.0, 5), (3.0, 1), (3.0, 16)])
def test_drawing_costs_what_torch_counts(arm, guidance, num_steps, monkeypatch):
    # The places that a CPU adds to a caption are no part of what drawing costs.
    monkeypatch.setattr(transformer, "CPU_KEYS", 1)
    for variant in (arm_spec(arm, grid=4, repeats=1), *with_encoder(arm_spec(arm, grid=4, repeats=1))):
        model, sampling = build(variant), sampling_of(variant, num_steps, guidance)
        generate(model, text_of(variant, 4), sampling, [0, 1, 2, 3])  # tables are made once
        # The CPU's own attention kernel is one that torch does not count.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            generate(model, text_of(variant, 4), sampling, [0, 1, 2, 3])
        assert sampling_flops(variant, sampling) == pytest.approx(counter.get_total_flops() / 4, rel=0.03)
