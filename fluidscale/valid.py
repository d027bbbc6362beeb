"""Which specs can be run: the numbers that must fit together, beside what `limits` allows each of them by itself.

Pure rules, so that planning knows them; what draws and builds asks here too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from fluidscale.limits import InvalidInput, checked, from_dict
from fluidscale.spec import LEAST_FD_IMAGES, MASK_LAWS, SOLVERS, TIME_STEPS, ModelSpec, RunSpec, SamplingSpec, WorldSpec


def run_spec_from_json(text: str, where: str) -> RunSpec:
    """Reads what `to_json` wrote. Raises InvalidInput when it is not a run spec, or one that cannot be run."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidInput(f"{where}: not JSON ({error})") from error
    spec = from_dict(RunSpec, content, where)
    check(spec, where)
    return spec


def read_run_spec(path: Path) -> RunSpec:
    """The spec in a file. Raises InvalidInput when there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: not readable as a run's spec.json ({error})") from error
    return run_spec_from_json(text, str(path))


def check(spec: RunSpec, where: str) -> None:
    """Raises InvalidInput when the numbers of a spec, each allowed by itself, do not fit together."""
    for faults in (_model_faults(spec.model), _train_faults(spec), _evaluate_faults(spec)):
        _refuse(faults, where)
    if spec.data.world is not None:
        check_world(spec.data.world, where)


def check_model(model: ModelSpec) -> None:
    """Raises InvalidInput for a spec that no model can be built from."""
    _refuse(_model_faults(checked(model, "model")), "model")


def check_world(world: WorldSpec, where: str) -> None:
    """Raises InvalidInput when the numbers of a world do not fit together."""
    for what, names in (("classes", world.classes), ("colors", world.colors)):
        if len(set(names)) < max(len(names), 2):
            raise InvalidInput(f"{where}: {what} must be at least two, each named once, got {list(names)}")
    if len(world.icon_sizes) != world.max_objects:
        raise InvalidInput(f"{where}: icon_sizes must name {world.max_objects} sizes, got {list(world.icon_sizes)}")
    for count in range(1, world.max_objects + 1):
        side, step = icon_extent(world, count), world.position_step
        room = world.resolution - side
        # Two that fit beside each other leave room for two more below; no more are ever drawn.
        farthest, apart = room // step * step, -(-side // step) * step
        if room < 0 or (count > 1 and farthest < apart):
            raise InvalidInput(f"{where}: {no_room(world, count)}")


def icon_extent(world: WorldSpec, count: int) -> int:
    """Side in px of the square that holds an icon of a scene of `count`, however scaled and turned."""
    turn = math.radians(min(abs(world.rotation_degrees), 45))
    return math.ceil(world.icon_sizes[count - 1] * (1 + world.size_jitter) * (math.cos(turn) + math.sin(turn)))


def no_room(world: WorldSpec, count: int) -> str:
    """What is wrong with a world whose scenes of `count` icons have no place for them."""
    return (
        f"{count} icon{'s' * (count > 1)} of {icon_extent(world, count)} px (with jitter and rotation) do not fit in "
        f"{world.resolution} px; lower icon_sizes, size_jitter or rotation_degrees"
    )


def check_sampling(sampling: SamplingSpec, objective: str | None) -> None:
    """Raises InvalidInput for settings that a head cannot draw with; `objective` None: a softmax's codes."""
    checked(sampling, "sampling")
    _refuse(_drawing_faults(sampling, objective), "sampling")


def check_solver(solver: str, objective: str, num_steps: int) -> None:
    """Raises InvalidInput for a solver that does not fit the head's objective, or a number of steps that it cannot
    take."""
    _refuse(_solver_faults(solver, objective, num_steps), "sampling")


def check_inference_steps(num_steps: int, num_tokens: int) -> None:
    """Raises InvalidInput unless each step of random order has a token to write."""
    _refuse(_step_faults(num_steps, num_tokens), "sampling")


def _refuse(faults: Iterable[str], where: str) -> None:
    for fault in faults:
        raise InvalidInput(f"{where}: {fault}")


