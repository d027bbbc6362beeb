"""Where a run's images and captions come from: an embedded world, rendered at will, or shards of encoded pictures.

Training, validation and drawing ask a `Source` and never know which it is.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fluidscale.data.captioned import CaptionedShards, code_type, read_manifest
from fluidscale.data.shards import Shards, ensure
from fluidscale.inputs import check_validation_images
from fluidscale.kept import Kept
from fluidscale.model.transformer import Text
from fluidscale.record import Placement, write_atomic
from fluidscale.spec import InvalidInput, RunSpec, canonical, digest
from fluidscale.tokens.text import TextEncoder, padded, relative_error, tolerance
from fluidscale.world.ahead import drawers

if TYPE_CHECKING:
    from fluidscale.tokens.image import Tokenizer
    from fluidscale.world import World

log = logging.getLogger("fluidscale.data")

# Validation scenes of a world: the start of this split, whose combinations are those of training.
WORLD_VALIDATION = "seen"
# Scenes drawn at a time to be encoded: a multiple of a tokenizer's pass, so that no token depends on it.
_DRAWN = 1024
# Batches of them, encoded: every run of a worker is measured on the same scenes, and several times.
_VALIDATION: Kept[tuple[Tensor, Text]] = Kept(256)


class Rows(Protocol):
    """The training rows, in memory-mapped files."""

    @property
    def rows(self) -> int: ...

    def gather(self, rows: np.ndarray, visits: np.ndarray) -> tuple[Tensor, Text]:
        """Stored tokens (codes (B, L), or moments (B, L, 2 C)) and text of the rows, at these visits (from 0)."""
        ...


class Source(Protocol):
    """One run's data, and the tokenizer that it went through."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    def training(self) -> Rows:
        """The training rows, made first where they are missing. Raises InvalidInput when they are damaged."""
        ...

    def validation(self, first: int, count: int) -> tuple[Tensor, Text]:
        """Stored tokens and text of validation images first .. first + count."""
        ...

    def text(self, captions: Sequence[str]) -> Text:
        """Captions as the model reads them. Raises InvalidInput where they cannot be."""
        ...


