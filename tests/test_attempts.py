"""The lives of a run: retries counted apart, hours that include lost steps, and a budget that is asked about."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import cheap_job
import pytest
from cheap_job import cheap, plan_of, write_sweep

from fluidscale.folder import RunFolder
from fluidscale.record import read_json, write_json
from fluidscale.spec import InvalidInput
from fluidscale.sweep import load_sweep
from slurm import attempts, budget, claim, launch, layout, local, plan, status, task
from slurm.attempts import MAX_DEATHS, Attempt
from slurm.job import StopSignal, Worker, load_queue, work_here
from slurm.placement import load_profile


@pytest.fixture
def planned(tmp_path):
    return plan_of(write_sweep(tmp_path))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(cheap_job, "STEP_SECONDS", 0.0)


def lived(end: str, step: int = 0, launch: str = "one") -> Attempt:
    return Attempt(launch, "7_1", "node", started=1000.0, devices=2, ended=1060.0, end=end, step=step)


def test_an_attempt_that_nobody_closed_died_at_its_last_sign_of_life(tmp_path):
    folder = RunFolder(tmp_path / "run")
    attempts.opened(folder, "one", devices=4)
    folder.set_status("running", step=9)
    attempts.opened(folder, "one", devices=4)
    first, second = attempts.read(folder)
    assert (first.end, first.step, first.ended) == ("node_failure", 9, folder.status["heartbeat"])
    assert second.ended is None and second.end == ""
    attempts.closed(folder, "done")
    assert attempts.read(folder)[-1].end == "done"
    assert attempts.retries(attempts.read(folder)) == {"node_failure": 1}


def test_causes_are_bounded_apart_and_by_launch():
    mixed = [*3 * [lived("preemption")], *2 * [lived("node_failure", 5)], lived("node_failure", 6)]
    assert attempts.exhausted(mixed, "one", {"preemption": 3, "node_failure": 3}) is None
    assert "3 times by preemption, 2 are allowed" in (attempts.exhausted(mixed, "one", {"preemption": 2}) or "")
    assert "node_failure" in (attempts.exhausted(mixed, "one", {"preemption": 9, "node_failure": 2}) or "")
    assert attempts.exhausted(mixed, "another", {"preemption": 0}) is None


def test_deaths_at_one_step_are_a_fault_of_the_run_and_deaths_on_the_way_are_not():
    assert attempts.exhausted(MAX_DEATHS * [lived("node_failure", 5)], "one", {})
    on_the_way = [lived("node_failure", step) for step in range(MAX_DEATHS)]
    between = [*(MAX_DEATHS - 1) * [lived("node_failure", 5)], lived("preemption", 5), lived("node_failure", 5)]
    assert attempts.exhausted(on_the_way, "one", {}) is None and attempts.exhausted(between, "one", {}) is None


def test_hours_count_every_device_of_every_life():
    running = dataclasses.replace(lived(""), ended=None)
    assert attempts.seconds([lived("preemption"), lived("done")]) == 240.0
    assert attempts.seconds([lived("preemption"), running], heartbeat=1030.0) == 180.0
    assert attempts.seconds([running], heartbeat=0.0) == 0.0


def test_the_status_tells_hours_retries_and_the_age_of_the_heartbeat(planned, tmp_path):
    run = planned.runs[0]
    folder = RunFolder(tmp_path / run.spec.id)
    lives = [dataclasses.asdict(each) for each in (lived("preemption"), dataclasses.replace(lived(""), ended=None))]
    write_json(folder.path / "attempts.json", {"attempts": lives})
    folder.set_status("running", phase="train", step=1)
    write_json(folder.path / "status.json", {**folder.status, "heartbeat": time.time() - 30})
    [row, *_] = status.as_rows(status.read_states(planned, tmp_path), [{}] * len(planned.runs))
    assert row["retries"] == {"preemption": 1} and row["job"] == "7_1"
    assert row["heartbeat_age_seconds"] == pytest.approx(30, abs=5)
    assert row["gpu_hours_used"] == pytest.approx((120 + 2 * (time.time() - 30 - 1000)) / 3600, rel=1e-6)


def test_a_run_that_nobody_works_on_is_written_down_as_lost_and_one_that_began_again_is_not(planned, tmp_path):
    lost, busy = planned.runs[0], planned.runs[-1]
    assert lost.spec.trunk_id != busy.spec.trunk_id
    for run in (lost, busy):
        folder = RunFolder(tmp_path / run.spec.id)
        attempts.opened(folder, "one", devices=1)
        folder.set_status("running", step=3)
        write_json(folder.path / "status.json", {**folder.status, "pid": 2**22 + 1, "heartbeat": 1.0})
    states = status.read_states(planned, tmp_path)
    assert [state.state for state in states if state.planned in (lost, busy)] == ["lost", "lost"]
    held = claim.take(layout.trunk_claim(tmp_path, busy.spec.trunk_id), {})
    assert held is not None
    status.write_back(states, tmp_path)
    held.release()
    assert RunFolder(tmp_path / lost.spec.id).status["state"] == "lost"
    assert RunFolder(tmp_path / busy.spec.id).status["state"] == "running"
    assert attempts.read(RunFolder(tmp_path / lost.spec.id))[-1].end == "node_failure"
    # What was found lost goes on as if nobody had looked.
    work(planned, tmp_path)
    assert all(state.state == "done" for state in status.read_states(planned, tmp_path))


@pytest.mark.parametrize(("notice", "patience"), [(task.NOTICE_SECONDS, 70), (15, 10)])
def test_a_notice_gives_time_for_a_long_step_and_a_requeue_is_tried_until_it_is_heard(notice, patience):
    calls = []

    def requeue(number, _):
        calls.append(number)
        if len(calls) < 3:
            raise subprocess.CalledProcessError(1, "scontrol requeue")
        raise SystemExit(-1)

    before = signal.signal(signal.SIGUSR2, requeue)
    stop = task.SlurmStop(notice)
    try:
        signal.raise_signal(signal.SIGUSR2)
        assert stop() and patience - 5 < signal.getitimer(signal.ITIMER_REAL)[0] <= patience < notice
        with pytest.raises(SystemExit):
            stop.leave()
        assert calls == [signal.SIGUSR2] * 3
    finally:
        stop.close()
        signal.signal(signal.SIGUSR2, before)


def test_a_look_at_a_full_disk_leaves_no_trunk_claimed(planned, tmp_path, monkeypatch):
    lost = planned.runs[0]
    folder = RunFolder(tmp_path / lost.spec.id)
    attempts.opened(folder, "one", devices=1)
    folder.set_status("running", step=3)
    write_json(folder.path / "status.json", {**folder.status, "pid": 2**22 + 1, "heartbeat": 1.0})
    states = status.read_states(planned, tmp_path)
    full = OSError(errno.ENOSPC, "No space left on device")
    for owner, name in ((status.attempts, "bury"), (claim.Claim, "describe")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, raising(full))
            status.write_back(states, tmp_path)
        assert not claim.is_held(layout.trunk_claim(tmp_path, lost.spec.trunk_id))


def raising(error):
    def raise_it(*_, **__):
        raise error

    return raise_it


def test_a_live_mfu_is_of_all_devices(planned):
    placement = dataclasses.replace(planned.runs[0].placement, peak_flops=1e12, strategy="ddp", devices=2, nodes=2)
    one, four = (
        status.speed(SimpleNamespace(images_per_s=100.0, planned=dataclasses.replace(planned.runs[0], placement=where)))
        for where in (dataclasses.replace(placement, strategy="single", devices=1, nodes=1), placement)
    )
    assert one[0] == four[0] and one[1] == pytest.approx(4 * four[1])


def work(planned, runs, **options):
    queue = local.prepare(planned, runs, "work", retry_failed=False, **options)
    worker = Worker(queue, StopSignal(), cheap)
    for trunk_id in queue.trunks:
        worker.train(trunk_id)
    return worker


def test_a_run_that_stops_since_another_of_its_processes_was_told_first_has_not_failed(planned, tmp_path):
    queue, stop = local.prepare(planned, tmp_path, "work", retry_failed=False), StopSignal()
    run_dir = queue.run_dirs[0]
    for each in queue.run_dirs:
        write_json(each / "placement.json", {**(read_json(each / "placement.json") or {}), "devices": 2})

    def told_late(_spec, path, _placement, _should_stop):
        RunFolder(path).set_status("stopped", error="stopped at step 3")
        threading.Timer(0.3, signal.raise_signal, (signal.SIGTERM,)).start()
        raise RuntimeError("stopped at step 3")

    worker = Worker(queue, stop, told_late)
    try:
        worker.train(next(iter(queue.trunks)))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    folder = RunFolder(run_dir)
    assert worker.is_stopped() and folder.status["state"] == "stopped"
    assert [life.end for life in attempts.read(folder)] == ["stopped"]
    # No other run was begun: its processes would have waited for those that had heard.
    assert not any(attempts.read(RunFolder(other)) for other in queue.run_dirs[1:])


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_in_a_worker_of_this_process_is_a_stop_and_no_fault_of_the_run(planned, tmp_path, times):
    queue, before = local.prepare(planned, tmp_path, "work", retry_failed=False), signal.getsignal(signal.SIGINT)

    def as_lightning(spec, run_dir, placement, should_stop):
        try:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
            cheap(spec, run_dir, placement, should_stop if times == 1 else lambda: False)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            sys.exit(1)

    try:
        assert work_here(queue, as_lightning) == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is before and signal.getitimer(signal.ITIMER_REAL)[0] == 0
    finally:
        signal.signal(signal.SIGINT, before)
    first, *others = [RunFolder(run_dir) for run_dir in queue.run_dirs]
    assert first.status["state"] == "stopped" and attempts.read(first)[-1].end == "stopped"
    assert not any(attempts.read(other) for other in others)
    assert work_here(queue, cheap) == 0
    assert all(state.state == "done" for state in status.read_states(planned, tmp_path))


@pytest.mark.parametrize("devices", [1, 2])
def test_what_an_earlier_life_left_does_not_hide_a_failure(planned, tmp_path, devices):
    queue = local.prepare(planned, tmp_path, "work", retry_failed=False)
    folder = RunFolder(queue.run_dirs[0])
    folder.set_status("stopped", error="stopped at step 3")
    placement = folder.path / "placement.json"
    write_json(placement, {**(read_json(placement) or {}), "devices": devices})

    def breaks(*_):
        raise InvalidInput("no such placement")

    worker = Worker(queue, StopSignal(), breaks)
    with contextlib.suppress(InvalidInput):
        worker.train(next(iter(queue.trunks)))
    assert folder.status["state"] == "failed" and "no such placement" in folder.status["error"]
    assert attempts.read(folder)[-1].end == "error"


def test_a_budget_is_kept_to_while_it_lasts_and_the_sweep_goes_on_when_it_is_raised(planned, tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "_LOOK_SECONDS", 0.0)
    # Long beside what a busy machine adds to a run.
    monkeypatch.setattr(cheap_job, "STEP_SECONDS", 0.1)
    hours = 1.5 * cheap_job.STEPS * 0.1 / 3600
    worker = work(planned, tmp_path, max_gpu_hours=hours)
    assert worker.is_stopped()
    states = status.read_states(planned, tmp_path)
    stopped = [state for state in states if state.state == "stopped"]
    assert len(stopped) == 1 and "--max-gpu-hours" in (stopped[0].error or "")
    assert sum(state.state == "done" for state in states) < len(states) - 1
    assert hours <= attempts.hours_spent(worker.queue.run_dirs)
    monkeypatch.setattr(cheap_job, "STEP_SECONDS", 0.01)
    work(planned, tmp_path)
    assert all(state.state == "done" for state in status.read_states(planned, tmp_path))


def test_a_budget_that_would_be_passed_is_asked_about(planned, tmp_path):
    states = status.read_states(planned, tmp_path)
    needed = planned.worker_hours
    assert budget.agreed(planned, states, 0.0) == 0.0
    assert budget.agreed(planned, states, 1.01 * needed) == 1.01 * needed
    asked = []
    assert budget.agreed(planned, states, needed / 2, lambda question: not asked.append(question)) == 0.0
    assert "Go on without a bound?" in asked[0]
    with pytest.raises(InvalidInput, match=r"or allow more: --max-gpu-hours"):
        budget.agreed(planned, states, needed / 2, lambda _: False)
    # What was used counts, also when it was lost: here all of it by a run that is finished since.
    cheap(planned.runs[0].spec, tmp_path / planned.runs[0].spec.id, planned.runs[0].placement, lambda: False)
    write_json(
        tmp_path / planned.runs[0].spec.id / "attempts.json",
        {"attempts": [dataclasses.asdict(dataclasses.replace(lived("done"), ended=1000.0 + 3600 * needed))]},
    )
    with pytest.raises(InvalidInput):
        budget.agreed(planned, status.read_states(planned, tmp_path), 1.5 * needed, lambda _: False)


def test_in_the_launchers_own_process_used_up_hours_are_told(planned, tmp_path):
    queue = local.prepare(planned, tmp_path, "work", retry_failed=False, max_gpu_hours=0.5)
    hour = dataclasses.replace(lived("stopped"), ended=1000.0 + 3600 / 2)
    write_json(queue.run_dirs[0] / "attempts.json", {"attempts": [dataclasses.asdict(hour)]})
    with pytest.raises(budget.UsedUp, match=r"has used 1 of its 0.5 GPU-hours"):
        work_here(queue, cheap)
    assert not (tmp_path / "steps.txt").exists()


def test_a_budget_is_the_whole_sweeps_whatever_a_launch_leaves_out(tmp_path, capsys):
    path, runs = write_sweep(tmp_path), tmp_path / "runs"
    planned = plan_of(path)
    part = plan.make_plan(load_sweep(str(path), arms=["discrete-random"]), planned.machine)
    others = [run.spec.id for run in planned.runs if run not in part.runs]
    queue = local.prepare(part, runs, "part", False, max_gpu_hours=2.0, others=others)
    assert not load_queue(queue.path).budget.exceeded()
    hours = dataclasses.replace(lived("done"), ended=1000.0 + 3600)
    write_json(runs / others[0] / "attempts.json", {"attempts": [dataclasses.asdict(hours)]})
    assert load_queue(queue.path).budget.exceeded()
    words = ["submit", str(path), "--runs", str(runs), "--results", str(tmp_path / "results"), "--profile", "cpu"]
    assert launch.main([*words, "--arm", "discrete-random", "--max-gpu-hours", "2"]) == 2
    assert "2 GPU-hours are spent" in capsys.readouterr().err
    assert not list(runs.glob("*/log.txt"))


def test_a_script_is_refused_a_sweep_over_its_budget_before_anything_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    words = ["submit", str(write_sweep(tmp_path)), "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "r")]
    assert launch.main([*words, "--profile", "cpu", "--max-gpu-hours", "1e-9"]) == 2
    error = capsys.readouterr().err
    assert "--max-gpu-hours" in error and error.count("\n") == 1
    assert not list((tmp_path / "runs").glob("*/spec.json"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("restarts: {preemptions: 3}", "did you mean 'preemption'"),
        ("restarts: {preemption: -1}", "restarts: preemption: expected at least 0"),
        ("restarts: 5", "expected keys and values"),
        ("evaluation: {minuets: 5}", "did you mean 'minutes'"),
        ("sizes: {50K: {restarts: {nodes: 1}}}", "sizes: 50K: restarts"),
    ],
)
def test_misspelt_bounds_are_refused(tmp_path, line, message):
    (tmp_path / "own.yaml").write_text(f"slurm: {{{line}}}")
    with pytest.raises(InvalidInput, match=message):
        load_profile("slurm", tmp_path / "own.yaml")


def test_what_a_launch_writes_only_its_owner_may_write(tmp_path):
    before = os.umask(0)
    try:
        words = ["submit", str(write_sweep(tmp_path)), "--profile", "cpu", "--max-hours", "1e-9"]
        launch.main([*words, "--runs", str(tmp_path / "runs")])
        write_json(tmp_path / "written.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "written.json").stat().st_mode & 0o022 == 0
    assert read_json(tmp_path / "written.json") == {}
