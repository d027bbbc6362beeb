"""Hostile tables: a right answer, or one clear line with a code."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.allocation import allocation
from analysis.fit_laws import main
from analysis.points import select
from analysis.sensitivity import sensitivity
from analysis.simulate import chinchilla_points, grid, ladder
from analysis.study import Choice, study
from analysis.table import InvalidTable, Table, load, prepare

OPTIONS = ["--n", "n", "--d", "d", "--metric", "loss", "--law", "chinchilla", "--no-report"]


def frame(noise: float = 0.003) -> pd.DataFrame:
    p = chinchilla_points(*grid(6, 4), noise, np.random.default_rng(0))
    return pd.DataFrame({"n": p.n, "d": p.d, "loss": p.y})


def alpha_of(table: pd.DataFrame, tmp_path: Path, *extra: str, name: str = "points.csv") -> float:
    path = tmp_path / name
    table.to_csv(path, index=False)
    assert main([str(path), *OPTIONS, *extra]) == 0
    return json.loads((tmp_path / "laws.json").read_text())["fits"][0]["params"]["alpha"]


def refused(table: pd.DataFrame | str | bytes, tmp_path: Path, capsys: pytest.CaptureFixture, *options: str) -> str:
    """The command ends with code 2 and one line on stderr; returns its code."""
    path = tmp_path / "points.csv"
    if isinstance(table, pd.DataFrame):
        table.to_csv(path, index=False)
    else:
        path.write_bytes(table if isinstance(table, bytes) else table.encode())
    assert main([str(path), *(options or OPTIONS)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("fit_laws: [")
    return lines[0].split("[")[1].split("]")[0]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> float:
    return alpha_of(frame(), tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("what", ["shuffled", "50 extra columns", "N in millions", "spaces", "exact duplicates"])
def test_harmless_oddities_change_nothing(what: str, tmp_path: Path, expected: float) -> None:
    table = frame()
    if what == "shuffled":
        table = table.sample(frac=1, random_state=1)
    elif what == "50 extra columns":
        table = table.assign(**{f"x{i}": "a, b" for i in range(50)})
    elif what == "N in millions":
        table["n"] /= 1e6
    elif what == "spaces":
        table["loss"] = [f" {v!r} " for v in table["loss"]]
    else:
        table = pd.concat([table, table.head(3)])
    # the optimum does not depend on the order of rows beyond the solver's own tolerance
    assert alpha_of(table, tmp_path) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8"])
def test_byte_order_mark(encoding: str, tmp_path: Path, expected: float) -> None:
    (tmp_path / "bom.csv").write_text(frame().to_csv(index=False), encoding=encoding)
    assert main([str(tmp_path / "bom.csv"), *OPTIONS]) == 0
    assert json.loads((tmp_path / "laws.json").read_text())["fits"][0]["params"]["alpha"] == pytest.approx(expected)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_other_formats(suffix: str, tmp_path: Path, expected: float) -> None:
    path = tmp_path / f"points.{suffix}"
    if suffix == "parquet":
        frame().to_parquet(path)
    else:
        frame().to_json(path, orient="records", lines=True, double_precision=15)
    assert main([str(path), *OPTIONS]) == 0
    assert json.loads((tmp_path / "laws.json").read_text())["fits"][0]["params"]["alpha"] == pytest.approx(
        expected, abs=1e-6
    )


@pytest.mark.parametrize("cell, reason", [("nan", "NOT_A_NUMBER"), ("inf", "NOT_A_NUMBER"), ("n/a", "NOT_A_NUMBER"),
                                          ("0", "OUT_OF_RANGE"), ("-1.5", "OUT_OF_RANGE")])  # fmt: skip
def test_bad_cells_are_left_out_by_name(cell: str, reason: str, tmp_path: Path) -> None:
    table = frame().astype(object)
    table.loc[4, "loss"] = cell
    table.loc[7, "d"] = "-3"
    alpha_of(table, tmp_path)
    doc = json.loads((tmp_path / "laws.json").read_text())
    assert {(e["row"], e["code"]) for e in doc["table"]["excluded"]} == {(4, reason), (7, "NON_POSITIVE")}
    assert doc["fits"][0]["n_runs"] == 22


def test_a_blank_is_not_measured_and_never_filled(tmp_path: Path) -> None:
    table = frame().astype(object)
    table.loc[[2, 3], "loss"] = ""
    alpha_of(table, tmp_path)
    doc = json.loads((tmp_path / "laws.json").read_text())
    assert doc["table"]["not_measured"] == {"loss in all": 2} and doc["fits"][0]["n_runs"] == 22
    assert [(e["row"], e["code"]) for e in doc["table"]["excluded"]] == [(2, "MISSING"), (3, "MISSING")]


def test_read_only_and_nullable_columns() -> None:
    table = frame()
    for name in table:
        table[name].to_numpy().flags.writeable = False
    before = table.copy(deep=True)
    nullable = table.astype("Float64")
    nullable.loc[5, "loss"] = pd.NA
    for given, count in ((table, 24), (nullable, 23)):
        prepared = prepare(given, "", "frame", n="n", d="d")
        points, _ = select(prepared, {}, prepared.frame, "loss")
        assert len(points) == count
    pd.testing.assert_frame_equal(table, before)


def test_unusable_tables_end_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table = frame()
    assert refused("", tmp_path, capsys) == "EMPTY_TABLE"
    assert refused("n,d,loss\n", tmp_path, capsys) == "NO_ROWS"
    assert refused(table.head(1), tmp_path, capsys) == "TOO_FEW_SIZES"
    assert refused(table.assign(d=20 * table["n"]), tmp_path, capsys) == "COLLINEAR_LADDER"
    assert refused(table.drop(columns="d"), tmp_path, capsys) == "MISSING_COLUMN"
    assert refused(table.drop(columns="loss"), tmp_path, capsys) == "MISSING_COLUMN"
    assert refused(table.assign(n="many"), tmp_path, capsys) == "NO_USABLE_ROWS"
    assert refused(table.assign(loss=0.0), tmp_path, capsys) == "OUT_OF_RANGE"
    assert refused(b"\xff\xfe\x00n,d", tmp_path, capsys) == "UNREADABLE_TABLE"
    assert refused(table, tmp_path, capsys, "--n", "n", "--metric", "loss", "--predict", "size=3") == "BAD_PLACE"
    assert refused(table, tmp_path, capsys, "--n", "n", "--metric", "loss", "--level", "95") == "BAD_LEVEL"
    units = table.assign(loss_unit=["nats", "bits"] * 12)
    assert refused(units, tmp_path, capsys) == "MIXED_UNITS"
    assert refused(table.assign(loss_protocol=["a", "b"] * 12), tmp_path, capsys) == "MIXED_PROTOCOLS"
    clash = pd.concat([table, table.head(1).assign(loss=9.9)]).assign(seed=0)
    assert refused(clash, tmp_path, capsys) == "CONTRADICTING_DUPLICATES"
    assert main([str(tmp_path / "nowhere.csv")]) == 2
    assert "[NO_TABLE]" in capsys.readouterr().err


def test_an_unwritable_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    frame().to_csv(tmp_path / "points.csv", index=False)
    assert main([str(tmp_path / "points.csv"), *OPTIONS, "--out", str(tmp_path / "file" / "x")]) == 2
    assert capsys.readouterr().err.startswith("fit_laws: [UNWRITABLE]")


def test_units_of_unlike_groups_may_differ() -> None:
    p = frame()
    both = pd.concat([p.assign(family="a", loss_unit="nats"), p.assign(family="b", loss_unit="bits")])
    table = prepare(both, "", "frame", n="n", d="d", group=("family",))
    assert len(study(table, Choice(metrics=("loss",), laws=("chinchilla",))).fits) == 2


def unfinished(own: pd.DataFrame) -> Table:
    own.loc[0, "status"] = "diverged"
    own.loc[1, "lr_decay_complete"] = False
    own.loc[2, "train_flops"] = 0.0
    return prepare(own, "", "frame")


def test_unfinished_runs_are_excluded_by_name() -> None:
    table = unfinished(ladder())
    assert [(e["row"], e["code"]) for e in table.excluded] == [
        (2, "NON_POSITIVE"),
        (0, "NOT_FINISHED"),
        (1, "UNFINISHED_DECAY"),
    ]
    assert len(table.frame) == 57


def test_a_folder_of_runs_is_a_table(tmp_path: Path) -> None:
    rows = ladder().replace("", np.nan)
    for _, row in rows.iterrows():
        folder = tmp_path / row["run_id"]
        folder.mkdir()
        (folder / "record.json").write_text(row.dropna().to_json())
    (tmp_path / "unfinished").mkdir()
    table = load(tmp_path)
    assert table.n_rows == 60 and table.metrics()[0] == "val_loss" and len(table.groups()) == 4
    (tmp_path / rows["run_id"][0] / "record.json").write_text("{")
    with pytest.raises(InvalidTable, match="UNREADABLE_TABLE"):
        load(tmp_path)


def test_lighter_evaluation_below_the_largest_data_size_is_no_mixture() -> None:
    own = ladder()
    small = own["images"] < 96_000
    own.loc[small, ["geneval", "geneval_se", "geneval_n", "geneval_unit"]] = [0.3, 0.05, 100, "share correct"]
    own.loc[small, "geneval_protocol"] = "icon-world-v1, 1 image a prompt"
    result = study(prepare(own, "", "frame"), Choice(metrics=("geneval",)))
    assert len(result.fits) == 8 and all(f.points.protocol == "icon-world-v1" for f in result.fits)


def several_sizes_of_data(protocol: str, any_n: str) -> pd.DataFrame:
    own = ladder().astype({"geneval": object, "geneval_se": object, "geneval_n": object, "geneval_unit": object})
    small = own["images"] < 96_000
    rate = 0.2 + 0.1 * np.log(own["images"] / 24_000) + 0.1 * np.log(own["params_total"] / 46_000)
    own.loc[small, "geneval"] = rate[small]
    own.loc[small, ["geneval_se", "geneval_n", "geneval_unit"]] = [0.05, 100, "share correct"]
    own.loc[small, "geneval_protocol"] = protocol
    return own.assign(geneval_protocol_any_n=any_n)


def test_a_scores_number_of_images_does_not_split_its_protocol() -> None:
    """A mean is unbiased in n; a Fréchet distance is not and stays apart."""
    result = study(prepare(several_sizes_of_data("icon-world-x1", "icon-world"), "", "frame"), Choice())
    joint = {f.points.name: f for f in result.find("geneval", "logit-joint")}
    assert len(joint) == 4 and all(len(f.points) == 15 for f in joint.values())
    assert all(allocation(f, 0.95) for f in joint.values())
    apart = study(prepare(several_sizes_of_data("icon-world-x1", ""), "", "frame"), Choice(metrics=("geneval",)))
    assert not apart.find("geneval", "logit-joint")
    assert {r["code"] for r in apart.refused if r["law"] == "logit-joint"} == {"TOO_FEW_LEVELS"}


def test_distances_at_several_data_sizes_have_a_split_only_at_equal_counts() -> None:
    own = ladder()
    truth = 3.0 + 2e3 * own["params_total"] ** -0.6 + 2e4 * own["images"] ** -0.8
    own = own.assign(fd=truth * np.exp(0.01 * np.random.default_rng(0).normal(size=60)), fd_se=0.02, fd_n=2048)
    own = own.assign(fd_unit="FD", fd_protocol="fd-icons-v1", fd_floor=3.0)
    fits = study(prepare(own, "", "frame"), Choice(metrics=("fd",))).find("fd", "chinchilla")
    assert len(fits) == 4 and all(allocation(f, 0.95) and f.frozen[0] for f in fits)
    own.loc[own["images"] < 96_000, "fd_n"] = 512
    lighter = study(prepare(own, "", "frame"), Choice(metrics=("fd",)))
    assert not lighter.find("fd", "chinchilla") and len(lighter.find("fd", "power-floor")) == 4


def test_a_ladder_too_short_for_a_law_is_still_reported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A smoke sweep of two sizes must not fail; it says that nothing was fitted."""
    own = ladder(sizes={"46K": 46_000, "96K": 96_000}, images=(24_000, 48_000))
    own.to_csv(tmp_path / "runs.csv", index=False)
    assert main([str(tmp_path / "runs.csv"), "--no-report"]) == 0
    doc = json.loads((tmp_path / "laws.json").read_text())
    assert doc["fits"] == [] and {r["code"] for r in doc["refused"]} >= {"TOO_FEW_SIZES"}


