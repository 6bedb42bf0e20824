"""Temporary names: never taken from who still writes them, never left where a crash left them; and
what is said where the disk fails after a file has its name.
"""

import io
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest

from cola_train import files
from cola_train.config.settings import UserError
from cola_train.files import atomic_folder, create, sweep, write_atomically
from cola_train.json_lines import JsonlWriter, read_log


def fill_slowly(final: Path, ready: Any) -> None:
    with atomic_folder(final) as working:
        (working / "part").write_text("half")
        ready.set()
        time.sleep(60)


def test_what_is_being_written_stays_until_its_writer_is_gone(tmp_path: Path) -> None:
    forks = multiprocessing.get_context("forkserver")
    ready, final = forks.Event(), tmp_path / "made"
    other = forks.Process(target=fill_slowly, args=(final, ready))
    other.start()
    try:
        assert ready.wait(60)
        (theirs,) = tmp_path.iterdir()
        sweep(tmp_path)
        with atomic_folder(tmp_path / "made") as working:
            (working / "part").write_text("whole")
        assert (theirs / "part").read_text() == "half"
    finally:
        other.kill()
        other.join()
    # Of another name: not its business.
    write_atomically(tmp_path / "other", "text")
    assert theirs.exists()
    write_atomically(tmp_path / "made" / "more", "text")
    with atomic_folder(final, replace=True) as working:
        (working / "part").write_text("again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "other"]
    assert [path.name for path in final.iterdir()] == ["part"]


def test_a_file_whose_writer_was_killed_is_swept_by_the_next(tmp_path: Path) -> None:
    left = tmp_path / f".made.{'0' * 16}"
    left.write_text("half")
    write_atomically(tmp_path / "made", "text", replace=False)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_what_was_about_to_be_replaced_is_put_back(tmp_path: Path) -> None:
    old = tmp_path / f".made.old.{'0' * 16}"
    (old / "content").mkdir(parents=True)
    (old / "content" / "part").write_text("before")
    sweep(tmp_path, "made")
    assert (tmp_path / "made" / "part").read_text() == "before"
    assert not old.exists()


def refuse(*arguments: object) -> None:
    raise OSError(5, "Input/output error")


def test_a_name_that_may_not_last_is_not_called_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "sync", refuse)
    said = r"made is written, but the disk does not confirm that it keeps it: Input/output error"
    with pytest.raises(UserError, match=said):
        write_atomically(tmp_path / "made", "text")
    assert (tmp_path / "made").read_text() == "text"


class FailsAtClose(io.FileIO):
    """A file of a disk that says only at the end what it could not do."""

    def close(self) -> None:
        was_open = not self.closed
        super().close()
        if was_open:
            refuse()


def test_lines_that_a_disk_refuses_when_it_is_told_to_close_are_there_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = JsonlWriter(tmp_path / "log.jsonl")
    lines.append({"row": 0})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode, buffering: FailsAtClose(path, "a+"))
        with pytest.warns(UserWarning, match=r"Cannot write .*Input/output error"):
            lines.append({"row": 1})
    assert [row["row"] for row in read_log(lines.path)] == [0]
    lines.sync()
    assert [row["row"] for row in read_log(lines.path)] == [0, 1]
    lines.append({"row": 2})
    assert lines.path.read_text() == "".join(json.dumps({"row": n}) + "\n" for n in range(3))


def test_lines_that_still_wait_are_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = JsonlWriter(tmp_path / "log.jsonl")
    monkeypatch.setattr(lines, "_write", refuse)
    with pytest.warns(UserWarning, match="its lines are kept"):
        lines.append({"row": 0})
    with pytest.raises(OSError, match="Input/output error"):
        lines.sync()


def test_a_file_that_could_not_be_made_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.os, "close", refuse)
    with pytest.raises(UserError, match=r"Cannot write .*Input/output error"):
        create(tmp_path / "made")
    assert not (tmp_path / "made").exists()
