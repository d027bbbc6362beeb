"""Training throughput on one GPU, in bfloat16: tokens/s and model FLOPs utilisation, alone and side by side.

    python benchmarks/throughput.py                                        166M, 369M, and 1.1B computing twice
    python benchmarks/throughput.py --size 369M --arm continuous-random --micro-batch 128 --steps 30 --compile
    python benchmarks/throughput.py --sweep icons --size 5.8M --micro-batch 256 --side-by-side 4 --compile

A step is all that a run computes (draws, forward, backward, clipping, AdamW, average) but Lightning's own bookkeeping.
MFU counts what the model's formulas count (3 x forward; computing activations again is not counted) over the device's
dense bfloat16 peak. Side by side, rates are of all processes together. Exit code 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Barrier

import torch
from paper_step import random_batch

from fluidscale.flops import flops_per_image
from fluidscale.model.build import build
from fluidscale.model.transformer import Text
from fluidscale.spec import ARMS, InvalidInput, RunSpec
from fluidscale.sweep import load_sweep
from fluidscale.train.batches import draw_step, visited
from fluidscale.train.compiled import compile_blocks
from fluidscale.train.optim import adamw
from fluidscale.train.sharding import recompute

# Dense bfloat16 TFLOP/s by device name: NVIDIA's data sheets.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}
SIZES = {"166M": False, "369M": False, "1.1B": True}  # whether activations are computed again
WARM_UP = 5


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    run: RunSpec
    again: bool
    compiled: bool
    processes: int
    steps: int


def stepper(case: Case) -> Callable[[int], None]:
    """Makes a model on the GPU, and what makes one step of its training."""
    run = case.run
    with torch.device("cuda"):
        model = build(run.model)
    if case.compiled:
        compile_blocks(model)
    if case.again:
        recompute(model)
    optimizer = adamw(model, run.train)
    shadow = [p.detach().clone() for p in model.parameters()]
    stored, text = random_batch(run, run.train.batch)
    stored, text = stored.cuda(), text.to(torch.device("cuda"))

    def step(number: int) -> None:
        draws = draw_step(model, run, number)
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

    return step


def one(case: Case, barrier: Barrier) -> tuple[float, float, float]:
    """Seconds of the first steps, seconds a step after them, and GB."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    try:
        step = stepper(case)
        for number in range(WARM_UP):
            step(number)
        torch.cuda.synchronize()
    except BaseException:
        # The others would wait for this one.
        barrier.abort()
        raise
    first = time.perf_counter() - started
    barrier.wait()
    started = time.perf_counter()
    for number in range(WARM_UP, WARM_UP + case.steps):
        step(number)
    torch.cuda.synchronize()
    return first, (time.perf_counter() - started) / case.steps, torch.cuda.max_memory_allocated() / 1e9


_TOGETHER: list[Barrier] = []


def _meet(barrier: Barrier) -> None:
    _TOGETHER.append(barrier)


def _one_of_many(case: Case) -> tuple[float, float, float]:
    return one(case, _TOGETHER[0])


def measure(case: Case, peak: float) -> str:
    """One row of the table, in processes of its own: each starts when all have warmed up."""
    # As the launcher's workers compile: each in its own process.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(case.processes)
    with ProcessPoolExecutor(case.processes, context, initializer=_meet, initargs=(barrier,)) as pool:
        answers = list(pool.map(_one_of_many, [case] * case.processes))
    first, seconds, memory = (max(column) for column in zip(*answers, strict=True))
    run, rate = case.run, case.processes / seconds
    mfu = 3 * flops_per_image(run.model, run.train.batch)["total"] * run.train.batch * rate / (peak * 1e12)
    cells = (run.arm, run.size, run.train.batch, case.processes, _word(case.again), _word(case.compiled),
             f"{first:.0f}", f"{1e3 / rate:.1f}", f"{run.train.batch * run.model.num_tokens * rate:,.0f}", f"{mfu:.1%}",
             f"{memory:.1f}")  # fmt: skip
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _word(flag: bool) -> str:
    return "yes" if flag else "no"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", default="fluid", help="whose models to train (default: fluid)")
    parser.add_argument("--size", nargs="+", help=f"default: {' '.join(SIZES)}")
    parser.add_argument("--arm", nargs="+", choices=ARMS, help="default: the two in random order")
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="compile the blocks (placement key `compile`)")
    parser.add_argument("--side-by-side", type=int, nargs="+", default=[1], help="processes that share the GPU")
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
    columns = ("arm", "size", "samples at once", "processes", "computed again", "compiled", "first steps, s",
               "step, ms", "tokens/s", "MFU", "GB each")  # fmt: skip
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for size in arguments.size or SIZES:
        for arm in arguments.arm or ("continuous-random", "discrete-random"):
            try:
                run = load_sweep(arguments.sweep, [size], [arm]).runs[0]
            except InvalidInput as error:
                print(error, file=sys.stderr)
                return 2
            run = replace(run, train=replace(run.train, batch=arguments.micro_batch))
            for processes in arguments.side_by_side:
                case = Case(run, SIZES.get(size, False), arguments.compile, processes, arguments.steps)
                print(measure(case, peak), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
