"""What the user is told: lines, progress bars and tables."""

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
    """One line per row, in columns; with `numbers` all but the first column are right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def cell(text: str, column: int) -> str:
        return text.rjust(widths[column]) if numbers and column > 0 else text.ljust(widths[column])

    return [
        "  ".join(cell(text, column) for column, text in enumerate(row)).rstrip() for row in rows
    ]
