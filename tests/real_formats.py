"""Small random networks saved in their real formats, and a few pictures with COCO's captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fluidscale import encode

WORDS = (
    "a",
    "red",
    "blue",
    "green",
    "cat",
    "dog",
    "on",
    "the",
    "left",
    "right",
    "of",
    "two",
    "three",
    "small",
    "house",
)


def tiny_vae(folder: Path, resolution: int = 32, **config: Any) -> Any:
    """A diffusers AutoencoderKL that maps 4 px to a latent of 4 channels, hence 8 px to a token of 16."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    vae = AutoencoderKL(block_out_channels=[8, 8, 8], norm_num_groups=4, latent_channels=4, **blocks, **config).eval()
    return _saved(vae, folder, resolution)


def tiny_vq(folder: Path, resolution: int = 32, **config: Any) -> Any:
    """A diffusers VQModel that maps 8 px to one of 64 codes."""
    from diffusers.models.autoencoders.vq_model import VQModel

    torch.manual_seed(1)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    channels = {"block_out_channels": [8, 8, 8, 8], "latent_channels": 4, "vq_embed_dim": 4}
    vq = VQModel(norm_num_groups=4, num_vq_embeddings=64, **channels, **blocks, **config).eval()
    # A fresh codebook lies around 0, where every image would get the same few codes.
    torch.nn.init.normal_(vq.quantize.embedding.weight, std=0.5)
    return _saved(vq, folder, resolution)


def _saved(network: Any, folder: Path, resolution: int) -> Any:
    network.save_pretrained(folder)
    (folder / "fluidscale.json").write_text(json.dumps({"resolution": resolution}))
    return network


def tiny_t5(folder: Path, width: int = 12) -> Any:
    """A T5 encoder of two layers and a vocabulary of words, saved as transformers saves them."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(2)
    shape = {"d_model": width, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 3}
    encoder = T5EncoderModel(T5Config(vocab_size=len(WORDS) + 3, **shape)).eval()
    encoder.save_pretrained(folder)
    word_vocabulary().save_pretrained(folder)
    return encoder


def word_vocabulary() -> Any:
    """Words by the space, an end mark behind them as T5's vocabulary has it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: k for k, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def pictures(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """PNG files of several shapes: a gradient and a rectangle each."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k in range(count):
        height, width = (40, 48) if k % 2 else (64, 36)
        image = np.linspace(rng.integers(0, 255, 3), rng.integers(0, 255, 3), width)[None].repeat(height, 0)
        top, left = rng.integers(0, 20, 2)
        image[top : top + 16, left : left + 16] = rng.integers(0, 255, 3)
        paths.append(folder / f"{k:012d}.png")
        Image.fromarray(image.astype(np.uint8)).save(paths[-1])
    return paths


def coco(path: Path, images: list[Path], captions: int = 2, seed: int = 0) -> Path:
    """COCO's captions file: `captions` of different lengths an image."""
    rng = np.random.default_rng(seed)
    notes = [
        {"id": captions * k + j, "image_id": k, "caption": " ".join(rng.choice(WORDS, rng.integers(1, 7)))}
        for k in range(len(images))
        for j in range(captions)
    ]
    listed = [{"id": k, "file_name": image.name} for k, image in enumerate(images)]
    path.write_text(json.dumps({"images": listed, "annotations": notes}))
    return path


# Four arms on pictures encoded by the tiny networks; ROOT is the folder of all of it.
SWEEP = """
sizes: [50K]
arms: all
seeds: [0]
images: [48]
defaults:
  data: {name: pictures}
  text_encoder: ROOT/t5
  model: {aligner_depth: 3, position: every_layer}
  train: {lr: 2.0e-3, batch: 8, warmup_steps: 2, decay_fraction: 0.25, weight_decay: 0.02, beta1: 0.9, beta2: 0.95,
          grad_clip: 1.0, ema_decay: 0.9, text_drop: 0.1}
  evaluate: {val_images: 4, geneval_images_per_prompt: 0, fd_images: 0,
             sampling: {guidance_scale: 2.0, temperature: 1.0, num_inference_steps: 4}}
by_token_kind:
  continuous:
    tokenizer: ROOT/vae
    data: {shards: ROOT/vae-shards}
    model: {head: {num_blocks: 1, objective: flow, noise_repeats: 1}}
    evaluate: {sampling: {solver: euler, num_denoising_steps: 4}}
  discrete:
    tokenizer: ROOT/vq
    data: {shards: ROOT/vq-shards}
by_order:
  random: {model: {mask_law: uniform}}
  raster: {evaluate: {sampling: {num_inference_steps: 16}}}
"""


def encoding(root: Path, tokenizer: str, out: str, *more: str) -> list[str]:
    """The words of a call of fluidscale.encode on a stack."""
    given = {"--captions": "captions.json", "--tokenizer": tokenizer, "--text-encoder": "t5", "--out": out}
    paths = [word for option, name in given.items() for word in (option, str(root / name))]
    return [str(root / "images"), *paths, "--text-length", "6", "--val-images", "4", *more]


def saved_stack(root: Path) -> Path:
    """A folder with pictures, captions, saved networks, encoded shards, and pictures.yaml, a sweep that names them."""
    torch.set_num_threads(1)
    tiny_vae(root / "vae"), tiny_vq(root / "vq"), tiny_t5(root / "t5")
    coco(root / "captions.json", pictures(root / "images", 20))
    for kind in ("vae", "vq"):
        assert encode.main(encoding(root, kind, f"{kind}-shards")) == 0
    (root / "pictures.yaml").write_text(SWEEP.replace("ROOT", str(root)))
    return root
