"""Writes docs/config.md from the verbs' settings: `python -m cola_train.cli.config_docs >
docs/config.md`.
"""

import argparse
import dataclasses
import inspect
import sys
from collections.abc import Iterator

from cola_train.cli import make_parser
from cola_train.config.describe import Described, DescribedSection, describe, sections

COMMAND = "python -m cola_train.cli.config_docs > docs/config.md"
_HEAD = f"""\
# Settings

All settings of all verbs, with defaults and meanings. They come from a YAML file, then from
`key=value` arguments: `optim.learning_rate=1e-3` after `cola-train joint my.yaml` is what
`optim: {{learning_rate: 1e-3}}` is in that file. A *required* setting must be given; NAME stands
for a name of your choice. In the terminal `cola-train VERB --help` shows the most used settings,
`--help WORD` those of a section or with a word.

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
    for config_class in verbs:
        for owner in dict.fromkeys(owners[config_class].values()):
            if owner in listed:
                continue
            listed.add(owner)
            users = [
                name
                for other, names in verbs.items()
                if owner in owners[other].values()
                for name in names
            ]
            own = {
                field for field, declared_by in owners[config_class].items() if declared_by is owner
            }
            heading = _verbs(users) if owner in verbs else _title(owner)
            shared = [
                part
                for part in dict.fromkeys(owners[config_class].values())
                if part is not owner and owner in verbs
            ]
            parts.append(f"## {heading}\n")
            parts.append(_introduction(owner, users, shared, is_verb=owner in verbs))
            parts += _tables(config_class, own)
    return "\n".join(parts)


def settings_verbs(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, type]]:
    """The verbs that take settings, with their config classes, in the order of `cola-train
    --help`.
    """
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
    return (
        (inspect.getdoc(config_class) or config_class.__name__)
        .partition("\n")[0]
        .partition(": ")[0]
        .rstrip(".")
    )


def _verbs(names: list[str]) -> str:
    return ", ".join(f"`cola-train {name}`" for name in names)


def _introduction(owner: type, users: list[str], shared: list[type], *, is_verb: bool) -> str:
    if not is_verb:
        return f"Settings of {_verbs(users)}.\n"
    text = (inspect.getdoc(owner) or "").replace("\n", " ")
    # The heading has the verb already.
    meaning = text.partition("`: ")[2] if text.startswith("`cola-train ") else text
    lines = [f"{meaning[0].upper()}{meaning[1:]}"]
    if shared:
        lines.append(
            "It also takes the settings above under "
            f"{' and '.join(f'*{_title(other)}*' for other in shared)}."
        )
    return " ".join(lines) + "\n"


def _tables(config_class: type, fields: set[str]) -> list[str]:
    entries = [entry for entry in describe(config_class) if entry.key.partition(".")[0] in fields]
    parts = [part for part in sections(config_class) if part.key in fields]
    tables = []
    plain = [entry for entry in entries if "." not in entry.key]
    if plain:
        tables.append(_table(plain))
    tables += [
        _section(part, [entry for entry in entries if entry.key.startswith(f"{part.key}.")])
        for part in parts
    ]
    return tables


def _section(part: DescribedSection, entries: list[Described]) -> str:
    return f"### {part.key}\n\n{part.meaning}\n\n{_table(entries)}"


def _table(entries: list[Described]) -> str:
    rows = [
        f"| `{entry.key}` | {_default(entry)} | {entry.meaning.replace('|', '&#124;')} |"
        for entry in entries
    ]
    return "\n".join(["| setting | default | meaning |", "| --- | --- | --- |", *rows, ""])


def _default(entry: Described) -> str:
    return (
        "*required*" if entry.default == "required" else f"`{entry.default}`".replace("|", "&#124;")
    )


if __name__ == "__main__":
    sys.stdout.write(page())
