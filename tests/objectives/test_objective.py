"""What becomes of an objective's terms: shares of the step's means, the loss, and the figures of a
step.
"""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from cola_train.data.batch import Batch
from cola_train.objectives.objective import Objective, Term, total_loss, weights_of
from tests.helpers.compare import number
from tests.helpers.losses import losses_of
from tests.helpers.tiny import make_batch, random_tokens

BATCH = make_batch(random_tokens(2, 4, seed=1), [0, 0])


class Square(Objective):
    """A learned value, as two terms and a metric; there are 8 tokens in BATCH."""

    def __init__(self) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(24.0))

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"tokens": batch.loss_mask.sum(), "rows": torch.tensor(len(batch.tokens))}

    def forward(self, batch: Batch, step: int | None = None) -> list[Term]:
        return [
            Term("flow", "mse", self.value, "tokens", 0.5),
            Term("kl", "nats_per_token", 2 * self.value, "tokens", 10.0),
            Term("accuracy", "", self.value.detach() / 2, "rows"),
        ]

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        return {"ratio": means["kl_nats_per_token"] / means["flow_mse"]}


def test_total_and_figures() -> None:
    objective = Square()
    losses = losses_of(objective, BATCH)
    assert number(losses.total) == pytest.approx(0.5 * 3 + 10 * 6)
    (gradient,) = torch.autograd.grad(losses.total, objective.value)
    assert float(gradient) == pytest.approx((0.5 + 20) / 8)
    figures = losses.values()
    assert {name: float(figure) for name, figure in figures.items()} == {
        "flow_mse": 3.0,
        "kl_nats_per_token": 6.0,
        "accuracy": 6.0,
    }
    assert (
        losses.weights
        == weights_of(objective(BATCH))
        == {"flow_mse": 0.5, "kl_nats_per_token": 10.0}
    )


def test_summarize_adds_what_follows() -> None:
    weights = {"flow_mse": 2.0, "kl_nats_per_token": 0.5}
    means = {"flow_mse": 3.0, "kl_nats_per_token": 4.0, "accuracy": 7.0}
    assert Square().summarize(means, weights) == {
        "loss": 8.0,
        **means,
        "ratio": pytest.approx(4 / 3),
    }


def test_shares_add_up_and_an_empty_count_gives_zero() -> None:
    counts = {"tokens": torch.tensor(8), "rows": torch.tensor(0)}
    terms = [
        Term("kl", "nats_per_token", torch.tensor(total), "tokens", 1.0) for total in (6.0, 10.0)
    ]
    assert (
        sum(float(term.share(counts)) for term in terms) == float(total_loss(terms, counts)) == 2.0
    )
    assert float(Term("accuracy", "", torch.tensor(0.0), "rows").share(counts)) == 0.0
