"""Preparation, against a plain reference in lists; the same for any number of processes; complete
or not at all.
"""

import contextlib
import dataclasses
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from cola_train.config.data import PrepareConfig
from cola_train.config.settings import UserError
from cola_train.data import packing
from cola_train.data.packing import EncodedDocuments, Encoder, SplitWriter, is_held_out
from cola_train.data.prepare import _encode, prepare
from cola_train.data.prepared import PreparedData
from cola_train.data.tokenizer import Tokenizer

Build = Callable[..., PrepareConfig]


def folder_bytes(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def documents_of(prepared: PreparedData, split: str) -> list[str]:
    """The texts of a split as the rows hold them, the last one perhaps cut."""
    eos, pad = prepared.manifest.eos_token_id, prepared.manifest.pad_token_id
    tokens = np.concatenate(
        [prepared.row(split, index)[0] for index in range(prepared.num_rows(split))]
    )
    pieces = np.split(tokens, np.flatnonzero(tokens == eos) + 1)
    return [
        prepared.tokenizer.decode([token for token in piece.tolist() if token != pad])
        for piece in pieces
    ]


def reference_streams(
    prose: str, tokenizer: Tokenizer, share: float, alignment: int
) -> dict[str, tuple[list[int], list[int]]]:
    """Tokens and document starts by split, the slow and obvious way."""
    streams: dict[str, tuple[list[int], list[int]]] = {"train": ([], []), "validation": ([], [])}
    for text in prose.split("\n\n"):
        if not text.strip():
            continue
        stream, starts = streams["validation" if is_held_out(text.strip("\n"), share) else "train"]
        starts.append(len(stream))
        stream.extend(tokenizer.encode_document(text.strip("\n")))
        stream.append(0)
        while len(stream) % alignment:
            stream.append(3)
    return streams


@pytest.mark.parametrize("alignment, seq_len", [(1, 64), (1, 7), (16, 64)])
def test_rows_are_the_documents_end_to_end(
    prepare_config: Build, prose: str, tokenizer: Tokenizer, alignment: int, seq_len: int
) -> None:
    prepared = prepare(prepare_config(seq_len=seq_len, document_alignment=alignment))
    for split, (stream, starts) in reference_streams(prose, tokenizer, 0.1, alignment).items():
        counts = prepared.manifest.splits[split]
        kept = len(stream) // seq_len * seq_len
        assert (counts.num_tokens, counts.num_dropped_tokens) == (kept, len(stream) - kept)
        assert counts.num_documents == sum(start < kept for start in starts)
        assert counts.num_rows == kept // seq_len > 5
        tokens = np.concatenate([prepared.row(split, index)[0] for index in range(counts.num_rows)])
        assert tokens.tolist() == stream[:kept]
        saved_starts = np.fromfile(prepared.folder / f"{split}.documents.bin", dtype="<u8")
        assert saved_starts.tolist() == [start for start in starts if start < kept]


def test_the_manifest_says_what_the_folder_holds(
    prepare_config: Build, tokenizer: Tokenizer, prose_file: Path
) -> None:
    manifest = prepare(prepare_config()).manifest
    assert manifest.tokenizer_sha256 == tokenizer.sha256
    assert [source.name for source in manifest.sources] == [str(prose_file)]
    assert (manifest.vocab_size, manifest.eos_token_id, manifest.pad_token_id) == (600, 0, 3)
    sizes = {path.name: path.stat().st_size for path in Path(prepare_config().out).iterdir()}
    assert sizes.pop("manifest.json") > 0
    assert manifest.files == sizes


@pytest.mark.parametrize("vocab_size, dtype", [(65_536, "<u2"), (65_537, "<u4")])
def test_ids_are_stored_in_two_bytes_where_they_fit(
    tmp_path: Path, vocab_size: int, dtype: str
) -> None:
    tokens = np.array([0, vocab_size - 1, 5], dtype=dtype)
    writer = SplitWriter(tmp_path, "train", 3, vocab_size)
    writer.append(EncodedDocuments(tokens, np.array([2, 1], dtype=np.uint64)))
    assert writer.finish().num_documents == 2
    assert (tmp_path / "train.tokens.bin").read_bytes() == tokens.tobytes()
    assert packing.token_dtype(vocab_size) == dtype


def test_three_processes_give_the_bytes_of_one(
    prepare_config: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Small batches, so that many are in flight at once and may finish out of order.
    monkeypatch.setattr("cola_train.data.prepare._BATCH_CHARACTERS", 2_000)
    prepare(prepare_config(out=str(tmp_path / "one")))
    prepare(prepare_config(out=str(tmp_path / "three"), num_processes=3))
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "three")
    assert "tokens/s" in capsys.readouterr().err


def test_input_is_not_read_far_ahead_of_what_is_encoded(tokenizer: Tokenizer) -> None:
    num_read = 0

    def batches() -> Iterator[list[str]]:
        nonlocal num_read
        for _ in range(200):
            num_read += 1
            yield ["some text"]

    with contextlib.closing(_encode(batches(), Encoder(tokenizer, 0.0, 1), 2)) as encoded:
        next(encoded)
        assert num_read <= 8


@given(text=st.text(), share=st.floats(0, 1), more=st.floats(0, 1))
def test_a_larger_share_holds_out_all_that_a_smaller_does(
    text: str, share: float, more: float
) -> None:
    assert is_held_out(text, max(share, more)) >= is_held_out(text, min(share, more))
    assert not is_held_out(text, 0.0)
    assert is_held_out(text, 1.0)


def test_the_held_out_share_is_about_what_was_asked() -> None:
    held_out = sum(is_held_out(f"document {number}", 0.05) for number in range(20_000))
    assert abs(held_out - 1000) < 5 * 31  # five standard deviations


def test_added_files_move_no_document_to_the_other_split(
    prepare_config: Build, prose: str, tmp_path: Path
) -> None:
    paragraphs = prose.split("\n\n")
    (tmp_path / "m.txt").write_text("\n\n".join(paragraphs[:300]), encoding="utf-8")
    before = prepare(prepare_config(out=str(tmp_path / "before"), inputs=[tmp_path / "m.txt"]))
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs[300:500]), encoding="utf-8")
    (tmp_path / "z.txt").write_text("\n\n".join(paragraphs[500:]), encoding="utf-8")
    after = prepare(prepare_config(out=str(tmp_path / "after"), inputs=[tmp_path / "*.txt"]))
    for split, other in [("train", "validation"), ("validation", "train")]:
        was = set(documents_of(before, split)[:-1])
        assert len(was) > 5
        assert was <= set(documents_of(after, split))
        assert was.isdisjoint(documents_of(after, other))


