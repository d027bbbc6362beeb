"""Every law: gradients, units, and a known truth recovered exactly."""

import numpy as np
import pytest

from analysis.fit import default_objective, fit
from analysis.laws import LAW_NAMES, Law, LogitLaw, law
from analysis.points import Points
from analysis.simulate import CHINCHILLA, chinchilla_points, grid
from analysis.solver import Objective

RNG = np.random.default_rng(0)
THETAS = {
    "power": [0.1, 0.3], "power-floor": [0.4, -0.5, 0.3], "compute": [0.4, -0.5, 0.1],
    "chinchilla": [0.5, -1.0, -1.2, 0.34, 0.28], "kaplan": [0.2, -0.1, 0.08, 0.11],
    "kaplan-floor": [0.3, 0.2, -0.1, 0.08, 0.11],
    "broken": [0.3, -0.4, 0.3, 0.15, 0.2], "logit": [0.3, 0.6],
    "logit-joint": [-0.5, -0.4, -0.9, 0.34, 0.28],
}  # fmt: skip


def points(y: np.ndarray, n: np.ndarray, d: np.ndarray, kind: str = "loss") -> Points:
    blank, rows, label = np.full(len(n), np.nan), np.arange(len(n)), np.full(len(n), "")
    return Points({}, "loss", kind, label, label, rows, n, d, 6 * n * d, y, blank, blank, rows, np.zeros(len(n), int))


