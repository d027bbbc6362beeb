"""What a run leaves behind: its folder's files, written atomically, and its one flat row of the results table."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

from fluidscale import flops
from fluidscale.limits import Amount, AtLeastOne, Count, InvalidInput, OneOf
from fluidscale.spec import RunSpec

SCHEMA_VERSION = 1
# A table opens with what identifies a run and closes with what it cost; metrics and varied keys lie between.
_FIRST = ("run_id", "trunk_id", "branch_step", "sweep")
_LAST = ("gpu_hours", "tokens_per_s", "mfu", "status", "git_rev", "versions", "finished_at")
# Columns that may differ between two faithful executions of one spec.
VOLATILE = ("gpu_hours", "tokens_per_s", "mfu", "finished_at", "git_rev", "versions")
DEVICES = ("cpu", "cuda", "mps")
# ddp: a whole model a process; fsdp: parameters sharded over the processes.
STRATEGIES = ("single", "ddp", "fsdp")
Strategy = Annotated[str, OneOf(STRATEGIES)]
Precision = Annotated[str, OneOf(("32-true", "bf16-mixed"))]  # Lightning's spelling


@dataclass(frozen=True)
class Placement:
    """Where and how a run is computed: nothing here may change its result, so nothing here is hashed."""

    device: Annotated[str, OneOf(("auto", *DEVICES))] = "auto"  # auto: CUDA, then MPS, then CPU
    strategy: Strategy = "single"
    devices: AtLeastOne = 1  # of each node, a process each
    nodes: AtLeastOne = 1
    micro_batch: Count = 0  # samples that a process computes at once, a divisor of its share of the batch; 0: all of it
    recompute: bool = False  # activations are computed again in the backward pass instead of being kept
    compile: bool = False  # blocks are compiled before they are trained: equal to rounding only
    threads: AtLeastOne = 1  # CPU threads of each process
    precision: Precision = "32-true"
    checkpoint_minutes: Amount = 5.0
    checkpoint_steps: Count = 0  # 0: by time only
    branch_steps: tuple[Count, ...] = ()  # steps at which siblings leave the trunk: their checkpoints are kept
    peak_flops: Amount = 0.0  # of the device, per second; 0: unknown, mfu stays empty
    data_dir: str = ""  # encoded scenes of embedded worlds; empty: <runs>/data
    # Where the folders are that the spec names by sha256: shards, tokenizer, text encoder. {sha256: path}
    # Published judges' files lie under judge:NAME (published.JUDGES).
    assets: dict[str, str] = field(default_factory=dict)

    def asset(self, key: str, what: str) -> Path:
        """The folder or file under a key. Raises InvalidInput when the placement does not say where it is."""
        if key not in self.assets:
            raise InvalidInput(
                f"{what}: the placement does not say where it is; plan the sweep again, "
                f'or add {{"{key}": "PATH"}} to "assets" in placement.json'
            )
        return Path(self.assets[key])

    evaluate: bool = True  # False: training only, another job evaluates

    @property
    def processes(self) -> int:
        return self.devices * self.nodes


@contextmanager
def atomic(path: Path, flush: bool = True) -> Iterator[Path]:
    """A file beside the target to write to, then flushed and renamed: a reader sees the old file or the new one.

    Each process has a name of its own for it. Without `flush` a crash of the machine may leave the target empty.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if flush:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def is_full(error: BaseException) -> bool:
    """Whether a write failed for want of room: nobody's fault but the disk's, and gone when there is some again."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def write_json(path: Path, content: Any) -> None:
    """`write_atomic` of readable JSON; a NaN or infinity becomes null, since JSON has neither."""
    write_atomic(path, json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not (abs(value) < float("inf")):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def read_json(path: Path) -> dict[str, Any] | None:
    """The file's content; None when there is none. Raises InvalidInput when it is not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise InvalidInput(f"{path}: not JSON ({error}); delete it to compute it again") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path}: not text ({error}); delete it to compute it again") from error
    except IsADirectoryError as error:
        raise InvalidInput(f"{path}: a folder, expected a file of JSON") from error


