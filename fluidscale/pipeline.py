"""A trained model as one object that draws pictures, saved and loaded as a folder.

    from fluidscale.pipeline import FluidPipeline

    pipe = FluidPipeline.from_pretrained("folder")          # what `python -m fluidscale.export` wrote
    pipe("two red apples", num_images_per_prompt=4, generator=torch.Generator().manual_seed(0)).images[0].save("a.png")

    folder/model_index.json        what the parts are, and the sha256 of the files that decide the pictures
           model/config.json       the ModelSpec, model/model.safetensors the averaged weights
           spec.json record.json   the run: what was asked, what was measured
           manifest.json           of the encoded data, where the run was trained on such
           README.md               the model card, made of the record

Tokenizer and text encoder are named by sha256. Those that come with fluidscale are found; others are looked for where
the run had them, or where `assets` ({sha256: path}) says.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from fluidscale.data.sources import Source, open_source
from fluidscale.folder import RunFolder
from fluidscale.model.build import FluidModel, load_model
from fluidscale.model.generator import generate
from fluidscale.model.transformer import Text
from fluidscale.record import Placement, atomic, read_json, write_atomic, write_json
from fluidscale.run import device_of, load_trained
from fluidscale.spec import InvalidInput, RunSpec, canonical, to_json
from fluidscale.tokens.folders import file_sha256
from fluidscale.valid import run_spec_from_json

# Tokens drawn in one batch: bounds memory; what is drawn does not depend on it.
_BATCH_TOKENS = 16384
_INDEX, _WEIGHTS, _MANIFEST = "model_index.json", "model/model.safetensors", "manifest.json"
OUTPUT_TYPES = ("pil", "np", "latent")

# Where an image's randomness comes from: one generator for all, or a generator or a seed for each image.
Randomness = torch.Generator | Sequence[torch.Generator] | Sequence[int] | None


@dataclass(frozen=True)
class PipelineOutput:
    """What was drawn, image after image, prompt after prompt, in the form that was asked for."""

    images: Any


@dataclass
class FluidPipeline:
    """A model, the tokenizer and the text that go with it, and the run they come from."""

    spec: RunSpec
    model: FluidModel
    source: Source
    record: dict[str, Any]
    placement: Placement

    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: Randomness = None,
        output_type: str = "pil",
        temperature: float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> PipelineOutput:
        """Draws `num_images_per_prompt` pictures of each prompt; what is not given is as the run was evaluated.

        `pil` gives a list of images, `np` float32 (n, H, W, 3) in [0, 1], `latent` the tokens. `progress` is called
        with (images done, all images). Raises InvalidInput for settings that do not fit the model.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if output_type not in OUTPUT_TYPES:
            raise InvalidInput(f"unknown output_type {output_type!r}; known: {', '.join(OUTPUT_TYPES)}")
        if num_images_per_prompt < 1 or not prompts:
            raise InvalidInput(f"nothing to draw: {len(prompts)} prompts x {num_images_per_prompt} images")
        named = ("num_inference_steps", "guidance_scale", "temperature")
        given = zip(named, (num_inference_steps, guidance_scale, temperature), strict=True)
        asked = {key: value for key, value in given if value is not None}
        sampling = dataclasses.replace(self.spec.evaluate.sampling, **asked)
        text = self.source.text([one for one in prompts for _ in range(num_images_per_prompt)])
        seeds = _seeds(generator, len(text.mask))
        batch = max(1, _BATCH_TOKENS // self.spec.model.num_tokens)
        tokens = []
        for first in range(0, len(seeds), batch):
            part = Text(text.values[first : first + batch], text.mask[first : first + batch])
            tokens.append(generate(self.model, part, sampling, seeds[first : first + batch]))
            if progress is not None:
                progress(min(first + batch, len(seeds)), len(seeds))
        drawn = torch.cat(tokens)
        if output_type == "latent":
            return PipelineOutput(drawn)
        pixels = self.source.tokenizer.decode(drawn)
        if output_type == "np":
            return PipelineOutput(pixels.astype(np.float32) / 255)
        return PipelineOutput([Image.fromarray(image) for image in pixels])

    @classmethod
    def from_run(cls, run_dir: Path | str, device: str | torch.device | None = None) -> FluidPipeline:
        """The pipeline of a trained run's folder. Raises InvalidInput when it is not one."""
        folder = RunFolder(Path(run_dir))
        spec, model = load_trained(folder.path)
        return cls._placed(spec, model, folder.record or {}, folder.placement, folder.path.parent, device)

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        device: str | torch.device | None = None,
        assets: Mapping[str, str] | None = None,
    ) -> FluidPipeline:
        """What `save_pretrained` wrote, or a run's folder. Raises InvalidInput when it is neither, or damaged."""
        folder = Path(folder)
        index = read_json(folder / _INDEX)
        if index is None:
            return cls.from_run(folder, device)
        spec = run_spec_from_json(_read(folder / "spec.json").decode(), str(folder / "spec.json"))
        weights = folder / _WEIGHTS
        if not weights.is_file() or file_sha256(weights) != index["weights_sha256"]:
            raise InvalidInput(f"{weights}: not the weights of {folder / _INDEX}; export the run again")
        model = load_model(spec.model, weights)
        named = {**index["assets"], **(assets or {})}
        if spec.data.manifest_sha256:
            named[spec.data.manifest_sha256] = str(folder)
        record = read_json(folder / "record.json") or {}
        return cls._placed(spec, model, record, Placement(assets=named), folder, device)

    @classmethod
    def _placed(
        cls,
        spec: RunSpec,
        model: FluidModel,
        record: dict[str, Any],
        placement: Placement,
        runs: Path,
        device: str | torch.device | None,
    ) -> FluidPipeline:
        there = device_of(Placement()) if device is None else torch.device(device)
        return cls(spec, model.to(there), open_source(spec, placement, runs, there), record, placement)

    def save_pretrained(self, folder: Path | str) -> None:
        """Writes the pipeline's folder; the index comes last, so a folder with one is whole."""
        folder = Path(folder)
        with atomic(folder / _WEIGHTS) as weights:
            state = self.model.state_dict().items()
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state}, weights)
        write_json(folder / "model" / "config.json", canonical(self.spec.model))
        write_atomic(folder / "spec.json", to_json(self.spec))
        write_json(folder / "record.json", self.record)
        if self.spec.data.manifest_sha256:
            shards = self.placement.asset(self.spec.data.manifest_sha256, "shards")
            write_atomic(folder / _MANIFEST, _read(shards / _MANIFEST))
        write_atomic(folder / "README.md", model_card(self.spec, self.record))
        kept = (self.spec.tokenizer_sha256, self.spec.text_encoder_sha256)
        index = {
            "_class_name": "FluidPipeline",
            "model": ["fluidscale", "FluidModel"],
            "tokenizer": ["fluidscale", self.spec.tokenizer_sha256],
            "text_encoder": ["fluidscale", self.spec.text_encoder_sha256 or self.spec.text_encoder],
            "weights_sha256": file_sha256(folder / _WEIGHTS),
            "assets": {sha256: path for sha256, path in self.placement.assets.items() if sha256 in kept},
        }
        write_json(folder / _INDEX, index)


