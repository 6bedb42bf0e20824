"""What is said to the user while data is made: lines and bars on stderr, and why a file could not
be read.
"""

import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm


def say(message: str) -> None:
    """One line to the user, on stderr so that stdout stays free for results."""
    tqdm.write(message, file=sys.stderr)


def progress_bar(description: str, unit: str, total: int | None = None, divisor: int = 1000) -> Any:
    """A bar on stderr; rare updates where stderr is a log file rather than a terminal."""
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(
        desc=description,
        unit=unit,
        total=total,
        unit_scale=True,
        unit_divisor=divisor,
        mininterval=interval,
    )


def aligned(rows: Sequence[Sequence[str]], *, numbers: bool = False) -> list[str]:
    """A line a row, columns as wide as they need; with `numbers` all but the first end at the same
    place.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def cell(text: str, column: int) -> str:
        return text.rjust(widths[column]) if numbers and column > 0 else text.ljust(widths[column])

    return [
        "  ".join(cell(text, column) for column, text in enumerate(row)).rstrip() for row in rows
    ]
