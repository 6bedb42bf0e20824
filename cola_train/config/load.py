"""Read a config: defaults < YAML (with `base:`) < key=value; unknown keys, wrong types refused."""

import dataclasses
import operator
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import OmegaConf

from cola_train.config.hints import key_hint
from cola_train.config.reading import Plain, parse, read_text
from cola_train.config.settings import UserError, check_value
from cola_train.config.typed import (
    NULLS,
    Argument,
    UnknownKeyError,
    section_class,
    table_class,
    typed_section,
)

T = TypeVar("T")
# The default of a setting that must be given, in a section that has to be made without it.
_REQUIRED = "???"


def load_config(
    config_class: type[T], path: Path | None = None, overrides: Sequence[str] = ()
) -> T:
    """`config_class` from its defaults, then the YAML file at `path`, then `key.sub=value`.

    Raises:
        UserError: a missing or malformed file, an unknown key, a value of the wrong type, a missing
            required value, or whatever the config's own validation refuses.
    """
    values = {} if path is None else read_values(path)
    return build_config(config_class, values, str(path), overrides)


def build_config(
    config_class: type[T], values: Mapping[str, Any], origin: str, overrides: Sequence[str] = ()
) -> T:
    """As `load_config`, from values that were read already; messages about them name `origin`."""
    layers = [(origin, values)]
    layers += [(f"the override '{text}'", _parse_override(text)) for text in overrides]
    try:
        given = _merge(*(typed_section(layer, config_class, origin) for origin, layer in layers))
    except UnknownKeyError as error:
        hint = key_hint(error.key, config_class, error.here, is_section=error.is_section)
        raise UserError(f"{error}; {hint}") from None
    if missing := sorted(_missing(config_class, given)):
        raise UserError(
            f"The config lacks a value for: {', '.join(missing)}. Give each as key=value or in the "
            "YAML file."
        )
    return cast(T, _construct(config_class, given))


def read_values(path: Path, heirs: tuple[str, ...] = ()) -> dict[str, Any]:
    """The keys of a YAML file with their texts, over those of the files that it names as `base`.

    `heirs` are the files that this one is a base of.

    Raises:
        UserError: a missing or malformed file, or bases in a circle.
    """
    text = read_text(path)
    chain = (*heirs, os.path.realpath(path))
    if chain[-1] in heirs:
        raise UserError(f"Config inheritance goes in a circle: {' -> '.join(chain)}.")
    values = parse(text, str(path))
    if isinstance(values, Plain) and values in NULLS:
        return {}
    if not isinstance(values, dict):
        found = "a list" if isinstance(values, list) else "one value"
        raise UserError(f"{path} must hold keys and values at the top level, not {found}.")
    base = values.pop("base", Plain())
    if isinstance(base, Plain) and base in NULLS:
        return values
    if not isinstance(base, str):
        raise UserError(f"{path}: `base` must be the name of another YAML file, and is several.")
    return _merge(read_values(path.parent / base, chain), values)


def to_yaml(config: Any) -> str:
    """The config as YAML, as saved in a run's folder; `load_config` reads it back."""
    values = dataclasses.asdict(config)

    def write(*, allow_unicode: bool) -> str:
        options: Any = {"sort_keys": False, "width": sys.maxsize, "allow_unicode": allow_unicode}
        return str(yaml.safe_dump(values, **options))

    text = write(allow_unicode=True)
    # PyYAML loses this end of a line where it does not write it as an escape.
    return write(allow_unicode=False) if "\x85" in text else text


def leaves(config_class: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every setting as (dotted key, field), sections flattened, in declaration order."""
    for field in dataclasses.fields(config_class):
        if (section := section_class(field.type)) is not None:
            yield from leaves(section, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field


def value_at(config: object, key: str) -> Any:
    """The value of a dotted key."""
    return operator.attrgetter(key)(config)


def changed_values(config: Any) -> dict[str, Any]:
    """The settings that are not the defaults, by dotted key; the class must have all defaults."""
    default = type(config)()
    return {
        key: value_at(config, key)
        for key, _ in leaves(type(config))
        if value_at(config, key) != value_at(default, key)
    }


class _Value:
    """What OmegaConf keeps as it is: in a text it would replace `${NAME}`, and miss a "???"."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """The keys and sections of all layers; the values of the last that has one."""
    flags = {"allow_objects": True}
    configs = [OmegaConf.create(_map_values(layer, _Value), flags=flags) for layer in layers]
    merged = OmegaConf.to_container(OmegaConf.unsafe_merge(*configs))
    return cast(dict[str, Any], _map_values(merged, operator.attrgetter("value")))


def _map_values(values: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(values, Mapping):
        return {key: _map_values(value, change) for key, value in values.items()}
    return change(values)


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(
            f"'{text}' is not an override; write key=value, for example trainer.max_steps=100."
        )
    values: Any = Argument(value)
    for name in reversed(key.split(".")):
        values = {name: values}
    return values


def _missing(config_class: type, given: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(config_class):
        key, value = prefix + field.name, given.get(field.name)
        if (section := section_class(field.type)) is not None:
            yield from _missing(section, value or {}, f"{key}.")
        elif (table := table_class(field.type)) is not None:
            for name, inside in (value or {}).items():
                yield from _missing(table, inside, f"{key}.{name}.")
        elif value == _REQUIRED or (field.name not in given and _is_required(field)):
            yield key


def _is_required(field: dataclasses.Field[Any]) -> bool:
    if field.default is dataclasses.MISSING:
        return field.default_factory is dataclasses.MISSING
    return bool(field.default == _REQUIRED)


def _construct(
    config_class: Any, given: Mapping[str, Any], default: Any = None, prefix: str = ""
) -> Any:
    """An instance with the values of `given`, over those of `default`, or else of the class."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        name, key = field.name, prefix + field.name
        if (section := section_class(field.type)) is not None:
            factory: Any = field.default_factory
            inner = factory() if default is None else getattr(default, name)
            values[name] = _construct(section, given.get(name, {}), inner, f"{key}.")
        elif name in given:
            values[name] = given[name]
            if (table := table_class(field.type)) is not None:
                values[name] = {
                    of: _construct(table, inside, prefix=f"{key}.{of}.")
                    for of, inside in given[name].items()
                }
            check_value(field, values[name], key)
    try:
        if default is not None:
            return dataclasses.replace(default, **values)
        return config_class(**values)
    except ValueError as error:  # UserError too
        raise UserError(str(error)) from error
