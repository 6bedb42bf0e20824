"""What may become of a file: bytes flipped, cut and moved, values of other kinds, no file at all.

A change is made from a seed, so that a list of changes is the same each time.
"""

import os
import random
import socket
from collections.abc import Callable
from pathlib import Path

Change = Callable[[Path, random.Random], object]

_DEEP = 100_000


def change_bytes(change: Callable[[bytearray, random.Random], bytes | bytearray]) -> Change:
    def apply(path: Path, draw: random.Random) -> None:
        path.write_bytes(change(bytearray(path.read_bytes()), draw))

    return apply


def _flip(data: bytearray, draw: random.Random) -> bytearray:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return data


def _flips(data: bytearray, draw: random.Random) -> bytearray:
    for _ in range(draw.randint(2, 40)):
        _flip(data, draw)
    return data


def _random_byte(data: bytearray, draw: random.Random) -> bytearray:
    data[draw.randrange(len(data))] = draw.randrange(256)
    return data


def _digit(data: bytearray, draw: random.Random) -> bytearray:
    """Another digit: what is read as well as what was there."""
    places = [place for place, byte in enumerate(data) if 48 <= byte < 58]
    if places:
        place = draw.choice(places)
        data[place] = draw.choice([digit for digit in range(48, 58) if digit != data[place]])
    return data


def _cut_middle(data: bytearray, draw: random.Random) -> bytearray:
    start = draw.randrange(len(data))
    del data[start : start + draw.randint(1, 40)]
    return data


def _twice(data: bytearray, draw: random.Random) -> bytearray:
    start = draw.randrange(len(data))
    data[start:start] = data[start : start + draw.randint(1, 200)]
    return data


def _inserted(data: bytearray, draw: random.Random) -> bytearray:
    start = draw.randrange(len(data) + 1)
    data[start:start] = draw.randbytes(draw.randint(1, 20))
    return data


def _zeros(data: bytearray, draw: random.Random) -> bytearray:
    start = draw.randrange(len(data))
    end = min(len(data), start + draw.choice([1, 16, 512, 4096]))
    data[start:end] = bytes(end - start)
    return data


def _swapped(data: bytearray, draw: random.Random) -> bytearray:
    half = len(data) // 2
    return data[half:] + data[:half]


def _line_gone(data: bytearray, draw: random.Random) -> bytes:
    lines = bytes(data).split(b"\n")
    del lines[draw.randrange(len(lines))]
    return b"\n".join(lines)


def _line_twice(data: bytearray, draw: random.Random) -> bytes:
    lines = bytes(data).split(b"\n")
    lines.insert(draw.randrange(len(lines)), draw.choice(lines))
    return b"\n".join(lines)


def _as(encoding: str) -> Change:
    def change(data: bytearray, draw: random.Random) -> bytes:
        return bytes(data).decode("utf-8", "replace").encode(encoding)

    return change_bytes(change)


BYTES: dict[str, Change] = {
    "a bit flipped": change_bytes(_flip),
    "several bits flipped": change_bytes(_flips),
    "another byte": change_bytes(_random_byte),
    "another digit": change_bytes(_digit),
    "the end cut off": change_bytes(lambda data, draw: data[: draw.randrange(len(data))]),
    "one byte cut off": change_bytes(lambda data, draw: data[:-1]),
    "the beginning cut off": change_bytes(lambda data, draw: data[draw.randint(1, len(data)) :]),
    "a piece cut out": change_bytes(_cut_middle),
    "a piece twice": change_bytes(_twice),
    "bytes put in": change_bytes(_inserted),
    "zeros over a piece": change_bytes(_zeros),
    "halves swapped": change_bytes(_swapped),
    "a line gone": change_bytes(_line_gone),
    "a line twice": change_bytes(_line_twice),
    "bytes at the end": change_bytes(lambda data, draw: data + draw.randbytes(draw.randint(1, 30))),
    "twice as a whole": change_bytes(lambda data, draw: data + data),
}


def written(content: bytes) -> Change:
    return lambda path, draw: path.write_bytes(content)


def _instead(make: Callable[[Path], object]) -> Change:
    def apply(path: Path, draw: random.Random) -> None:
        path.unlink()
        make(path)

    return apply


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "inside.json").write_text("{}")


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket is at most 107 bytes
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)
    os.chdir(here)


def _huge(path: Path, draw: random.Random) -> None:
    with path.open("r+b") as file:
        file.truncate(3 << 30)  # a hole: no space on the disk


HOSTILE: dict[str, Change] = {
    "empty": written(b""),
    "blank": written(b" \n\t\n"),
    "a zero byte": written(b"\0"),
    "noise": lambda path, draw: path.write_bytes(draw.randbytes(4096)),
    "a file of 3 GB": _huge,
    "a line of 20 MB": written(b"x" * (20 << 20)),
    "nested lists": written(b"[" * _DEEP + b"]" * _DEEP),
    "nested objects": written(b'{"a":' * _DEEP + b"1" + b"}" * _DEEP),
    "a million lists": written(b"[" + b"[]," * 1_000_000 + b"[]]"),
    "null": written(b"null"),
    "a list": written(b"[1, 2, 3]"),
    "a text": written(b'"text"'),
    "a number": written(b"1e400"),
    "a number of a million digits": written(b"9" * 1_000_000),
    "an empty object": written(b"{}"),
    "no UTF-8": written(b'{"a": "\xff\xfe\x80"}'),
    "lone surrogates": written(b'{"a": "\\ud800", "\\udfff": 1}'),
    "UTF-16": _as("utf-16"),
    "UTF-32": _as("utf-32"),
    "a byte order mark before it": _as("utf-8-sig"),
    "an LFS pointer": written(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
    ),
    "a pickle": written(b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94."),
    "a web page": written(b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n"),
    "gone": _instead(lambda path: None),
    "a folder": _instead(_folder),
    "a pipe that nobody writes": _instead(os.mkfifo),
    "a socket": _instead(_socket),
    "a link to /dev/zero": _instead(lambda path: path.symlink_to("/dev/zero")),
    "a link to /dev/null": _instead(lambda path: path.symlink_to("/dev/null")),
    "a broken link": _instead(lambda path: path.symlink_to("nowhere/at all")),
    "a link to itself": _instead(lambda path: path.symlink_to(path.name)),
    "a link to /proc/self/mem": _instead(lambda path: path.symlink_to("/proc/self/mem")),
}
