"""The LLaDA baseline: masked diffusion with cross-entropy weighted by 1/t at masked tokens (method, section 8)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cola_train.config.baselines import MaskedDiffusionConfig
from cola_train.data.datamodule import Batch
from cola_train.models.transformer import Transformer
from cola_train.objectives.losses import Counts, Losses, latent_documents, mean_share
from cola_train.randomness import Purpose, uniform


class MaskedDiffusionObjective(nn.Module):
    """From a batch to its share of the step's loss; holds the transformer it trains."""

    def __init__(self, transformer: Transformer, config: MaskedDiffusionConfig, seed: int) -> None:
        super().__init__()
        assert not transformer.causal
        self.transformer, self.config, self.seed = transformer, config, seed

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """What this batch adds to each mean's denominator: real tokens, and masked ones."""
        return {"tokens": batch.loss_mask.sum(), "masked_tokens": self.draw_mask(batch)[1].sum()}

    def draw_mask(self, batch: Batch) -> tuple[Float[Tensor, " batch"], Bool[Tensor, "batch seq"]]:
        """t of each row, uniform in (min_mask_prob, 1], and which of its real tokens are masked, each with probability t."""
        low = self.config.min_mask_prob
        t = 1 - (1 - low) * uniform(self.seed, Purpose.DIFFUSION_TIME, batch.sample_index, 1)[:, 0]
        draws = uniform(self.seed, Purpose.DIFFUSION_MASK, batch.sample_index, batch.tokens.shape[1])
        return t, (draws < t[:, None]) & batch.loss_mask

    def forward(self, batch: Batch, counts: Counts) -> Losses:
        """The loss of `batch`, a sum over it divided by the step's `counts`.

        Terms: masked_diffusion (nats per real token): the sum over masked tokens of -log p(x_i | x_t) / t. Its mean over masks and
        over t in (0, 1] bounds -log p(x) from above (LLaDA, equation 4); min_mask_prob leaves out a little of that range.
        Metrics: accuracy at masked tokens.

        The head runs at all positions: how many are masked differs by row, and shapes that change cost more than they save.
        """
        t, masked = self.draw_mask(batch)
        tokens = torch.where(masked, self.transformer.mask_token_id, batch.tokens)
        hidden = self.transformer(tokens, latent_documents(batch, 1, self.config.mask_documents))
        nats, right = self.transformer.lm_head.losses(hidden, batch.tokens, masked / t[:, None])
        return Losses(
            {"masked_diffusion_nats_per_token": mean_share("masked_diffusion_nats_per_token", nats, counts)},
            self.weights(),
            {"masked_token_accuracy": mean_share("masked_token_accuracy", right, counts)},
        )

    def weights(self) -> dict[str, float]:
        """The weight of each term in the total."""
        return {"masked_diffusion_nats_per_token": 1.0}
