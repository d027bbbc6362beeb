"""Sweep files to runs: strict YAML in, fully resolved specs out, before anything is spent.

A sweep names what varies (sizes, arms, seeds, images, any dotted key) and extends shared defaults; a value is decided
by the last of: defaults, token kind, order, arm, size, `vary`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fluidscale.inputs import Inputs, read_inputs
from fluidscale.published import read_judges
from fluidscale.spec import (
    ARMS,
    MASK_LAWS,
    SOLVERS,
    InvalidInput,
    RunSpec,
    TrainSpec,
    WorldSpec,
    canonical,
    from_dict,
    unknown_key,
)

SWEEPS = Path(__file__).resolve().parent.parent / "sweeps"
_KEYS = (
    "extends",
    "sizes",
    "arms",
    "only",
    "seeds",
    "images",
    "defaults",
    "smaller_images",
    "by_token_kind",
    "by_order",
    "by_arm",
    "by_size",
    "vary",
    "judges",
)
_SECTIONS = ("model", "data", "train", "evaluate", "tokenizer", "text_encoder")


@dataclass(frozen=True)
class Sweep:
    """A named list of runs and the text of the file that asked for them; partial when a filter left some out.

    `assets` says where the folders are that the runs name by sha256, and under judge:NAME the judges' files.
    """

    name: str
    runs: tuple[RunSpec, ...]
    text: str
    partial: bool = False
    assets: dict[str, str] = field(default_factory=dict)

    def require_data(self) -> None:
        """Raises InvalidInput when a run is planned only: its images are not encoded, or its tokenizer not trained."""
        for run in self.runs:
            if run.data.world is None and run.data.manifest_sha256 is None:
                raise InvalidInput(
                    f"{self.name}: {run.data.name} is planned only; encode it (python -m fluidscale.encode --help), "
                    "then name in the sweep data.shards, tokenizer and text_encoder"
                )
            if run.data.world is not None and not run.tokenizer_sha256:
                raise InvalidInput(
                    f"{self.name}: the tokenizer of {run.arm} is planned only; train this world's networks first: "
                    f"python -m fluidscale.pretrain vae --world {run.data.name}; then vq, detector, detector2, "
                    "features; or, where only channels or codes differ, as the sweep's file says"
                )


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping with its interpolations resolved. Raises InvalidInput naming the file."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except FileNotFoundError as error:
        raise InvalidInput(f"{path}: no such file") from error
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError) as error:
        raise InvalidInput(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise InvalidInput(f"{path}: expected a mapping of keys, got {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def _read_once(path: Path) -> dict[str, Any]:
    """`read_yaml` for files that every run of a sweep names: parsing them a thousand times takes half a minute."""
    return _unchanged(path, path.stat().st_mtime_ns if path.exists() else 0)


@lru_cache
def _unchanged(path: Path, modified: int) -> dict[str, Any]:
    return read_yaml(path)


def load_world(name: str) -> WorldSpec:
    """A row of sweeps/worlds.yaml by name, or a world of the user's own from a YAML file with WorldSpec's fields."""
    if name.endswith((".yaml", ".yml")):
        return from_dict(WorldSpec, _read_once(Path(name)), name)
    path = SWEEPS / "worlds.yaml"
    rows = _read_once(path)
    if name not in rows:
        raise InvalidInput(unknown_key(name, rows, str(path)))
    return from_dict(WorldSpec, rows[name], f"{path}: {name}")


def sweep_path(name: str) -> Path:
    """The file of a sweep given by name (sweeps/NAME.yaml) or by path."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    path = SWEEPS / f"{name}.yaml"
    if not path.exists():
        known = {p.stem for p in SWEEPS.glob("*.yaml")} - {"recipe", "sizes", "worlds"}
        raise InvalidInput(unknown_key(name, known, f"no sweep {name!r} in {SWEEPS}"))
    return path


def load_sweep(name: str, sizes: Sequence[str] | None = None, arms: Sequence[str] | None = None) -> Sweep:
    """All runs of a sweep, each fully resolved; `sizes` and `arms` keep only those named.

    Raises InvalidInput on an unknown key, size or arm, and on numbers that do not fit together.
    """
    path = sweep_path(name)
    plan = _extended(path)
    where = str(path)
    ladder = read_yaml(SWEEPS / "sizes.yaml")
    _check_layers(plan, ladder, where)
    all_sizes, all_arms = _listed(plan, "sizes", ladder, where), _listed(plan, "arms", ARMS, where)
    only = {size: _listed(plan["only"], size, ARMS, f"{where}: only") for size in plan.get("only") or {}}
    kept_sizes = _filter(all_sizes, sizes, "SIZE", where)
    kept_arms = _filter(all_arms, arms, "ARM", where)
    judges = read_judges(plan.get("judges") or {}, where)
    runs = [
        (judges.asked_of(run, inputs.card.get("resolution")), inputs)
        for size, arm in itertools.product(kept_sizes, kept_arms)
        if arm in only.get(size, ARMS)
        for seed in _seeds(plan, size, where)
        for varied in _varied(plan.get("vary") or {}, where)
        for run, inputs in _runs(plan, arm, size, ladder[size], int(seed), varied, where)
    ]
    unique = {run.id: run for run, _ in runs}
    assets = judges.assets | {sha256: path for _, inputs in runs for sha256, path in inputs.assets.items()}
    if not unique:
        raise InvalidInput(f"{where}: no runs; `sizes`, `arms`, `seeds` and `images` must each list at least one value")
    partial = len(kept_sizes) * len(kept_arms) < len(all_sizes) * len(all_arms)
    return Sweep(path.stem, tuple(unique.values()), path.read_text(), partial, assets)


