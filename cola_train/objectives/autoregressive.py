"""The autoregressive baseline: next-token cross-entropy (method, section 8)."""

from jaxtyping import Bool
from torch import Tensor, nn

from cola_train.config.baselines import AutoregressiveConfig
from cola_train.data.datamodule import Batch
from cola_train.models.transformer import Transformer
from cola_train.objectives.losses import Counts, Losses, latent_documents, mean_share


class AutoregressiveObjective(nn.Module):
    """From a batch to its share of the step's loss; holds the transformer it trains."""

    def __init__(self, transformer: Transformer, config: AutoregressiveConfig, seed: int) -> None:
        super().__init__()
        assert transformer.causal
        self.transformer, self.config, self.seed = transformer, config, seed

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """What this batch adds to the mean's denominator: tokens that are predicted."""
        return {"predicted_tokens": self._predicted(batch).sum()}

    def forward(self, batch: Batch, counts: Counts) -> Losses:
        """The loss of `batch`, a sum over it divided by the step's `counts`.

        Terms: next_token (nats per predicted token: real ones but a row's first, with mask_documents but each document's first).
        Metrics: accuracy of the likeliest next token.
        """
        hidden = self.transformer(batch.tokens, latent_documents(batch, 1, self.config.mask_documents))
        nats, right = self.transformer.lm_head.losses(hidden[:, :-1], batch.tokens[:, 1:], self._predicted(batch).float())
        return Losses(
            {"next_token_nats_per_token": mean_share("next_token_nats_per_token", nats, counts)},
            self.weights(),
            {"next_token_accuracy": mean_share("next_token_accuracy", right, counts)},
        )

    def weights(self) -> dict[str, float]:
        """The weight of each term in the total."""
        return {"next_token_nats_per_token": 1.0}

    def _predicted(self, batch: Batch) -> Bool[Tensor, "batch predicted"]:
        real = batch.loss_mask[:, 1:]
        if not self.config.mask_documents:
            return real
        return real & (batch.document_ids[:, 1:] == batch.document_ids[:, :-1])
