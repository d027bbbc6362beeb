"""What would run and what it would cost: specs in, priced rows out. Spends nothing and imports no torch."""

from __future__ import annotations

import heapq
import itertools
import os
import shutil
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from fluidscale.record import Placement, planned
from fluidscale.spec import InvalidInput, RunSpec
from fluidscale.sweep import Sweep
from slurm.cost import Cost, cost, evaluation_flops, memory
from slurm.placement import Machine, Profile, place

# A placement of more devices than this is not looked for.
_MOST_DEVICES = 1024


@dataclass(frozen=True)
class PlannedRun:
    """A run with its place and its price."""

    spec: RunSpec
    placement: Placement
    cost: Cost
    array: str  # the trunk's number: runs of one trunk share a worker


@dataclass(frozen=True)
class Plan:
    """A sweep on a machine. `trunks` go to one worker each, their runs in ascending order of steps."""

    sweep: Sweep
    machine: Machine
    runs: tuple[PlannedRun, ...]

    @property
    def trunks(self) -> list[list[PlannedRun]]:
        """Runs by trunk, the most expensive trunk first, so that no worker is left with a long one at the end.

        Before all others one of each tokenizer: whoever first needs its tokens encodes them, and the rest would wait.
        """
        groups: dict[str, list[PlannedRun]] = defaultdict(list)
        for run in self.runs:
            groups[run.spec.trunk_id].append(run)
        ordered = sorted(groups.values(), key=lambda group: -sum(run.cost.seconds for run in group))
        firsts = {group[0].spec.tokenizer_sha256: group for group in reversed(ordered)}
        return sorted(ordered, key=lambda group: group is not firsts[group[0].spec.tokenizer_sha256])

    @property
    def hours(self) -> float:
        """Wall time on this machine, hours: trunks dealt in order, each to the worker that is free first."""
        loads = [0.0] * max(1, min(self.machine.workers, len(self.trunks)))
        for group in self.trunks:
            heapq.heapreplace(loads, loads[0] + sum(run.cost.seconds for run in group))
        return max(loads) / 3600

    @property
    def worker_hours(self) -> float:
        """GPU-hours (core-hours on a CPU) of all runs together."""
        return sum(run.cost.device_seconds for run in self.runs) / 3600

    @property
    def disk_gb(self) -> float:
        return sum(run.cost.disk_gb for run in self.runs)


def make_plan(sweep: Sweep, machine: Machine) -> Plan:
    """Prices every run of `sweep`: a run pays only for the steps that its shorter siblings have not made."""
    groups: dict[str, list[RunSpec]] = defaultdict(list)
    for spec in sweep.runs:
        groups[spec.trunk_id].append(spec)
    profiles = {size: machine.profile.of(size) for size in {spec.size for spec in sweep.runs}}
    runs = []
    for number, group in enumerate(groups.values()):
        group.sort(key=lambda spec: spec.train.steps)
        branches = tuple(sorted({spec.train.branch_step for spec in group}))
        reached = 0
        for spec in group:
            profile = profiles[spec.size]
            placement = place(spec, profile, branches, sweep.assets)
            runs.append(PlannedRun(spec, placement, cost(spec, reached, profile), f"{sweep.name}[{number}]"))
            reached = max(reached, spec.train.branch_step)
    return Plan(sweep, machine, tuple(runs))


def check_budget(plan: Plan, max_hours: float | None) -> None:
    """Raises InvalidInput when a run does not fit a worker's memory, or the sweep the hours it may take."""
    profile = plan.machine.profile
    worst = max(plan.runs, key=lambda run: run.cost.memory_gb)
    if worst.cost.memory_gb > profile.memory_gb > 0:
        way_out = smallest(worst.spec, profile.of(worst.spec.size))
        raise InvalidInput(
            f"{worst.spec.arm} {worst.spec.size} needs about {worst.cost.memory_gb:.1f} GB a worker, profile "
            f"{profile.name} has {profile.memory_gb:.1f}: {way_out}; or lower train.batch in the sweep, leave the size "
            "out (SIZE=..), or use another --profile"
        )
    if max_hours is not None and plan.hours > max_hours:
        raise InvalidInput(
            f"--max-hours {max_hours:g}: {len(plan.runs)} runs need about {plan.hours:.3g} hours on "
            f"{plan.machine.workers} {profile.name} worker(s); take fewer sizes or arms, or allow more"
        )


