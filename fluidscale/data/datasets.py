"""Folders and tables of captioned images, listed in parts that workers share out among themselves.

- a folder of images with COCO's captions JSON
- a CSV, TSV or parquet table with a column of image paths and one of captions; rows of one image are joined
- WebDataset tars: members of one name are one sample, its caption in .txt or in .json under "caption"
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from fluidscale.spec import InvalidInput, digest

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TABLES = (".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Item:
    """One image as found: its bytes unread, its captions, or the reason why it is of no use."""

    name: str
    read: Callable[[], bytes]
    captions: tuple[str, ...]
    fault: str = ""


@dataclass(frozen=True)
class Dataset:
    """What a data set holds, in parts whose order and content do not depend on who lists them."""

    parts: tuple[Callable[[], Iterator[Item]], ...]
    listing_sha256: str  # of names and captions, or of the tars' names and sizes
    images: int | None  # None: not known before the tars are read


def open_dataset(path: Path, captions: Path | None, rows_per_part: int, allow_missing: bool = False) -> Dataset:
    """Lists a data set. Raises InvalidInput when it is none, captions are not UTF-8, or images are missing."""
    if not path.exists():
        raise InvalidInput(f"{path}: no such file or folder")
    tars = [path] if path.suffix == ".tar" else sorted(path.glob("*.tar")) if path.is_dir() else []
    if tars:
        return _tars(tars)
    if path.suffix in TABLES:
        table = _table(path)
        return _listed(path.parent, table, rows_per_part, allow_missing, str(path))
    if captions is None:
        raise InvalidInput(f"{path}: name its captions (--captions FILE.json, COCO's form), or give tars or a table")
    return _listed(path, _coco(captions), rows_per_part, allow_missing, str(captions))


def _listed(root: Path, captions: dict[str, list[str]], rows_per_part: int, allow_missing: bool, where: str) -> Dataset:
    """Images by path below a root, each with all its captions."""
    names = sorted(captions)
    if not names:
        raise InvalidInput(f"{where}: no captions")
    missing = [name for name in names if not (root / name).is_file()]
    if missing and not allow_missing:
        raise InvalidInput(
            f"{where}: {len(missing)} of {len(names)} images are not in {root}, first {missing[0]}; "
            "add them, or leave them out with --allow-missing"
        )

    def part(first: int) -> Callable[[], Iterator[Item]]:
        return lambda: (
            Item(name, (root / name).read_bytes, tuple(dict.fromkeys(captions[name])))
            for name in names[first : first + rows_per_part]
        )

    parts = tuple(part(first) for first in range(0, len(names), rows_per_part))
    return Dataset(parts, digest({"captions": captions, "rows_per_part": rows_per_part}), len(names))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise InvalidInput(f"{path}: not readable ({error.strerror})") from error


def _coco(path: Path) -> dict[str, list[str]]:
    """COCO's captions by file name: {"images": [{id, file_name}], "annotations": [{image_id, caption}]}."""
    try:
        content = json.loads(_read_text(path))
        files = {image["id"]: str(image["file_name"]) for image in content["images"]}
        found: dict[str, list[str]] = {}
        for note in sorted(content["annotations"], key=lambda note: note.get("id", 0)):
            found.setdefault(files[note["image_id"]], []).append(str(note["caption"]).strip())
        return found
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InvalidInput(
            f"{path}: not COCO's captions ({type(error).__name__}: {error}); expected "
            '{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}'
        ) from error


def _table(path: Path) -> dict[str, list[str]]:
    """Captions by image path, from the columns `image` (or `file_name`, `path`) and `caption` (or `text`)."""
    found: dict[str, list[str]] = {}
    rows, columns = _parquet(path) if path.suffix == ".parquet" else _delimited(path)
    image = _column(columns, ("image", "file_name", "path"), path)
    caption = _column(columns, ("caption", "text"), path)
    for row in rows:
        found.setdefault(str(row[image]), []).append(str(row[caption] or "").strip())
    return found


def _delimited(path: Path) -> tuple[Iterable[dict[str, Any]], list[str]]:
    # Line ends within quotes are the caption's own.
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), delimiter="\t" if path.suffix == ".tsv" else ",")
    return reader, list(reader.fieldnames or ())


def _parquet(path: Path) -> tuple[Iterable[dict[str, Any]], list[str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        return table.to_pylist(), table.column_names
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: not a readable table of UTF-8 text ({' '.join(str(error).split())})") from error


def _column(columns: list[str], names: tuple[str, ...], path: Path) -> str:
    for name in names:
        if name in columns:
            return name
    raise InvalidInput(f"{path}: no column {' or '.join(names)}; it has: {', '.join(columns) or 'none'}")


def _tars(paths: list[Path]) -> Dataset:
    """A part a tar: their members need not be listed first, which would read them all."""
    listing = [[path.name, path.stat().st_size] for path in paths]
    return Dataset(tuple(lambda path=path: _members(path) for path in paths), digest({"tars": listing}), None)


def _members(path: Path) -> Iterator[Item]:
    try:
        with tarfile.open(path) as archive:
            samples: dict[str, dict[str, bytes]] = {}
            for member in archive:
                file = archive.extractfile(member) if member.isfile() else None
                if file is None:
                    continue
                name = PurePosixPath(member.name)
                stem, _, ending = name.name.partition(".")
                key = str(name.parent / stem)
                # Members of one sample stand together; the one before is complete when another begins.
                if samples and key not in samples:
                    yield _sample(path, *samples.popitem())
                samples.setdefault(key, {})[f".{ending.lower()}"] = file.read()
            if samples:
                yield _sample(path, *samples.popitem())
    except (tarfile.TarError, OSError, EOFError) as error:
        yield Item(path.name, bytes, (), f"tar unreadable from here on: {error}")


def _sample(path: Path, key: str, members: dict[str, bytes]) -> Item:
    name = f"{path.name}/{key}"
    image = next((members[ending] for ending in IMAGES if ending in members), None)
    try:
        if ".txt" in members:
            captions = (members[".txt"].decode("utf-8").strip(),)
        else:
            content = json.loads(members.get(".json", b"{}").decode("utf-8"))
            captions = (str(content["caption"]).strip(),) if "caption" in content else ()
    except (UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
        return Item(name, bytes, (), f"caption unreadable: {error}")
    if image is None:
        return Item(name, bytes, (), f"no image among {', '.join(sorted(members))}")
    return Item(name, partial(bytes, image), captions)
