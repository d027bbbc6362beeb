"""Sweep files to runs: strict YAML in, fully resolved specs out, before anything is spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fluidscale.spec import InvalidInput, WorldSpec, from_dict, unknown_key

SWEEPS = Path(__file__).resolve().parent.parent / "sweeps"


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping with its interpolations resolved. Raises InvalidInput naming the file."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except FileNotFoundError as error:
        raise InvalidInput(f"{path}: no such file") from error
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise InvalidInput(f"{path}: expected a mapping of keys, got {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def load_world(name: str) -> WorldSpec:
    """A row of sweeps/worlds.yaml by name, or a world of the user's own from a YAML file with WorldSpec's fields."""
    if name.endswith((".yaml", ".yml")):
        return from_dict(WorldSpec, read_yaml(Path(name)), name)
    path = SWEEPS / "worlds.yaml"
    rows = read_yaml(path)
    if name not in rows:
        raise InvalidInput(unknown_key(name, rows, str(path)))
    return from_dict(WorldSpec, rows[name], f"{path}: {name}")
