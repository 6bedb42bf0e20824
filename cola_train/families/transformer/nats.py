"""-log p of tokens under a transformer's vocabulary head."""

import torch
from jaxtyping import Float64
from torch import Tensor

from cola_train.models.transformer import Transformer
from cola_train.models.vocabulary_head import token_nats


def row_nats(network: Transformer, hidden: Tensor, targets: Tensor) -> Float64[Tensor, "draws seq"]:
    """-log p of each target from the hidden state at its place, nats."""
    # Row by row: the logits of a batch over a real vocabulary would be gigabytes.
    rows = [
        token_nats(network.head(h[None]), t[None]) for h, t in zip(hidden, targets, strict=True)
    ]
    return torch.cat(rows).double()
