"""A run's folder: what dead writers left goes, what a living one writes stays."""

import subprocess
import sys

import pytest

from fluidscale.folder import RunFolder, trunk_checkpoint, trunk_folder
from fluidscale.record import write_atomic

TRUNK = "trunk-0"


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


def unfinished(checkpoint, pid):
    path = checkpoint.with_name(f".{checkpoint.name}.{pid}.tmp")
    write_atomic(path, b"half")
    return path


def dead_pid():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_what_a_sibling_is_writing_into_the_trunk_stays(folder, tmp_path):
    branch = trunk_checkpoint(trunk_folder(tmp_path, TRUNK), 100)
    sibling = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        living = unfinished(branch, sibling.pid)
        folder.open_for_writing(TRUNK)
        assert living.exists()
    finally:
        sibling.kill()
        sibling.wait()
    folder.open_for_writing(TRUNK)
    assert not living.exists()


def test_only_who_trains_cleans_the_trunk(folder, tmp_path):
    # Another machine's process is none of this one's, and a folder that several processes write names none.
    left = [unfinished(trunk_checkpoint(trunk_folder(tmp_path, TRUNK), 100), dead_pid())]
    left.append(left[0].with_name(".step-00000200.ckpt.tmp"))
    left[1].mkdir()
    own = unfinished(folder.weights, dead_pid())
    write_atomic(folder.weights, b"trained")
    folder.open_for_writing(TRUNK)
    assert all(path.exists() for path in left) and not own.exists()
    folder.weights.unlink()
    folder.open_for_writing(TRUNK)
    assert not any(path.exists() for path in left)
