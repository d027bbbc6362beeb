"""Trains the embedded world's own networks: two tokenizers, two detectors, a feature network; minutes each on one core.

Every network sees all combinations of class and colour, also those held out of the models' training: judges and
tokenizers must not be what fails on them. Pictures are fresh at every step and never among those that are measured on.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from fluidscale.evaluate.detect import DetectorNetwork, IconDetector, Target, load_detector
from fluidscale.evaluate.features import FeatureNetwork, load_features
from fluidscale.evaluate.flaws import Pictures, judged_views
from fluidscale.evaluate.references import references
from fluidscale.inputs import CARDS, JUDGES
from fluidscale.spec import InvalidInput, digest
from fluidscale.sweep import load_world
from fluidscale.tokens import shipped
from fluidscale.tokens.image import as_tokenizer, build_network, load_tokenizer, load_weights, to_pixels
from fluidscale.tokens.networks import FACTOR, KLAutoencoder, VQAutoencoder
from fluidscale.tokens.quality import psnr, reconstruct
from fluidscale.world import Scene, World
from fluidscale.world.ahead import drawers

SPLIT = "all"
# Numbers of the held-out scenes that quality is measured on; seeds start their training scenes SEED_STRIDE apart.
HELD_OUT_START, HELD_OUT_COUNT, SEED_STRIDE = 10**12, 2048, 10**9
# What counts as found in counting tasks, and as a ghost anywhere (GenEval's two thresholds).
SURE, GHOST = 0.9, 0.3

# What the scenes of one batch are learned from, and a network's loss on it: a scalar.
Material = Any
Loss = Callable[[Any, Material], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How one network is built and trained. `lr` is the peak: 100 steps of warm-up, then half a cosine."""

    kind: str  # continuous | discrete | detector | features
    network: dict[str, Any]
    steps: int
    batch: int
    lr: float
    seed: int = 0
    channels: int = 0  # of a continuous token
    codes: int = 0  # of a discrete token's vocabulary

    @property
    def tokenizes(self) -> bool:
        return self.kind in ("continuous", "discrete")


RECIPES: dict[str, Recipe] = {
    "vae": Recipe("continuous", {"widths": [32, 64, 128], "kl_weight": 1e-3}, 6000, 16, 5e-3, channels=8),
    "vq": Recipe("discrete", {"widths": [32, 64, 128], "code_width": 16, "warmup": 1500}, 6000, 16, 5e-3, codes=1024),
    "detector": Recipe("detector", {"shape": "pyramid", "widths": [24, 48, 64]}, 3000, 32, 3e-3),
    # Another architecture, other scenes, other initial weights: it shares only the task with the first.
    "detector2": Recipe("detector", {"shape": "tower", "widths": [32]}, 3000, 32, 3e-3, seed=1),
    "features": Recipe("features", {"widths": [24, 48, 128], "features": 64, "max_count": 4}, 4000, 32, 3e-3),
}


