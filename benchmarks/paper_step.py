"""Does the paper's smallest model fit a CPU? One real training step and one image of each arm of 166M.

    python benchmarks/paper_step.py                       all four arms, one after the other, each in its own process
    python benchmarks/paper_step.py --arm discrete-raster --batch 8

The step is that of training: loss under the paper's mask law and noise, backward, clipping, AdamW, the average. The
image is drawn under the paper's guidance, temperature and numbers of steps, from weights that have taken that one step,
so it shows nothing. Data are random: this is about seconds and memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from fluidscale.model.build import build
from fluidscale.model.generator import generate
from fluidscale.model.transformer import Text
from fluidscale.spec import ARMS, RunSpec
from fluidscale.sweep import load_sweep
from fluidscale.train.batches import draw_step, visited
from fluidscale.train.optim import adamw

LIMIT_GIB = 24
COLUMNS = ("step_seconds", "step_cpu_seconds", "image_seconds", "image_cpu_seconds", "peak_gib")


def random_batch(spec: RunSpec, batch: int) -> tuple[torch.Tensor, Text]:
    """Stored tokens and text of the right shapes."""
    model, rng = spec.model, torch.Generator().manual_seed(1)
    if model.token_channels:
        tokens = torch.randn(batch, model.num_tokens, 2 * model.token_channels, generator=rng)
    else:
        tokens = torch.randint(model.vocab_size, (batch, model.num_tokens), generator=rng)
    if model.text_vocab_size:
        text = torch.randint(1, model.text_vocab_size, (batch, model.text_length), generator=rng)
    else:
        text = torch.randn(batch, model.text_length, model.text_width, generator=rng)
    return tokens, Text(text, torch.ones(batch, model.text_length, dtype=torch.bool))


def clocks() -> tuple[float, float]:
    """Seconds of the wall, and of this process's own computing: they differ where others use the machine."""
    return time.perf_counter(), time.process_time()


def measure(arm: str, batch: int) -> dict[str, float]:
    """Seconds and peak memory of one arm, in this process."""
    run = load_sweep("fluid", ["166M"], [arm]).runs[0]
    torch.manual_seed(0)
    model = build(run.model)
    shadow = [p.detach().clone() for p in model.parameters()]
    optimizer = adamw(model, run.train)
    stored, text = random_batch(run, batch)
    started = clocks()
    draws = draw_step(model, run, 0).rows(slice(0, batch))
    tokens = visited(stored, draws.posterior)
    losses, counted = model.losses_under(draws.noise, tokens, text, draws.view, draws.drop)
    loss = losses.sum() / counted.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), run.train.grad_clip)
    optimizer.step()
    with torch.no_grad():
        torch._foreach_lerp_(shadow, [p.detach() for p in model.parameters()], 1 - run.train.ema_decay)
    stepped = clocks()
    optimizer.zero_grad(set_to_none=True)
    drawn = generate(model.eval(), Text(text.values[:1], text.mask[:1]), run.evaluate.sampling, [0])
    sampled = clocks()
    return {
        "loss": float(loss.detach()),
        "step_seconds": stepped[0] - started[0],
        "step_cpu_seconds": stepped[1] - started[1],
        "image_seconds": sampled[0] - stepped[0],
        "image_cpu_seconds": sampled[1] - stepped[1],
        "finite": float(torch.isfinite(drawn.float()).all()),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", choices=ARMS, help="one arm, in this process; default: all, one after the other")
    parser.add_argument("--batch", type=int, default=2, help="samples of the training step")
    arguments = parser.parse_args()
    if arguments.arm:
        print(json.dumps(measure(arguments.arm, arguments.batch)))
        return 0
    print("| arm | loss | training step, s | of CPU | one image, s | of CPU | peak memory, GiB |\n|" + "---|" * 7)
    fits = True
    for arm in ARMS:
        command = [sys.executable, __file__, "--arm", arm, "--batch", str(arguments.batch)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        fits &= found["peak_gib"] < LIMIT_GIB
        measured = " | ".join(f"{found[key]:.1f}" for key in COLUMNS)
        print(f"| {arm} | {found['loss']:.3f} | {measured} |", flush=True)
    print(f"batch {arguments.batch}, {torch.get_num_threads()} thread(s), float32")
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
