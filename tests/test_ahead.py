"""Scenes drawn ahead by processes of their own are those drawn when asked, in order, and a fault reaches the reader."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from fluidscale.pretrain import material
from fluidscale.sweep import load_world
from fluidscale.world import World, ahead
from fluidscale.world.ahead import Drawers, drawers


@pytest.fixture(scope="module")
def world() -> World:
    return World(load_world("icons32"))


def numbers(world: World, start: int) -> np.ndarray:
    return world.scenes(start, 8)[0]


def who(world: World, item: int) -> int:
    return os.getpid()


def one_fails(world: World, start: int) -> int:
    if start == 3:
        raise ValueError("scene 3")
    return start


def test_the_scenes_and_their_order_do_not_depend_on_the_processes(world: World):
    starts = range(0, 160, 8)
    with Drawers(world, 2) as other, Drawers(world, 0) as inline:
        # Twice from the same processes: a folder of shards asks for one shard after the other.
        for part in (starts[:13], starts[13:]):
            for one, asked in zip(other.map(numbers, part), inline.map(numbers, part), strict=True):
                assert np.array_equal(one, asked)


def test_what_a_detector_learns_from_travels_between_processes(world: World):
    draw = partial(material, "detector", 4)
    with Drawers(world, 1) as one:
        (own, second), *rest = one.map(draw, (0, 4))
    again, other = draw(world, 0)
    assert len(rest) == 1 and np.array_equal(own.images, again.images) and own.objects == again.objects
    assert np.array_equal(second.images, other.images) and second.objects == other.objects


def test_a_fault_reaches_the_reader_and_ends_the_processes(world: World):
    with pytest.raises(ValueError, match="scene 3"), Drawers(world, 2) as two:
        list(two.map(one_fails, range(100)))
    assert not multiprocessing.active_children()


def test_the_processes_end_with_a_parent_that_is_killed():
    program = (
        "import sys, test_ahead; from fluidscale.sweep import load_world; from fluidscale.world import World\n"
        "from fluidscale.world.ahead import Drawers\n"
        "with Drawers(World(load_world('icons32')), 1) as ahead:\n"
        "    print(*ahead.map(test_ahead.who, [0]), flush=True)\n"
        "    sys.stdin.read()\n"
    )
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    parent = subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1, text=True, env=here)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs([child], timeout=20)
    assert not alive


def test_only_beside_a_gpu_do_other_cores_draw(world: World, monkeypatch):
    monkeypatch.setattr(ahead, "available_cores", lambda: 4)
    assert drawers(world, "cpu").workers == 0 and drawers(world, "cuda").workers == 3