def _model_faults(model: ModelSpec) -> Iterator[str]:
    """What is wrong, with the way out; so do all that follow."""
    head_dim, rest = divmod(model.width, model.num_heads)
    if rest:
        yield f"width {model.width} is not divisible by num_heads {model.num_heads}; change its row in sizes.yaml"
    if model.position != "input" and head_dim % 4:
        yield f"2-D rotary positions need a head dimension divisible by 4, got {head_dim}; change num_heads"
    if model.mask_law not in (("none",) if model.order == "raster" else MASK_LAWS):
        laws = f"(random: {', '.join(MASK_LAWS)}; raster: none)"
        yield f"mask_law {model.mask_law!r} is not for {model.order} order {laws}"
    if model.order == "raster" and (model.encoder_depth or model.buffer_tokens):
        yield "encoder_depth and buffer_tokens are of random order: raster order has no mask tokens; set them to 0"
    if model.encoder_depth >= model.depth:
        yield (
            f"encoder_depth {model.encoder_depth} leaves no block for the decoder; it must be below depth {model.depth}"
        )
    if (model.token_kind == "continuous") == (model.head is None):
        yield f"model.head is {model.head}: continuous tokens need one, discrete tokens take none"
    if model.token_kind == "continuous" and not model.token_channels:
        yield "continuous tokens need token_channels of at least 1"
    if model.token_kind == "discrete" and model.vocab_size < 2:
        yield f"discrete tokens need a vocab_size of at least 2, got {model.vocab_size}"


def _train_faults(spec: RunSpec) -> Iterator[str]:
    train, data = spec.train, spec.data
    if train.warmup_steps > train.branch_step:
        yield (
            f"{train.steps} steps cannot hold {train.warmup_steps} of warm-up and {train.decay_steps} of decay; "
            "raise `images` or lower train.warmup_steps"
        )
    if not (data.world or data.manifest_sha256) and spec.tokenizer_sha256:
        yield "data.world or data.shards is missing: name a row of sweeps/worlds.yaml, or a folder of encoded images"
    if train.batch > data.images_unique:
        yield f"data.images_unique {data.images_unique} is below one batch of {train.batch}"


def _evaluate_faults(spec: RunSpec) -> Iterator[str]:
    model, evaluate = spec.model, spec.evaluate
    if model.order == "random":
        yield from _within(_step_faults(evaluate.sampling.num_inference_steps, model.num_tokens))
    draws = evaluate.geneval_images_per_prompt or evaluate.fd_images or evaluate.judges
    # A denoising head that draws nothing needs no solver.
    if model.head is None or draws or evaluate.sampling.solver != "none":
        yield from _within(_drawing_faults(evaluate.sampling, model.head.objective if model.head else None))
    if (spec.data.world or {"fid", "fd"} & {*evaluate.judges}) and 0 < evaluate.fd_images < LEAST_FD_IMAGES:
        yield f"evaluate.fd_images is {evaluate.fd_images}: a distance needs at least {LEAST_FD_IMAGES}; or set it to 0"
    for name in ("val_images", "stepwise_images"):
        if getattr(evaluate, name) == 1:
            yield f"evaluate.{name} is 1: one image tells no standard error; give more, or set it to 0"


def _within(faults: Iterable[str]) -> Iterator[str]:
    return (f"evaluate.sampling.{fault}" for fault in faults)


def _drawing_faults(sampling: SamplingSpec, objective: str | None) -> Iterator[str]:
    if objective is None:
        if sampling.solver != "none":
            yield f"solver {sampling.solver!r} does not draw codes; choose from none"
        if sampling.final_denoising_steps:
            yield f"final_denoising_steps is {sampling.final_denoising_steps}: codes are drawn without any; set it to 0"
        return
    for steps in (sampling.num_denoising_steps, sampling.final_denoising_steps or sampling.num_denoising_steps):
        yield from _solver_faults(sampling.solver, objective, steps)


def _solver_faults(solver: str, objective: str, num_steps: int) -> Iterator[str]:
    if solver not in SOLVERS[objective]:
        yield f"solver {solver!r} does not draw this head's tokens; choose from {', '.join(SOLVERS[objective])}"
    if num_steps < 1 or (solver.startswith("ddpm") and num_steps > TIME_STEPS):
        yield f"num_denoising_steps must be at least 1 (ddpm: at most {TIME_STEPS}), got {num_steps}"


def _step_faults(num_steps: int, num_tokens: int) -> Iterator[str]:
    if not 1 <= num_steps <= num_tokens:
        yield f"num_inference_steps must be 1 to {num_tokens} (the number of tokens), got {num_steps}"
