"""What tables of n-grams make of held-out rows: a yardstick beside any family's likelihood."""

import numpy as np
from jaxtyping import Float64
from torch import Tensor

from cola_train.data.batch import validation_batches
from cola_train.data.prepared import PreparedData
from cola_train.evaluation.likelihood.rates import Rate, rate_of
from cola_train.likelihood.token_tables import BigramModel, count_pairs, text_starts, training_rows

_MOST_ROWS = 8192  # training rows that are counted: a second


def table_rates(
    data: PreparedData, num_rows: int, vocab_size: int, mask_documents: bool
) -> dict[str, Rate]:
    """Cross-entropy of the first `num_rows` held-out rows by unigrams and by bigrams.

    Counted on training rows, evenly spread; empty where there are none. With `mask_documents` a
    document begins without a token before it.
    """
    rows = training_rows(data, _MOST_ROWS)
    if not rows:
        return {}
    model = BigramModel.of(count_pairs(data, rows, vocab_size, mask_documents))
    tokens = list[Tensor]()
    sums: dict[str, list[Tensor]] = {"unigrams": [], "bigrams": []}
    for batch in validation_batches(data, num_rows):
        found = model.nats(batch.tokens, text_starts(batch, mask_documents))
        for name, nats in zip(sums, found, strict=True):
            sums[name].append((nats * batch.loss_mask).sum(1))
        tokens.append(batch.loss_mask.sum(1))

    def joined(parts: list[Tensor]) -> Float64[np.ndarray, " rows"]:
        return np.concatenate([part.double().numpy() for part in parts])

    return {name: rate_of(joined(parts), joined(tokens)) for name, parts in sums.items()}
