"""The one way tests compare tensors."""

import numpy as np
import torch
from torch import Tensor

from cola_train.models.attention.masks import TokenLayout, visible_set_mask
from cola_train.models.attention.rows import RowAttention


def assert_near(actual: Tensor, expected: Tensor | np.ndarray, tolerance: float = 1e-5) -> None:
    """Equal shapes, and absolute differences within `tolerance`."""
    expected = torch.as_tensor(expected)
    torch.testing.assert_close(
        actual.detach().double(), expected.detach().double(), rtol=0, atol=tolerance
    )


def largest_difference(one: Tensor, other: Tensor) -> float:
    return float((one.detach() - other.detach()).abs().max())


def number(scalar: Tensor) -> float:
    return float(scalar.detach())


def every_pair(places: TokenLayout) -> RowAttention:
    """Attention that computes every pair, under the mask of the one predicate."""
    return RowAttention(visible_set_mask(places, places)[:, None])
