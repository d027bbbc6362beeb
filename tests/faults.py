"""FAULTS.md from what the tests noted: every fault they stood, and what it left behind.

FAULTS=faults.jsonl make test-cluster && python tests/faults.py faults.jsonl > FAULTS.md
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
_HEAD = """# Faults, and what each leaves behind

Every row is what a test noted at its end, after it had put real runs through the fault. Those of the sweep on SLURM
happened to one sweep of twelve runs, whose weights, losses and table must equal an undisturbed one's, bit for
bit. Made by:

    FAULTS=faults.jsonl make test-cluster && python tests/faults.py faults.jsonl > FAULTS.md

| fault | what happens | steps made again | what it leaves behind | shown by |
|---|---|---|---|---|
"""


def noted_by_tests() -> set[str]:
    """The names of the faults in the tests' sources: first arguments of `fault(..)`, keys of `outcomes[..]`.

    A name that is put together at run time counts with its constant beginning.
    """
    names = set()
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "fault" and node.args:
                names |= _constant(node.args[0])
            if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute):
                names |= _constant(node.slice) if node.value.attr == "outcomes" else set()
    return names


def _constant(node: ast.expr) -> set[str]:
    if isinstance(node, ast.JoinedStr):
        node = node.values[0]
    return {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()


def table(lines: list[str]) -> str:
    """The document; of a fault noted several times the last counts."""
    rows = {row["fault"]: row for row in map(json.loads, lines)}
    cells = [[row[key] for key in ("fault", "then", "repeated", "leaves", "test")] for _, row in sorted(rows.items())]
    return _HEAD + "".join(f"| {' | '.join(row)} |\n" for row in cells)


if __name__ == "__main__":
    print(table(Path(sys.argv[1]).read_text().splitlines()), end="")
