"""The work of a pass through a stack of transformer blocks, and sums of passes by part."""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

from cola_train.flops.work import Backward, Extent, Linear, Parts, Work, attention, product
from cola_train.models.attention.tiles import row_tiles

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Block:
    """A transformer block."""

    width: int  # of the residual stream
    inner: int  # of all attention heads together
    mlp: tuple[Linear, ...]  # in order
    # Whether the last projection's output is added to the block's input as it is. No gradient needs
    # that output, so recomputing the block stops short of it.
    ends_with_product: bool


@dataclasses.dataclass(frozen=True)
class Span:
    """What a pass runs on, summed over rows."""

    positions: Extent
    pairs: Extent  # of query and key; useful are the visible ones
    # Positions whose last hidden state is read; of others the last block computes keys and values.
    outputs: Extent
    output_pairs: Extent  # whose query is one of these

    @classmethod
    def all_read(cls, positions: int, pairs: Extent) -> "Span":
        """Every position's output is read."""
        return cls(Extent.of(positions), pairs, Extent.of(positions), pairs)

    @classmethod
    def none_read(cls, positions: int, pairs: Extent) -> "Span":
        """Keys and values alone are read, as where a cache is filled."""
        return cls(Extent.of(positions), pairs, Extent(0, positions), Extent(0, pairs.executed))


def visible_pairs(length: int, block_size: int) -> int:
    """(query, key) pairs of a row of whole clean blocks: each sees itself and those before."""
    blocks = length // block_size
    assert blocks * block_size == length
    return block_size**2 * blocks * (blocks + 1) // 2


def row_pairs(length: int, block_size: int, documents: bool = False) -> Extent:
    """Visible pairs of a clean row, and those that kernels compute.

    The latter are whole tiles, or all pairs where one kernel needs no mask. `documents`: whether
    they are kept apart, which takes a mask.
    """
    whole = block_size in (1, length) and not documents
    executed = length**2 if whole else sum(tile.pairs for tile in row_tiles(length, block_size))
    return Extent(visible_pairs(length, block_size), executed)


def named(network: str, parts: Mapping[str, T]) -> dict[str, T]:
    """Parts with the network's name before theirs."""
    return {f"{network}.{name}": part for name, part in parts.items()}


def added(*several: Parts) -> Parts:
    """The parts of several passes, those of the same name summed."""
    total: Parts = {}
    for parts in several:
        for name, work in parts.items():
            total[name] = total.get(name, Work()) + work
    return total


def times(parts: Parts, count: int) -> Parts:
    """The same pass `count` times."""
    return {name: work * count for name, work in parts.items()}


def stack(block: Block, count: int, span: Span, backward: Backward) -> Parts:
    """`count` blocks, the last of which computes less where not all outputs are read."""
    inner = _block(block, span.positions, span.positions, span.pairs, backward)
    last = _block(block, span.positions, span.outputs, span.output_pairs, backward)
    return added(times(inner, count - 1), last)


def _block(
    block: Block, positions: Extent, outputs: Extent, pairs: Extent, backward: Backward
) -> Parts:
    width, inner = block.width, block.inner
    linear = product(Linear(width, 2 * inner), positions, backward)
    for layer in (Linear(width, inner), Linear(inner, width), *block.mlp[:-1]):
        linear += product(layer, outputs, backward)
    end = product(block.mlp[-1], outputs, backward)
    attended = attention(pairs, inner, backward)
    if backward.recomputes_blocks:
        linear, attended = linear.computed_again(), attended.computed_again()
        end = end if block.ends_with_product else end.computed_again()
    return {"linear": linear + end, "attention": attended}
