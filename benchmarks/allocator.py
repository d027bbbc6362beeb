"""What keeping freed memory is worth to training steps and to drawing: processes as workers are, and bare ones.

    python benchmarks/allocator.py                               the local ladder's smallest and largest size, four arms
    python benchmarks/allocator.py --size 190K --rounds 9

Processes of both kinds take turns, each measuring one arm at one size; a row has the median ratio of neighbours and
its range. The variables are those that `slurm/placement.py` hands to every worker.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

import torch
from paper_step import random_batch

from fluidscale.model.build import build
from fluidscale.model.generator import generate
from fluidscale.model.transformer import Text
from fluidscale.spec import ARMS
from fluidscale.sweep import load_sweep
from fluidscale.train.batches import draw_step, visited
from fluidscale.train.optim import adamw
from slurm.placement import KEEP_FREED_MEMORY

STEPS, WARM_UP, IMAGES, DRAWINGS = 40, 5, 256, 3


def seconds(size: str, arm: str) -> tuple[float, float]:
    """Of one training step of the local sweep, and of one drawn image."""
    torch.set_num_threads(1)
    run = load_sweep("local", [size], [arm]).runs[0]
    model = build(run.model)
    optimizer = adamw(model, run.train)
    stored, text = random_batch(run, max(run.train.batch, IMAGES))
    batch = slice(run.train.batch)
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            started = time.perf_counter()
        draws = draw_step(model, run, step)
        tokens = visited(stored[batch], draws.posterior)
        words = Text(text.values[batch], text.mask[batch])
        losses, counted = model.losses_under(draws.noise, tokens, words, draws.view, draws.drop)
        (losses.sum() / counted.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.train.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    trained = time.perf_counter()
    words = Text(text.values[:IMAGES], text.mask[:IMAGES])
    for drawing in range(1 + DRAWINGS):
        if drawing == 1:
            warm = time.perf_counter()
        generate(model, words, run.evaluate.sampling, list(range(IMAGES)))
    return (trained - started) / STEPS, (time.perf_counter() - warm) / (DRAWINGS * IMAGES)


def apart(size: str, arm: str, variables: dict[str, str]) -> tuple[float, ...]:
    """`seconds`, measured in a process of its own that starts with these variables."""
    bare = {name: value for name, value in os.environ.items() if name not in KEEP_FREED_MEMORY}
    command = [sys.executable, __file__, "--size", size, "--arm", arm, "--one"]
    out = subprocess.run(command, env={**bare, **variables}, check=True, capture_output=True, text=True).stdout
    return tuple(map(float, out.split()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", default=["50K", "930K"], help="sizes of sweeps/local.yaml")
    parser.add_argument("--arm", nargs="+", default=list(ARMS), choices=ARMS, help="arms (default: all four)")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of processes a row (default: 5)")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(*seconds(arguments.size[0], arguments.arm[0]))
        return 0
    print("| size | arm | ms a step: bare | kept | ratio (range) | ms an image: bare | kept | ratio (range) |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for size in arguments.size:
        for arm in arguments.arm:
            pairs = [(apart(size, arm, {}), apart(size, arm, KEEP_FREED_MEMORY)) for _ in range(arguments.rounds)]
            cells = []
            for k in (0, 1):
                ratios = [bare[k] / kept[k] for bare, kept in pairs]
                ms = [statistics.median(1e3 * one[k] for one in side) for side in zip(*pairs, strict=True)]
                ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                cells += [f"{ms[0]:.1f}", f"{ms[1]:.1f}", ratio]
            print("| " + " | ".join([size, arm, *cells]) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
