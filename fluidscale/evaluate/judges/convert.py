"""mmdet's Mask2Former checkpoint, GenEval's own detector, as a local folder that transformers loads.

    python -m fluidscale.evaluate.judges.convert mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.pth DETECTOR_DIR

Every tensor goes to exactly one place or the conversion is refused. Two things are more than names: mmdet's Swin holds
q, k and v in one matrix, and merges patches channel by channel where the original does it position by position.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluidscale.evaluate.judges.pretrained import load_pretrained
from fluidscale.objects import CLASSES
from fluidscale.spec import InvalidInput

_STAGE = r"backbone\.stages\.(\d+)"
_BLOCK = rf"{_STAGE}\.blocks\.(\d+)"
_ENCODER = r"panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)"
_DECODER = r"panoptic_head\.transformer_decoder\.layers\.(\d+)"
_PIXEL, _SWIN = "model.pixel_level_module.decoder", "model.pixel_level_module.encoder"
_TO_BLOCK = rf"{_SWIN}.encoder.layers.\1.blocks.\2"
_TO_ENCODER, _TO_DECODER = rf"{_PIXEL}.encoder.layers.\1", r"model.transformer_module.decoder.layers.\1"

# mmdet 2's names and, where they differ, mmdet 3's -> transformers'. In the decoder cross-attention comes first.
RENAMED = {
    r"backbone\.patch_embed\.projection": rf"{_SWIN}.embeddings.patch_embeddings.projection",
    r"backbone\.patch_embed\.norm": rf"{_SWIN}.embeddings.norm",
    rf"{_BLOCK}\.norm1": rf"{_TO_BLOCK}.layernorm_before",
    rf"{_BLOCK}\.norm2": rf"{_TO_BLOCK}.layernorm_after",
    rf"{_BLOCK}\.attn\.w_msa\.relative": rf"{_TO_BLOCK}.attention.self.relative",
    rf"{_BLOCK}\.attn\.w_msa\.proj": rf"{_TO_BLOCK}.attention.output.dense",
    rf"{_BLOCK}\.ffn\.layers\.0\.0": rf"{_TO_BLOCK}.intermediate.dense",
    rf"{_BLOCK}\.ffn\.layers\.1": rf"{_TO_BLOCK}.output.dense",
    rf"{_STAGE}\.downsample": rf"{_SWIN}.encoder.layers.\1.downsample",
    r"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.conv": rf"{_PIXEL}.input_projections.\1.0",
    r"panoptic_head\.pixel_decoder\.input_convs\.(\d+)\.gn": rf"{_PIXEL}.input_projections.\1.1",
    rf"{_ENCODER}\.(?:attentions\.0|self_attn)": rf"{_TO_ENCODER}.self_attn",
    rf"{_ENCODER}\.norms\.0": rf"{_TO_ENCODER}.self_attn_layer_norm",
    rf"{_ENCODER}\.norms\.1": rf"{_TO_ENCODER}.final_layer_norm",
    rf"{_ENCODER}\.(?:ffns\.0|ffn)\.layers\.0\.0": rf"{_TO_ENCODER}.fc1",
    rf"{_ENCODER}\.(?:ffns\.0|ffn)\.layers\.1": rf"{_TO_ENCODER}.fc2",
    r"panoptic_head\.pixel_decoder\.level_encoding\.weight": f"{_PIXEL}.level_embed",
    r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.conv": f"{_PIXEL}.adapter_1.0",
    r"panoptic_head\.pixel_decoder\.lateral_convs\.0\.gn": f"{_PIXEL}.adapter_1.1",
    r"panoptic_head\.pixel_decoder\.output_convs\.0\.conv": f"{_PIXEL}.layer_1.0",
    r"panoptic_head\.pixel_decoder\.output_convs\.0\.gn": f"{_PIXEL}.layer_1.1",
    r"panoptic_head\.pixel_decoder\.mask_feature": f"{_PIXEL}.mask_projection",
    rf"{_DECODER}\.(?:attentions\.0|cross_attn)\.attn": rf"{_TO_DECODER}.cross_attn",
    rf"{_DECODER}\.(?:attentions\.1|self_attn)\.attn": rf"{_TO_DECODER}.self_attn",
    rf"{_DECODER}\.norms\.0": rf"{_TO_DECODER}.cross_attn_layer_norm",
    rf"{_DECODER}\.norms\.1": rf"{_TO_DECODER}.self_attn_layer_norm",
    rf"{_DECODER}\.norms\.2": rf"{_TO_DECODER}.final_layer_norm",
    rf"{_DECODER}\.(?:ffns\.0|ffn)\.layers\.0\.0": rf"{_TO_DECODER}.fc1",
    rf"{_DECODER}\.(?:ffns\.0|ffn)\.layers\.1": rf"{_TO_DECODER}.fc2",
    r"panoptic_head\.transformer_decoder\.post_norm": "model.transformer_module.decoder.layernorm",
    r"panoptic_head\.query_embed": "model.transformer_module.queries_embedder",
    r"panoptic_head\.query_feat": "model.transformer_module.queries_features",
    r"panoptic_head\.level_embed": "model.transformer_module.level_embed",
    r"panoptic_head\.cls_embed": "class_predictor",
}
_MASKS = "model.transformer_module.decoder.mask_predictor.mask_embedder"
# Tables that transformers computes, and the loss's class weights.
_DROPPED = (".relative_position_index", "loss_cls.class_weight")


def converted(source: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names and layouts for an mmdet state dict. Raises InvalidInput on a tensor without a place."""
    target: dict[str, Tensor] = {}
    for name, tensor in source.items():
        if name.endswith(_DROPPED):
            continue
        for place, part in _placed(name, tensor):
            if place in target:
                raise InvalidInput(f"two tensors of the checkpoint go to {place}, the second is {name}")
            target[place] = part.clone()
    return target


