"""A run of several processes as a user starts it, in a folder of its own; who of it is there."""

import contextlib
import fcntl
import functools
import os
import select
import shutil
import signal
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from cola_train.json_text import parse_json
from cola_train.operations.watched import JobError
from cola_train.programs import ENDING, start
from cola_train.run_layout import LOGS, RANKS
from tests.helpers.programs import clean_environment


class Program(contextlib.AbstractContextManager["Program"]):
    """`cola-train ARGUMENTS` in `folder`; a context manager that leaves nothing of it behind.

    Attributes:
        run_folder: of the run that it trains.
        folder: where it works. Every process of it does, which is how they are found.
        temporary: its folder for temporary files.
    """

    def __init__(
        self, arguments: Sequence[str], folder: Path, name: str, *, real: bool, terminal: bool
    ) -> None:
        """Start it.

        `real` is the program itself, which imports for itself; without it, it is forked from one
        that has. In a `terminal` it is the session's first process, as in a window of its own.
        """
        self.folder, self.run_folder = folder, folder / "checkpoints" / name
        self._real = real
        # A short path: in it are sockets, whose paths may have 107 bytes.
        self.temporary, self.output = Path(tempfile.mkdtemp()), folder / f"{name}.log"
        self._master, streams = -1, os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        if terminal:
            os.close(streams)
            self._master, streams = os.openpty()
            os.set_blocking(self._master, False)
        self._process = start(
            "cola_train",
            arguments,
            (streams, streams),
            environment={**clean_environment(), "TMPDIR": str(self.temporary)},
            folder=folder,
            first=functools.partial(_begin, terminal, tuple(arguments) if real else None),
        )
        os.close(streams)
        assert self._process.pid is not None
        self.launcher = psutil.Process(self._process.pid)

    def __exit__(self, *rest: object) -> None:
        for process in processes_in(self.folder):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.join()
        self.close_terminal()
        shutil.rmtree(self.temporary, ignore_errors=True)

    @property
    def ended(self) -> int | None:
        """The exit status; None while it runs."""
        self.read_terminal()
        return self._process.exitcode

    def read_terminal(self) -> None:
        """Take what was written to the terminal, which would fill up otherwise."""
        if self._master < 0 or not select.select([self._master], [], [], 0)[0]:
            return
        # EIO is what a terminal says whose programs have all ended.
        with contextlib.suppress(OSError), self.output.open("ab") as output:
            output.write(os.read(self._master, 1 << 16))

    def close_terminal(self) -> None:
        """Close the window."""
        if self._master >= 0:
            os.close(self._master)
            self._master = -1

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, by rank; those that are gone may be missing."""
        for path in self.run_folder.glob(f"{LOGS}/*-{self._process.pid}/{RANKS}"):
            return _living(parse_json(path.read_text()))
        # It names them once all have been started. A launcher that was forked forks them itself.
        with contextlib.suppress(psutil.NoSuchProcess):
            children = self.launcher.children()
            if not self._real:
                return children
            return [
                rank for one in children if "forkserver" in _command(one) for rank in one.children()
            ]
        return []

    def said(self) -> str:
        """All that its processes said."""
        logs = [self.output, *self.run_folder.glob(f"{LOGS}/*/rank-*.log")]
        texts = {log: log.read_text(errors="replace") for log in logs if log.is_file()}
        return "\n".join(f"--- {log.name}\n{text[-4000:]}" for log, text in texts.items())

    def failure(self, what: str) -> JobError:
        """An error that shows all that was said."""
        return JobError(f"{what}\n{self.said()}")


def processes_in(folder: Path) -> list[psutil.Process]:
    """Every process that works in this folder, has it in a variable, or has a file of it open.

    Those that are stopped are there; those that only wait to be collected (zombies) are not.
    """
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        with contextlib.suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            place = str(folder)
            open_files = (file.path for file in process.open_files())
            if (
                process.cwd() == place
                or any(place in value for value in process.environ().values())
                or any(path.startswith(place + os.sep) for path in open_files)
            ):
                found.append(process)
    return found


def wait_until_none(program: Program, seconds: float) -> float:
    """Wait until nothing of a program is there; returns how long it took.

    Raises:
        JobError: something still is after `seconds`.
    """
    began = time.monotonic()
    while left := processes_in(program.folder):
        program.read_terminal()
        if time.monotonic() - began > seconds:
            names = [f"{process.pid} ({_state(process)})" for process in left]
            raise program.failure(f"still there after {seconds:.0f} s: {', '.join(names)}")
        time.sleep(0.1)
    return time.monotonic() - began


def _begin(terminal: bool, arguments: tuple[str, ...] | None) -> None:
    """The first thing that the program's process does."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # not as these tests were started
    os.setsid()
    if terminal:
        fcntl.ioctl(1, termios.TIOCSCTTY, 0)
        os.dup2(1, 0)
    if arguments is not None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        os.execv(sys.executable, [sys.executable, "-m", "cola_train", *arguments])


def _living(numbers: Sequence[int]) -> list[psutil.Process]:
    found = []
    for number in numbers:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(number))
    return found


def _command(process: psutil.Process) -> str:
    return _asked(lambda: " ".join(process.cmdline()))


def _state(process: psutil.Process) -> str:
    return _asked(lambda: f"{process.status()}, parent {process.ppid()}, {process.cmdline()[-1:]}")


def _asked(ask: Callable[[], str]) -> str:
    try:
        return ask()
    except psutil.Error:
        return "gone"
