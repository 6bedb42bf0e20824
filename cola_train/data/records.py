"""The text of one record, and what becomes of a record that has none that can be used."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from cola_train.config.settings import UserError, nearest, require
from cola_train.console import say

_MOST_PLACES, _MOST_CHARACTERS = 100, 500
_LONE_SURROGATES = re.compile("[\ud800-\udfff]")


class BadRecords:
    """Stops at the first record that cannot be used as it is, or counts such records.

    Attributes:
        num_skipped: those left out.
        num_replaced: those used with U+FFFD for what is no Unicode text in them.
        places: the first 100 of both: where each is, and what is wrong with it.
    """

    def __init__(self, policy: Literal["stop", "skip", "replace"]) -> None:
        self._policy = policy
        self.num_skipped = self.num_replaced = 0
        self.places: list[str] = []

    def leave_out(self, problem: str) -> None:
        """Count a record as left out; or raise a UserError of its `problem`, by policy."""
        require(
            self._policy != "stop",
            f"{problem.rstrip('.')}. (corpus.on_bad_record=skip leaves such records out.)",
        )
        self.num_skipped += 1
        self._note(problem)

    def replaces(self, problem: str) -> bool:
        """Whether a record of text that is no Unicode text is to be repaired; else it is left out.

        Raises:
            UserError: the policy is to stop.
        """
        if self._policy != "replace":
            self.leave_out(problem)
            return False
        self.num_replaced += 1
        self._note(problem)
        return True

    @property
    def summary(self) -> str:
        """How many there were and where the first is, after a blank; empty if there was none."""
        if not self.places:
            return ""
        return (
            f" Records left out: {self.num_skipped:,}; repaired: {self.num_replaced:,} "
            f"(corpus.on_bad_record={self._policy}). The first: {self.places[0].rstrip('.')}."
        )

    def tell(self) -> None:
        """Say the summary, if there is one."""
        if self.places:
            say(self.summary.strip())

    def _note(self, problem: str) -> None:
        if len(self.places) < _MOST_PLACES:
            self.places.append(problem[:_MOST_CHARACTERS])


def text_of(
    record: Mapping[str, Any], column: str, place: str, bad: BadRecords, most_bytes: int
) -> str | None:
    """The text of a record: null and blank count as empty; None for a record that is left out.

    A dot in `column` leads into an object, unless the record has a column of just that name.

    Raises:
        UserError: no such column, not a string, a lone surrogate, or more than `most_bytes` as
            UTF-8; if `bad` stops at such records.
    """
    try:
        value = _value(record, column, place)
    except UserError as error:
        bad.leave_out(str(error))
        return None
    if (problem := surrogate_in(value)) is not None:
        if not bad.replaces(f"{place}: the text {problem}; repair or remove this record"):
            return None
        value = _LONE_SURROGATES.sub("\ufffd", value)
    # A character has at most 4 bytes: few texts have to be encoded for this.
    if 4 * len(value) > most_bytes and len(value.encode("utf-8")) > most_bytes:
        bad.leave_out(too_long(place, most_bytes))
        return None
    return value if value.strip() else ""


def _value(record: Mapping[str, Any], column: str, place: str) -> str:
    value: Any = record
    if isinstance(plain := record.get(column), str):  # as most are
        return plain
    for name in [column] if column in record else column.split("."):
        if value is None:
            break
        found = type(value).__name__
        require(
            isinstance(value, Mapping),
            f"{place}: corpus.text_column '{column}' looks for '{name}' in an object, not in "
            f"{found}.",
        )
        require_column(name, value, place)
        value = value[name]
    require(
        value is None or isinstance(value, str),
        f"{place}: corpus.text_column '{column}' must hold strings, not {type(value).__name__}.",
    )
    return value or ""


def require_column(column: str, columns: Iterable[str], place: str) -> None:
    """Refuse a text column that does not exist."""
    columns = list(columns)
    if column not in columns:
        hint = nearest(column, columns) if columns else "it has no columns at all"
        raise UserError(f"{place}: there is no column '{column}' (corpus.text_column); {hint}")


def outer_column(column: str, columns: Iterable[str]) -> str:
    """The column of a table that holds `column`: itself, or what stands before its first dot."""
    return column if column in columns else column.split(".")[0]


def surrogate_in(text: str) -> str | None:
    """What is wrong with a text that UTF-8 cannot write, in words; None if it can."""
    if text.isascii() or (found := _LONE_SURROGATES.search(text)) is None:
        return None
    return f"has a lone surrogate at character {found.start()}, which is no Unicode text"


def too_long(place: str, most_bytes: int) -> str:
    """The problem of a document above corpus.max_document_bytes."""
    return (
        f"{place}: the document has more than {most_bytes:,} bytes (corpus.max_document_bytes); "
        "divide it into documents, or raise that setting, with which memory grows."
    )
