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

from fluidscale.inputs import Inputs, check_validation_images, check_worlds_judges, read_inputs
from fluidscale.limits import AtLeastOne, InvalidInput, Positive, Share, from_dict, mapping, typed, unknown_key
from fluidscale.published import read_judges
from fluidscale.spec import ARMS, ORDERS, TOKEN_KINDS, RunSpec, Seed, TrainSpec, WorldSpec, canonical
from fluidscale.valid import check, check_world

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
# Of keys and values; then those that may be a name.
_MAPPINGS = ("model", "data", "train", "evaluate")
_SECTIONS = (*_MAPPINGS, "tokenizer", "text_encoder")
# Of `evaluate`, what follows from the section `judges`.
_JUDGED = ("judges", "geneval_prompts_sha256", "fid_prompts_sha256")


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
        """Raises InvalidInput when a run is planned only: its images are not encoded, or its tokenizer or its world's
        judges not trained."""
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
            check_worlds_judges(run, self.name)


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
        content, where = _read_once(Path(name)), name
    else:
        path = SWEEPS / "worlds.yaml"
        rows, where = _read_once(path), f"{path}: {name}"
        if name not in rows:
            raise InvalidInput(unknown_key(name, rows, str(path)))
        content = rows[name]
    world = from_dict(WorldSpec, content, where)
    check_world(world, where)
    return world


def ladder() -> dict[str, Any]:
    """The rows of sweeps/sizes.yaml."""
    return _read_once(SWEEPS / "sizes.yaml")


def sweep_path(name: str) -> Path:
    """The file of a sweep given by name (sweeps/NAME.yaml) or by path."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    path = SWEEPS / f"{name}.yaml"
    if not path.exists():
        raise InvalidInput(unknown_key(name, _shipped() - {"recipe"}, f"no sweep {name!r} in {SWEEPS}"))
    return path


def _shipped() -> set[str]:
    """The names in sweeps/ that another sweep may extend."""
    return {path.stem for path in SWEEPS.glob("*.yaml")} - {"sizes", "worlds"}


def load_sweep(name: str, sizes: Sequence[str] | None = None, arms: Sequence[str] | None = None) -> Sweep:
    """All runs of a sweep, each fully resolved; `sizes` and `arms` keep only those named.

    Raises InvalidInput on an unknown key, size or arm, and on numbers that do not fit together.
    """
    path = sweep_path(name)
    plan = _extended(path)
    where = str(path)
    rows = ladder()
    _check_layers(plan, where)
    all_sizes, all_arms = _listed(plan, "sizes", rows, where), _listed(plan, "arms", ARMS, where)
    only = _by_name(plan, "only", rows, where)
    only = {size: _listed(only, size, ARMS, f"{where}: only") for size in only}
    kept_sizes = _filter(all_sizes, sizes, "SIZE", where)
    kept_arms = _filter(all_arms, arms, "ARM", where)
    judges = read_judges(mapping(plan.get("judges"), f"{where}: judges"), where)
    images = sorted(typed(plan.get("images", []), tuple[AtLeastOne, ...], f"{where}: images"))
    runs = [
        (judges.asked_of(run, inputs.card.get("resolution")), inputs)
        for size, arm in itertools.product(kept_sizes, kept_arms)
        if arm in only.get(size, ARMS)
        for seed in _seeds(plan, size, where)
        for varied in _varied(mapping(plan.get("vary"), f"{where}: vary"), where)
        for run, inputs in _runs(plan, arm, size, seed, images, varied, where)
    ]
    unique = {run.id: run for run, _ in runs}
    assets = judges.assets | {sha256: path for _, inputs in runs for sha256, path in inputs.assets.items()}
    if not unique:
        raise InvalidInput(f"{where}: no runs; `sizes`, `arms`, `seeds` and `images` must each list at least one value")
    partial = len(kept_sizes) * len(kept_arms) < len(all_sizes) * len(all_arms)
    return Sweep(path.stem, tuple(unique.values()), path.read_text(), partial, assets)


def _extended(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's keys over those of the files it extends, sections merged key by key; `seen` extend it."""
    if path.resolve() in seen:
        raise InvalidInput(f"{seen[0]}: extends: it comes back to {path}; a sweep cannot extend itself")
    plan = read_yaml(path)
    for key in plan:
        if key not in _KEYS:
            raise InvalidInput(unknown_key(key, _KEYS, str(path)))
    if "extends" not in plan:
        return plan
    name = typed(plan.pop("extends"), str, f"{path}: extends")
    return _merged(_extended(_extendable(name, path), (*seen, path.resolve())), plan)


def _extendable(name: str, path: Path) -> Path:
    """The sweep that the one at `path` extends: beside it, or else one of the shipped."""
    for folder in (path.parent, SWEEPS):
        if (there := folder / f"{name}.yaml").exists():
            return there
    raise InvalidInput(unknown_key(name, _shipped(), f"{path}: extends: no {name}.yaml beside it, nor shipped"))


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


def _by_name(plan: dict[str, Any], key: str, known: Any, where: str) -> dict[str, Any]:
    """A part with something for each of some names; a misspelt one would be something that no run gets."""
    part = mapping(plan.get(key), f"{where}: {key}")
    for name in part:
        if name not in known:
            raise InvalidInput(unknown_key(name, known, f"{where}: {key}"))
    return part


def _check_layers(plan: dict[str, Any], where: str) -> None:
    layers = {key: plan.get(key) for key in ("defaults", "smaller_images")}
    for axis, known in (("token_kind", TOKEN_KINDS), ("order", ORDERS), ("arm", ARMS), ("size", ladder())):
        layers |= {f"by_{axis}: {k}": layer for k, layer in _by_name(plan, f"by_{axis}", known, where).items()}
    for name, layer in layers.items():
        _check_sections(mapping(layer, f"{where}: {name}"), f"{where}: {name}")


