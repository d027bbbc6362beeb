"""One run, from its spec to its record: data, training, evaluation, each resumed where it was left.

    python -m fluidscale.run runs/ID/spec.json --dir runs/ID

A record.json in the folder means that the run is done; running it again then costs nothing. Ctrl-C and SIGTERM stop
the training after its step, with a checkpoint, and the same command continues; a second Ctrl-C ends at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluidscale.folder import RunFolder
from fluidscale.limits import InvalidInput, from_dict
from fluidscale.processes import deaf
from fluidscale.record import Placement, git_revision, is_full, read_json, row, write_atomic, write_json
from fluidscale.spec import RunSpec, to_json
from fluidscale.valid import read_run_spec

if TYPE_CHECKING:
    from fluidscale.data.sources import Source
    from fluidscale.evaluate import Subject
    from fluidscale.train.ranks import Ranks

log = logging.getLogger("fluidscale.run")
_POLL_SECONDS = 0.2


class Interrupted(BaseException):
    """Ctrl-C came a second time; no KeyboardInterrupt, of which Lightning makes an exit with an error."""


def run(
    spec: RunSpec, run_dir: Path, placement: Placement | None = None, should_stop: Callable[[], bool] = lambda: False
) -> dict[str, Any] | None:
    """Computes what is missing of one run and returns its row; None where the placement leaves evaluation to another.

    Each process of the placement calls this, and the first one alone writes files; where nobody has started them, this
    does. A non-finite loss ends as a finished row with status `diverged`. Raises `Stopped` when `should_stop` said so,
    and whatever went wrong otherwise, after writing status `failed` with the reason: of several processes the others
    then wait in vain, so whoever started them has to end them.
    """
    placement = placement or Placement()
    folder = RunFolder(run_dir)
    if (record := folder.record) is not None:
        return record
    from fluidscale.train.callbacks import Stopped
    from fluidscale.train.fit import check
    from fluidscale.train.ranks import is_started, join

    check(placement)
    ranks = join(placement, device_of(placement)) if is_started(placement) else None
    if ranks is not None and not ranks.leads:
        return _compute(spec, folder, placement, should_stop, ranks)
    _claim(folder, spec, placement)
    with _logged(folder):
        try:
            if ranks is None:
                return _start_processes(folder, placement, should_stop)
            return _compute(spec, folder, placement, should_stop, ranks)
        except (Stopped, Interrupted, KeyboardInterrupt) as error:
            log.info("%s", str(error) or "interrupted")
            folder.set_status("stopped", error=str(error) or "interrupted")
            raise
        except Exception as error:
            if is_full(error):
                folder.drop_ballast()
            log.error("%s", traceback.format_exc())
            folder.set_status("stopped" if is_full(error) else "failed", error=_one_line(error))
            raise


def _claim(folder: RunFolder, spec: RunSpec, placement: Placement) -> None:
    """Writes spec.json and placement.json; refuses a folder that holds another run."""
    folder.path.mkdir(parents=True, exist_ok=True)
    there = folder.path / "spec.json"
    if there.exists() and read_run_spec(there) != spec:
        raise InvalidInput(f"{there}: this folder holds another run; use a folder of its own for {spec.id}")
    write_atomic(there, to_json(spec))
    write_json(folder.path / "placement.json", dataclasses.asdict(placement))
    folder.open_for_writing(spec.trunk_id)
    folder.set_status("running", phase="start", steps=spec.train.steps)


def _start_processes(folder: RunFolder, placement: Placement, should_stop: Callable[[], bool]) -> dict[str, Any] | None:
    """Computes a run in a process a device of this machine; a request to stop is passed on to them."""
    from fluidscale.train.callbacks import Stopped

    if placement.nodes > 1:
        raise InvalidInput(f"{placement.nodes} nodes: start a task a device on each of them (srun), not one process")
    module, path = "fluidscale.run", folder.path
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={placement.devices}"]
    command += ["-m", module, str(path / "spec.json"), "--dir", str(path), "--placement", str(path / "placement.json")]
    with open(path / "processes.txt", "w") as output:
        # A terminal's Ctrl-C reaches them from here, as SIGTERM: torchrun would tell them a second time.
        with deaf(signal.SIGINT):
            processes = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            while processes.poll() is None:
                if should_stop():
                    processes.terminate()
                    processes.wait()
                time.sleep(_POLL_SECONDS)
        finally:
            processes.terminate()
            processes.wait()
    status = folder.status
    if (record := folder.record) is not None or status.get("state") == "trained":
        return record
    if status.get("state") == "stopped":
        raise Stopped(status.get("error"))
    raise RuntimeError(status.get("error") or f"its processes ended with {processes.returncode} ({output.name})")


def _compute(
    spec: RunSpec, folder: RunFolder, placement: Placement, should_stop: Callable[[], bool], ranks: Ranks
) -> dict[str, Any] | None:
    """Trains together with the run's other processes, then judges with them: each draws and looks at its share."""
    import torch

    from fluidscale.data.sources import open_source
    from fluidscale.train.fit import fit
    from fluidscale.train.module import Diverged

    torch.set_num_threads(placement.threads)
    source = open_source(spec, placement, folder.path.parent, device_of(placement))
    status = "done"
    try:
        if not ranks.agree(folder.weights.exists()):
            _rehearse(spec, folder, placement, source, ranks)
            if ranks.leads:
                folder.set_status("running", phase="data")
            fit(spec, folder, placement, source.training(), should_stop, ranks)
    except Diverged as error:
        log.warning("diverged: %s", error)
        status = "diverged"
    record = None
    _release(device_of(placement))
    if status == "diverged" or placement.evaluate:
        seconds = _judge(spec, folder, placement, source, ranks) if status == "done" else 0.0
        record = _record(spec, folder, placement, source, status, seconds) if ranks.leads else None
    elif ranks.leads:
        folder.set_status("trained", phase="evaluate", step=spec.train.steps)
    # Not after a fault: the others are then waiting elsewhere, and end with this process.
    ranks.barrier()
    return record


