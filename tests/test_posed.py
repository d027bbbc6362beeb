"""A prompt file posed to a trained run: drawn and judged in one command that a kill does not set back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fluidscale.evaluate import generate, posed, shown
from fluidscale.evaluate.__main__ import main as command
from fluidscale.evaluate.samples import read_samples
from fluidscale.model.build import build
from fluidscale.spec import to_json
from fluidscale.world import World
from fluidscale.world.captions import TAGS


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tiny_spec) -> Path:
    """A trained run's folder, as far as evaluation looks: two thousand random numbers for weights."""
    folder, spec = tmp_path_factory.mktemp("runs") / "one", tiny_spec("discrete-random")
    torch.manual_seed(0)
    network = build(spec.model)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    (folder / "ckpt").mkdir(parents=True)
    (folder / "spec.json").write_text(to_json(spec))
    save_file(network.state_dict(), folder / "ckpt" / "ema.safetensors")
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory, tiny_spec) -> Path:
    """Two prompts a tag, in the official format."""
    path = tmp_path_factory.mktemp("prompts") / "posed.jsonl"
    lines = World(tiny_spec("discrete-random").data.world).prompts("seen", dict.fromkeys(TAGS, 2))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_one_command_draws_and_judges_and_a_second_time_costs_nothing(run_dir, prompts, capsys, monkeypatch):
    line = [str(run_dir), "--prompts", str(prompts), "--images-per-prompt", "4", "--json"]
    assert command(line) == 0
    shown_ = capsys.readouterr()
    scores = {score["name"]: score for score in json.loads(shown_.out)}
    assert set(scores) == {"geneval", *(f"geneval_{tag}" for tag in TAGS)} and scores["geneval"]["n"] == 48
    assert scores["geneval"]["protocol"].startswith("geneval-posed-icons32-x4-")
    (folder,) = run_dir.glob("samples/posed-*")
    results = [json.loads(one) for one in (folder / "results.jsonl").read_text().splitlines()]
    assert len(results) == 48 and list(results[0])[:4] == ["filename", "tag", "prompt", "correct"]
    kept = {entry["metric"]: entry for entry in json.loads((folder / "scores.json").read_text())["scores"]}
    extra = kept["geneval"]["extra"]
    assert len(kept) == 7 and set(extra["tags"]) == set(TAGS) and len(extra["detector_sha256"]) == 64
    assert {"se_seed", "se_bootstrap"} <= set(extra)
    monkeypatch.setattr(generate, "generate", None)
    monkeypatch.setattr(posed, "judge_images", None)
    assert command(line) == 0 and {s["name"]: s for s in json.loads(capsys.readouterr().out)} == scores


def test_several_scales_are_drawn_in_common_batches_and_the_best_is_named(run_dir, prompts, capsys, monkeypatch):
    drawn, original = [], generate.generate

    def spy(model, text, sampling, seeds, *rest, scales=None, **options):
        drawn.append((len(seeds), sorted(set(scales or [sampling.guidance_scale]))))
        return original(model, text, sampling, seeds, *rest, scales=scales, **options)

    monkeypatch.setattr(generate, "generate", spy)
    line = [str(run_dir), "--prompts", str(prompts), "--images-per-prompt", "2", "--guidance-scale"]
    assert command([*line, "1,3,5"]) == 0
    # Images without guidance cost half and have a batch of their own.
    assert drawn == [(24, [1]), (48, [3, 5])]
    content = json.loads((run_dir / "eval" / "guidance" / "posed.json").read_text())
    assert [one["guidance_scale"] for one in content["metrics"]["geneval"]["scales"]] == [1, 3, 5]
    assert "geneval: best" in capsys.readouterr().err
    folders = list(run_dir.glob("samples/guidance_scale=*/posed-*"))
    together = {folder.parent.name: read_samples(folder).sha256 for folder in folders}
    for path in run_dir.glob("samples/guidance_scale=*/posed-*/*.png"):
        path.unlink()
    for scale in (1, 3, 5):
        assert command([*line, str(scale)]) == 0
    alone = {folder.parent.name: read_samples(folder).sha256 for folder in folders}
    # Codes: the same pictures bit for bit, whoever shared their batch.
    assert together == alone and len(alone) == 3


def test_a_killed_command_goes_on_where_it_was(run_dir, prompts, tmp_path):
    copy = tmp_path / "one"
    for name in ("spec.json", "ckpt/ema.safetensors"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((run_dir / name).read_bytes())
    line = ["--prompts", str(prompts), "--images-per-prompt", "40"]
    process = subprocess.Popen([sys.executable, "-m", "fluidscale.evaluate", str(copy), *line],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(copy.glob("samples/posed-*/*.png")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in copy.glob("samples/posed-*/*.png")}
    assert 0 < len(before) < 480
    assert command([str(copy), *line]) == 0
    (folder,) = copy.glob("samples/posed-*")
    assert all((folder / name).stat().st_mtime_ns == time for name, time in before.items() if "grid" not in name)
    assert command([str(run_dir), *line]) == 0
    (whole,) = [path for path in run_dir.glob("samples/posed-*") if path.name == folder.name]
    assert read_samples(folder).sha256 == read_samples(whole).sha256
    assert (folder / "results.jsonl").read_text() == (whole / "results.jsonl").read_text()


def test_progress_says_how_long_it_will_take(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(shown.time, "monotonic", lambda: clock[0])
    with shown.shown() as progress:
        for done in (10, 20, 30, 100):
            progress("drawing", done, 100)
            clock[0] += 6.0
    assert capsys.readouterr().err == "drawing: 30 of 100, 42 s left\ndrawing: 100\n"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--detector", "icons32-vq"], "not a detector"),
        (["--clip", "."], "--clip goes with --detector"),
        (["--detector", "."], "--detector needs --clip"),
        (["--detector", ".", "--clip", "."], "12 prompts, GenEval has 553"),
        (["--images-per-prompt", "0"], "must be at least 1"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_it_is_drawn(run_dir, prompts, capsys, monkeypatch, asked, message):
    monkeypatch.setattr(generate, "generate", None)
    assert command([str(run_dir), "--prompts", str(prompts), "--num-inference-steps", "3", *asked]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_detector_without_prompts_is_refused(run_dir, capsys):
    assert command([str(run_dir), "--detector", "icons32-detector"]) == 2
    assert "judge the images of --prompts" in capsys.readouterr().err
