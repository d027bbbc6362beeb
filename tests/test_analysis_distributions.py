"""The quantiles and the slope against scipy.stats, which takes too long to import for the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from analysis import distributions as d

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("dof", [1.0, 2.5, 9.0, 400.0, np.inf])
def test_students_t(dof: float) -> None:
    assert float(d.t_quantile(0.8, dof)) == pytest.approx(stats.t.ppf(0.8, dof), rel=1e-10)
    assert d.two_sided(0.95, dof) == pytest.approx(stats.t.ppf(0.975, dof), rel=1e-10)


def test_f_and_the_normal_distribution() -> None:
    assert d.f_quantile(0.95, 1, 7.5) == pytest.approx(stats.f.ppf(0.95, 1, 7.5), rel=1e-10)
    assert d.f_tail(3.2, 4, 11) == pytest.approx(stats.f.sf(3.2, 4, 11), rel=1e-10)
    assert d.normal_quantile(0.9) == pytest.approx(stats.norm.ppf(0.9), rel=1e-12)
    assert d.normal_cdf(-1.3) == pytest.approx(stats.norm.cdf(-1.3), rel=1e-12)
    assert d.normal_pdf(-1.3) == pytest.approx(stats.norm.pdf(-1.3), rel=1e-12)


def test_the_slope_of_a_line() -> None:
    rng = np.random.default_rng(0)
    x = np.linspace(1, 4, 6)
    y = 2 - 0.3 * x + 0.1 * rng.standard_normal(6)
    expected = stats.linregress(x, y)
    half = stats.t.ppf(0.95, 4) * expected.stderr  # type: ignore[attr-defined]
    slope = expected.slope  # type: ignore[attr-defined]
    assert d.slope(x, y, 0.9) == pytest.approx((slope, slope - half, slope + half), rel=1e-10)


def test_the_command_line_starts_without_scipys_statistics() -> None:
    code = "import sys, analysis.fit_laws; sys.exit(any(m in sys.modules for m in ('scipy.stats', 'matplotlib')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
