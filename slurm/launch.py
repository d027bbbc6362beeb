"""Plan, run, watch and collect a sweep.

    python -m slurm.launch plan local                         what would run and what it would cost; spends nothing
    python -m slurm.launch submit local --size 50K,80K        train, evaluate, collect and fit what is missing of it
    python -m slurm.launch submit local --cluster slurm       the same on a SLURM cluster: submits and returns
    python -m slurm.launch status local --watch               one table of all runs
    python -m slurm.launch cancel local                       stop all of it, here and in SLURM's queue
    python -m slurm.launch collect local                      finished runs to results/local/runs.csv

A sweep is a name (sweeps/NAME.yaml) or a path. Ctrl-C stops cleanly and the same command continues; so does a launch
after any other death, a second launch beside the first shares the work, and finished runs are never trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from fluidscale.folder import RunFolder
from fluidscale.spec import InvalidInput
from fluidscale.sweep import load_sweep
from slurm import attempts, budget, claim, collect, layout, plan, scheduler, sizing, state_table, status
from slurm.live import Bars, PlainLines
from slurm.mirror import Mirror
from slurm.placement import CLUSTERS, choose

if TYPE_CHECKING:
    from slurm.local import Workers

FIT_LAWS = Path(__file__).resolve().parent.parent / "analysis" / "fit_laws.py"
_WATCH_SECONDS = 2.0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m slurm.launch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("plan", "submit", "status", "cancel", "collect"))
    parser.add_argument("sweep", metavar="SWEEP", help="a name of sweeps/, or the path of a sweep's YAML file")
    parser.add_argument("--size", default="all", help="sizes to keep, with commas between (166M,369M); default: all")
    parser.add_argument("--arm", default="all", help="arms to keep (continuous-random,discrete-raster); default: all")
    parser.add_argument("--cluster", choices=CLUSTERS, default="local", help="local: this machine; debug: this process")
    parser.add_argument("--profile", help="row of slurm/resources.yaml; default: what this machine has (GPU, then CPU)")
    parser.add_argument("--resources", type=Path, metavar="FILE", help="YAML with profiles of your own, by name")
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="run folders; default: runs")
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    parser.add_argument("--max-hours", type=float, metavar="H", help="refuse a plan that takes longer than this")
    parser.add_argument("--max-gpu-hours", type=float, metavar="H", help="submit: of the whole sweep, what it has used "
                        "and what --size and --arm leave out included; asks before it is passed, and workers keep to "
                        "it")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="submit: print what would go to sbatch; spend nothing")
    parser.add_argument("--retry-failed", action="store_true", help="submit: try runs again that failed")
    parser.add_argument("--watch", action="store_true", help="status: repeat until all runs are over")
    parser.add_argument("--json", action="store_true", help="plan, status: for programs")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    # What others may write, others may make us run: files are their owner's to write.
    os.umask(os.umask(0o022) | 0o022)
    commands = {"plan": _plan, "submit": _submit, "status": _status, "cancel": _cancel, "collect": _collect}
    try:
        return commands[arguments.command](arguments, _console())
    except InvalidInput as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (head, less) has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _console() -> Console:
    # Into a pipe or file a table keeps its full width instead of being cut to 80 columns.
    return Console() if sys.stdout.isatty() else Console(width=240)


def _load(arguments: argparse.Namespace) -> plan.Plan:
    sweep = load_sweep(arguments.sweep, arguments.size.split(","), arguments.arm.split(","))
    return plan.make_plan(sweep, choose(arguments.cluster, arguments.profile, arguments.resources))


def _plan(arguments: argparse.Namespace, console: Console) -> int:
    planned = _load(arguments)
    # A sweep too large for this machine is priced on the GPUs that it would need, unless it was asked for here.
    away = arguments.profile is None and not sizing.fits(planned)
    plans = sizing.elsewhere(planned.sweep) if away else [planned]
    for priced in plans:
        plan.check_budget(priced, arguments.max_hours)
    if arguments.json:
        print(json.dumps({"runs": plan.as_rows(plans[-1])}, indent=1))
        return 0
    console.print(plan.as_table(plans[-1]))
    if any(spec.data.world is None for spec in planned.sweep.runs):
        console.print(sizing.alternatives((spec.size, spec.model) for spec in planned.sweep.runs))
    if away:
        here = planned.machine.profile
        console.print(f"This machine's {here.memory_gb:.1f} GB a worker ({here.name}) hold no such run; on others:")
    for priced in plans:
        if priced.machine.profile.sizes:
            console.print(sizing.placements(priced))
        console.print(plan.totals(priced), highlight=False, soft_wrap=True)
    return 0


def _states(planned: plan.Plan, runs_dir: Path) -> list[status.RunState]:
    """Where every run stands by its files and, where tasks were submitted to SLURM, by its queue."""
    states = scheduler.reconcile(status.read_states(planned, runs_dir), runs_dir)
    status.write_back(states, runs_dir)
    return states


def _status(arguments: argparse.Namespace, console: Console) -> int:
    planned = _load(arguments)
    if arguments.json:
        states = _states(planned, arguments.runs)
        print(json.dumps({"runs": status.as_rows(states, plan.as_rows(planned))}, indent=1))
        return 0
    if not arguments.watch:
        states = _states(planned, arguments.runs)
        if console.is_terminal:
            console.print(state_table.as_table(states, planned.sweep.name, console.width))
        else:
            print(state_table.as_text(states, planned.sweep.name))
        return 0
    with Live(console=console, auto_refresh=False) as live:
        while True:
            states = _states(planned, arguments.runs)
            hint = Text("Ctrl-C ends the watching, not the runs", style="dim")
            drawn = state_table.as_table(states, planned.sweep.name, console.width, console.height)
            live.update(Group(drawn, hint), refresh=True)
            if all(state.state in status.OVER for state in states):
                return 0
            time.sleep(_WATCH_SECONDS)


def _cancel(arguments: argparse.Namespace, console: Console) -> int:
    from slurm.local import cancel, elsewhere

    if (arguments.size, arguments.arm) != ("all", "all"):
        raise InvalidInput("cancel stops a whole sweep; it takes no --size and no --arm (make: SIZE, ARM)")
    name = load_sweep(arguments.sweep).name
    stopped = cancel(arguments.runs, name) + scheduler.cancel(arguments.runs, name)
    left = elsewhere(arguments.runs, name)
    if stopped:
        console.print(f"{name}: {stopped} processes and tasks stopped")
    elif not left:
        console.print(f"{name}: nothing of it was running")
    for host, holders in left.items():
        print(f"{name}: still at work on {host}: {', '.join(holders)}; say the same there", file=sys.stderr)
    return 1 if left else 0


def _collect(arguments: argparse.Namespace, console: Console) -> int:
    planned = _load(arguments)
    states = _states(planned, arguments.runs)
    collected = collect.collect(planned.sweep, states, arguments.runs, arguments.results)
    for run_id, reason in collected.missing:
        console.print(f"not in the table: {run_id} ({reason})", highlight=False, markup=False, soft_wrap=True)
    _tell(collected, console)
    return 0


def _tell(collected: collect.Collected, console: Console) -> None:
    for run_id in collected.vanished:
        console.print(f"no longer in the table: {run_id} (not a finished run of this sweep here)", soft_wrap=True)
    console.print(f"{collected.rows} runs in {collected.table}", highlight=False, soft_wrap=True)


def _submit(arguments: argparse.Namespace, console: Console) -> int:
    planned = _load(arguments)
    planned.sweep.require_data()
    runs_dir = arguments.runs.resolve()
    plan.check_budget(planned, arguments.max_hours)
    if arguments.dry_run:
        return _dry_run(planned, runs_dir, arguments, console)
    missing = [run for run in planned.runs if RunFolder(runs_dir / run.spec.id).record is None]
    plan.check_folder(runs_dir, sum(run.cost.disk_gb for run in missing))
    plan.check_folder(arguments.results, 0)
    console.print(plan.totals(planned), highlight=False, soft_wrap=True)
    if len(missing) < len(planned.runs):
        console.print(f"{len(planned.runs) - len(missing)} of {len(planned.runs)} runs are finished already")
    if missing:
        hours = planned.machine.profile.max_gpu_hours if arguments.max_gpu_hours is None else arguments.max_gpu_hours
        others = _left_out(planned, arguments) if hours else []
        elsewhere = attempts.hours_spent(runs_dir / run_id for run_id in others)
        hours = budget.agreed(planned, _states(planned, runs_dir), hours, elsewhere=elsewhere)
        with Mirror(runs_dir) as mirror:
            code = _train(planned, arguments, hours, others, console, mirror)
            # The tracker is brought level while the laws are fitted.
            mirror.end()
            return _conclude(planned, runs_dir, arguments, console) if code is None else code
    return _conclude(planned, runs_dir, arguments, console)


def _left_out(planned: plan.Plan, arguments: argparse.Namespace) -> list[str]:
    """The sweep's runs that --size and --arm leave out: its budget is one for all."""
    if not planned.sweep.partial:
        return []
    mine = {run.spec.id for run in planned.runs}
    return [spec.id for spec in load_sweep(arguments.sweep).runs if spec.id not in mine]


