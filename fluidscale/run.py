"""One run, from its spec to its record: data, training, evaluation, each resumed where it was left.

    python -m fluidscale.run runs/ID/spec.json --dir runs/ID

A record.json in the folder means that the run is done; running it again then costs nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fluidscale.folder import RunFolder, trunk_checkpoint, trunk_folder
from fluidscale.record import Placement, git_revision, read_json, row, write_atomic, write_json
from fluidscale.spec import InvalidInput, RunSpec, from_dict, run_spec_from_json, to_json

log = logging.getLogger("fluidscale.run")


def run(
    spec: RunSpec, run_dir: Path, placement: Placement | None = None, should_stop: Callable[[], bool] = lambda: False
) -> dict[str, Any] | None:
    """Computes what is missing of one run and returns its row; None where the placement leaves evaluation to another.

    A non-finite loss ends as a finished row with status `diverged`. Raises `Stopped` when `should_stop` said so, and
    whatever went wrong otherwise, after writing status `failed` with the reason.
    """
    placement = placement or Placement()
    folder = RunFolder(run_dir)
    if (record := folder.record) is not None:
        return record
    _claim(folder, spec, placement)
    with _logged(folder):
        from fluidscale.train.callbacks import Stopped

        try:
            return _compute(spec, folder, placement, should_stop)
        except (Stopped, KeyboardInterrupt) as error:
            folder.set_status("stopped", error=str(error) or "interrupted")
            raise
        except Exception as error:
            log.error("%s", traceback.format_exc())
            folder.set_status("failed", error=_one_line(error))
            raise


def _claim(folder: RunFolder, spec: RunSpec, placement: Placement) -> None:
    """Writes spec.json and placement.json; refuses a folder that holds another run."""
    folder.path.mkdir(parents=True, exist_ok=True)
    there = folder.path / "spec.json"
    if there.exists() and run_spec_from_json(there.read_text(), str(there)) != spec:
        raise InvalidInput(f"{there}: this folder holds another run; use a folder of its own for {spec.id}")
    write_atomic(there, to_json(spec))
    write_json(folder.path / "placement.json", dataclasses.asdict(placement))
    folder.set_status("running", phase="start", steps=spec.train.steps)


def _compute(
    spec: RunSpec, folder: RunFolder, placement: Placement, should_stop: Callable[[], bool]
) -> dict[str, Any] | None:
    import torch

    from fluidscale.data.sources import open_source
    from fluidscale.evaluate import Subject, evaluate
    from fluidscale.train.module import Diverged

    torch.set_num_threads(placement.threads)
    device = device_of(placement)
    source = open_source(spec, placement, folder.path.parent, device)
    status = "done"
    seconds, tokens_per_s = 0.0, None
    try:
        if not folder.weights.exists():
            _train(spec, folder, placement, source, should_stop)
        if not placement.evaluate:
            folder.set_status("trained", phase="evaluate", step=spec.train.steps)
            return None
        cost = read_json(folder.checkpoints / "cost.json") or {}
        seconds, tokens_per_s = cost["seconds"], cost["tokens_per_s"]
        folder.set_status("running", phase="evaluate")
        started = time.monotonic()
        model = load_weights(spec, folder).to(device)
        for score in evaluate(Subject(model, spec, source, folder.path, device)):
            log.info("%s = %.5g +- %.2g", score.metric.name, score.value, score.se)
        seconds += time.monotonic() - started
    except Diverged as error:
        log.warning("diverged: %s", error)
        status = "diverged"
    outcome = {
        "lr_decay_complete": status == "done",
        "gpu_hours": seconds / 3600,
        "tokens_per_s": tokens_per_s,
        "mfu": _mfu(spec, tokens_per_s, placement),
        "status": status,
        "git_rev": git_revision(),
        "versions": _versions(),
        **source.tokenizer.references,
    }
    record = row(spec, folder.path, outcome)
    write_json(folder.path / "record.json", record)
    folder.set_status(status, phase="end", step=spec.train.steps if status == "done" else folder.status.get("step", 0))
    return record


def _train(
    spec: RunSpec, folder: RunFolder, placement: Placement, source: Any, should_stop: Callable[[], bool]
) -> None:
    import lightning.pytorch as pl
    import torch
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from safetensors.torch import save

    from fluidscale.model.build import build
    from fluidscale.train.callbacks import Checkpoints, Monitor
    from fluidscale.train.checkpoint import NEWEST, PREVIOUS, AtomicCheckpointIO, newest_loadable
    from fluidscale.train.ema import EMA
    from fluidscale.train.module import Batches, FluidModule, trainer_options

    # Lightning sets its own level when imported; its hints and advertisements are not this run's log.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    runs = folder.path.parent
    folder.set_status("running", phase="data")
    rows = source.training()
    trunk = trunk_folder(runs, spec.trunk_id)
    own = [folder.checkpoints / NEWEST, folder.checkpoints / PREVIOUS]
    branches = sorted({*placement.branch_steps, spec.train.branch_step})
    shared = [trunk_checkpoint(trunk, step) for step in branches if step <= spec.train.branch_step]
    found = newest_loadable(own + shared, spec.train.steps)
    path, start = found or (None, 0)
    source = path.with_suffix(".jsonl") if path in shared else folder.metrics
    folder.keep_metrics(source, start)
    log.info("training from step %d of %d%s", start, spec.train.steps, f" ({path})" if path else "")

    torch.manual_seed(spec.seed)
    module = FluidModule(spec, build(spec.model))
    ema, monitor = EMA(spec.train.ema_decay), Monitor(spec, folder)
    options = trainer_options(placement.precision, placement.device)
    trainer = pl.Trainer(
        **options,
        max_steps=spec.train.steps,
        callbacks=[ema, monitor, Checkpoints(spec, folder, trunk, placement, should_stop)],
        # Found inside a SLURM job, Lightning would requeue it and resume by itself: both have their owner already.
        plugins=[AtomicCheckpointIO(), LightningEnvironment()],
    )
    if start < spec.train.steps:
        trainer.fit(module, train_dataloaders=Batches(spec, rows, start), ckpt_path=path, weights_only=True)
    ema.copy_to(module.model)
    cost = {"seconds": monitor.seconds, "tokens_per_s": monitor.tokens_per_s}
    write_json(folder.checkpoints / "cost.json", cost)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in module.model.state_dict().items()}
    write_atomic(folder.weights, save(state))
    # The averaged weights are kept; the optimiser's state is of use to the trunk only, which keeps its own.
    for checkpoint in own:
        checkpoint.unlink(missing_ok=True)
    if spec.train.branch_step == branches[-1]:
        prune_trunk(trunk)


def prune_trunk(trunk: Path) -> None:
    """Keeps a trunk's newest checkpoint, from which a longer run can go on; called by the longest of its runs."""
    for checkpoint in sorted(trunk.glob("step-*.ckpt"))[:-1]:
        checkpoint.unlink(missing_ok=True)
        checkpoint.with_suffix(".jsonl").unlink(missing_ok=True)


