"""Fits of whole ladders: every family and metric, as JSON and as tables."""

import dataclasses
import itertools
import json

import pytest

from cola_train.config.settings import UserError
from cola_train.scaling.fit import fit_points, show
from cola_train.scaling.metrics import with_distances
from cola_train.scaling.power_law import NotFitted, PowerLaw
from tests.scaling.ladders import BUDGETS, best_size, ladder


def test_every_metric_and_family() -> None:
    points = ladder(noise=0.005)
    fits = fit_points(points, "model")
    assert list(fits.metrics) == ["judge_nats_per_token_distance", "next_word_accuracy"]
    for of in fits.metrics.values():
        assert list(of.power_laws) == list(of.isoflops) == ["cola", "ar"]
    laws = fits.metrics["judge_nats_per_token_distance"].power_laws
    for family in ("cola", "ar"):
        law = laws[family]
        assert isinstance(law, PowerLaw)
        limit = {"cola": 3.1, "ar": 2.9}[family]  # the ladder's, real text's 3
        least = [limit + 1.2 * (budget / BUDGETS[0]) ** -0.3 - 3 for budget in BUDGETS]
        assert law.values == pytest.approx(least, abs=0.02)
        assert law.flops.tolist() == pytest.approx([budget * 1e18 for budget in BUDGETS])
    found = json.loads(json.dumps(fits.to_json(), allow_nan=False))
    assert found["convention"] == "model"
    assert found["power_laws"]["next_word_accuracy"]["ar"]["formula"].startswith("limit - ")
    assert len(found["isoflop"]["judge_nats_per_token_distance"]["cola"]["budgets"]) == len(BUDGETS)
    assert found["interval_level"] == 0.95
    assert "alpha" in found["surfaces"]["judge_nats_per_token_distance"]["ar"]
    frontier = found["power_laws"]["next_word_accuracy"]["ar"]["frontier"]
    assert [row["eflops"] for row in frontier["budgets"]] == pytest.approx(list(BUDGETS))
    assert fit_points(points, "model").to_json() == fits.to_json()


def test_compute_is_counted_by_the_convention() -> None:
    fits = [fit_points(ladder(), "model"), fit_points(ladder(), "paper")]
    by_model, by_paper = (fit.metrics["next_word_accuracy"].power_laws["ar"] for fit in fits)
    assert isinstance(by_model, PowerLaw)
    assert isinstance(by_paper, PowerLaw)
    assert (by_paper.flops == 2 * by_model.flops).all()


def test_the_tables_say_what_was_found_and_what_not() -> None:
    sizes = {"small": 100_000, "medium": 200_000, "large": 400_000}
    points = ladder(sizes=sizes)
    few = [
        point
        for point in points
        if point.family == "cola" or (point.budget in BUDGETS[:2] and point.size != "large")
    ]
    fits = fit_points(few, "model")
    assert isinstance(fits.metrics["next_word_accuracy"].power_laws["ar"], NotFitted)
    lines = show(fits).splitlines()
    nats = [line for line in lines if line.startswith("judge_nats_per_token")]
    assert [line.split()[1] for line in nats] == ["cola", "ar"] * 3
    assert (
        "not fitted: a power law needs at least 4 budgets of different FLOPs, and there are 2"
        in nats[1]
    )
    # The best sizes of the last two budgets, 459k and 606k, are outside the measured ones; cola's
    # three sizes leave no interval.
    cells = nats[2].split()[2:7]
    assert [cell.startswith("(") for cell in cells] == [False] * 3 + [True] * 2
    found = [float(cell.strip("()")) for cell in cells]
    assert found == pytest.approx([best_size(budget) for budget in BUDGETS], rel=0.1)
    assert nats[3].split()[2:] == ["?", "?", "-"]
    assert "not fitted: L(N, D) needs 3 sizes, and there are 2" in nats[5]
    assert "brackets hold 95% intervals" in lines[0]
    header, first = next(
        (line, after) for line, after in itertools.pairwise(lines) if line.startswith("metric")
    )
    assert first[header.index("family") :].startswith("cola")
    assert first[header.index("limit") - 1] == " " != first[header.index("limit")]


def test_nothing_to_fit_is_said() -> None:
    with pytest.raises(UserError, match=r"no points to fit.*curve run"):
        fit_points([], "model")
    with pytest.raises(
        UserError,
        match=r"one of the metrics judge_nats_per_token.*the points have tokens_per_continuation",
    ):
        fit_points(
            [dataclasses.replace(ladder()[0], metrics={"tokens_per_continuation": 3.0})], "model"
        )


@pytest.mark.parametrize("value", [2.5, 3.5])
def test_a_judge_is_fitted_by_the_distance_to_real_text(value: float) -> None:
    """Text that a judge likes better than real text is as far from it as text it likes less."""
    (point,) = with_distances(
        [
            dataclasses.replace(
                ladder()[0],
                metrics={
                    "judge_nats_per_byte": value,
                    "judge_nats_per_byte_standard_error": 0.1,
                    "held_out_judge_nats_per_byte": 3.0,
                    "bigram_divergence": 0.4,
                },
            )
        ]
    )
    assert point.metrics["judge_nats_per_byte_distance"] == 0.5
    assert point.metrics["judge_nats_per_byte_distance_standard_error"] == 0.1
    assert "bigram_divergence_distance" not in point.metrics


def test_a_judge_without_real_text_is_refused() -> None:
    point = dataclasses.replace(ladder()[0], metrics={"known_word_share": 0.8})
    with pytest.raises(UserError, match=r"must have held_out_known_word_share beside it"):
        fit_points([point], "model")
