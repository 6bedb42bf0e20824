"""The compute-optimal size N: at each budget the end of a parabola over log parameters.

Over budgets, N = N0 (C / C0)^a (Hoffmann et al. 2022, approach 2); N0 is the best size at C0, the
least budget that counts.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64

from cola_train.bootstrap import Interval
from cola_train.config.amounts import FLOPS_PER_EFLOP
from cola_train.config.loop import Convention
from cola_train.scaling.points import Point, by_budget
from cola_train.scaling.power_law import Direction, NotFitted, interval, resample

_PARABOLA, _LINE = 3, 2  # parameters
# Relative to the largest value; smaller coefficients are rounding errors.
_ROUNDING = 1e-12
Problem = Literal["", "outside the measured sizes", "no best size"]


@dataclasses.dataclass(frozen=True)
class Parabola:
    """One budget of one family."""

    flops: float  # mean of the points'
    parameters: Float64[np.ndarray, " points"]  # measured sizes, rising
    values: Float64[np.ndarray, " points"]  # of the metric
    # Of u^2, u and 1, where u = log(parameters / the geometric mean of the sizes).
    coefficients: Float64[np.ndarray, "3"]
    # Parameters at the parabola's end; infinite or 0, as it slopes, if it opens the wrong way and
    # has none. So may the interval's ends be; it is None with three sizes: they are fitted exactly.
    best: float
    best_interval: Interval | None
    problem: Problem  # why `best` is not to be used; empty if it may be

    def at(self, parameters: Float64[np.ndarray, " sizes"]) -> Float64[np.ndarray, " sizes"]:
        """The metric at any size."""
        return np.polyval(self.coefficients, np.log(parameters) - np.log(self.parameters).mean())

    def to_json(self) -> dict[str, Any]:
        """All but the coefficients."""
        return {
            "eflops": self.flops / FLOPS_PER_EFLOP,
            "parameters": self.parameters.tolist(),
            "values": self.values.tolist(),
            "best_parameters": None if self.problem == "no best size" else self.best,
            "best_parameters_interval": self.best_interval and self.best_interval.to_json(),
            "problem": self.problem,
        }


@dataclasses.dataclass(frozen=True)
class Growth:
    """The best size over compute."""

    exponent: float
    exponent_interval: Interval | None  # None with two budgets, which a line fits exactly
    c0_flops: float
    parameters_at_c0: float

    def to_json(self) -> dict[str, Any]:
        """The law with its formula."""
        return {
            "formula": "parameters_at_c0 (C / C0)^exponent",
            "c0_eflops": self.c0_flops / FLOPS_PER_EFLOP,
            "parameters_at_c0": self.parameters_at_c0,
            "exponent": self.exponent,
            "exponent_interval": self.exponent_interval and self.exponent_interval.to_json(),
        }


@dataclasses.dataclass(frozen=True)
class IsoFLOP:
    """One family's parabolas, budgets rising, and the growth of their ends."""

    parabolas: dict[float, Parabola | NotFitted]

    @property
    def fitted(self) -> list[Parabola]:
        """The budgets that have a parabola."""
        return [parabola for parabola in self.parabolas.values() if isinstance(parabola, Parabola)]

    @functools.cached_property
    def growth(self) -> Growth | NotFitted:
        """The growth of the best size over those budgets whose parabola shows one."""
        parabolas = [parabola for parabola in self.fitted if not parabola.problem]
        if len(parabolas) < _LINE:
            return NotFitted(
                f"growth needs {_LINE} budgets whose best size lies inside the measured ones; "
                f"there are {len(parabolas)}"
            )
        flops = np.array([parabola.flops for parabola in parabolas])
        best = np.log([parabola.best for parabola in parabolas])
        design = np.vander(np.log(flops / flops[0]), _LINE)
        solve = np.linalg.pinv(design)
        line = solve @ best
        uncertainty = None
        if len(parabolas) > _LINE:
            uncertainty = interval(resample(best, design @ line, _LINE) @ solve[0])
        return Growth(float(line[0]), uncertainty, float(flops[0]), float(np.exp(line[1])))

    def to_json(self) -> dict[str, Any]:
        """Budgets as a list, in EFLOPs."""
        budgets = [{"budget_eflops": at, **of.to_json()} for at, of in self.parabolas.items()]
        return {"budgets": budgets, "growth": self.growth.to_json()}


def fit_isoflop(
    points: Sequence[Point], metric: str, direction: Direction, convention: Convention
) -> IsoFLOP:
    """Fit a parabola to one family's points at each budget.

    Raises:
        UserError: see `by_budget`.
    """
    budgets = by_budget(points, convention).items()
    return IsoFLOP(
        {budget: _fit(members, metric, direction, convention) for budget, members in budgets}
    )


def _fit(
    members: Sequence[Point], metric: str, direction: Direction, convention: Convention
) -> Parabola | NotFitted:
    sizes = np.array([member.parameters for member in members], dtype=np.float64)
    num_sizes = len(np.unique(sizes))
    if num_sizes < _PARABOLA:
        return NotFitted(f"a parabola needs {_PARABOLA} sizes, and there are {num_sizes}")
    values = np.array([member.metrics[metric] for member in members])
    middle = np.log(sizes).mean()
    design = np.vander(np.log(sizes) - middle, _PARABOLA)
    solve = np.linalg.pinv(design)
    coefficients = solve @ values
    sign = 1 if direction == "falls" else -1
    least = _ROUNDING * np.abs(values).max()

    def best(coefficients: Float64[np.ndarray, "fits 3"]) -> Float64[np.ndarray, " fits"]:
        curvature, slope = (sign * np.where(np.abs(x) > least, x, 0) for x in coefficients.T[:2])
        opens_right = curvature > 0
        away = np.where(slope == 0, 0, np.copysign(np.inf, -slope))
        end = np.where(opens_right, -slope / np.where(opens_right, 2 * curvature, 1), away)
        with np.errstate(over="ignore"):  # an end far outside is as good as infinite
            return np.exp(middle + end)

    at = float(best(coefficients[None])[0])
    uncertainty = None
    if len(sizes) > _PARABOLA:
        uncertainty = interval(best(resample(values, design @ coefficients, _PARABOLA) @ solve.T))
    problem: Problem = "" if sizes.min() <= at <= sizes.max() else "outside the measured sizes"
    if sign * coefficients[0] <= least:
        problem = "no best size"
    flops = float(np.mean([member.flops[convention] for member in members]))
    return Parabola(flops, sizes, values, coefficients, at, uncertainty, problem)
