"""What a launch leaves behind when its processes die, in every combination; on cheap jobs, then on real ones."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from cheap_job import STEPS, WORKERS, plan_of, write_sweep

from fluidscale.record import write_json
from slurm import claim, layout, local
from slurm.attempts import MAX_DEATHS, Attempt
from slurm.launch import main

DRIVER = Path(__file__).parent / "cheap_job.py"
PATIENCE = 240.0


class Launcher:
    """A launcher in a process group of its own, as a shell would start it."""

    def __init__(self, sweep: Path, runs: Path, *options: str) -> None:
        self.output = runs.parent / f"launcher-{time.monotonic_ns()}.txt"
        with open(self.output, "wb") as file:
            command = [sys.executable, str(DRIVER), str(sweep), str(runs), *options]
            self.process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)

    def wait(self) -> int:
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill_group()
            raise AssertionError(f"the launcher hangs:\n{self.output.read_text()}") from None

    def kill_group(self) -> None:
        """SIGKILL for the launcher and everything that it started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never comes to this"
        time.sleep(0.02)


@dataclass(frozen=True)
class CheapSweep:
    path: Path
    name: str
    trunks: list[list[str]]

    @property
    def run_ids(self) -> list[str]:
        return [run_id for trunk in self.trunks for run_id in trunk]


@pytest.fixture
def cheap_sweep(tmp_path):
    path = write_sweep(tmp_path)
    plan = plan_of(path)
    return CheapSweep(path, plan.sweep.name, [[run.spec.id for run in trunk] for trunk in plan.trunks])


@pytest.fixture
def runs(tmp_path):
    """A run folder; whatever still works there at the end of the test is killed."""
    folder = tmp_path / "runs"
    folder.mkdir()
    yield folder
    for pid in worker_pids(folder):
        local.send(pid, signal.SIGKILL)


def worker_pids(runs: Path) -> list[int]:
    return [facts["pid"] for path in layout.slots(runs) if (facts := claim.holder(path))]


def steps_made(runs: Path) -> list[tuple[float, int, str, int]]:
    path = runs / "steps.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(float(a), int(b), c, int(d)) for a, b, c, d in (line.split() for line in lines)]


def wait_for_steps(runs: Path, count: int) -> None:
    eventually(lambda: len(steps_made(runs)) >= count)


def chains(runs: Path) -> dict[str, str]:
    records = [json.loads(path.read_text()) for path in runs.glob("*/record.json")]
    return {record["run_id"]: record["chain"] for record in records}


def assert_whole(runs: Path, run_ids: list[str], repeated: int = 0) -> None:
    """Every run is finished with the result of an undisturbed one; at most `repeated` steps were made twice."""
    found = chains(runs)
    assert sorted(found) == sorted(run_ids)
    assert len(set(found.values())) == 1, "a run's result depends on how often it was interrupted"
    made = defaultdict(list)
    for _, _, run_id, step in steps_made(runs):
        made[run_id].append(step)
    assert all(set(steps) == set(range(1, STEPS + 1)) for steps in made.values())
    assert sum(len(steps) - STEPS for steps in made.values()) <= repeated


def test_undisturbed_each_run_has_one_process_and_trunks_go_in_order(cheap_sweep, runs):
    launcher = Launcher(cheap_sweep.path, runs)
    assert launcher.wait() == 0
    assert_whole(runs, cheap_sweep.run_ids)
    processes, first = defaultdict(set), {}
    for at, pid, run_id, _ in steps_made(runs):
        processes[run_id].add(pid)
        first.setdefault(run_id, at)
    assert all(len(pids) == 1 for pids in processes.values())
    assert len(set().union(*processes.values())) == WORKERS
    for trunk in cheap_sweep.trunks:
        assert [first[run_id] for run_id in trunk] == sorted(first[run_id] for run_id in trunk)
        assert len(set().union(*(processes[run_id] for run_id in trunk))) == 1
    assert not worker_pids(runs), "workers outlive their launch"


