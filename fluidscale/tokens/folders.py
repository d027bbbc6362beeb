"""Networks of other projects as local folders: what a folder holds, and one hash for all of it. No torch, no download.

A folder is what `save_pretrained` of diffusers or transformers writes: config.json beside the weights. Its identity is
that of every byte which decides its output: the configuration, our settings, the weights and, for text, the vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fluidscale.limits import InvalidInput, unknown_key
from fluidscale.record import read_json
from fluidscale.spec import digest

# Our own settings of a tokenizer, an optional file in its folder, with these defaults.
SETTINGS = "fluidscale.json"
DEFAULTS: dict[str, Any] = {
    # Fluid trains on 256 x 256 images (arXiv 2410.13863).
    "resolution": 256,
    # Side of the square of latents that becomes one token; 0: 2 for latents of 4 channels, as MAR grouped KL-8
    # (arXiv 2406.11838), else 1.
    "group": 0,
    # What is learned from: "sample", a fresh draw at every visit (MAR), or "mean".
    "posterior": "sample",
}
# What each class of tokenizer calls its kind of token; JanusVQVAE's architecture is LlamaGen's VQ-16.
KINDS = {"AutoencoderKL": "continuous", "VQModel": "discrete", "JanusVQVAE": "discrete"}
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt")
VOCABULARY = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "vocab.txt", "special_tokens_map.json")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder. Raises InvalidInput where there is none, with the way out."""
    content = read_json(folder / "config.json") if folder.is_dir() else None
    if content is None:
        inside = [child.name for child in sorted(folder.glob("*")) if (child / "config.json").exists()]
        hint = f"; name one of its parts: {', '.join(inside)}" if inside else ""
        raise InvalidInput(f"{folder}: no config.json, so it is no saved network{hint}")
    if not isinstance(content, dict):
        raise InvalidInput(f"{folder / 'config.json'}: expected an object")
    return content


def class_of(folder: Path, config: dict[str, Any]) -> str:
    """The tokenizer class that a configuration is of. Raises InvalidInput for any that is not known here."""
    name = config.get("_class_name") or {"janus_vqgan": "JanusVQVAE"}.get(str(config.get("model_type")), "")
    if name not in KINDS:
        found = name or config.get("model_type") or "nothing"
        raise InvalidInput(f"{folder / 'config.json'}: names {found}, expected one of {', '.join(KINDS)}")
    return name


def settings_of(folder: Path) -> dict[str, Any]:
    """Our settings of a tokenizer folder, defaults filled in."""
    path = folder / SETTINGS
    given = read_json(path) or {}
    for key in given:
        if key not in DEFAULTS:
            raise InvalidInput(unknown_key(key, DEFAULTS, str(path)))
    settings = {**DEFAULTS, **given}
    if settings["posterior"] not in ("sample", "mean"):
        raise InvalidInput(f"{path}: posterior is 'sample' or 'mean', not {settings['posterior']!r}")
    return settings


def tokenizer_card(folder: Path) -> dict[str, Any]:
    """What the rest of the program asks of a tokenizer, in the form of the shipped ones' cards.

    Raises InvalidInput when the folder is not a tokenizer, or its numbers do not fit together.
    """
    config = read_config(folder)
    name, settings = class_of(folder, config), settings_of(folder)
    kind, janus = KINDS[name], name == "JanusVQVAE"
    levels = len(config.get("channel_multiplier", ()) if janus else config.get("block_out_channels", ()))
    latent_channels = int(config.get("latent_channels", 4))
    group = (settings["group"] or (2 if latent_channels == 4 else 1)) if kind == "continuous" else 1
    factor = 2 ** (levels - 1) * group
    grid, rest = divmod(settings["resolution"], factor)
    if rest or grid < 1:
        raise InvalidInput(
            f"{folder / SETTINGS}: resolution {settings['resolution']} is not a multiple of {factor}, "
            "the pixels per side of one token"
        )
    card = {
        "name": folder.resolve().name,
        "class": name,
        "kind": kind,
        "resolution": settings["resolution"],
        "grid": grid,
        "channels": latent_channels * group**2 if kind == "continuous" else 0,
        "vocab_size": 0 if kind == "continuous" else int(config["num_embeddings" if janus else "num_vq_embeddings"]),
        "group": group,
        "posterior": settings["posterior"],
    }
    return card | {"sha256": digest({"card": {**card, "name": ""}, "config": _plain(config), **file_hashes(folder)})}


def text_card(folder: Path) -> dict[str, Any]:
    """What is asked of a text encoder: label, width, sha256. Raises InvalidInput when the folder is none."""
    config = read_config(folder)
    family = str(config.get("model_type"))
    if family not in ("t5", "bert"):
        raise InvalidInput(f"{folder / 'config.json'}: model_type {family!r} is no text encoder known here: t5, bert")
    width = int(config.get("d_model" if family == "t5" else "hidden_size", 0))
    hashes = file_hashes(folder, (*WEIGHTS, *VOCABULARY))
    if not set(VOCABULARY) & set(hashes):
        raise InvalidInput(f"{folder}: no vocabulary ({', '.join(VOCABULARY[:4])}); save it beside the model")
    return {
        "name": f"{family}-{width}",
        "family": family,
        "width": width,
        "sha256": digest({"config": _plain(config), **hashes}),
    }


def weight_files(folder: Path) -> list[Path]:
    """The weights of a folder: safetensors where there are any, else pickled files."""
    for pattern in WEIGHTS:
        if found := sorted(folder.glob(pattern)):
            return found
    raise InvalidInput(f"{folder}: no weights ({', '.join(WEIGHTS)})")


def file_hashes(folder: Path, patterns: tuple[str, ...] = ()) -> dict[str, str]:
    """sha256 by file name of the weights that would be loaded, and of further files by pattern."""
    further = [path for pattern in patterns if pattern not in WEIGHTS for path in folder.glob(pattern)]
    return {path.name: file_sha256(path) for path in sorted({*weight_files(folder), *further})}


def file_sha256(path: Path) -> str:
    """sha256 of a file of any size."""
    content = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            content.update(block)
    return content.hexdigest()


def _plain(config: dict[str, Any]) -> Any:
    """A configuration without the notes that its library adds at saving: versions and where it came from."""
    notes = ("_diffusers_version", "transformers_version", "_name_or_path", "torch_dtype", "dtype")
    return json.loads(json.dumps({key: value for key, value in config.items() if key not in notes}))
