"""Published judges in their real formats, small and random: what their loaders and post-processing are tested on."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)

from fluidscale.objects import CLASSES


def mask2former(seed: int = 0) -> Mask2FormerForUniversalSegmentation:
    """Every part of the real one, 80 classes, a thousandth of its weights."""
    swin = SwinConfig(embed_dim=12, depths=[1, 1, 2, 1], num_heads=[1, 2, 3, 3], window_size=7, drop_path_rate=0.0,
                      out_features=["stage1", "stage2", "stage3", "stage4"])  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=48,
        dim_feedforward=64, encoder_layers=1, decoder_layers=3, num_attention_heads=8, num_queries=12,
        id2label=dict(enumerate(CLASSES)), label2id={name: k for k, name in enumerate(CLASSES)},
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sampling_offsets" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
        # Sure of its classes: otherwise no score passes any threshold.
        model.class_predictor.weight.mul_(20.0)
    return model


def clip(folder: Path, activation: str = "quick_gelu") -> Path:
    """A CLIP of two layers with a tokenizer that knows bytes only."""
    parts = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    parts |= {"hidden_act": activation}
    text = parts | {"vocab_size": 514, "max_position_embeddings": 77, "bos_token_id": 512, "eos_token_id": 513}
    vision = parts | {"image_size": 28, "patch_size": 14}
    torch.manual_seed(1)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    symbols = [chr(k) for k in (*range(33, 127), *range(161, 173), *range(174, 256))]
    symbols += [chr(256 + k) for k in range(256 - len(symbols))]
    words = [*symbols, *(f"{one}</w>" for one in symbols), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def dinov2(folder: Path) -> Path:
    torch.manual_seed(2)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    return folder