def test_a_corpus_cannot_forge_a_separator(prepare_config: Build, tmp_path: Path) -> None:
    texts = ["one<|endoftext|>two<|pad|>", "<|endoftext|>", "three <|im_end|>"] * 30
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    prepared = prepare(prepare_config(inputs=[tmp_path / "a.jsonl"], held_out_share=0.0, seq_len=8))
    assert prepared.manifest.splits.keys() == {"train"}
    assert documents_of(prepared, "train")[:-1] == texts[: len(documents_of(prepared, "train")) - 1]


def test_a_tokenizer_that_forges_one_is_refused(prepare_config: Build, tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<|endoftext|>": 0, "<|pad|>": 1, "word": 2}, unk_token="word")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "words.json"))
    (tmp_path / "a.txt").write_text("fine\n\nword <|endoftext|> word\n")
    with pytest.raises(
        UserError,
        match=(
            r"turns plain text of a document into its separator \(id 0\) or padding \(id 1\); "
            r"use one"
        ),
    ):
        prepare(
            prepare_config(
                tokenizer=str(tmp_path / "words.json"),
                inputs=[tmp_path / "a.txt"],
                seq_len=1,
                held_out_share=0.0,
            )
        )


def test_empty_documents_are_counted(prepare_config: Build, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "some words"}\n{"text": " "}\n{"text": null}\n')
    prepared = prepare(prepare_config(inputs=[tmp_path / "a.jsonl"], held_out_share=0.0, seq_len=2))
    assert prepared.manifest.num_empty_documents == 2


def test_what_is_left_out_is_counted_and_said(
    prepare_config: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "some words"}\n{"text": 5}\n{"text": "s\xff"}')
    config = prepare_config(inputs=[tmp_path / "a.jsonl"], held_out_share=0.0, seq_len=2)
    corpus = dataclasses.replace(config.corpus, on_bad_record="replace")
    manifest = prepare(dataclasses.replace(config, corpus=corpus)).manifest
    assert (manifest.num_skipped_records, manifest.num_replaced_records) == (1, 1)
    assert [problem.split(":")[0] for problem in manifest.bad_records] == [
        f"{tmp_path}/a.jsonl, line 2",
        f"{tmp_path}/a.jsonl is not valid UTF-8 at byte 46 (invalid start byte); convert the file "
        "to UTF-8, for example with iconv.",
    ]
    assert (
        "Records left out: 1; repaired: 1 (corpus.on_bad_record=replace)."
        in capsys.readouterr().err
    )
    corpus = dataclasses.replace(config.corpus, on_bad_record="skip")
    with pytest.raises(UserError, match="on_bad_record is replace there, skip here"):
        prepare(dataclasses.replace(config, corpus=corpus))
    assert PreparedData.open(config.out).manifest == manifest


def test_a_corpus_that_is_all_left_out_says_why(prepare_config: Build, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"txt": "some words"}')
    config = prepare_config(inputs=[tmp_path / "a.jsonl"])
    config = dataclasses.replace(
        config, corpus=dataclasses.replace(config.corpus, on_bad_record="skip")
    )
    message = r"no text: 0 documents, all empty\. Records left out: 1; .*line 1: there is no column"
    with pytest.raises(UserError, match=message):
        prepare(config)


def test_a_name_that_is_no_utf8(prepare_config: Build, prose: str, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / os.fsdecode(b"\xe9.txt")).write_text(prose, encoding="utf-8")
    texts = pa.table({"text": [prose]})
    with (folder / os.fsdecode(b"\xe9.parquet")).open("wb") as file:
        pq.write_table(texts, file)
    with (folder / os.fsdecode(b"\xe9.txt.zst")).open("wb") as file:
        file.write(pa.compress(prose.encode(), "zstd", asbytes=True))
    prepared = prepare(prepare_config(inputs=[folder]))
    again = PreparedData.open(prepared.folder)
    assert [os.fsencode(source.name).rpartition(b"/")[2] for source in again.manifest.sources] == [
        b"\xe9.parquet",
        b"\xe9.txt",
        b"\xe9.txt.zst",
    ]


# A tokenizer that loses the text.


def word_tokenizer(path: Path, words: list[str], unknown: str | None) -> str:
    names = ["<|endoftext|>", "<|pad|>", *([unknown] if unknown else []), *words]
    vocabulary = {name: number for number, name in enumerate(names)}
    model = (
        tokenizers.models.WordLevel(vocabulary, unk_token=unknown)
        if unknown
        else tokenizers.models.BPE(vocabulary, [])
    )
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(path))
    return str(path)


