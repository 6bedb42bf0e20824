"""Quality as a power law of training compute: L(C) = E + A (C / C0)^-alpha.

C0 is the least measured compute, E what no compute removes, A what compute can remove at C0. A
metric that rises towards a ceiling U is U - A (C / C0)^-alpha; all that rise are shares, so U <= 1.
With y = L, or y = 1 - L, both are y = E + A (C / C0)^-alpha with E, A, alpha >= 0: that is fitted.

How uncertain a fit to few points is, of this law or another, the residual bootstrap says.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float64

from cola_train.bootstrap import Interval, bootstrap_generator, percentile_interval
from cola_train.config.amounts import FLOPS_PER_EFLOP
from cola_train.config.loop import Convention
from cola_train.scaling.points import Point, by_budget

Direction = Literal["falls", "rises"]
PerPoint = Float64[np.ndarray, " points"]
PerFit = Float64[np.ndarray, " fits"]
FitsByPoints = Float64[np.ndarray, "fits points"]

LEVEL = 0.9  # of all intervals
_NUM_RESAMPLES = 1000
_NUM_PARAMETERS = 3
# Bounds of alpha x log(most / least compute): from a straight line over log C to a curve that has
# reached E at the second point.
_LEAST_DECAY, _MOST_DECAY = 1e-3, 20.0
_GRID_SIZE = 60
_NUM_CUTS = 30
# How far past the last point to_json looks, in multiples of its compute.
_BEYOND = (3.0, 10.0)


@dataclasses.dataclass(frozen=True)
class NotFitted:
    """Why there is no fit."""

    reason: str

    def to_json(self) -> dict[str, Any]:
        return {"not_fitted": self.reason}


@dataclasses.dataclass(frozen=True)
class Parameters:
    """E, A and alpha of y, one number each for the fit or for every resample."""

    limit: PerFit
    amplitude: PerFit
    exponent: PerFit

    def at(self, log_ratio: PerPoint) -> FitsByPoints:
        """y at these log(C / C0)."""
        return self.limit[:, None] + self.amplitude[:, None] * np.exp(
            -self.exponent[:, None] * log_ratio
        )


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """A fit of quality over FLOPs."""

    direction: Direction
    flops: PerPoint  # measured, rising; the first is C0
    values: PerPoint  # measured
    fitted: Parameters
    resampled: Parameters
    limit: float  # what the metric tends to: E, or the ceiling
    limit_interval: Interval
    amplitude: float  # A: how far the fit is from `limit` at C0
    amplitude_interval: Interval
    exponent: float  # alpha; 0 if compute does not help
    exponent_interval: Interval

    def at(self, flops: PerPoint) -> PerPoint:
        """The metric at any FLOPs."""
        return _mirror(self.fitted.at(self._log_ratio(flops)), self.direction)[0]

    def interval_at(self, flops: float) -> Interval:
        """Where the curve, not a new measurement, may be at any FLOPs."""
        y = self.resampled.at(self._log_ratio(np.array([flops])))
        return interval(_mirror(y, self.direction)[:, 0])

    def is_extrapolated(self, flops: PerPoint) -> Bool[np.ndarray, " points"]:
        """Whether each is outside the measured FLOPs; intervals know nothing of a bend there."""
        return (flops < self.flops[0]) | (flops > self.flops[-1])

    @property
    def note(self) -> str:
        """A warning about the exponent; empty if there is none."""
        if self.exponent == 0:
            return "does not improve with compute"
        decay = self.exponent * self._log_ratio(self.flops[-1:])[0]
        return "has reached its limit by the second budget" if decay > 0.99 * _MOST_DECAY else ""

    def to_json(self) -> dict[str, Any]:
        """Parameters and the curve with intervals; also extrapolated, at 3 and 10 x C."""
        sign = "+" if self.direction == "falls" else "-"
        flops = np.concatenate([self.flops, self.flops[-1] * np.array(_BEYOND)])
        curve = zip(flops, self.at(flops), self.is_extrapolated(flops), strict=True)
        return {
            "formula": f"limit {sign} amplitude (C / C0)^-exponent",
            "num_points": len(self.flops),
            "c0_eflops": float(self.flops[0]) / FLOPS_PER_EFLOP,
            "limit": self.limit,
            "amplitude": self.amplitude,
            "exponent": self.exponent,
            "limit_interval": self.limit_interval.to_json(),
            "amplitude_interval": self.amplitude_interval.to_json(),
            "exponent_interval": self.exponent_interval.to_json(),
            "residual_rms": float(np.sqrt(np.square(self.values - self.at(self.flops)).mean())),
            "note": self.note,
            "curve": [
                {
                    "eflops": float(at) / FLOPS_PER_EFLOP,
                    "value": float(value),
                    "interval": self.interval_at(at).to_json(),
                    "extrapolated": bool(beyond),
                }
                for at, value, beyond in curve
            ],
        }

    def _log_ratio(self, flops: PerPoint) -> PerPoint:
        return np.log(flops / self.flops[0])


def frontier(
    points: Sequence[Point], metric: str, direction: Direction, convention: Convention
) -> list[Point]:
    """The best size of one family at each budget, budgets rising.

    The best of several noisy metrics looks better than it is, by about the noise; by as much at
    every budget with as many sizes.

    Raises:
        UserError: see `by_budget`.
    """
    best = min if direction == "falls" else max
    budgets = by_budget(points, convention).values()
    return [best(members, key=lambda point: point.metrics[metric]) for members in budgets]


def resample(values: PerPoint, fitted: PerPoint, num_parameters: int) -> FitsByPoints:
    """Values as they might have been measured: the fit plus residuals drawn with replacement.

    Cases are not resampled: of five points, a draw often holds three different ones, on which the
    fit says nothing. Residuals of a fit are smaller than the noise, so they are scaled by sqrt(n /
    (n - p)). How large the noise is they say only roughly, so each resample has another scale, with
    n - p degrees of freedom, as in Student's t. Without that, 90% intervals of a power law hold the
    truth 60% of the time at 4 points and 80% at 8.

    The noise is assumed to be the same at all points and independent between them. The draws are
    the same each time.
    """
    num_points = len(values)
    freedom = num_points - num_parameters
    assert freedom > 0
    draws = bootstrap_generator()
    residuals = values - fitted
    residuals = (residuals - residuals.mean()) * np.sqrt(num_points / freedom)
    scale = np.sqrt(freedom / draws.chisquare(freedom, size=(_NUM_RESAMPLES, 1)))
    return fitted + scale * residuals[draws.integers(num_points, size=(_NUM_RESAMPLES, num_points))]


def interval(resamples: PerFit) -> Interval:
    """The percentile interval; resamples of what the points do not determine may be infinite."""
    return percentile_interval(resamples, LEVEL, "inverted_cdf")


def fit_power_law(flops: PerPoint, values: PerPoint, direction: Direction) -> PowerLaw | NotFitted:
    """Least squares, with bootstrap intervals (`resample`).

    For a given alpha, E and A are a linear problem that is solved exactly; the best alpha is
    searched for on a grid and then between its neighbors. So the fit is the best there is and needs
    no starting point. If compute does not help, E is the mean, A and alpha are 0.

    `flops` rise. There is no fit to fewer points than parameters + 1, nor to values out of range:
    those that fall must be 0 or more, those that rise 1 or less.
    """
    assert (np.diff(flops) > 0).all()
    assert len(flops) == len(values)
    if len(flops) <= _NUM_PARAMETERS:
        return NotFitted(
            f"a power law needs at least {_NUM_PARAMETERS + 1} budgets, and there are {len(flops)}"
        )
    y = _mirror(values, direction)
    if (y < 0).any():
        rules = {"falls": "must not be negative", "rises": "is a share and must not exceed 1"}
        worst = f"{values[y.argmin()]:g}"
        return NotFitted(f"a metric that {direction} {rules[direction]}, and one point has {worst}")
    log_ratio = np.log(flops / flops[0])
    fitted = _solve(log_ratio, y[None])
    resampled = _solve(log_ratio, resample(y, fitted.at(log_ratio)[0], _NUM_PARAMETERS))
    return PowerLaw(
        direction,
        flops,
        values,
        fitted,
        resampled,
        limit=float(_mirror(fitted.limit, direction)[0]),
        limit_interval=interval(_mirror(resampled.limit, direction)),
        amplitude=float(fitted.amplitude[0]),
        amplitude_interval=interval(resampled.amplitude),
        exponent=float(fitted.exponent[0]),
        exponent_interval=interval(resampled.exponent),
    )


def _mirror(
    values: Float64[np.ndarray, "*shape"], direction: Direction
) -> Float64[np.ndarray, "*shape"]:
    return values if direction == "falls" else 1 - values


def _solve(log_ratio: PerPoint, y: FitsByPoints) -> Parameters:
    """The best E, A and alpha for each row of y."""

    def error(exponent: PerFit) -> PerFit:
        return np.square(_linear(log_ratio, y, exponent).at(log_ratio) - y).sum(axis=1)

    grid = np.geomspace(_LEAST_DECAY, _MOST_DECAY, _GRID_SIZE) / log_ratio[-1]
    best = np.stack([error(np.full(len(y), exponent)) for exponent in grid]).argmin(axis=0)
    low, high = grid[np.maximum(best - 1, 0)], grid[np.minimum(best + 1, _GRID_SIZE - 1)]
    golden = (np.sqrt(5) - 1) / 2
    for _ in range(_NUM_CUTS):
        left, right = high - golden * (high - low), low + golden * (high - low)
        keeps_left = error(left) < error(right)
        low, high = np.where(keeps_left, low, left), np.where(keeps_left, right, high)
    found = _linear(log_ratio, y, (low + high) / 2)
    return dataclasses.replace(found, exponent=np.where(found.amplitude > 0, found.exponent, 0.0))


def _linear(log_ratio: PerPoint, y: FitsByPoints, exponent: PerFit) -> Parameters:
    """The best E, A >= 0 for a given alpha of each row, on the better bound if one is broken."""
    x = np.exp(-exponent[:, None] * log_ratio)
    x_mean, y_mean = x.mean(axis=1), y.mean(axis=1)
    x_centered = x - x_mean[:, None]
    amplitude = (x_centered * y).sum(axis=1) / np.square(x_centered).sum(axis=1)
    limit = y_mean - amplitude * x_mean
    # The error is convex: where a bound is broken, the best is on it.
    through_zero = np.maximum((x * y).sum(axis=1) / np.square(x).sum(axis=1), 0)
    amplitude, limit = np.where(limit < 0, through_zero, amplitude), np.maximum(limit, 0)
    is_flat = amplitude <= 0
    return Parameters(
        np.where(is_flat, np.maximum(y_mean, 0), limit), np.where(is_flat, 0.0, amplitude), exponent
    )
