"""Power laws: known ones are found again, and no other solver finds a better one."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import least_squares

from cola_train.scaling.power_law import NotFitted, PowerLaw, fit_power_law


def fit(flops: Any, values: Any, direction: Any = "falls") -> PowerLaw:
    law = fit_power_law(
        np.asarray(flops, dtype=np.float64), np.asarray(values, dtype=np.float64), direction
    )
    assert isinstance(law, PowerLaw)
    return law


def compute(num_points: int, span: float = 100.0) -> Any:
    return 1e18 * np.geomspace(1, span, num_points)


@settings(max_examples=25)
@given(
    limit=st.floats(0, 5),
    amplitude=st.floats(0.1, 3),
    exponent=st.floats(0.05, 1),
    num_points=st.integers(4, 12),
    span=st.floats(8, 1e4),
    rises=st.booleans(),
)
def test_a_law_without_noise_is_found_exactly(
    limit: float, amplitude: float, exponent: float, num_points: int, span: float, rises: bool
) -> None:
    flops = compute(num_points, span)
    y = limit + amplitude * (flops / flops[0]) ** -exponent
    law = fit(flops, 1 - y if rises else y, "rises" if rises else "falls")
    assert law.exponent == pytest.approx(exponent, rel=1e-3)
    assert law.amplitude == pytest.approx(amplitude, rel=2e-3, abs=2e-3)
    assert law.limit == pytest.approx(1 - limit if rises else limit, rel=2e-3, abs=5e-3)
    assert law.note == ""
    np.testing.assert_allclose(law.at(flops), law.values, atol=1e-5)


@settings(max_examples=20)
@given(data=st.data(), num_points=st.integers(4, 8))
def test_no_other_solver_finds_a_better_one(data: st.DataObject, num_points: int) -> None:
    flops = compute(num_points)
    values = np.array(
        data.draw(st.lists(st.floats(0, 5), min_size=num_points, max_size=num_points))
    )
    law = fit(flops, values)
    ratio = flops / flops[0]
    # The least and the greatest exponents that ours may have.
    bounds = ([0, 0, np.log(1e-3 / np.log(100))], [np.inf, np.inf, np.log(20 / np.log(100))])

    def residuals(x: Any) -> Any:
        return x[0] + x[1] * ratio ** -np.exp(x[2]) - values

    starts = [
        (values.min() / 2 + 0.01, 0.1 + np.ptp(values), np.log(exponent))
        for exponent in (0.01, 0.1, 0.4, 1.0, 3.0)
    ]
    others = [least_squares(residuals, start, bounds=bounds) for start in starts]
    assert (
        np.square(law.at(flops) - values).sum()
        <= min(2 * other.cost for other in others) * (1 + 1e-6) + 1e-9
    )
    assert law.limit >= 0
    assert law.amplitude >= 0
    assert law.exponent >= 0


def test_beyond_the_measured_compute_is_wider_and_marked() -> None:
    flops = compute(6)
    law = fit(flops, 2 + (flops / 1e18) ** -0.3 + 0.01 * np.random.default_rng(1).normal(size=6))
    curve = law.to_json()["curve"]
    assert [row["extrapolated"] for row in curve] == [False] * 6 + [True] * 2
    assert [row["eflops"] for row in curve[-2:]] == pytest.approx([300, 1000])
    widths = [row["interval"][1] - row["interval"][0] for row in curve]
    assert widths[4] < widths[5] < widths[6] < widths[7]
    assert law.is_extrapolated(np.array([0.9e18, 1e18, 1e20, 1.1e20])).tolist() == [
        True,
        False,
        False,
        True,
    ]


def test_limits_stay_possible() -> None:
    """A straight fall would lead below 0, and a straight rise of a share above 1."""
    flops = compute(5)
    assert fit(flops, [4.0, 3.0, 2.0, 1.0, 0.01]).limit == 0
    rising = fit(flops, [0.2, 0.4, 0.6, 0.8, 0.99], "rises")
    assert rising.limit == 1
    assert rising.limit_interval.high <= 1
    assert rising.interval_at(1e30).high <= 1


@pytest.mark.parametrize("values", [[1, 2, 3, 4, 5], [2, 2, 2, 2, 2], [2, 1, 3, 1, 3]])
def test_what_does_not_improve_is_flat(values: list[float]) -> None:
    law = fit(compute(5), values)
    assert (law.limit, law.amplitude, law.exponent) == (pytest.approx(np.mean(values)), 0, 0)
    assert law.note == "does not improve with compute"


def test_what_stops_improving_at_once_is_said() -> None:
    assert fit(compute(5), [5, 1, 1, 1, 1]).note == "has reached its limit by the second budget"


@pytest.mark.parametrize(
    "values, direction, reason",
    [
        ([3, 2, 1], "falls", "at least 4 budgets of different FLOPs, and there are 3"),
        ([], "falls", "there are 0"),
        ([3, 2, 1, -0.5], "falls", "must not be negative, and one point has -0.5"),
        ([0.1, 0.5, 1.2, 1.1], "rises", "must not exceed 1, and one point has 1.2"),
    ],
)
def test_no_fit_without_a_reason(values: list[float], direction: Any, reason: str) -> None:
    found = fit_power_law(compute(len(values)), np.array(values, dtype=np.float64), direction)
    assert isinstance(found, NotFitted)
    assert reason in found.to_json()["not_fitted"]


def test_budgets_of_nearly_the_same_compute() -> None:
    """In any order, and equal ones: only different FLOPs are enough for a fit."""
    flops = np.array([1e18, 4e18, 1.01e18, 1.6e19, 1.01e18, 6.4e19])
    values = 2 + (flops / 1e18) ** -0.3
    law = fit(flops, values)
    assert law.flops.tolist() == sorted(flops)
    assert law.exponent == pytest.approx(0.3, rel=1e-3)
    found = fit_power_law(np.array([1e18, 4e18, 1e18, 4e18, 9e18]), np.ones(5), "falls")
    assert found == NotFitted(
        "a power law needs at least 4 budgets of different FLOPs, and there are 3"
    )
