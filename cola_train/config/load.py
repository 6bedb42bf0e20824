"""Read a config: defaults < YAML (with `base:`) < key=value; unknown keys, wrong types refused."""

import dataclasses
import io
import operator
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from cola_train.config.settings import UserError, nearest

T = TypeVar("T")


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
    config = OmegaConf.structured(config_class)
    OmegaConf.set_readonly(config, False)
    for origin, values in layers:
        _refuse_unknown_keys(values, config_class, origin, prefix="")
        config = _merge(config, values, origin)
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise UserError(
            f"The config lacks a value for: {', '.join(missing)}. Give each as key=value or in the "
            "YAML file."
        )
    try:
        return cast(T, OmegaConf.to_object(config))
    # omegaconf re-raises what a __post_init__ raised, with lines of its own added
    except Exception as error:
        raise UserError(_first_line(error)) from error


def read_values(path: Path, heirs: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys and values of a YAML file, over those of the files that it names as `base`.

    `heirs` are the files that this one is a base of.

    Raises:
        UserError: a missing or malformed file, or bases in a circle.
    """
    chain = (*heirs, path.resolve())
    if chain[-1] in heirs:
        raise UserError(f"Config inheritance goes in a circle: {' -> '.join(map(str, chain))}.")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = f"the folder {path.parent} has no .yaml file"
        # A folder that does not exist has no files either.
        found = [*path.parent.glob("*.yaml"), *path.parent.glob(f"*/{path.name}")]
        if found:
            hint = nearest(path.name, [p.relative_to(path.parent).as_posix() for p in found])
        raise UserError(f"There is no config file {path}; {hint}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; give a .yaml config file.") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}); give a .yaml config file."
        ) from None
    values = _parse(text, path)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(f"{path}: `base` must be the name of another YAML file, not {base!r}.")
    return _deep_update(read_values(path.parent / base, chain), values)


def to_yaml(config: Any) -> str:
    """The resolved config as YAML, as saved in a run's folder; `load_config` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def section_class(annotation: object) -> type | None:
    """The config class that a field of this type is a section of; None for a setting."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return annotation
    return None


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


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        # OmegaConf takes a lone word for a key: what stands at the top is seen before its loader.
        if not isinstance(yaml.compose(text, Loader=yaml.SafeLoader), yaml.MappingNode):
            value = yaml.safe_load(text)
            if value is None:
                return {}
            raise UserError(
                f"{path} must hold keys and values at the top level, not a {type(value).__name__}."
            )
        # OmegaConf's loader reads 1e-4 as a number, which plain YAML 1.1 does not.
        return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(io.StringIO(text))))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None


def _deep_update(under: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _deep_update(merged[key], value) if both else value
    return merged


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, _ = text.partition("=")
    if not equals or not key:
        raise UserError(
            f"'{text}' is not an override; write key=value, for example trainer.max_steps=100."
        )
    try:
        return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist([text])))
    except Exception as error:  # omegaconf lets several parsers' errors through here
        raise UserError(f"The override '{text}' cannot be read: {_first_line(error)}") from error


def _refuse_unknown_keys(
    values: Mapping[str, Any], config_class: type, origin: str, prefix: str
) -> None:
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for key, value in values.items():
        full = f"{prefix}{key}"
        if key not in fields:
            hint = nearest(full, [prefix + name for name in fields])
            raise UserError(f"Unknown config key '{full}' in {origin}; {hint}")
        if (section := section_class(fields[key].type)) is not None:
            if not isinstance(value, Mapping):
                what = f"a section of keys, not the value {value!r}"
                raise UserError(f"Config key '{full}' in {origin} is {what}.")
            _refuse_unknown_keys(value, section, origin, f"{full}.")


def _merge(config: Any, values: Mapping[str, Any], origin: str) -> DictConfig:
    try:
        # In place: OmegaConf.merge would copy all settings for each override.
        return cast(DictConfig, OmegaConf.unsafe_merge(config, values))
    except ConfigKeyError as error:
        raise UserError(f"{origin}: {_first_line(error)}") from error
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise UserError(
            f"Config key '{key}' in {origin} has a value it cannot take: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
