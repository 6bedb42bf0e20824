"""How verbs of this folder report: lines on stdout, the ends of logs."""

import sys
from pathlib import Path

_LAST_LINES = 30


def report(text: object) -> None:
    """Write a line to stdout at once: the next may take long, or never come."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def last_lines(log: Path) -> list[str]:
    """The end of a log, to be shown with a failure."""
    return log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
