"""The parquet files that lie beside a results table."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluidscale.record import write_atomic


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> None:
    """Overwrites the file; without rows there is none, since what is of runs that are gone must not stay."""
    # Launching needs no pandas.
    import pandas as pd

    if not rows:
        path.unlink(missing_ok=True)
        return
    table = io.BytesIO()
    pd.DataFrame(rows, columns=list(columns)).to_parquet(table, index=False)
    write_atomic(path, table.getvalue())
