"""CLIP as GenEval's colour classifier and as CLIPScore, through transformers from a local folder.

OpenAI's weights were trained with quick_gelu. With plain GELU they load without a word and give other colours, so the
activation is asserted, never assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fluidscale.evaluate.judges.pretrained import load_pretrained, pixels_of
from fluidscale.evaluate.protocol import Detection
from fluidscale.objects import COLORS
from fluidscale.spec import InvalidInput

# openai/CLIP, clip/clip.py: the normalisation of its own images.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# GenEval, evaluation/evaluate_images.py: templates, and the grey behind a cut-out object.
TEMPLATES = ("a photo of a {color} {cls}", "a photo of a {color}-colored {cls}", "a photo of a {color} object")
GREY = (0x99, 0x99, 0x99)
BATCH = 64


class Clip:
    """Unit-length embeddings of images and texts; `sha256` names the weights."""

    def __init__(self, model: Any, tokenizer: Any, sha256: str, name: str, device: torch.device) -> None:
        self.model, self.tokenizer, self.sha256, self.name, self.device = model, tokenizer, sha256, name, device
        self.side: int = model.config.vision_config.image_size
        self.length: int = model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def images(self, images: np.ndarray) -> Tensor:
        """uint8 (B, H, W, 3) -> (B, F), on the CPU."""
        parts = []
        for start in range(0, len(images), BATCH):
            pixels = pixels_of(images[start : start + BATCH], self.side, MEAN, STD, self.device)
            features = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
            parts.append(F.normalize(features, dim=-1).cpu())
        return torch.cat(parts)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """(B, F), on the CPU; a text longer than the model reads is cut, as CLIPScore does."""
        parts = []
        for start in range(0, len(texts), BATCH):
            batch = list(texts[start : start + BATCH])
            options = {"padding": True, "truncation": True, "max_length": self.length, "return_tensors": "pt"}
            words = self.tokenizer(batch, **options).to(self.device)
            output = self.model.text_model(input_ids=words.input_ids, attention_mask=words.attention_mask)
            parts.append(F.normalize(self.model.text_projection(output.pooler_output), dim=-1).cpu())
        return torch.cat(parts)


class ColorClassifier:
    """GenEval's: which of ten colour names an object has, seen alone on grey and cropped to its box."""

    def __init__(self, clip: Clip) -> None:
        self.clip = clip
        self._names = lru_cache(maxsize=None)(self._embedded)

    def color(self, image: np.ndarray, detection: Detection) -> str:
        """The colour of one detection, which must have a mask, in its image uint8 (H, W, 3)."""
        features = self.clip.images(cut_out(image, detection)[None])[0]
        return tuple(COLORS)[int((self._names(detection.cls) @ features).argmax())]

    def _embedded(self, cls: str) -> Tensor:
        """(10, F): each colour's mean over the templates, of unit length again (clip_benchmark's zero-shot head)."""
        rows = []
        for color in COLORS:
            texts = [template.format(color=color, cls=cls) for template in TEMPLATES]
            rows.append(F.normalize(self.clip.texts(texts).mean(0), dim=-1))
        return torch.stack(rows)


def cut_out(image: np.ndarray, detection: Detection) -> np.ndarray:
    """The object through its mask on grey, cropped to its box: uint8 (h, w, 3)."""
    assert detection.mask is not None, "colours are classified on masks"
    picture, mask = Image.fromarray(image), Image.fromarray(detection.mask)
    alone = Image.composite(picture, Image.new("RGB", picture.size, GREY), mask)
    x0, y0, x1, y1 = (round(side) for side in detection.box)
    return np.asarray(alone.crop((x0, y0, x1, y1)))


def clip_scores(clip: Clip, images: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """max(100 cos(image, text), 0) per pair, float64 (n,): CLIPScore (arXiv 2104.08718) as torchmetrics scales it."""
    similarity = (clip.images(images).double() * clip.texts(texts).double()).sum(-1)
    return (100 * similarity).clamp(min=0).numpy()


def load_clip(folder: Path, device: torch.device | str = "cpu") -> Clip:
    """CLIP and its tokenizer from a local folder. Raises InvalidInput, not least for another activation."""
    model, sha256 = load_pretrained("CLIPModel", folder, device)
    for part in ("vision_config", "text_config"):
        if (found := getattr(model.config, part).hidden_act) != "quick_gelu":
            raise InvalidInput(
                f"{folder}: its {part} has hidden_act {found!r}; OpenAI's CLIP was trained with quick_gelu and gives "
                "other colours without it: use a folder whose config.json says so"
            )
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise InvalidInput(f"{folder}: no CLIP tokenizer (vocab.json, merges.txt) beside the weights") from error
    return Clip(model, tokenizer, sha256, folder.name, torch.device(device))
