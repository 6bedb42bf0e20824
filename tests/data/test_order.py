"""The order of rows, against enumeration and chance."""

import itertools
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cola_train.data.batch import row_index


@given(
    num_rows=st.integers(1, 3000),
    epoch=st.integers(0, 10**6),
    data_seed=st.integers(-(2**70), 2**70),
)
@example(num_rows=1, epoch=0, data_seed=0)
@example(num_rows=2, epoch=1, data_seed=0)
@example(num_rows=3, epoch=0, data_seed=1)
@example(num_rows=64, epoch=0, data_seed=1)
@example(num_rows=65, epoch=0, data_seed=1)
@example(num_rows=4096, epoch=2, data_seed=1)
def test_each_epoch_holds_every_row_exactly_once(num_rows: int, epoch: int, data_seed: int) -> None:
    positions = epoch * num_rows + np.arange(num_rows)
    assert sorted(row_index(positions, num_rows, data_seed).tolist()) == list(range(num_rows))


@given(
    positions=st.lists(st.integers(0, 10**12), min_size=1, max_size=20),
    num_rows=st.integers(1, 10**9),
)
def test_an_array_of_positions_gives_what_each_gives_alone(
    positions: list[int], num_rows: int
) -> None:
    together = row_index(np.array(positions), num_rows, 7)
    assert together.tolist() == [row_index(position, num_rows, 7) for position in positions]
    assert row_index(np.array([positions, positions]), num_rows, 7).shape == (2, len(positions))


def test_the_order_is_this_one_for_ever() -> None:
    # A change would silently reorder the data of every run that is resumed after it.
    assert row_index(np.arange(8), 10**9, 6198).tolist() == [
        69556484,
        281923609,
        525144166,
        943828616,
        746350589,
        837951478,
        610729117,
        565442018,
    ]
    assert row_index(np.arange(10), 5, 6198).tolist() == [2, 1, 3, 0, 4, 0, 2, 1, 3, 4]


def test_epochs_and_seeds_differ() -> None:
    num_rows = 1000
    first, second = row_index(np.arange(2 * num_rows), num_rows, 0).reshape(2, num_rows)
    other_seed = row_index(np.arange(num_rows), num_rows, 1)
    for one, other in itertools.combinations([first, second, other_seed, np.arange(num_rows)], 2):
        # Two random permutations agree at 1 place on average; 8 or more at one in a million.
        assert int((one == other).sum()) < 8


def test_a_billion_rows_need_no_table() -> None:
    row_index(np.arange(32), 10**9, 3)
    tracemalloc.start()
    rows = row_index(np.arange(4096) + 123_456_789_012, 10**9, 3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000
    assert len(set(rows.tolist())) == 4096  # all of one epoch
    assert rows.min() >= 0
    assert rows.max() < 10**9


@pytest.mark.parametrize(
    "num_rows, vary, trials",
    [(2, "epoch", 6000), (3, "epoch", 6000), (4, "epoch", 6000), (3, "seed", 200)],
)
def test_every_order_of_a_few_rows_is_as_likely(num_rows: int, vary: str, trials: int) -> None:
    if vary == "epoch":
        orders = row_index(np.arange(num_rows * trials), num_rows, 5).reshape(trials, num_rows)
    else:
        orders = np.stack(
            [row_index(np.arange(num_rows), num_rows, seed) for seed in range(trials)]
        )
    counts = Counter(map(tuple, orders.tolist()))
    permutations = list(itertools.permutations(range(num_rows)))
    expected = trials / len(permutations)
    chi_square = sum((counts[order] - expected) ** 2 / expected for order in permutations)
    # 99.99 % points for 1, 5 and 23 degrees of freedom.
    assert chi_square < {2: 15.1, 3: 25.7, 4: 56.0}[num_rows]


@pytest.mark.parametrize("num_rows", [1000, 10**9])
def test_where_a_position_leads_is_uniform(num_rows: int) -> None:
    # Over seeds at one position, and over neighboring positions of one seed: rows fall evenly in 20
    # bins.
    across_seeds = np.array([row_index(17, num_rows, seed) for seed in range(4000)])
    count = min(num_rows, 100_000)
    differences = np.diff(row_index(np.arange(count), num_rows, 1)) % num_rows
    for rows in (across_seeds, differences):
        counts = np.bincount(rows * 20 // num_rows, minlength=20)
        chi_square = float(((counts - rows.size / 20) ** 2 / (rows.size / 20)).sum())
        assert chi_square < 53.0  # the 99.99 % point for 19 degrees of freedom is 50.8


@pytest.mark.parametrize("position, num_rows", [(-1, 5), (0, 0), (np.array([3, -2]), 5)])
def test_refuses_what_is_no_position(position: int | np.ndarray, num_rows: int) -> None:
    with pytest.raises(ValueError, match="row_index needs num_rows >= 1 and position >= 0"):
        row_index(position, num_rows, 0)