def outcome(table: pd.DataFrame, tmp_path: Path, *options: str) -> dict:
    table.to_csv(tmp_path / "points.csv", index=False)
    assert main([str(tmp_path / "points.csv"), *options, "--metric", "loss", "--no-report"]) == 0
    return json.loads((tmp_path / "laws.json").read_text())


def test_a_table_of_compute_alone_has_rollouts_and_a_prediction_on_record(tmp_path: Path) -> None:
    c = np.geomspace(1e18, 1e22, 7)
    loss = (1.7 + 900.0 * c**-0.16) * np.exp(0.001 * np.random.default_rng(0).normal(size=7))
    doc = outcome(pd.DataFrame({"c": c, "loss": loss}), tmp_path, "--c", "c")
    (found,) = doc["fits"]
    assert found["law"] == "compute" and found["params"]["alpha"] == pytest.approx(0.16, abs=0.02)
    assert len(found["rollout"]) >= 3 and found["rollout"][-1]["held_out"]["c"] == pytest.approx(c[-1])
    (entry,) = doc["predictions"]["predictions"]
    assert entry["target"] == {"c": pytest.approx(c[-1])} and entry["measured"] == pytest.approx(loss[-1])
    assert {r["law"] for r in doc["law_choice"]} >= {"power", "compute"}


