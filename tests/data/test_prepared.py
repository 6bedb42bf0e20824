"""The prepared folder: rows and document ids against a plain count, O(1) opening, and every message
about a bad folder.
"""

import dataclasses
import json
import os
import pickle
import re
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cola_train.config.data import DataConfig
from cola_train.config.settings import UserError
from cola_train.data.batch import row_index
from cola_train.data.packing import SplitCounts, row_check
from cola_train.data.prepared import PreparedData, PreparedManifest
from cola_train.training.data import RunData


@pytest.mark.parametrize("split", ["train", "validation"])
def test_document_ids_count_separators_seen_in_the_row(prepared: PreparedData, split: str) -> None:
    # Documents may start only after a separator and its padding: count them by walking along the
    # tokens.
    eos, pad = prepared.manifest.eos_token_id, prepared.manifest.pad_token_id
    most = 0
    for index in range(prepared.num_rows(split)):
        tokens, document_ids = prepared.row(split, index)
        assert tokens.dtype == document_ids.dtype == np.int64
        # not a view of the map, which would keep the file open in other processes
        assert type(tokens) is np.ndarray
        expected, number = [], 0
        for place, token in enumerate(tokens.tolist()):
            ended = place > 0 and tokens[place - 1] in (eos, pad) and token != pad
            number += ended
            expected.append(number)
        assert document_ids.tolist() == expected
        most = max(most, number)
    assert most >= 2


def test_padding_is_there_and_documents_start_aligned(prepared: PreparedData) -> None:
    rows = [prepared.row("train", index) for index in range(prepared.num_rows("train"))]
    assert sum(int((tokens == prepared.manifest.pad_token_id).sum()) for tokens, _ in rows) > 20
    assert all(start % 4 == 0 for _, ids in rows for start in np.flatnonzero(np.diff(ids)) + 1)


def test_rows_are_numbered_from_0(prepared: PreparedData) -> None:
    num_rows = prepared.num_rows("train")
    for index in (-1, num_rows):
        with pytest.raises(
            IndexError, match=f"the split 'train' has {num_rows} rows, there is no row {index}"
        ):
            prepared.row("train", index)
    assert prepared.num_rows("test") == 0
    with pytest.raises(IndexError, match="the split 'test' has 0 rows"):
        prepared.row("test", 0)


def test_the_manifest_survives_a_round_trip(prepared: PreparedData) -> None:
    assert PreparedManifest.from_json(prepared.manifest.to_json()) == prepared.manifest


def test_the_summary_names_the_counts(prepared: PreparedData) -> None:
    assert f"rows of 64 tokens; train: {prepared.num_rows('train'):,} rows of " in prepared.summary


def test_another_process_gets_the_folder_and_not_its_content(prepared: PreparedData) -> None:
    pickled = pickle.dumps(prepared)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).row("train", 1)[0].tolist() == prepared.row("train", 1)[0].tolist()


