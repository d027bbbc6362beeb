"""What drawn images are compared with: features of real ones, kept in a file that says of which, and by whom."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from fluidscale.evaluate.extract import Extractor
from fluidscale.published import reference_facts
from fluidscale.record import write_atomic
from fluidscale.spec import InvalidInput


@dataclass(frozen=True)
class Reference:
    """Features (m, F) of real images and `facts`: which images, how resized, by which extractor."""

    features: np.ndarray
    facts: dict[str, Any]


def save_reference(path: Path, kept: Reference) -> None:
    """One file: features, and what they are of."""
    content = io.BytesIO()
    np.savez(content, features=kept.features, facts=np.array(json.dumps(kept.facts, sort_keys=True)))
    write_atomic(path, content.getvalue())


def load_reference(path: Path, network: Extractor) -> Reference:
    """Raises InvalidInput when the file is damaged, or its statistics are another extractor's."""
    facts = reference_facts(path)
    if (measured := facts["extractor_sha256"]) != network.sha256:
        raise InvalidInput(
            f"{path}: statistics of {facts['extractor']} {measured[:12]}.., judged with {network.name} "
            f"{network.sha256[:12]}..; distances between them mean nothing: make the reference with this extractor"
        )
    try:
        with np.load(path, allow_pickle=False) as content:
            return Reference(content["features"], facts)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise InvalidInput(f"{path}: damaged reference statistics ({error}); make them again") from error
