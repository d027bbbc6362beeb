"""Where a run is computed: resource profiles, what this machine has, and the `Placement` that a run is handed.

Imports no torch: a GPU is found by the driver's own tool, and the worker has the last word.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from fluidscale.limits import Amount, AtLeastOne, Count, InvalidInput, OneOf, Positive, from_dict, mapping, unknown_key
from fluidscale.machine import available_cores, available_memory_gb
from fluidscale.published import judge_assets
from fluidscale.record import DEVICES, Placement, Precision, Strategy
from fluidscale.spec import RunSpec
from fluidscale.sweep import ladder, read_yaml

# How a run ends that goes on by itself; `slurm/attempts.py` counts them apart.
RETRIED = ("preemption", "time_limit", "requeue", "node_failure")
RESOURCES = Path(__file__).resolve().parent / "resources.yaml"
CLUSTERS = ("local", "debug", "slurm")
# Parameters of sbatch, or of submitit beside them, on which the launcher relies: by them it finds its tasks again.
_LAUNCHERS_OWN = ("array", "array_parallelism", "comment", "dependency", "error", "job_name", "nodes", "ntasks",
                  "ntasks_per_node", "open_mode", "output", "signal", "signal_delay_s", "srun_args",
                  "time")  # fmt: skip
# Read by glibc when a process starts, unknown elsewhere. By default it hands freed megabytes back to the system and
# pays for zeroed pages at the next step: up to a fifth of a small model's step (benchmarks/allocator.py).
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**28)}


@dataclass(frozen=True)
class Profile:
    """One row of resources.yaml: a kind of worker and what it is expected to reach."""

    name: str
    cluster: Annotated[str, OneOf(("local", "slurm"))]
    device: Annotated[str, OneOf(DEVICES)]
    threads: AtLeastOne
    precision: Precision
    peak_tflops: Positive
    sustained_tflops: Positive
    layer_seconds: Amount
    run_seconds: Amount
    checkpoint_minutes: Amount
    memory_gb: Amount = 0.0
    runs_per_device: AtLeastOne = 1
    strategy: Strategy = "single"
    nodes: AtLeastOne = 1
    devices: AtLeastOne = 1
    micro_batch: Count = 0
    recompute: bool = False
    compile: bool = False
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    minutes: AtLeastOne = 1440
    parallel: AtLeastOne = 64
    trunks_per_task: AtLeastOne = 1
    max_gpu_hours: Amount = 0.0
    # Laid over the parameters of sbatch; null takes one away.
    sbatch: dict[str, Any] | None = None
    # By cause, how often a run is started again; a cause that is not named has no bound.
    restarts: dict[str, Count] | None = None
    # The keys that differ for jobs of their own that evaluate; None: evaluated where it was trained.
    evaluation: dict[str, Any] | None = None
    # Per size, the keys that differ for it.
    sizes: dict[str, dict[str, Any]] | None = None

    def of(self, size: str) -> Profile:
        """This profile with what it says of one size."""
        keys = {**asdict(self), **(self.sizes or {}).get(size, {}), "sizes": None}
        return from_dict(Profile, keys, f"{self.name}: sizes: {size}")

    @property
    def processes(self) -> int:
        """Of one run: a process a device."""
        return self.devices * self.nodes

    @property
    def placed(self) -> dict[str, Any]:
        """The part of a run's `Placement` that is the profile's, whatever the run."""
        keys = ("device", "strategy", "devices", "nodes", "micro_batch", "recompute", "compile", "threads", "precision")
        named = {key: getattr(self, key) for key in (*keys, "checkpoint_minutes")}
        return {**named, "peak_flops": self.peak_tflops * 1e12}

    @property
    def environment(self) -> dict[str, str]:
        """What a process that computes must find before its first import."""
        # Compiling, too, each worker has its own cores alone; torch would start a process a core for each of them.
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")}
        return {**threads, **KEEP_FREED_MEMORY}

    @property
    def evaluating(self) -> Profile | None:
        """The placement of jobs that evaluate; None where training does it."""
        if self.evaluation is None:
            return None
        keys = {**asdict(self), **self.evaluation, "evaluation": None}
        return from_dict(Profile, keys, f"{self.name}: evaluation")


@dataclass(frozen=True)
class Machine:
    """The workers one machine can hold: a worker a core, or some a GPU."""

    profile: Profile
    workers: int
    gpus: tuple[int, ...] = ()  # CUDA indices, one a worker


def load_profile(name: str, resources: Path | None = None) -> Profile:
    """A row of resources.yaml, over which a file of the user's own is laid. Raises InvalidInput on unknown names."""
    rows, where = read_yaml(RESOURCES), str(resources or RESOURCES)
    for own, keys in (read_yaml(resources) if resources else {}).items():
        rows[own] = {**rows.get(own, {}), **mapping(keys, f"{where}: {own}")}
    if name not in rows:
        raise InvalidInput(unknown_key(name, rows, f"--profile: {where}"))
    profile = from_dict(Profile, {"name": name, **rows[name]}, f"{where}: {name}")
    _check(profile, f"{where}: {name}")
    for size in profile.sizes or {}:
        if size not in (known := ladder()):
            raise InvalidInput(unknown_key(size, known, f"{where}: {name}: sizes"))
        _check(profile.of(size), f"{where}: {name}: sizes: {size}")
    return profile