def _extended(path: Path) -> dict[str, Any]:
    """The file's keys over those of the files it extends, sections merged key by key."""
    plan = read_yaml(path)
    for key in plan:
        if key not in _KEYS:
            raise InvalidInput(unknown_key(key, _KEYS, str(path)))
    if "extends" not in plan:
        return plan
    parent = _extended(path.parent / f"{plan.pop('extends')}.yaml")
    return _merged(parent, plan)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict) and key != "vary"
        result[key] = _merged(result[key], value) if both else value
    return result


def _listed(plan: dict[str, Any], key: str, known: Any, where: str) -> list[str]:
    values = plan.get(key, "all")
    if values == "all" and key == "arms":
        return list(known)
    if not isinstance(values, list) or not values:
        raise InvalidInput(f"{where}: {key}: expected a list")
    for value in values:
        if str(value) not in known:
            raise InvalidInput(unknown_key(str(value), known, f"{where}: {key}"))
    return [str(value) for value in values]


def _check_layers(plan: dict[str, Any], ladder: dict[str, Any], where: str) -> None:
    """A misspelt arm or size would be a layer that no run gets."""
    kinds, orders = (dict.fromkeys(arm.split("-")[i] for arm in ARMS) for i in (0, 1))
    for axis, known in (("token_kind", kinds), ("order", orders), ("arm", ARMS), ("size", ladder)):
        layers = plan.get(f"by_{axis}") or {}
        if not isinstance(layers, dict):
            raise InvalidInput(f"{where}: by_{axis}: expected keys and values, got {layers!r}")
        for value in layers:
            if value not in known:
                raise InvalidInput(unknown_key(str(value), known, f"{where}: by_{axis}"))


def _filter(there: list[str], wanted: Sequence[str] | None, label: str, where: str) -> list[str]:
    if not wanted or list(wanted) == ["all"]:
        return there
    for value in wanted:
        if value not in there:
            raise InvalidInput(f"{label}={value} is not in {where}; it has: {', '.join(there)}")
    return [value for value in there if value in wanted]


def _seeds(plan: dict[str, Any], size: str, where: str) -> list[Any]:
    """The seeds of a size: one list for all sizes, or a mapping with a list for each."""
    seeds = plan.get("seeds", [0])
    if isinstance(seeds, dict):
        if size not in seeds:
            raise InvalidInput(f"{where}: seeds: no list for size {size}; it has: {', '.join(map(str, seeds))}")
        seeds = seeds[size]
    if not isinstance(seeds, list):
        raise InvalidInput(f"{where}: seeds: expected a list of numbers, or one for each size, got {seeds!r}")
    return seeds


def _varied(vary: dict[str, list[Any]], where: str) -> Iterator[dict[str, Any]]:
    """Every combination of the varied dotted keys, as nested overrides."""
    for key, values in vary.items():
        if not isinstance(values, list) or not values:
            raise InvalidInput(f"{where}: vary: {key}: expected a list of values")
    for values in itertools.product(*vary.values()):
        nested: dict[str, Any] = {}
        for key, value in zip(vary, values, strict=True):
            *parents, leaf = key.split(".")
            place = nested
            for parent in parents:
                place = place.setdefault(parent, {})
            place[leaf] = value
        yield nested


def _runs(
    plan: dict[str, Any], arm: str, size: str, row: dict[str, Any], seed: int, varied: dict[str, Any], where: str
) -> Iterator[tuple[RunSpec, Inputs]]:
    """One run a data size: they share their trunk, and only the largest is evaluated in full."""
    kind, order = arm.split("-")
    resolved = dict(plan.get("defaults", {}))
    layers = [
        (plan.get(f"by_{axis}") or {}).get(value)
        for axis, value in (("token_kind", kind), ("order", order), ("arm", arm))
    ]
    # A sweep's own word on a size comes after the size's row.
    for layer in [*layers, {"model": row}, (plan.get("by_size") or {}).get(size), varied]:
        resolved = _merged(resolved, layer or {})
    sizes_of_data = sorted(int(n) for n in plan.get("images", []))
    for images in sizes_of_data:
        smaller = plan.get("smaller_images") or {}
        yield _run(
            _merged(resolved, smaller) if images < sizes_of_data[-1] else resolved, arm, size, seed, images, where
        )


