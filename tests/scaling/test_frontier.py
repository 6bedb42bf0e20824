"""The best size of each budget, told by the others: of surfaces, and of noise alone."""

import numpy as np
import pytest

from cola_train.scaling.frontier import frontier
from cola_train.scaling.points import Point
from tests.scaling.coverage import best_loss, best_size, loss, points

BUDGETS = np.geomspace(1e19, 1e21, 6)
MIDDLE = best_size(1e20)


def surface(sizes: np.ndarray, sign: int = 1, noise: float = 0.0) -> list[Point]:
    return points(
        np.random.default_rng(0),
        lambda flops: sizes,
        lambda size, flops: sign * loss(size, flops),
        BUDGETS,
        noise,
    )


@pytest.mark.parametrize("direction, sign", [("falls", 1), ("rises", -1)])
def test_a_surface_without_noise(direction: str, sign: int) -> None:
    measured = surface(MIDDLE * np.geomspace(0.2, 5, 5), sign)
    found = frontier(measured[::-1], "loss", direction, "model")  # type: ignore[arg-type]
    np.testing.assert_allclose(found.flops, BUDGETS, rtol=1e-9)
    np.testing.assert_allclose(found.parameters, best_size(BUDGETS), rtol=0.2)
    np.testing.assert_allclose(found.values, sign * best_loss(BUDGETS), atol=2e-3)
    assert found.num_at_edge == 0
    assert found.note == ""


def test_a_budget_has_no_say_in_its_own_choice() -> None:
    """Its metrics move, its size does not; nor do the others' values at the size they had."""
    measured = surface(MIDDLE * np.geomspace(0.2, 5, 5), noise=0.01)
    lucky = [
        Point(**{**vars(point), "metrics": {"loss": point.metrics["loss"] - 5}})
        if number == 7
        else point
        for number, point in enumerate(measured)
    ]
    before, after = (frontier(some, "loss", "falls", "model") for some in (measured, lucky))
    assert after.parameters[1] == pytest.approx(before.parameters[1], rel=1e-6)
    assert after.values[1] < before.values[1]
    assert (after.parameters != before.parameters).any()


def test_the_best_of_equal_sizes_is_not_their_luckiest() -> None:
    noise, num_curves = 0.1, 60
    draws = np.random.default_rng(1)
    errors, luckiest = [], []
    for _ in range(num_curves):
        measured = points(
            draws, lambda flops: MIDDLE * np.geomspace(0.2, 5, 5), lambda *at: 2.0, BUDGETS, noise
        )
        errors.append(frontier(measured, "loss", "falls", "model").values.mean() - 2)
        values = np.array([point.metrics["loss"] for point in measured]).reshape(len(BUDGETS), -1)
        luckiest.append(values.min(axis=1).mean() - 2)
    assert abs(np.mean(errors)) < 3 * np.std(errors) / num_curves**0.5
    assert np.mean(luckiest) < -0.8 * noise


def test_a_best_size_outside_the_measured_ones_is_said() -> None:
    found = frontier(surface(MIDDLE * np.geomspace(4, 40, 4)), "loss", "falls", "model")
    assert (found.parameters[:-1] == found.parameters.min()).all()
    assert found.num_at_edge >= 5
    assert f"{found.num_at_edge} of 6 budgets are best at the least or largest size" in found.note


@pytest.mark.parametrize("num_sizes", [1, 2])
def test_few_sizes_are_measured_ones(num_sizes: int) -> None:
    measured = surface(MIDDLE * np.array([1.0, 30.0])[:num_sizes])
    found = frontier(measured, "loss", "falls", "model")
    assert found.parameters == pytest.approx(round(MIDDLE))
    assert found.values == pytest.approx([point.metrics["loss"] for point in measured[::num_sizes]])
    assert found.num_at_edge == (6 if num_sizes == 2 else 0)


def test_one_budget_alone_is_told_nothing() -> None:
    measured = surface(MIDDLE * np.geomspace(0.2, 5, 5))[:5]
    found = frontier(measured, "loss", "falls", "model")
    assert found.parameters == pytest.approx(MIDDLE, rel=1e-6)
    assert found.num_at_edge == 0
