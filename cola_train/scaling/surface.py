"""Quality over size N and tokens D: L(N, D) = E + A / N^alpha + B / D^beta, fitted to all points.

As Hoffmann et al. 2022, approach 3, and Besiroglu et al. 2024: the Huber loss of log L, from many
starts. Where 6 N D is the compute C, the best size grows as C^(beta / (alpha + beta)). A metric
that rises is fitted as 1 - L, as in power_law.py.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from cola_train.bootstrap import Interval
from cola_train.scaling.points import Point
from cola_train.scaling.power_law import Direction, NotFitted, interval, mirror, resample

# Residuals of log L that count by their square; larger ones count by their size.
_HUBER = 1e-3
_LEAST, _MOST = 0.02, 2.0  # exponents that are searched
_STARTS = np.geomspace(0.1, 1.2, 5)  # of either exponent
_STEPS, _RESAMPLED_STEPS = 100, 30
_NUM_RESAMPLES = 500
# How far below the metric, in log, E, A / N^alpha and B / D^beta are told from 0.
_NEGLIGIBLE = 12.0
Log = Float64[np.ndarray, " points"]  # of a positive number
# log E, log A, log B, alpha, beta, where N and D are in units of their geometric means.
Theta = Float64[np.ndarray, "fits 5"]
PerFit = Float64[np.ndarray, "fits points"]


@dataclasses.dataclass(frozen=True)
class Surface:
    """A fit whose exponents the points determine."""

    limit: float  # E, or the ceiling
    limit_interval: Interval
    alpha: float  # of size
    alpha_interval: Interval
    beta: float  # of tokens
    beta_interval: Interval
    growth: float  # of the best size with compute
    growth_interval: Interval
    num_points: int

    def to_json(self) -> dict[str, Any]:
        """Parameters with intervals."""
        return {
            "formula": "limit + A / N^alpha + B / D^beta, or limit - ... if the metric rises",
            "num_points": self.num_points,
            "limit": self.limit,
            "limit_interval": self.limit_interval.to_json(),
            "alpha": self.alpha,
            "alpha_interval": self.alpha_interval.to_json(),
            "beta": self.beta,
            "beta_interval": self.beta_interval.to_json(),
            "best_size_exponent": self.growth,
            "best_size_exponent_interval": self.growth_interval.to_json(),
        }


def fit_surface(points: Sequence[Point], metric: str, direction: Direction) -> Surface | NotFitted:
    """Fit one family's points, with bootstrap intervals (`power_law.resample`, of log L).

    Without a fit where the exponents, or an end of their intervals, are at the bounds of the
    search: the points then do not determine them.
    """
    size, tokens = (
        np.log([getattr(point, name) for point in points]) for name in ("parameters", "tokens")
    )
    num_parameters = 5
    for name, log in (("sizes", size), ("amounts of tokens", tokens)):
        if (count := len(np.unique(log))) < 3:
            return NotFitted(f"L(N, D) needs 3 {name}, and there are {count}")
    if len(points) <= num_parameters:
        needed = num_parameters + 1
        return NotFitted(f"L(N, D) needs at least {needed} points, and there are {len(points)}")
    y = mirror(np.array([point.metrics[metric] for point in points]), direction)
    if (y <= 0).any():
        rule = "above 0" if direction == "falls" else "below 1"
        return NotFitted(
            f"L(N, D) is fitted to logarithms: a metric that {direction} must be {rule}"
        )
    size, tokens, log = size - size.mean(), tokens - tokens.mean(), np.log(y)
    starts = _starts(size, tokens, y)
    found = _solve(size, tokens, log, starts, _STEPS)
    best = found[_loss(_predict(size, tokens, found)[0] - log).argmin()][None]
    if _is_at_bound(best[:, 3:]).any():
        return NotFitted(_undetermined("the best ones are at"))
    fitted = _predict(size, tokens, best)[0][0]
    resampled = resample(log, fitted, num_parameters)[:_NUM_RESAMPLES]
    many = _solve(
        size, tokens, resampled, np.repeat(best, len(resampled), axis=0), _RESAMPLED_STEPS
    )
    intervals = [interval(exponents) for exponents in many.T[3:]]
    if any(_is_at_bound(np.array(ends)).any() for ends in intervals):
        return NotFitted(_undetermined("their intervals reach"))

    def growth(theta: Theta) -> Float64[np.ndarray, " fits"]:
        return theta[:, 4] / theta[:, 3:].sum(axis=1)

    return Surface(
        limit=float(mirror(np.exp(best[:, 0]), direction)[0]),
        limit_interval=interval(mirror(np.exp(many[:, 0]), direction)),
        alpha=float(best[0, 3]),
        alpha_interval=intervals[0],
        beta=float(best[0, 4]),
        beta_interval=intervals[1],
        growth=float(growth(best)[0]),
        growth_interval=interval(growth(many)),
        num_points=len(points),
    )


def _undetermined(what: str) -> str:
    return (
        f"the points do not determine alpha and beta: {what} the bounds of the search, "
        f"{_LEAST:g} and {_MOST:g}"
    )


def _is_at_bound(exponents: Float64[np.ndarray, "*shape"]) -> np.ndarray:
    return (exponents < _LEAST * 1.01) | (exponents > _MOST / 1.01)


def _starts(size: Log, tokens: Log, y: Float64[np.ndarray, " points"]) -> Theta:
    """For each pair of exponents least squares, where it is positive."""
    starts = []
    for alpha in _STARTS:
        for beta in _STARTS:
            design = np.stack([np.ones_like(y), np.exp(-alpha * size), np.exp(-beta * tokens)], -1)
            terms = np.maximum(np.linalg.lstsq(design, y)[0], 0.01 * y.min())
            starts.append([*np.log(terms), alpha, beta])
    return np.array(starts)


def _predict(
    size: Log, tokens: Log, theta: Theta
) -> tuple[PerFit, Float64[np.ndarray, "fits points 5"]]:
    """log L, and its derivatives by theta."""
    logs = np.stack(
        [
            np.broadcast_to(theta[:, :1], (len(theta), len(size))),
            theta[:, 1:2] - theta[:, 3:4] * size,
            theta[:, 2:3] - theta[:, 4:] * tokens,
        ],
        axis=-1,
    )
    most = logs.max(axis=-1, keepdims=True)
    terms = np.exp(logs - most)
    total = terms.sum(axis=-1, keepdims=True)
    shares = terms / total
    by_exponents = -shares[:, :, 1:] * np.stack([size, tokens], axis=-1)
    predicted = (most + np.log(total))[:, :, 0]
    return predicted, np.concatenate([shares, by_exponents], axis=-1)


def _loss(residuals: PerFit) -> Float64[np.ndarray, " fits"]:
    size = np.abs(residuals)
    huber = np.where(size < _HUBER, size**2 / 2, _HUBER * (size - _HUBER / 2))
    return huber.sum(axis=-1)


def _solve(
    size: Log, tokens: Log, log: Float64[np.ndarray, "*fits points"], theta: Theta, num_steps: int
) -> Theta:
    """Levenberg and Marquardt's steps, many fits at once; large residuals are weighted down."""
    scale = float(np.mean(log))
    low = np.array([*[scale - _NEGLIGIBLE] * 3, _LEAST, _LEAST])
    high = np.array([*[scale + _NEGLIGIBLE] * 3, _MOST, _MOST])
    damping = np.full(len(theta), 1e-2)
    predicted, slopes = _predict(size, tokens, theta)
    residuals = predicted - log
    loss = _loss(residuals)
    for _ in range(num_steps):
        weighted = slopes / np.maximum(np.abs(residuals) / _HUBER, 1)[:, :, None]
        gradient = np.einsum("fpi,fp->fi", weighted, residuals)
        curvature = np.matmul(weighted.transpose(0, 2, 1), slopes)
        diagonal = np.einsum("fii->fi", curvature)  # a view
        diagonal *= 1 + damping[:, None]
        diagonal += 1e-12
        tried = np.clip(
            theta - np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0], low, high
        )
        predicted, tried_slopes = _predict(size, tokens, tried)
        tried_residuals = predicted - log
        tried_loss = _loss(tried_residuals)
        better = tried_loss < loss
        damping = np.clip(np.where(better, damping / 5, damping * 5), 1e-9, 1e9)
        theta = np.where(better[:, None], tried, theta)
        residuals = np.where(better[:, None], tried_residuals, residuals)
        slopes = np.where(better[:, None, None], tried_slopes, slopes)
        loss = np.where(better, tried_loss, loss)
    return theta
