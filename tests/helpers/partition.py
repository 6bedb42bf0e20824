"""An optimizer step cut into micro-batches: the losses and gradients that add up."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cola_train.data.batch import Batch
from cola_train.objectives.objective import Losses
from tests.helpers.tiny import rows_of

Step = Callable[[Batch, dict[str, Tensor]], Losses]


def added_up(objective: nn.Module, step: Step, batch: Batch, rows_each: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Figures and gradients of `batch` in micro-batches of `rows_each`, with counts over all of them."""
    objective.zero_grad()
    parts = [rows_of(batch, slice(start, start + rows_each)) for start in range(0, len(batch.tokens), rows_each)]
    per_part = [objective.counts(part) for part in parts]  # type: ignore[operator]  # both objectives have it
    counts = {name: sum(counts[name] for counts in per_part) for name in per_part[0]}
    figures: dict[str, Tensor] = {}
    for part in parts:
        losses = step(part, counts)
        losses.total.backward()
        for name, value in losses.figures().items():
            figures[name] = figures.get(name, torch.zeros(())) + value
    gradients = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    return figures, gradients


def assert_same_step(one: tuple[dict[str, Tensor], dict[str, Tensor]], other: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    for actual, expected in zip(one, other, strict=True):
        assert actual.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(
                actual[name], expected[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
