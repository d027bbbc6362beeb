"""The rate's shape, and what weight decay leaves alone."""

import dataclasses
import math
from itertools import pairwise

import pytest
from tiny_models import arm_spec, awake

from fluidscale.spec import TrainSpec
from fluidscale.train.optim import adamw, lr_at, set_lr

TRAIN = TrainSpec(1e-3, 8, 100, 60, 10, 0.02, 0.9, 0.95, 1.0, 0.99, 0.1)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_the_rate_warms_up_stays_and_falls_to_zero(shape):
    train = dataclasses.replace(TRAIN, decay_shape=shape)
    rates = [lr_at(train, step) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4) and rates[9:40] == [1e-3] * 31
    assert all(before > after for before, after in pairwise(rates[40:]))
    left = 1 / 61 if shape == "linear" else (1 - math.cos(math.pi / 61)) / 2
    assert rates[-1] == pytest.approx(left * 1e-3)
    assert lr_at(dataclasses.replace(train, decay_steps=0), 99) == 1e-3
    # Half-way the two agree.
    assert lr_at(dataclasses.replace(train, decay_steps=59), 70) == pytest.approx(5e-4, rel=0.01)


def test_decay_acts_on_matrices_and_on_the_head_if_asked():
    model = awake(arm_spec("continuous-random"))
    names = {id(p): name for name, p in model.named_parameters()}
    for train in (TRAIN, dataclasses.replace(TRAIN, decay_head=False)):
        decayed, free = ([names[id(p)] for p in group["params"]] for group in adamw(model, train).param_groups)
        assert len(decayed) + len(free) == len(names) and all(not name.endswith("bias") for name in decayed)
        head = [name for name in decayed if name.startswith("head.denoiser")]
        assert bool(head) == train.decay_head
        assert "trunk.blocks.0.mlp.0.weight" in decayed and "head.inward.weight" in decayed


@pytest.mark.parametrize("arm", ["continuous-random", "discrete-raster"])
def test_what_is_no_linear_maps_matrix_has_a_rate_of_its_own(arm):
    model = awake(arm_spec(arm))
    names = {id(p): name for name, p in model.named_parameters()}
    train = dataclasses.replace(TRAIN, lr_vectors=4e-3)
    optimizer = adamw(model, train)
    for step in (3, 50, 90):
        set_lr(optimizer, train, step)
        rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert rates.keys() == set(names.values())
        own = {name for name, rate in rates.items() if rate == pytest.approx(4 * lr_at(train, step))}
        assert all(rates[name] == lr_at(train, step) for name in rates.keys() - own)
        assert {"trunk.position", "trunk.special", "text.words.weight", "trunk.norm.weight"} <= own
        assert not own & {"trunk.blocks.0.mlp.0.weight", "trunk.blocks.0.cross.q.weight", "text.project.weight"}
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {name for name, p in model.named_parameters() if p.ndim >= 2}


def test_one_rate_keeps_the_groups_of_older_checkpoints():
    model = awake(arm_spec("continuous-random"))
    optimizer = adamw(model, TRAIN)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [TRAIN.weight_decay, 0]
    for group in optimizer.param_groups:
        del group["lr_scale"]
    set_lr(optimizer, TRAIN, 20)
    assert [group["lr"] for group in optimizer.param_groups] == [TRAIN.lr, TRAIN.lr]
