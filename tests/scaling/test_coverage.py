"""Intervals hold the truth: a few curves of each setting here, 200 in docs/scaling.md's table."""

from pathlib import Path

import pytest

from cola_train.scaling.power_law import LEVEL
from tests.scaling.coverage import SETTINGS, coverage

NUM_CURVES = 20
DOCS = Path(__file__).parents[2] / "docs/scaling.md"


@pytest.mark.parametrize("name", SETTINGS)
def test_few_curves_are_missed(name: str) -> None:
    """Of 20 at 95 %, less than one quantity in a thousand is missed more than five times."""
    for quantity, (drawn, held) in coverage(name, NUM_CURVES).items():
        assert drawn == NUM_CURVES, quantity
        assert drawn - held <= 5, quantity


def test_the_table_is_of_these_settings_and_says_what_was_to_show() -> None:
    """Of 200 curves at 95 %, 184 to 196 hold the truth."""
    assert LEVEL == 0.95
    rows = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in DOCS.read_text(encoding="utf-8").splitlines()
        if any(setting.what in line for setting in SETTINGS.values())
    ]
    named = [
        (setting.what, quantity)
        for name, setting in SETTINGS.items()
        for quantity in coverage(name, 1)
    ]
    assert [(row[0], row[1]) for row in rows] == named
    assert all(int(row[2]) >= 190 for row in rows)
    assert all(0.92 <= float(row[3]) <= 0.98 for row in rows)
