"""A run's folder: its state, its metrics and where everything else of it lies. Files are the truth."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluidscale.limits import from_dict
from fluidscale.processes import lives
from fluidscale.record import Placement, now, read_json, write_atomic, write_json

# A status, an attempt and the last lines of a log, in blocks of a usual file system.
_BALLAST_BYTES = 1 << 16


@dataclass(frozen=True)
class RunFolder:
    """runs/<id>/: spec.json placement.json status.json metrics.jsonl eval/ samples/ ckpt/ log.txt record.json."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "ckpt"

    @property
    def weights(self) -> Path:
        """The averaged weights of the finished training, safetensors."""
        return self.checkpoints / "ema.safetensors"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def record(self) -> dict[str, Any] | None:
        """The run's row; None while it is not finished."""
        return read_json(self.path / "record.json")

    @property
    def status(self) -> dict[str, Any]:
        return read_json(self.path / "status.json") or {}

    @property
    def placement(self) -> Placement:
        """Where the run was computed last; the default placement where that is not known."""
        path = self.path / "placement.json"
        return from_dict(Placement, read_json(path) or {}, str(path))

    def open_for_writing(self, trunk_id: str) -> None:
        """For the one process that computes the run: removes what dead writers left, and sets the ballast aside.

        The trunk's folder is cleaned before training only: while this run is evaluated, a sibling may write there.
        """
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        trunk = () if self.weights.exists() else (trunk_folder(self.path.parent, trunk_id),)
        for place in (self.checkpoints, *trunk):
            for partial in place.glob(".*.tmp"):
                if _is_being_written(partial):
                    continue
                shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
        if not self._ballast.exists():
            write_atomic(self._ballast, b"\0" * _BALLAST_BYTES)

    def drop_ballast(self) -> None:
        """Makes room on a full disk for the status that says so."""
        self._ballast.unlink(missing_ok=True)

    @property
    def _ballast(self) -> Path:
        return self.checkpoints / "ballast"

    def set_status(self, state: str, **facts: Any) -> None:
        """Overwrites status.json: keys keep their last value until they are set again."""
        content = {**self.status, "error": None, **facts, "state": state}
        content |= {"heartbeat": time.time(), "updated_at": now(), "pid": os.getpid(), "host": socket.gethostname()}
        write_json(self.path / "status.json", content)

    def append_metrics(self, line: dict[str, Any]) -> None:
        """One line of metrics.jsonl; a torn last line after a crash is dropped by `keep_metrics`."""
        with open(self.metrics, "a") as file:
            file.write(json.dumps(line) + "\n")

    def keep_metrics(self, source: Path, last_step: int) -> None:
        """Sets metrics.jsonl to the lines of `source` up to `last_step`: a resumed run repeats no step."""
        kept = []
        for line in source.read_text().splitlines() if source.exists() else ():
            try:
                if json.loads(line)["step"] <= last_step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):
                break
        write_atomic(self.metrics, "".join(line + "\n" for line in kept))


def _is_being_written(partial: Path) -> bool:
    """Whether the process whose number its name carries lives here; a folder of several processes carries none."""
    pid = partial.name.split(".")[-2]
    return pid.isdigit() and lives(int(pid))


def trunk_folder(runs: Path, trunk_id: str) -> Path:
    """Where the runs of one trunk leave its checkpoints for each other."""
    return runs / "trunks" / trunk_id


def trunk_checkpoint(folder: Path, step: int) -> Path:
    """The checkpoint at a branch point; the metrics up to there lie beside it with the ending .jsonl."""
    return folder / f"step-{step:08d}.ckpt"