def _train(
    planned: plan.Plan,
    arguments: argparse.Namespace,
    hours: float,
    others: Sequence[str],
    console: Console,
    mirror: Mirror,
) -> int | None:
    """Trains what is missing; an exit code when the sweep is not to be concluded now.

    `hours` is what the sweep may use, that of its runs in `others` included.
    """
    from slurm import local
    from slurm.job import work_here

    runs_dir = mirror.runs_dir
    launch_id = f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
    held = claim.take(layout.launch(runs_dir, launch_id), claim.facts_of_this_process(sweep=planned.sweep.name))
    assert held is not None
    try:
        queue = local.prepare(planned, runs_dir, launch_id, arguments.retry_failed, hours, others)
        if arguments.cluster == "debug":
            if number := work_here(queue):
                return _stopped(number, status.read_states(planned, runs_dir), console)
            return None
        if arguments.cluster == "slurm":
            from slurm.array import submit

            tasks = submit(planned, queue, _conclusion(arguments))
            console.print(_submitted(tasks, arguments.sweep), highlight=False, soft_wrap=True)
            return 0
        return _supervise(planned, local.Workers(planned.machine, queue), console, mirror)
    except budget.UsedUp as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        held.release()


def _dry_run(planned: plan.Plan, runs_dir: Path, arguments: argparse.Namespace, console: Console) -> int:
    """Prints what a submission would hand to sbatch, or to this machine's workers; writes nothing."""
    console.print(plan.totals(planned), highlight=False, soft_wrap=True)
    if arguments.cluster != "slurm":
        left = sum(RunFolder(runs_dir / run.spec.id).record is None for run in planned.runs)
        console.print(f"{left} runs to train here, on {planned.machine.workers} worker(s)", highlight=False)
        return 0
    from slurm.array import arrays
    from slurm.local import queue_of

    there: dict[scheduler.Work, scheduler.Task] = {}
    try:
        there = scheduler.live(runs_dir)
    except scheduler.NoScheduler as error:
        console.print(f"what is in the queue already is not known here ({error})", highlight=False, soft_wrap=True)
    queue = queue_of(planned, runs_dir, "dry-run")
    for array in arrays(planned, queue, there):
        print(f"\n{array.describe(queue.sweep)}")
    print("\nthen, after all of them: the tracker brought level, the table, the fit and the report")
    return 0


