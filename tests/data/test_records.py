"""Records that cannot be used as they are: stopped at, left out or repaired, and counted; lines and
documents of any length in bounded memory; columns inside columns.
"""

import gzip
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cola_train.config.data import CorpusConfig
from cola_train.config.settings import UserError
from cola_train.data import readers
from cola_train.data.records import BadRecords
from cola_train.data.sources import read_documents


def read(path: Path, policy: Any = "stop", **settings: Any) -> tuple[list[str], BadRecords]:
    bad = BadRecords(policy)
    corpus = CorpusConfig(inputs=[str(path)], on_bad_record=policy, **settings)
    return list(read_documents(corpus, bad)), bad


@given(
    content=st.text(st.sampled_from("ab\n\r\u2028\x0c"), max_size=30),
    block=st.integers(1, 5),
    most=st.integers(1, 40),
)
def test_lines_are_those_of_universal_newlines(content: str, block: int, most: int) -> None:
    class Pieces(io.BytesIO):
        def read1(self, size: int | None = -1) -> bytes:
            return super().read(block)

    expected = io.StringIO(content, newline=None).read().removesuffix("\n").split("\n")
    found = list(readers._lines(Pieces(content.encode()), most))
    texts = [line.encode()[: most + 1] for line in expected]
    assert [line for _, line in found] == (texts if content else [])
    for start, line in found:
        assert content.encode()[start:].startswith(line)


# What becomes of them.

LINES = [
    b'{"text": "fine"}',
    b'{"text": "bytes \xff!"}',
    b'{"text": "half \\ud83d!"}',
    b'{"text": 5}',
    b'{"txt": "no column"}',
    b"[1]",
    b"{",
    b"[" * 100_000,
    b'{"text": "' + b"long" * 50_000 + b'"}',
    b'{"text": "last"}',
]
PROBLEMS = [
    (2, r"is not valid UTF-8 at byte 33"),
    (3, r"line 3: the text has a lone surrogate at character 5"),
    (4, r"line 4: corpus.text_column 'text' must hold strings, not int"),
    (5, r"line 5: there is no column 'text'"),
    (6, r"line 6 must be one JSON object, not a list"),
    (7, r"line 7 is not valid JSON"),
    (8, r"line 8 is not valid JSON"),
    (9, r"line 9: the document has more than 150,000 bytes \(corpus.max_document_bytes\)"),
]


@pytest.fixture
def bad_lines(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(LINES))
    return path


@pytest.mark.parametrize("number, problem", PROBLEMS)
def test_the_first_bad_record_stops(tmp_path: Path, number: int, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([LINES[0]] * (number - 1) + [LINES[number - 1]]))
    problem = problem.replace("33", str(17 * (number - 1) + 16))
    with pytest.raises(UserError, match=problem + r".*\(corpus\.on_bad_record=skip leaves such"):
        read(path, max_document_bytes=150_000)


def test_bad_records_are_left_out_and_counted(bad_lines: Path) -> None:
    texts, bad = read(bad_lines, "skip", max_document_bytes=150_000)
    assert texts == ["fine", "last"]
    assert (bad.num_skipped, bad.num_replaced) == (8, 0)
    assert len(bad.places) == 8
    assert "a.jsonl, line 9" in bad.places[-1]
    assert "Records left out: 8; repaired: 0 (corpus.on_bad_record=skip)" in bad.summary


def test_what_is_no_text_in_them_is_replaced(bad_lines: Path) -> None:
    texts, bad = read(bad_lines, "replace", max_document_bytes=150_000)
    assert texts == ["fine", "bytes \ufffd!", "half \ufffd!", "last"]
    assert (bad.num_skipped, bad.num_replaced) == (6, 2)


def test_bad_paragraphs_and_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\ntw\xffo\nlines\n\n" + b"too long\n" * 3 + b"\nlast")
    texts, bad = read(path, "skip", max_document_bytes=20)
    assert texts == ["one", "last"]
    assert [problem.split(";")[0] for problem in bad.places] == [
        f"{path} is not valid UTF-8 at byte 7 (invalid start byte)",
        f"{path}, byte 17: the document has more than 20 bytes (corpus.max_document_bytes)",
    ]
    assert read(path, "replace", max_document_bytes=20)[0] == ["one", "tw\ufffdo\nlines", "last"]
    assert read(path, "skip", documents="file", max_document_bytes=20)[0] == []
    assert read(path, "skip", max_document_bytes=26)[0] == [
        "one",
        "\n".join(["too long"] * 3),
        "last",
    ]


def test_bad_rows_of_tables(tmp_path: Path) -> None:
    texts = pa.array([b"fine", b"b\xff", b"x" * 30, b"last"]).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    found, bad = read(tmp_path / "a.parquet", "skip", max_document_bytes=20)
    assert (found, bad.num_skipped) == (["fine", "last"], 2)
    datasets.Dataset.from_dict({"text": ["fine", "é" * 15]}).save_to_disk(str(tmp_path / "saved"))
    corpus = CorpusConfig(
        dataset=str(tmp_path / "saved"), on_bad_record="skip", max_document_bytes=20
    )
    assert list(read_documents(corpus)) == ["fine"]


# Columns inside columns.


def test_a_dot_leads_into_an_object(tmp_path: Path) -> None:
    rows: list[Any] = [{"a": {"b": "inside", "c": 1}}, {"a": None}, {"a": {"b": None}}]
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(map(json.dumps, [*rows, {"a.b": "a name", "a": {"b": "no"}}])))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    assert read(lines, text_column="a.b")[0] == ["inside", "", "", "a name"]
    assert read(tmp_path / "a.parquet", text_column="a.b")[0] == ["inside", "", ""]
    corpus = CorpusConfig(dataset=str(tmp_path / "saved"), text_column="a.b")
    assert list(read_documents(corpus)) == ["inside", "", ""]
    for path in (lines, tmp_path / "a.parquet"):
        with pytest.raises(UserError, match=r"there is no column 'x' .*allowed: b, c"):
            read(path, text_column="a.x")
        with pytest.raises(UserError, match=r"looks for 'd' in an object, not in int"):
            read(path, text_column="a.c.d")


# Memory.


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_line_of_any_length_takes_bounded_memory(tmp_path: Path, policy: str) -> None:
    path = tmp_path / "bomb.txt.gz"
    path.write_bytes(gzip.compress(bytes(10_000_000)) * 4 + gzip.compress(b"\n\nlast"))
    tracemalloc.start()
    try:
        if policy == "stop":
            with pytest.raises(
                UserError, match=r"bomb\.txt\.gz, byte 0: the document has more than"
            ):
                read(path, policy, max_document_bytes=1_000_000)
        else:
            assert read(path, policy, max_document_bytes=1_000_000)[0] == ["last"]
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


def test_too_little_memory_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> Any:
        raise MemoryError

    (tmp_path / "a.txt").touch()
    monkeypatch.setattr(readers, "_lines", fails)
    with pytest.raises(UserError, match=r"not enough memory to read .*corpus\.max_document_bytes"):
        read(tmp_path / "a.txt")