def test_a_killed_worker_is_replaced(cheap_sweep, runs):
    launcher = Launcher(cheap_sweep.path, runs)
    for count in (5, 30):
        wait_for_steps(runs, count)
        os.kill(worker_pids(runs)[0], signal.SIGKILL)
    assert launcher.wait() == 0
    assert_whole(runs, cheap_sweep.run_ids, repeated=2)


def test_workers_of_a_killed_launcher_are_adopted(cheap_sweep, runs):
    first = Launcher(cheap_sweep.path, runs)
    wait_for_steps(runs, 5)
    eventually(lambda: len(worker_pids(runs)) == WORKERS)
    orphans = set(worker_pids(runs))
    first.process.kill()
    first.process.wait()
    second = Launcher(cheap_sweep.path, runs)
    assert second.wait() == 0
    assert_whole(runs, cheap_sweep.run_ids)
    assert {pid for _, pid, _, _ in steps_made(runs)} == orphans, "the orphans' work was done by others"


def test_after_the_death_of_all_processes_the_sweep_goes_on(cheap_sweep, runs):
    draw = random.Random(0)
    for _ in range(3):
        launcher = Launcher(cheap_sweep.path, runs)
        wait_for_steps(runs, len(steps_made(runs)) + draw.randrange(1, 25))
        launcher.kill_group()
        eventually(lambda: not worker_pids(runs))
    assert Launcher(cheap_sweep.path, runs).wait() == 0
    assert_whole(runs, cheap_sweep.run_ids, repeated=3 * WORKERS)


def test_two_launches_at_once_share_the_cores_and_train_nothing_twice(cheap_sweep, runs):
    launchers = [Launcher(cheap_sweep.path, runs) for _ in range(2)]
    most = 0
    while any(launcher.process.poll() is None for launcher in launchers):
        most = max(most, len(worker_pids(runs)))
        time.sleep(0.05)
    assert [launcher.wait() for launcher in launchers] == [0, 0]
    assert_whole(runs, cheap_sweep.run_ids)
    assert most <= WORKERS


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_stops_workers_after_their_step_and_the_same_command_continues(cheap_sweep, runs, number, code):
    launcher = Launcher(cheap_sweep.path, runs)
    wait_for_steps(runs, 8)
    # As the terminal does it: every process of the group gets the signal.
    os.killpg(launcher.process.pid, signal.SIGINT) if number == signal.SIGINT else launcher.process.send_signal(number)
    asked = time.monotonic()
    assert launcher.wait() == code
    assert time.monotonic() - asked < 10
    assert not worker_pids(runs)
    states = [json.loads(path.read_text())["state"] for path in runs.glob("*/status.json")]
    assert "stopped" in states and not {"running", "failed"} & set(states)
    assert Launcher(cheap_sweep.path, runs).wait() == 0
    assert_whole(runs, cheap_sweep.run_ids)


def test_a_failed_run_says_why_and_stops_no_other(cheap_sweep, runs):
    broken = runs / cheap_sweep.run_ids[0]
    broken.mkdir()
    (broken / "crash").touch()
    launcher = Launcher(cheap_sweep.path, runs)
    assert launcher.wait() == 1
    assert sorted(chains(runs)) == sorted(cheap_sweep.run_ids[1:])
    assert json.loads((broken / "status.json").read_text())["error"] == "Crash: the last line"
    assert "first line" in (broken / "log.txt").read_text()
    assert "Crash: the last line" in launcher.output.read_text()
    made = len(steps_made(runs))
    (broken / "crash").unlink()
    assert Launcher(cheap_sweep.path, runs).wait() == 1, "a failed run was tried again unasked"
    assert len(steps_made(runs)) == made
    assert Launcher(cheap_sweep.path, runs, "--retry-failed").wait() == 0
    assert_whole(runs, cheap_sweep.run_ids)


