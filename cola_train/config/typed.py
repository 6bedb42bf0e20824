"""What a text of a config means, by the type of its setting."""

import dataclasses
import math
import re
import reprlib
import types
import typing
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NoReturn

import yaml

from cola_train.config.reading import Plain, parse
from cola_train.config.settings import UserError

_NUMBER = re.compile(
    r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(e[-+]?\d{1,6})?", re.ASCII | re.IGNORECASE
)
NULLS = ("", "~", "null", "Null", "NULL")
_BOOLS = {
    word: value
    for words, value in (("true yes on y 1", True), ("false no off n 0", False))
    for word in words.split()
}
_FIRST_TOO_LARGE = 2**63
_QUOTES = "Put quotes around a name or text with [ ] { } : # or a comma in it"
_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother = 2, 80, 80


class Argument(str):
    """What follows `key=` on the command line: the text itself, or YAML, by the setting's type."""


class UnknownKeyError(UserError):
    """A key of a config that its class lacks: `key`, where it stands, and the keys beside it."""

    def __init__(self, key: str, origin: str, here: list[str], value: object) -> None:
        super().__init__(f"Unknown config key '{key}' in {origin}")
        # What stands alone below it belongs to it: `a.b=1`.
        whole = key
        while isinstance(value, dict) and len(value) == 1:
            ((name, value),) = value.items()
            whole += f".{name}"
        self.key, self.here, self.is_section = whole, here, isinstance(value, dict)


def section_class(annotation: object) -> type | None:
    """The config class that a field of this type is a section of; None for a setting."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return annotation
    return None


def table_class(annotation: object) -> type | None:
    """The config class of the sections in a table by name; None if a field of this type is none."""
    if typing.get_origin(annotation) is dict:
        return section_class(typing.get_args(annotation)[1])
    return None


def typed_section(
    values: Mapping[str, Any], config_class: type, origin: str, prefix: str = ""
) -> dict[str, Any]:
    """The texts in `values` as what the settings of the class are; sections as dictionaries.

    Raises:
        UnknownKeyError: an unknown key.
        UserError: a value of the wrong type; it names key and `origin`.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    found = {}
    for name, value in values.items():
        if name not in fields:
            raise UnknownKeyError(
                f"{prefix}{name}", origin, [prefix + field for field in fields], value
            )
        found[name] = typed(value, fields[name].type, f"{prefix}{name}", origin)
    return found


def typed(value: Any, kind: Any, key: str, origin: str) -> Any:
    """A text, list or dictionary of texts as a value of the type `kind`.

    Raises:
        UserError: it is none; the message names `key` and `origin`.
    """

    def refuse(allowed: str, hint: str = "") -> NoReturn:
        raise UserError(
            f"Config key '{key}' in {origin} must be {allowed}, not {_short.repr(value)}{hint}."
        )

    may_be_null = typing.get_origin(kind) in (typing.Union, types.UnionType)
    if may_be_null:
        (kind,) = [option for option in typing.get_args(kind) if option is not type(None)]
    outer, inner = typing.get_origin(kind), typing.get_args(kind)
    start = ""  # of what is to be written instead
    if isinstance(value, Argument):
        start = f"{key}="
        value = _text(value, origin) if kind is str else _parsed(value, kind, key, origin)
    if (section := section_class(kind)) is not None:
        if not isinstance(value, dict):
            raise UserError(
                f"Config key '{key}' in {origin} is a section of keys, not the value "
                f"{_short.repr(value)}."
            )
        return typed_section(value, section, origin, f"{key}.")
    is_null = isinstance(value, Plain) and value in NULLS
    if may_be_null and is_null:
        return None
    if outer is dict:
        if not isinstance(value, dict):
            refuse("names with values, such as {a: 1}")
        return {
            name: typed(item, inner[1], f"{key}.{name}", origin) for name, item in value.items()
        }
    if outer in (list, tuple):
        is_fixed = outer is tuple and inner[-1] is not Ellipsis
        if not isinstance(value, list):
            single = isinstance(value, str) and not is_null and not is_fixed
            refuse(
                "a list, such as [a, b]",
                f"; write a list: {as_list(start, value, kind)}" if single else "",
            )
        if is_fixed and len(value) != len(inner):
            refuse(f"a list of {len(inner)}")
        kinds = inner if is_fixed else [inner[0]] * len(value)
        return outer(
            typed(item, of, f"{key}[{place}]", origin)
            for place, (item, of) in enumerate(zip(value, kinds, strict=True))
        )
    if not isinstance(value, str):
        refuse("a single value", f". {_QUOTES}" if kind is str else "")
    if outer is typing.Literal:
        return str(value) if value in inner else refuse(f"one of {', '.join(inner)}")
    if kind is str:
        return refuse("a text, in quotes if it looks like nothing") if is_null else str(value)
    if kind is bool:
        word = value.lower()
        return _BOOLS[word] if word in _BOOLS else refuse("true or false")
    number = _number(value)
    if kind is int:
        return int(number) if _is_whole(number) else refuse("a whole number")
    if kind is float:
        return float(number) if math.isfinite(float(number)) else refuse("a finite number")
    raise TypeError(f"{key} is declared as {kind}, which no config can hold.")


def as_list(start: str, text: str, kind: Any) -> str:
    """How what was given as one text is written as a list, for `kind`, a type of lists.

    `start` is "key=" on the command line, where quotes keep the shell from the brackets.
    """
    parts: list[str] = [part.strip() for part in text.split(",")]
    if typing.get_args(kind)[0] is str:
        dumped = yaml.safe_dump(parts, default_flow_style=True, allow_unicode=True, width=2**31)
        written = start + dumped.rstrip("\n")
    else:
        written = f"{start}[{', '.join(parts)}]"
    quote = '"' if "'" in written else "'"
    return f"{quote}{written}{quote}" if start else written


def _parsed(value: Argument, kind: Any, key: str, origin: str) -> Any:
    try:
        return parse(value, origin)
    except UserError as error:
        inside = value.strip().removeprefix("[").removesuffix("]")
        if typing.get_args(kind)[:1] != (str,) or any(quote in inside for quote in "'\""):
            raise
        raise UserError(f"{error} {_QUOTES}: {as_list(f'{key}=', inside, kind)}.") from None


def _text(value: Argument, origin: str) -> str:
    """What was typed, but for quotes around all of it."""
    if value[:1] in ("'", '"'):
        try:
            inside = parse(value, origin)
        except UserError:
            return Plain(value)
        if isinstance(inside, str):
            return inside
    return Plain(value)


def _number(text: str) -> Decimal:
    return Decimal(text.replace("_", "") if _NUMBER.fullmatch(text) else "nan")


def _is_whole(number: Decimal) -> bool:
    # By size first: 1e999999 is whole, and has a million digits.
    return (
        number.is_finite()
        and abs(number) < _FIRST_TOO_LARGE
        and number == number.to_integral_value()
    )
