"""The autoregressive baseline: next-token cross-entropy (method, section 8)."""

from collections.abc import Mapping
from typing import ClassVar

from jaxtyping import Bool
from torch import Tensor

from cola_train.data.batch import Batch
from cola_train.families.autoregressive.family import AutoregressiveConfig
from cola_train.models.transformer import Transformer
from cola_train.objectives.objective import Objective, Term, documents_of


class AutoregressiveObjective(Objective):
    """Holds the transformer it trains."""

    timed_forwards: ClassVar[Mapping[str, str]] = {"transformer": "forward of the transformer"}

    def __init__(self, transformer: Transformer, config: AutoregressiveConfig) -> None:
        super().__init__()
        assert transformer.causal
        self.transformer, self.config = transformer, config

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"predicted_tokens": self._predicted(batch).sum()}

    def forward(self, batch: Batch, step: int | None = None) -> list[Term]:
        """Next-token cross-entropy, nats per predicted token, and the accuracy of the likeliest.

        Predicted are real tokens but a row's first, with mask_documents but each document's first.
        """
        hidden = self.transformer(batch.tokens, documents_of(batch, 1, self.config.mask_documents))
        nats, right = self.transformer.lm_head.losses(
            hidden[:, :-1], batch.tokens[:, 1:], self._predicted(batch).float()
        )
        return [
            Term("next_token", "nats_per_token", nats, "predicted_tokens", 1.0),
            Term("next_token_accuracy", "", right, "predicted_tokens"),
        ]

    def _predicted(self, batch: Batch) -> Bool[Tensor, "batch predicted"]:
        real = batch.loss_mask[:, 1:]
        if not self.config.mask_documents:
            return real
        return real & (batch.document_ids[:, 1:] == batch.document_ids[:, :-1])
