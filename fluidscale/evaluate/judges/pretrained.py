"""Published judges (Mask2Former, CLIP, DINOv2) from local folders in transformers' format. Never from a network.

A judge with one layer left at its random start still gives numbers. So nothing is loaded with a warning: a weight that
is missing, left over or of another shape is refused.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError

from fluidscale.spec import InvalidInput

# In transformers' Swin and unused as a backbone: checkpoints do without it.
_UNUSED = ("swin.layernorm.", "encoder.layernorm.")


def load_pretrained(kind: str, folder: Path, device: torch.device | str = "cpu") -> tuple[Any, str]:
    """The model of transformers' class `kind` in a local folder, ready to judge in float32, and its weights' sha256.

    Raises InvalidInput when transformers is not there, or the folder is not a whole model of this kind.
    """
    try:
        import transformers
    except ImportError as error:
        raise InvalidInput("published judges need transformers: pip install 'fluidscale[judges]'") from error
    _check_config(folder, kind)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True, "dtype": torch.float32}
    try:
        model, found = getattr(transformers, kind).from_pretrained(str(folder), **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InvalidInput(f"{folder}: does not load as {kind} ({str(error).splitlines()[0]})") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in found[what] if not any(part in str(key) for part in _UNUSED))
        if keys:
            what = what.replace("_", " ")
            raise InvalidInput(f"{folder}: {len(keys)} {what}, first {keys[0]}; a partly random judge gives no score")
    return model.to(device).eval().requires_grad_(False), weights_sha256(folder)


def weights_sha256(folder: Path) -> str:
    """sha256 of a folder's weights; of the shards' hashes where there are several."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InvalidInput(f"{folder}: no .safetensors weights; convert them first, pickled weights are not loaded")
    hashes = [file_sha256(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file of any size. Raises InvalidInput when it cannot be read."""
    content = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
    except OSError as error:
        raise InvalidInput(f"{path}: not readable ({error.strerror})") from error
    return content.hexdigest()


def pixels_of(
    images: np.ndarray, side: int, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, side, side): shorter side to `side` (bicubic, antialiased), middle cut out.

    In 8 bits through Pillow, as the published judges were trained to see pictures.
    """
    parts = [np.asarray(_cut(Image.fromarray(image), side)) for image in images]
    pixels = torch.from_numpy(np.stack(parts)).to(device).movedim(-1, 1).float() / 255
    shift, scale = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))
    return (pixels - shift) / scale


def _cut(image: Image.Image, side: int) -> Image.Image:
    scale = side / min(image.size)
    width, height = (side if length == min(image.size) else int(length * scale) for length in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def _check_config(folder: Path, kind: str) -> None:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path}: a local folder with config.json and .safetensors is needed ({error})") from error
    if kind not in (config.get("architectures") or [kind]):
        raise InvalidInput(f"{path}: describes {config['architectures'][0]}, expected {kind}")
