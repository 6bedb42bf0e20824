"""From answers to accuracies, and what is written of them: verdicts, a table and a figure.

Imports no torch.
"""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cola_train.bootstrap import bootstrap_generator, percentile_interval
from cola_train.drawing import BLUE, drawing
from cola_train.evaluation.benchmarks.answers import Answer
from cola_train.evaluation.benchmarks.tasks import RELEASED_ACCURACY, TASKS
from cola_train.files import write_atomically
from cola_train.json_lines import json_lines

_COLUMNS = ("task", "num_samples", "correct", "accuracy", "low", "high", "released_accuracy")
_LEVEL = 0.95
_NUM_RESAMPLES = 10_000
_WIDTH = 0.38  # of a bar; benchmarks are 1 apart


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """A benchmark's accuracy, or the average's.

    Attributes:
        accuracy: 100 correct / num_samples; the average's is the unweighted mean of the others.
        low, high: the middle 95 % of the bootstrap over samples, in percent.
        released_accuracy: of the released model on its samples of the same benchmarks, in percent.
        chance: accuracy of choosing an option blindly, in percent; None where a sample has no
            options, and of the average.
    """

    task: str
    num_samples: int
    correct: int
    accuracy: float
    low: float
    high: float
    released_accuracy: float
    chance: float | None = None


def accuracies(answers: Sequence[Answer]) -> dict[str, float]:
    """Percent correct of each benchmark that has answers, in order, and `average`, their mean."""
    return {result.task: result.accuracy for result in summarize(answers)}


def summarize(answers: Sequence[Answer]) -> list[TaskResult]:
    """The results of the benchmarks that have answers, in order, then the average's, if any has."""
    results, resamples = [], []
    for task in TASKS:
        own = [answer for answer in answers if answer.task == task]
        if not own:
            continue
        total, correct = len(own), sum(answer.verdict.correct for answer in own)
        # Of samples drawn with replacement, the number of correct ones is binomial.
        generator = bootstrap_generator(TASKS.index(task))
        drawn = generator.binomial(total, correct / total, _NUM_RESAMPLES)
        resamples.append(100 * drawn / total)
        low, high = percentile_interval(resamples[-1], _LEVEL)
        chance = None
        if all(answer.choices for answer in own):
            chance = float(np.mean([100 / len(answer.choices) for answer in own]))
        accuracy, released = 100 * correct / total, RELEASED_ACCURACY[task]
        results.append(TaskResult(task, total, correct, accuracy, low, high, released, chance))
    if results:
        low, high = percentile_interval(np.mean(resamples, axis=0), _LEVEL)
        average = TaskResult(
            "average",
            sum(result.num_samples for result in results),
            sum(result.correct for result in results),
            float(np.mean([result.accuracy for result in results])),
            low,
            high,
            float(np.mean([result.released_accuracy for result in results])),
        )
        results.append(average)
    return results


def write_results(folder: Path, answers: Sequence[Answer], incomplete: Mapping[str, str]) -> str:
    """Write verdicts, accuracies and their figure, replacing older ones; returns the table.

    `incomplete` names the benchmarks that are left out, with how many of how many answers they
    have.
    """
    write_atomically(folder / "verdicts.jsonl", json_lines(map(verdict_row, answers)))
    results = summarize(answers)
    write_atomically(folder / "accuracy_summary.csv", to_csv(results))
    draw_benchmarks(results, folder / "benchmarks.png", folder / "benchmarks.svg")
    return to_table(results, incomplete)


def verdict_row(answer: Answer) -> dict[str, Any]:
    """A line of verdicts.jsonl; the score to 4 decimals."""
    found = dataclasses.replace(answer.verdict, score=round(answer.verdict.score, 4))
    return {"task": answer.task, "id": answer.id, **dataclasses.asdict(found)}


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
        chances = [(x, result.chance) for x, result in enumerate(results) if result.chance]
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
