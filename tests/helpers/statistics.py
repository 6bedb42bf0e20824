"""Goodness of fit, with thresholds that a right sample misses about once in a million draws of the
seed.
"""

import torch
from torch import Tensor


def assert_distribution(draws: Tensor, cumulative: Tensor) -> None:
    """Kolmogorov-Smirnov: `cumulative` is the expected distribution function at each of `draws`."""
    count = draws.numel()
    order = draws.flatten().argsort()
    expected = cumulative.flatten().double()[order]
    below, upto = torch.arange(count) / count, torch.arange(1, count + 1) / count
    distance = float(torch.maximum((expected - below).abs(), (expected - upto).abs()).max())
    # P(sqrt(n) D > 2.7) = 2 exp(-2 x 2.7^2), about 1e-6.
    assert distance * count**0.5 < 2.7


def assert_shares(counts: Tensor, shares: Tensor) -> None:
    """Chi-square: `counts` were drawn with probabilities `shares`, none of them tiny beside the
    number of draws.
    """
    expected = shares.double() / shares.sum() * counts.sum()
    assert expected.min() > 5
    statistic = float(((counts - expected) ** 2 / expected).sum())
    # Wilson and Hilferty's approximation of the chi-square's upper 1e-6 point (4.75 standard
    # deviations).
    freedom = len(counts) - 1
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 4.75 * (2 / (9 * freedom)) ** 0.5) ** 3


def assert_uncorrelated(one: Tensor, other: Tensor) -> None:
    """Pearson's correlation of as many draws is normal with deviation 1 / sqrt(n) where there is
    none.
    """
    one, other = (x.flatten().double() - x.double().mean() for x in (one, other))
    correlation = float((one * other).mean() / (one.std() * other.std()))
    assert abs(correlation) * one.numel() ** 0.5 < 5
