"""What a network attends over, given as an argument: a row in training, cached history in sampling.

Nothing is kept on modules.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


@runtime_checkable
class LayerAttention(Protocol):
    """Softmax attention of one layer with scale 1/sqrt(head_dim); q, k already normed and rotated.

    q is (batch, heads, queries, head_dim), k and v are (batch, heads, seq, head_dim), the result
    has q's shape. queries < seq: q holds the first positions alone, since only they are read.
    """

    def __call__(
        self,
        q: Float[Tensor, "batch heads queries head_dim"],
        k: Float[Tensor, "batch heads seq head_dim"],
        v: Float[Tensor, "batch heads seq head_dim"],
    ) -> Float[Tensor, "batch heads queries head_dim"]: ...


@runtime_checkable
class Attention(Protocol):
    """What all layers of a network attend over."""

    def layer(self, index: int) -> LayerAttention:
        """What layer `index` attends over."""


@dataclasses.dataclass(frozen=True)
class RowAttention:
    """Attention in each row under a boolean mask (True: visible); kernels are faster without."""

    visible: Bool[Tensor, "#batch 1 seq seq"] | None
    causal: bool = False  # without a mask: each position sees those up to itself, or all

    def layer(self, index: int) -> LayerAttention:
        return self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        visible = None if self.visible is None else self.visible[:, :, : q.shape[2]]
        if q.device.type == "cpu":
            # The CPU's backward kernel is five times slower in bf16 than in fp32.
            with torch.autocast("cpu", enabled=False):
                out = F.scaled_dot_product_attention(
                    q.float(), k.float(), v.float(), attn_mask=visible, is_causal=self.causal
                )
            return out.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=self.causal)
