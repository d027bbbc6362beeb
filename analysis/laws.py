"""The laws, each a small frozen dataclass with an analytic gradient, evaluated for many parameter vectors at once.

Laws see dimensionless coordinates only: `u = log x - mean(log x)` per axis and `y / scale`. Units therefore cannot
move an optimum (raw logs can, through the solver's tolerances); `public` turns the result back into the table's units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# exponents outside this range are not met in any published ladder (Hoffmann et al. 2022: .34 / .28; Kaplan et al.
# 2020: .05 to .1; steep toy tasks reach 2): a fit that ends here is at a bound and says so
EXPONENT_BOUNDS = (1e-4, 5.0)
# log amplitudes are relative to the geometric mean of the metric: e^+-60 is out of reach of any table
AMPLITUDE_BOUNDS = (-60.0, 60.0)
# width of the break in log x; Caballero et al. 2022 (Broken Neural Scaling Laws) leave it free, which a ladder of
# fewer than a dozen rungs cannot carry
BREAK_WIDTH = 0.5


@dataclass(frozen=True)
class Public:
    """One parameter in the table's units. `gradient` is that of `value`, or of log(value) where `logarithmic`."""

    name: str
    value: float
    gradient: Array
    logarithmic: bool


class Law(Protocol):
    """A parametric law. `parameters` names the internal vector; `axes` the columns ("n", "d", "c") it reads."""

    @property
    def name(self) -> str:
        """As users write it."""
        ...

    @property
    def axes(self) -> tuple[str, ...]:
        """The columns it reads."""
        ...

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the internal vector."""
        ...

    def evaluate(self, theta: Array, u: Array) -> tuple[Array, Array]:
        """theta (B, p), u (axes, n) -> values (B, n) and their gradient (B, p, n), both over the metric's scale."""
        ...

    def bounds(self) -> tuple[Array, Array]: ...

    def starts(self, u: Array, y: Array) -> Array:
        """A grid of starting vectors (S, p) for metric values y (n,) over their scale."""
        ...

    def public(self, theta: Array, center: Array, scale: float) -> list[Public]:
        """theta (p,), the axes' mean logs (axes,), the metric's scale -> parameters in the table's units."""
        ...


def _unit(size: int, **entries: float) -> Array:
    vector = np.zeros(size)
    for key, value in entries.items():
        vector[int(key[1:])] = value
    return vector


def _linear_starts(powers: Array, u: Array, y: Array) -> Array:
    """Non-negative floor and amplitudes (S, 1 + axes) that suit each row of exponents (S, axes) best in relative terms.

    Clipping instead of an active-set solve: these are only starting points.
    """
    terms = np.exp(-powers[:, :, None] * u[None])
    design = np.concatenate([np.ones((len(powers), 1, u.shape[1])), terms], axis=1) / np.abs(y)
    gram = design @ design.transpose(0, 2, 1)
    ridge = 1e-9 * np.trace(gram, axis1=1, axis2=2)[:, None, None] * np.eye(gram.shape[1])
    solved = np.linalg.solve(gram + ridge, (design @ np.sign(y))[:, :, None])[:, :, 0]
    return np.maximum(solved, 1e-3 * np.abs(y).min())


