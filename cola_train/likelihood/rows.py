"""Rows of tokens whose likelihood is asked for, and the draws that go with them."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cola_train.config.likelihood import MOST_SAMPLES
from cola_train.randomness import Purpose

# Addresses of one draw of a row: more than there are coordinates in a row of 2^18 latents of 16
# channels.
_STRIDE = 2**34 // MOST_SAMPLES


@dataclasses.dataclass(frozen=True)
class ScoredRow:
    """Tokens whose likelihood is asked for.

    Attributes:
        tokens: ids; padding among them carries no likelihood.
        key: the address of the row's random draws, in [0, 2^63). Rows of the same key share the
            draws of places that they both have.
        documents: of each token, where documents are apart (`mask_documents`); None where the row
            is one sequence.
        given: so many tokens at the beginning are given: what is asked for is the likelihood of the
            others after them.
    """

    tokens: Sequence[int]
    key: int
    documents: Sequence[int] | None = None
    given: int = 0


class Draw(NamedTuple):
    """Draw `number`, from 0, of row `row`, by its place in the list of rows."""

    row: int
    number: int


def batches(widths: Sequence[int], num_draws: int, batch_size: int) -> Iterator[list[Draw]]:
    """All draws of all rows in batches whose rows have one width, the widest first, a row's draws
    one after the other.

    So no row is padded to another's width, and the first batch shows what memory and time it takes.
    """
    for width in sorted(set(widths), reverse=True):
        draws = [
            Draw(row, number)
            for row, w in enumerate(widths)
            if w == width
            for number in range(num_draws)
        ]
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
    """`count` values of `draw` (`uniform` or `normal`) for each of `draws`, the first ones the same
    whatever `count` is.
    """
    assert count <= _STRIDE
    keys = [torch.tensor([rows[number].key], device=device) for number, _ in draws]
    return torch.cat(
        [
            draw(seed, purpose, key, count, number * _STRIDE)
            for key, (_, number) in zip(keys, draws, strict=True)
        ]
    )
