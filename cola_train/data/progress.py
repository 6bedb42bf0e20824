"""What is said to the user while data is made: lines and bars on stderr, and why a file could not be read."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cola_train.config.settings import UserError


def say(message: str) -> None:
    """One line to the user, on stderr so that stdout stays free for results."""
    tqdm.write(message, file=sys.stderr)


def progress_bar(description: str, unit: str, total: int | None = None, divisor: int = 1000) -> Any:
    """A bar on stderr; rare updates where stderr is a log file rather than a terminal."""
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(desc=description, unit=unit, total=total, unit_scale=True, unit_divisor=divisor, mininterval=interval)


@contextlib.contextmanager
def read_errors_explained(path: Path) -> Iterator[None]:
    """Turn an OSError of the body (no permission, a lost disk, ...) into one UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}. Check that it exists and may be read.") from error
