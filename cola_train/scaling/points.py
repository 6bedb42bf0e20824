"""Points of a scaling curve: what was trained, what it cost, what it can do."""

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

from cola_train.files import write_atomically


@dataclasses.dataclass(frozen=True)
class Point:
    """One model, trained and measured."""

    family: str
    size: str
    parameters: int
    tokens: int
    budget: float
    flops: dict[str, int]
    kind: str
    metrics: dict[str, float]


def write_points(path: Path, points: Sequence[Point]) -> None:
    """As CSV."""
    metrics = sorted({name for point in points for name in point.metrics})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            "family",
            "size",
            "parameters",
            "tokens",
            "budget_eflops",
            "kind",
            "flops_paper",
            "flops_model",
            "flops_executed",
            *metrics,
        ]
    )
    for p in points:
        writer.writerow(
            [
                p.family,
                p.size,
                p.parameters,
                p.tokens,
                repr(p.budget),
                p.kind,
                *(p.flops[n] for n in ("paper", "model", "executed")),
                *(repr(p.metrics[m]) for m in metrics),
            ]
        )
    write_atomically(path, text.getvalue())
