"""Means that are added up batch by batch."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Tally:
    """Weighted means of values, apart for each of `size` groups; in fp64, so that the order of
    batches is not seen.
    """

    def __init__(self, size: int) -> None:
        self.total = torch.zeros(size, dtype=torch.float64)
        self.count = torch.zeros(size, dtype=torch.float64)

    def add(
        self,
        values: Float[Tensor, "*shape"] | Bool[Tensor, "*shape"],
        weights: Bool[Tensor, "*shape"],
        group: Tensor,
    ) -> None:
        """Add `values` where `weights` is True; `group`, of a shape that broadcasts to theirs, says
        to which mean each belongs.
        """
        at: Int[Tensor, " chosen"] = group.expand_as(values)[weights]
        size = self.total.shape[0]
        self.total += torch.bincount(at, weights=values[weights].double(), minlength=size).cpu()
        self.count += torch.bincount(at, minlength=size).cpu()

    def means(self) -> list[float]:
        """Each group's mean; NaN for one that nothing was added to."""
        return (self.total / self.count).tolist()

    def mean(self) -> float:
        """Of all groups together."""
        count = float(self.count.sum())
        return float(self.total.sum()) / count if count else math.nan