def _release(device: Any) -> None:
    """Gives back what training held of a GPU: it hangs in Lightning's cycles, and judges are about to be loaded."""
    import torch

    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _rehearse(spec: RunSpec, folder: RunFolder, placement: Placement, source: Source, ranks: Ranks) -> None:
    """Raises InvalidInput, before anything is trained, when the run's judges could not judge it."""
    import torch

    from fluidscale.evaluate import rehearse
    from fluidscale.model.build import build

    with torch.device("meta"):
        model = build(spec.model)
    rehearse(_subject(model, spec, folder, placement, source, ranks))


def _judge(spec: RunSpec, folder: RunFolder, placement: Placement, source: Source, ranks: Ranks) -> float:
    """Evaluates what was trained and returns the seconds that took."""
    from fluidscale.evaluate import evaluate

    if ranks.leads:
        folder.set_status("running", phase="evaluate")
    started, model = time.monotonic(), None
    for turn in range(placement.devices):
        # One of a node at a time: its host then holds the whole weights once.
        if ranks.rank % placement.devices == turn:
            model = load_weights(spec, folder).to(device_of(placement))
        ranks.barrier()
    for score in evaluate(_subject(model, spec, folder, placement, source, ranks)):
        if ranks.leads:
            log.info("%s = %.5g +- %.2g", score.metric.name, score.value, score.se)
    return time.monotonic() - started


def _subject(
    model: Any, spec: RunSpec, folder: RunFolder, placement: Placement, source: Source, ranks: Ranks
) -> Subject:
    from fluidscale.evaluate import Subject
    from fluidscale.evaluate.share import Share

    share = Share(ranks.rank, ranks.size, ranks.host)
    return Subject(model, spec, source, folder.path, device_of(placement), share=share, placement=placement)


