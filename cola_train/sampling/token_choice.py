"""Logits to ids: repetition penalty; then greedy, or temperature, top-k, top-p, addressed draws."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import require


def penalize_repetition(
    logits: Float[Tensor, "batch seq vocab"], seen: Bool[Tensor, "batch vocab"], penalty: float
) -> Float[Tensor, "batch seq vocab"]:
    """Logits of `seen` ids: above 0 divided by the penalty, else multiplied (method, 6.3)."""
    if penalty == 1.0:
        return logits
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen[:, None, :], penalized, logits)


def choose_tokens(
    logits: Float[Tensor, "batch seq vocab"],
    config: SamplerConfig,
    draws: Float[Tensor, "batch seq"] | None,
) -> Int[Tensor, "batch seq"]:
    """One id per position: the likeliest at temperature 0, else by inverse CDF from `draws`.

    Draws are uniform in [0, 1). top_k keeps the k likeliest; top_p then keeps the smallest set of
    likeliest ids whose probabilities, renormalized after top_k, reach it.

    Raises:
        UserError: logits that are NaN or infinite, of which the choice would be an arbitrary id.
    """
    require(
        bool(logits.amax(-1).isfinite().all()),
        "The model's logits are not finite (NaN or infinite), so no token can be chosen: its "
        "training may have diverged, or guidance_scale is too large for it. Take an earlier "
        "checkpoint, or a smaller guidance_scale.",
    )
    if config.temperature == 0:
        return logits.argmax(-1)
    assert draws is not None
    k = min(config.top_k or logits.shape[-1], logits.shape[-1])
    top = (logits.double() / config.temperature).topk(k, dim=-1)
    probabilities = top.values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    # The likeliest id always stays: nothing comes before it.
    kept = torch.where(before < config.top_p, probabilities, 0.0)
    cumulative = kept.cumsum(-1)
    target = draws.double()[..., None] * cumulative[..., -1:]
    rank = torch.searchsorted(cumulative, target, right=True).clamp(max=k - 1)
    return top.indices.gather(-1, rank).squeeze(-1)
