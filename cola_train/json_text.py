"""JSON as it is read everywhere, and text as it is written."""

import json
from typing import Any

_MOST_NESTED = 200  # so that whatever walks or writes a value again by recursion can
_MOST_VALUES = 2**23  # each takes up to 150 bytes of memory, however short it is in the text


def parse_json(text: str) -> Any:
    """The value of a JSON text. All JSON that the program reads is read by this.

    Raises:
        ValueError: it is not JSON, is nested more than 200 deep or has more than 8 million values.
    """
    opened = text.count("[") + text.count("{")
    if opened + text.count(",") > _MOST_VALUES:
        raise ValueError(f"it has more than {_MOST_VALUES:,} values, which no such file needs")
    try:
        value = json.loads(text)
        is_deep = opened > _MOST_NESTED and _is_deep(value)
    except RecursionError:
        is_deep = True
    if is_deep:
        raise ValueError(f"lists or objects are nested more than {_MOST_NESTED} deep")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MOST_NESTED):
        inside: list[Any] = []
        for one in level:
            if isinstance(one, dict | list):
                inside += one.values() if isinstance(one, dict) else one
        level = inside
    return any(isinstance(one, dict | list) for one in level)


def utf8(text: str) -> bytes:
    """A text's bytes, whatever it holds.

    Python's strings for names of files that are no UTF-8 have lone surrogates. They become escapes,
    which JSON reads again as they were.
    """
    return text.encode("utf-8", "backslashreplace")
