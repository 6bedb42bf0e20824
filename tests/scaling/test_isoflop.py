"""Curves over size at each budget, and how their best sizes grow."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_train.scaling.isoflop import Growth, IsoFLOP, fit_isoflop
from cola_train.scaling.points import Point
from cola_train.scaling.power_law import NotFitted
from cola_train.scaling.size_curve import SizeCurve
from tests.scaling.coverage import best_loss, best_size, loss
from tests.scaling.ladders import SIZES


def points_at(values: dict[int, float], budget: float = 1e-6) -> list[Point]:
    flops = dict.fromkeys(("paper", "model", "executed"), round(budget * 1e18))
    return [
        Point("ar", str(size), size, 10, budget, flops, "run", {"loss": value})
        for size, value in values.items()
    ]


def fit(points: list[Point], direction: Any = "falls") -> IsoFLOP:
    return fit_isoflop(points, "loss", direction, "model")


def curve(values: dict[int, float], direction: Any = "falls") -> SizeCurve:
    (found,) = fit(points_at(values), direction).fitted
    return found


@settings(max_examples=20)
@given(
    off=st.floats(0.6, 1.7),
    flops=st.floats(1e18, 1e22),
    span=st.floats(8, 256),
    num_sizes=st.integers(4, 9),
    rises=st.booleans(),
)
def test_a_surface_without_noise(
    off: float, flops: float, span: float, num_sizes: int, rises: bool
) -> None:
    """The best size and metric of a known surface, of which nobody says the exponents."""
    sizes = np.round(off * best_size(flops) * np.geomspace(span**-0.5, span**0.5, num_sizes))
    sign = -1 if rises else 1
    values = sign * loss(sizes, flops)
    found = curve(
        dict(zip(sizes.astype(int).tolist(), values.tolist(), strict=True)),
        "rises" if rises else "falls",
    )
    assert found.problem == ""
    assert found.best == pytest.approx(best_size(flops), rel=0.05)
    assert found.best_value == pytest.approx(sign * best_loss(flops), abs=2e-3)
    np.testing.assert_allclose(found.at(np.array([found.best])), found.best_value, atol=1e-9)
    np.testing.assert_allclose(found.at(found.parameters), found.values, atol=5e-3)
    assert found.best_interval is not None
    assert found.best_interval.low <= found.best * 1.001
    assert found.best_interval.high >= found.best * 0.999


def test_three_sizes_are_fitted_exactly_and_have_no_interval() -> None:
    values = {100_000: 2.1, 300_000: 2.0, 900_000: 2.2}
    found = curve(values)
    np.testing.assert_allclose(found.at(found.parameters), [*values.values()], rtol=1e-9)
    assert found.problem == ""
    assert found.best_interval is found.value_interval is None


def test_turning_the_metric_over_turns_the_fit_over() -> None:
    values = {100_000: 2.1, 200_000: 2.0, 400_000: 1.97, 800_000: 2.08}
    falls = curve(values)
    rises = curve({size: -value for size, value in values.items()}, "rises")
    assert rises.best == falls.best
    assert rises.best_value == -falls.best_value
    assert rises.best_interval == falls.best_interval
    assert falls.value_interval is not None
    assert rises.value_interval is not None
    # Of 4,000 draws the 100th from below is not quite the 3,900th.
    ends = [-end for end in reversed(falls.value_interval)]
    np.testing.assert_allclose(rises.value_interval, ends, rtol=1e-3)


@pytest.mark.parametrize("direction", ["falls", "rises"])
def test_an_end_outside_the_sizes_is_flagged(direction: str) -> None:
    sign = -1 if direction == "rises" else 1
    found = curve({size: sign * np.log(size / 3e6) ** 2 for size in SIZES.values()}, direction)
    assert found.best > max(SIZES.values())
    assert found.problem == "outside the measured sizes"
    assert found.best_interval is None
    assert found.best_value == pytest.approx(found.at(np.array([800_000.0]))[0])
    assert found.to_json()["best_parameters"] == found.best


@pytest.mark.parametrize("best, expected", [(3e6, 0.0), (1e3, np.inf)])
@pytest.mark.parametrize("direction", ["falls", "rises"])
def test_the_wrong_way_up_is_flagged(best: float, expected: float, direction: str) -> None:
    """The metric is worst at `best`, and goes on getting better away from it."""
    sign = 1 if direction == "rises" else -1
    found = curve({size: sign * np.log(size / best) ** 2 for size in SIZES.values()}, direction)
    assert found.problem == "no best size"
    assert found.best == expected
    assert found.best_interval is None
    assert found.to_json()["best_parameters"] is None


def test_noise_that_hides_the_end_gives_an_open_interval() -> None:
    found = curve({100_000: 1.0, 200_000: 0.7, 400_000: 1.1, 800_000: 0.9, 1_600_000: 1.05})
    assert found.best_interval is not None
    assert not all(np.isfinite(found.best_interval))
    assert (
        json.loads(json.dumps(found.to_json(), allow_nan=False))["best_parameters_interval"].count(
            None
        )
        > 0
    )


def surface_points(budgets: list[float], around: list[float]) -> list[Point]:
    """Sizes around the best one at each budget (EFLOPs)."""
    points: list[Point] = []
    for budget in budgets:
        sizes = [round(best_size(budget * 1e18) * share) for share in around]
        points += points_at({size: float(loss(size, budget * 1e18)) for size in sizes}, budget)
    return points


def test_the_best_size_grows_as_it_was_made_to() -> None:
    found = fit(surface_points([10.0, 20.0, 40.0, 80.0], [0.3, 0.6, 1.2, 2.4, 4.8]))
    assert isinstance(found.growth, Growth)
    assert found.growth.exponent == pytest.approx(0.28 / 0.62, rel=0.01)
    assert found.growth.exponent_interval is not None
    assert found.growth.exponent_interval.low < 0.28 / 0.62 < found.growth.exponent_interval.high
    assert found.growth.c0_flops == 1e19
    assert found.growth.parameters_at_c0 == pytest.approx(best_size(1e19), rel=0.02)


def test_only_sizes_that_are_known_count_for_growth() -> None:
    good = [0.3, 0.6, 1.2, 2.4]
    points = surface_points([10.0], good) + surface_points([20.0], [2.0, 4.0, 8.0, 16.0])
    points += surface_points([40.0], good)
    upside_down = surface_points([80.0], good)
    points += [
        dataclasses.replace(point, metrics={"loss": -point.metrics["loss"]})
        for point in upside_down
    ]
    points += surface_points([160.0], good)[:2]
    found = fit(points)
    assert [getattr(of, "problem", None) for of in found.curves.values()] == [
        "",
        "outside the measured sizes",
        "",
        "no best size",
        None,
    ]
    assert isinstance(found.growth, Growth)
    assert found.growth.exponent == pytest.approx(0.28 / 0.62, rel=0.01)
    assert found.growth.exponent_interval is None
    assert found.curves[160] == NotFitted("a curve needs 3 sizes, and there are 2")
    budgets = json.loads(json.dumps(found.to_json(), allow_nan=False))["budgets"]
    assert [row["budget_eflops"] for row in budgets] == [10, 20, 40, 80, 160]


def test_a_metric_that_is_the_same_for_all_sizes_has_no_best() -> None:
    found = fit(points_at(dict.fromkeys(SIZES.values(), 0.7)))
    assert [curve.problem for curve in found.fitted] == ["no best size"]
    assert found.growth == NotFitted(
        "growth needs 2 budgets whose best size lies inside the measured ones; there are 0"
    )
