"""The disk under a folder, measured and tried: speed, space, and whether it keeps the promises that
atomic writing builds on.
"""

import fcntl
import os
import resource
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from cola_train.config.settings import UserError

_BLOCK = 8 * 2**20
_LARGEST = 256_000_000 // _BLOCK
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Disk:
    """The disk under `folder`.

    `failure` says why it could not be tried; what could not be measured is None. Speeds are in
    GB/s, writing with fsync, reading after asking the system to forget what it kept in memory.
    `rename_atomic`: a reader sees the old file or the new one at every moment. `open_files`: how
    many this process may hold, None without limit.
    """

    folder: str
    file_system: str
    total_bytes: int
    free_bytes: int
    failure: str | None
    measured_bytes: int
    write_gb_per_s: float | None
    read_gb_per_s: float | None
    rename_atomic: bool | None
    flock: bool | None
    shared_memory_bytes: int | None
    shared_memory_free_bytes: int | None
    open_files: int | None

    def lines(self) -> list[tuple[str, str]]:
        """Name and text of each line of the report."""
        answers = {True: "yes", False: "no", None: "not tried"}
        size = f"{self.measured_bytes / 1e6:.0f} MB"
        shared = "none"
        if self.shared_memory_bytes is not None and self.shared_memory_free_bytes is not None:
            shared = (
                f"{self.shared_memory_bytes / 1e9:.2f} GB, "
                f"{self.shared_memory_free_bytes / 1e9:.2f} GB free"
            )
        return [
            ("folder", f"{self.folder} ({self.file_system})"),
            ("space", f"{self.total_bytes / 1e9:.1f} GB, {self.free_bytes / 1e9:.1f} GB free"),
            (
                "write, fsync",
                (
                    "not measured"
                    if self.write_gb_per_s is None
                    else f"{self.write_gb_per_s:.2f} GB/s ({size})"
                ),
            ),
            (
                "read",
                (
                    "not measured"
                    if self.read_gb_per_s is None
                    else f"{self.read_gb_per_s:.2f} GB/s ({size})"
                ),
            ),
            ("rename is atomic", answers[self.rename_atomic]),
            ("flock works", answers[self.flock]),
            ("/dev/shm", shared),
            (
                "open files",
                "no limit" if self.open_files is None else f"at most {self.open_files}",
            ),
        ]


def existing_folder(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that exists.

    Raises:
        UserError: that is no folder, or it may not be looked at.
    """
    found = folder.absolute()
    try:
        while not found.exists():
            found = found.parent
    except OSError as error:
        raise UserError(
            f"--folder must be a folder, or one that can be made; {found}: {error.strerror}."
        ) from error
    if not found.is_dir():
        raise UserError(
            f"--folder must be a folder, or one that can be made; {found} is a file. Choose "
            "another."
        )
    return found


def measure_disk(folder: Path) -> Disk:
    """Try the disk under an existing folder; whatever is written there is gone afterwards."""
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
    # Random bytes, because some file systems compress. The file has no name, so nothing stays
    # whatever ends this process.
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
    """Replace a file again and again while another thread reads it by name: it must always be
    there, and whole.
    """
    target, versions = folder / "target", (b"a" * 4096, b"b" * 4096)
    target.write_bytes(versions[0])
    done = threading.Event()
    wrong: list[str] = []

    def read() -> None:
        while not done.is_set() and not wrong:
            try:
                if target.read_bytes() not in versions:
                    wrong.append("mixed")
            except OSError:
                wrong.append("not there")

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(50):
            new = folder / "new"
            new.write_bytes(versions[number % 2])
            new.replace(target)
            wrong += [] if target.read_bytes() == versions[number % 2] else ["old"]
    finally:
        done.set()
        reader.join()
    return not wrong


def _flock_works(folder: Path) -> bool:
    """Whether a lock can be taken, and taken only once."""
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
    mounted = [
        partition
        for partition in psutil.disk_partitions(all=True)
        if resolved.is_relative_to(partition.mountpoint)
    ]
    # Of several on one mount point the last covers the others.
    return (
        max(reversed(mounted), key=lambda partition: len(partition.mountpoint)).fstype
        if mounted
        else "unknown"
    )
