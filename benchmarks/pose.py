"""GenEval's 553 prompts x 4 images, drawn and judged by one command that is killed in the middle, then finished.

    python benchmarks/pose.py --world icons32 --out DIR       a run of the smallest size, trained for 640 steps first
    python benchmarks/pose.py --world icons64 --out DIR       all 80 classes; tokenizer, detector and model untrained

The prompts are the world's own in the official file's numbers; where it has fewer distinct ones they are posed again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save, save_file

from fluidscale.evaluate.detect import DetectorNetwork
from fluidscale.model.build import build
from fluidscale.record import Placement
from fluidscale.run import run
from fluidscale.spec import RunSpec, canonical, to_json
from fluidscale.sweep import load_sweep, load_world
from fluidscale.tokens.image import build_network
from fluidscale.tokens.shipped import store
from fluidscale.world import World
from fluidscale.world.prompts import PROTOCOL

KILL_AFTER = 512  # images


def official_counts(world: World) -> list[dict]:
    """553 prompts of a world, as many of each tag as GenEval has."""
    own = world.prompts("seen")
    by_tag = {tag: itertools.cycle([prompt for prompt in own if prompt["tag"] == tag]) for tag in PROTOCOL}
    return [next(by_tag[tag]) for tag, count in PROTOCOL.items() for _ in range(count)]


def trained(out: Path) -> tuple[Path, list[str]]:
    """A run on icons32 and nothing to add to the command."""
    spec = load_sweep("smoke", sizes=["50K"], arms=["discrete-raster"]).runs[-1]
    train = dataclasses.replace(spec.train, steps=640, decay_steps=160)
    evaluation = dataclasses.replace(spec.evaluate, geneval_images_per_prompt=0, fd_images=0)
    spec = dataclasses.replace(spec, train=train, evaluate=evaluation)
    run(spec, out / spec.id, Placement())
    return out / spec.id, []


def untrained(out: Path) -> tuple[Path, list[str]]:
    """A run on icons64 with random weights throughout, and its detector's option."""
    torch.manual_seed(0)
    world = World(load_world("icons64"))
    facts = {
        "resolution": world.spec.resolution,
        "classes": list(world.spec.classes),
        "colors": list(world.spec.colors),
    }
    shape = {"widths": [16, 16, 16], "code_width": 8, "warmup": 1}
    card = {**facts, "name": "vq", "kind": "discrete", "grid": 8, "channels": 0, "vocab_size": 256, "network": shape}
    card = store(out / "vq.safetensors", save(build_network(card).state_dict()), card)
    network = {"shape": "pyramid", "widths": [8, 8, 8]}
    detector = DetectorNetwork(**network, num_classes=len(world.spec.classes), num_colors=len(world.spec.colors))
    store(out / "detector.safetensors", save(detector.state_dict()),
          {**facts, "name": "icons64-detector", "kind": "detector", "network": network})  # fmt: skip
    spec = load_sweep("smoke", sizes=["50K"], arms=["discrete-raster"]).runs[-1]
    words = {"text_vocab_size": len(world.vocabulary), "text_length": world.text_length}
    model = dataclasses.replace(spec.model, grid=8, vocab_size=256, **words)
    data = dataclasses.replace(spec.data, name="icons64", world=world.spec)
    spec = dataclasses.replace(spec, model=model, data=data, tokenizer_sha256=card["sha256"])
    return _folder(out / spec.id, spec, {card["sha256"]: str(out / "vq.safetensors")}), [
        "--detector", str(out / "detector.safetensors"),
    ]  # fmt: skip


def _folder(run_dir: Path, spec: RunSpec, assets: dict[str, str]) -> Path:
    (run_dir / "ckpt").mkdir(parents=True)
    (run_dir / "spec.json").write_text(to_json(spec))
    (run_dir / "placement.json").write_text(json.dumps(canonical(dataclasses.asdict(Placement(assets=assets)))))
    save_file(build(spec.model).state_dict(), run_dir / "ckpt" / "ema.safetensors")
    return run_dir


def timed(command: list[str], run_dir: Path, kill_after: int | None = None) -> tuple[float, float]:
    """Wall and CPU seconds of a command, killed (SIGKILL) once so many images are there."""
    started, before = time.monotonic(), os.times()
    process = subprocess.Popen(command)
    while process.poll() is None:
        if kill_after and len(list(run_dir.glob("samples/posed-*/0*.png"))) >= kill_after:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.05)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.monotonic() - started, cpu


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=("icons32", "icons64"), default="icons32")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    run_dir, options = (trained if arguments.world == "icons32" else untrained)(arguments.out)
    prompts = arguments.out / "posed.jsonl"
    prompts.write_text("".join(json.dumps(p) + "\n" for p in official_counts(World(load_world(arguments.world)))))
    command = [sys.executable, "-m", "fluidscale.evaluate", str(run_dir), "--prompts", str(prompts)]
    command += ["--images-per-prompt", "4", *options]
    for name, kill_after in (("killed", KILL_AFTER), ("finished", None), ("a second time", None)):
        wall, cpu = timed(command, run_dir, kill_after)
        images = len(list(run_dir.glob("samples/posed-*/0*.png")))
        print(f"| {arguments.world} | {name} | {images} | {wall:.0f} | {cpu:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
