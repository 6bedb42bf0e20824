"""Accuracies, averages and intervals, against resampling by hand and the binomial distribution."""

import csv
import io
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from cola_train.evaluation.benchmarks.answers import Answer
from cola_train.evaluation.benchmarks.results import (
    TaskResult,
    accuracies,
    draw_benchmarks,
    summarize,
    to_csv,
    to_table,
    verdict_row,
)
from cola_train.evaluation.benchmarks.tasks import RELEASED_ACCURACY, TASKS


def lambada(*right: bool) -> list[Answer]:
    return [
        Answer("lambada", number, " ball." if is_right else " hall.", "ball")
        for number, is_right in enumerate(right)
    ]


def siqa(*chosen: str) -> list[Answer]:
    return [
        Answer("siqa", number, f" {text}", "red", ("red", "blue", "green"))
        for number, text in enumerate(chosen)
    ]


def test_accuracies_in_the_benchmarks_order_and_their_plain_mean() -> None:
    answers = [*siqa("red", "blue", "green", "red"), *lambada(True, False, False)]
    assert accuracies(answers) == {
        "lambada": 100 / 3,
        "siqa": 50.0,
        "average": pytest.approx((100 / 3 + 50) / 2),
    }
    assert [*accuracies(answers)] == ["lambada", "siqa", "average"]
    assert accuracies([]) == {}
    first, second, average = summarize(answers)
    assert (first.num_samples, first.correct, first.chance) == (3, 1, None)
    assert (second.num_samples, second.correct, second.chance) == (4, 2, pytest.approx(100 / 3))
    assert (average.num_samples, average.correct, average.chance) == (7, 3, None)
    assert average.released_accuracy == pytest.approx((50.8 + 28.9) / 2)


def test_intervals_are_those_of_resampled_samples() -> None:
    num_samples, correct = 60, 21
    row = summarize(lambada(*[number < correct for number in range(num_samples)]))[0]
    outcomes = np.arange(num_samples) < correct
    drawn = np.random.default_rng(5).choice(outcomes, size=(20_000, num_samples)).mean(axis=1) * 100
    low, high = np.quantile(drawn, [0.025, 0.975])
    # One sample is 1.67 %: the resampled quantiles may be one apart.
    assert row.low == pytest.approx(low, abs=1.7)
    assert row.high == pytest.approx(high, abs=1.7)
    exact = stats.binom(num_samples, correct / num_samples).ppf([0.025, 0.975]) / num_samples * 100
    assert [row.low, row.high] == pytest.approx(exact, abs=1.7)
    assert row == summarize(lambada(*[number < correct for number in range(num_samples)]))[0]


def test_the_averages_interval_is_of_the_benchmarks_together() -> None:
    """Its width is the root of the summed squares over their number, not their mean width."""
    answers = lambada(*[number % 2 == 0 for number in range(400)]) + siqa(*["red", "blue"] * 200)
    first, second, average = summarize(answers)
    spread = stats.binom(400, 0.5).std() / 400 * 100
    for row, expected in ((first, spread), (second, spread), (average, spread / 2**0.5)):
        assert (row.high - row.low) / (2 * stats.norm.ppf(0.975)) == pytest.approx(
            expected, rel=0.06
        )


def test_a_benchmarks_interval_does_not_depend_on_the_others() -> None:
    answers = lambada(*[True, False, True] * 20)
    assert summarize(answers)[0] == summarize(answers + siqa("red", "blue"))[0]


def test_an_option_chosen_by_likelihood_is_right_if_it_is_the_true_one() -> None:
    """Whatever its text looks like: by the rules for text, "C" would be the third option."""
    choices = ("A", "C", "B")
    right = Answer("mmlu", 1, "C", "C", choices, (-3.0, -1.0, -2.0)).verdict
    assert (right.correct, right.score, right.predicted, right.gold, right.text) == (
        True,
        1.0,
        "B",
        "B",
        "C",
    )
    wrong = Answer("mmlu", 1, "A", "C", choices, (-1.0, -1.0, -2.0)).verdict
    assert (wrong.correct, wrong.score, wrong.predicted, wrong.gold) == (False, 0.0, "A", "B")
    assert (
        Answer("hellaswag", 1, "x y", "x y.", ("x y", "x y."), (-1.0, -2.0)).verdict.correct
        is False
    )


def test_verdict_rows() -> None:
    answer = siqa("the blue one\nQuestion:")[0]
    assert verdict_row(answer) == {
        "task": "siqa",
        "id": 0,
        "correct": False,
        "score": 0.0,
        "text": " the blue one",
        "predicted": "B",
        "gold": "A",
    } | {"score": round(answer.verdict.score, 4)}


def test_the_summary_as_csv() -> None:
    rows = summarize([*siqa("red", "blue", "green"), *lambada(True)])
    table = [*csv.DictReader(io.StringIO(to_csv(rows)))]
    assert [*table[0]] == [
        "task",
        "num_samples",
        "correct",
        "accuracy",
        "low",
        "high",
        "released_accuracy",
    ]
    assert [line["task"] for line in table] == ["lambada", "siqa", "average"]
    assert [line["accuracy"] for line in table] == ["100.0000", "33.3333", "66.6667"]
    assert table[0]["released_accuracy"] == "50.8000"
    assert all(
        float(line["low"]) <= float(line["accuracy"]) <= float(line["high"]) for line in table
    )


def test_the_table_says_what_the_average_is_of_and_what_is_missing() -> None:
    page = to_table(summarize([*siqa("red", "blue"), *lambada(True)]), {"squad": "3 of 7"})
    assert re.search(r"^siqa +2 +1 +50\.00 +0\.00 to 100\.00 +28\.90$", page, re.M)
    assert "The average is over 2 of the 8 benchmarks, the released model's over the same." in page
    assert "Not counted: squad, 3 of 7 answers." in page
    full = [
        TaskResult(task, 1, 1, 100.0, 100.0, 100.0, RELEASED_ACCURACY[task]) for task in (*TASKS,)
    ]
    assert "average is over" not in to_table([*full, full[0]], {})


def test_the_figure_names_every_benchmark_and_is_the_same_each_time(tmp_path: Path) -> None:
    rows = summarize([*siqa("red", "blue"), *lambada(True)])
    drawn = []
    for name in "ab":
        draw_benchmarks(rows, tmp_path / f"{name}.png", tmp_path / f"{name}.svg")
        drawn.append((tmp_path / f"{name}.svg").read_bytes())
    text = drawn[0].decode()
    assert drawn[0] == drawn[1]
    for word in (
        "lambada",
        "siqa",
        "average",
        "this checkpoint",
        "released model",
        "an option chosen blindly",
        "50.0",
        "75.0",
    ):
        assert f">{word}<" in text, word
    assert (tmp_path / "a.png").stat().st_size > 5000
    draw_benchmarks(summarize(lambada(True)), tmp_path / "c.png", tmp_path / "c.svg")
    assert "blindly" not in (tmp_path / "c.svg").read_text()
