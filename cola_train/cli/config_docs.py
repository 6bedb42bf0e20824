"""Writes docs/config.md: `python -m cola_train.cli.config_docs > docs/config.md`."""

import argparse
import dataclasses
import inspect
import sys
from collections.abc import Iterator

from cola_train.cli import make_parser
from cola_train.config.describe import Described, describe, sections

COMMAND = "python -m cola_train.cli.config_docs > docs/config.md"
_HEAD = f"""\
# Settings

All settings of all verbs, with defaults and meanings. They come from a YAML file, then from
`key=value` arguments: `optim.learning_rate=1e-3` after `cola-train joint my.yaml` is what
`optim: {{learning_rate: 1e-3}}` is in that file. A *required* setting must be given; NAME stands
for a name of your choice. *Allowed* is the range of a number, or the words to choose from. A text
is taken as it is written (`name=007`, `name=no`), and a whole number may be written `1e3`. A key
may stand only once in a file, and nothing such as `${{HOME}}` is replaced. A YAML file may also
come through a pipe, as in `cola-train joint <(command)`.

In the terminal `cola-train VERB --help` shows the most used settings, `--help WORD` those of a
section or with a word.

This page is made from the code; after a change to a setting run `{COMMAND}`.
"""


def page() -> str:
    """The whole of docs/config.md.

    A setting that several verbs share, because one class declares it for all of them, is listed
    once, before the first of them.
    """
    verbs: dict[type, list[str]] = {}
    for name, config_class in settings_verbs(make_parser()):
        verbs.setdefault(config_class, []).append(name)
    owners = {config_class: _owners(config_class) for config_class in verbs}
    parts, listed = [_HEAD], set()
    for config_class, declared_by in owners.items():
        classes = list(dict.fromkeys(declared_by.values()))
        for owner in classes:
            if owner in listed:
                continue
            listed.add(owner)
            users = [name for c in verbs if owner in owners[c].values() for name in verbs[c]]
            fields = {field for field, declares in declared_by.items() if declares is owner}
            if owner in verbs:
                shared = [other for other in classes if other is not owner]
                parts += [f"## {_verbs(users)}\n", _introduction(owner, shared)]
            else:
                parts += [f"## {_title(owner)}\n", f"Settings of {_verbs(users)}.\n"]
            parts += _tables(config_class, fields)
    return "\n".join(parts)


def settings_verbs(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, type]]:
    """The verbs that take settings, with their config classes, in the order of the help."""
    config_class = parser.get_default("config_class")
    if config_class is not None:
        yield name, config_class
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb, inner in action.choices.items():
                yield from settings_verbs(inner, f"{name} {verb}".strip())


def _owners(config_class: type) -> dict[str, type]:
    """By name of a field, the class that declares it."""
    return {
        field.name: next(
            base for base in config_class.__mro__ if field.name in inspect.get_annotations(base)
        )
        for field in dataclasses.fields(config_class)
    }


def _title(config_class: type) -> str:
    first = (inspect.getdoc(config_class) or config_class.__name__).partition("\n")[0]
    return first.partition(": ")[0].rstrip(".")


def _verbs(names: list[str]) -> str:
    return ", ".join(f"`cola-train {name}`" for name in names)


def _introduction(owner: type, shared: list[type]) -> str:
    text = (inspect.getdoc(owner) or "").replace("\n", " ")
    # The heading has the verb already.
    meaning = text.partition("`: ")[2] if text.startswith("`cola-train ") else text
    introduction = f"{meaning[0].upper()}{meaning[1:]}"
    if shared:
        titles = " and ".join(f"*{_title(other)}*" for other in shared)
        introduction += f" It also takes the settings above under {titles}."
    return f"{introduction}\n"


def _tables(config_class: type, fields: set[str]) -> list[str]:
    entries = [entry for entry in describe(config_class) if entry.key.partition(".")[0] in fields]
    plain = [entry for entry in entries if "." not in entry.key]
    tables = [_table(plain)] if plain else []
    for part in sections(config_class):
        if part.key in fields:
            inside = [entry for entry in entries if entry.key.startswith(f"{part.key}.")]
            tables.append(f"### {part.key}\n\n{part.meaning}\n\n{_table(inside)}")
    return tables


def _table(entries: list[Described]) -> str:
    lines = ["| setting | default | allowed | meaning |", "| --- | --- | --- | --- |"]
    for entry in entries:
        default = "*required*" if entry.default == "required" else f"`{entry.default}`"
        cells = (f"`{entry.key}`", default, entry.allowed, entry.meaning)
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.stdout.write(page())
