"""The C library that counts and strikes file operations (fault.c), and the file that steers it."""

import contextlib
import ctypes
import fcntl
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, get_args

SOURCE = Path(__file__).with_name("fault.c")
VARIABLE = "FAULT_CONTROL"

Mode = Literal["kill", "EIO", "ENOSPC", "full"]
MODES: tuple[Mode, ...] = get_args(Mode)

# As in fault.c.
TAKES_ROOM = ("create", "write", "mkdir", "link", "truncate", "allocate")
_HEAD = struct.Struct("4096s64sIIII")
_LOG = 1 << 20


class Operation(NamedTuple):
    """A file operation: the `number`-th of a process, on `path`, relative to the folder."""

    process: str  # "0" is the command itself, "0.1" the first that it forks
    number: int
    name: str
    path: str
    struck: bool


class Strike(NamedTuple):
    """Which operation is struck, and how."""

    process: str
    number: int
    mode: Mode


def missing() -> str | None:
    """Why the library cannot be built or loaded here; None if it can."""
    if not sys.platform.startswith("linux"):
        return f"file operations are struck on Linux only, not on {sys.platform}"
    if shutil.which("cc") is None:
        return "no C compiler (cc) to build tests/faults/fault.c with"
    return None


def build(folder: Path) -> Path:
    """Compile the library into `folder`."""
    library = folder / "fault.so"
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["cc", *flags, "-o", library, SOURCE, "-ldl", "-lpthread"], check=True)
    return library


def arm() -> None:
    """Count this process' operations and those of its children, as the file in `VARIABLE` says."""
    if ctypes.CDLL(None).fault_arm(os.environ[VARIABLE].encode()):
        raise OSError(f"cannot use {os.environ[VARIABLE]}")


class Control:
    """The control file of one command: made before it starts, read when it has ended."""

    def __init__(self, path: Path, folder: Path, strike: Strike | None) -> None:
        self.path = path
        process, number, mode = strike or ("", 0, None)
        how = 0 if mode is None else 1 + MODES.index(mode)
        place = os.fsencode(folder.resolve())
        path.write_bytes(_HEAD.pack(place, process.encode(), how, number, 0, 0) + bytes(_LOG))

    def operations(self) -> list[Operation]:
        """What was done, in order of time."""
        content = self.path.read_bytes()
        logged = _HEAD.unpack_from(content)[5]
        if logged > _LOG:
            raise OverflowError(f"{logged} bytes of operations; there is room for {_LOG}")
        found = []
        for line in content[_HEAD.size : _HEAD.size + logged].decode(errors="replace").splitlines():
            process, number, name, path, struck = line.split("\t")
            found.append(Operation(process, int(number), name, path, bool(struck)))
        return found

    @contextlib.contextmanager
    def all_ended(self, seconds: float) -> Iterator[None]:
        """Wait until no process of the command lives: each holds a lock on the file.

        Raises:
            TimeoutError: one still does.
        """
        deadline = time.monotonic() + seconds
        with self.path.open("rb") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"a process lives after {seconds:g} s") from None
                    time.sleep(0.01)
            yield
