"""Where a run's images and captions come from: an embedded world, rendered at will, or shards of encoded pictures.

Training, validation and drawing ask a `Source` and never know which it is.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fluidscale.data.shards import Shards, ensure
from fluidscale.model.transformer import Text
from fluidscale.record import Placement
from fluidscale.spec import InvalidInput, RunSpec, canonical, digest

if TYPE_CHECKING:
    from fluidscale.tokens.image import Tokenizer
    from fluidscale.world import World

log = logging.getLogger("fluidscale.data")

# Validation scenes of a world: the start of this split, whose combinations are those of training.
WORLD_VALIDATION = "seen"


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

    def training(self) -> Rows:
        return WordRows(self._shards())

    def validation(self, first: int, count: int) -> tuple[Tensor, Text]:
        images, words, _ = self.world.scenes(first, count, WORLD_VALIDATION)
        return self.tokenizer.encode(images), words_text(words)

    def text(self, captions: Sequence[str]) -> Text:
        return words_text(np.stack([self.world.encode(caption) for caption in captions]))

    def _shards(self) -> Shards:
        spec, world, tokenizer = self.spec, self.world, self.tokenizer
        recipe = {"world": canonical(spec.data.world), "tokenizer": tokenizer.sha256, "split": "train"}
        name = f"{spec.data.name}-{spec.model.token_kind}-{digest([recipe, spec.data.images_unique])[:10]}"
        kept = np.float16 if spec.model.token_kind == "continuous" else np.int16

        def encode(start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
            parts = []
            for first in range(start, start + count, 4096):
                images, text, _ = world.scenes(first, min(4096, start + count - first), split="train")
                parts.append((tokenizer.encode(images).numpy().astype(kept), text))
            tokens, text = zip(*parts, strict=True)
            return np.concatenate(tokens), np.concatenate(text)

        def progress(done: int, rows: int) -> None:
            log.info("encoded %d of %d scenes", done, rows)

        return ensure(self.data_dir / name, recipe, spec.data.images_unique, encode, progress)


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


def open_source(spec: RunSpec, placement: Placement, runs: Path, device: torch.device | str = "cpu") -> Source:
    """The data that a spec names, from where the placement says that they lie; `runs` is the folder of all runs.

    Raises InvalidInput when they are missing, damaged, or do not fit the spec.
    """
    from fluidscale.tokens.image import load_tokenizer
    from fluidscale.world import World

    assert spec.data.world is not None
    world = World(spec.data.world)
    check_world(spec, world)
    tokenizer = load_tokenizer(spec.tokenizer_sha256, device)
    return WorldSource(spec, world, tokenizer, Path(placement.data_dir or runs / "data"))


def check_world(spec: RunSpec, world: Any) -> None:
    """Raises InvalidInput when the spec's text table does not fit the world's vocabulary."""
    words, length = len(world.vocabulary), world.text_length
    if spec.model.text_vocab_size < words or spec.model.text_length != length:
        raise InvalidInput(
            f"{spec.id}: world {spec.data.name} has {words} words and captions of {length}; "
            f"set model.text_vocab_size >= {words} and model.text_length: {length}"
        )