def _run(content: dict[str, Any], arm: str, size: str, seed: int, images: int, where: str) -> tuple[RunSpec, Inputs]:
    for key in content:
        if key not in _SECTIONS:
            raise InvalidInput(unknown_key(key, _SECTIONS, where))
    kind, order = arm.split("-")
    inputs = read_inputs(content, where)
    card = inputs.card
    if card["kind"] != kind:
        raise InvalidInput(f"{where}: {arm} cannot use the {card['kind']} tokenizer {content['tokenizer']}")
    model = {
        **content["model"],
        **inputs.text,
        "token_kind": kind,
        "order": order,
        "grid": card["grid"],
        "token_channels": card["channels"] if kind == "continuous" else 0,
        "vocab_size": card["vocab_size"] if kind == "discrete" else 0,
    }
    if model.get("head") is not None:
        # The denoising head is as wide as the trunk unless a sweep says otherwise.
        model["head"] = {"width": model["width"], **model["head"]}
    data = dict(inputs.data)
    if isinstance(data.get("world"), str):
        data["world"] = canonical(load_world(data["world"]))
    spec = from_dict(
        RunSpec,
        {
            "size": size,
            "seed": seed,
            "model": model,
            "tokenizer_sha256": card["sha256"],
            "text_encoder": inputs.text_encoder,
            "text_encoder_sha256": inputs.text_encoder_sha256,
            "data": data,
            "train": _train(dict(content["train"]), images, int(model["width"]), where),
            "evaluate": content["evaluate"],
        },
        where,
    )
    check(spec, f"{where}: {arm} {size}")
    return spec, inputs


def _train(train: dict[str, Any], images: int, width: int, where: str) -> dict[str, Any]:
    """Images, fractions and the rate's rule become the numbers that the loop uses.

    With `lr_width`, `lr` is the rate at that width and others get lr * lr_width / width: Adam's rate for matrices under
    maximal-update scaling (arXiv 2203.03466, Table 3), under which `lr_vectors` is one for all widths.
    """
    known = {f.name for f in fields(TrainSpec)} - {"steps", "decay_steps"} | {"decay_fraction", "lr_width"}
    for key in train:
        if key not in known:
            raise InvalidInput(unknown_key(key, known, f"{where}: train"))
    steps, rest = divmod(images, int(train.get("batch", 1)))
    if rest:
        raise InvalidInput(f"{where}: images: {images} is not a multiple of the batch {train['batch']}")
    fraction, at_width = train.pop("decay_fraction", 0.0), train.pop("lr_width", width)
    # Nine digits: a rate that a person can read back from its spec.
    rate = float(f"{train['lr'] * at_width / width:.9g}") if "lr" in train else None
    return {**train, "lr": rate, "steps": steps, "decay_steps": round(steps * fraction)}


def check(spec: RunSpec, where: str) -> None:
    """Raises InvalidInput when the numbers of a spec do not fit together, with the way out."""
    model, train, sampling = spec.model, spec.train, spec.evaluate.sampling
    objective = model.head.objective if model.head else ""
    solvers = SOLVERS.get(objective, ()) if model.head else ("none",)
    draws = spec.evaluate.geneval_images_per_prompt or spec.evaluate.fd_images or spec.evaluate.judges
    head_dim, rest = divmod(model.width, model.num_heads)
    rules = (
        (rest, f"width {model.width} is not divisible by num_heads {model.num_heads}; change its row in sizes.yaml"),
        (
            model.position != "input" and head_dim % 4,
            f"2-D rotary positions need a head dimension divisible by 4, got {head_dim}; change num_heads",
        ),
        (
            model.mask_law not in (("none",) if model.order == "raster" else MASK_LAWS),
            f"mask_law {model.mask_law!r} is not for {model.order} order "
            f"(random: {', '.join(MASK_LAWS)}; raster: none)",
        ),
        (
            (model.token_kind == "continuous") == (model.head is None),
            f"model.head is {model.head}: continuous tokens need one, discrete tokens take none",
        ),
        (not solvers, f"model.head.objective {objective!r}: choose from {', '.join(SOLVERS)}"),
        (
            sampling.solver not in (solvers if draws else (*solvers, "none")),
            f"evaluate.sampling.solver {sampling.solver!r} does not draw this head's tokens; "
            f"choose from {', '.join(solvers)}",
        ),
        (
            train.warmup_steps > train.branch_step,
            f"{train.steps} steps cannot hold {train.warmup_steps} of warm-up and {train.decay_steps} of decay; "
            "raise `images` or lower train.warmup_steps",
        ),
        (
            not (spec.data.world or spec.data.manifest_sha256) and spec.tokenizer_sha256,
            "data.world or data.shards is missing: name a row of sweeps/worlds.yaml, or a folder of encoded images",
        ),
        (
            train.lr <= 0 or train.batch <= 0 or (train.lr_vectors is not None and train.lr_vectors <= 0),
            "train.lr (and lr_vectors, where given) and train.batch must be positive",
        ),
        (train.decay_shape not in ("linear", "cosine"), f"train.decay_shape {train.decay_shape!r}: linear or cosine"),
        (
            not train.batch <= spec.data.images_unique,
            f"data.images_unique {spec.data.images_unique} is below one batch of {train.batch}",
        ),
    )
    for broken, message in rules:
        if broken:
            raise InvalidInput(f"{where}: {message}")
