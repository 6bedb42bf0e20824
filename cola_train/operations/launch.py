"""Start the processes of a run on this machine, pass signals on to them, and say how they ended.

They are tied to their launcher, and meet in a file that has no name, so that nobody else finds it
and nothing of it stays: no port is opened beyond the machine itself.
"""

import contextlib
import functools
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

from cola_train.config.settings import INTERRUPTED, UserError, require
from cola_train.console import only_warned
from cola_train.files import write_atomically, write_errors_explained
from cola_train.operations.report import last_lines
from cola_train.operations.runs import list_runs
from cola_train.processes import STORE
from cola_train.programs import ENDING, handling, signal_at_parents_end, start
from cola_train.run_folder import Status, write_unsaid_end
from cola_train.run_layout import LOGS, RANKS

# From a signal, or a first failure, to SIGKILL.
_SECONDS_TO_SAVE = 300


def launch(
    arguments: Sequence[str], num_processes: int, run_folder: Path, *, uses_gpu: bool
) -> int:
    """Run `cola-train ARGUMENTS`, which trains the run, in `num_processes` processes.

    Process 0 writes to this terminal, the others into a folder of their own in the run's logs; the
    end of the log of one that failed is shown. How process 0 ended is written to the run's status
    where it could not do so itself.

    Returns:
        The exit status of the process that failed first, or 0. After a signal 128 + its number, as
        a shell does, whether or not the processes could save: status.json says.

    Raises:
        UserError: no folder for the logs can be made.
    """
    logs = run_folder / LOGS / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    try:
        logs.mkdir(parents=True)
    except OSError as error:
        reason = f"The folder {logs} for the run's logs cannot be made: {error.strerror or error}."
        raise UserError(f"{reason} Choose another runs_folder.") from error
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    require(hasattr(os, "memfd_create"), "Several processes of a run need Linux: start one alone.")
    with os.fdopen(os.memfd_create("meeting"), "wb") as store:
        ranks = _Ranks()
        with handling(ENDING, ranks.pass_on), ranks.ended_on_error():
            for rank in range(num_processes):
                variables = _place(rank, num_processes)
                shared = Connection(os.dup(store.fileno()), readable=False)
                with _streams(rank, logs) as streams:
                    ranks.add(
                        start(
                            "cola_train",
                            arguments,
                            streams,
                            environment={**os.environ, **variables},
                            first=functools.partial(_join_launcher, shared),
                            fresh=uses_gpu,
                        )
                    )
            with only_warned(f"the processes' numbers are not in {logs}"):
                write_atomically(logs / RANKS, json.dumps(ranks.numbers()) + "\n")
            ranks.wait()
    for row in list_runs(run_folder):
        if row.state == "died":
            reason = f"process 0 {_in_words(ranks.exit_of_first)}"
            write_unsaid_end(run_folder, Status("failed", row.step, reason))
    if ranks.signals:
        name = signal.Signals(ranks.signals[0]).name
        sys.stderr.write(f"cola-train: {name} was passed on to all processes\n")
        return 128 + ranks.signals[0]
    if ranks.first_failure is None:
        return 0
    rank, status = ranks.first_failure
    if status == INTERRUPTED:
        return INTERRUPTED
    if status < 0:
        name = signal.Signals(-status).name
        sys.stderr.write(
            f"cola-train: error: process {rank} was ended by {name}, and so were the others. The "
            "same command again goes on from the last checkpoint.\n"
        )
    if rank > 0:  # process 0 has said it here
        log = _log(rank, logs)
        with contextlib.suppress(OSError):
            if lines := last_lines(log):
                heading = f"cola-train: process {rank} failed first; the end of {log}:"
                sys.stderr.write("\n".join([heading, *lines, ""]))
    return status if status > 0 else 128 - status


