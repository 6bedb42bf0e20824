"""Attention that leaves out most of the pairs of a query and a key that it may not see.

A packed training row has a quarter of its pairs visible. Cut along its diagonals (tiles.py), two
fifths are computed at 512 latents. On a CPU each tile is one call of the fused kernel; on a GPU
FlexAttention leaves out blocks of such pairs. What is visible inside a tile is decided by the one
predicate (masks.py).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from cola_train.models.attention.masks import (
    TokenLayout,
    clean_layout,
    is_visible,
    packed_layout,
    visible_set_mask,
)
from cola_train.models.attention.rows import Attention, LayerAttention, RowAttention
from cola_train.models.attention.tiles import Span, Tile, packed_tiles, row_tiles

_aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class TiledAttention:
    """Attention within each row, tile by tile, on a CPU."""

    tiles: tuple[Tile, ...]
    # (#batch, 1, queries, keys) of each tile: 0 where visible, else -inf
    biases: tuple[Tensor, ...]

    @classmethod
    def over(cls, tiles: list[Tile], places: TokenLayout) -> "TiledAttention":
        """`tiles` of a row whose positions are `places`."""
        biases = []
        for tile in tiles:
            visible = visible_set_mask(_part(places, (tile.queries,)), _part(places, tile.keys))
            bias = torch.zeros(visible.shape, device=visible.device)
            biases.append(bias.masked_fill(~visible, -torch.inf)[:, None])
        return cls(tuple(tiles), tuple(biases))

    def layer(self, index: int) -> LayerAttention:
        return self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # The CPU's backward kernel is five times slower in bf16 than in fp32.
        with torch.autocast("cpu", enabled=False):
            out: Tensor = _TiledAttention.apply(  # type: ignore[no-untyped-call]
                q.float(), k.float(), v.float(), self.tiles, *self.biases
            )
        return out.to(q.dtype)


class _TiledAttention(torch.autograd.Function):
    """The CPU's fused kernel by tiles; gradients of keys add up in place, not in copies of rows."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: tuple[Tile, ...], *biases: Tensor
    ) -> Tensor:
        outs, sums = [], []
        for tile, bias in zip(tiles, biases, strict=True):
            if tile.queries[0] >= q.shape[2]:
                break
            keys, values = _spans_of(k, tile.keys), _spans_of(v, tile.keys)
            queries = q[:, :, slice(*tile.queries)]
            out, log_sum = _aten._scaled_dot_product_flash_attention_for_cpu(
                queries, keys, values, 0.0, False, attn_mask=_whole(bias, q)
            )
            outs.append(out.transpose(1, 2))
            sums.append(log_sum)
        out = torch.cat(outs, dim=1).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, *sums, *biases[: len(sums)])
        ctx.tiles = tiles[: len(sums)]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *rest = ctx.saved_tensors
        sums, biases = rest[: len(ctx.tiles)], rest[len(ctx.tiles) :]
        grad_q = torch.empty_like(q)
        grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
        for tile, log_sum, bias in zip(ctx.tiles, sums, biases, strict=True):
            at = slice(*tile.queries)
            keys, values = _spans_of(k, tile.keys), _spans_of(v, tile.keys)
            given = (grad[:, :, at], q[:, :, at], keys, values, out[:, :, at], log_sum)
            grad_queries, *parts = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *given, 0.0, False, attn_mask=_whole(bias, q)
            )
            grad_q[:, :, at] = grad_queries
            taken = 0
            for start, end in tile.keys:
                part = slice(taken, taken + end - start)
                grad_k[:, :, start:end] += parts[0][:, :, part]
                grad_v[:, :, start:end] += parts[1][:, :, part]
                taken += end - start
        return grad_q, grad_k, grad_v, None, *(None for _ in ctx.needs_input_grad[4:])


def _whole(bias: Tensor, q: Tensor) -> Tensor:
    return bias.expand(q.shape[0], q.shape[1], -1, -1)


def _spans_of(x: Tensor, spans: tuple[Span, ...]) -> Tensor:
    parts = [x[:, :, start:end] for start, end in spans]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)


def _part(places: TokenLayout, spans: tuple[Span, ...]) -> TokenLayout:
    return places.map(lambda x: torch.cat([x[:, start:end] for start, end in spans], dim=1))


@dataclasses.dataclass(frozen=True)
class FlexAttention:
    """Attention within each row under the one predicate, on a GPU, by blocks of a mask."""

    rows: BlockMask
    outputs: BlockMask  # for the first positions alone, whose results the last layer's readers want

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


def row_attention(
    seq: int, block_size: int, document: Int[Tensor, "batch seq"] | None, device: torch.device
) -> Attention:
    """Attention in clean rows: a position sees its own block and earlier ones, of its document."""
    if document is None and block_size in (1, seq):
        return RowAttention(None, causal=block_size == 1)
    make = _static_row if document is None else _row
    return make(seq, block_size, document, device)


def packed_attention(
    num_latents: int,
    block_size: int,
    document: Int[Tensor, "batch latents"] | None,
    sees_history: Bool[Tensor, "batch noised"] | None,
    device: torch.device,
    copies: int = 1,
) -> Attention:
    """Attention in training rows (`masks.packed_layout`)."""
    make = _static_packed if document is None and sees_history is None else _packed
    return make(num_latents, block_size, document, sees_history, device, copies)


def _row(seq: int, block_size: int, document: Tensor | None, device: torch.device) -> Attention:
    places = clean_layout(seq, block_size, document, device)
    return _over(row_tiles(seq, block_size), places, seq)


def _packed(
    num_latents: int,
    block_size: int,
    document: Tensor | None,
    sees_history: Tensor | None,
    device: torch.device,
    copies: int,
) -> Attention:
    places = packed_layout(num_latents, block_size, document, sees_history, device, copies)
    return _over(packed_tiles(num_latents, block_size, copies), places, copies * num_latents)


# Rows of a run have one length: masks without documents are made once, and may be read with
# gradients later even where they were first needed without.
_static_row = functools.lru_cache(maxsize=4)(torch.inference_mode(False)(_row))
_static_packed = functools.lru_cache(maxsize=4)(torch.inference_mode(False)(_packed))


def forget_masks() -> None:
    """Make masks anew from here on: a dry run's have no numbers, and it cannot use real ones."""
    _static_row.cache_clear()
    _static_packed.cache_clear()


def _over(tiles: list[Tile], places: TokenLayout, outputs: int) -> Attention:
    """`outputs`: how many positions' results the last layer's readers want."""
    if places.block.device.type == "cuda":
        return FlexAttention(block_mask(places, places.block.shape[1]), block_mask(places, outputs))
    return TiledAttention.over(tiles, places)