@dataclass(frozen=True)
class SumLaw:
    """L = [E +] sum over axes of A x^-alpha: the pure power law, the floored one, L(C) and Chinchilla's (N, D) law.

    Source of the two-axis form: Hoffmann et al. 2022 (arXiv 2203.15556), approach 3.
    """

    name: str
    axes: tuple[str, ...]
    floored: bool = True
    signed_floor: bool = False

    @property
    def parameters(self) -> tuple[str, ...]:
        amplitudes, exponents = ("a", "b")[: len(self.axes)], ("alpha", "beta")[: len(self.axes)]
        return (("E",) if self.floored else ()) + amplitudes + exponents

    def evaluate(self, theta: Array, u: Array) -> tuple[Array, Array]:
        k, f = len(self.axes), int(self.floored)
        gradient = np.empty((len(theta), len(self.parameters), u.shape[1]))
        value = np.zeros((len(theta), u.shape[1]))
        for i in range(k):
            term = gradient[:, f + i]
            np.exp(theta[:, f + i, None] - theta[:, f + k + i, None] * u[i], out=term)
            np.multiply(term, -u[i], out=gradient[:, f + k + i])
            value += term
        if self.floored:
            gradient[:, 0] = 1.0
            value += theta[:, :1]
        return value, gradient

    def bounds(self) -> tuple[Array, Array]:
        k = len(self.axes)
        floor = [(-np.inf if self.signed_floor else 0.0, np.inf)] * int(self.floored)
        low, high = zip(*(floor + [AMPLITUDE_BOUNDS] * k + [EXPONENT_BOUNDS] * k), strict=True)
        return np.array(low), np.array(high)

    def starts(self, u: Array, y: Array) -> Array:
        grid = np.geomspace(0.06, 1.8, 7 if len(self.axes) == 2 else 10)
        powers = np.stack(np.meshgrid(*[grid] * len(self.axes), indexing="ij"), axis=-1).reshape(-1, len(self.axes))
        return self._signed_starts(powers, u, y) if self.signed_floor else self.at(powers, u, y)

    def at(self, powers: Array, u: Array, y: Array) -> Array:
        """Vectors (S, p) with the exponents (S, axes) and the floor and amplitudes near their best for each."""
        linear = _linear_starts(powers, u, y)
        logs = np.log(linear[:, 1:])
        if not self.floored:
            logs = logs + np.log1p(linear[:, :1] / linear[:, 1:].sum(1, keepdims=True))
        return np.concatenate(([linear[:, :1]] if self.floored else []) + [logs, powers], axis=1)

    def _signed_starts(self, powers: Array, u: Array, y: Array) -> Array:
        spread = max(float(np.ptp(y)), 1e-9)
        floors = np.repeat(y.min() - spread * np.array([0.05, 0.3, 1.0, 3.0]), len(powers))
        powers = np.tile(powers, (4, 1))
        amplitude = np.log(np.maximum(y.mean() - floors, 1e-9) / len(self.axes))
        return np.concatenate([floors[:, None], np.tile(amplitude[:, None], (1, len(self.axes))), powers], axis=1)

    def public(self, theta: Array, center: Array, scale: float) -> list[Public]:
        k, f, p = len(self.axes), int(self.floored), len(self.parameters)
        out = [Public("E", float(theta[0]) * scale, _unit(p, _0=scale), False)] if self.floored else []
        for i in range(k):
            log_a = np.log(scale) + theta[f + i] + theta[f + k + i] * center[i]
            gradient = _unit(p, **{f"_{f + i}": 1.0, f"_{f + k + i}": float(center[i])})
            out.append(Public("AB"[i], float(np.exp(log_a)), gradient, True))
        for i in range(k):
            gradient = _unit(p, **{f"_{f + k + i}": 1.0})
            out.append(Public(("alpha", "beta")[i], float(theta[f + k + i]), gradient, False))
        return out


@dataclass(frozen=True)
class KaplanLaw:
    """L = [(N_c / N)^(alpha_N / alpha_D) + D_c / D]^alpha_D. Source: Kaplan et al. 2020 (arXiv 2001.08361), eq. 1.5."""

    name: str = "kaplan"
    axes: tuple[str, ...] = ("n", "d")
    parameters: tuple[str, ...] = ("r", "q", "alpha_N", "alpha_D")

    def evaluate(self, theta: Array, u: Array) -> tuple[Array, Array]:
        r, q, a_n, a_d = (theta[:, i, None] for i in range(4))
        ratio = a_n / a_d
        size, data = np.exp(r - ratio * u[0]), np.exp(q - u[1])
        total = size + data
        value = total**a_d
        slope = a_d * value / total
        gradient = np.empty((len(theta), 4, u.shape[1]))
        gradient[:, 0] = slope * size
        gradient[:, 1] = slope * data
        gradient[:, 2] = slope * size * -u[0] / a_d
        gradient[:, 3] = value * np.log(total) + slope * size * u[0] * ratio / a_d
        return value, gradient

    def bounds(self) -> tuple[Array, Array]:
        low, high = zip(AMPLITUDE_BOUNDS, AMPLITUDE_BOUNDS, EXPONENT_BOUNDS, EXPONENT_BOUNDS, strict=True)
        return np.array(low), np.array(high)

    def starts(self, u: Array, y: Array) -> Array:
        grid = np.array([0.02, 0.05, 0.1, 0.2, 0.4, 0.8])
        a_n, a_d, share = (v.ravel() for v in np.meshgrid(grid, grid, [0.2, 0.5, 0.8], indexing="ij"))
        total = np.exp(np.log(y).mean() / a_d)
        return np.stack([np.log(total * share), np.log(total * (1 - share)), a_n, a_d], axis=1)

    def public(self, theta: Array, center: Array, scale: float) -> list[Public]:
        r, q, a_n, a_d = theta
        lift = np.log(scale) / a_d
        log_nc = center[0] + (r + lift) * a_d / a_n
        log_dc = center[1] + q + lift
        g_nc = np.array([a_d / a_n, 0.0, -(log_nc - center[0]) / a_n, r / a_n])
        return [
            Public("N_c", float(np.exp(log_nc)), g_nc, True),
            Public("D_c", float(np.exp(log_dc)), np.array([0.0, 1.0, 0.0, -lift / a_d]), True),
            Public("alpha_N", float(a_n), _unit(4, _2=1.0), False),
            Public("alpha_D", float(a_d), _unit(4, _3=1.0), False),
        ]


