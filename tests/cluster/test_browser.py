"""A real browser shows a mirrored run in MLflow's pages."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from conftest import lacking
from mlflow.tracking import MlflowClient

pytestmark = pytest.mark.cluster
# Quiet and offline: no profile, no updates, no sandbox (which root may not have).
_OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
_OPTIONS += ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
# Time as the page sees it: it stands still while a request is under way, so a loaded machine costs none of it.
_OPTIONS += ["--virtual-time-budget=60000"]


@pytest.fixture
def browser(tmp_path):
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        lacking("chromium")
    return [program, *_OPTIONS, f"--user-data-dir={tmp_path / 'profile'}"]


def test_the_experiments_page_lists_every_run_by_name(server, mirrored, browser, tmp_path):
    experiment = MlflowClient(server.uri).get_experiment_by_name("mini")
    assert experiment is not None
    names = {path.parent.name for path in mirrored.glob("*/record.json")}
    page = f"{server.uri}/#/experiments/{experiment.experiment_id}/runs"
    answer = subprocess.run([*browser, "--dump-dom", page], capture_output=True, text=True, timeout=240, check=False)
    text = re.sub(r"<(script|style).*?</\1>", "", answer.stdout, flags=re.DOTALL)
    shown = {name for name in names if re.search(rf">{re.escape(name)}<", text)}
    assert shown == names, answer.stderr[-2000:]
