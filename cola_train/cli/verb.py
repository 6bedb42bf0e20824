"""A verb that takes settings: its parser, its help and its config."""

import argparse
import dataclasses
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cola_train.config.load import leaves, load_config, value_at

CONFIG_METAVAR = "CONFIG.yaml | key=value"


def add_verb(
    verbs: Any,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    summary: str,
    config_class: type,
    example: str,
    positionals: Mapping[str, str] | None = None,
) -> argparse.ArgumentParser:
    """Add a verb whose settings are those of `config_class`, listed in its help; `run` gets the parsed arguments."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n  {example}\n\nsettings (key=value, after any YAML file):\n{_settings_table(config_class)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for positional, meaning in (positionals or {}).items():
        parser.add_argument(positional, type=Path, metavar=positional.upper(), help=meaning)
    parser.add_argument("settings", nargs="*", metavar=CONFIG_METAVAR, help="a config file, then overrides")
    parser.set_defaults(run=run, config_class=config_class)
    return parser


def _settings_table(config_class: type) -> str:
    lines = []
    for key, field in leaves(config_class):
        if key == "stage":
            continue
        default = _default(config_class, key)
        text = f"{field.metadata['help']} [{default}]"
        lines.append(f"  {key}\n" + textwrap.fill(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)


def _default(config_class: type, key: str) -> str:
    """As the help shows it; a section may have defaults of its own, other than its class'."""
    name, _, inside = key.partition(".")
    (field,) = (field for field in dataclasses.fields(config_class) if field.name == name)
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if inside:
        value = value_at(value, inside)
    if value in (dataclasses.MISSING, "???"):
        return "required"
    return "null" if value is None else f"{value!r}"


def load_settings(options: argparse.Namespace) -> Any:
    """The config that a verb's arguments describe."""
    given: list[str] = options.settings
    path = Path(given[0]) if given and "=" not in given[0] else None
    return load_config(options.config_class, path, given[1:] if path else given)
