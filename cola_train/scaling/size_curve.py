"""A metric over model size at one budget, and the size where it is best.

At a given budget, L(N, D) = E + A / N^alpha + B / D^beta is E + a N^-alpha + b N^beta over size N:
nearly a parabola over log N, but steeper on one side and flatter far away. A parabola through sizes
that span a factor of 256 therefore puts the best size a few per cent off, more than its noise, and
an interval around it misses.

The points of one budget are too few to find alpha and beta. So all that may be are tried: given
them, E, a and b are a linear problem, and each pair counts by how well it then fits and by a prior
around what has been found for language models: (0.34, 0.28) by Hoffmann et al. 2022, (0.35, 0.37)
by Besiroglu et al. 2024. Intervals hold the middle of curves that are drawn accordingly: a pair of
exponents, then the noise, then E, a and b (Student's t). They include what is not known of the
curve's shape. tests/scaling/coverage.py measures how often they hold the truth.
"""

import dataclasses
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64, Int64

from cola_train.bootstrap import Interval, bootstrap_generator
from cola_train.config.amounts import FLOPS_PER_EFLOP
from cola_train.scaling.power_law import Direction, interval

NUM_PARAMETERS = 3  # E, a and b
_NUM_DRAWS = 4000
# The prior: half the sum of the exponents is 0.3 within a factor of e^0.5, their difference 0 ± 0.1
# (standard deviations).
_MIDDLE, _MIDDLE_SPREAD, _DIFFERENCE_SPREAD = 0.3, 0.5, 0.1
_GRID = 13, 7  # differences by middles
_NUM_ZOOMS = 2
# Where five parameters fit all points, the likelihood that belongs to a flat prior of the log of
# the noise, residuals^-(points - 3), is infinite. This much less is finite, and the intervals hold
# the truth as often as they should.
_TEMPERING = 0.5
_LEAST_WEIGHT, _LEAST_EXPONENT = 1e-4, 0.01
# Relative to the largest value; smaller coefficients are rounding errors.
_ROUNDING = 1e-12
Problem = Literal["", "outside the measured sizes", "no best size"]
Terms = Float64[np.ndarray, "nodes points 3"]
PerNode = Float64[np.ndarray, " nodes"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Exponents of a curve over x = log N, one pair or many: E + a e^(-alpha x) + b e^(beta x)."""

    alpha: PerNode
    beta: PerNode

    def basis(self, x: Float64[np.ndarray, "#nodes points"]) -> Terms:
        """The curve's linear terms: 1, one like x, and one like x^2 / 2, around x = 0."""
        alpha, beta = self.alpha[:, None], self.beta[:, None]
        falling, rising = np.expm1(-alpha * x) / alpha, np.expm1(beta * x) / beta
        middle = (rising - falling) / 2
        return np.stack(
            [np.ones_like(middle), middle, (falling + rising) / (alpha + beta)], axis=-1
        )

    def lowest(self, slope: PerNode, curvature: PerNode) -> PerNode:
        """Where slope and curvature times the last two terms of `basis` are least; infinite, as
        they slope, if nowhere.
        """
        per_side = curvature / (self.alpha + self.beta)
        # The derivative is up e^(beta x) - down e^(-alpha x).
        up, down = per_side + slope / 2, per_side - slope / 2
        turns = (up > 0) & (down > 0)
        ratio = np.where(turns, down, 1) / np.where(turns, up, 1)
        return np.where(
            turns, np.log(ratio) / (self.alpha + self.beta), np.copysign(np.inf, -slope)
        )

    def __getitem__(self, index: Int64[np.ndarray, " chosen"]) -> "Shape":
        return Shape(self.alpha[index], self.beta[index])


@dataclasses.dataclass(frozen=True)
class SizeCurve:
    """One budget of one family."""

    flops: float  # mean of the points'
    parameters: Float64[np.ndarray, " points"]  # measured sizes, rising
    values: Float64[np.ndarray, " points"]  # of the metric
    shape: Shape  # of the curve whose best size is the median of all
    coefficients: Float64[np.ndarray, "3"]  # of shape.basis, in the metric's sign
    # Infinite or 0, as the curve slopes, where it has no best size.
    best: float  # parameters
    best_value: float  # the metric there, or at the nearest measured size
    # None where there is no best size inside the measured ones, and with as many points as E, a and
    # b fit exactly: nothing then tells of the noise. An end may be open: infinite, or 0.
    best_interval: Interval | None
    value_interval: Interval | None
    problem: Problem  # why `best` is not to be used; empty if it may be

    def at(self, parameters: Float64[np.ndarray, " sizes"]) -> Float64[np.ndarray, " sizes"]:
        """The metric at any size."""
        x = np.log(parameters) - np.log(self.parameters).mean()
        return self.shape.basis(x[None])[0] @ self.coefficients

    def to_json(self) -> dict[str, Any]:
        """All but the curve."""
        has_best = self.problem != "no best size"
        return {
            "eflops": self.flops / FLOPS_PER_EFLOP,
            "parameters": self.parameters.tolist(),
            "values": self.values.tolist(),
            "best_parameters": self.best if has_best else None,
            "best_parameters_interval": self.best_interval and self.best_interval.to_json(),
            "best_value": self.best_value if has_best else None,
            "best_value_interval": self.value_interval and self.value_interval.to_json(),
            "problem": self.problem,
        }


@dataclasses.dataclass(frozen=True)
class _Fits:
    """The least squares of each pair of exponents, and how much each counts."""

    shape: Shape
    coefficients: Float64[np.ndarray, "nodes 3"]
    inverses: Float64[np.ndarray, "nodes 3 3"]  # of R, where Q R is the basis
    squares: PerNode  # of residuals, summed
    weights: PerNode  # sum to 1


def fit_size_curve(
    flops: float,
    parameters: Float64[np.ndarray, " points"],
    values: Float64[np.ndarray, " points"],
    direction: Direction,
) -> SizeCurve:
    """Fit one budget's points, of at least three sizes."""
    middle = np.log(parameters).mean()
    x = np.log(parameters) - middle
    sign = 1 if direction == "falls" else -1
    fits = _fit(x, sign * values)
    places, heights = _lowest(fits.shape, fits.coefficients, x)
    median = _median(places, fits.weights)
    best_interval = value_interval = None
    with np.errstate(over="ignore"):  # far outside is as good as infinite
        best = float(np.exp(middle + places[median]))
        problem: Problem = (
            "" if x.min() <= places[median] <= x.max() else "outside the measured sizes"
        )
        if not np.isfinite(places[median]):
            problem = "no best size"
        if len(x) > NUM_PARAMETERS and not problem:
            drawn_places, drawn_heights = _lowest(*_draw(fits, len(x)), x)
            best_interval = interval(np.exp(middle + drawn_places))
            value_interval = interval(sign * drawn_heights)
    return SizeCurve(
        flops,
        parameters,
        values,
        fits.shape[np.array([median])],
        sign * fits.coefficients[median],
        best,
        float(sign * heights[median]),
        best_interval,
        value_interval,
        problem,
    )


def _fit(x: Float64[np.ndarray, " points"], y: Float64[np.ndarray, " points"]) -> _Fits:
    """Zooms in on the exponents that count, since those of far-reaching points are well known."""
    differences = np.linspace(-3, 3, _GRID[0]) * _DIFFERENCE_SPREAD
    middles = np.log(_MIDDLE) + np.linspace(-2, 2, _GRID[1]) * _MIDDLE_SPREAD
    fits, counts = _fit_grid(x, y, differences, middles)
    for _ in range(_NUM_ZOOMS):
        differences = _zoom(differences, counts.max(axis=1))
        middles = _zoom(middles, counts.max(axis=0))
        fits, counts = _fit_grid(x, y, differences, middles)
    return fits


def _fit_grid(
    x: Float64[np.ndarray, " points"],
    y: Float64[np.ndarray, " points"],
    differences: Float64[np.ndarray, " rows"],
    middles: Float64[np.ndarray, " columns"],
) -> tuple[_Fits, np.ndarray]:
    """The fits, and where on the grid weight is not negligible."""
    grid = np.meshgrid(differences, middles, indexing="ij")
    difference, middle = (axis.ravel() for axis in grid)
    exponents = np.exp(middle) + np.array([[0.5], [-0.5]]) * difference
    shape = Shape(*np.maximum(exponents, _LEAST_EXPONENT))
    q, r = np.linalg.qr(shape.basis(x[None]))
    projected = np.einsum("npk,p->nk", q, y)
    squares = np.square(y - np.einsum("npk,nk->np", q, projected)).sum(axis=1)
    rounding = _ROUNDING * np.abs(y).max()
    freedom = len(x) - NUM_PARAMETERS
    log_weights = -0.5 * (
        np.square(difference / _DIFFERENCE_SPREAD)
        + np.square((middle - np.log(_MIDDLE)) / _MIDDLE_SPREAD)
        + max(freedom - _TEMPERING, 0) * np.log(squares + rounding**2 + np.finfo(float).tiny)
    )
    weights = np.exp(log_weights - log_weights.max())
    inverses = np.linalg.inv(r)
    coefficients = np.einsum("nij,nj->ni", inverses, projected)
    coefficients[np.abs(coefficients) <= rounding] = 0
    fits = _Fits(shape, coefficients, inverses, squares, weights / weights.sum())
    return fits, (weights > _LEAST_WEIGHT).reshape(grid[0].shape)


def _zoom(axis: Float64[np.ndarray, " grid"], counts: np.ndarray) -> Float64[np.ndarray, " grid"]:
    (found,) = np.nonzero(counts)
    first, last = max(found[0] - 1, 0), min(found[-1] + 1, len(axis) - 1)
    return np.linspace(axis[first], axis[last], len(axis))


def _draw(fits: _Fits, num_points: int) -> tuple[Shape, Float64[np.ndarray, "draws 3"]]:
    """Curves as they may be; the draws are the same each time."""
    draws = bootstrap_generator()
    freedom = num_points - NUM_PARAMETERS
    node = np.searchsorted(np.cumsum(fits.weights)[:-1], draws.random(_NUM_DRAWS))
    scale = np.sqrt(fits.squares[node] / draws.chisquare(freedom, size=_NUM_DRAWS))
    noise = draws.normal(size=(_NUM_DRAWS, NUM_PARAMETERS)) * scale[:, None]
    moved = np.einsum("nij,nj->ni", fits.inverses[node], noise)
    return fits.shape[node], fits.coefficients[node] + moved


def _lowest(
    shape: Shape, coefficients: Float64[np.ndarray, "curves 3"], x: Float64[np.ndarray, " points"]
) -> tuple[Float64[np.ndarray, " curves"], Float64[np.ndarray, " curves"]]:
    """Where each curve is least, and its value at the measured size or between two, nearest."""
    places = shape.lowest(*coefficients.T[1:])
    inside = np.clip(places, x.min(), x.max())
    return places, np.einsum("npk,nk->n", shape.basis(inside[:, None]), coefficients)


def _median(values: PerNode, weights: PerNode) -> int:
    """The index of the weighted median."""
    order = np.argsort(values)
    return int(order[np.searchsorted(np.cumsum(weights[order]), 0.5)])
