"""Encoded pictures with their captions, as `fluidscale.encode` writes them: parts in any order, and one manifest.

part-00000-tokens.npy      codes int16 or int32 (rows, L), or moments float16 (rows, L, 2 C)
part-00000-captions.npy    int64 (rows + 1,): where a row's captions begin; an image may have several
part-00000-offsets.npy     int64 (captions + 1,): where a caption's tokens begin; only real tokens are kept
part-00000-ids.npy         int32: the captions' token ids, one after the other
part-00000-features.npy    (tokens, width): their features; absent where the encoder runs live
part-00000.json            the part is complete: rows, sizes and hashes
rows-train.npy rows-val.npy    int64: the rows of each split, duplicates left out
index.parquet rejected.jsonl   for people: which image is which row, and which are none
manifest.json              written last; its sha256 is what a run's spec names
"""

from __future__ import annotations

import errno
import io
import json
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fluidscale.record import read_json, write_atomic
from fluidscale.spec import InvalidInput
from fluidscale.tokens.folders import file_sha256

MANIFEST = "manifest.json"
SPLITS = ("train", "val")
# Files of a part at most, and descriptors that a process needs for all else.
_KINDS, _OTHER_FILES = 5, 512
# Features are kept bit for bit: numpy has no bfloat16, so its bits are stored as uint16.
STORED = {"bfloat16": np.uint16, "float32": np.float32}


def code_type(vocab_size: int) -> type:
    """What codes of this vocabulary are kept as."""
    return np.int16 if vocab_size <= 2**15 else np.int32


def store_array(path: Path, array: np.ndarray) -> dict[str, Any]:
    """Writes a .npy file atomically and returns what the manifest keeps of it."""
    content = io.BytesIO()
    np.save(content, np.ascontiguousarray(array))
    write_atomic(path, content.getvalue())
    return file_facts(path)


def file_facts(path: Path) -> dict[str, Any]:
    """Size and hash of a file: the first is checked at every opening, the second when encoding is asked for again."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def read_manifest(folder: Path, sha256: str = "") -> dict[str, Any]:
    """The manifest of a finished folder. Raises InvalidInput where there is none, or not the one of this hash."""
    path = folder / MANIFEST
    manifest = read_json(path)
    if manifest is None:
        raise InvalidInput(f"{folder}: no {MANIFEST}; encode the data, or let all workers finish")
    if sha256 and (found := file_sha256(path)) != sha256:
        raise InvalidInput(
            f"{path}: sha256 {found[:12]}.. is not {sha256[:12]}.., which the run names; "
            "these are other data: restore them, or plan the sweep again"
        )
    return manifest


def verify(folder: Path) -> None:
    """Reads every byte and compares it with the manifest. Raises InvalidInput naming the first file that differs."""
    for name, facts in _files(read_manifest(folder)):
        check_size(folder / name, facts)
        if file_sha256(folder / name) != facts["sha256"]:
            raise InvalidInput(f"{folder / name}: its bytes are not those of the manifest; {_way_out(folder / name)}")


def check_size(path: Path, facts: dict[str, Any]) -> None:
    """Raises InvalidInput when a file is missing or cut off."""
    size = path.stat().st_size if path.exists() else 0
    if size != facts["bytes"]:
        raise InvalidInput(f"{path}: {size} bytes, the manifest says {facts['bytes']}; {_way_out(path)}")


def _way_out(path: Path) -> str:
    part = "-".join(path.name.split("-")[:2])
    return f"delete {part}.json and {MANIFEST} and encode again"


def _files(manifest: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [item for part in manifest["parts"] for item in part["files"].items()] + list(manifest["files"].items())


class CaptionedShards:
    """Random access to the rows of one split, memory-mapped.

    Raises InvalidInput when the manifest is not the one named, or a file is missing or cut off.
    """

    def __init__(self, folder: Path, split: str, sha256: str = "") -> None:
        self.folder, self.manifest = folder, read_manifest(folder, sha256)
        for name, facts in _files(self.manifest):
            check_size(folder / name, facts)
        self._chosen = _mapped(folder / f"rows-{split}.npy")
        self.rows = len(self._chosen)
        self._first = np.cumsum([0, *(part["rows"] for part in self.manifest["parts"])])
        _allow_files(_KINDS * len(self.manifest["parts"]))
        self._parts = [self._open(part["name"]) for part in self.manifest["parts"]]

    def _open(self, name: str) -> dict[str, np.ndarray]:
        cached = self.manifest["text"]["features"] == "cached"
        kinds = ["tokens", "captions", "offsets", "ids", *(["features"] if cached else [])]
        return {kind: _mapped(self.folder / f"{name}-{kind}.npy") for kind in kinds}

    def tokens(self, rows: np.ndarray) -> Tensor:
        """Stored tokens of the split's rows (B,), in their order, copied into memory."""
        return torch.from_numpy(np.stack([part["tokens"][row] for part, row in self._located(rows)]))

    def text(self, kind: str, rows: np.ndarray, visits: np.ndarray) -> list[Tensor]:
        """`ids` (T_i,) or `features` (T_i, width) of one caption a row; an image's take turns, visit by visit."""
        found = []
        for (part, row), visit in zip(self._located(rows), visits.tolist(), strict=True):
            first, end = part["captions"][row : row + 2].tolist()
            caption = first + visit % (end - first)
            start, stop = part["offsets"][caption : caption + 2].tolist()
            found.append(self._tensor(kind, np.array(part[kind][start:stop])))
        return found

    def _tensor(self, kind: str, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        bits = kind == "features" and self.manifest["text"]["dtype"] == "bfloat16"
        return tensor.view(torch.bfloat16) if bits else tensor

    def _located(self, rows: np.ndarray) -> list[tuple[dict[str, np.ndarray], int]]:
        """The part of each row, and the row within it."""
        places = self._chosen[rows]
        parts = np.searchsorted(self._first, places, side="right") - 1
        within = places - self._first[parts]
        return [(self._parts[part], row) for part, row in zip(parts.tolist(), within.tolist(), strict=True)]


def _allow_files(more: int) -> None:
    """Every mapped file holds a descriptor: as many as the system lets a process have, where the usual 1024 are few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = more + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise InvalidInput(
                f"{path}: {error.strerror}: raise the limit (ulimit -n), or encode into fewer parts"
            ) from error
        raise InvalidInput(f"{path}: not readable ({error}); {_way_out(path)}") from error


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """The same facts give the same bytes, hence the same hash."""
    write_atomic(folder / MANIFEST, json.dumps(facts, indent=1, sort_keys=True) + "\n")


def ragged(parts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Arrays of different lengths as one, and where each begins (n + 1,)."""
    offsets = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64)
    return (np.concatenate(parts) if parts else np.zeros(0, np.int32)), offsets
