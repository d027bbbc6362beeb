"""Encoded images and captions as memory-mapped shards with a manifest that says what they are.

A folder holds `tokens-00000.npy`, `text-00000.npy`, .. and manifest.json, written last: {"recipe", "recipe_sha256",
"rows", "shards": [{"rows", "tokens_sha256", "text_sha256"}]}. Tokens are int16 or int32 codes (rows, L) or float16
moments (rows, L, 2C); text is int64 word ids (rows, T).
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fluidscale.record import read_json, write_json
from fluidscale.spec import InvalidInput, digest

ROWS_PER_SHARD = 32768
Encode = Callable[[int, int], tuple[np.ndarray, np.ndarray]]
Progress = Callable[[int, int], None]


class Shards:
    """Random access to a folder of shards, checked against its manifest when opened.

    Raises InvalidInput on a missing, truncated or altered shard.
    """

    def __init__(self, folder: Path) -> None:
        manifest = read_json(folder / "manifest.json")
        if manifest is None:
            raise InvalidInput(f"{folder}: no manifest.json; encode the data again")
        self.rows: int = manifest["rows"]
        self._tokens = [_open(folder, "tokens", k, shard) for k, shard in enumerate(manifest["shards"])]
        self._text = [_open(folder, "text", k, shard) for k, shard in enumerate(manifest["shards"])]

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and text of the given rows, in their order, as copies in memory."""
        if len(self._tokens) == 1:
            return self._tokens[0][rows], self._text[0][rows]
        shard, within = np.divmod(rows, ROWS_PER_SHARD)
        tokens = np.empty((len(rows), *self._tokens[0].shape[1:]), self._tokens[0].dtype)
        text = np.empty((len(rows), *self._text[0].shape[1:]), self._text[0].dtype)
        for k in np.unique(shard):
            chosen = shard == k
            tokens[chosen], text[chosen] = self._tokens[k][within[chosen]], self._text[k][within[chosen]]
        return tokens, text


def _open(folder: Path, kind: str, index: int, entry: dict[str, Any]) -> np.ndarray:
    path = folder / f"{kind}-{index:05d}.npy"
    way_out = f"delete {folder} to have it encoded again"
    try:
        found = _sha(path)
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path}: shard unreadable ({error}); {way_out}") from error
    if found != entry[f"{kind}_sha256"] or len(array) != entry["rows"]:
        raise InvalidInput(f"{path}: shard does not match its manifest; {way_out}")
    return array


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an advisory lock on `path`; the kernel releases it when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def ensure(folder: Path, recipe: Any, rows: int, encode: Encode, progress: Progress | None = None) -> Shards:
    """The shards of `recipe` in `folder`, encoded first where they are missing: one process encodes, others wait.

    `encode(start, count)` gives tokens and text of rows start .. start + count. A shard that is already complete is
    not encoded again. The recipe (canonical JSON) is what the folder is named for and is checked.
    """
    with locked(folder.with_suffix(".lock")):
        manifest = read_json(folder / "manifest.json")
        if manifest is None:
            _write(folder, recipe, rows, encode, progress)
        elif manifest["recipe_sha256"] != digest(recipe) or manifest["rows"] != rows:
            raise InvalidInput(f"{folder}: holds other data than asked for; delete it to have it encoded again")
    return Shards(folder)


def _write(folder: Path, recipe: Any, rows: int, encode: Encode, progress: Progress | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for index, start in enumerate(range(0, rows, ROWS_PER_SHARD)):
        count = min(ROWS_PER_SHARD, rows - start)
        done = folder / f"shard-{index:05d}.json"
        entry = read_json(done)
        if entry is None:
            tokens, text = encode(start, count)
            entry = dict[str, Any](rows=count)
            for kind, array in (("tokens", tokens), ("text", text)):
                path = folder / f"{kind}-{index:05d}.npy"
                entry[f"{kind}_sha256"] = _save(path, array)
            write_json(done, entry)
        shards.append(entry)
        if progress is not None:
            progress(start + count, rows)
    write_json(
        folder / "manifest.json",
        {"recipe": json.loads(json.dumps(recipe)), "recipe_sha256": digest(recipe), "rows": rows, "shards": shards},
    )


def _save(path: Path, array: np.ndarray) -> str:
    temporary, content = path.with_suffix(".tmp"), io.BytesIO()
    # Through memory: a full disk is then an error that says so, which numpy's own writing hides.
    np.save(content, np.ascontiguousarray(array))
    try:
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return _sha(path)