def test_a_store_of_a_billion_rows_opens_at_once_and_a_run_goes_on_at_once(
    prepared: PreparedData, tmp_path: Path
) -> None:
    num_rows, seq_len = 10**9, 512
    sizes = {
        "train.tokens.bin": num_rows * seq_len * 4,
        "train.documents.bin": 8 * 10**8,
        "train.checks.bin": num_rows * 8,
    }
    for name, size in sizes.items():
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, size)  # holes: no space on the disk
    with (tmp_path / "train.documents.bin").open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write((num_rows * seq_len - 100).to_bytes(8, "little"))
    manifest = dataclasses.replace(
        prepared.manifest,
        seq_len=seq_len,
        token_dtype="<u4",
        splits={"train": SplitCounts(num_rows, 10**8, num_rows * seq_len, 0)},
        files=sizes,
    )
    (tmp_path / "manifest.json").write_text(manifest.to_json())
    first, last = 8 * 10**8, num_rows - 1
    read = row_index(np.arange(first, first + 8), num_rows, 5).tolist()
    with (tmp_path / "train.checks.bin").open("r+b") as file:
        for row in (*read, last):
            starts = [num_rows * seq_len - 100] if row == last else []
            check = row_check(np.zeros(seq_len, "<u4"), np.array(starts, "<u8"))
            file.seek(8 * row)
            file.write(check.to_bytes(8, "little"))
    tracemalloc.start()
    start = time.process_time()
    huge = PreparedData.open(tmp_path)
    tokens, document_ids = huge.row("train", num_rows - 1)
    seconds = time.process_time() - start
    module = RunData(
        DataConfig(path=str(tmp_path)),
        global_batch_size=8,
        micro_batch_size=8,
        validation_rows=None,
        data_seed=5,
    )
    module.start_step = 10**8
    batch = next(iter(module.train_loader(0, 1)))
    until_first_batch = time.process_time() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert batch.sample_index.tolist() == list(range(8 * 10**8, 8 * 10**8 + 8))
    assert batch.row_index.max() > 10**8  # from all over the store
    assert until_first_batch < 1.0
    assert tokens.tolist() == [0] * seq_len
    assert document_ids.tolist() == [0] * (seq_len - 100) + [1] * 100
    assert seconds < 1.0
    assert peak < 1_000_000


# What a run may ask of it.


def test_a_run_that_fits(prepared: PreparedData) -> None:
    data = DataConfig(path=str(prepared.folder), seq_len=64)
    prepared.check_run(data, None)
    prepared.check_run(data, prepared.tokenizer.sha256)


def test_another_seq_len(prepared: PreparedData) -> None:
    with pytest.raises(
        UserError,
        match=(
            r"has rows of 64 tokens, the run asks for 512\. Set data\.seq_len=64, or prepare "
            r"another folder with seq_len=512"
        ),
    ):
        prepared.check_run(DataConfig(path=str(prepared.folder)), None)


def test_another_tokenizer(prepared: PreparedData) -> None:
    with pytest.raises(
        UserError,
        match=(
            rf"prepared with sha256 {prepared.manifest.tokenizer_sha256}, the run has 00ff\. "
            r"Prepare the data again with"
        ),
    ):
        prepared.check_run(DataConfig(path=str(prepared.folder), seq_len=64), "00ff")


# Damage.


def no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def truncate(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 2)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def grow(folder: Path) -> None:
    with (folder / "train.documents.bin").open("ab") as file:
        file.write(b"\0" * 8)


def drop_key(folder: Path) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    del values["seq_len"], values["xxh3"]
    # As an earlier version wrote it: its checksum would be missed first.
    (folder / "manifest.json").write_text(json.dumps({**values, "format_version": 1}))