def _conclusion(arguments: argparse.Namespace) -> list[str]:
    """The arguments with which a sweep's last job concludes it, wherever it runs."""
    there = Path(arguments.sweep)
    words = ["collect", str(there.resolve()) if there.suffix in (".yaml", ".yml") else arguments.sweep]
    words += ["--size", arguments.size, "--arm", arguments.arm, "--cluster", arguments.cluster]
    words += ["--runs", str(arguments.runs.resolve()), "--results", str(arguments.results.resolve())]
    words += ["--profile", arguments.profile] if arguments.profile else []
    return words + (["--resources", str(arguments.resources.resolve())] if arguments.resources else [])


def conclude(argv: Sequence[str], folder: Path) -> int:
    """What a sweep's last job does: the tracker brought level, the table, the fit, the report; 1 when a run failed.

    The sweep is read as `folder`, where it was launched, has it; Python goes on from here.
    """
    arguments, here = _parser().parse_args(argv), Path.cwd()
    os.chdir(folder)
    try:
        planned = _load(arguments)
    finally:
        os.chdir(here)
    # A tracker that is down has warned; the files are the truth, and a later sync finds them.
    subprocess.run([sys.executable, "-m", "fluidscale.sync", str(arguments.runs)], check=False)
    return _conclude(planned, arguments.runs, arguments, _console())


