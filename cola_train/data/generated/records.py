"""JSON records that count what they hold: {"name":"mira","letters":4,"tags":["red"],"count":1}."""

import json
import random
import string

from cola_train.data.generated.language import Language
from cola_train.json_text import parse_json

_TAGS = ("red", "blue", "green", "black", "white")
_MOST_LETTERS, _MOST_TAGS = 6, 3


def _write(draws: random.Random, most_bytes: int) -> str:
    """A name of 1 to 6 letters and up to 3 tags, each number as likely; of tags as many as fit."""
    letters = draws.randint(1, _MOST_LETTERS)
    name = "".join(draws.choice(string.ascii_lowercase) for _ in range(letters))
    tags = [draws.choice(_TAGS) for _ in range(draws.randint(0, _MOST_TAGS))]
    while len(text := _record(name, tags)) > most_bytes:
        tags.pop()
    return text


def _record(name: str, tags: list[str]) -> str:
    record = {"name": name, "letters": len(name), "tags": tags, "count": len(tags)}
    return json.dumps(record, separators=(",", ":"))


def _fault(text: str) -> str | None:
    try:
        record = parse_json(text)
    except ValueError:
        return "is not JSON"
    if not (isinstance(record, dict) and [*record] == ["name", "letters", "tags", "count"]):
        return "has other keys, or in another order"
    name, letters, tags, count = record.values()
    if not (isinstance(name, str) and 1 <= len(name) <= _MOST_LETTERS):
        return "has another name than 1 to 6 letters"
    if not set(name) <= set(string.ascii_lowercase):
        return "has another name than 1 to 6 letters"
    if not (isinstance(tags, list) and len(tags) <= _MOST_TAGS and all(t in _TAGS for t in tags)):
        return "has other tags"
    # `True` is 1 in Python, not in JSON.
    if type(letters) is not int or letters != len(name):
        return "counts its letters wrong"
    if type(count) is not int or count != len(tags):
        return "counts its tags wrong"
    return None if text == _record(name, tags) else "has blanks or escapes"


RECORDS = Language(_write, _fault)
