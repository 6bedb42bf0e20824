"""Means that are added up batch by batch."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


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