@dataclass(frozen=True)
class KaplanFloorLaw:
    """L = E + Kaplan's joint law: his coupling of N and D, and the loss that no size and no data remove.

    Kaplan et al. leave the latter out; Hoffmann et al. 2022 have it without the coupling.
    """

    name: str = "kaplan-floor"
    axes: tuple[str, ...] = ("n", "d")
    parameters: tuple[str, ...] = ("E", *KaplanLaw.parameters)

    def evaluate(self, theta: Array, u: Array) -> tuple[Array, Array]:
        value, gradient = KaplanLaw().evaluate(theta[:, 1:], u)
        return theta[:, :1] + value, np.concatenate([np.ones_like(gradient[:, :1]), gradient], axis=1)

    def bounds(self) -> tuple[Array, Array]:
        low, high = KaplanLaw().bounds()
        return np.append(0.0, low), np.append(np.inf, high)

    def starts(self, u: Array, y: Array) -> Array:
        floors = y.min() * np.array([0.1, 0.7])
        return np.concatenate([np.insert(KaplanLaw().starts(u, y - floor), 0, floor, axis=1) for floor in floors])

    def public(self, theta: Array, center: Array, scale: float) -> list[Public]:
        inner = KaplanLaw().public(theta[1:], center, scale)
        wide = [Public(q.name, q.value, np.append(0.0, q.gradient), q.logarithmic) for q in inner]
        return [Public("E", float(theta[0]) * scale, _unit(5, _0=scale), False), *wide]


@dataclass(frozen=True)
class BrokenLaw:
    """L = E + A x^-alpha (1 + (x / x_break)^(1/w))^(-delta w): one smooth break, after Caballero et al. 2022."""

    name: str = "broken"
    axes: tuple[str, ...] = ("n",)
    parameters: tuple[str, ...] = ("E", "a", "alpha", "delta", "break")

    def evaluate(self, theta: Array, u: Array) -> tuple[Array, Array]:
        floor, a, alpha, delta, where = (theta[:, i, None] for i in range(5))
        z = (u[0] - where) / BREAK_WIDTH
        soft = np.logaddexp(0.0, z)
        term = np.exp(a - alpha * u[0] - delta * BREAK_WIDTH * soft)
        gradient = np.empty((len(theta), 5, u.shape[1]))
        gradient[:, 0] = 1.0
        gradient[:, 1] = term
        gradient[:, 2] = -u[0] * term
        gradient[:, 3] = -BREAK_WIDTH * soft * term
        gradient[:, 4] = delta * term / (1.0 + np.exp(-z))
        return floor + term, gradient

    def bounds(self) -> tuple[Array, Array]:
        low, high = zip((0.0, np.inf), AMPLITUDE_BOUNDS, EXPONENT_BOUNDS, (-5.0, 5.0), (-20.0, 20.0), strict=True)
        return np.array(low), np.array(high)

    def starts(self, u: Array, y: Array) -> Array:
        plain = SumLaw("power-floor", self.axes).starts(u, y)
        breaks = np.quantile(u[0], [0.3, 0.5, 0.7])
        rows = [np.concatenate([row, [d, w]]) for row in plain for d in (-0.2, 0.2) for w in breaks]
        return np.array(rows)

    def public(self, theta: Array, center: Array, scale: float) -> list[Public]:
        head = SumLaw("power-floor", self.axes).public(theta[:3], center, scale)
        wide = [Public(q.name, q.value, np.concatenate([q.gradient, [0.0, 0.0]]), q.logarithmic) for q in head]
        where = Public("x_break", float(np.exp(theta[4] + center[0])), _unit(5, _4=1.0), True)
        return [*wide, Public("delta", float(theta[3]), _unit(5, _3=1.0), False), where]


