"""Pictures and captions to parts of token shards, and finished parts to a manifest.

Each part is complete or absent, whoever encodes it, so workers need to agree on nothing but the recipe; whoever
finishes last writes the manifest.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fluidscale.data.captioned import STORED, code_type, file_facts, ragged, store_array, write_manifest
from fluidscale.data.datasets import Dataset, Item
from fluidscale.data.pictures import RULE, square
from fluidscale.data.shards import locked
from fluidscale.record import atomic, read_json, write_atomic, write_json
from fluidscale.spec import InvalidInput, digest

if TYPE_CHECKING:
    import torch

    from fluidscale.tokens.image import Tokenizer
    from fluidscale.tokens.text import TextEncoder

# Images read and encoded at once.
WINDOW = 128
# Threads that read pictures beside the encoder.
READERS = 4
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Encoder:
    """What turns images and captions into rows; `text_features` is cached (kept in the shards) or live (ids only)."""

    tokenizer: Tokenizer
    text: TextEncoder
    text_features: str

    def recipe(self, dataset: Dataset, val_images: int) -> dict[str, Any]:
        """Everything that decides what the shards hold."""
        tokenizer, text = self.tokenizer, self.text
        names = ("kind", "resolution", "grid", "channels", "vocab_size", "sha256")
        return {
            "dataset_sha256": dataset.listing_sha256,
            "parts": len(dataset.parts),
            "val_images": val_images,
            "images": RULE,
            "tokenizer": {name: getattr(tokenizer, name) for name in names},
            "text": {
                "encoder": text.name,
                "sha256": text.sha256,
                "width": text.width,
                "length": text.length,
                "dtype": text.dtype,
                "features": self.text_features,
            },
        }


@dataclass(frozen=True)
class Row:
    """One image that was read: where from, the hash of its file, its pixels and captions."""

    name: str
    sha256: str
    pixels: np.ndarray
    captions: tuple[str, ...]


def begin(folder: Path, recipe: dict[str, Any]) -> None:
    """Writes recipe.json, or refuses a folder that holds other data."""
    path = folder / "recipe.json"
    with locked(folder.parent / f".{folder.name}.lock"):
        there = read_json(path)
        if there is not None and there != json.loads(json.dumps(recipe)):
            raise InvalidInput(f"{folder}: holds other data than asked for; choose another --out, or delete it")
        if there is None:
            write_json(path, recipe)


def part_name(index: int) -> str:
    return f"part-{index:05d}"


def encode_part(folder: Path, index: int, items: Iterator[Item], encoder: Encoder, progress: Progress) -> None:
    """Encodes one part and marks it complete; one that is complete already is left alone.

    One process at a time: another that comes to the same part waits, and then finds it complete. Pictures and captions
    that are of no use go to the part's list of rejected ones.
    """
    name = part_name(index)
    with locked(folder / f".{name}.lock"):
        if (folder / f"{name}.json").exists():
            return
        for partial in folder.glob(f".{name}-*.tmp"):
            # Of a process that was killed: only the lock's holder writes here.
            partial.unlink()
        _encode_part(folder, name, items, encoder, progress)


def _encode_part(folder: Path, name: str, items: Iterator[Item], encoder: Encoder, progress: Progress) -> None:
    rejected: list[dict[str, str]] = []
    tokens: list[np.ndarray] = []
    rows: list[dict[str, Any]] = []
    kept = np.float16 if encoder.tokenizer.kind == "continuous" else code_type(encoder.tokenizer.vocab_size)
    for window in read(items, encoder.tokenizer.resolution, rejected, progress):
        encoded = encoder.tokenizer.encode(np.stack([row.pixels for row in window]))
        tokens.append(encoded.cpu().numpy().astype(kept))
        rows += [{"name": row.name, "sha256": row.sha256, "captions": row.captions} for row in window]
    shape = (0, encoder.tokenizer.grid**2, *([2 * encoder.tokenizer.channels] if kept == np.float16 else []))
    arrays = {"tokens": np.concatenate(tokens) if tokens else np.zeros(shape, kept)}
    ids = encoder.text.ids([caption for row in rows for caption in row["captions"]]) if rows else []
    arrays["captions"] = np.cumsum([0, *(len(row["captions"]) for row in rows)], dtype=np.int64)
    arrays["ids"], arrays["offsets"] = ragged(ids)
    files = {f"{name}-{kind}.npy": store_array(folder / f"{name}-{kind}.npy", array) for kind, array in arrays.items()}
    if encoder.text_features == "cached":
        path = folder / f"{name}-features.npy"
        _store_features(path, ids, encoder.text)
        files[path.name] = file_facts(path)
    _write_index(folder / f"{name}-index.parquet", rows)
    facts = {"name": name, "rows": len(rows), "files": files}
    write_json(folder / f"{name}.json", {**facts, "images": [row["sha256"] for row in rows], "rejected": rejected})


def read(
    items: Iterator[Item], resolution: int, rejected: list[dict[str, str]], progress: Progress
) -> Iterator[list[Row]]:
    """Windows of readable images; the others are added to `rejected` with their reason."""

    def one(item: Item) -> Row | str:
        if item.fault or not item.captions:
            return item.fault or "no caption"
        try:
            data = item.read()
            return Row(item.name, hashlib.sha256(data).hexdigest(), square(data, resolution), item.captions)
        # Whatever a decoder may raise on a damaged file: no single picture stops the others.
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return f"{type(error).__name__}: {error}"

    with ThreadPoolExecutor(READERS) as readers:
        while window := list(itertools.islice(items, WINDOW)):
            answers = list(readers.map(one, window))
            for item, answer in zip(window, answers, strict=True):
                if isinstance(answer, str):
                    rejected.append({"image": item.name, "reason": answer})
            if rows := [answer for answer in answers if isinstance(answer, Row)]:
                yield rows
            progress(len(window))


def _store_features(path: Path, ids: Sequence[np.ndarray], text: TextEncoder) -> None:
    """Features of one caption after the other, straight into the file: those of a part need not fit into memory."""
    import torch

    shape = (sum(len(one) for one in ids), text.width)
    if not shape[0]:
        store_array(path, np.zeros(shape, STORED[text.dtype]))
        return
    with atomic(path) as temporary:
        stored = np.lib.format.open_memmap(temporary, mode="w+", dtype=STORED[text.dtype], shape=shape)
        start = 0
        for first in range(0, len(ids), WINDOW):
            for values in text.features(ids[first : first + WINDOW]):
                bits: torch.Tensor = values.view(torch.uint16) if text.dtype == "bfloat16" else values
                stored[start : start + len(values)] = bits.numpy()
                start += len(values)
        stored.flush()


def _write_index(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {"image": pyarrow.string(), "sha256": pyarrow.string(), "captions": pyarrow.list_(pyarrow.string())}
    table = pyarrow.table(
        {
            "image": [row["name"] for row in rows],
            "sha256": [row["sha256"] for row in rows],
            "captions": [list(row["captions"]) for row in rows],
        },
        schema=pyarrow.schema(list(columns.items())),
    )
    with atomic(path) as temporary:
        pyarrow.parquet.write_table(table, temporary)


def finish(folder: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest, written when every part is complete; None while others are still at work.

    Images of equal bytes are kept once, the first of them. The validation split is the `val_images` whose hashes come
    first: as good as random, and the same however the parts were shared out. Raises InvalidInput when too few are left.
    """
    with locked(folder.parent / f".{folder.name}.lock"):
        parts = [read_json(folder / f"{part_name(index)}.json") for index in range(recipe["parts"])]
        if any(part is None for part in parts):
            return None
        done = [part for part in parts if part is not None]
        first: dict[str, int] = {}
        hashes = [sha256 for part in done for sha256 in part["images"]]
        for row, sha256 in enumerate(hashes):
            first.setdefault(sha256, row)
        order = sorted(first)
        if len(order) <= recipe["val_images"]:
            raise InvalidInput(
                f"{folder}: {len(order)} distinct images were readable, {recipe['val_images']} are to be set aside for "
                "validation; lower --val-images, and see rejected.jsonl"
            )
        _write_rejected(folder, done)
        split = {"val": order[: recipe["val_images"]], "train": order[recipe["val_images"] :]}
        rows = {name: np.array([first[sha256] for sha256 in chosen], np.int64) for name, chosen in split.items()}
        # Validation stays in the order of hashes: the first rows of it are as good as random too.
        rows["train"].sort()
        files = {f"rows-{name}.npy": store_array(folder / f"rows-{name}.npy", chosen) for name, chosen in rows.items()}
        manifest = {
            "recipe": recipe,
            "recipe_sha256": digest(recipe),
            "tokenizer": recipe["tokenizer"],
            "text": recipe["text"],
            "splits": {name: len(chosen) for name, chosen in rows.items()},
            "duplicates": len(hashes) - len(first),
            "rejected": sum(len(part["rejected"]) for part in done),
            "parts": [{key: part[key] for key in ("name", "rows", "files")} for part in done],
            "files": files,
        }
        _merge_index(folder, len(done), rows)
        write_manifest(folder, manifest)
        return manifest


def _write_rejected(folder: Path, parts: list[dict[str, Any]]) -> None:
    lines = [json.dumps(entry) + "\n" for part in parts for entry in part["rejected"]]
    write_atomic(folder / "rejected.jsonl", "".join(lines))


def _merge_index(folder: Path, parts: int, rows: dict[str, np.ndarray]) -> None:
    """index.parquet: every row in order, with its split; empty for a duplicate."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.concat_tables(
        [pyarrow.parquet.read_table(folder / f"{part_name(index)}-index.parquet") for index in range(parts)]
    )
    splits = np.full(table.num_rows, "", dtype=object)
    for name, chosen in rows.items():
        splits[chosen] = name
    with atomic(folder / "index.parquet") as temporary:
        pyarrow.parquet.write_table(table.append_column("split", pyarrow.array(splits, pyarrow.string())), temporary)


__all__ = ["Encoder", "begin", "encode_part", "finish", "read"]
