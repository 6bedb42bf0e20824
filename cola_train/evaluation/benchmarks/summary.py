"""From answers to accuracies: verdicts, the mean of each benchmark and of all, and how sure these
are.
"""

import csv
import dataclasses
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from cola_train.bootstrap import Interval, bootstrap_generator, percentile_interval
from cola_train.evaluation.benchmarks.answers import Answer
from cola_train.evaluation.benchmarks.scoring import Verdict, verdict
from cola_train.evaluation.benchmarks.tasks import RELEASED_ACCURACY, TASKS

EMA_PREFIX = "average"
_COLUMNS = ("task", "num_samples", "correct", "accuracy", "low", "high", "released_accuracy")
_LEVEL = 0.95
_NUM_RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Row:
    """A benchmark's accuracy, or the average's.

    Attributes:
        accuracy: 100 correct / num_samples; of the average the plain mean of the others, each of
            the same weight.
        low, high: the middle 95 % of the bootstrap over samples, in percent.
        released_accuracy: of the released model on its samples of the same benchmarks.
        chance: of choosing an option blindly, in percent; None where a sample has no options, and
            of the average.
    """

    task: str
    num_samples: int
    correct: int
    accuracy: float
    low: float
    high: float
    released_accuracy: float
    chance: float | None = None


def judge(answer: Answer) -> Verdict:
    """What an answer counts as: generated text by the benchmark's rules, a chosen option by being
    the true one.
    """
    if answer.chosen is None:
        return verdict(answer.task, answer.generation, answer.ground_truth, answer.choices or None)
    correct = answer.choices[answer.chosen] == answer.ground_truth
    gold = (
        answer.choices.index(answer.ground_truth) if answer.ground_truth in answer.choices else None
    )
    letters = [None if place is None else chr(ord("A") + place) for place in (answer.chosen, gold)]
    return Verdict(
        text=answer.generation,
        correct=correct,
        score=float(correct),
        predicted=letters[0],
        gold=letters[1],
    )


def verdict_row(answer: Answer, found: Verdict) -> dict[str, Any]:
    """A line of verdicts.jsonl; the score to 4 decimals."""
    row = {
        "task": answer.task,
        "id": answer.id,
        "correct": found.correct,
        "score": round(found.score, 4),
        "text": found.text,
    }
    return {**row, "predicted": found.predicted, "gold": found.gold}


def accuracies(answers: Iterable[Answer]) -> dict[str, float]:
    """Percent of each benchmark that is there, in the benchmarks' order, and `average`, their plain
    mean.
    """
    return {
        row.task: row.accuracy for row in summarize([(answer, judge(answer)) for answer in answers])
    }


def summarize(judged: Sequence[tuple[Answer, Verdict]]) -> list[Row]:
    """A row for each benchmark that is there, in the benchmarks' order, then the average's. Without
    answers there are none.
    """
    rows, resamples = [], []
    for task in TASKS:
        of_task = [(answer, found) for answer, found in judged if answer.task == task]
        if not of_task:
            continue
        num_samples, correct = len(of_task), sum(found.correct for _, found in of_task)
        resamples.append(_resampled(task, num_samples, correct))
        chance = None
        if all(answer.choices for answer, _ in of_task):
            chance = float(np.mean([100 / len(answer.choices) for answer, _ in of_task]))
        accuracy = 100 * correct / num_samples
        rows.append(
            Row(
                task,
                num_samples,
                correct,
                accuracy,
                *_interval(resamples[-1]),
                RELEASED_ACCURACY[task],
                chance,
            )
        )
    return [*rows, _average(rows, resamples)] if rows else []


def _average(rows: Sequence[Row], resamples: Sequence[Float64[np.ndarray, " resamples"]]) -> Row:
    return Row(
        EMA_PREFIX,
        sum(row.num_samples for row in rows),
        sum(row.correct for row in rows),
        float(np.mean([row.accuracy for row in rows])),
        *_interval(np.mean(resamples, axis=0)),
        float(np.mean([row.released_accuracy for row in rows])),
    )


def _resampled(task: str, num_samples: int, correct: int) -> Float64[np.ndarray, " resamples"]:
    """Accuracies of as many samples drawn with replacement: how many right ones are drawn is
    binomial. Always the same draws.
    """
    draws = bootstrap_generator(TASKS.index(task))
    return 100 * draws.binomial(num_samples, correct / num_samples, _NUM_RESAMPLES) / num_samples


def _interval(resamples: Float64[np.ndarray, " resamples"]) -> Interval:
    return percentile_interval(resamples, _LEVEL)


def to_csv(rows: Sequence[Row]) -> str:
    """accuracy_summary.csv: percents to 4 decimals."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in rows:
        values = (getattr(row, column) for column in _COLUMNS)
        writer.writerow([f"{value:.4f}" if isinstance(value, float) else value for value in values])
    return text.getvalue()


def to_table(rows: Sequence[Row], incomplete: Mapping[str, str]) -> str:
    """For the screen. `incomplete`: how many of how many answers a benchmark has that is not among
    the rows.
    """
    lines = [
        f"{'':13}{'samples':>8}{'correct':>9}{'accuracy':>10}  "
        f" {'95 % interval':16}{'released model':>14}"
    ]
    for row in rows:
        interval = f"{row.low:.2f} to {row.high:.2f}"
        lines.append(
            f"{row.task:13}{row.num_samples:8}{row.correct:9}{row.accuracy:10.2f}  "
            f" {interval:16}{row.released_accuracy:14.2f}"
        )
    num_tasks = len(rows) - 1
    lines.append("")
    if 0 < num_tasks < len(TASKS):
        lines.append(
            f"The average is over {num_tasks} of the {len(TASKS)} benchmarks, the released model's "
            "over the same."
        )
    lines += [f"Not counted: {task}, {counts} answers." for task, counts in incomplete.items()]
    return "\n".join(lines).rstrip("\n") + "\n"
