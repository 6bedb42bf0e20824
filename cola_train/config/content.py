"""Files that a user gives: read without waiting; the whole of one bounded, and read once."""

import errno
import os
import stat
import time
from io import BufferedReader, FileIO
from pathlib import Path

# Far more than any such file of people's needs: lists of prompts, tokenizers, manifests.
MOST_BYTES = 2**27
_PIECE_BYTES = 2**16
# How long a pipe may have no writer, and how long its content may take to come.
_WRITER_SECONDS, _CONTENT_SECONDS = 3, 30


def read_bytes(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """The content of a file, or what comes through a pipe, which can be read only once.

    Raises:
        OSError: no such file, one that may not be read or has more than `most_bytes`; a folder, a
            device, or a pipe that nobody writes or that does not end.
    """
    try:
        # Unbuffered, so that a pipe without anything in it can be told from one that has ended.
        with open(path, "rb", buffering=0, opener=without_waiting) as file:
            data = _read(file, path, most_bytes + 1)
    except ValueError as error:  # of a name that holds what none can
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    if len(data) > most_bytes:
        problem = f"it has more than {most_bytes:,} bytes, which no such file needs"
        raise OSError(errno.EFBIG, problem, str(path))
    return data


def open_file(path: Path) -> BufferedReader:
    """Open a file to be read in binary, at whatever place.

    Raises:
        OSError: no such file, or one that may not be read; a folder, a device or a pipe, which
            could be waited for without end.
    """
    return open(path, "rb", opener=_file_alone)


def _file_alone(path: str, flags: int) -> int:
    descriptor = without_waiting(path, flags)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is a folder, a pipe or a device, not a file", path)


def without_waiting(path: str, flags: int) -> int:
    """An `opener` for `open`, by which a pipe that nobody has at its other end is open at once."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


def _read(file: FileIO, path: Path, most_bytes: int) -> bytes:
    mode = os.fstat(file.fileno()).st_mode
    is_pipe = stat.S_ISFIFO(mode)
    if not (is_pipe or stat.S_ISREG(mode)):
        raise OSError(errno.EINVAL, "it is neither a file nor a pipe", str(path))
    data, begin = bytearray(), time.monotonic()
    while len(data) < most_bytes:
        # b"" at the end, or without a writer; None where a writer has written nothing yet.
        piece = file.read(min(most_bytes - len(data), _PIECE_BYTES))
        if piece:
            data += piece
            continue
        if piece is not None and (data or not is_pipe):
            break
        patience = _WRITER_SECONDS if piece is not None else _CONTENT_SECONDS
        if time.monotonic() - begin > patience:
            problem = "it is a pipe through which no whole file comes"
            raise OSError(errno.ETIMEDOUT, problem, str(path))
        time.sleep(0.02)
    return bytes(data)
