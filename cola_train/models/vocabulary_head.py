"""The vocabulary head, and its cross-entropy with the logits of only a few positions at a time.

At 100,278 classes the logits of 8 x 512 tokens are 1.6 GB in fp32, and autograd would keep them and
their gradient. Here a part of the positions goes through logits, loss and gradients before the next
one does; what the forward pass keeps is the gradients themselves, which the backward pass only
scales. The work is that of the plain way: three products of the head's size. In bf16 the weight's
gradient is summed over parts, and all gradients are scaled, in fp32.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# A number of parts, not a size, so that memory grows with the tokens alone: 8 x 512 tokens of a
# large vocabulary are in parts of 256. A small vocabulary has one part per _IDS_A_PART ids: more
# calls than that cost more than the logits.
PARTS, _IDS_A_PART = 16, 1024


class VocabularyHead(nn.Linear):
    """Hidden states to logits, or with targets to their loss; a call gathers sharded weights."""

    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, weights: Tensor | None = None
    ) -> Any:
        """Logits (*positions, vocab) of `hidden` (*positions, dim), or what `losses` returns."""
        if targets is None:
            return F.linear(hidden, self.weight, self.bias)
        assert weights is not None
        device, compute = hidden.device.type, self.weight.dtype
        if torch.is_autocast_enabled(device):
            compute = torch.get_autocast_dtype(device)
        flat, with_gradients = (targets.flatten(), weights.flatten()), torch.is_grad_enabled()
        with torch.autocast(device, enabled=False):
            return _HeadLoss.apply(  # type: ignore[no-untyped-call]
                hidden.flatten(0, -2), self.weight, self.bias, *flat, compute, with_gradients
            )

    def losses(
        self,
        hidden: Float[Tensor, "*positions dim"],
        targets: Int[Tensor, "*positions"],
        weights: Float[Tensor, "*positions"],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The weighted sum of -log p(target), nats, fp32, and the number of right predictions.

        Right: the target is the likeliest id; counted at positions of weight above 0.
        """
        return self(hidden, targets, weights)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        compute: torch.dtype,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        read, matrix = hidden.to(compute), weight.to(compute)
        nats, right = (hidden.new_zeros((), dtype=torch.float32) for _ in range(2))
        needs = [with_gradients and needed for needed in ctx.needs_input_grad[:3]]
        grad_hidden = torch.empty_like(read) if needs[0] else None
        grad_matrix = torch.zeros_like(matrix, dtype=torch.float32) if needs[1] else None
        grad_bias = None
        if bias is not None and needs[2]:
            grad_bias = bias.new_zeros(bias.shape, dtype=torch.float32)
        done, parts = 0, min(PARTS, max(1, len(weight) // _IDS_A_PART))
        split = (x.tensor_split(parts) for x in (read, targets, weights.float()))
        for part, target, scale in zip(*split, strict=True):
            if len(part) == 0:
                continue
            logits = F.linear(part, matrix, None if bias is None else bias.to(compute)).float()
            nats, right = _add_losses(logits, target, scale, nats, right)
            if any(needs):
                error = _error(logits, target, scale).to(compute)
                if grad_hidden is not None:
                    torch.mm(error, matrix, out=grad_hidden[done : done + len(part)])
                if grad_matrix is not None:
                    _add_product(grad_matrix, error, part, parts)
                if grad_bias is not None:
                    grad_bias += error.sum(0, dtype=torch.float32)
                del error
            done += len(part)
            # Else it would still be there while the next part's logits are made.
            del logits
        # Not by save_for_backward: what autograd also holds it copies into .grad.
        dtypes = (hidden.dtype, weight.dtype, weight.dtype)
        ctx.gradients = [
            None if found is None else found.to(dtype)
            for found, dtype in zip((grad_hidden, grad_matrix, grad_bias), dtypes, strict=True)
        ]
        ctx.mark_non_differentiable(right)
        return nats, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        if gradients is None:
            raise RuntimeError(
                "Trying to backward through the graph a second time: the vocabulary head's "
                "gradients went to the first backward pass. Give that one retain_graph=True."
            )
        # Gradients kept for another pass must not change; else they are scaled in place and given
        # away, at no memory. Only this private function tells the two cases apart before the graph
        # is freed.
        retained = torch._C._autograd._get_current_graph_task_keep_graph()
        if not retained:
            ctx.gradients = None
        scaled = [
            None if x is None else _scaled(x.clone() if retained else x, grad) for x in gradients
        ]
        return *scaled, None, None, None, None


def _add_product(total: Tensor, error: Tensor, part: Tensor, parts: int) -> None:
    """total += error^T part, each product of bf16 numbers rounded once; `total` is in fp32."""
    if error.dtype == total.dtype:
        torch.addmm(total, error.T, part, out=total)
        return
    # By ids, so that the product in bf16 is a small part of the total.
    for rows, errors in zip(total.tensor_split(parts), error.tensor_split(parts, 1), strict=True):
        rows += errors.T @ part


def _scaled(gradient: Tensor, scale: Tensor) -> Tensor:
    """The gradient times the scale, in place; in bf16 too by the scale itself, in fp32."""
    if gradient.dtype == scale.dtype:
        return gradient.mul_(scale)
    for part in gradient.tensor_split(PARTS):
        part.copy_(part.float().mul_(scale))
    return gradient


def _add_losses(
    logits: Tensor, target: Tensor, scale: Tensor, nats: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    """Add to both sums; `logits` become their exponentials, each row's largest 1."""
    largest, likeliest = logits.max(-1)
    right = right + ((likeliest == target) & (scale > 0)).sum()
    of_target = logits.gather(1, target[:, None])[:, 0] - largest
    logits.sub_(largest[:, None]).exp_()
    return nats + (scale * (logits.sum(-1).log() - of_target)).sum(), right


def _error(exponentials: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """The gradient of the loss by the logits, in place: scale (softmax - one-hot)."""
    exponentials.mul_((scale / exponentials.sum(-1))[:, None])
    return exponentials.scatter_add_(1, target[:, None], -scale[:, None])


def token_nats(
    logits: Float[Tensor, "batch seq vocab"], targets: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq"]:
    """-log p of each target, nats, in fp32."""
    nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return nats.unflatten(0, targets.shape)


def row_nats(
    head: Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "batch seq dim"],
    targets: Int[Tensor, "batch seq"],
) -> Float64[Tensor, "batch seq"]:
    """-log p of each target from the hidden state at its place, nats."""
    # Row by row: the logits of a batch over a real vocabulary would be gigabytes.
    rows = [token_nats(head(h[None]), t[None]) for h, t in zip(hidden, targets, strict=True)]
    return torch.cat(rows).double()