def test_a_metric_of_any_sign_is_fitted_on_its_raw_scale(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table = frame().assign(loss=frame()["loss"] - 3.0)
    assert (table["loss"] < 0).any()
    doc = outcome(table, tmp_path, "--n", "n", "--d", "d", "--law", "chinchilla", "--objective", "lse")
    assert doc["fits"][0]["params"]["alpha"] == pytest.approx(0.34, abs=0.05) and doc["fits"][0]["params"]["E"] < 0
    assert doc["fits"][0]["n_runs"] == 24 and doc["table"]["excluded"] == []
    path = str(tmp_path / "points.csv")
    assert main([path, "--n", "n", "--d", "d", "--metric", "loss", "--no-report"]) == 2
    assert "rows were left out: loss is not positive" in capsys.readouterr().err, "the cause of the refusal is named"


def test_what_no_law_can_say_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table = frame()
    power = ("--n", "n", "--metric", "loss", "--law", "power-floor")
    assert refused(table.assign(loss=2.0), tmp_path, capsys, *power) == "CONSTANT_METRIC"
    assert refused(table, tmp_path, capsys, *power, "--floor", "9") == "FLOOR_ABOVE_DATA"
    assert refused(table, tmp_path, capsys, *power, "--objective", "quasi-binomial") == "NOT_A_SCORE"


@pytest.mark.parametrize("name, mark", [("semicolons.csv", ";"), ("tabs.tsv", "\t")])
def test_other_marks_between_cells(name: str, mark: str, tmp_path: Path, expected: float) -> None:
    frame().to_csv(tmp_path / name, index=False, sep=mark)
    assert main([str(tmp_path / name), *OPTIONS]) == 0
    found = json.loads((tmp_path / "laws.json").read_text())["fits"][0]
    assert found["params"]["alpha"] == pytest.approx(expected, abs=1e-6)


def test_json_may_be_one_list_and_rows_must_be_objects(
    tmp_path: Path, expected: float, capsys: pytest.CaptureFixture
) -> None:
    frame().to_json(tmp_path / "list.json", orient="records", double_precision=15)
    assert main([str(tmp_path / "list.json"), *OPTIONS]) == 0
    found = json.loads((tmp_path / "laws.json").read_text())["fits"][0]
    assert found["params"]["alpha"] == pytest.approx(expected, abs=1e-6)
    capsys.readouterr()
    (tmp_path / "rows.jsonl").write_text('{"n": 1}\n[1, 2]\n')
    assert main([str(tmp_path / "rows.jsonl"), *OPTIONS]) == 2
    assert capsys.readouterr().err.startswith("fit_laws: [UNREADABLE_TABLE]")


def test_a_blank_group_has_a_name(tmp_path: Path) -> None:
    table = frame().assign(family=["", "b"] * 12)
    doc = outcome(table, tmp_path, "--n", "n", "--d", "d", "--group", "family", "--law", "chinchilla")
    assert [f["group"]["family"] for f in doc["fits"]] == ["(blank)", "b"]


@pytest.mark.parametrize("named", [True, False])
def test_a_failed_run_beside_its_rerun_is_not_put_back(named: bool, tmp_path: Path) -> None:
    table = frame().assign(seed=0, status="done", **({"run_id": [f"r{i}" for i in range(24)]} if named else {}))
    own = table.rename(columns={"n": "params_total", "d": "images", "loss": "val_loss"})
    failed = own.iloc[[3]].assign(status="failed", val_loss=9.9)
    pd.concat([own, failed]).assign(val_loss_se=0.01).to_csv(tmp_path / "runs.csv", index=False)
    options = [str(tmp_path / "runs.csv"), "--law", "chinchilla", "--no-report"]

    def choices() -> dict[str, dict]:
        assert main(options) == 0
        return {r["choice"]: r for r in json.loads((tmp_path / "laws.json").read_text())["sensitivity"]}

    assert choices() and not [c for c in choices() if "unfinished" in c]
    twice = pd.concat([own.drop(index=3), failed, failed.assign(val_loss=8.8)])
    twice.assign(val_loss_se=0.01).to_csv(tmp_path / "runs.csv", index=False)
    assert choices()["with unfinished runs"]["code"] == "CONTRADICTING_DUPLICATES"


def test_runs_without_a_name_are_not_one_run(tmp_path: Path) -> None:
    for nothing in (None, " "):
        frame().assign(run_id=pd.array([nothing] * 24, dtype="string")).to_parquet(tmp_path / "points.parquet")
        assert main([str(tmp_path / "points.parquet"), *OPTIONS]) == 0


def test_all_blank_group_cells_are_one_group(tmp_path: Path) -> None:
    table = frame().assign(family=["", "nan", None, "b"] * 6, status=["done", "done", "failed", *["done"] * 21])
    table.to_parquet(tmp_path / "points.parquet")
    prepared = load(tmp_path / "points.parquet", n="n", d="d", group=("family",))
    assert [(key["family"], len(rows)) for key, rows in prepared.groups()] == [("(blank)", 17), ("b", 6)]
    (found,) = study(prepared, Choice(metrics=("loss",), laws=("chinchilla",))).fits
    assert "with 1 unfinished runs" in [r["choice"] for r in sensitivity(found, prepared, 0.95)]


def test_a_repeated_column_and_a_number_too_large_to_hold_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    text = frame().to_csv(index=False)
    assert refused(text.replace("n,d,loss", "n,loss,loss", 1), tmp_path, capsys) == "UNREADABLE_TABLE"
    rows = [json.dumps(row) for row in frame().to_dict("records")]
    (tmp_path / "big.jsonl").write_text("\n".join([*rows, '{"n": 1' + "0" * 400 + ', "d": 1, "loss": 2}']))
    assert main([str(tmp_path / "big.jsonl"), *OPTIONS]) == 0
    doc = json.loads((tmp_path / "laws.json").read_text())
    assert [(e["row"], e["code"]) for e in doc["table"]["excluded"]] == [(24, "NOT_A_NUMBER")]


def test_sensitivity_puts_unfinished_runs_back_and_recounts_compute(tmp_path: Path) -> None:
    own = ladder()
    mine = (own["token_kind"] == "continuous") & (own["order"] == "random")
    last = own.index[mine & (own["images"] == 96_000)][-1]
    own.loc[last, "lr_decay_complete"] = False
    own.loc[last, "val_loss"] *= 1.2
    own.to_csv(tmp_path / "runs.csv", index=False)
    assert main([str(tmp_path / "runs.csv"), "--metric", "val_loss", "--no-report"]) == 0
    rows = json.loads((tmp_path / "laws.json").read_text())["sensitivity"]
    arm = [r for r in rows if r["group"] == {"token_kind": "continuous", "order": "random"} and r["law"] == "compute"]
    found = {r["choice"]: r for r in arm}
    assert {"as reported", "C = body only", "C = 6 N tokens", "with 1 unfinished runs"} <= set(found)
    back, reported = found["with 1 unfinished runs"], found["as reported"]
    assert back["n_runs"] == reported["n_runs"] and back["exponents"] != reported["exponents"]
    # the simulated FLOPs are 6 N a token throughout, and the body is nine tenths of them
    for name in ("C = body only", "C = 6 N tokens"):
        assert found[name]["exponents"]["alpha"][0] == pytest.approx(reported["exponents"]["alpha"][0], abs=1e-6)