def smallest(spec: RunSpec, profile: Profile) -> str:
    """The fewest devices like this on which a run fits, as the keys of a profile's size."""
    devices = [1] if profile.device != "cuda" else [2**k for k in range(_MOST_DEVICES.bit_length())]
    for count, recompute in itertools.product(devices, (False, True)):
        share, rest = divmod(spec.train.batch, count)
        micro = share
        while not rest and micro:
            keys = {"strategy": "single" if count == 1 else "fsdp", "devices": count, "nodes": 1}
            candidate = replace(profile, **keys, micro_batch=micro, recompute=recompute)
            if (needed := memory(spec, candidate).total) <= profile.memory_gb:
                keys = {**keys, "micro_batch": micro, "recompute": recompute}
                said = ", ".join(f"{key}: {str(value).lower()}" for key, value in keys.items() if key != "nodes")
                return f"the smallest placement that fits is {{{said}}} ({needed:.1f} GB)"
            micro = micro // 2 if micro % 2 == 0 else 0
    return f"no placement of up to {devices[-1]} such devices fits"


def check_folder(runs_dir: Path, needed_gb: float) -> None:
    """Raises InvalidInput when the run folder cannot be written, or has less free space than the plan needs."""
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"{runs_dir}: cannot make this folder ({error.strerror}); name another") from error
    if not os.access(runs_dir, os.W_OK | os.X_OK):
        raise InvalidInput(f"{runs_dir}: this folder is not writable; name another")
    probe = runs_dir / f".writable.{os.getpid()}"
    try:
        probe.write_bytes(b"\0" * 4096)
    except OSError as error:
        raise InvalidInput(f"{runs_dir}: cannot write there ({error.strerror}); name another folder") from error
    finally:
        probe.unlink(missing_ok=True)
    free = shutil.disk_usage(runs_dir).free / 1e9
    if free < needed_gb:
        raise InvalidInput(
            f"{runs_dir}: {free:.2f} GB free, the plan needs about {needed_gb:.2f}; make room or name another folder"
        )


def as_rows(plan: Plan) -> list[dict[str, Any]]:
    """The plan as `plan --json` prints it: the columns of runs.csv that are known before, and the price."""
    return [
        {
            "sweep": plan.sweep.name,
            **planned(run.spec),
            "memory_gb_per_gpu": round(run.cost.memory_gb, 3),
            "gpus": 0 if run.placement.device == "cpu" else run.cost.devices,
            "hours": run.cost.seconds / 3600,
            "gpu_hours": run.cost.device_seconds / 3600,
            "evaluation_flops": evaluation_flops(run.spec),
            "evaluation_hours": run.cost.evaluate_seconds / 3600,
            "tokens_per_s_assumed": run.cost.tokens_per_s,
            "disk_gb": round(run.cost.disk_gb, 4),
            "array": run.array,
        }
        for run in plan.runs
    ]


def as_table(plan: Plan) -> Table:
    """The plan for people."""
    table = Table(title=f"{plan.sweep.name}: {len(plan.runs)} runs, {len(plan.trunks)} trunks", title_justify="left")
    table.add_column("run", no_wrap=True)
    for name in ("embed", "text", "body", "head", "params", "FLOPs"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("images", "steps", "batch", "GB", "eval", "time", "array"):
        table.add_column(name, justify="right", no_wrap=True)
    for row, run in zip(as_rows(plan), plan.runs, strict=True):
        parts = [count(row[f"params_{part}"]) for part in ("embed", "text", "body", "head", "total")]
        table.add_row(
            row["run_id"], *parts, f"{row['train_flops']:.2e}", count(row["images"]), str(row["steps"]),
            str(row["batch"]), f"{row['memory_gb_per_gpu']:.1f}", duration(run.cost.evaluate_seconds),
            duration(run.cost.seconds), run.array,
        )  # fmt: skip
    return table


def totals(plan: Plan) -> str:
    """One line: what the whole sweep costs on this machine."""
    machine, hours = plan.machine, f"{plan.worker_hours:.3g}"
    rows = as_rows(plan)
    flops, measuring = (sum(row[f"{part}_flops"] for row in rows) for part in ("train", "evaluation"))
    unit = "core-hours" if machine.profile.device == "cpu" else "GPU-hours"
    return (
        f"{len(plan.runs)} runs in {len(plan.trunks)} trunks: {flops:.2e} training FLOPs and {measuring:.2e} to "
        f"evaluate, about {hours} "
        f"{unit}; {duration(plan.hours * 3600)} on {machine.workers} {machine.profile.name} worker(s), "
        f"{max(run.cost.memory_gb for run in plan.runs):.1f} GB memory each, {plan.disk_gb:.2f} GB disk"
    )


def count(value: float) -> str:
    """1234567 as 1.23M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def duration(seconds: float) -> str:
    """Seconds as people say them: 45s, 12m, 3h05m, 2d07h."""
    if seconds < 90:
        return f"{seconds:.0f}s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes}m"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours < 48 else f"{hours // 24}d{hours % 24:02d}h"
