"""What an objective gives for a batch, as shares of the batch's own means, by name."""

import dataclasses

from torch import Tensor

from cola_train.data.batch import Batch
from cola_train.objectives.objective import Counts, Objective, total_loss, weights_of


@dataclasses.dataclass(frozen=True)
class Losses:
    terms: dict[str, Tensor]
    weights: dict[str, float]
    metrics: dict[str, Tensor]
    total: Tensor

    def values(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in (self.terms | self.metrics).items()}


def losses_of(
    objective: Objective, batch: Batch, counts: Counts | None = None, step: int | None = None
) -> Losses:
    """With `counts` of a larger step, the shares of its means."""
    counts = objective.counts(batch) if counts is None else counts
    found = objective(batch, step)
    return Losses(
        {term.key: term.share(counts) for term in found if term.weight is not None},
        weights_of(found),
        {term.key: term.share(counts) for term in found if term.weight is None},
        total_loss(found, counts),
    )
