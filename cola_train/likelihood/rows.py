"""Rows of tokens, what estimates their log p(x) or a bound, and the random draws it takes."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from cola_train.config.evaluation import MOST_SAMPLES
from cola_train.likelihood.importance import LogWeights
from cola_train.randomness import Purpose

# Addresses of one draw of a row: more than there are coordinates in a row of 2^18 latents of 16
# channels.
_STRIDE = 2**34 // MOST_SAMPLES
LikelihoodKind = Literal["exact", "bound", "ELBO"]
"""log p itself; draws whose mean bounds it; or draws of latents, of which the mean of logs bounds
it, and where log p(z_0) comes from a solver estimates that bound.
"""


@dataclasses.dataclass(frozen=True)
class ScoredRow:
    """Tokens whose likelihood is estimated.

    `key` is the address of the row's random draws, in [0, 2^63): rows of the same key share the
    draws of positions that both have.
    """

    tokens: Sequence[int]  # ids; padding among them carries no likelihood
    key: int
    documents: Sequence[int] | None = None  # of each token, where apart; None: one sequence
    given: int = 0  # that many first tokens are a condition; the likelihood is that of the others


class Draw(NamedTuple):
    """Draw `number`, from 0, of the row at index `row` in the list of rows."""

    row: int
    number: int


@runtime_checkable
class Estimator(Protocol):
    """log p of the rows that it was made for, or `num_draws` draws of each that bound it."""

    num_draws: int

    def width(self, row: int) -> int:
        """Tokens that the row at index `row` is computed with, or what else sets its cost.

        A call's draws have one width.
        """

    def __call__(self, draws: Sequence[Draw]) -> LogWeights | Float64[Tensor, " draws"]:
        """log w in its parts, or log p, of each draw, nats."""


def batches(widths: Sequence[int], num_draws: int, batch_size: int) -> Iterator[list[Draw]]:
    """All draws of all rows in batches of one width, the widest first, a row's draws in sequence.

    So no row is padded to another's width, and the first batch shows what memory and time it takes.
    """
    for width in sorted(set(widths), reverse=True):
        rows = [row for row, row_width in enumerate(widths) if row_width == width]
        draws = [Draw(row, number) for row in rows for number in range(num_draws)]
        for start in range(0, len(draws), batch_size):
            yield draws[start : start + batch_size]


def draws_at(
    draw: Callable[..., Tensor],
    seed: int,
    purpose: Purpose,
    rows: Sequence[ScoredRow],
    draws: Sequence[Draw],
    count: int,
    device: torch.device,
) -> Float[Tensor, "draws count"]:
    """`count` values of `draw` (`uniform` or `normal`) a draw; a larger count only adds to them."""
    assert count <= _STRIDE
    keys = torch.tensor([rows[row].key for row, _ in draws], device=device)
    starts = torch.tensor([number * _STRIDE for _, number in draws], device=device)
    found: Tensor = draw(seed, purpose, keys, count, starts)
    return found
