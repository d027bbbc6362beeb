"""What every evaluator shares, and how its scores are kept."""

import dataclasses
import json

import pytest
import torch

from fluidscale.evaluate import Metric, Score, Subject, protocol_id, suite
from fluidscale.evaluate.suite import chosen, evaluate
from fluidscale.spec import InvalidInput


class Network(torch.nn.Module):
    """Two numbers are weights enough to be named."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([value, 2.0]))


class Counting:
    """An evaluator that counts how often it really measures."""

    name = "depth"

    def __init__(self) -> None:
        self.measured = 0
        self.stops_early = False

    def wanted(self, spec):
        return spec.evaluate.val_images > 0

    def protocol(self, subject):
        return protocol_id("depth", guidance=subject.spec.evaluate.sampling.guidance_scale)

    def drawings(self, subject):
        return ()

    def __call__(self, subject, progress=lambda *_: None):
        self.measured += 1
        protocol = self.protocol(subject)
        yield Score(Metric("depth_part", "fathom", True), 1.0, float("nan"), 3, protocol, {"why": "a part"})
        if self.stops_early:
            raise KeyboardInterrupt
        yield Score(Metric("depth", "fathom", True), 2.0, 0.5, 3, protocol)


@pytest.fixture
def counting(monkeypatch):
    evaluator = Counting()
    monkeypatch.setattr(suite, "EVALUATORS", (evaluator,))
    return evaluator


@pytest.fixture
def subject(tiny_spec, tmp_path):
    return Subject(Network(1.0), tiny_spec("discrete-raster"), None, tmp_path / "run", torch.device("cpu"))


def guided(subject: Subject, scale: float) -> Subject:
    evaluation = subject.spec.evaluate
    evaluation = dataclasses.replace(
        evaluation, sampling=dataclasses.replace(evaluation.sampling, guidance_scale=scale)
    )
    return dataclasses.replace(subject, spec=dataclasses.replace(subject.spec, evaluate=evaluation))


def test_a_protocol_id_names_every_fact():
    assert protocol_id("fd", n=1, x="a") == protocol_id("fd", x="a", n=1)
    assert protocol_id("fd", n=1) != protocol_id("fd", n=2) != protocol_id("kid", n=2)
    assert protocol_id("fd", n=1).startswith("fd-")
    with pytest.raises(TypeError):
        protocol_id("fd", when=object())


def test_scores_are_kept_and_read_back(subject, counting):
    first, again = list(evaluate(subject)), list(evaluate(subject))
    assert counting.measured == 1
    assert [s.metric.name for s in first] == ["depth_part", "depth"]
    assert [(s.metric, s.value, s.n, s.protocol, s.extra) for s in first] == [
        (s.metric, s.value, s.n, s.protocol, s.extra) for s in again
    ]
    content = json.loads((subject.run_dir / "eval" / "depth.json").read_text())
    assert {k: content[k] for k in ("metric", "unit", "value", "se", "n")} == {
        "metric": "depth",
        "unit": "fathom",
        "value": 2.0,
        "se": 0.5,
        "n": 3,
    }
    assert json.loads((subject.run_dir / "eval" / "depth_part.json").read_text())["se"] is None


def test_an_interrupted_evaluation_is_not_taken_for_a_whole_one(subject, counting):
    counting.stops_early = True
    with pytest.raises(KeyboardInterrupt):
        list(evaluate(subject))
    counting.stops_early = False
    assert [s.metric.name for s in evaluate(subject)] == ["depth_part", "depth"] and counting.measured == 2


def test_other_weights_or_another_protocol_are_measured_anew(subject, counting):
    list(evaluate(subject))
    list(evaluate(dataclasses.replace(subject, model=Network(1.5))))
    list(evaluate(guided(subject, 7.0)))
    assert counting.measured == 3


def test_a_lost_companion_is_measured_anew(subject, counting):
    list(evaluate(subject))
    (subject.run_dir / "eval" / "depth_part.json").unlink()
    assert len(list(evaluate(subject))) == 2 and counting.measured == 2


def test_a_variant_has_files_of_its_own(subject, counting):
    list(evaluate(subject))
    list(evaluate(dataclasses.replace(guided(subject, 7.0), variant="guidance_scale=7")))
    assert (subject.run_dir / "eval" / "guidance_scale=7" / "depth.json").exists()
    list(evaluate(subject))
    assert counting.measured == 2


def test_unknown_and_unasked_metrics_are_refused(subject, counting):
    with pytest.raises(InvalidInput, match="known: depth"):
        chosen(subject, ["height"])
    evaluation = dataclasses.replace(subject.spec.evaluate, val_images=0)
    none = dataclasses.replace(subject, spec=dataclasses.replace(subject.spec, evaluate=evaluation))
    assert chosen(none, None) == []
    with pytest.raises(InvalidInput, match="image count is 0"):
        chosen(none, ["depth"])


def test_a_foreign_file_is_refused(subject, counting):
    path = subject.run_dir / "eval" / "depth.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(InvalidInput, match=r"depth\.json: not a score"):
        list(evaluate(subject))
