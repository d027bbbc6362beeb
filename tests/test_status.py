"""What a run folder says, reconciled with who still lives."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
import time

import pytest
from cheap_job import STEPS, cheap, plan_of, write_sweep
from rich.console import Console

from fluidscale.folder import RunFolder
from fluidscale.record import write_json
from slurm import attempts, claim, launch, layout, plan, state_table, status
from slurm.live import Pace, PlainLines
from slurm.placement import Machine, load_profile


@pytest.fixture
def planned(tmp_path):
    return plan_of(write_sweep(tmp_path))


def state_of(planned, runs, run):
    return next(state for state in status.read_states(planned, runs) if state.planned is run)


def as_text(table, width=250):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_a_run_goes_from_planned_to_done(planned, tmp_path):
    run = planned.runs[0]
    folder = RunFolder(tmp_path / run.spec.id)
    assert state_of(planned, tmp_path, run).state == "planned"
    write_json(folder.path / "placement.json", {})
    assert state_of(planned, tmp_path, run).state == "queued"
    held = claim.take(layout.trunk_claim(tmp_path, run.spec.trunk_id), {})
    folder.set_status("running", phase="train", step=1, images_per_s=10.0)
    running = state_of(planned, tmp_path, run)
    assert running.state == "running" and running.step == 1
    left = (run.spec.train.steps - 1) * run.spec.train.batch / 10.0
    assert running.eta_seconds == pytest.approx(left + run.cost.evaluate_seconds)
    held.release()
    cheap(run.spec, folder.path, run.placement, lambda: False)
    assert state_of(planned, tmp_path, run).state == "done"


def test_what_was_finished_at_an_earlier_look_is_not_read_again(planned, tmp_path, monkeypatch):
    first, second = planned.runs[:2]
    cheap(first.spec, RunFolder(tmp_path / first.spec.id).path, first.placement, lambda: False)
    before = status.read_states(planned, tmp_path)
    read = []
    monkeypatch.setattr(status, "_read", lambda run, *_, of=status._read: read.append(run) or of(run, *_))
    cheap(second.spec, RunFolder(tmp_path / second.spec.id).path, second.placement, lambda: False)
    after = status.read_states(planned, tmp_path, before)
    assert first not in read and second in read
    assert [s.state for s in after[:2]] == ["done", "done"] and [s.planned for s in after] == list(planned.runs)


def test_a_run_whose_process_died_is_lost_not_running(planned, tmp_path):
    run = planned.runs[0]
    code = (
        "import sys; from pathlib import Path; from fluidscale.folder import RunFolder\n"
        "RunFolder(Path(sys.argv[1])).set_status('running', phase='train', step=3)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / run.spec.id)], check=True)
    lost = state_of(planned, tmp_path, run)
    assert lost.state == "lost" and lost.eta_seconds is None


def test_a_run_by_hand_counts_as_running_without_a_claim(planned, tmp_path):
    run = planned.runs[0]
    RunFolder(tmp_path / run.spec.id).set_status("running", phase="train")
    assert state_of(planned, tmp_path, run).state == "running"


@pytest.mark.parametrize(("age", "expected"), [(10.0, "running"), (status.SILENCE_SECONDS + 60, "lost")])
def test_a_run_of_another_machine_lives_by_its_heartbeat(planned, tmp_path, age, expected):
    run = planned.runs[0]
    folder = RunFolder(tmp_path / run.spec.id)
    folder.set_status("running", phase="train")
    there = {**folder.status, "host": "elsewhere", "heartbeat": time.time() - age}
    write_json(folder.path / "status.json", there)
    assert state_of(planned, tmp_path, run).state == expected


def test_the_table_shows_scores_errors_and_the_tally(planned, tmp_path):
    done, failed = planned.runs[0], planned.runs[1]
    cheap(done.spec, tmp_path / done.spec.id, done.placement, lambda: False)
    score = {"metric": "val_loss", "unit": "nats", "value": 1.23456, "se": 0.004, "n": 16, "protocol": "p"}
    write_json(tmp_path / done.spec.id / "eval" / "val_loss.json", score)
    RunFolder(tmp_path / failed.spec.id).set_status("failed", error="ValueError: told so")
    states = status.read_states(planned, tmp_path)
    assert status.tally(states) == f"1 done, 1 failed, {len(planned.runs) - 2} planned"
    text = as_text(state_table.as_table(states, "cheap"))
    assert "1.2346±0.0040" in text and "ValueError: told so" in text and done.spec.id in text
    rows = status.as_rows(states, plan.as_rows(planned))
    assert rows[0]["val_loss"] == 1.23456 and rows[0]["state"] == "done" and rows[0]["run_id"] == done.spec.id
    assert rows[1]["error"] == "ValueError: told so"
    json.dumps(rows, allow_nan=False)


def test_a_small_terminal_shows_whole_columns_and_the_runs_that_matter(planned, tmp_path):
    """Rich squeezes columns to nothing rather than leaving one out, and a live display is cut at the terminal's end."""
    RunFolder(tmp_path / planned.runs[-1].spec.id).set_status("failed", error="ValueError: told so")
    states = status.read_states(planned, tmp_path)
    assert len(states) > 3
    small = state_table.as_table(states, "cheap", width=100, height=10)
    text = as_text(small, width=100)
    assert max(map(len, text.splitlines())) <= 100 and f"of {len(states)} runs 3 shown" in text
    assert planned.runs[-1].spec.id in text and "failed" in text and "val loss" in text and "MFU" not in text
    assert planned.runs[0].spec.id in text and planned.runs[-2].spec.id not in text
    assert "MFU" in as_text(state_table.as_table(states, "cheap"))


