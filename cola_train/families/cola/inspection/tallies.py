"""Means by group and how sure they are, added up batch by batch."""

import dataclasses
import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from cola_train.bootstrap import bootstrap_generator, percentile_interval

_NUM_RESAMPLES = 1000
_LEVEL = 0.95


class Tally:
    """The mean of values for each of `size` groups, in fp64: the order of batches is not seen."""

    def __init__(self, size: int) -> None:
        self.total = torch.zeros(size, dtype=torch.float64)
        self.count = torch.zeros(size, dtype=torch.float64)

    def add(
        self,
        values: Float[Tensor, "*shape"] | Bool[Tensor, "*shape"],
        counted: Bool[Tensor, "*shape"],
        group: Tensor,
    ) -> None:
        """Add `values` where `counted`, each to the mean that `group` (broadcast) names."""
        at: Int[Tensor, " chosen"] = group.expand_as(values)[counted]
        size = self.total.shape[0]
        self.total += torch.bincount(at, weights=values[counted].double(), minlength=size).cpu()
        self.count += torch.bincount(at, minlength=size).cpu()

    def means(self) -> list[float]:
        """Each group's mean; NaN for one that nothing was added to."""
        return (self.total / self.count).tolist()

    def mean(self) -> float:
        """The mean over all groups together; NaN if nothing was added."""
        count = float(self.count.sum())
        return float(self.total.sum()) / count if count else math.nan


def paired_gain(
    difference: Float[Tensor, " rows"], count: Float[Tensor, " rows"]
) -> tuple[float, float]:
    """Mean difference per latent, and its standard error over rows.

    `difference` is each row's sum over `count` latents; the error is that of a ratio of sums, to
    first order.
    """
    gain = float(difference.sum() / count.sum())
    rest = difference - gain * count
    rows = len(count)
    return gain, math.sqrt(float(rest.square().sum()) * rows / (rows - 1)) / float(count.sum())


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over rows, its standard error, and what holds the middle 95 % of resampled ones."""

    mean: float
    standard_error: float
    low: float
    high: float


def resampled_means(
    sums: Float64[np.ndarray, "rows groups"], counts: Float64[np.ndarray, "rows groups"]
) -> list[Estimate]:
    """Each group's mean of values, of which each row has `counts` with the sum `sums`.

    Differences of two models are paired by being summed as such. The bootstrap draws rows with all
    that is of them: latents of a row depend on each other. NaN for a group that nothing is in.
    """
    rows = len(sums)
    draws = bootstrap_generator().multinomial(rows, np.full(rows, 1 / rows), size=_NUM_RESAMPLES)
    with np.errstate(invalid="ignore"):
        means = sums.sum(0) / counts.sum(0)
        resampled = (draws @ sums) / (draws @ counts)
    found = []
    for mean, column in zip(means.tolist(), resampled.T, strict=True):
        # A small group may be in none of the rows that were drawn.
        drawn = column[np.isfinite(column)]
        ends = percentile_interval(drawn, _LEVEL) if len(drawn) else (math.nan, math.nan)
        error = float(drawn.std()) if len(drawn) else math.nan
        found.append(Estimate(mean, error, *ends))
    return found
