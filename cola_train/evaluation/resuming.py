"""What lets the same command go on: results in a file of JSON lines, and what they are of.

OUT                  a line a record: its own fields and those that were found; appended as it comes
OUT.settings.json    all that decides the results; a command of others is refused
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from cola_train.config.content import open_file, read_bytes
from cola_train.config.settings import UserError, require
from cola_train.files import (
    create,
    not_confirmed,
    read_errors_explained,
    require_new,
    sweep,
    write_atomically,
)
from cola_train.json_lines import JsonlWriter
from cola_train.json_text import parse_json


def digest(values: Iterable[Any]) -> str:
    """The sha256 of values that JSON can hold, in hexadecimal."""
    found = hashlib.sha256()
    for value in values:
        found.update(json.dumps(value).encode() + b"\n")
    return found.hexdigest()


def refuse_others(
    there: Mapping[str, Any], here: Mapping[str, Any], holds: str, kind: Literal["file", "folder"]
) -> None:
    """Refuse to go on with what other settings made.

    `holds` begins the message ("OUT holds other results"), and `kind` is of what else to give.

    Raises:
        UserError: these differ; each key is named, with both values.
    """
    before, now = dict(_flat(there)), dict(_flat(here))
    different = [
        f"{key} ({before.get(key)} there, {now.get(key)} here)"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]
    require(
        not different,
        f"{holds}, which are kept. It differs in: {'; '.join(different)}. Give another {kind} by "
        "--out.",
    )


class ResultFile:
    """Results of records in a file, each written once, whoever was interrupted meanwhile.

    Args:
        path: the file, new or begun by the same command.
        fields: the names of the fields that are found; those of a record are written as they are.

    Raises:
        UserError: something else is there.
    """

    def __init__(self, path: Path, fields: Sequence[str]) -> None:
        self.path = path
        self._fields = frozenset(fields)
        self._settings = path.with_name(f"{path.name}.settings.json")
        self._lines = JsonlWriter(path)
        self._records: list[str] = []
        if not self._settings.is_file():
            require_new(path)

    def begin(self, identity: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> set[int]:
        """Make the file or go on with it; returns the places of the records that have a result.

        Args:
            identity: JSON of all that decides the results.
            records: what results are wanted of, in order.

        Raises:
            UserError: something else is there, or results of another identity; keys that differ are
                named.
        """
        self._records = [self._key(record) for record in records]
        for path in (self.path, self._settings):
            sweep(path.parent, path.name)
        here: dict[str, Any] = parse_json(json.dumps(identity))  # as it will be read
        there = self._read_settings() if self._settings.exists() else None
        # An empty file holds nothing that could be of others.
        if there is not None and self.path.exists() and self.path.stat().st_size:
            refuse_others(there, here, f"{self.path} holds the results of another command", "file")
            return set(self._found())
        if there != here:
            write_atomically(self._settings, json.dumps(here, indent=1, ensure_ascii=False) + "\n")
        if there is None or not self.path.exists():
            try:
                create(self.path)
            except UserError:
                if there is None:
                    with contextlib.suppress(OSError):
                        self._settings.unlink()
                raise
        return set()

    def append(self, record: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """Write a record's result."""
        self._lines.append({**record, **found})

    def finish(self) -> list[dict[str, Any]]:
        """Put the lines into the order of the records, and return them.

        Raises:
            UserError: the disk refused some, or another program wrote into the file.
        """
        unconfirmed = None
        try:
            self._lines.sync()
        except OSError as error:  # what is missing by it is counted
            unconfirmed = error
        found = self._found()
        require(
            len(found) == len(self._records),
            f"Not all results could be written to {self.path} ({len(found)} of "
            f"{len(self._records)}). Make room there and give the same command again: what was "
            "written is kept.",
        )
        ordered = [found[place] for place in range(len(found))]
        content = b"".join(line + b"\n" for line in ordered)
        with read_errors_explained(self.path):
            is_in_order = _content(self.path) == content
        if not is_in_order:
            write_atomically(self.path, content)
        elif unconfirmed is not None:
            raise not_confirmed(self.path, unconfirmed) from unconfirmed
        return [parse_json(line.decode()) for line in ordered]

    def _read_settings(self) -> dict[str, Any]:
        try:
            with read_errors_explained(self._settings):
                found = parse_json(read_bytes(self._settings).decode())
            if not (isinstance(found, dict) and "checkpoint" in found):
                raise ValueError("it names no checkpoint")
        except UserError:
            raise
        except ValueError as error:
            raise UserError(
                f"Cannot read {self._settings} ({error}), which says what {self.path} is of; put "
                "it back, or give another file by --out."
            ) from None
        return found

    def _found(self) -> dict[int, bytes]:
        """The line of each record that has a result; of equal records the first come first."""
        places: dict[str, list[int]] = {}
        for place in reversed(range(len(self._records))):
            places.setdefault(self._records[place], []).append(place)
        with read_errors_explained(self.path):
            lines = _content(self.path).split(b"\n")
        found: dict[int, bytes] = {}
        for number, line in enumerate(lines, start=1):
            try:
                row = parse_json(line.decode())
            except ValueError:
                # nothing, or what a crash cut short
                if not line.strip() or line.startswith(b"{"):
                    continue
                row = None
            is_result = isinstance(row, dict) and self._fields <= row.keys()
            key = self._key(row) if is_result else ""
            require(
                key in places,
                f"{self.path}, line {number} is no result of this command: another program wrote "
                "there, and the file is kept. Take the line out, or give another file by --out.",
            )
            if places[key]:  # two that ran at once may both have written one
                found[places[key].pop()] = line
        return found

    def _key(self, row: Mapping[str, Any]) -> str:
        own = {name: value for name, value in row.items() if name not in self._fields}
        return json.dumps(own, sort_keys=True)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _content(path: Path) -> bytes:
    with open_file(path) as file:
        return file.read()