def _check(profile: Profile, where: str) -> None:
    """Raises InvalidInput when a nested key is unknown or of a wrong kind."""
    for cause in profile.restarts or {}:
        if cause not in RETRIED:
            raise InvalidInput(unknown_key(cause, RETRIED, f"{where}: restarts"))
    for key, value in (profile.sbatch or {}).items():
        if key.replace("-", "_") in _LAUNCHERS_OWN:
            raise InvalidInput(f"{where}: sbatch: {key}: it is the launcher's to say")
        if value is not None and value is not True and (value is False or not isinstance(value, (str, int, float))):
            raise InvalidInput(f"{where}: sbatch: {key}: expected a text, a number, true or null, got {value!r}")
    if profile.evaluating:
        _check(profile.evaluating, f"{where}: evaluation")


def choose(cluster: str, name: str | None, resources: Path | None = None) -> Machine:
    """The profile and the workers of `--cluster` and `--profile`; a GPU is taken when there is one."""
    gpus = cuda_devices()
    if name is None:
        name = "slurm" if cluster == "slurm" else "cuda" if gpus else "mps" if has_mps() else "cpu"
    profile = load_profile(name, resources)
    if (profile.cluster == "slurm") != (cluster == "slurm"):
        raise InvalidInput(f"--profile {name}: it is for cluster {profile.cluster}, not for --cluster {cluster}")
    if cluster == "slurm":
        return Machine(profile, profile.parallel)
    if profile.device == "cuda":
        if not gpus:
            raise InvalidInput(f"--profile {name}: no CUDA device here (nvidia-smi lists none); try --profile cpu")
        # Every device before any of them again: few runs are spread out.
        indices = tuple(index for index, _ in gpus) * profile.runs_per_device
        memory = profile.memory_gb or min(gigabytes for _, gigabytes in gpus) / profile.runs_per_device
        return Machine(replace(profile, memory_gb=memory), len(indices), indices)
    workers = 1 if profile.device == "mps" else max(1, available_cores() // profile.threads)
    return Machine(replace(profile, memory_gb=profile.memory_gb or available_memory_gb() / workers), workers)


def place(spec: RunSpec, profile: Profile, branch_steps: tuple[int, ...], assets: Mapping[str, str]) -> Placement:
    """What `fluidscale.run` needs to know of the profile; `branch_steps` are those of all runs of its trunk,
    and `assets` says where a sweep's files are, by sha256, or judge:NAME.

    Raises InvalidInput when the batch does not divide into processes x micro-batches x their accumulation.
    """
    processes = profile.processes
    where = f"profile {profile.name}: {spec.arm} {spec.size}"
    if processes > 1 and (profile.strategy == "single" or profile.cluster == "local"):
        raise InvalidInput(f"{where}: {processes} devices a run need strategy ddp or fsdp, and cluster slurm")
    if spec.train.batch % (processes * max(profile.micro_batch, 1)):
        raise InvalidInput(
            f"{where}: a batch of {spec.train.batch} is not micro_batch {profile.micro_batch} x {processes} devices x "
            "a whole number of accumulated steps; change micro_batch, devices or nodes"
        )
    data, networks = spec.data, (spec.tokenizer_sha256, spec.text_encoder_sha256)
    named = (data.manifest_sha256, data.val_manifest_sha256, *networks, *judge_assets(spec))
    files = {key: assets[key] for key in named if key and key in assets}
    return Placement(**profile.placed, branch_steps=branch_steps, assets=files)


def cuda_devices() -> list[tuple[int, float]]:
    """(index, memory in GB) of the visible CUDA devices, by nvidia-smi; CUDA_VISIBLE_DEVICES is respected."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines() if line.count(",") == 2]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    wanted = None if visible is None else [entry.strip() for entry in visible.split(",")]
    return [
        (int(index), float(mebibytes) * 2**20 / 1e9)
        for index, uuid, mebibytes in rows
        if wanted is None or index in wanted or any(entry and uuid.startswith(entry) for entry in wanted)
    ]


def has_mps() -> bool:
    """Whether this is a Mac whose GPU torch can use."""
    return platform.system() == "Darwin" and platform.machine() == "arm64"
