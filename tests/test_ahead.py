"""Scenes drawn ahead by processes of their own are those drawn when asked, in order, and a fault reaches the reader."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from fluidscale.pretrain import material
from fluidscale.sweep import load_world
from fluidscale.world import World
from fluidscale.world.ahead import Drawers, drawers


@pytest.fixture(scope="module")
def world() -> World:
    return World(load_world("icons32"))


def numbers(world: World, start: int) -> np.ndarray:
    return world.scenes(start, 8)[0]


def one_fails(world: World, start: int) -> int:
    if start == 3:
        raise ValueError("scene 3")
    return start


def test_the_scenes_and_their_order_do_not_depend_on_the_processes(world: World):
    starts = range(0, 160, 8)
    with Drawers(world, 2) as ahead, Drawers(world, 0) as inline:
        # Twice from the same processes: a folder of shards asks for one shard after the other.
        for part in (starts[:13], starts[13:]):
            for one, other in zip(ahead.map(numbers, part), inline.map(numbers, part), strict=True):
                assert np.array_equal(one, other)


def test_what_a_detector_learns_from_travels_between_processes(world: World):
    draw = partial(material, "detector", 4)
    with Drawers(world, 1) as ahead:
        (own, second), *rest = ahead.map(draw, (0, 4))
    again, other = draw(world, 0)
    assert len(rest) == 1 and np.array_equal(own.images, again.images) and own.objects == again.objects
    assert np.array_equal(second.images, other.images) and second.objects == other.objects


def test_a_fault_reaches_the_reader_and_ends_the_processes(world: World):
    with pytest.raises(ValueError, match="scene 3"), Drawers(world, 2) as ahead:
        list(ahead.map(one_fails, range(100)))


def test_only_beside_a_gpu_do_other_cores_draw(world: World):
    assert drawers(world, "cpu").workers == 0
    assert drawers(world, "cuda").workers >= 0
