"""Lines are only ever appended: none is lost to a full disk, none is joined to one that a crash cut
short. And permissions.
"""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cola_train.config.settings import UserError
from cola_train.data.tokenizer import Tokenizer
from cola_train.evaluation.benchmarks.score import read_answers
from cola_train.evaluation.benchmarks.tasks import read_samples
from cola_train.files import atomic_folder, sweep, write_atomically
from cola_train.json_lines import JsonlWriter, json_lines, read_jsonl, read_log

Rows = st.lists(
    st.dictionaries(
        st.text(max_size=5), st.floats(allow_nan=False) | st.text(max_size=8), max_size=3
    ),
    max_size=8,
)


@given(rows=Rows, refused=st.sets(st.integers(0, 7)))
def test_what_the_disk_refuses_is_written_when_it_can_be(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, float | str]], refused: set[int]
) -> None:
    lines = JsonlWriter(tmp_path_factory.mktemp("lines") / "log.jsonl")
    write = lines._write
    for number, row in enumerate(rows):
        if number in refused:

            def full(data: bytes) -> None:
                raise OSError(28, "No space left on device")

            lines._write = full  # type: ignore[method-assign]
        else:
            lines._write = write  # type: ignore[method-assign]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lines.append(row)
    lines._write = write  # type: ignore[method-assign]
    lines.append({"end": 1.0})
    assert [
        json.loads(line) for line in lines.path.read_text(encoding="utf-8").split("\n")[:-1]
    ] == [*rows, {"end": 1.0}]


def test_a_full_disk_warns_once_until_there_is_room(tmp_path: Path) -> None:
    lines = JsonlWriter(tmp_path / "gone" / "log.jsonl")
    with pytest.warns(
        UserWarning,
        match=r"Cannot write .*log.jsonl now \(No such file or directory\); its lines are kept",
    ):
        lines.append({"a": 1})
    lines.append({"a": 2})
    (tmp_path / "gone").mkdir()
    lines.append({"a": 3})
    assert lines.path.read_text() == '{"a": 1}\n{"a": 2}\n{"a": 3}\n'


def test_a_line_cut_short_stays_alone(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n{"a": ')
    JsonlWriter(path).append({"a": 2})
    assert path.read_text() == '{"a": 1}\n{"a": \n{"a": 2}\n'
    assert [*read_log(path)] == [{"a": 1}, {"a": 2}]


@given(rows=Rows)
def test_rows_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, float | str]]
) -> None:
    lines = JsonlWriter(tmp_path_factory.mktemp("lines") / "log.jsonl")
    assert [*read_log(lines.path)] == []
    for row in rows:
        lines.append(row)
    assert [*read_log(lines.path)] == rows


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    "read",
    [
        lambda path: [*read_jsonl(path, "prompts")],
        lambda path: read_samples(path.parent, path.stem),
        read_answers,
        Tokenizer.load,
    ],
)
def test_what_git_lfs_left_out_is_named(read: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / "squad.jsonl").write_text(POINTER)
    with pytest.raises(UserError, match=r"squad\.jsonl.* Git LFS pointer .*`git lfs pull`"):
        read(tmp_path / "squad.jsonl")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_users_lines_with_a_byte_order_mark_and_any_line_end(tmp_path: Path, end: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + end.join(['"one\u2028"', "", "2"]).encode())
    assert list(read_jsonl(path, "texts")) == [
        (f"{path}, line 1", "one\u2028"),
        (f"{path}, line 3", 2),
    ]


def test_half_a_character_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00"}\n{"text": ["\\ud83d"]}\n')
    lines = read_jsonl(path, "texts")
    assert next(lines)[1] == {"text": "\U0001f600"}
    with pytest.raises(UserError, match=r"a\.jsonl, line 2 has a lone surrogate"):
        next(lines)


def make_meanwhile(final: Path, kind: str) -> None:
    with atomic_folder(final) as working:
        (working / "mine").write_text("hours of work")
        if kind == "folder":
            final.mkdir()
            (final / "notes.txt").write_text("yours")
        elif kind == "file":
            final.write_text("yours")
        else:
            final.symlink_to("nowhere")


@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_that_came_to_a_name_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    def refuses(*arguments: object) -> None:
        raise PermissionError(1, "Operation not permitted")  # as on a memory card

    if not has_links:
        monkeypatch.setattr(os, "link", refuses)
    path = tmp_path / "a.txt"
    write_atomically(path, "first", replace=False)
    with pytest.raises(UserError, match=r"a\.txt exists and is not overwritten"):
        write_atomically(path, "second", replace=False)
    assert [one.name for one in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "first"
    write_atomically(path, "third")
    assert path.read_text() == "third"


def test_a_folder_is_not_published_with_a_temporary_name_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink, failures = Path.unlink, [OSError(5, "Input/output error")]

    def fails_once(path: Path, *rest: bool) -> None:
        if failures:
            raise failures.pop()
        unlink(path, *rest)

    monkeypatch.setattr(Path, "unlink", fails_once)
    with atomic_folder(tmp_path / "out") as working:
        write_atomically(working / "a.txt", "content", replace=False)
        assert not failures
        assert len(list(working.iterdir())) == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.txt"]


@pytest.mark.parametrize("kind", ["folder", "file", "broken link"])
def test_what_came_to_a_name_meanwhile_is_not_replaced(tmp_path: Path, kind: str) -> None:
    final = tmp_path / "final"
    with pytest.raises(UserError, match=r"final exists and is not overwritten: .* is complete"):
        make_meanwhile(final, kind)
    if kind == "folder":
        assert [path.name for path in final.iterdir()] == ["notes.txt"]
    else:
        assert final.is_symlink() if kind == "broken link" else final.read_text() == "yours"
    sweep(tmp_path)  # which takes only what is unfinished
    (kept,) = tmp_path.glob("final.kept.*")
    assert (kept / "mine").read_text() == "hours of work"


def test_names_that_are_no_utf8_are_written_as_they_are_read(tmp_path: Path) -> None:
    row = {"path": os.fsdecode(b"caf\xe9"), "text": "café"}
    JsonlWriter(tmp_path / "log.jsonl").append(row)
    write_atomically(tmp_path / "rows.jsonl", json_lines([row]))
    for name in ("log.jsonl", "rows.jsonl"):
        assert "café" in (tmp_path / name).read_text(encoding="utf-8")
        assert [*read_log(tmp_path / name)] == [row]


_WRITES = """
import os, pathlib, sys
from cola_train.files import atomic_folder, sweep, write_atomically

os.umask(0o027)

def refused(mask):
    raise AssertionError("the mask of the whole process was changed, other threads' files too")

os.umask = refused
folder = pathlib.Path(sys.argv[1])
for _ in range(2):
    write_atomically(folder / "file", "x")
    with atomic_folder(folder / "whole", replace=True) as working:
        (working / "inside").write_text("x")
"""


def test_what_is_written_has_the_permissions_that_the_users_mask_leaves(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WRITES, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    modes = {
        str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")
    }
    assert modes == {"file": 0o640, "whole": 0o750, "whole/inside": 0o640}
