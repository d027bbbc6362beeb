import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluidscale.model.order import MASK, MASK_LAWS, START, Random, Raster, group_sizes
from fluidscale.spec import InvalidInput


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_raster_reads_one_token_back_and_counts_all():
    view = Raster().training_view(2, 4, rng())
    assert view.reads.tolist() == [[START, 0, 1, 2]] * 2
    assert view.positions.tolist() == [[0, 1, 2, 3]] * 2
    assert view.counted.all()


def test_raster_view_counts_each_rows_next_token():
    view = Raster().view(torch.tensor([[True, False, False], [True, True, False]]))
    assert view.reads.tolist() == [[START, 0, 1]] * 2
    assert view.counted.tolist() == [[False, True, False], [False, False, True]]


def test_raster_refuses_a_gap_and_a_mask_law():
    with pytest.raises(InvalidInput, match="gap"):
        Raster().view(torch.tensor([[True, False, True]]))
    with pytest.raises(InvalidInput, match="mask_law"):
        Raster("cosine")


def test_random_reads_what_is_known_and_predicts_the_rest():
    view = Random("cosine").view(torch.tensor([[True, False, True]]))
    assert view.reads.tolist() == [[0, MASK, 2]]
    assert view.counted.tolist() == [[False, True, False]]
    with pytest.raises(InvalidInput, match="known: cosine"):
        Random("cosin")


@pytest.mark.parametrize("law", list(MASK_LAWS))
def test_training_views_hide_exactly_what_they_count(law):
    view = Random(law).training_view(64, 16, rng())
    hidden = view.reads == MASK
    assert torch.equal(hidden, view.counted)
    assert hidden.sum(1).min() >= 1
    assert torch.equal(view.reads[~hidden], view.positions[~hidden])
    again = Random(law).training_view(64, 16, rng())
    assert torch.equal(view.reads, again.reads)


def test_every_position_is_masked_equally_often():
    hidden = Random("uniform").training_view(20000, 9, rng()).counted.float().mean(0)
    assert torch.allclose(hidden, torch.full((9,), 5 / 9), atol=0.02)


def test_mask_ratios_follow_their_laws():
    length, batch = 4096, 4000  # long, so that rounding up hides nothing
    cosine = MASK_LAWS["cosine"](batch, length, rng()) / length
    assert cosine.mean() == pytest.approx(2 / math.pi, abs=0.02)
    assert (cosine < 0.5).float().mean() == pytest.approx(1 / 3, abs=0.02)  # u > 2/3
    uniform = MASK_LAWS["uniform"](batch, 16, rng())
    assert torch.bincount(uniform, minlength=17)[1:].float().std() / (batch / 16) < 0.15 and uniform.min() == 1
    generator = rng()
    mar = torch.stack([MASK_LAWS["mar"](3, length, generator) for _ in range(batch)])
    assert torch.equal(mar[:, 0], mar[:, 2])  # one ratio for the batch
    ratios = mar[:, 0] / length
    assert ratios.mean() == pytest.approx(0.867, abs=0.003)
    assert 0.7 <= ratios.min() < 0.703 and 0.999 < ratios.max() <= 1
    of_each = MASK_LAWS["mar_sample"](batch, length, rng()) / length  # the same law, a ratio for each sample
    assert of_each.mean() == pytest.approx(0.867, abs=0.003) and len(of_each.unique()) > 100


def test_mars_schedule_for_256_tokens_in_64_steps():
    sizes = group_sizes(256, 64)
    assert sum(sizes) == 256 and len(sizes) == 64
    assert sizes[:13] == [1] * 13 and sizes[13] > 1
    assert set(sizes[-10:]) == {6, 7}
    left = 256 - sum(sizes[:40])
    assert left == math.floor(256 * math.cos(math.pi / 2 * 40 / 64))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 80), st.data())
def test_any_number_of_steps_writes_every_token_once(length, data):
    num_steps = data.draw(st.integers(1, length))
    permutations = torch.stack([torch.randperm(length, generator=rng(s)) for s in range(3)])
    for order in (Random("cosine"), Raster()):
        steps = order.steps(length, num_steps, permutations)
        assert all(written.shape[1] >= 1 for written in steps)
        assert torch.equal(torch.cat(steps, 1).sort(1).values, torch.arange(length).expand(3, -1))
    assert len(Random("cosine").steps(length, num_steps, permutations)) == num_steps


@pytest.mark.parametrize("num_steps", [0, 17])
def test_an_impossible_number_of_steps_is_refused(num_steps):
    with pytest.raises(InvalidInput, match="1 to 16"):
        group_sizes(16, num_steps)


def test_a_view_repeated_for_guidance_keeps_its_shared_positions():
    view = Raster().training_view(2, 4, rng()).twice()
    assert view.reads.shape == (4, 4) and view.distinct_positions.shape == (1, 4)
    whole = view.since(3)
    assert whole.reads.tolist() == [[2]] * 4 and whole.positions.tolist() == [[3]] * 4
