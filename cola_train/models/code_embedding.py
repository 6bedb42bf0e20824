"""Clean latents read as the tokens that they are codes of (models/codebook.py).

A projection of a few channels tells a network nothing of a token until its MLPs have learned a
search over all codes. Where a latent is clean, that search is arithmetic, and what it finds may
have an embedding of its own, as in an autoregressive model.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cola_train.models.codebook import Codebook

# Likelihoods of so many latents x codes at a time, 64 MiB in fp32.
_MOST_LIKELIHOODS = 1 << 24


class CodeEmbedding(nn.Module):
    """A vector for the likeliest token of a clean latent, 0 for a noised one."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)

    def forward(
        self,
        latents: Float[Tensor, "batch seq channels"],
        is_clean: Bool[Tensor, "batch seq"],
        book: Codebook,
    ) -> Float[Tensor, "batch seq dim"]:
        """Embeddings; latents get no gradient by the choice of a token."""
        found = self.tokens(_likeliest(latents.detach(), book))
        return torch.where(is_clean[..., None], found, 0.0)


@torch.no_grad()
def _likeliest(
    latents: Float[Tensor, "batch seq channels"], book: Codebook
) -> Int[Tensor, "batch seq"]:
    """Which token k has the largest p_k N(z_0; c_k, S)."""
    # The nearest code is told by small differences: nothing here may be rounded to bf16.
    with torch.autocast(latents.device.type, enabled=False):
        flat = latents.flatten(0, 1).float()
        parts = max(1, -(-len(flat) * len(book.codes) // _MOST_LIKELIHOODS))
        found = [
            (book.log_likelihood(part, part.new_zeros(len(part))) + book.log_p).argmax(-1)
            for part in flat.tensor_split(parts)
        ]
        return torch.cat(found).unflatten(0, latents.shape[:2])
