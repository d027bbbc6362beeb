"""Judging a trained model: losses, likelihood, GenEval-protocol score, Fréchet distance, all with standard errors."""

from fluidscale.evaluate.protocol import Detection, Detector, Evaluator, Metric, Progress, Score, Subject, protocol_id
from fluidscale.evaluate.suite import EVALUATORS, evaluate, rehearse

__all__ = [
    "EVALUATORS",
    "Detection",
    "Detector",
    "Evaluator",
    "Metric",
    "Progress",
    "Score",
    "Subject",
    "evaluate",
    "protocol_id",
    "rehearse",
]
