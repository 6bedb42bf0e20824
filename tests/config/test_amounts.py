"""Amounts of training, and marks at them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cola_train.config.amounts import Amount, Mark
from cola_train.config.settings import UserError


@pytest.mark.parametrize(
    "text, expected",
    [
        ("5000", Amount(5000, "steps")),
        ("1e6", Amount(1_000_000, "steps")),
        (" 5000 steps ", Amount(5000, "steps")),
        ("3.6e9 tokens", Amount(3_600_000_000, "tokens")),
        ("38.9 EFLOPs", Amount(38_900_000_000_000_000_000, "EFLOPs")),
        ("77.856768 eflops", Amount(77_856_768 * 10**12, "EFLOPs")),
        ("1e-5 EFLOPs", Amount(10**13, "EFLOPs")),
    ],
)
def test_an_amount_is_exactly_what_is_written(text: str, expected: Amount) -> None:
    assert Amount.parse(text, "k") == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("soon", "k must be an amount such as '5000 steps'"),
        ("-3", "k must be an amount"),
        ("5 parsecs", "k must be an amount"),
        ("", "k must be an amount"),
        ("2.5 steps", "k must be a whole number of steps, not '2.5 steps'"),
        ("1e-20 EFLOPs", "k must be a whole number of FLOPs"),
    ],
)
def test_anything_else_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Amount.parse(text, "k")


def test_a_mark_at_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="k must be above 0"):
        Mark.parse("every 0 steps", "k")


@given(st.integers(1, 50), st.booleans(), st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_a_mark_is_passed_when_its_point_lies_within_a_step(
    point: int, repeats: bool, sizes: list[int]
) -> None:
    mark, before = Mark(Amount(point, "tokens"), repeats), 0
    for size in sizes:
        counted = range(before + 1, before + size + 1)
        assert mark.passed(before, before + size) == any(
            count % point == 0 if repeats else count == point for count in counted
        )
        before += size