def load_weights(spec: RunSpec, folder: RunFolder) -> Any:
    """The trained model with its averaged weights, in evaluation mode."""
    from safetensors.torch import load_file

    from fluidscale.model.build import build

    model = build(spec.model)
    try:
        model.load_state_dict(load_file(folder.weights))
    except Exception as error:
        raise InvalidInput(f"{folder.weights}: does not load ({_one_line(error)}); delete it to train again") from error
    return model.eval()


def load_trained(run_dir: Path) -> tuple[RunSpec, Any]:
    """Spec and model of a trained run's folder. Raises InvalidInput when it is not one."""
    folder = RunFolder(run_dir)
    if not folder.weights.exists():
        raise InvalidInput(f"{run_dir}: no trained weights ({folder.weights} is missing); run it first")
    path = run_dir / "spec.json"
    spec = run_spec_from_json(path.read_text(), str(path))
    return spec, load_weights(spec, folder)


def device_of(placement: Placement) -> Any:
    """The torch device of a placement; `auto` takes a GPU where there is one."""
    import torch

    if placement.device != "auto":
        return torch.device(placement.device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@contextmanager
def _logged(folder: RunFolder) -> Iterator[None]:
    """Log lines of this run go to its log.txt."""
    handler = logging.FileHandler(folder.path / "log.txt")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    package = logging.getLogger("fluidscale")
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        handler.close()


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _mfu(spec: RunSpec, tokens_per_s: float | None, placement: Placement) -> float | None:
    """Model FLOPs utilisation: what the run's formulas count, over what the device could have done."""
    if not placement.peak_flops or tokens_per_s is None:
        return None
    from fluidscale.flops import train_flops

    return train_flops(spec) / (spec.images * spec.model.num_tokens) * tokens_per_s / placement.peak_flops


def _versions() -> str:
    from importlib.metadata import version

    return " ".join(f"{name}={version(name)}" for name in ("fluidscale", "torch", "lightning", "numpy"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fluidscale.run", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("spec", type=Path, help="the run's spec.json (as `make plan` and the launcher write it)")
    parser.add_argument("--dir", type=Path, required=True, help="the run's folder; what it already holds is kept")
    parser.add_argument("--placement", type=Path, help="placement.json; default: this machine's GPU, else one thread")
    arguments = parser.parse_args(argv)
    try:
        if not arguments.spec.exists():
            raise InvalidInput(f"{arguments.spec}: no such file; `make plan` shows a sweep's runs")
        spec = run_spec_from_json(arguments.spec.read_text(), str(arguments.spec))
        content = read_json(arguments.placement) if arguments.placement else {}
        placement = from_dict(Placement, content or {}, str(arguments.placement))
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        record = run(spec, arguments.dir, placement)
    except InvalidInput as error:
        print(error, file=sys.stderr)
        return 2
    if record is not None:
        print(f"{record['status']}: {arguments.dir / 'record.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
