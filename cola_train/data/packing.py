"""Documents to one stream of ids per split: held-out choice, separator, alignment, files."""

import array
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash
from jaxtyping import UInt, UInt64

from cola_train.config.settings import require
from cola_train.data.tokenizer import Tokenizer

TRAIN = "train"
VALIDATION = "validation"


def token_dtype(vocab_size: int) -> str:
    """How an id is stored: little-endian, two bytes where they suffice."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def tokens_file(split: str) -> str:
    """The file of a split's rows, laid end to end."""
    return f"{split}.tokens.bin"


def documents_file(split: str) -> str:
    """The file of the positions in a split's tokens where documents start: ascending "<u8"."""
    return f"{split}.documents.bin"


def checks_file(split: str) -> str:
    """The file of a checksum of each of a split's rows, "<u8"."""
    return f"{split}.checks.bin"


def row_check(tokens: UInt[np.ndarray, " seq"], starts: UInt64[np.ndarray, " documents"]) -> int:
    """The checksum of a row: of its ids and of the positions where documents start inside it.

    Both as they are stored; a start at the row's first position counts for nothing.
    """
    return xxhash.xxh3_64_intdigest(tokens.tobytes() + starts.tobytes())


def is_held_out(text: str, share: float) -> bool:
    """Whether a document is for validation: by its text alone, so added files move no document."""
    if share == 0:
        return False
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2.0**64


@dataclasses.dataclass(frozen=True)
class EncodedDocuments:
    """The documents of one split in one batch, in order."""

    tokens: UInt[np.ndarray, " tokens"]
    lengths: UInt64[np.ndarray, " documents"]  # separator and padding included


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Texts to ids and splits; is pickled to other processes."""

    tokenizer: Tokenizer
    held_out_share: float
    document_alignment: int

    def __call__(self, texts: Sequence[str]) -> dict[str, EncodedDocuments]:
        """Each document as its ids, then eos, then padding to the alignment; by split.

        A tokenizer that makes its separator or padding out of plain text is a UserError.
        """
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        # Numbers as they are stored, since a list of a batch's would be read once more; 32 bits
        # hold any id.
        flat = {TRAIN: array.array("I"), VALIDATION: array.array("I")}
        lengths: dict[str, list[int]] = {TRAIN: [], VALIDATION: []}
        num_padding = 0
        for text in texts:
            ids = self.tokenizer.encode_document(text)
            split = VALIDATION if is_held_out(text, self.held_out_share) else TRAIN
            padding = -(len(ids) + 1) % self.document_alignment
            num_padding += padding
            ids += [eos, *[pad] * padding]
            flat[split].fromlist(ids)
            lengths[split].append(len(ids))
        dtype = token_dtype(self.tokenizer.vocab_size)
        tokens = {name: np.frombuffer(ids, np.uint32).astype(dtype) for name, ids in flat.items()}
        everything = np.concatenate([*tokens.values()])
        require(
            (everything == eos).sum() == len(texts) and (everything == pad).sum() == num_padding,
            f"The tokenizer turns plain text of a document into its separator (id {eos}) or "
            f"padding (id {pad}); use one that encodes special tokens written in text as "
            "text, for example of `cola-train tokenizer olmo2`.",
        )
        return {
            name: EncodedDocuments(ids, np.array(lengths[name], dtype=np.uint64))
            for name, ids in tokens.items()
        }


@dataclasses.dataclass(frozen=True)
class SplitCounts:
    """What a split holds."""

    num_rows: int
    num_documents: int  # that start within the rows
    num_tokens: int  # num_rows x seq_len, separators and padding included
    num_dropped_tokens: int  # the tail that fills no row


class SplitWriter:
    """Appends one split's documents to its files, in bounded memory."""

    def __init__(self, folder: Path, split: str, seq_len: int, vocab_size: int) -> None:
        self._seq_len, self._dtype = seq_len, np.dtype(token_dtype(vocab_size))
        self._tokens = (folder / tokens_file(split)).open("wb")
        self._documents = (folder / documents_file(split)).open("wb")
        self._checks = (folder / checks_file(split)).open("wb")
        self.num_tokens = self.num_documents = 0
        # Of the row that is not complete yet.
        self._open_tokens = np.zeros(0, dtype=self._dtype)
        self._open_starts = np.zeros(0, dtype="<u8")

    def append(self, encoded: EncodedDocuments) -> None:
        """Add documents at the end of the stream."""
        ends = np.cumsum(encoded.lengths, dtype=np.uint64) + np.uint64(self.num_tokens)
        tokens = encoded.tokens.astype(self._dtype, copy=False)
        starts = (ends - encoded.lengths).astype("<u8", copy=False)
        self._tokens.write(tokens.tobytes())
        self._documents.write(starts.tobytes())
        self._check(tokens, starts)
        self.num_tokens += len(encoded.tokens)
        self.num_documents += len(encoded.lengths)

    def _check(
        self, tokens: UInt[np.ndarray, " tokens"], starts: UInt64[np.ndarray, " documents"]
    ) -> None:
        """Write the checksums of the rows that these tokens complete."""
        size, first = self._seq_len, self.num_tokens - len(self._open_tokens)
        tokens = np.concatenate([self._open_tokens, tokens])
        starts = np.concatenate([self._open_starts, starts])
        num_rows = len(tokens) // size
        begins = first + np.arange(num_rows + 1, dtype=np.uint64) * np.uint64(size)
        after, before = np.searchsorted(starts, np.stack([begins + np.uint64(1), begins]))
        checks = [
            row_check(tokens[row * size : (row + 1) * size], starts[after[row] : before[row + 1]])
            for row in range(num_rows)
        ]
        self._checks.write(np.array(checks, dtype="<u8").tobytes())
        self._open_tokens = tokens[num_rows * size :]
        self._open_starts = starts[before[num_rows] :]

    def finish(self) -> SplitCounts:
        """Cut what fills no row, and close."""
        self._checks.close()
        num_rows, dropped = divmod(self.num_tokens, self._seq_len)
        kept = self.num_tokens - dropped
        with self._tokens as file:
            file.truncate(kept * self._dtype.itemsize)
        with self._documents as file:
            file.flush()
            starts = np.zeros(0, dtype="<u8")
            if self.num_documents:  # an empty file cannot be mapped
                starts = np.memmap(file.name, dtype="<u8", mode="r")
            # The key must have the array's own type, or numpy converts the whole array to floating
            # point first.
            num_documents = int(np.searchsorted(starts, np.uint64(kept)))
            file.truncate(num_documents * starts.itemsize)
        return SplitCounts(num_rows, num_documents, kept, dropped)

    def close(self) -> None:
        """Close the files as they are; harmless after `finish`."""
        for file in (self._tokens, self._documents, self._checks):
            file.close()
