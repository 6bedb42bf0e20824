"""The compute-optimal size N: at each budget the lowest point of a curve over size.

Over budgets, N = N0 (C / C0)^a (Hoffmann et al. 2022, approach 2); N0 is the best size at C0, the
least budget that counts.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from cola_train.bootstrap import Interval
from cola_train.config.amounts import FLOPS_PER_EFLOP
from cola_train.config.loop import Convention
from cola_train.scaling.points import Point, by_budget
from cola_train.scaling.power_law import Direction, NotFitted, interval, resample
from cola_train.scaling.size_curve import NUM_PARAMETERS, SizeCurve, fit_size_curve

_LINE = 2  # parameters


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
    """One family's curves over size, budgets rising, and the growth of their best sizes."""

    curves: dict[float, SizeCurve | NotFitted]  # by budget in EFLOPs

    @property
    def fitted(self) -> list[SizeCurve]:
        """The budgets that have a curve."""
        return [curve for curve in self.curves.values() if isinstance(curve, SizeCurve)]

    @functools.cached_property
    def growth(self) -> Growth | NotFitted:
        """The growth of the best size over those budgets whose curve shows one."""
        curves = [curve for curve in self.fitted if not curve.problem]
        if len(curves) < _LINE:
            return NotFitted(
                f"growth needs {_LINE} budgets whose best size lies inside the measured ones; "
                f"there are {len(curves)}"
            )
        flops = np.array([curve.flops for curve in curves])
        best = np.log([curve.best for curve in curves])
        design = np.vander(np.log(flops / flops[0]), _LINE)
        solve = np.linalg.pinv(design)
        line = solve @ best
        uncertainty = None
        if len(curves) > _LINE:
            uncertainty = interval(resample(best, design @ line, _LINE) @ solve[0])
        return Growth(float(line[0]), uncertainty, float(flops[0]), float(np.exp(line[1])))

    def to_json(self) -> dict[str, Any]:
        """Budgets as a list, in EFLOPs."""
        budgets = [{"budget_eflops": at, **of.to_json()} for at, of in self.curves.items()]
        return {"budgets": budgets, "growth": self.growth.to_json()}


def fit_isoflop(
    points: Sequence[Point], metric: str, direction: Direction, convention: Convention
) -> IsoFLOP:
    """Fit a curve over size to one family's points at each budget.

    Raises:
        UserError: see `by_budget`.
    """
    budgets = by_budget(points, convention).items()
    return IsoFLOP(
        {budget: _fit(members, metric, direction, convention) for budget, members in budgets}
    )


def _fit(
    members: Sequence[Point], metric: str, direction: Direction, convention: Convention
) -> SizeCurve | NotFitted:
    sizes = np.array([member.parameters for member in members], dtype=np.float64)
    num_sizes = len(np.unique(sizes))
    if num_sizes < NUM_PARAMETERS:
        return NotFitted(f"a curve needs {NUM_PARAMETERS} sizes, and there are {num_sizes}")
    flops = float(np.mean([member.flops[convention] for member in members]))
    values = np.array([member.metrics[metric] for member in members])
    return fit_size_curve(flops, sizes, values, direction)