def _check_sections(content: dict[str, Any], where: str) -> None:
    for key in content:
        if key not in _SECTIONS:
            raise InvalidInput(unknown_key(key, _SECTIONS, where))
    for key in _MAPPINGS:
        mapping(content.get(key), f"{where}: {key}")


def _filter(there: list[str], wanted: Sequence[str] | None, label: str, where: str) -> list[str]:
    if not wanted or list(wanted) == ["all"]:
        return there
    for value in wanted:
        if value not in there:
            raise InvalidInput(f"{label}={value} is not in {where}; it has: {', '.join(there)}")
    return [value for value in there if value in wanted]


def _seeds(plan: dict[str, Any], size: str, where: str) -> tuple[int, ...]:
    """The seeds of a size: one list for all sizes, or a mapping with a list for each."""
    seeds = plan.get("seeds", [0])
    if isinstance(seeds, dict):
        seeds = _by_name(plan, "seeds", ladder(), where)
        if size not in seeds:
            raise InvalidInput(f"{where}: seeds: no list for size {size}; it has: {', '.join(map(str, seeds))}")
        seeds = seeds[size]
    if not isinstance(seeds, list):
        raise InvalidInput(f"{where}: seeds: expected a list of numbers, or one for each size, got {seeds!r}")
    return typed(seeds, tuple[Seed, ...], f"{where}: seeds")


def _varied(vary: dict[str, list[Any]], where: str) -> Iterator[dict[str, Any]]:
    """Every combination of the varied dotted keys, as nested overrides."""
    for key, values in vary.items():
        if not isinstance(values, list) or not values:
            raise InvalidInput(f"{where}: vary: {key}: expected a list of values")
        for other in vary:
            if other.startswith(f"{key}."):
                raise InvalidInput(f"{where}: vary: {other} is a part of {key}, which varies too; name one of them")
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
    plan: dict[str, Any], arm: str, size: str, seed: int, images: list[int], varied: dict[str, Any], where: str
) -> Iterator[tuple[RunSpec, Inputs]]:
    """One run a data size: they share their trunk, and only the largest is evaluated in full."""
    kind, order = arm.split("-")
    resolved = dict(plan.get("defaults") or {})
    layers = [
        (plan.get(f"by_{axis}") or {}).get(value)
        for axis, value in (("token_kind", kind), ("order", order), ("arm", arm))
    ]
    # A sweep's own word on a size comes after the size's row.
    for layer in [*layers, {"model": ladder()[size]}, (plan.get("by_size") or {}).get(size), varied]:
        resolved = _merged(resolved, layer or {})
    smaller = _merged(resolved, plan.get("smaller_images") or {})
    for count in images:
        yield _run(smaller if count < images[-1] else resolved, arm, size, seed, count, where)


def _run(content: dict[str, Any], arm: str, size: str, seed: int, images: int, where: str) -> tuple[RunSpec, Inputs]:
    _check_sections(content, where)
    for key in _JUDGED:
        if key in (content.get("evaluate") or {}):
            raise InvalidInput(f"{where}: evaluate: {key}: it follows from the section `judges`; name the files there")
    kind, order = arm.split("-")
    inputs = read_inputs(content, where)
    card = inputs.card
    if card["kind"] != kind:
        raise InvalidInput(f"{where}: {arm} cannot use the {card['kind']} tokenizer {content['tokenizer']}")
    model = {
        **(content.get("model") or {}),
        **inputs.text,
        "token_kind": kind,
        "order": order,
        "grid": card["grid"],
        "token_channels": card["channels"] if kind == "continuous" else 0,
        "vocab_size": card["vocab_size"] if kind == "discrete" else 0,
    }
    model["width"] = typed(model.get("width"), AtLeastOne, f"{where}: model: width")
    if model.get("head") is not None:
        # The denoising head is as wide as the trunk unless a sweep says otherwise.
        model["head"] = {"width": model["width"], **mapping(model["head"], f"{where}: model: head")}
    data = dict(inputs.data)
    if isinstance(data.get("world"), str):
        data["world"] = canonical(load_world(data["world"]))
        side, seen = data["world"]["resolution"], card.get("resolution")
        if seen not in (None, side):
            raise InvalidInput(
                f"{where}: tokenizer {card.get('name', '')} is of pictures of {seen} px, the world's have {side}; "
                "train this world's own (python -m fluidscale.pretrain --help)"
            )
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
            "train": _train(dict(content.get("train") or {}), images, model["width"], where),
            "evaluate": content.get("evaluate"),
        },
        where,
    )
    check(spec, f"{where}: {arm} {size}")
    if inputs.val_images is not None:
        check_validation_images(spec, inputs.val_images, f"{where}: data.shards")
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
    batch = typed(train.get("batch", 1), AtLeastOne, f"{where}: train: batch")
    steps, rest = divmod(images, batch)
    if rest:
        raise InvalidInput(f"{where}: images: {images} is not a multiple of the batch {batch}")
    fraction = typed(train.pop("decay_fraction", 0.0), Share, f"{where}: train: decay_fraction")
    at_width = typed(train.pop("lr_width", width), Positive, f"{where}: train: lr_width")
    if "lr" in train:
        rate = typed(train["lr"], Positive, f"{where}: train: lr")
        # Nine digits: a rate that a person can read back from its spec.
        train["lr"] = float(f"{rate * at_width / width:.9g}")
    return {**train, "steps": steps, "decay_steps": round(steps * fraction)}
