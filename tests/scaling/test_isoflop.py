"""Parabolas at each budget, and how their ends grow."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cola_train.scaling.isoflop import Growth, IsoFLOP, Parabola, fit_isoflop
from cola_train.scaling.points import Point
from cola_train.scaling.power_law import NotFitted
from tests.scaling.ladders import BUDGETS, GROWTH, SIZES, best_size, ladder


def points_at(values: dict[int, float], budget: float = 1e-6) -> list[Point]:
    flops = dict.fromkeys(("paper", "model", "executed"), round(budget * 1e18))
    return [
        Point("ar", str(size), size, 10, budget, flops, "run", {"loss": value})
        for size, value in values.items()
    ]


def fit(points: list[Point], direction: Any = "falls") -> IsoFLOP:
    return fit_isoflop(points, "loss", direction, "model")


def parabola(values: dict[int, float], direction: Any = "falls") -> Parabola:
    (found,) = fit(points_at(values), direction).fitted
    return found


@given(
    best=st.floats(1.1e5, 7e5),
    curvature=st.floats(0.01, 1),
    height=st.floats(-5, 5),
    rises=st.booleans(),
    sizes=st.lists(st.integers(1000, 10**6), min_size=1, max_size=5, unique=True),
)
def test_an_exact_parabola(
    best: float, curvature: float, height: float, rises: bool, sizes: list[int]
) -> None:
    sign = -1 if rises else 1
    known = {
        size: height + sign * curvature * np.log(size / best) ** 2
        for size in {100_000, 300_000, 800_000, *sizes}
    }
    found = parabola(known, "rises" if rises else "falls")
    assert found.best == pytest.approx(best, rel=1e-5)
    assert found.problem == ""
    np.testing.assert_allclose(found.at(np.array([best])), height, atol=1e-8)
    np.testing.assert_allclose(found.at(found.parameters), found.values, atol=1e-8)
    if len(known) == 3:
        assert found.best_interval is None
    else:
        assert found.best_interval is not None
        assert found.best_interval == pytest.approx((best, best), rel=1e-3)


def test_intervals_hold_the_truth() -> None:
    sizes, best, generator, held = np.geomspace(1e5, 1e6, 6), 3e5, np.random.default_rng(0), 0
    for _ in range(60):
        values = np.log(sizes / best) ** 2 + 0.05 * generator.normal(size=6)
        found = parabola(
            {round(size): float(value) for size, value in zip(sizes, values, strict=True)}
        )
        assert found.best_interval is not None
        held += found.best_interval.low <= best <= found.best_interval.high
    assert 0.75 < held / 60 < 0.99


@pytest.mark.parametrize("direction", ["falls", "rises"])
def test_an_end_outside_the_sizes_is_flagged(direction: str) -> None:
    sign = -1 if direction == "rises" else 1
    found = parabola({size: sign * np.log(size / 3e6) ** 2 for size in SIZES.values()}, direction)
    assert found.best == pytest.approx(3e6)
    assert found.problem == "outside the measured sizes"
    assert found.to_json()["best_parameters"] == pytest.approx(3e6)


@pytest.mark.parametrize("best, expected", [(3e6, 0.0), (1e3, np.inf)])
@pytest.mark.parametrize("direction", ["falls", "rises"])
def test_the_wrong_way_up_is_flagged(best: float, expected: float, direction: str) -> None:
    """The metric is worst at `best`, and goes on getting better away from it."""
    sign = 1 if direction == "rises" else -1
    found = parabola({size: sign * np.log(size / best) ** 2 for size in SIZES.values()}, direction)
    assert found.problem == "no best size"
    assert found.best == expected
    assert found.to_json()["best_parameters"] is None


def test_noise_that_hides_the_end_gives_an_open_interval() -> None:
    found = parabola({100_000: 1.0, 200_000: 0.7, 400_000: 1.1, 800_000: 0.9, 1_600_000: 1.05})
    assert found.best_interval is not None
    assert not all(np.isfinite(found.best_interval))
    assert (
        json.loads(json.dumps(found.to_json(), allow_nan=False))["best_parameters_interval"].count(
            None
        )
        > 0
    )


def test_the_best_size_grows_as_it_was_made_to() -> None:
    found = fit_isoflop(
        [point for point in ladder() if point.family == "ar"],
        "next_word_accuracy",
        "rises",
        "paper",
    )
    assert [parabola.best for parabola in found.fitted] == pytest.approx(
        [best_size(budget) for budget in BUDGETS]
    )
    assert isinstance(found.growth, Growth)
    assert found.growth.exponent == pytest.approx(GROWTH)
    assert found.growth.exponent_interval == pytest.approx((GROWTH, GROWTH), rel=1e-4)
    assert found.growth.c0_flops == pytest.approx(2 * BUDGETS[0] * 1e18)
    assert found.growth.parameters_at_c0 == pytest.approx(best_size(BUDGETS[0]))


def test_only_sizes_that_are_known_count_for_growth() -> None:
    points: list[Point] = []
    for budget, best, curvature in (
        (1e-6, 2e5, 1),
        (2e-6, 3e6, 1),
        (4e-6, 4e5, 1),
        (8e-6, 3e5, -1),
    ):
        points += points_at(
            {size: curvature * np.log(size / best) ** 2 for size in SIZES.values()}, budget
        )
    points += points_at({100_000: 1.0, 200_000: 1.0}, 16e-6)
    found = fit(points)
    assert [getattr(of, "problem", None) for of in found.parabolas.values()] == [
        "",
        "outside the measured sizes",
        "",
        "no best size",
        None,
    ]
    assert isinstance(found.growth, Growth)
    assert found.growth.exponent == pytest.approx(0.5)
    assert found.growth.exponent_interval is None
    assert found.parabolas[16e-6] == NotFitted("a parabola needs 3 sizes, and there are 2")
    budgets = json.loads(json.dumps(found.to_json(), allow_nan=False))["budgets"]
    assert [row["budget_eflops"] for row in budgets] == [1e-6, 2e-6, 4e-6, 8e-6, 16e-6]


def test_a_metric_that_is_the_same_for_all_sizes_has_no_best() -> None:
    found = fit(points_at(dict.fromkeys(SIZES.values(), 0.7)))
    assert [parabola.problem for parabola in found.fitted] == ["no best size"]
    assert found.growth == NotFitted(
        "growth needs 2 budgets whose best size lies inside the measured ones; there are 0"
    )
