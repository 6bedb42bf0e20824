"""How uncertain a metric is, by resampling: what all bootstraps share, and which serves where.

- A fit to a few points resamples residuals (scaling/power_law.py): with so few points, drawing the
  points themselves often leaves too few different ones to fit.
- A curve over model size draws its shape, noise and parameters instead (scaling/size_curve.py): few
  points leave the shape open, and a resample fitted with one shape says nothing of that.
- An accuracy resamples a benchmark's samples, which makes the number of correct ones binomial
  (evaluation/benchmarks/results.py).
- A metric of generated text resamples the openings that the text continues, since tokens of one
  continuation depend on each other: to first order, by how much of the metric is due to each
  (evaluation/writing/statistics.py). It is given with a standard error, the standard deviation of
  the resamples. A difference of two models is resampled in pairs, and has an interval.

The draws are the same each time, so an interval that is computed again is the same to the bit.
"""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float64

_SEED = 0


class Interval(NamedTuple):
    """The ends of a confidence interval; infinite where it is open."""

    low: float
    high: float

    def to_json(self) -> list[float | None]:
        """Two numbers; null for an open end."""
        return [end if np.isfinite(end) else None for end in self]


def bootstrap_generator(*address: int) -> np.random.Generator:
    """The source of a bootstrap's draws; other addresses of the same length give independent ones.

    Zeros at the end of an address change nothing: numpy's seeds ignore them.
    """
    return np.random.default_rng([_SEED, *address])


def percentile_interval(
    resamples: Float64[np.ndarray, " resamples"],
    level: float,
    method: Literal["linear", "inverted_cdf"] = "linear",
) -> Interval:
    """What holds the middle `level` (in (0, 1)) of the resamples (Efron's percentile interval).

    `method` is np.quantile's. "linear" interpolates between two resamples; "inverted_cdf" gives
    values that were drawn, as it must be where resamples may be infinite: between a number and
    infinity there is nothing to interpolate.
    """
    low, high = np.quantile(resamples, [(1 - level) / 2, (1 + level) / 2], method=method)
    return Interval(float(low), float(high))
