"""The folder that `cola-train prepare` writes: rows of token ids, memory-mapped, opened in O(1)."""

import dataclasses
import functools
import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Int64

from cola_train.config.content import open_file, read_bytes
from cola_train.config.data import DataConfig
from cola_train.config.settings import UserError, require
from cola_train.console import say
from cola_train.data.packing import (
    SplitCounts,
    checks_file,
    documents_file,
    row_check,
    tokens_file,
)
from cola_train.data.sources import SourceHash
from cola_train.data.tokenizer import Tokenizer
from cola_train.files import file_hint, read_errors_explained
from cola_train.json_text import parse_json

MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
# The first had no checksums.
FORMAT_VERSION = 2
_READ_VERSIONS = (1, FORMAT_VERSION)

_Row = Int64[np.ndarray, " seq"]


@dataclasses.dataclass(frozen=True)
class PreparedManifest:
    """What a prepared folder holds and what it was made from."""

    format_version: int
    seq_len: int
    document_alignment: int
    held_out_share: float
    text_column: str
    documents: str
    dataset_config: str | None
    dataset_split: str
    tokenizer_sha256: str
    vocab_size: int
    eos_token_id: int
    pad_token_id: int
    token_dtype: str
    num_empty_documents: int
    splits: dict[str, SplitCounts]
    sources: tuple[SourceHash, ...]
    files: dict[str, int]  # name -> bytes
    # With defaults: folders of earlier versions lack them.
    on_bad_record: str = "stop"
    max_document_bytes: int | None = None  # where longer documents did not stop the preparation
    num_skipped_records: int = 0
    num_replaced_records: int = 0
    bad_records: tuple[str, ...] = ()  # the first of both, with what was wrong
    generated: dict[str, Any] | None = None  # the fields of a GeneratedConfig

    def to_json(self) -> str:
        """The text of manifest.json, with a checksum of its own."""
        values = dataclasses.asdict(self)
        if self.format_version > 1:
            values["xxh3"] = _checksum(values)
        # In ASCII: names of files are bytes, which need not be UTF-8.
        return json.dumps(values, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "PreparedManifest":
        """The inverse of `to_json`; ValueError, KeyError or TypeError on anything else."""
        values: dict[str, Any] = parse_json(text)
        if values["format_version"] > 1 and values.pop("xxh3") != _checksum(values):
            raise ValueError("its own checksum does not fit")
        values["splits"] = {key: SplitCounts(**counts) for key, counts in values["splits"].items()}
        values["sources"] = tuple(SourceHash(**source) for source in values["sources"])
        values["bad_records"] = tuple(values.get("bad_records", ()))
        manifest = cls(**values)
        manifest._check()
        return manifest

    def _check(self) -> None:
        """Refuse, by a ValueError, what no preparation can have written."""
        if self.token_dtype not in ("<u2", "<u4"):
            raise ValueError(f"token_dtype {self.token_dtype!r}")
        sizes = {tokens_file: int(self.token_dtype[-1]), documents_file: 8, checks_file: 8}
        if self.format_version == 1:
            del sizes[checks_file]
        for split, counts in self.splits.items():
            if type(counts.num_rows) is not int or counts.num_rows < 1:
                raise ValueError(f"{counts.num_rows!r} rows of {split}")
            of_kind = (counts.num_rows * self.seq_len, counts.num_documents, counts.num_rows)
            for (name, size), number in zip(sizes.items(), of_kind):
                if self.files[name(split)] != size * number:
                    raise ValueError(f"{name(split)} and the counts of {split}")


def _checksum(values: Mapping[str, object]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())


_AGAIN = "Delete the folder and prepare it again, or copy it again from its origin."


class PreparedData:
    """Rows of `seq_len` token ids by split: "train", and "validation" if documents were held out.

    Use `open`, which checks the folder first.
    """

    def __init__(self, folder: Path, manifest: PreparedManifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._tokens, self._document_starts, self._checks = {}, {}, {}
        for split in manifest.splits:
            self._tokens[split] = _mapped(folder / tokens_file(split), manifest.token_dtype)
            self._document_starts[split] = _mapped(folder / documents_file(split), "<u8")
            if manifest.format_version > 1:
                self._checks[split] = _mapped(folder / checks_file(split), "<u8")

    @classmethod
    def open(cls, folder: str | Path) -> "PreparedData":
        """Open a prepared folder; reads the manifest and file sizes only.

        Raises:
            UserError: no such folder, no or a damaged manifest, or a file of another size.
        """
        folder = Path(folder)
        require(
            folder.is_dir(),
            f"There is no prepared data folder {folder}{file_hint(folder)}; write one with "
            "`cola-train prepare`.",
        )
        path = folder / MANIFEST_FILE
        require(
            path.is_file(),
            f"{folder} is not prepared data: it has no {MANIFEST_FILE}; "
            "give a folder written by `cola-train prepare`.",
        )
        with read_errors_explained(folder):
            try:
                text = read_bytes(path).decode()
                version = parse_json(text)["format_version"]
                require(
                    version in _READ_VERSIONS,
                    f"{path} has format_version {version!r}; this version of cola-train reads "
                    f"{' and '.join(map(str, _READ_VERSIONS))}. Prepare the data again.",
                )
                manifest = PreparedManifest.from_json(text)
            except UserError:
                raise
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                what = f"{type(error).__name__}: {error}"
                raise UserError(f"{path} is damaged ({what}). {_AGAIN}") from error
            for name, size in manifest.files.items():
                file = folder / name
                require(file.is_file(), f"{folder} is damaged: {name} is missing. {_AGAIN}")
                sizes = f"{name} has {file.stat().st_size} bytes, its manifest says {size}"
                require(file.stat().st_size == size, f"{folder} is damaged: {sizes}. {_AGAIN}")
            if manifest.format_version == 1:
                _say_unchecked(folder)
            return cls(folder, manifest)

    def __reduce__(self) -> tuple[Any, ...]:
        # Reader processes map the files again; pickling a memory map would send its whole content.
        return (PreparedData.open, (self.folder,))

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that encoded the data; a UserError if the folder's copy was changed."""
        tokenizer = Tokenizer.load(self.folder / TOKENIZER_FILE)
        sha256 = self.manifest.tokenizer_sha256
        require(
            tokenizer.sha256 == sha256,
            f"{self.folder} is damaged: its {TOKENIZER_FILE} has sha256 {tokenizer.sha256}, its "
            f"manifest says {sha256}. Put back the tokenizer it was prepared with.",
        )
        for name in ("vocab_size", "eos_token_id", "pad_token_id"):
            says, has = getattr(self.manifest, name), getattr(tokenizer, name)
            require(
                says == has,
                f"{self.folder} is damaged: its manifest says {name} {says}, its tokenizer has "
                f"{has}. {_AGAIN}",
            )
        return tokenizer

    @property
    def summary(self) -> str:
        """The folder's rows, documents and vocabulary in one line, for people."""
        splits = ", ".join(
            f"{name}: {counts.num_rows:,} rows of {counts.num_documents:,} documents"
            for name, counts in self.manifest.splits.items()
        )
        seq_len, vocab_size = self.manifest.seq_len, self.manifest.vocab_size
        return f"{self.folder}: rows of {seq_len} tokens; {splits}; {vocab_size:,} ids"

    def num_rows(self, split: str) -> int:
        """Rows of a split; 0 if there is no such split."""
        return self.manifest.splits[split].num_rows if split in self.manifest.splits else 0

    def row(self, split: str, index: int) -> tuple[_Row, _Row]:
        """A row's token ids and their documents, numbered from 0 in each row.

        Raises:
            IndexError: there is no such row.
            UserError: it is not as it was prepared.
        """
        num_rows, seq_len = self.num_rows(split), self.manifest.seq_len
        if not 0 <= index < num_rows:
            raise IndexError(f"the split '{split}' has {num_rows} rows, there is no row {index}")
        start = index * seq_len
        stored = self._tokens[split][start : start + seq_len]
        tokens = stored.astype(np.int64)
        starts = self._document_starts[split]
        # The keys must have the array's own type, or numpy converts the whole array to floating
        # point first.
        keys = np.array([start + 1, start + seq_len], dtype=np.uint64)
        first, last = np.searchsorted(starts, keys)
        inside = starts[first:last]
        checks = self._checks.get(split)
        is_damaged = checks is not None and checks[index] != row_check(stored, inside)
        require(
            not is_damaged and tokens.max() < self.manifest.vocab_size,
            f"{self.folder} is damaged: row {index} of {split} is not as it was prepared. {_AGAIN}",
        )
        begins = np.zeros(seq_len, dtype=np.int64)
        begins[inside.astype(np.int64) - start] = 1
        return tokens, np.cumsum(begins)

    def check_run(self, data: DataConfig, tokenizer_sha256: str | None) -> None:
        """Refuse a run with another seq_len or another tokenizer than the data's by a UserError.

        `tokenizer_sha256` is of the tokenizer of the run's model; None if it has none yet.
        """
        seq_len, sha256 = self.manifest.seq_len, self.manifest.tokenizer_sha256
        require(
            data.seq_len == seq_len,
            f"data.seq_len must be what the data was prepared with: {self.folder} has rows of "
            f"{seq_len} tokens, the run asks for {data.seq_len}. Set data.seq_len={seq_len}, or "
            f"prepare another folder with seq_len={data.seq_len}.",
        )
        require(
            tokenizer_sha256 in (None, sha256),
            f"The tokenizer of the run and of the data must be the same file: {self.folder} was "
            f"prepared with sha256 {sha256}, the run has {tokenizer_sha256}. Prepare the data "
            "again with the run's tokenizer.",
        )


@functools.cache
def _say_unchecked(folder: Path) -> None:
    say(
        f"{folder} was prepared by an earlier version, without checksums: whether its rows are as "
        "they were written cannot be checked."
    )


def _mapped(path: Path, dtype: str) -> np.ndarray:
    with open_file(path) as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # Rows are read in no order: reading ahead of each, which the system does unless told, costs a
    # thousand times the row itself.
    mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype=dtype)
