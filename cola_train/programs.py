"""Programs of this package as processes of their own, whose imports are done.

Imports take longer than the steps of a small run. A process that has done them, and nothing else,
forks one for each program. What uses a GPU cannot be forked: such a program is `fresh`.
"""

import contextlib
import ctypes
import io
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import TextIO

from cola_train.config.settings import require

_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
ENDING = tuple(signal.Signals[name] for name in _NAMES)
"""The signals that terminals, schedulers and users send to end a program."""

_FORKS, _FRESH = multiprocessing.get_context("forkserver"), multiprocessing.get_context("spawn")
_FORKS.set_forkserver_preload(["cola_train.cli", "cola_train.training.run", "lightning.pytorch"])
# One that was forked can fork, for its imports are done; but not while it has threads.
_HERE = multiprocessing.get_context("fork")
_was_forked = False
_PR_SET_PDEATHSIG = 1  # prctl(2)
# Of a path of a socket, and what `multiprocessing` puts behind the folder for temporary files.
_MOST_PATH_BYTES, _SOCKET_NAME_BYTES = 107, len("/pymp-12345678/listener-12345678")


def check_temporary_folder() -> None:
    """Refuse a folder for temporary files where processes cannot meet.

    Raises:
        UserError: its path leaves no room for the names of sockets.
    """
    folder, most = tempfile.gettempdir(), _MOST_PATH_BYTES - _SOCKET_NAME_BYTES
    found = len(os.fsencode(folder))
    require(
        found <= most,
        f"The path of the folder for temporary files ({folder}) has {found} bytes, and processes "
        f"that meet there can use {most}, for the system limits the names of sockets; set TMPDIR "
        "to a folder with a shorter one.",
    )


@contextlib.contextmanager
def handling(
    numbers: Iterable[signal.Signals], handle: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """While the block runs, call `handle` for these signals; the main thread alone may.

    A SIGHUP that whoever started the program wants ignored (`nohup`) stays ignored.
    """
    kept = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    before = {number: signal.signal(number, handle) for number in set(numbers) - kept}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def signal_at_parents_end(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent ends, even while it is stopped.

    For a process of `multiprocessing`. Nothing is done where the system is not Linux.
    """
    prctl, parent = getattr(ctypes.CDLL(None), "prctl", None), multiprocessing.parent_process()
    if prctl is None or parent is None:
        return
    prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(number))
    if not parent.is_alive():  # it ended before
        os.kill(os.getpid(), number)


def start(
    module: str,
    arguments: Sequence[str],
    streams: tuple[int, int],
    *,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    first: Callable[[], None] | None = None,
    fresh: bool = False,
) -> BaseProcess:
    """Start what `python -m MODULE ARGUMENTS` does.

    Args:
        module: of this package, or any other that can be imported.
        arguments: as on a command line.
        streams: file descriptors for standard output and standard error.
        environment: its variables, all of them; None for this process' own.
        folder: where it works; None for here.
        first: what it calls before the module runs; a function that can be imported.
        fresh: a new interpreter that imports for itself.

    Raises:
        UserError: as of `check_temporary_folder`.
    """
    check_temporary_folder()
    files = [Connection(os.dup(stream), readable=False) for stream in streams]
    values = dict(os.environ if environment is None else environment)
    job = (module, arguments, files, values, folder or Path.cwd(), first)
    forks_itself = _was_forked and threading.active_count() == 1
    forks: Callable[..., BaseProcess] = _HERE.Process if forks_itself else _FORKS.Process
    make: Callable[..., BaseProcess] = _FRESH.Process if fresh else forks
    process = make(target=_run, args=(*job, not fresh))
    # A signal to all processes of a terminal or a job must not end the one that forks: its children
    # are waited for through it. They take what is kept back here when they are ready. Starting the
    # tracker lets SIGTERM and SIGINT through again, so that comes before.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for file in files:
            _close(file)
    return process


def _close(file: Connection) -> None:
    # Others of the same file stay open, and say it if it matters.
    with contextlib.suppress(OSError):
        file.close()


def _run(
    module: str,
    arguments: Sequence[str],
    files: Sequence[Connection],
    environment: Mapping[str, str],
    folder: Path,
    first: Callable[[], None] | None,
    forked: bool,
) -> None:
    global _was_forked
    _was_forked = forked
    for number, file in enumerate(files, start=1):
        os.dup2(file.fileno(), number)
        _close(file)
    # Anew: those that it was forked with know what other files could do (whether they seek).
    sys.stdout = _opened(sys.stdout, 1, by_line=os.isatty(1))
    sys.stderr = _opened(sys.stderr, 2, by_line=True)
    # Processes that it starts itself are started as in any program, not as this one was.
    multiprocessing.set_start_method(None, force=True)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    os.chdir(folder)
    sys.argv = [module, *arguments]
    for number in ENDING:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if first is not None:
        first()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _opened(before: TextIO, number: int, *, by_line: bool) -> TextIO:
    """A text stream as Python opens it, with encoding and errors as of the one `before`."""
    return io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(number, "w", closefd=False)),
        encoding=before.encoding,
        errors=before.errors,
        line_buffering=by_line,
    )
