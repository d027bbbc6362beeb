"""Training throughput on one GPU: tokens/s and model FLOPs utilisation of the paper's sizes, in bfloat16.

    python benchmarks/throughput.py                                        166M, 369M, and 1.1B computing twice
    python benchmarks/throughput.py --size 369M --arm continuous-random --micro-batch 128 --steps 30

MFU counts what the model's formulas count (3 x forward; computing activations again is not counted) over the device's
dense bfloat16 peak. Needs a CUDA device: exit code 2 without one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace

import torch
from paper_step import random_batch

from fluidscale.flops import flops_per_image
from fluidscale.model.build import build
from fluidscale.model.transformer import Text
from fluidscale.spec import ARMS
from fluidscale.sweep import load_sweep
from fluidscale.train.batches import draw_step, visited
from fluidscale.train.optim import adamw
from fluidscale.train.sharding import recompute

# Dense bfloat16 TFLOP/s by device name: NVIDIA's data sheets.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}
SIZES = {"166M": False, "369M": False, "1.1B": True}  # whether activations are computed again
WARM_UP = 5


def measure(size: str, arm: str, micro_batch: int, steps: int, again: bool, peak: float) -> str:
    """One row of the table: the median step of `steps`, after a warm-up."""
    run = load_sweep("fluid", [size], [arm]).runs[0]
    run = replace(run, train=replace(run.train, batch=micro_batch))
    with torch.device("cuda"):
        model = build(run.model)
    if again:
        recompute(model)
    optimizer = adamw(model, run.train)
    shadow = [p.detach().clone() for p in model.parameters()]
    stored, text = random_batch(run, micro_batch)
    stored, text = stored.cuda(), text.to(torch.device("cuda"))
    seconds = []
    for step in range(WARM_UP + steps):
        torch.cuda.synchronize()
        started = time.perf_counter()
        draws = draw_step(model, run, step)
        with torch.autocast("cuda", torch.bfloat16):
            tokens = visited(stored, draws.posterior)
            losses, counted = model.losses_under(
                draws.noise, tokens, Text(text.values, text.mask), draws.view, draws.drop.cuda()
            )
        (losses.sum() / counted.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.train.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(shadow, [p.detach() for p in model.parameters()], 1 - run.train.ema_decay)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds[WARM_UP:])
    mfu = 3 * flops_per_image(run.model, micro_batch)["total"] * micro_batch / median / (peak * 1e12)
    memory = torch.cuda.max_memory_allocated() / 1e9
    cells = (arm, size, micro_batch, "yes" if again else "no", f"{1e3 * median:.1f}",
             f"{micro_batch * run.model.num_tokens / median:,.0f}", f"{mfu:.1%}", f"{memory:.1f}")  # fmt: skip
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), help="default: all")
    parser.add_argument("--arm", choices=ARMS, help="default: the continuous and the discrete arm in random order")
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--peak-tflops", type=float, help="of the device, dense bfloat16; default: by its name")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("throughput.py measures a GPU, and there is no CUDA device here", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name()
    peak = arguments.peak_tflops or next((value for key, value in PEAK_TFLOPS.items() if key in name), None)
    if peak is None:
        print(f"{name}: its peak is not known here; give --peak-tflops", file=sys.stderr)
        return 2
    print(f"{name}, {peak:g} TFLOP/s, torch {torch.__version__}\n")
    columns = ("arm", "size", "samples at once", "computed again", "step, ms", "tokens/s", "MFU", "GB")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for size in [arguments.size] if arguments.size else SIZES:
        for arm in [arguments.arm] if arguments.arm else ("continuous-random", "discrete-random"):
            torch.cuda.reset_peak_memory_stats()
            row = measure(size, arm, arguments.micro_batch, arguments.steps, SIZES[size], peak)
            print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
