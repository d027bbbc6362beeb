"""What a SLURM task does without SLURM: how it stops, how it hands over, and which tasks share an array."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cheap_job import STEPS, cheap, plan_of, write_sweep
from submitit.slurm.slurm import _make_sbatch_string

from fluidscale.folder import RunFolder
from fluidscale.record import Placement, read_json, write_atomic, write_json
from fluidscale.spec import InvalidInput, RunSpec
from slurm import array, attempts, claim, launch, layout, local, scheduler
from slurm.array import Array
from slurm.job import load_queue
from slurm.placement import Machine, Profile, load_profile
from slurm.plan import Plan, make_plan
from slurm.scheduler import Task
from slurm.task import TrunkTask, cause_of


@pytest.fixture
def plan(tmp_path):
    return plan_of(write_sweep(tmp_path))


def task_of(plan: Plan, runs: Path) -> TrunkTask:
    queue = local.prepare(plan, runs, "launch", retry_failed=False)
    return TrunkTask(str(queue.path), list(queue.trunks)[:1], restarts={"requeue": 3}, execute=cheap)


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


def test_a_run_that_is_requeued_more_often_than_allowed_is_given_up_until_asked_for(plan, tmp_path):
    runs = tmp_path / "runs"
    task = task_of(plan, runs)
    for life in range(4):
        process = start(task, runs, restarts=life)
        made = len(steps(runs))
        wait_for(lambda made=made: len(steps(runs)) > made)
        os.kill(process.pid, signal.SIGUSR2)
        process.join(60)
        assert process.exitcode == 17
    process = start(task, runs, restarts=4)
    process.join(60)
    run_id = load_queue(Path(task.queue_path)).trunks[task.trunk_ids[0]][0]
    status = RunFolder(runs / run_id).status
    assert status["state"] == "failed" and "4 times by requeue, 3 are allowed" in status["error"]
    assert attempts.retries(attempts.read(RunFolder(runs / run_id))) == {"requeue": 4}
    # Asked for again by hand, it goes on where it was: a launch counts from nothing.
    queue = local.prepare(plan, runs, "another", retry_failed=True)
    again = start(TrunkTask(str(queue.path), task.trunk_ids, restarts={"requeue": 0}, execute=cheap), runs)
    again.join(60)
    assert again.exitcode == 0 and (runs / run_id / "record.json").exists()
    assert len([line for line in steps(runs) if run_id in line]) == STEPS, "a step was made twice"


@pytest.mark.parametrize(
    ("facts", "noticed", "cause"),
    [
        # As scontrol 22.05 says it at the moment of the signal.
        ({"JobState": "RUNNING", "PreemptTime": "2026-11-23T15:03:36", "Restarts": "0"}, True, "preemption"),
        ({"JobState": "RUNNING", "PreemptTime": "2026-11-23T15:03:36", "Restarts": "0"}, False, "preemption"),
        ({"JobState": "COMPLETING", "Restarts": "1", "EndTime": "Unknown"}, False, "requeue"),
        ({"JobState": "COMPLETING", "PreemptTime": "None", "Restarts": "0"}, False, "stopped"),
        ({"JobState": "RUNNING", "Restarts": "0", "EndTime": "SOON"}, True, "time_limit"),
        ({"JobState": "RUNNING", "Restarts": "0", "EndTime": "LATE"}, True, "requeue"),
        ({}, True, "requeue"),
        ({}, False, "stopped"),
    ],
)
def test_why_slurm_ends_a_job_is_what_slurm_says(facts, noticed, cause):
    ends = {"SOON": time.time() + 60, "LATE": time.time() + 3600}
    if (end := facts.get("EndTime")) in ends:
        facts = {**facts, "EndTime": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(ends[end]))}
    assert cause_of(facts, 0, noticed) == cause


def note(spec: RunSpec, run_dir: Path, placement: Placement, should_stop: Callable[[], bool]) -> None:
    """A job that only says on what it would be computed."""
    write_json(run_dir / "noted.json", dataclasses.asdict(placement))


@pytest.mark.parametrize("stage", ["whole", "train", "evaluate"])
def test_a_task_computes_on_what_it_was_submitted_with_whatever_is_launched_later(plan, tmp_path, monkeypatch, stage):
    profile = dataclasses.replace(load_profile("slurm"), device="cpu", strategy="ddp", devices=2, micro_batch=8)
    queue = local.prepare(make_plan(plan.sweep, Machine(profile, 2)), tmp_path, "launch", retry_failed=False)
    trunk, run_ids = next(iter(queue.trunks.items()))
    tasks: list[TrunkTask] = []
    monkeypatch.setattr(array, "_sbatch", lambda queue, array, given: tasks.extend(given))
    array._submit(queue, Array(profile, stage, ((trunk,),)))
    local.prepare(plan, tmp_path, "another", retry_failed=False)
    tasks[0].execute = note
    if stage == "evaluate":
        for run_id in run_ids:
            write_atomic(RunFolder(tmp_path / run_id).weights, b"there")
    process = start(tasks[0], tmp_path)
    process.join(60)
    for run_id in run_ids:
        noted = read_json(tmp_path / run_id / "noted.json") or {}
        assert noted["evaluate"] == (stage != "train") and noted["branch_steps"]
        assert {key: noted[key] for key in profile.placed} == profile.placed


def test_evaluation_in_jobs_of_its_own_waits_for_its_training_and_leaves_what_is_in_the_queue(plan, tmp_path):
    evaluation = {"minutes": 7, "threads": 2}
    profile = dataclasses.replace(load_profile("cpu"), trunks_per_task=2, evaluation=evaluation)
    plan = make_plan(plan.sweep, Machine(profile, 2))
    queue = local.prepare(plan, tmp_path, "launch", retry_failed=False)
    training, evaluating = array.arrays(plan, queue, {})
    assert (training.stage, evaluating.stage) == ("train", "evaluate") and training.tasks == evaluating.tasks
    assert [len(task) for task in training.tasks] == [2, 2]
    assert (evaluating.profile.minutes, evaluating.profile.threads) == (7, 2)
    after = array._after(queue, evaluating, [(training, "12")], {})
    assert after.after == "aftercorr:12" and after.parameters()["dependency"] == "aftercorr:12"
    # Trained trunks only lack their evaluation; those whose evaluation is in the queue lack nothing.
    first, second = list(queue.trunks)[:2]
    for run_id in queue.trunks[first]:
        write_atomic(RunFolder(tmp_path / run_id).weights, b"there")
    at_work = {("train", second, run_id): Task("9_1", "RUNNING") for run_id in queue.trunks[second]}
    there = at_work | {("evaluate", second, run_id): Task("10_1", "PENDING") for run_id in queue.trunks[second]}
    rest, its_evaluation, alone = array.arrays(plan, queue, there)
    assert set(sum(rest.tasks, ())) == set(sum(its_evaluation.tasks, ())) == set(queue.trunks) - {first, second}
    assert alone.stage == "evaluate" and alone.tasks == ((first,),)
    *_, waiting = array.arrays(plan, queue, at_work)
    assert array._after(queue, waiting, [], at_work).after == "afterany:9_1"


@pytest.mark.parametrize("apart", [False, True])
def test_a_trunk_in_the_queue_for_other_runs_is_submitted_again_after_them(plan, tmp_path, apart):
    profile = dataclasses.replace(load_profile("cpu"), evaluation={} if apart else None)
    plan = make_plan(plan.sweep, Machine(profile, 2))
    queue = local.prepare(plan, tmp_path, "launch", retry_failed=False)
    trunk, (shorter, _) = next(iter(queue.trunks.items()))
    stages = {"train": "9_1", "evaluate": "10_1"} if apart else {"whole": "9_1"}
    for run_id in (shorter, "of-another-sweep"):
        there = {(stage, trunk, run_id): Task(job, "PENDING") for stage, job in stages.items()}
        found = list(array.arrays(plan, queue, there))
        again = [array._after(queue, each, [], there) for each in found if (trunk,) in each.tasks]
        assert [each.tasks for each in again] == [((trunk,),)] * len(stages)
        assert again[0].after == "afterany:9_1", "it would find its trunk in another's hands, and end"
        # What need not wait does not.
        others = [each for each in found if (trunk,) not in each.tasks]
        assert others and not any(array._after(queue, each, [], there).after for each in others)
        if apart:
            new = [(again[0], "12")]
            assert array._after(queue, again[1], new, there).after == "afterok:12,afterany:10_1:9_1"
    # An older submission does not say which runs it has.
    there = {(stage, trunk, ""): Task(job, "PENDING") for stage, job in stages.items()}
    assert not any((trunk,) in each.tasks for each in array.arrays(plan, queue, there))


def test_a_dry_run_prints_what_sbatch_would_get_and_writes_nothing(tmp_path, capsys):
    sweep = write_sweep(tmp_path)
    (tmp_path / "own.yaml").write_text("slurm: {partition: a100, account: us, minutes: 30, evaluation: {minutes: 9}}")
    words = ["submit", str(sweep), "--cluster", "slurm", "--resources", str(tmp_path / "own.yaml"), "--dry-run"]
    before = sorted(tmp_path.rglob("*"))
    assert launch.main([*words, "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]) == 0
    said = capsys.readouterr().out
    for line in ("--partition=a100", "--account=us", "--array=0-3%4", "--time=30", "--time=9", "--signal=USR2@90"):
        assert f"#SBATCH {line}\n" in said
    # Where slurm.conf says JobRequeue=0, only what asks for it is put back into the queue.
    assert said.count("#SBATCH --requeue\n") == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_signals_that_come_before_python_hears_them_do_not_end_a_task():
    early = "import os, signal; [os.kill(os.getpid(), n) for n in (signal.SIGUSR2, signal.SIGTERM)]"
    assert subprocess.run(f"{array._DEAF_AT_FIRST} -c '{early}'", shell=True, check=False).returncode == 0


def test_a_job_finds_its_threads_and_its_allocators_settings(tmp_path):
    profile = dataclasses.replace(load_profile("slurm"), threads=3)
    setup = array._setup(tmp_path / "runs", profile)
    assert {"export OMP_NUM_THREADS=3", "export MALLOC_TRIM_THRESHOLD_=268435456"} < set(setup)


def test_a_launch_hands_on_where_the_cluster_and_its_queue_are_and_nothing_of_a_job_it_is_in(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SBATCH_TIMELIMIT", "SUBMITIT_EXECUTOR", "MASTER_PORT"):
        monkeypatch.setenv(name, "7")
    handed_on = {"SLURM_CONF", "SBATCH_ACCOUNT", "SBATCH_RESERVATION"}
    for name in (*handed_on, "SBATCH_PARTITION"):
        monkeypatch.setenv(name, "there")
    # The environment would win over a profile that names the same.
    profile = dataclasses.replace(load_profile("slurm"), partition="a100")
    with array._outside_any_job(profile):
        left = {name for name in os.environ if name.startswith(("SLURM", "SBATCH", "SUBMITIT", "MASTER"))}
        assert left == handed_on
    assert os.environ["SLURM_NTASKS"] == "7" and os.environ["SBATCH_PARTITION"] == "there"


def test_questions_to_slurm_do_not_depend_on_what_the_user_likes_to_see(monkeypatch):
    liked = ("SQUEUE_STATES", "SQUEUE_PARTITION", "SLURM_TIME_FORMAT", "SLURM_CLUSTERS", "SCANCEL_INTERACTIVE")
    for name in (*liked, "SLURM_CONF"):
        monkeypatch.setenv(name, "there")
    heard = {line.partition("=")[0] for line in scheduler._ask("env").splitlines()}
    assert "SLURM_CONF" in heard and not heard & set(liked)


@pytest.fixture
def queue_lines(monkeypatch):
    """The lines of a queue, as squeue prints them; scancel takes those of a job out."""
    lines: list[str] = []

    def ask(*command: str) -> str:
        if command[0] == "scancel":
            lines[:] = [line for line in lines if line.split("|")[0].partition("_")[0] not in command]
        return "\n".join(lines)

    monkeypatch.setattr(scheduler, "_ask", ask)
    return lines


def test_what_a_dead_launch_left_is_adopted_where_it_can_begin_and_else_cancelled(tmp_path, queue_lines):
    trunks = (("a",), ("b",))
    arrays = (trunks, trunks, (("c",),))
    whole, half, alone = (scheduler.announce(tmp_path, "s", "whole", tasks, {}) for tasks in arrays)
    for job_id, comment in (("7_0", whole), ("7_1", whole), ("8_0", half), ("8_1", half), ("9", alone)):
        queue_lines.append(f"{job_id}|PENDING|Priority|{comment}")
        if job_id != "8_1":
            write_atomic(layout.worker_logs(tmp_path) / f"{job_id}_submitted.pkl", b"there")
    scheduler.adopt(tmp_path)
    files = {path.stem: (read_json(path) or {})["job"] for path in layout.submissions(tmp_path).glob("*.json")}
    assert files == {whole: "7", alone: "9"}
    assert [line.partition("|")[0] for line in queue_lines] == ["7_0", "7_1", "9"]


def test_a_task_that_is_about_to_end_is_waited_for_where_it_matters(tmp_path, queue_lines, monkeypatch):
    comment = scheduler.announce(tmp_path, "s", "whole", (("mine",), ("other",)), {"mine": ["run"]})
    queue_lines += [f"7_0|COMPLETING|None|{comment}", f"7_1|COMPLETING|None|{comment}"]
    monkeypatch.setattr(scheduler.time, "sleep", lambda _: queue_lines.pop(0))
    assert scheduler.settled(tmp_path, {"mine"}).keys() == {("whole", "other", "")}


def test_the_last_job_reads_the_sweep_as_the_launch_did(tmp_path, monkeypatch, capsys):
    write_sweep(tmp_path)
    path = tmp_path / "relative.yaml"
    path.write_text((tmp_path / "cheap.yaml").read_text().replace(f"{tmp_path}/", ""))
    monkeypatch.chdir(tmp_path)
    words = ["submit", "relative.yaml", "--runs", "runs", "--results", "results"]
    arguments = launch._conclusion(launch._parser().parse_args(words))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert launch.conclude(arguments, tmp_path) == 1
    assert "no finished run of relative yet" in capsys.readouterr().err
    assert Path.cwd() == tmp_path / "elsewhere"


def test_sizes_with_a_placement_of_their_own_get_their_own_array(tmp_path):
    (tmp_path / "own.yaml").write_text("cpu: {sizes: {80K: {minutes: 7, threads: 3}}}")
    profile = load_profile("cpu", tmp_path / "own.yaml")
    path = write_sweep(tmp_path)
    path.write_text(path.read_text().replace("sizes: [50K]", "sizes: [50K, 80K]"))
    plan = make_plan(plan_of(path).sweep, Machine(profile, 2))
    trunks = list(dict.fromkeys(run.spec.trunk_id for run in plan.runs))
    profiles = {run.spec.trunk_id: plan.machine.profile.of(run.spec.size) for run in plan.runs}
    small, large = array._by_placement(profiles, trunks)
    assert small[0].threads == 1 and (large[0].minutes, large[0].threads) == (7, 3)
    assert len(small[1]) == len(large[1]) == len(trunks) / 2 and set(small[1] + large[1]) == set(trunks)
    assert {run.placement.threads for run in plan.runs if run.spec.size == "80K"} == {3}


def test_a_misspelt_key_of_a_size_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "own.yaml").write_text("cpu: {sizes: {80K: {minuets: 7}}}")
    with pytest.raises(InvalidInput, match="did you mean 'minutes'"):
        load_profile("cpu", tmp_path / "own.yaml")


def test_a_run_of_several_processes_gets_a_task_a_device():
    gpu = dataclasses.replace(load_profile("slurm"), strategy="fsdp", nodes=2, devices=8)
    parameters = Array(gpu, "train", (("a",),)).parameters()
    assert (parameters["nodes"], parameters["ntasks_per_node"], parameters["gpus_per_node"]) == (2, 8, 8)
    # The death of one process must end the others, which wait for it in the middle of a step.
    assert "--kill-on-bad-exit=1" in parameters["srun_args"]


def test_what_a_profile_says_of_sbatch_wins_and_null_takes_away(plan, tmp_path, monkeypatch):
    kept = {"mem": "64G", "wckey": None, "cpus-per-task": 5, "requeue": None}
    laid = {**kept, "gres": "gpu:a100:8", "gpus-per-node": None}
    profile = dataclasses.replace(load_profile("slurm"), sbatch=laid)
    given = Array(profile, "whole", (("a",),)).parameters()
    text = _make_sbatch_string(command="", folder=tmp_path, **given)
    flags = {line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert {"mem=64G", "gres=gpu:a100:8", "cpus-per-task=5"} <= flags
    assert not {flag.partition("=")[0] for flag in flags} & {"wckey", "gpus-per-node", "requeue"}
    said = Array(profile, "whole", (("a",),)).describe("name").splitlines()
    assert {line.removeprefix("#SBATCH --") for line in said[1:]} - {"job-name=name"} <= flags
    # The last job computes on no GPU.
    jobs: list[Array] = []
    monkeypatch.setattr(array, "_sbatch", lambda queue, array, tasks: jobs.append(array))
    planned = make_plan(plan.sweep, Machine(profile, 2))
    array._submit_conclusion(planned, local.queue_of(planned, tmp_path, "launch"), [], set())
    assert jobs[0].profile.sbatch == kept


def test_no_gpu_is_asked_for_on_a_cpu_profile():
    gpu: Profile = load_profile("slurm")
    assert Array(gpu, "whole", (("a",),)).parameters()["gpus_per_node"] == 1
    assert "gpus_per_node" not in Array(load_profile("cpu"), "whole", (("a",),)).parameters()
