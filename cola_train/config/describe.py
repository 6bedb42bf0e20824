"""The settings of a config with meanings and defaults, for `--help` and docs/config.md."""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args, get_origin

from cola_train.config.settings import allowed_words
from cola_train.config.typed import section_class, table_class


class Described(NamedTuple):
    """One setting."""

    key: str  # dotted; NAME stands for names that the user chooses
    meaning: str
    default: str  # as it is written in YAML, nearly; "required" where there is none
    allowed: str  # what its rule says, or the words to choose from; "" where the type says all
    common: bool  # one of those that people change


@dataclasses.dataclass(frozen=True)
class DescribedSection:
    """One section, or one table of sections by name."""

    key: str
    meaning: str
    count: int  # of settings, those of sections inside included


def describe(
    config_class: type, defaults: object = None, prefix: str = "", *, common: bool = True
) -> list[Described]:
    """Every setting, in declaration order, with the values of `defaults`, an instance, if given."""
    found = []
    for field in dataclasses.fields(config_class):
        key = prefix + field.name
        # Nobody sets it: a verb's config has the only value it can have.
        if key == "stage":
            continue
        default = field.default if defaults is None else getattr(defaults, field.name)
        if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        inside = _inside(field)
        marked = common and field.metadata.get("common", inside is not None)
        if (section := section_class(field.type)) is not None:
            found += describe(section, default, f"{key}.", common=marked)
            continue
        found.append(
            Described(key, field.metadata["help"], _shown(default), _allowed(field), marked)
        )
        if inside is not None:
            found += describe(inside, prefix=f"{key}.NAME.", common=marked)
    return found


def sections(config_class: type) -> list[DescribedSection]:
    """The sections at the top of a config class, in declaration order."""
    keys = [entry.key for entry in describe(config_class)]
    found = []
    for field in dataclasses.fields(config_class):
        if _inside(field) is not None:
            count = sum(key.startswith(f"{field.name}.") for key in keys)
            found.append(DescribedSection(field.name, field.metadata["help"], count))
    return found


def _allowed(field: dataclasses.Field[Any]) -> str:
    is_choice = get_origin(field.type) is Literal
    return ", ".join(get_args(field.type)) if is_choice else allowed_words(field)


def _inside(field: dataclasses.Field[Any]) -> type | None:
    """The config class of a section, or of a dictionary's values; None for a plain setting."""
    return section_class(field.type) or table_class(field.type)


def _shown(value: Any) -> str:
    if value in (dataclasses.MISSING, "???"):
        return "required"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)
