"""What is read, from where and in which order, and every message about a bad source."""

import gzip
import hashlib
import json
import lzma
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cola_train.config.data import CorpusConfig
from cola_train.config.settings import UserError
from cola_train.data.sources import expand_inputs, read_documents, source_hashes


def documents(*inputs: Path | str, **settings: Any) -> list[str]:
    return list(read_documents(CorpusConfig(inputs=[str(path) for path in inputs], **settings)))


def write_parquet(path: Path, texts: Any, column: str = "text") -> None:
    pq.write_table(pa.table({"id": list(range(len(texts))), column: texts}), path, row_group_size=2)


def zstandard_frames(text: str) -> bytes:
    """Compressed in pieces, as by several processes."""
    pieces = (text[at : at + 7000].encode() for at in range(0, len(text), 7000))
    return b"".join(pa.compress(piece, "zstd", asbytes=True) for piece in pieces)


# Which files, in which order.


def test_folders_globs_and_files_are_read_once_each_in_path_order(tmp_path: Path) -> None:
    for name in [
        "b.txt",
        "a/z.txt",
        "a/deep/y.jsonl",
        "a/.hidden.txt",
        ".git/x.txt",
        "a/readme.md",
        "UPPER.TXT",
    ]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    everything = [tmp_path / name for name in ["UPPER.TXT", "a/deep/y.jsonl", "a/z.txt", "b.txt"]]
    inputs = [str(tmp_path / "b.txt"), str(tmp_path), str(tmp_path / "**/*.txt")]
    for named in ([str(tmp_path)], inputs):
        files, left_out = expand_inputs(named)
        assert files == everything
        assert {path.relative_to(tmp_path).as_posix(): why for path, why in left_out.items()} == {
            ".git": "hidden",
            "a/.hidden.txt": "hidden",
            "a/readme.md": "of other endings",
        }
    assert expand_inputs([str(tmp_path / "*.txt")]) == ([tmp_path / "b.txt"], {})
    assert expand_inputs([str(tmp_path / "a*")])[0] == everything[1:3]


def test_linked_folders_are_read_and_what_is_left_out_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus"
    for name in ["elsewhere/b.txt", "elsewhere/c.tar.zst", "corpus/a.txt", "corpus/deep/d.csv"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (corpus / "linked").symlink_to("../elsewhere")
    (corpus / "circle").symlink_to(".")
    (corpus / "broken.txt").symlink_to("gone.txt")
    os.mkfifo(corpus / "pipe.txt")
    assert documents(corpus) == ["corpus/a.txt", "elsewhere/b.txt"]
    assert capsys.readouterr().err == (
        f"Not read from corpus.inputs: 1 broken links, the first {corpus}/broken.txt; "
        f"2 of other endings (.csv, .tar.zst), the first {corpus}/deep/d.csv; "
        f"1 no regular files, the first {corpus}/pipe.txt.\n"
    )
    assert documents(corpus / "a.txt") == ["corpus/a.txt"]
    assert capsys.readouterr().err == ""


def test_a_broken_link_that_is_named_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to("gone.txt")
    with pytest.raises(UserError, match=r"Cannot read .*a\.txt: No such file"):
        source_hashes(CorpusConfig(inputs=[str(tmp_path / "a.txt")]))


def test_a_path_and_another_path_to_it_are_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "link.txt").symlink_to("a.txt")
    monkeypatch.chdir(tmp_path)
    assert documents("a.txt", tmp_path / "a.txt", "link.txt") == ["one"]


