"""How uncertain a fit to few points is: the residual bootstrap."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

LEVEL = 0.9  # of all intervals
_NUM_RESAMPLES = 1000
_SEED = 0


class Interval(NamedTuple):
    """What holds the middle 90% of the bootstrap; infinite where that has no end."""

    low: float
    high: float

    def to_json(self) -> list[float | None]:
        """Two numbers; null for an end that there is not."""
        return [end if np.isfinite(end) else None for end in self]


def resample(
    values: Float64[np.ndarray, " points"], fitted: Float64[np.ndarray, " points"], num_parameters: int
) -> Float64[np.ndarray, "resamples points"]:
    """Values as they might have been measured: the fit, and residuals drawn with replacement.

    Cases are not resampled: of five points, a draw often holds three different ones, on which the fit says nothing. Residuals of a
    fit are smaller than the noise, so they are scaled by sqrt(n / (n - p)). How large the noise is they say only roughly, so each
    resample has another scale, with n - p degrees of freedom, as in Student's t. Without that, 90% intervals of a power law hold
    the truth 60% of the time at 4 points and 80% at 8.

    The noise is taken to be the same at all points and independent between them. The same draws come out each time.
    """
    num_points = len(values)
    freedom = num_points - num_parameters
    assert freedom > 0
    generator = np.random.default_rng(_SEED)
    residuals = values - fitted
    residuals = (residuals - residuals.mean()) * np.sqrt(num_points / freedom)
    scale = np.sqrt(freedom / generator.chisquare(freedom, size=(_NUM_RESAMPLES, 1)))
    return fitted + scale * residuals[generator.integers(num_points, size=(_NUM_RESAMPLES, num_points))]


def interval(resamples: Float64[np.ndarray, " resamples"]) -> Interval:
    """The percentile interval."""
    # Values that were drawn, not means of two: these may be infinite.
    low, high = np.quantile(resamples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    return Interval(float(low), float(high))