def now() -> str:
    """UTC, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def git_revision() -> str:
    """The code's revision, with a + where the tree has changes; a copy of the code is told its own by the launcher.

    Empty where nobody can tell: outside of a checkout, or without git.
    """
    if "FLUIDSCALE_GIT_REV" in os.environ:
        return os.environ["FLUIDSCALE_GIT_REV"]
    here = str(Path(__file__).resolve().parent)
    command = ["git", "-C", here, "describe", "--always", "--dirty=+", "--abbrev=10"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def planned(spec: RunSpec) -> dict[str, Any]:
    """The columns of a run's row that are known before it is computed."""
    model, train, sampling = spec.model, spec.train, spec.evaluate.sampling
    counts, costs = flops.params(model), flops.flops_per_image(model, train.batch)
    return {
        "run_id": spec.id,
        "trunk_id": spec.trunk_id,
        "branch_step": train.branch_step,
        "token_kind": model.token_kind,
        "order": model.order,
        "size": spec.size,
        "seed": spec.seed,
        "schema_version": SCHEMA_VERSION,
        **{f"params_{part}": counts[part] for part in ("embed", "text", "body", "head", "total")},
        "flops_per_image_body": costs["total"] - costs["head"],
        "flops_per_image_head": costs["head"],
        "train_flops": flops.train_flops(spec),
        "images": spec.images,
        "tokens_seen": spec.images * model.num_tokens,
        "lr": train.lr,
        "batch": train.batch,
        "steps": train.steps,
        "images_unique": min(spec.images, spec.data.images_unique),
        "guidance_scale": sampling.guidance_scale,
        "temperature": sampling.temperature,
        "num_inference_steps": sampling.num_inference_steps,
        "mask_law": model.mask_law,
        "tokenizer_sha": spec.tokenizer_sha256[:12],
        "text_encoder": spec.text_encoder,
    }


def row(spec: RunSpec, run_dir: Path, outcome: dict[str, Any]) -> dict[str, Any]:
    """A finished run as one flat row: the plan, what was measured (eval/*.json) and what it cost.

    `outcome` has the columns lr_decay_complete gpu_hours tokens_per_s mfu status git_rev versions and the tokenizer's
    reference columns. A metric that was not measured has no column here and is empty in the table.
    """
    measured: dict[str, Any] = {}
    for path in sorted((run_dir / "eval").glob("*.json")):
        score = read_json(path) or {}
        name = score["metric"]
        measured[name] = score["value"]
        for suffix, key in (("se", "se"), ("unit", "unit"), ("n", "n"), ("protocol", "protocol")):
            measured[f"{name}_{suffix}"] = score[key]
    return {**planned(spec), **measured, **outcome, "finished_at": now()}


def varying(specs: Iterable[RunSpec]) -> dict[str, dict[str, Any]]:
    """Per run id, one dotted column for every spec key that varies over the runs and has no column of its own."""
    flat = {spec.id: flatten(asdict(spec)) for spec in specs}
    own = {"size", "seed", "train.lr", "train.batch", "train.steps", "train.decay_steps", "tokenizer_sha256"}
    own |= {"model.token_kind", "model.order", "model.mask_law"}
    own |= {f"evaluate.sampling.{key}" for key in ("guidance_scale", "temperature", "num_inference_steps")}
    keys = sorted({key for columns in flat.values() for key in columns} - own)
    varied = [key for key in keys if len({json.dumps(columns.get(key)) for columns in flat.values()}) > 1]
    return {run_id: {key: columns.get(key) for key in varied} for run_id, columns in flat.items()}


def table_row(record: dict[str, Any], sweep: str, varied: dict[str, Any]) -> dict[str, Any]:
    """A finished run's row of its sweep's table: its record, and the spec keys that vary over the sweep."""
    return {**record, "sweep": sweep, **{key: value for key, value in varied.items() if key not in record}}


def table_csv(rows: Iterable[dict[str, Any]]) -> str:
    """Rows as CSV: every float with every digit that it has; what was not measured is empty."""
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    middle = [name for name in names if name not in (*_FIRST, *_LAST)]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*_FIRST, *middle, *_LAST], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
