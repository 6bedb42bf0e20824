"""What is minimized: an objective holds the networks it trains, takes a batch and gives loss terms.

A term is a sum over a batch, to be divided by a count over the *whole* optimizer step (all
processes, all micro-batches). So the shares of micro-batches add up to the step's means, and
neither losses nor gradients depend on how a step is cut up.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cola_train.data.batch import Batch

Counts = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Term:
    """A term of the loss, or a metric.

    Not a tuple: FSDP2 would take the tensors in it for outputs of the root.
    """

    name: str
    unit: str  # such as "nats_per_token"; empty for shares and the like
    sum: Float[Tensor, ""]  # over the batch
    denominator: str  # the count, by its name in `Objective.counts`, that it is a mean over
    weight: float | None = None  # in the loss; None: a metric, which is only reported

    @property
    def key(self) -> str:
        """The name in metrics.jsonl."""
        return f"{self.name}_{self.unit}" if self.unit else self.name

    def share(self, counts: Counts) -> Float[Tensor, ""]:
        """This batch's share of the step's mean; 0 where the step counts nothing."""
        return self.sum / counts[self.denominator].clamp(min=1)


def total_loss(terms: Sequence[Term], counts: Counts) -> Float[Tensor, ""]:
    """The weighted sum of the terms' shares, to minimize; `counts` are the whole step's."""
    weighted = [term.weight * term.share(counts) for term in terms if term.weight is not None]
    return torch.stack(weighted).sum()


def weights_of(terms: Sequence[Term]) -> dict[str, float]:
    """The weight of each term of the loss, by key."""
    return {term.key: term.weight for term in terms if term.weight is not None}


class Objective(nn.Module, abc.ABC):
    """From a batch to loss terms.

    Built on the meta device. It is the root that is sharded, so everything goes through `forward`.
    Its parameters' names begin with the network's: "vae.", "dit.", "transformer.".
    """

    # Path to label of the modules whose forward `cola-train bench train` times.
    timed_forwards: ClassVar[Mapping[str, str]] = {}

    @abc.abstractmethod
    def counts(self, batch: Batch) -> dict[str, Int[Tensor, ""]]:
        """What this batch adds to each denominator; the caller sums micro-batches and processes."""

    @abc.abstractmethod
    def forward(self, batch: Batch, step: int | None = None) -> list[Term]:
        """The terms of `batch` at optimizer step `step`, from 0, where they change in training.

        Without a step all terms, as validation asks for them.
        """

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """Metrics that follow from a step's means, by name; none by default."""
        return {}

    def learning_rate_factor(self, name: str) -> float:
        """Factor on the schedule's learning rate for the parameter `name`."""
        return 1.0

    def summarize(
        self, means: Mapping[str, float], weights: Mapping[str, float]
    ) -> dict[str, float]:
        """A step's means with what follows from them: the loss, and `derived` metrics."""
        loss = sum(weights[name] * means[name] for name in weights)
        return {"loss": loss, **means, **self.derived(means)}


def documents_of(
    batch: Batch, patch_size: int, mask_documents: bool
) -> Int[Tensor, "batch patches"] | None:
    """The document of each patch of tokens, or None where attention may cross documents."""
    return batch.document_ids[:, ::patch_size] if mask_documents else None
