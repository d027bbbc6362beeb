"""What a SLURM task does without SLURM: how it stops, how it hands over, and which tasks share an array."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from cheap_job import STEPS, cheap, plan_of, write_sweep

from fluidscale.spec import InvalidInput
from slurm import array, claim, layout, local
from slurm.array import TrunkTask
from slurm.placement import Machine, Profile, load_profile
from slurm.plan import Plan, make_plan


@pytest.fixture
def plan(tmp_path):
    return plan_of(write_sweep(tmp_path))


def task_of(plan: Plan, runs: Path) -> TrunkTask:
    queue = local.prepare(plan, runs, "launch", retry_failed=False)
    return TrunkTask(str(queue.path), list(queue.trunks)[:1], restarts=3, execute=cheap)


def start(task: TrunkTask, runs: Path, restarts: int = 0) -> multiprocessing.Process:
    """A process as submitit starts it: whose handler of USR2 (here it only notes what it finds) ends it."""

    def requeue(*_: object) -> None:
        states = {path.parent.name: json.loads(path.read_text())["state"] for path in runs.glob("*/status.json")}
        (runs / "requeued.json").write_text(json.dumps(states))
        raise SystemExit(17)

    def process() -> None:
        os.environ["SLURM_RESTART_COUNT"] = str(restarts)
        signal.signal(signal.SIGUSR2, requeue)
        task()

    started = multiprocessing.get_context("fork").Process(target=process)
    started.start()
    return started


def steps(runs: Path) -> list[str]:
    path = runs / "steps.txt"
    return path.read_text().splitlines() if path.exists() else []


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_notice_stops_the_run_after_its_step_before_the_task_goes_back_into_the_queue(plan, tmp_path):
    runs = tmp_path / "runs"
    task = task_of(plan, runs)
    first = start(task, runs)
    wait_for(lambda: len(steps(runs)) >= 3)
    # SLURM sends both when it preempts.
    os.kill(first.pid, signal.SIGUSR2)
    os.kill(first.pid, signal.SIGTERM)
    first.join(60)
    assert first.exitcode == 17
    assert list(json.loads((runs / "requeued.json").read_text()).values()) == ["stopped"]
    made = len(steps(runs))
    again = start(task, runs, restarts=1)
    again.join(60)
    assert again.exitcode == 0
    assert len(steps(runs)) == 2 * STEPS > made, "a step was made twice"


def test_a_bare_sigterm_leaves_the_decision_to_slurm(plan, tmp_path):
    runs = tmp_path / "runs"
    process = start(task_of(plan, runs), runs)
    wait_for(lambda: len(steps(runs)) >= 3)
    os.kill(process.pid, signal.SIGTERM)
    wait_for(lambda: any(json.loads(p.read_text())["state"] == "stopped" for p in runs.glob("*/status.json")))
    process.join(1)
    assert process.is_alive(), "a job that ends by itself is not put back into the queue"
    # A preemption whose notice comes late is requeued all the same.
    os.kill(process.pid, signal.SIGUSR2)
    process.join(60)
    assert process.exitcode == 17


def test_a_requeued_task_waits_for_its_former_life_and_a_second_one_does_not(plan, tmp_path):
    runs = tmp_path / "runs"
    task = task_of(plan, runs)
    former = claim.take(layout.trunk_claim(runs, task.trunk_ids[0]), {})
    assert former is not None
    second = start(task, runs)
    second.join(60)
    assert second.exitcode == 0 and not steps(runs)
    requeued = start(task, runs, restarts=1)
    requeued.join(2)
    assert requeued.is_alive() and not steps(runs)
    # The forked processes have inherited the descriptor: closing it here would not free the lock.
    fcntl.flock(former.descriptor, fcntl.LOCK_UN)
    requeued.join(60)
    assert requeued.exitcode == 0 and len(steps(runs)) == 2 * STEPS


def test_a_task_that_is_started_again_and_again_is_given_up(plan, tmp_path):
    process = start(task_of(plan, tmp_path / "runs"), tmp_path / "runs", restarts=4)
    process.join(60)
    assert process.exitcode not in (0, None) and not steps(tmp_path / "runs")


def test_sizes_with_a_placement_of_their_own_get_their_own_array(tmp_path):
    (tmp_path / "own.yaml").write_text("cpu: {sizes: {80K: {minutes: 7, threads: 3}}}")
    profile = load_profile("cpu", tmp_path / "own.yaml")
    path = write_sweep(tmp_path)
    path.write_text(path.read_text().replace("sizes: [50K]", "sizes: [50K, 80K]"))
    plan = make_plan(plan_of(path).sweep, Machine(profile, 2))
    trunks = list(dict.fromkeys(run.spec.trunk_id for run in plan.runs))
    small, large = array._by_placement(plan, trunks)
    assert small[0].threads == 1 and (large[0].minutes, large[0].threads) == (7, 3)
    assert len(small[1]) == len(large[1]) == len(trunks) / 2 and set(small[1] + large[1]) == set(trunks)
    assert {run.placement.threads for run in plan.runs if run.spec.size == "80K"} == {3}


def test_a_misspelt_key_of_a_size_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "own.yaml").write_text("cpu: {sizes: {80K: {minuets: 7}}}")
    with pytest.raises(InvalidInput, match="did you mean 'minutes'"):
        load_profile("cpu", tmp_path / "own.yaml")


def test_no_gpu_is_asked_for_on_a_cpu_profile():
    gpu: Profile = load_profile("slurm")
    assert array._parameters(gpu)["gpus_per_node"] == 1
    assert "gpus_per_node" not in array._parameters(load_profile("cpu"))
