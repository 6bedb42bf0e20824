"""A process that hangs says so, with its rank, its step and what it was doing, and ends."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

# The first process to end takes the others with it; they time out moments later, and must have
# said where they were by then.
_SECONDS_FOR_OTHERS = 8.0


class Watchdog:
    """Ends this process if `beat` is not called for `timeout_seconds`; a context manager.

    A hung collective cannot be left any other way: the thread waits inside the communication
    library. Every process times out, those that wait and the one they wait for, and each says where
    it was.
    """

    def __init__(self, rank: int, timeout_seconds: float) -> None:
        self._rank, self._timeout = rank, timeout_seconds
        # Tells the run's status why it ended; on the process that writes it.
        self.tell: Callable[[str], None] = lambda reason: None
        self.doing, self._waited = "starting", 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def beat(self, doing: str) -> None:
        """The process is alive and begins to do this."""
        self.doing, self._waited = doing, 0.0

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        pause = min(1.0, self._timeout / 4)
        while not self._ended.wait(pause):
            # Not by the clock: while this process is stopped (Ctrl-Z), it does not hang.
            self._waited += pause
            if self._waited > self._timeout:
                self._end(self._waited)

    def _end(self, waited: float) -> None:
        reason = (
            f"rank {self._rank} has been {self.doing} for {waited:.0f} s, longer than "
            f"parallel.timeout_seconds ({self._timeout:g})"
        )
        # In a thread: it may be the disk that hangs.
        threading.Thread(target=self.tell, args=(reason,), daemon=True).start()
        sys.stderr.write(
            f"\ncola-train: error: {reason}. Some process hangs: compare what each rank "
            "says, the one that is not in the forward, backward or a checkpoint of "
            "the others is the one they wait for. The last checkpoint is intact; "
            "run the same command again to go on from it. Where each thread was:\n"
        )
        faulthandler.dump_traceback(file=sys.stderr)
        sys.stderr.flush()
        time.sleep(_SECONDS_FOR_OTHERS)
        os._exit(1)
