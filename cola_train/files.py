"""Atomic writing: a crash leaves the old file or the new one; nothing is overwritten unasked."""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from cola_train.config.content import open_file
from cola_train.config.settings import UserError, require
from cola_train.json_text import utf8


def sync(path: Path) -> None:
    """Make a file or a folder's entries durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes, *, replace: bool = True) -> None:
    """Put `content` at `path` in one step, replacing what was there; a UserError if it may not."""
    data = utf8(content) if isinstance(content, str) else content
    with write_errors_explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, path.name)
        working, descriptor, held = _begin_file(path)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if replace or not _link_to_new(working, path):
                working.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to be told
                working.unlink(missing_ok=True)
            raise
        finally:
            os.close(held)
        _make_name_durable(path)


def _link_to_new(working: Path, path: Path) -> bool:
    try:
        path.hardlink_to(working)  # which, unlike a look beforehand, nothing can overtake
    except OSError:
        require(
            not os.path.lexists(path),
            f"{path} exists and is not overwritten; choose another name or remove it yourself.",
        )
        return False  # a file system without links
    with contextlib.suppress(OSError):  # `path` is there: the other name is swept later
        working.unlink()
    return True


def _make_name_durable(path: Path) -> None:
    try:
        sync(path.parent)
    except OSError as error:
        raise not_confirmed(path, error) from error


def not_confirmed(path: Path, error: OSError) -> UserError:
    """What to raise where `path` is whole, but `sync` failed."""
    return UserError(
        f"{path} is written, but the disk does not confirm that it keeps it: "
        f"{error.strerror or error}. A power cut could undo it; look at that disk."
    )


def require_new(path: Path | None) -> None:
    """Refuse an output that exists already; None is no output.

    Raises:
        UserError: `path` exists.
    """
    require(
        path is None or not os.path.lexists(path),
        f"{path} exists and is not overwritten; choose another --out, or remove it yourself.",
    )


def create(path: Path) -> None:
    """Make an empty file.

    Raises:
        UserError: `path` exists, or the disk refuses.
    """
    with write_errors_explained(path):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            require_new(path)
            raise
        try:
            os.close(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink()
            raise


@contextlib.contextmanager
def atomic_folder(final: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `final` if the block succeeds, and vanishes if not.

    Raises:
        UserError: `final` exists and `replace` is False; or the disk refuses (full, read-only).
            If `final` was made while the block ran, what the block wrote is kept beside it.
    """
    if not replace and final.exists():
        raise UserError(
            f"{final} exists and is not overwritten; choose another name or remove it yourself."
        )
    with write_errors_explained(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        sweep(final.parent, final.name)
        working, held = _begin_folder(final)
        try:
            yield working
            for path in sorted(working.rglob("*")):
                if is_unfinished(path):
                    path.unlink()  # of a file of here, and could not be removed then
                else:
                    sync(path)
            sync(working)
            if replace:
                _swap_in(working, final)
            elif not _move_to_new(working, final):
                kept = working.rename(final.with_name(f"{final.name}.kept{working.suffix}"))
                raise UserError(
                    f"{final} exists and is not overwritten: it was made while this was at work. "
                    f"What was written is complete, in {kept}: rename it, or delete it."
                )
            _make_name_durable(final)
        finally:
            shutil.rmtree(working, ignore_errors=True)
            os.close(held)


# What `_name_beside` gives; a folder that is being replaced is `content` in one of NAME.old.
_UNFINISHED = re.compile(r"\.(?P<name>.+?)(?P<old>\.old)?\.[0-9a-f]{16}")


def _name_beside(path: Path) -> Path:
    # Hidden, and nobody else's: 64 random bits, and whoever makes it fails where it exists.
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def _begin_file(path: Path) -> tuple[Path, int, int]:
    """Make a temporary file for `path`; its name, a descriptor to write it, one that holds it."""
    while True:
        working = _name_beside(path)
        # Not by tempfile, whose files are for their owner alone: made so, the kernel gives this one
        # the user's own permissions.
        descriptor = os.open(working, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        held = _hold(working)
        if held is not None:
            return working, descriptor, held
        os.close(descriptor)


def _begin_folder(final: Path) -> tuple[Path, int]:
    """Make a temporary folder for `final`; its name, a descriptor that holds it."""
    while True:
        working = _name_beside(final)
        working.mkdir()
        held = _hold(working)
        if held is not None:
            return working, held


def _hold(working: Path) -> int | None:
    """Lock what is being written, until the descriptor is closed; None if it was swept before."""
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(working, os.O_RDONLY)
        with contextlib.suppress(OSError):  # no locks here: then nothing is swept either
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.lexists(working):
            return descriptor
        os.close(descriptor)
    return None


@contextlib.contextmanager
def _abandoned(path: Path) -> Iterator[bool]:
    """Whether nobody writes this any more; while the block runs nobody else can sweep it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def is_unfinished(path: Path) -> bool:
    """Whether this is the temporary name of something that is being written, or was."""
    return _UNFINISHED.fullmatch(path.name) is not None


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what writes (of one name, or of any) that a crash ended left in a folder.

    What some process still writes is left alone. What was about to be replaced is put back where
    its successor has not come to its place.
    """
    for path in list(folder.glob(".*")):
        match = _UNFINISHED.fullmatch(path.name)
        if match is None or name not in (None, match["name"]):
            continue
        with _abandoned(path) as abandoned, contextlib.suppress(OSError):
            if not abandoned:
                continue
            final = folder / match["name"]
            if match["old"] and (path / "content").exists() and not final.exists():
                (path / "content").rename(final)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def _move_to_new(working: Path, final: Path) -> bool:
    try:
        # No look beforehand, which can be overtaken: on anything but an empty folder this fails.
        working.rename(final)
    except OSError:
        if os.path.lexists(final):
            return False
        raise
    return True


def _swap_in(working: Path, final: Path) -> None:
    if not final.exists():
        working.rename(final)
        return
    old, held = _begin_folder(final.with_name(f"{final.name}.old"))
    try:
        final.rename(old / "content")
        try:
            working.rename(final)
        except BaseException:
            (old / "content").rename(final)
            raise
    finally:
        if os.path.lexists(final):  # else its content is in there
            shutil.rmtree(old, ignore_errors=True)
        os.close(held)


_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def file_hint(path: Path) -> str:
    """The end of a phrase about a folder that is not there: is it a file?"""
    return " (it is a file: give a folder)" if path.is_file() else ""


def lfs_hint(path: Path) -> str:
    """The end of a message about a file that cannot be understood: is it a Git LFS pointer?"""
    with contextlib.suppress(OSError), open_file(path) as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            return " It is a Git LFS pointer to the file, not the file: run `git lfs pull` there."
    return ""


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
