"""The house rules that no linter knows: no module over 400 lines, no function over 60, no `utils.py`.

python tests/house.py        lists what breaks them and exits with 1; `make check` runs it
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULE_LINES, FUNCTION_LINES = 400, 60
FOLDERS = ("fluidscale", "slurm", "analysis", "benchmarks", "tests")


def broken(path: Path) -> Iterator[str]:
    """One line for each rule that a module breaks."""
    text = path.read_text()
    name = path.relative_to(ROOT)
    if path.stem == "utils":
        yield f"{name}: a module is named after what it is about"
    if (lines := text.count("\n")) > MODULE_LINES:
        yield f"{name}: {lines} lines, at most {MODULE_LINES}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                yield f"{name}:{node.lineno} {node.name}: {lines} lines, at most {FUNCTION_LINES}"


def main() -> int:
    found = [line for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")) for line in broken(path)]
    print("\n".join(found) if found else "house rules hold")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
