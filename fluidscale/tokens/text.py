"""Frozen text encoders from local folders: captions to features, as float in the encoder's own precision.

T5's encoder for the paper's setting, BERT-like ones for small experiments. bf16 is T5's precision: fp16 overflows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fluidscale.spec import InvalidInput
from fluidscale.tokens.folders import text_card
from fluidscale.tokens.foreign import library, pretrained

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Tokens of one pass: bounds the memory of a call, whatever its size.
TOKENS_PER_PASS = 16384


class TextEncoder:
    """A text encoder and its vocabulary; `sha256` names both. Features have `width` channels."""

    def __init__(self, folder: Path, dtype: str, length: int, device: torch.device | str = "cpu") -> None:
        """`length` is the longest caption in tokens; more are cut off. Raises InvalidInput on a folder of no use."""
        card = text_card(folder)
        self.name, self.sha256, self.width = card["name"], card["sha256"], card["width"]
        self.dtype, self.length, self.device = dtype, length, torch.device(device)
        transformers = library("transformers")
        cls = transformers.T5EncoderModel if card["family"] == "t5" else transformers.BertModel
        # BERT's pooler belongs to sentence tasks; it is not asked for, and many folders do not hold it.
        options = {} if card["family"] == "t5" else {"add_pooling_layer": False}
        self._network = pretrained(cls, folder, dtype=DTYPES[dtype], **options).to(self.device).requires_grad_(False)
        try:
            self._vocabulary = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise InvalidInput(f"{folder}: its vocabulary does not load ({reason})") from error

    def ids(self, captions: Sequence[str]) -> list[np.ndarray]:
        """Token ids int32 of each caption, the end mark included, at most `length`."""
        found = self._vocabulary(list(captions), truncation=True, max_length=self.length, padding=False)["input_ids"]
        return [np.asarray(one, dtype=np.int32) for one in found]

    @torch.inference_mode()
    def features(self, ids: Sequence[np.ndarray]) -> list[Tensor]:
        """Features (T_i, width) of each caption's own tokens, on the CPU, in the encoder's precision.

        Captions of like length share a pass; padding is masked, so it changes rounding at most.
        """
        features: list[Tensor] = [torch.empty(0)] * len(ids)
        order = sorted(range(len(ids)), key=lambda k: len(ids[k]))
        start = 0
        while start < len(order):
            stop = start + 1
            while stop < len(order) and (stop + 1 - start) * len(ids[order[stop]]) <= TOKENS_PER_PASS:
                stop += 1
            values, mask = padded([torch.from_numpy(ids[k]) for k in order[start:stop]])
            inputs = {"input_ids": values.long().to(self.device), "attention_mask": mask.long().to(self.device)}
            hidden = self._network(**inputs).last_hidden_state.cpu()
            for row, k in enumerate(order[start:stop]):
                features[k] = hidden[row, : len(ids[k])]
            start = stop
        return features


def padded(values: Sequence[Tensor], length: int = 0) -> tuple[Tensor, Tensor]:
    """Ragged (T_i, ..) to (B, T, ..) filled with 0, and the mask bool (B, T); T is `length`, or the longest's."""
    length = length or max((len(one) for one in values), default=0)
    filled = torch.zeros(len(values), length, *values[0].shape[1:], dtype=values[0].dtype)
    mask = torch.zeros(len(values), length, dtype=torch.bool)
    for row, one in enumerate(values):
        filled[row, : len(one)] = one
        mask[row, : len(one)] = True
    return filled, mask


def relative_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest distance of a caption's features from those wanted, as a share of their length."""
    errors = [
        float((one.float() - other.float()).norm() / other.float().norm().clamp(min=1e-12))
        if one.shape == other.shape
        else float("inf")
        for one, other in zip(found, wanted, strict=True)
    ]
    return max(errors, default=0.0)


def tolerance(dtype: str) -> float:
    """How far the same features may differ between devices and batches: some roundings of their precision."""
    return 16 * float(torch.finfo(DTYPES[dtype]).eps)


__all__ = ["DTYPES", "TextEncoder", "padded", "relative_error", "tolerance"]
