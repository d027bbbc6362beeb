"""What a sweep's data, tokenizer and text encoder are, read from their cards and manifests: no torch, nothing hashed.

A spec names them by sha256. Where they lie is kept beside it, for the placement.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from fluidscale.limits import AtLeastOne, Count, InvalidInput, OneOf, from_dict, mapping
from fluidscale.record import read_json
from fluidscale.spec import TOKEN_KINDS, RunSpec

# Where shipped networks and their cards lie: tokenizers, and an embedded world's own judges.
CARDS = Path(__file__).resolve().parent / "tokens" / "weights"
JUDGES = Path(__file__).resolve().parent / "evaluate" / "weights"
# Of what images each judge is asked.
_JUDGED_BY = {"detector": "geneval_images_per_prompt", "features": "fd_images"}


@dataclass(frozen=True)
class _Tokens:
    """What tokens are: all that planning asks of a tokenizer; a card and a manifest say more."""

    kind: Annotated[str, OneOf(TOKEN_KINDS)]
    grid: AtLeastOne
    channels: Count
    vocab_size: Count


@dataclass(frozen=True)
class _Planned(_Tokens):
    """A tokenizer that need not be there, in a sweep."""

    name: str = ""


@dataclass(frozen=True)
class TokenCard(_Tokens):
    """What a trained tokenizer's card must say where a run is planned."""

    sha256: str


@dataclass(frozen=True)
class TokenizerCard(TokenCard):
    """What it must say where pictures are made of them."""

    resolution: AtLeastOne


@dataclass(frozen=True)
class Inputs:
    """Parts of a spec that follow from the files it names, and where these lie ({sha256: path})."""

    card: dict[str, Any]
    data: dict[str, Any]
    text: dict[str, Any] = field(default_factory=dict)  # of the model: text_vocab_size, text_width, text_length
    text_encoder: str = ""
    text_encoder_sha256: str = ""
    assets: dict[str, str] = field(default_factory=dict)
    val_images: int | None = None  # that were set aside; None where there are as many as one likes


def read_inputs(content: dict[str, Any], where: str) -> Inputs:
    """The inputs of a sweep's sections `data`, `tokenizer` and `text_encoder`.

    - `data.world`: an embedded world; the tokenizer is a shipped one, or the path of its .safetensors.
    - `data.shards`: a folder of `fluidscale.encode`, whose manifest names tokenizer and text encoder; the sections
      `tokenizer` and `text_encoder` say in which folders these are. `data.val_shards`: another such folder, of the
      same two, whose images set aside for validation take the place of its own.
    - neither, or a tokenizer of {kind, grid, channels, vocab_size}: planned only. With a `name` in it too, the network
      of that name takes its place once it is trained.

    Raises InvalidInput where a file is missing or is no such thing.
    """
    data, tokenizer = dict(content.get("data") or {}), content.get("tokenizer")
    encoder = str(content.get("text_encoder") or "")
    if "shards" in data:
        return _encoded(data, tokenizer, encoder, where)
    if data.pop("val_shards", None) is not None:
        raise InvalidInput(f"{where}: data.val_shards: only beside data.shards, whose validation images it replaces")
    if isinstance(tokenizer, dict):
        return Inputs(_planned(tokenizer, where), data, text_encoder=encoder)
    card = read_card(str(tokenizer), where)
    path = Path(str(tokenizer))
    assets = {card["sha256"]: str(path.absolute())} if path.suffix == ".safetensors" else {}
    return Inputs(card, data, text_encoder=encoder, assets=assets)


def _planned(tokenizer: dict[str, Any], where: str) -> dict[str, Any]:
    """The card of a tokenizer that need not be there yet: the trained network's if it is, else what is asked of it."""
    asked = from_dict(_Planned, tokenizer, f"{where}: tokenizer")
    tokens = {field.name: getattr(asked, field.name) for field in fields(_Tokens)}
    if not asked.name or not (CARDS / f"{asked.name}.json").exists():
        return {**tokens, "sha256": ""}
    card = read_card(asked.name, where)
    for key, value in tokens.items():
        if card[key] != value:
            raise InvalidInput(f"{where}: tokenizer: {asked.name} has {key} {card[key]}, the sweep asks for {value}")
    return card


@dataclass(frozen=True)
class _Shards:
    """What a folder of `fluidscale.encode` holds."""

    folder: Path
    sha256: str  # of its manifest
    card: dict[str, Any]
    text: dict[str, Any]  # of the model, as in Inputs
    text_encoder: str
    alike: dict[str, Any]  # what must be the same where a model trained on one folder is validated on another
    train: int
    val: int


