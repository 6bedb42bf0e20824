"""A verb that takes settings: its parser and its config; help.py writes its help."""

import argparse
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cola_train.cli.help import WIDTH, HelpAction, HelpFormatter
from cola_train.config.load import load_config

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
    """Add a verb whose settings are those of `config_class`, shown by its help; `run` gets the
    parsed arguments.
    """
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=summary,
        description=f"{textwrap.fill(f'{summary[0].upper()}{summary[1:]}. For example:', WIDTH)}\n "
        f" {example}",
        formatter_class=HelpFormatter,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action=HelpAction)
    for positional, meaning in (positionals or {}).items():
        parser.add_argument(positional, type=Path, metavar=positional.upper(), help=meaning)
    parser.add_argument(
        "settings", nargs="*", metavar=CONFIG_METAVAR, help="a config file, then overrides"
    )
    parser.set_defaults(run=run, config_class=config_class)
    return parser


def load_settings(options: argparse.Namespace) -> Any:
    """The config that a verb's arguments describe."""
    given: list[str] = options.settings
    path = Path(given[0]) if given and "=" not in given[0] else None
    return load_config(options.config_class, path, given[1:] if path else given)
