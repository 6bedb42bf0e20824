"""What a few seeds say of a trial: means, with intervals where there are seeds enough."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

FEWEST = 3  # seeds for an interval; with two it would be 9 standard deviations wide
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class SeedMean:
    """A mean over seeds; `half_width` is that of its 95 % interval, None below 3 seeds."""

    mean: float
    half_width: float | None
    num_seeds: int


def over_seeds(values: Sequence[float]) -> SeedMean | None:
    """The mean, with Student's interval: mean ± t(n - 1) s / sqrt(n); None without values.

    It covers if a figure is normally distributed over seeds.
    """
    count = len(values)
    if count == 0:
        return None
    mean = math.fsum(values) / count
    if count < FEWEST:
        return SeedMean(mean, None, count)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half_width = student_quantile(LEVEL, count - 1) * math.sqrt(variance / count)
    return SeedMean(mean, half_width, count)


def less(ours: Mapping[int, float], theirs: Mapping[int, float]) -> SeedMean | None:
    """The mean of `ours` less `theirs`, paired over the seeds that both have; None without one."""
    return over_seeds([value - theirs[seed] for seed, value in ours.items() if seed in theirs])


def student_quantile(level: float, degrees: int) -> float:
    """The t that |T| stays below with probability `level`, T being Student's of these degrees.

    By bisection of the closed form for whole degrees (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    low, high = 0.0, math.pi / 2  # of atan(t / sqrt(degrees))
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < level else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _within(angle: float, degrees: int) -> float:
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = degrees % 2 == 1
    term, total = (cosine, 0.0) if is_odd else (1.0, 0.0)
    for k in range(1, degrees // 2 + 1):
        total += term
        term *= cosine**2 * (2 * k / (2 * k + 1) if is_odd else (2 * k - 1) / (2 * k))
    return 2 / math.pi * (angle + sine * total) if is_odd else sine * total