def _seeds(generator: Randomness, count: int) -> list[int]:
    """A seed for each image."""
    if generator is None:
        generator = torch.Generator().manual_seed(torch.seed() % 2**63)
    if isinstance(generator, torch.Generator):
        return torch.randint(2**63 - 1, (count,), generator=generator, device=generator.device).tolist()
    if len(generator) != count:
        raise InvalidInput(f"{len(generator)} generators for {count} images: give one for all, or one for each image")
    return [one if isinstance(one, int) else _seeds(one, 1)[0] for one in generator]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"{path}: not readable ({error.strerror}); export the run again") from error


def model_card(spec: RunSpec, record: Mapping[str, Any]) -> str:
    """The model card: what was trained on what, and every score with its error and protocol."""
    model, train, sampling = spec.model, spec.train, spec.evaluate.sampling
    facts = {
        "arm": f"{model.token_kind} tokens in {model.order} order",
        "size": f"{spec.size}: {model.depth} blocks of {model.width} channels, {model.num_heads} heads",
        "parameters": record.get("params_total"),
        "tokens": f"{model.grid} x {model.grid}",
        "tokenizer": spec.tokenizer_sha256,
        "text": " ".join(filter(None, (spec.text_encoder, spec.text_encoder_sha256))),
        "data": f"{spec.data.name}, {spec.data.images_unique:,} images; {spec.images:,} seen in training",
        "training": f"{train.steps:,} steps of {train.batch}, AdamW, rate {train.lr:g}, seed {spec.seed}",
        "training FLOPs": record.get("train_flops"),
        "sampling": json.dumps(canonical(sampling)),
        "code": " ".join(filter(None, (record.get("git_rev"), record.get("versions")))),
        "status": record.get("status", "not evaluated"),
    }
    lines = ["---", "library_name: fluidscale", "tags: [text-to-image]", "---", "", f"# {spec.id}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items() if value not in (None, "")]
    scores = [name.removesuffix("_protocol") for name in record if name.endswith("_protocol")]
    if scores:
        lines += ["", "| score | value | standard error | unit | n | protocol |", "|---|---|---|---|---|---|"]
    for name in scores:
        error = record.get(f"{name}_se")
        cells = (
            name,
            f"{record[name]:.5g}" if record.get(name) is not None else "",
            f"{error:.2g}" if error is not None else "",
            record.get(f"{name}_unit"),
            record.get(f"{name}_n"),
            record.get(f"{name}_protocol"),
        )
        lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


__all__ = ["FluidPipeline", "PipelineOutput", "model_card"]
