"""Specs small enough to be trained in a test."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable

import pytest

from fluidscale.spec import RunSpec
from fluidscale.sweep import load_sweep


def tiny(arm: str, steps: int = 24, decay_steps: int = 6, **train: float) -> RunSpec:
    """A run of the smoke sweep's smallest size, cut down to a few steps and no sampling."""
    spec = max(load_sweep("smoke", sizes=["50K"], arms=[arm]).runs, key=lambda run: run.images)
    shorter = dataclasses.replace(
        spec.train,
        batch=8,
        steps=steps,
        decay_steps=decay_steps,
        warmup_steps=4,
        **train,  # type: ignore[arg-type]
    )
    lighter = dataclasses.replace(spec.evaluate, val_images=16, geneval_images_per_prompt=0, fd_images=0)
    data = dataclasses.replace(spec.data, images_unique=64)
    return dataclasses.replace(spec, train=shorter, evaluate=lighter, data=data)


@pytest.fixture(scope="session")
def tiny_spec():
    return tiny


@pytest.fixture
def fault(request) -> Callable[..., None]:
    """Notes, at the end of a test that stood a fault, what it left behind: a row of FAULTS.md (tests/faults.py)."""

    def note(name: str, *, then: str, repeated: str, leaves: str) -> None:
        row = {"fault": name, "then": then, "repeated": repeated, "leaves": leaves, "test": request.node.nodeid}
        if "FAULTS" in os.environ:
            with open(os.environ["FAULTS"], "a") as file:
                file.write(json.dumps(row) + "\n")

    return note
