"""Files of JSON lines: logs that are appended to, and lists of a user's."""

import contextlib
import io
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cola_train.config.content import open_file, read_bytes
from cola_train.config.settings import UserError, require
from cola_train.files import lfs_hint, sync
from cola_train.json_text import parse_json, utf8

_MOST_LINE_BYTES = 2**24


class JsonlWriter:
    """An append-only file of JSON lines; lines that a full disk refuses are kept for later."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = b""
        self._warned = False

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one line, after those that could not be written before."""
        self._waiting += utf8(json_lines([row]))
        try:
            self._write_waiting()
        except OSError as error:
            if not self._warned:
                message = f"Cannot write {self.path} now ({error.strerror}); its lines are kept"
                warnings.warn(f"{message} until it can be.", stacklevel=2)
            self._warned = True

    def _write_waiting(self) -> None:
        self._write(self._waiting)
        self._waiting, self._warned = b"", False

    def _write(self, data: bytes) -> None:
        end = None
        try:
            with self.path.open("a+b", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                    # a crash cut the last line short: what follows must not be joined to it
                    data = b"\n" + data
                while data:
                    data = data[file.write(data) :]
        except OSError:  # some disks tell it when the file is closed
            if end is not None:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, end)
            raise

    def sync(self) -> None:
        """Write the lines that wait, and make all durable.

        Raises:
            OSError: the disk refuses.
        """
        if self._waiting:
            self._write_waiting()
        if self.path.exists():
            sync(self.path)


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """The text of a JSON-lines file: an object a line, in UTF-8 rather than escapes."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Each row that `JsonlWriter` wrote; none without a file.

    What is no row, as a crash cuts lines short, is passed over.
    """
    for line in read_lines(path):
        with contextlib.suppress(ValueError):
            row = parse_json(line)
            if isinstance(row, dict):
                yield row


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a log but those longer than any of ours; none without a file."""
    if not path.is_file():
        return
    # Bytes: a text may hold the separators of Unicode.
    with open_file(path) as file:
        is_rest = False
        while line := file.readline(_MOST_LINE_BYTES):
            is_whole = line.endswith(b"\n") or len(line) < _MOST_LINE_BYTES
            if is_whole and not is_rest:
                yield line.decode("utf-8", errors="replace")
            is_rest = not is_whole


def read_jsonl(path: Path, what: str) -> Iterator[tuple[str, Any]]:
    """Each value of a user's JSON-lines file, after its place for messages; blank lines are passed.

    `what` names its content in messages: "prompts".

    Raises:
        UserError: no such file, not UTF-8, nothing in it, or a line, by its number, that is not
            JSON or has a lone surrogate in a text.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"Cannot read the {what} {path}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        message = f"{path} is not UTF-8 text (byte {error.start}); convert it first."
        raise UserError(message) from None
    # Lines end as in any text; not splitlines: other separators may stand in a JSON string.
    lines = io.StringIO(text, newline=None)
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    require(bool(numbered), f"{path} holds no {what}.")
    for number, line in numbered:
        where = f"{path}, line {number}"
        try:
            value = parse_json(line)
        except ValueError as error:
            raise UserError(f"{where} is not JSON ({error}).{lfs_hint(path)}") from None
        if "\\ud" in line.lower():  # only so written can one stand in valid UTF-8
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = f"\\u{ord(error.object[error.start]):04x}"
                raise UserError(
                    f"{where} has a lone surrogate ({half}), half of a character, which is no "
                    "Unicode text; repair the line."
                ) from None
        yield where, value
