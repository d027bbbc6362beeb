"""Shipped weights and their cards, by name. Planning reads cards, so nothing here imports torch.

A network is two files side by side: NAME.safetensors (the weights) and NAME.json (its card: what it is, the command
that trained it, its measured quality, and the sha256 of the weights, which is checked at every load).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fluidscale.inputs import CARDS, JUDGES
from fluidscale.record import write_atomic, write_json
from fluidscale.spec import InvalidInput


def shipped_cards() -> dict[str, dict[str, Any]]:
    """Every shipped network's card by name, tokenizers first."""
    return {path.stem: _read_card(path) for path in _shipped()}


def exists(name: str) -> bool:
    """Whether a network of this name is shipped."""
    return any(path.stem == name for path in _shipped())


def card(name_or_path: str) -> dict[str, Any]:
    """The card of a shipped network (`icons32-vae`, or its sha256) or of the user's own (`folder/NAME.safetensors`).

    Raises InvalidInput when there is none, naming those there are.
    """
    return _read_card(_weights_path(name_or_path).with_suffix(".json"))


def verified(name_or_path: str) -> tuple[bytes, dict[str, Any]]:
    """The weights as safetensors bytes and their card. Raises InvalidInput when the bytes are not those of the card."""
    path = _weights_path(name_or_path)
    content = _read_card(path.with_suffix(".json"))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"{path}: not readable ({error.strerror})") from error
    found = hashlib.sha256(data).hexdigest()
    if found != content.get("sha256"):
        raise InvalidInput(
            f"{path}: sha256 {found[:12]}.. is not its card's {str(content.get('sha256'))[:12]}..; "
            "the file was damaged or replaced: restore it, or train it again with the command on its card"
        )
    return data, content


def store(path: Path, data: bytes, content: dict[str, Any]) -> dict[str, Any]:
    """Writes weights and card, each atomically, and returns the card with its sha256."""
    content = {**content, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    write_atomic(path.with_suffix(".safetensors"), data)
    write_json(path.with_suffix(".json"), content)
    return content


def _weights_path(name_or_path: str) -> Path:
    given = Path(name_or_path)
    if given.suffix == ".safetensors":
        return given
    for path in _shipped():
        if name_or_path in (path.stem, _read_card(path)["sha256"]):
            return path.with_suffix(".safetensors")
    known = ", ".join(path.stem for path in _shipped())
    raise InvalidInput(f"{name_or_path}: no such network; shipped: {known}; or give the path of a .safetensors file")


def _shipped() -> list[Path]:
    return [path for folder in (CARDS, JUDGES) for path in sorted(folder.glob("*.json"))]


def _read_card(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise InvalidInput(f"{path}: the card beside the weights is not readable ({error.strerror})") from error
    except ValueError as error:
        raise InvalidInput(f"{path}: not a card ({error})") from error
    if not isinstance(content, dict):
        raise InvalidInput(f"{path}: not a card (expected an object)")
    return content
