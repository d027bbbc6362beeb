"""The fitter: what must not move an optimum, what must agree, what must be refused."""

import time
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize

import analysis.fit as fitting
from analysis import solver
from analysis.bootstrap import refit
from analysis.fit import fit, huber_inflation, weights_of
from analysis.laws import law
from analysis.points import Points
from analysis.simulate import chinchilla_points, grid
from analysis.solver import Objective, minimise
from analysis.study import Choice, fit_one
from analysis.table import InvalidTable


def noisy(sizes: int = 6, ratios: int = 4, noise: float = 0.01, seed: int = 3) -> Points:
    return chinchilla_points(*grid(sizes, ratios), noise, np.random.default_rng(seed))


def exponents(points: Points, objective: str = "huber-log") -> np.ndarray:
    fitted = fit(law("chinchilla"), points, Objective(objective), thorough=False)
    return np.array([fitted.parameter(k).value for k in ("alpha", "beta")])


@pytest.mark.parametrize("objective", ["huber-log", "lse-log"])
@pytest.mark.parametrize("change", ["N in millions", "D in billions", "loss x 1e-4", "loss x 1e6"])
def test_units_do_not_move_exponents(change: str, objective: str) -> None:
    p = noisy()
    other = {
        "N in millions": replace(p, n=p.n / 1e6), "D in billions": replace(p, d=p.d / 1e9),
        "loss x 1e-4": replace(p, y=p.y * 1e-4), "loss x 1e6": replace(p, y=p.y * 1e6),
    }[change]  # fmt: skip
    np.testing.assert_allclose(exponents(other, objective), exponents(p, objective), atol=1e-7)


def test_a_scaled_objective_has_the_same_optimum() -> None:
    p = noisy()
    one, u = law("chinchilla"), np.log(np.stack([p.n, p.d]))
    u -= u.mean(1, keepdims=True)
    y = p.y / p.y.mean()
    starts = one.starts(u, y)
    found = []
    for scale in (1e-4, 1.0, 1e6):
        solved = minimise(one, u, y, starts, Objective(), np.full(len(p), scale))
        found.append(solved.theta[np.argmin(solved.value)])
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    np.testing.assert_allclose(found[2], found[1], atol=1e-6)


@pytest.mark.parametrize("objective", ["huber-log", "lse-log", "lse"])
def test_starts_and_variable_projection_agree(objective: str) -> None:
    fitted = fit(law("chinchilla"), noisy(20, 12), Objective(objective))
    assert fitted.share_at_best > 0.5
    assert fitted.projection_gap is not None and abs(fitted.projection_gap) < 1e-8
    assert fitted.headline


def test_no_general_optimiser_finds_a_better_point() -> None:
    p = noisy(8, 4)
    fitted = fit(law("chinchilla"), p)
    logs = np.log(np.stack([p.n, p.d]))
    u = logs - logs.mean(1, keepdims=True)

    def objective(theta: np.ndarray) -> float:
        value, _ = fitted.law.evaluate(theta[None], u)
        if (value <= 0).any():
            return 1e9
        residual = np.log(value) - np.log(p.y / fitted.scale)
        return float(fitted.objective.total(value, residual, p.y, np.ones(len(p)))[0])

    rng = np.random.default_rng(0)
    for _ in range(5):
        start = fitted.theta + 0.02 * rng.normal(size=5)
        best = minimize(
            objective, start, method="Nelder-Mead", options={"maxiter": 4000, "xatol": 1e-10, "fatol": 1e-16}
        )
        assert best.fun >= fitted.value * (1 - 1e-9)


def test_huber_resists_an_outlier_and_least_squares_does_not() -> None:
    p = noisy(8, 4, 0.002)
    y = p.y.copy()
    y[0] *= 1.3
    spoilt = replace(p, y=y)
    moved = [np.abs(exponents(spoilt, o) - exponents(p, o)).max() for o in ("huber-log", "lse-log")]
    assert moved[0] < 0.02 < moved[1]


def test_huber_inflation_limits() -> None:
    assert huber_inflation(1e-9, 1.0) == pytest.approx(np.pi / 2)
    assert huber_inflation(10.0, 1.0) == pytest.approx(1.0, abs=1e-6)
    assert huber_inflation(1.345, 1.0) == pytest.approx(1 / 0.95, abs=2e-3)  # Huber's own constant: 95 % efficient


def test_weights_follow_standard_errors_with_a_floor() -> None:
    p = noisy()
    se = 0.01 * p.y
    se[0], se[1] = 0.1 * se[0], 10 * se[1]
    w = weights_of(replace(p, se=se), Objective("lse-log"))
    assert w[0] == pytest.approx(w[2]) and w[1] == pytest.approx(w[2] / 100) and w.mean() == pytest.approx(1)


def code(points: Points, name: str = "chinchilla") -> str:
    with pytest.raises(InvalidTable) as error:
        fit(law(name), points)
    return error.value.code


def test_what_the_data_cannot_carry_is_refused() -> None:
    p = noisy()
    assert code(p.take(p.n <= np.unique(p.n)[1])) == "TOO_FEW_SIZES"
    assert code(replace(p, d=p.n * 20)) == "COLLINEAR_LADDER"
    assert code(p.take(np.arange(0, 24, 5)), "chinchilla") == "TOO_FEW_RUNS"
    assert code(replace(p, d=np.full(24, np.nan))) == "MISSING_AXIS"
    assert code(replace(p, d=np.where(np.arange(24) % 2, 1e9, 2e9))) == "TOO_FEW_LEVELS"
    assert code(replace(p, y=p.y - 3.0)) == "NON_POSITIVE"


