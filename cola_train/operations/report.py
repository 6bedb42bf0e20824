"""How verbs of this folder report: lines on stdout, the doctor's sections, the ends of logs."""

import abc
import sys
from pathlib import Path

from cola_train.console import aligned

_LAST_LINES = 30


class Section(abc.ABC):
    """A part of the doctor's report; its title is the class' name."""

    @abc.abstractmethod
    def lines(self) -> list[tuple[str, str]]:
        """Name and text of each line of the report."""

    def __str__(self) -> str:
        lines = [f"  {line}" for line in aligned(self.lines())]
        return "\n".join([type(self).__name__.lower(), *lines, ""])


def report(text: object) -> None:
    """Write a line to stdout at once: the next may take long, or never come."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def last_lines(log: Path) -> list[str]:
    """The end of a log, to be shown with a failure."""
    return log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
