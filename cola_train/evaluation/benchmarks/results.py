"""What is written beside answers: the verdict on each, and the accuracies as table and as figure.

Imports no torch.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cola_train.drawing import BLUE, drawing
from cola_train.evaluation.benchmarks.answers import Answer
from cola_train.evaluation.benchmarks.summary import TaskResult, summarize
from cola_train.evaluation.benchmarks.tasks import TASKS
from cola_train.files import json_lines, write_atomically

_VERDICTS, _SUMMARY, _FIGURE = "verdicts.jsonl", "accuracy_summary.csv", "benchmarks"
_COLUMNS = ("task", "num_samples", "correct", "accuracy", "low", "high", "released_accuracy")
_WIDTH = 0.38  # of a bar; benchmarks are 1 apart


def write_results(folder: Path, answers: Sequence[Answer], incomplete: Mapping[str, str]) -> str:
    """Write verdicts, accuracies and their figure, replacing older ones; returns the table.

    `incomplete` names the benchmarks that are left out, with how many of how many answers they
    have.
    """
    write_atomically(folder / _VERDICTS, json_lines(map(verdict_row, answers)))
    results = summarize(answers)
    write_atomically(folder / _SUMMARY, to_csv(results))
    draw_benchmarks(results, folder / f"{_FIGURE}.png", folder / f"{_FIGURE}.svg")
    return to_table(results, incomplete)


def verdict_row(answer: Answer) -> dict[str, Any]:
    """A line of verdicts.jsonl; the score to 4 decimals."""
    found = answer.verdict
    return {
        "task": answer.task,
        "id": answer.id,
        "correct": found.correct,
        "score": round(found.score, 4),
        "text": found.text,
        "predicted": found.predicted,
        "gold": found.gold,
    }


def to_csv(results: Sequence[TaskResult]) -> str:
    """The text of accuracy_summary.csv: percents to 4 decimals."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for result in results:
        values = (getattr(result, column) for column in _COLUMNS)
        writer.writerow([f"{value:.4f}" if isinstance(value, float) else value for value in values])
    return text.getvalue()


def to_table(results: Sequence[TaskResult], incomplete: Mapping[str, str]) -> str:
    """The results for the screen, and the `incomplete` benchmarks; see `write_results`."""
    lines = [
        f"{'':13}{'samples':>8}{'correct':>9}{'accuracy':>10}   {'95 % interval':16}"
        f"{'released model':>14}"
    ]
    for row in results:
        interval = f"{row.low:.2f} to {row.high:.2f}"
        lines.append(
            f"{row.task:13}{row.num_samples:8}{row.correct:9}{row.accuracy:10.2f}   {interval:16}"
            f"{row.released_accuracy:14.2f}"
        )
    num_tasks = len(results) - 1
    lines.append("")
    if 0 < num_tasks < len(TASKS):
        lines.append(
            f"The average is over {num_tasks} of the {len(TASKS)} benchmarks, the released model's "
            "over the same."
        )
    lines += [f"Not counted: {task}, {counts} answers." for task, counts in incomplete.items()]
    return "\n".join(lines).rstrip("\n") + "\n"


def draw_benchmarks(results: Sequence[TaskResult], png: Path, svg: Path) -> None:
    """Draw two bars a result, in percent: this checkpoint's with its 95 % interval, the released
    model's; and a dashed line at the accuracy of blind choice.
    """
    places = np.arange(len(results))
    accuracy, low, high, released = (
        np.array([getattr(result, name) for result in results])
        for name in ("accuracy", "low", "high", "released_accuracy")
    )
    # A percentile interval need not hold the accuracy that it is of.
    errors = [np.maximum(0.0, accuracy - low), np.maximum(0.0, high - accuracy)]
    with drawing((1.8 + 0.8 * len(results), 3.2), png, svg, {"axes.grid": False}) as figure:
        axes = figure.add_subplot()
        left, right, thin = places - _WIDTH / 2, places + _WIDTH / 2, {"elinewidth": 0.8}
        axes.bar(
            left, accuracy, _WIDTH, color=BLUE, label="this checkpoint", yerr=errors, error_kw=thin
        )
        axes.bar(right, released, _WIDTH, color="0.75", label="released model")
        chances = [
            (place, result.chance)
            for place, result in enumerate(results)
            if result.chance is not None
        ]
        if chances:
            middles, levels = np.array(chances).T
            axes.hlines(
                levels,
                middles - _WIDTH,
                middles + _WIDTH,
                color="black",
                linestyle=(0, (2, 1.5)),
                linewidth=1,
                label="an option chosen blindly",
            )
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        for x, share, top in zip(left, accuracy, np.maximum(accuracy, high) + 0.8, strict=True):
            axes.text(x, top, f"{share:.1f}", ha="center", fontsize=7, bbox=behind)
        axes.set_xticks(places, [f"{result.task}\n{result.num_samples:,}" for result in results])
        axes.set_ylabel("correct (%)")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.25, linewidth=0.5)
        figure.legend(loc="outside upper center", ncols=3)
