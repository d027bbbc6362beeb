"""Where runs go and what they will cost, before anything is spent."""

from __future__ import annotations

import dataclasses
import os

import pytest
from cheap_job import plan_of, write_sweep

from fluidscale.machine import available_cores, available_memory_gb
from fluidscale.spec import InvalidInput
from fluidscale.sweep import load_sweep, read_yaml
from slurm import cost, launch, placement, plan
from slurm.placement import RESOURCES, Machine, choose, load_profile


@pytest.fixture
def sweep(tmp_path):
    return load_sweep(str(write_sweep(tmp_path)))


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Puts an nvidia-smi on the PATH that answers as the real one does for two GPUs of 80 GB."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\necho "0, GPU-1111aaaa, 81559"\necho "1, GPU-2222bbbb, 81559"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tool


def test_every_profile_loads_and_an_unknown_one_names_the_nearest():
    for name in read_yaml(RESOURCES):
        assert load_profile(name).name == name
    with pytest.raises(InvalidInput, match="did you mean 'cuda'"):
        load_profile("cudda")


def test_profiles_of_ones_own_are_laid_over_the_shipped_ones(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("cpu: {checkpoint_minutes: 0.5}\nmine: {cluster: local, device: cpu}\nbad: 3\n")
    with pytest.raises(InvalidInput, match="bad: expected keys and values"):
        load_profile("cpu", own)
    own.write_text("cpu: {checkpoint_minutes: 0.5}\nmine: {cluster: local, device: cpu}\n")
    profile = load_profile("cpu", own)
    assert profile == dataclasses.replace(load_profile("cpu"), checkpoint_minutes=0.5)
    with pytest.raises(InvalidInput, match="mine: missing"):
        load_profile("mine", own)
    own.write_text("cpu: {thread: 2}\n")
    with pytest.raises(InvalidInput, match="did you mean 'threads'"):
        load_profile("cpu", own)


def test_without_a_gpu_there_is_a_one_thread_worker_a_core(monkeypatch):
    monkeypatch.setattr(placement, "cuda_devices", list)
    monkeypatch.setattr(placement, "has_mps", lambda: False)
    machine = choose("local", None)
    assert machine.profile.name == "cpu" and machine.workers == available_cores() and machine.profile.threads == 1
    assert 0 < machine.profile.memory_gb * machine.workers <= available_memory_gb() * 1.001


def test_the_cores_are_those_this_process_may_use():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_a_gpu_is_used_without_being_asked_and_left_alone_when_hidden(driver, monkeypatch):
    machine = choose("local", None)
    # Small models share a device: each gets its part of the memory, and every device is used before any of them again.
    shared = machine.profile.runs_per_device
    assert machine.profile.name == "cuda" and machine.gpus == (0, 1) * shared and machine.workers == 2 * shared
    assert machine.profile.memory_gb * shared == pytest.approx(85.5, abs=0.1)
    for visible, expected in (("1", (1,)), ("GPU-2222", (1,)), ("1,0", (0, 1))):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert choose("local", None).gpus == expected * shared
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose("local", None).profile.name in ("cpu", "mps")
    with pytest.raises(InvalidInput, match="no CUDA device"):
        choose("local", "cuda")


def test_no_run_at_all_on_a_device_is_refused(driver, tmp_path):
    (tmp_path / "own.yaml").write_text("cuda: {runs_per_device: 0}\n")
    with pytest.raises(InvalidInput, match=r"cuda: runs_per_device: expected at least 1, got 0"):
        choose("local", None, tmp_path / "own.yaml")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("threads: 0", r"cpu: threads: expected at least 1, got 0"),
        ("peak_tflops: 0", r"cpu: peak_tflops: expected above 0, got 0"),
        ("sustained_tflops: 0", r"cpu: sustained_tflops: expected above 0, got 0"),
        ("layer_seconds: -1", r"cpu: layer_seconds: expected at least 0, got -1"),
        ("checkpoint_minutes: soon", r"cpu: checkpoint_minutes: expected a number, got 'soon'"),
        ("micro_batch: -1", r"cpu: micro_batch: expected at least 0, got -1"),
        ("minutes: 0", r"cpu: minutes: expected at least 1, got 0"),
        ("recompute: 'no'", r"cpu: recompute: expected true or false, got 'no'"),
        ("device: gpu", r"cpu: device: unknown 'gpu'; .*known: cpu, cuda, mps"),
        ("precision: bf17", r"cpu: precision: unknown 'bf17'; did you mean 'bf16-mixed'"),
        ("cluster: Slurm", r"cpu: cluster: unknown 'Slurm'; did you mean 'slurm'"),
        ("strategy: zero", r"cpu: strategy: unknown 'zero'; .*known: single, ddp, fsdp"),
        ("sizes: {50k: {threads: 2}}", r"cpu: sizes: unknown key '50k'; did you mean '50K'"),
        ("sizes: {50K: 3}", r"cpu: sizes: 50K: expected keys and values, got 3"),
        ("sizes: {50K: {threads: 0}}", r"cpu: sizes: 50K: threads: expected at least 1, got 0"),
        ("evaluation: {threads: 0}", r"cpu: evaluation: threads: expected at least 1, got 0"),
        ("3: 4", r"cpu: unknown key '3'"),
    ],
)
def test_a_row_that_no_worker_can_have_is_one_clear_line(tmp_path, capsys, row, message):
    own = tmp_path / "own.yaml"
    own.write_text(f"cpu: {{{row}}}\n")
    with pytest.raises(InvalidInput, match=message):
        load_profile("cpu", own)
    assert launch.main(["plan", str(write_sweep(tmp_path)), "--profile", "cpu", "--resources", str(own)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_driver_that_does_not_answer_is_no_gpu(driver):
    driver.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert choose("local", None).profile.name in ("cpu", "mps")


def test_a_profile_of_another_cluster_is_refused():
    with pytest.raises(InvalidInput, match="not for --cluster local"):
        choose("local", "slurm")
    with pytest.raises(InvalidInput, match="not for --cluster slurm"):
        choose("slurm", "cpu")


def test_siblings_pay_for_their_trunk_once_and_know_each_others_branches(tmp_path):
    planned = plan_of(write_sweep(tmp_path))
    for shorter, longer in planned.trunks:
        steps = longer.spec.train.steps - shorter.spec.train.branch_step
        assert longer.cost.train_seconds / shorter.cost.train_seconds == pytest.approx(steps / shorter.spec.train.steps)
        branches = (shorter.spec.train.branch_step, longer.spec.train.branch_step)
        assert shorter.placement.branch_steps == longer.placement.branch_steps == branches


def test_workers_begin_with_different_tokenizers_then_take_what_costs_most():
    """Two that begin with the same one's tokens would wait for each other."""
    trunks = plan.make_plan(load_sweep("local"), Machine(load_profile("cpu"), 2)).trunks
    kinds = [trunk[0].spec.model.token_kind for trunk in trunks]
    costs = [sum(run.cost.seconds for run in trunk) for trunk in trunks]
    assert set(kinds[:2]) == {"continuous", "discrete"} and costs[0] == max(costs)
    assert costs[2:] == sorted(costs[2:], reverse=True) and costs[1] == max(
        price for price, kind in zip(costs, kinds, strict=True) if kind != kinds[0]
    )


def test_the_wall_time_is_that_of_the_busiest_worker(sweep):
    alone, pair, many = (plan.make_plan(sweep, Machine(load_profile("cpu"), workers)) for workers in (1, 2, 64))
    assert alone.hours == pytest.approx(alone.worker_hours)
    # Shared evenly, the halves may differ from half the whole in the last digit.
    assert alone.hours / 2 <= pair.hours * (1 + 1e-12) < alone.hours
    longest = max(sum(run.cost.seconds for run in trunk) for trunk in many.trunks)
    assert many.hours == pytest.approx(longest / 3600)


def test_memory_grows_with_the_batch_and_shrinks_with_precision(sweep):
    spec = sweep.runs[0]
    profile = load_profile("cpu")
    wide = dataclasses.replace(spec, train=dataclasses.replace(spec.train, batch=4096))
    assert cost.memory(wide, profile).total > 1.05 * cost.memory(spec, profile).total
    halved = dataclasses.replace(profile, precision="bf16-mixed")
    assert cost.memory(wide, halved).total < cost.memory(wide, profile).total


def test_a_budget_that_cannot_be_met_is_refused(sweep):
    planned = plan.make_plan(sweep, Machine(dataclasses.replace(load_profile("cpu"), memory_gb=0.5), 1))
    with pytest.raises(InvalidInput, match="GB a worker"):
        plan.check_budget(planned, None)
    planned = plan.make_plan(sweep, Machine(load_profile("cpu"), 1))
    plan.check_budget(planned, planned.hours * 1.01)
    with pytest.raises(InvalidInput, match="--max-hours"):
        plan.check_budget(planned, planned.hours / 2)


def test_a_folder_that_cannot_hold_the_runs_is_refused(tmp_path):
    plan.check_folder(tmp_path / "new" / "runs", 0.0)
    assert not list((tmp_path / "new" / "runs").iterdir()), "the check leaves something behind"
    with pytest.raises(InvalidInput, match="free, the plan needs about"):
        plan.check_folder(tmp_path, 1e9)
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match="Not a directory"):
        plan.check_folder(tmp_path / "file" / "runs", 0.0)
    with pytest.raises(InvalidInput, match=r"cannot make this folder|not writable"):
        plan.check_folder(tmp_path.__class__("/proc/runs"), 0.0)


def test_a_batch_is_micro_batches_times_devices_times_accumulation(sweep):
    spec, profile = sweep.runs[0], load_profile("slurm")
    assert spec.train.batch == 64
    four = dataclasses.replace(profile, strategy="ddp", nodes=2, devices=2)
    for micro_batch in (0, 1, 8, 16):
        placed = placement.place(spec, dataclasses.replace(four, micro_batch=micro_batch), (1,), {})
        assert placed.processes == 4 and placed.micro_batch == micro_batch and placed.strategy == "ddp"
    for wrong in ({"micro_batch": 3}, {"micro_batch": 32}, {"nodes": 3}):
        with pytest.raises(InvalidInput, match="whole number of accumulated steps"):
            placement.place(spec, dataclasses.replace(four, **wrong), (1,), {})
    with pytest.raises(InvalidInput, match="need strategy ddp or fsdp"):
        placement.place(spec, dataclasses.replace(profile, devices=2), (1,), {})


def test_further_parameters_of_sbatch_are_plain_and_none_that_the_launcher_relies_on(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("slurm: {sbatch: {mem: 64G, nice: 10, exclusive: true, wckey: null}}")
    assert load_profile("slurm", own).sbatch == {"mem": "64G", "nice": 10, "exclusive": True, "wckey": None}
    for wrong, said in (("sbatch: 64G", "expected keys and values"), ("sbatch: {mem: [64]}", "sbatch: mem: expected a"),
                        ("sbatch: {job-name: a}", "the launcher's to say"),
                        ("evaluation: {sbatch: {mem: {}}}", "evaluation: sbatch: mem: expected a")):  # fmt: skip
        own.write_text(f"slurm: {{{wrong}}}")
        with pytest.raises(InvalidInput, match=said):
            load_profile("slurm", own)