@dataclass(frozen=True)
class LogitLaw:
    """score = ceiling / (1 + exp(-(intercept + slope log x))): the bounded score's law, fitted as a quasi-binomial."""

    name: str = "logit"
    axes: tuple[str, ...] = ("c",)
    ceiling: float = 1.0
    parameters: tuple[str, ...] = ("i", "slope")

    def evaluate(self, theta: Array, u: Array) -> tuple[Array, Array]:
        share = 1.0 / (1.0 + np.exp(-(theta[:, :1] + theta[:, 1:] * u[0])))
        slope = self.ceiling * share * (1.0 - share)
        return self.ceiling * share, np.stack([slope, slope * u[0]], axis=1)

    def bounds(self) -> tuple[Array, Array]:
        return np.array([-40.0, -20.0]), np.array([40.0, 20.0])

    def starts(self, u: Array, y: Array) -> Array:
        middle = np.clip(y.mean() / self.ceiling, 0.02, 0.98)
        return np.array([[np.log(middle / (1 - middle)), slope] for slope in (0.0, 0.2, 0.5, 1.0, -0.2)])

    def public(self, theta: Array, center: Array, scale: float) -> list[Public]:
        intercept = float(theta[0] - theta[1] * center[0])
        return [
            Public("intercept", intercept, np.array([1.0, -float(center[0])]), False),
            Public("slope", float(theta[1]), _unit(2, _1=1.0), False),
        ]


@dataclass(frozen=True)
class LogitJointLaw:
    """score = ceiling / (1 + exp(E + A N^-alpha + B D^-beta)): Chinchilla's form on the scale of log odds.

    Log odds that were linear in log N and in log D would have no best split of a budget; terms that level off do.
    """

    name: str = "logit-joint"
    ceiling: float = 1.0
    axes: tuple[str, ...] = ("n", "d")

    @property
    def inner(self) -> SumLaw:
        """The law of minus the log odds."""
        return SumLaw("chinchilla", self.axes, signed_floor=True)

    @property
    def parameters(self) -> tuple[str, ...]:
        return self.inner.parameters

    def evaluate(self, theta: Array, u: Array) -> tuple[Array, Array]:
        odds, gradient = self.inner.evaluate(theta, u)
        share = 1.0 / (1.0 + np.exp(np.clip(odds, -700.0, 700.0)))
        slope = self.ceiling * share * (1.0 - share)
        return self.ceiling * share, -slope[:, None] * gradient

    def bounds(self) -> tuple[Array, Array]:
        return self.inner.bounds()

    def starts(self, u: Array, y: Array) -> Array:
        share = np.clip(y / self.ceiling, 0.01, 0.99)
        return self.inner.starts(u, np.log((1 - share) / share))

    def public(self, theta: Array, center: Array, scale: float) -> list[Public]:
        return self.inner.public(theta, center, scale)


def law(name: str, axis: str | None = None, *, signed_floor: bool = False, ceiling: float = 1.0) -> Law:
    """The law of that name; `axis` moves a one-axis law to another column ("n", "d" or "c").

    Raises KeyError for a name that is not in LAW_NAMES.
    """
    if name == "power":
        return SumLaw("power", (axis or "n",), floored=False)
    if name == "power-floor":
        return SumLaw("power-floor", (axis or "n",), signed_floor=signed_floor)
    if name == "compute":
        return SumLaw("compute", ("c",), signed_floor=signed_floor)
    if name == "chinchilla":
        return SumLaw("chinchilla", ("n", "d"), signed_floor=signed_floor)
    if name == "kaplan":
        return KaplanLaw()
    if name == "kaplan-floor":
        return KaplanFloorLaw()
    if name == "broken":
        return BrokenLaw(axes=(axis or "n",))
    if name == "logit":
        return LogitLaw(axes=(axis or "c",), ceiling=ceiling)
    if name == "logit-joint":
        return LogitJointLaw(ceiling=ceiling)
    raise KeyError(name)


LAW_NAMES = (
    "power", "power-floor", "compute", "chinchilla", "kaplan", "kaplan-floor", "broken", "logit", "logit-joint",
)  # fmt: skip
# laws of a sum over N and D, whose best split of a budget has a closed form
SPLIT_LAWS = ("chinchilla", "logit-joint")