def test_a_name_with_brackets_is_meant_literally(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("one")
    (tmp_path / "a1.txt").write_text("two")
    assert documents(tmp_path / "a[1].txt") == ["one"]


# What a document is.


def test_paragraphs_keep_their_lines_and_indentation(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(
        b"\n \n  Shall I compare\nthee \n\n\n\nto a  summer's\r\nday\r\n\r\nlast"
    )
    assert documents(tmp_path) == ["  Shall I compare\nthee", "to a  summer's\nday", "last"]
    assert documents(tmp_path, documents="file") == [
        "  Shall I compare\nthee \n\n\n\nto a  summer's\nday\n\nlast"
    ]


@given(text=st.text(st.sampled_from("ab é\n\t "), max_size=40))
@example(text="")
def test_paragraphs_are_what_splitting_the_whole_text_gives(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("paragraphs") / "a.txt"
    path.write_text(text, encoding="utf-8")
    pieces = re.split(r"(?:^|(?<=\n))[ \t]*\n", text + "\n")
    assert documents(path) == [piece.rstrip() for piece in pieces if piece.strip()]


def test_compressed_files_and_a_byte_order_mark_give_the_same(tmp_path: Path, prose: str) -> None:
    plain = tmp_path / "plain.txt"
    plain.write_text(prose, encoding="utf-8")
    expected = documents(plain)
    assert len(expected) > 100
    for name, content in [
        ("a.txt.gz", gzip.compress(prose.encode(), mtime=0)),
        ("a.txt.xz", lzma.compress(prose.encode())),
        ("a.txt.zst", pa.compress(prose.encode(), "zstd", asbytes=True)),
        ("frames.txt.zst", zstandard_frames(prose)),
        ("return.txt", prose.replace("\n", "\r").encode()),
        ("bom.txt", b"\xef\xbb\xbf" + prose.encode()),
        ("crlf.txt", prose.replace("\n", "\r\n").encode()),
    ]:
        (tmp_path / name).write_bytes(content)
        assert documents(tmp_path / name) == expected, name


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json.gz", "a.jsonl.xz", "a.jsonl.zst", "a.json", "a.parquet"]
)
def test_records_are_read_as_they_are_and_empty_ones_are_left_to_count(
    tmp_path: Path, name: str
) -> None:
    texts = ["  one\r\n\r\ntwo ", "", None, " \n", "trois é <|endoftext|>"]
    lines = "\ufeff" + "\n\n".join(json.dumps({"body": text, "id": 1}) for text in texts)
    opened: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.compress,
        ".xz": lzma.compress,
        ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
    }
    if name.endswith(".parquet"):
        write_parquet(tmp_path / name, texts, "body")
    else:
        (tmp_path / name).write_bytes(opened.get(Path(name).suffix, bytes)(lines.encode()))
    assert documents(tmp_path / name, text_column="body") == [
        "  one\r\n\r\ntwo ",
        "",
        "",
        "",
        "trois é <|endoftext|>",
    ]


def test_a_pipe_that_is_named_is_one_message(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"Cannot read .*a\.txt: .* save what comes through a pipe"):
        source_hashes(CorpusConfig(inputs=[str(tmp_path / "a.txt")]))


def test_reading_holds_one_document_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cola_train.data.sources._why_not", lambda path: None)
    path = tmp_path / "endless.txt"
    os.mkfifo(path)
    # A pipe that is never closed: whoever wanted the whole file first would wait for ever.
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.write(descriptor, b"one\n\ntwo\n\n" + b"x" * 20_000 + b"\n\n")
        stream = read_documents(CorpusConfig(inputs=[str(path)]))
        assert [next(stream), next(stream)] == ["one", "two"]
        stream.close()  # type: ignore[attr-defined]  # a generator
    finally:
        os.close(descriptor)


# The `datasets` library.


@pytest.fixture
def saved_dataset(tmp_path: Path) -> Path:
    rows = datasets.Dataset.from_dict({"text": ["one", "", "two"], "id": [1, 2, 3]})
    datasets.DatasetDict({"train": rows, "test": rows.select([2])}).save_to_disk(
        str(tmp_path / "saved")
    )
    return tmp_path / "saved"


def dataset_documents(path: Path, **settings: Any) -> list[str]:
    return list(read_documents(CorpusConfig(dataset=str(path), **settings)))


def test_datasets_saved_to_disk(saved_dataset: Path) -> None:
    assert dataset_documents(saved_dataset) == ["one", "", "two"]
    assert dataset_documents(saved_dataset, dataset_split="test") == ["two"]
    assert dataset_documents(saved_dataset / "train") == ["one", "", "two"]


def test_datasets_that_load_dataset_understands(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "train.csv").write_text("text,id\none,1\ntwo,2\n")
    (tmp_path / "raw" / "test.csv").write_text("text,id\nthree,3\n")
    assert dataset_documents(tmp_path / "raw", dataset_split="test") == ["three"]
    before = source_hashes(CorpusConfig(dataset=str(tmp_path / "raw")))
    (tmp_path / "raw" / "train.csv").write_text("text,id\none,1\nTWO,2\n")
    assert dataset_documents(tmp_path / "raw") == ["one", "TWO"]
    assert source_hashes(CorpusConfig(dataset=str(tmp_path / "raw"))) != before


def test_a_hosted_dataset_is_known_by_its_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    class Builder:
        hash = "revision1"

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, config: Builder())
    hashes = [
        source_hashes(CorpusConfig(dataset="owner/name", dataset_split=split))[0].sha256
        for split in ("train", "test", "test")
    ]
    Builder.hash = "revision2"
    hashes.append(source_hashes(CorpusConfig(dataset="owner/name"))[0].sha256)
    assert len(set(hashes)) == 3
    assert hashes[1] == hashes[2]


