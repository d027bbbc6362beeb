"""What one process of a sharded run holds on its host while the model comes to be, before the first step.

    python benchmarks/host_memory.py --size 10.5B --processes 128

This is process 0 of as many as are asked for, the others pretended: nothing is sent while a model is built, sharded and
given its values, so that memory and seconds are those of a real run on CPUs (on GPUs the kept part lies there).
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from fluidscale.flops import params
from fluidscale.model.deferred import build_without_values, draw_values
from fluidscale.sweep import load_sweep
from fluidscale.train.sharding import shard


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="10.5B")
    parser.add_argument("--processes", type=int, default=128)
    arguments = parser.parse_args()
    spec = load_sweep("fluid", [arguments.size], ["continuous-random"]).runs[0].model
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=arguments.processes)
    mesh, before, started = init_device_mesh("cpu", (arguments.processes,)), peak_gb(), time.process_time()
    model, fills = build_without_values(spec)
    shard(model, mesh, torch.float32)
    model.to_empty(device="cpu")
    draw_values(model, fills)
    largest = max(parameter.numel() for parameter in model.parameters()) * 4 / 1e9
    kept = sum(parameter.to_local().nbytes for parameter in model.parameters()) / 1e9
    print("| size | processes | whole model, GB | kept part | largest parameter | peak above the start | CPU s |")
    print("|" + "---|" * 7)
    figures = (params(spec)["total"] * 4 / 1e9, kept, largest, peak_gb() - before)
    shown = " | ".join(f"{figure:.2f}" for figure in figures)
    print(f"| {arguments.size} | {arguments.processes} | {shown} | {time.process_time() - started:.0f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