def _record(
    spec: RunSpec, folder: RunFolder, placement: Placement, source: Source, status: str, seconds: float
) -> dict[str, Any]:
    """Writes the record of a run that is over, `seconds` of which went into its evaluation."""
    tokens_per_s, trainers, device_seconds = None, placement.processes, seconds * placement.processes
    if status == "done":
        cost = read_json(folder.checkpoints / "cost.json") or {}
        # Whoever evaluates may be fewer than trained.
        trainers = cost.get("processes", placement.processes)
        device_seconds, tokens_per_s = device_seconds + cost["seconds"] * trainers, cost["tokens_per_s"]
    outcome = {
        "lr_decay_complete": status == "done",
        "gpu_hours": device_seconds / 3600,
        "tokens_per_s": tokens_per_s,
        "mfu": _mfu(spec, tokens_per_s, placement.peak_flops * trainers),
        "status": status,
        "git_rev": git_revision(),
        "versions": _versions(),
        **source.tokenizer.references,
    }
    record = row(spec, folder.path, outcome)
    write_json(folder.path / "record.json", record)
    folder.set_status(status, phase="end", step=spec.train.steps if status == "done" else folder.status.get("step", 0))
    return record


def load_weights(spec: RunSpec, folder: RunFolder) -> Any:
    """The trained model with its averaged weights, in evaluation mode."""
    from fluidscale.model.build import load_model

    try:
        return load_model(spec.model, folder.weights)
    except Exception as error:
        raise InvalidInput(f"{folder.weights}: does not load ({_one_line(error)}); delete it to train again") from error


def load_trained(run_dir: Path) -> tuple[RunSpec, Any]:
    """Spec and model of a trained run's folder. Raises InvalidInput when it is not one."""
    folder = RunFolder(run_dir)
    if not folder.weights.exists():
        raise InvalidInput(f"{run_dir}: no trained weights ({folder.weights} is missing); run it first")
    spec = read_run_spec(run_dir / "spec.json")
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


def _mfu(spec: RunSpec, tokens_per_s: float | None, peak_flops: float) -> float | None:
    """Model FLOPs utilisation: what the run's formulas count, over what its devices could have done a second."""
    if not peak_flops or tokens_per_s is None:
        return None
    from fluidscale.flops import train_flops

    per_token = train_flops(spec) / (spec.images * spec.model.num_tokens)
    return per_token * tokens_per_s / peak_flops


def _versions() -> str:
    from importlib.metadata import version

    return " ".join(f"{name}={version(name)}" for name in ("fluidscale", "torch", "lightning", "numpy"))


class _Told:
    """Whether SIGTERM or Ctrl-C has come while it is open: the run then stops after its step, with a checkpoint."""

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> _Told:
        self._before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return bool(self.number)

    def _hear(self, number: int, _: Any) -> None:
        if self.number and number == signal.SIGINT:
            raise Interrupted
        self.number = number
        if number == signal.SIGINT:
            # Past Python's own buffers, in the middle of whose writing a signal may come.
            os.write(2, b"stopping after the step of training; Ctrl-C again ends at once\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fluidscale.run", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("spec", type=Path, help="the run's spec.json (as `make plan` and the launcher write it)")
    parser.add_argument("--dir", type=Path, required=True, help="the run's folder; what it already holds is kept")
    parser.add_argument("--placement", type=Path, help="placement.json; default: this machine's GPU, else one thread")
    arguments = parser.parse_args(argv)
    from fluidscale.train.callbacks import Stopped

    told = _Told()
    try:
        if not arguments.spec.exists():
            raise InvalidInput(f"{arguments.spec}: no such file; `make plan` shows a sweep's runs")
        spec, content = read_run_spec(arguments.spec), {}
        if arguments.placement is not None and (content := read_json(arguments.placement)) is None:
            raise InvalidInput(f"{arguments.placement}: no such file; leave --placement out for this machine's own")
        placement = from_dict(Placement, content, str(arguments.placement))
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        with told:
            record = run(spec, arguments.dir, placement, told)
    except InvalidInput as error:
        print(error, file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"{stopped}; the same command continues from there", file=sys.stderr)
        # Of several processes another may have been told.
        return 128 + (told.number or signal.SIGTERM)
    except Interrupted:
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 128 + signal.SIGINT
    # Of several processes the first one alone has something to say.
    if record is not None:
        print(f"{record['status']}: {arguments.dir / 'record.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