def other_version(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(
        text.replace('"format_version": 2', '"format_version": 99')
    )


@pytest.mark.parametrize(
    "damage, message",
    [
        (no_folder, r"There is no prepared data folder .*; write one with `cola-train prepare`"),
        (
            remove("manifest.json"),
            r"is not prepared data: it has no manifest\.json; give a folder written by",
        ),
        (
            truncate("train.tokens.bin"),
            (
                r"is damaged: train\.tokens\.bin has \d+ bytes, its manifest says \d+\. Delete the "
                r"folder and"
            ),
        ),
        (
            truncate("validation.documents.bin"),
            r"is damaged: validation\.documents\.bin has \d+ bytes, its manifest says",
        ),
        (grow, r"is damaged: train\.documents\.bin has \d+ bytes, its manifest says"),
        (
            remove("validation.tokens.bin"),
            (
                r"is damaged: validation\.tokens\.bin is missing\. Delete the folder and prepare "
                r"it again"
            ),
        ),
        (
            truncate("tokenizer.json"),
            r"is damaged: tokenizer\.json has \d+ bytes, its manifest says",
        ),
        (
            truncate("manifest.json"),
            (
                r"manifest\.json is damaged \(JSONDecodeError: .*\)\. Delete the folder and "
                r"prepare it again"
            ),
        ),
        (drop_key, r"manifest\.json is damaged \(TypeError: .*seq_len.*\)\. Delete"),
        (
            lambda folder: (folder / "manifest.json").write_text("[]"),
            r"manifest\.json is damaged \(TypeError",
        ),
        (
            other_version,
            r"has format_version 99; this version of cola-train reads 1 and 2\. Prepare the data",
        ),
    ],
)
def test_damaged_folders(
    prepared: PreparedData, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(prepared.folder, folder)
    PreparedData.open(folder)
    damage(folder)
    with pytest.raises(UserError, match=message):
        PreparedData.open(folder)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("kind", ["tokens", "documents", "checks"])
def test_every_bit_of_the_rows_is_checked(
    prepared: PreparedData, tmp_path: Path, kind: str, split: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(prepared.folder, folder)
    path, rows = folder / f"{split}.{kind}.bin", range(prepared.num_rows(split))
    whole = path.read_bytes()
    for place in (0, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        damaged, bad = PreparedData.open(folder), 0
        for row in rows:
            try:
                found = damaged.row(split, row)
            except UserError:
                bad += 1
            else:
                assert np.array_equal(found, prepared.row(split, row))
        # Where the first document begins says nothing: a row's first is its first.
        assert bad >= 1 or (kind == "documents" and place == 0)


def test_every_byte_of_the_manifest_is_checked(prepared: PreparedData, tmp_path: Path) -> None:
    shutil.copytree(prepared.folder, tmp_path / "copy")
    path = tmp_path / "copy" / "manifest.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = PreparedData.open(path.parent)
        except UserError:
            continue
        assert found.manifest == prepared.manifest


def test_rows_of_an_earlier_version_are_read_and_that_they_are_unchecked_is_said(
    prepared: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(prepared.folder, tmp_path / "copy")
    files = {name: size for name, size in prepared.manifest.files.items() if "checks" not in name}
    old = dataclasses.replace(prepared.manifest, format_version=1, files=files)
    (tmp_path / "copy" / "manifest.json").write_text(old.to_json())
    found = PreparedData.open(tmp_path / "copy")
    assert "was prepared by an earlier version, without checksums" in capsys.readouterr().err
    assert np.array_equal(found.row("train", 1), prepared.row("train", 1))
    assert found.tokenizer.sha256 == prepared.tokenizer.sha256
    for change in (
        {"token_dtype": "<f8"},
        {"splits": {"train": SplitCounts(1, 1, 64, 0)}},
        {"seq_len": 32},
    ):
        wrong = dataclasses.replace(old, **change)
        (tmp_path / "copy" / "manifest.json").write_text(wrong.to_json())
        with pytest.raises(UserError, match=r"manifest\.json is damaged"):
            PreparedData.open(tmp_path / "copy")
    wrong = dataclasses.replace(old, pad_token_id=0)
    (tmp_path / "copy" / "manifest.json").write_text(wrong.to_json())
    with pytest.raises(UserError, match="manifest says pad_token_id 0, its tokenizer has 3"):
        PreparedData.open(tmp_path / "copy").tokenizer  # noqa: B018


def test_a_changed_tokenizer_of_the_same_size(prepared: PreparedData, tmp_path: Path) -> None:
    shutil.copytree(prepared.folder, tmp_path / "copy")
    path = tmp_path / "copy" / "tokenizer.json"
    path.write_text(
        re.sub(r"<\|im_end\|>", "<|im_fin|>", path.read_text(encoding="utf-8")), encoding="utf-8"
    )
    with pytest.raises(
        UserError,
        match=(
            r"is damaged: its tokenizer\.json has sha256 \w+, its manifest says \w+\. Put back the"
        ),
    ):
        PreparedData.open(tmp_path / "copy").tokenizer  # noqa: B018
