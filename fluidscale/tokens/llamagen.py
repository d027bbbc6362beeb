"""LlamaGen's published VQ checkpoint, once, to the folder that transformers' JanusVQVAE reads.

The two are one architecture under two sets of names (arXiv 2406.06525; its `tokenizer/tokenizer_image/vq_model.py`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from fluidscale.record import write_json
from fluidscale.spec import InvalidInput
from fluidscale.tokens.folders import SETTINGS
from fluidscale.tokens.foreign import library, load_pickle

# LlamaGen's names, in order: levels, residual blocks and the three parts of the middle.
RENAMED = (
    (re.compile(r"^encoder\.conv_blocks\."), "encoder.down."),
    (re.compile(r"^decoder\.conv_blocks\."), "decoder.up."),
    (re.compile(r"^(encoder\.down|decoder\.up)\.(\d+)\.res\."), r"\1.\2.block."),
    (re.compile(r"^(encoder|decoder)\.mid\.0\."), r"\1.mid.block_1."),
    (re.compile(r"^(encoder|decoder)\.mid\.1\."), r"\1.mid.attn_1."),
    (re.compile(r"^(encoder|decoder)\.mid\.2\."), r"\1.mid.block_2."),
)
# Use counts that LlamaGen's training keeps beside the codebook.
UNUSED = ("quantize.codebook_used",)


def convert(checkpoint: Path, out: Path, resolution: int = 256) -> None:
    """Writes `out`/{config.json, model.safetensors, fluidscale.json} from LlamaGen's .pt file (`vq_ds16_t2i.pt`).

    The shape is read from the weights. Raises InvalidInput when the file is not LlamaGen's, or does not fit.
    """
    content = load_pickle(checkpoint)
    weights = {renamed(key): value for key, value in content.get("model", content).items() if key not in UNUSED}
    janus = library("transformers.models.janus.modeling_janus")
    config = janus.JanusVQVAEConfig(**shape_of(weights, str(checkpoint)), num_patches=resolution // 16)
    network = janus.JanusVQVAE(config)
    found = network.load_state_dict(weights, strict=False)
    if odd := [*found.missing_keys, *found.unexpected_keys]:
        raise InvalidInput(f"{checkpoint}: not LlamaGen's VQ: {len(odd)} weights missing or unknown, first {odd[0]}")
    network.save_pretrained(out)
    write_json(out / SETTINGS, {"resolution": resolution})


def renamed(key: str) -> str:
    """A weight's name in JanusVQVAE, from LlamaGen's."""
    for pattern, replacement in RENAMED:
        key = pattern.sub(replacement, key)
    return key


def shape_of(weights: dict[str, Tensor], where: str) -> dict[str, Any]:
    """JanusVQVAE's configuration, from the shapes of its weights."""
    try:
        levels = 1 + max(int(key.split(".")[2]) for key in weights if key.startswith("encoder.down."))
        blocks = 1 + max(int(key.split(".")[4]) for key in weights if key.startswith("encoder.down.0.block."))
        base = weights["encoder.conv_in.weight"].shape[0]
        outputs = [weights[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
        codes, width = weights["quantize.embedding.weight"].shape
        latent_channels = weights["encoder.conv_out.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise InvalidInput(f"{where}: not LlamaGen's VQ ({error} is not among its weights)") from error
    return {
        "base_channels": base,
        "channel_multiplier": [channels // base for channels in outputs],
        "num_res_blocks": blocks,
        "latent_channels": latent_channels,
        "num_embeddings": codes,
        "embed_dim": width,
    }