def test_remarks_keep_exponents_out_of_the_headline() -> None:
    n, d = grid(6, 2)
    flat = chinchilla_points(n, d, 0.0, np.random.default_rng(0))
    rising = replace(flat, y=2.0 + 1e-12 * flat.n)
    fitted = fit(law("power-floor"), rising)
    assert not fitted.headline
    assert {"AT_BOUND"} <= {w.code for w in fitted.warnings}


def test_a_floor_at_its_bound_is_no_headline() -> None:
    """There alpha takes up what the floor was kept from: its interval is that of a law with E = 0."""
    p = chinchilla_points(np.geomspace(1e6, 1e9, 8), np.full(8, 1e10), 0.0, np.random.default_rng(0))
    bent_down = replace(p, y=20 * p.n**-0.12 - 0.5)
    fitted = fit(law("power-floor"), bent_down)
    assert fitted.parameter("E").value == 0.0 and not fitted.headline


def test_rows_of_one_trunk_widen_the_interval() -> None:
    p = noisy(8, 4, 0.003)
    cluster = np.repeat(np.arange(8), 4)
    shared = 0.01 * np.random.default_rng(5).normal(size=8)[cluster]
    p = replace(p, y=p.y * np.exp(shared))
    apart, together = (fit(law("chinchilla"), q) for q in (p, replace(p, cluster=cluster)))
    k = together.law.parameters.index("alpha")
    assert together.between[0] > 0 == apart.between[0]
    assert together.covariance[k, k] > 1.5 * apart.covariance[k, k]


def test_many_points_and_many_refits_are_fast() -> None:
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(1e8, 1e10, 20), np.geomspace(2e9, 2e11, 12)))
    p = chinchilla_points(n, d, 0.01, np.random.default_rng(0))
    start = time.process_time()
    fitted = fit(law("chinchilla"), p)
    assert time.process_time() - start < 1.0
    counts = np.random.default_rng(1).multinomial(240, np.full(240, 1 / 240), size=1000).astype(float)
    start = time.process_time()
    solved = refit(fitted, p.y / fitted.scale, counts)
    assert time.process_time() - start < 1.25
    assert solved.converged.mean() > 0.99
    assert np.std(solved.theta[:, 3]) == pytest.approx(np.sqrt(fitted.covariance[3, 3]), rel=0.3)


def test_a_large_table_reaches_the_same_optimum_as_its_polish() -> None:
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(1e8, 1e10, 60), np.geomspace(2e9, 2e11, 60)))
    p = chinchilla_points(n, d, 0.01, np.random.default_rng(0))
    fitted = fit(law("chinchilla"), p, Objective("lse-log"))
    again = refit(fitted, p.y / fitted.scale, np.ones((1, len(p))), tolerance=1e-11)
    assert again.value[0] == pytest.approx(fitted.value, rel=1e-12)
    assert fitted.parameter("alpha").value == pytest.approx(0.34, abs=0.03)


def test_a_search_cut_short_says_so_and_is_no_headline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real solver, stopped after two steps."""
    solve = solver.minimise
    monkeypatch.setattr(fitting, "minimise", lambda *a, **k: solve(*a[:7], **(k | {"iterations": 2, "tolerance": 0.0})))
    points = chinchilla_points(*grid(6, 4), 0.003, np.random.default_rng(0))
    found = fit(law("chinchilla"), points, thorough=False)
    assert "NOT_CONVERGED" in {w.code for w in found.warnings} and not found.headline
    monkeypatch.undo()
    assert "NOT_CONVERGED" not in {w.code for w in fit(law("chinchilla"), points, thorough=False).warnings}


def test_a_ladder_whose_data_grow_with_its_models_has_a_headline_in_compute_alone() -> None:
    n = np.geomspace(1e8, 1e10, 9)
    grown = chinchilla_points(n, 20 * n, 5e-4, np.random.default_rng(0))
    along_n, along_c = (fit_one(chosen, grown, Choice()) for chosen in (law("power-floor"), law("compute")))
    assert "CONFOUNDED_LADDER" in [w.code for w in along_n.warnings] and not along_n.headline
    assert along_c.warnings == () and along_c.headline
    for d in (np.full(9, 1e11), 1e11 * (1 + 1e-4 * np.arange(9)), np.full(9, np.nan)):
        assert fit_one(law("power-floor"), replace(grown, d=d), Choice()).headline


def test_compute_at_one_data_size_is_the_law_in_n_by_another_name() -> None:
    n = np.geomspace(1e8, 1e10, 9)
    fixed = chinchilla_points(n, np.full(9, 1e11), 5e-4, np.random.default_rng(0))
    assert "FIXED_DATA" in [w.code for w in fit_one(law("compute"), fixed, Choice()).warnings]
    for other in (replace(fixed, n=np.full(9, np.nan)), replace(fixed, d=np.full(9, np.nan))):
        assert "FIXED_DATA" not in [w.code for w in fit_one(law("compute"), other, Choice()).warnings]


def test_a_refusal_for_want_of_levels_says_which_rows_a_law_takes() -> None:
    n, c = (v.ravel() for v in np.meshgrid(np.geomspace(1e8, 1e9, 5), [1e19, 1e20, 1e21]))
    points = chinchilla_points(n, c / 6 / n, 1e-3, np.random.default_rng(0))
    with pytest.raises(InvalidTable, match=r"TOO_FEW_LEVELS.* 1 distinct C, .* at each size's largest data size"):
        fit_one(law("compute"), points, Choice())
