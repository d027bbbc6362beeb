"""Tables from known truths: what the tests, the coverage benchmark and the advice on next runs are checked against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from analysis.laws import Array
from analysis.points import Points
from analysis.published import CHINCHILLA

LADDER = {"46K": 46_000, "96K": 96_000, "204K": 204_000, "440K": 440_000, "950K": 950_000}
ARMS = (("continuous", "random"), ("continuous", "raster"), ("discrete", "random"), ("discrete", "raster"))
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
TOKENS_PER_IMAGE = 64


@dataclass(frozen=True)
class ArmTruth:
    """One arm's laws: loss = E + A N^-alpha + B D^-beta (N, D over the ladder's largest), FD and score from loss."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    fd_scale: float
    fd_alpha: float
    score: float
    slope: float


TRUTHS: Mapping[tuple[str, str], ArmTruth] = {
    ("continuous", "random"): ArmTruth(0.210, 0.060, 0.030, 0.34, 0.30, 3.0, 0.45, 1.1, 0.75),
    ("continuous", "raster"): ArmTruth(0.195, 0.058, 0.032, 0.32, 0.28, 4.2, 0.38, 1.4, 0.62),
    ("discrete", "random"): ArmTruth(2.60, 0.72, 0.36, 0.30, 0.26, 5.5, 0.30, 0.5, 0.55),
    ("discrete", "raster"): ArmTruth(2.40, 0.70, 0.40, 0.28, 0.27, 6.1, 0.26, 1.2, 0.48),
}


def chinchilla_points(
    n: Array, d: Array, noise: float, rng: np.random.Generator, truth: Mapping[str, float] = CHINCHILLA
) -> Points:
    """Points of Chinchilla's law at (n, d) with log-normal noise; every run its own cluster."""
    mean = truth["E"] + truth["A"] * n ** -truth["alpha"] + truth["B"] * d ** -truth["beta"]
    blank, rows, label = np.full(len(n), np.nan), np.arange(len(n)), np.full(len(n), "")
    y = mean * np.exp(noise * rng.normal(size=len(n)))
    return Points({}, "loss", "loss", label, label, rows, n, d, 6 * n * d, y, blank, blank, rows, np.full(len(n), "0"))


def trunk_points(
    sizes: int, ratios: int, seeds: int, noise: float, rng: np.random.Generator, truth: Mapping[str, float] = CHINCHILLA
) -> Points:
    """`grid` at several seeds as cool-down branches: a trunk a size and seed, with an error as large as a run's own."""
    n, d = (np.tile(axis, seeds) for axis in grid(sizes, ratios))
    points = chinchilla_points(n, d, noise, rng, truth)
    seed = np.repeat(np.arange(seeds), sizes * ratios)
    trunk = np.tile(np.repeat(np.arange(sizes), ratios), seeds) + sizes * seed
    shared = noise * rng.normal(size=sizes * seeds)[trunk]
    return replace(points, y=points.y * np.exp(shared), cluster=trunk, seed=seed.astype(str))


def grid(sizes: int, ratios: int) -> tuple[Array, Array]:
    """A ladder of `sizes` from 1e8 to 1e10 parameters, each at `ratios` ratios D / N spread around Chinchilla's 20."""
    spread = np.array([8.0, 50.0]) if ratios == 2 else np.geomspace(5.0, 80.0, ratios)
    n = np.repeat(np.geomspace(1e8, 1e10, sizes), ratios)
    return n, n * np.tile(spread, sizes)


def ladder(
    images: Sequence[int] = (24_000, 48_000, 96_000),
    seeds: Sequence[int] = (0,),
    noise: float = 0.004,
    sizes: Mapping[str, int] = LADDER,
    random_state: int = 0,
) -> pd.DataFrame:
    """A results table in the project's own schema: four arms x sizes x data sizes, full evaluation at the largest D."""
    rng = np.random.default_rng(random_state)
    biggest = max(sizes.values())
    rows = []
    for arm in ARMS:
        for size, params in sizes.items():
            for seed in seeds:
                trunk = f"{'-'.join(arm)}-{size}-s{seed}"
                shift = 0.5 * noise * rng.normal()
                for d in images:
                    rows.append(_row(arm, size, params, seed, d, d == max(images), trunk, shift, noise, biggest, rng))
    return pd.DataFrame(rows)


def _row(
    arm: tuple[str, str],
    size: str,
    params: int,
    seed: int,
    images: int,
    full: bool,
    trunk: str,
    shift: float,
    noise: float,
    biggest: int,
    rng: np.random.Generator,
) -> dict:
    truth, kind = TRUTHS[arm], arm[0]
    mean = truth.E + truth.A * (params / biggest) ** -truth.alpha + truth.B * (images / 96_000) ** -truth.beta
    flops = 2.0 * params * TOKENS_PER_IMAGE
    row = {
        "run_id": f"{trunk}-{images}", "trunk_id": trunk, "branch_step": images // 64, "sweep": "simulated",
        "token_kind": kind, "order": arm[1], "order_index": 0, "size": size, "seed": seed, "schema_version": 1,
        "params_embed": int(0.04 * params), "params_text": int(0.16 * params), "params_body": int(0.7 * params),
        "params_head": int(0.1 * params), "params_total": params, "flops_per_image_body": 0.9 * flops,
        "flops_per_image_head": 0.1 * flops, "train_flops": 3 * flops * images, "images": images,
        "tokens_seen": images * TOKENS_PER_IMAGE, "lr": 1e-3, "batch": 64, "steps": images // 64,
        "lr_decay_complete": True, "images_unique": images, "gpu_hours": flops * images / 1e14, "status": "done",
        "val_loss": mean * np.exp(shift + noise * rng.normal()), "val_loss_se": 0.004 * mean, "val_loss_n": 512,
        "val_loss_unit": "flow-matching loss per token" if kind == "continuous" else "nats per token",
        "val_loss_protocol": "fixed-noise-v1",
    }  # fmt: skip
    row |= _evaluation(truth, kind, params / biggest, full, rng)
    return row


def _evaluation(truth: ArmTruth, kind: str, relative: float, full: bool, rng: np.random.Generator) -> dict:
    floor, ceiling = (1.2, 0.96) if kind == "continuous" else (2.1, 0.90)
    out: dict = {"fd_floor": floor, "fd_real_floor": 0.4, "geneval_ceiling": ceiling, "geneval_floor": 0.03}
    names = ["fd", "geneval", *(f"geneval_{tag}" for tag in TAGS), "geneval_unseen"]
    if not full:
        return out | {f"{m}{s}": "" for m in names for s in ("", "_se", "_n", "_unit", "_protocol")}
    fd = floor + truth.fd_scale * relative**-truth.fd_alpha
    out |= {
        "fd": fd * np.exp(0.02 * rng.normal()),
        "fd_se": 0.02 * fd,
        "fd_n": 2048,
        "fd_unit": "FD",
        "fd_protocol": "fd-icons-v1",
    }
    shifts: dict[str, float] = dict(zip(TAGS, (1.2, 0.1, -0.3, 0.5, -0.8, -0.6), strict=True))
    for name in names[1:]:
        logit = truth.score + truth.slope * np.log(relative) + shifts.get(name.removeprefix("geneval_"), 0.0)
        share, n = ceiling / (1 + np.exp(-logit)), 400 if name == "geneval" else 80
        se = np.sqrt(2.2 * share * (1 - share) / n)
        out |= {name: np.clip(share + 0.4 * se * rng.normal(), 0, 1), f"{name}_se": se, f"{name}_n": n}
        out |= {f"{name}_unit": "share correct", f"{name}_protocol": "icon-world-v1"}
    return out