@pytest.mark.parametrize("name", LAW_NAMES)
def test_gradient_is_the_derivative(name: str) -> None:
    one = law(name)
    theta = np.array([THETAS[name]])
    u = RNG.normal(size=(len(one.axes), 9))
    _, gradient = one.evaluate(theta, u)
    for k in range(theta.shape[1]):
        step = np.zeros_like(theta)
        step[0, k] = 1e-6
        numeric = (one.evaluate(theta + step, u)[0] - one.evaluate(theta - step, u)[0]) / 2e-6
        np.testing.assert_allclose(gradient[:, k], numeric, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("name", LAW_NAMES)
def test_public_gradient_is_the_derivative(name: str) -> None:
    one = law(name)
    theta, center = np.array(THETAS[name]), np.array([20.0, 25.0])[: len(one.axes)]
    for k in range(len(theta)):
        step = np.zeros_like(theta)
        step[k] = 1e-6
        here, up, down = (one.public(t, center, 2.5) for t in (theta, theta + step, theta - step))
        for p, a, b in zip(here, up, down, strict=True):
            change = np.log(a.value / b.value) if p.logarithmic else a.value - b.value
            assert p.gradient[k] == pytest.approx(change / 2e-6, rel=1e-4, abs=1e-6)


def formula(name: str, q: dict[str, float], n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """The laws as users read them, in the table's units."""
    if name.startswith("kaplan"):
        coupled = (q["N_c"] / n) ** (q["alpha_N"] / q["alpha_D"]) + q["D_c"] / d
        return q.get("E", 0.0) + coupled ** q["alpha_D"]
    if name == "logit":
        return 1 / (1 + np.exp(-(q["intercept"] + q["slope"] * np.log(6 * n * d))))
    if name == "logit-joint":
        return 1 / (1 + np.exp(q["E"] + q["A"] * n ** -q["alpha"] + q["B"] * d ** -q["beta"]))
    x = 6 * n * d if name == "compute" else n
    out = q.get("E", 0.0) + q["A"] * x ** -q["alpha"] * (1 + (x / q.get("x_break", 1)) ** 2) ** (-q.get("delta", 0) / 2)
    return out + (q["B"] * d ** -q["beta"] if "B" in q else 0)


@pytest.mark.parametrize("name", LAW_NAMES)
def test_public_parameters_mean_the_formula(name: str) -> None:
    one, (n, d) = law(name), grid(5, 4)
    columns = {"n": n, "d": d, "c": 6 * n * d}
    logs = np.log(np.stack([columns[a] for a in one.axes]))
    center, theta = logs.mean(1), np.array(THETAS[name])
    scale = 1.0 if name.startswith("logit") else 2.5
    public = {p.name: p.value for p in one.public(theta, center, scale)}
    value = one.evaluate(theta[None], logs - center[:, None])[0][0] * scale
    np.testing.assert_allclose(formula(name, public, n, d), value, rtol=1e-9)


TRUTHS: dict[str, dict[str, float]] = {
    "power": {"A": 80.0, "alpha": 0.21},
    "power-floor": {"E": 1.7, "A": 400.0, "alpha": 0.34},
    "compute": {"E": 1.9, "A": 900.0, "alpha": 0.16},
    "chinchilla": CHINCHILLA,
    "kaplan": {"N_c": 8.8e13, "D_c": 5.4e13, "alpha_N": 0.076, "alpha_D": 0.095},
    "kaplan-floor": {"E": 1.4, "N_c": 3.0e7, "D_c": 2.0e9, "alpha_N": 0.31, "alpha_D": 0.36},
    "broken": {"E": 1.1, "A": 300.0, "alpha": 0.3, "delta": 0.25, "x_break": 1.5e9},
    "logit": {"intercept": -12.0, "slope": 0.28},
    "logit-joint": {"E": -2.0, "A": 900.0, "B": 1200.0, "alpha": 0.34, "beta": 0.28},
}


@pytest.mark.parametrize("objective", ["huber-log", "lse-log", "lse"])
@pytest.mark.parametrize("name", [n for n in LAW_NAMES if not n.startswith("logit")])
def test_noiseless_truth_is_recovered(name: str, objective: str) -> None:
    n, d = grid(12 if name == "broken" else 6, 4)
    fitted = fit(law(name), points(formula(name, TRUTHS[name], n, d), n, d), Objective(objective))
    for p in fitted.public():
        # a break's place and depth trade off: their valley is flat to the square root of rounding
        assert p.value == pytest.approx(TRUTHS[name][p.name], rel=1e-5 if name == "broken" else 1e-8)


@pytest.mark.parametrize("name, precision", [("logit", 1e-8), ("logit-joint", 1e-5)])
def test_noiseless_logit_is_recovered(name: str, precision: float) -> None:
    n, d = grid(6, 4)
    p = points(formula(name, TRUTHS[name], n, d), n, d, "score")
    fitted = fit(law(name), p, default_objective(p))
    assert {q.name: q.value for q in fitted.public()} == pytest.approx(TRUTHS[name], rel=precision)


def test_a_signed_metric_keeps_a_free_floor() -> None:
    n, d = grid(7, 2)
    y = -3.0 + 400.0 * n**-0.34
    fitted = fit(law("power-floor", signed_floor=True), points(y, n, d, "signed"))
    assert {q.name: q.value for q in fitted.public()} == pytest.approx({"E": -3.0, "A": 400.0, "alpha": 0.34}, rel=1e-6)


def test_a_fixed_floor_stays() -> None:
    n, d = grid(6, 2)
    fitted = fit(law("power-floor"), points(2.0 + 50 * n**-0.3, n, d), floor=2.0)
    assert fitted.parameter("E").value == pytest.approx(2.0, abs=1e-12)
    assert fitted.parameter("alpha").value == pytest.approx(0.3, rel=1e-8)
    assert fitted.free == 2


def test_forcing_the_floor_to_zero_distorts_the_exponent() -> None:
    """Why E = 0 is never forced: a true .34 comes out near .1."""
    n, d = grid(6, 2)
    p = chinchilla_points(n, d * 1e6, 0.0, RNG)
    assert fit(law("power-floor"), p).parameter("alpha").value == pytest.approx(0.34, rel=0.02)
    assert fit(law("power"), p).parameter("alpha").value < 0.15


def test_ceiling_is_respected() -> None:
    one: Law = LogitLaw(ceiling=0.8)
    value, _ = one.evaluate(np.array([[0.0, 1.0]]), np.array([[50.0]]))
    assert value[0, 0] == pytest.approx(0.8)