@dataclass(frozen=True)
class WorldSource:
    """The embedded world's scenes; those of training are encoded once for all runs of a folder."""

    spec: RunSpec
    world: World
    tokenizer: Tokenizer
    data_dir: Path
    device: str = "cpu"  # of the tokenizer

    def training(self) -> Rows:
        return WordRows(self._shards())

    def validation(self, first: int, count: int) -> tuple[Tensor, Text]:
        def encode() -> tuple[Tensor, Text]:
            images, words, _ = self.world.scenes(first, count, WORLD_VALIDATION)
            return self.tokenizer.encode(images), words_text(words)

        return _VALIDATION((self.world.spec, self.tokenizer.sha256, first, count), encode)

    def text(self, captions: Sequence[str]) -> Text:
        return words_text(np.stack([self.world.encode(caption) for caption in captions]))

    def _shards(self) -> Shards:
        spec, world, tokenizer = self.spec, self.world, self.tokenizer
        recipe = {"world": canonical(spec.data.world), "tokenizer": tokenizer.sha256, "split": "train"}
        kept = np.float16 if spec.model.token_kind == "continuous" else code_type(spec.model.vocab_size)
        if kept == np.int32:
            # A folder of its own: older ones hold such codes wrapped in 16 bits.
            recipe["codes"] = "int32"
        name = f"{spec.data.name}-{spec.model.token_kind}-{digest([recipe, spec.data.images_unique])[:10]}"

        def encode(start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
            parts = [(first, min(_DRAWN, start + count - first)) for first in range(start, start + count, _DRAWN)]
            drawn = [(tokenizer.encode(images).numpy().astype(kept), text) for images, text in draw(parts)]
            tokens, text = zip(*drawn, strict=True)
            return np.concatenate(tokens), np.concatenate(text)

        def progress(done: int, rows: int) -> None:
            log.info("encoded %d of %d scenes", done, rows)

        with drawers(world, self.device) as at_work:
            draw = functools.partial(at_work.map, _training_scenes)
            return ensure(self.data_dir / name, recipe, spec.data.images_unique, encode, progress)


def _training_scenes(world: World, part: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Pictures and captions of one part (first scene, number of scenes)."""
    images, text, _ = world.scenes(*part, split="train")
    return images, text


@dataclass(frozen=True)
class WordRows:
    """Rows of a world: the caption's word ids, padded with 0."""

    shards: Shards

    @property
    def rows(self) -> int:
        return self.shards.rows

    def gather(self, rows: np.ndarray, visits: np.ndarray) -> tuple[Tensor, Text]:
        tokens, words = self.shards.gather(rows)
        return torch.from_numpy(tokens), words_text(words)


def words_text(words: np.ndarray) -> Text:
    """Word ids int64 (B, T), padded with 0, and where a word is."""
    values = torch.as_tensor(words)
    return Text(values, values > 0)


@dataclass(frozen=True)
class ShardSource:
    """Encoded pictures with captions; the text encoder is loaded when live features or new captions need it."""

    spec: RunSpec
    tokenizer: Tokenizer
    folder: Path
    text_encoder: Callable[[], TextEncoder]
    encoder_placed: bool  # whether the text encoder is at hand at all: with cached features it need not be
    checked: Path  # empty files here say which cached features were found equal to live ones
    set_aside: Callable[[], CaptionedShards]  # the validation images

    def training(self) -> Rows:
        data = self.spec.data
        if self.spec.evaluate.val_images:
            # First: what cannot be measured is not trained.
            aside = self.set_aside()
            if data.val_manifest_sha256:
                self._check_features(aside, data.val_manifest_sha256)
        shards = self._shards()
        if shards.rows != data.images_unique:
            wanted = data.images_unique
            raise InvalidInput(f"{self.folder}: {shards.rows} training images, the run names {wanted}; plan again")
        self._check_features(shards, str(data.manifest_sha256))
        return self._rows(shards)

    def _check_features(self, shards: CaptionedShards, sha256: str) -> None:
        """Once for all runs of a folder on one kind of device: the encoder is larger than most models."""
        passed = self.checked / sha256
        if shards.manifest["text"]["features"] != "cached":
            return
        if not self.encoder_placed:
            log.info("cached text features are not compared with live ones: the text encoder is not at hand")
        elif not passed.exists():
            check_features(shards, self.text_encoder())
            write_atomic(passed, "")

    def validation(self, first: int, count: int) -> tuple[Tensor, Text]:
        rows, chosen = self._rows(self.set_aside()), np.arange(first, first + count)
        tokens, text = rows.gather(chosen, np.zeros_like(chosen))
        return tokens.float() if tokens.is_floating_point() else tokens.long(), text

    def text(self, captions: Sequence[str]) -> Text:
        encoder = self.text_encoder()
        return Text(*padded(encoder.features(encoder.ids(captions)), self.spec.model.text_length))

    def _shards(self) -> CaptionedShards:
        return CaptionedShards(self.folder, "train", self.spec.data.manifest_sha256 or "")

    def _rows(self, shards: CaptionedShards) -> CaptionedRows:
        live = None if shards.manifest["text"]["features"] == "cached" else self.text_encoder()
        return CaptionedRows(shards, self.spec.model.text_length, live)


@dataclass(frozen=True)
class CaptionedRows:
    """Rows of encoded pictures: features as they were kept, or made from the captions' ids at every visit."""

    shards: CaptionedShards
    length: int
    live: TextEncoder | None

    @property
    def rows(self) -> int:
        return self.shards.rows

    def gather(self, rows: np.ndarray, visits: np.ndarray) -> tuple[Tensor, Text]:
        if self.live is None:
            features = self.shards.text("features", rows, visits)
        else:
            features = self.live.features([ids.numpy() for ids in self.shards.text("ids", rows, visits)])
        return self.shards.tokens(rows), Text(*padded(features, self.length))


def check_features(shards: CaptionedShards, encoder: TextEncoder, sample: int = 8) -> None:
    """Raises InvalidInput unless the encoder at hand gives the features that the shards hold, on a few captions."""
    rows = np.linspace(0, shards.rows - 1, min(sample, shards.rows)).astype(np.int64)
    visits = np.zeros_like(rows)
    live = encoder.features([ids.numpy() for ids in shards.text("ids", rows, visits)])
    error = relative_error(live, shards.text("features", rows, visits))
    if error > tolerance(encoder.dtype):
        raise InvalidInput(
            f"{shards.folder}: its text features are {error:.2g} off those of {encoder.name} here, "
            f"{tolerance(encoder.dtype):.2g} is rounding; encode again, or use the encoder that they were made with"
        )


def open_source(spec: RunSpec, placement: Placement, runs: Path, device: torch.device | str = "cpu") -> Source:
    """The data that a spec names, from where the placement says that they lie; `runs` is the folder of all runs.

    Raises InvalidInput when they are missing, damaged, or do not fit the spec.
    """
    from fluidscale.world import World

    if spec.data.world is None:
        return _open_shards(spec, placement, runs, device)
    world = World(spec.data.world)
    check_world(spec, world)
    data_dir = Path(placement.data_dir or runs / "data")
    tokenizer = _tokenizer(spec, placement, device)
    picture = ("resolution", tokenizer.resolution, world.spec.resolution)
    facts = (picture, *_token_facts(spec, tokenizer.grid, tokenizer.channels, tokenizer.vocab_size))
    _require(
        facts,
        f"{spec.id}: the tokenizer's",
        "name a tokenizer of the world's resolution in a sweep, which takes the rest from its card",
    )
    return WorldSource(spec, world, tokenizer, data_dir, str(device))


def _tokenizer(spec: RunSpec, placement: Placement, device: torch.device | str) -> Tokenizer:
    """A shipped tokenizer, or the one that the placement has under the spec's hash."""
    from fluidscale.tokens.image import load_tokenizer

    where = placement.assets.get(spec.tokenizer_sha256, spec.tokenizer_sha256)
    tokenizer = load_tokenizer(where, device)
    _same(tokenizer.sha256, spec.tokenizer_sha256, f"{where}: this tokenizer")
    return tokenizer


def _same(found: str, wanted: str, what: str) -> None:
    if found != wanted:
        raise InvalidInput(f"{what} is {found[:12]}.., the run names {wanted[:12]}..; point the placement at that one")


def _open_shards(spec: RunSpec, placement: Placement, runs: Path, device: torch.device | str) -> ShardSource:
    if not spec.data.manifest_sha256:
        raise InvalidInput(
            f"{spec.id}: {spec.data.name} is planned only; encode it (python -m fluidscale.encode --help), then name "
            "the shards in the sweep: data.shards"
        )
    folder = placement.asset(spec.data.manifest_sha256, "shards")
    manifest = read_manifest(folder, spec.data.manifest_sha256)
    check_manifest(spec, manifest, folder)

    @functools.cache
    def text_encoder() -> TextEncoder:
        where = placement.asset(spec.text_encoder_sha256, "text encoder")
        encoder = TextEncoder(where, manifest["text"]["dtype"], manifest["text"]["length"], device)
        _same(encoder.sha256, spec.text_encoder_sha256, f"{where}: this text encoder")
        return encoder

    @functools.cache
    def set_aside() -> CaptionedShards:
        sha256, where = spec.data.val_manifest_sha256 or spec.data.manifest_sha256 or "", folder
        if spec.data.val_manifest_sha256:
            where = placement.asset(sha256, "validation shards")
            check_manifest(spec, read_manifest(where, sha256), where)
        shards = CaptionedShards(where, "val", sha256)
        check_validation_images(spec, shards.rows, str(where))
        return shards

    placed, checked = spec.text_encoder_sha256 in placement.assets, runs / "cache" / f"text-{device}"
    return ShardSource(spec, _tokenizer(spec, placement, device), folder, text_encoder, placed, checked, set_aside)


def check_manifest(spec: RunSpec, manifest: dict[str, Any], folder: Path) -> None:
    """Raises InvalidInput when shards hold other tokens or other text than the model reads."""
    tokens, text, model = manifest["tokenizer"], manifest["text"], spec.model
    facts = (
        ("tokenizer", tokens["sha256"], spec.tokenizer_sha256),
        ("text encoder", text["sha256"], spec.text_encoder_sha256),
        *_token_facts(spec, tokens["grid"], tokens["channels"], tokens["vocab_size"]),
        ("text width", text["width"], model.text_width),
        ("text length", text["length"], model.text_length),
        ("text vocabulary", 0, model.text_vocab_size),
    )
    _require(facts, f"{folder}:", "name these shards in the sweep anew")


def _token_facts(spec: RunSpec, grid: int, channels: int, vocab_size: int) -> tuple[tuple[str, Any, Any], ...]:
    """What tokens are, and what the run's model takes them for."""
    model = spec.model
    taken = (model.grid, model.token_channels, model.vocab_size)
    return tuple(zip(("grid", "token channels", "codes"), (grid, channels, vocab_size), taken, strict=True))


def _require(facts: Iterable[tuple[str, Any, Any]], where: str, way_out: str) -> None:
    """Raises InvalidInput at the first (what, there, wanted) that is not the same."""
    for what, there, wanted in facts:
        if there != wanted:
            raise InvalidInput(f"{where} {what} {there}, the run has {wanted}; {way_out}")


def check_world(spec: RunSpec, world: Any) -> None:
    """Raises InvalidInput when the spec's text table does not fit the world's vocabulary."""
    words, length = len(world.vocabulary), world.text_length
    if spec.model.text_vocab_size < words or spec.model.text_length != length:
        raise InvalidInput(
            f"{spec.id}: world {spec.data.name} has {words} words and captions of {length}; "
            f"set model.text_vocab_size >= {words} and model.text_length: {length}"
        )