def _shards(name: Any, where: str) -> _Shards:
    """Raises InvalidInput where there are none."""
    folder = Path(str(name)).absolute()
    path = folder / "manifest.json"
    manifest = read_json(path)
    if manifest is None:
        raise InvalidInput(f"{where}: no {path}; make it with python -m fluidscale.encode")
    try:
        card, text, splits = manifest["tokenizer"], manifest["text"], manifest["splits"]
        model = {"text_vocab_size": 0, "text_width": text["width"], "text_length": text["length"]}
        alike = {"tokenizer": card["sha256"], "text encoder": text["sha256"], "text length": text["length"]}
        alike["text dtype"] = text["dtype"]
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        return _Shards(folder, sha256, card, model, text["encoder"], alike, splits["train"], splits["val"])
    except (KeyError, TypeError) as error:
        raise InvalidInput(f"{path}: not a manifest of fluidscale.encode ({error!r} is missing)") from error


def _encoded(data: dict[str, Any], tokenizer: Any, encoder: str, where: str) -> Inputs:
    shards = _shards(data.pop("shards"), f"{where}: data.shards")
    data = {"name": shards.folder.name, **data, "images_unique": shards.train, "manifest_sha256": shards.sha256}
    assets, aside = {shards.sha256: str(shards.folder)}, shards.val
    if (name := data.pop("val_shards", None)) is not None:
        others = _shards(name, f"{where}: data.val_shards")
        for what, wanted in shards.alike.items():
            if others.alike[what] != wanted:
                message = f"its {what} is {others.alike[what]}, that of data.shards {wanted}; encode both alike"
                raise InvalidInput(f"{where}: data.val_shards: {others.folder}: {message}")
        data["val_manifest_sha256"], aside = others.sha256, others.val
        assets[others.sha256] = str(others.folder)
    for name, given in (("tokenizer", tokenizer), ("text_encoder", encoder)):
        if given:
            known = shards.alike[name.replace("_", " ")]
            assets[known] = str(there(Path(str(given)), f"{where}: {name}"))
    encoder_sha256 = shards.alike["text encoder"]
    return Inputs(shards.card, data, shards.text, shards.text_encoder, encoder_sha256, assets, aside)


def there(path: Path, where: str) -> Path:
    """The absolute path. Raises InvalidInput when nothing is there."""
    if not path.exists():
        raise InvalidInput(f"{where}: no such file or folder: {path}")
    return path.absolute()


def read_card(name: str, where: str) -> dict[str, Any]:
    """What a tokenizer's card says of its tokens: a shipped one by name, a user's by the path of its .safetensors."""
    path = Path(name).with_suffix(".json") if name.endswith(".safetensors") else CARDS / f"{name}.json"
    try:
        card = mapping(json.loads(path.read_text()), str(path))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        known = ", ".join(sorted(p.stem for p in CARDS.glob("*.json")))
        raise InvalidInput(
            f"{where}: no tokenizer {name!r} ({path} unreadable); there are: {known}; train another with "
            "python -m fluidscale.pretrain"
        ) from error
    check_card(card, str(path), TokenCard)
    return card


def check_card(card: dict[str, Any], where: str, needed: type[TokenCard]) -> None:
    """Raises InvalidInput for a card that does not say all that is `needed`."""
    from_dict(needed, {field.name: card[field.name] for field in fields(needed) if field.name in card}, where)


def check_validation_images(spec: RunSpec, there: int, where: str) -> None:
    """Raises InvalidInput when a run asks for more validation images than were set aside."""
    if (asked := spec.evaluate.val_images) > there:
        raise InvalidInput(
            f"{where}: {there} validation images, {asked} asked for; lower evaluate.val_images, or encode with a "
            "larger --val-images"
        )


def check_worlds_judges(spec: RunSpec, where: str) -> None:
    """Raises InvalidInput when the networks of a run's world, by their cards, could not judge what the run draws."""
    for target, images in _JUDGED_BY.items():
        name, world = f"{spec.data.name}-{target}", spec.data.world
        if world is None or not getattr(spec.evaluate, images):
            continue
        way_out = f"train one (python -m fluidscale.pretrain {target} --help) or set evaluate.{images} to 0"
        card = read_json(JUDGES / f"{name}.json")
        if card is None:
            raise InvalidInput(f"{where}: no {name}, which is to judge the world of this name; {way_out}")
        for what, asked in (("classes", world.classes), ("colors", world.colors)):
            if target == "detector" and (unknown := sorted({*asked} - {*card.get(what, ())})):
                raise InvalidInput(f"{where}: {name} does not know the {what} {', '.join(unknown)}; {way_out}")
