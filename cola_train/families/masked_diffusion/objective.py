"""The LLaDA baseline: cross-entropy at masked tokens, weighted by 1/t (method, section 8)."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cola_train.data.batch import Batch
from cola_train.families.masked_diffusion.family import MaskedDiffusionConfig
from cola_train.models.transformer import Transformer
from cola_train.objectives.objective import Objective, Term, documents_of
from cola_train.randomness import Purpose, uniform


class MaskedDiffusionObjective(Objective):
    """Holds the transformer it trains."""

    timed_forwards: ClassVar[Mapping[str, str]] = {"transformer": "forward of the transformer"}

    def __init__(self, transformer: Transformer, config: MaskedDiffusionConfig, seed: int) -> None:
        super().__init__()
        assert not transformer.causal
        self.transformer, self.config, self.seed = transformer, config, seed

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"tokens": batch.loss_mask.sum(), "masked_tokens": self.draw_mask(batch)[1].sum()}

    def draw_mask(self, batch: Batch) -> tuple[Float[Tensor, " batch"], Bool[Tensor, "batch seq"]]:
        """t of each row, uniform in (min_mask_prob, 1], and its real tokens masked with that p."""
        low = self.config.min_mask_prob
        t = 1 - (1 - low) * uniform(self.seed, Purpose.DIFFUSION_TIME, batch.sample_index, 1)[:, 0]
        seq = batch.tokens.shape[1]
        draws = uniform(self.seed, Purpose.DIFFUSION_MASK, batch.sample_index, seq)
        return t, (draws < t[:, None]) & batch.loss_mask

    def forward(self, batch: Batch, step: int | None = None) -> list[Term]:
        """Sum over masked tokens of -log p(x_i | x_t) / t, in nats per real token, and accuracy.

        Its mean over masks and over t in (0, 1] bounds -log p(x) from above (LLaDA, equation 4);
        min_mask_prob leaves out a little of that range. The head runs at all positions: how many
        are masked differs by row, and shapes that change cost more than they save.
        """
        t, masked = self.draw_mask(batch)
        tokens = torch.where(masked, self.transformer.mask_token_id, batch.tokens)
        hidden = self.transformer(tokens, documents_of(batch, 1, self.config.mask_documents))
        nats, right = self.transformer.lm_head.losses(hidden, batch.tokens, masked / t[:, None])
        return [
            Term("masked_diffusion", "nats_per_token", nats, "tokens", 1.0),
            Term("masked_token_accuracy", "", right, "masked_tokens"),
        ]
