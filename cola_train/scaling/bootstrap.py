"""The uncertainty of a fit to few points: the residual bootstrap."""

import numpy as np
from jaxtyping import Float64

from cola_train.bootstrap import Interval, bootstrap_generator, percentile_interval

LEVEL = 0.9  # of all intervals
_NUM_RESAMPLES = 1000


def resample(
    values: Float64[np.ndarray, " points"],
    fitted: Float64[np.ndarray, " points"],
    num_parameters: int,
) -> Float64[np.ndarray, "resamples points"]:
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


def interval(resamples: Float64[np.ndarray, " resamples"]) -> Interval:
    """The percentile interval; resamples of what the points do not determine may be infinite."""
    return percentile_interval(resamples, LEVEL, "inverted_cdf")
