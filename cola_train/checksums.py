"""Sizes and checksums of files, by which a change after they were written is found."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import xxhash

from cola_train.config.content import open_file

_READ_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True)
class FileChecksum:
    """A file as it was written."""

    bytes: int
    xxh3: str


def file_checksum(path: Path) -> FileChecksum:
    """Size and checksum of a file, read from disk."""
    digest, size = xxhash.xxh3_128(), 0
    with open_file(path) as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
            size += len(piece)
    return FileChecksum(size, digest.hexdigest())


_SEAL = re.compile(rb"^# xxh3\b[^\n]*\n?", re.MULTILINE)


def sealed(text: str) -> str:
    """A text with its checksum above and below, as comments: whichever end is cut off is missed."""
    seal = f"# xxh3 {xxhash.xxh3_128_hexdigest(text.encode())}\n"
    return f"{seal}{text}{seal}"


def is_altered(data: bytes) -> bool:
    """Whether this is no longer what `sealed` gave; False without any seal."""
    whole = b"".join(_SEAL.split(data))
    seal = f"# xxh3 {xxhash.xxh3_128_hexdigest(whole)}\n".encode()
    return _SEAL.search(data) is not None and data != seal + whole + seal


def damage(folder: Path, files: Mapping[str, FileChecksum], record: str) -> list[str]:
    """What is wrong with these files of a folder, one line each; `record` is what says so."""
    found = []
    for name, expected in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected.bytes:
                found.append(
                    f"{name} has {size} bytes, {record} says {expected.bytes}: truncated or "
                    "half-copied"
                )
            elif file_checksum(path) != expected:
                found.append(f"{name} has been altered: its checksum is not {record}'s")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
    return found
