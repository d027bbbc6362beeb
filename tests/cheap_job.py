"""A job for the scheduler's tests: real files, real time, no training.

It counts its steps in a checkpoint, resumes from it, and notes every step that a process made, so that a test can see
whether two processes ever worked on one run. What ends up in its record depends on every step.

    python tests/cheap_job.py SWEEP RUNS      launches a sweep of such jobs on two workers
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cloudpickle

from fluidscale.folder import RunFolder
from fluidscale.record import Placement, now, planned, read_json, write_json
from fluidscale.spec import RunSpec
from fluidscale.sweep import load_sweep
from slurm import claim, layout, local
from slurm.live import PlainLines
from slurm.placement import Machine, load_profile
from slurm.plan import Plan, make_plan

STEPS, STEP_SECONDS, WORKERS = 12, 0.04, 2


SWEEP = """
sizes: [50K]
arms: [continuous-raster, discrete-random]
seeds: [0, 1]
images: [256, 512]
defaults:
  text_encoder: words
  data: {name: icons32, world: icons32, images_unique: 256}
  model: {aligner_depth: 1, text_vocab_size: 32, text_width: 32, text_length: 7}
  train: {lr: 1.0e-3, batch: 64, warmup_steps: 1, decay_fraction: 0.25, weight_decay: 0.02, beta1: 0.9, beta2: 0.95,
          grad_clip: 1.0, ema_decay: 0.99, text_drop: 0.1}
  evaluate:
    val_images: 16
    geneval_images_per_prompt: 0
    fd_images: 0
    sampling: {guidance_scale: 1.0, temperature: 1.0, num_inference_steps: 16}
by_token_kind:
  continuous:
    tokenizer: FOLDER/continuous.safetensors
    model: {head: {num_blocks: 2}}
  discrete: {tokenizer: FOLDER/discrete.safetensors}
by_order:
  random: {model: {mask_law: cosine}}
"""


def write_sweep(folder: Path) -> Path:
    """A sweep of eight runs in four trunks, whose tokenizers are named by cards of their own; returns its file."""
    for kind, channels, codes in (("continuous", 16, 0), ("discrete", 0, 512)):
        card = {"sha256": kind[0] * 64, "kind": kind, "grid": 4, "channels": channels, "vocab_size": codes}
        write_json(folder / f"{kind}.json", card)
    path = folder / "cheap.yaml"
    path.write_text(SWEEP.replace("FOLDER", str(folder)))
    return path


def plan_of(sweep: Path) -> Plan:
    return make_plan(load_sweep(str(sweep)), Machine(load_profile("cpu"), WORKERS))


class Crash(RuntimeError):
    """A run whose folder holds a file `crash` fails with this; one with `vanish` takes its process along."""


def cheap(spec: RunSpec, run_dir: Path, placement: Placement, should_stop: Callable[[], bool]) -> None:
    folder = RunFolder(run_dir)
    folder.set_status("running", phase="train", steps=STEPS)
    state = read_json(run_dir / "state.json") or {"step": 0, "chain": ""}
    while state["step"] < STEPS:
        time.sleep(STEP_SECONDS)
        step = state["step"] + 1
        state = {"step": step, "chain": hashlib.sha256(f"{state['chain']}{step}".encode()).hexdigest()}
        # Noted before it is kept: a death in between repeats the step, and loses no line that a test counts.
        with open(run_dir.parent / "steps.txt", "a") as file:
            file.write(f"{time.time():.4f} {os.getpid()} {spec.id} {step}\n")
        if (run_dir / "vanish").exists():
            # Before its state is kept: however often it starts, it never gets further.
            os._exit(9)
        write_json(run_dir / "state.json", state)
        folder.set_status("running", phase="train", step=step, steps=STEPS)
        if (run_dir / "crash").exists():
            raise Crash("first line\nthe last line")
        if should_stop():
            folder.set_status("stopped")
            raise RuntimeError("stopped")
    record = {**planned(spec), "status": "done", "chain": state["chain"], "gpu_hours": 0.0, "finished_at": now()}
    write_json(run_dir / "record.json", record)
    folder.set_status("done", step=STEPS)


def launch(sweep: Path, runs_dir: Path, *options: str) -> int:
    """As `python -m slurm.launch submit` on two CPU workers, without collecting; its exit codes.

    Options: --retry-failed; --max-gpu-hours=H; --unknown-job, with which no worker can import what it is to do.
    """
    import cheap_job

    if "--unknown-job" not in options:
        cloudpickle.register_pickle_by_value(cheap_job)
    plan = plan_of(sweep)
    launch_id = f"test-{os.getpid()}"
    held = claim.take(layout.launch(runs_dir, launch_id), claim.facts_of_this_process(sweep=plan.sweep.name))
    assert held is not None
    hours = [float(option.partition("=")[2]) for option in options if option.startswith("--max-gpu-hours=")]
    queue = local.prepare(plan, runs_dir, launch_id, "--retry-failed" in options, *hours)
    workers = local.Workers(plan.machine, queue, cheap_job.cheap)
    with local.catching_signals() as stop:
        states = local.supervise(plan, workers, stop, PlainLines(WORKERS, lambda line: print(line, flush=True)))
    held.release()
    if stop.times:
        return 128 + stop.signum
    return 1 if any(state.state == "failed" for state in states) else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(launch(Path(sys.argv[1]), Path(sys.argv[2]).resolve(), *sys.argv[3:]))
