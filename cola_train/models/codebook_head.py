"""A head that names codes: the velocity of a posterior over tokens, each with its own latent.

With a codebook (models/codebook.py) and logits l_k of the trunk's features,

    p(k | z_t, history) ~ p_k exp(l_k) N(z_t; (1 - t) c_k, V)

and the velocity follows from the mean code, so that logits of 0 are the best that token frequencies
can do. The posterior is learned by cross-entropy, whose gradient toward a token of probability p is
1 / p times that of the squared error of v (Dieleman et al., 2022; Gulrajani and Hashimoto, 2023).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cola_train.models.codebook import Codebook
from cola_train.models.vocabulary_head import VocabularyHead

# Logits of so many positions x codes at a time, 64 MiB in fp32; with more, the backward pass
# computes them again.
_MOST_LOGITS = 1 << 24


class CodebookHead(nn.Module):
    """Features of a DiT to velocities, over the codes of a Text VAE with one token a latent.

    What is known of the latents, measured once (families/cola/yardsticks), is in buffers: they
    stay in fp32 and whole on every process, and are saved.
    """

    codes: Float[Tensor, "vocab channels"]
    log_p: Float[Tensor, " vocab"]
    variance: Float[Tensor, " channels"]

    def __init__(self, width: int, channels: int, vocab_size: int) -> None:
        super().__init__()
        self.proj = VocabularyHead(width, vocab_size)
        self.register_buffer("codes", torch.zeros(vocab_size, channels))
        self.register_buffer("log_p", torch.zeros(vocab_size))
        self.register_buffer("variance", torch.ones(channels))

    @property
    def book(self) -> Codebook:
        """What is known of the latents."""
        return Codebook(self.codes, self.log_p, self.variance)

    def forward(
        self,
        hidden: Float[Tensor, "batch seq dim"],
        z_t: Float[Tensor, "batch seq channels"],
        t: Float[Tensor, "batch seq"],
        targets: Int[Tensor, "batch seq"] | None = None,
    ) -> tuple[Float[Tensor, "batch seq channels"], Float[Tensor, "batch seq"] | None]:
        """Velocities, and -log p(target | z_t, history) in nats where there are targets; fp32."""
        shape = t.shape
        flat = [hidden.flatten(0, 1), z_t.flatten(0, 1).float(), t.flatten().float()]
        chosen = torch.zeros_like(flat[2], dtype=torch.long)
        flat.append(chosen if targets is None else targets.flatten())
        parts = -(-len(chosen) * len(self.codes) // _MOST_LOGITS)
        if parts <= 1:
            velocity, nats = self._part(*flat)
        else:
            found = [
                checkpoint(self._part, *part, use_reentrant=False)
                for part in zip(*(x.tensor_split(parts) for x in flat), strict=True)
            ]
            velocity, nats = (torch.cat(pieces) for pieces in zip(*found, strict=True))
        return velocity.unflatten(0, shape), None if targets is None else nats.unflatten(0, shape)

    def _part(
        self, hidden: Tensor, z_t: Tensor, t: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = self.proj(hidden).float()
        # The nearest code is told by small differences: nothing here may be rounded to bf16.
        with torch.autocast(hidden.device.type, enabled=False):
            book = self.book
            log_posterior = book.log_likelihood(z_t, t).add(logits + book.log_p).log_softmax(-1)
            velocity = book.velocity(z_t, t, log_posterior.exp() @ book.codes)
            return velocity, F.nll_loss(log_posterior, targets, reduction="none")