def _placed(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    stem, _, kind = name.rpartition(".")
    if match := re.fullmatch(rf"{_BLOCK}\.attn\.w_msa\.qkv", stem):
        place = match.expand(f"{_TO_BLOCK}.attention.self")
        parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
        return [(f"{place}.{part}.{kind}", value) for part, value in parts]
    if match := re.fullmatch(rf"{_DECODER}\.(?:attentions\.1|self_attn)\.attn\.in_proj_(\w+)", name):
        place, kind = match.expand(f"{_TO_DECODER}.self_attn"), match[2]
        parts = zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True)
        return [(f"{place}.{part}.{kind}", value) for part, value in parts]
    if match := re.fullmatch(rf"{_STAGE}\.downsample\.(norm|reduction)", stem):
        tensor = by_position(tensor)
    if match := re.fullmatch(r"backbone\.norm(\d)", stem):
        return [(f"{_SWIN}.hidden_states_norms.stage{int(match[1]) + 1}.{kind}", tensor)]
    if match := re.fullmatch(r"panoptic_head\.mask_embed\.([024])", stem):
        return [(f"{_MASKS}.{int(match[1]) // 2}.0.{kind}", tensor)]
    for pattern, place in RENAMED.items():
        if match := re.match(rf"{pattern}(?=[._]|$)", name):
            return [(match.expand(place) + name[match.end() :], tensor)]
    raise InvalidInput(f"the checkpoint's {name} has no place in transformers' Mask2Former; is it GenEval's detector?")


def by_position(tensor: Tensor) -> Tensor:
    """Merged patches (.., 4 C) from mmdet's order (channel, row, column) to the original's (column, row, channel)."""
    square = tensor.unflatten(-1, (-1, 2, 2))
    return square.movedim(-3, -1).transpose(-3, -2).flatten(-3)


def configuration(weights: dict[str, Tensor]) -> Any:
    """The Mask2FormerConfig of converted weights; what no shape tells is mmdet's configuration for COCO instances."""
    from transformers import Mask2FormerConfig, SwinConfig

    def count(pattern: str) -> int:
        return 1 + max(int(match[1]) for name in weights if (match := re.match(pattern, name)))

    stages = [rf"{re.escape(_SWIN)}\.encoder\.layers\.{k}\.blocks\.(\d+)\." for k in range(4)]
    tables = [f"{_SWIN}.encoder.layers.{k}.blocks.0.attention.self.relative_position_bias_table" for k in range(4)]
    hidden, features = weights["class_predictor.weight"].shape[1], weights[f"{_PIXEL}.mask_projection.weight"].shape
    first = rf"{_PIXEL}.encoder.layers.0"
    swin: dict[str, Any] = {
        "embed_dim": weights[f"{_SWIN}.embeddings.norm.weight"].shape[0],
        "depths": [count(pattern) for pattern in stages],
        "num_heads": [weights[table].shape[1] for table in tables],
        "window_size": (int(weights[tables[0]].shape[0] ** 0.5) + 1) // 2,
        "drop_path_rate": 0.0,
        "out_features": [f"stage{k}" for k in range(1, 5)],
    }
    # Offsets are (heads, 3 levels, 4 points, 2), so their number tells the heads.
    heads = weights[f"{first}.self_attn.sampling_offsets.bias"].shape[0] // 24
    return Mask2FormerConfig(
        backbone_config=SwinConfig(**swin),
        feature_size=features[1],
        mask_feature_size=features[0],
        hidden_dim=hidden,
        encoder_feedforward_dim=weights[f"{first}.fc1.bias"].shape[0],
        dim_feedforward=weights["model.transformer_module.decoder.layers.0.fc1.bias"].shape[0],
        encoder_layers=count(rf"{re.escape(_PIXEL)}\.encoder\.layers\.(\d+)\."),
        # transformers counts the prediction before the first layer.
        decoder_layers=1 + count(r"model\.transformer_module\.decoder\.layers\.(\d+)\."),
        num_attention_heads=heads,
        num_queries=weights["model.transformer_module.queries_embedder.weight"].shape[0],
        id2label=dict(enumerate(CLASSES)),
        label2id={name: k for k, name in enumerate(CLASSES)},
        architectures=["Mask2FormerForUniversalSegmentation"],
    )


def convert(checkpoint: Path, folder: Path) -> str:
    """Writes config.json and model.safetensors and returns the weights' sha256, after loading them as a judge would."""
    from safetensors.torch import save_file

    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InvalidInput(f"{checkpoint}: not a checkpoint of plain tensors ({str(error).splitlines()[0]})") from error
    weights = converted(content.get("state_dict", content))
    if (classes := weights["class_predictor.weight"].shape[0] - 1) != len(CLASSES):
        raise InvalidInput(f"{checkpoint}: {classes} classes; GenEval's is the instance model with {len(CLASSES)}")
    folder.mkdir(parents=True, exist_ok=True)
    config = configuration(weights)
    config.save_pretrained(folder)
    # The loss keeps its class weights with the model; mmdet's void weight is .1.
    weights["criterion.empty_weight"] = torch.tensor([1.0] * len(CLASSES) + [config.no_object_weight])
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    return load_pretrained("Mask2FormerForUniversalSegmentation", folder)[1]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fluidscale.evaluate.judges.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="mmdet's .pth")
    parser.add_argument("folder", type=Path, help="where config.json and model.safetensors are written")
    arguments = parser.parse_args(argv)
    try:
        sha256 = convert(arguments.checkpoint, arguments.folder)
    except InvalidInput as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{arguments.folder}: detector {sha256}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