def test_a_run_that_always_takes_its_process_along_is_given_up(cheap_sweep, runs):
    deadly = runs / cheap_sweep.run_ids[0]
    deadly.mkdir()
    (deadly / "vanish").touch()
    launcher = Launcher(cheap_sweep.path, runs)
    assert launcher.wait() == 1
    error = json.loads((deadly / "status.json").read_text())["error"]
    assert f"vanished {MAX_DEATHS} times" in error
    assert sorted(chains(runs)) == sorted(cheap_sweep.run_ids[1:])


def test_hours_that_are_used_up_end_the_launch_and_more_of_them_continue_it(cheap_sweep, runs):
    lived = Attempt("earlier", "", "node", started=0.0, devices=1, ended=3600.0, end="stopped")
    write_json(runs / cheap_sweep.run_ids[0] / "attempts.json", {"attempts": [asdict(lived)]})
    launcher = Launcher(cheap_sweep.path, runs, "--max-gpu-hours=0.5")
    assert launcher.wait() == 1
    said = launcher.output.read_text().splitlines()[-1]
    assert "the sweep has used 1 of its 0.5 GPU-hours; allow more: --max-gpu-hours" in said
    assert not steps_made(runs) and not worker_pids(runs)
    assert not list(layout.worker_logs(runs).glob("*")), "a worker was started for nothing"
    assert Launcher(cheap_sweep.path, runs, "--max-gpu-hours=2").wait() == 0
    assert_whole(runs, cheap_sweep.run_ids)


def test_workers_that_cannot_start_end_the_launch_with_their_reason(cheap_sweep, runs):
    launcher = Launcher(cheap_sweep.path, runs, "--unknown-job")
    assert launcher.wait() == 1
    said = launcher.output.read_text().splitlines()[-1]
    assert "workers end before they get anything done" in said and "No module named 'cheap_job'" in said


def test_cancel_stops_the_launcher_and_its_workers(cheap_sweep, runs):
    launcher = Launcher(cheap_sweep.path, runs)
    wait_for_steps(runs, 5)
    assert local.cancel(runs, "another") == 0 and launcher.process.poll() is None
    assert local.cancel(runs, cheap_sweep.name) >= 1
    assert launcher.wait() == 128 + signal.SIGTERM
    assert not worker_pids(runs)
    assert Launcher(cheap_sweep.path, runs).wait() == 0
    assert_whole(runs, cheap_sweep.run_ids)


def test_cancel_stops_orphans_too(cheap_sweep, runs):
    launcher = Launcher(cheap_sweep.path, runs)
    eventually(lambda: len(worker_pids(runs)) == WORKERS)
    launcher.process.kill()
    launcher.process.wait()
    assert local.cancel(runs, cheap_sweep.name) == WORKERS
    assert not worker_pids(runs)


def test_cancel_leaves_another_machines_processes_alone_and_names_them(cheap_sweep, runs, capfd):
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    facts = {"pid": bystander.pid, "host": f"{socket.gethostname()}-1", "sweep": cheap_sweep.name, "launch": "there"}
    slot = layout.slot(runs, 0)
    away = [layout.launch(runs, "there"), slot.with_name(f"{facts['host']}-0.lock")]
    held = [claim.take(path, facts) for path in away]
    try:
        assert main(["cancel", str(cheap_sweep.path), "--runs", str(runs)]) == 1
        line = f"{cheap_sweep.name}: still at work on {facts['host']}: there, {facts['host']}-0; say the same there\n"
        assert capfd.readouterr() == ("", line)
        assert bystander.poll() is None and layout.slots(runs) == []
    finally:
        bystander.kill()
        bystander.wait()
        for each in held:
            assert each is not None
            each.release()
    assert main(["cancel", str(cheap_sweep.path), "--runs", str(runs)]) == 0
    assert "nothing of it was running" in capfd.readouterr().out
