"""The disk under a folder: its speed, its space, and whether atomic writing can rely on it."""

import contextlib
import fcntl
import os
import resource
import shutil
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from cola_train.config.settings import UserError, require

_BLOCK = 8 * 2**20
_LARGEST = 256_000_000 // _BLOCK
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Disk:
    """The disk under `folder`; what could not be measured is None."""

    folder: str
    file_system: str
    total_bytes: int
    free_bytes: int
    failure: str | None  # why it could not be tried
    measured_bytes: int
    write_gb_per_s: float | None  # fsync included
    read_gb_per_s: float | None  # after asking the system to drop what it cached
    rename_atomic: bool | None  # a reader sees the old file or the new one at every moment
    flock: bool | None
    shared_memory_bytes: int | None
    shared_memory_free_bytes: int | None
    open_files: int | None  # how many this process may hold, None without limit

    def lines(self) -> list[tuple[str, str]]:
        answers = {True: "yes", False: "no", None: "not tried"}
        open_files = "no limit" if self.open_files is None else f"at most {self.open_files}"
        return [
            ("folder", f"{self.folder} ({self.file_system})"),
            ("space", _space(self.total_bytes, self.free_bytes, 1)),
            ("write, fsync", self._speed(self.write_gb_per_s)),
            ("read", self._speed(self.read_gb_per_s)),
            ("rename is atomic", answers[self.rename_atomic]),
            ("flock works", answers[self.flock]),
            ("/dev/shm", _space(self.shared_memory_bytes, self.shared_memory_free_bytes, 2)),
            ("open files", open_files),
        ]

    def _speed(self, gb_per_s: float | None) -> str:
        if gb_per_s is None:
            return "not measured"
        return f"{gb_per_s:.2f} GB/s ({self.measured_bytes / 1e6:.0f} MB)"


def _space(total: int | None, free: int | None, digits: int) -> str:
    if total is None or free is None:
        return "none"
    return f"{total / 1e9:.{digits}f} GB, {free / 1e9:.{digits}f} GB free"


def existing_folder(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that exists.

    Raises:
        UserError: that is no folder, or it may not be looked at.
    """
    rule = "--folder must be a folder, or one that can be made"
    found = folder.absolute()
    try:
        while not found.exists():
            found = found.parent
    except OSError as error:
        raise UserError(f"{rule}; {found}: {error.strerror}.") from error
    require(found.is_dir(), f"{rule}; {found} is a file. Choose another.")
    return found


def measure_disk(folder: Path) -> Disk:
    """Try the disk under an existing folder; whatever is written there is removed."""
    usage = shutil.disk_usage(folder)
    blocks = min(_LARGEST, usage.free // 4 // _BLOCK)
    failure = write = read = rename_atomic = flock = None
    try:
        if blocks:
            write, read = _speeds(folder, blocks)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor.") as name:
            rename_atomic = _rename_is_atomic(Path(name))
            flock = _flock_works(Path(name))
    except OSError as error:
        failure = error.strerror or str(error)
    shared = shutil.disk_usage(_SHARED_MEMORY) if _SHARED_MEMORY.is_dir() else None
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return Disk(
        folder=str(folder),
        file_system=_file_system(folder),
        total_bytes=usage.total,
        free_bytes=usage.free,
        failure=failure,
        measured_bytes=blocks * _BLOCK,
        write_gb_per_s=write,
        read_gb_per_s=read,
        rename_atomic=rename_atomic,
        flock=flock,
        shared_memory_bytes=shared.total if shared else None,
        shared_memory_free_bytes=shared.free if shared else None,
        open_files=None if limit == resource.RLIM_INFINITY else limit,
    )


def _speeds(folder: Path, blocks: int) -> tuple[float, float]:
    # Random bytes, because some file systems compress. The file has no name, so that nothing stays
    # however this process ends.
    block = bytearray(os.urandom(_BLOCK))
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for _ in range(blocks):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        write_seconds = time.perf_counter() - start
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        while file.readinto(block):
            pass
        read_seconds = time.perf_counter() - start
    gigabytes = blocks * _BLOCK / 1e9
    return gigabytes / write_seconds, gigabytes / read_seconds


def _rename_is_atomic(folder: Path) -> bool:
    # One thread replaces a file, another reads it by name: it must always be there, and whole.
    target, new, versions = folder / "target", folder / "new", (b"a" * 4096, b"b" * 4096)
    target.write_bytes(versions[0])
    done = threading.Event()

    def is_always_whole() -> bool:
        with contextlib.suppress(OSError):
            while target.read_bytes() in versions:
                if done.is_set():
                    return True
        return False

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(is_always_whole)
        try:
            for version in versions * 25:
                new.write_bytes(version)
                new.replace(target)
                if target.read_bytes() != version:
                    return False
        finally:
            done.set()
    return reader.result()


def _flock_works(folder: Path) -> bool:
    # A lock must be there to take, and to be taken only once.
    path = folder / "lock"
    with path.open("wb") as first, path.open("wb") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _file_system(folder: Path) -> str:
    resolved = folder.resolve()
    partitions = psutil.disk_partitions(all=True)
    above = [found for found in partitions if resolved.is_relative_to(found.mountpoint)]
    # Of several on one mount point the last covers the others.
    deepest = max(reversed(above), key=lambda found: len(found.mountpoint), default=None)
    return deepest.fstype if deepest else "unknown"
