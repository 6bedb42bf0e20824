"""Atomic writing: a crash leaves the old file or the new one; nothing is overwritten unasked."""

import contextlib
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from cola_train.config.settings import UserError, require


def sync(path: Path) -> None:
    """Make a file or a folder's entries durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Put `content` at `path` in one step, replacing what was there."""
    data = content.encode() if isinstance(content, str) else content
    with write_errors_explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        working = _name_beside(path)
        # Not by tempfile, whose files are for their owner alone: made so, the kernel gives this one
        # the user's own permissions.
        descriptor = os.open(working, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            working.replace(path)
        except BaseException:
            working.unlink(missing_ok=True)
            raise
        sync(path.parent)


class JsonlWriter:
    """An append-only file of JSON lines; lines that a full disk refuses are kept for later."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = b""
        self._warned = False

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one line, after those that could not be written before."""
        self._waiting += json.dumps(row, ensure_ascii=False).encode() + b"\n"
        try:
            self._write(self._waiting)
        except OSError as error:
            if not self._warned:
                message = f"Cannot write {self.path} now ({error.strerror}); its lines are kept"
                warnings.warn(f"{message} until it can be.", stacklevel=2)
            self._warned = True
            return
        self._waiting, self._warned = b"", False

    def _write(self, data: bytes) -> None:
        with self.path.open("a+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                # a crash cut the last line short: what follows must not be joined to it
                data = b"\n" + data
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(end)
                raise

    def sync(self) -> None:
        """Make what was written durable."""
        with contextlib.suppress(OSError):
            sync(self.path)


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """The text of a JSON-lines file: an object a line, in UTF-8 rather than escapes."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def require_new(path: Path | None) -> None:
    """Refuse an output that exists already; None is no output.

    Raises:
        UserError: `path` exists.
    """
    require(
        path is None or not path.exists(),
        f"{path} exists and is not overwritten; choose another --out, or remove it yourself.",
    )


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Each row that `JsonlWriter` wrote, but lines that a crash cut short; none without a file."""
    if not path.is_file():
        return
    # Not splitlines: a text may hold the separators of Unicode.
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def read_jsonl(path: Path, what: str) -> Iterator[tuple[str, Any]]:
    """Each value of a user's JSON-lines file, after its place for messages; blank lines are passed.

    `what` names its content in messages: "prompts".

    Raises:
        UserError: no such file, not UTF-8, nothing in it, or a line that is not JSON, by number.
    """
    try:
        # other separators may stand in a JSON string
        lines = path.read_bytes().decode("utf-8").split("\n")
    except OSError as error:
        raise UserError(f"Cannot read the {what} {path}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        message = f"{path} is not UTF-8 text (byte {error.start}); convert it first."
        raise UserError(message) from None
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    require(bool(numbered), f"{path} holds no {what}.")
    for number, line in numbered:
        where = f"{path}, line {number}"
        try:
            yield where, json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is not JSON ({error}).") from None


@contextlib.contextmanager
def atomic_folder(final: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `final` if the block succeeds, and vanishes if not.

    Raises:
        UserError: `final` exists and `replace` is False; or the disk refuses (full, read-only).
    """
    if not replace and final.exists():
        raise UserError(
            f"{final} exists and is not overwritten; choose another name or remove it yourself."
        )
    with write_errors_explained(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        working = _name_beside(final)
        working.mkdir()  # with the user's own permissions, as in write_atomically
        try:
            yield working
            for path in sorted(working.rglob("*")):
                sync(path)
            sync(working)
            _swap_in(working, final)
            sync(final.parent)
        finally:
            shutil.rmtree(working, ignore_errors=True)


# What `_name_beside` gives; a folder that is being replaced is `content` in one of NAME.old.
_UNFINISHED = re.compile(r"\.(?P<name>.+?)(?P<old>\.old)?\.[0-9a-f]{16}")


def _name_beside(path: Path) -> Path:
    # Hidden, and nobody else's: 64 random bits, and whoever makes it fails where it exists.
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def is_unfinished(path: Path) -> bool:
    """Whether this is the temporary name of something that is being written, or was."""
    return _UNFINISHED.fullmatch(path.name) is not None


def sweep(folder: Path) -> None:
    """Remove what writes that a crash ended left in a folder; only while nothing writes there.

    What was about to be replaced is put back where its successor has not come to its place.
    """
    for path in list(folder.glob(".*")):
        match = _UNFINISHED.fullmatch(path.name)
        if match is None:
            continue
        final = folder / match["name"]
        if match["old"] and (path / "content").exists() and not final.exists():
            (path / "content").rename(final)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def _swap_in(working: Path, final: Path) -> None:
    if not final.exists():
        working.rename(final)
        return
    old = _name_beside(final.with_name(f"{final.name}.old"))
    old.mkdir()
    final.rename(old / "content")
    try:
        working.rename(final)
    except BaseException:
        (old / "content").rename(final)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def read_errors_explained(path: Path) -> AbstractContextManager[None]:
    """Turn an OSError of the block (permissions, a lost disk) into a UserError naming the file."""
    return _explained(f"Cannot read {path}", "Check that it exists and may be read.")


def write_errors_explained(path: Path) -> AbstractContextManager[None]:
    """Turn an OSError of the block (a full or read-only disk) into a UserError naming the file."""
    advice = "Nothing was changed there; free space or choose another place."
    return _explained(f"Cannot write {path}", advice)


@contextlib.contextmanager
def _explained(problem: str, advice: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{problem}: {error.strerror or error}. {advice}") from error
