"""L(N, D): known surfaces are found again, no other solver finds a better one, and what points do
not determine is not stated.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

from cola_train.scaling import surface
from cola_train.scaling.points import Point
from cola_train.scaling.power_law import NotFitted
from cola_train.scaling.surface import Surface, fit_surface
from tests.scaling.coverage import ALPHA, BETA, E, best_size, loss, points

BUDGETS = np.geomspace(1e19, 1e21, 5)


def measured(noise: float = 0.0, budgets: Any = BUDGETS, num_sizes: int = 4) -> list[Point]:
    around = np.geomspace(0.25, 4, num_sizes)
    draws = np.random.default_rng(5)
    return points(draws, lambda flops: around * best_size(flops), loss, budgets, noise)


def turned(some: list[Point], value: Any) -> list[Point]:
    return [
        dataclasses.replace(point, metrics={"loss": value(point.metrics["loss"])}) for point in some
    ]


@pytest.mark.parametrize("rises", [False, True])
def test_a_surface_without_noise_is_found(rises: bool) -> None:
    some = turned(measured(), lambda value: 1 - value / 10) if rises else measured()
    found = fit_surface(some, "loss", "rises" if rises else "falls")
    assert isinstance(found, Surface)
    assert found.limit == pytest.approx(1 - E / 10 if rises else E, rel=1e-3)
    assert found.alpha == pytest.approx(ALPHA, rel=1e-3)
    assert found.beta == pytest.approx(BETA, rel=1e-3)
    assert found.growth == pytest.approx(BETA / (ALPHA + BETA), rel=1e-3)
    assert found.num_points == 20
    assert found.to_json()["alpha_interval"] == pytest.approx([ALPHA, ALPHA], rel=1e-2)


def test_no_other_solver_finds_a_better_one() -> None:
    some = measured(noise=0.004)
    size, tokens = (
        np.log([getattr(point, name) for point in some]) for name in ("parameters", "tokens")
    )
    size, tokens = size - size.mean(), tokens - tokens.mean()
    log = np.log([point.metrics["loss"] for point in some])

    def objective(theta: Any) -> float:
        parts = [theta[0] + 0 * size, theta[1] - theta[3] * size, theta[2] - theta[4] * tokens]
        away = np.abs(np.logaddexp.reduce(parts) - log)
        return float(np.where(away < 1e-3, away**2 / 2, 1e-3 * (away - 5e-4)).sum())

    starts = surface._starts(size, tokens, np.exp(log))
    found = surface._solve(size, tokens, log, starts, surface._STEPS)
    ours = min(objective(theta) for theta in found)
    for start in ([0.5, -1, -1, 0.34, 0.28], [0, 0, 0, 0.5, 0.5], [0.6, -2, -1, 0.2, 0.3]):
        other = minimize(objective, start, method="Nelder-Mead", options={"maxiter": 4000})
        assert ours <= other.fun * (1 + 1e-3)


def test_what_the_points_do_not_determine_is_not_stated() -> None:
    found = fit_surface(measured(noise=0.5), "loss", "falls")
    assert isinstance(found, NotFitted)
    assert "the points do not determine alpha and beta" in found.reason
    assert "the bounds of the search, 0.02 and 2" in found.reason


@pytest.mark.parametrize(
    "some, reason",
    [
        (measured(num_sizes=1, budgets=[1e19]), "L(N, D) needs 3 sizes, and there are 1"),
        (measured(budgets=[1e19]), "L(N, D) needs at least 6 points, and there are 4"),
        (turned(measured(), lambda value: value - 3), "a metric that falls must be above 0"),
    ],
)
def test_no_fit_without_a_reason(some: list[Point], reason: str) -> None:
    found = fit_surface(some, "loss", "falls")
    assert isinstance(found, NotFitted)
    assert reason in found.reason
