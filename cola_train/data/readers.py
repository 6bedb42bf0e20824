"""One file to its documents in order; memory holds one document (parquet: one batch of rows)."""

import gzip
import itertools
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from cola_train.config.settings import UserError, nearest, require
from cola_train.files import read_errors_explained
from cola_train.json_text import parse_json

SUFFIXES = (".txt", ".txt.gz", ".txt.xz", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet")
_OPENERS: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PARQUET_BATCH_ROWS = 256


def suffix_of(path: Path) -> str | None:
    """Which of `SUFFIXES` a file name ends in, upper case tolerated; None if in none."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def read_file(
    path: Path, text_column: str, documents: Literal["paragraph", "file"]
) -> Iterator[str]:
    """The documents of one file; one without text is an empty string, so that it can be counted.

    A UserError names the place of damage, invalid UTF-8, bad JSON or a missing column.
    """
    suffix = suffix_of(path)
    with read_errors_explained(path):
        try:
            if suffix == ".parquet":
                yield from _parquet(path, text_column)
            elif suffix is not None and suffix.startswith(".jsonl"):
                yield from _jsonl(path, text_column)
            else:
                yield from _paragraphs(path) if documents == "paragraph" else _whole_file(path)
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise UserError(
                f"{path} cannot be decompressed ({error}): truncated or damaged; fetch or make it "
                "again."
            ) from error


def text_of(record: Mapping[str, Any], column: str, place: str) -> str:
    """The text of a record: its `column`; null and blank count as empty.

    Raises:
        UserError: no such column, not a string, or text that UTF-8 cannot write (a lone surrogate).
    """
    require_column(column, record, place)
    value = record[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"{place}: corpus.text_column '{column}' must hold strings, not {type(value).__name__}."
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: the text has a lone surrogate at character {error.start}, which is no "
            "Unicode text; repair or remove this record."
        ) from None
    return value if value.strip() else ""


def require_column(column: str, columns: Mapping[str, Any] | list[str], place: str) -> None:
    """Refuse a text column that does not exist."""
    if column not in columns:
        hint = nearest(column, columns) if columns else "it has no columns at all"
        raise UserError(f"{place}: there is no column '{column}' (corpus.text_column); {hint}")


def _lines(path: Path) -> Iterator[str]:
    r"""Decoded lines, "\n" kept, "\r\n" as "\n". Cutting at "\n" never cuts a UTF-8 character."""
    offset, suffix = 0, path.suffix.lower()
    with _OPENERS.get(suffix, open)(path, "rb") as file:
        for raw in file:
            start, offset = offset, offset + len(raw)
            if start == 0 and raw.startswith(_BYTE_ORDER_MARK):
                raw = raw.removeprefix(_BYTE_ORDER_MARK)
                start = len(_BYTE_ORDER_MARK)
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                unpacked = " of the unpacked text" if suffix in _OPENERS else ""
                raise UserError(
                    f"{path} is not valid UTF-8 at byte {start + error.start}{unpacked} "
                    f"({error.reason}); convert the file to UTF-8, for example with iconv."
                ) from None
            yield line[:-2] + "\n" if line.endswith("\r\n") else line


def _paragraphs(path: Path) -> Iterator[str]:
    for has_text, lines in itertools.groupby(_lines(path), key=lambda line: bool(line.strip())):
        if has_text:
            yield "".join(lines).rstrip()


def _whole_file(path: Path) -> Iterator[str]:
    yield "".join(itertools.dropwhile(lambda line: not line.strip(), _lines(path))).rstrip()


def _jsonl(path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = parse_json(line)
        except ValueError as error:
            rule = "every line must be one JSON object"
            raise UserError(f"{place} is not valid JSON: {error}; {rule}.") from None
        found = type(record).__name__
        require(isinstance(record, dict), f"{place} must be one JSON object, not a {found}.")
        yield text_of(record, column, place)


def _parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            require_column(column, file.schema_arrow.names, str(path))
            batches = file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=[column])
            values = itertools.chain.from_iterable(batch.column(0) for batch in batches)
            for row, value in enumerate(values):
                place = f"{path}, row {row}"
                try:
                    text = value.as_py()
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{place} is not valid UTF-8 at byte {error.start} of its text "
                        f"({error.reason})."
                    ) from None
                yield text_of({column: text}, column, place)
    except pa.ArrowInvalid as error:
        raise UserError(
            f"{path} is not a readable parquet file ({error}); fetch or make it again."
        ) from error
