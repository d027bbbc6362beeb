"""The table of faults names all that the tests do."""

from faults import TESTS, noted_by_tests


def test_every_fault_of_the_tests_is_in_the_table_and_every_row_has_its_test():
    text = (TESTS.parent / "FAULTS.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")][2:]
    named, noted = {row[0] for row in rows}, noted_by_tests()
    assert len(noted) > 12
    assert not {name for name in noted if not any(row.startswith(name) for row in named)}, "run: make test-cluster"
    assert not {row for row in named if not any(row.startswith(name) for name in noted)}, "no test does this any more"
    for row in rows:
        path, _, function = row[4].partition("::")
        assert f"def {function.partition('[')[0]}(" in (TESTS.parent / path).read_text()
