"""The MLflow mirror beside a launch: a process of its own, whose death never touches training.

It ends by itself when the launcher is gone, however that died.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from slurm import claim, layout

# A mirror that dies is started again this often; then the sweep goes on without, and a later sync brings it level.
_STARTS = 3


class Mirror:
    """Runs `python -m fluidscale.sync RUNS --follow` while open; one mirror a run folder, whoever started it."""

    def __init__(self, runs_dir: Path) -> None:
        self.runs_dir = runs_dir
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self.patience = 120.0  # seconds that the mirror may take at the end to come level

    def __enter__(self) -> Mirror:
        return self

    def keep_alive(self) -> None:
        """Starts the mirror where none runs: at first, after its death, or when another launch took its own along."""
        if self._process is not None and self._process.poll() is None:
            return
        lock = layout.mirror(self.runs_dir)
        if self._starts >= _STARTS or claim.is_held(lock):
            return
        held = claim.take(lock, {})
        if held is None:
            return
        self._starts += 1
        log = layout.scheduler_dir(self.runs_dir) / "mirror.log"
        command = [
            sys.executable,
            "-m",
            "fluidscale.sync",
            str(self.runs_dir),
            "--follow",
            "--parent",
            str(os.getpid()),
        ]
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                # A session of its own: Ctrl-C must not reach it before the last files are mirrored.
                start_new_session=True,
                # The lock lives in the child: it is free the moment the child is dead.
                pass_fds=(held.descriptor,),
            )
        held.release()

    def end(self) -> None:
        """Asks the mirror to come level with the files and to end; it is waited for at the exit."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def __exit__(self, *_: Any) -> None:
        """Lets the mirror come level with the files, then ends it; one that hangs is killed."""
        self.end()
        if self._process is None:
            return
        try:
            self._process.wait(self.patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def is_remote(uri: str | None) -> bool:
    """Whether a tracking URI names a server, which any node may speak to; a database's may name its driver as well."""
    scheme = (uri or "").partition(":")[0].partition("+")[0]
    return scheme in ("http", "https", "databricks", "postgresql", "mysql")