def test_used_and_planned_hours_of_a_run_are_both_of_all_its_devices(tmp_path):
    profile = dataclasses.replace(load_profile("slurm"), device="cpu", strategy="ddp", devices=2, nodes=2, memory_gb=4)
    planned = plan.make_plan(plan_of(write_sweep(tmp_path)).sweep, Machine(profile, 1))
    run, price = planned.runs[0], planned.runs[0].cost
    started = time.time() - price.seconds
    life = attempts.Attempt("one", "7_1", "n1", started, run.placement.processes, 0, time.time(), "done", 12)
    folder = RunFolder(tmp_path / run.spec.id)
    write_json(folder.path / "attempts.json", {"attempts": [dataclasses.asdict(life)]})
    [state, *_] = status.read_states(planned, tmp_path)
    # It took as long as was planned: what is used is what was planned.
    assert state.device_seconds_used == pytest.approx(price.device_seconds, rel=0.01) == 4 * price.seconds
    [row, *_] = status.as_rows([state], plan.as_rows(planned)[:1])
    assert row["gpu_hours_used"] == pytest.approx(row["gpu_hours"], rel=0.01)
    planned_time = plan.duration(price.device_seconds)
    assert f"{planned_time}/{planned_time}" in as_text(state_table.as_table([state], "four processes a run"))
    # A run by hand, of which only its training's own clock is known.
    (folder.path / "attempts.json").unlink()
    write_json(folder.checkpoints / "cost.json", {"seconds": 60.0, "tokens_per_s": 1.0})
    assert status.read_state(run, tmp_path).device_seconds_used == 240.0


def test_plain_lines_tell_each_change_once(planned, tmp_path):
    lines = []
    show = PlainLines(2, lines.append)
    show(status.read_states(planned, tmp_path))
    assert lines == []
    run = planned.runs[0]
    RunFolder(tmp_path / run.spec.id).set_status("running", phase="train", step=1, steps=STEPS)
    for _ in range(3):
        show(status.read_states(planned, tmp_path))
    cheap(run.spec, tmp_path / run.spec.id, run.placement, lambda: False)
    show(status.read_states(planned, tmp_path))
    assert [line.split()[0] for line in lines] == ["running", "done"]


def test_the_time_spent_on_data_is_not_taken_for_the_pace_of_steps(planned, tmp_path, monkeypatch):
    now, pace = 0.0, Pace(2)
    monkeypatch.setattr("slurm.live.time.monotonic", lambda: now)
    run = planned.runs[0]
    pace.share_and_eta(status.read_states(planned, tmp_path))
    now = 500.0  # the data is ready
    pace.share_and_eta(status.read_states(planned, tmp_path))
    cheap(run.spec, tmp_path / run.spec.id, run.placement, lambda: False)
    now = 510.0
    share, eta = pace.share_and_eta(status.read_states(planned, tmp_path))
    assert 0 < share < 1 and eta == pytest.approx(10 * (1 - share) / share)


def test_status_of_a_cluster_s_runs_needs_none_of_its_commands(tmp_path, monkeypatch, capsys):
    """On a laptop that has mounted or copied the run folders."""
    sweep = write_sweep(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch.main(["status", str(sweep), "--cluster", "slurm", "--runs", str(tmp_path / "runs")]) == 0
    assert "planned" in capsys.readouterr().out
