"""Time, memory and rates against what is known of them."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cola_train.bench.machine import Clock, Memory, gflops, spread
from cola_train.devices import matrix_seconds

CPU = torch.device("cpu")


def test_cpu_time_does_not_pass_while_others_work_and_wall_time_does() -> None:
    assert Clock(CPU, threads=1).kind == "cpu"
    assert Clock(CPU, threads=1).time(lambda: time.sleep(0.2)) < 0.1
    assert Clock(CPU, threads=2).kind == "wall"
    assert Clock(CPU, threads=2).time(lambda: time.sleep(0.2)) >= 0.2


def test_rates_follow_from_the_median_product() -> None:
    assert gflops(CPU, [1.0, 2.0, 90.0]) == pytest.approx(2 * 1024**3 / 2.0 / 1e9)
    seconds = matrix_seconds(CPU, torch.float32, Clock(CPU, 1).read)
    # Slower than a tenth of a GFLOP/s or faster than any core there is: not this product.
    assert 0.1 < gflops(CPU, seconds) < 10_000


def test_memory_is_of_its_own_time() -> None:
    before = torch.ones(60_000_000)  # 240 MB, gone again
    del before
    memory = Memory(CPU)
    assert memory.peak() - memory.begin < 50e6
    during = torch.ones(30_000_000)
    del during
    assert 110e6 < memory.peak() - memory.begin < 170e6


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=9))
def test_a_spread_is_numpys(runs: list[float]) -> None:
    found = spread(runs)
    quartiles = np.percentile(runs, [0, 25, 50, 75, 100])
    names = ("min", "lower_quartile", "median", "upper_quartile", "max")
    assert [found[name] for name in names] == pytest.approx(quartiles.tolist())
    assert found["runs"] == runs
