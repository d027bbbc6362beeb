"""What happens beside training: metrics and status as files, checkpoints by time and at branch points."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from fluidscale.folder import RunFolder, trunk_checkpoint
from fluidscale.record import Placement, write_atomic
from fluidscale.spec import RunSpec
from fluidscale.train.checkpoint import NEWEST
from fluidscale.train.module import Diverged, FluidModule
from fluidscale.train.optim import lr_at
from fluidscale.train.ranks import Ranks
from fluidscale.train.steps import AfterStep

LOG_EVERY = 25  # steps from one line of metrics.jsonl to the next
HEARTBEAT_SECONDS = 5.0


class Stopped(RuntimeError):
    """Training was asked to stop and has left a checkpoint."""


class Monitor(AfterStep):
    """Writes metrics.jsonl and status.json, and ends a run whose loss is no longer finite.

    Losses stay on the device between lines, so that no step waits for the one before. The time spent so far travels
    in the checkpoint, but only within one run: what a sibling spent on the shared trunk is the sibling's. Of several
    processes each holds its share of the losses until a line is written, and the first one writes it.
    """

    def __init__(self, spec: RunSpec, folder: RunFolder, ranks: Ranks) -> None:
        self._spec, self._folder, self._ranks = spec, folder, ranks
        self._losses: list[torch.Tensor] = []
        self._mark, self._beat = time.monotonic(), 0.0
        self.seconds, self.steps_timed = 0.0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark = time.monotonic()

    def after_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, FluidModule)
        self._losses.append(pl_module.take_loss())
        step = trainer.global_step
        if step % LOG_EVERY == 0 or step == self._spec.train.steps:
            self._write(step, pl_module)

    def _write(self, step: int, module: FluidModule) -> None:
        # Those of a checkpoint have come back on the CPU.
        losses = torch.stack([one.to(self._losses[-1].device) for one in self._losses])
        loss = self._ranks.sum(losses.float()).mean().item()
        elapsed, taken = time.monotonic() - self._mark, len(self._losses)
        self._mark += elapsed
        self._losses.clear()
        self.seconds += elapsed
        self.steps_timed += taken
        images_per_s = taken * self._spec.train.batch / max(elapsed, 1e-9)
        line = {
            "step": step,
            "images": step * self._spec.train.batch,
            "train_loss": loss if math.isfinite(loss) else None,
            "lr": lr_at(self._spec.train, step - 1),
            "grad_norm": float(module.grad_norm),
            "images_per_s": images_per_s,
            "time": time.time(),
        }
        if not math.isfinite(loss):
            raise Diverged(f"training loss is {loss} at step {step}")
        if not self._ranks.leads:
            return
        self._folder.append_metrics(line)
        if time.monotonic() - self._beat > HEARTBEAT_SECONDS:
            self._beat = time.monotonic()
            facts = {"step": step, "steps": self._spec.train.steps, "images_per_s": images_per_s, "loss": loss}
            self._folder.set_status("running", phase="train", **facts)

    @property
    def tokens_per_s(self) -> float | None:
        """Training throughput over the steps that this run itself made."""
        tokens = self.steps_timed * self._spec.train.batch * self._spec.model.num_tokens
        return tokens / self.seconds if self.seconds else None

    def state_dict(self) -> dict[str, Any]:
        own: dict[str, Any] = {"run_id": self._spec.id, "trunk_id": self._spec.trunk_id}
        own |= {"seconds": self.seconds, "steps_timed": self.steps_timed}
        # Of all processes: those that go on from here may be fewer or more.
        unwritten = list(self._ranks.sum(torch.stack(self._losses)).unbind()) if self._losses else []
        return {**own, "unwritten_losses": unwritten}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._losses = [loss if self._ranks.leads else loss * 0 for loss in state_dict["unwritten_losses"]]
        if state_dict["run_id"] == self._spec.id:
            self.seconds, self.steps_timed = state_dict["seconds"], state_dict["steps_timed"]


class OwnSignal(Callback):
    """Leaves SIGTERM to whom it belonged to before training.

    Lightning's handler speaks to the other processes from wherever this one is in its step: told at different moments,
    they wait for each other for ever. It also ends a step between two of its parts, before there is a checkpoint.
    """

    def __init__(self) -> None:
        self._handler = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Only the main thread may, and only there has Lightning taken it.
        if threading.current_thread() is threading.main_thread() and self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)


class Checkpoints(AfterStep):
    """Saves the newest state on a timer and by step, and the trunk's state wherever a sibling branches off.

    Several processes save together, so they agree after every step on whether they do.
    """

    def __init__(self, spec: RunSpec, folder: RunFolder, trunk: Path, placement: Placement,
                 should_stop: Callable[[], bool], ranks: Ranks) -> None:  # fmt: skip
        self._spec, self._folder, self._trunk, self._placement = spec, folder, trunk, placement
        self._should_stop, self._ranks = should_stop, ranks
        # Past its own branch step a run has left the trunk.
        self._branches = {s for s in (*placement.branch_steps, spec.train.branch_step) if s <= spec.train.branch_step}
        self._saved = time.monotonic()

    def after_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        if step in self._branches:
            path = trunk_checkpoint(self._trunk, step)
            if not self._ranks.agree(path.exists()):
                if self._ranks.leads:
                    write_atomic(path.with_suffix(".jsonl"), _read(self._folder.metrics))
                trainer.save_checkpoint(path)
        every = self._placement.checkpoint_steps
        late = time.monotonic() - self._saved > 60 * self._placement.checkpoint_minutes
        stopping, due = self._ranks.any(self._should_stop(), late)
        if step < self._spec.train.steps and (stopping or due or (every and step % every == 0)):
            trainer.save_checkpoint(self._folder.checkpoints / NEWEST)
            self._saved = time.monotonic()
        if stopping:
            if self._ranks.leads:
                # Attempts and the status table tell from here how far the run came.
                self._folder.set_status("running", step=step)
            raise Stopped(f"stopped at step {step}")


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
