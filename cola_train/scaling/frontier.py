"""The best metric at each budget, without the luck of the best of several.

The best of several noisy sizes looks better than it is, by about the noise, and a power law through
such points is off by as much: its intervals missed every second time. So which size is best at a
budget is asked of the other budgets, whose noise is their own. The metric at that size is then
read off this budget's own points. A size a little off costs less than the noise, since the curve is
flat around its best.

What the other budgets tell is a + A / N^alpha + B / (C / N)^beta with a height `a` for each, by
least squares over a grid of exponents.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from cola_train.config.amounts import FLOPS_PER_EFLOP
from cola_train.config.loop import Convention
from cola_train.scaling.points import Point, by_budget
from cola_train.scaling.power_law import Direction
from cola_train.scaling.size_curve import NUM_PARAMETERS, Shape

_ROUNDING = 1e-9
_GRID = np.geomspace(0.05, 2, 16)  # of either exponent
PerBudget = Float64[np.ndarray, " budgets"]


@dataclasses.dataclass(frozen=True)
class Frontier:
    """One family's best size at each budget, budgets rising."""

    flops: PerBudget  # mean of the points'
    parameters: PerBudget  # the size that the other budgets tell, inside this one's sizes
    values: PerBudget  # the metric there, by this budget's points
    num_at_edge: int  # budgets whose best size is the least or the largest measured one

    def to_json(self) -> dict[str, Any]:
        """A budget a row."""
        rows = zip(self.flops / FLOPS_PER_EFLOP, self.parameters, self.values, strict=True)
        names = ("eflops", "parameters", "value")
        return {
            "budgets": [dict(zip(names, map(float, row), strict=True)) for row in rows],
            "num_at_edge": self.num_at_edge,
        }

    @property
    def note(self) -> str:
        """A warning about what "best" means; empty if there is none."""
        if not self.num_at_edge:
            return ""
        return (
            f"the best of {self.num_at_edge} of {len(self.flops)} budgets is the least or largest "
            "size: of the measured sizes, not of all"
        )


def frontier(
    points: Sequence[Point], metric: str, direction: Direction, convention: Convention
) -> Frontier:
    """Find one family's best metric at each budget, of the sizes between the measured ones.

    With one size there is no choice; of two, it is the better one by the other budgets.

    Raises:
        UserError: see `by_budget`.
    """
    budgets = by_budget(points, convention).values()
    sign = 1 if direction == "falls" else -1
    flops = np.array([np.mean([point.flops[convention] for point in one]) for one in budgets])
    compute = np.log(flops) - np.log(flops).mean()
    sizes = [np.log([point.parameters for point in one]) for one in budgets]
    middle = np.concatenate(sizes).mean()
    sizes = [size - middle for size in sizes]
    measured = [sign * np.array([point.metrics[metric] for point in one]) for one in budgets]
    best, values = np.empty_like(flops), np.empty_like(flops)
    num_at_edge = 0
    chosen, shapes = _best_by_others(sizes, measured, compute)
    for at, (size, y) in enumerate(zip(sizes, measured, strict=True)):
        num_sizes = len(np.unique(size))
        best[at] = np.clip(chosen[at], size.min(), size.max())
        if num_sizes < NUM_PARAMETERS:  # between two sizes there is nothing to read off
            best[at] = size[np.abs(size - best[at]).argmin()]
        num_at_edge += num_sizes > 1 and best[at] in (size.min(), size.max())
        # Around the chosen size, so that the curve's first coefficient is its height there.
        basis = shapes[[at]].basis((size - best[at])[None])[0, :, :num_sizes]
        values[at] = (np.linalg.pinv(basis) @ y)[0]
    return Frontier(flops, np.exp(best + middle), sign * values, num_at_edge)


def _best_by_others(
    sizes: Sequence[np.ndarray], measured: Sequence[np.ndarray], compute: PerBudget
) -> tuple[PerBudget, Shape]:
    """Each budget's best log size, and the exponents, by the other budgets alone.

    The size is infinite where A or B is 0. Only sums over a budget's points around
    their means enter.
    """
    alpha, beta = (axis.ravel() for axis in np.meshgrid(_GRID, _GRID))
    grams, products = [], []
    for size, y, at in zip(sizes, measured, compute, strict=True):
        terms = np.exp([np.outer(-alpha, size), np.outer(beta, size - at)])
        terms -= terms.mean(axis=-1, keepdims=True)
        y = y - y.mean()
        grams.append(np.einsum("inp,jnp->ijn", terms, terms))
        products.append(terms @ y)
    (falling, both), (_, rising) = np.moveaxis(_others(np.array(grams)), 0, 2)
    by_falling, by_rising = _others(np.array(products)).swapaxes(0, 1)
    tiny = np.finfo(float).tiny
    determinant = falling * rising - both**2
    tells = determinant > _ROUNDING * falling * rising  # the two terms apart
    determinant = np.where(tells, determinant, 1)
    a = (rising * by_falling - both * by_rising) / determinant
    b = (falling * by_rising - both * by_falling) / determinant
    explained = [
        np.maximum(by_falling, 0) ** 2 / (falling + tiny),
        np.maximum(by_rising, 0) ** 2 / (rising + tiny),
        np.where(tells & (a > 0) & (b > 0), a * by_falling + b * by_rising, 0),
    ]
    kind, node = np.divmod(np.concatenate(explained, axis=1).argmax(axis=1), len(alpha))
    row = np.arange(len(compute))
    a, b, alpha, beta = a[row, node], b[row, node], alpha[node], beta[node]
    with np.errstate(divide="ignore", invalid="ignore"):
        turns = (np.log(a * alpha / (b * beta)) + beta * compute) / (alpha + beta)
    return np.choose(kind, [np.inf, -np.inf, turns]), Shape(alpha, beta)


def _others(sums: np.ndarray) -> np.ndarray:
    """For each budget, the sum over the others."""
    return sums.sum(axis=0) - sums
