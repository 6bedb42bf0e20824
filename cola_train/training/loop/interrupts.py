"""Signals that ask for the run to be saved and stopped at the next optimizer step."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from cola_train.processes import is_one_of_several
from cola_train.programs import handling

# SIGUSR1 and SIGUSR2 are what SLURM is usually told to send some time before its limit; SIGHUP is a
# terminal that closes.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Set by a signal to this process.

    The processes learn of each other's with the step's counts (module.py) and stop together: a
    handler that communicated would do so amid another collective, and hang.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None

    @property
    def made(self) -> bool:
        """Whether this process was asked to stop."""
        return self.signal_name is not None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals while the block runs; a terminal's second SIGINT interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: FrameType | None) -> None:
            name = signal.Signals(number).name
            # Of several, one Ctrl-C may arrive twice: from the terminal and passed on.
            if name == self.signal_name == "SIGINT" and not is_one_of_several():
                raise KeyboardInterrupt
            self.signal_name = name

        with handling(_SIGNALS, handle):
            yield
