"""Tables as spreadsheets and other programs write them: read as they were meant, or refused in one line."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_analysis_table import OPTIONS, frame, refused

from analysis.fit_laws import main
from analysis.study import Choice, study
from analysis.table import InvalidTable, prepare, read

LINES = frame().to_csv(index=False).splitlines()
HEADER, ROWS = LINES[0], LINES[1:]


def written(lines: list[str], folder: Path, end: str = "\n") -> pd.DataFrame:
    path = folder / "points.csv"
    path.write_bytes("".join(line + end for line in lines).encode())
    return read(path)[0]


@pytest.mark.parametrize("what", ["a mark too many", "a mark too many in some", "labels", "spaces", "CR", "CRLF"])
def test_what_other_programs_write_is_read_as_it_was_meant(what: str, tmp_path: Path) -> None:
    header, rows = HEADER, ROWS
    if what == "a mark too many":
        rows = [f"{row}," for row in ROWS]
    elif what == "a mark too many in some":
        rows = [*ROWS[:3], *(f"{row}, " for row in ROWS[3:])]
    elif what == "labels":
        header, rows = '"n","d","loss"', [f'"{i}",{row}' for i, row in enumerate(ROWS, 1)]
    elif what == "spaces":
        header = " n ,d  , loss "
    end = {"CR": "\r", "CRLF": "\r\n"}.get(what, "\n")
    pd.testing.assert_frame_equal(written([header, *rows], tmp_path, end), written(LINES, tmp_path))


@pytest.mark.parametrize("rows", [
    [f"x,{row}" for row in ROWS],
    [f"{row},note" for row in (ROWS[0], *ROWS)],
    [f"{row},{'note' * (i == 5)}" for i, row in enumerate(ROWS)],
    [f"x,{ROWS[0]}", *ROWS[1:]],
    [f"{row},," for row in ROWS],
])  # fmt: skip
def test_cells_that_no_name_stands_over_are_refused(
    rows: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert refused("\n".join([HEADER, *rows]), tmp_path, capsys) == "UNREADABLE_TABLE"


def test_scores_in_percent_are_refused_not_fitted_from_those_under_one(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    n = np.geomspace(1e6, 1e9, 8)
    percent = pd.DataFrame({"n": n, "acc": np.geomspace(0.2, 90.0, 8)})
    options = ("--n", "n", "--metric", "acc", "--law", "logit")
    assert refused(percent, tmp_path, capsys, *options) == "PERCENT"
    percent.assign(acc=percent["acc"] / 100).to_csv(tmp_path / "points.csv", index=False)
    assert main([str(tmp_path / "points.csv"), *options, "--no-report"]) == 0


def test_the_terminal_says_how_many_rows_were_left_out_and_why(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table = frame().astype(object)
    table.to_csv(tmp_path / "points.csv", index=False)
    assert main([str(tmp_path / "points.csv"), *OPTIONS]) == 0
    assert "left out" not in capsys.readouterr().out
    table.loc[[3, 5], "n"], table.loc[7, "loss"] = "100M", "n/a"
    table.to_csv(tmp_path / "points.csv", index=False)
    assert main([str(tmp_path / "points.csv"), *OPTIONS]) == 0
    said = "3 of 24 rows left out: n is not a finite number (2), loss is not a finite number (1)"
    assert said in capsys.readouterr().out.splitlines()


def test_a_comma_in_a_number_is_named_with_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table = frame().astype(object)
    table.loc[[4, 6], "loss"], table.loc[3, "n"] = "3,25", "1,000,000"
    table.to_csv(tmp_path / "points.csv", index=False)
    assert main([str(tmp_path / "points.csv"), *OPTIONS]) == 0
    out = capsys.readouterr().out
    assert "3 of 24 rows left out: loss is not a finite number: 3,25 has a comma; decimals want a point" in out
    assert "n is not a finite number: 1,000,000 has a comma" in out


def test_a_blank_standard_error_is_not_passed_over_in_silence() -> None:
    """One blank cell and all rows count alike; a column without any is a table without errors."""
    table = frame().assign(loss_se=0.01)

    def remarks(table: pd.DataFrame) -> list[str]:
        fits = study(prepare(table, "", "points.csv", n="n", d="d"), Choice(metrics=("loss",))).fits
        assert fits
        return [w.message for f in fits for w in f.warnings if w.code == "SE_INCOMPLETE"]

    assert remarks(table) == [] == remarks(table.assign(loss_se=np.nan))
    table.loc[5, "loss_se"] = np.nan
    assert {message.split(":")[0] for message in remarks(table)} == {"1 of 24 rows have no standard error"}


def test_a_table_without_a_usable_row_names_the_first_cell_at_fault() -> None:
    with pytest.raises(InvalidTable, match=r"NO_USABLE_ROWS.*d has '20 B': write plain numbers, such as 1e8"):
        prepare(frame().assign(d="20 B"), "", "frame", n="n", d="d")


@pytest.mark.parametrize("word", ["success", "Succeeded", "complete", "completed", "finished"])
def test_what_others_call_a_finished_run_is_finished(word: str) -> None:
    assert len(prepare(frame().assign(status=word), "", "frame", n="n", d="d").frame) == 24


def test_checkpoints_of_a_run_are_no_contradiction_and_may_be_a_cluster(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    runs = frame().assign(run_id=[f"run{i // 4}" for i in range(24)])
    runs.to_csv(tmp_path / "points.csv", index=False)
    assert main([str(tmp_path / "points.csv"), *OPTIONS]) == 0
    capsys.readouterr()
    by_n = ("--n", "n", "--metric", "loss", "--law", "power-floor")
    assert refused(runs, tmp_path, capsys, *by_n) == "CONTRADICTING_DUPLICATES", "nothing tells its checkpoints apart"
    assert main([str(tmp_path / "points.csv"), *by_n, "--cluster", "run_id", "--no-report"]) == 0


def test_runs_of_one_seed_in_two_arms_are_told_apart_by_group_and_blank_seeds_by_nothing(tmp_path: Path) -> None:
    arms = pd.concat([frame().assign(arm=arm, seed=0, loss=frame()["loss"] * k) for arm, k in (("a", 1), ("b", 1.1))])
    with pytest.raises(InvalidTable, match=r"CONTRADICTING_DUPLICATES.* differ in loss: .* apart with --group$"):
        study(prepare(arms, "", "frame", n="n", d="d"), Choice(metrics=("loss",)))
    arms["seed"] = ""
    assert len(study(prepare(arms, "", "frame", n="n", d="d"), Choice(metrics=("loss",))).points[0]) == 48


def test_an_arm_that_contradicts_itself_is_refused_alone() -> None:
    good = frame().assign(arm="good", seed=0)
    bad = pd.concat([good, good.assign(loss=good["loss"] * 1.1)]).assign(arm="bad")
    choice = Choice(metrics=("loss",), laws=("chinchilla",))
    found = study(prepare(pd.concat([bad, good]), "", "frame", n="n", d="d", group=("arm",)), choice)
    assert [f.points.name for f in found.fits] == ["good"]
    assert [(r["group"], r["code"]) for r in found.refused] == [({"arm": "bad"}, "CONTRADICTING_DUPLICATES")]
    with pytest.raises(InvalidTable, match="CONTRADICTING_DUPLICATES"):
        study(prepare(bad, "", "frame", n="n", d="d", group=("arm",)), choice)


def test_the_terminal_gives_small_exponents_four_digits(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    frame().to_csv(tmp_path / "points.csv", index=False)
    assert main([str(tmp_path / "points.csv"), *OPTIONS[:-3], "--law", "kaplan", "--no-report"]) == 0
    assert re.search(r"alpha_N 0\.0[1-9]\d{3} \[", capsys.readouterr().out)
