"""What a block attends over, as an argument: a masked row in training, cached history in sampling. Nothing is kept on modules."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cola_train.models.masks import Places, visible_set_mask


@runtime_checkable
class Attention(Protocol):
    """Softmax attention of layer `layer` with scale 1/sqrt(head_dim); q, k already normed and rotated."""

    def __call__(
        self,
        layer: int,
        q: Float[Tensor, "batch heads seq head_dim"],
        k: Float[Tensor, "batch heads seq head_dim"],
        v: Float[Tensor, "batch heads seq head_dim"],
    ) -> Float[Tensor, "batch heads seq head_dim"]:
        """The attended values."""
        ...


@dataclasses.dataclass(frozen=True)
class RowAttention:
    """Attention inside each row, under a boolean mask (True is visible), or without one: kernels are faster so."""

    visible: Bool[Tensor, "#batch 1 seq seq"] | None
    causal: bool = False  # without a mask: each position sees those up to itself, or all

    @classmethod
    def from_places(cls, places: Places) -> "RowAttention":
        """The mask of the one predicate."""
        return cls(visible_set_mask(places, places)[:, None])

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attention`."""
        if q.device.type == "cpu":
            # The CPU's backward kernel is five times slower in bf16 than in fp32.
            with torch.autocast("cpu", enabled=False):
                out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=self.visible, is_causal=self.causal)
            return out.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.visible, is_causal=self.causal)


class KVCache:
    """Keys and values of committed positions, per row as many as that row has; preallocated.

    A pass writes its own positions behind each row's committed ones and attends over both. They stay only if the caller
    then commits them: the next pass overwrites what was not committed. So denoising steps leave no trace.

    Attributes:
        lengths: committed positions of each row.
    """

    def __init__(
        self, num_layers: int, batch: int, capacity: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (num_layers, batch, capacity, heads, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = [0] * batch

    @property
    def capacity(self) -> int:
        """Positions that a row can hold, uncommitted ones included."""
        return self.keys.shape[2]

    def commit(self, added: Sequence[int]) -> None:
        """Keep the first `added[row]` positions that the last pass wrote."""
        self.lengths = [length + more for length, more in zip(self.lengths, added, strict=True)]

    def positions(self, seq: int) -> Int[Tensor, "batch seq"]:
        """The positions that a pass over `seq` new ones takes in each row."""
        starts = torch.tensor(self.lengths, device=self.keys.device)
        return starts[:, None] + torch.arange(seq, device=self.keys.device)


class CachedAttention:
    """Attention of new positions over the cache's committed ones and, under `inside`, over one another.

    Rows beyond the cache's are the unconditional branch: they see one another alone, and share the linear layers' batch.
    """

    def __init__(self, cache: KVCache, inside: Bool[Tensor, "seq seq"]) -> None:
        """`inside`: which of the new positions see which (True is visible)."""
        seq = inside.shape[0]
        span = max(cache.lengths) + seq
        assert span <= cache.capacity, f"cache of {cache.capacity} positions, {span} needed"
        self.cache, self.span, self.inside = cache, span, inside
        self.slots = cache.positions(seq)
        starts = self.slots[:, :1, None]  # (batch, 1, 1)
        slot = torch.arange(span, device=self.slots.device)[None, None, :]
        offset = slot - starts
        new = (offset >= 0) & (offset < seq)
        allowed = inside[:, offset.clamp(0, seq - 1)[:, 0]].transpose(0, 1)  # (batch, seq, span)
        self.visible = ((offset < 0) | (new & allowed))[:, None]
        self.rows = torch.arange(self.slots.shape[0], device=self.slots.device)[:, None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attention`."""
        batch = len(self.cache.lengths)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.rows, self.slots] = k[:batch].transpose(1, 2).to(keys.dtype)
        values[self.rows, self.slots] = v[:batch].transpose(1, 2).to(values.dtype)
        seen_k, seen_v = (x[:, : self.span].transpose(1, 2).to(q.dtype) for x in (keys, values))
        out = F.scaled_dot_product_attention(q[:batch], seen_k, seen_v, attn_mask=self.visible)
        if q.shape[0] == batch:
            return out
        alone = F.scaled_dot_product_attention(q[batch:], k[batch:], v[batch:], attn_mask=self.inside)
        return torch.cat([out, alone])