def test_bad_datasets(saved_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no column 'txt' \(corpus.text_column\); did you mean 'text'\?"
    ):
        dataset_documents(saved_dataset, text_column="txt")
    with pytest.raises(
        UserError, match=r"has no split 'trian' \(corpus.dataset_split\); did you mean 'train'\?"
    ):
        dataset_documents(saved_dataset, dataset_split="trian")
    with pytest.raises(
        UserError, match=r"row 0: corpus\.text_column 'id' must hold strings, not int"
    ):
        dataset_documents(saved_dataset, text_column="id")
    with pytest.raises(
        UserError,
        match=(
            r"The dataset .*/nowhere \(split train\) cannot be read: .* Check corpus.dataset, "
            r"corpus."
        ),
    ):
        dataset_documents(tmp_path / "nowhere")


# What identifies a corpus.


def test_hashes_are_of_content_in_reading_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"bee")
    (tmp_path / "a.jsonl").write_bytes(b"{}")
    hashes = source_hashes(CorpusConfig(inputs=[str(tmp_path)]))
    assert [(Path(one.name).name, one.kind) for one in hashes] == [
        ("a.jsonl", ".jsonl"),
        ("b.txt", ".txt"),
    ]
    assert [one.sha256 for one in hashes] == [
        hashlib.sha256(content).hexdigest() for content in (b"{}", b"bee")
    ]


# Bad input.


def refused(message: str, *inputs: Path | str, **settings: Any) -> None:
    with pytest.raises(UserError, match=message):
        documents(*inputs, **settings)


def test_missing_inputs(tmp_path: Path) -> None:
    (tmp_path / "novels.txt").touch()
    refused(
        r"The corpus input .*/novel\.txt does not exist and matches no file; did you mean "
        r"'novels\.txt'\?",
        tmp_path / "novel.txt",
    )
    refused(
        r"/\*\.parquet does not exist and matches no file; allowed: novels\.txt",
        tmp_path / "*.parquet",
    )
    refused(
        r"/no/where/a\.txt does not exist and matches no file; look at what is in /no/where",
        "/no/where/a.txt",
    )


