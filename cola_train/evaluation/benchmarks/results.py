"""What is written beside answers: the verdict on each, the accuracies and their figure. Imports no
torch.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cola_train.evaluation.benchmarks.answers import Answer, to_lines
from cola_train.evaluation.benchmarks.figure import draw_benchmarks
from cola_train.evaluation.benchmarks.summary import (
    judge,
    summarize,
    to_csv,
    to_table,
    verdict_row,
)
from cola_train.files import write_atomically

_VERDICTS, _SUMMARY, _FIGURE = "verdicts.jsonl", "accuracy_summary.csv", "benchmarks"


def write_results(folder: Path, answers: Sequence[Answer], incomplete: Mapping[str, str]) -> str:
    """Write verdicts, accuracies and their figure, replacing older ones; returns the table.

    `incomplete`: how many of how many answers there are of a benchmark that is left out.
    """
    judged = [(answer, judge(answer)) for answer in answers]
    write_atomically(
        folder / _VERDICTS, to_lines([verdict_row(answer, found) for answer, found in judged])
    )
    rows = summarize(judged)
    write_atomically(folder / _SUMMARY, to_csv(rows))
    draw_benchmarks(rows, folder / f"{_FIGURE}.png", folder / f"{_FIGURE}.svg")
    return to_table(rows, incomplete)
