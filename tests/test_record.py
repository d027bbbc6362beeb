import json
import math
import os
import threading

import pytest

from fluidscale.record import flatten, git_revision, planned, read_json, varying, write_atomic, write_json
from fluidscale.spec import InvalidInput
from fluidscale.sweep import load_sweep


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "file"
    contents = ["a" * 200_000, "b" * 200_000]
    write_atomic(path, contents[0])
    stop = threading.Event()

    def write():
        while not stop.is_set():
            for content in contents:
                write_atomic(path, content)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert all(path.read_text() in contents for _ in range(200))
    finally:
        stop.set()
        writer.join()
    assert os.listdir(tmp_path) == ["file"]


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "x.json", {"a": [math.nan, 1.5], "b": {"c": math.inf}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, 1.5], "b": {"c": None}}


def test_missing_is_none_and_broken_is_said(tmp_path):
    assert read_json(tmp_path / "no.json") is None
    (tmp_path / "torn.json").write_text('{"a": 1')
    with pytest.raises(InvalidInput, match=r"torn\.json: not JSON"):
        read_json(tmp_path / "torn.json")


def test_without_git_the_revision_is_empty(tmp_path, monkeypatch):
    monkeypatch.delenv("FLUIDSCALE_GIT_REV", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision() == ""


def test_a_plan_knows_what_the_table_will_say():
    runs = load_sweep("local").runs
    rows = {run.id: planned(run) for run in runs}
    for run in runs:
        row = rows[run.id]
        parts = sum(row[f"params_{part}"] for part in ("embed", "text", "body", "head"))
        assert parts == row["params_total"]
        per_image = row["flops_per_image_body"] + row["flops_per_image_head"]
        assert row["train_flops"] == pytest.approx(3 * run.images * per_image)
        assert row["images_unique"] == row["images"] == run.train.steps * 64
        assert row["branch_step"] == run.train.branch_step < run.train.steps


def test_what_varies_gets_a_dotted_column_of_its_own():
    runs = load_sweep("local", sizes=["50K"]).runs
    columns = varying(runs)
    assert {row["model.head.objective"] for row in columns.values()} == {None, "flow"}
    assert "train.lr" not in next(iter(columns.values()))
    assert varying(runs[:1]) == {runs[0].id: {}}
    assert flatten({"a": {"b": 1}, "c": 2}) == {"a.b": 1, "c": 2}
