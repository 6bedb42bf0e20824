"""A verb that takes settings: its parser, its config, and its help.

The help is one screen; `--help WORD` lists a section, settings with the word, or all.
"""

import argparse
import difflib
import os
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cola_train.config.describe import Described, describe, sections
from cola_train.config.hints import USUAL_NAMES, meant
from cola_train.config.load import load_config
from cola_train.config.run import RunConfig
from cola_train.families.registry import load_run_config

CONFIG_METAVAR = "CONFIG.yaml | key=value"
WIDTH = 100
FEW = 15  # settings that are shown at once
ALL = "all"


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
    path = Path(given[0]) if given and is_path(given[0]) else None
    return load_config(options.config_class, path, given[1:] if path else given)


def is_path(text: str) -> bool:
    """Whether an argument is a path and no setting: `runs/lr=3e-4` is one where it exists."""
    # Path.exists raises for what is too long for a name.
    return "=" not in text or os.path.exists(text)  # noqa: PTH110


def dashes_hint(options: argparse.Namespace, rest: Sequence[str]) -> str:
    """The end of a message about unknown options, where one of them is a setting with dashes."""
    config_class = getattr(options, "config_class", None)
    known = [] if config_class is None else [entry.key for entry in describe(config_class)]
    for text in rest:
        name, _, value = text.removeprefix("--").partition("=")
        if not (text.startswith("--") and hasattr(options, "settings")):
            continue
        for key in [name] if name in known or "." in name else meant(name, known):
            return f"; settings are key=value, without --: {key}={value or 'VALUE'}"
    return ""


def load_run(options: argparse.Namespace) -> RunConfig:
    """The run config, of any family, of a verb whose arguments are its file and overrides."""
    return load_run_config(Path(options.settings[0]), options.settings[1:])


class HelpAction(argparse.Action):
    """`-h` and `--help` with an optional word; ends the program."""

    def __init__(self, option_strings: Sequence[str], dest: str, **_: Any) -> None:
        super().__init__(
            option_strings,
            dest,
            nargs="?",
            default=argparse.SUPPRESS,
            metavar="WORD",
            help=f"this page; or settings: a section's, those that have a word, or {ALL}",
        )

    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> NoReturn:
        """Print what was asked for; status 2 if nothing has that word."""
        word: str | None = given[1]
        # Only now: the class is looked at only when its help is.
        config_class: type = parser.get_default("config_class")
        if word is None:
            parser.epilog = settings_page(config_class)
            parser.print_help()
            parser.exit()
        if (found := look_up(config_class, word)) is None:
            parser.exit(
                2,
                f"cola-train: error: No setting of `{parser.prog}` has '{word}' "
                f"{_hint(config_class, word)}\n",
            )
        title, entries = found
        print(f"{title} of `{parser.prog}`:\n{table(entries)}")
        parser.exit()


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Leaves out the argument for settings: the usage shows it and the page's end explains it."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=columns())

    def add_argument(self, action: argparse.Action) -> None:
        if action.dest != "settings":
            super().add_argument(action)


def columns() -> int:
    """Characters in a line: the terminal's, at most WIDTH."""
    return min(shutil.get_terminal_size((WIDTH, 0)).columns, WIDTH)


def settings_page(config_class: type) -> str:
    """The first screen's settings: all if they are few, else the common ones and the sections."""
    entries, parts = describe(config_class), sections(config_class)
    if len(entries) <= FEW:
        return f"settings (key=value, after any YAML file):\n{table(entries)}"
    lines = ["the most used settings (key=value, after any YAML file):"]
    common = [entry for entry in entries if entry.common]
    longest = max((len(entry.key) for entry in common), default=0)
    for entry in common:
        meaning = brief(entry.meaning, columns() - longest - len(entry.default) - 7)
        lines.append(f"  {entry.key:<{longest}}  {meaning} [{entry.default}]")
    lines.append("")
    if parts:
        lines.append(
            f"all {len(entries)}, by section (--help SECTION: its settings; --help WORD: those "
            f"with a word; --help {ALL}):"
        )
        longest = max(len(part.key) for part in parts)
        room = columns() - longest - 8
        lines += [f"  {p.key:<{longest}} {p.count:>3}  {brief(p.meaning, room)}" for p in parts]
    else:
        lines.append(
            f"all {len(entries)} settings: --help {ALL}; those with a word in their name or "
            "meaning: --help WORD"
        )
    return "\n".join(lines)


def look_up(config_class: type, word: str) -> tuple[str, list[Described]] | None:
    """What `--help WORD` lists, with its title: all, a section, or settings with the word."""
    entries = describe(config_class)
    if word == ALL:
        return f"all {len(entries)} settings", entries
    inside = [entry for entry in entries if entry.key == word or entry.key.startswith(f"{word}.")]
    if any(entry.key != word for entry in inside):
        return f"{_count(inside)} of section {word}", inside
    found = [
        entry
        for entry in entries
        if word.lower() in f"{entry.key}\n{entry.key.replace('_', ' ')}\n{entry.meaning}".lower()
    ]
    return (f"{_count(found)} with '{word}'", found) if found else None


def table(entries: Sequence[Described]) -> str:
    """Each setting in full: its key, then its meaning, its default and what it may be."""
    wrap = textwrap.TextWrapper(columns(), initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(
        f"  {entry.key}\n{wrap.fill(f'{entry.meaning} [{_range(entry)}]')}" for entry in entries
    )


def brief(meaning: str, room: int) -> str:
    """A meaning's beginning, in whole clauses or else words, in at most `room` characters."""
    if len(meaning) <= room:
        return meaning
    for mark in (". ", "; ", ": ", ", "):
        end = "..." if mark == ", " else "."
        cut = meaning.rfind(mark, 0, room - len(end) + len(mark))
        # Neither a clause too short to say anything, such as "wsd: ...", nor half of a parenthesis.
        while cut > room // 3:
            if meaning.count("(", 0, cut) == meaning.count(")", 0, cut):
                return meaning[:cut] + end
            cut = meaning.rfind(mark, 0, cut)
    return textwrap.shorten(meaning, max(room, 4), placeholder="...")


def _range(entry: Described) -> str:
    return f"{entry.default}; {entry.allowed}" if entry.allowed else entry.default


def _count(entries: Sequence[Described]) -> str:
    return f"{len(entries)} setting{'' if len(entries) == 1 else 's'}"


def _hint(config_class: type, word: str) -> str:
    keys = [entry.key for entry in describe(config_class)]
    prefixes = {key[:place] for key in keys for place, letter in enumerate(key) if letter == "."}
    names = [*sorted(prefixes), *keys, *(key.rpartition(".")[2] for key in keys)]
    usual = meant(word, keys) if word in USUAL_NAMES else []
    close = usual or difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.5)
    end = f"did you mean '{close[0]}'?" if close else f"--help {ALL} lists them."
    return f"in its name or meaning; {end}"
