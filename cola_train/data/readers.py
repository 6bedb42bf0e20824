"""One file to its documents in order; memory holds one document (parquet: one batch of rows)."""

import contextlib
import gzip
import itertools
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cola_train.config.content import open_file
from cola_train.config.data import CorpusConfig
from cola_train.config.settings import UserError
from cola_train.data.records import BadRecords, outer_column, require_column, text_of, too_long
from cola_train.files import read_errors_explained
from cola_train.json_text import parse_json


def _open_zstandard(path: Path, mode: str) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(path.open(mode)), "zstd")


_OPENERS: Mapping[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}
_LINES_OF_JSON = (".jsonl", ".json")
SUFFIXES = (
    *(kind + packed for kind in (".txt", *_LINES_OF_JSON) for packed in ("", *_OPENERS)),
    ".parquet",
)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLOCK_BYTES = 1 << 18
_PARQUET_BATCH_ROWS = 256
_PARQUET_BATCH_BYTES = 1 << 26


def suffix_of(path: Path) -> str | None:
    """Which of `SUFFIXES` a file name ends in, upper case tolerated; None if in none."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def read_file(path: Path, corpus: CorpusConfig, bad: BadRecords) -> Iterator[str]:
    """The documents of one file; one without text is an empty string, so that it can be counted.

    A UserError names the place of damage; `bad` decides about a record that cannot be used.
    """
    suffix = suffix_of(path)
    with read_errors_explained(path):
        try:
            if suffix == ".parquet":
                yield from _parquet(path, corpus, bad)
                return
            with _OPENERS.get(path.suffix.lower(), open)(path, "rb") as file:
                lines = _lines(file, corpus.max_document_bytes)
                is_json = suffix is not None and suffix.startswith(_LINES_OF_JSON)
                yield from (_json_lines if is_json else _plain_text)(path, lines, corpus, bad)
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the system's, not a decompressor's
            raise UserError(
                f"{path} cannot be decompressed ({error}): truncated or damaged; fetch or make it "
                "again."
            ) from error
        except MemoryError as error:
            raise UserError(
                f"There is not enough memory to read {path}: set a smaller "
                f"corpus.max_document_bytes (now {corpus.max_document_bytes:,}), or divide it."
            ) from error


def _lines(file: Any, most_bytes: int) -> Iterator[tuple[int, bytes]]:
    r"""The byte at which each line starts, and the line without its "\n", "\r\n" or lone "\r".

    Of a longer line than `most_bytes` only so many bytes and one are given, before its end is read.
    """
    start = end = 0
    held, after_return = bytearray(), False
    while block := file.read1(_BLOCK_BYTES):
        if end == 0 and block.startswith(_BYTE_ORDER_MARK):
            start = end = len(_BYTE_ORDER_MARK)
            block = block[end:]
        for piece in block.splitlines(keepends=True):
            end += len(piece)
            # A block may end between the two bytes of a line end.
            if after_return and piece == b"\n":
                start, after_return = end, False
                continue
            after_return = piece.endswith(b"\r")
            line = piece.rstrip(b"\r\n")
            is_whole, is_given = len(line) < len(piece), len(held) > most_bytes
            if is_whole and not held and len(line) <= most_bytes:  # as most are
                yield start, line
                start = end
                continue
            held += line[: most_bytes + 1 - len(held)]
            if not is_given and (is_whole or len(held) > most_bytes):
                yield start, bytes(held)
            if is_whole:
                held.clear()
                start = end
    if 0 < len(held) <= most_bytes:
        yield start, bytes(held)


def _plain_text(
    path: Path, lines: Iterator[tuple[int, bytes]], corpus: CorpusConfig, bad: BadRecords
) -> Iterator[str]:
    whole_file, most_bytes = corpus.documents == "file", corpus.max_document_bytes
    document: list[tuple[int, bytes]] = []
    size = 0  # of the document in bytes, with line ends; more than `most_bytes` + 1: left out
    for start, line in lines:
        if _is_blank(line) and not (whole_file and size):
            if document and (text := _decoded(path, document, bad)) is not None:
                yield text
            document, size = [], 0
            continue
        had_room = size <= most_bytes + 1
        size += len(line) + 1
        if size <= most_bytes + 1:
            document.append((start, line))
        elif had_room:
            first = document[0][0] if document else start
            bad.leave_out(too_long(f"{path}, byte {first}", most_bytes))
            document = []
    if document or (whole_file and not size):
        text = _decoded(path, document, bad)
        if text is not None:
            yield text


def _is_blank(line: bytes) -> bool:
    # Bytes that are no UTF-8 are no blank.
    return not b"!" <= line[:1] <= b"~" and not line.decode("utf-8", errors="replace").strip()


def _decoded(path: Path, lines: list[tuple[int, bytes]], bad: BadRecords) -> str | None:
    """The text of these lines; None if it is left out."""
    with contextlib.suppress(UnicodeDecodeError):
        return b"\n".join([line for _, line in lines]).decode("utf-8").rstrip()
    text, errors = [], "strict"
    for start, line in lines:
        try:
            text.append(line.decode("utf-8", errors))
        except UnicodeDecodeError as error:
            unpacked = " of the unpacked text" if path.suffix.lower() in _OPENERS else ""
            problem = (
                f"{path} is not valid UTF-8 at byte {start + error.start}{unpacked} "
                f"({error.reason}); convert the file to UTF-8, for example with iconv."
            )
            if not bad.replaces(problem):
                return None
            errors = "replace"
            text.append(line.decode("utf-8", errors))
    return "\n".join(text).rstrip()


def _json_lines(
    path: Path, lines: Iterator[tuple[int, bytes]], corpus: CorpusConfig, bad: BadRecords
) -> Iterator[str]:
    for number, (start, raw) in enumerate(lines, start=1):
        place, most_bytes = f"{path}, line {number}", corpus.max_document_bytes
        if len(raw) > most_bytes:
            bad.leave_out(too_long(place, most_bytes))
            continue
        line = _decoded(path, [(start, raw)], bad)
        if not line:
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            rule = "every line must be one JSON object"
            bad.leave_out(f"{place} is not valid JSON: {error}; {rule}.")
            continue
        if not isinstance(record, dict):
            bad.leave_out(f"{place} must be one JSON object, not a {type(record).__name__}.")
            continue
        text = text_of(record, corpus.text_column, place, bad, most_bytes)
        if text is not None:
            yield text


def _parquet(path: Path, corpus: CorpusConfig, bad: BadRecords) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Python opens it: Arrow cannot where the name is no UTF-8.
        with contextlib.ExitStack() as stack:
            opened = stack.enter_context(open_file(path))
            file = stack.enter_context(pq.ParquetFile(opened, pre_buffer=False))
            columns = file.schema_arrow.names
            column = outer_column(corpus.text_column, columns)
            require_column(column, columns, str(path))
            rows = _rows_at_once(file.metadata)
            batches = file.iter_batches(batch_size=rows, columns=[column])
            values = itertools.chain.from_iterable(batch.column(0) for batch in batches)
            for row, value in enumerate(values):
                place = f"{path}, row {row}"
                try:
                    record = {column: value.as_py()}
                except UnicodeDecodeError as error:
                    bad.leave_out(
                        f"{place} is not valid UTF-8 at byte {error.start} of its text "
                        f"({error.reason})."
                    )
                    continue
                most_bytes = corpus.max_document_bytes
                text = text_of(record, corpus.text_column, place, bad, most_bytes)
                if text is not None:
                    yield text
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
            raise
        raise UserError(
            f"{path} is not a readable parquet file ({error}); fetch or make it again."
        ) from error


def _rows_at_once(metadata: Any) -> int:
    # Fewer where rows are long, as far as the file says: a row is decoded whole.
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    longest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
    return max(1, min(_PARQUET_BATCH_ROWS, _PARQUET_BATCH_BYTES // max(1, longest)))
