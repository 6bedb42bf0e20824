"""What the user is told: lines, progress bars and tables. That it cannot be told stops nothing."""

import contextlib
import errno
import os
import select
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO, cast

from tqdm import tqdm

from cola_train.config.settings import UserError


def open_standard_streams() -> None:
    """Where a program was started with a standard stream closed, give it the null device.

    The next file that is opened would get the stream's number, and all that is said into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  # to the end


@contextlib.contextmanager
def outliving_console() -> Iterator[None]:
    """While the block runs, writing to stderr cannot fail: a console that is gone ends no work.

    Standard output is left alone: what is written there is a result, and its loss an error.
    """
    before = sys.stderr
    if isinstance(before, _Outliving):
        yield
        return
    console = _Outliving(before)
    sys.stderr = cast(TextIO, console)
    try:
        yield
    finally:
        sys.stderr = before
        console.end()


class _Outliving:
    """A stream whose writing never fails. Once its reader is gone all goes to the null device.

    A full disk may have room again: what it refuses now is tried again later.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write `text` if that is possible; returns its length."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._see(error)
        return len(text)

    def flush(self) -> None:
        """Write what waits, if that is possible."""
        try:
            self._stream.flush()
        except OSError as error:
            self._see(error)

    def end(self) -> None:
        """Let go of what still cannot be written: the interpreter's end would fail at it."""
        try:
            self._stream.flush()
        except OSError:
            _to_nowhere(self._stream)

    def _see(self, error: OSError) -> None:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            _to_nowhere(self._stream)


def has_no_reader(stream: TextIO) -> bool:
    """Whether a stream is a pipe that nobody reads any more; what it holds is let go then."""
    with contextlib.suppress(OSError):
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        if any(state & select.POLLERR for _, state in poll.poll(0)):
            _to_nowhere(stream)
            return True
    return False


def _to_nowhere(stream: TextIO) -> None:
    # The descriptor itself: libraries write there too, and what the stream still holds must go.
    with contextlib.suppress(OSError):
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


def say(message: str) -> None:
    """One line to the user, on stderr so that stdout stays free for results."""
    tqdm.write(message, file=sys.stderr)


@contextlib.contextmanager
def only_warned(what: str) -> Iterator[None]:
    """Make a warning, that begins with `what`, of an error in what is only looked at or told."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, (UserError, OSError)) else f"{type(error).__name__}: "
        say(f"cola-train: warning: {what}: {kind}{error}")


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
