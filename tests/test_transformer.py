import dataclasses

import pytest
import torch
from tiny_models import ARMS, POSITIONS, arm_spec, awake, sampling_of, text_of, tokens_of, with_encoder

from fluidscale.model import transformer
from fluidscale.model.build import build
from fluidscale.model.generator import generate
from fluidscale.model.order import Random, Raster
from fluidscale.model.transformer import Place, Text, rotary_table, rows_of
from fluidscale.model.transformer import _rotate as rotate


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def z_of(model, text, drop=None, batch=3):
    view = model.order.training_view(batch, model.spec.num_tokens, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(view, tokens_of(model.spec, batch), text, drop)


def test_rotary_products_depend_on_the_offset_in_rows_and_columns_only():
    grid, size = 4, 8
    cos, sin = rotary_table(grid, size, 0, torch.device("cpu"))
    q, k = torch.randn(2, size, generator=torch.Generator().manual_seed(0))
    scores = rotate(q.expand(16, -1), cos, sin) @ rotate(k.expand(16, -1), cos, sin).T
    at = scores.view(grid, grid, grid, grid)  # row, column of query, then of key
    assert torch.allclose(at[0, 0, 1, 2], at[2, 1, 3, 3], atol=1e-5)
    assert torch.allclose(at[3, 0, 1, 2], at[2, 1, 0, 3], atol=1e-5)
    assert not torch.allclose(at[0, 0, 1, 2], at[0, 0, 2, 1], atol=1e-3)
    assert torch.allclose(rotate(q, cos[5], sin[5]).norm(), q.norm())


def test_text_starts_as_large_as_the_spec_says_and_nothing_else_moves():
    spec = arm_spec("discrete-random")
    states = []
    for changed in (spec, dataclasses.replace(spec, text_init_std=1.0)):
        torch.manual_seed(0)
        states.append(build(changed).state_dict())
    small, large = states
    factors = {"text.words.weight": 50, "text.position": 50}
    for name, value in small.items():
        assert torch.allclose(large[name], value * factors.get(name, 1), rtol=1e-5), name
    assert small["text.position"].std() == pytest.approx(0.02, rel=0.3)


def test_padding_words_change_nothing():
    model = awake(arm_spec("discrete-random"))
    text = text_of(model.spec, 3)
    other = Text(torch.where(text.mask, text.values, 7), text.mask)
    assert torch.allclose(z_of(model, text), z_of(model, other), atol=1e-6)
    shorter = Text(text.values[:1, :4], torch.ones(1, 4, dtype=torch.bool))
    longer = Text(torch.nn.functional.pad(shorter.values, (0, 1)), torch.tensor([[True] * 4 + [False]]))
    assert torch.allclose(z_of(model, shorter, batch=1), z_of(model, longer, batch=1), atol=1e-5)


@pytest.mark.parametrize("arm", ARMS)
def test_the_places_that_a_cpu_adds_to_a_caption_are_rounding(arm, monkeypatch):
    """Of losses, of every gradient, and of images drawn; a dropped and an empty caption are among them."""
    found = []
    for keys in (1, 8):
        monkeypatch.setattr(transformer, "CPU_KEYS", keys)
        model, text = awake(arm_spec(arm)), text_of(arm_spec(arm), 4)
        text = Text(text.values, text.mask & (torch.arange(4) != 1)[:, None])
        assert model.text(text, None).mask.shape == (4, 5 if keys == 1 else 8)
        view = model.order.training_view(4, model.spec.num_tokens, rng())
        losses, _ = model.losses(tokens_of(model.spec, 4), text, view, rng(), torch.arange(4) == 0)
        losses.sum().backward()
        drawn = generate(model, text, sampling_of(model.spec), [0, 1, 2, 3])
        found.append([losses.detach(), drawn, *(p.grad for p in model.parameters())])
    for without, padded in zip(*found, strict=True):
        torch.testing.assert_close(padded, without, rtol=1e-4, atol=1e-5)


def test_dropped_text_is_the_null_whatever_it_said():
    model = awake(arm_spec("continuous-raster"))
    first, second = text_of(model.spec, 3), text_of(model.spec, 3, seed=9)
    drop = torch.tensor([True, False, True])
    a, b = z_of(model, first, drop), z_of(model, second, drop)
    assert torch.allclose(a[drop], b[drop], atol=1e-6)
    assert not torch.allclose(a[1], b[1], atol=1e-2)
    assert not torch.allclose(a[0], z_of(model, first)[0], atol=1e-2)


def test_an_empty_caption_is_the_null_and_never_nan():
    model = awake(arm_spec("discrete-raster"))
    text = text_of(model.spec, 3)
    empty = Text(text.values * 0, torch.zeros_like(text.mask))
    z = z_of(model, empty)
    assert z.isfinite().all()
    assert torch.allclose(z, z_of(model, text, torch.ones(3, dtype=torch.bool)), atol=1e-6)


def test_frozen_features_enter_without_a_vocabulary():
    spec = dataclasses.replace(arm_spec("discrete-raster"), text_vocab_size=0)
    model = awake(spec)
    features = torch.randn(3, 5, spec.text_width, dtype=torch.bfloat16)
    z = z_of(model, Text(features, torch.ones(3, 5, dtype=torch.bool)))
    assert z.shape == (3, 9, 16) and z.isfinite().all() and model.text.words is None


@pytest.mark.parametrize("position", POSITIONS)
def test_shared_positions_are_a_shortcut_and_nothing_else(position):
    for order in (Raster(), Random("cosine")):
        name = "raster" if order.causal else "random"
        model = awake(arm_spec(f"discrete-{name}", position))
        view = order.training_view(3, 9, torch.Generator().manual_seed(0))
        assert len(view.distinct_positions) == 1
        written_out = type(view)(view.reads, view.positions.contiguous(), view.counted)
        assert len(written_out.distinct_positions) == 3
        with torch.no_grad():
            tokens, text = tokens_of(model.spec, 3), text_of(model.spec, 3)
            assert torch.allclose(model(view, tokens, text), model(written_out, tokens, text), atol=1e-6)


@pytest.mark.parametrize("position", POSITIONS)
@torch.no_grad()
def test_an_encoder_is_given_what_is_known_and_nothing_else(position):
    """MAR's encoder runs on the known tokens alone; here on all slots, of which the unknown must be as if not there."""
    for spec in with_encoder(arm_spec("continuous-random", position, grid=4)):
        if not spec.encoder_depth:
            continue
        model = awake(spec)
        known = torch.arange(16)[None] % 3 == 0
        view, text = model.order.view(known), text_of(spec, 1)
        seen = []
        model.trunk.blocks[1].register_forward_pre_hook(lambda block, given, seen=seen: seen.append(given[0]))
        model(view, tokens_of(spec, 1), text)
        blocks = model.trunk.blocks
        kept = torch.cat([torch.ones(1, spec.buffer_tokens, dtype=torch.bool), known], dim=1)[0]
        x, positions = model.trunk._entered(model.head.embed(tokens_of(spec, 1)), view)
        alone = blocks[0](x[:, kept], _place(model, positions[:, kept]), model.text(text, None))
        assert torch.allclose(seen[0][:, kept], alone, atol=1e-5)
        assert torch.equal(seen[0][:, ~kept], x[:, ~kept]), "mask tokens enter the decoder as they are"


def _place(model, positions):
    """Where some slots stand, with nobody else beside them."""
    trunk = model.trunk
    if not trunk.rotary:
        return Place(causal=False)
    angles = rotary_table(trunk.grid, trunk.head_dim, trunk.num_buffers, positions.device)
    cos, sin = (angle[positions][:, :, None, None] for angle in angles)
    return Place(causal=False, positions=positions, rotary=(cos, sin))


@pytest.mark.parametrize("arm", ["continuous-random", "discrete-random"])
@pytest.mark.parametrize("position", POSITIONS)
def test_encoder_and_buffers_learn_in_every_parameter_and_draw_whole_images(arm, position):
    for spec in with_encoder(arm_spec(arm, position)):
        model = awake(spec)
        tokens, text = tokens_of(spec, 8), text_of(spec, 8)
        for view in (model.order.training_view(8, 9, rng()), model.order.view(torch.zeros(8, 9, dtype=torch.bool))):
            losses, counted = model.losses(tokens, text, view, rng(1), torch.tensor([True] + [False] * 7))
            (losses.sum() / counted.sum()).backward()
            slots = torch.rand(8, 9, generator=rng(2)).argsort(1)[:, :2]
            alone = model(view, tokens, text, wanted=slots)
            torch.testing.assert_close(alone, rows_of(model(view, tokens, text), slots), atol=1e-5, rtol=0)
        silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert silent == [] and losses.isfinite().all()
        drawn = generate(model, text_of(spec, 2), sampling_of(spec), [1, 2])
        assert drawn.shape[:2] == (2, 9) and torch.isfinite(drawn.float()).all()
