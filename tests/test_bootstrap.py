"""Percentile intervals against scipy's, and draws that never change."""

import json

import numpy as np
import pytest
from scipy import stats

from cola_train.bootstrap import Interval, bootstrap_generator, percentile_interval


def test_the_interval_is_the_percentile_one_of_scipy() -> None:
    sample = np.random.default_rng(1).gamma(2.0, size=30)
    settings = {"confidence_level": 0.8, "method": "percentile", "n_resamples": 500}
    found = stats.bootstrap((sample,), np.mean, rng=np.random.default_rng(2), **settings)
    assert percentile_interval(found.bootstrap_distribution, 0.8) == pytest.approx(
        tuple(found.confidence_interval), rel=1e-12
    )


def test_values_that_were_drawn_may_be_infinite() -> None:
    resamples = np.array([1.0, 2.0, 3.0] * 3 + [np.inf])
    open_end = percentile_interval(resamples, 0.9, "inverted_cdf")
    assert open_end == Interval(1.0, np.inf)
    assert json.dumps(open_end.to_json(), allow_nan=False) == "[1.0, null]"
    assert percentile_interval(resamples, 0.5, "inverted_cdf") == (1.0, 3.0)


def test_the_draws_are_the_same_each_time_and_others_at_each_address() -> None:
    draws = [bootstrap_generator(place).integers(2**60) for place in (*range(8), *range(8))]
    assert draws[:8] == draws[8:]
    assert len(set(draws)) == 8
    assert bootstrap_generator().integers(2**60) == draws[0]
    # Published figures rest on these.
    assert (
        bootstrap_generator().integers(100, size=5).tolist()
        == np.random.default_rng(0).integers(100, size=5).tolist()
    )
    assert (
        bootstrap_generator(3).integers(100, size=5).tolist()
        == np.random.default_rng([0, 3]).integers(100, size=5).tolist()
    )