@pytest.mark.parametrize(
    "words, unknown",
    [(["pride"], "<unk>"), (["x", "y"], None)],
    ids=["unknown tokens", "nothing"],
)
def test_a_tokenizer_that_loses_the_text_is_refused(
    prepare_config: Build, tmp_path: Path, words: list[str], unknown: str | None
) -> None:
    tokenizer = word_tokenizer(tmp_path / "words.json", words, unknown)
    with pytest.raises(
        UserError,
        match=r"loses the text: [\d,]+ of [\d,]+ characters looked at become unknown tokens, or ",
    ):
        prepare(prepare_config(tokenizer=tokenizer))
    assert not Path(prepare_config().out).exists()


def test_a_tokenizer_that_loses_a_few_words_is_said(
    prepare_config: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = word_tokenizer(tmp_path / "words.json", ["one", "two"], "<unk>")
    (tmp_path / "a.txt").write_text("one two\n\ntwo one six")
    prepare(
        prepare_config(
            tokenizer=tokenizer, inputs=[tmp_path / "a.txt"], seq_len=2, held_out_share=0.0
        )
    )
    err = capsys.readouterr().err
    assert "The tokenizer loses 3 of 15 characters looked at: they become unknown tokens" in err


# The same again, and something else in the way.


def test_the_same_again_does_nothing_and_says_so(
    prepare_config: Build, prose_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = prepare(prepare_config())
    before = {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    shutil.copy(prose_file, tmp_path / "elsewhere.txt")
    capsys.readouterr()
    again = prepare(prepare_config(inputs=[tmp_path / "elsewhere.txt"], num_processes=2))
    assert "Already prepared, nothing to do: " in capsys.readouterr().err
    assert again.manifest == first.manifest
    assert {path.name: path.stat().st_mtime_ns for path in first.folder.iterdir()} == before


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seq_len": 32}, "seq_len is 64 there, 32 here"),
        (
            {"held_out_share": 0.2, "document_alignment": 2},
            "document_alignment is 1 there, 2 here; held_out_share is 0.1 there, 0.2 here",
        ),
        ({"documents": "file"}, "documents is paragraph there, file here"),
        ({"more": True}, "the sources differ: 1 files there, 2 here, 1 in common"),
    ],
)
def test_other_data_in_the_way_is_named_and_kept(
    prepare_config: Build, prose_file: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    prepare(prepare_config())
    before = folder_bytes(prepare_config().out)
    (tmp_path / "more.txt").write_text("more")
    config = prepare_config(
        inputs=[prose_file, tmp_path / "more.txt"] if changes.pop("more", False) else None
    )
    if "documents" in changes:
        changes = {"corpus": dataclasses.replace(config.corpus, **changes)}
    with pytest.raises(
        UserError,
        match=rf"already exists with something else in it, and is never overwritten \({message}\)",
    ):
        prepare(dataclasses.replace(config, **changes))
    assert folder_bytes(prepare_config().out) == before


@pytest.mark.parametrize("kind", ["file", "folder", "empty folder"])
def test_anything_else_in_the_way_is_kept(prepare_config: Build, kind: str) -> None:
    out = Path(prepare_config().out)
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "mine.txt").write_text("mine")
    with pytest.raises(
        UserError,
        match=(
            r"prepared already exists and is not prepared data; it is never overwritten\. Give "
            r"another out="
        ),
    ):
        prepare(prepare_config())
    assert out.is_file() or [path.name for path in out.iterdir()] == ["mine.txt"] * (
        kind == "folder"
    )


def test_a_damaged_folder_is_not_taken_for_prepared(prepare_config: Build) -> None:
    prepared = prepare(prepare_config())
    os.truncate(prepared.folder / "train.tokens.bin", 100)
    with pytest.raises(
        UserError, match=r"is damaged: train\.tokens\.bin has 100 bytes, its manifest says \d+"
    ):
        prepare(prepare_config())


# Too little text.


def test_an_empty_corpus(prepare_config: Build, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    (tmp_path / "b.txt").write_text("\n")
    with pytest.raises(
        UserError, match=r"The corpus has no text: 1 documents, all empty\. Check corpus\.inputs"
    ):
        prepare(prepare_config(inputs=[tmp_path / "*.*"]))
    assert not Path(prepare_config().out).exists()


def test_a_corpus_smaller_than_a_row(prepare_config: Build, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("few words")
    with pytest.raises(
        UserError,
        match=(
            r"fill at least one row of the training split: it has \d tokens, seq_len is 64. Give "
            r"more text or a smaller"
        ),
    ):
        prepare(prepare_config(inputs=[tmp_path / "a.txt"], held_out_share=0.0))


def test_held_out_documents_smaller_than_a_row(prepare_config: Build) -> None:
    with pytest.raises(
        UserError,
        match=(
            r"held_out_share=1e-05 chose 0 tokens, seq_len is 64\. Raise held_out_share, use a "
            r"shorter seq_len, or set held"
        ),
    ):
        prepare(prepare_config(held_out_share=1e-5))


# Interrupted and failed: nothing is left.


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize(
    "failure, raised, message",
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            UserError,
            "Cannot write .*prepared: No space left on device.*free space",
        ),
    ],
)
def test_a_failure_in_the_middle_leaves_nothing(
    prepare_config: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_processes: int,
    failure: BaseException,
    raised: type[BaseException],
    message: str | None,
) -> None:
    monkeypatch.setattr("cola_train.data.prepare._BATCH_CHARACTERS", 10_000)
    original = SplitWriter.append

    def append(self: SplitWriter, encoded: EncodedDocuments) -> None:
        original(self, encoded)
        if self.num_tokens > 20_000:
            raise failure

    monkeypatch.setattr(SplitWriter, "append", append)
    with pytest.raises(raised, match=message):
        prepare(prepare_config(num_processes=num_processes))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_no_more(prepare_config: Build, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(
            UserError, match=r"Cannot write .*prepared: File too large\. Nothing was changed there"
        ):
            prepare(prepare_config())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(prepare_config: Build, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"Cannot write .*/file/prepared: File exists\."):
        prepare(prepare_config(out=str(tmp_path / "file" / "prepared")))


def test_a_bad_document_late_in_the_corpus_leaves_nothing(
    prepare_config: Build, prose: str, tmp_path: Path
) -> None:
    corpus = tmp_path / "a.txt"
    corpus.write_bytes(prose.encode() + b"\n\n\xff")
    with pytest.raises(
        UserError, match=rf"a\.txt is not valid UTF-8 at byte {len(prose.encode()) + 2} "
    ):
        prepare(prepare_config(inputs=[corpus], num_processes=2))
    assert list(tmp_path.iterdir()) == [corpus]


class DyingEncoder(Encoder):
    def __call__(self, texts: Sequence[str]) -> dict[str, EncodedDocuments]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}


def test_a_dead_process_is_reported_rather_than_waited_for(tokenizer: Tokenizer) -> None:
    with pytest.raises(
        UserError,
        match=(
            r"A tokenizing process died, perhaps for lack of memory: use a smaller num_processes\."
        ),
    ):
        list(_encode(iter([["a"], ["b"]]), DyingEncoder(tokenizer, 0.0, 1), 2))


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_whole_program_interrupted(
    prepare_config: Build, tmp_path: Path, how: signal.Signals
) -> None:
    (tmp_path / "in").mkdir()
    pipe = tmp_path / "in" / "endless.txt"
    os.mkfifo(pipe)
    script = tmp_path / "in" / "script.py"
    config = prepare_config(inputs=[pipe], num_processes=2, out=str(tmp_path / "out" / "prepared"))
    script.write_text(
        "from cola_train.config.data import *\n"
        "import cola_train.data.prepare as module\n"
        "module.source_hashes = lambda corpus: []\n"
        # An input is a file; this one has no end.
        f"module.read_documents = lambda corpus, bad: open({str(pipe)!r})\n"
        "if __name__ == '__main__':\n"
        f"    module.prepare({config!r})\n"
    )
    program = subprocess.Popen(
        [sys.executable, str(script)], stderr=subprocess.DEVNULL, start_new_session=True
    )
    with pipe.open("wb") as file:
        while not list(tmp_path.glob("out/.prepared.*/train.tokens.bin")) or not all_written(
            tmp_path
        ):
            file.write(b"some words\n\n" * 100_000)
            file.flush()
        workers = children_of(program.pid)
        assert len(workers) >= 2
        os.kill(program.pid, how) if how == signal.SIGKILL else os.killpg(program.pid, how)
        program.wait(30)
    assert program.returncode == -how
    assert not (tmp_path / "out" / "prepared").exists()
    if how == signal.SIGINT:
        assert list((tmp_path / "out").iterdir()) == []
    deadline = time.monotonic() + 20
    while any(alive(worker) for worker in workers):
        assert time.monotonic() < deadline, "tokenizing processes outlive their parent"
        time.sleep(0.1)


def all_written(tmp_path: Path) -> bool:
    return (
        sum(path.stat().st_size for path in tmp_path.glob("out/.prepared.*/train.tokens.bin")) > 0
    )


def children_of(pid: int) -> list[int]:
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    with contextlib.suppress(OSError):
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    return False
