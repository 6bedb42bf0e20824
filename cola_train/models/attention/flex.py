"""Attention of rows on a GPU: FlexAttention, whose block masks leave out what no query sees."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from cola_train.models.attention.masks import TokenLayout, is_visible
from cola_train.models.attention.rows import LayerAttention


@dataclasses.dataclass(frozen=True)
class FlexAttention:
    """Attention within each row under the one predicate.

    q is (batch, heads, queries, head_dim), k and v (batch, heads, seq, head_dim).
    """

    rows: BlockMask
    outputs: BlockMask  # for the first positions alone, whose results the last layer's readers want

    @classmethod
    def over(cls, places: TokenLayout, outputs: int) -> "FlexAttention":
        """Attention in rows of this layout; the first `outputs` results of the last layer count."""
        return cls(block_mask(places, places.block.shape[1]), block_mask(places, outputs))

    def layer(self, index: int) -> LayerAttention:
        return self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = self.rows if q.shape[2] == k.shape[2] else self.outputs
        # Uncompiled it would compute every pair. Inside a compiled block it becomes a part of that.
        run: Any = flex_attention if torch.compiler.is_compiling() else _compiled()
        out: Tensor = run(q, k, v, block_mask=mask)
        return out


def block_mask(places: TokenLayout, queries: int) -> BlockMask:
    """The predicate for the first `queries` positions over all, by blocks of 128 x 128."""
    fields = (places.block, places.document, places.sees_history)
    rows = max(len(x) for x in fields if x is not None)
    seq = places.block.shape[1]

    def at(row: Tensor, position: Tensor) -> TokenLayout:
        # A field that is the same for all rows has one.
        return places.map(lambda x: x[row if x.shape[0] > 1 else 0, position])

    # A lambda: torch reads the number of its arguments, which checked functions hide.
    predicate = lambda row, _head, query, key: is_visible(at(row, query), at(row, key))  # noqa: E731
    return create_block_mask(
        predicate, rows if rows > 1 else None, None, queries, seq, device=str(places.block.device)
    )


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)
