"""The launcher's command line: it answers at once, refuses with one line, and collects without losing a row."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
import time

import cheap_job
import pytest
from cheap_job import cheap, plan_of, write_sweep

from fluidscale.folder import RunFolder
from fluidscale.record import write_json
from fluidscale.spec import InvalidInput
from fluidscale.sweep import load_sweep
from slurm import claim, collect, launch, layout, plan, status
from slurm.job import Queue, load_queue, read_job
from slurm.local import prepare


@pytest.fixture
def sweep(tmp_path):
    return write_sweep(tmp_path)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(cheap_job, "STEP_SECONDS", 0.0)


def finish(planned, runs, count):
    for run in planned.runs[:count]:
        cheap(run.spec, runs / run.spec.id, run.placement, lambda: False)


def collected(sweep, runs, results, **filters):
    loaded = load_sweep(str(sweep), **filters)
    planned = plan.make_plan(loaded, plan_of(sweep).machine)
    return collect.collect(loaded, status.read_states(planned, runs), runs, results)


def rows_of(table):
    return list(csv.DictReader(table.open()))


def test_a_plan_takes_under_two_seconds_of_cpu_and_no_torch(sweep):
    code = (
        "import sys, time; from slurm.launch import main\n"
        f"assert main(['plan', {str(sweep)!r}]) == 0\n"
        "assert not {'torch', 'pandas', 'submitit', 'mlflow'} & set(sys.modules), 'a heavy import'\n"
        "print(time.process_time())"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "8 runs in 4 trunks" in answer.stdout
    assert float(answer.stdout.split()[-1]) < 2


def test_the_plan_for_programs_has_the_tables_columns(sweep, capsys):
    assert launch.main(["plan", str(sweep), "--json", "--arm", "discrete-random"]) == 0
    rows = json.loads(capsys.readouterr().out)["runs"]
    assert len(rows) == 4
    known = "run_id sweep size token_kind order seed params_total train_flops memory_gb_per_gpu gpus hours array"
    assert set(known.split()) <= set(rows[0])
    assert {row["token_kind"] for row in rows} == {"discrete"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "nosuch"], "no sweep 'nosuch'"),
        (["plan", "SWEEP", "--size", "3K"], "SIZE=3K"),
        (["submit", "SWEEP", "--arm", "discrete-spiral"], "ARM=discrete-spiral"),
        (["plan", "SWEEP", "--profile", "cpus"], "did you mean 'cpu'"),
        (["submit", "SWEEP", "--max-hours", "1e-9"], "--max-hours"),
        (["submit", "SWEEP", "--runs", "/proc/runs"], "/proc/runs"),
        (["collect", "SWEEP", "--runs", "RUNS"], "no finished run"),
        (["cancel", "SWEEP", "--runs", "RUNS", "--size", "50K"], "takes no --size and no --arm"),
        (["cancel", "SWEEP", "--runs", "RUNS", "--arm", "discrete-random"], "takes no --size and no --arm"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(sweep, tmp_path, capsys, arguments, message):
    replaced = {"SWEEP": str(sweep), "RUNS": str(tmp_path / "none")}
    assert launch.main([replaced.get(argument, argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


def test_an_unknown_key_names_the_file_the_key_and_the_nearest(sweep, capsys):
    sweep.write_text(sweep.read_text().replace("grad_clip", "gradclip"))
    assert launch.main(["plan", str(sweep)]) == 2
    error = capsys.readouterr().err
    assert str(sweep) in error and "'gradclip'" in error and "'grad_clip'" in error


def test_a_full_run_folder_is_refused(sweep, tmp_path, capsys):
    full = tmp_path / "small"
    full.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(full)], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a small file system here")
    try:
        (full / "ballast").write_bytes(b"\0" * 2**16)
    except OSError:
        assert launch.main(["submit", str(sweep), "--runs", str(full), "--results", str(tmp_path)]) == 2
        assert "No space left" in capsys.readouterr().err
    else:
        assert launch.main(["submit", str(sweep), "--runs", str(full), "--results", str(tmp_path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    finally:
        subprocess.run(["umount", str(full)], check=True)


def test_a_table_has_a_row_a_finished_run_and_names_what_is_missing(sweep, tmp_path):
    planned, runs = plan_of(sweep), tmp_path / "runs"
    finish(planned, runs, 6)
    RunFolder(runs / planned.runs[6].spec.id).set_status("failed", error="ValueError: why")
    found = collected(sweep, runs, tmp_path / "results")
    rows = rows_of(found.table)
    assert found.rows == len(rows) == 6
    assert found.missing == ((planned.runs[6].spec.id, "failed: ValueError: why"), (planned.runs[7].spec.id, "planned"))
    for row, run in zip(rows, planned.runs, strict=False):
        record = RunFolder(runs / run.spec.id).record
        assert row["run_id"] == run.spec.id and row["sweep"] == "cheap"
        assert float(row["train_flops"]) == record["train_flops"], "a digit was lost"
        assert row["mfu"] == "", "what was not measured must be empty"
    assert (found.table.parent / "sweep.yaml").read_text() == sweep.read_text()


def test_a_filtered_collection_leaves_the_whole_table_alone(sweep, tmp_path):
    planned, runs = plan_of(sweep), tmp_path / "runs"
    finish(planned, runs, 8)
    whole = collected(sweep, runs, tmp_path / "results").table
    before = whole.read_bytes()
    part = collected(sweep, runs, tmp_path / "results", arms=["discrete-random"])
    assert part.table == tmp_path / "results" / "cheap" / "partial" / "runs.csv" and part.rows == 4
    assert whole.read_bytes() == before


def test_rows_that_vanish_from_a_table_are_named(sweep, tmp_path):
    planned, runs = plan_of(sweep), tmp_path / "runs"
    finish(planned, runs, 8)
    collected(sweep, runs, tmp_path / "results")
    (runs / planned.runs[0].spec.id / "record.json").unlink()
    assert collected(sweep, runs, tmp_path / "results").vanished == (planned.runs[0].spec.id,)


def test_the_sheet_of_the_largest_data_size_is_copied(sweep, tmp_path):
    planned, runs = plan_of(sweep), tmp_path / "runs"
    finish(planned, runs, 8)
    for run in planned.runs:
        for name in ("captions-1", "seen-2"):
            grid = runs / run.spec.id / "samples" / name / "grid.png"
            grid.parent.mkdir(parents=True)
            grid.write_text(f"{name} {run.spec.images} {run.spec.seed}")
    copied = collected(sweep, runs, tmp_path / "results").table.parent / "samples"
    assert sorted(path.name for path in copied.iterdir()) == ["continuous-raster-50K.png", "discrete-random-50K.png"]
    assert (copied / "discrete-random-50K.png").read_text() == "seen-2 512 0"


def test_a_queue_round_trips_and_a_changed_spec_is_refused(sweep, tmp_path):
    planned = plan_of(sweep)
    queue = prepare(planned, tmp_path, "one", retry_failed=False)
    assert load_queue(queue.path) == queue and isinstance(queue, Queue)
    assert list(queue.trunks.values()) == [[run.spec.id for run in trunk] for trunk in planned.trunks]
    run = planned.runs[0]
    spec, placement = read_job(tmp_path / run.spec.id)
    assert (spec, placement) == (run.spec, run.placement)
    path = tmp_path / run.spec.id / "spec.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 5'))
    with pytest.raises(InvalidInput, match="was changed"):
        read_job(path.parent)
    with pytest.raises(InvalidInput, match="another run"):
        prepare(planned, tmp_path, "two", retry_failed=False)


def test_a_trunk_at_work_keeps_its_placement_and_hears_of_new_branches(sweep, tmp_path):
    planned = plan_of(sweep)
    prepare(planned, tmp_path, "one", retry_failed=False)
    busy, idle = (group[0] for group in planned.trunks[:2])
    held = claim.take(layout.trunk_claim(tmp_path, busy.spec.trunk_id), {})
    sweep.write_text(sweep.read_text().replace("[256, 512]", "[256, 512, 1024]"))
    other = dataclasses.replace(planned.machine.profile, threads=3)
    again = plan.make_plan(load_sweep(str(sweep)), dataclasses.replace(planned.machine, profile=other))
    prepare(again, tmp_path, "two", retry_failed=False)
    placed = [read_job(tmp_path / run.spec.id)[1] for run in (busy, idle)]
    assert [placement.threads for placement in placed] == [1, 3]
    assert [len(placement.branch_steps) for placement in placed] == [3, 3]
    assert held is not None
    held.release()


def test_a_filtered_launch_takes_no_run_out_of_its_experiment(sweep, tmp_path):
    planned = plan_of(sweep)
    prepare(planned, tmp_path, "one", retry_failed=False)
    part = plan.make_plan(load_sweep(str(sweep), arms=["discrete-random"]), planned.machine)
    prepare(part, tmp_path, "two", retry_failed=False)
    members = json.loads((tmp_path / "sweeps" / "cheap.json").read_text())["runs"]
    assert sorted(members) == sorted(run.spec.id for run in planned.runs)


def test_a_claim_is_exclusive_and_ends_with_its_holder(tmp_path):
    path = tmp_path / "a.lock"
    code = (
        "import sys, time; from pathlib import Path; from slurm import claim\n"
        "held = claim.take(Path(sys.argv[1]), {'who': 'child'}); print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"held\n"
    assert claim.is_held(path) and claim.holder(path) == {"who": "child"} and claim.take(path, {}) is None
    child.kill()
    child.wait()
    deadline = time.monotonic() + 5
    while claim.is_held(path) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert claim.holder(path) is None
    mine = claim.take(path, {"who": "me"})
    assert mine is not None and claim.holder(path) == {"who": "me"}
    mine.release()
    assert not claim.is_held(path)


def test_asking_never_makes_a_claim_fail(tmp_path):
    """`is_held` takes the lock for an instant; whoever claims at that moment must get it all the same."""
    path = tmp_path / "a.lock"
    path.touch()
    code = "import sys; from pathlib import Path; from slurm import claim\nwhile True: claim.is_held(Path(sys.argv[1]))"
    asker = subprocess.Popen([sys.executable, "-c", code, str(path)])
    try:
        for _ in range(300):
            held = claim.take(path, {})
            assert held is not None
            held.release()
    finally:
        asker.kill()
        asker.wait()


def test_a_partial_record_is_never_a_finished_run(sweep, tmp_path):
    run = plan_of(sweep).runs[0]
    write_json(tmp_path / run.spec.id / "status.json", {"state": "running", "step": 3, "host": "x", "heartbeat": 0})
    (tmp_path / run.spec.id / ".record.json.7.tmp").write_text('{"status": "do')
    assert status.read_states(plan_of(sweep), tmp_path)[0].state == "lost"
