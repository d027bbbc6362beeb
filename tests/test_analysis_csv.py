"""Tables as spreadsheets and other programs write them: read as they were meant, or refused in one line."""

from pathlib import Path

import pandas as pd
import pytest
from test_analysis_table import frame, refused

from analysis.table import read

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
