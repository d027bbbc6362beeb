"""The MLflow mirror of a folder of runs: written behind, from files, by a process that trains nothing.

What lies in runs/<id>/ is the truth; the mirror can be deleted and made again. One MLflow run per spec across all
restarts: its id, and how far it is level, are kept in the run folder's mlflow.json.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

# A server that is gone must cost seconds, not minutes (the client's defaults wait through many retries).
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

from mlflow.entities import LifecycleStage, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from fluidscale.folder import RunFolder
from fluidscale.record import flatten, read_json, write_json
from fluidscale.spec import InvalidInput, RunSpec, canonical
from fluidscale.valid import run_spec_from_json

log = logging.getLogger(__name__)
_BATCH = 1000  # MLflow's limit of metrics a request; requests are what is slow, not metrics
_PARAMS = 100  # MLflow's limit of parameters a request
_SENT = ("status.json", "metrics.jsonl", "eval")  # what tells that a run has something new; its end comes last
_SERVERS = ("http", "https", "databricks")  # schemes of stores that are spoken to through a server
# `lost` is written into a run's status by whoever finds its job gone.
_FINAL = {"done": "FINISHED", "diverged": "FINISHED", "failed": "FAILED", "stopped": "KILLED", "lost": "KILLED"}


def default_uri(runs: Path) -> str:
    """The sqlite database beside the runs."""
    return f"sqlite:///{(runs / 'mlflow' / 'mlflow.db').resolve()}"


def without_secrets(text: str) -> str:
    """A URI, or a message with some in it, without the names and passwords they carry."""
    return re.sub(r"://[^/@\s]+@", "://", text)


class Mirror:
    """Brings an MLflow store level with run folders; every call may raise what the client raises."""

    def __init__(self, runs: Path, tracking_uri: str | None = None) -> None:
        (runs / "mlflow").mkdir(parents=True, exist_ok=True)
        self.uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(runs)
        self._name = without_secrets(self.uri)  # which is written into run folders
        self._artifacts = (runs / "mlflow" / "artifacts").resolve().as_uri()
        self._experiments: dict[str, str] = {}
        self._there: set[str] = set()  # runs that the store was found to have
        self._level: dict[Path, list[Any]] = {}  # run folders, and their files' marks when the store was level

    @cached_property
    def _client(self) -> MlflowClient:
        # Made when it is needed: that of a database connects at once, and one that is down may be up at the next pass.
        return MlflowClient(self.uri)

    def experiment(self, name: str) -> str:
        """The experiment's id, made where it is missing."""
        if name not in self._experiments:
            found = self._client.get_experiment_by_name(name)
            # A server keeps artifacts where it was told to. A database keeps none: its client would put them below
            # whatever folder it was called in.
            place = None if self.uri.partition(":")[0] in _SERVERS else self._artifacts
            made = found.experiment_id if found else self._client.create_experiment(name, artifact_location=place)
            if found and found.lifecycle_stage == LifecycleStage.DELETED:
                # Its name is taken until it is gone for good.
                self._client.restore_experiment(made)
            self._experiments[name] = made
        return self._experiments[name]

    def push(self, run_dir: Path, sweep: str) -> bool:
        """Sends what the store lacks of one run; True when there was anything to send."""
        marks, kept = [_mark(run_dir / name) for name in _SENT], run_dir / "mlflow.json"
        # A pass over a thousand finished runs costs a thousand looks, not a thousand readings.
        if self._level.get(run_dir) == [*marks, _mark(kept)]:
            return False
        folder = RunFolder(run_dir)
        text = (run_dir / "spec.json").read_text()
        state = self._opened(folder, run_spec_from_json(text, str(run_dir)), sweep)
        changed = self._push_metrics(state, _lines_since(folder, state["time"]))
        changed |= self._push_scores(folder, state)
        changed |= self._push_end(folder, state)
        if changed:
            write_json(kept, state)
        self._level[run_dir] = [*marks, _mark(kept)]
        return changed

    def _opened(self, folder: RunFolder, spec: RunSpec, sweep: str) -> dict[str, Any]:
        state = read_json(folder.path / "mlflow.json")
        if state is not None and state["tracking_uri"] == self._name and self._has(state["run_id"]):
            return state
        experiment = self.experiment(sweep)
        same = f"tags.run_id = '{spec.id}'"
        found = self._client.search_runs([experiment], filter_string=same, max_results=1)
        run = found[0] if found else self._client.create_run(experiment, run_name=spec.id, tags={"run_id": spec.id})
        if not found:
            params = [Param(key, str(value)) for key, value in sorted(flatten(canonical(spec)).items())]
            for first in range(0, len(params), _PARAMS):
                self._client.log_batch(run.info.run_id, params=params[first : first + _PARAMS])
            tags = [RunTag("sweep", sweep), RunTag("arm", spec.arm), RunTag("size", spec.size)]
            self._client.log_batch(run.info.run_id, tags=tags)
        level = {"step": 0, "time": 0.0, "scores": [], "end": None}
        state = {"tracking_uri": self._name, "run_id": run.info.run_id, **level}
        write_json(folder.path / "mlflow.json", state)
        return state

    def _has(self, run_id: str) -> bool:
        """Whether the store still has a run; asked once, so that a store which was deleted is filled again."""
        if run_id not in self._there:
            try:
                found = self._client.get_run(run_id)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return False
            if found.info.lifecycle_stage == LifecycleStage.DELETED:
                return False
            self._there.add(run_id)
        return True

    def _push_metrics(self, state: dict[str, Any], lines: list[dict[str, Any]]) -> bool:
        metrics = [
            Metric(key, float(value), int(1000 * line["time"]), line["step"])
            for line in lines
            for key, value in line.items()
            if key not in ("step", "time") and value is not None
        ]
        for first in range(0, len(metrics), _BATCH):
            self._client.log_batch(state["run_id"], metrics=metrics[first : first + _BATCH])
        if lines:
            state["step"], state["time"] = lines[-1]["step"], lines[-1]["time"]
        return bool(lines)

    def _push_scores(self, folder: RunFolder, state: dict[str, Any]) -> bool:
        new = [path for path in sorted((folder.path / "eval").glob("*.json")) if path.name not in state["scores"]]
        for path in new:
            score = read_json(path) or {}
            stamp, step = int(1000 * path.stat().st_mtime), state["step"]
            values = {score["metric"]: score["value"], f"{score['metric']}_se": score["se"]}
            metrics = [Metric(key, float(value), stamp, step) for key, value in values.items() if value is not None]
            self._client.log_batch(state["run_id"], metrics=metrics)
            state["scores"].append(path.name)
        return bool(new)

    def _push_end(self, folder: RunFolder, state: dict[str, Any]) -> bool:
        ended = folder.status.get("state")
        if ended == "running" and state["end"] is not None:
            self._client.update_run(state["run_id"], status="RUNNING")
            state["end"] = None
            return True
        if ended == state["end"] or ended not in _FINAL:
            return False
        for name in ("spec.json", "record.json", "log.txt"):
            if (folder.path / name).exists():
                self._client.log_artifact(state["run_id"], str(folder.path / name))
        for grid in sorted(folder.path.glob("samples/**/grid.png")):
            self._client.log_artifact(state["run_id"], str(grid), "samples")
        self._client.set_terminated(state["run_id"], _FINAL[ended])
        state["end"] = ended
        return True


