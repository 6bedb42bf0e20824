"""Attention of samplers over the keys and values of positions that went through before."""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from cola_train.models.attention.rows import LayerAttention


class KVCache:
    """Keys and values of committed positions, per row as many as that row has; preallocated.

    A pass writes its own positions behind each row's committed ones and attends over both. They
    stay only if the caller then commits them: the next pass overwrites what was not committed. So
    denoising steps leave no trace.

    `keys` and `values` are (num_layers, batch, capacity, heads, head_dim). Rows in use are the
    first `len(lengths)` of these; `lengths` are their committed positions.
    """

    def __init__(
        self, num_layers: int, batch: int, capacity: int, heads: int, head_dim: int, like: Tensor
    ) -> None:
        """An empty cache on the device of `like` and of its type."""
        shape = (num_layers, batch, capacity, heads, head_dim)
        self.keys = torch.zeros(shape, device=like.device, dtype=like.dtype)
        self.values = torch.zeros_like(self.keys)
        self.lengths = [0] * batch
        self.allocated_rows = batch
        self.capacity = capacity  # positions that a row can hold, uncommitted ones included

    def commit(self, added: Sequence[int]) -> None:
        """Keep the first `added[row]` positions that the last pass wrote."""
        self.lengths = [length + more for length, more in zip(self.lengths, added, strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows (increasing), moved up in order; uncommitted positions are lost."""
        for place, row in enumerate(rows):
            if place != row:
                for held in (self.keys, self.values):
                    held[:, place, : self.lengths[row]] = held[:, row, : self.lengths[row]]
        self.lengths = [self.lengths[row] for row in rows]

    def append(self, other: "KVCache") -> None:
        """Add the rows of another cache behind those in use, with their committed positions."""
        first, last = len(self.lengths), len(self.lengths) + len(other.lengths)
        width = max(other.lengths)
        assert last <= self.allocated_rows, f"cache of {self.allocated_rows} rows, {last} needed"
        assert width <= self.capacity
        for held, theirs in ((self.keys, other.keys), (self.values, other.values)):
            held[:, first:last, :width] = theirs[:, : len(other.lengths), :width]
        self.lengths = [*self.lengths, *other.lengths]


class CachedAttention:
    """Attention of new positions over a cache's committed ones and one another, until a commit.

    Rows of q, k and v beyond the cache's are the unconditional branch: they see one another alone,
    and share the linear layers' batch.
    """

    def __init__(
        self, cache: KVCache, new: Bool[Tensor, "seq seq"] | int, *, fixed_shapes: bool = False
    ) -> None:
        """Prepare passes; they may be any number until the cache's next commit.

        `new` says which of the new positions see which, (query, key), True is visible; or how many
        there are, all of which see all. With `fixed_shapes` all of the cache that is allocated is
        attended over, under a mask, so that a compiled pass fits every block.
        """
        seq, inside = (new, None) if isinstance(new, int) else (new.shape[0], new)
        needed = max(cache.lengths) + seq
        assert needed <= cache.capacity, f"cache of {cache.capacity} positions, {needed} needed"
        self.cache, self.inside = cache, inside
        lengths = list(cache.lengths)
        if fixed_shapes:
            lengths += [0] * (cache.allocated_rows - len(lengths))
        self.batch, self.span = len(lengths), cache.capacity if fixed_shapes else needed
        # Rows of one length are written as a slice, and see all that there is: no mask, which makes
        # kernels faster.
        self.start = lengths[0] if len(set(lengths)) == 1 and not fixed_shapes else None
        device = cache.keys.device
        starts = torch.tensor(lengths, device=device)
        # The position of each new one in its row.
        self.slots: Int[Tensor, "batch seq"] = starts[:, None] + torch.arange(seq, device=device)
        self.rows = torch.arange(self.batch, device=device)[:, None]
        unmasked = self.start is not None and inside is None
        self.visible = None if unmasked else self._mask(starts[:, None, None], seq, inside)

    def _mask(
        self, starts: Tensor, seq: int, inside: Tensor | None
    ) -> Bool[Tensor, "batch 1 seq span"]:
        offset = torch.arange(self.span, device=starts.device) - starts  # (batch, 1, span)
        new = (offset >= 0) & (offset < seq)
        if inside is None:
            inside = torch.ones(seq, seq, dtype=torch.bool, device=starts.device)
        allowed = inside[:, offset.clamp(0, seq - 1)[:, 0]].transpose(0, 1)  # (batch, seq, span)
        return ((offset < 0) | (new & allowed))[:, None]

    def layer(self, index: int) -> LayerAttention:
        return functools.partial(self._attend, self.cache.keys[index], self.cache.values[index])

    def _attend(self, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, queries = self.batch, q.shape[2]
        self._write(keys, k[:batch].transpose(1, 2))
        self._write(values, v[:batch].transpose(1, 2))
        if queries == 0:
            return torch.zeros_like(q)
        seen_k, seen_v = (
            held[:batch, : self.span].transpose(1, 2).to(q.dtype) for held in (keys, values)
        )
        visible = None if self.visible is None else self.visible[:, :, :queries]
        out = F.scaled_dot_product_attention(q[:batch], seen_k, seen_v, attn_mask=visible)
        if q.shape[0] == batch:
            return out
        inside = None if self.inside is None else self.inside[:queries]
        alone = F.scaled_dot_product_attention(q[batch:], k[batch:], v[batch:], attn_mask=inside)
        return torch.cat([out, alone])

    def _write(self, held: Tensor, new: Tensor) -> None:
        """Write `new` (batch, seq, heads, head_dim) into a layer's keys or values."""
        if self.start is not None:
            held[: self.batch, self.start : self.start + new.shape[1]] = new
        else:
            held[self.rows, self.slots] = new.to(held.dtype)
