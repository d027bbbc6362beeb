import numpy as np
import pytest

from fluidscale.data.sampler import permute, positions, samples_at


@pytest.mark.parametrize("num_samples", [1, 2, 7, 64, 1000])
def test_every_epoch_is_a_permutation_of_its_own(num_samples):
    epochs = [samples_at(3, num_samples, np.arange(e * num_samples, (e + 1) * num_samples)) for e in range(3)]
    for order in epochs:
        assert sorted(order.tolist()) == list(range(num_samples))
    if num_samples >= 64:
        assert not np.array_equal(epochs[0], epochs[1])
        assert not np.array_equal(epochs[0], samples_at(4, num_samples, np.arange(num_samples)))


def test_global_batches_do_not_depend_on_the_world_size_or_on_where_reading_starts():
    straight = samples_at(0, 1000, positions(32, range(100)))
    for world_size in (1, 2, 4):
        parts = [samples_at(0, 1000, positions(32, range(100), rank, world_size)) for rank in range(world_size)]
        assert np.array_equal(np.concatenate(parts, axis=1), straight)
    assert np.array_equal(samples_at(0, 1000, positions(32, range(57, 100))), straight[57:])


def test_the_permutation_looks_random():
    order = permute(np.arange(10_000), 10_000, "key")
    # Neighbours are as far apart as those of a random permutation: a third of the range on average.
    assert abs(np.abs(np.diff(order)).mean() / 10_000 - 1 / 3) < 0.02
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="not divisible by the world size 3"):
        positions(32, range(1), 0, 3)