def _submitted(tasks: Sequence[str], sweep: str) -> str:
    """What a submission did, and how to watch it."""
    watch = f"watch: make status SWEEP={sweep} CLUSTER=slurm; a last job collects, fits and reports"
    if not tasks:
        return f"nothing to submit: every unfinished run is in the queue already; {watch}"
    return f"submitted {len(tasks)} tasks: {tasks[0]} .. {tasks[-1]}; {watch}"


def _supervise(planned: plan.Plan, workers: Workers, console: Console, mirror: Mirror) -> int | None:
    from slurm import local

    number = planned.machine.workers
    view = Bars(number, console) if console.is_terminal else PlainLines(number, lambda line: print(line, flush=True))
    with local.catching_signals() as stop:
        try:
            with view as show:
                states = local.supervise(planned, workers, stop, show, mirror)
        except local.WorkersFail as error:
            print(error, file=sys.stderr)
            return 1
        if stop.times:
            mirror.patience = local.STOP_SECONDS
            return _stopped(stop.signum, states, console)
    return None


def _stopped(signum: int, states: list[status.RunState], console: Console) -> int:
    """Says what a signal left behind; the exit code of a program that it ended."""
    console.print(f"stopped: {status.tally(states)}. The same command continues from the last checkpoints.")
    return 128 + signum


def _conclude(planned: plan.Plan, runs_dir: Path, arguments: argparse.Namespace, console: Console) -> int:
    """Collects, fits and reports; 1 when a run failed or the fit did."""
    states = _states(planned, runs_dir)
    failed = [state for state in states if state.state not in status.FINISHED]
    code = 1 if failed else 0
    try:
        collected = collect.collect(planned.sweep, states, runs_dir, arguments.results)
    except InvalidInput as error:
        print(error, file=sys.stderr)
        code = 1
    else:
        _tell(collected, console)
        code = max(code, _fit(collected.table, console))
    for state in failed:
        log = runs_dir / state.planned.spec.id / "log.txt"
        print(f"{state.state}: {state.planned.spec.id}: {state.error} ({log})", file=sys.stderr)
    if failed:
        print("try failed runs again: --retry-failed (make: RETRY=1)", file=sys.stderr)
    return code


def _fit(table: Path, console: Console) -> int:
    """Fits the laws to the table, tells the verdicts and where the report is; 1 when the fit failed."""
    command = [sys.executable, str(FIT_LAWS), str(table), "--out", str(table.parent)]
    console.print("fitting the laws", highlight=False)
    fitted = subprocess.run(command, check=False, capture_output=True, text=True)
    if fitted.returncode:
        print(fitted.stderr, end="", file=sys.stderr)
        print(f"the fit failed; the table is whole. Again: {' '.join(command)}", file=sys.stderr)
        return 1
    for row in json.loads((table.parent / "laws.json").read_text())["verdicts"]:
        console.print(f"{row['verdict']:13s} {row['claim']}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"report: {table.parent / 'report' / 'index.html'}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