def _mark(path: Path) -> tuple[int, ...]:
    """What changes whenever a file or the list of a folder does: files are replaced whole or grow."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size


def experiment_runs(name: str, tracking_uri: str | None = None) -> list[dict[str, Any]]:
    """Every run of an experiment, oldest first: name state params metrics, and its files spec.json and record.json.

    `metrics` are last values; `spec` (text) and `record` (parsed) are None where the run has none. Raises InvalidInput
    where the store or the experiment is not there.
    """
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or default_uri(Path("runs"))
    shown = without_secrets(uri)
    # The client would make an empty database of a path that does not exist.
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise InvalidInput(f"{shown}: no such database; name the store with --tracking-uri")
    client = MlflowClient(uri)
    try:
        found = client.get_experiment_by_name(name)
        if found is None:
            known = ", ".join(e.name for e in client.search_experiments()) or "none"
            raise InvalidInput(f"{shown}: no experiment {name!r} (known: {known})")
        runs, token = [], None
        while token != "":
            page = client.search_runs([found.experiment_id], order_by=["start_time ASC"], page_token=token)
            runs += [_as_row(client, run) for run in page]
            token = page.token or ""
        return runs
    except MlflowException as error:
        raise InvalidInput(f"{shown}: {without_secrets(str(error)).strip().splitlines()[0][:200]}") from error


def _as_row(client: MlflowClient, run: Run) -> dict[str, Any]:
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    with tempfile.TemporaryDirectory() as place:
        texts = {
            name: Path(client.download_artifacts(run.info.run_id, name, place)).read_text() if name in names else None
            for name in ("spec.json", "record.json")
        }
    record = json.loads(texts["record.json"]) if texts["record.json"] else None
    return {
        "name": run.info.run_name or run.info.run_id,
        "state": run.info.status,
        "params": dict(run.data.params),
        "metrics": dict(run.data.metrics),
        "spec": texts["spec.json"],
        "record": record,
    }


def _lines_since(folder: RunFolder, when: float) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl written after `when`: of a step repeated after a restart the later counts."""
    lines = []
    for text in folder.metrics.read_text().splitlines() if folder.metrics.exists() else ():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break  # being written at this moment; the next pass finds it whole
        if line["time"] > when:
            lines.append(line)
    return lines
