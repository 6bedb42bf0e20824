"""The autoregressive baseline: next-token cross-entropy (method, section 8)."""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cola_train.data.batch import Batch
from cola_train.families.autoregressive.family import AutoregressiveConfig
from cola_train.models.transformer import Transformer
from cola_train.objectives.objective import Objective, Term


class AutoregressiveObjective(Objective):
    """Holds the transformer it trains."""

    timed_forwards: ClassVar[Mapping[str, str]] = {"transformer": "forward of the transformer"}

    def __init__(self, transformer: Transformer, config: AutoregressiveConfig) -> None:
        super().__init__()
        assert transformer.causal
        self.transformer, self.config = transformer, config

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        predicted = batch.loss_mask[:, 1:]
        if self.config.mask_documents:
            predicted = behind_separators(batch).predicted
        return {"predicted_tokens": predicted.sum()}

    def forward(self, batch: Batch, step: int | None = None) -> list[Term]:
        """Next-token cross-entropy, nats per predicted token, and the accuracy of the likeliest.

        Predicted are real tokens but a row's first; with mask_documents also that and each
        document's first, from the separator (`behind_separators`).
        """
        if self.config.mask_documents:
            read, document, predicted = behind_separators(batch)
            hidden, targets = self.transformer(read, document), batch.tokens
        else:
            hidden, targets = self.transformer(batch.tokens)[:, :-1], batch.tokens[:, 1:]
            predicted = batch.loss_mask[:, 1:]
        nats, right = self.transformer.lm_head.losses(hidden, targets, predicted.float())
        return [
            Term("next_token", "nats_per_token", nats, "predicted_tokens", 1.0),
            Term("next_token_accuracy", "", right, "predicted_tokens"),
        ]


class BehindSeparators(NamedTuple):
    """A batch of documents apart, as the network reads it to predict the token at each place."""

    read: Int[Tensor, "batch seq"]  # the token before it, and at each document's first a separator
    document: Int[Tensor, "batch seq"]  # of the token that is predicted
    predicted: Bool[Tensor, "batch seq"]


def behind_separators(batch: Batch) -> BehindSeparators:
    """Each document, also a row's first, behind a separator of its own, as likelihood scores it.

    The separator is taken from the row: it ends every document. A row that holds no end of a
    document shows none, and the first token of its document is not predicted.
    """
    tokens, real, document = batch.tokens, batch.loss_mask, batch.document_ids
    begins = torch.ones_like(real)
    begins[:, 1:] = document[:, 1:] != document[:, :-1]
    # Padding comes after the separator.
    ends = real[:, :-1] & (begins[:, 1:] | ~real[:, 1:])
    separator = torch.where(ends, tokens[:, :-1], 0).amax(1, keepdim=True)
    unknown = begins & ~ends.any(1, keepdim=True)
    return BehindSeparators(
        torch.where(begins, separator, tokens.roll(1, dims=1)),
        # What stands in place of an unknown separator is a document of its own: nobody sees it.
        torch.where(unknown, -1, document),
        real & ~unknown,
    )
