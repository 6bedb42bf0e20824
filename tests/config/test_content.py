"""The content of a file is bounded, comes without waiting, and is that of a file."""

import os
import threading
import time
from pathlib import Path

import pytest

from cola_train.config.content import read_bytes
from cola_train.config.settings import UserError
from cola_train.evaluation.benchmarks.score import read_answers
from cola_train.evaluation.writing.sample import read_prompts
from cola_train.json_lines import read_log
from cola_train.json_text import parse_json


def test_what_is_no_file_is_an_error_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    begin = time.monotonic()
    for path, problem in {
        Path("/dev/zero"): "neither a file nor a pipe",
        tmp_path: "Is a directory",
        tmp_path / "pipe": "a pipe through which no whole file comes",
        tmp_path / "loop": "symbolic links",
        tmp_path / "absent": "No such file",
        tmp_path / "a\0b": "null",
    }.items():
        with pytest.raises(OSError, match=problem):
            read_bytes(path)
    assert time.monotonic() - begin < 10


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)
    assert read_bytes(path, 1000) == b"x" * 1000
    with pytest.raises(OSError, match="more than 999 bytes"):
        read_bytes(path, 999)
    path.write_bytes(b"")
    assert read_bytes(path) == b""
    os.truncate(path, 1 << 40)  # a hole
    with pytest.raises(OSError, match="more than 134,217,728 bytes"):
        read_bytes(path)


def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    def write() -> None:
        with (tmp_path / "pipe").open("wb") as file:
            for _ in range(3):
                time.sleep(0.05)
                file.write(b"part ")
                file.flush()

    writer = threading.Thread(target=write)
    writer.start()
    assert read_bytes(tmp_path / "pipe") == b"part part part "
    writer.join()


@pytest.mark.parametrize("read", [read_prompts, read_answers])
def test_lists_of_a_users_are_files(read: object, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), tmp_path / "pipe", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            read(path)  # type: ignore[operator]


def test_json_of_more_values_than_memory_can_hold() -> None:
    for piece in ("[],", "{},", "1,"):
        with pytest.raises(ValueError, match="more than 8,388,608 values"):
            parse_json("[" + piece * 9_000_000 + "1]")
    assert parse_json('["' + "," * 1000 + '"]') == ["," * 1000]


def test_a_log_is_read_past_lines_that_are_none_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n[1]\n3\n' + b"x" * (40 << 20) + b'\n{"a": 2}\n\xff\n{"a": 3}')
    assert [*read_log(path)] == [{"a": 1}, {"a": 2}, {"a": 3}]
