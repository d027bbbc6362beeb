"""What every evaluator shares: what is judged, what comes out, and the name of how it was measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fluidscale.evaluate.share import Share
from fluidscale.record import Placement
from fluidscale.spec import InvalidInput, RunSpec

if TYPE_CHECKING:
    import numpy as np

    from fluidscale.data.sources import Source
    from fluidscale.evaluate.generate import Drawing
    from fluidscale.model.build import FluidModel
    from fluidscale.tokens.image import Tokenizer
    from fluidscale.world import World


@dataclass(frozen=True)
class Metric:
    """What a number is called, what it is measured in, and which way is better."""

    name: str
    unit: str
    higher_is_better: bool


@dataclass(frozen=True)
class Score:
    """One measured number: `se` is its standard error, `n` the number of images behind it.

    Two scores may be compared only if their `protocol` is equal. `extra` holds what explains the number (other
    standard errors, parts of it) in plain JSON types.
    """

    metric: Metric
    value: float
    se: float
    n: int
    protocol: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """What is judged: a trained model with the averaged weights, in eval mode, and where it came from.

    `detector` and `features` name the judges; empty means those that were trained for the run's own world. `variant`
    names a way of sampling other than the run's own: its files lie in a folder of that name and never mix. `share` is
    the part of the images that this process draws and looks at; the scores are of all. `placement` says where
    published judges lie.
    """

    model: FluidModel
    spec: RunSpec
    source: Source
    run_dir: Path
    device: torch.device
    detector: str = ""
    features: str = ""
    variant: str = ""
    share: Share = field(default_factory=Share)
    placement: Placement = field(default_factory=Placement)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.source.tokenizer

    @property
    def world(self) -> World:
        """The world that the run's scenes and prompts come from. Raises InvalidInput for a run on other images."""
        from fluidscale.data.sources import WorldSource

        if not isinstance(self.source, WorldSource):
            raise InvalidInput(f"{self.spec.data.name}: this score needs an embedded world's scenes and prompts")
        return self.source.world

    @property
    def scores_dir(self) -> Path:
        return self.run_dir / "eval" / self.variant

    @property
    def samples_dir(self) -> Path:
        return self.run_dir / "samples" / self.variant

    @property
    def cache_dir(self) -> Path:
        """What runs share: reference features, the same for every model."""
        return self.run_dir.parent / "cache"

    @cached_property
    def weights_sha256(self) -> str:
        """Names the weights, so that a score or a picture of older ones is never taken for theirs."""
        content = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            content.update(name.encode())
            content.update(tensor.detach().cpu().contiguous().flatten().view(dtype=torch.uint8).numpy().tobytes())
        return content.hexdigest()

    @property
    def detector_name(self) -> str:
        return self.detector or f"{self.spec.data.name}-detector"

    @property
    def features_name(self) -> str:
        return self.features or f"{self.spec.data.name}-features"


# (what is being done, images done, images in all)
Progress = Callable[[str, int, int], None]


def silent(phase: str, done: int, total: int) -> None:
    """A progress that nobody watches."""


class Evaluator(Protocol):
    """One way of judging a model. Yields each score as soon as it is known, that of its own name last."""

    @property
    def name(self) -> str: ...

    def wanted(self, spec: RunSpec) -> bool:
        """Whether a run's spec asks for it, and its model has it."""
        ...

    def protocol(self, subject: Subject) -> str:
        """How it would measure this subject, known without measuring."""
        ...

    def drawings(self, subject: Subject) -> Sequence[Drawing]:
        """The images that it looks at; none where it needs the model alone, which is not asked here.

        Raises InvalidInput on whatever would keep it from judging them: unfit prompts, a judge that is none.
        """
        ...

    def __call__(self, subject: Subject, progress: Progress = silent) -> Iterator[Score]: ...


@dataclass(frozen=True)
class Detection:
    """One object that a detector saw. The rules that judge it live in `geneval`, for every detector alike."""

    cls: str
    score: float  # in [0, 1]
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 in px, y downwards
    color: str = ""  # the detector's verdict; empty when colours are classified by another model
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)  # bool (H, W), where the detector has one


class Detector(Protocol):
    """Finds objects; takes no decision. `sha256` names its weights."""

    name: str
    sha256: str

    @property
    def classes(self) -> Sequence[str]: ...

    @property
    def colors(self) -> Sequence[str]: ...

    def detect(self, images: np.ndarray) -> list[list[Detection]]:
        """All candidates with a score above .05, best first, for images uint8 (B, H, W, 3)."""
        ...


def protocol_id(kind: str, /, **facts: Any) -> str:
    """A short name of how a number was measured: `kind` for people, a hash of every fact for programs.

    Raises TypeError on a fact that has no JSON form: what cannot be written down cannot be compared.
    """
    content = json.dumps({"kind": kind, **facts}, sort_keys=True, separators=(",", ":"))
    return f"{kind}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