def train(
    network: nn.Module,
    recipe: Recipe,
    batches: Iterable[Material],
    loss_of: Loss,
    report: Callable[[int, float], None],
) -> None:
    """AdamW with clipped gradients, a step a batch; `report` hears every step."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=1e-4)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step, drawn in enumerate(batches):
        loss = loss_of(network, drawn)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss is {loss.item()} at step {step}; lower the rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(step + 1, loss.item())


def batch(world: World, start: int, count: int) -> tuple[np.ndarray, list[Scene]]:
    """Pictures uint8 (count, R, R, 3) and what they show."""
    scenes = world.describe(start, count, SPLIT)
    return np.stack([world.render(scene) for scene in scenes]), scenes


def targets(world: World, scenes: Sequence[Scene]) -> list[list[Target]]:
    """What a detector should find in each scene."""
    classes = {name: k for k, name in enumerate(world.spec.classes)}
    colors = {name: k for k, name in enumerate((*world.spec.colors, None))}
    return [[Target(classes[icon.cls], colors[icon.color], *icon.box) for icon in scene.objects] for scene in scenes]


def seconds(world: World, scenes: Sequence[Scene], start: int) -> Pictures:
    """What each scene may be mingled with: every other one with its own content placed anew, the rest with the next."""
    rng = np.random.default_rng(start)
    others = [*scenes[1:], scenes[0]]
    others[::2] = [world.scene_for(scene.metadata, rng) for scene in scenes[::2]]
    return Pictures(np.stack([world.render(scene) for scene in others]), targets(world, others))


def pairs(world: World, scenes: Sequence[Scene]) -> np.ndarray:
    """Objects of each class and colour, int64 (B, K, C + 1); the last colour is untinted."""
    counts = np.zeros((len(scenes), len(world.spec.classes), len(world.spec.colors) + 1), np.int64)
    for row, objects in zip(counts, targets(world, scenes), strict=True):
        for target in objects:
            row[target.cls, target.color] += 1
    return counts


def material(kind: str, count: int, world: World, start: int) -> Material:
    """What a network of a kind learns from, of `count` scenes from number `start` on."""
    images, scenes = batch(world, start, count)
    if kind == "detector":
        return Pictures(images, targets(world, scenes)), seconds(world, scenes, start)
    return (images, pairs(world, scenes)) if kind == "features" else images


def certainty(detector: IconDetector, images: np.ndarray, scenes: Sequence[Scene]) -> dict[str, float]:
    """Shares of objects found with a score above .9, and of ghosts above .3 per object, on real scenes."""
    objects = sure = ghosts = 0
    for scene, found in zip(scenes, detector.detect(images), strict=True):
        there = Counter(icon.cls for icon in scene.objects)
        objects += there.total()
        sure += (there & Counter(one.cls for one in found if one.score > SURE)).total()
        ghosts += (Counter(one.cls for one in found if one.score > GHOST) - there).total()
    return {"sure_share": sure / objects, "ghost_share": ghosts / objects}


class Workshop:
    """One world, where its networks are kept, and the device that they are trained on."""

    def __init__(self, world_name: str, out: Path | None, device: str = "cpu") -> None:
        self.name = Path(world_name).stem
        self.world = World(load_world(world_name))
        self.out, self.device = out, device
        if self.world.spec.resolution % FACTOR:
            raise InvalidInput(f"{world_name}: resolution {self.world.spec.resolution} is not divisible by {FACTOR}")

    def path(self, target: str) -> Path:
        """Where a target's weights belong."""
        return (self.out or _shipped_folder(target)) / f"{self.name}-{target}.safetensors"

    def nearest(self, target: str) -> Path:
        """A network that another is trained or measured with: the one beside it, else the shipped one of this world."""
        own = self.path(target)
        return own if own.exists() else _shipped_folder(target) / own.name

    def tokenizers(self) -> dict[str, Any]:
        """Those tokenizers of this world that have been trained already."""
        paths = {target: self.nearest(target) for target in ("vae", "vq")}
        return {target: load_tokenizer(str(path), self.device) for target, path in paths.items() if path.exists()}

    def card(self, target: str, recipe: Recipe, command: str) -> dict[str, Any]:
        """All of a card that is known before training."""
        spec = self.world.spec
        facts: dict[str, Any] = {
            "name": f"{self.name}-{target}",
            "kind": recipe.kind,
            "world": self.name,
            "world_sha256": digest(spec),
            "resolution": spec.resolution,
            "network": recipe.network,
        }
        if recipe.tokenizes:
            facts |= {"grid": spec.resolution // FACTOR, "channels": recipe.channels, "vocab_size": recipe.codes}
        else:
            facts |= {"classes": list(spec.classes), "colors": list(spec.colors)}
        return facts | {"command": command, "recipe": asdict(recipe), "torch": torch.__version__, "device": self.device}

    def network(self, card: dict[str, Any]) -> nn.Module:
        """The untrained network of a card."""
        if card["kind"] in ("continuous", "discrete"):
            return build_network(card)
        build = DetectorNetwork if card["kind"] == "detector" else FeatureNetwork
        return build(**card["network"], num_classes=len(card["classes"]), num_colors=len(card["colors"]))

    def loss(self, recipe: Recipe) -> Loss:
        """How a network learns from one batch's material."""
        if recipe.kind == "detector":
            tokenizers = list(self.tokenizers().values())

            def of_views(network: Any, drawn: Material) -> Tensor:
                own, second = drawn
                views = judged_views(own, second, tokenizers)
                return network.loss(views.pixels.to(self.device), views.objects)

            return of_views
        if recipe.kind == "features":
            return lambda network, drawn: network.loss(
                to_pixels(drawn[0], self.device), torch.from_numpy(drawn[1]).to(self.device)
            )
        return lambda network, drawn: network.loss(to_pixels(drawn, self.device))

    def train(self, network: nn.Module, recipe: Recipe, report: Callable[[int, float], None]) -> None:
        """Trains on the workshop's device, while other cores draw the next scenes."""
        first = recipe.seed * SEED_STRIDE
        starts = range(first, first + recipe.steps * recipe.batch, recipe.batch)
        with drawers(self.world, self.device) as at_work:
            batches = at_work.map(partial(material, recipe.kind, recipe.batch), starts)
            train(network.to(self.device), recipe, batches, self.loss(recipe), report)

    def quality(self, network: nn.Module, card: dict[str, Any]) -> dict[str, Any]:
        """What a card says of a trained network, measured on held-out scenes with the weights as stored."""
        images, scenes = batch(self.world, HELD_OUT_START, HELD_OUT_COUNT)
        if isinstance(network, FeatureNetwork):
            with torch.inference_mode():
                counts = torch.from_numpy(pairs(self.world, scenes)).to(self.device)
                return {"scene_accuracy": network.accuracy(to_pixels(images, self.device), counts)}
        named = {**card, "sha256": ""}
        if isinstance(network, DetectorNetwork):
            detector = IconDetector(network, named, self.device)
            measured = {**certainty(detector, images, scenes), **references(self.world, detector=detector)}
            for target, tokenizer in self.tokenizers().items():
                through = references(self.world, tokenizer, detector)
                measured |= {f"geneval_ceiling_{target}": through["geneval_ceiling"]}
            return measured
        tokenizer = as_tokenizer(network, named, self.device)
        started = time.process_time()
        tokens = tokenizer.encode(images)
        encoded = time.process_time()
        tokenizer.decode(tokenizer.sample(tokens, torch.Generator().manual_seed(0)))
        decoded = time.process_time()
        measured = {
            "psnr": psnr(images, reconstruct(tokenizer, images)),
            "encode_per_s": round(len(images) / (encoded - started)),
            "decode_per_s": round(len(images) / (decoded - encoded)),
        }
        if isinstance(network, VQAutoencoder):
            return measured | {"codes_used": len(tokens.unique())}
        # z-scored: 1 would be a channel without information, 0 one without noise.
        return measured | {"mean_deviation": tokens[..., card["channels"] :].mean().item()}


def pretrain(workshop: Workshop, target: str, recipe: Recipe, command: str) -> dict[str, Any]:
    """Trains one network, measures it as stored, writes weights and card, and returns the card."""
    torch.manual_seed(recipe.seed)
    path = workshop.path(target)
    _check_writable(path.parent)
    card = workshop.card(target, recipe, command)
    network = workshop.network(card)
    # Of the one thread, so that what else the machine did does not show; beside a GPU the thread waits.
    clock = time.process_time if workshop.device == "cpu" else time.perf_counter
    started = clock()
    with _progress(card["name"], recipe.steps) as report:
        workshop.train(network, recipe, report)
    if isinstance(network, (KLAutoencoder, FeatureNetwork)):
        images, _ = batch(workshop.world, recipe.seed * SEED_STRIDE, HELD_OUT_COUNT)
        network.measure_scaling(to_pixels(images, workshop.device))
    card["seconds"] = round(clock() - started, 1)
    # Half precision halves what is shipped; quality is measured on what a user will load.
    data = save_safetensors({k: v.half() if v.ndim > 1 else v for k, v in network.state_dict().items()})
    load_weights(network, data)
    return shipped.store(path, data, card | workshop.quality(network.eval().requires_grad_(False), card))


def measure(workshop: Workshop, target: str) -> dict[str, Any]:
    """Measures a trained network anew and writes its card, on a tokenizer's also its floors and ceilings."""
    path = workshop.path(target)
    data, card = shipped.verified(str(path))
    network = workshop.network(card).to(workshop.device)
    load_weights(network, data)
    card |= workshop.quality(network.eval().requires_grad_(False), card)
    if card["kind"] in ("continuous", "discrete"):
        detector = load_detector(str(workshop.nearest("detector")), workshop.device)
        features = load_features(str(workshop.nearest("features")), workshop.device)
        card |= {"detector_sha256": detector.sha256, "features_sha256": features.sha256}
        card |= references(workshop.world, load_tokenizer(str(path), workshop.device), detector, features)
    return shipped.store(path, data, card)


def _shipped_folder(target: str) -> Path:
    return CARDS if target.partition("-")[0] in ("vae", "vq") else JUDGES


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InvalidInput(f"{folder}: cannot be written ({error.strerror}); choose another --out") from error


@contextlib.contextmanager
def _progress(name: str, steps: int) -> Iterator[Callable[[int, float], None]]:
    """Progress with time left: a bar on a terminal, a line every ten seconds elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    started = last = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task(name, total=steps)

        def report(step: int, loss: float) -> None:
            nonlocal last
            bar.update(task, completed=step, description=f"{name}  loss {loss:.4f}")
            now = time.monotonic()
            if bar.disable and (now - last > 10 or step == steps):
                last = now
                left = (now - started) / step * (steps - step)
                print(f"{name}: step {step} of {steps}, loss {loss:.4f}, {left:.0f} s left", flush=True)

        yield report


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fluidscale.pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m fluidscale.pretrain vae --world icons32 --out runs/tokenizers\n"
        "order: vae and vq, then detector, detector2 and features, then measure: every card's figures anew,\n"
        "and on the tokenizers' the floors and ceilings that scores are to be read against.\n"
        "One CPU thread, so that a command gives the same weights on every run; --device cuda for worlds of 64 px and\n"
        "more, where one thread takes an hour.",
    )
    parser.add_argument("target", choices=(*RECIPES, "measure"))
    parser.add_argument(
        "--world", default="icons32", metavar="NAME|YAML", help="a row of sweeps/worlds.yaml, or a file"
    )
    parser.add_argument("--out", type=Path, help="folder of weights and cards (default: where shipped ones lie)")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"), default="cpu", help="default: %(default)s")
    parser.add_argument("--seed", type=int, help="initial weights and scenes (default: the recipe's)")
    parser.add_argument("--steps", type=int, help="training steps (default: the recipe's)")
    parser.add_argument("--channels", type=int, help="vae: channels of a token; the file is then WORLD-vae-CHANNELS")
    parser.add_argument("--codes", type=int, help="vq: codes of the vocabulary; the file is then WORLD-vq-CODES")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        words = sys.argv[1:] if argv is None else argv
        cards = _run(arguments, f"python -m fluidscale.pretrain {shlex.join(words)}")
    except InvalidInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for card in cards:
        shown = {k: f"{v:.4g}" for k, v in card.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        print(f"{card['name']}: " + ", ".join(f"{key} {value}" for key, value in shown.items()))
    return 0


def _run(arguments: argparse.Namespace, command: str) -> list[dict[str, Any]]:
    workshop = Workshop(arguments.world, arguments.out, arguments.device)
    if arguments.target == "measure":
        return [measure(workshop, target) for target in RECIPES]
    asked = {
        key: value for key in ("seed", "steps", "channels", "codes") if (value := getattr(arguments, key)) is not None
    }
    recipe = replace(RECIPES[arguments.target], **asked)
    _check(arguments.target, recipe, asked)
    size = asked.get("channels", asked.get("codes"))
    if size is None:
        return [pretrain(workshop, arguments.target, recipe, command)]
    # A tokenizer of another size is there to be compared: its floors and ceilings belong to it from the start.
    name = f"{arguments.target}-{size}"
    pretrain(workshop, name, recipe, command)
    return [measure(workshop, name)]


def _check(target: str, recipe: Recipe, asked: dict[str, int]) -> None:
    """Raises InvalidInput on options out of range, or of another target."""
    if recipe.steps < 1 or recipe.seed < 0:
        raise InvalidInput(
            f"--steps {recipe.steps} --seed {recipe.seed}: steps must be at least 1, the seed at least 0"
        )
    for option, owner in (("channels", "vae"), ("codes", "vq")):
        if option in asked and (target != owner or asked[option] < 1):
            raise InvalidInput(f"--{option} {asked[option]}: a number of at least 1, and for {owner} alone")


if __name__ == "__main__":
    raise SystemExit(main())
