"""The best metric at each budget, without the luck of the best of several.

The best of several noisy sizes looks better than it is, by about the noise, and a power law through
such points is off by as much: its intervals missed every second time. So which size is best at a
budget is asked of the other budgets, whose noise is their own. The metric at that size is then
read off this budget's own points. A size a little off costs less than the noise, since the curve is
flat around its best.

What the other budgets tell is a + A / N^alpha + B / (C / N)^beta with a height `a` for each, over a
grid of exponents, by least squares. The size is the mean over the grid, weighed by how well each
fits: where size hardly matters it stays near the middle, and does not follow the noise.
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
    num_at_edge: int  # budgets that are best at the least or the largest size, or beyond

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
            f"{self.num_at_edge} of {len(self.flops)} budgets are best at the least or largest size"
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
    chosen = _best_by_others(sizes, measured, compute)
    best, values = chosen.size.copy(), np.empty_like(flops)
    num_at_edge = 0
    for at, (size, y) in enumerate(zip(sizes, measured, strict=True)):
        num_sizes = len(np.unique(size))
        if num_sizes < NUM_PARAMETERS:  # between two sizes there is nothing to read off
            best[at] = size[np.abs(size - best[at]).argmin()]
        num_at_edge += num_sizes == 2 or bool(chosen.is_at_edge[at] and num_sizes > 1)
        # Around the chosen size, so that the curve's first coefficient is its height there.
        basis = chosen.shape[np.array([at])].basis((size - best[at])[None])[0, :, :num_sizes]
        values[at] = (np.linalg.pinv(basis) @ y)[0]
    return Frontier(flops, np.exp(best + middle), sign * values, num_at_edge)


@dataclasses.dataclass(frozen=True)
class _Choice:
    """What the other budgets tell of each."""

    size: PerBudget  # log
    is_at_edge: np.ndarray
    shape: Shape  # of the best fit


def _best_by_others(
    sizes: Sequence[np.ndarray], measured: Sequence[np.ndarray], compute: PerBudget
) -> _Choice:
    """Choose by sums over each budget's points around their means, less those of the budget."""
    alpha, beta = (axis.ravel() for axis in np.meshgrid(_GRID, _GRID))
    grams, products, squares, freedoms = [], [], [], []
    for size, y, at in zip(sizes, measured, compute, strict=True):
        terms = np.exp([np.outer(-alpha, size), np.outer(beta, size - at)])
        terms -= terms.mean(axis=-1, keepdims=True)
        y = y - y.mean()
        grams.append(np.einsum("inp,jnp->ijn", terms, terms))
        products.append(terms @ y)
        squares.append(y @ y)
        freedoms.append(len(y) - 1)
    (falling, both), (_, rising) = np.moveaxis(_others(np.array(grams)), 0, 2)
    by_falling, by_rising = _others(np.array(products)).swapaxes(0, 1)
    tiny = np.finfo(float).tiny
    determinant = falling * rising - both**2
    tells = determinant > _ROUNDING * falling * rising  # the two terms apart
    determinant = np.where(tells, determinant, 1)
    a = (rising * by_falling - both * by_rising) / determinant
    b = (falling * by_rising - both * by_falling) / determinant
    turns = tells & (a > 0) & (b > 0)
    ratio = np.where(turns, a, 1) * alpha / (np.where(turns, b, 1) * beta)
    places = (np.log(ratio) + beta * compute[:, None]) / (alpha + beta)
    low, high = (np.array([[end(size)] for size in sizes]) for end in (np.min, np.max))
    # A and B, A alone, or B alone; what explains nothing has no best size, so the middle is taken.
    explained = np.stack(
        [
            np.where(turns, a * by_falling + b * by_rising, 0),
            np.maximum(by_falling, 0) ** 2 / (falling + tiny),
            np.maximum(by_rising, 0) ** 2 / (rising + tiny),
        ]
    )
    places = np.stack([np.clip(places, low, high), high + 0 * places, low + 0 * places])
    places = np.where(explained > 0, places, (low + high) / 2)
    total = _others(np.array(squares))[:, None]
    freedom = np.maximum(_others(np.array(freedoms)) - 2, 0)[:, None]
    log_weights = -freedom / 2 * np.log(np.maximum(total - explained, _ROUNDING * total) + tiny)
    weights = np.exp(log_weights - log_weights.max(axis=(0, 2), keepdims=True))
    weights /= weights.sum(axis=(0, 2), keepdims=True)
    best = explained.max(axis=0).argmax(axis=1)
    at_edge = (places == low) | (places == high)
    return _Choice(
        (weights * places).sum(axis=(0, 2)),
        (weights * at_edge).sum(axis=(0, 2)) > 0.5,
        Shape(alpha[best], beta[best]),
    )


def _others(sums: np.ndarray) -> np.ndarray:
    """For each budget, the sum over the others."""
    return sums.sum(axis=0) - sums
