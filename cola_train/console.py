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
    return tqdm(
        desc=description,
        unit=unit,
        total=total,
        unit_scale=True,
        unit_divisor=divisor,
        mininterval=0.2 if sys.stderr.isatty() else 30.0,
    )


def aligned(rows: Sequence[Sequence[str]], *, numbers: bool = False) -> list[str]:
    """One line per row, in columns; with `numbers` all but the first column are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [text.ljust(width) for text, width in zip(row, widths)]
        if numbers:
            cells[1:] = [text.rjust(width) for text, width in zip(row[1:], widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return lines
