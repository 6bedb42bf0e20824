"""From answers to accuracies: of each benchmark and of all, and how sure these are."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from cola_train.bootstrap import bootstrap_generator, percentile_interval
from cola_train.evaluation.benchmarks.answers import Answer
from cola_train.evaluation.benchmarks.tasks import RELEASED_ACCURACY, TASKS

_AVERAGE = "average"
_LEVEL = 0.95
_NUM_RESAMPLES = 10_000


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
        num_samples, correct = len(own), sum(answer.verdict.correct for answer in own)
        # Of samples drawn with replacement, the number of correct ones is binomial.
        generator = bootstrap_generator(TASKS.index(task))
        drawn = generator.binomial(num_samples, correct / num_samples, _NUM_RESAMPLES)
        resamples.append(100 * drawn / num_samples)
        low, high = percentile_interval(resamples[-1], _LEVEL)
        chance = None
        if all(answer.choices for answer in own):
            chance = float(np.mean([100 / len(answer.choices) for answer in own]))
        accuracy, released = 100 * correct / num_samples, RELEASED_ACCURACY[task]
        results.append(
            TaskResult(task, num_samples, correct, accuracy, low, high, released, chance)
        )
    if results:
        low, high = percentile_interval(np.mean(resamples, axis=0), _LEVEL)
        average = TaskResult(
            _AVERAGE,
            sum(result.num_samples for result in results),
            sum(result.correct for result in results),
            float(np.mean([result.accuracy for result in results])),
            low,
            high,
            float(np.mean([result.released_accuracy for result in results])),
        )
        results.append(average)
    return results
