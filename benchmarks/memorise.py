"""Can every arm give back what it was trained on? It tells a flaw from a small budget, before any ladder is run.

    python benchmarks/memorise.py [--arm discrete-random] [--steps 2500] [--scenes 200]

Each arm is trained on 200 captioned scenes until the loss no longer falls and then draws the training captions with
one token a step. Passed: a GenEval-protocol score of at least 90 % of the tokenizer's own, measured on the same scenes
encoded and decoded. Prints a table and writes runs/memorise/<arm>/result.json; a second call repeats nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from fluidscale.data.sources import WorldSource
from fluidscale.evaluate.detect import load_detector
from fluidscale.evaluate.geneval import judge_images
from fluidscale.model.generator import generate
from fluidscale.record import Placement, write_json
from fluidscale.run import load_trained, run
from fluidscale.spec import ARMS, RunSpec
from fluidscale.sweep import load_sweep
from fluidscale.tokens.image import load_tokenizer
from fluidscale.world import World

PASS = 0.9  # of the tokenizer's ceiling


def spec_of(arm: str, size: str, scenes: int, steps: int) -> RunSpec:
    """The local recipe, without guidance's text drop, on a handful of scenes."""
    spec = load_sweep("local", sizes=[size], arms=[arm]).runs[-1]
    train = dataclasses.replace(spec.train, steps=steps, decay_steps=steps // 4, text_drop=0.0)
    sampling = dataclasses.replace(
        spec.evaluate.sampling, guidance_scale=1.0, num_inference_steps=spec.model.num_tokens
    )
    evaluate = dataclasses.replace(spec.evaluate, sampling=sampling, geneval_images_per_prompt=0, fd_images=0)
    data = dataclasses.replace(spec.data, images_unique=scenes)
    return dataclasses.replace(spec, train=train, evaluate=evaluate, data=data)


def judge(spec: RunSpec, run_dir: Path) -> dict[str, float]:
    """Scores of the model's drawings of the training captions, and of the training scenes through the tokenizer."""
    _, model = load_trained(run_dir)
    assert spec.data.world is not None
    world, tokenizer = World(spec.data.world), load_tokenizer(spec.tokenizer_sha256)
    detector = load_detector(f"{spec.data.name}-detector")
    scenes = world.describe(0, spec.data.images_unique, split="train")
    prompts = [scene.metadata for scene in scenes]
    text = WorldSource(spec, world, tokenizer, run_dir).text([prompt["prompt"] for prompt in prompts])
    drawn = tokenizer.decode(generate(model, text, spec.evaluate.sampling, list(range(len(scenes)))))
    encoded = tokenizer.encode(np.stack([world.render(scene) for scene in scenes]))
    kept = encoded if spec.model.token_kind == "discrete" else encoded.chunk(2, dim=-1)[0]
    score, ceiling = (
        float(np.mean([verdict.correct for verdict in judge_images(images, prompts, detector)]))
        for images in (drawn, tokenizer.decode(kept))
    )
    return {"geneval": score, "ceiling": ceiling, "share": score / ceiling}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", action="append", choices=ARMS, help="default: all four")
    parser.add_argument("--size", default="460K")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--runs", type=Path, default=Path("runs/memorise"))
    arguments = parser.parse_args(argv)
    failed = 0
    print(f"{'arm':20} {'steps':>6} {'GenEval':>8} {'ceiling':>8} {'share':>6}")
    for arm in arguments.arm or ARMS:
        spec = spec_of(arm, arguments.size, arguments.scenes, arguments.steps)
        run(spec, arguments.runs / spec.id, Placement(threads=1))
        path = arguments.runs / spec.id / "memorised.json"
        if not path.exists():
            write_json(path, judge(spec, arguments.runs / spec.id))
        result = json.loads(path.read_text())
        failed += result["share"] < PASS
        values = f"{result['geneval']:8.3f} {result['ceiling']:8.3f} {result['share']:6.3f}"
        print(f"{arm:20} {arguments.steps:6d} {values}{'' if result['share'] >= PASS else '  below'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
