"""Compiled blocks: the model's own losses to rounding, and training that goes on where nothing can be compiled."""

import dataclasses
import functools
import json
import logging

import pytest
import torch

from fluidscale.record import Placement
from fluidscale.run import run
from fluidscale.train import compiled

ONE = Placement(device="cpu")


def losses(spec, folder, placement):
    assert run(spec, folder / spec.id, placement)["status"] == "done"
    lines = [json.loads(line) for line in (folder / spec.id / "metrics.jsonl").read_text().splitlines()]
    return [(line["train_loss"], line["grad_norm"]) for line in lines]


def small(tiny_spec, arm):
    spec = tiny_spec(arm, steps=6, decay_steps=1)
    return dataclasses.replace(spec, evaluate=dataclasses.replace(spec.evaluate, val_images=0))


@pytest.fixture
def traced(monkeypatch):
    """What is compiled is traced, forward and backward, and no code is made of it: that takes a minute on a CPU."""
    graphs = []

    def compile(function):
        graphs.append(function)
        return plain(function)

    plain = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", compile)
    return graphs


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("arm", ["continuous-random", "discrete-raster"])
def test_a_compiled_run_has_the_losses_of_a_plain_one(tmp_path, tiny_spec, traced, arm, again):
    spec = small(tiny_spec, arm)
    plain = losses(spec, tmp_path / "plain", ONE)
    assert not traced
    found = losses(spec, tmp_path / "compiled", dataclasses.replace(ONE, compile=True, recompute=again))
    # Blocks of trunk and aligner, and the denoiser of continuous tokens.
    assert len(traced) == spec.model.depth + spec.model.aligner_depth + (spec.model.head is not None)
    assert found == [pytest.approx(line, rel=1e-4) for line in plain]


def test_blocks_of_a_kind_share_what_was_compiled(tmp_path, tiny_spec, traced):
    torch._dynamo.utils.counters.clear()
    losses(small(tiny_spec, "discrete-raster"), tmp_path, dataclasses.replace(ONE, compile=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # of the trunk's blocks, and of the aligner's


def test_without_a_c_compiler_training_goes_on_as_it_is(tmp_path, tiny_spec, monkeypatch, caplog):
    spec = small(tiny_spec, "discrete-random")
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        found = losses(spec, tmp_path / "compiled", dataclasses.replace(ONE, compile=True))
    assert "no C compiler" in caplog.text
    assert found == losses(spec, tmp_path / "plain", ONE)
