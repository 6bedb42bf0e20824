"""Quality as a power law of training compute: L(C) = E + A (C / C0)^-alpha.

C0 is the least measured compute, E what no compute removes, A what compute can remove at C0. A
metric that rises towards a ceiling U is U - A (C / C0)^-alpha; all that rise are shares, so U <= 1.
With y = L, or y = 1 - L, both are y = E + A (C / C0)^-alpha with E, A, alpha >= 0: that is fitted.

How uncertain a fit to few points is, of this law or another, the residual bootstrap says.
"""

import dataclasses
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float64

from cola_train.bootstrap import Interval, bootstrap_generator, percentile_interval
from cola_train.config.amounts import FLOPS_PER_EFLOP

Direction = Literal["falls", "rises"]
PerPoint = Float64[np.ndarray, " points"]
PerFit = Float64[np.ndarray, " fits"]
FitsByPoints = Float64[np.ndarray, "fits points"]

LEVEL = 0.95  # of all intervals
NUM_RESAMPLES = 1000
_NUM_PARAMETERS = 3
# Bounds of alpha x log(most / least compute): from a straight line over log C to a curve that has
# reached E at the second point.
_LEAST_DECAY, _MOST_DECAY = 1e-3, 20.0
_GRID_SIZE = 60
_NUM_CUTS = 20
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
        return mirror(self.fitted.at(self._log_ratio(flops)), self.direction)[0]

    def interval_at(self, flops: float) -> Interval:
        """Where the curve, not a new measurement, may be at any FLOPs."""
        y = self.resampled.at(self._log_ratio(np.array([flops])))
        return interval(mirror(y, self.direction)[:, 0])

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
    scale = np.sqrt(freedom / draws.chisquare(freedom, size=(NUM_RESAMPLES, 1)))
    return fitted + scale * residuals[draws.integers(num_points, size=(NUM_RESAMPLES, num_points))]


def interval(resamples: PerFit) -> Interval:
    """The percentile interval; resamples of what the points do not determine may be infinite."""
    return percentile_interval(resamples, LEVEL, "inverted_cdf")


def fit_power_law(flops: PerPoint, values: PerPoint, direction: Direction) -> PowerLaw | NotFitted:
    """Least squares, with bootstrap intervals (`resample`).

    For a given alpha, E and A are a linear problem that is solved exactly; the best alpha is
    searched for on a grid and then between its neighbors. So the fit is the best there is and needs
    no starting point. If compute does not help, E is the mean, A and alpha are 0.

    `flops` may be in any order, and equal: points of budgets that are close may have spent the
    same. There is no fit to fewer different ones than parameters + 1, nor to values out of range:
    those that fall must be 0 or more, those that rise 1 or less.
    """
    order = np.argsort(flops, kind="stable")
    flops, values = flops[order], values[order]
    if (num_budgets := len(np.unique(flops))) <= _NUM_PARAMETERS:
        return NotFitted(
            f"a power law needs at least {_NUM_PARAMETERS + 1} budgets of different FLOPs, and "
            f"there are {num_budgets}"
        )
    y = mirror(values, direction)
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
        limit=float(mirror(fitted.limit, direction)[0]),
        limit_interval=interval(mirror(resampled.limit, direction)),
        amplitude=float(fitted.amplitude[0]),
        amplitude_interval=interval(resampled.amplitude),
        exponent=float(fitted.exponent[0]),
        exponent_interval=interval(resampled.exponent),
    )


def mirror(
    values: Float64[np.ndarray, "*shape"], direction: Direction
) -> Float64[np.ndarray, "*shape"]:
    """y of a metric, or the metric of y: what falls is itself, what rises is a share below 1."""
    return values if direction == "falls" else 1 - values


def _solve(log_ratio: PerPoint, y: FitsByPoints) -> Parameters:
    """The best E, A and alpha for each row of y."""

    def error(exponent: PerFit) -> PerFit:
        return np.square(_linear(log_ratio, y, exponent).at(log_ratio) - y).sum(axis=1)

    grid = np.geomspace(_LEAST_DECAY, _MOST_DECAY, _GRID_SIZE) / log_ratio[-1]
    best = _errors_on_grid(np.exp(-np.outer(grid, log_ratio)), y).argmin(axis=0)
    low, high = grid[np.maximum(best - 1, 0)], grid[np.minimum(best + 1, _GRID_SIZE - 1)]
    golden = (np.sqrt(5) - 1) / 2
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = error(left), error(right)
    for _ in range(_NUM_CUTS):  # each moves an end to the worse of two places, and tries one more
        goes_left = at_left < at_right
        low, high = np.where(goes_left, low, left), np.where(goes_left, right, high)
        tried = np.where(goes_left, high - golden * (high - low), low + golden * (high - low))
        at_tried = error(tried)
        left, right = np.where(goes_left, tried, right), np.where(goes_left, left, tried)
        at_left, at_right = (
            np.where(goes_left, at_tried, at_right),
            np.where(goes_left, at_left, at_tried),
        )
    found = _linear(log_ratio, y, (low + high) / 2)
    return dataclasses.replace(found, exponent=np.where(found.amplitude > 0, found.exponent, 0.0))


def _errors_on_grid(
    x: Float64[np.ndarray, "grid points"], y: FitsByPoints
) -> Float64[np.ndarray, "grid fits"]:
    """The squared error of `_linear` at exponents that all rows share: x is (C / C0)^-alpha."""
    x_mean, y_mean = x.mean(axis=1, keepdims=True), y.mean(axis=1)
    x_centered = x - x_mean
    together, spread = x_centered @ y.T, np.square(x_centered).sum(axis=1, keepdims=True)
    of_zero, of_limit = np.square(y).sum(axis=1), np.square(y - y_mean[:, None]).sum(axis=1)
    from_zero = np.maximum(x @ y.T, 0) ** 2 / np.square(x).sum(axis=1, keepdims=True)
    has_limit = y_mean - together / spread * x_mean >= 0
    error = np.where(has_limit, of_limit - together**2 / spread, of_zero - from_zero)
    return np.where(together > 0, error, of_limit)


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
