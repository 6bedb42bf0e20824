"""An optimizer step cut into micro-batches: the losses and gradients that add up."""

import torch
from torch import Tensor

from cola_train.data.batch import Batch
from cola_train.objectives.objective import Objective
from tests.helpers.losses import losses_of
from tests.helpers.tiny import rows_of

Step = tuple[dict[str, Tensor], dict[str, Tensor]]


def added_up(objective: Objective, batch: Batch, rows_each: int, step: int | None = None) -> Step:
    """Figures and gradients of `batch` in micro-batches of `rows_each`, with counts over all of
    them.
    """
    objective.zero_grad()
    parts = [
        rows_of(batch, slice(start, start + rows_each))
        for start in range(0, len(batch.tokens), rows_each)
    ]
    per_part = [objective.counts(part) for part in parts]
    counts = {
        name: torch.stack([counts[name] for counts in per_part]).sum() for name in per_part[0]
    }
    figures: dict[str, Tensor] = {}
    for part in parts:
        losses = losses_of(objective, part, counts, step)
        losses.total.backward()
        for name, value in losses.values().items():
            figures[name] = figures.get(name, torch.zeros(())) + value
    gradients = {
        name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None
    }
    return figures, gradients


def assert_same_step(one: Step, other: Step) -> None:
    for actual, expected in zip(one, other, strict=True):
        assert actual.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(
                actual[name],
                expected[name],
                rtol=1e-5,
                atol=1e-6,
                msg=lambda text, name=name: f"{name}: {text}",
            )
