"""A plan beyond one machine: on which GPUs, what each of them holds, and how many parameters a size could also have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from rich.table import Table

from fluidscale.flops import params
from fluidscale.spec import ModelSpec
from fluidscale.sweep import Sweep
from slurm.placement import choose
from slurm.plan import Plan, count, duration, make_plan

# Profiles of resources.yaml on which a sweep is priced that does not fit the machine at hand.
GPU_TABLES = ("a100", "h100")
_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9}


def fits(plan: Plan) -> bool:
    """Whether every run fits a worker's memory."""
    limit = plan.machine.profile.memory_gb
    return not limit or all(run.cost.memory_gb <= limit for run in plan.runs)


def elsewhere(sweep: Sweep) -> list[Plan]:
    """The sweep on the GPUs it would need."""
    return [make_plan(sweep, choose("slurm", name)) for name in GPU_TABLES]


def placements(plan: Plan) -> Table:
    """Per run: devices, how the model lies on them, and the memory, rate and hours that are assumed."""
    profile = plan.machine.profile
    share = profile.sustained_tflops / profile.peak_tflops
    title = f"{profile.name}: {profile.memory_gb:g} GB, {profile.peak_tflops:g} TFLOP/s, {share:.0%} of them reached"
    table = Table(title=f"{title} (MFU is assumed: see slurm/resources.yaml)", title_justify="left")
    table.add_column("run", no_wrap=True)
    held = ("weights", "gradients", "optimizer", "EMA", "activations", "GB")
    for name in ("GPUs", "sharding", "at once", *held, "tokens/s", "time", "GPU-hours"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in plan.runs:
        place, cost, memory = run.placement, run.cost, run.cost.memory
        at_once = place.micro_batch or run.spec.train.batch // place.processes
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.average, memory.activations, memory.total)
        table.add_row(
            f"{run.spec.arm} {run.spec.size}",
            str(cost.devices),
            place.strategy + (" + recompute" if place.recompute else ""),
            str(at_once),
            *(f"{part:.1f}" for part in parts),
            count(cost.tokens_per_s),
            duration(cost.seconds),
            f"{cost.device_seconds / 3600:,.0f}",
        )
    return table


def alternatives(models: Iterable[tuple[str, ModelSpec]]) -> Table:
    """Parameters against a size's name, and what they would be had an unverified choice been another; a row a head."""
    table = Table(title="parameters against the size's name, here and under other readings", title_justify="left")
    table.add_column("size", no_wrap=True)
    for name in ("tokens", "parameters", "here", *_READINGS):
        table.add_column(name, justify="right", no_wrap=True)
    distinct = {(size, model.token_kind): model for size, model in models}
    for (size, kind), model in distinct.items():
        named, total = float(size[:-1]) * _UNITS[size[-1]], params(model)["total"]
        others = [params(other)["total"] if (other := read(model)) else None for read in _READINGS.values()]
        differences = ["" if n is None else f"{n / named - 1:+.1%}" for n in (total, *others)]
        table.add_row(size, kind, count(total), *differences)
    return table


def _with_head(**keys: int) -> Callable[[ModelSpec], ModelSpec | None]:
    return lambda model: replace(model, head=replace(model.head, **keys)) if model.head else None


# Other models that a size's name could mean; None where there is no such model.
_READINGS: dict[str, Callable[[ModelSpec], ModelSpec | None]] = {
    "head of 6 blocks": _with_head(num_blocks=6),
    "head of width 1024": _with_head(width=1024),
    "head of width 1536": _with_head(width=1536),
    "positions in every layer": lambda model: replace(model, position="every_layer"),
}