def test_inputs_of_unknown_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.md").touch()
    message = (
        r"has no file of a known kind \(1 of other kinds\); allowed: \.txt, \.txt\.gz, \.txt\.xz, "
        r"\.txt\.zst, \.jsonl, .*\.parquet"
    )
    refused(message, tmp_path / "a.md")
    refused(message, tmp_path)
    refused(message, tmp_path / "*")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"fine\n\nsm\xf6rg\xe5s", r"a\.txt is not valid UTF-8 at byte 8 \(invalid"),
        ("a.txt", b"\xef\xbb\xbffi\xff", r"a\.txt is not valid UTF-8 at byte 5 \("),
        (
            "a.txt",
            b"cut \xe2\x82",
            (
                r"a\.txt is not valid UTF-8 at byte 4 \(unexpected end of data\); convert the file "
                r"to UTF-8"
            ),
        ),
        (
            "a.txt.gz",
            gzip.compress(b"ok\n\xff", mtime=0),
            r"a\.txt\.gz is not valid UTF-8 at byte 3 of the unpacked text",
        ),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"a\.jsonl is not valid UTF-8 at byte 24 "),
        (
            "a.jsonl",
            b'{"text": "a"}\n\n{"text": ',
            r"a\.jsonl, line 3 is not valid JSON: .*; every line must be one JSON object",
        ),
        ("a.jsonl", b'["text"]', r"a\.jsonl, line 1 must be one JSON object, not a list"),
        (
            "a.jsonl",
            b'{"txet": "a"}',
            (
                r"a\.jsonl, line 1: there is no column 'text' \(corpus\.text_column\); did you "
                r"mean 'txet'\?"
            ),
        ),
        (
            "a.jsonl",
            b"{}",
            (
                r"a\.jsonl, line 1: there is no column 'text' \(corpus\.text_column\); it has no "
                r"columns at all"
            ),
        ),
        (
            "a.jsonl",
            b'{"text": 5}',
            r"a\.jsonl, line 1: corpus\.text_column 'text' must hold strings, not int",
        ),
        (
            "a.jsonl",
            b'{"text": "a\\ud800"}',
            r"a\.jsonl, line 1: the text has a lone surrogate at character 1",
        ),
        (
            "a.txt.gz",
            gzip.compress(b"x" * 1000, mtime=0)[:-12],
            r"a\.txt\.gz cannot be decompressed \(.*\): truncated or damaged",
        ),
        (
            "a.txt.gz",
            b"no gzip",
            (
                r"a\.txt\.gz cannot be decompressed \(.*\): truncated or damaged; fetch or make it "
                r"again"
            ),
        ),
        ("a.txt.xz", lzma.compress(b"x" * 1000)[:-12], r"a\.txt\.xz cannot be decompressed"),
        ("a.txt.xz", b"no xz", r"a\.txt\.xz cannot be decompressed"),
        ("a.txt.zst", b"no zst", r"a\.txt\.zst cannot be decompressed"),
        (
            "a.txt.zst",
            pa.compress(b"x" * 1000, "zstd", asbytes=True)[:-2],
            r"a\.txt\.zst cannot be decompressed",
        ),
        (
            "a.jsonl",
            b"[" * 100_000,
            r"a\.jsonl, line 1 is not valid JSON: .*; every line must be one JSON object",
        ),
        (
            "a.parquet",
            b"no parquet",
            r"a\.parquet is not a readable parquet file \(.*\); fetch or make it again",
        ),
    ],
)
def test_bad_files_are_named_with_the_place(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    refused(message, tmp_path / name)


def test_bad_parquet_columns(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["x", "y"])
    refused(
        r"a\.parquet: there is no column 'texts' \(corpus\.text_column\); did you mean 'text'\?",
        tmp_path,
        text_column="texts",
    )
    refused(
        r"a\.parquet, row 0: corpus\.text_column 'id' must hold strings, not int",
        tmp_path,
        text_column="id",
    )
    bad = pa.array([b"fine", b"ok", b"b\xff"]).view(pa.string())
    write_parquet(tmp_path / "a.parquet", bad)
    refused(r"a\.parquet, row 2 is not valid UTF-8 at byte 1 of its text", tmp_path)


@pytest.mark.skipif(
    sys.platform != "linux", reason="needs a file that opens and then fails to read"
)
def test_a_read_error_is_one_message() -> None:
    # Reading one's own memory at address 0 fails with an input/output error, as a failing disk
    # does.
    link = Path(os.environ.get("TMPDIR", "/tmp")) / f"memory-{os.getpid()}.txt"
    link.symlink_to("/proc/self/mem")
    try:
        refused(
            r"Cannot read .*memory-\d+\.txt: Input/output error\. Check that it exists and may be "
            r"read\.",
            link,
        )
    finally:
        link.unlink()
