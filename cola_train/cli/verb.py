"""A verb that takes settings: its parser and its config; help.py writes its help."""

import argparse
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cola_train.cli.help import WIDTH, HelpAction, HelpFormatter
from cola_train.config.load import load_config
from cola_train.config.run import RunConfig
from cola_train.families.registry import load_run_config

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
    """Add a verb that takes the settings of `config_class`; `run` gets the parsed arguments.

    `example` is what follows the verb's name in an example; `positionals` are paths, with meanings.
    """
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=summary, formatter_class=HelpFormatter, add_help=False
    )
    sentence = textwrap.fill(f"{summary[0].upper()}{summary[1:]}. For example:", WIDTH)
    parser.description = f"{sentence}\n  {parser.prog} {example}"
    parser.add_argument("-h", "--help", action=HelpAction)
    for positional, meaning in (positionals or {}).items():
        parser.add_argument(positional, type=Path, metavar=positional.upper(), help=meaning)
    parser.add_argument("settings", nargs="*", metavar=CONFIG_METAVAR)
    parser.set_defaults(run=run, config_class=config_class)
    return parser


def add_settings(parser: argparse.ArgumentParser, help: str) -> None:
    """Add a run's config file and overrides as an argument, for `load_run`."""
    parser.add_argument("settings", nargs="+", metavar=CONFIG_METAVAR, help=help)


def add_path(
    parser: argparse.ArgumentParser, name: str, metavar: str, help: str, **rest: Any
) -> None:
    """Add an argument or option that is a file or folder."""
    parser.add_argument(name, type=Path, metavar=metavar, help=help, **rest)


def add_count(
    parser: argparse.ArgumentParser, name: str, default: int, help: str, metavar: str = "N"
) -> None:
    """Add an option that is a whole number."""
    parser.add_argument(name, type=int, default=default, metavar=metavar, help=help)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option --device; devices.named_device says what its values mean."""
    parser.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one",
    )


def load_settings(options: argparse.Namespace) -> Any:
    """The config that a verb's arguments describe."""
    given: list[str] = options.settings
    path = Path(given[0]) if given and "=" not in given[0] else None
    return load_config(options.config_class, path, given[1:] if path else given)


def load_run(options: argparse.Namespace) -> RunConfig:
    """The run config, of any family, of a verb whose arguments are its file and overrides."""
    return load_run_config(Path(options.settings[0]), options.settings[1:])