class _Ranks:
    """The processes of a launch.

    Attributes:
        signals: those that this process got, in order.
        first_failure: which rank ended first with another status than 0, and with which; minus the
            signal's number where a signal ended it.
    """

    def __init__(self) -> None:
        self._all: list[BaseProcess] = []
        self._running: list[BaseProcess] = []
        self.signals: list[int] = []
        self.first_failure: tuple[int, int] | None = None

    def add(self, process: BaseProcess) -> None:
        """Take one that has just been started; those come by rank."""
        self._all.append(process)
        self._running.append(process)

    def numbers(self) -> list[int | None]:
        """The processes' numbers, by rank."""
        return [process.pid for process in self._all]

    @property
    def exit_of_first(self) -> int | None:
        """The exit status of process 0, once it has ended."""
        return self._all[0].exitcode

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: all get it."""
        self.signals.append(number)
        self._send(number)

    def wait(self) -> None:
        """Wait for all; after a signal, or the first end, not for longer than saving may take."""
        if self.signals:  # some had not been started when it came
            self._send(self.signals[0])
        kill_at: float | None = None
        while self._running:
            wait([process.sentinel for process in self._running], timeout=1)
            for process in [process for process in self._running if process.exitcode is not None]:
                self._running.remove(process)
                if process.exitcode and self.first_failure is None:
                    self.first_failure = self._all.index(process), process.exitcode
                    if not self.signals:
                        self._send(signal.SIGTERM)
                self._send(signal.SIGCONT)  # where one ends the others do: let them see it
            if self.signals or len(self._running) < len(self._all):
                kill_at = kill_at or time.monotonic() + _SECONDS_TO_SAVE
            if kill_at is not None and time.monotonic() > kill_at:
                self._send(signal.SIGKILL)

    @contextlib.contextmanager
    def ended_on_error(self) -> Iterator[None]:
        """End those that run if the block fails: without the others they would wait for them."""
        try:
            yield
        except BaseException:
            self._send(signal.SIGTERM)
            wait_until = time.monotonic() + _SECONDS_TO_SAVE
            for process in self._running:
                process.join(max(0, wait_until - time.monotonic()))
            self._send(signal.SIGKILL)
            raise

    def _send(self, number: int) -> None:
        for process in self._running:
            with contextlib.suppress(ProcessLookupError):
                assert process.pid is not None
                os.kill(process.pid, number)
                os.kill(process.pid, signal.SIGCONT)  # one that was stopped heeds nothing else


def _in_words(status: int | None) -> str:
    if status is None or status >= 0:
        return f"ended with exit status {status}"
    name = signal.Signals(-status).name
    return f"was ended by {name}" + (" (kill -9, lack of memory)" if name == "SIGKILL" else "")


def _log(rank: int, logs: Path) -> Path:
    return logs / f"rank-{rank}.log"


@contextlib.contextmanager
def _streams(rank: int, logs: Path) -> Iterator[tuple[int, int]]:
    if rank == 0:
        yield 1, 2
        return
    with write_errors_explained(_log(rank, logs)):
        file = os.open(_log(rank, logs), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        yield file, file
    finally:
        with contextlib.suppress(OSError):  # nothing was written by it
            os.close(file)


def _place(rank: int, num_processes: int) -> dict[str, str]:
    """The variables that tell a process its place, and keep what it says on this machine."""
    number, count = str(rank), str(num_processes)
    place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback is not None:
        for library in ("GLOO", "NCCL"):
            name = f"{library}_SOCKET_IFNAME"
            place[name] = os.environ.get(name, loopback)
    return place


def _join_launcher(store: Connection) -> None:
    """Take no signals of the launcher's terminal, and end when the launcher does."""
    os.setsid()
    # By this path each process opens the file anew, as its locks want it.
    os.environ[STORE] = f"/proc/self/fd/{os.dup(store.fileno())}"
    signal_at_parents_end(signal.SIGCONT)  # stopped, it would not see what the thread sees
    threading.Thread(target=_end_with_launcher, daemon=True).start()


def _end_with_launcher() -> None:
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    wait([launcher.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_SECONDS_TO_SAVE)
    os.kill(os.getpid(), signal.SIGKILL)
