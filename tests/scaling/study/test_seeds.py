"""Means over seeds against scipy and against sums by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cola_train.scaling.study.seeds import SeedMean, less, over_seeds, student_quantile


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
def test_quantiles_are_students(level: float) -> None:
    for degrees in (*range(1, 40), 400, 401):
        expected = stats.t.ppf((1 + level) / 2, degrees)
        assert student_quantile(level, degrees) == pytest.approx(expected, rel=1e-9)


def test_an_interval_by_hand() -> None:
    # s = 1, t(2) = 4.302653: 4.302653 / sqrt(3).
    assert over_seeds([1.0, 2.0, 3.0]) == SeedMean(2.0, pytest.approx(2.484138, abs=1e-6), 3)


def test_fewer_than_three_seeds_have_no_interval() -> None:
    assert over_seeds([]) is None
    assert over_seeds([5.0]) == SeedMean(5.0, None, 1)
    assert over_seeds([5.0, 6.0]) == SeedMean(5.5, None, 2)


@given(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=12))
def test_intervals_are_scipys(values: list[float]) -> None:
    found = over_seeds(values)
    assert found is not None
    error = np.std(values, ddof=1) / len(values) ** 0.5
    width = stats.t.ppf(0.975, len(values) - 1) * error
    assert found.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert found.half_width == pytest.approx(width, rel=1e-6, abs=1e-9)


def test_differences_are_paired_by_seed() -> None:
    # Seeds differ by 10, trials by 1: unpaired this would be uncertain.
    ours = {1: 11.0, 2: 21.1, 3: 30.9, 5: 99.0}
    theirs = {3: 30.0, 2: 20.0, 1: 10.0, 4: -99.0}
    found = less(ours, theirs)
    assert found == SeedMean(pytest.approx(1.0), pytest.approx(0.1 * 4.302653 / 3**0.5), 3)
    assert less({1: 1.0}, {2: 1.0}) is None
